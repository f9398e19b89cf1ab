"""Locks each thread of a graph's memory, so that one request at a time uses it.

A graph writes its draft into its thread before the draft is judged. So a second request on that thread waits
until the draft is replaced by the released answer: otherwise it would read the draft, and its own changes
would be overwritten. The lock covers the requests of this process only.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from cai_graph.concurrency import bridge
from cai_graph.errors import RunError

__all__ = ["Turn"]

_lock = threading.Lock()
_queues: dict[Hashable, deque[Turn]] = {}
"""By thread of a memory, the queue of turns; the first one is granted. Idle threads have no entry."""
_around: ContextVar[tuple[Turn, ...]] = ContextVar("cai_graph_turns", default=())
"""The turns of the enclosing requests: an app that calls itself on its own thread is inside its own turn."""
_NOWHERE = nullcontext()


class Turn:
    """The turn of one request: a reentrant, fair lock on a thread of a memory.

    Callers may use any OS thread and any event loop.

    Args:
        of: identifies the thread and its memory; None if there is none, and so nothing to wait for.
    """

    def __init__(self, of: Hashable | None = None) -> None:
        self._of = of
        self.is_inside = False
        """Whether an app calls itself: the turn is held by an enclosing request, or by one waiting for it."""
        self._around: tuple[Turn, ...] = ()
        """The turns of the enclosing requests."""
        self._needs: frozenset[int] = frozenset()
        """The OS threads, by ident, that this request needs to finish."""
        self._loop: asyncio.AbstractEventLoop
        self._granted: Future[None]

    async def begin(self, caller: bridge.Caller | None) -> bool:
        """Acquire the turn; return whether that required waiting.

        It is granted at once inside a turn of the same memory thread, and also if the holder waits for a turn
        that encloses this one, as when two apps call each other.

        Args:
            caller: the OS thread that waits for the answer; None under an asynchronous call.

        Raises:
            RunError: it would deadlock: another request in the queue needs an OS thread that the caller
                blocks.
        """
        self._around = _around.get()
        self.is_inside = any(turn._of == self._of and turn.has_it() for turn in self._around)
        if self._of is None or self.is_inside or self.has_it():
            return False
        self._loop, self._granted = asyncio.get_running_loop(), Future()
        blocked = None if caller is None else await caller.call(threading.get_ident)
        self._needs = frozenset({threading.get_ident()} | ({blocked} if blocked is not None else set()))
        with _lock:
            if self._of in _queues and _needs_one(_queues[self._of][0], self._around):
                self.is_inside = True
                return False
            queue = _queues.setdefault(self._of, deque())
            if any(blocked in turn._needs and not turn._loop.is_closed() for turn in queue):
                raise RunError(
                    "another request of this thread is under way, and this synchronous call blocks what it "
                    "runs in, such as its event loop; use `await app.ainvoke(…)` there"
                )
            queue.append(self)
            _go_on(self._of)
            if self._granted.done():
                return False
        try:
            await asyncio.wrap_future(self._granted)
        except BaseException:
            self.end()
            raise
        return True

    def end(self) -> None:
        """Release the turn to the next in the queue, or leave the queue; no effect if not acquired."""
        with _lock:
            queue = _queues.get(self._of)
            if queue is not None and self in queue:
                queue.remove(self)
                _go_on(self._of)

    def inside(self) -> AbstractContextManager[None]:
        """Return a context manager that marks its body, which runs the app, as inside this turn."""
        return _NOWHERE if self._of is None else self._inside()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        token = _around.set((*_around.get(), self))
        try:
            yield
        finally:
            _around.reset(token)

    def has_it(self) -> bool:
        """Return whether this turn is granted."""
        with _lock:
            queue = _queues.get(self._of)
            return bool(queue) and queue[0] is self  # type: ignore[index]


def _needs_one(turn: Turn, of: tuple[Turn, ...]) -> bool:
    """Return whether a turn is, or directly or indirectly waits for, one of `of`. Needs the lock."""
    needed, seen = [turn], set[Turn]()
    while needed:
        turn = needed.pop()
        if turn in of:
            return True
        if turn not in seen:
            seen.add(turn)
            needed += [
                queue[0] for queue in _queues.values() for each in [*queue][1:] if turn in each._around
            ]
    return False


def _go_on(of: Hashable) -> None:
    """Grant the turn to the first in a thread's queue. The caller must hold the lock."""
    queue = _queues[of]
    while queue and queue[0]._loop.is_closed():  # its event loop was closed before it ended
        queue.popleft()
    if not queue:
        del _queues[of]
        return
    granted = queue[0]._granted
    # A turn that is being cancelled concurrently passes the turn on when it leaves the queue.
    if not (granted.done() or granted.running()) and granted.set_running_or_notify_cancel():
        granted.set_result(None)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent may have held it
    _queues.clear()  # these are requests of the parent


os.register_at_fork(after_in_child=_after_fork)
