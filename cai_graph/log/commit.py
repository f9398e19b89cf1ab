"""`Commit`: the future of one append, which resolves once its record is committed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Any

from cai_graph.errors import CaiError
from cai_graph.log.alarm import say

__all__ = ["Commit", "resolve"]


class Commit(Future[None]):
    """Resolves once a record is committed, and fails if it cannot be. Event loops can await it, too.

    The Commits of a writer share one condition, and those of a transaction are resolved together: a condition
    for each would cost as much as the rest of an append, and waking an event loop for each would make the
    writer wait for the GIL each time. A Commit cannot be cancelled: an appended record is always written.
    """

    _state = "RUNNING"
    _result: None = None
    _exception: BaseException | None = None
    _awaited: tuple[asyncio.Future[None], ...] = ()

    def __init__(self, condition: threading.Condition) -> None:
        # Future.__init__ is not called, as it creates a condition; its other attributes are set above.
        self._condition = condition
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Future[None]], object]] = []

    def done(self) -> bool:
        """Return whether the record is committed or has failed."""
        return self._state == "FINISHED"

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait at most `timeout` seconds, and return the error of the append; None if it was committed.

        Raises:
            TimeoutError: the record is neither committed nor failed yet.
        """
        if not self.done():
            with self._condition:  # shared: other Commits notify it, too
                if not self._condition.wait_for(self.done, timeout):
                    raise TimeoutError
        return self._exception

    def result(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds until the record is committed.

        Raises:
            TimeoutError: the record is neither committed nor failed yet.
            CaiError: the record could not be committed; the message gives the reason.
        """
        if self.exception(timeout) is not None:
            super().result()

    def __await__(self) -> Generator[Any, None, None]:
        """Wait in the running event loop; raises as `result`."""
        waiter = asyncio.get_running_loop().create_future()
        with self._condition:
            if self.done():
                waiter.set_result(None)
            self._awaited += (waiter,)
        yield from waiter
        self.result()


def resolve(condition: threading.Condition, decided: Iterable[tuple[Commit, CaiError | None]]) -> None:
    """Resolve Commits that share `condition`: as committed, or with an error."""
    commits: list[Commit] = []
    with condition:
        for commit, error in decided:
            commit._exception = error
            commit._state = "FINISHED"
            for waiter in commit._waiters:  # added by concurrent.futures.wait and as_completed
                waiter.add_result(commit) if error is None else waiter.add_exception(commit)
            commits.append(commit)
        condition.notify_all()
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for commit in commits:
        for awaited in commit._awaited:
            loops.setdefault(awaited.get_loop(), []).append(awaited)
        for callback in commit._done_callbacks:
            try:
                callback(commit)
            except BaseException:
                say(logging.ERROR, "a callback of an append failed", trace=True)
    for loop, waiting in loops.items():
        with contextlib.suppress(RuntimeError):  # The loop is closed, so nothing awaits there.
            loop.call_soon_threadsafe(_wake, waiting)


def _wake(waiting: Iterable[asyncio.Future[None]]) -> None:
    for waiter in waiting:
        if not waiter.done():  # It is done if its task was cancelled.
            waiter.set_result(None)
