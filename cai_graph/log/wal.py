"""The WAL beside a log's file that is not that file's: it is set aside, so that nothing in it is lost.

SQLite takes any `cai.db-wal` for that of `cai.db`. Where the file was moved away while a process had it open,
or after a crash, the WAL stays behind with records that were committed. A new file is empty, and beside an
empty one SQLite deletes the WAL; to one that was put in its place SQLite would apply it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cai_graph.log.alarm import say

__all__ = ["is_at_rest", "make", "set_aside", "wal_of"]

_HEADER = 32
"""Bytes before the first frame."""


def wal_of(path: Path) -> bytes | None:
    """Return what tells the WAL beside a file from any other; None where it holds nothing."""
    try:
        with open(f"{path}-wal", "rb", buffering=0) as file:
            header = file.read(_HEADER)  # with two random numbers in it
            return header if file.read(1) else None
    except OSError:
        return None


def make(path: Path) -> None:
    """Make an empty file, unless there is one, without a WAL.

    Raises:
        OSError: it cannot be made.
    """
    with _alone_in(path.parent):
        if not path.exists():
            _clear(path)
            # Readable by its owner alone, since it holds what users wrote. O_EXCL: closing a descriptor of a
            # file that SQLite has open would drop SQLite's locks on it.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        elif path.stat().st_size == 0 and wal_of(path) is not None:
            _clear(path)


def set_aside(path: Path, wal: bytes) -> None:
    """Set aside the WAL beside a path if it still is this one, that of a file which stands there no more."""
    with contextlib.suppress(OSError), _alone_in(path.parent):  # the folder may be gone, too
        if wal_of(path) == wal:
            _clear(path)


def is_at_rest(path: Path) -> bool:
    """Return whether no process has a log open, and this one could not help it to its WAL."""
    return not os.path.exists(f"{path}-wal") and not os.access(path.parent, os.W_OK)


def _clear(path: Path) -> None:
    wal = Path(f"{path}-wal")
    if wal_of(path) is not None:
        left = Path(f"{wal}.left-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")
        wal.rename(left)
        say(
            logging.ERROR,
            "%s: the file that stood here was moved or replaced, and its WAL stayed behind, with committed "
            "records in it. It is %s now: before anything opens the moved file, put it beside that, under "
            "the file's name and -wal",
            path,
            left,
        )
    wal.unlink(missing_ok=True)
    # Who still has the old file open shares his with those who have, too, and nobody else.
    Path(f"{path}-shm").unlink(missing_ok=True)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from making or setting aside in this folder."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
