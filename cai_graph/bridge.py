"""The one bridge from synchronous callers to the async core.

A daemon event loop, one a process, runs the core. `run` blocks the calling thread until the core is
done; meanwhile the core may hand work back to that thread (`Caller.call`), so that under a
synchronous `invoke` the wrapped app's own `invoke` runs where its author expects it: in the caller's
thread, with the caller's context variables, connections and thread-locals.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, TypeVar

__all__ = ["Caller", "run"]

T = TypeVar("T")


class _Loop:
    """An event loop on a daemon thread of this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="cai_graph", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


_shared: _Loop | None = None
_lock = threading.Lock()


def _loop() -> _Loop:
    global _shared
    with _lock:
        if _shared is None or _shared.pid != os.getpid():  # a fork keeps the object but not the thread
            _shared = _Loop()
        if threading.current_thread() is _shared.thread:
            return _Loop()  # a synchronous call from inside the core: waiting on its own loop would hang
        return _shared


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


class Caller:
    """The thread that waits in `run`, as the core sees it."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the caller's thread and return what it returns, or raise what it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            result: T | None = None
            error: Exception | None = None
            try:
                result = function()
            except StopIteration as stop:  # a future cannot carry it
                error = RuntimeError(f"the wrapped app raised {stop!r}")
            except Exception as raised:  # an interrupt is not caught here: it ends `run` itself
                error = raised
            loop.call_soon_threadsafe(settle, result, error)

        self._work.put(work)
        return await future

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _release(self) -> None:
        self._work.put(None)


def run(core: Callable[[Caller], Coroutine[Any, Any, T]]) -> T:
    """Run `core(caller)` on the bridge's loop, in a copy of the caller's context, and return its result.

    An interrupt of the waiting thread (Ctrl-C) cancels the core, waits until it has cleaned up, and is
    raised again.
    """
    caller = Caller()
    context = copy_context()
    started: queue.SimpleQueue[asyncio.Task[T]] = queue.SimpleQueue()

    coroutine = core(caller)
    loop = _loop()

    def start() -> None:
        task = loop.loop.create_task(coroutine, context=context)
        task.add_done_callback(lambda _: caller._release())
        started.put(task)

    loop.loop.call_soon_threadsafe(start)
    task = started.get()
    try:
        caller._serve()
    except BaseException:
        loop.loop.call_soon_threadsafe(task.cancel)
        caller._serve()
        raise
    finally:
        if loop is not _shared:
            loop.stop()
    return task.result()
