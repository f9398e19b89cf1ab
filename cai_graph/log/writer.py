"""Group commit: one thread that turns whatever has been appended into one transaction.

While a transaction is being written, the next appends gather; so a batch is as large as the disk is slow,
and nobody waits for a timer. Redaction and the database work happen on this thread. A record is encoded by
its caller, a few microseconds: what is stored is the record as it was then, whatever becomes of the dicts in
it; the bytes that wait are counted exactly; and one thread less encodes while others wait for its commit.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from cai_graph.errors import CaiError, DataError, LogError
from cai_graph.log.commit import Commit, resolve
from cai_graph.log.redaction import Redactor, apply, withhold
from cai_graph.log.store import MAX_ROWS, Row, Store, row_of
from cai_graph.trajectory import Record, encode

__all__ = ["Writer"]

MAX_PENDING_BYTES = 64 << 20
"""Appends wait while more than this is not committed yet."""
MAX_BATCH_BYTES = 16 << 20
"""Bytes in one transaction; other processes wait for the file that long."""

_ROW_BYTES = 512
"""What a record takes beside its payload."""

_logger = logging.getLogger("cai_graph.log")


_Pending = tuple[Row, Commit, Callable[[], Row] | None]
"""A row and the Commit of its append. Where a redactor is still to be applied, the row stands for its size
only, and the function makes the one that is stored."""


class Writer:
    """The queue and the thread in front of one store. Thread-safe; survives a fork.

    Args:
        store: where the rows go.
        name: how messages call the log, such as its path.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self.lost = 0
        """Records that this process could not write; their futures failed."""
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # concurrent.futures.wait takes that of each Commit at once
        self._arrived = threading.Condition(self._lock)
        self._progressed = threading.Condition(self._lock)
        self._queue: deque[_Pending] = deque()
        self._pending_bytes = 0
        self._appended = 0
        self._finished = 0
        self._idle = False
        self._closing = False
        self._failing = False
        self._thread: threading.Thread | None = None

    def append(
        self, record: Record, redactor: Redactor | None = None, payload: bytes | None = None
    ) -> Commit:
        """Queue a record, and return a future that resolves once it is committed.

        Waits while too much is pending. The future cannot be cancelled: what was appended is written.

        Args:
            record: the record.
            redactor: applied on the writer's thread before anything is written.
            payload: the record's encoding where it is known.

        Raises:
            LogError: the writer is closed.
        """
        commit = Commit(self._progressed)
        try:
            row = row_of(record, encode(record) if payload is None else payload)
        except Exception as error:
            self._resolve([commit], [_unstorable(record, error)])
            return commit
        redaction = None if redactor is None else partial(_redacted, record, redactor)
        size = len(row.payload) + _ROW_BYTES
        with self._lock:
            if (
                self._pending_bytes + size > MAX_PENDING_BYTES
                # A callback of a future runs on the writer's own thread, which must not wait for itself.
                and threading.current_thread() is not self._thread
            ):
                while self._pending_bytes and self._pending_bytes + size > MAX_PENDING_BYTES:
                    self._progressed.wait()
            if self._closing:
                raise LogError(f"{self._name}: the log is closed; open it again before you append")
            self._queue.append((row, commit, redaction))
            self._pending_bytes += size
            self._appended += 1
            if self._idle:
                self._idle = False
                self._arrived.notify()
            elif self._thread is None:
                self._start()
        return commit

    @property
    def is_full(self) -> bool:
        """Whether an append may have to wait; true from half of MAX_PENDING_BYTES, since records differ."""
        return self._pending_bytes > MAX_PENDING_BYTES // 2

    def flush(self) -> None:
        """Wait until everything appended before is committed or has failed."""
        with self._lock:
            target = self._appended
            while self._finished < target:
                self._progressed.wait()

    def close(self) -> None:
        """Write what is pending and end the thread. Closing twice is harmless."""
        with self._lock:
            self._closing = True
            self._arrived.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def before_fork(self) -> None:
        """Hold the queue still until `after_fork`."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on in the parent; in the child, begin with an empty queue and without a thread.

        What was pending belongs to the parent, which writes it.
        """
        if child:
            closing = self._closing
            self._reset()
            self._closing = closing
            self.lost = 0
        else:
            self._lock.release()

    # --- the thread -----------------------------------------------------------------------------------

    def _start(self) -> None:
        # A daemon, so that a program that forgets to close still ends; `drain` at exit writes the rest.
        self._thread = threading.Thread(target=self._run, name=f"cai log {self._name}", daemon=True)
        self._thread.start()
        if "multiprocessing.util" in sys.modules:
            # A child of multiprocessing leaves by os._exit and runs its own finalizers, not atexit's.
            from multiprocessing.util import Finalize

            Finalize(self, self.flush, exitpriority=10)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue:
                    if self._closing:
                        self._thread = None
                        return
                    self._idle = True
                    self._arrived.wait()
                    self._idle = False
                batch, size = self._take()
            try:
                self._write(batch)
            finally:
                with self._lock:
                    self._pending_bytes -= size
                    self._finished += len(batch)
                    self._progressed.notify_all()

    def _take(self) -> tuple[list[_Pending], int]:
        batch: list[_Pending] = []
        size = 0
        while self._queue and len(batch) < MAX_ROWS:
            more = len(self._queue[0][0].payload) + _ROW_BYTES
            if batch and size + more > MAX_BATCH_BYTES:
                break
            size += more
            batch.append(self._queue.popleft())
        return batch, size

    def _write(self, batch: list[_Pending]) -> None:
        rows = [row if redaction is None else redaction() for row, _, redaction in batch]
        commits = [commit for _, commit, _ in batch]
        try:
            errors = self._store.insert(rows)
        except Exception as error:
            if not self._failing:
                self._failing = True
                _logger.error("%s", error)
            self._resolve(commits, [self._unwritten(error) for _ in commits])
            return
        if self._failing:
            self._failing = False
            _logger.warning("%s: writing works again; %d records were lost", self._name, self.lost)
        self._resolve(commits, errors)

    def _resolve(self, commits: list[Commit], errors: Sequence[CaiError | None]) -> None:
        with self._lock:
            self.lost += len(errors) - errors.count(None)
        resolve(self._progressed, zip(commits, errors, strict=True))

    def _unwritten(self, error: Exception) -> LogError:
        failure = LogError(str(error) if isinstance(error, CaiError) else f"{self._name}: {error!r}")
        failure.__cause__ = error
        return failure


def _redacted(record: Record, redactor: Redactor) -> Row:
    redacted = apply(redactor, record)
    try:
        return row_of(redacted, encode(redacted))
    except Exception:  # The hook made something that cannot be stored; never the raw record instead.
        bare = withhold(record)
        return row_of(bare, encode(bare))


def _unstorable(record: Record, error: Exception) -> CaiError:
    if isinstance(error, CaiError):
        return error
    # A field of a wrong type, which nothing checked before.
    failure = DataError(f"record {record.id!r} cannot be stored: {error!r}; check the types of its fields")
    failure.__cause__ = error
    return failure
