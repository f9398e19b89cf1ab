"""The log as its users see it: append, read, errors, redaction, bad files, migration."""

from __future__ import annotations

import asyncio
import doctest
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait
from datetime import timedelta
from pathlib import Path

import apsw
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from log_support import START, comparison, feedback, records, review, trajectory

from cai_graph.errors import ConfigError, DataError, LogError
from cai_graph.log import WITHHELD, Log, open_log, redact_texts, redaction
from cai_graph.log import sqlite as sqlite_store
from cai_graph.log import writer as log_writer
from cai_graph.log.redaction import is_withheld, withhold
from cai_graph.log.sqlite import APPLICATION_ID, SCHEMA
from cai_graph.log.upkeep import verify
from cai_graph.trajectory import Message, Outcome, Record, Trajectory, encode


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with open_log(tmp_path / "cai.db") as log:
        yield log


def fill(log: Log, count: int) -> list[Trajectory]:
    made = [trajectory(number) for number in range(count)]
    for future in [log.append(record) for record in made]:
        future.result()
    return made


# --- append and read ----------------------------------------------------------------------------------


def test_a_resolved_append_is_in_the_file_for_every_other_connection(log: Log) -> None:
    record = trajectory()
    log.append(record).result()
    with apsw.Connection(log.name) as other:
        assert other.execute("SELECT id FROM records").fetchall() == [(record.id,)]
        assert other.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    assert log.get(record.id) == record


def test_commits_are_synced_in_full(log: Log) -> None:
    fill(log, 1)
    store = log._shared.store
    assert isinstance(store, sqlite_store.SQLiteStore)
    assert store.change(lambda db: db.execute("PRAGMA synchronous").fetchall()) == [(2,)]


def test_records_are_read_in_the_order_of_append(log: Log) -> None:
    made = fill(log, 1200)  # more than two pages of reading
    assert list(log.read()) == made
    assert list(log.read(newest_first=True)) == made[::-1]


def test_a_read_shows_the_log_as_it_was_when_it_began(log: Log) -> None:
    made = fill(log, 600)
    reading = log.read()
    first = next(reading)
    fill(log, 10)
    assert [first, *reading] == made


def test_filters_hold_together(log: Log) -> None:
    made = [
        trajectory(0, tags=("a", "b"), source="run1:0"),
        trajectory(1, outcome=Outcome.KEPT, tags=("a",), source="run1:1"),
        trajectory(2, source="run2:0"),
    ]
    about = [feedback(made[0].id, at=START), review(made[0].id), comparison(made[1].id)]
    for record in [*made, *about]:
        log.append(record).result()
    assert list(log.read(kind="trajectory")) == made
    assert list(log.read(kind="review")) == [about[1]]
    assert list(log.read(trajectory_id=made[0].id)) == about[:2]
    assert list(log.read(tag="a")) == made[:2]
    assert list(log.read(tag="a", outcome="KEPT")) == [made[1]]
    assert list(log.read(tag="no")) == []
    assert list(log.read(source="run1:")) == made[:2]
    assert list(log.read(kind="trajectory", since=made[1].started_at)) == made[1:]
    assert list(log.read(kind="trajectory", until=made[1].started_at)) == made[:1]
    naive = made[1].started_at.replace(tzinfo=None)
    assert list(log.read(kind="trajectory", since=naive)) == made[1:]
    assert list(log.read(constitution="d1" * 32)) == made
    assert list(log.read(constitution="d2" * 32)) == []
    assert list(log.read(limit=2)) == made[:2]
    assert list(log.read(limit=0)) == []
    assert list(log.read(after=made[1].id, limit=1)) == [made[2]]
    assert list(log.read(after=made[1].id, newest_first=True)) == [made[0]]


def test_reading_after_an_unknown_id_says_so(log: Log) -> None:
    with pytest.raises(DataError, match="no record 'nobody'"):
        list(log.read(after="nobody"))
    with pytest.raises(DataError, match=r"no record 'nobody'; `cai log list` shows the ids"):
        log.get("nobody")


def test_sources_are_those_of_the_prefix(log: Log) -> None:
    for source in ["run1:0", "run1:1", "run1:\N{GRINNING FACE}", "run10", None, "run2:0"]:
        log.append(trajectory(source=source)).result()
    assert log.sources("run1:") == {"run1:0", "run1:1", "run1:\N{GRINNING FACE}"}
    assert len(log.sources()) == 5
    assert log.sources("no") == set()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(records)
def test_any_record_comes_back_from_the_file(log: Log, record: Record) -> None:
    record = msgspec.structs.replace(record, id=f"{record.id}{os.urandom(8).hex()}")
    log.append(record).result()
    assert log.get(record.id) == record
    assert next(log.read(newest_first=True)) == record


def test_stats_count_what_is_there(log: Log) -> None:
    assert log.stats().trajectories == 0
    assert log.stats().first is None
    made = fill(log, 3)
    log.append(trajectory(9, outcome=Outcome.KEPT, rounds=(), source="\ud800")).result()
    log.append(feedback(made[0].id)).result()
    log.append(comparison(made[0].id)).result()
    stats = log.stats()
    assert (stats.trajectories, stats.comparisons, stats.reviews, stats.feedback) == (4, 1, 0, 1)
    assert stats.outcomes == {"KEPT": 1, "REVISED": 3}
    assert stats.constitutions == {"balanced 1 (d1d1d1d1d1d1)": 4}
    assert stats.violated == {"no-harm": 3}
    assert stats.unreadable == 3
    assert stats.calls == 9
    assert stats.input_tokens == 4 * 40 + 1
    assert stats.output_tokens == 4 * 60 + 2
    assert stats.first == START
    assert stats.last == START + timedelta(minutes=9)
    assert stats.bytes > 0


def test_a_record_that_cannot_be_stored_fails_alone(log: Log) -> None:
    good = [trajectory(n) for n in range(20)]
    wrong = [
        trajectory(seconds=float("nan")),
        trajectory(metadata={"thing": object()}),
        trajectory(started_at="yesterday"),
        trajectory(outcome="KEPT"),
    ]
    futures = [log.append(record) for record in [*good[:10], *wrong, *good[10:]]]
    failed = [future.exception() for future in futures]
    assert [type(error) for error in failed] == [type(None)] * 10 + [DataError] * 4 + [type(None)] * 10
    assert list(log.read()) == good
    assert log.lost == 4


def test_the_same_record_again_is_harmless_and_a_different_one_is_refused(log: Log) -> None:
    record = trajectory()
    other = msgspec.structs.replace(record, seconds=9.0)
    neighbour = trajectory(1)
    futures = [log.append(one) for one in (record, record, other, neighbour)]
    errors = [future.exception() for future in futures]
    assert errors[:2] == [None, None]
    assert isinstance(errors[2], DataError)
    assert "records are never changed" in str(errors[2])
    assert errors[3] is None
    assert list(log.read()) == [record, neighbour]
    assert verify(log.name).ok


def test_what_was_appended_is_the_record_as_it_was_then(log: Log) -> None:
    metadata = {"count": 1}
    record = trajectory(metadata=metadata)
    future = log.append(record)
    metadata["count"] = 2
    future.result()
    stored = log.get(record.id)
    assert isinstance(stored, Trajectory)
    assert stored.metadata == {"count": 1}


async def test_an_event_loop_awaits_the_commit_and_a_cancelled_wait_loses_nothing(log: Log) -> None:
    record, second = trajectory(), trajectory(1)
    await log.append(record)
    assert log.get(record.id) == record
    future = log.append(second)
    assert not future.cancel()
    for waiting in (asyncio.ensure_future(future), asyncio.ensure_future(asyncio.wrap_future(future))):
        await asyncio.sleep(0)
        waiting.cancel()
    log.flush()
    assert log.get(second.id) == second
    await future
    with pytest.raises(DataError, match="records are never changed"):
        await log.append(trajectory(2, id=second.id))


async def test_a_transaction_wakes_an_event_loop_once(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    wake, woken = loop.call_soon_threadsafe, []
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: woken.append(args) or wake(*args))
    with log._shared.store._writing:  # type: ignore[attr-defined]  # so that all but the first gather
        first = log.append(trajectory())
        while log._shared.writer._queue:  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        rest = [asyncio.ensure_future(log.append(trajectory(n))) for n in range(100)]
        await asyncio.sleep(0)
    await first
    await asyncio.gather(*rest)
    assert len(woken) == 2


def test_a_loop_that_is_gone_harms_nobody(log: Log) -> None:
    async def leave() -> None:
        waiting = asyncio.ensure_future(log.append(trajectory()))
        await asyncio.sleep(0)
        assert not waiting.done()

    with log._shared.store._writing:  # type: ignore[attr-defined]  # so that the loop is closed first
        asyncio.run(leave())
    assert len(fill(log, 3)) == len(list(log.read())) - 1


def test_an_append_is_waited_for_by_whatever_waits_for_futures(log: Log) -> None:
    with log._shared.store._writing:  # type: ignore[attr-defined]
        futures = [log.append(trajectory(n)) for n in range(20)]
        for undecided in (futures[0].result, futures[0].exception):
            with pytest.raises(TimeoutError):
                undecided(timeout=0.01)
        assert futures[0].running()
        assert not wait(futures, timeout=0.01).done
    assert wait(futures, timeout=60).done == set(futures)
    assert set(as_completed(futures)) == set(futures)
    refused = log.append(trajectory(metadata={"not": float("nan")}))
    assert wait([refused], return_when=FIRST_EXCEPTION).done == {refused}
    with pytest.raises(DataError):
        refused.result()


def test_a_callback_may_append(log: Log) -> None:
    second = trajectory(1)
    chained: Future[None] = Future()

    def more(_: Future[None]) -> None:
        log.append(second).add_done_callback(lambda done: chained.set_result(done.result()))

    log.append(trajectory()).add_done_callback(more)
    chained.result(timeout=60)
    assert log.get(second.id) == second


def test_a_callback_that_raises_anything_harms_nobody(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    def leave(_: Future[None]) -> None:
        raise SystemExit(1)

    with log._shared.store._writing:  # type: ignore[attr-defined]  # so that the callback is there in time
        log.append(trajectory()).add_done_callback(leave)
    log.flush()
    assert "a callback of an append failed" in caplog.text
    made = fill(log, 3)
    assert list(log.read())[1:] == made


def test_many_threads_lose_nothing_and_keep_each_ones_order(log: Log) -> None:
    def produce(number: int) -> list[str]:
        mine = [trajectory(n, source=f"{number}:{n}") for n in range(150)]
        futures = [log.append(record) for record in mine]
        for future in futures:
            future.result()
        return [record.id for record in mine]

    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(produce, range(16)))
    stored = [record.id for record in log.read()]
    assert sorted(stored) == sorted(id for mine in ids for id in mine)
    place = {id: n for n, id in enumerate(stored)}
    for mine in ids:
        assert [place[id] for id in mine] == sorted(place[id] for id in mine)
    assert verify(log.name).ok


def test_a_full_queue_makes_the_caller_wait_and_drops_nothing(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "MAX_PENDING_BYTES", 40_000)
    peak = 0
    writer = log._shared.writer
    assert writer is not None
    made = [trajectory(n, metadata={"text": "x" * 10_000}) for n in range(60)]
    futures = []
    for record in made:
        futures.append(log.append(record))
        peak = max(peak, writer._pending_bytes)
    for future in futures:
        future.result()
    assert peak <= 40_000
    assert list(log.read()) == made


def test_a_record_larger_than_the_queue_is_taken_alone(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "MAX_PENDING_BYTES", 1000)
    made = fill(log, 5)
    big = trajectory(metadata={"text": "\N{GRINNING FACE}" * 1_000_000})
    log.append(big).result()
    assert log.get(big.id) == big
    assert list(log.read(kind="trajectory", limit=5)) == made


# --- opening and closing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://host/db", "unknown scheme 'mysql'"),
        ("postgresql://ann:secret@host/db", "PostgreSQL is not there yet"),
        ("sqlite://cai.db", "after three slashes"),
        ("sqlite:///", "after three slashes"),
        ("sqlite:///:memory:", "a log is a plain file"),
        ("sqlite:///cai.db?mode=ro", "a log is a plain file"),
        ("cai", "no log is named so"),
        ("", "no log is named so"),
    ],
)
def test_a_url_of_no_known_form_names_the_forms(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_log(url)
    assert "sqlite:///cai.db" in str(caught.value)
    assert "secret" not in str(caught.value)


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


def test_an_absent_folder_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=f"the folder {tmp_path / 'no'} does not exist; make it"):
        open_log(tmp_path / "no" / "cai.db")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "cai.db").mkdir()
    with pytest.raises(LogError, match="is a directory"):
        open_log(tmp_path / "cai.db")


def test_an_empty_file_becomes_a_log(tmp_path: Path) -> None:
    (tmp_path / "cai.db").touch()
    with open_log(tmp_path / "cai.db") as log:
        assert list(log.read()) == []
        fill(log, 1)


def test_reading_only_makes_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with pytest.raises(LogError, match="there is no log"):
        open_log(path, read_only=True)
    assert not path.exists()
    with open_log(path) as log:
        made = fill(log, 2)
    before = path.read_bytes()
    with open_log(path, read_only=True) as log:
        assert list(log.read()) == made
        with pytest.raises(LogError, match="read only"):
            log.append(trajectory())
    assert path.read_bytes() == before


def test_closing_writes_what_is_pending_and_closing_twice_is_harmless(tmp_path: Path) -> None:
    log = open_log(tmp_path / "cai.db")
    other = open_log(tmp_path / "cai.db")
    futures = [log.append(trajectory(n)) for n in range(100)]
    log.close()
    log.close()
    assert all(future.done() for future in futures)
    with pytest.raises(LogError, match="the log is closed"):
        log.append(trajectory())
    with pytest.raises(LogError, match="the log is closed"):
        log.get("x")
    fill(other, 1)
    other.close()
    assert not Path(f"{log.name}-wal").exists()


def test_what_is_pending_at_exit_is_written(tmp_path: Path) -> None:
    script = """
import sys
sys.path.insert(0, sys.argv[2])
from log_support import trajectory
from cai_graph.log import open_log
log = open_log(sys.argv[1])
for n in range(200):
    log.append(trajectory(n))
"""
    path = tmp_path / "cai.db"
    subprocess.run([sys.executable, "-c", script, str(path), str(Path(__file__).parent)], check=True)
    with open_log(path, read_only=True) as log:
        assert log.stats().trajectories == 200


def test_importing_the_log_loads_no_database_driver() -> None:
    script = "import cai_graph.log, sys; sys.exit('apsw' in sys.modules or 'pyarrow' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- files that are not ours --------------------------------------------------------------------------


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


# --- migration ----------------------------------------------------------------------------------------


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
    with pytest.raises(LogError, match="open it for writing once"):
        open_log(path, read_only=True)
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


def test_the_golden_log_of_schema_1_reads_as_it_did(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden"
    path = tmp_path / "log-v1.sqlite"
    path.write_bytes((golden / "log-v1.sqlite").read_bytes())
    assert verify(path).ok
    with open_log(path) as log:
        assert b"".join(log.lines()) == (golden / "log-v1.jsonl").read_bytes()
        made = fill(log, 1)
        assert next(log.read(newest_first=True)) == made[0]
    db = apsw.Connection(str(path))
    assert db.execute("PRAGMA application_id").fetchall() == [(APPLICATION_ID,)]
    db.close()


# --- redaction ----------------------------------------------------------------------------------------


def test_redaction_comes_before_the_first_write(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    secret = "ann@example.org"
    record = trajectory(
        messages=(Message(role="user", content=[{"type": "text", "text": f"I am {secret}"}], name=secret),),
        context={"documents": f"mail of {secret}"},
        metadata={"who": [{"mail": secret}]},
        tags=(secret,),
        error=f"KeyError: {secret}",
        source="run:1",
    )
    with open_log(path, redact=redact_texts(lambda text: text.replace(secret, "[mail]"))) as log:
        log.append(record).result()
        stored = log.get(record.id)
        written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret.encode() not in written
    assert isinstance(stored, Trajectory)
    assert stored.prompt == "I am [mail]"
    assert stored.metadata == {"who": [{"mail": "[mail]"}]}
    assert stored.source == "run:1"
    assert stored.rounds == record.rounds
    assert not is_withheld(stored)


def test_the_example_of_a_hook_runs() -> None:
    assert doctest.testmod(redaction).attempted == 2
    assert doctest.testmod(redaction).failed == 0


def broken_hook(record: Record) -> Record:
    raise ValueError(f"cannot handle {record!r}")


def absent_hook(record: Record) -> Record:
    return None  # type: ignore[return-value]


def renaming_hook(record: Record) -> Record:
    return msgspec.structs.replace(record, id="another")


def unstorable_hook(record: Record) -> Record:
    return trajectory(id=record.id, seconds=float("nan"))


@pytest.mark.parametrize("hook", [broken_hook, absent_hook, renaming_hook, unstorable_hook])
def test_a_hook_that_fails_withholds_the_texts_and_keeps_the_record(tmp_path: Path, hook) -> None:
    made: list[Record] = [
        trajectory(
            context={"secret": "secret"}, tags=("secret",), metadata={"secret": "secret"}, error="secret"
        ),
        feedback("t", note="secret", user="secret"),
        review("t", note="secret", reviewer="secret", answer=Message(role="user", content="secret")),
        comparison(
            "t", metadata={"secret": "secret"}, answers=(Message(role="secret", content="secret"),) * 2
        ),
    ]
    made[0] = msgspec.structs.replace(
        made[0], messages=(Message(role="user", content="secret", name="secret"),)
    )
    made[3] = msgspec.structs.replace(made[3], answers=(Message(role="user", content="secret"),) * 2)
    with open_log(tmp_path / "cai.db", redact=hook) as log:
        for record in made:
            log.append(record).result()
        stored = list(log.read())
        written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert log.stats().withheld == 4
    assert b"secret" not in written
    assert [record.id for record in stored] == [record.id for record in made]
    assert all(is_withheld(record) for record in stored)
    assert isinstance(stored[0], Trajectory)
    assert stored[0].prompt == WITHHELD
    assert stored[0].outcome is Outcome.REVISED
    assert len(stored[0].calls) == 2


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(records)
def test_any_record_can_be_withheld(record: Record) -> None:
    bare = withhold(record)
    assert is_withheld(bare)
    assert bare.id == record.id
    encode(bare)


# --- failing disks ------------------------------------------------------------------------------------


def test_a_full_database_fails_the_append_and_recovers_by_itself(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    made = fill(log, 3)
    store = log._shared.store
    assert isinstance(store, sqlite_store.SQLiteStore)
    pages = store.change(lambda db: db.execute("PRAGMA page_count").fetchall()[0][0])
    store.change(lambda db: db.execute(f"PRAGMA max_page_count = {pages + 2}").fetchall())
    big = trajectory(metadata={"text": "x" * 200_000})
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
    subprocess.run([sys.executable, "-c", script, str(path), str(Path(__file__).parent)], check=True)
    found = verify(path)
    assert found.ok
    assert found.records == 6


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
