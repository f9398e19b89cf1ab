"""How long an answer waits for its log, and what becomes of a record that the log does not take."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from replies import RULES, verdicts

from cai_graph import Budget, ScriptedModel, constitutional
from cai_graph.errors import CaiError, LogError
from cai_graph.faces.runnable import Answered
from cai_graph.log import Log, open_log
from cai_graph.log.commit import Commit, resolve
from cai_graph.log.store import Duplicate
from cai_graph.request import committing

ERROR = ConnectionError("the provider is down")


async def ask(replies: Sequence[Any] = ("the draft", verdicts()), **settings: Any) -> Answered:
    model = ScriptedModel(replies=[*replies])
    return await constitutional(model, constitution=RULES, **settings).answered("hello")


class FullDisk:
    """A log that takes nothing."""

    is_full = False

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once

    def append(self, record: Any) -> Commit:
        if self.at_once:
            raise LogError("cai.db: no space left on device")
        condition = threading.Condition()
        failed = Commit(condition)
        resolve(condition, [(failed, LogError("cai.db: no space left on device"))])
        return failed


@pytest.mark.parametrize("at_once", [True, False])
async def test_an_answer_outlives_its_log_and_the_alarm_is_loud(
    at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before = committing.log_failures

    with caplog.at_level(logging.ERROR, logger="cai_graph"):
        output, trajectory = await ask(log=FullDisk(at_once=at_once))

    assert output.content == "the draft"
    assert committing.log_failures == before + 1
    assert trajectory.id in caplog.text
    assert "no space left" in caplog.text


class Stuck:
    """A log that has no room, or else commits nothing, until it goes on."""

    def __init__(self, *, has_room: bool) -> None:
        self.is_full = not has_room
        self.goes_on = threading.Event()
        self.taken: list[str] = []
        self._condition = threading.Condition()
        self._commits: list[Commit] = []

    def append(self, record: Any) -> Commit:
        if self.is_full:
            assert self.goes_on.wait(20)
        self.taken.append(record.id)
        self._commits.append(Commit(self._condition))
        if self.goes_on.is_set():
            self.end()
        return self._commits[-1]

    def end(self, error: CaiError | None = None) -> None:
        self.goes_on.set()
        resolve(self._condition, [(commit, error) for commit in self._commits])


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("seconds", [1.0, None])
async def test_a_stuck_log_holds_an_answer_no_longer_than_its_budget(
    has_room: bool, seconds: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(committing, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(committing, "PATIENCE_SECONDS", 0.2)
    log = Stuck(has_room=has_room)
    began = time.monotonic()

    output, trajectory = await ask(log=log, budget=Budget(seconds=seconds))

    assert output.content == "the draft"
    assert time.monotonic() - began < 5
    assert "the log is slow" in caplog.text
    log.end()
    while not log.taken:
        await asyncio.sleep(0.01)
    assert log.taken == [trajectory.id]
    assert "LOST" not in caplog.text


async def test_what_a_stuck_log_never_takes_raises_the_alarm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(committing, "PATIENCE_SECONDS", 0.2)
    log = Stuck(has_room=True)
    _, trajectory = await ask(log=log, budget=Budget(seconds=None))

    log.end(LogError("cai.db: no space left on device"))

    assert f"LOST FROM THE LOG: trajectory {trajectory.id}" in caplog.text


async def test_a_request_that_is_cancelled_while_the_log_is_full_is_logged() -> None:
    log = Stuck(has_room=False)
    asked = asyncio.create_task(ask(log=log))
    await asyncio.sleep(0.3)

    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked

    log.end()
    while not log.taken:
        await asyncio.sleep(0.01)


async def test_a_request_that_fails_while_the_log_is_full_holds_up_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = Stuck(has_room=False)

    with pytest.raises(ConnectionError):
        await ask([ERROR], log=log)

    assert not log.taken
    log.end()
    async with asyncio.timeout(10):
        while not log.taken:
            await asyncio.sleep(0.01)
    assert "LOST" not in caplog.text


async def test_a_record_that_fails_once_its_request_is_cancelled_raises_the_alarm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = Stuck(has_room=True)
    asked = asyncio.create_task(ask(log=log))
    while not log.taken:
        await asyncio.sleep(0.01)

    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    log.end(LogError("cai.db: no space left on device"))

    assert f"LOST FROM THE LOG: trajectory {log.taken[0]}" in caplog.text


async def test_a_record_that_another_process_has_logged_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(committing, "PATIENCE_SECONDS", 0.2)
    log = Stuck(has_room=True)
    await ask(log=log, budget=Budget(seconds=None))

    log.end(Duplicate("cai.db: another record of this id is in the log"))

    assert "LOST" not in caplog.text


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_log_that_fails_costs_the_answer_where_the_user_says_so(at_once: bool) -> None:
    with pytest.raises(LogError, match="no space left"):
        await ask(log=FullDisk(at_once=at_once), on_log_error="raise")


@pytest.mark.parametrize("at_once", [True, False])
async def test_the_apps_error_is_not_hidden_behind_the_logs(
    at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConnectionError):
        await ask([ERROR], log=FullDisk(at_once=at_once), on_log_error="raise")

    assert "LOST FROM THE LOG" in caplog.text


async def test_an_acknowledged_answer_is_committed(log: Log) -> None:
    await ask(log=log)

    with open_log(log.name, read_only=True) as other:
        assert len(list(other.read(kind="trajectory"))) == 1
