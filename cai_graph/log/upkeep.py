"""Upkeep of a log: find damage (`verify`), save what is intact (`recover`), remove by age (`gc`)."""

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

from cai_graph import whole
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
    """Its place in the log, counted from 1."""
    id: str | None
    """Its id, as far as it can be read."""
    what: str
    """What does not fit."""


class Gap(NamedTuple):
    """Records that a writer committed and that are not in the log any more."""

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
    """Those of them that are damaged."""
    gaps: tuple[Gap, ...]
    """Records that are missing."""
    integrity: tuple[str, ...]
    """What the database's own check of the log's structure reports."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
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
    """Records of which nothing intact is left, those in `damaged` included."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What `gc` removed, or would remove."""

    trajectories: int
    """Trajectories removed."""
    others: int
    """Comparisons, reviews and feedback removed with them, or whose Trajectory is not in the log."""
    kept: int
    """Trajectories old enough that were kept, because of a review or a tag."""
    erased: bool
    """Whether nothing of what this or an earlier `gc` removed is left in the log's files. What stood in a
    file's records is overwritten, but SQLite may have left copies beside them, which go only when the file is
    written anew; a reader may hold up both until the next `gc`. Nor while there are `copies`. PostgreSQL
    overwrites when it uses the space again."""
    compacted: bool
    """Whether the file was written anew and space went back to the disk; otherwise the log uses it again. A
    file that anybody else has open is not written anew."""
    copies: tuple[Path, ...]
    """What was saved of a damaged WAL, or of one that stayed behind, and stands beside the file: it may hold
    what was removed. It is yours to delete, once you have recovered from it."""


# --- verify -------------------------------------------------------------------------------------------

_COLUMNS = ("id", "kind", "at", "trajectory_id", "outcome", "constitution", "source", "tags", "withheld")
_PAGE = " WHERE position > :position AND position <= :last ORDER BY position LIMIT 1000"
_LAST = 2**63 - 1


def verify(url: str | os.PathLike[str]) -> Verification:
    """Check every record of a log, each writer's sequence and chain, and the database's structure.

    Reads only. A changed byte in a record is found by its checksum, a removed or reordered record by its
    writer's sequence and chain. What is not found: that the latest records of a writer are missing.

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
            # A flipped byte in one link must not cast doubt on the next record as well, so both the
            # stored link and the one that should be there may be followed.
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
        except Exception as error:  # A damaged row may hold anything, of any type.
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
    """Return what is wrong with a row (empty where nothing is), its true checksum, and its writer."""
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
    """Yield the rows of records and of tombstones by position, while `gc` may turn some into the others.

    The tombstones are read after the records that stand among them, so that none is missed; what is found as
    both is one record that was removed meanwhile.
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
    """Return the next rows, each behind the one before it, whatever a damaged tree leads to."""
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

    Reads the file page by page, past SQLite, so that a damaged index or tree loses no intact record; each
    record is taken only if its checksum holds. The damaged file is left as it is. In the new log the
    records stand under one new writer; ids and contents are unchanged. The new log appears whole or not at
    all.

    Args:
        url: the damaged log. No process may have it open.
        into: the new log; must not exist.

    Raises:
        ConfigError: one of them is no file: PostgreSQL recovers itself.
        LogError: the damaged file cannot be read or holds no intact record, or `into` exists or cannot be
            written.
    """
    # Here, as what else is for SQLite alone, which a log in PostgreSQL does not load.
    from cai_graph.log.pages import scan

    source, target = (_file_of(log) for log in (url, into))
    # Where even the look fails, the writing says why.
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
    """Make a log of what was found."""
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
        # Below every position that the new log gives, so that none is given twice.
        stones = [dict(zip(_STONE, (-n, *stone), strict=True)) for n, stone in enumerate(found.tombstones, 1)]
        sql = f"INSERT INTO tombstones VALUES ({', '.join(f':{name}' for name in _STONE)})"
        store.change(lambda db: [db.execute(sql, stone) for stone in stones])
    finally:
        store.close()


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Give where to make a log, which stands at `target` once the body has ended, or goes away.

    Raises:
        LogError: it cannot be written.
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
            whole.sync_folder(target.parent)
    except OSError as error:
        raise LogError(f"{target}: cannot be made: {error.strerror}") from error
    except LogError as error:
        if isinstance(error.__cause__, apsw.Error):  # It names a file that is gone.
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
    """Remove Trajectories made before a time, with everything appended about them, however late.

    A tombstone of each keeps its id, when it was removed, and why; `get` says so, and `import` does not
    bring it back. Whether nothing of what was removed is left in a file, `erased` says.

    Args:
        url: the log.
        before: Trajectories made before this time are removed; a time without a zone is UTC.
        why: kept in the tombstones, such as "retention of 90 days".
        keep_reviewed: keep Trajectories that a person has reviewed.
        keep_tag: keep Trajectories that carry this tag.
        dry_run: count only.

    Raises:
        LogError: there is no log, or it cannot be read or written; what was removed until then stays removed.
    """
    open_store(url, read_only=True).close()  # to write would make a log where there is none
    store = open_store(url, read_only=dry_run)
    try:
        sweep = _Sweep(store, before, why, keep_reviewed=keep_reviewed, keep_tag=keep_tag)
        trajectories, others = sweep.planned() if dry_run else sweep.remove()
        erased = not dry_run and store.erase()  # which waits for readers
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
    """What `gc` removes: what was made before a time, apart from what is kept.

    It goes through the log once, in the order of positions, and removes a part at a time, so that the writers
    of other processes come through. At its end goes what came after its Trajectory had been removed.
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
            # Nothing added to the kind, or SQLite would look for it among all reviews, by the other index.
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
        """What is young and was appended about a Trajectory after that was removed; it may hold its texts."""

    def kept(self) -> int:
        """Return how many Trajectories are old enough and stay."""
        return self._count(self._kept)

    def planned(self) -> tuple[int, int]:
        """Return how many Trajectories and how many others `remove` would remove."""
        about = f"FROM records a WHERE a.trajectory_id IN (SELECT r.id {self._doomed})"
        others = self._count(about) + self._count(self._orphans) + self._count(self._late)
        return self._count(self._doomed), others

    def remove(self) -> tuple[int, int]:
        """Remove them; return how many Trajectories and how many others they were."""
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
        # Found outside the transaction, for which others wait.
        while found := [row[0] for row in self._store.rows(sql, self._bindings | {"after": after})]:
            if not advances(found[-1], after + 1, last):
                raise self._store.out_of_order()
            yield self._store.change(partial(self._bury, source, found))
            after = found[-1]

    def _bury(self, source: str, found: list[int], db: Database) -> tuple[int, int]:
        """Remove what is still to go of what was found; return how much, and how much that is about it."""
        among = self._store.among
        # A review may have come meanwhile, which keeps its Trajectory.
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
