"""The memory that the conversations of an engine share, lent so that together they never fill it.

Where one of them finds it full, llama.cpp fails all that are in flight.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

__all__ = ["Loan", "Pool"]


class Pool:
    """Tokens to lend, in the order of asking; for any thread and event loop."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._free = tokens
        self._waiting: deque[Loan] = deque()
        # The garbage collector may end a loan amid another's call.
        self._guard = threading.RLock()

    def ask(self, tokens: int) -> Loan:
        """Return a loan of at most all tokens, which is done once they are there."""
        loan = Loan(self, tokens)
        with self._guard:
            self._waiting.append(loan)
            self._lend(0)
        return loan

    def after_fork(self) -> None:
        """Be of use to the loans that a forked process got from its parent."""
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
    """Tokens of a pool. Done once they are lent; given back by `end`, or when nobody holds it any more."""

    def __init__(self, pool: Pool, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self._pool = pool
        self._ended = False

    def end(self) -> None:
        """Give the tokens back, or ask for them no more. Ending twice is fine."""
        with self._pool._guard:
            if not self._ended:
                self._ended = True
                self._pool._lend(0 if self.cancel() else self.tokens)

    __del__ = end
