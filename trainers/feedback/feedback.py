"""AI feedback over a log: a judge compares pairs of answers to logged prompts; Comparisons are appended.

    pairs_of     selects the answers of a Trajectory to compare
    Labelling    makes and appends the comparisons that a log still lacks; resumes where it stopped
    p_a_of       a critic's judgements of two answers, as a preference; p_violates, of one answer

Two labellings are the same if the judge and everything that affects its answers are the same, including the
weights in a file of the user's own. A comparison's key in the log is
`label:SETTINGS/TRAJECTORY/PAIR/PRINCIPLE`, so that a killed labelling repeats nothing, and one with more
samples or principles adds to the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any, Literal, NamedTuple

import msgspec
from langchain_core.language_models import BaseChatModel

from cai_graph import models
from cai_graph.calls import UNATTENDED_SECONDS, Budget, Calls
from cai_graph.concurrency.together import side_by_side, until
from cai_graph.constitution import Constitution, Principle
from cai_graph.critic import Critic, failed_principles
from cai_graph.errors import ConfigError, ModelError
from cai_graph.failures import describe, is_about_all_rows
from cai_graph.log import Log
from cai_graph.log.redaction import is_withheld
from cai_graph.messages import cut_short, from_langchain, to_langchain
from cai_graph.prompts import Exchange
from cai_graph.trajectory import (
    Call,
    Comparison,
    ConstitutionRef,
    Critique,
    Label,
    Message,
    Outcome,
    Rejection,
    Trajectory,
    Verdict,
    new_id,
    now,
    revision_name,
    text_of,
)
from trainers.config import at_least
from trainers.dataset.compared import same_answer
from trainers.feedback.judge import Judge, Opinion
from trainers.feedback.positions import Positions, decided
from trainers.identity import weights_of

__all__ = [
    "BAND",
    "Config",
    "Labelled",
    "Labelling",
    "Pair",
    "PairKind",
    "draw",
    "p_a_of",
    "p_violates",
    "pairs_of",
]

PairKind = Literal["revision", "rejected", "samples"]
"""`revision`: the last accepted revision against the draft. `rejected`: each rejected candidate against the
answer that was current at the time. `samples`: answers sampled anew from a model, each against each."""

BAND = (0.4, 0.6)
"""Band for a judge that reasons, since its probabilities are nearly always 0 or 1 (Bai et al. 2022, 4.1)."""

_NO_ANSWERS = (
    Rejection.EMPTY,
    Rejection.TRUNCATED,
    Rejection.UNCHANGED,
    Rejection.NO_REWRITE,
    Rejection.BAD_SCHEMA,
)
"""Reasons of rejection for texts that are not complete answers; comparing them teaches nothing."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a labelling."""

    pairs: tuple[PairKind, ...] = ("revision",)
    """The kinds of pairs to compare."""
    principles: int = 1
    """Principles per pair, drawn by weight without repetition; the paper draws one."""
    samples: int = 2
    """Answers sampled per prompt, for pairs of `samples`: N give N(N − 1)/2 pairs."""
    seed: int = 0
    """Seed of the draw of principles."""
    band: tuple[float, float] | None = BAND
    """Band that the probabilities of a judge that reasons are clamped to; None: no clamping."""
    limit: int | None = None
    """Process only this many trajectories, from the first."""
    seconds: float = UNATTENDED_SECONDS
    """Deadline for all comparisons of one trajectory."""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ConfigError("pairs: name at least one of revision, rejected, samples")
        at_least(1, self, "principles", "limit")
        at_least(2, self, "samples")
        if self.band is not None and not 0 <= self.band[0] <= 0.5 <= self.band[1] <= 1:
            raise ConfigError(f"band is two probabilities around 0.5, such as 0.4 and 0.6, found {self.band}")


# --- pairs --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two answers to compare."""

    answers: tuple[Message, Message]
    """A and B."""
    origins: tuple[str, str]
    """Where they come from, in the form of `Comparison.origins`."""


def pairs_of(trajectory: Trajectory, kinds: Sequence[PairKind]) -> list[Pair]:
    """Return the pairs of answers in a Trajectory, of the given kinds.

    Texts that are not answers (empty, cut off, a remark about the revision) and identical pairs are left out.
    """
    draft = trajectory.draft
    if draft is None or draft.truncated or draft.unfinished:
        return []
    if trajectory.outcome is Outcome.FAILED or is_withheld(trajectory):
        return []
    pairs = []
    standing = ("draft", draft.answer)
    for number, round_ in enumerate(trajectory.rounds):
        candidates = [(revision_name(number, i), revision) for i, revision in enumerate(round_.revisions)]
        accepted = [(origin, revision.answer) for origin, revision in candidates if revision.accepted]
        better = accepted[0] if accepted else standing
        if "rejected" in kinds:
            pairs += [
                _pair((origin, revision.answer), better)
                for origin, revision in candidates
                if not revision.accepted and revision.rejection not in _NO_ANSWERS
            ]
        standing = better
    if "revision" in kinds and standing[0] != "draft":
        pairs.insert(0, _pair(("draft", draft.answer), standing))
    return [pair for pair in pairs if not _empty(pair) and not same_answer(*pair.answers)]


def _pair(a: tuple[str, Message], b: tuple[str, Message]) -> Pair:
    return Pair((a[1], b[1]), (a[0], b[0]))


def _empty(pair: Pair) -> bool:
    return any(not text_of(answer).strip() and not answer.tool_calls for answer in pair.answers)


def draw(constitution: Constitution, count: int, seed: int, pair: str) -> list[Principle]:
    """Return `count` principles for a pair, drawn by weight without repetition.

    The draw depends only on seed and pair; a larger count extends the result of a smaller one.

    Source: Efraimidis and Spirakis 2006: the items with the largest keys u^(1/w) are a weighted sample.
    """
    chance = random.Random(f"{seed}/{pair}")
    keys = {p.id: math.log(1 - chance.random()) / p.weight for p in constitution.principles}
    return sorted(constitution.principles, key=lambda p: -keys[p.id])[:count]


# --- labelling ----------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """The result for one Trajectory."""

    trajectory: Trajectory
    """The Trajectory."""
    comparisons: tuple[Comparison, ...]
    """Comparisons made now, and committed to the log."""
    failed: str | None = None
    """Class and message of the error that ended it; the next run tries the remaining ones again."""


class Labelling:
    """Makes the comparisons that a log still lacks, with a judge.

    Attributes:
        total: number of trajectories with answers to compare, up to the limit.
        done: number of those that are complete.
        positions: statistics of the judge's comparisons, including earlier runs.
    """

    def __init__(
        self,
        log: Log,
        judge: Judge | Critic,
        constitution: Constitution,
        config: Config,
        *,
        sampler: BaseChatModel | None = None,
        sampling: str = "",
    ) -> None:
        """Read the log once, so that errors in the setup are raised before the first call.

        Args:
            log: read, and appended to.
            judge: a Judge that compares, or a Critic that judges each answer alone under the whole
                constitution.
            constitution: its preference questions are asked.
            config: see `Config`.
            sampler: the model that samples answers, for pairs of `samples`.
            sampling: the sampler's settings as text; other settings make another labelling.

        Raises:
            ConfigError: samples are configured without a sampler, or the constitution has fewer principles
                than are to be drawn.
            LogError: the log cannot be read.
        """
        if ("samples" in config.pairs) != (sampler is not None):
            raise ConfigError("pairs of the kind 'samples' and the model that answers go together; name both")
        if config.principles > len(constitution):
            raise ConfigError(
                f"{config.principles} principles a pair, and {constitution.name!r} has {len(constitution)}"
            )
        self._log, self._judge, self._constitution, self._config = log, judge, constitution, config
        self._sampler = sampler
        self._sampler_name = "" if sampler is None else models.name_of(sampler)
        self._settings = {
            "seed": config.seed,
            "sampler": self._sampler_name,
            "sampling": sampling,
            **({"reasoning": judge.reasoning, "votes": judge.votes} if isinstance(judge, Judge) else {}),
        }
        shaping: list[Any] = [constitution.digest, judge.name, type(judge).__name__, self._settings]
        # Added only if there are any, so that the keys of all other labellings already in logs still match.
        own = [weights_of(model) for model in (getattr(judge, "model", None), sampler)]
        if any(own):
            shaping.append({"weights": own})
        if isinstance(judge, Judge) and judge.reasoning and config.band != BAND:
            shaping.append({"band": config.band})
        digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode("ascii")).hexdigest()
        self.prefix = f"label:{digest[:16]}/"
        self.positions = Positions(judge.name)
        self._people = decided(log)
        self._known: set[str] = set()
        self._succeeded = False
        for record in log.read(kind="comparison"):
            if (record.source or "").startswith(self.prefix):
                self._known.add(record.source or "")
                self.positions.add(record, self._people.get(record.trajectory_id))
        self.total = self.done = 0
        for trajectory in self._trajectories():
            wanted = self._wanted(trajectory)
            self.total += bool(wanted)
            self.done += bool(wanted) and self._known.issuperset(wanted)

    async def results(
        self, concurrency: int, *, stopped: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[Labelled, None]:
        """Yield the result for each Trajectory that is not complete, as soon as it is there.

        Args:
            concurrency: how many are processed at once.
            stopped: once it returns True, no further one is started, and those in progress are finished.

        Raises:
            ConfigError, MissingExtra, LogError: an error that would fail every further one.
            Exception: such an error of a provider, for example a rejected API key.
        """
        begun = until((t for t in self._trajectories() if not self._done(t)), stopped)
        async with contextlib.aclosing(side_by_side(begun, self._label, concurrency)) as ended:
            async for result in ended:
                yield result

    def _trajectories(self) -> Iterator[Trajectory]:
        return islice(self._log.read(kind="trajectory"), self._config.limit)

    def _done(self, trajectory: Trajectory) -> bool:
        return self._known.issuperset(self._wanted(trajectory))

    def _wanted(self, trajectory: Trajectory) -> list[str]:
        origins = [pair.origins for pair in pairs_of(trajectory, self._config.pairs)]
        if self._samples(trajectory):
            origins += combinations(self._sample_origins, 2)
        return [key for pair in origins for key, _ in self._asked(trajectory, pair)]

    def _samples(self, trajectory: Trajectory) -> bool:
        if "samples" not in self._config.pairs or is_withheld(trajectory):
            return False
        # A failed request is not sampled: once it is answered, that is another trajectory.
        asked = any(message.role == "user" for message in trajectory.messages)
        return asked and trajectory.outcome is not Outcome.FAILED

    @property
    def _sample_origins(self) -> list[str]:
        return [f"sample:{index}:{self._sampler_name}" for index in range(self._config.samples)]

    def _asked(self, trajectory: Trajectory, origins: tuple[str, str]) -> list[tuple[str, Principle | None]]:
        """Return the keys of a pair's comparisons, each with the principle to ask about."""
        pair = f"{trajectory.id}/{origins[0]}~{origins[1]}"
        if not isinstance(self._judge, Judge):  # a critic judges by all principles at once
            return [(f"{self.prefix}{pair}/", None)]
        drawn = draw(self._constitution, self._config.principles, self._config.seed, pair)
        return [(f"{self.prefix}{pair}/{principle.id}", principle) for principle in drawn]

    async def _label(self, trajectory: Trajectory) -> Labelled:
        made: list[Comparison] = []
        work = _Work(trajectory, Calls(Budget(calls=None, forward_passes=None, seconds=self._config.seconds)))
        try:
            pairs = pairs_of(trajectory, self._config.pairs)
            if self._samples(trajectory):
                pairs += await self._sample_pairs(work)
            for pair in pairs:
                for key, principle in self._asked(trajectory, pair.origins):
                    if key in self._known:
                        continue
                    comparison = await self._compared(work, pair, principle, key)
                    await self._log.append(comparison)
                    self.positions.add(comparison, self._people.get(work.trajectory.id))
                    made.append(comparison)
                    self._succeeded = True
        except Exception as error:
            if is_about_all_rows(error, succeeded=self._succeeded):
                raise
            return Labelled(trajectory, tuple(made), describe(error))
        return Labelled(trajectory, tuple(made))

    async def _sample_pairs(self, work: _Work) -> list[Pair]:
        """Sample the answers that no earlier run has sampled, and return all pairs of answers."""
        assert self._sampler is not None
        origins = self._sample_origins
        wanted = self._wanted(work.trajectory)
        answers: dict[str, Message] = {}
        if not self._known.isdisjoint(wanted):
            for record in self._log.read(kind="comparison", trajectory_id=work.trajectory.id):
                if (record.source or "").startswith(self.prefix):
                    answers |= zip(record.origins, record.answers, strict=True)
                    work.truncated.update(record.settings.get("truncated", ()))
        asked = to_langchain(work.trajectory.messages)
        for origin in origins:
            if origin not in answers:
                reply = await work.calls.generate("draft", self._sampler, self._sampler_name, asked)
                answers[origin] = from_langchain(reply)
                if cut_short(reply):
                    work.truncated.add(origin)
                if not text_of(reply).strip() and not reply.tool_calls:
                    raise ModelError(f"{self._sampler_name} answered nothing")
        return [_pair((a, answers[a]), (b, answers[b])) for a, b in combinations(origins, 2)]

    async def _compared(self, work: _Work, pair: Pair, principle: Principle | None, key: str) -> Comparison:
        exchange = Exchange(
            messages=work.trajectory.messages, answer=pair.answers[0], context=work.trajectory.context
        )
        opinion: Opinion | None = None
        critiques: tuple[Critique, ...] = ()
        if same_answer(*pair.answers):  # only sampled answers can be; this is a tie without asking the judge
            p_a: tuple[float | None, float | None] = (0.5, 0.5)
        elif principle is not None and isinstance(self._judge, Judge):
            question = principle.preference_question
            opinion = await self._judge.compare(exchange, pair.answers[1], question, work.calls)
            p_a = opinion.p_a
        else:
            critiques = (
                await self._critique(work, pair.origins[0], exchange),
                await self._critique(
                    work, pair.origins[1], msgspec.structs.replace(exchange, answer=pair.answers[1])
                ),
            )
            p = p_a_of(*critiques, self._constitution)
            p_a = (p, p)
        settings: dict[str, Any] = dict(self._settings)
        if cut := sorted(work.truncated.intersection(pair.origins)):
            settings["truncated"] = cut
        if opinion is not None and opinion.clipped:
            settings["clipped"] = True
        reference = self._constitution
        return Comparison(
            id=new_id(),
            at=now(),
            trajectory_id=work.trajectory.id,
            answers=pair.answers,
            origins=pair.origins,
            judge=self._judge.name,
            p_a=p_a,
            band=self._config.band if opinion is not None and opinion.reasoning is not None else None,
            method=opinion.method if opinion is not None else "critic" if critiques else None,
            votes=None if opinion is None else opinion.votes,
            principle=None if principle is None else principle.id,
            constitution=ConstitutionRef(
                name=reference.name, version=reference.version, digest=reference.digest
            ),
            reasoning=None if opinion is None else opinion.reasoning,
            critiques=critiques,
            calls=work.new_calls(),
            settings=settings,
            source=key,
        )

    async def _critique(self, work: _Work, origin: str, exchange: Exchange) -> Critique:
        assert not isinstance(self._judge, Judge)
        if origin not in work.critiques:
            work.critiques[origin] = await self._judge.critique(
                exchange, self._constitution, work.calls, explain=False
            )
        return work.critiques[origin]


@dataclass
class _Work:
    """The state of labelling one Trajectory."""

    trajectory: Trajectory
    calls: Calls
    critiques: dict[str, Critique] = field(default_factory=dict)
    """A critic's critique of each answer, by origin, so that it is asked only once."""
    truncated: set[str] = field(default_factory=set)
    """Origins of sampled answers that were cut off."""
    told: int = 0
    """Number of calls that are already recorded in a Comparison."""

    def new_calls(self) -> tuple[Call, ...]:
        """Return the calls since the last Comparison."""
        new = tuple(self.calls.made[self.told :])
        self.told = len(self.calls.made)
        return new


def p_a_of(a: Critique, b: Critique, constitution: Constitution) -> float | None:
    """Return P(A is better) from a critic's separate judgements of A and B; None if one is unreadable.

    Each answer enters by its `p_violates`, a and b. Given that exactly one of the two violates, the odds that
    it is B are b(1 − a) : a(1 − b); if both terms are 0, neither answer is better.
    """
    p, q = p_violates(a, constitution), p_violates(b, constitution)
    if p is None or q is None:
        return None
    a_better, b_better = q * (1 - p), p * (1 - q)
    total = a_better + b_better
    return a_better / total if total > 0 else 0.5


def p_violates(critique: Critique, constitution: Constitution) -> float | None:
    """Return P(the answer violates something), the highest among its verdicts; None if one is unreadable.

    A verdict without a probability counts as 1 if it is a violation in `failed_principles`, and else as 0.
    """
    if not critique.verdicts or any(v.label is Label.UNREADABLE for v in critique.verdicts):
        return None
    failed = failed_principles(critique, constitution)
    named, aims = {principle.id for principle in failed}, {principle.aim for principle in failed}

    def p_of(verdict: Verdict) -> float:
        if verdict.probability is not None:
            return verdict.probability
        counts = verdict.principle in named or verdict.aim in aims
        return float(verdict.label is Label.VIOLATES and counts)

    return max(map(p_of, critique.verdicts))
