"""The future of one append."""

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
    """Resolves once a record is committed, and fails where it is not. An event loop can await it, too.

    The Commits of a writer share a condition, and those of a transaction are resolved in one go: a condition
    for each costs as much as all else that an append does, and to wake an event loop for each of them has
    the writer wait for Python's lock as often. What was appended is written, so it cannot be cancelled.
    """

    _state = "RUNNING"
    _result: None = None
    _exception: BaseException | None = None
    _awaited: tuple[asyncio.Future[None], ...] = ()

    def __init__(self, condition: threading.Condition) -> None:
        # Instead of Future's own, which makes a condition; all else that it sets stands above.
        self._condition = condition
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Future[None]], object]] = []

    def done(self) -> bool:
        """Return whether the record is committed or has failed."""
        return self._state == "FINISHED"

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, at most `timeout` seconds, and return why the record is not committed; None: it is.

        Raises:
            TimeoutError: it is not decided yet.
        """
        if not self.done():
            with self._condition:  # which other Commits notify, too
                if not self._condition.wait_for(self.done, timeout):
                    raise TimeoutError
        return self._exception

    def result(self, timeout: float | None = None) -> None:
        """Wait, at most `timeout` seconds, until the record is committed.

        Raises:
            TimeoutError: it is not decided yet.
            CaiError: it is not committed; says why.
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
    """Resolve Commits that share `condition`: as committed, or with the error that says why not."""
    commits: list[Commit] = []
    with condition:
        for commit, error in decided:
            commit._exception = error
            commit._state = "FINISHED"
            for waiter in commit._waiters:  # of concurrent.futures.wait and as_completed
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
        with contextlib.suppress(RuntimeError):  # The loop is closed, so nobody waits there.
            loop.call_soon_threadsafe(_wake, waiting)


def _wake(waiting: Iterable[asyncio.Future[None]]) -> None:
    for waiter in waiting:
        if not waiter.done():  # One is when its task was cancelled.
            waiter.set_result(None)
