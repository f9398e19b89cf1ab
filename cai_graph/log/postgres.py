"""Stores a log in PostgreSQL, through psycopg.

`cai_graph.log.store` describes the tables. They are in a schema of their own, `cai_log`, in the database that
the URL names.

Order: one advisory lock, taken at the start of each transaction and released at its commit, serializes the
writers of all hosts. So positions are in order of commit: a reader that has seen a position has seen all
before it. The lock is released with its connection, so a host that dies cannot keep it.

Outages: a transaction whose connection broke is retried on a new one, under a new writer's id. If the first
attempt was committed after all, the ids of its records are already stored, so they are not stored twice.
A failure on a connection that was already open does not show that the server is down now: the connection may
date from before an outage, or this process may have been suspended. So such an operation is always retried.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import psycopg

from cai_graph.errors import CaiError, DataError, LogError
from cai_graph.log.postgres_session import READ_S, WRITE_S, Late, Session, connect, parameters_of
from cai_graph.log.store import PAGE_BYTES, TAGGED, Database, Row, Store

__all__ = ["PostgresStore"]

OUTAGE_S = 20.0
"""How long an operation is retried while the server cannot be reached. If an outage lasts longer, each
operation after the first is tried only once on a new connection."""
_COPY = """
    COPY records (id, kind, at, trajectory_id, outcome, constitution, source, tags, withheld, payload,
                  writer, sequence, digest, chain)
    FROM STDIN (FORMAT BINARY)
"""
_STOOD_STILL = ("25P03", "25P04")
"""SQLSTATEs that the server returns to a process that was idle for too long inside a transaction."""
_COPY_TYPES = ("text", "text", "int8", *["text"] * 5, "int2", "bytea", "text", "int8", "bytea", "bytea")

T = TypeVar("T")


class PostgresStore(Store):
    """One log in PostgreSQL, shared by the threads of a process: one connection writes, another reads.

    Both are closed before a fork, since two processes must not share a connection.

    Args:
        dsn: `postgresql://…`, as libpq reads it.
        name: the log's name in messages.
        read_only: open for reading only; a missing log is an error.
    """

    tagged = TAGGED.format("strpos")

    def __init__(self, dsn: str, name: str, *, read_only: bool = False) -> None:
        super().__init__(name, read_only=read_only)
        self._parameters = parameters_of(dsn, name)
        self._down = False
        """Whether the server was unreachable when an operation last gave up retrying."""
        self._reset()
        if read_only:
            self._patiently(lambda: self._read("SELECT 1", {}), 0)
        else:
            self._patiently(lambda: self._write(lambda db: None), 0)

    def _reset(self) -> None:
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._db: Session | None = None
        self._reader: Session | None = None

    def close(self) -> None:
        """Close both connections; see `Store.close`."""
        with self._writing, self._reading:
            self._drop_writer()
            self._drop_reader()

    def before_fork(self) -> None:
        """Close both connections and keep the locks; see `Store.before_fork`."""
        self._writing.acquire()
        self._reading.acquire()
        self._drop_writer()
        self._drop_reader()

    def after_fork(self, *, child: bool) -> None:
        """Allow work again, in the parent or in the child."""
        if child:
            self._reset()
        else:
            self._reading.release()
            self._writing.release()

    # --- writing --------------------------------------------------------------------------------------

    def insert(self, rows: Sequence[Row]) -> list[CaiError | None]:
        """Commit the rows in one transaction, retried if the connection breaks; see `Store.insert`."""
        seconds = WRITE_S + sum(len(row.payload) for row in rows) / 1e6
        try:
            return self._patiently(lambda: self._write(lambda db: self._insert(db, rows), seconds), OUTAGE_S)
        except _Unstorable as error:
            if len(rows) == 1:
                return [DataError(f"{self.name}: record {rows[0].id!r} cannot be stored: {error}")]
        # One of the rows cannot be stored; bisect, so that the others are.
        errors: list[CaiError | None] = []
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            try:
                errors += self.insert(half)
            except LogError as error:
                errors += [error] * len(half)
        return errors

    def _insert(self, db: Session, rows: Sequence[Row]) -> list[CaiError | None]:
        errors: list[CaiError | None] = [None] * len(rows)
        try:
            with db.turn():
                sequence, link = self._copy(db, rows)
        except psycopg.errors.UniqueViolation:
            with db.turn():
                errors, fresh = self._refuse(_Named(db), rows)
                sequence, link = self._copy(db, fresh)
        self._sequence, self._link = sequence, link
        return errors

    def _copy(self, db: Session, rows: Sequence[Row]) -> tuple[int, bytes]:
        bindings, sequence, link = self._bindings(rows)
        with db.cursor() as cursor, cursor.copy(_COPY) as copy:
            copy.set_types(_COPY_TYPES)
            for binding in bindings:
                copy.write_row(binding)
        return sequence, link

    def change(self, write: Callable[[Database], T]) -> T:
        """Run `write` in one transaction and return its result; see `Store.change`."""

        def attempt(db: Session) -> T:
            with db.turn():
                return write(_Named(db))

        return self._patiently(lambda: self._write(attempt, READ_S), 0)

    def erase(self) -> bool:
        """Do nothing and return False: the server overwrites removed rows when it reuses their space."""
        return False

    def compact(self) -> bool:
        """Let the server reuse the space of removed rows (VACUUM); nothing is returned to the disk."""

        def vacuum(db: Session) -> None:
            db.execute("SET statement_timeout = 0")
            db.execute("VACUUM (ANALYZE) records, tombstones")
            db.execute("RESET statement_timeout")

        self._patiently(lambda: self._write(vacuum, math.inf), 0)
        return False

    def _write(self, write: Callable[[Session], T], seconds: float = READ_S) -> T:
        with self._writing:
            was_open = self._db is not None
            try:
                if self._db is None:
                    self._db = connect(self._parameters, self.name, read_only=self.read_only)
                    self._begin_run()
                with self._db.within(seconds):
                    return write(self._db)
            except BaseException as error:
                # After any error a new connection, and a new writer with its own sequence, are safe to use.
                self._drop_writer()
                if was_open and _is_passing(error):
                    raise _Stale from error
                raise

    # --- reading --------------------------------------------------------------------------------------

    def rows(self, sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        """Return all rows of a query, retried if the connection breaks; see `Store.rows`."""
        return self._patiently(lambda: self._read(sql, bindings), OUTAGE_S)

    def page(self, sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        """Return the first rows of a query; see `Store.page`."""
        # The server adds up the sizes, which it knows without reading the payloads.
        cut = (
            "SELECT * FROM (SELECT page.*, sum(octet_length(payload)) OVER (ROWS BETWEEN UNBOUNDED PRECEDING "
            f"AND 1 PRECEDING) AS before FROM ({sql}) AS page) AS pages "
            f"WHERE coalesce(before, 0) <= {PAGE_BYTES}"
        )
        return [row[:-1] for row in self.rows(cut, bindings)]

    def faults(self) -> list[str]:
        """Report pages that failed their checksum, and invalid indexes; see `Store.faults`."""
        ((failures,),) = self.rows(
            "SELECT coalesce(max(checksum_failures), 0) FROM pg_stat_database "
            "WHERE datname = current_database()",
            {},
        )
        faults = [f"{failures} pages of the database failed their checksum"] if failures else []
        invalid = (
            "SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class ON pg_class.oid = indrelid "
            "WHERE relnamespace = 'cai_log'::regnamespace AND NOT indisvalid"
        )
        return faults + [f"the index {index} is not valid; REINDEX it" for (index,) in self.rows(invalid, {})]

    def size(self) -> int:
        """Return the bytes of the tables and their indexes."""
        sql = "SELECT pg_total_relation_size('records') + pg_total_relation_size('tombstones')"
        ((size,),) = self.rows(sql, {})
        return int(size)

    @staticmethod
    def among(column: str, name: str) -> str:
        """Return the expression; see `Store.among`."""
        return f"{column} = ANY(:{name})"

    @staticmethod
    def packed(values: Sequence[str] | Sequence[int]) -> list[Any]:
        """Return the values as a list, which psycopg sends as an array."""
        return list(values)

    @staticmethod
    def raw(column: str) -> str:
        """Return the expression; see `Store.raw`."""
        return f"convert_to({column}::text, 'UTF8')"

    def _read(self, sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        with self._reading:
            was_open = self._reader is not None
            try:
                if self._reader is None:
                    self._reader = connect(self._parameters, self.name, read_only=self.read_only)
                with self._reader.within(READ_S), self._reader.cursor(binary=True) as cursor:
                    return cursor.execute(_psycopg_form(sql), bindings).fetchall()
            except BaseException as error:
                self._drop_reader()
                if was_open and _is_passing(error):
                    raise _Stale from error
                raise

    # --- outages --------------------------------------------------------------------------------------

    def _drop_writer(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def _drop_reader(self) -> None:
        db, self._reader = self._reader, None
        if db is not None:
            db.close()

    def _patiently(self, attempt: Callable[[], T], patience_s: float) -> T:
        """Return what `attempt` returns, retrying while the server cannot be reached.

        However short `patience_s`, an attempt that fails on an old connection is retried on a new one.

        Raises:
            LogError: the attempt failed, or the server could not be reached for `patience_s`.
            _Unstorable: the server rejected a value.
        """
        deadline = time.monotonic() + (0 if self._down else patience_s)
        pause = 0.0
        while True:
            try:
                result = attempt()
            except _Stale:
                continue
            except psycopg.Error as error:
                if _is_of_the_data(error):
                    raise _Unstorable(_first_line(error)) from error
                if _is_passing(error):
                    if time.monotonic() + pause < deadline:
                        time.sleep(pause)
                        pause = min(2 * pause + 0.05, 0.5)
                        continue
                    self._down = self._down or patience_s > 0
                raise self._explain(error) from error
            self._down = False
            return result

    def _explain(self, error: psycopg.Error) -> LogError:
        what = _first_line(error)
        match error:
            case Late():
                return LogError(
                    f"{self.name}: PostgreSQL did not answer in time; the log goes on once it does"
                )
            case psycopg.errors.DiskFull():
                return LogError(
                    f"{self.name}: no space left on the server ({what}); free some, the log goes on by itself"
                )
            case psycopg.errors.InsufficientPrivilege():
                return LogError(
                    f"{self.name}: {what}; GRANT CREATE ON DATABASE to the role that opens the log first, "
                    "and USAGE on the schema cai_log with ALL on its tables to the others"
                )
            case psycopg.errors.ReadOnlySqlTransaction():
                return LogError(
                    f"{self.name}: the server is a replica, which only reads; name the primary, or all hosts "
                    "with ?target_session_attrs=read-write"
                )
            case psycopg.OperationalError():
                return LogError(
                    f"{self.name}: PostgreSQL cannot be reached or does not answer: {what}; check that it "
                    "runs, its host and port, user and password. An open log goes on by itself"
                )
            case _:
                return LogError(f"{self.name}: PostgreSQL: {what}")


class _Stale(Exception):  # noqa: N818
    """A transient failure on a connection that was open before the operation began."""


class _Unstorable(LogError):  # noqa: N818
    """The server rejected one of the values that it was sent."""


class _Named:
    """A connection whose statements have named parameters in the form `:name`."""

    def __init__(self, db: Session) -> None:
        self._db = db

    def execute(self, sql: str, bindings: Mapping[str, Any], /) -> Iterable[Any]:
        """Run one statement; see `Database.execute`."""
        cursor = self._db.cursor(binary=True)
        cursor.execute(_psycopg_form(sql), bindings)
        return cursor if cursor.description is not None else ()


@lru_cache(maxsize=256)
def _psycopg_form(sql: str) -> Any:
    return re.sub(r"(?<!:):([a-z_]+)", r"%(\1)s", sql)


def _is_of_the_data(error: psycopg.Error) -> bool:
    """Return whether the server rejected a value, usually because it is too large."""
    return isinstance(error, psycopg.DataError | psycopg.errors.ProgramLimitExceeded)


def _is_passing(error: BaseException) -> bool:
    """Return whether the error is transient: the same operation may work later, on a new connection."""
    if isinstance(error, psycopg.errors.DiskFull):
        return False
    if isinstance(error, psycopg.Error) and error.diag.sqlstate in _STOOD_STILL:
        return True
    return isinstance(
        error,
        psycopg.OperationalError
        | psycopg.InterfaceError
        # After a failover the host that we write to may have become a replica.
        | psycopg.errors.ReadOnlySqlTransaction
        # The log was dropped while it was open; a new connection creates it again.
        | psycopg.errors.UndefinedTable
        | psycopg.errors.InvalidSchemaName,
    )


def _first_line(error: psycopg.Error) -> str:
    return (error.diag.message_primary or str(error)).strip().partition("\n")[0]
