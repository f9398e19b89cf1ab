"""Defines the tables of a log in SQLite, and the migrations from older schema versions.

`cai_graph.log.store` describes their contents.
"""

from __future__ import annotations

from collections.abc import Callable

import apsw

__all__ = ["APPLICATION_ID", "MIGRATIONS", "SCHEMA"]

APPLICATION_ID = 0x63616947
"""`caiG`, in the header of every log."""
SCHEMA = 3
"""The version of the tables that this release writes."""


def _create(db: apsw.Connection) -> None:
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(
        """
        CREATE TABLE records (
            position      INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice, so `after` holds
            id            TEXT    NOT NULL UNIQUE,
            kind          TEXT    NOT NULL,
            writer        TEXT    NOT NULL,
            sequence      INTEGER NOT NULL,
            at            INTEGER NOT NULL,                   -- microseconds since 1970 UTC
            trajectory_id TEXT,
            outcome       TEXT,
            constitution  TEXT,
            source        TEXT,
            tags          TEXT,                               -- JSON array
            withheld      INTEGER NOT NULL,
            digest        BLOB    NOT NULL,
            chain         BLOB    NOT NULL,
            payload       BLOB    NOT NULL                    -- last: the columns are read without it
        ) STRICT;
        CREATE INDEX records_trajectory ON records (trajectory_id) WHERE trajectory_id IS NOT NULL;
        CREATE INDEX records_source ON records (source) WHERE source IS NOT NULL;
        CREATE TABLE tombstones (
            position   INTEGER PRIMARY KEY,
            id         TEXT    NOT NULL UNIQUE,
            kind       TEXT    NOT NULL,
            writer     TEXT    NOT NULL,
            sequence   INTEGER NOT NULL,
            digest     BLOB    NOT NULL,
            chain      BLOB    NOT NULL,
            removed_at INTEGER NOT NULL,                      -- microseconds since 1970 UTC
            why        TEXT    NOT NULL
        ) STRICT;
        """
    )


def _add_indexes(db: apsw.Connection) -> None:
    # SQLite appends the rowid, here the position, to each index, so that each has the order of reading.
    db.execute(
        """
        CREATE INDEX records_kind ON records (kind) WHERE trajectory_id IS NOT NULL;  -- few are no Trajectory
        CREATE INDEX records_outcome ON records (outcome) WHERE outcome IS NOT NULL;
        CREATE INDEX records_constitution ON records (constitution) WHERE constitution IS NOT NULL;
        CREATE INDEX records_at ON records (at);
        CREATE INDEX records_tags ON records (position, tags) WHERE tags IS NOT NULL;
        CREATE INDEX records_withheld ON records (withheld) WHERE withheld = 1;
        -- An id may be appended again after it was removed, and be removed again.
        CREATE TABLE buried (
            position   INTEGER PRIMARY KEY,
            id         TEXT    NOT NULL,
            kind       TEXT    NOT NULL,
            writer     TEXT    NOT NULL,
            sequence   INTEGER NOT NULL,
            digest     BLOB    NOT NULL,
            chain      BLOB    NOT NULL,
            removed_at INTEGER NOT NULL,                      -- microseconds since 1970 UTC
            why        TEXT    NOT NULL
        ) STRICT;
        INSERT INTO buried SELECT * FROM tombstones;
        DROP TABLE tombstones;
        ALTER TABLE buried RENAME TO tombstones;
        CREATE INDEX tombstones_id ON tombstones (id);
        """
    )


def _join_indexes(db: apsw.Connection) -> None:
    # A commit writes a page of every index that it adds to, whatever the size of the record. With one index
    # in the order of positions, a filter skips the records that do not match without reading their payloads.
    db.execute(
        """
        DROP INDEX records_outcome;
        DROP INDEX records_constitution;
        DROP INDEX records_at;
        DROP INDEX records_tags;
        CREATE INDEX records_filtered ON records (position, at, outcome, constitution, tags);
        """
    )


MIGRATIONS: dict[int, Callable[[apsw.Connection], None]] = {0: _create, 1: _add_indexes, 2: _join_indexes}
"""Version n -> the function that migrates a file from version n to n + 1, inside one transaction."""
