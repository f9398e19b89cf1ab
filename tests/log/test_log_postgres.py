"""The log in PostgreSQL: a server that goes away, backends that are killed, what it refuses, its schema.

CAI_LOG_FALLS sets how many times the server is brought down while it is written to (2 by default).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from log_support import START, contents, execute, feedback, fill, store_of, trajectory
from postgres_server import Network, Server
from replies import verdicts
from repository import SUPPORT, fenced, read_page

from cai_graph import constitutional
from cai_graph.addresses import without_password
from cai_graph.constitution import load
from cai_graph.errors import ConfigError, DataError, LogError, MissingExtra
from cai_graph.log import Log, open_log, open_store, postgres_session, recover
from cai_graph.log import postgres as postgres_store
from cai_graph.log.postgres_session import LOCK, SCHEMA
from cai_graph.log.store import Database, row_of
from cai_graph.log.upkeep import gc, verify
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Trajectory, encode

FALLS = int(os.environ.get("CAI_LOG_FALLS", "2"))


@pytest.fixture
def url(postgres: Server) -> str:
    return postgres.url(postgres.database(1))


@pytest.fixture
def log(url: str) -> Iterator[Log]:
    with open_log(url) as log:
        yield log


def kill_backends(url: str) -> None:
    execute(
        url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'cai_graph' AND datname = current_database()",
    )


# --- durability ---------------------------------------------------------------------------------------


def test_commits_are_synced_whatever_the_server_s_default(url: str) -> None:
    execute(url, "ALTER ROLE postgres SET synchronous_commit = off")
    try:
        with open_log(url) as log:
            fill(log, 1)
            store = log._shared.store
            ((setting,),) = store.change(lambda db: list(db.execute("SHOW synchronous_commit", {})))
        assert setting == "on"
    finally:
        execute(url, "ALTER ROLE postgres RESET synchronous_commit")


def test_a_duplicate_fails_no_neighbour_whatever_the_server_s_isolation(url: str) -> None:
    execute(url, "ALTER ROLE postgres SET default_transaction_isolation = 'repeatable read'")
    try:
        with open_log(url) as log, closing(open_store(url)) as another, ThreadPoolExecutor(1) as thread:
            (first,), second, third = fill(log, 1), trajectory(1), trajectory(2)
            with psycopg.connect(url.replace("+psycopg", "")) as other:
                other.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
                appended = [log.append(record) for record in (first, second, third)]
                wait_in_line(url, 1)
                inserted = thread.submit(another.insert, [row_of(second, encode(second))])
                wait_in_line(url, 2)
            # The first is refused, and the second is committed while the log waits for its turn again.
            assert inserted.result() == [None]
            assert [commit.exception() for commit in appended] == [None] * 3
        assert {record.id for record in contents(url)} == {first.id, second.id, third.id}
    finally:
        execute(url, "ALTER ROLE postgres RESET default_transaction_isolation")


def wait_in_line(url: str, count: int) -> None:
    """Wait until so many writers wait for their turn."""
    while execute(url, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") != [
        (count,)
    ]:
        time.sleep(0.01)


def test_a_server_without_fsync_is_refused(postgres: Server, url: str) -> None:
    with open_log(url) as log:
        made = fill(log, 1)
    postgres.execute("ALTER SYSTEM SET fsync = off")
    postgres.execute("SELECT pg_reload_conf()")
    try:
        while postgres.execute("SHOW fsync") != [("off",)]:
            time.sleep(0.01)
        with pytest.raises(
            LogError, match="runs with fsync = off, so a power cut loses what it has committed"
        ):
            open_log(url)
        assert contents(url) == made
    finally:
        postgres.execute("ALTER SYSTEM RESET fsync")
        postgres.execute("SELECT pg_reload_conf()")
        while postgres.execute("SHOW fsync") != [("on",)]:
            time.sleep(0.01)


def test_a_killed_backend_fails_nobody(url: str, log: Log) -> None:
    made = fill(log, 3)
    reading = log.read()
    assert next(reading) == made[0]
    kill_backends(url)
    made += fill(log, 3)
    kill_backends(url)
    assert list(log.read()) == made
    assert list(reading) == made[1:3]
    assert log.lost == 0
    assert verify(url).ok


def test_backends_killed_at_any_moment_lose_nothing_and_double_nothing(url: str, log: Log) -> None:
    stop = threading.Event()
    chance = random.Random(7)
    kills = 0

    def kill() -> None:
        nonlocal kills
        while not stop.wait(chance.uniform(0, 0.1)):
            kill_backends(url)
            kills += 1

    made: list[Trajectory] = []
    writers: set[str] = set()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while kills < 25 or len(writers) < 4:  # some of the kills hit a transaction
            writers.add(store_of(log)._writer)
            part = range(len(made), len(made) + 15)
            made += [trajectory(n, metadata={"text": "x" * (n * 97 % 9000)}) for n in part]
            futures = [log.append(record) for record in made[-15:]]
            for future in futures:
                future.result()
    finally:
        stop.set()
        killer.join()
    assert list(log.read()) == made
    assert verify(url).ok


def test_no_acknowledged_record_is_lost_when_the_server_falls(url: str, postgres: Server) -> None:
    chance = random.Random(20261124)
    lock = threading.Lock()
    acknowledged: set[str] = set()
    appended: set[str] = set()
    stop = threading.Event()

    def produce() -> None:
        for number in range(10**9):
            if stop.is_set():
                return
            record = trajectory(number, metadata={"text": "x" * (number * 97 % 9000)})
            with lock:
                appended.add(record.id)
            log.append(record).add_done_callback(
                lambda done, id=record.id: None if done.exception() else acknowledged.add(id)
            )
            if number % 50 == 49:
                log.flush()

    with open_log(url) as log:
        producers = [threading.Thread(target=produce) for _ in range(2)]
        for producer in producers:
            producer.start()
        try:
            for number in range(FALLS):
                before = len(acknowledged)
                while len(acknowledged) < before + chance.randrange(1, 400):
                    time.sleep(0.001)
                if number % 2:
                    # One killed backend has the server end all others and recover.
                    ((pid,), *_) = execute(
                        url,
                        "SELECT pid FROM pg_stat_activity WHERE application_name = 'cai_graph' "
                        "AND datname = current_database() ORDER BY backend_start",
                    )
                    os.kill(pid, signal.SIGKILL)
                else:
                    postgres.crash()
                    postgres.start()
            log.append(trajectory()).result()
        finally:
            stop.set()
            for producer in producers:
                producer.join()
        log.flush()
        stored = [record.id for record in log.read()]
        last = log.lost
    assert acknowledged <= set(stored)
    assert len(stored) == len(set(stored))
    assert len(set(stored) - appended) == 1  # nothing but those and the last
    assert len(acknowledged) + last == len(appended)
    assert verify(url).ok


@pytest.mark.parametrize("answer", [b"COMMIT\0", b"COPY 5\0", b"BEGIN\0"])
def test_a_connection_that_breaks_at_any_answer_stores_the_records_once(
    url: str, postgres: Server, answer: bytes
) -> None:
    with Network(postgres) as network, open_log(network.url("test1")) as log:
        fill(log, 1)
        records = [trajectory(n) for n in range(5)]
        with log._shared.store._writing:  # type: ignore[attr-defined]  # so that they are in one transaction
            first = log.append(trajectory())
            while log._shared.writer._queue:  # type: ignore[union-attr]
                time.sleep(0.001)
            futures = [log.append(record) for record in records]
            network.cut_at = answer
        for future in [first, *futures]:
            future.result()
        assert network.cut_at is None
        assert list(log.read())[2:] == records
        assert log.lost == 0
    assert verify(url).ok


def test_a_network_that_falls_silent_fails_the_append_and_is_found_again(
    url: str, postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "WRITE_S", 0.5)
    monkeypatch.setattr(postgres_store, "OUTAGE_S", 0.1)
    with Network(postgres) as network, open_log(network.url("test1") + "&connect_timeout=2") as log:
        made = fill(log, 1)
        network.freeze()
        for number in (1, 2):
            with pytest.raises(LogError, match="PostgreSQL cannot be reached"):
                log.append(trajectory(number)).result(timeout=10)
        network.thaw()
        made += fill(log, 2)
        stored = list(log.read())
    assert stored[:1] + stored[-2:] == made
    assert verify(url).ok


def test_an_outage_ends_in_an_error_soon_and_the_log_goes_on_after_it(
    url: str, log: Log, postgres: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = fill(log, 2)
    monkeypatch.setattr(postgres_store, "OUTAGE_S", 0.3)
    postgres.crash()
    try:
        lost = log.append(trajectory())
        with pytest.raises(LogError, match="PostgreSQL cannot be reached"):
            lost.result()
        monkeypatch.setattr(postgres_store, "OUTAGE_S", 3600.0)  # in an outage that lasts nobody waits again
        with pytest.raises(LogError, match="PostgreSQL cannot be reached"):
            log.append(trajectory()).result()
        with pytest.raises(LogError, match="PostgreSQL cannot be reached"):
            list(log.read())
        assert log.lost == 2
    finally:
        postgres.start()
    made += fill(log, 2)
    assert "writing works again; 2 records were lost" in caplog.text
    assert list(log.read()) == made
    assert verify(url).ok


def test_an_answer_outlives_an_outage_of_its_log(
    url: str, log: Log, postgres: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgres_store, "OUTAGE_S", 0.3)
    ids = [principle.id for principle in load("balanced")]
    model = ScriptedModel(replies=[reply for n in range(3) for reply in (f"answer {n}", verdicts(ids=ids))])
    app = constitutional(model, constitution="balanced", log=log)
    assert app.invoke("hello").content == "answer 0"
    postgres.crash()
    try:
        assert app.invoke("hello").content == "answer 1"
        assert "LOST FROM THE LOG" in caplog.text
        assert "PostgreSQL cannot be reached" in caplog.text
    finally:
        postgres.start()
    assert app.invoke("hello").content == "answer 2"
    released = [record.released.content for record in log.read()]  # type: ignore[union-attr]
    assert released == ["answer 0", "answer 2"]


@pytest.mark.parametrize("meets", ["read", "append"])
def test_a_connection_from_before_an_outage_costs_nothing_after_it(
    url: str, log: Log, postgres: Server, monkeypatch: pytest.MonkeyPatch, meets: str
) -> None:
    made = fill(log, 2)
    assert list(log.read()) == made  # so that each of the two connections is open
    monkeypatch.setattr(postgres_store, "OUTAGE_S", 0.3)
    kill_backends(url)
    postgres.execute("ALTER DATABASE test1 ALLOW_CONNECTIONS false")
    try:
        with pytest.raises(LogError, match="PostgreSQL cannot be reached"):
            list(log.read()) if meets == "read" else log.append(trajectory()).result()
    finally:
        postgres.execute("ALTER DATABASE test1 ALLOW_CONNECTIONS true")
    if meets == "read":
        made += fill(log, 1)
    assert list(log.read()) == made
    assert log.lost == (meets == "append")
    assert verify(url).ok


def test_a_backend_that_stands_still_costs_no_record(
    url: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fill(log, 1)
    monkeypatch.setattr(postgres_store, "WRITE_S", 0.5)
    monkeypatch.setattr(postgres_store, "OUTAGE_S", 0.1)  # over by then, as after a pause of this process
    ((pid,),) = execute(
        url,
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'cai_graph' "
        "AND datname = current_database() AND query = 'COMMIT'",
    )
    os.kill(pid, signal.SIGSTOP)
    try:
        made += fill(log, 2)  # on another connection
    finally:
        os.kill(pid, signal.SIGCONT)
    assert list(log.read()) == made
    assert log.lost == 0


def test_a_server_that_is_there_and_does_not_answer_is_given_up(
    url: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fill(log, 1)
    kill_backends(url)
    monkeypatch.setattr(postgres_session, "WRITE_S", 0.5)
    monkeypatch.setattr(postgres_store, "OUTAGE_S", 0.1)
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute("LOCK TABLE cai_log.log")  # which each new connection reads
        with pytest.raises(LogError, match="PostgreSQL did not answer in time"):
            log.append(trajectory()).result(timeout=10)
    made += fill(log, 2)
    assert list(log.read()) == made
    assert log.lost == 1


@pytest.mark.parametrize("timeout", ["idle_in_transaction_session_timeout", "transaction_timeout"])
def test_a_pause_between_two_statements_fails_nobody(
    url: str, monkeypatch: pytest.MonkeyPatch, timeout: str
) -> None:
    monkeypatch.setitem(postgres_session._SETTINGS, timeout, "200ms")
    pauses = iter([0.6])
    with open_log(url) as log:

        def insert(db: Database) -> list[Any]:
            time.sleep(next(pauses, 0))
            return list(db.execute("SELECT 1", {}))

        assert store_of(log).change(insert) == [(1,)]
        assert list(pauses) == []
        made = fill(log, 2)
        assert list(log.read()) == made


def test_gc_goes_on_where_its_idle_connection_was_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_log(url) as log:
        fill(log, 1200)  # some parts
    steps = {name: getattr(postgres_store.PostgresStore, name) for name in ("change", "compact")}

    def after_a_kill(name: str) -> Callable[..., Any]:
        def step(store: postgres_store.PostgresStore, *args: Any) -> Any:
            kill_backends(url)
            return steps[name](store, *args)

        return step

    for name in steps:
        monkeypatch.setattr(postgres_store.PostgresStore, name, after_a_kill(name))
    assert gc(url, before=START + timedelta(days=3), why="age").trajectories == 1200
    assert contents(url) == []
    assert verify(url).ok


def test_a_host_that_keeps_its_turn_holds_up_the_others_for_a_while_only(url: str, log: Log) -> None:
    made = fill(log, 1)
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
        future = log.append(trajectory(1))
        assert list(log.read()) == made  # readers do not wait for writers
        with pytest.raises(TimeoutError):
            future.exception(timeout=0.3)
        other.commit()
    assert future.exception() is None


def test_positions_are_in_order_of_commit_over_all_writers(url: str) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from log_support import trajectory
from cai_graph.log import open_log
with open_log(sys.argv[1]) as log:
    for n in range(80):
        log.append(trajectory(n, source=f"{{sys.argv[2]}}:{{n}}")).result()
"""
    children = [subprocess.Popen([sys.executable, "-c", script, url, str(n)]) for n in range(3)]
    seen: list[str] = []
    try:
        with open_log(url) as log:
            while any(child.poll() is None for child in children) or list(log.read(after=seen[-1])):
                # A reader that goes on after the last record it has seen misses none.
                seen += [record.id for record in (log.read(after=seen[-1]) if seen else log.read())]
            assert seen == [record.id for record in log.read()]
    finally:
        for child in children:
            assert child.wait(60) == 0
    assert len(seen) == 240
    assert verify(url).ok


# --- one record's fault -------------------------------------------------------------------------------


def test_a_record_that_the_server_cannot_hold_fails_alone(url: str, log: Log) -> None:
    # An index holds no key of this size.
    long = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=20_000))
    made = [trajectory(n) for n in range(20)]
    store = log._shared.store
    with store._writing:  # type: ignore[attr-defined]  # so that they are in one transaction
        first = log.append(made[0])
        futures = [log.append(record) for record in made[1:10]]
        wrong = log.append(trajectory(source=long))
        futures += [log.append(record) for record in made[10:]]
    for future in [first, *futures]:
        future.result()
    with pytest.raises(DataError, match="cannot be stored: index row"):
        wrong.result()
    assert list(log.read()) == made
    assert verify(url).ok


def test_a_page_of_what_goes_with_its_trajectory_looks_at_no_other(
    url: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in fill(log, 300):
        log.append(feedback(made.id))
    log.flush()
    execute(url, "ANALYZE records")
    store = store_of(log)
    plans: list[str] = []

    def page(sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        plans.append(str(store.rows(f"EXPLAIN {sql}", bindings)))
        return real(sql, bindings)

    real = store.page
    monkeypatch.setattr(store, "page", page)
    assert len(list(log.read(with_appended=True, outcome="REVISED"))) == 600
    assert plans
    assert "hashed SubPlan" not in str(plans)


def test_memory_stays_flat_where_records_are_large(log: Log) -> None:
    big = [trajectory(n, metadata={"text": f"{n}" * 1_500_000}) for n in range(8)]
    for record in big:
        log.append(record).result()
    store = log._shared.store
    sql = "SELECT position, payload FROM records ORDER BY position"
    assert len(store.page(sql, {})) == 3  # the first that are together more than 4 MB
    assert list(log.read()) == big
    assert list(log.read(newest_first=True)) == big[::-1]


def test_no_encoding_that_a_url_names_loses_a_record(url: str) -> None:
    with open_log(f"{url}&client_encoding=LATIN1") as log:
        log.append(record := trajectory(source="\N{CJK UNIFIED IDEOGRAPH-65E5}")).result()
        assert list(log.read(source=record.source)) == [record]


def test_tags_of_any_text_are_found(log: Log) -> None:
    tags = ["", "a", 'say "hi"', '", "', "x, y", "\\", "\ud800", "\0", "ü\N{GRINNING FACE}", "[]", "%s :tag"]
    made = [trajectory(n, tags=(tag,)) for n, tag in enumerate(tags)]
    made.append(trajectory(99, tags=tuple(tags)))
    for record in made:
        log.append(record).result()
    for number, tag in enumerate(tags):
        assert list(log.read(tag=tag)) == [made[number], made[-1]], tag


# --- what is refused ----------------------------------------------------------------------------------


def test_a_log_of_a_newer_release_is_refused_and_unchanged(url: str) -> None:
    with open_log(url) as log:
        fill(log, 3)
    execute(url, "UPDATE log SET version = ?", SCHEMA + 1)
    for read_only in (False, True):
        with pytest.raises(LogError, match=rf"schema version {SCHEMA + 1}, this release reads 1 to {SCHEMA}"):
            open_log(url, read_only=read_only)
    with pytest.raises(LogError, match="upgrade cai-graph"):
        verify(url)
    assert execute(url, "SELECT version, (SELECT count(*) FROM records) FROM log") == [(SCHEMA + 1, 3)]


def test_a_schema_that_is_not_ours_is_refused_and_unchanged(url: str) -> None:
    execute(url, "CREATE SCHEMA cai_log")
    execute(url, "CREATE TABLE cai_log.mine (x int)")
    with pytest.raises(LogError, match="its schema 'cai_log' is no log of cai-graph"):
        open_log(url)
    assert execute(url, "SELECT relname FROM pg_class WHERE relnamespace = 'cai_log'::regnamespace") == [
        ("mine",)
    ]


def test_a_log_that_is_removed_while_open_begins_anew(url: str, log: Log) -> None:
    fill(log, 2)
    execute(url, "DROP SCHEMA cai_log CASCADE")
    made = fill(log, 3)
    assert list(log.read()) == made
    assert verify(url).ok


def test_recover_says_that_postgresql_recovers_itself(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PostgreSQL recovers itself when it starts"):
        recover(url, tmp_path / "new.db")
    assert list(tmp_path.iterdir()) == []


def test_without_psycopg_the_extra_is_named() -> None:
    script = """
import sys
sys.modules["psycopg"] = None
from cai_graph import open_log
from cai_graph.errors import MissingExtra
from cai_graph.installed import command
try:
    open_log("postgresql://host/db")
except MissingExtra as error:
    assert str(error) == f"a log in PostgreSQL needs psycopg; {command('postgres')}", error
else:
    raise SystemExit("no error")
"""
    assert issubclass(MissingExtra, ImportError)
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_role_without_rights_is_told_what_to_grant(postgres: Server, url: str) -> None:
    postgres.execute("CREATE ROLE poor LOGIN")
    theirs = url.replace("postgres@", "poor@")
    try:
        with pytest.raises(LogError, match=r"permission denied .* GRANT CREATE ON DATABASE"):
            open_log(theirs)
        with open_log(url) as log:
            made = fill(log, 1)
        with pytest.raises(LogError, match=r"permission denied .* USAGE on the schema cai_log"):
            open_log(theirs)
        execute(url, "GRANT USAGE ON SCHEMA cai_log TO poor")
        execute(url, "GRANT ALL ON ALL TABLES IN SCHEMA cai_log TO poor")
        with open_log(theirs) as log:
            made += fill(log, 1)
            assert list(log.read()) == made
    finally:
        execute(url, "DROP OWNED BY poor")
        postgres.execute("DROP ROLE poor")


def test_the_set_up_of_the_docs_works(postgres: Server) -> None:
    docs = read_page("log.md")
    (block,) = fenced(docs, "sql")
    for statement in block.split(";")[:-1]:
        postgres.execute(statement)
    try:
        with open_log(f"postgresql://cai@/logs?host={postgres.folder}") as log:
            fill(log, 1)
    finally:
        postgres.execute("DROP DATABASE logs")
        postgres.execute("DROP ROLE cai")


# --- passwords ----------------------------------------------------------------------------------------

WRONG = [
    "postgresql://ann:s3cret@127.0.0.1:1/db",
    "postgresql+psycopg://ann:s3cret@127.0.0.1:1/db",
    "postgresql://ann@127.0.0.1:1/db?password=s3cret",
    "postgresql://ann@127.0.0.1:1/db?sslpassword=s3cret&connect_timeout=1",
    "postgresql://ann:%zzs3cret@127.0.0.1:1/db",
    "postgresql://ann:s3cret@127.0.0.1:1/db?nonsense=1",
    "postgresql://ann:x@s3cret@127.0.0.1:1/db",
    "postgresql://ann:x/s3cret@127.0.0.1:1/db",
    "postgresql://ann:x?s3cret@127.0.0.1:1/db",
]


@pytest.mark.parametrize("url", WRONG)
def test_no_error_shows_a_password(url: str) -> None:
    script = "import sys, cai_graph; cai_graph.open_log(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, url], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Error" in done.stderr
    assert "s3cret" not in done.stderr.replace(url, "")
    assert "s3cret" not in without_password(url)


def test_a_url_without_a_password_stays_as_it_is() -> None:
    for url in (
        "postgresql://ann@host:5432/db?sslmode=require",
        "postgresql:///db?host=/run/postgresql",
        "sqlite:////data/cai.db",
        "cai.db",
    ):
        assert without_password(url) == url
    assert without_password("postgresql://ann:x@a:1,b:2/db?password=x&sslmode=require") == (
        "postgresql://ann@a:1,b:2/db?sslmode=require"
    )


# --- migration ----------------------------------------------------------------------------------------


def test_an_older_log_is_migrated_and_keeps_its_records(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_log(url) as log:
        made = fill(log, 5)
    monkeypatch.setattr(postgres_session, "SCHEMA", SCHEMA + 1)
    monkeypatch.setitem(
        postgres_session.MIGRATIONS, SCHEMA, lambda db: db.execute("CREATE TABLE cai_log.added (x int)")
    )
    assert contents(url) == made  # reading changes nothing
    assert execute(url, "SELECT version FROM log") == [(SCHEMA,)]
    with open_log(url) as log:
        assert list(log.read()) == made
        fill(log, 1)
    assert execute(url, "SELECT version, (SELECT count(*) FROM added) FROM log") == [(SCHEMA + 1, 0)]


def test_a_migration_that_fails_leaves_the_old_version(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_log(url) as log:
        made = fill(log, 5)

    def fail(db: Any) -> None:
        db.execute("DELETE FROM records")
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(postgres_session, "SCHEMA", SCHEMA + 1)
        patch.setitem(postgres_session.MIGRATIONS, SCHEMA, fail)
        with pytest.raises(RuntimeError, match="half way"):
            open_log(url)
    with open_log(url) as log:
        assert list(log.read()) == made
    assert verify(url).ok


def test_a_kill_during_migration_leaves_the_old_version(url: str) -> None:
    with open_log(url) as log:
        made = fill(log, 50)
    script = """
import os, signal, sys
from cai_graph.log import open_log
from cai_graph.log import postgres_session as postgres
def die(db):
    db.execute("DELETE FROM records")
    os.kill(os.getpid(), signal.SIGKILL)
postgres.SCHEMA += 1
postgres.MIGRATIONS[postgres.SCHEMA - 1] = die
open_log(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", script, url], check=False)
    assert done.returncode == -9
    with open_log(url) as log:
        assert list(log.read()) == made
    assert verify(url).ok
