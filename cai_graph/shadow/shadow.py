"""The background queue of shadow mode: judges answers on the bridge's loop after they were returned.

The number and size of the answers that are queued and not yet in the log are limited. If too many wait,
further answers are logged without a judgement (`overload`); if too many wait even for the log, further ones
are only counted (`lost`), and so are those that could not be written to the log. `Shadow.tally` has the
counts, and warnings report them.

When the process ends, waiting answers are judged for up to `DRAIN_SECONDS`, and the rest is logged unjudged
(`shutdown`). This happens at a normal exit, at `sys.exit`, and at a SIGTERM without a handler. To handle
SIGTERM, the app must be wrapped in the main thread, the only one that may set a signal handler; otherwise a
warning is logged. An existing handler of the application is not replaced, since it ends the process in its
own way: by an exit, which drains the queue, or by calling `close` first. When that handler is removed, ours
is installed: uvicorn removes its own after shutdown, and then sends itself the SIGTERM again. A process that
is killed by SIGKILL loses the waiting answers.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextlib
import dataclasses
import logging
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple
from weakref import WeakSet, finalize

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from pydantic import BaseModel

from cai_graph.concurrency import bridge
from cai_graph.errors import RunError
from cai_graph.log import Log
from cai_graph.request.plan import Plan
from cai_graph.request.policy import Settings
from cai_graph.request.request import Request
from cai_graph.run import run
from cai_graph.trajectory import Outcome, Trajectory, text_of

__all__ = ["DRAIN_SECONDS", "WAITING", "WAITING_BYTES", "Shadow", "Tally", "size_of"]

WAITING = 1000
"""How many answers of a wrapped app may wait for a judgement. Twice as many may be queued for the log."""
WAITING_BYTES = 64 << 20
"""How many bytes of text these may contain; twice as many in those that are not in the log yet."""
DRAIN_SECONDS = 20.0
"""How long the end of the process waits for judgements. Kubernetes kills 30 s after its SIGTERM."""
_LOGGING_SECONDS = 5.0
"""How long the end of the process then waits for the log."""
_WARN_SECONDS = 10.0
_AFTER_SECONDS = 0.005
"""Delay between the return of an answer and the start of its judgement."""
_LOOKS = 300
"""About how many items of lists `size_of` inspects."""

Reason = Literal["sample", "overload", "shutdown"]
"""Why an answer was not judged; see `Trajectory.unjudged`."""

logger = logging.getLogger("cai_graph")


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts of a wrapped app's answers in this process, by their state; the states add up to `answers`."""

    answers: int = 0
    """Answers that the app returned, and runs of the app that failed."""
    judged: int = 0
    """Judged, and logged."""
    unjudged: int = 0
    """Logged without a judgement; the reason is in the Trajectory."""
    failed: int = 0
    """The app, a critic or a reviser failed; the error is in the Trajectory."""
    lost: int = 0
    """Not logged: too many others waited for the log, or the log could not be written."""
    waiting: int = 0
    """Not in the log yet."""


class _Handed(NamedTuple):
    plan: Plan
    make: Callable[[], Request]
    reason: Reason | None
    config: RunnableConfig
    size: int
    context: Context
    future: Future[Trajectory]


class Shadow:
    """The queue of a wrapped app's answers that are not judged yet. Thread-safe; survives a fork.

    Args:
        settings: the share of answers to judge, and how many are judged at once.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._log: Log | None = None
        self._reset()
        _watch(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._counts = dict.fromkeys(("answers", "judged", "unjudged", "failed", "lost"), 0)
        self._waiting = 0
        """Number of answers that wait for a judgement."""
        self._pending = 0
        """Number of answers that are not in the log yet."""
        self._bytes = 0
        """Approximate size of these answers, in bytes of text."""
        self._stopping = False
        self._warned = {False: -_WARN_SECONDS, True: -_WARN_SECONDS}
        # The following are used on the bridge's loop only.
        self._queue: deque[_Handed] = deque()
        self._judging: set[asyncio.Task[None]] = set()

    @property
    def tally(self) -> Tally:
        """The counts of the answers so far."""
        with self._lock:
            return Tally(**self._counts, waiting=self._pending)

    def take(
        self, plan: Plan, make: Callable[[], Request], config: RunnableConfig, size: int
    ) -> Future[Trajectory]:
        """Queue a request to be judged. Never blocks and never raises.

        Args:
            plan: how the answer is judged, revised and logged.
            make: called later on the bridge's loop; returns the request, with mode `shadow`.
            config: the configuration under which the judgement is traced.
            size: approximate bytes of text in the request.

        Returns:
            A future of the Trajectory; it fails if the answer is lost.
        """
        future: Future[Trajectory] = Future()
        future.set_running_or_notify_cancel()  # so that it cannot be cancelled, and `_end` can set it
        _see_to_sigterm()
        self._log = plan.log
        with self._lock:
            self._counts["answers"] += 1
            reason: Reason | None = None
            if self._stopping:
                reason = "shutdown"
            elif self._waiting >= WAITING or self._bytes + size > WAITING_BYTES:
                reason = "overload"
            lost = self._pending >= 2 * WAITING or self._bytes + size > 2 * WAITING_BYTES
            if lost:
                self._counts["lost"] += 1
            else:
                self._pending += 1
                self._bytes += size
                self._waiting += reason is None
        if lost or reason == "overload":
            self._warn(lost)
        if lost:
            future.set_exception(RunError("the answer was neither judged nor logged: too many others wait"))
        else:
            handed = _Handed(plan, make, reason, config, size, copy_context(), future)
            bridge.start(lambda: self._arrive(handed), after=_AFTER_SECONDS)
        return future

    def close(self) -> None:
        """Wait until every answer so far is judged and logged."""
        self.drain()
        if self._log is not None:
            self._log.flush()

    async def aclose(self) -> None:
        """Wait until every answer so far is judged and logged."""
        await asyncio.to_thread(self.close)

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until every answer so far is judged and logged; return whether all were.

        After `seconds` the answers that still wait are logged unjudged (`shutdown`). Must not be called on
        the bridge's loop, so not by a critic.
        """
        if self._wait(seconds):
            return True
        with self._lock:
            self._stopping = True
        bridge.start(self._stop)
        self._wait(_LOGGING_SECONDS)
        with self._lock:
            self._stopping = False
        return False

    def _wait(self, seconds: float | None) -> bool:
        with self._lock:
            return self._changed.wait_for(lambda: not self._pending, seconds)

    # --- on the bridge's loop -------------------------------------------------------------------------

    async def _arrive(self, handed: _Handed) -> None:
        try:
            request = handed.make()
        except Exception as error:
            self._end(handed, None, error, waited=handed.reason is None)
            return
        reason = handed.reason or ("shutdown" if self._stopping else None)
        arrived = handed._replace(
            make=lambda: request, reason=reason if _drawn(self._settings, request) else "sample"
        )
        if arrived.reason is None:
            self._queue.append(arrived)
            self._go_on()
            return
        with self._lock:
            self._waiting -= handed.reason is None
        await self._run(arrived)

    def _go_on(self) -> None:
        while self._queue and len(self._judging) < self._settings.shadow_concurrency:
            handed = self._queue.popleft()
            with self._lock:
                self._waiting -= 1
            task = asyncio.get_running_loop().create_task(self._run(handed), context=handed.context)
            self._judging.add(task)
            task.add_done_callback(self._judged)

    def _judged(self, task: asyncio.Task[None]) -> None:
        self._judging.discard(task)
        self._go_on()

    async def _stop(self) -> None:
        """Log the waiting answers without a judgement, and cancel the judgements in progress."""
        with self._lock:
            self._waiting -= len(self._queue)
        waiting, self._queue = self._queue, deque()
        for task in self._judging:
            task.cancel()
        await asyncio.gather(*(self._run(handed._replace(reason="shutdown")) for handed in waiting))

    async def _run(self, handed: _Handed) -> None:
        records: list[Trajectory] = []
        losses: list[BaseException] = []
        request = dataclasses.replace(
            handed.make(), unjudged=handed.reason, recorded=records.append, lost=losses.append
        )
        failure: BaseException | None = None
        try:
            await run(handed.plan, request, handed.config)
        except BaseException as error:  # it is in the Trajectory, and no caller waits
            failure = error
        self._end(handed, records[0] if records else None, failure, lost=bool(losses))

    def _end(
        self,
        handed: _Handed,
        record: Trajectory | None,
        error: BaseException | None,
        *,
        waited: bool = False,
        lost: bool = False,
    ) -> None:
        with self._lock:
            self._counts["lost" if lost else _what(record)] += 1
            self._pending -= 1
            self._waiting -= waited
            self._bytes -= handed.size
            self._changed.notify_all()
        if record is not None:
            handed.future.set_result(record)
            return
        handed.future.set_exception(error or RunError("the answer was not logged"))
        logger.error("an answer was neither judged nor logged", exc_info=error)

    def _warn(self, lost: bool) -> None:
        now = time.monotonic()
        if now - self._warned[lost] < _WARN_SECONDS:
            return
        self._warned[lost] = now
        tally = self.tally
        logger.log(
            logging.ERROR if lost else logging.WARNING,
            "shadow mode is overloaded: of %d answers %d were logged unjudged and %d were lost; "
            "lower `sample`, or raise `shadow_concurrency`",
            tally.answers,
            tally.unjudged,
            tally.lost,
        )


def _what(record: Trajectory | None) -> str:
    if record is None:
        return "lost"
    return {Outcome.UNJUDGED: "unjudged", Outcome.FAILED: "failed"}.get(record.outcome, "judged")


def _drawn(settings: Settings, request: Request) -> bool:
    """Return whether a request is in the sample; this depends on its id, or with a seed on its messages."""
    if settings.sample >= 1:
        return True
    if settings.seed is None:
        return int(request.id[-12:], 16) / (1 << 48) < settings.sample  # the last 48 bits are random
    texts = [text_of(message) for message in request.messages]
    return random.Random(ascii(("sample", settings.seed, texts))).random() < settings.sample


def size_of(value: Any) -> int:
    """Return approximately how many bytes an app's input or output contains. Never raises, whatever it is.

    The cost is small for inputs of any size: of long lists only evenly spaced items are measured.
    """
    size, waiting, seen = 0.0, [(value, _LOOKS, 1.0)], set[int]()
    while waiting:
        part, looks, times = waiting.pop()
        if isinstance(part, str | bytes):
            size += times * (64 + len(part))
        elif part is None or isinstance(part, int | float):
            size += times * 32
        elif id(part) not in seen:  # it may contain itself
            seen.add(id(part))
            try:
                inside, step = _inside(part), 1
                if isinstance(part, dict | list | tuple):
                    step += len(inside) // (looks + 1)
                else:
                    size += times * 512
                looked = inside[::step]
                for each in looked:
                    waiting.append((each, looks // len(looked) or 1, times * len(inside) / len(looked)))
            except Exception:  # an app's own class may raise anything when it is inspected
                continue
    return int(size)


def _inside(value: Any) -> Sequence[Any]:
    """Return the values that an object contains."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, BaseMessage):
        return (value.content,)  # its other fields are small, and slow to inspect
    if isinstance(value, BaseModel):
        return [*vars(value).values(), *(value.model_extra or {}).values()]
    if isinstance(value, Mapping):
        return [*value.values()]
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, set | frozenset):
        return [*value]
    content = getattr(value, "content", None)
    return () if content is None else (content,)


# --- the end of the process ---------------------------------------------------------------------------

_live: WeakSet[Shadow] = WeakSet()
_drains = False
_handles = False
"""Whether the exit hooks (`_drains`) and the SIGTERM handling (`_handles`) are installed."""
_told = False
"""Whether the warning that SIGTERM is not handled was logged."""


def _watch(shadow: Shadow) -> None:
    """Make the end of the process wait for the answers in a shadow."""
    global _drains
    _live.add(shadow)
    if not _drains:
        _drains = True
        # By the time atexit's functions run, Python has shut down its thread pools, and some versions start
        # no more threads. A critic may need either, so the queue is drained before, by a private hook; as
        # that hook may be missing, by atexit, too.
        with contextlib.suppress(AttributeError, RuntimeError):
            threading._register_atexit(_drain)  # type: ignore[attr-defined]
        atexit.register(_drain)
    _see_to_sigterm()


def _see_to_sigterm() -> None:
    global _handles, _told
    if _handles:
        return
    if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
        _handles = True
        handler = signal.getsignal(signal.SIGTERM)
        if handler == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminated)
        else:
            with contextlib.suppress(TypeError):  # not every object supports weak references
                finalize(handler, _see_to_sigterm_again).atexit = False
    elif not _told:
        _told = True
        logger.warning(
            "an app of mode 'shadow' was wrapped outside the main thread, so a SIGTERM may lose what waits "
            "for its judgement; wrap it in the main thread, or handle SIGTERM and call its `shadow.close()`"
        )


def _see_to_sigterm_again() -> None:
    """Install our handler after the application's own was removed and garbage-collected."""
    global _handles
    _handles = False
    _see_to_sigterm()


def _drain() -> None:
    end = time.monotonic() + DRAIN_SECONDS
    shadows = list(_live)
    for shadow in shadows:
        shadow.drain(max(0.0, end - time.monotonic()))
    for log in {shadow._log for shadow in shadows if shadow._log is not None}:
        with contextlib.suppress(Exception):
            log.flush()


def _terminated(number: int, frame: FrameType | None) -> None:
    """Drain the queues, and then end the process by the signal's default action."""
    # In a raw thread, which `threading` does not manage: the interrupted thread may hold any of its locks.
    done = _thread.allocate_lock()
    done.acquire()

    def work() -> None:
        try:
            _drain()
        finally:
            done.release()

    _thread.start_new_thread(work, ())
    done.acquire(timeout=DRAIN_SECONDS + 2 * _LOGGING_SECONDS)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _after_fork() -> None:
    global _handles
    _handles = False  # a server's worker may handle SIGTERM differently from its parent
    for shadow in list(_live):
        shadow._reset()  # waiting answers belong to the parent


os.register_at_fork(after_in_child=_after_fork)
