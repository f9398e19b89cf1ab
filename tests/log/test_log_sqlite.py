"""The log in a file: what it is made of, files that are not ours, migration, failing disks."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import apsw
import pytest
from log_support import START, fill, trajectory
from repository import ROOT, SUPPORT

from cai_graph.errors import ConfigError, LogError
from cai_graph.log import Log, open_log
from cai_graph.log import sqlite as sqlite_store
from cai_graph.log.sqlite_schema import APPLICATION_ID, SCHEMA
from cai_graph.log.store import Filters
from cai_graph.log.upkeep import verify
from cai_graph.trajectory import Outcome, Trajectory

# --- opening and closing -----------------------------------------------------------------------------


def test_commits_are_synced_in_full(log: Log) -> None:
    fill(log, 1)
    store = log._shared.store
    assert isinstance(store, sqlite_store.SQLiteStore)
    assert store.change(lambda db: db.execute("PRAGMA synchronous").fetchall()) == [(2,)]
    assert store.change(lambda db: db.execute("PRAGMA journal_mode").fetchall()) == [("wal",)]


def test_relative_absolute_and_plain_paths_name_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = trajectory()
    with open_log("sqlite:///cai.db") as one, open_log(f"sqlite:///{tmp_path}/cai.db") as two:
        assert one.name == two.name == str(tmp_path / "cai.db")
        one.append(record).result()
        assert two.get(record.id) == record
        assert one._shared is two._shared
    with open_log("cai.db") as three:
        assert three.get(record.id) == record


def test_a_new_log_is_for_its_owner_alone(tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        fill(log, 1)
        for file in tmp_path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


@pytest.mark.parametrize("read_only", [False, True])
def test_a_sqlite_that_is_too_old_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.3")
    with pytest.raises(LogError, match=r"SQLite 3\.51\.3 here, and a log needs 3\.53 or newer; pip install"):
        open_log(tmp_path / "cai.db", read_only=read_only)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_folder_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=f"the folder {tmp_path / 'no'} does not exist; make it"):
        open_log(tmp_path / "no" / "cai.db")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "cai.db").mkdir()
    with pytest.raises(LogError, match="is a directory"):
        open_log(tmp_path / "cai.db")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_path_that_cannot_be_looked_at_is_one_error(tmp_path: Path, read_only: bool) -> None:
    with pytest.raises(LogError, match=r"x\.db: cannot be opened: File name too long"):
        open_log(tmp_path / f"{'x' * 300}.db", read_only=read_only)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # which others may pass through
        Path(folder).chmod(0o755)
        private = Path(folder, "private")
        private.mkdir()
        open_log(private / "cai.db").close()
        private.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # whom no mode keeps out
                os.seteuid(65534)
            with pytest.raises(LogError, match=r"cai\.db: cannot be opened: Permission denied"):
                open_log(private / "cai.db", read_only=read_only)
        finally:
            os.seteuid(user)
            private.chmod(0o700)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_name_that_sqlite_cannot_read_is_refused_before_anything_is_made(
    tmp_path: Path, read_only: bool
) -> None:
    with pytest.raises(ConfigError, match=r"caf\\udce9.db': the path is no UTF-8, .* rename"):
        open_log(tmp_path / os.fsdecode(b"caf\xe9.db"), read_only=read_only)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_becomes_a_log(tmp_path: Path) -> None:
    (tmp_path / "cai.db").touch()
    with open_log(tmp_path / "cai.db") as log:
        assert list(log.read()) == []
        fill(log, 1)


def test_reading_only_leaves_every_byte_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with pytest.raises(LogError, match="there is no log"):
        open_log(path, read_only=True)
    assert not path.exists()
    with open_log(path) as log:
        made = fill(log, 2)
    before = path.read_bytes()
    with open_log(path, read_only=True) as log:
        assert list(log.read()) == made
    assert path.read_bytes() == before


def test_closing_leaves_one_file(log: Log) -> None:
    fill(log, 1)
    log.close()
    assert not Path(f"{log.name}-wal").exists()


# --- files that are not ours -------------------------------------------------------------------------


def test_a_log_of_a_newer_release_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        fill(log, 3)
    with apsw.Connection(str(path)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(LogError, match=rf"schema version {SCHEMA + 1}, this release reads 1 to {SCHEMA}"):
            open_log(path, read_only=read_only)
    with pytest.raises(LogError, match="upgrade cai-graph"):
        verify(path)
    assert path.read_bytes() == before


def test_a_newer_release_is_refused_even_where_only_the_wal_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        fill(log, 1)
    newer = apsw.Connection(str(path))
    newer.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    before = path.read_bytes()
    try:
        with pytest.raises(LogError, match="upgrade cai-graph"):
            open_log(path)
        assert path.read_bytes() == before
    finally:
        newer.close()


@pytest.mark.parametrize("content", [b"hello, this is a text file that is no database\n" * 40, b"x"])
def test_a_file_that_is_no_database_is_refused_and_unchanged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cai.db"
    path.write_bytes(content)
    with pytest.raises(LogError, match="is no SQLite database"):
        open_log(path)
    assert path.read_bytes() == content


def test_another_application_s_database_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    db = apsw.Connection(str(path))
    db.execute("CREATE TABLE mine (x)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(LogError, match="is an SQLite database, but no log"):
        open_log(path)
    assert path.read_bytes() == before


def test_a_log_that_is_removed_while_open_begins_anew_where_it_stood(log: Log) -> None:
    fill(log, 2)
    for file in Path(log.name).parent.iterdir():
        file.unlink()
    made = fill(log, 3)
    assert list(log.read()) == made
    assert verify(log.name).ok


# --- files that are moved, and copies ----------------------------------------------------------------


def left_of(path: Path) -> Path:
    (left,) = path.parent.glob(f"{path.name}-wal.left-*")
    return left


def test_what_was_committed_before_the_file_was_moved_away_is_kept(
    log: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = fill(log, 20)
    path, moved = Path(log.name), tmp_path / "old.db"
    path.rename(moved)
    time.sleep(2 * sqlite_store._LOOKED_S)
    after = fill(log, 3)
    log.close()
    left = left_of(path)
    assert f"It is {left} now" in caplog.text
    left.rename(f"{moved}-wal")
    for file, made in ((moved, before), (path, after)):
        assert verify(file).ok
        with open_log(file, read_only=True) as one:
            assert list(one.read()) == made


@pytest.mark.parametrize("put", ["nothing", "an empty file"])
def test_what_a_crashed_process_had_committed_survives_that_its_file_is_moved(
    tmp_path: Path, put: str
) -> None:
    path = tmp_path / "cai.db"
    with open_log(tmp_path / "live.db") as log:
        made = fill(log, 20)
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{log.name}{suffix}", f"{path}{suffix}")
    moved = path.rename(tmp_path / "old.db")
    if put != "nothing":
        path.touch()
        with pytest.raises(LogError, match="the file is empty"):
            open_log(path, read_only=True)
    with open_log(path) as log:
        after = fill(log, 1)
        assert list(log.read()) == after
    left_of(path).rename(f"{moved}-wal")
    with open_log(moved, read_only=True) as log:
        assert list(log.read()) == made


@pytest.mark.parametrize("first", ["a reader", "the writer"])
def test_a_backup_that_is_put_in_the_place_of_an_open_log_is_whole(
    log: Log, tmp_path: Path, first: str
) -> None:
    backup = tmp_path / "backup.db"
    with open_log(backup) as other:
        restored = fill(other, 5)
    fill(log, 200)
    backup.replace(log.name)
    time.sleep(2 * sqlite_store._LOOKED_S)
    if first == "a reader":
        assert list(log.read()) == restored
    after = fill(log, 3)
    assert list(log.read()) == restored + after
    assert verify(log.name).ok
    assert left_of(Path(log.name))


def test_a_copy_in_another_journal_mode_is_written_in_wal(log: Log, tmp_path: Path) -> None:
    made = fill(log, 2)
    db = apsw.Connection(log.name)
    db.execute(f"VACUUM INTO '{tmp_path}/copy.db'")
    db.close()
    with open_log(tmp_path / "copy.db") as copy:
        made += fill(copy, 1)
        store = copy._shared.store
        assert isinstance(store, sqlite_store.SQLiteStore)
        assert store.change(lambda db: db.execute("PRAGMA journal_mode").fetchall()) == [("wal",)]
        assert list(copy.read()) == made


def test_a_closed_log_in_a_folder_that_may_only_be_read_is_read() -> None:
    script = """
import os, sys
import cai_graph.log.sqlite, cai_graph.log.writer
from cai_graph.log import open_log
from cai_graph.log.upkeep import verify
folder = sys.argv[1]
if os.getuid() == 0:
    os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
assert not os.access(folder, os.W_OK)
with open_log(f"{folder}/cai.db", read_only=True) as log:
    assert len(list(log.read())) == 3
assert verify(f"{folder}/cai.db").ok
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with open_log(f"{folder}/cai.db") as log:
            fill(log, 3)
        Path(folder, "cai.db").chmod(0o444)
        Path(folder).chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", script, folder], check=False, capture_output=True, text=True
        )
        Path(folder).chmod(0o755)
    assert done.returncode == 0, done.stderr


# --- migration ---------------------------------------------------------------------------------------


def test_an_older_file_is_migrated_and_keeps_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = fill(log, 5)

    def add_a_table(db: apsw.Connection) -> None:
        db.execute("CREATE TABLE added (x)")

    monkeypatch.setattr(sqlite_store, "SCHEMA", SCHEMA + 1)
    monkeypatch.setitem(sqlite_store.MIGRATIONS, SCHEMA, add_a_table)
    before = path.read_bytes()
    with open_log(path, read_only=True) as log:
        assert list(log.read()) == made
    assert path.read_bytes() == before
    with open_log(path) as log:
        assert list(log.read()) == made
        fill(log, 1)
    with open_log(tmp_path / "new.db") as log:
        fill(log, 1)
    db = apsw.Connection(str(path))
    assert db.execute("PRAGMA user_version").fetchall() == [(SCHEMA + 1,)]
    assert db.execute("SELECT count(*) FROM added").fetchall() == [(0,)]
    db.close()


def test_a_migration_that_fails_leaves_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = fill(log, 5)

    def fail(db: apsw.Connection) -> None:
        db.execute("DELETE FROM records")
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_store, "SCHEMA", SCHEMA + 1)
        patch.setitem(sqlite_store.MIGRATIONS, SCHEMA, fail)
        with pytest.raises(RuntimeError, match="half way"):
            open_log(path)
    with open_log(path) as log:
        assert list(log.read()) == made
    assert verify(path).ok


def test_a_kill_during_migration_leaves_the_old_version(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = fill(log, 50)
    script = """
import os, signal, sys
from cai_graph.log import open_log, sqlite
def die(db):
    db.execute("DELETE FROM records")
    db.cache_flush()
    os.kill(os.getpid(), signal.SIGKILL)
sqlite.SCHEMA += 1
sqlite.MIGRATIONS[sqlite.SCHEMA - 1] = die
open_log(sys.argv[1])
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
        assert done.returncode == -9
    with open_log(path) as log:
        assert list(log.read()) == made
    assert verify(path).ok


@pytest.mark.parametrize("schema", range(1, SCHEMA))
def test_filters_find_in_a_file_of_any_schema_what_they_find_in_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: int
) -> None:
    path = tmp_path / "cai.db"
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_store, "SCHEMA", schema)
        with open_log(path) as log:
            made = fill(log, 20)
            rare = trajectory(outcome=Outcome.FAILED, tags=("rare",), started_at=START + timedelta(days=9))
            log.append(rare).result()
    filters: list[Filters] = [
        {"outcome": "FAILED"},
        {"tag": "rare"},
        {"since": START + timedelta(days=9)},
        {"constitution": rare.constitution.digest},
        {"kind": "trajectory", "until": START},
    ]
    found = []
    for read_only in (True, False):  # not migrated yet, and migrated
        with open_log(path, read_only=read_only) as log:
            assert list(log.read()) == [*made, rare]
            found.append([list(log.read(**some)) for some in filters])
    assert found[0] == found[1]
    assert found[0][:4] == [[rare], [rare], [rare], [*made, rare]]
    db = apsw.Connection(str(path))
    assert db.execute("PRAGMA user_version").fetchall() == [(SCHEMA,)]
    db.close()
    assert verify(path).ok


def test_the_golden_log_of_schema_1_reads_as_it_did(tmp_path: Path) -> None:
    golden = ROOT / "tests" / "golden"
    path = tmp_path / "log-v1.sqlite"
    path.write_bytes((golden / "log-v1.sqlite").read_bytes())
    assert verify(path).ok
    with open_log(path, read_only=True) as log:
        assert b"".join(log.lines()) == (golden / "log-v1.jsonl").read_bytes()
        tags = {tag for record in log.read() if isinstance(record, Trajectory) for tag in record.tags}
        tagged = {tag: list(log.read(tag=tag)) for tag in tags}
    assert path.read_bytes() == (golden / "log-v1.sqlite").read_bytes()
    with open_log(path) as log:
        assert b"".join(log.lines()) == (golden / "log-v1.jsonl").read_bytes()
        assert {tag: list(log.read(tag=tag)) for tag in tags} == tagged
        made = fill(log, 1)
        assert next(log.read(newest_first=True)) == made[0]
    db = apsw.Connection(str(path))
    assert db.execute("PRAGMA application_id").fetchall() == [(APPLICATION_ID,)]
    db.close()


# --- failing disks -----------------------------------------------------------------------------------


def test_a_full_database_fails_the_append_and_recovers_by_itself(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    made = fill(log, 3)
    store = log._shared.store
    assert isinstance(store, sqlite_store.SQLiteStore)
    pages = store.change(lambda db: db.execute("PRAGMA page_count").fetchall()[0][0])
    store.change(lambda db: db.execute(f"PRAGMA max_page_count = {pages + 2}").fetchall())
    big = trajectory(metadata={"text": "x" * 1_000_000})
    lost = log.append(big)
    with pytest.raises(LogError, match=r"no space left to write; free some, the log goes on by itself"):
        lost.result()
    assert log.lost == 1
    assert "no space left" in caplog.text
    made += fill(log, 2)
    assert "writing works again; 1 records were lost" in caplog.text
    assert list(log.read()) == made
    log.append(big).result()
    assert verify(log.name).ok


def test_a_disk_that_refuses_bytes_fails_the_append_and_recovers_without_a_restart(tmp_path: Path) -> None:
    script = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from log_support import trajectory
from cai_graph.errors import LogError
from cai_graph.log import open_log
log = open_log(sys.argv[1])
first = [trajectory(n) for n in range(3)]
for record in first:
    log.append(record).result()
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
refused = 0
for n in range(5):
    try:
        log.append(trajectory(metadata={"text": "x" * 300_000})).result()
    except LogError as error:
        assert "disk" in str(error) or "space" in str(error), error
        refused += 1
assert refused == 5, refused
assert list(log.read()) == first
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
last = [trajectory(n) for n in range(3)]
for record in last:
    log.append(record).result()
assert list(log.read()) == first + last
assert log.lost == 5
"""
    path = tmp_path / "cai.db"
    subprocess.run([sys.executable, "-c", script, str(path), str(SUPPORT)], check=True)
    found = verify(path)
    assert found.ok
    assert found.records == 6


@pytest.mark.parametrize("read_only", [True, False])
def test_a_log_that_a_full_disk_lets_nobody_open_says_so(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = fill(log, 3)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # less than the shared memory of the WAL
    try:
        with pytest.raises(LogError, match=r"the disk failed to read or write .*; check its space"):
            open_log(path, read_only=read_only)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with open_log(path, read_only=read_only) as log:
        assert list(log.read()) == made


def test_a_file_held_by_another_process_for_a_while_fails_nobody(log: Log) -> None:
    made = fill(log, 1)
    holder = apsw.Connection(log.name)
    holder.execute("BEGIN IMMEDIATE")
    more = [trajectory(n) for n in range(50)]
    futures = [log.append(record) for record in more]
    assert list(log.read()) == made  # readers do not wait for writers
    timer = threading.Timer(0.7, lambda: (holder.execute("ROLLBACK"), holder.close()))
    timer.start()
    for future in futures:
        future.result()
    timer.join()
    assert list(log.read()) == made + more


def test_a_file_held_for_too_long_is_reported_and_nothing_is_stored(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, 1)
    monkeypatch.setattr(sqlite_store, "BUSY_S", 0.0)
    holder = apsw.Connection(log.name)
    holder.execute("BEGIN IMMEDIATE")
    future = log.append(trajectory())
    with pytest.raises(LogError, match="another process has held the log"):
        future.result()
    holder.execute("ROLLBACK")
    holder.close()
    fill(log, 1)
    assert log.stats().trajectories == 2


def test_a_log_that_was_replaced_while_open_is_not_written_over(log: Log, tmp_path: Path) -> None:
    fill(log, 2)
    path = tmp_path / "cai.db"
    with apsw.Connection(str(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    with open_log(tmp_path / "other.db") as other:
        ids = [record.id for record in fill(other, 3)]
    (tmp_path / "other.db").replace(path)
    second = apsw.Connection(str(path))  # another program has the new one open
    assert second.execute("SELECT count(*) FROM records").get == 3
    time.sleep(2 * sqlite_store._LOOKED_S)

    record = trajectory()
    log.append(record).result()
    second.close()
    assert [found.id for found in log.read()] == [*ids, record.id]
    assert verify(str(path)).ok
