"""Commits a request's record to the log: how long the answer waits for it, and the alarm for a lost record.

in time     the answer is released once its record is committed
late        the answer is released before, and the record is committed as soon as the log accepts it
never       `on_log_error="answer"`: the alarm, LOST FROM THE LOG, is logged and counted; `raise`: LogError
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cai_graph.errors import LogError
from cai_graph.log import Log
from cai_graph.log.commit import Commit
from cai_graph.log.store import Duplicate
from cai_graph.request.plan import Plan
from cai_graph.request.policy import Settings
from cai_graph.trajectory import Review, Trajectory

__all__ = ["alarm", "commit"]

logger = logging.getLogger("cai_graph")

GRACE_SECONDS = 1.0
"""How much longer than its budget of seconds an answer waits for the log, under `on_log_error="answer"`."""
PATIENCE_SECONDS = 60.0
"""How long it waits where the budget has no bound of seconds."""
_FULL_SECONDS = 0.01
"""Interval at which a task checks whether a full log has room again."""

log_failures = 0
"""How many records of this process could not be committed, although their answers were released."""


async def commit(
    plan: Plan,
    record: Trajectory | Review,
    *,
    failed: bool = False,
    since: float | None = None,
    lost: Callable[[BaseException], None] = lambda error: None,
) -> None:
    """Commit a record to the plan's log, and wait for it as `on_log_error` allows.

    Under `answer` this waits until the budget's seconds are over, plus GRACE_SECONDS. A record that is not
    committed by then is committed later, in the background; if that fails, `alarm` is called.

    Args:
        plan: the plan, with the log and the settings.
        record: the record.
        failed: whether an error is being raised; then this does not wait and raises nothing, so that an
            error of the log does not hide that one.
        since: when the request began, by `time.perf_counter`; None: now.
        lost: called with the error where the record could not be committed and this raises nothing.

    Raises:
        LogError: it could not be committed and `on_log_error` is `raise`.
        Duplicate: the log already has a record with its id, so that nothing is lost.
    """
    if plan.log is None:
        return
    settings, entry = plan.settings, _Entry(plan.log, record, lost)
    if failed:
        entry.leave()
        return
    raises = settings.on_log_error == "raise" and settings.mode != "shadow"
    try:
        async with asyncio.timeout(None if raises else _patience(settings, since)) as timeout:
            await entry.committed()
    except asyncio.CancelledError:
        entry.leave()
        raise
    except Duplicate:
        raise
    except Exception as error:
        if timeout.expired():
            logger.warning("the log is slow: the answer of %s leaves before it is committed", entry.name)
            entry.leave()
        elif raises:
            raise LogError(f"{entry.name} could not be logged: {error}") from error
        else:
            entry.alarm(error)


def _patience(settings: Settings, since: float | None) -> float | None:
    """Return how many seconds an answer may wait for the log; None, no bound, where no answer waits."""
    if settings.mode == "shadow":
        return None
    if settings.budget.seconds is None:
        return PATIENCE_SECONDS
    elapsed = 0.0 if since is None else time.perf_counter() - since
    return max(0.0, settings.budget.seconds - elapsed) + GRACE_SECONDS


class _Entry:
    """A record that is being committed."""

    def __init__(self, log: Log, record: Trajectory | Review, lost: Callable[[BaseException], None]) -> None:
        self.name = f"{type(record).__name__.lower()} {record.id}"
        self._log = log
        self._record = record
        self._lost = lost
        self._appended: Commit | None = None

    async def committed(self) -> None:
        """Append the record and wait until it is committed; raises the log's errors."""
        # Poll for room: a blocking append would stop the event loop and could not be cancelled.
        while self._log.is_full:
            await asyncio.sleep(_FULL_SECONDS)
        self._appended = self._log.append(self._record)
        await self._appended

    def leave(self) -> None:
        """Have the record committed in the background; if that fails, `alarm` is called.

        The log writes its queue out when the process exits.
        """
        if self._appended is not None:
            self._appended.add_done_callback(self._alarm_if_failed)
        elif self._log.is_full:
            try:
                _late.submit(self._append)
            except RuntimeError as error:  # the process ends
                self.alarm(error)
        else:
            self._append()

    def _append(self) -> None:
        try:
            self._log.append(self._record).add_done_callback(self._alarm_if_failed)
        except Exception as error:
            self.alarm(error)

    def _alarm_if_failed(self, appended: Future[None]) -> None:
        error = appended.exception()
        if error is not None and not isinstance(error, Duplicate):
            self.alarm(error)

    def alarm(self, error: BaseException) -> None:
        """Log and count the record as lost, and call the `lost` callback."""
        self._lost(error)
        alarm(self.name, error)


def alarm(name: str, error: BaseException) -> None:
    """Log the error that a record is lost, and count it in `log_failures`."""
    global log_failures
    log_failures += 1
    logger.error(
        "LOST FROM THE LOG: %s could not be committed (%d lost in this process): %s",
        name,
        log_failures,
        error,
    )


_late = ThreadPoolExecutor(1, "cai late")
"""The thread that appends records to a full log when no task waits for them."""


def _after_fork() -> None:
    global _late
    _late = ThreadPoolExecutor(1, "cai late")  # the parent's thread does not exist in a forked process


os.register_at_fork(after_in_child=_after_fork)
