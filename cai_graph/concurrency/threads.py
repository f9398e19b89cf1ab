"""Threads for what blocks: a model without asynchronous calls, a synchronous handler, the look-up of a host.

The pool that asyncio makes for itself has few threads, which calls that hang would keep from all others; and
when the main thread has ended it takes no more calls, though other threads go on.
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
"""How long a thread waits for a further call before it ends."""

_Inbox: TypeAlias = "queue.SimpleQueue[Callable[[], None]]"


class Threads(ThreadPoolExecutor):  # an event loop takes no other kind
    """Runs each call at once, in a thread that is idle or else in a new one.

    How many run is bounded by what asks for them. The process ends without waiting for any. A fork keeps the
    object, but not its threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()
        self._idle: list[_Inbox] = []

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread call `fn`, and return the future of what it returns or raises."""
        future: Future[T] = Future()
        with self._guard:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(inbox,), name="cai_graph_call", daemon=True).start()
        inbox.put(partial(_settle, future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: a loop that closes says this, others go on, and idle threads end by themselves."""

    def _work(self, inbox: _Inbox) -> None:
        while (call := self._next(inbox)) is not None:
            call()
            del call  # or what it was called with would live as long as the thread waits
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
            return inbox.get()  # it was chosen this very moment


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
        del future  # the error knows this frame, and would hold itself
    else:
        future.set_result(result)


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `function` returns, called in a thread for which no loop waits when it ends."""
    return await asyncio.wrap_future(shared().submit(function, *args, **kwargs))


def shared() -> Threads:
    """Return those of this process; all loops share them."""
    return _shared


_shared = Threads()


def _after_fork() -> None:
    global _shared
    _shared = Threads()  # the parent has the threads


os.register_at_fork(after_in_child=_after_fork)
