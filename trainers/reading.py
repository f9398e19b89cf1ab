"""Reading a log for training: of each Trajectory only what rows are made of, at the speed of the parser.

sources      a log by URL, or JSONL files as `cai log export` writes them; raw payloads, never all at once
Logged       what rows need of a Trajectory; the other fields are skipped, not parsed
Evidence     the Comparisons, Reviews and Feedback about one Trajectory
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cai_graph.errors import DataError
from cai_graph.log import CURRENT_END, open_log
from cai_graph.trajectory import (
    SCHEMA_VERSION,
    Comparison,
    Feedback,
    Record,
    Review,
    ToolCall,
    Trajectory,
    decode,
)

__all__ = [
    "Evidence",
    "Logged",
    "LoggedCritique",
    "LoggedMessage",
    "LoggedRevision",
    "LoggedRound",
    "LoggedVerdict",
    "about",
    "evidence",
    "payloads",
    "read_logged",
]

JSONL = (".jsonl", ".ndjson")
_TRAJECTORY = b'{"record":"trajectory",'
_BLOCK = 1 << 20


class _Part(msgspec.Struct, frozen=True, gc=False):
    """Settings of the partial records. Fields are named and mean the same as in cai_graph.trajectory."""


class LoggedMessage(_Part, frozen=True):
    """A Message."""

    role: str
    content: str | list[Any] = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class LoggedVerdict(_Part, frozen=True):
    """A Verdict."""

    label: str
    principle: str | None = None
    aim: str | None = None
    probability: float | None = None
    reason: str | None = None


class LoggedCritique(_Part, frozen=True):
    """A Critique."""

    verdicts: tuple[LoggedVerdict, ...] = ()
    reasoning: str = ""
    critic: str | None = None


class LoggedDraft(_Part, frozen=True):
    """A Draft."""

    answer: LoggedMessage
    truncated: bool = False


class LoggedRevision(_Part, frozen=True):
    """A Revision."""

    answer: LoggedMessage
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


class Logged(_Part, frozen=True):
    """A Trajectory, as far as rows are made of it."""

    id: str
    mode: str
    constitution: LoggedConstitution
    outcome: str
    messages: tuple[LoggedMessage, ...] = ()
    draft: LoggedDraft | None = None
    rounds: tuple[LoggedRound, ...] = ()
    released: LoggedMessage | None = None
    released_from: str | None = None
    metadata: dict[str, Any] = {}
    schema: int = SCHEMA_VERSION


class Evidence(NamedTuple):
    """What was appended about one Trajectory, in the order of the log."""

    comparisons: tuple[Comparison, ...] = ()
    reviews: tuple[Review, ...] = ()
    feedback: tuple[Feedback, ...] = ()


NO_EVIDENCE = Evidence()

_decoder = msgspec.json.Decoder(Logged)


def read_logged(payload: bytes) -> Logged | None:
    """Return what rows need of an encoded Trajectory; None for a record of another kind.

    Raises:
        DataError: the payload is no record that this release reads.
    """
    try:
        # A record ends in its version and begins with its kind, as `encode` writes it; what does not may be
        # of another version or another kind, and is read in full.
        if payload.endswith(CURRENT_END) and payload.startswith(_TRAJECTORY):
            return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass
    record = decode(payload)
    if not isinstance(record, Trajectory):
        return None
    return msgspec.convert(msgspec.to_builtins(record), Logged)


# --- payloads -----------------------------------------------------------------------------------------


def is_file(source: str) -> bool:
    """Return whether a source is a JSONL file rather than a log."""
    return source.endswith(JSONL)


def payloads(source: str) -> Iterator[bytes]:
    """Yield the encoded records of a source one by one, broken lines of a file included.

    Raises:
        DataError: the file cannot be read.
        LogError: the log cannot be read, or a record is damaged.
    """
    if is_file(source):
        with _open(source) as file:
            yield from _lines(file)
    else:
        with open_log(source, read_only=True) as log:
            for line in log.lines():
                yield line[:-1]


def _open(source: str) -> FileIO:
    try:
        return Path(source).open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error


def _lines(file: FileIO) -> Iterator[bytes]:
    """Yield the lines of a file without their ends, blank ones left out."""
    rest = b""
    while block := file.read(_BLOCK):
        *lines, tail = block.split(b"\n")
        if lines:
            lines[0] = rest + lines[0]
            rest = tail
            for line in lines:
                if line:
                    yield line
        else:
            rest += tail
    if rest:
        yield rest


def evidence(sources: Sequence[str]) -> dict[str, Evidence]:
    """Return what the sources say about Trajectories, by the Trajectory's id."""
    found: dict[str, list[Record]] = {}
    for source in sources:
        for payload in payloads(source):
            if payload.startswith(_TRAJECTORY):
                continue
            try:
                record = decode(payload)
            except DataError:
                continue  # The reading of trajectories accounts for it.
            if not isinstance(record, Trajectory):
                found.setdefault(record.trajectory_id, []).append(record)
    return {id: _sorted(records) for id, records in found.items()}


def about(source: str, trajectory_id: str) -> list[Record]:
    """Return a Trajectory and what was said of it; nothing where the source does not hold it.

    Raises:
        DataError: the file cannot be read.
        LogError: the log cannot be read.
    """
    if is_file(source):
        named = json.dumps(trajectory_id).encode()
        found = []
        for payload in payloads(source):
            if named in payload:
                with contextlib.suppress(DataError):
                    record = decode(payload)
                    if trajectory_id in (record.id, getattr(record, "trajectory_id", None)):
                        found.append(record)
        return found
    with open_log(source, read_only=True) as log:
        try:
            first = log.get(trajectory_id)
        except DataError:
            return []
        return [first, *log.read(trajectory_id=trajectory_id)]


def _sorted(records: list[Record]) -> Evidence:
    return Evidence(
        tuple(record for record in records if isinstance(record, Comparison)),
        tuple(record for record in records if isinstance(record, Review)),
        tuple(record for record in records if isinstance(record, Feedback)),
    )
