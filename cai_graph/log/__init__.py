"""The log: durable storage of every Trajectory and its reviews, feedback and comparisons, for training.

    log = open_log("sqlite:///cai.db")
    log.append(trajectory).result()     # returns once the record is committed
    for record in log.read(kind="trajectory", newest_first=True, limit=10): ...

An acknowledged record is committed: it survives a crash of the process and a power cut. Nothing is dropped
silently, records are never changed in place, and a redaction hook runs before the first write.
"""

from __future__ import annotations

import atexit
import importlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, Unpack, overload

from cai_graph.addresses import without_password
from cai_graph.errors import ConfigError, DataError, LogError, MissingExtra
from cai_graph.log.redaction import WITHHELD, Redactor, redact_texts
from cai_graph.log.stats import Stats
from cai_graph.log.store import Filters, FiltersOfKind, Kind
from cai_graph.trajectory import (
    SCHEMA_VERSION,
    Comparison,
    Feedback,
    Record,
    Review,
    Trajectory,
    decode,
    encode,
)

if TYPE_CHECKING:
    from cai_graph.log.commit import Commit
    from cai_graph.log.store import Store, StoredPayload
    from cai_graph.log.transfer import Import, export, import_
    from cai_graph.log.upkeep import Recovery, Removal, Verification, gc, recover, verify
    from cai_graph.log.writer import Writer

__all__ = [
    "CURRENT_END",
    "WITHHELD",
    "Commit",
    "Filters",
    "FiltersOfKind",
    "Import",
    "Kind",
    "Log",
    "Recovery",
    "Redactor",
    "Removal",
    "Stats",
    "Verification",
    "export",
    "gc",
    "import_",
    "is_open",
    "open_log",
    "open_store",
    "place_of",
    "recover",
    "redact_texts",
    "verify",
]

_LATER = {
    "Commit": "commit",
    "Import": "transfer",
    "export": "transfer",
    "import_": "transfer",
    "Recovery": "upkeep",
    "Removal": "upkeep",
    "Verification": "upkeep",
    "gc": "upkeep",
    "recover": "upkeep",
    "verify": "upkeep",
}
"""Public names whose modules are loaded on first use, so that importing the package stays cheap."""

_FORMS = (
    "'sqlite:///cai.db' (beside you), 'sqlite:////data/cai.db' (absolute), a path that ends in .db, "
    "or 'postgresql://USER@HOST/DATABASE'"
)
CURRENT_END = b'"schema":%d}' % SCHEMA_VERSION


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cai_graph.log.{_LATER[name]}"), name)


class Place(NamedTuple):
    """Where a log is."""

    key: str
    """Identical for all URLs that name the same place."""
    name: str
    """The name used in messages; contains no password."""
    path: Path | None
    """The absolute path of its file; None for PostgreSQL."""


class _Shared:
    """The store and the writer that every Log of one place in this process shares."""

    def __init__(self, place: Place, store: Store, writer: Writer | None) -> None:
        self.place = place
        self.store = store
        self.writer = writer
        self.users = 0


_lock = threading.Lock()
_open: dict[tuple[str, bool], _Shared] = {}
_live: set[_Shared] = set()
"""Entries of `_open`, and those that are closing and still have connections, which a fork must not copy."""


def open_log(url: str | os.PathLike[str], *, redact: Redactor | None = None, read_only: bool = False) -> Log:
    """Return the log at `url`, creating it if it does not exist (a file is readable by its owner only).

    Args:
        url: `sqlite:///cai.db` (relative), `sqlite:////data/cai.db` (absolute), a path that ends in
            .db, .sqlite or .sqlite3, or `postgresql://user@host:5432/database`, also written
            `postgresql+psycopg://…`, with any libpq parameters.
        redact: applied to each record appended through this Log, before anything is written. If it
            fails, the record is stored without its texts (`WITHHELD`). Either way calls are stored without
            their `prompt_digest`, from which a short text could be guessed.
        read_only: open for reading only; a missing log is an error, and `append` raises.

    Raises:
        ConfigError: the URL has none of these forms.
        LogError: the log cannot be opened or reached, is not a log of cai-graph, or was written by a newer
            release; or PostgreSQL runs with `fsync = off`.
        MissingExtra: the log is in PostgreSQL, and psycopg is not installed.
    """
    place = place_of(url)
    key = (place.key, read_only)
    with _lock:
        shared = _open.get(key)
        if shared is None:
            from cai_graph.log.writer import Writer

            store = open_store(url, read_only=read_only)
            shared = _open[key] = _Shared(place, store, None if read_only else Writer(store, place.name))
            _live.add(shared)
        shared.users += 1
    return Log(key, shared, redact)


def open_store(url: str | os.PathLike[str], *, read_only: bool = False) -> Store:
    """Return a new store at `url`, not shared with any Log. Raises as `open_log`."""
    place = place_of(url)
    if place.path is None:
        try:
            importlib.import_module("psycopg")
        except ImportError as error:
            raise MissingExtra("a log in PostgreSQL", "psycopg", "postgres") from error
        from cai_graph.log.postgres import PostgresStore

        return PostgresStore(place.key, place.name, read_only=read_only)
    from cai_graph.log.sqlite import SQLiteStore

    return SQLiteStore(place.path, read_only=read_only)


def place_of(url: str | os.PathLike[str]) -> Place:
    """Return the place that `url` names.

    Raises:
        ConfigError: the URL has none of the supported forms.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text.endswith((".db", ".sqlite", ".sqlite3")):
            raise ConfigError(f"log {text!r}: no log is named so; use {_FORMS}")
        return _file(text)
    shown = without_password(text)
    if scheme in ("postgresql", "postgresql+psycopg", "postgres"):
        if re.search(r"[@/?#\s]", rest.rpartition("@")[0]):
            # The driver would parse part of the password as the host, and quote it in its errors.
            raise ConfigError(
                f"log {shown!r}: a user or password holds an @, /, ?, # or space; "
                "write it %40, %2F, %3F, %23, %20"
            )
        return Place(f"postgresql://{rest}", shown, None)
    if scheme != "sqlite":
        raise ConfigError(f"log {shown!r}: unknown scheme {scheme!r}; use {_FORMS}")
    name = rest.removeprefix("/")
    if not rest.startswith("/") or not name:
        raise ConfigError(f"log {text!r}: a file is named after three slashes; use {_FORMS}")
    if name == ":memory:" or "?" in name or "\0" in name:
        raise ConfigError(f"log {text!r}: a log is a plain file, without options; use {_FORMS}")
    return _file(name)


def _file(name: str) -> Place:
    path = os.path.realpath(name)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"log {path!r}: the path is no UTF-8, and SQLite takes no other; rename it, or name another file"
        ) from None
    return Place(path, path, Path(path))


def is_open(path: Path) -> bool:
    """Return whether this process has the log open."""
    with _lock:
        return any(shared.place.path == path for shared in _live)


class Log:
    """A handle to one log, returned by `open_log`. Thread-safe, and usable after a fork.

    All Logs of one file in a process share one writer. Used as a context manager, the Log closes on exit.
    """

    def __init__(self, key: tuple[str, bool], shared: _Shared, redact: Redactor | None) -> None:
        self._key = key
        self._shared = shared
        self._redact = redact
        self._closed = False

    @property
    def name(self) -> str:
        """The log's name in messages: the path of its file, or its URL without a password."""
        return self._shared.place.name

    @property
    def lost(self) -> int:
        """Number of records that this process failed to write so far; the future of each has the error."""
        return 0 if self._shared.writer is None else self._shared.writer.lost

    @property
    def is_full(self) -> bool:
        """Whether more than 32 MB are pending, so that `append` may block; an event loop should wait."""
        return self._shared.writer is not None and self._shared.writer.is_full

    def append(self, record: Record) -> Commit:
        """Queue a record, and return a future that resolves once it is committed; an event loop can await it.

        Callable from any thread or event loop. Blocks while more than 64 MB are pending. The
        future fails with DataError if this record cannot be stored (a value that is not JSON; a
        different record under its id), and with LogError if the log cannot be written (no space, a
        failing disk); the log resumes by itself as soon as writing works. The future cannot be cancelled,
        and is valid only in the process that appended.

        Raises:
            LogError: the log is closed or read-only.
        """
        return self._writer().append(record, self._redact)

    def append_encoded(self, record: Record, payload: bytes | None) -> Commit:
        """Queue a record like `append`, and store `payload`, its encoding, unchanged.

        Args:
            record: the record.
            payload: its encoding, from `encode` or an export; None: as `append`. Rejected if this Log has a
                redaction hook, since the bytes would bypass it.

        Raises:
            LogError: as `append`.
            ConfigError: a payload is given and this Log redacts.
        """
        if payload is not None and self._redact is not None:
            raise ConfigError(f"{self.name}: a log with a redaction hook takes records, not encoded ones")
        return self._writer().append(record, self._redact, payload)

    @overload
    def read(
        self, *, kind: Literal["trajectory"], **filters: Unpack[FiltersOfKind]
    ) -> Iterator[Trajectory]: ...
    @overload
    def read(
        self, *, kind: Literal["comparison"], **filters: Unpack[FiltersOfKind]
    ) -> Iterator[Comparison]: ...
    @overload
    def read(self, *, kind: Literal["review"], **filters: Unpack[FiltersOfKind]) -> Iterator[Review]: ...
    @overload
    def read(self, *, kind: Literal["feedback"], **filters: Unpack[FiltersOfKind]) -> Iterator[Feedback]: ...
    @overload
    def read(self, **filters: Unpack[Filters]) -> Iterator[Record]: ...
    def read(self, **filters: Unpack[Filters]) -> Iterator[Any]:
        """Yield the records that match the filters, in constant memory.

        Records that are appended after iteration starts are not included.

        Args:
            filters: see `Filters`; a record must match all that are given.

        Raises:
            ConfigError: a filter, kind or outcome is unknown, or a time is not a datetime.
            DataError: a record was written by a newer release; or the record named by `after` does not exist.
            LogError: the log cannot be read, was closed during iteration, or a record is damaged.
        """
        for stored in self._select(filters):
            yield self._record(stored)

    def lines(self, **filters: Unpack[Filters]) -> Iterator[bytes]:
        """Yield the same records as `read`, each as one line of JSON, including the newline."""
        for stored in self._select(filters):
            payload = stored.payload
            # Records of an earlier schema version are converted, so that readers need only the current one.
            yield (payload if payload.endswith(CURRENT_END) else encode(self._record(stored))) + b"\n"

    def payloads(self, **filters: Unpack[Filters]) -> Iterator[bytes]:
        """Yield the stored bytes of the same records as `read`; earlier schema versions are not converted."""
        for stored in self._select(filters):
            yield stored.payload

    def cuts(self, count: int) -> list[int]:
        """Return the positions that split the current log into `count` parts of about the same size.

        `[a, b, c]` stands for the parts (a, b) and (b, c), each a value for the filter `positions`.
        """
        return self._store().cuts(count)

    def has_appended(self) -> bool:
        """Return whether the log contains a comparison, a review or feedback; an indexed lookup."""
        return self._store().has_appended()

    def get(self, id: str) -> Record:
        """Return one record.

        Raises:
            DataError: no record has this id; if it was removed, the message gives the date and the reason.
            LogError: the log cannot be read, or the record is damaged.
        """
        return self._record(self._store().get(id))

    def known(self, ids: Sequence[str], *, removed: bool = True) -> set[str]:
        """Return the subset of the ids that are in the log or, with `removed`, were removed by `gc`."""
        return self._store().known(ids, removed=removed)

    def stats(self) -> Stats:
        """Return counts over the log's contents; reads every record once."""
        return self._store().stats()

    def flush(self) -> None:
        """Wait until every record appended so far, by any Log of this file, is committed or has failed.

        Called from a redaction hook or a callback of an append, it returns at once: these run on the
        writer's thread, which would wait for itself.
        """
        if self._shared.writer is not None:
            self._shared.writer.flush()

    def close(self) -> None:
        """Write pending records and release the file. Closing twice is harmless.

        Called from a redaction hook or a callback of an append, it does neither: pending records are still
        written, and the file is released when the program ends, or when another Log of it closes.
        """
        with _lock:
            if self._closed:
                return
            self._closed = True
            self._shared.users -= 1
            writer = self._shared.writer
            last = self._shared.users == 0 and not (writer is not None and writer.is_here)
            if last:
                _open.pop(self._key, None)
        if last:
            _close(self._shared)
        else:
            self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _select(self, filters: Filters) -> Iterator[StoredPayload]:
        for stored in self._store().select(filters):
            yield stored
            self._store()  # raises if the log was closed meanwhile; reading on would reopen it

    def _record(self, stored: StoredPayload) -> Record:
        try:
            return decode(stored.payload)
        except DataError as error:
            raise DataError(f"{self.name}: record {stored.id!r}: {error}") from error

    def _store(self) -> Store:
        if self._closed:
            raise LogError(f"{self.name}: the log is closed; open it again")
        return self._shared.store

    def _writer(self) -> Writer:
        if self._closed:
            raise LogError(f"{self.name}: the log is closed; open it again before you append")
        if self._shared.writer is None:
            raise LogError(f"{self.name}: the log was opened to be read only; open it for writing")
        return self._shared.writer


def _close(shared: _Shared) -> None:
    if shared.writer is not None:
        shared.writer.close()
    shared.store.close()
    with _lock:
        _live.discard(shared)


@atexit.register
def _drain() -> None:
    """Write pending records when the program ends without closing its Logs, and release the files.

    The Logs stay open: an exit handler that was registered earlier runs later than this one, and may append.
    """
    with _lock:
        remaining = list(_open.values())
    for shared in remaining:
        if shared.writer is not None:
            shared.writer.drain()
        shared.store.close()


def _before_fork() -> None:
    _lock.acquire()
    for shared in _live:
        shared.store.before_fork()


def _after_fork(*, child: bool) -> None:
    for shared in _live:
        shared.store.after_fork(child=child)
        if child and shared.writer is not None:
            shared.writer.after_fork_in_child()
    _lock.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork(child=False),
    after_in_child=lambda: _after_fork(child=True),
)
