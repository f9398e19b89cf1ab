"""Opens PostgreSQL sessions for a log: bounded waits, a durable server, an up-to-date schema."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import psycopg

from cai_graph.errors import ConfigError, LogError

__all__ = ["LOCK", "READ_S", "SCHEMA", "WRITE_S", "Late", "Session", "connect", "parameters_of"]

SCHEMA = 1
"""The version of the tables that this release writes."""
CONNECT_S = 5
"""How long connecting to one host may take."""
WRITE_S = 15.0
"""How long a transaction of the writer may take, including the wait for the lock; plus 1 s a megabyte."""
READ_S = 300.0
"""How long one query of a reader may take."""

LOCK = 0x6361694700000001
"""The advisory lock that writers hold: `caiG`, and a number."""
_URL_FORM = "postgresql://USER@HOST:5432/DATABASE"

_SETTINGS = {
    "search_path": "cai_log",
    "client_min_messages": "warning",
    # A transaction sees what others committed before it got the lock, above all the ids of their records.
    "default_transaction_isolation": r"read\ committed",
    # Records are read in the order of an index, page by page. Without statistics on the table, the planner
    # would prefer to sort all remaining rows, again for each page.
    "enable_sort": "off",
    "enable_incremental_sort": "off",
    "statement_timeout": f"{READ_S:.0f}s",
    # A host that died, or a process that is suspended, must not keep the lock.
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


class Late(psycopg.OperationalError):
    """The server accepted a query and did not answer in time."""


class Session(psycopg.Connection[tuple[Any, ...]]):
    """A connection on which no operation takes longer than `seconds`; see `within`."""

    seconds = math.inf
    _ends = math.inf

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for `gen`, at most until the deadline; see `psycopg.Connection.wait`."""
        return super().wait(self._until_late(gen), *args, **kwargs)

    def _until_late(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if time.monotonic() > self._ends:
                    raise Late("the server does not answer")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Limit the time of the body's queries: past it they raise `Late`."""
        before = self.seconds, self._ends
        self.seconds, self._ends = seconds, time.monotonic() + seconds
        try:
            yield
        finally:
            self.seconds, self._ends = before

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Run the body in a transaction that holds the writers' lock, and commit it."""
        timeout = 0 if math.isinf(self.seconds) else int(self.seconds * 1000)
        self.execute(f"BEGIN; SET LOCAL statement_timeout = {timeout}; SELECT pg_advisory_xact_lock({LOCK})")
        try:
            yield
            self.execute("COMMIT")
        except psycopg.errors.UniqueViolation:
            self.execute("ROLLBACK")
            raise
        # After any other error the caller closes the session, which also rolls back.


def _create(db: Session) -> None:
    db.execute(_CREATE)


MIGRATIONS: dict[int, Callable[[Session], None]] = {0: _create}
"""Version n -> the function that migrates a log from version n to n + 1, inside one transaction."""


def parameters_of(dsn: str, name: str) -> dict[str, Any]:
    """Return the libpq parameters of a URL, with defaults that bound every wait, and with UTF-8 encoding.

    Raises:
        ConfigError: libpq cannot parse the URL.
    """
    try:
        parameters = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        # Without the driver's message, which may quote a password.
        raise ConfigError(
            f"log {name!r}: is no URL that PostgreSQL reads; write it as {_URL_FORM}, and %40 for an @ in a "
            "password"
        ) from None
    defaults = {
        "application_name": "cai_graph",
        "connect_timeout": CONNECT_S,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    # Other encodings cannot represent every text.
    return {**defaults, **parameters, "client_encoding": "UTF8"}


def connect(parameters: Mapping[str, Any], name: str, *, read_only: bool) -> Session:
    """Return a session with a log, creating a missing log and migrating an older one.

    Args:
        parameters: see `parameters_of`.
        name: the log's name in messages.
        read_only: create and change nothing.

    Raises:
        psycopg.Error: the server cannot be reached, or rejects the connection.
        LogError: with `read_only`, there is no log; or the schema `cai_log` is not a log of cai-graph or was
            written by a newer release; the database is not in UTF-8; or the server does not commit durably.
    """
    settings = {**_SETTINGS, "default_transaction_read_only": "on" if read_only else "off"}
    options = " ".join(f"-c {setting}={value}" for setting, value in settings.items())
    given = parameters.get("options") or os.environ.get("PGOPTIONS", "")
    # No prepared statements: each query is planned for the values in its filters.
    db = Session.connect(
        autocommit=True, prepare_threshold=None, **{**parameters, "options": f"{given} {options}"}
    )
    try:
        with db.within(WRITE_S):
            _check(db, name, read_only)
    except BaseException:
        db.close()
        raise
    return db


def _check(db: Session, name: str, read_only: bool) -> None:
    """Migrate the log, and reject a server whose encoding or durability settings do not suffice."""
    sql = """
        SELECT current_setting('server_encoding'), current_setting('fsync'),
               current_setting('synchronous_commit'), pg_is_in_recovery()
    """
    ((encoding, fsync, synchronous_commit, is_replica),) = db.execute(sql)
    if encoding != "UTF8":
        raise LogError(f"{name}: the database is in {encoding}; make one WITH ENCODING 'UTF8'")
    if not read_only:
        if is_replica:
            raise psycopg.errors.ReadOnlySqlTransaction("the server is a replica")
        if fsync != "on":
            raise LogError(
                f"{name}: the server runs with fsync = {fsync}, so a power cut loses what it has "
                "committed; set fsync = on, or keep the log elsewhere"
            )
        if synchronous_commit not in ("on", "remote_apply"):
            db.execute("SET synchronous_commit = on")
    version = _version(db, name)
    if version == SCHEMA:
        return
    if not read_only:
        _migrate(db, name)
    elif version == 0:
        raise LogError(f"{name}: there is no log in this database; `cai run` or `cai ask` makes one")


def _version(db: Session, name: str) -> int:
    """Return the schema version; 0 if there is no log."""
    ((is_log, others),) = db.execute(
        "SELECT to_regclass('cai_log.log') IS NOT NULL, "
        "EXISTS (SELECT FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE nspname = 'cai_log')"
    )
    if is_log:
        ((version,),) = db.execute("SELECT version FROM cai_log.log")
        if version > SCHEMA:
            raise LogError(
                f"{name}: schema version {version}, this release reads 1 to {SCHEMA}; "
                "upgrade cai-graph. The log is unchanged"
            )
        return int(version)
    if others:
        raise LogError(
            f"{name}: its schema 'cai_log' is no log of cai-graph; name another database, or drop the schema"
        )
    return 0


def _migrate(db: Session, name: str) -> None:
    with db.within(math.inf):
        while True:
            with db.turn():
                # Read again: another process may have been first.
                version = _version(db, name)
                if version == SCHEMA:
                    return
                MIGRATIONS[version](db)
                db.execute("UPDATE cai_log.log SET version = %s", (version + 1,))
