"""Upkeep of a log: find damage (`verify`), save the intact records (`recover`), remove old ones (`gc`)."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph import atomic
from cai_graph.errors import CaiError, ConfigError, LogError
from cai_graph.log import is_open, open_store, place_of
from cai_graph.log.store import (
    MAX_ROWS,
    PAGE_BYTES,
    Database,
    Row,
    Store,
    advances,
    chain_of,
    column_text,
    digest_of,
    micros,
    row_of,
)
from cai_graph.trajectory import decode, now

if TYPE_CHECKING:
    from cai_graph.log.pages import Found

__all__ = ["Damage", "Gap", "Recovery", "Removal", "Verification", "gc", "recover", "verify"]

_CHUNK = 500


class Damage(NamedTuple):
    """One record whose bytes are not those that were written."""

    position: int
    """Its position in the log, counted from 1."""
    id: str | None
    """Its id, as far as it can be read."""
    what: str
    """The fault that was found."""


class Gap(NamedTuple):
    """Records that a writer committed and that are no longer in the log."""

    writer: str
    """The writer's id."""
    first: int
    """Sequence of the first missing record."""
    last: int
    """Sequence of the last missing record."""

    @property
    def records(self) -> int:
        """How many records are missing."""
        return self.last - self.first + 1


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found."""

    log: str
    """The log: its file, or its URL without a password."""
    records: int
    """Records that were checked."""
    damaged: tuple[Damage, ...]
    """The damaged records among these."""
    gaps: tuple[Gap, ...]
    """Records that are missing."""
    integrity: tuple[str, ...]
    """Faults that the database's own check of the log's structure reports."""

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not (self.damaged or self.gaps or self.integrity)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What `recover` saved, and what it could not."""

    into: Path
    """The new log."""
    records: int
    """Intact records, all of them in the new log."""
    damaged: tuple[Damage, ...]
    """Records that could be found but not saved."""
    gaps: tuple[Gap, ...]
    """Records of which no intact copy remains, including those in `damaged`."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What `gc` removed, or would remove."""

    trajectories: int
    """Trajectories removed."""
    others: int
    """Comparisons, reviews and feedback removed with these, or whose Trajectory is not in the log."""
    kept: int
    """Trajectories that are old enough but were kept, because of a review or a tag."""
    erased: bool
    """Whether the log's files contain nothing any more of the records that this or an earlier `gc` removed.
    Removed records in a file are overwritten, but SQLite may have left copies elsewhere in it, which
    disappear only when the file is rewritten; a reader may delay both until the next `gc`. False while there
    are `copies`, and for PostgreSQL, which overwrites removed records only when it reuses their space."""
    compacted: bool
    """Whether the file was rewritten, which returned space to the disk; otherwise the log reuses the space. A
    file that another connection has open is not rewritten."""
    copies: tuple[Path, ...]
    """Saved copies of damaged or orphaned WALs beside the file, which may contain removed records. Delete
    them once you have recovered the records that you need from them."""


# --- verify -------------------------------------------------------------------------------------------

_COLUMNS = ("id", "kind", "at", "trajectory_id", "outcome", "constitution", "source", "tags", "withheld")
_PAGE = " WHERE position > :position AND position <= :last ORDER BY position LIMIT 1000"
_LAST = 2**63 - 1


def verify(url: str | os.PathLike[str]) -> Verification:
    """Check every record of a log, each writer's sequence and chain, and the database's structure.

    Changes nothing. Detects a changed byte in a record by its checksum, and a removed or reordered record by
    its writer's sequence and chain. Does not detect that the latest records of a writer are missing.

    Raises:
        LogError: the log cannot be opened at all, or was written by a newer release.
    """
    store = open_store(url, read_only=True)
    try:
        return _verify(store)
    finally:
        store.close()


def _verify(store: Store) -> Verification:
    integrity = store.faults()
    damaged: list[Damage] = []
    gaps: list[Gap] = []
    links: dict[str, tuple[int, set[bytes]]] = {}
    records = 0
    linked = f"{store.raw('writer')}, sequence, digest, chain"
    stored = f"SELECT position, {linked}, {', '.join(map(store.raw, _COLUMNS))}, payload FROM records"
    buried = f"SELECT position, {linked}, NULL AS payload FROM tombstones"
    merged = _merged(store, stored + _PAGE, buried + _PAGE, integrity)
    for position, writer, sequence, digest, chain, *columns in merged:
        is_record = len(columns) > 1
        records += is_record
        try:
            what, real, name = _fault(columns if is_record else [], writer, sequence, digest)
            seen, before = links.get(name, (0, {b""}))
            # A flipped byte in one chain value must not make the next record look damaged as well, so the
            # next one may continue either the stored value or the correct one.
            expected = {chain_of(link, value) for link in before for value in (digest, real)}
            if not what and sequence <= seen:
                what = "stands out of its writer's order"
            elif not what and sequence == seen + 1 and chain not in expected:
                what = "does not follow its writer's record before it"
            elif not what and sequence > seen + 1:
                gaps.append(Gap(name, seen + 1, sequence - 1))
            if not what:
                links[name] = (sequence, {chain})
            elif sequence == seen + 1:
                links[name] = (sequence, {chain} | expected)
        except Exception as error:  # A damaged row may contain anything, of any type.
            what = f"cannot be read: {error!r}"
        if what:
            id = columns[0]
            damaged.append(
                Damage(position, None if id is None else bytes(id).decode("utf-8", "replace"), what)
            )
    return Verification(
        log=store.name,
        records=records,
        damaged=tuple(damaged),
        gaps=tuple(gaps),
        integrity=tuple(integrity),
    )


def _fault(columns: list[Any], writer: bytes, sequence: int, digest: bytes) -> tuple[str, bytes, str]:
    """Return the fault of a row (empty if it has none), its true checksum, and its writer."""
    name = writer.decode()
    if not columns:
        return "", digest, name
    *stored, payload = columns
    real = digest_of(name, sequence, payload)
    if real != digest:
        return "its bytes do not match its checksum", real, name
    try:
        expected = row_of(decode(payload), payload)
    except CaiError as error:
        return str(error), real, name
    wrong = [
        column
        for column, found, wanted in zip(_COLUMNS, stored, expected, strict=False)
        if found != (None if wanted is None else str(wanted).encode())
    ]
    return f"its column {', '.join(wrong)} does not match its payload" if wrong else "", real, name


def _merged(store: Store, stored: str, buried: str, integrity: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of records and of tombstones by position, while `gc` may be removing records.

    For each range of positions the tombstones are read after the records, so that no row is missed. A
    position found in both is a record that was removed in between, and is yielded once, as a record.
    """
    position = 0
    while position < _LAST:
        rows = _page(store, stored, position, _LAST, integrity)
        last = rows[-1][0] if rows else _LAST
        seen = {row[0] for row in rows}
        stones = (stone for stone in _paged(store, buried, position, last, integrity) if stone[0] not in seen)
        yield from heapq.merge(rows, stones, key=lambda row: row[0])
        position = last


def _paged(
    store: Store, sql: str, position: int, last: int, integrity: list[str]
) -> Iterator[tuple[Any, ...]]:
    while rows := _page(store, sql, position, last, integrity):
        yield from rows
        position = rows[-1][0]


def _page(store: Store, sql: str, position: int, last: int, integrity: list[str]) -> list[Any]:
    """Return the next rows, in increasing positions even if the B-tree is damaged; report faults found."""
    try:
        rows = store.page(sql, {"position": position, "last": last})
    except LogError as error:
        integrity.append(f"after position {position} nothing can be read: {error.__cause__ or error}")
        return []
    found: list[Any] = []
    for row in rows:
        if advances(row[0], position + 1, last):
            found.append(row)
            position = row[0]
        elif (what := f"after position {position} stand rows that are out of order") not in integrity:
            integrity.append(what)
    return found


# --- recover ------------------------------------------------------------------------------------------

_STONE = ("position", "id", "kind", "writer", "sequence", "digest", "chain", "removed_at", "why")


def recover(url: str | os.PathLike[str], into: str | os.PathLike[str]) -> Recovery:
    """Write every intact record of a damaged log file into a new one, in the order of their positions.

    Reads the file page by page, bypassing SQLite, so that a damaged index or B-tree loses no intact record; a
    record is accepted only if its checksum matches. The damaged file is not changed. In the new log all
    records have one new writer; ids and contents are unchanged. The new log is written atomically.

    Args:
        url: the damaged log. No process may have it open.
        into: the new log; must not exist.

    Raises:
        ConfigError: one of the two is not a file; PostgreSQL recovers itself.
        LogError: the damaged file cannot be read or contains no intact record, or `into` exists or cannot be
            written.
    """
    # Imported here, like all that is specific to SQLite: a log in PostgreSQL does not load it.
    from cai_graph.log.pages import scan

    source, target = (_file_of(log) for log in (url, into))
    # If this check itself fails, writing raises an error with the reason.
    if os.path.exists(target) and os.path.getsize(target):
        raise LogError(f"{target}: exists; name a new file to recover into")
    if is_open(source):
        raise LogError(f"{source}: this process has the log open; close it before you recover it")
    with scan(source) as found:
        if not (found.records or found.tombstones):
            raise LogError(
                f"{source}: holds no intact record of a log, so nothing was written; name another file, or "
                "restore a backup"
            )
        with _appearing(target) as work:
            _save(found, work)
    return Recovery(
        into=target,
        records=found.records,
        damaged=tuple(Damage(*damage) for damage in found.damaged),
        gaps=tuple(_missing(found.sequences)),
    )


def _save(found: Found, path: Path) -> None:
    """Write a log with the records and tombstones that were found."""
    from cai_graph.log.sqlite import SQLiteStore

    store = SQLiteStore(path)
    try:
        part: list[Row] = []
        size = 0
        for row in found.rows:
            part.append(row)
            size += len(row.payload)
            if len(part) == MAX_ROWS or size > PAGE_BYTES:
                store.insert(part)
                part, size = [], 0
        store.insert(part)
        # Negative positions, which the new log never assigns, so that none is used twice.
        stones = [dict(zip(_STONE, (-n, *stone), strict=True)) for n, stone in enumerate(found.tombstones, 1)]
        sql = f"INSERT INTO tombstones VALUES ({', '.join(f':{name}' for name in _STONE)})"
        store.change(lambda db: [db.execute(sql, stone) for stone in stones])
    finally:
        store.close()


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a log; it is moved to `target` when the body ends, or deleted on error.

    Raises:
        LogError: the log cannot be written.
    """
    import apsw

    from cai_graph.log.wal import set_aside, wal_of

    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            work = Path(folder, target.name)
            yield work
            if wal_of(work) is not None:
                raise LogError(f"{target}: cannot be written, since its WAL stays; free some space")
            if (stale := wal_of(target)) is not None:
                set_aside(target, stale)
            work.replace(target)
            atomic.sync_folder(target.parent)
    except OSError as error:
        raise LogError(f"{target}: cannot be made: {error.strerror}") from error
    except LogError as error:
        if isinstance(error.__cause__, apsw.Error):  # Its message names the temporary file, which is gone.
            raise LogError(f"{target}: cannot be written, so nothing was: {error.__cause__}") from error
        raise


def _file_of(url: str | os.PathLike[str]) -> Path:
    place = place_of(url)
    if place.path is None:
        raise ConfigError(
            f"{place.name}: PostgreSQL recovers itself when it starts; after damage to its disk restore a "
            "backup, and `cai log verify` says whether it is whole"
        )
    return place.path


def _missing(sequences: dict[str, set[int]]) -> Iterator[Gap]:
    for writer, present in sorted(sequences.items()):
        before = 0
        for sequence in sorted(present):
            if sequence > before + 1:
                yield Gap(writer, before + 1, sequence - 1)
            before = sequence


# --- gc -----------------------------------------------------------------------------------------------


def gc(
    url: str | os.PathLike[str],
    *,
    before: datetime,
    why: str,
    keep_reviewed: bool = True,
    keep_tag: str | None = None,
    dry_run: bool = False,
) -> Removal:
    """Remove Trajectories made before a time, with everything appended about them, even if it was later.

    A tombstone for each records its id, the time of the removal and the reason; `get` reports these, and
    `import_` does not add the record again. `Removal.erased` is True if the files no longer contain it.

    Args:
        url: the log.
        before: Trajectories made before this time are removed; a time without a zone is UTC.
        why: the reason, stored in the tombstones, such as "retention of 90 days".
        keep_reviewed: keep Trajectories that a person has reviewed.
        keep_tag: keep Trajectories that carry this tag.
        dry_run: count only.

    Raises:
        LogError: there is no log, or it cannot be read or written; records removed before then stay removed.
    """
    open_store(url, read_only=True).close()  # opening it for writing would create a missing log
    store = open_store(url, read_only=dry_run)
    try:
        sweep = _Sweep(store, before, why, keep_reviewed=keep_reviewed, keep_tag=keep_tag)
        trajectories, others = sweep.planned() if dry_run else sweep.remove()
        erased = not dry_run and store.erase()  # waits for readers
        compacted = not dry_run and store.compact()
        copies = tuple(store.copies())
        return Removal(
            trajectories=trajectories,
            others=others,
            kept=sweep.kept(),
            erased=(erased or compacted) and not copies,
            compacted=compacted,
            copies=copies,
        )
    finally:
        store.close()


class _Sweep:
    """One removal by `gc`: selects the records made before a time, except those to keep, and removes them.

    It goes through the log once, in the order of positions, and removes a chunk at a time, so that writers of
    other processes can commit in between. Last, it removes what was appended about a Trajectory after that
    was removed.
    """

    def __init__(
        self, store: Store, before: datetime, why: str, *, keep_reviewed: bool, keep_tag: str | None
    ) -> None:
        self._store = store
        self._why = column_text(why)
        first, last = store.span({"until": before})
        self._bindings: dict[str, Any] = {"limit": micros(before), "after": first - 1, "last": last}
        keep = ["1 = 0"]
        if keep_reviewed:
            # `|| ''` keeps SQLite from using the index on kinds, in which it would scan all reviews.
            review = "v.trajectory_id = r.id AND v.kind || '' = 'review'"
            keep.append(f"EXISTS (SELECT 1 FROM records v WHERE {review})")
        if keep_tag is not None:
            keep.append(store.tagged)
            self._bindings["tag"] = json.dumps(keep_tag)
        old = "FROM records r WHERE r.at < :limit AND r.position > :after AND r.position <= :last"
        self._kept = f"{old} AND r.kind = 'trajectory' AND ({' OR '.join(keep)})"
        self._doomed = f"{old} AND r.kind = 'trajectory' AND NOT ({' OR '.join(keep)})"
        orphan = "NOT EXISTS (SELECT 1 FROM records t WHERE t.id = r.trajectory_id)"
        self._orphans = f"{old} AND r.trajectory_id IS NOT NULL AND {orphan}"
        self._late = (
            f"FROM records r WHERE r.trajectory_id IS NOT NULL AND r.at >= :limit AND {orphan} "
            "AND EXISTS (SELECT 1 FROM tombstones s WHERE s.id = r.trajectory_id)"
        )
        """Newer records that were appended about a Trajectory after that was removed; they may quote it."""

    def kept(self) -> int:
        """Return how many Trajectories are old enough but are kept."""
        return self._count(self._kept)

    def planned(self) -> tuple[int, int]:
        """Return how many Trajectories and how many others `remove` would remove."""
        about = f"FROM records a WHERE a.trajectory_id IN (SELECT r.id {self._doomed})"
        others = self._count(about) + self._count(self._orphans) + self._count(self._late)
        return self._count(self._doomed), others

    def remove(self) -> tuple[int, int]:
        """Remove the records; return how many Trajectories and how many others were removed."""
        trajectories = others = 0
        for removed, with_them in self._remove(self._doomed):
            trajectories += removed
            others += with_them
        for removed, with_them in self._remove(self._orphans):
            others += removed + with_them
        late = sorted(
            position for (position,) in self._store.rows(f"SELECT r.position {self._late}", self._bindings)
        )
        for start in range(0, len(late), _CHUNK):
            others += sum(self._store.change(partial(self._bury, self._late, late[start : start + _CHUNK])))
        return trajectories, others

    def _count(self, source: str) -> int:
        ((number,),) = self._store.rows(f"SELECT count(*) {source}", self._bindings)
        return int(number)

    def _remove(self, source: str) -> Iterator[tuple[int, int]]:
        sql = f"SELECT r.position {source} ORDER BY r.position LIMIT {_CHUNK}"
        after, last = self._bindings["after"], self._bindings["last"]
        # Selected outside the transaction, which blocks other writers.
        while found := [row[0] for row in self._store.rows(sql, self._bindings | {"after": after})]:
            if not advances(found[-1], after + 1, last):
                raise self._store.out_of_order()
            yield self._store.change(partial(self._bury, source, found))
            after = found[-1]

    def _bury(self, source: str, found: list[int], db: Database) -> tuple[int, int]:
        """Remove the found records that are still to be removed, with the records about them; return both
        numbers.
        """
        among = self._store.among
        # Selected again: a review may have been appended meanwhile, for which the Trajectory is kept.
        sql = f"SELECT r.position, r.id {source} AND {among('r.position', 'found')}"
        doomed = list(db.execute(sql, self._bindings | {"found": self._store.packed(found)}))
        ids = self._store.packed([id for _, id in doomed])
        sql = f"SELECT position FROM records WHERE {among('trajectory_id', 'ids')}"
        about = [row[0] for row in db.execute(sql, {"ids": ids})]
        dead = {"dead": self._store.packed([position for position, _ in doomed] + about)}
        db.execute(
            "INSERT INTO tombstones SELECT position, id, kind, writer, sequence, digest, chain, :at, :why "
            f"FROM records WHERE {among('position', 'dead')}",
            dead | {"at": micros(now()), "why": self._why},
        )
        db.execute(f"DELETE FROM records WHERE {among('position', 'dead')}", dead)
        return len(doomed), len(about)
