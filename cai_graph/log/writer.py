"""Group commit: one thread per log that writes all records appended so far in one transaction.

While a transaction is being written, further appends collect in a queue and form the next one. So batches
grow with the disk's latency, and no append waits for a timer. Redaction and the database work run on this
thread. A record is encoded in the caller's thread, which takes a few microseconds: so later changes to the
dicts in it have no effect, the number of pending bytes is known, and the writer's thread has less to do.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from cai_graph.errors import CaiError, DataError, LogError
from cai_graph.log.alarm import say
from cai_graph.log.commit import Commit, resolve
from cai_graph.log.redaction import Redactor, apply, withhold
from cai_graph.log.store import MAX_ROWS, Row, Store, row_of
from cai_graph.trajectory import Record, decode, encode

__all__ = ["Writer", "redacted_row"]

MAX_PENDING_BYTES = 64 << 20
"""Appends block while more than this is pending, that is, not yet committed."""
MAX_BATCH_BYTES = 16 << 20
"""Most bytes in one transaction, which blocks the writers of other processes for its duration."""

_ROW_BYTES = 512
"""Estimated memory of a pending record beside its payload."""

_Pending = tuple[Row, Commit, Callable[[], Row] | None]
"""A row, the Commit of its append, and, if a redactor is still to be applied, a function that returns the row
to store; then the first row serves only to know the size."""


class Writer:
    """The queue and the thread in front of one store. Thread-safe; survives a fork.

    Appends do not lock each other out: an append puts its row into a deque, and if another thread is already
    doing the rest of the work, leaves it to that thread. A thread that waits for a lock acquires it before it
    has reacquired the GIL, and blocks all others until then; so with a lock and many producers each append
    would cost two thread switches, more than all its other work.

    Args:
        store: the store to write to.
        name: the log's name in messages, such as its path.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._closing = False
        self._leaving = False
        """Whether the program is ending or the writer closing, so that each append flushes by itself."""
        self._failing = False
        self._reset()

    def _reset(self) -> None:
        self.lost = 0
        """Number of records that this process failed to write; their futures failed."""
        self._queue: deque[_Pending | threading.Event] = deque()
        """Pending rows; an Event is set once all rows before it are committed or have failed."""
        self._uncounted: deque[int] = deque()
        self._counting = threading.Lock()
        self._appended_bytes = 0
        self._finished_bytes = 0
        self._decided = threading.Condition()  # shared by all Commits
        self._finished = threading.Condition()
        self._arrived = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def append(
        self, record: Record, redactor: Redactor | None = None, payload: bytes | None = None
    ) -> Commit:
        """Queue a record, and return a future that resolves once it is committed.

        Blocks while too much is pending. The future cannot be cancelled: the record is always written.

        Args:
            record: the record.
            redactor: applied on the writer's thread before anything is written.
            payload: the record's encoding, if known.

        Raises:
            LogError: the writer is closed.
        """
        commit = Commit(self._decided)
        try:
            row = row_of(record, encode(record) if payload is None else payload)
        except Exception as error:
            self._resolve([commit], [_unstorable(record, error)])
            return commit
        redaction = None if redactor is None else partial(redacted_row, row.payload, redactor)
        size = _size(row)
        if self.pending_bytes + size > MAX_PENDING_BYTES:
            self._wait_for_room(size)
        if self._closing:
            raise LogError(f"{self._name}: the log is closed; open it again before you append")
        self._queue.append((row, commit, redaction))
        self._uncounted.append(size)
        self._count()
        self._wake()
        if self._leaving and not self.is_here:
            self.flush()
            self._store.close()
        return commit

    @property
    def pending_bytes(self) -> int:
        """Bytes in memory of the records that are neither committed nor failed yet."""
        return self._appended_bytes - self._finished_bytes

    @property
    def is_full(self) -> bool:
        """Whether an append may block; true above half of MAX_PENDING_BYTES, since records vary in size."""
        return self.pending_bytes > MAX_PENDING_BYTES // 2

    @property
    def is_here(self) -> bool:
        """Whether this is the writer's own thread, on which callbacks and hooks run."""
        return threading.current_thread() is self._thread

    def flush(self) -> None:
        """Wait until every record appended before this call is committed or has failed.

        The writer's own thread returns at once: it would wait for itself.
        """
        if self.is_here or (self._thread is None and not self._queue):
            return
        reached = threading.Event()
        self._queue.append(reached)
        self._wake()
        reached.wait()

    def drain(self) -> None:
        """Write pending records as the program ends; later appends return only when committed or failed."""
        self._leaving = True
        self.flush()

    def close(self) -> None:
        """Write pending records and end the thread. Closing twice is harmless."""
        self._leaving = self._closing = True  # in this order, so that no append is left unwritten
        self._arrived.set()
        with self._starting:  # an append may be about to start it
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def after_fork_in_child(self) -> None:
        """Start with an empty queue and without a thread: pending records belong to the parent."""
        self._reset()

    def _wait_for_room(self, size: int) -> None:
        if self.is_here:
            return  # Called from a future's callback: the thread must not wait for itself.
        with self._finished:
            self._finished.wait_for(
                lambda: self.pending_bytes <= 0 or self.pending_bytes + size <= MAX_PENDING_BYTES
            )

    def _count(self) -> None:
        """Add up the appended bytes, unless another thread is doing so: it checks again before it ends."""
        while self._uncounted and self._counting.acquire(blocking=False):
            try:
                while self._uncounted:
                    self._appended_bytes += self._uncounted.popleft()
            finally:
                self._counting.release()

    def _wake(self) -> None:
        """Make the writer's thread check the queue; it checks again after it changes the flags read here."""
        if not self._arrived.is_set():
            self._arrived.set()
        if self._thread is None:
            self._start()

    # --- the thread -----------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None:
                return
            end = self._flush_at_exit()
            # A daemon, so that a program that never closes the log still ends; `drain` writes the rest.
            thread = threading.Thread(target=self._run, args=[end], name=f"cai log {self._name}", daemon=True)
            self._thread = thread
            try:
                thread.start()
            except BaseException:
                self._thread = None
                end()
                raise

    def _flush_at_exit(self) -> Callable[[], None]:
        """Make a multiprocessing child flush when it ends; return a function that undoes that."""
        if "multiprocessing.util" not in sys.modules:
            return lambda: None
        # Such a child ends by os._exit, which runs multiprocessing's finalizers but not atexit's.
        from multiprocessing.util import Finalize

        return Finalize(None, self.flush, exitpriority=10).cancel

    def _run(self, end: Callable[[], None]) -> None:
        while self._await_arrival():
            batch, size, reached = self._take()
            if batch:
                self._write(batch, size)
            for event in reached:
                event.set()
        end()

    def _await_arrival(self) -> bool:
        """Wait until something is queued; return False if the log is closed and the queue is empty."""
        while not self._queue:
            self._arrived.clear()
            if self._queue:
                break
            if not self._closing:
                self._arrived.wait()
                continue
            with self._starting:
                self._thread = None  # so that an append from here on starts another
                if not self._queue:
                    return False
                self._thread = threading.current_thread()
        return True

    def _take(self) -> tuple[list[_Pending], int, list[threading.Event]]:
        """Dequeue the rows of one transaction; return them, their bytes, and the flush events among them."""
        batch: list[_Pending] = []
        size = 0
        reached: list[threading.Event] = []
        while self._queue and len(batch) < MAX_ROWS:
            item = self._queue[0]
            if isinstance(item, threading.Event):
                reached.append(item)
            else:
                more = _size(item[0])
                if batch and size + more > MAX_BATCH_BYTES:
                    break
                size += more
                batch.append(item)
            self._queue.popleft()
        return batch, size, reached

    def _write(self, batch: list[_Pending], size: int) -> None:
        commits = [commit for _, commit, _ in batch]
        errors: Sequence[CaiError | None]
        try:
            errors = self._store.insert([row if redact is None else redact() for row, _, redact in batch])
        except Exception as error:
            if not self._failing:
                self._failing = True
                say(logging.ERROR, "%s", error)
            errors = [self._unwritten(error) for _ in commits]
        else:
            if self._failing:
                self._failing = False
                say(logging.WARNING, "%s: writing works again; %d records were lost", self._name, self.lost)
        self._resolve(commits, errors)
        with self._finished:
            self._finished_bytes += size
            self._finished.notify_all()

    def _resolve(self, commits: list[Commit], errors: Sequence[CaiError | None]) -> None:
        with self._decided:
            self.lost += len(errors) - errors.count(None)
        resolve(self._decided, zip(commits, errors, strict=True))

    def _unwritten(self, error: Exception) -> LogError:
        failure = LogError(str(error) if isinstance(error, CaiError) else f"{self._name}: {error!r}")
        failure.__cause__ = error
        return failure


def _size(row: Row) -> int:
    return len(row.payload) + _ROW_BYTES


def redacted_row(payload: bytes, redactor: Redactor) -> Row:
    """Return the row of an encoded record after redaction; if the hook fails, of the record without texts."""
    record = decode(payload)
    redacted = apply(redactor, record)
    try:
        return row_of(redacted, encode(redacted))
    except Exception:  # The hook returned a record that cannot be stored; never store the raw one.
        bare = withhold(record)
        return row_of(bare, encode(bare))


def _unstorable(record: Record, error: Exception) -> CaiError:
    if isinstance(error, CaiError):
        return error
    # A field has a wrong type, which was not validated before.
    failure = DataError(f"record {record.id!r} cannot be stored: {error!r}; check the types of its fields")
    failure.__cause__ = error
    return failure
