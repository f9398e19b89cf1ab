"""One request at a time for each thread of a graph's memory.

A graph has written its draft into its thread before anybody judged it. So a second request of that thread
waits until what leaves stands in the draft's place: it would be given the draft, and would be written over.
It holds for what this process guards; the requests of another process are not known here.
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
"""By thread the turns that are taken or waited for; the first one has it. Idle threads have no entry."""
_around: ContextVar[tuple[Turn, ...]] = ContextVar("cai_graph_turns", default=())
"""The turns inside which this is: an app that asks itself on its own thread is inside its own."""
_NOWHERE = nullcontext()


class Turn:
    """The turn of one request. Callers may be of any OS thread and any event loop.

    Args:
        of: which thread of which memory; None where there is none, and nothing to wait for.
    """

    def __init__(self, of: Hashable | None = None) -> None:
        self._of = of
        self.is_inside = False
        """Whether an app asks itself: a turn of the same thread stands around, or waits for one that does."""
        self._around: tuple[Turn, ...] = ()
        """The turns inside which this one is."""
        self._needs: frozenset[int] = frozenset()
        """The OS threads that this request needs in order to end."""
        self._loop: asyncio.AbstractEventLoop
        self._granted: Future[None]

    async def begin(self, caller: bridge.Caller | None) -> bool:
        """Take the turn; return whether that took waiting.

        Inside a turn of the same thread it is taken. So it is where the one who has it waits for one that
        stands around this, as where two apps ask each other.

        Args:
            caller: the OS thread that waits for the answer, where it is a synchronous one.

        Raises:
            RunError: it would wait for ever: who has the turn needs an OS thread that the caller blocks.
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
        """Give the turn to who waits next, or leave the queue; nothing where it was not taken."""
        with _lock:
            queue = _queues.get(self._of)
            if queue is not None and self in queue:
                queue.remove(self)
                _go_on(self._of)

    def inside(self) -> AbstractContextManager[None]:
        """Return what has its body, which runs the app, be inside this turn."""
        return _NOWHERE if self._of is None else self._inside()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        token = _around.set((*_around.get(), self))
        try:
            yield
        finally:
            _around.reset(token)

    def has_it(self) -> bool:
        """Return whether this is who has the turn."""
        with _lock:
            queue = _queues.get(self._of)
            return bool(queue) and queue[0] is self  # type: ignore[index]


def _needs_one(turn: Turn, of: tuple[Turn, ...]) -> bool:
    """Return whether a turn cannot end before one of these does, as far as turns go. The lock is held."""
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
    """Give the turn to the first in a thread's queue. The lock is held."""
    queue = _queues[of]
    while queue and queue[0]._loop.is_closed():  # its event loop ended, and left it behind
        queue.popleft()
    if not queue:
        del _queues[of]
        return
    granted = queue[0]._granted
    # One that was cancelled in this very moment gives it on when it leaves the queue.
    if not (granted.done() or granted.running()) and granted.set_running_or_notify_cancel():
        granted.set_result(None)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent may have held it
    _queues.clear()  # and these are its requests


os.register_at_fork(after_in_child=_after_fork)
