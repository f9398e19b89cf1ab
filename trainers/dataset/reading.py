"""Reads a log fast for training: parses only those fields of each Trajectory that rows need.

    Logged       the fields of a Trajectory that rows need; other fields are skipped, not parsed
    Head         the fields of Logged that are not texts, which suffice to tell whether rows are possible
    Mixed        the Head of a Trajectory with messages that rows cannot represent, such as images
    Stretch      a part of a log or of a JSONL file, which one worker reads

Messages are parsed directly as `Turn`, the form that they have in rows, since nearly all need no conversion.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from cai_graph.errors import DataError
from cai_graph.log import CURRENT_END, open_log, place_of
from cai_graph.trajectory import (
    Critique,
    Message,
    Outcome,
    Record,
    ToolCall,
    Trajectory,
    decode,
)
from trainers.ledger import Reason
from trainers.rows import Dropped, FunctionCall, ToolUse, Turn

__all__ = [
    "Head",
    "Logged",
    "LoggedCritique",
    "LoggedDraft",
    "LoggedRevision",
    "LoggedRound",
    "LoggedVerdict",
    "Mixed",
    "NotText",
    "Stretch",
    "about",
    "appended",
    "located",
    "logged_of",
    "read_logged",
    "stretches",
    "turn",
]

_JSONL = (".jsonl", ".ndjson")
_BUFFER = 1 << 18
_RECORD = 4 << 10
"""Approximate bytes of a record."""
_TRAJECTORY = b'{"record":"trajectory",'
_BEFORE_TEXTS = 512
"""First bytes of a record in which its outcome is, unless a name is very long."""


# --- what is read of a record -------------------------------------------------------------------------


class _Part(msgspec.Struct, frozen=True, gc=False):
    """Base class of the partial records, whose fields have the names and meanings of cai_graph.trajectory."""


class LoggedVerdict(_Part, frozen=True):
    """A Verdict."""

    label: str
    principle: str | None = None
    aim: str | None = None
    probability: float | None = None
    reason: str | None = None
    severity: int | None = None

    @property
    def about(self) -> str | None:
        """The principle's id, or else the aim; None if the verdict is on the whole answer."""
        return self.principle or self.aim or None


class LoggedCritique(_Part, frozen=True):
    """A Critique."""

    verdicts: tuple[LoggedVerdict, ...] = ()
    reasoning: str = ""
    critic: str | None = None


class LoggedDraft(_Part, frozen=True):
    """A Draft."""

    answer: Turn
    truncated: bool = False


class LoggedRevision(_Part, frozen=True):
    """A Revision."""

    answer: Turn
    critique: LoggedCritique | None = None
    accepted: bool = False
    rejection: str | None = None


class LoggedRound(_Part, frozen=True):
    """A Round."""

    critique: LoggedCritique
    revisions: tuple[LoggedRevision, ...] = ()


class LoggedConstitution(_Part, frozen=True):
    """A ConstitutionRef."""

    name: str
    digest: str


class Head(_Part, frozen=True):
    """A Trajectory's id, mode, constitution, outcome and metadata, without its texts."""

    id: str
    mode: str
    constitution: LoggedConstitution
    outcome: str
    metadata: dict[str, Any] = {}


class Logged(Head, frozen=True):
    """The parts of a Trajectory from which rows are made."""

    messages: tuple[Turn, ...] = ()
    draft: LoggedDraft | None = None
    rounds: tuple[LoggedRound, ...] = ()
    released: Turn | None = None
    released_from: str | None = None


class Mixed(Head, frozen=True):
    """The Head of a Trajectory in which a message has parts other than text."""


_decoder = msgspec.json.Decoder(Logged)
_heads = msgspec.json.Decoder(Head)
_MARKS = {outcome: b',"outcome":"%b",' % outcome.value.encode() for outcome in Outcome}


def read_logged(payload: bytes, head_enough: Outcome | None = None) -> Logged | Head | Dropped | None:
    """Return the parts of an encoded Trajectory that rows need; None for a record of another kind.

    Returns Mixed if a message has parts other than text, and Dropped as `unreadable_record` if the payload is
    not a record that this release can read.

    Args:
        payload: the encoded record.
        head_enough: the outcome for which the Head is enough, which costs half as much to parse. A Trajectory
            that needs the slow parser is returned as Logged or Mixed even so.
    """
    if payload.startswith(_TRAJECTORY) and payload.endswith(CURRENT_END):
        try:
            # The match may also be in a tool call's arguments, in a message near the beginning: check it.
            if head_enough is not None and payload.find(_MARKS[head_enough], 0, _BEFORE_TEXTS) > 0:
                head = _heads.decode(payload)
                if head.outcome == head_enough:
                    return head
            return _decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            pass  # Lone surrogates, or a message that needs conversion: tool calls, parts.
    try:
        record = decode(payload)
    except DataError:
        return Dropped(Reason.UNREADABLE_RECORD)
    return logged_of(record) if isinstance(record, Trajectory) else None


def logged_of(record: Trajectory) -> Logged | Mixed:
    """Return the parts of a Trajectory that rows need; Mixed if a message has parts other than text."""
    head: dict[str, Any] = {
        "id": record.id,
        "mode": record.mode,
        "constitution": LoggedConstitution(record.constitution.name, record.constitution.digest),
        "outcome": record.outcome.value,
        "metadata": record.metadata,
    }
    try:
        return Logged(
            **head,
            messages=tuple(map(turn, record.messages)),
            draft=None
            if record.draft is None
            else LoggedDraft(turn(record.draft.answer), record.draft.truncated),
            rounds=tuple(
                LoggedRound(
                    _critique(round_.critique),
                    tuple(
                        LoggedRevision(
                            turn(revision.answer),
                            None if revision.critique is None else _critique(revision.critique),
                            revision.accepted,
                            None if revision.rejection is None else revision.rejection.value,
                        )
                        for revision in round_.revisions
                    ),
                )
                for round_ in record.rounds
            ),
            released=None if record.released is None else turn(record.released),
            released_from=record.released_from,
        )
    except NotText:
        return Mixed(**head)


def _critique(critique: Critique) -> LoggedCritique:
    return LoggedCritique(
        tuple(
            LoggedVerdict(
                verdict.label.value,
                verdict.principle,
                verdict.aim,
                verdict.probability,
                verdict.reason,
                verdict.severity,
            )
            for verdict in critique.verdicts
        ),
        critique.reasoning,
        critique.critic,
    )


class NotText(Exception):  # noqa: N818 - an image is not an error
    """Raised where a message has parts other than text."""


_BESIDE_TEXT = frozenset(
    {"tool_use", "tool_call", "invalid_tool_call", "thinking", "reasoning", "redacted_thinking"}
)
"""Types of content parts that are skipped: valid calls are also in `tool_calls`, and reasoning is not part of
the answer."""


def turn(message: Message) -> Turn:
    """Convert a message to the form that it has in rows.

    Raises:
        NotText: the message has an image or another part that is not text.
    """
    content = message.content
    if not isinstance(content, str):
        texts = []
        for part in content:
            if isinstance(part, dict):
                if part.get("type") in _BESIDE_TEXT:
                    continue
                part = part.get("text") if part.get("type") == "text" else None
            if not isinstance(part, str):
                raise NotText
            texts.append(part)
        content = "".join(texts)
    return Turn(
        role=message.role,
        content=content,
        name=message.name,
        tool_calls=tuple(map(_tool_use, message.tool_calls)),
        tool_call_id=message.tool_call_id,
    )


def _tool_use(call: ToolCall) -> ToolUse:
    return ToolUse(id=call.id, function=FunctionCall(name=call.name, arguments=call.args))


# --- stretches ----------------------------------------------------------------------------------------


class Stretch(NamedTuple):
    """A part of a source, which one worker reads."""

    source: str
    """A log by URL, or a JSONL file."""
    start: int
    """For a file, the first byte; for a log, the position before the first record."""
    stop: int
    """For a file, the byte before which the last line begins; for a log, the position of the last record."""

    def size(self) -> int:
        """Return the approximate size in bytes."""
        return (self.stop - self.start) * (1 if is_file(self.source) else _RECORD)

    def payloads(self) -> Iterator[bytes]:
        """Yield the encoded records one by one, including broken lines of a file.

        Raises:
            DataError: the file cannot be read.
            LogError: the log cannot be read, or a record is damaged.
        """
        return self._lines() if is_file(self.source) else self._records()

    def seems_judged(self) -> bool:
        """Return whether the stretch is known to have Comparisons, Reviews or Feedback.

        In a file only the end is inspected, where most of them are; for a log, all of it.
        """
        if not is_file(self.source):
            with open_log(self.source, read_only=True) as log:
                return log.has_appended()
        with _opened(self.source) as file:
            file.seek(max(self.start, self.stop - _BUFFER))
            file.readline()  # The position may be inside a line: skip its rest.
            return any(not line.startswith(_TRAJECTORY) for line in file)

    def _records(self) -> Iterator[bytes]:
        with open_log(self.source, read_only=True) as log:
            yield from log.payloads(positions=(self.start, self.stop))

    def appended_records(self) -> Iterator[bytes]:
        """Yield the encoded Comparisons, Reviews and Feedback of a log."""
        with open_log(self.source, read_only=True) as log:
            if log.has_appended():
                yield from log.payloads(positions=(self.start, self.stop), appended=True)

    def _lines(self) -> Iterator[bytes]:
        with _opened(self.source) as file:
            # A line belongs to the stretch that contains its first byte.
            if self.start:
                file.seek(self.start - 1)
                file.readline()
            at = file.tell()
            for line in file:
                if at >= self.stop:
                    return
                at += len(line)
                line = line.rstrip()
                if line:
                    yield line


def is_file(source: str) -> bool:
    """Return whether a source is a JSONL file rather than a log."""
    return source.endswith(_JSONL)


def located(source: str) -> str:
    """Return the name of a source, independent of the working directory and without a password.

    Raises:
        ConfigError: the source is neither a JSONL file nor the URL of a log.
    """
    if is_file(source):
        return os.path.abspath(source)
    place = place_of(source)
    return place.name if place.path is None else f"sqlite:///{place.path}"


def stretches(source: str, count: int) -> list[Stretch]:
    """Split a source into at most `count` stretches of about the same size.

    Raises:
        DataError: the file cannot be read.
        LogError: the log cannot be read.
    """
    if is_file(source):
        with _opened(source) as file:
            size = os.fstat(file.fileno()).st_size
        ends = [size * number // count for number in range(count + 1)]
    else:
        with open_log(source, read_only=True) as log:
            ends = log.cuts(count)
    return [Stretch(source, start, stop) for start, stop in pairwise(ends) if start < stop]


def _opened(source: str) -> BinaryIO:
    try:
        return Path(source).open("rb", buffering=_BUFFER)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error


# --- what was appended --------------------------------------------------------------------------------


def appended(stretch: Stretch) -> Iterator[tuple[str, bytes]]:
    """Yield the encoded Comparisons, Reviews and Feedback of a stretch, as (Trajectory id, record).

    Raises:
        DataError: the file cannot be read.
        LogError: the log cannot be read, or a record is damaged.
    """
    payloads = stretch.payloads() if is_file(stretch.source) else stretch.appended_records()
    for payload in payloads:
        if payload.startswith(_TRAJECTORY):
            continue
        with contextlib.suppress(DataError):  # Unreadable records are counted when trajectories are read.
            record = decode(payload)
            if not isinstance(record, Trajectory):
                yield record.trajectory_id, payload


def about(source: str, trajectory_id: str) -> list[Record]:
    """Return a Trajectory and the records about it; an empty list if the source does not contain it.

    Raises:
        DataError: the file cannot be read.
        LogError: the log cannot be read.
    """
    if not is_file(source):
        with open_log(source, read_only=True) as log:
            try:
                first = log.get(trajectory_id)
            except DataError:
                return []
            return [first, *log.read(trajectory_id=trajectory_id)]
    named = json.dumps(trajectory_id).encode()
    found = []
    for stretch in stretches(source, 1):
        for payload in stretch.payloads():
            if named in payload:
                with contextlib.suppress(DataError):
                    record = decode(payload)
                    if trajectory_id in (record.id, getattr(record, "trajectory_id", None)):
                        found.append(record)
    return found
