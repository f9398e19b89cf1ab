"""An evaluation on disk: its prompts, answers, grades and contests, each of which is made only once.

    evaluation.json                       subjects and their settings; notes for readers
    prompts.jsonl                         the suites
    generations/SUBJECT.jsonl             answers
    grades/SUITE/GRADER/SUBJECT.jsonl     grades of the answers
    choices/GRADER/SUBJECT.jsonl          grades that best-of-n chooses by
    contests/SUITE/JUDGE.jsonl            pairs of answers, compared in both orders

Every file is complete, or a `.part` that the next run continues. A new grader needs no new answers. Several
runs may add subjects to one folder at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec

from cai_graph.calls import Budget, Calls
from cai_graph.concurrency.together import side_by_side
from cai_graph.constitution import Constitution
from cai_graph.errors import ConfigError, DataError
from cai_graph.failures import describe, is_about_all_rows
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Message
from trainers import atomic, lines
from trainers.dataset.compared import same_answer
from trainers.evaluation.generations import Asked, Subject
from trainers.evaluation.grades import Grader
from trainers.evaluation.inference import best, most_agreed
from trainers.evaluation.suites import Prompt, Suite
from trainers.feedback import draw
from trainers.feedback.judge import Judge
from trainers.identity import told_apart
from trainers.lines import Lines, Row

__all__ = ["AIMS", "UNASKED", "Evaluation", "OnProgress", "has_failed", "write_whole"]

OnProgress = Callable[[int, int], None]
"""Callback with the number of items that are done, and the total."""

AIMS: dict[Suite, str] = {"harmlessness": "harmless", "helpfulness": "helpful"}
"""The aim under which a suite's answers are graded and compared; over-refusal uses classes instead."""

_ABOUT, _PROMPTS, _LOCK = "evaluation.json", "prompts.jsonl", ".lock"
UNASKED = "not judged yet"
"""The error of an answer, or of a pair, that was not judged in its current form."""

_ANSWER = ("prompt", "sample")
_PAIR = ("prompt", "a", "b")
_FORMAT = 1

_ADDED = ("weights", "config_and_tokenizer", "critic_weights", "module")
"""Digests among the settings that earlier versions did not record."""


class Evaluation:
    """Answers of subjects to the prompts of suites, with their grades and comparisons.

    Attributes:
        path: the folder.
        prompts: the prompts of all suites, by id.
        notes: caveats for readers of the figures, one sentence each.
    """

    def __init__(self, path: Path, about: dict[str, Any], prompts: Iterable[Prompt]) -> None:
        self.path = path
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self._about = about

    @classmethod
    def begin(cls, path: Path, prompts: Sequence[Prompt], *, notes: Iterable[str] = ()) -> Evaluation:
        """Return the evaluation of these prompts in a folder: a new one, or the existing one.

        The labels and kinds of stored prompts are updated to the given ones; answers and grades do not depend
        on them.

        Raises:
            ConfigError: the folder has subjects with other prompts, or there are no prompts.
            DataError: it cannot be read or written.
        """
        if not prompts:
            raise ConfigError("there are no prompts to evaluate on; name a file for one suite at least")
        digest = hashlib.sha256("".join(sorted(p.id for p in prompts)).encode()).hexdigest()
        about = {"format": _FORMAT, "prompts": digest, "subjects": {}, "notes": []}
        begun = cls(path, about, prompts)
        with _held(path):
            found = cls.open(path) if (path / _ABOUT).exists() else None
            if found is not None and found._about["prompts"] != digest:
                if found._about["subjects"]:
                    raise _of_other_prompts(path)
                found = None  # its run ended before it had a subject
            if found is None or found.prompts != begun.prompts:
                write_whole(path / _PROMPTS, lines.text(map(msgspec.to_builtins, prompts)))
            if found is None:
                begun._write()
        begun._note(notes)
        return begun

    @classmethod
    def open(cls, path: Path) -> Evaluation:
        """Return the evaluation in a folder.

        Raises:
            DataError: there is no evaluation in it, or it cannot be read.
        """
        try:
            about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
            if about["format"] != _FORMAT:
                raise DataError(f"{path / _ABOUT}: format {about['format']!r}, this release reads {_FORMAT}")
            prompts = [msgspec.convert(row, Prompt) for row in lines.read(path / _PROMPTS)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: holds no evaluation that can be read ({error}); `cai evaluate run` makes one"
            ) from error
        return cls(path, about, prompts)

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for readers of the figures."""
        return tuple(self._about["notes"])

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of the subjects whose answers are complete, in the order in which they were added."""
        names = self._about["subjects"]
        return tuple(name for name in names if self._file(name).exists())

    def of_suite(self, suite: Suite) -> list[Prompt]:
        """Return the prompts of a suite."""
        return [prompt for prompt in self.prompts.values() if prompt.suite == suite]

    def suites(self) -> list[Suite]:
        """Return the suites that have prompts."""
        return list(dict.fromkeys(prompt.suite for prompt in self.prompts.values()))

    def about(self, subject: str) -> dict[str, Any]:
        """Return a subject's settings; one that chooses among another's answers also has `of` and `by`."""
        found: dict[str, Any] = self._about["subjects"][subject]
        return found

    # --- answers ---

    async def generate(
        self,
        subject: Subject,
        *,
        samples: int = 1,
        notes: Iterable[str] = (),
        progress: OnProgress | None = None,
    ) -> int:
        """Generate and store a subject's missing answers, and return how many prompts failed.

        A failed prompt is stored with its error, is excluded from the figures, and is retried next time.

        Raises:
            ConfigError: the folder contains answers under that name with other settings.
            Exception: an error that would fail every further prompt.
        """
        self._enter(subject.name, {**subject.settings, "samples": samples})
        self._note(notes)
        wanted = [Asked(p, sample) for p in self.prompts.values() for sample in range(samples)]
        with Lines(self._file(subject.name), _ANSWER) as kept:
            done = {key for key, row in kept.rows.items() if row["error"] is None}
            missing = [one for one in wanted if (one.prompt.id, one.sample) not in done]
            if progress is not None:
                progress(len(wanted) - len(missing), len(wanted))
            if missing:
                came = len(wanted) - len(missing)
                async for row in subject.answers(missing):
                    kept.add(row)
                    came += 1
                    if progress is not None:
                        progress(came, len(wanted))
            kept.finish()
            return sum(row["error"] is not None for row in kept.rows.values())

    def answers(self, subject: str) -> list[Row]:
        """Return a subject's answers, without those that failed.

        Raises:
            DataError: the answers are not complete.
        """
        rows = lines.read(self._file(subject))
        if not rows:
            raise DataError(f"{self.path}: has no answers of {subject}; run `cai evaluate run` again")
        return [row for row in rows if row["error"] is None and row["prompt"] in self.prompts]

    async def best_of(self, grader: Grader, progress: OnProgress | None = None) -> list[str]:
        """Add a best-of-n subject for each subject with several answers per prompt: the best by a grader.

        Prompts without any readable grade are left out.

        Returns:
            Names of the added subjects.
        """
        added = []
        for name in self._with_several():
            file = self._in("choices", grader.name, name)
            grades = await self._grade(file, self.answers(name), grader, progress)
            rows: list[Row] = []
            for samples in self._samples(name):
                place = best([grades[row["prompt"], row["sample"]]["value"] for row in samples])
                if place is not None:
                    rows.append({**samples[place], "sample": 0, "chosen": samples[place]["sample"]})
            added.append(self._chosen(name, f"best of {self.about(name)['samples']}", grader.name, rows))
        return added

    def self_consistent(self) -> list[str]:
        """Add a self-consistency subject for each subject with several answers per prompt.

        It takes the answer to each prompt that agrees most with the others.

        Returns:
            Names of the added subjects.
        """
        added = []
        for name in self._with_several():
            rows = []
            for samples in self._samples(name):
                chosen = samples[most_agreed([row["answer"] for row in samples])]
                rows.append({**chosen, "sample": 0, "chosen": chosen["sample"]})
            added.append(
                self._chosen(name, f"self-consistency of {self.about(name)['samples']}", "word overlap", rows)
            )
        return added

    def _with_several(self) -> list[str]:
        found = [name for name in self.subjects if self.about(name).get("samples", 1) > 1]
        if not found:
            raise ConfigError(
                f"{self.path}: no subject has several answers to a prompt to choose from; "
                "run `cai evaluate run` with --samples"
            )
        return found

    def _samples(self, subject: str) -> list[list[Row]]:
        """Return a subject's answers, grouped by prompt."""
        found: dict[str, list[Row]] = {}
        for row in self.answers(subject):
            found.setdefault(row["prompt"], []).append(row)
        return list(found.values())

    def _chosen(self, of: str, how: str, by: str, rows: Sequence[Row]) -> str:
        name = f"{of}, {how} by {by}"
        self._enter(name, {"of": of, "by": by, "samples": 1})
        write_whole(self._file(name), lines.text(rows))
        return name

    # --- grades ---

    async def grade(self, suite: Suite, grader: Grader, progress: OnProgress | None = None) -> int:
        """Grade every subject's answers to a suite that this grader has not graded yet.

        A failed grade is stored with its error, is excluded from the figures, and is retried next time.

        Returns:
            How many answers have no grade because the grader failed.

        Raises:
            Exception: an error of the grader; the grades so far are kept.
        """
        failed = 0
        for name in self.subjects:
            rows = [row for row in self.answers(name) if self.prompts[row["prompt"]].suite == suite]
            found = await self._grade(self._in("grades", suite, grader.name, name), rows, grader, progress)
            failed += sum(has_failed(found[row["prompt"], row["sample"]]) for row in rows)
        return failed

    def grades(self, suite: Suite) -> dict[str, dict[str, list[Row]]]:
        """Return the grades of the answers to a suite, by grader, then by subject.

        There is a row for each answer; an answer that was not graded in its current form has the error
        `UNASKED`.
        """
        found: dict[str, dict[str, list[Row]]] = {}
        slugs = {_slug(name): name for name in self.subjects}
        answers = {
            name: {
                (row["prompt"], row["sample"]): _digest(row["answer"])
                for row in self.answers(name)
                if self.prompts[row["prompt"]].suite == suite
            }
            for name in self.subjects
        }
        for file in sorted((self.path / "grades" / suite).glob("*/*.jsonl")):
            if file.stem in slugs and (rows := lines.read(file)):
                name = slugs[file.stem]
                graded = _as_they_are(rows, _ANSWER, answers[name], {"value": None, "label": None})
                found.setdefault(rows[0]["by"], {})[name] = graded
        return found

    async def _grade(
        self, file: Path, rows: Sequence[Row], grader: Grader, progress: OnProgress | None
    ) -> dict[tuple[Any, ...], Row]:
        with Lines(file, _ANSWER) as kept:
            # An answer that has changed, since it had failed or another one was chosen, is graded again.
            known = {key: row["of"] for key, row in kept.rows.items() if not has_failed(row)}
            missing = [r for r in rows if known.get((r["prompt"], r["sample"])) != _digest(r["answer"])]
            for start in range(0, len(missing), grader.batch):
                batch = missing[start : start + grader.batch]
                grades = await grader.grade([self._exchange(row) for row in batch])
                for row, grade in zip(batch, grades, strict=True):
                    key = {"prompt": row["prompt"], "sample": row["sample"], "of": _digest(row["answer"])}
                    kept.add({**key, **grade._asdict(), "by": grader.name})
                if progress is not None:
                    progress(len(rows) - len(missing) + start + len(batch), len(rows))
            kept.finish()
            return dict(kept.rows)

    def _exchange(self, row: Row) -> Exchange:
        return Exchange(
            messages=self.prompts[row["prompt"]].messages,
            answer=Message(role="assistant", content=row["answer"]),
        )

    # --- contests ---

    async def compare(
        self,
        suite: Suite,
        judge: Judge,
        constitution: Constitution,
        *,
        seed: int = 0,
        concurrency: int = 4,
        progress: OnProgress | None = None,
    ) -> int:
        """Have a judge compare the subjects' first answers to each prompt of a suite, all subjects pairwise.

        Each pair is compared in both orders, under one principle of the suite's aim, drawn by weight for the
        prompt. Equal answers are a tie without asking the judge. A failed comparison is stored with its
        error, is excluded from the figures, and is retried next time.

        Returns:
            How many pairs have no comparison because the judge failed.

        Raises:
            ConfigError: the suite has no aim, or the constitution has no principle of that aim.
            Exception: an error that would fail every further pair.
        """
        aim = AIMS.get(suite)
        of_aim = [p.id for p in constitution.principles if p.aim == aim]
        if not of_aim:
            raise ConfigError(f"{constitution.name!r} has no principle to compare answers to {suite} by")
        rules = constitution.select(of_aim)
        who = told_apart(judge.name, judge.model) + (" reasoning" if judge.reasoning else "")
        by = f"{who} under {constitution.name} ({constitution.digest[:8]})"
        first = self._first()
        pairs = self._pairs(suite, first)

        async def work(pair: tuple[str, str, str]) -> Row:
            prompt, a, b = pair
            one, other = first[a][prompt], first[b][prompt]
            principle = draw(rules, 1, seed, prompt)[0]
            row: Row = {"prompt": prompt, "a": a, "b": b, "by": by, "principle": principle.id}
            row |= {"of": pairs[pair], "p_a": [None, None], "why": ""}
            row["error"] = None
            exchange, answer = self._exchange(one), Message(role="assistant", content=other["answer"])
            if same_answer(exchange.answer, answer):
                return {**row, "p_a": [0.5, 0.5], "why": "the same answer"}
            try:
                said = await judge.compare(exchange, answer, principle.preference_question, Calls(Budget()))
            except Exception as error:
                if is_about_all_rows(error):
                    raise
                return {**row, "error": describe(error)}
            return {**row, "p_a": list(said.p_a), "method": said.method, "clipped": said.clipped}

        with Lines(self._in("contests", suite, by), _PAIR) as kept:
            known = {key: row["of"] for key, row in kept.rows.items() if not has_failed(row)}
            missing = [pair for pair, of in pairs.items() if known.get(pair) != of]
            done = len(pairs) - len(missing)
            async for row in side_by_side(missing, work, concurrency):
                kept.add(row)
                done += 1
                if progress is not None:
                    progress(done, len(pairs))
            kept.finish()
            return sum(has_failed(kept.rows[pair]) for pair in pairs)

    def contests(self, suite: Suite) -> dict[str, list[Row]]:
        """Return the comparisons of a suite's answers, by judge.

        For each pair of subjects that were compared there is a row per prompt; where the current answers were
        not compared, it has the error `UNASKED`.
        """
        found: dict[str, list[Row]] = {}
        pairs = self._pairs(suite, self._first())
        for file in sorted((self.path / "contests" / suite).glob("*.jsonl")):
            rows = lines.read(file)
            met = {(row["a"], row["b"]) for row in rows}
            if now := {(prompt, a, b): of for (prompt, a, b), of in pairs.items() if (a, b) in met}:
                found[rows[0]["by"]] = _as_they_are(rows, _PAIR, now, {"p_a": [None, None]})
        return found

    def _first(self) -> dict[str, dict[str, Row]]:
        """Return each subject's first answers, by prompt."""
        return {
            name: {row["prompt"]: row for row in self.answers(name) if row["sample"] == 0}
            for name in self.subjects
        }

    def _pairs(self, suite: Suite, first: dict[str, dict[str, Row]]) -> dict[tuple[str, str, str], str]:
        """Return the digest of each pair of first answers to a suite, by prompt and subjects."""
        return {
            (prompt.id, a, b): _digest_of_pair(first[a][prompt.id], first[b][prompt.id])
            for a, b in combinations(first, 2)
            for prompt in self.of_suite(suite)
            if prompt.id in first[a] and prompt.id in first[b]
        }

    # --- files ---

    def _file(self, subject: str) -> Path:
        return self._in("generations", subject)

    def _in(self, *names: str) -> Path:
        folders = [name if name in AIMS or name == "over-refusal" else _slug(name) for name in names[1:]]
        return self.path.joinpath(names[0], *folders[:-1], f"{folders[-1]}.jsonl")

    def _enter(self, name: str, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))
        with self._changing() as about:
            # Settings that an earlier version did not record are taken to be the same.
            added = {key: settings[key] for key in _ADDED if key in settings}
            known = {**added, **about["subjects"].get(name, settings)}
            changed = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
            if not changed:
                about["subjects"][name] = known
        if changed:
            was = ", ".join(f"{key} {known.get(key)!r}, not {settings.get(key)!r}" for key in changed)
            raise ConfigError(
                f"{self.path}: the answers of {name} were made with other settings ({was}); "
                "name another folder, or give the subject another name"
            )

    def _note(self, notes: Iterable[str]) -> None:
        with self._changing() as about:
            about["notes"] = list(dict.fromkeys([*about["notes"], *notes]))

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """Yield the content of `evaluation.json`, read under its lock; write it if the body changes it."""
        with _held(self.path):
            about = self.open(self.path)._about
            if about["prompts"] != self._about["prompts"]:  # another run replaced the prompts
                raise _of_other_prompts(self.path)
            self._about = about
            before = json.dumps(self._about)
            yield self._about
            if json.dumps(self._about) != before:
                self._write()

    def _write(self) -> None:
        write_whole(self.path / _ABOUT, json.dumps(self._about, indent=2) + "\n")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Lock `evaluation.json` against changes by other processes while the body runs.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK).open("ab")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _of_other_prompts(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: holds an evaluation of other prompts, and figures compare on the same ones only; "
        "name another folder"
    )


def _slug(name: str) -> str:
    """Return a file name for a name; different names get different file names."""
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def has_failed(row: Row) -> bool:
    """Return whether a row records an error instead of a result; rows of earlier releases have no `error`."""
    return row.get("error") is not None


def _as_they_are(rows: Iterable[Row], key: Sequence[str], now: Mapping[Any, str], unasked: Row) -> list[Row]:
    """Return one row per current item: its judgement, or a row with the error `UNASKED` if there is none.

    Args:
        rows: the stored judgements, some of which may be of earlier answers.
        key: the fields that identify an item.
        now: the digest of each current item, by key.
        unasked: the other fields of a row without a judgement.
    """
    said = {(*(row[field] for field in key), row["of"]): row for row in rows}
    return [
        said.get((*place, of), {**dict(zip(key, place, strict=True)), **unasked, "error": UNASKED})
        for place, of in now.items()
    ]


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, text)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _digest_of_pair(a: Row, b: Row) -> str:
    return _digest(a["answer"] + "\0" + b["answer"])
