"""The bridge: lets synchronous callers run the async core on one shared event loop.

The core runs on a daemon event loop, one per process; blocking calls run in daemon threads. `run` blocks the
calling thread until the core is done, and `stream` until it has the next item. Meanwhile the core may run
functions in that thread (`Caller.call`), so that under a synchronous `invoke` the wrapped app's own `invoke`
runs where its author expects it: in the caller's thread, with the caller's context variables, connections and
thread-locals.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar, cast

from cai_graph.concurrency import threads

__all__ = ["Caller", "is_here", "run", "start", "stream"]

T = TypeVar("T")


class _LoopThread(threading.Thread): ...


class _Loop:
    """An event loop on a daemon thread of this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(threads.shared())
        self._is_over = False
        self.thread = _LoopThread(target=self._run, name="cai_graph", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self._is_over:
            with suppress(SystemExit, KeyboardInterrupt):  # raised in a task, which keeps it, too
                self.loop.run_forever()
        self.loop.close()

    def stop(self, *, wait: bool = True) -> None:
        self._is_over = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        if wait:
            self.thread.join()


_shared: _Loop | None = None
_lock = threading.Lock()


def _loop() -> _Loop:
    shared = _shared_loop()
    if threading.current_thread() is shared.thread:
        return _Loop()  # a synchronous call from inside the core: waiting for its own loop would deadlock
    return shared


def _shared_loop() -> _Loop:
    global _shared
    with _lock:
        if _shared is None or _shared.pid != os.getpid():  # a fork keeps the object but not the thread
            _shared = _Loop()
        return _shared


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


class Caller:
    """The core's handle to the thread that waits in `run` or `stream`."""

    def __init__(self) -> None:
        self._loop = _loop()
        self._context = copy_context()
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.current_thread()
        self._interrupted: Callable[[], object] = lambda: None
        """Fails the `call` whose function was interrupted last; does nothing if none was."""
        self.gone = False
        """Whether the thread no longer waits: a stream was abandoned unclosed, or a wait interrupted."""

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the caller's thread, and return what it returns or raise what it raises.

        Raises:
            RuntimeError: the caller's thread no longer waits, or was interrupted while it ran `function`.
        """
        gone = RuntimeError("the caller is gone, and with it the thread to run the app in")
        if self.gone:
            raise gone
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
            if self.gone:
                loop.call_soon_threadsafe(settle, None, gone)
                return
            result: T | None = None
            error: Exception | None = None
            try:
                result = function()
            except StopIteration as stop:  # a future cannot carry it
                error = RuntimeError(f"the wrapped app raised {stop!r}")
            except Exception as raised:
                error = raised
            except BaseException as interrupt:  # an interrupt, which `run` raises in the caller's thread
                broken = RuntimeError(f"interrupted in the caller's thread by {interrupt!r}")
                self._interrupted = partial(loop.call_soon_threadsafe, settle, None, broken)
                raise
            loop.call_soon_threadsafe(settle, result, error)

        self._work.put(work)
        if self.gone:  # meanwhile
            raise gone
        return await future

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, run the functions that it passes to `call`, and return its result.

        An interrupt of this thread (Ctrl-C) cancels the coroutine, waits for its cleanup, and is raised
        again. A second one is raised at once; the rest of the cleanup then continues without this thread.
        """
        started: queue.SimpleQueue[asyncio.Task[T]] = queue.SimpleQueue()
        loop = self._loop.loop

        def start() -> None:
            task = loop.create_task(coroutine, context=self._context)
            task.add_done_callback(lambda _: self._work.put(lambda: None))  # wakes `_serve`
            started.put(task)

        loop.call_soon_threadsafe(start)
        task = started.get()
        try:
            self._serve(task)
        except BaseException:
            loop.call_soon_threadsafe(task.cancel)
            self._interrupted()  # after the cancellation: so this error reaches only shielded code
            try:
                self._serve(task)
            except BaseException:
                self._go()
                raise
            raise
        return task.result()

    def _serve(self, task: asyncio.Task[Any]) -> None:
        """Run the queued functions until `task` is done.

        An interrupt may have consumed the queue item that wakes this, so `task` itself is checked.
        """
        while not task.done():
            self._work.get()()

    def _go(self) -> None:
        """Stop serving: all pending and later `call`s fail instead of waiting for this thread."""
        self.gone = True
        self._interrupted()
        while not self._work.empty():
            self._work.get()()

    def _leave(self, *, wait: bool = True) -> None:
        if self._loop is not _shared:
            self._loop.stop(wait=wait)

    def _is_foreign(self) -> bool:
        """Return whether this runs in the thread of another loop, where a stream was garbage-collected."""
        return is_here() and threading.current_thread() is not self._thread

    def _abandon(self, items: AsyncGenerator[Any, None]) -> None:
        """Close `items` without waiting for it; its calls to this caller fail."""
        self.gone = True

        def begin() -> None:
            _keep(loop.create_task(_close_abandoned(items), context=self._context), then=leave)

        def leave() -> None:
            _open.discard(items)
            self._leave(wait=False)

        loop = self._loop.loop
        loop.call_soon_threadsafe(begin)


def is_here() -> bool:
    """Return whether the current thread is one of the bridge's loop threads, not a caller's thread."""
    return isinstance(threading.current_thread(), _LoopThread)


def run(core: Callable[[Caller], Coroutine[Any, Any, T]]) -> T:
    """Run `core(caller)` on the bridge's loop, in a copy of the caller's context, and return its result."""
    caller = Caller()
    try:
        return caller._wait(core(caller))
    finally:
        caller._leave()


def stream(core: Callable[[Caller], AsyncGenerator[T, None]]) -> Iterator[T]:
    """Yield what `core(caller)` yields, running it as `run` does.

    Between two items the caller's thread runs other code: a `Caller.call` then waits until the next item is
    requested. Closing the stream closes the core and waits for its cleanup. A stream that is not closed may
    be garbage-collected in the thread of a loop, which cannot wait for itself: then the core is closed later.
    """
    caller = Caller()
    items = core(caller)
    _open.add(items)
    try:
        while (item := caller._wait(_next(items))) is not _END:
            yield cast("T", item)
    finally:
        if sys.is_finalizing():
            pass  # the loop's thread has ended, so waiting would hang
        elif caller._is_foreign():
            caller._abandon(items)
        else:
            try:
                caller._wait(_close(items))
            finally:
                _open.discard(items)
                caller._leave()


_open: set[AsyncGenerator[Any, None]] = set()
"""The cores of open streams, referenced here because garbage collection of a core, together with its reader,
would close all its async generators at once and out of order."""

_END = object()


async def _next(items: AsyncGenerator[T, None]) -> T | object:
    return await anext(items, _END)


async def _close(items: AsyncGenerator[Any, None]) -> None:
    await items.aclose()


async def _close_abandoned(items: AsyncGenerator[Any, None]) -> None:
    with suppress(Exception):  # nobody could receive the error: the reader is gone
        await items.aclose()


def start(core: Callable[[], Coroutine[Any, Any, None]], *, after: float = 0) -> None:
    """Schedule `core()` on the bridge's loop in `after` seconds, in a copy of the caller's context.

    The caller does not wait. With a short delay the loop's work does not compete with the returning caller
    for the GIL.
    """

    def begin() -> None:
        _keep(loop.create_task(core(), context=context))

    context, loop = copy_context(), _shared_loop().loop
    loop.call_soon_threadsafe(loop.call_later, after, begin)


def _keep(task: asyncio.Task[None], then: Callable[[], None] = lambda: None) -> None:
    """Keep a reference to a task until it is done, as the loop has only a weak one; then call `then`."""

    def done(task: asyncio.Task[None]) -> None:
        _begun.discard(task)
        then()

    _begun.add(task)
    task.add_done_callback(done)


_begun: set[asyncio.Task[None]] = set()
