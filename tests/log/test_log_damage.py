"""Damaged files and WALs: each reading ends, nothing intact is lost or written over, a recovery is whole."""

from __future__ import annotations

import random
import resource
import shutil
import stat
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import apsw
import pytest
from log_support import START, contents, everything, execute, fill, trajectory

from cai_graph.errors import CaiError, LogError
from cai_graph.log import Log, open_log, sqlite, upkeep
from cai_graph.log.sqlite import PAGE_SIZE, SQLiteStore
from cai_graph.log.store import MAX_ROWS, Row
from cai_graph.log.upkeep import gc, recover, verify
from cai_graph.trajectory import Trajectory, encode

FRAME = 24 + PAGE_SIZE


def crash(path: str | Path, into: Path) -> Path:
    """Copy an open log as a crash would leave it."""
    for suffix in ("", "-wal"):
        shutil.copyfile(f"{path}{suffix}", f"{into}{suffix}")
    return into


def flip(path: Path | str, offset: int, value: int = 1) -> None:
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= value
    Path(path).write_bytes(data)


def root_of(path: Path) -> int:
    """Return where the root page of the records begins."""
    ((number,),) = execute(path, "SELECT rootpage FROM sqlite_schema WHERE name = 'records'")
    return int((number - 1) * PAGE_SIZE)


def kinds_of(record: Trajectory, data: bytearray) -> int:
    """Return where in a file a row tells of its id, kind and writer: that they are texts of these lengths."""
    kinds = bytes(13 + 2 * length for length in (36, len("trajectory"), 16))
    return data.rindex(kinds, 0, data.index(encode(record)))


# --- readings end -------------------------------------------------------------------------------------


@pytest.fixture
def circular(tmp_path: Path) -> Path:
    """A log of 200 records whose tree leads from its end to its beginning."""
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        fill(log, 200)
    root = root_of(path)
    data = bytearray(path.read_bytes())
    cell = root + int.from_bytes(data[root + 12 : root + 14])
    data[root + 8 : root + 12] = data[cell : cell + 4]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_tree_that_leads_in_a_circle_ends_a_reading_with_an_error(
    circular: Path, newest_first: bool
) -> None:
    with open_log(circular, read_only=True) as log:
        lines = islice(log.lines(newest_first=newest_first), 1000)
        with pytest.raises(LogError, match="do not come in the order of their positions"):
            list(lines)


@pytest.mark.timeout(20)
def test_a_tree_that_leads_in_a_circle_ends_a_verification(circular: Path) -> None:
    found = verify(circular)
    assert "stand rows that are out of order" in found.integrity[-1]
    assert found.records < 200


@pytest.mark.timeout(20)
def test_a_sector_of_zeros_ends_no_verification_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = fill(log, 60)
    data = bytearray(path.read_bytes())
    row = kinds_of(made[30], data) - 5
    data[row : row + 512] = bytes(512)  # A row of zeros has the position 0, and NULL in each column.
    path.write_bytes(data)
    found = verify(path)
    assert not found.ok
    assert found.records == 59
    assert [(gap.first, gap.last) for gap in found.gaps] == [(31, 31)]


def test_a_record_with_null_in_its_columns_is_damaged_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = fill(log, 3)
    data = bytearray(path.read_bytes())
    data[kinds_of(made[0], data) + 3] = 0  # its sequence, which was 1
    path.write_bytes(data)
    with open_log(path, read_only=True) as log:
        with pytest.raises(LogError, match="its bytes do not match its checksum"):
            list(log.read())
        with pytest.raises(LogError, match="its bytes do not match its checksum"):
            log.get(made[0].id)


# --- the WAL ------------------------------------------------------------------------------------------


@pytest.fixture
def crashed(log: Log, tmp_path: Path) -> tuple[Path, list[Trajectory]]:
    """A log with 10 records in its file and 8 in its WAL, each in a transaction of its own."""
    made = fill(log, 10)
    log.close()
    with open_log(log.name) as again:
        for number in range(8):
            made.append(trajectory(number))
            again.append(made[-1]).result()
        return crash(log.name, tmp_path / "crashed.db"), made


def damaged_copies(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{path.name}-wal.damaged-*"))


def ends_of_transactions(wal: bytes) -> list[int]:
    """Return where each transaction of a WAL ends."""
    starts = range(32, len(wal), FRAME)
    return [start + FRAME for start in starts if any(wal[start + 4 : start + 8])]


def test_damage_that_hides_committed_records_is_reported_and_written_over_by_none(
    crashed: tuple[Path, list[Trajectory]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, made = crashed
    wal = Path(f"{path}-wal")
    flip(wal, ends_of_transactions(wal.read_bytes())[4] - 1000)
    damaged = wal.read_bytes()

    found = verify(path)
    assert "the WAL is damaged after frame" in found.integrity[0]
    assert contents(path) == made[:14]  # what SQLite reads
    assert "what was committed behind it cannot be read" in caplog.text
    assert wal.read_bytes() == damaged
    assert damaged_copies(path) == []

    with open_log(path) as log:
        after = fill(log, 1)
        (kept,) = damaged_copies(path)
        with open_log(path) as second:  # says and copies nothing again
            after += fill(second, 1)
    assert kept.read_bytes() == damaged
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert caplog.text.count(f"copied to {kept}") == 1
    assert verify(path).ok

    copy = tmp_path / "copy.db"
    shutil.copyfile(path, copy)
    shutil.copyfile(kept, f"{copy}-wal")
    recover(copy, tmp_path / "saved.db")
    saved = {record.id for record in contents(tmp_path / "saved.db")}
    assert saved == {record.id for record in [*made, *after]}


def test_damage_that_was_copied_sounds_no_alarm_while_a_reader_keeps_the_wal(
    crashed: tuple[Path, list[Trajectory]], caplog: pytest.LogCaptureFixture
) -> None:
    path, made = crashed
    wal = Path(f"{path}-wal")
    flip(wal, ends_of_transactions(wal.read_bytes())[2] - 1000)
    damaged = wal.read_bytes()
    reader = apsw.Connection(str(path))
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM records").get == 12
    with open_log(path) as log:
        for _ in range(2):  # writes over a part of what was copied
            fill(log, 1)
            assert verify(path).ok
            assert contents(path)[:12] == made[:12]
    with open_log(path):
        (kept,) = damaged_copies(path)
    assert kept.read_bytes() == damaged
    assert wal.read_bytes()[-FRAME:] == damaged[-FRAME:]
    assert caplog.text.count("what was committed behind it cannot be read") == 1
    reader.close()


def test_a_wal_that_is_damaged_once_more_is_copied_once_more(
    crashed: tuple[Path, list[Trajectory]], tmp_path: Path
) -> None:
    path, _ = crashed
    wal = Path(f"{path}-wal")
    flip(wal, ends_of_transactions(wal.read_bytes())[2] - 1000)
    reader = apsw.Connection(str(path))
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM records").get == 12
    with open_log(path) as log:
        for _ in range(12):
            fill(log, 1)
        crash(path, tmp_path / "again.db")
    reader.close()
    (first,) = damaged_copies(path)
    path, wal = tmp_path / "again.db", tmp_path / "again.db-wal"
    first.rename(path.with_name(first.name.replace("crashed", "again")))
    assert len(ends_of_transactions(wal.read_bytes())) > 12
    flip(wal, ends_of_transactions(wal.read_bytes())[6] - 1000)
    damaged = wal.read_bytes()

    assert "the WAL is damaged after frame" in verify(path).integrity[0]
    with open_log(path):
        _, second = sorted(damaged_copies(path), key=lambda copy: copy.stat().st_mtime_ns)
    assert second.read_bytes() == damaged


def test_damage_anywhere_before_the_last_transaction_of_a_wal_is_reported(
    crashed: tuple[Path, list[Trajectory]], tmp_path: Path
) -> None:
    path, made = crashed
    wal = Path(f"{path}-wal")
    sound = wal.read_bytes()
    *_, last, end = ends_of_transactions(sound)
    chance = random.Random(1)
    anywhere = [32 + FRAME * number + chance.randrange(FRAME) for number in range((last - 32) // FRAME)]
    for offset in [0, 9, 17, 25, *anywhere]:
        wal.write_bytes(sound)
        flip(wal, offset)
        assert "the WAL is damaged after frame" in verify(path).integrity[0], offset
    # A power cut may have torn the last one, which was not acknowledged then.
    for change in (lambda: flip(wal, end - 5000), lambda: wal.write_bytes(sound[: end - 5000])):
        wal.write_bytes(sound)
        change()
        assert verify(path).ok
    with open_log(path) as log:
        assert list(log.read()) == made[:-1]
    assert damaged_copies(path) == []


def test_a_damaged_wal_that_cannot_be_copied_is_not_written_over(
    crashed: tuple[Path, list[Trajectory]],
) -> None:
    path, _ = crashed
    wal = Path(f"{path}-wal")
    flip(wal, 32 + FRAME)
    damaged = wal.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(damaged) // 2, limit[1]))
    try:
        with pytest.raises(LogError, match="nor can it be copied"):
            open_log(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert wal.read_bytes() == damaged


def test_what_a_wal_holds_from_before_it_began_anew_hides_nothing(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_ERASE_S", 0.0)

    def long(number: int) -> Trajectory:
        return trajectory(number, metadata={"text": f"{number:04}" * 15_000})

    made = [long(number) for number in range(12)]
    for record in made:
        log.append(record).result()
    reader = apsw.Connection(log.name)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM records").get == 12
    gc(log.name, before=START + timedelta(minutes=6), why="age")
    reader.execute("ROLLBACK")
    reader.execute("PRAGMA wal_checkpoint(PASSIVE)")
    reader.close()
    made += [long(number) for number in range(12, 15)]
    for record in made[12:]:  # into the pages that `gc` overwrote
        log.append(record).result()
    path = crash(log.name, tmp_path / "crashed.db")
    wal = Path(f"{path}-wal").read_bytes()
    assert len({wal[start + 8 : start + 16] for start in range(32, len(wal), FRAME)}) == 2

    assert verify(path).ok
    found = recover(path, tmp_path / "new.db")
    assert (found.records, found.damaged) == (9, ())
    assert contents(tmp_path / "new.db") == made[6:]


# --- recovery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "value"), [(0, 8), (0, 15), (4, 8), (4, 1), (3, 1)])
def test_a_leaf_whose_header_is_damaged_loses_no_record(tmp_path: Path, offset: int, value: int) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = [trajectory(n, metadata={"text": f"{n:04}" * 750}) for n in range(40)]
        for appended in [log.append(record) for record in made]:
            appended.result()
    page = path.read_bytes().index(encode(made[20])) // PAGE_SIZE
    flip(path, page * PAGE_SIZE + offset, value)
    found = recover(path, tmp_path / "new.db")
    assert (found.records, found.damaged, found.gaps) == (40, (), ())
    assert contents(tmp_path / "new.db") == made


def test_a_recovery_that_is_interrupted_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = [trajectory(n, metadata={"text": "x" * 30_000}) for n in range(8)]
        for record in made:
            log.append(record).result()
    monkeypatch.setattr(upkeep, "PAGE_BYTES", 100_000)
    parts: list[Sequence[Row]] = []
    insert = SQLiteStore.insert

    def insert_until(last: int) -> Callable[[SQLiteStore, Sequence[Row]], list[CaiError | None]]:
        def inserted(store: SQLiteStore, rows: Sequence[Row]) -> list[CaiError | None]:
            parts.append(rows)
            if len(parts) == last:
                raise KeyboardInterrupt
            return insert(store, rows)

        return inserted

    monkeypatch.setattr(SQLiteStore, "insert", insert_until(2))
    with pytest.raises(KeyboardInterrupt):
        recover(path, tmp_path / "new.db")
    assert list(tmp_path.iterdir()) == [path]
    parts.clear()
    monkeypatch.setattr(SQLiteStore, "insert", insert_until(0))
    recover(path, tmp_path / "new.db")
    assert contents(tmp_path / "new.db") == made
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "new.db"]
    # Few are held in memory at a time.
    assert all(len(rows) <= MAX_ROWS for rows in parts)
    assert max(sum(len(row.payload) for row in rows) for rows in parts) < 150_000


def test_a_recovery_without_space_leaves_nothing_and_names_the_new_log(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        for number in range(4):
            log.append(trajectory(number, metadata={"text": "x" * 500_000})).result()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    try:
        with pytest.raises(LogError, match=rf"{tmp_path}/new.db: cannot be written, so nothing was"):
            recover(path, tmp_path / "new.db")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(LogError, match="cannot be made: No such file or directory"):
        recover(path, tmp_path / "no" / "new.db")


# --- what was removed ---------------------------------------------------------------------------------


def test_gc_says_overwritten_once_no_copy_of_what_it_removed_is_left(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    chance = random.Random(1)
    keeping: dict[str, Any] = {"before": START + timedelta(days=9), "why": "age", "keep_tag": "keep"}
    with open_log(path) as log:
        for _ in range(600):
            tag, text = ("keep", "kept") if chance.random() < 0.4 else ("go", "private")
            log.append(trajectory(tags=(tag,), metadata={"text": text * chance.randrange(400)}))
        log.flush()
        done = gc(path, **keeping)
        assert (done.erased, done.compacted) == (False, False)
        # SQLite has moved rows from page to page, and left copies behind.
        assert b"private" in everything(path)
    done = gc(path, **keeping)
    assert (done.trajectories, done.erased, done.compacted) == (0, True, True)
    assert b"private" not in everything(path)
    assert verify(path).ok
    before = path.stat().st_mtime_ns
    done = gc(path, **keeping)
    assert (done.trajectories, done.erased, done.compacted) == (0, True, False)
    assert path.stat().st_mtime_ns == before


def test_gc_says_overwritten_only_where_no_copy_of_a_wal_stands_beside_the_log(
    crashed: tuple[Path, list[Trajectory]],
) -> None:
    path, made = crashed
    wal = Path(f"{path}-wal")
    flip(wal, ends_of_transactions(wal.read_bytes())[4] - 1000)
    removing: dict[str, Any] = {"before": START + timedelta(days=9), "why": "asked for"}
    done = gc(path, **removing)
    (kept,) = damaged_copies(path)
    assert made[-1].id.encode() in kept.read_bytes()
    assert (done.trajectories, done.erased, done.copies) == (14, False, (kept,))
    kept.rename(left := Path(f"{wal}.left-20261130T000000.000000"))
    done = gc(path, **removing)
    assert (done.erased, done.copies) == (False, (left,))
    left.unlink()
    done = gc(path, **removing)
    assert (done.erased, done.copies) == (True, ())
