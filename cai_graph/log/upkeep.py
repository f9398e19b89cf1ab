"""Upkeep of a log file: find damage (`verify`), save what is intact (`recover`), remove by age (`gc`)."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from cai_graph.errors import CaiError, LogError
from cai_graph.log import is_open, path_of
from cai_graph.log.pages import scan
from cai_graph.log.sqlite import SQLiteStore, chain_of, digest_of
from cai_graph.log.store import column_text, micros, row_of
from cai_graph.trajectory import decode, now

__all__ = ["Damage", "Gap", "Recovery", "Removal", "Verification", "gc", "recover", "verify"]

_CHUNK = 500


class Damage(NamedTuple):
    """One record whose bytes are not those that were written."""

    position: int
    """Its place in the file, counted from 1."""
    id: str | None
    """Its id, as far as it can be read."""
    what: str
    """What does not fit."""


class Gap(NamedTuple):
    """Records that a writer committed and that are not in the file any more."""

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

    path: Path
    """The file."""
    records: int
    """Records that were checked."""
    damaged: tuple[Damage, ...]
    """Those of them that are damaged."""
    gaps: tuple[Gap, ...]
    """Records that are missing."""
    integrity: tuple[str, ...]
    """What SQLite's own check of the file's structure reports."""

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
    compacted: bool
    """Whether the space went back to the disk; otherwise the log uses it again."""


# --- verify -------------------------------------------------------------------------------------------

_COLUMNS = ("id", "kind", "at", "trajectory_id", "outcome", "constitution", "source", "tags", "withheld")
# As bytes: a flipped byte may leave a text that is no UTF-8.
_RECORDS = f"""
    SELECT position, {", ".join(f"CAST({name} AS BLOB)" for name in _COLUMNS)}, payload,
           CAST(writer AS BLOB), sequence, digest, chain
    FROM records WHERE position > ? ORDER BY position LIMIT 1000
"""
_TOMBSTONES = """
    SELECT position, CAST(writer AS BLOB), sequence, digest, chain
    FROM tombstones WHERE position > ? ORDER BY position LIMIT 1000
"""


def verify(url: str | os.PathLike[str]) -> Verification:
    """Check every record of a log, each writer's sequence and chain, and the file's structure.

    Reads only. A changed byte in a record is found by its checksum, a removed or reordered record by its
    writer's sequence and chain. What is not found: that the latest records of a writer are missing.

    Raises:
        LogError: the file cannot be opened at all, or was written by a newer release.
    """
    store = SQLiteStore(path_of(url), read_only=True)
    try:
        return _verify(store)
    finally:
        store.close()


def _verify(store: SQLiteStore) -> Verification:
    integrity = _integrity(store)
    damaged: list[Damage] = []
    gaps: list[Gap] = []
    links: dict[str, tuple[int, set[bytes]]] = {}
    records = 0
    merged = heapq.merge(
        _paged(store, _RECORDS, integrity), _paged(store, _TOMBSTONES, integrity), key=lambda row: row[0]
    )
    for row in merged:
        position, *columns, writer, sequence, digest, chain = row
        records += bool(columns)
        try:
            what, real, name = _fault(columns, writer, sequence, digest)
            seen, before = links.get(name, (0, {b""}))
            # A flipped byte in one link must not cast doubt on the next record as well, so both the
            # stored link and the one that should be there may be followed.
            expected = {chain_of(link, value) for link in before for value in (digest, real)}
            if not what and sequence <= seen:
                what = "stands out of its writer's order"
            elif not what and sequence == seen + 1 and chain not in expected:
                what = "does not follow its writer's record before it"
            elif not what and columns and sequence > seen + 1:
                gaps.append(Gap(name, seen + 1, sequence - 1))
            if not what:
                links[name] = (sequence, {chain})
            elif sequence == seen + 1:
                links[name] = (sequence, {chain} | expected)
        except Exception as error:  # A damaged row may hold anything, of any type.
            what = f"cannot be read: {error!r}"
        if what:
            id = columns[0] if columns else None
            damaged.append(
                Damage(position, None if id is None else bytes(id).decode("utf-8", "replace"), what)
            )
    return Verification(
        path=store.path,
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


def _integrity(store: SQLiteStore) -> list[str]:
    wal = Path(f"{store.path}-wal")
    crashed = wal.exists() and wal.stat().st_size > 0

    def check(db: apsw.Connection) -> list[str]:
        if crashed:
            # What a crash left in the WAL stays there; closing would move it into the file.
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        db.execute("PRAGMA cell_size_check = ON")
        return [str(row[0]) for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]

    try:
        return store.query(check)
    except LogError as error:
        return [str(error.__cause__ or error)]


def _paged(store: SQLiteStore, sql: str, integrity: list[str]) -> Iterator[tuple[Any, ...]]:
    position = 0
    while True:

        def page(db: apsw.Connection, after: int = position) -> list[Any]:
            rows: list[Any] = []
            try:
                rows.extend(db.execute(sql, (after,)))
            except apsw.CorruptError:
                if not rows:
                    raise
            return rows

        try:
            rows = store.query(page)
        except LogError as error:
            integrity.append(f"after position {position} nothing can be read: {error.__cause__ or error}")
            return
        if not rows:
            return
        yield from rows
        position = rows[-1][0]


# --- recover ------------------------------------------------------------------------------------------


def recover(url: str | os.PathLike[str], into: str | os.PathLike[str]) -> Recovery:
    """Write every intact record of a damaged log into a new one, in the order of their positions.

    Reads the file page by page, past SQLite, so that a damaged index or tree loses no intact record; each
    record is taken only if its checksum holds. The damaged file is left as it is. In the new log the
    records stand under one new writer; ids and contents are unchanged.

    Args:
        url: the damaged log. No process may have it open.
        into: the new log; must not exist.

    Raises:
        LogError: the damaged file cannot be read, or `into` exists or cannot be written.
    """
    source, target = path_of(url), path_of(into)
    if target.exists() and target.stat().st_size:
        raise LogError(f"{target}: exists; name a new file to recover into")
    if is_open(source):
        raise LogError(f"{source}: this process has the log open; close it before you recover it")
    with scan(source) as found:
        store = SQLiteStore(target)
        try:
            while part := list(islice(found.rows, _CHUNK)):
                store.insert(part)
            # Below every position that the new log gives, so that none is given twice.
            stones = [(-n, *stone) for n, stone in enumerate(found.tombstones, 1)]
            sql = "INSERT INTO tombstones VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            store.change(lambda db: db.executemany(sql, stones))
        finally:
            store.close()
    return Recovery(
        into=target,
        records=found.records,
        damaged=tuple(Damage(*damage) for damage in found.damaged),
        gaps=tuple(_missing(found.sequences)),
    )


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
    """Remove Trajectories made before a time, with everything appended about them.

    A tombstone of each keeps its id, when it was removed, and why; `get` says so, and `import` does not
    bring it back. What is removed is overwritten on the disk.

    Args:
        url: the log.
        before: Trajectories made before this time are removed; a time without a zone is UTC.
        why: kept in the tombstones, such as "retention of 90 days".
        keep_reviewed: keep Trajectories that a person has reviewed.
        keep_tag: keep Trajectories that carry this tag.
        dry_run: count only.

    Raises:
        LogError: the log cannot be read or written; what was removed until then stays removed.
    """
    path = path_of(url)
    if not path.exists():
        raise LogError(f"{path}: there is no log")
    store = SQLiteStore(path, read_only=dry_run)
    limit = micros(before)
    keep = ["0"]
    bindings: list[Any] = []
    if keep_reviewed:
        keep.append("EXISTS (SELECT 1 FROM records r WHERE r.trajectory_id = t.id AND r.kind = 'review')")
    if keep_tag is not None:
        keep.append("EXISTS (SELECT 1 FROM json_each(t.tags) WHERE value = ?)")
        bindings.append(keep_tag)
    kept = " OR ".join(keep)
    old = "FROM records t WHERE t.kind = 'trajectory' AND t.at < ?"
    orphans = (
        "FROM records o WHERE o.trajectory_id IS NOT NULL AND o.at < ? "
        "AND NOT EXISTS (SELECT 1 FROM records t WHERE t.id = o.trajectory_id)"
    )
    doomed = f"SELECT t.position, t.id {old} AND NOT ({kept})"

    def about(db: apsw.Connection, ids: list[str]) -> list[int]:
        sql = "SELECT position FROM records WHERE trajectory_id = ?"
        return [row[0] for id in ids for row in db.execute(sql, (id,))]

    try:
        spared = store.query(
            lambda db: next(db.execute(f"SELECT count(*) {old} AND ({kept})", (limit, *bindings)))[0]
        )
        trajectories = others = 0
        if dry_run:
            found = store.query(lambda db: list(db.execute(doomed, (limit, *bindings))))
            trajectories = len(found)
            others = store.query(lambda db: len(about(db, [id for _, id in found])))
            others += store.query(lambda db: next(db.execute(f"SELECT count(*) {orphans}", (limit,)))[0])
            return Removal(trajectories=trajectories, others=others, kept=spared, compacted=False)

        def bury(db: apsw.Connection, positions: list[int]) -> None:
            stamp = (micros(now()), column_text(why))
            db.executemany(
                "INSERT INTO tombstones SELECT position, id, kind, writer, sequence, digest, chain, ?, ? "
                "FROM records WHERE position = ?",
                ((*stamp, position) for position in positions),
            )
            db.executemany("DELETE FROM records WHERE position = ?", ((position,) for position in positions))

        def remove(db: apsw.Connection) -> tuple[int, int]:
            # A part at a time, so that the writers of other processes come through.
            found = list(db.execute(f"{doomed} LIMIT {_CHUNK}", (limit, *bindings)))
            with_them = about(db, [id for _, id in found])
            bury(db, [position for position, _ in found] + with_them)
            return len(found), len(with_them)

        def remove_orphans(db: apsw.Connection) -> int:
            found = [row[0] for row in db.execute(f"SELECT o.position {orphans} LIMIT {_CHUNK}", (limit,))]
            bury(db, found)
            return len(found)

        while (part := store.change(remove)) != (0, 0):
            trajectories += part[0]
            others += part[1]
        while orphaned := store.change(remove_orphans):
            others += orphaned
        compacted = store.compact() if trajectories or others else False
        return Removal(trajectories=trajectories, others=others, kept=spared, compacted=compacted)
    finally:
        store.close()
