"""The tables of a log and the `Store` interface to them, common to SQLite and PostgreSQL.

A row contains the encoded record (`payload`) and a few columns for filters. These columns are a function of
the record (`row_of`), so `verify` can compute them again and compare.

    records      one row a record, in order of commit (`position`); see `Row` for the columns
      writer, sequence   id of one unbroken run of appends by one process, and the number within it, from 1
      digest             sha256 over writer, sequence and payload, 16 bytes: detects a changed record
      chain              sha256 over the writer's previous chain and this digest, 16 bytes: detects a
                         removed, added or reordered record
    tombstones   one row a record that `gc` removed, with the reason, writer, sequence, digest and chain
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, TypeVar
from uuid import uuid4

from cai_graph.errors import CaiError, ConfigError, DataError, LogError
from cai_graph.log.redaction import is_withheld
from cai_graph.log.stats import Stats, Tally
from cai_graph.trajectory import Comparison, Feedback, Outcome, Record, Review, Trajectory

__all__ = [
    "MAX_ROWS",
    "PAGE_BYTES",
    "TAGGED",
    "Database",
    "Duplicate",
    "Filters",
    "FiltersOfKind",
    "Kind",
    "Row",
    "Store",
    "StoredPayload",
    "advances",
    "chain_of",
    "column_text",
    "digest_of",
    "from_micros",
    "micros",
    "row_of",
]

T = TypeVar("T")

MAX_ROWS = 384
"""Rows in one transaction: enough that the cost of the sync per row is small, and few enough that callers
prepare the next rows while these are written."""

Kind = Literal["trajectory", "comparison", "review", "feedback"]

KINDS: dict[type[Record], Kind] = {
    Trajectory: "trajectory",
    Comparison: "comparison",
    Review: "review",
    Feedback: "feedback",
}

TAGGED = """
    (tags IS NOT NULL AND {}('", ' || substr(tags, 2, length(tags) - 2) || ', "', '", ' || :tag || ', "') > 0)
"""
"""SQL condition: the JSON array in `tags` contains the text whose JSON is `:tag`. `{}` is the name of the
database's substring search. A text cannot contain the separators `", ` and `, "`: JSON escapes quotes."""

PAGE_ROWS = 500
PAGE_BYTES = 4 << 20
"""Most rows, and about the most bytes of payload, that are read at a time."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST, _LATEST = -(2**63), 2**63 - 1


class FiltersOfKind(TypedDict, total=False):
    """The filters of `Filters` other than `kind`."""

    trajectory_id: str | None
    """Only the comparisons, reviews and feedback about this Trajectory."""
    outcome: str | None
    """Only Trajectories with this outcome."""
    constitution: str | None
    """Only Trajectories judged by the constitution with this digest."""
    tag: str | None
    """Only Trajectories with this tag."""
    source: str | None
    """Only Trajectories whose source key starts with this text."""
    since: datetime | None
    """Only records made at this time or later; a time without a zone is UTC."""
    until: datetime | None
    """Only records made before this time; a time without a zone is UTC."""
    appended: bool
    """Only comparisons, reviews and feedback, about any Trajectory."""
    with_appended: bool
    """Comparisons, reviews and feedback match if their Trajectory does, whenever they were made: `outcome`,
    `constitution`, `tag`, `source`, `since` and `until` apply to the Trajectory only."""
    positions: tuple[int, int] | None
    """Only records after the first position and up to the second; `Log.cuts` gives positions."""
    after: str | None
    """Only records that come after the record with this id, in the requested order. That record may have been
    removed, unless it was removed before the log was recovered."""
    limit: int | None
    """At most this many."""
    newest_first: bool
    """Latest committed first; otherwise in the order of commit, which preserves each writer's sequence."""


class Filters(FiltersOfKind, total=False):
    """Which records to read, and in which order; a record must match every filter that is given."""

    kind: Kind | None
    """Only records of this kind."""


class Row(NamedTuple):
    """One record as a store keeps it; `writer`, `sequence`, `digest` and `chain` are added on insert."""

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


class Duplicate(DataError):  # noqa: N818 - reads as what the record is
    """A different record with this id is in the log."""


class StoredPayload(NamedTuple):
    """One encoded record as it was read; its checksum was verified."""

    id: str
    payload: bytes


class Database(Protocol):
    """One connection inside a transaction."""

    def execute(self, sql: str, bindings: Mapping[str, Any], /) -> Iterable[Any]:
        """Run one statement with named parameters (`:name`), and return its rows."""


class Store(ABC):
    """One log in a database, shared by the threads of a process.

    This class has the SQL that both databases share, with named parameters (`:name`). A subclass adds the
    connections, the schema, the inserts, and the few SQL expressions that differ.

    Attributes:
        name: the log's name in messages, such as its path; contains no password.
        read_only: whether the log may only be read.
    """

    tagged: ClassVar[str]
    """TAGGED, with the database's substring search."""

    def __init__(self, name: str, *, read_only: bool) -> None:
        self.name = name
        self.read_only = read_only
        self._begin_run()

    # --- what a database brings -----------------------------------------------------------------------

    @abstractmethod
    def insert(self, rows: Sequence[Row]) -> list[CaiError | None]:
        """Commit at most MAX_ROWS rows durably in one transaction; return an error, or None, for each row.

        None means that the row is stored. A row whose id is already stored with the same payload counts as
        stored; with another payload its error is a Duplicate.

        Raises:
            LogError: none of the rows is stored.
        """

    @abstractmethod
    def rows(self, sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        """Return all rows of a query.

        Raises:
            LogError: the log cannot be read, or is damaged in the part that the query read.
        """

    @abstractmethod
    def page(self, sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        """Return the first rows of a query whose last column is the payload. Raises as `rows`.

        They are all rows, or else at least one, with not much more than PAGE_BYTES of payload in total.
        """

    @abstractmethod
    def change(self, write: Callable[[Database], T]) -> T:
        """Run `write` in one transaction, and return its result.

        `write` must be safe to run again, even after its changes were committed: if the connection to
        PostgreSQL breaks during a commit, whether it succeeded is unknown.

        Raises:
            LogError: nothing was changed.
        """

    @abstractmethod
    def erase(self) -> bool:
        """Overwrite removed rows where the log's files still contain them; return whether all are gone."""

    @abstractmethod
    def compact(self) -> bool:
        """Return the space of removed rows to the disk, unless that would block other users of the log;
        return whether it was done.
        """

    def copies(self) -> Sequence[Path]:
        """Return files beside the log that may contain removed rows; `erase` and `compact` ignore them."""
        return ()

    @abstractmethod
    def faults(self) -> list[str]:
        """Return the faults that the database's own check of the log's structure reports."""

    @abstractmethod
    def size(self) -> int:
        """Return the bytes that the log takes on the disk."""

    @abstractmethod
    def close(self) -> None:
        """Close every connection; the next use opens them again."""

    @abstractmethod
    def before_fork(self) -> None:
        """Wait for the transaction in progress, close every connection, and block work until `after_fork`."""

    @abstractmethod
    def after_fork(self, *, child: bool) -> None:
        """Allow work again, in the parent or in the child."""

    @staticmethod
    @abstractmethod
    def among(column: str, name: str) -> str:
        """Return the SQL expression for "the column is one of the values in `:name`"."""

    @staticmethod
    @abstractmethod
    def packed(values: Sequence[str] | Sequence[int]) -> Any:
        """Return the values in the form in which `among` expects them bound."""

    @staticmethod
    @abstractmethod
    def raw(column: str) -> str:
        """Return the SQL expression for the column's bytes, even if damaged; UTF-8 for text."""

    def filtered(self) -> str:
        """Return the index hint after the table's name for filters on time, outcome, constitution or tag."""
        return ""

    # --- reading --------------------------------------------------------------------------------------

    def select(self, filters: Filters) -> Iterator[StoredPayload]:
        """Yield the payloads that match the filters, as of the start of iteration, in constant memory.

        They are read page by page in the order of positions, which is also that of the indexes; a range of
        sources or times is first converted to a range of positions.

        Raises:
            ConfigError: a filter, kind or outcome is unknown, or a time is not a datetime.
            LogError: the log cannot be read, or a record is damaged.
        """
        _check(filters)
        newest_first = filters.get("newest_first", False)
        first, last = self.span(filters)
        clauses, bindings = self._where(filters)
        few = filters.get("trajectory_id") or filters.get("appended")  # these have their own indexes
        few = few or filters.get("kind") not in (None, "trajectory")
        by = any(
            filters.get(name) is not None for name in ("since", "until", "outcome", "constitution", "tag")
        )
        sql = (
            "SELECT position, id, writer, sequence, digest, payload "
            f"FROM records{self.filtered() if by and not few else ''} "
            f"WHERE {' AND '.join(['position >= :first AND position <= :last', *clauses])} "
            f"ORDER BY position {'DESC' if newest_first else 'ASC'} LIMIT :wanted"
        )
        left = filters.get("limit")
        while first <= last and (left is None or left > 0):
            wanted = PAGE_ROWS if left is None else min(left, PAGE_ROWS)
            rows = self.page(sql, bindings | {"first": first, "last": last, "wanted": wanted})
            if not rows:
                return
            for position, *stored in rows:
                if not advances(position, first, last):
                    raise self.out_of_order()
                if newest_first:
                    last = position - 1
                else:
                    first = position + 1
                yield self._checked(*stored)
            if left is not None:
                left -= len(rows)

    def cuts(self, count: int) -> list[int]:
        """Return the positions that split the log into `count` parts of about as many records each.

        They are the position before the first record of each part, and then that of the last record.
        """
        sql = "SELECT coalesce(min(position), 1) - 1, coalesce(max(position), 0) FROM records"
        ((low, high),) = self.rows(sql, {})
        # Positions have gaps only where `gc` removed records, or a transaction failed.
        return sorted({low + (high - low) * number // count for number in range(count + 1)})

    def has_appended(self) -> bool:
        """Return whether the log contains a comparison, a review or feedback."""
        return bool(self.rows("SELECT 1 FROM records WHERE trajectory_id IS NOT NULL LIMIT 1", {}))

    def get(self, id: str) -> StoredPayload:
        """Return one payload. Raises DataError if no record has this id."""
        sql = "SELECT id, writer, sequence, digest, payload FROM records WHERE id = :id"
        for found in self.rows(sql, {"id": column_text(id)}):
            return self._checked(*found)
        raise self._missing(id)

    def known(self, ids: Sequence[str], *, removed: bool) -> set[str]:
        """Return the subset of the ids that are stored or, with `removed`, that have a tombstone."""
        tables = ("records", "tombstones") if removed else ("records",)
        sql = " UNION ALL ".join(
            f"SELECT id FROM {table} WHERE {self.among('id', 'ids')}" for table in tables
        )
        stored = {row[0] for row in self.rows(sql, {"ids": self.packed([column_text(id) for id in ids])})}
        return {id for id in ids if column_text(id) in stored}

    def stats(self) -> Stats:
        """Return the counts; reads every payload once, in constant memory."""
        outcomes = dict(self.rows(f"{_COUNT.format('outcome', 'outcome')} ORDER BY 1", {}))
        kinds = dict(self.rows(_COUNT.format("kind", "trajectory_id"), {}))
        ((first, last, withheld, removed),) = self.rows(
            "SELECT (SELECT min(at) FROM records), (SELECT max(at) FROM records), "
            "(SELECT count(*) FROM records WHERE withheld = 1), (SELECT count(*) FROM tombstones)",
            {},
        )
        tally = Tally()
        for kind in ("trajectory", "comparison"):
            for _, payload in self.select({"kind": kind}):
                tally.add(payload)
        return Stats(
            trajectories=sum(outcomes.values()),
            comparisons=kinds.get("comparison", 0),
            reviews=kinds.get("review", 0),
            feedback=kinds.get("feedback", 0),
            outcomes=outcomes,
            constitutions=dict(sorted(tally.constitutions.items())),
            violated=dict(sorted(tally.violated.items(), key=lambda item: (-item[1], item[0]))),
            unreadable=tally.unreadable,
            calls=tally.calls,
            input_tokens=tally.input_tokens,
            output_tokens=tally.output_tokens,
            withheld=withheld,
            removed=removed,
            first=None if first is None else from_micros(first),
            last=None if last is None else from_micros(last),
            bytes=self.size(),
        )

    def _where(self, filters: Filters) -> tuple[list[str], dict[str, Any]]:
        of_any: list[str] = []
        of_trajectory: list[str] = []
        bindings: dict[str, Any] = {}
        for name in ("kind", "trajectory_id", "outcome", "constitution"):
            value = filters.get(name)
            if value is not None:
                (of_any if name in ("kind", "trajectory_id") else of_trajectory).append(f"{name} = :{name}")
                bindings[name] = column_text(str(value))
        if filters.get("appended") or filters.get("kind") not in (None, "trajectory"):
            of_any.append("trajectory_id IS NOT NULL")  # the condition of the index on kinds
        if (tag := filters.get("tag")) is not None:
            of_trajectory.append(self.tagged)
            bindings["tag"] = json.dumps(tag)
        for column, clause, values in _ranges(filters):
            # An expression, to avoid the column's own index: its order would require sorting each page.
            of_trajectory.append(clause.format("source || ''" if column == "source" else "at + 0"))
            bindings |= values
        if filters.get("with_appended") and of_trajectory:
            chosen = " AND ".join(of_trajectory)
            # In the subquery the columns are those of `about`. Only Trajectories have an outcome.
            about = f"SELECT 1 FROM records AS about WHERE about.id = records.trajectory_id AND {chosen}"
            about += " LIMIT 1 OFFSET 0"  # else PostgreSQL would look up all Trajectories, on each page
            of_trajectory = [f"(outcome IS NOT NULL AND {chosen} OR outcome IS NULL AND EXISTS ({about}))"]
        return of_any + of_trajectory, bindings

    def span(self, filters: Filters) -> tuple[int, int]:
        """Return the first and last position that may match the filters; if none may, the first is larger."""
        if (positions := filters.get("positions")) is not None:
            first, last = positions[0] + 1, positions[1]
        else:
            ((first, last),) = self.rows("SELECT 1, coalesce(max(position), 0) FROM records", {})
        if (after := filters.get("after")) is not None:
            position = self._position_of(after)
            if filters.get("newest_first"):
                last = min(last, position - 1)
            else:
                first = max(first, position + 1)
        # What was appended about a Trajectory may be at any position.
        for column, clause, values in () if filters.get("with_appended") else _ranges(filters):
            # `+ 0`, or PostgreSQL would search for the first position by scanning all of them in order.
            table = f"records{self.filtered() if column == 'at' else ''}"
            sql = f"SELECT min(position + 0), max(position + 0) FROM {table} WHERE {clause.format(column)}"
            ((low, high),) = self.rows(sql, values)
            first, last = (1, 0) if low is None else (max(first, low), min(last, high))
        return first, last

    def _position_of(self, id: str) -> int:
        """Return the position of a record or, if it was removed, the last one that it had."""
        found = " UNION ALL ".join(
            f"SELECT position FROM {table} WHERE id = :id" for table in ("records", "tombstones")
        )
        sql = f"SELECT max(position) FROM ({found}) AS found"
        ((position,),) = self.rows(sql, {"id": column_text(id)})
        if position is None:
            raise self._missing(id)
        if position < 0:
            raise DataError(
                f"{self.name}: record {id!r} was removed before the log was recovered, so what came after it "
                "is not known; name a record that is in the log"
            )
        return int(position)

    def _checked(self, id: str, writer: str, sequence: int, digest: bytes, payload: bytes) -> StoredPayload:
        try:
            sound = digest_of(writer, sequence, payload) == digest
        except (AttributeError, TypeError):  # a damaged row may have NULL in any column
            sound = False
        if not sound:
            raise LogError(
                f"{self.name}: record {id!r} is damaged, its bytes do not match its checksum; "
                "`cai log verify` finds all such records, `cai log recover` saves the intact ones"
            )
        return StoredPayload(id, payload)

    def out_of_order(self) -> LogError:
        """Return the error for rows that were not read in the order of their positions."""
        return LogError(
            f"{self.name}: the log is damaged, its records do not come in the order of their positions; "
            "`cai log verify` says where, `cai log recover` saves every intact record of a file"
        )

    def _missing(self, id: str) -> DataError:
        sql = "SELECT removed_at, why FROM tombstones WHERE id = :id ORDER BY position DESC"
        for removed_at, why in self.rows(sql, {"id": column_text(id)}):
            return DataError(
                f"{self.name}: record {id!r} was removed on {from_micros(removed_at):%Y-%m-%d}: {why}"
            )
        return DataError(f"{self.name}: no record {id!r}; `cai log list` shows the ids")

    # --- writing --------------------------------------------------------------------------------------

    def _begin_run(self) -> None:
        """Become a new writer, whose sequence begins at 1."""
        self._writer, self._sequence, self._link = uuid4().hex[:16], 0, b""

    def _bindings(self, rows: Sequence[Row]) -> tuple[list[tuple[Any, ...]], int, bytes]:
        """Return the rows with writer, sequence, digest and chain; and the last sequence and chain value."""
        writer, sequence, link = self._writer, self._sequence, self._link
        bindings: list[tuple[Any, ...]] = []
        for row in rows:
            sequence += 1
            digest = digest_of(writer, sequence, row.payload)
            link = chain_of(link, digest)
            bindings.append((*row, writer, sequence, digest, link))
        return bindings, sequence, link

    def _refuse(self, db: Database, rows: Sequence[Row]) -> tuple[list[CaiError | None], list[Row]]:
        """Return an error, or None, for each row, and the rows whose id is new; see `insert`."""
        sql = f"SELECT id, payload FROM records WHERE {self.among('id', 'ids')}"
        stored = dict(db.execute(sql, {"ids": self.packed([row.id for row in rows])}))
        errors: list[CaiError | None] = []
        fresh: list[Row] = []
        for row in rows:
            payload = stored.get(row.id)
            if payload is None:
                payload = stored[row.id] = row.payload
                fresh.append(row)
            errors.append(
                None
                if payload == row.payload
                else Duplicate(
                    f"{self.name}: a different record of the id {row.id!r} is in the log; "
                    "records are never changed, append a new one under a new id"
                )
            )
        return errors, fresh


_COUNT = "SELECT {0}, count(*) FROM records WHERE {1} IS NOT NULL GROUP BY {0}"


def _ranges(filters: Filters) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the filters for ranges of values: column, SQL condition on it, and bindings."""
    if (source := filters.get("source")) is not None:
        yield "source", "{0} >= :source AND {0} < :source_end", _prefix(source)
    since, until = filters.get("since"), filters.get("until")
    if since is not None or until is not None:
        low = _EARLIEST if since is None else micros(since)
        high = _LATEST if until is None else micros(until)
        yield "at", "{0} >= :since AND {0} < :before", {"since": low, "before": high}


def _prefix(source: str) -> dict[str, str]:
    low = column_text(source)
    return {"source": low, "source_end": low + "\U0010ffff"}


def _check(filters: Filters) -> None:
    """Reject unknown filters and values, which would match everything or nothing by mistake."""
    for name, value in filters.items():
        if name not in Filters.__annotations__:
            known = ", ".join(Filters.__annotations__)
            close = get_close_matches(name, Filters.__annotations__, n=1)
            raise ConfigError(
                f"no filter {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"they are {known}")
            )
        menu: Collection[str] | None = {"kind": KINDS.values(), "outcome": list(Outcome)}.get(name)
        if menu is not None and value is not None and value not in menu:
            raise ConfigError(f"{name} is one of {', '.join(menu)}; found {value!r}")
        if name in ("since", "until") and not isinstance(value, datetime | None):
            raise ConfigError(f"{name} is a datetime, found {value!r}")


def advances(position: Any, first: int, last: int) -> bool:
    """Return whether a row is at a position where the next one may be.

    A damaged B-tree may return the same rows again and again.
    """
    return isinstance(position, int) and first <= position <= last


def digest_of(writer: str, sequence: int, payload: bytes) -> bytes:
    """Return the checksum of one record."""
    digest = hashlib.sha256(b"%b:%d:" % (writer.encode(), sequence))
    # Above 2047 bytes hashlib releases the GIL, and reacquiring it takes longer than hashing these bytes.
    for start in range(0, len(payload), 2047):
        digest.update(payload[start : start + 2047])
    return digest.digest()[:16]


def chain_of(previous: bytes, digest: bytes) -> bytes:
    """Return the chain value of one record; `previous` is empty for a writer's first record."""
    return hashlib.sha256(previous + digest).digest()[:16]


def micros(at: datetime) -> int:
    """Return a time as whole microseconds since 1970 UTC; a time without a zone is UTC."""
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def from_micros(value: int) -> datetime:
    """Return the time, UTC, of which `micros` returns `value`, or the nearest that a datetime can express."""
    try:
        return _EPOCH + value * _MICROSECOND
    except OverflowError:  # within hours of datetime.min or .max, in another zone
        return (datetime.min if value < 0 else datetime.max).replace(tzinfo=UTC)


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
    """Return text in a form that a database column can store; the payload has it unescaped.

    Lone surrogates have no UTF-8 form, and PostgreSQL does not store NUL.
    """
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
