"""Shares an engine's context memory among its requests, so that they never need more than there is.

Where a request finds that memory full, llama.cpp fails all requests in flight. So each request waits here for
a Loan of as many tokens as it may need.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

__all__ = ["Loan", "Pool"]


class Pool:
    """A number of tokens that are lent in the order of the requests. Safe for threads and event loops."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._free = tokens
        self._waiting: deque[Loan] = deque()
        # Reentrant, since the garbage collector may end a loan within a call by the same thread.
        self._guard = threading.RLock()

    def ask(self, tokens: int) -> Loan:
        """Return a Loan of `tokens`, at most all of the pool; it is done once they are lent."""
        loan = Loan(self, tokens)
        with self._guard:
            self._waiting.append(loan)
            self._lend(0)
        return loan

    def after_fork(self) -> None:
        """Replace the lock in a forked process, whose loans, copied from the parent, still use this pool."""
        self._guard = threading.RLock()  # another thread of the parent may have held it

    def _lend(self, back: int) -> None:
        with self._guard:
            self._free += back
            while self._waiting and (self._waiting[0].cancelled() or self._waiting[0].tokens <= self._free):
                loan = self._waiting.popleft()
                self._free -= loan.tokens
                if loan.set_running_or_notify_cancel():
                    loan.set_result(None)
                else:
                    self._free += loan.tokens


class Loan(Future[None]):
    """Tokens of a pool. Done once they are lent; they are returned by `end`, or by the garbage collector."""

    def __init__(self, pool: Pool, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self._pool = pool
        self._ended = False

    def end(self) -> None:
        """Return the tokens to the pool, or cancel the request for them. May be called twice."""
        with self._pool._guard:
            if not self._ended:
                self._ended = True
                self._pool._lend(0 if self.cancel() else self.tokens)

    __del__ = end
