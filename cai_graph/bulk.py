"""Many rows at once: prompts through a wrapped model into the log, existing answers to verdicts.

    Rows      a file of rows, opened: JSONL, CSV or text, each row read or Broken
    Run       its prompts, drafted, judged and logged; takes up where an earlier run of it ended
    judge     its answers, judged in order; nothing is drafted and nothing is logged
    Summary   what a run came to

A run is the same run again when the file's bytes and everything that shapes the answers are the same. A
row's key in the log is `run:FILE/SETTINGS/INDEX`: 16 digits of both digests, and the row's index, since
prompts repeat within a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, TypeVar

import msgspec
from langchain_core.messages import BaseMessage, HumanMessage, convert_to_messages

from cai_graph.calls import Budget, Calls, describe
from cai_graph.chain import ConstitutionalChatModel
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic, failed_principles
from cai_graph.errors import ConfigError, DataError, LogError, MissingExtra
from cai_graph.log import Log
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Critique, Label, Message, Outcome, Trajectory, from_langchain

__all__ = [
    "Answer",
    "Broken",
    "Failed",
    "Format",
    "Judgement",
    "Prompt",
    "Rows",
    "Run",
    "Summary",
    "is_about_all_rows",
    "judge",
    "side_by_side",
    "until",
    "violated",
    "written_whole",
]

Format = Literal["jsonl", "csv", "text"]
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Prompt:
    """A row that asks."""

    index: int
    """Place among the rows, from 0; blank lines are no rows."""
    line: int
    """Line of the file in which it begins, from 1."""
    messages: list[BaseMessage]
    """The conversation."""
    metadata: dict[str, Any]
    """The row's other fields that are text, numbers or booleans."""


@dataclass(frozen=True)
class Answer:
    """A row that holds an answer."""

    index: int
    """Place among the rows, from 0."""
    line: int
    """Line of the file in which it begins, from 1."""
    id: Any
    """The row's `id`, or else its index."""
    exchange: Exchange
    """The answer, in its conversation."""


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read."""

    index: int
    """Place among the rows, from 0."""
    line: int
    """Line of the file in which it begins, from 1."""
    why: str
    """What was found, and what to do."""


@dataclass(frozen=True)
class Failed:
    """A row that was read and could not be answered; the next run of the file tries it again."""

    index: int
    """Place among the rows, from 0."""
    line: int
    """Line of the file in which it begins, from 1."""
    why: str
    """Class and message of the error."""


# --- reading rows -------------------------------------------------------------------------------------


class Rows:
    """A file of rows, opened. Iterating it again starts from its first row.

    What cannot be read twice, such as standard input, is copied to a temporary file first.
    """

    def __init__(self, path: str, format: Format | None = None) -> None:
        """Open `path`; `-` is standard input. `format` is by default what the name ends in.

        Raises:
            ConfigError: no format is given and the name does not say one.
            DataError: the file cannot be read.
        """
        suffix = Path(path).suffix.lower()
        chosen = format or _SUFFIXES.get(suffix)
        if chosen is None:
            found = "standard input has no name" if path == "-" else f"the name {Path(path).name!r} does not"
            raise ConfigError(f"{found} to say how the rows are written; add --format jsonl, csv or text")
        self.name = "standard input" if path == "-" else path
        """What messages call it."""
        self.format: Format = chosen
        """How rows are written."""
        self._file = _readable_twice(path)
        self.digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        """sha256 of its bytes."""

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def prompts(self, column: str | None = None) -> Iterator[Prompt | Broken]:
        """Yield each row as a Prompt.

        Args:
            column: where the prompt is; by default `messages` or `prompt`, and in a CSV file `prompt`
                or the only column. Text has a prompt a line, and no columns.

        Raises:
            ConfigError: the file has no such column.
            DataError: the file cannot be read.
        """
        for index, line, row in self._each(column):
            if isinstance(row, str):
                yield Broken(index, line, row)
                continue
            try:
                key = column or ("messages" if "messages" in row else "prompt")
                yield Prompt(index, line, _conversation(row, key), _scalars(row, without=key))
            except DataError as error:
                yield Broken(index, line, str(error))

    def answers(self) -> Iterator[Answer | Broken]:
        """Yield each row as an Answer: `prompt` and `response`, or `messages` that end in the answer.

        Raises:
            DataError: the file cannot be read.
        """
        for index, line, row in self._each(None):
            if isinstance(row, str):
                yield Broken(index, line, row)
                continue
            try:
                yield Answer(index, line, row.get("id", index), _exchange(row))
            except DataError as error:
                yield Broken(index, line, str(error))

    def _each(self, column: str | None) -> Iterator[tuple[int, int, dict[str, Any] | str]]:
        """Yield index, line, and the row or what is wrong with it."""
        self._file.seek(0)
        read = {"jsonl": _jsonl, "csv": _csv, "text": _text}[self.format]
        try:
            for index, (line, row) in enumerate(read(self._file, column)):
                yield index, line, row
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror}") from error


_File = io.BufferedReader | io.BufferedRandom


def _readable_twice(path: str) -> _File:
    try:
        if path == "-":
            return _copy(sys.stdin.buffer)
        file = open(path, "rb")  # noqa: SIM115 - `Rows.close`
        if file.seekable():
            return file
        with file:
            return _copy(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _copy(file: BinaryIO) -> _File:
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - `Rows.close`
    shutil.copyfileobj(file, copy)
    copy.seek(0)
    return copy


_Read = Iterator[tuple[int, dict[str, Any] | str]]


def _text(file: _File, column: str | None) -> _Read:
    if column is not None:
        raise ConfigError(f"text has one prompt a line and no column {column!r}; leave --column out")
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            yield number, {"prompt": line.decode("utf-8").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield number, f"not UTF-8: {error.reason} at byte {error.start} of the line"


def _jsonl(file: _File, column: str | None) -> _Read:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON: {error}"
            continue
        if isinstance(row, str):
            row = {column or "prompt": row}
        yield number, row if isinstance(row, dict) else f"a row is an object, found {type(row).__name__}"


def _lines(file: _File) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, 1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _csv(file: _File, column: str | None) -> _Read:
    # Bytes that are no UTF-8 become lone surrogates, so that one bad row does not end the file.
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for _, line in _lines(file)), strict=True)
    header = next(reader, [])
    wanted = column or (header[0] if len(header) == 1 else "prompt")
    if wanted not in header:
        found = f"the file has the columns {', '.join(map(repr, header)) or '(none)'}"
        raise ConfigError(f"no column {wanted!r}: {found}; say which with --column")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not CSV: {error}"
            continue
        if not fields:
            continue
        if len(fields) != len(header):
            yield line, f"{len(fields)} fields, and the header has {len(header)}; is a quote missing?"
        elif any("\udc80" <= char <= "\udcff" for item in fields if not item.isascii() for char in item):
            yield line, "not UTF-8; save the file as UTF-8"
        else:
            row: dict[str, Any] = dict(zip(header, fields, strict=True))
            if column is None:
                row["prompt"] = row.pop(wanted)
            yield line, row


def _conversation(row: Mapping[str, Any], key: str) -> list[BaseMessage]:
    if key not in row:
        found = ", ".join(map(repr, row)) or "(none)"
        raise DataError(f"no {key!r} among the keys {found}; say where the prompt is with --column")
    value = row[key]
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{key!r} is empty")
        return [HumanMessage(value)]
    if not isinstance(value, list) or not value:
        raise DataError(f"{key!r} is text or a list of messages, found {str(value)[:60]!r}")
    try:
        return convert_to_messages(value)
    except Exception as error:  # its errors are of many classes, all about the messages
        raise DataError(f"{key!r} is no list of messages: {str(error).splitlines()[0][:200]}") from error


def _scalars(row: Mapping[str, Any], *, without: str) -> dict[str, Any]:
    return {
        key: value for key, value in row.items() if key != without and isinstance(value, str | int | float)
    }


def _exchange(row: Mapping[str, Any]) -> Exchange:
    if "messages" in row and "response" not in row:
        *before, last = map(from_langchain, _conversation(row, "messages"))
        if last.role != "assistant":
            raise DataError(f"'messages' end in a message of the role {last.role!r}; the answer comes last")
        return Exchange(messages=tuple(before), answer=last)
    response = row.get("response")
    if not isinstance(response, str):
        found = ", ".join(map(repr, row)) or "(none)"
        raise DataError(f"no text under 'response' among the keys {found}; a row has prompt and response")
    asked = _conversation(row, "messages" if "messages" in row else "prompt")
    return Exchange(
        messages=tuple(map(from_langchain, asked)), answer=Message(role="assistant", content=response)
    )


# --- side by side -------------------------------------------------------------------------------------


async def side_by_side(
    items: Iterable[T], work: Callable[[T], Awaitable[R]], concurrency: int
) -> AsyncGenerator[R, None]:
    """Yield what `work` returns for each item, as each ends; at most `concurrency` are under way.

    Items are drawn one by one, when there is room. When the caller leaves early, or `work` raises, what
    is under way is cancelled and waited for.
    """
    iterator = iter(items)
    pending: set[asyncio.Future[R]] = set()
    try:
        while True:
            room = islice(iterator, concurrency - len(pending))
            pending |= {asyncio.ensure_future(work(item)) for item in room}
            if not pending:
                return
            ended, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                yield task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def until(items: Iterable[T], stopped: Callable[[], bool]) -> Iterator[T]:
    """Yield the items until `stopped` returns True."""
    for item in items:
        if stopped():
            return
        yield item


def is_about_all_rows(error: Exception) -> bool:
    """Return whether every further row would fail alike: a wrong set-up, a refused key, a broken log."""
    refused = getattr(error, "status_code", None) in (401, 403)
    return refused or isinstance(error, ConfigError | MissingExtra | LogError)


# --- prompts ------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What the Trajectories of a run came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Trajectories by outcome."""
    violated: Counter[str] = field(default_factory=Counter)
    """Trajectories whose draft violated it, by principle id, or by aim where no principle was named."""
    calls: int = 0
    """Generations."""
    forward_passes: int = 0
    """Calls that wrote no token."""
    input_tokens: int = 0
    """Tokens of prompts, where the provider counts."""
    output_tokens: int = 0
    """Tokens written, where the provider counts."""
    skipped: list[Broken | Failed] = field(default_factory=list)
    """Rows without an answer."""

    @property
    def answered(self) -> int:
        """Rows with an answer."""
        return sum(self.outcomes.values())

    @property
    def revised_share(self) -> float:
        """Share of the answers that are revisions, from 0 to 1."""
        return self.outcomes[Outcome.REVISED] / self.answered if self.outcomes else 0.0

    def add(self, trajectory: Trajectory) -> None:
        """Count one Trajectory."""
        self.outcomes[trajectory.outcome.value] += 1
        self.violated.update(violated(trajectory))
        for call in trajectory.calls:
            self.calls += call.kind == "generation"
            self.forward_passes += call.kind == "forward"
            self.input_tokens += call.input_tokens or 0
            self.output_tokens += call.output_tokens or 0


def violated(trajectory: Trajectory) -> list[str]:
    """Return what a draft violated: ids of principles, or the aims where no principle was named."""
    if not trajectory.rounds:
        return []
    verdicts = [v for v in trajectory.rounds[0].critique.verdicts if v.label is Label.VIOLATES]
    named = [verdict.principle for verdict in verdicts if verdict.principle is not None]
    return named or [verdict.aim for verdict in verdicts if verdict.aim is not None]


class Run:
    """The prompts of a file, through a wrapped model into its log.

    Attributes:
        prefix: what the source key of each of its Trajectories starts with.
        rows: how many rows it has, up to the limit.
        done: how many of them were answered before.
        summary: what the run came to, earlier parts of it included.
    """

    def __init__(
        self,
        guarded: ConstitutionalChatModel,
        rows: Rows,
        *,
        drafting: Mapping[str, Any],
        column: str | None = None,
        limit: int | None = None,
    ) -> None:
        """Read the rows once and the log, so that what cannot work is said before the first call.

        Args:
            guarded: the wrapped chat model; it must have a log.
            rows: the prompts.
            drafting: what else shapes the drafts, as JSON: the model's name and its settings.
            column: see `Rows.prompts`.
            limit: only so many rows, from the first.

        Raises:
            ConfigError: the column is missing.
            DataError: the file cannot be read.
            LogError: the log cannot be read.
        """
        assert guarded.plan.log is not None
        self._guarded = guarded
        self._read = partial(rows.prompts, column)
        self._limit = limit
        shaping = {
            "constitution": guarded.plan.constitution.digest,
            "settings": guarded.plan.recorded_settings,
            "drafting": drafting,
            "column": column,
            "format": rows.format,
        }
        digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode("ascii")).hexdigest()
        self.prefix = f"run:{rows.digest[:16]}/{digest[:16]}/"
        self.rows = sum(1 for _ in self._prompts())
        self.summary = Summary()
        self._done = self._answered(guarded.plan.log)
        self.done = len(self._done)

    def _prompts(self) -> Iterator[Prompt | Broken]:
        return islice(self._read(), self._limit)

    def _answered(self, log: Log) -> set[int]:
        """Return the rows that need no further call, and count them. A row that failed is tried again."""
        done: set[int] = set()
        for record in log.read(kind="trajectory", source=self.prefix):
            assert isinstance(record, Trajectory)
            index = int((record.source or "").removeprefix(self.prefix))
            if record.outcome is not Outcome.FAILED and index < self.rows:
                done.add(index)
                self.summary.add(record)
        return done

    async def results(
        self, concurrency: int, *, stopped: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[Trajectory | Broken | Failed, None]:
        """Yield what becomes of each row that is not done, as each ends; all are in `summary` by then.

        Args:
            concurrency: how many rows are under way at once.
            stopped: once it returns True, no further row is begun, and those under way are finished.

        Raises:
            ConfigError, MissingExtra, LogError: what would fail every further row.
            Exception: the same of a provider, such as a refused key.
        """
        waiting = (row for row in self._prompts() if isinstance(row, Broken) or row.index not in self._done)
        begun = until(waiting, stopped)
        async with contextlib.aclosing(side_by_side(begun, self._answer, concurrency)) as ended:
            async for result in ended:
                if isinstance(result, Trajectory):
                    self.summary.add(result)
                else:
                    self.summary.skipped.append(result)
                yield result

    async def _answer(self, row: Prompt | Broken) -> Trajectory | Broken | Failed:
        if isinstance(row, Broken):
            return row
        try:
            answered = await self._guarded.answered(
                row.messages, {"metadata": row.metadata}, source=f"{self.prefix}{row.index}"
            )
        except Exception as error:
            if is_about_all_rows(error):
                raise
            return Failed(row.index, row.line, describe(error))
        return answered.trajectory


# --- answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What became of one row of answers."""

    index: int
    """Place among the rows, from 0."""
    id: Any
    """The row's `id`, or else its index."""
    critique: Critique | None
    """What the critic found; None where there is an error."""
    error: str | None = None
    """Why there is no critique."""

    def violates(self, constitution: Constitution) -> bool:
        """Return whether the answer violates the constitution, thresholds of severity respected."""
        return self.critique is not None and bool(failed_principles(self.critique, constitution))

    @property
    def unreadable(self) -> bool:
        """Whether a verdict could not be read."""
        return self.critique is not None and any(
            verdict.label is Label.UNREADABLE for verdict in self.critique.verdicts
        )

    def word(self, constitution: Constitution) -> str:
        """Return it in a word."""
        if self.critique is None:
            return "skipped"
        return "violates" if self.violates(constitution) else "unreadable" if self.unreadable else "complies"

    def line(self) -> str:
        """Return it as one line of ASCII JSON: `id`, `verdicts` and `aims`, or `id` and `error`."""
        if self.critique is None:
            return json.dumps({"id": self.id, "error": self.error})
        verdicts: Sequence[dict[str, Any]] = msgspec.to_builtins(self.critique.verdicts)
        by_aim = {v.aim: v.probability for v in self.critique.verdicts if v.aim and v.probability is not None}
        aims = {**by_aim, **self.critique.readings}
        return json.dumps({"id": self.id, "verdicts": verdicts, "aims": aims})


async def judge(
    critic: Critic, constitution: Constitution, rows: Rows, concurrency: int
) -> AsyncGenerator[Judgement, None]:
    """Yield the judgement of each row, in the order of the rows.

    Raises:
        DataError: the file cannot be read.
        Exception: what would fail every further row, such as a refused key.
    """

    async def work(row: Answer | Broken) -> Judgement:
        if isinstance(row, Broken):
            return Judgement(row.index, row.index, None, f"line {row.line}: {row.why}")
        try:
            critique = await critic.critique(row.exchange, constitution, Calls(Budget()), explain=False)
        except Exception as error:
            if is_about_all_rows(error):
                raise
            return Judgement(row.index, row.id, None, f"line {row.line}: {describe(error)}")
        return Judgement(row.index, row.id, critique)

    early: dict[int, Judgement] = {}
    following = 0
    async with contextlib.aclosing(side_by_side(rows.answers(), work, concurrency)) as ended:
        async for judgement in ended:
            early[judgement.index] = judgement
            while following in early:
                yield early.pop(following)
                following += 1


@contextlib.contextmanager
def written_whole(path: str | None) -> Iterator[TextIO]:
    """Give a file to write to that appears at `path` whole, when the body ends, or not at all.

    It is readable by its owner alone. None is standard output, which appears as it is written.

    Raises:
        DataError: the file cannot be written there.
    """
    if path is None:
        yield sys.stdout
        return
    target = Path(path)
    if target.exists() and not target.is_file():
        raise DataError(f"{target}: is not a plain file; name one, or leave -o out for standard output")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
