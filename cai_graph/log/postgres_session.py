"""Sessions with a log in PostgreSQL: every wait has an end, the server is one that keeps what it commits, and
the schema is up to date.
"""

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
"""How long a transaction of the writer may take, its turn included, beside a second for each megabyte."""
READ_S = 300.0
"""How long one query of a reader may take."""

LOCK = 0x6361694700000001
"""The advisory lock that writers hold: `caiG`, and a number."""
_URL_FORM = "postgresql://USER@HOST:5432/DATABASE"

_SETTINGS = {
    "search_path": "cai_log",
    "client_min_messages": "warning",
    # A transaction sees what others have committed until its turn came, above all the ids of their records.
    "default_transaction_isolation": r"read\ committed",
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


class Late(psycopg.OperationalError):
    """The server took a query and did not answer in time."""


class Session(psycopg.Connection[tuple[Any, ...]]):
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
                    raise Late("the server does not answer")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Fail with `Late` what takes longer."""
        before = self.seconds, self._ends
        self.seconds, self._ends = seconds, time.monotonic() + seconds
        try:
            yield
        finally:
            self.seconds, self._ends = before

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A transaction that no other writer's overlaps."""
        timeout = 0 if math.isinf(self.seconds) else int(self.seconds * 1000)
        self.execute(f"BEGIN; SET LOCAL statement_timeout = {timeout}; SELECT pg_advisory_xact_lock({LOCK})")
        try:
            yield
            self.execute("COMMIT")
        except psycopg.errors.UniqueViolation:
            self.execute("ROLLBACK")
            raise
        # After any other error the session is closed, which rolls back, too.


def _create(db: Session) -> None:
    db.execute(_CREATE)


MIGRATIONS: dict[int, Callable[[Session], None]] = {0: _create}
"""Version n -> what turns a log of version n into version n + 1, inside one transaction."""


def parameters_of(dsn: str, name: str) -> dict[str, Any]:
    """Return the parameters of libpq that a URL says, beside those that bound every wait, in UTF-8.

    Raises:
        ConfigError: it is no URL that PostgreSQL reads.
    """
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
        "connect_timeout": CONNECT_S,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    # In another encoding there are texts that it cannot write.
    return {**defaults, **parameters, "client_encoding": "UTF8"}


def connect(parameters: Mapping[str, Any], name: str, *, read_only: bool) -> Session:
    """Return a session with a log; an absent one is made, an older one brought up to date.

    Args:
        parameters: see `parameters_of`.
        name: how messages call the log.
        read_only: makes and changes nothing.

    Raises:
        psycopg.Error: the server cannot be reached, or refuses.
        LogError: the log is absent, no log or a newer release's; or the server does not keep what it commits.
    """
    settings = {**_SETTINGS, "default_transaction_read_only": "on" if read_only else "off"}
    options = " ".join(f"-c {setting}={value}" for setting, value in settings.items())
    given = parameters.get("options") or os.environ.get("PGOPTIONS", "")
    # Nothing is prepared: each query is planned for the values in its filters.
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
    """Bring the log up to date, and refuse what does not keep its promises."""
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
