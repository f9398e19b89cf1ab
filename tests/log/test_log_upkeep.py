"""Damage is found, what is intact is saved, and what is removed leaves a tombstone."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
from log_support import (
    START,
    comparison,
    contents,
    everything,
    execute,
    feedback,
    fill,
    review,
    trajectory,
)

from cai_graph.errors import CaiError, DataError, LogError
from cai_graph.log import Import, import_, open_log, open_store, sqlite, upkeep
from cai_graph.log.store import Database, digest_of
from cai_graph.log.upkeep import Gap, _verify, gc, recover, verify
from cai_graph.trajectory import Record, encode

PAGE = 32768


def make(path: str | Path, count: int = 40, size: int = 3000) -> list[Record]:
    made: list[Record] = [trajectory(n, metadata={"text": f"{n:04}" * (size // 4)}) for n in range(count)]
    made += [feedback(record.id) for record in made[:3]]
    with open_log(path) as log:
        for future in [log.append(record) for record in made]:
            future.result()
    return made


def clear(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def damage(path: Path, sound: bytes, offset: int, value: int) -> None:
    clear(path)
    changed = bytearray(sound)
    changed[offset] ^= value
    path.write_bytes(changed)


# --- verify -------------------------------------------------------------------------------------------


def test_a_sound_log_verifies(url: str) -> None:
    with pytest.raises(LogError, match="there is no log"):
        verify(url)
    made = make(url)
    found = verify(url)
    assert found.ok, found
    assert found.records == len(made)


@pytest.mark.parametrize("before", ["records", "tombstones"])
def test_what_gc_removes_beside_a_verification_is_neither_damaged_nor_missing(
    url: str, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(url, count=1500, size=40)  # more than a page
    store = open_store(url, read_only=True)
    page, asked = store.page, 0

    def page_beside_gc(sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        nonlocal asked
        asked += f"FROM {before}" in sql
        if asked == 1:
            gc(url, before=START + timedelta(minutes=1200), why="age")
        return page(sql, bindings)

    monkeypatch.setattr(store, "page", page_beside_gc)
    found = _verify(store)
    store.close()
    assert found.ok, found
    assert verify(url).ok


def test_every_flipped_byte_inside_a_record_is_found_and_never_read_as_data(tmp_path: Path) -> None:
    made = make(tmp_path / "sound.db")
    sound = (tmp_path / "sound.db").read_bytes()
    chance = random.Random(1)
    path = tmp_path / "cai.db"
    for _ in range(150):
        record = chance.choice(made)
        payload = encode(record)
        start = sound.index(payload)
        # From the id, which stands first in the row, to the payload's end; ids are also in the payload,
        # so the last occurrence before it is the column.
        first = sound.rindex(record.id.encode(), 0, start)
        offset = chance.randrange(first, start + len(payload))
        damage(path, sound, offset, chance.randrange(1, 256))
        try:
            found = verify(path)
            assert not found.ok, offset
        except LogError:
            continue  # so damaged that it does not open
        with open_log(path, read_only=True) as log:
            try:
                for read, original in zip(log.read(), made, strict=False):
                    assert read == original, offset
            except CaiError:
                pass


def test_verify_leaves_a_crashed_log_as_it_is(tmp_path: Path) -> None:
    crashed = tmp_path / "crashed.db"
    with open_log(tmp_path / "cai.db") as log:
        log.append(trajectory()).result()
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{log.name}{suffix}", f"{crashed}{suffix}")
    before = [Path(f"{crashed}{suffix}").read_bytes() for suffix in ("", "-wal")]
    assert verify(crashed).records == 1
    assert [Path(f"{crashed}{suffix}").read_bytes() for suffix in ("", "-wal")] == before


def test_a_removed_record_is_a_gap_in_its_writer_s_sequence(url: str) -> None:
    make(url)
    execute(url, "DELETE FROM records WHERE sequence IN (5, 6, 9)")
    found = verify(url)
    assert [(gap.first, gap.last, gap.records) for gap in found.gaps] == [(5, 6, 2), (9, 9, 1)]
    assert found.damaged == ()
    assert not found.ok


def test_a_record_that_is_missing_before_a_tombstone_is_a_gap(url: str) -> None:
    with open_log(url) as log:
        for number in (100, 101, 102, 1, 103):
            log.append(trajectory(number)).result()
    gc(url, before=START + timedelta(minutes=50), why="age")  # the fourth
    assert verify(url).ok
    execute(url, "DELETE FROM records WHERE sequence = 3")
    assert [(gap.first, gap.last) for gap in verify(url).gaps] == [(3, 3)]


def test_a_forged_record_breaks_the_chain_once(url: str) -> None:
    made = make(url)
    ((writer,),) = execute(url, "SELECT writer FROM records WHERE sequence = 7")
    forged = encode(trajectory(6, id=made[6].id, error="forged"))
    digest = digest_of(writer, 7, forged)
    execute(url, "UPDATE records SET payload = ?, digest = ? WHERE sequence = 7", forged, digest)
    found = verify(url)
    assert [(one.id, one.what) for one in found.damaged] == [
        (made[6].id, "does not follow its writer's record before it")
    ]
    assert found.gaps == ()


def test_a_changed_payload_is_found_and_never_read_as_data(url: str) -> None:
    made = make(url, count=5)
    changed = encode(made[2]).replace(b"revised", b"Revised")
    execute(url, "UPDATE records SET payload = ? WHERE id = ?", changed, made[2].id)
    (one,) = verify(url).damaged
    assert (one.id, one.what) == (made[2].id, "its bytes do not match its checksum")
    with open_log(url, read_only=True) as log:
        with pytest.raises(LogError, match=f"record '{made[2].id}' is damaged"):
            list(log.read())
        with pytest.raises(LogError, match="is damaged"):
            log.get(made[2].id)
        assert log.get(made[3].id) == made[3]


def test_a_changed_column_is_found_although_the_payload_is_intact(url: str) -> None:
    made = make(url)
    execute(url, "UPDATE records SET outcome = 'KEPT', source = 'x' WHERE sequence = 3")
    (one,) = verify(url).damaged
    assert (one.position, one.id) == (3, made[2].id)
    assert one.what == "its column outcome, source does not match its payload"


@pytest.mark.parametrize("column", ["digest", "chain"])
def test_a_changed_checksum_casts_no_doubt_on_the_neighbours(url: str, column: str) -> None:
    make(url)
    execute(url, f"UPDATE records SET {column} = ? WHERE sequence = 3", bytes(16))
    assert [one.position for one in verify(url).damaged] == [3]


def test_swapped_records_are_found(url: str) -> None:
    make(url)
    if url.startswith("postgresql"):
        execute(url, "ALTER TABLE records ALTER position SET GENERATED BY DEFAULT")
    for old, new in ((3, -1), (4, 3), (-1, 4)):
        execute(url, "UPDATE records SET position = ? WHERE position = ?", new, old)
    assert not verify(url).ok


def test_a_damaged_tree_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    make(path)
    sound = path.read_bytes()
    clear(path)
    path.write_bytes(sound[:PAGE] + b"\xff" * PAGE + sound[2 * PAGE :])
    found = verify(path)
    assert found.integrity
    assert not found.ok


# --- recover ------------------------------------------------------------------------------------------


def test_recovering_a_sound_log_gives_it_all(tmp_path: Path) -> None:
    made = make(tmp_path / "cai.db")
    found = recover(tmp_path / "cai.db", tmp_path / "new.db")
    assert (found.records, found.damaged, found.gaps) == (len(made), (), ())
    assert contents(tmp_path / "new.db") == made
    assert verify(tmp_path / "new.db").ok


def test_after_any_flipped_byte_every_intact_record_is_recovered_and_none_is_wrong(tmp_path: Path) -> None:
    made = make(tmp_path / "sound.db", count=25)
    sound = (tmp_path / "sound.db").read_bytes()
    cells = [(sound.index(encode(record)) - 200, encode(record)) for record in made]
    chance = random.Random(2)
    path, into = tmp_path / "cai.db", tmp_path / "new.db"
    anywhere = [chance.randrange(len(sound)) for _ in range(25)]
    heads = [number * PAGE + chance.randrange(16) for number in range(len(sound) // PAGE)]
    for offset in [*anywhere, *heads]:
        damage(path, sound, offset, chance.randrange(1, 256))
        clear(into)
        recover(path, into)
        saved = contents(into)
        hit = [record for record, (start, payload) in zip(made, cells, strict=True)
               if start <= offset < start + 200 + len(payload)]  # fmt: skip
        assert {encode(record) for record in made if record not in hit} <= set(map(encode, saved)), offset
        assert [record for record in made if record in saved] == saved, offset
        assert verify(into).ok


def test_a_lost_page_loses_only_its_own_records_and_says_which(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    made = make(path)
    sound = path.read_bytes()
    page = sound.index(encode(made[20])) // PAGE
    gone = [record for record in made if sound.index(encode(record)) // PAGE == page]
    clear(path)
    path.write_bytes(sound[: page * PAGE] + bytes(PAGE) + sound[(page + 1) * PAGE :])
    found = recover(path, tmp_path / "new.db")
    assert contents(tmp_path / "new.db") == [record for record in made if record not in gone]
    (gap,) = found.gaps
    first = made.index(gone[0]) + 1
    assert gap == Gap(gap.writer, first, first + len(gone) - 1)


@pytest.mark.parametrize("keep", [0.55, 0.8])
def test_a_truncated_file_gives_what_is_left_of_it(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cai.db"
    made = make(path, 200)
    sound = path.read_bytes()
    cut = int(len(sound) * keep)
    clear(path)
    path.write_bytes(sound[:cut])
    recover(path, tmp_path / "new.db")
    left = [record for record in made if encode(record) in sound[:cut]]
    assert left
    assert contents(tmp_path / "new.db") == left


def test_what_only_the_wal_holds_is_recovered(tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        made = [trajectory(n) for n in range(30)]
        for record in made:
            log.append(record).result()
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{log.name}{suffix}", tmp_path / f"crashed.db{suffix}")
    with (tmp_path / "crashed.db").open("r+b") as file:
        file.truncate(100)
    recover(tmp_path / "crashed.db", tmp_path / "new.db")
    assert contents(tmp_path / "new.db") == made


def test_long_records_with_overflow_pages_are_recovered(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    made = make(path, count=6, size=100_000)
    sound = path.read_bytes()
    offset = sound.index(b"0003" * 1000)
    damage(path, sound, offset, 1)
    found = recover(path, tmp_path / "new.db")
    assert contents(tmp_path / "new.db") == [record for record in made if record is not made[3]]
    assert [(one.id, one.what) for one in found.damaged] == [
        (made[3].id, "its bytes do not match its checksum")
    ]


def test_a_recovered_log_is_safe_on_the_disk_once_it_is_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "cai.db")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))

    recover(tmp_path / "cai.db", tmp_path / "new.db")

    assert synced[-1] == str(tmp_path)  # in which the file has its name


def test_recover_never_writes_over_a_file_nor_reads_an_open_one(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    make(path)
    (tmp_path / "new.db").write_text("mine")
    with pytest.raises(LogError, match=r"new.db: exists; name a new file"):
        recover(path, tmp_path / "new.db")
    with open_log(path), pytest.raises(LogError, match="this process has the log open"):
        recover(path, tmp_path / "other.db")
    with pytest.raises(LogError, match="cannot be read"):
        recover(tmp_path / "absent.db", tmp_path / "other.db")
    with pytest.raises(LogError, match="cannot be made: File name too long"):
        recover(path, tmp_path / f"{'x' * 300}.db")


def test_what_was_appended_again_after_it_was_removed_is_recovered(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    again, gone = trajectory(), trajectory(1)
    with open_log(path) as log:
        for record in (again, gone):
            log.append(record).result()
    for number in (1, 2):
        gc(path, before=START + timedelta(days=1), why="age")
        with open_log(path) as log:
            log.append(again).result()
        found = recover(path, tmp_path / f"new{number}.db")
        assert (found.records, found.gaps) == (1, ())
        assert contents(tmp_path / f"new{number}.db") == [again]
        path = tmp_path / f"new{number}.db"
    with open_log(path) as log, pytest.raises(DataError, match="was removed"):
        log.get(gone.id)


def tombstones(path: Path) -> set[tuple[Any, ...]]:
    return set(
        execute(path, "SELECT id, kind, writer, sequence, digest, chain, removed_at, why FROM tombstones")
    )


def test_no_remnant_of_a_tombstone_is_recovered_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        fill(log, 1000)
    # The table's first page becomes one that leads to others, and keeps parts of the rows that it had.
    gc(path, before=START + timedelta(minutes=300), why="x")
    found = recover(path, tmp_path / "new.db")
    assert tombstones(tmp_path / "new.db") == tombstones(path)
    assert found.gaps == ()


def test_a_tombstone_whose_time_is_no_number_ends_no_recovery(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = fill(log, 3)
    gc(path, before=START + timedelta(minutes=2), why="age")
    sound = path.read_bytes()
    digest, number, blob = b"\x2c", b"\x06", b"\x1c"  # how a row tells the kinds of its columns
    assert sound.count(digest * 2 + number) == 2
    path.write_bytes(sound.replace(digest * 2 + number, digest * 2 + blob, 1))
    recover(path, tmp_path / "new.db")
    assert contents(tmp_path / "new.db") == made[2:]
    assert len(tombstones(tmp_path / "new.db")) == 1


@pytest.mark.parametrize("newest_first", [False, True])
def test_what_stood_after_a_removed_record_is_not_guessed_in_a_recovered_log(
    tmp_path: Path, newest_first: bool
) -> None:
    path = tmp_path / "cai.db"
    made = [trajectory(number) for number in (50, 1, 51)]
    with open_log(path) as log:
        for record in made:
            log.append(record).result()
    gc(path, before=START + timedelta(minutes=4), why="age")
    recover(path, tmp_path / "new.db")
    with open_log(tmp_path / "new.db") as log:
        with pytest.raises(DataError, match="was removed before the log was recovered"):
            list(log.read(after=made[1].id, newest_first=newest_first))
        assert list(log.read(after=made[0].id)) == [made[2]]


# --- gc -----------------------------------------------------------------------------------------------


def test_gc_removes_what_is_old_with_all_that_speaks_of_it(url: str) -> None:
    made = [trajectory(n, metadata={"text": f"private{n:04}"}) for n in range(30)]
    reviewed, tagged = made[4], trajectory(5, tags=("hold",))
    made[5] = tagged
    about = [
        feedback(made[0].id, at=START + timedelta(days=9), note="private"),
        comparison(made[1].id),
        review(reviewed.id),
        feedback("nobody", at=START - timedelta(days=1)),
        feedback(made[25].id, at=START - timedelta(days=1)),
    ]
    with open_log(url) as log:
        for record in [*made, *about]:
            log.append(record).result()
        arguments = {"before": START + timedelta(minutes=20), "why": "retention of a day", "keep_tag": "hold"}
        planned = gc(url, **arguments, dry_run=True)  # type: ignore[arg-type]
        assert (planned.trajectories, planned.others, planned.kept) == (18, 3, 2)
        assert log.stats().trajectories == 30
        done = gc(url, **arguments)  # type: ignore[arg-type]
        assert (done.trajectories, done.others, done.kept) == (18, 3, 2)
        left = [reviewed, tagged, *made[20:], about[2], about[4]]
        assert list(log.read()) == left
        assert log.stats().removed == 21
        with pytest.raises(DataError, match=r"was removed on \d{4}-\d\d-\d\d: retention of a day"):
            log.get(made[0].id)
        assert list(log.read(after=made[19].id)) == left[2:]
        log.append(trajectory(50)).result()
    found = verify(url)
    assert found.ok, found
    raw = everything(url)
    assert b"private0000" not in raw
    assert b"private0029" in raw
    assert gc(url, **arguments).trajectories == 0  # type: ignore[arg-type]


def test_gc_removes_what_was_appended_about_a_trajectory_after_it_had_removed_that(url: str) -> None:
    made = [trajectory(number) for number in (100, 1, 2, 101)]
    before = START + timedelta(minutes=50)
    with open_log(url) as log:
        for record in made:
            log.append(record).result()
        gc(url, before=before, why="age")
        again = made[2]
        log.append(again).result()
        young = START + timedelta(days=9)
        late = [comparison(made[1].id, at=young), feedback(made[1].id, at=young)]
        stay = [comparison(made[0].id, at=young), feedback(again.id, at=young), feedback("new", at=young)]
        for record in [*late, *stay]:
            log.append(record).result()
        arguments = {"before": START, "why": "age"}  # nothing else is as old
        planned = gc(url, **arguments, dry_run=True)  # type: ignore[arg-type]
        assert (planned.trajectories, planned.others) == (0, 2)
        done = gc(url, **arguments)  # type: ignore[arg-type]
        assert (done.trajectories, done.others) == (0, 2)
        assert list(log.read()) == [made[0], made[3], again, *stay]
        with pytest.raises(DataError, match="was removed"):
            log.get(late[0].id)
    assert verify(url).ok


def test_gc_looks_at_what_it_keeps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        for number in range(40):
            log.append(trajectory(number, tags=("hold",) if number % 2 else ()))
    looked = 0

    def instr(text: str, part: str) -> int:  # SQLite's own, which finds a tag
        nonlocal looked
        looked += 1
        return text.find(part) + 1

    def connect(path: Path, **options: Any) -> apsw.Connection:
        db = real(path, **options)
        db.create_scalar_function("instr", instr, 2)
        return db

    real = sqlite.connect
    monkeypatch.setattr(sqlite, "connect", connect)
    monkeypatch.setattr(upkeep, "_CHUNK", 5)
    done = gc(path, before=START + timedelta(days=1), why="age", keep_tag="hold")

    assert (done.trajectories, done.kept) == (20, 20)
    assert looked == 2 * 20  # to pass it by, and to count it


def test_gc_finds_a_review_without_looking_at_all_of_them(tmp_path: Path) -> None:
    make(tmp_path / "cai.db")
    store = open_store(tmp_path / "cai.db", read_only=True)
    sweep = upkeep._Sweep(store, START, "age", keep_reviewed=True, keep_tag=None)
    plan = str(store.rows(f"EXPLAIN QUERY PLAN SELECT 1 {sweep._doomed}", sweep._bindings))
    store.close()
    assert "SEARCH v USING INDEX records_trajectory" in plan, plan


def test_a_review_that_comes_while_gc_is_at_work_keeps_its_trajectory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cai.db"
    change = sqlite.SQLiteStore.change
    with open_log(path) as log:
        made = fill(log, 3)

        def change_late(store: sqlite.SQLiteStore, write: Callable[[Database], Any]) -> Any:
            log.append(review(made[1].id, id="late")).result()
            return change(store, write)

        monkeypatch.setattr(sqlite.SQLiteStore, "change", change_late)
        done = gc(path, before=START + timedelta(days=1), why="age")
        assert (done.trajectories, done.others, done.kept) == (2, 0, 1)
        assert [record.id for record in log.read()] == [made[1].id, "late"]


def test_gc_says_whether_what_it_removed_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_ERASE_S", 0.0)
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        for appended in [log.append(trajectory(n, metadata={"text": "private"})) for n in range(30)]:
            appended.result()
        reader = apsw.Connection(str(path))
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM records").get == 30
        done = gc(path, before=START + timedelta(days=1), why="asked for")
        assert (done.trajectories, done.erased, done.compacted) == (30, False, False)
        reader.close()
        done = gc(path, before=START + timedelta(days=1), why="asked for")
        assert (done.trajectories, done.erased, done.compacted) == (0, False, False)
        assert b"private" not in everything(str(path))
    done = gc(path, before=START + timedelta(days=1), why="asked for")
    assert (done.trajectories, done.erased, done.compacted) == (0, True, True)


def test_gc_gives_space_back_only_where_nobody_would_wait_for_it(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    made = make(path, count=60)
    with open_log(path) as log:  # as another process would have it
        size = path.stat().st_size
        done = gc(path, before=START + timedelta(minutes=20), why="age")
        assert (done.trajectories, done.erased, done.compacted) == (20, False, False)
        assert path.stat().st_size == size
        log.append(trajectory(99)).result()
    done = gc(path, before=START + timedelta(minutes=40), why="age")
    assert (done.trajectories, done.erased, done.compacted) == (20, True, True)
    assert path.stat().st_size < size
    assert contents(path)[:-1] == made[40:60]
    assert verify(path).ok


def test_a_reviewed_trajectory_goes_where_that_is_asked_for(url: str) -> None:
    record = trajectory()
    with open_log(url) as log:
        log.append(record).result()
        log.append(review(record.id)).result()
    done = gc(url, before=START + timedelta(days=1), why="asked for", keep_reviewed=False)
    assert (done.trajectories, done.others, done.kept) == (1, 1, 0)
    assert contents(url) == []


def test_what_gc_removed_stays_away_from_import(url: str, tmp_path: Path) -> None:
    lines = tmp_path / "all.jsonl"
    made = make(url, count=10)
    lines.write_bytes(b"".join(encode(record) + b"\n" for record in made))
    gc(url, before=START + timedelta(minutes=4), why="age")
    counts = Import(records=0, demonstrations=0, present=6, removed=7, broken=(), truncated=False)
    assert import_(url, lines) == counts
    with open_log(url) as log:
        log.append(trajectory()).result()
    assert verify(url).ok
    assert gc(url, before=START + timedelta(days=1), why="all").trajectories == 7


def test_what_gc_removed_stays_away_from_import_and_recovery(tmp_path: Path) -> None:
    path, lines = tmp_path / "cai.db", tmp_path / "all.jsonl"
    made = make(path, count=10)
    lines.write_bytes(b"".join(encode(record) + b"\n" for record in made))
    gc(path, before=START + timedelta(minutes=4), why="age")
    counts = Import(records=0, demonstrations=0, present=6, removed=7, broken=(), truncated=False)
    assert import_(path, lines) == counts
    recovered = tmp_path / "new.db"
    found = recover(path, recovered)
    assert (found.records, found.gaps) == (6, ())
    assert contents(recovered) == contents(path)
    assert import_(recovered, lines) == counts
    with open_log(recovered) as log:
        log.append(trajectory()).result()
    assert verify(recovered).ok
    assert gc(recovered, before=START + timedelta(days=1), why="all").trajectories == 7


def test_what_is_appended_again_after_it_was_removed_can_be_removed_again(url: str) -> None:
    record = trajectory()
    with open_log(url) as log:
        for why in ("once", "twice"):
            log.append(record).result()
            assert gc(url, before=START + timedelta(days=1), why=why).trajectories == 1
        assert log.stats().removed == 2
        log.append(record).result()
        assert list(log.read()) == [record]
    assert verify(url).ok


def test_what_was_removed_twice_stood_where_it_was_last(url: str) -> None:
    again, young = trajectory(), trajectory(50)
    with open_log(url) as log:
        for why, records in (("once", [again]), ("twice", [young, again])):
            for record in records:
                log.append(record).result()
            gc(url, before=START + timedelta(minutes=4), why=why)
        assert list(log.read(after=again.id)) == []
        assert list(log.read(after=again.id, newest_first=True)) == [young]
        with pytest.raises(DataError, match=r"was removed on .*: twice"):
            log.get(again.id)


def test_gc_of_an_absent_log_makes_none(new_log: Callable[[], str], tmp_path: Path) -> None:
    url = new_log()
    for dry_run in (True, False):
        with pytest.raises(LogError, match="there is no log"):
            gc(url, before=START, why="x", dry_run=dry_run)
    with pytest.raises(LogError, match="there is no log"):
        open_log(url, read_only=True)
    assert list(tmp_path.iterdir()) == []
