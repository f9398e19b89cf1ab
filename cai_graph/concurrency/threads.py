"""A thread pool for blocking calls: models without async methods, synchronous handlers, host look-ups.

asyncio's default pool has few threads, so that hanging calls would block all others; and once the main thread
has ended it accepts no more calls, even if other threads are still running.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeAlias, TypeVar

__all__ = ["Threads", "in_thread", "shared"]

P = ParamSpec("P")
T = TypeVar("T")

IDLE_SECONDS = 10.0
"""How long an idle thread waits for another call before it ends."""

_Inbox: TypeAlias = "queue.SimpleQueue[Callable[[], None]]"


class Threads(ThreadPoolExecutor):  # an event loop takes no other kind
    """Runs each call at once, in an idle thread or else in a new one.

    The number of threads is bounded only by the callers. The process ends without waiting for them. After a
    fork the child has this object, but not its threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()
        self._idle: list[_Inbox] = []

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `fn` in a thread, and return a future for its result or exception."""
        future: Future[T] = Future()
        with self._guard:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(inbox,), name="cai_graph_call", daemon=True).start()
        inbox.put(partial(_settle, future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: a closing loop calls this, but other loops share the pool; idle threads end anyway."""

    def _work(self, inbox: _Inbox) -> None:
        while (call := self._next(inbox)) is not None:
            call()
            del call  # or its arguments would stay alive while the thread is idle
            with self._guard:
                self._idle.append(inbox)

    def _next(self, inbox: _Inbox) -> Callable[[], None] | None:
        try:
            return inbox.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            with self._guard:
                if inbox in self._idle:
                    self._idle.remove(inbox)
                    return None
            return inbox.get()  # `submit` has just chosen this thread


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
        del future  # the error's traceback references this frame: avoid a reference cycle
    else:
        future.set_result(result)


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` in a thread and return its result; loops do not wait for the thread when they close."""
    return await asyncio.wrap_future(shared().submit(function, *args, **kwargs))


def shared() -> Threads:
    """Return the pool of this process, which all loops share."""
    return _shared


_shared = Threads()


def _after_fork() -> None:
    global _shared
    _shared = Threads()  # the threads exist in the parent only


os.register_at_fork(after_in_child=_after_fork)
