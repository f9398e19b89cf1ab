"""Stores a log in one SQLite file; `cai_graph.log.store` describes the tables.

It uses a WAL with `synchronous=FULL`: a committed transaction survives a crash and a power cut. The file's
`application_id` marks it as a log, and its `user_version` is its schema version.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import apsw

from cai_graph.errors import CaiError, LogError
from cai_graph.log.sqlite_schema import APPLICATION_ID, MIGRATIONS, SCHEMA
from cai_graph.log.store import MAX_ROWS, PAGE_BYTES, TAGGED, Database, Row, Store
from cai_graph.log.wal import copies_of, is_at_rest, keep_unread, make, set_aside, unread_of, wal_of

__all__ = ["PAGE_SIZE", "SQLITE_NEEDED", "SQLiteStore", "connect"]

SQLITE_NEEDED = (3, 53)
"""First SQLite release with `SQLITE_CHECKPOINT_NOOP`, which reports how many frames of a WAL it reads."""

PAGE_SIZE = 32768
"""Bytes. Records of a few kilobytes share a page and waste little of it. At half this size a record of 9 KB
takes a page of its own, and a transaction of many takes 1.5 times as long."""
BUSY_S = 60.0
"""How long an operation waits for other processes before it gives up."""
_BUSY_SLICE_MS = 500
_ERASE_S = 5.0
"""How long `erase` waits for readers; meanwhile it blocks writers for short times."""
_LOOKED_S = 0.02
"""For how long a check that the open file is still the one at the path is not repeated."""
_SMALLEST_DATABASE = 512
"""Bytes. SQLite treats a smaller file as empty, and would overwrite it."""
_FULL_SYNC = "PRAGMA fullfsync = ON"
"""Without it, a sync on macOS leaves the data in the disk's cache. Readers set it, too: the connection that
closes last syncs."""
_EMPTY = "{}: the file is empty and holds no log yet"
_NO_DATABASE = (
    "{}: is no SQLite database, so no log of cai-graph; name another file, or, if it was a log, "
    "`cai log recover` saves what is intact"
)

T = TypeVar("T")


# --- statements ---------------------------------------------------------------------------------------

_INSERT = """
    INSERT INTO records (id, kind, at, trajectory_id, outcome, constitution, source, tags, withheld, payload,
                         writer, sequence, digest, chain)
    VALUES """
_VALUES = "(?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
_KEPT_ROWS = 8
"""Insert statements for up to this many rows stay prepared, and so does the one for a full transaction;
others do not, as a prepared statement takes a kilobyte a row."""


def _insert_all(db: apsw.Connection, bindings: Sequence[tuple[Any, ...]]) -> None:
    """Insert all rows in one statement, which is a transaction of its own if none is open.

    Every statement releases and reacquires the GIL, and under many producers each time may cost milliseconds.
    During one statement, rows are written while producers run.
    """
    if bindings:
        sql = _INSERT + ",".join([_VALUES] * len(bindings))
        kept = len(bindings) <= _KEPT_ROWS or len(bindings) == MAX_ROWS
        db.execute(sql, tuple(chain.from_iterable(bindings)), can_cache=kept)


# --- connections --------------------------------------------------------------------------------------


def connect(path: Path, *, read_only: bool = False) -> apsw.Connection:
    """Return a connection to a log. A missing or empty file is initialized, an older log is migrated.

    Raises:
        LogError: the file cannot be opened, is not a log, or was written by a newer release, or SQLite is
            too old; the file is unchanged.
    """
    version = apsw.sqlite_lib_version()
    if tuple(map(int, version.split("."))) < SQLITE_NEEDED:
        needed = ".".join(map(str, SQLITE_NEEDED))
        raise LogError(
            f"{path}: apsw has SQLite {version} here, and a log needs {needed} or newer; "
            f'pip install --upgrade "apsw>={needed}"'
        )
    _make_file(path, read_only)

    def attempt() -> apsw.Connection:
        db = _opened(path, read_only)
        try:
            db.set_busy_timeout(_BUSY_SLICE_MS)
            # Until the file is known to be a log, closing must not write to it.
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            db.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
            version = _version(db, path)
            unread = unread_of(path, db)
            if unread is not None:
                keep_unread(path, db, unread, read_only=read_only)
            db.execute(_FULL_SYNC)
            if read_only:
                if version == 0:
                    raise LogError(_EMPTY.format(path))
                # Not SQLITE_OPEN_READONLY: such a connection cannot clean up the WAL when it closes.
                db.execute("PRAGMA query_only = ON")
            else:
                if version == 0:
                    db.execute(f"PRAGMA page_size = {PAGE_SIZE}")  # It has an effect on empty files only.
                db.execute("PRAGMA journal_mode = WAL")  # A copy made by VACUUM INTO is in another mode.
                _migrate(db, path, version)
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA secure_delete = ON")  # What `gc` removes is overwritten.
                db.execute("PRAGMA wal_autocheckpoint = 1000")
                db.execute("PRAGMA journal_size_limit = 67108864")
            if unread is None or not read_only:
                db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        except BaseException:
            db.close()
            raise
        return db

    return _patiently(attempt, path)


def _opened(path: Path, read_only: bool) -> apsw.Connection:
    if read_only and is_at_rest(path):
        # SQLite would have to create -wal and -shm files beside the log, and cannot.
        uri = f"{path.absolute().as_uri()}?immutable=1"
        return apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    return apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)


def _make_file(path: Path, read_only: bool) -> None:
    size = None
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise LogError(
            f"{path}: cannot be opened: {error.strerror}; check its name, and the permissions of its folder"
        ) from error
    else:
        if stat.S_ISDIR(status.st_mode):
            raise LogError(f"{path}: is a directory; name a file in it, such as {path / 'cai.db'}")
        size = status.st_size
        if 0 < size < _SMALLEST_DATABASE:
            raise LogError(_NO_DATABASE.format(path))
        if size:
            return
    if read_only:
        raise LogError(
            f"{path}: there is no log; `cai run` or `cai ask` makes one, or name another with --log"
            if size is None
            else _EMPTY.format(path)
        )
    if not path.parent.is_dir():
        raise LogError(f"{path}: the folder {path.parent} does not exist; make it, or name another file")
    try:
        make(path)
    except OSError as error:
        raise LogError(f"{path}: cannot be made: {error.strerror}") from error


def _version(db: apsw.Connection, path: Path) -> int:
    """Return the schema version, 0 for an empty file."""
    with _snapshot(db):  # otherwise another process may create the log between two of these reads
        application = int(_one(db, "PRAGMA application_id"))
        version = int(_one(db, "PRAGMA user_version"))
        tables = int(_one(db, "SELECT count(*) FROM sqlite_schema"))
    if application == APPLICATION_ID:
        if version > SCHEMA:
            raise LogError(
                f"{path}: schema version {version}, this release reads 1 to {SCHEMA}; upgrade cai-graph. "
                "The file is unchanged"
            )
        return version
    if application == 0 and version == 0 and not tables:
        return 0
    raise LogError(f"{path}: is an SQLite database, but no log of cai-graph; name another file")


@contextlib.contextmanager
def _snapshot(db: apsw.Connection) -> Iterator[None]:
    """Make the body's reads see one state of the file, in the open transaction or in one of its own."""
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN")
    try:
        yield
    finally:
        if db.in_transaction:  # on some errors SQLite ends it; a ROLLBACK would then fail and hide the error
            db.execute("ROLLBACK")


@contextlib.contextmanager
def _transaction(db: apsw.Connection) -> Iterator[None]:
    """Run the body in one write transaction, which is rolled back if the body raises."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _migrate(db: apsw.Connection, path: Path, version: int) -> None:
    while version < SCHEMA:
        with _transaction(db):
            version = _version(db, path)  # read again: another process may have been first
            if version < SCHEMA:
                MIGRATIONS[version](db)
                version += 1
                db.execute(f"PRAGMA user_version = {version}")


def _one(db: apsw.Connection, sql: str, bindings: tuple[Any, ...] = ()) -> Any:
    for row in db.execute(sql, bindings):
        return row[0]
    return None


def _patiently(attempt: Callable[[], T], path: Path) -> T:
    """Return what `attempt` returns, retrying while other processes lock the file.

    Raises:
        LogError: the attempt failed, or the file was locked for longer than BUSY_S.
    """
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            return attempt()
        except (apsw.BusyError, apsw.LockedError, apsw.SchemaChangeError, apsw.ProtocolError) as error:
            if time.monotonic() > deadline:
                raise LogError(
                    f"{path}: another process has held the log for more than {BUSY_S:.0f} s; "
                    "find it (`fuser` names it) and let it finish or end it"
                ) from error
            time.sleep(0.005)
        except apsw.Error as error:
            raise explain(error, path) from error


def explain(error: apsw.Error, path: Path) -> LogError:
    """Return a LogError that explains an SQLite error for this file."""
    match error:
        case apsw.NotADBError():
            return LogError(_NO_DATABASE.format(path))
        case apsw.FullError():
            return LogError(f"{path}: no space left to write; free some, the log goes on by itself")
        case apsw.CorruptError():
            return LogError(
                f"{path}: the file is damaged ({error}); `cai log recover` saves every intact record, "
                "and `cai log verify` says where, if the file can be opened"
            )
        case apsw.ReadOnlyError() | apsw.CantOpenError() | apsw.PermissionsError():
            return LogError(
                f"{path}: cannot be opened or written ({error}); check its permissions and folder"
            )
        case apsw.IOError():
            return LogError(
                f"{path}: the disk failed to read or write ({error}); "
                "check its space and health, the log goes on by itself once it works"
            )
        case _:
            return LogError(f"{path}: {type(error).__name__}: {error}")


# --- the store ----------------------------------------------------------------------------------------


class SQLiteStore(Store):
    """One log file, shared by the threads of a process.

    SQLite's locks do not survive a fork: a child that inherits an open database assumes that it owns its
    parent's locks. So every connection is closed before a fork, and each side opens its own afterwards.
    """

    tagged = TAGGED.format("instr")

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        super().__init__(str(path), read_only=read_only)
        self.path = path
        self._reset()
        self.query(lambda db: None)  # So that a bad file raises when the log is opened.

    def _reset(self) -> None:
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        wals: dict[tuple[int, int], bytes | None] = {}
        self._db = _Connection(self.path, wals, read_only=False)
        self._reader = _Connection(self.path, wals, read_only=self.read_only)
        self._run = 0
        """The count `_db.opened` at which the current writer id was begun."""

    def close(self) -> None:
        """Close every connection; the next use opens them again."""
        with self._writing, self._reading:
            self._db.close()
            self._reader.close()

    def before_fork(self) -> None:
        """Wait for the transaction in progress, close every connection, and block work until `after_fork`."""
        self._writing.acquire()
        self._reading.acquire()
        self._db.close()
        self._reader.close()

    def after_fork(self, *, child: bool) -> None:
        """Allow work again, in the parent or in the child."""
        if child:
            self._reset()
        else:
            self._reading.release()
            self._writing.release()

    # --- writing --------------------------------------------------------------------------------------

    def insert(self, rows: Sequence[Row]) -> list[CaiError | None]:
        """Commit the rows durably in one transaction; see `Store.insert`."""

        def attempt() -> list[CaiError | None]:
            with self._writing:
                try:
                    # Check the file only once for transactions in quick succession: the check releases the
                    # GIL, and the callers woken by the last commit would take it before this thread starts.
                    errors = self._insert(self._writable(self._db.current(_LOOKED_S)), rows)
                    while not self._db.is_current():
                        errors = self._insert(self._writable(self._db.current()), rows)
                    return errors
                except (apsw.BusyError, apsw.LockedError):
                    raise
                except BaseException:
                    # After a failed write neither SQLite's state nor whether the commit reached the disk is
                    # certain: use a new connection, and a new writer with its own sequence.
                    self._db.close()
                    raise

        return _patiently(attempt, self.path)

    def _insert(self, db: apsw.Connection, rows: Sequence[Row]) -> list[CaiError | None]:
        bindings, sequence, link = self._bindings(rows)
        errors: list[CaiError | None] = [None] * len(rows)
        try:
            _insert_all(db, bindings)
        except apsw.ConstraintError:
            with _transaction(db):
                errors, fresh = self._refuse(db, rows)
                bindings, sequence, link = self._bindings(fresh)
                _insert_all(db, bindings)
        self._sequence, self._link = sequence, link
        return errors

    def change(self, write: Callable[[Database], T]) -> T:
        """Run `write` in one transaction and return its result; see `Store.change`."""

        def attempt() -> T:
            with self._writing:
                db = self._writable(self._db.current())
                with _transaction(db):
                    return write(db)

        return _patiently(attempt, self.path)

    def erase(self) -> bool:
        """Overwrite removed rows in the file and its WAL; see `Store.erase`.

        SQLite overwrites a row when it removes it, but not the copies that remained when it moved the row to
        another page: these disappear only when `compact` rewrites the file.
        """
        end = time.monotonic() + _ERASE_S

        def attempt() -> bool:
            with self._writing:
                db = self._writable(self._db.current())
                try:
                    return not _one(db, "PRAGMA wal_checkpoint(TRUNCATE)")  # 1: a reader blocks it
                except (apsw.BusyError, apsw.LockedError):
                    return False

        while not (done := _patiently(attempt, self.path)) and time.monotonic() < end:
            time.sleep(0.05)
        return done and not self._is_stale()

    def compact(self) -> bool:
        """Rewrite the file, if anything was removed and no other connection has it open; see `Store.compact`.

        That takes minutes for a large file, and blocks all writers.
        """

        def attempt() -> bool:
            with self._writing, self._reading:
                self._db.close()
                self._reader.close()
                db = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)
                try:
                    db.execute(_FULL_SYNC)
                    db.execute("PRAGMA locking_mode = EXCLUSIVE")  # locks the file from the next statement on
                    db.execute("VACUUM")
                    with _transaction(db):
                        db.execute("DELETE FROM sqlite_sequence WHERE name = 'tombstones'")
                        db.execute(
                            "INSERT INTO sqlite_sequence SELECT 'tombstones', count(*) FROM tombstones"
                        )
                except (apsw.FullError, apsw.BusyError, apsw.LockedError):
                    return False
                finally:
                    db.close()
                return True

        return self._is_stale() and _patiently(attempt, self.path)

    def copies(self) -> Sequence[Path]:
        """Return the saved copies of WALs; see `Store.copies`."""
        return copies_of(self.path)

    def _is_stale(self) -> bool:
        """Return whether records were removed since the file was last rewritten, so that copies may remain.

        The number of tombstones at that time is stored in SQLite's table `sqlite_sequence`.
        """
        written = "SELECT seq FROM sqlite_sequence WHERE name = 'tombstones'"
        sql = f"SELECT count(*) > coalesce(({written}), 0) FROM tombstones"
        return bool(self.query(lambda db: _one(db, sql)))

    def _writable(self, db: apsw.Connection) -> apsw.Connection:
        if self._run != self._db.opened:
            self._run = self._db.opened
            self._begin_run()
        return db

    # --- reading --------------------------------------------------------------------------------------

    def rows(self, sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        """Return all rows of a query; see `Store.rows`."""
        return self.query(lambda db: list(db.execute(sql, bindings)))

    def page(self, sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        """Return the first rows of a query, up to any damage; see `Store.page`."""

        def read(db: apsw.Connection) -> list[Any]:
            rows: list[Any] = []
            size = 0
            try:
                for row in db.execute(sql, bindings):
                    rows.append(row)
                    size += len(row[-1]) if isinstance(row[-1], bytes) else 0
                    if size > PAGE_BYTES:
                        break
            except apsw.CorruptError:
                if not rows:
                    raise
            return rows

        return self.query(read)

    def faults(self) -> list[str]:
        """Report faults that SQLite finds in the file, and that we find in its WAL; see `Store.faults`."""
        wal = Path(f"{self.path}-wal")
        crashed = wal.exists() and wal.stat().st_size > 0

        def check(db: apsw.Connection) -> list[str]:
            if crashed:
                # Keep what a crash left in the WAL there; a checkpoint on close would move it into the file.
                db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            unread = unread_of(self.path, db)
            db.execute("PRAGMA cell_size_check = ON")
            faults = [str(row[0]) for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            return faults if unread is None else [unread, *faults]

        try:
            return self.query(check)
        except LogError as error:
            return [str(error.__cause__ or error)]

    def size(self) -> int:
        """Return the bytes of the file and its WAL."""
        files = (self.path, Path(f"{self.path}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    @staticmethod
    def among(column: str, name: str) -> str:
        """Return the expression; see `Store.among`."""
        return f"{column} IN (SELECT value FROM json_each(:{name}))"

    @staticmethod
    def packed(values: Sequence[str] | Sequence[int]) -> str:
        """Return the values as JSON; see `Store.packed`."""
        return json.dumps(values)

    @staticmethod
    def raw(column: str) -> str:
        """Return the expression; see `Store.raw`."""
        return f"CAST({column} AS BLOB)"  # After a flipped byte a text may not be valid UTF-8.

    def filtered(self) -> str:
        """Return the index for filters, which SQLite does not choose by itself; see `Store.filtered`."""
        # An older log that is opened read-only is not migrated, and has no such index.
        has_index = self.rows("SELECT 1 FROM sqlite_schema WHERE name = 'records_filtered'", {})
        return " INDEXED BY records_filtered" if has_index else ""

    def query(self, read: Callable[[apsw.Connection], T]) -> T:
        """Return what `read` returns for the reading connection, which it must not keep.

        Raises:
            LogError: the log cannot be read, or is damaged in the part that `read` read.
        """

        def attempt() -> T:
            with self._reading:
                try:
                    return read(self._reader.current())
                except UnicodeDecodeError as error:
                    raise apsw.CorruptError(str(error)) from error

        return _patiently(attempt, self.path)


class _Connection:
    """A connection that is opened on first use, and reopened when another file is at its path.

    Args:
        path: the log's file.
        wals: by (device, inode) of each file that was at the path, the header of the WAL it last had, or
            None; shared between connections.
        read_only: the connection changes nothing.
    """

    def __init__(self, path: Path, wals: dict[tuple[int, int], bytes | None], *, read_only: bool) -> None:
        self.path = path
        self._wals = wals
        self.read_only = read_only
        self.opened = 0
        """How many times a connection was opened."""
        self._db: apsw.Connection | None = None
        self._file = (0, 0)
        self._at_rest = False
        self._looked = -math.inf

    def current(self, looked_s: float = 0.0) -> apsw.Connection:
        """Return a connection to the file that is at the path now.

        Args:
            looked_s: seconds for which an earlier check of the file is not repeated.
        """
        if time.monotonic() - self._looked > looked_s and not self.is_current():
            wal = self._wals.pop(self._file, None)
            if wal is not None and not self.read_only and self._is_another():
                set_aside(self.path, wal)
            self.close()
        if self._db is None:
            self._db = connect(self.path, read_only=self.read_only)
            self._file = self._identity()
            self._wals[self._file] = wal_of(self.path)
            self._at_rest = self.read_only and is_at_rest(self.path)
            self.opened += 1
        return self._db

    def is_current(self) -> bool:
        """Return whether the open file is still the one at its path.

        Records written to a file that was removed or replaced would be lost.
        """
        found = self._db is not None and not self._is_another()
        if found and self._at_rest:
            found = is_at_rest(self.path)
        if found:
            self._wals[self._file] = wal_of(self.path)
        self._looked = time.monotonic() if found else -math.inf
        return found

    def close(self) -> None:
        """Close the connection. What it cannot checkpoint stays in the WAL for the next connection."""
        if self._db is not None:
            db, self._db = self._db, None
            with contextlib.suppress(apsw.Error):
                db.close()

    def _is_another(self) -> bool:
        """Return whether another file, or none, is at the path."""
        try:
            return self._identity() != self._file
        except FileNotFoundError:
            return True

    def _identity(self) -> tuple[int, int]:
        status = os.stat(self.path)
        return status.st_dev, status.st_ino
