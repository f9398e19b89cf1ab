"""What a store of records keeps beside each payload, and what it must be able to do.

A store holds rows: the encoded record as it stands, and beside it the few columns that filters read.
The columns are a function of the record (`row_of`), so `verify` can compute them again and compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple, Protocol, TypedDict

from cai_graph.errors import CaiError
from cai_graph.log.redaction import is_withheld
from cai_graph.trajectory import Comparison, Feedback, Record, Review, Trajectory

__all__ = ["Filters", "Kind", "Row", "Stats", "Store", "StoredPayload", "from_micros", "micros", "row_of"]

Kind = Literal["trajectory", "comparison", "review", "feedback"]

KINDS: dict[type[Record], Kind] = {
    Trajectory: "trajectory",
    Comparison: "comparison",
    Review: "review",
    Feedback: "feedback",
}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Filters(TypedDict, total=False):
    """Which records to read, and in which order; every filter that is given must hold."""

    kind: Kind | None
    """Only records of this kind."""
    trajectory_id: str | None
    """Only the comparisons, reviews and feedback about this Trajectory."""
    outcome: str | None
    """Only Trajectories that ended so."""
    constitution: str | None
    """Only Trajectories judged by the constitution of this digest."""
    tag: str | None
    """Only Trajectories that carry this tag."""
    source: str | None
    """Only Trajectories whose source key starts so."""
    since: datetime | None
    """Only records made at this time or later; a time without a zone is UTC."""
    until: datetime | None
    """Only records made before this time; a time without a zone is UTC."""
    after: str | None
    """Only records that come after the record of this id, in the order that is asked for."""
    limit: int | None
    """At most this many."""
    newest_first: bool
    """Latest committed first; otherwise in the order of commit, which keeps each writer's sequence."""


class Row(NamedTuple):
    """One record as a store keeps it."""

    id: str
    kind: Kind
    at: int
    trajectory_id: str | None
    outcome: str | None
    constitution: str | None
    source: str | None
    tags: str | None
    withheld: int
    payload: bytes


class StoredPayload(NamedTuple):
    """One encoded record as it was read, its checksum verified."""

    id: str
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a log holds, counted."""

    trajectories: int = 0
    """Number of Trajectories."""
    comparisons: int = 0
    """Number of Comparisons."""
    reviews: int = 0
    """Number of Reviews."""
    feedback: int = 0
    """Number of Feedback records."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Trajectories by outcome."""
    constitutions: dict[str, int] = field(default_factory=dict)
    """Trajectories by constitution, as `NAME VERSION (first 12 digits of the digest)`."""
    violated: dict[str, int] = field(default_factory=dict)
    """Trajectories whose draft was found to violate it, by principle id or aim."""
    unreadable: int = 0
    """Verdicts that could not be read."""
    calls: int = 0
    """Model calls in Trajectories and Comparisons."""
    input_tokens: int = 0
    """Tokens of their prompts, where the provider counted."""
    output_tokens: int = 0
    """Tokens that they wrote, where the provider counted."""
    withheld: int = 0
    """Records stored without their texts, because the redaction hook failed."""
    removed: int = 0
    """Records that `gc` removed; a tombstone says why."""
    first: datetime | None = None
    """Time of the earliest record, UTC."""
    last: datetime | None = None
    """Time of the latest record, UTC."""
    bytes: int = 0
    """Size of the log on disk."""


class Store(Protocol):
    """What the group-commit writer and the readers need of a database."""

    def insert(self, rows: Sequence[Row]) -> list[CaiError | None]:
        """Commit the rows durably in one transaction; one entry a row, None where it is stored.

        A row whose id is stored already with the same payload counts as stored; with another payload
        its entry is a DataError.

        Raises:
            LogError: none of the rows is stored.
        """

    def select(self, filters: Filters) -> Iterator[StoredPayload]:
        """Yield the payloads that pass the filters, as of the first one, in flat memory."""

    def get(self, id: str) -> StoredPayload:
        """Return one payload. Raises DataError where there is none."""

    def known(self, ids: Sequence[str]) -> set[str]:
        """Return those of the ids that are stored, or were and have a tombstone."""

    def sources(self, prefix: str) -> set[str]:
        """Return the source keys of Trajectories that start with `prefix`."""

    def stats(self) -> Stats:
        """Return the counts."""

    def close(self) -> None:
        """Close every connection."""

    def before_fork(self) -> None:
        """Wait for the transaction in progress, close every connection, and hold until after_fork."""

    def after_fork(self, *, child: bool) -> None:
        """Let work go on, in the parent or in the child."""


def micros(at: datetime) -> int:
    """Return a time as whole microseconds since 1970 UTC; a time without a zone is UTC."""
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def from_micros(value: int) -> datetime:
    """Return the time, UTC, that `micros` turned into `value`."""
    return _EPOCH + value * _MICROSECOND


def row_of(record: Record, payload: bytes) -> Row:
    """Return the row that stores `record`, whose encoding is `payload`."""
    withheld = int(is_withheld(record))
    if isinstance(record, Trajectory):
        return Row(
            column_text(record.id),
            "trajectory",
            micros(record.started_at),
            None,
            record.outcome.value,
            column_text(record.constitution.digest),
            None if record.source is None else column_text(record.source),
            json.dumps(record.tags) if record.tags else None,
            withheld,
            payload,
        )
    about = column_text(record.trajectory_id)
    return Row(
        column_text(record.id),
        KINDS[type(record)],
        micros(record.at),
        about,
        None,
        None,
        None,
        None,
        withheld,
        payload,
    )


def column_text(text: str) -> str:
    """Return text as a database column can hold it; the payload keeps what is escaped here.

    Lone surrogates have no UTF-8 form, and PostgreSQL has no NUL.
    """
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
