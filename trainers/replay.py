"""Replay: judges logged answers again, with another constitution or critic, and reports what changes.

This is a regression test for constitutions. The log is only read. Each judgement is written at once to a
separate file, so that an interrupted replay resumes; the file belongs to one constitution and one critic.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from cai_graph import local
from cai_graph.calls import UNATTENDED_SECONDS, Budget, Calls
from cai_graph.concurrency.together import side_by_side, until
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic, failed_principles
from cai_graph.errors import ConfigError, DataError
from cai_graph.failures import describe, is_about_all_rows
from cai_graph.log import Filters, Log
from cai_graph.log.redaction import is_withheld
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Critique, Label, Message, Outcome, Trajectory, text_of
from trainers import lines
from trainers.feedback.positions import Share
from trainers.identity import weights_of

__all__ = ["Answer", "Change", "Example", "Judged", "Replay", "Report", "answers_of", "standing"]

Standing = Literal["violates", "complies", "unreadable", "unjudged"]
"""The overall result of a critique of an answer, in one word."""

Change = Literal["newly violates", "cleared", "now unreadable"]
"""`newly violates`: complied in the log. `cleared`: violated in the log and complies now."""


class Answer(NamedTuple):
    """An answer from the log."""

    trajectory_id: str
    """Id of the Trajectory that contains it."""
    outcome: str
    """Outcome of that Trajectory."""
    of: Literal["draft", "released"]
    """Whether it is the draft, or the revision (or a person's answer) that was released instead."""
    exchange: Exchange
    """The answer, in its conversation."""
    before: Critique | None
    """The critique in the log; None if the answer was not judged."""
    passed: bool
    """Whether the run accepted it under the thresholds of that constitution."""
    constitution: str
    """Digest of the constitution that judged it."""

    @property
    def key(self) -> str:
        """Unique key of the answer."""
        return f"{self.trajectory_id}/{self.of}"


class Judged(NamedTuple):
    """The result of judging one answer again."""

    answer: Answer
    """The answer."""
    before: Standing
    """The result in the log."""
    after: Standing
    """The result now; `unjudged` if judging failed."""
    failed: str | None = None
    """Class and message of the error, if judging failed."""


def answers_of(trajectory: Trajectory) -> Iterator[Answer]:
    """Yield the draft, and the answer that was released instead of it, unless that is the refusal."""
    if trajectory.draft is None or is_withheld(trajectory):
        return

    gated = trajectory.mode != "sampled"  # in sampled mode every revision is taken, whatever its verdicts

    def answer(
        of: Literal["draft", "released"], message: Message, before: Critique | None, passed: bool
    ) -> Answer:
        exchange = Exchange(messages=trajectory.messages, answer=message, context=trajectory.context)
        outcome, digest = trajectory.outcome.value, trajectory.constitution.digest
        return Answer(trajectory.id, outcome, of, exchange, before, passed and gated, digest)

    rounds = trajectory.rounds
    judged, was_kept = rounds[0].critique if rounds else None, trajectory.outcome is Outcome.KEPT
    yield answer("draft", trajectory.draft.answer, judged, was_kept)
    if trajectory.released is not None and trajectory.released_from in ("revision", "human"):
        revisions = [revision for round_ in rounds for revision in round_.revisions]
        same = [r for r in revisions if text_of(r.answer) == text_of(trajectory.released)]
        critique, accepted = (same[-1].critique, same[-1].accepted) if same else (None, False)
        yield answer("released", trajectory.released, critique, accepted)


def standing(critique: Critique | None, rules: Constitution | None, *, passed: bool = False) -> Standing:
    """Return the overall result of a critique, in one word.

    Args:
        critique: the critique.
        rules: the constitution it was made with, whose severity thresholds apply; None if it is not
            available.
        passed: without rules, whether the run accepted the answer: then a violation with a severity was
            below its threshold, and does not count. If False, every VIOLATES counts.
    """
    if critique is None or not critique.verdicts:
        return "unjudged"
    if rules is not None:
        violates = bool(failed_principles(critique, rules))
    else:
        found = [verdict for verdict in critique.verdicts if verdict.label is Label.VIOLATES]
        violates = any(not passed or verdict.severity is None for verdict in found)
    if violates:
        return "violates"
    unread = any(verdict.label is Label.UNREADABLE for verdict in critique.verdicts)
    return "unreadable" if unread else "complies"


class Replay:
    """Judges the answers of a log again.

    Attributes:
        total: number of answers.
        done: how many of them an earlier replay has judged.
        path: the file of the judgements.
        report: what changes, including the judgements of earlier replays.
    """

    def __init__(
        self,
        log: Log,
        critic: Critic,
        constitution: Constitution,
        *,
        kept: Path | None = None,
        filters: Filters | None = None,
        limit: int | None = None,
        seed: int = 0,
        examples: int = 3,
    ) -> None:
        """Read the log once, and the judgements of an earlier replay.

        Args:
            log: only read.
            critic: judges the answers now.
            constitution: the critic judges by it.
            kept: file of the judgements; None: one in the local cache.
            filters: which Trajectories to read.
            limit: only this many of them, drawn by `seed` and their ids: the same ones each time.
            seed: of that draw.
            examples: how many examples to keep of each change.

        Raises:
            ConfigError: the file belongs to another constitution or critic.
            DataError: the file cannot be read or written, or another replay is writing it.
            LogError: the log cannot be read.
        """
        self._log, self._critic, self._rules = log, critic, constitution
        self._filters: Filters = {**(filters or {}), "kind": "trajectory"}
        self._chosen = None if limit is None else self._draw(limit, seed)
        shaping = {"constitution": constitution.digest, "critic": critic.name}
        if weights := weights_of(getattr(critic, "model", None)):
            shaping["weights"] = weights
        digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
        self.path = kept or local.cache_dir() / "replay" / f"{digest[:16]}.jsonl"
        self._kept = _Judgements(self.path, shaping)
        self.report = Report(examples=examples)
        self.total = self.done = 0
        for answer in self._answers():
            self.total += 1
            if (critique := self._kept.get(answer.key)) is not None:
                self.done += 1
                self._count(answer, critique)

    async def results(
        self, concurrency: int, *, stopped: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[Judged, None]:
        """Yield the result of each answer that was not judged before, as soon as it is there.

        Args:
            concurrency: how many answers are judged at once.
            stopped: once it returns True, no further answer is started, and those in progress are finished.

        Raises:
            DataError: another replay is writing the file.
            Exception: an error that would fail every further answer, such as a rejected API key.
        """
        waiting = (answer for answer in self._answers() if self._kept.get(answer.key) is None)
        with self._kept.alone():
            async with contextlib.aclosing(
                side_by_side(until(waiting, stopped), self._judge, concurrency)
            ) as ended:
                async for result in ended:
                    yield result

    async def _judge(self, answer: Answer) -> Judged:
        try:
            calls = Calls(Budget(seconds=UNATTENDED_SECONDS))
            critique = await self._critic.critique(answer.exchange, self._rules, calls, explain=False)
        except Exception as error:
            if is_about_all_rows(error, succeeded=self.report.judged > 0):
                raise
            self.report.failed += 1
            return Judged(answer, self._before(answer), "unjudged", describe(error))
        self._kept.add(answer.key, critique)
        return self._count(answer, critique)

    def _count(self, answer: Answer, critique: Critique) -> Judged:
        judged = Judged(answer, self._before(answer), standing(critique, self._rules))
        self.report.add(judged, critique)
        return judged

    def _before(self, answer: Answer) -> Standing:
        rules = self._rules if answer.constitution == self._rules.digest else None
        return standing(answer.before, rules, passed=answer.passed)

    def _trajectories(self) -> Iterator[Trajectory]:
        for record in self._log.read(**self._filters):
            assert isinstance(record, Trajectory)
            yield record

    def _answers(self) -> Iterator[Answer]:
        for trajectory in self._trajectories():
            if self._chosen is None or trajectory.id in self._chosen:
                yield from answers_of(trajectory)

    def _draw(self, limit: int, seed: int) -> set[str]:
        ids = (trajectory.id for trajectory in self._trajectories() if any(answers_of(trajectory)))
        return set(
            heapq.nsmallest(limit, ids, key=lambda id: hashlib.sha256(f"{seed}/{id}".encode()).digest())
        )


class _Judgements:
    """Judgements in a JSON Lines file: a header with constitution and critic, then one judgement per line."""

    def __init__(self, path: Path, belongs: Mapping[str, str]) -> None:
        self._path = path
        self._found: dict[str, Critique] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            head = {"replay": dict(belongs)}
            with self.alone():
                self._check(belongs)  # before a torn line is cut off: the file may be something else entirely
                rows = lines.resume(path, "name another file")
                if not rows:
                    lines.append(path, head)
            for row in rows:
                if row != head:  # two replays that created the file at the same time both wrote a header
                    self._found[row["answer"]] = msgspec.convert(row["critique"], Critique)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, msgspec.ValidationError) as error:
            raise DataError(
                f"{path}: holds no judgements of a replay ({error}); name another file"
            ) from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the file against every other replay while the body runs.

        Raises:
            DataError: another one is writing it.
            OSError: it cannot be written.
        """
        # Readable by its owner only, since critics quote what users wrote.
        with open(self._path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(f"{self._path}: another replay is writing it; wait for its end") from error
            yield

    def _check(self, belongs: Mapping[str, str]) -> None:
        with self._path.open("rb") as file:
            first = file.readline()
        if lines.text([{"replay": belongs}]).encode().startswith(first):  # a kill may have truncated it
            return
        head = json.loads(first)["replay"]
        if head != belongs:
            other = "constitution" if head.get("constitution") != belongs["constitution"] else "critic"
            raise ConfigError(f"{self._path}: belongs to a replay with another {other}; name another file")

    def get(self, key: str) -> Critique | None:
        return self._found.get(key)

    def add(self, key: str, critique: Critique) -> None:
        self._found[key] = critique
        lines.append(self._path, {"answer": key, "critique": msgspec.to_builtins(critique)})


# --- what changes -------------------------------------------------------------------------------------


class Example(NamedTuple):
    """One answer whose result has changed."""

    trajectory_id: str
    """Id of its Trajectory."""
    of: str
    """`draft` or `released`."""
    prompt: str
    """The user's request."""
    answer: str
    """The answer's text."""
    principles: tuple[str, ...]
    """Principles (by id) or aims that it violates now or, if it was cleared, violated in the log."""
    reason: str
    """The critic's reasons: those of now, or those in the log."""


@dataclass
class PrincipleChange:
    """One principle or aim, over the answers that were judged by it in the log and now."""

    compared: int = 0
    """Answers with a readable verdict both in the log and now."""
    before: int = 0
    """Those of them that violated it in the log."""
    after: int = 0
    """Those of them that violate it now."""
    newly: int = 0
    """Those that complied in the log and violate it now."""
    cleared: int = 0
    """Those that violated it in the log and comply now."""
    only_then: int = 0
    """Answers with a verdict on it only in the log."""
    only_now: int = 0
    """Answers with a verdict on it only now."""
    violates_only_now: int = 0
    """The `only_now` answers that violate it."""


@dataclass
class OutcomeChange:
    """The answers of all requests with the same outcome."""

    drafts: int = 0
    """Drafts judged now."""
    drafts_before: int = 0
    """Drafts that violate according to the log."""
    drafts_after: int = 0
    """Drafts that violate now."""
    drafts_unreadable: int = 0
    """Drafts that are unreadable now."""
    released: int = 0
    """Released revisions judged now."""
    released_after: int = 0
    """Released revisions that violate now."""


@dataclass
class Report:
    """The results of a replay."""

    examples: int = 3
    """How many examples to keep of each change."""
    standings: Counter[tuple[Standing, Standing]] = field(default_factory=Counter)
    """Number of answers by (result in the log, result now)."""
    principles: dict[str, PrincipleChange] = field(default_factory=dict)
    """Changes by id of a principle, or by aim."""
    outcomes: dict[str, OutcomeChange] = field(default_factory=dict)
    """Changes by outcome of the request."""
    shown: dict[Change, list[Example]] = field(default_factory=dict)
    """Examples of each change."""
    failed: int = 0
    """Answers that could not be judged."""

    def add(self, judged: Judged, critique: Critique) -> None:
        """Count one answer."""
        before, after, answer = judged.before, judged.after, judged.answer
        self.standings[before, after] += 1
        self._add_principles(answer.before, critique)
        ended = self.outcomes.setdefault(answer.outcome, OutcomeChange())
        if answer.of == "draft":
            ended.drafts += 1
            ended.drafts_before += before == "violates"
            ended.drafts_after += after == "violates"
            ended.drafts_unreadable += after == "unreadable"
        else:
            ended.released += 1
            ended.released_after += after == "violates"
        change: Change | None = None
        if (before, after) == ("complies", "violates"):
            change = "newly violates"
        elif (before, after) == ("violates", "complies"):
            change = "cleared"
        elif after == "unreadable" and before in ("complies", "violates"):
            change = "now unreadable"
        if change is not None and len(self.shown.setdefault(change, [])) < self.examples:
            self.shown[change].append(_example(answer, critique if after == "violates" else answer.before))

    def _add_principles(self, before: Critique | None, after: Critique) -> None:
        then, now_ = _labels(before), _labels(after)
        for name in then.keys() | now_.keys():
            row = self.principles.setdefault(name, PrincipleChange())
            old, new = then.get(name), now_.get(name)
            if old is None:
                row.only_now += 1
                row.violates_only_now += new is Label.VIOLATES
            elif new is None:
                row.only_then += 1
            elif Label.UNREADABLE not in (old, new):
                row.compared += 1
                row.before += old is Label.VIOLATES
                row.after += new is Label.VIOLATES
                row.newly += old is not new and new is Label.VIOLATES
                row.cleared += old is not new and old is Label.VIOLATES

    @property
    def judged(self) -> int:
        """Number of answers judged now."""
        return self.standings.total()

    @property
    def newly(self) -> int:
        """Number of answers that complied in the log and violate now."""
        return self.standings["complies", "violates"]

    @property
    def cleared(self) -> int:
        """Number of answers that violated in the log and comply now."""
        return self.standings["violates", "complies"]

    @property
    def now_unreadable(self) -> int:
        """Number of answers that were readable in the log and are not now."""
        return sum(self.standings[before, "unreadable"] for before in ("complies", "violates"))

    def share(self, when: Literal["before", "after"]) -> Share:
        """Return the share that violates, among the answers that were readable in the log and are now."""
        place = 0 if when == "before" else 1
        readable = {k: n for k, n in self.standings.items() if set(k) <= {"complies", "violates"}}
        return Share(sum(n for k, n in readable.items() if k[place] == "violates"), sum(readable.values()))

    def summary(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {
            "judged": self.judged,
            "failed": self.failed,
            "violates": {when: self.share(when).json() for when in ("before", "after")},
            "newly_violates": self.newly,
            "cleared": self.cleared,
            "now_unreadable": self.now_unreadable,
            "standings": [
                {"before": before, "after": after, "answers": count}
                for (before, after), count in sorted(self.standings.items())
            ],
            "principles": {name: vars(row) for name, row in sorted(self.principles.items())},
            "outcomes": {name: vars(row) for name, row in sorted(self.outcomes.items())},
            "examples": {change: [one._asdict() for one in found] for change, found in self.shown.items()},
        }


def _labels(critique: Critique | None) -> dict[str, Label]:
    verdicts = () if critique is None else critique.verdicts
    return {verdict.about: verdict.label for verdict in verdicts if verdict.about is not None}


def _example(answer: Answer, critique: Critique | None) -> Example:
    verdicts = () if critique is None else critique.verdicts
    reasons = [v.reason for v in verdicts if v.label is Label.VIOLATES and v.reason]
    return Example(
        answer.trajectory_id,
        answer.of,
        answer.exchange.request,
        text_of(answer.exchange.answer),
        () if critique is None else critique.violated,
        " ".join(reasons) or ("" if critique is None else critique.reasoning),
    )
