"""The log as its users see it, in each database: append, read, open, close, redaction."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from typing import Any, get_args, get_overloads, get_type_hints
from weakref import WeakSet

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_support import (
    START,
    comparison,
    execute,
    feedback,
    fill,
    records,
    review,
    store_of,
    trajectory,
)
from repository import SUPPORT

from cai_graph.errors import ConfigError, DataError, LogError
from cai_graph.log import Filters, Log, open_log, store
from cai_graph.log import writer as log_writer
from cai_graph.log.store import row_of
from cai_graph.log.upkeep import verify
from cai_graph.log.writer import Writer
from cai_graph.trajectory import (
    ConstitutionRef,
    Message,
    Outcome,
    Record,
    Review,
    Trajectory,
    decode,
    encode,
)


@pytest.fixture
def log(url: str) -> Iterator[Log]:
    with open_log(url) as log:
        yield log


# --- append and read ----------------------------------------------------------------------------------


def test_a_resolved_append_is_there_for_every_other_connection(url: str, log: Log) -> None:
    record = trajectory()
    log.append(record).result()
    assert execute(url, "SELECT id FROM records") == [(record.id,)]
    assert log.get(record.id) == record


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


def test_a_type_checker_knows_what_is_read_of_each_kind() -> None:
    told = [get_type_hints(read) for read in get_overloads(Log.read)]
    found = {get_args(hints["return"]): get_args(hints["kind"]) for hints in told if "kind" in hints}
    assert found == {(record,): (kind,) for record, kind in store.KINDS.items()}


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"tags": "y"}, "no filter 'tags'; did you mean 'tag'"),
        ({"colour": "y"}, "no filter 'colour'; they are trajectory_id, outcome"),
        ({"kind": "trajectories"}, "kind is one of trajectory, comparison, review, feedback; found 'traj"),
        ({"outcome": "kept"}, "outcome is one of KEPT, .*; found 'kept'"),
        ({"since": "2020-01-01"}, "since is a datetime, found '2020-01-01'"),
    ],
)
def test_a_filter_that_is_none_is_refused_and_passes_not_everything(
    log: Log, filters: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        next(log.read(**filters), None)


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
    minute = timedelta(minutes=1)
    assert list(log.read(kind="trajectory", since=made[1].started_at, until=made[2].started_at)) == [made[1]]
    assert list(log.read(since=made[2].started_at + minute)) == []
    assert list(log.read(until=START)) == []
    assert list(log.read(source="run1:", since=made[1].started_at, newest_first=True)) == [made[1]]
    assert list(log.read(source="run1:", after=made[0].id)) == [made[1]]
    assert list(log.read(source="run1:", after=made[2].id)) == []
    assert list(log.read(source="run2:", outcome="KEPT")) == []


@pytest.mark.parametrize(
    ("filters", "chosen"),
    [
        ({"outcome": "KEPT"}, [1]),
        ({"tag": "a"}, [0, 1]),
        ({"source": "run1:"}, [0]),
        ({"source": "run1:", "outcome": "KEPT"}, []),
        ({"constitution": "d1" * 32}, [0, 1, 2]),
        ({"since": START + timedelta(minutes=2)}, [2]),
        ({"until": START + timedelta(minutes=1)}, [0]),
        ({}, [0, 1, 2, None]),
        ({"outcome": "KEPT", "kind": "review"}, [1]),
        ({"tag": "a", "kind": "trajectory"}, [0, 1]),
    ],
)
@pytest.mark.parametrize("newest_first", [False, True])
def test_what_was_appended_goes_with_its_trajectory_wherever_it_stands(
    log: Log, filters: Filters, chosen: list[int | None], newest_first: bool
) -> None:
    made = [
        trajectory(0, tags=("a",), source="run1:0"),
        trajectory(1, tags=("a",), outcome=Outcome.KEPT),
        trajectory(2),
    ]
    late = START + timedelta(days=1)
    early = [(number, feedback(made[number].id)) for number in (0, 1, 2)]
    later = [(number, review(made[number].id, at=late)) for number in (2, 1, 0)]
    alone = [(None, comparison("removed"))]
    everything = [*early, *enumerate(made), *later, *alone]
    for _, record in everything:
        log.append(record).result()

    found = list(log.read(with_appended=True, newest_first=newest_first, **filters))

    kind = {"review": Review, "trajectory": Trajectory}.get(filters.get("kind") or "", object)
    expected = [record for number, record in everything if number in chosen and isinstance(record, kind)]
    assert found == (expected[::-1] if newest_first else expected)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.lists(st.text('", \\a', max_size=4), max_size=4), max_size=4))
def test_a_tag_is_found_where_it_is_and_nowhere_else(log: Log, tags: list[list[str]]) -> None:
    last = trajectory()
    log.append(last).result()
    made = [trajectory(n, tags=tuple(some)) for n, some in enumerate(tags)]
    for future in [log.append(record) for record in made]:
        future.result()
    for tag in {tag for some in tags for tag in some} | {"", '", "', ", ", "a"}:
        found = list(log.read(tag=tag, after=last.id))
        assert found == [record for record in made if tag in record.tags], tag


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({"outcome": "FAILED"}, "records_outcome|records_filtered"),
        ({"constitution": "d2" * 32}, "records_constitution|records_filtered"),
        ({"kind": "review"}, "records_kind"),
        ({"trajectory_id": "t"}, "records_trajectory"),
        ({"tag": "rare"}, "records_tags|records_filtered"),
        ({"kind": "trajectory", "outcome": "FAILED"}, "records_outcome|records_filtered"),
        ({"source": "run7:"}, None),
        ({"since": START + timedelta(minutes=1990)}, None),
    ],
)
@pytest.mark.parametrize("newest_first", [False, True])
def test_what_is_rare_is_found_without_reading_the_rest(
    log: Log, monkeypatch: pytest.MonkeyPatch, filters: Filters, index: str | None, newest_first: bool
) -> None:
    store = store_of(log)
    rows = []
    for number in range(2000):
        changes = {"source": f"run{number // 10}:{number}", "metadata": {"text": "x" * 1000}}
        if number == 77:
            digest = ConstitutionRef(name="other", version="1", digest="d2" * 32)
            changes |= {"outcome": Outcome.FAILED, "tags": ("rare",), "constitution": digest}
        record = trajectory(number, **changes)
        rows.append(row_of(record, encode(record)))
    about = review("t")
    for some in (rows[:1000], [row_of(about, encode(about))], rows[1000:]):
        store.insert(some)
    asked = []
    page = store.page
    monkeypatch.setattr(
        store, "page", lambda sql, bindings: asked.append((sql, bindings)) or page(sql, bindings)
    )
    found = list(log.read(newest_first=newest_first, **filters))
    assert len(found) == (1 if index else 10)
    sql, bindings = asked[0]
    if index is None:  # The index has told the positions.
        assert bindings["last"] - bindings["first"] == 9
    else:
        how = "EXPLAIN " if log.name.startswith("postgresql") else "EXPLAIN QUERY PLAN "
        plan = " ".join(str(row) for row in store.rows(how + sql, bindings))
        assert re.search(index, plan), plan  # as PostgreSQL has it, and as SQLite
        assert "Sort" not in plan
        assert "TEMP B-TREE" not in plan


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_cuts_divide_the_log_without_loss_or_overlap(log: Log, count: int) -> None:
    made = fill(log, 20)
    assert not log.has_appended()
    about = feedback(made[0].id, at=START)
    log.append(about).result()
    cuts = log.cuts(count)
    assert len(cuts) == min(count, 21) + 1
    parts = [list(log.read(positions=part)) for part in pairwise(cuts)]
    assert [record for part in parts for record in part] == [*made, about]
    assert [*log.read(positions=(cuts[0], cuts[-1]), newest_first=True)] == [about, *reversed(made)]
    assert log.has_appended()
    assert list(log.read(appended=True)) == [about]
    assert [decode(payload) for payload in log.payloads(limit=2)] == made[:2]


@pytest.mark.parametrize("newest_first", [False, True])
def test_what_comes_after_a_record_in_a_range_is_in_both(log: Log, newest_first: bool) -> None:
    made = fill(log, 10)
    for number, one in enumerate(made):
        found = list(log.read(positions=(3, 7), after=one.id, newest_first=newest_first))
        expected = made[3 : min(number, 7)][::-1] if newest_first else made[max(number + 1, 3) : 7]
        assert found == expected, number


def test_an_empty_log_has_one_cut(log: Log) -> None:
    assert log.cuts(3) == [0]


def test_a_time_without_a_zone_is_utc_wherever_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        there.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert store.micros(datetime(2026, 1, 1)) == store.micros(datetime(2026, 1, 1, tzinfo=UTC))
    time.tzset()


def test_reading_after_an_unknown_id_says_so(log: Log) -> None:
    with pytest.raises(DataError, match="no record 'nobody'"):
        list(log.read(after="nobody"))
    with pytest.raises(DataError, match=r"no record 'nobody'; `cai log list` shows the ids"):
        log.get("nobody")


def test_a_source_is_matched_by_its_beginning(log: Log) -> None:
    for source in ["run1:0", "run1:1", "run1:\N{GRINNING FACE}", "run10", None, "run2:0"]:
        log.append(trajectory(source=source)).result()

    def found(prefix: str) -> set[str | None]:
        return {record.source for record in log.read(kind="trajectory", source=prefix)}

    assert found("run1:") == {"run1:0", "run1:1", "run1:\N{GRINNING FACE}"}
    assert found("run") == found("run1:") | {"run10", "run2:0"}
    assert found("no") == set()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(records)
def test_any_record_comes_back(log: Log, record: Record) -> None:
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


def test_a_record_of_the_first_year_is_counted(log: Log) -> None:
    log.append(trajectory(started_at=datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))))).result()
    assert log.stats().first == datetime.min.replace(tzinfo=UTC)


def test_a_record_that_cannot_be_stored_fails_alone(log: Log) -> None:
    good = [trajectory(n) for n in range(20)]
    wrong = [
        trajectory(seconds=float("nan")),
        trajectory(metadata={"thing": object()}),
        trajectory(started_at="yesterday"),
        trajectory(outcome="KEPT"),
        trajectory(tags=("prod", 4711)),
        trajectory(messages=(Message(role="user", content=None),)),  # type: ignore[arg-type]
        msgspec.structs.replace(feedback("t"), user=42),
        msgspec.structs.replace(feedback("t"), score=True),
        review("t", decision="ok"),
    ]
    futures = [log.append(record) for record in [*good[:10], *wrong, *good[10:]]]
    failed = [future.exception() for future in futures]
    assert [type(error) for error in failed] == [type(None)] * 10 + [DataError] * 9 + [type(None)] * 10
    assert list(log.read()) == good
    assert log.lost == 9


def test_the_same_record_again_is_harmless_and_a_different_one_is_refused(url: str, log: Log) -> None:
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
    assert verify(url).ok


def test_what_was_appended_is_the_record_as_it_was_then(log: Log) -> None:
    metadata = {"count": 1}
    record = trajectory(metadata=metadata)
    future = log.append(record)
    metadata["count"] = 2
    future.result()
    stored = log.get(record.id)
    assert isinstance(stored, Trajectory)
    assert stored.metadata == {"count": 1}


def test_a_handler_of_the_application_s_that_raises_harms_nobody(log: Log) -> None:
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("the collector is down")

    def fail(_: Future[None]) -> None:
        raise ValueError

    logger, handler = logging.getLogger("cai_graph.log"), Raising()
    logger.addHandler(handler)
    try:
        with store_of(log)._writing:  # type: ignore[attr-defined]  # so that the callback is there in time
            log.append(trajectory()).add_done_callback(fail)
        log.append(trajectory(1)).result(10)
    finally:
        logger.removeHandler(handler)


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
    with store_of(log)._writing:  # type: ignore[attr-defined]  # so that all but the first gather
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

    with store_of(log)._writing:  # type: ignore[attr-defined]  # so that the loop is closed first
        asyncio.run(leave())
    assert len(fill(log, 3)) == len(list(log.read())) - 1


def test_an_append_is_waited_for_by_whatever_waits_for_futures(log: Log) -> None:
    with store_of(log)._writing:  # type: ignore[attr-defined]
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


@pytest.mark.parametrize("act", ["flush", "close"])
def test_a_callback_that_flushes_or_closes_a_log_holds_up_nobody(url: str, act: str) -> None:
    with open_log(url) as log:
        other, ended = open_log(url), threading.Event()

        def callback(_: Future[None]) -> None:
            getattr(other, act)()
            ended.set()

        with store_of(log)._writing:  # type: ignore[attr-defined]  # so that the callback is there in time
            log.append(trajectory()).add_done_callback(callback)
            later = log.append(trajectory(1))
        later.result(timeout=10)
        assert ended.wait(10)
        other.close()
        assert len(list(log.read())) == 2


def test_a_callback_that_closes_the_last_log_of_a_file_loses_nothing(url: str) -> None:
    log, closed = open_log(url), threading.Event()

    def close(_: Future[None]) -> None:
        log.close()
        closed.set()

    with store_of(log)._writing:  # type: ignore[attr-defined]  # so that the callback is there in time
        log.append(trajectory()).add_done_callback(close)
        later = [log.append(trajectory(number)) for number in range(1, 400)]
    assert closed.wait(10)

    with open_log(url) as again:
        again.flush()
        assert len(list(again.read())) == 400
    assert all(commit.done() for commit in later)


def test_a_redaction_hook_may_open_the_log_that_it_redacts_for(url: str) -> None:
    def redact(record: Record) -> Record:
        with open_log(url) as other:
            other.append(trajectory(9, id=f"{record.id} seen"))
            other.flush()
        return record

    with open_log(url, redact=redact) as log:
        made = trajectory()
        log.append(made).result(timeout=10)
        log.flush()
        assert {record.id for record in log.read()} == {made.id, f"{made.id} seen"}


def test_a_callback_that_raises_anything_harms_nobody(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    def leave(_: Future[None]) -> None:
        raise SystemExit(1)

    with store_of(log)._writing:  # type: ignore[attr-defined]  # so that the callback is there in time
        log.append(trajectory()).add_done_callback(leave)
    log.flush()
    assert "a callback of an append failed" in caplog.text
    made = fill(log, 3)
    assert list(log.read())[1:] == made


def test_many_threads_lose_nothing_and_keep_each_ones_order(url: str, log: Log) -> None:
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
    assert verify(url).ok
    writer = log._shared.writer
    assert writer is not None
    assert writer.pending_bytes == 0, "every byte was counted in and out"


def test_an_append_waits_for_no_other(log: Log) -> None:
    writer = log._shared.writer
    assert writer is not None
    with writer._counting, ThreadPoolExecutor(1) as pool:  # as an append does that was stopped halfway
        futures = [pool.submit(log.append, trajectory(n)).result(10) for n in range(3)]
        for future in futures:
            future.result(10)
    log.append(trajectory(3))  # which counts what nobody counted
    log.flush()
    assert writer.pending_bytes == 0


def test_a_close_waits_for_a_writer_that_is_just_being_started(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, starting, go = open_log(url), threading.Event(), threading.Event()
    start = threading.Thread.start

    def slowly(thread: threading.Thread) -> None:
        if thread.name.startswith("cai log"):
            starting.set()
            go.wait(10)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    with ThreadPoolExecutor(2) as pool:
        appended = pool.submit(lambda: log.append(trajectory()).result(10))
        assert starting.wait(10)
        closed = pool.submit(log.close)
        go.set()
        closed.result(10)
        appended.result(10)


def test_an_append_beside_a_close_is_refused_or_written(url: str) -> None:
    log = open_log(url)
    committed, started = [], threading.Event()

    def produce(number: int) -> None:
        for n in range(2000):
            try:
                future = log.append(trajectory(n, source=f"{number}:{n}"))
            except LogError:
                return
            started.set()
            future.result(10)
            committed.append(f"{number}:{n}")

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(produce, number) for number in range(4)]
        started.wait(10)
        log.close()
        for future in running:
            future.result(30)
    with open_log(url, read_only=True) as again:
        stored = [record.source for record in again.read()]
    assert sorted(stored) == sorted(committed)


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
        peak = max(peak, writer.pending_bytes)
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
        ("postgresql://ann:secret@more@host/db", "a user or password holds an @"),
        ("mysql://ann:secret@host/db", "'mysql://ann@host/db': unknown scheme 'mysql'"),
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
    assert ("sqlite:///cai.db" in str(caught.value)) is ("password" not in says)
    assert "secret" not in str(caught.value)
    assert "more@" not in str(caught.value)


def test_reading_only_makes_and_changes_nothing(url: str) -> None:
    with pytest.raises(LogError, match="there is no log"):
        open_log(url, read_only=True)
    with open_log(url) as log:
        made = fill(log, 2)
    with open_log(url, read_only=True) as log:
        assert list(log.read()) == made
        with pytest.raises(LogError, match="read only"):
            log.append(trajectory())


def test_logs_of_one_place_share_one_writer(url: str) -> None:
    with open_log(url) as one, open_log(url) as two:
        record = trajectory()
        one.append(record).result()
        assert two.get(record.id) == record
        assert one._shared is two._shared


def test_closing_writes_what_is_pending_and_closing_twice_is_harmless(url: str) -> None:
    log = open_log(url)
    other = open_log(url)
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


def test_a_log_that_was_closed_is_let_go_of(url: str) -> None:
    importlib.import_module("multiprocessing.util")  # the finalizers of its children are in it
    kept: WeakSet[Writer] = WeakSet()
    for number in range(3):
        with open_log(url) as log:
            log.append(feedback(str(number))).result()
            kept.add(log._writer())
    del log
    gc.collect()
    assert not kept


def test_reading_ends_where_the_log_is_closed(url: str) -> None:
    log = open_log(url)
    fill(log, 600)  # more than is read at a time
    reading = log.read()
    next(reading)
    log.close()
    with pytest.raises(LogError, match="the log is closed"):
        list(reading)


def test_what_is_pending_at_exit_is_written(url: str) -> None:
    script = """
import sys
import threading
sys.path.insert(0, sys.argv[2])
from log_support import trajectory
from cai_graph.log import open_log
log = open_log(sys.argv[1])
for n in range(200):
    log.append(trajectory(n))
"""
    subprocess.run([sys.executable, "-c", script, url, str(SUPPORT)], check=True)
    with open_log(url, read_only=True) as log:
        assert log.stats().trajectories == 200


def test_importing_the_log_loads_no_database_driver() -> None:
    script = "import cai_graph.log, sys; sys.exit(bool({'apsw', 'psycopg', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", script], check=True)
