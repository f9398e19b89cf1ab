"""The log in PostgreSQL, through psycopg; `Store` says what the tables hold.

They stand in a schema of their own, `cai_log`, of the database that the URL names.

Order: the writers of all hosts take turns, under one advisory lock held from the first row of a transaction
to its commit. So positions are in order of commit: whoever has read one has seen all before it. The lock
goes with its connection, so a host that dies cannot keep it.

Outages: a transaction whose connection broke is tried again on a new one, under a new writer's id. Whether
the first attempt was committed after all is told by the ids of its records, which are then there already.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from cai_graph.errors import CaiError, ConfigError, DataError, LogError, MissingExtra
from cai_graph.log.store import PAGE_BYTES, TAGGED, Database, Row, Store

try:
    import psycopg
except ImportError as error:
    raise MissingExtra("a log in PostgreSQL", "psycopg", "postgres") from error

__all__ = ["SCHEMA", "PostgresStore"]

SCHEMA = 1
"""The version of the tables that this release writes."""
OUTAGE_S = 20.0
"""For how long an operation is tried again where the server cannot be reached. In an outage that lasts
longer, the operations after the first are tried once."""
CONNECT_S = 5
"""How long connecting to one host may take."""
WRITE_S = 15.0
"""How long a transaction of the writer may take, its turn included, beside a second for each megabyte."""
READ_S = 300.0
"""How long one query of a reader may take."""

_LOCK = 0x6361694700000001
"""The advisory lock that writers hold: `caiG`, and a number."""
_URL_FORM = "postgresql://USER@HOST:5432/DATABASE"

_SETTINGS = {
    "search_path": "cai_log",
    "client_min_messages": "warning",
    # Records are read in the order of an index, page by page. A server that has not counted the table yet
    # would rather sort all that is left, for each page anew.
    "enable_sort": "off",
    "enable_incremental_sort": "off",
    "statement_timeout": f"{READ_S:.0f}s",
    # A host that died, or a process that stands still, must not keep its turn.
    "idle_in_transaction_session_timeout": f"{WRITE_S:.0f}s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

_CREATE = """
    CREATE SCHEMA IF NOT EXISTS cai_log;
    CREATE TABLE cai_log.log (version integer NOT NULL);
    INSERT INTO cai_log.log VALUES (0);
    CREATE TABLE cai_log.records (
        position      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        id            text COLLATE "C" NOT NULL UNIQUE,
        kind          text COLLATE "C" NOT NULL,
        writer        text COLLATE "C" NOT NULL,
        sequence      bigint   NOT NULL,
        at            bigint   NOT NULL,  -- microseconds since 1970 UTC
        trajectory_id text COLLATE "C",
        outcome       text COLLATE "C",
        constitution  text COLLATE "C",
        source        text COLLATE "C",
        tags          text COLLATE "C",   -- JSON array
        withheld      smallint NOT NULL,
        digest        bytea    NOT NULL,
        chain         bytea    NOT NULL,
        payload       bytea    NOT NULL
    );
    -- The position stands in each index, since records are read in its order.
    CREATE INDEX records_trajectory ON cai_log.records (trajectory_id, position)
        WHERE trajectory_id IS NOT NULL;
    CREATE INDEX records_kind ON cai_log.records (kind, position)
        WHERE trajectory_id IS NOT NULL;  -- few are no Trajectory
    CREATE INDEX records_outcome ON cai_log.records (outcome, position) WHERE outcome IS NOT NULL;
    CREATE INDEX records_constitution ON cai_log.records (constitution, position)
        WHERE constitution IS NOT NULL;
    CREATE INDEX records_source ON cai_log.records (source, position) WHERE source IS NOT NULL;
    CREATE INDEX records_at ON cai_log.records (at, position);
    CREATE INDEX records_tags ON cai_log.records (position) WHERE tags IS NOT NULL;
    CREATE INDEX records_withheld ON cai_log.records (withheld) WHERE withheld = 1;
    CREATE TABLE cai_log.tombstones (
        position   bigint PRIMARY KEY,
        id         text COLLATE "C" NOT NULL,
        kind       text COLLATE "C" NOT NULL,
        writer     text COLLATE "C" NOT NULL,
        sequence   bigint NOT NULL,
        digest     bytea  NOT NULL,
        chain      bytea  NOT NULL,
        removed_at bigint NOT NULL,       -- microseconds since 1970 UTC
        why        text COLLATE "C" NOT NULL
    );
    CREATE INDEX tombstones_id ON cai_log.tombstones (id);
"""

_Connection = psycopg.Connection[tuple[Any, ...]]


def _create(db: _Connection) -> None:
    db.execute(_CREATE)


MIGRATIONS: dict[int, Callable[[_Connection], None]] = {0: _create}
"""Version n -> what turns a log of version n into version n + 1, inside one transaction."""

_COPY = """
    COPY records (id, kind, at, trajectory_id, outcome, constitution, source, tags, withheld, payload,
                  writer, sequence, digest, chain)
    FROM STDIN (FORMAT BINARY)
"""
_COPY_TYPES = ("text", "text", "int8", *["text"] * 5, "int2", "bytea", "text", "int8", "bytea", "bytea")

T = TypeVar("T")


class _Late(psycopg.OperationalError):
    """The server took a query and did not answer in time."""


class _Timed(psycopg.Connection[tuple[Any, ...]]):
    """A connection on which no work takes longer than `seconds`."""

    seconds = math.inf
    _ends = math.inf

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for what `gen` does; see `psycopg.Connection.wait`."""
        return super().wait(self._until_late(gen), *args, **kwargs)

    def _until_late(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if time.monotonic() > self._ends:
                    raise _Late("the server does not answer")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Fail with `_Late` what takes longer."""
        before = self.seconds, self._ends
        self.seconds, self._ends = seconds, time.monotonic() + seconds
        try:
            yield
        finally:
            self.seconds, self._ends = before


class PostgresStore(Store):
    """One log in PostgreSQL, shared by the threads of a process: one connection writes, another reads.

    Both are closed before a fork, since two processes must not speak through one connection.

    Args:
        dsn: `postgresql://…`, as libpq reads it.
        name: how messages call it.
        read_only: reads only; a log that is not there is an error.
    """

    tagged = TAGGED.format("strpos")

    def __init__(self, dsn: str, name: str, *, read_only: bool = False) -> None:
        super().__init__(name, read_only=read_only)
        self._parameters = _parameters(dsn, name)
        self._down = False
        """Whether the server could not be reached the last time that was tried for long enough."""
        self._reset()
        if read_only:
            self._patiently(lambda: self._read("SELECT 1", {}), 0)
        else:
            self._patiently(lambda: self._write(lambda db: None), 0)

    def _reset(self) -> None:
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._db: _Timed | None = None
        self._reader: _Timed | None = None

    def close(self) -> None:
        """Close both connections; see `Store.close`."""
        with self._writing, self._reading:
            self._drop_writer()
            self._drop_reader()

    def before_fork(self) -> None:
        """Close both connections and hold; see `Store.before_fork`."""
        self._writing.acquire()
        self._reading.acquire()
        self._drop_writer()
        self._drop_reader()

    def after_fork(self, *, child: bool) -> None:
        """Let work go on, in the parent or in the child."""
        if child:
            self._reset()
        else:
            self._reading.release()
            self._writing.release()

    # --- writing --------------------------------------------------------------------------------------

    def insert(self, rows: Sequence[Row]) -> list[CaiError | None]:
        """Commit the rows in one transaction, tried again where the connection broke; see `Store.insert`."""
        seconds = WRITE_S + sum(len(row.payload) for row in rows) / 1e6
        try:
            return self._patiently(lambda: self._write(lambda db: self._insert(db, rows), seconds), OUTAGE_S)
        except _Unstorable as error:
            if len(rows) == 1:
                return [DataError(f"{self.name}: record {rows[0].id!r} cannot be stored: {error}")]
        # One of them is at fault; the others are stored without it.
        errors: list[CaiError | None] = []
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            try:
                errors += self.insert(half)
            except LogError as error:
                errors += [error] * len(half)
        return errors

    def _insert(self, db: _Timed, rows: Sequence[Row]) -> list[CaiError | None]:
        errors: list[CaiError | None] = [None] * len(rows)
        try:
            with _turn(db):
                sequence, link = self._copy(db, rows)
        except psycopg.errors.UniqueViolation:
            with _turn(db):
                errors, fresh = self._refuse(_Named(db), rows)
                sequence, link = self._copy(db, fresh)
        self._sequence, self._link = sequence, link
        return errors

    def _copy(self, db: _Timed, rows: Sequence[Row]) -> tuple[int, bytes]:
        bindings, sequence, link = self._bindings(rows)
        with db.cursor() as cursor, cursor.copy(_COPY) as copy:
            copy.set_types(_COPY_TYPES)
            for binding in bindings:
                copy.write_row(binding)
        return sequence, link

    def change(self, write: Callable[[Database], T]) -> T:
        """Return what `write` does inside one transaction; see `Store.change`."""

        def attempt(db: _Timed) -> T:
            with _turn(db):
                return write(_Named(db))

        return self._patiently(lambda: self._write(attempt, READ_S), 0)

    def compact(self) -> bool:
        """Let the server use again what was removed; it keeps the space."""

        def vacuum(db: _Timed) -> None:
            db.execute("SET statement_timeout = 0")
            db.execute("VACUUM (ANALYZE) records, tombstones")
            db.execute("RESET statement_timeout")

        self._patiently(lambda: self._write(vacuum, math.inf), 0)
        return False

    def _write(self, write: Callable[[_Timed], T], seconds: float = READ_S) -> T:
        with self._writing:
            try:
                if self._db is None:
                    self._db = self._connect()
                    self._begin_run()
                with self._db.within(seconds):
                    return write(self._db)
            except BaseException:
                # Whatever it was, a new connection and a new writer with its own sequence are sound.
                self._drop_writer()
                raise

    # --- reading --------------------------------------------------------------------------------------

    def rows(self, sql: str, bindings: Mapping[str, Any]) -> list[Any]:
        """Return all rows of a query, asked again where the connection broke; see `Store.rows`."""
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
        """Return pages that failed their checksum and indexes that are not valid; see `Store.faults`."""
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
            try:
                if self._reader is None:
                    self._reader = self._connect()
                with self._reader.within(READ_S), self._reader.cursor(binary=True) as cursor:
                    return cursor.execute(_psycopg_form(sql), bindings).fetchall()
            except BaseException:
                self._drop_reader()
                raise

    # --- connections ----------------------------------------------------------------------------------

    def _connect(self) -> _Timed:
        settings = {**_SETTINGS, "default_transaction_read_only": "on" if self.read_only else "off"}
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        given = self._parameters.get("options") or os.environ.get("PGOPTIONS", "")
        parameters = {**self._parameters, "options": f"{given} {options}"}
        # Nothing is prepared: each query is planned for the values in its filters.
        db = _Timed.connect(autocommit=True, prepare_threshold=None, **parameters)
        try:
            with db.within(READ_S):
                self._check(db)
        except BaseException:
            db.close()
            raise
        return db

    def _check(self, db: _Timed) -> None:
        """Bring the log up to date, and refuse what does not keep its promises."""
        sql = """
            SELECT current_setting('server_encoding'), current_setting('fsync'),
                   current_setting('synchronous_commit'), pg_is_in_recovery()
        """
        ((encoding, fsync, synchronous_commit, is_replica),) = db.execute(sql)
        if encoding != "UTF8":
            raise LogError(f"{self.name}: the database is in {encoding}; make one WITH ENCODING 'UTF8'")
        if not self.read_only:
            if is_replica:
                raise psycopg.errors.ReadOnlySqlTransaction("the server is a replica")
            if fsync != "on":
                raise LogError(
                    f"{self.name}: the server runs with fsync = {fsync}, so a power cut loses what it has "
                    "committed; set fsync = on, or keep the log elsewhere"
                )
            if synchronous_commit not in ("on", "remote_apply"):
                db.execute("SET synchronous_commit = on")
        version = self._version(db)
        if version == SCHEMA:
            return
        if not self.read_only:
            self._migrate(db)
        elif version == 0:
            raise LogError(f"{self.name}: there is no log in this database; `cai run` or `cai ask` makes one")

    def _version(self, db: _Timed) -> int:
        """Return the schema version, 0 where there is no log."""
        ((is_log, others),) = db.execute(
            "SELECT to_regclass('cai_log.log') IS NOT NULL, "
            "EXISTS (SELECT FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
            "WHERE nspname = 'cai_log')"
        )
        if is_log:
            ((version,),) = db.execute("SELECT version FROM cai_log.log")
            if version > SCHEMA:
                raise LogError(
                    f"{self.name}: schema version {version}, this release reads 1 to {SCHEMA}; "
                    "upgrade cai-graph. The log is unchanged"
                )
            return int(version)
        if others:
            raise LogError(
                f"{self.name}: its schema 'cai_log' is no log of cai-graph; name another database, or drop "
                "the schema"
            )
        return 0

    def _migrate(self, db: _Timed) -> None:
        with db.within(math.inf):
            while True:
                with _turn(db):
                    # Read again: another process may have been first.
                    version = self._version(db)
                    if version == SCHEMA:
                        return
                    MIGRATIONS[version](db)
                    db.execute("UPDATE cai_log.log SET version = %s", (version + 1,))

    def _drop_writer(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def _drop_reader(self) -> None:
        db, self._reader = self._reader, None
        if db is not None:
            db.close()

    def _patiently(self, attempt: Callable[[], T], patience_s: float) -> T:
        """Return what `attempt` returns, tried again while the server cannot be reached.

        Raises:
            LogError: it failed, or the server could not be reached for `patience_s`.
            _Unstorable: the server refuses what it was given.
        """
        deadline = time.monotonic() + (0 if self._down else patience_s)
        pause = 0.0
        while True:
            try:
                result = attempt()
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
            case _Late():
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


class _Unstorable(Exception):  # noqa: N818
    """The server refuses one of the records that it was given."""


class _Named:
    """A connection whose statements have named parameters in the form `:name`."""

    def __init__(self, db: _Timed) -> None:
        self._db = db

    def execute(self, sql: str, bindings: Mapping[str, Any], /) -> Iterable[Any]:
        """Run one statement; see `Database.execute`."""
        cursor = self._db.cursor(binary=True)
        cursor.execute(_psycopg_form(sql), bindings)
        return cursor if cursor.description is not None else ()


@contextlib.contextmanager
def _turn(db: _Timed) -> Iterator[None]:
    """A transaction that no other writer's overlaps."""
    timeout = 0 if math.isinf(db.seconds) else int(db.seconds * 1000)
    db.execute(f"BEGIN; SET LOCAL statement_timeout = {timeout}; SELECT pg_advisory_xact_lock({_LOCK})")
    try:
        yield
        db.execute("COMMIT")
    except psycopg.errors.UniqueViolation:
        db.execute("ROLLBACK")
        raise
    # After any other error the connection is closed, which rolls back, too.


@lru_cache(maxsize=256)
def _psycopg_form(sql: str) -> Any:
    return re.sub(r"(?<!:):([a-z_]+)", r"%(\1)s", sql)


def _parameters(dsn: str, name: str) -> dict[str, Any]:
    try:
        parameters = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        # Not the driver's words, which may quote a password.
        raise ConfigError(
            f"log {name!r}: is no URL that PostgreSQL reads; write it as {_URL_FORM}, and %40 for an @ in a "
            "password"
        ) from None
    defaults = {
        "application_name": "cai_graph",
        "client_encoding": "UTF8",
        "connect_timeout": CONNECT_S,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    return {**defaults, **parameters}


def _is_of_the_data(error: psycopg.Error) -> bool:
    """Whether the server refuses a value: one that is too large, above all."""
    return isinstance(error, psycopg.DataError | psycopg.errors.ProgramLimitExceeded)


def _is_passing(error: psycopg.Error) -> bool:
    """Whether the same may work later, on a new connection."""
    if isinstance(error, psycopg.errors.DiskFull):
        return False
    return isinstance(
        error,
        psycopg.OperationalError
        | psycopg.InterfaceError
        # After a failover the host that was written to may be a replica.
        | psycopg.errors.ReadOnlySqlTransaction
        # The log was removed while it was open; a new connection makes it anew.
        | psycopg.errors.UndefinedTable
        | psycopg.errors.InvalidSchemaName,
    )


def _first_line(error: psycopg.Error) -> str:
    return (error.diag.message_primary or str(error)).strip().partition("\n")[0]
