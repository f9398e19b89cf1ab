"""The WAL beside a log's file that SQLite would lose records of: it is set aside first.

SQLite takes any `cai.db-wal` for that of `cai.db`. Where the file was moved away while a process had it open,
or after a crash, the WAL stays behind with records that were committed. A new file is empty, and beside an
empty one SQLite deletes the WAL; to one that was put in its place SQLite would apply it.

Of a WAL that was left by a crash SQLite reads what stands before the first frame that is damaged, and writes
over the rest. The format: https://www.sqlite.org/fileformat2.html#walformat.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import apsw

from cai_graph import whole
from cai_graph.errors import LogError
from cai_graph.log.alarm import say

__all__ = ["copies_of", "is_at_rest", "keep_unread", "make", "set_aside", "unread_of", "wal_of"]

_HEADER = 32
"""Bytes before the first frame."""
_FRAME = 24
"""Bytes of a frame before its page: the page's number, the size of the file where it ends a transaction or 0,
the salts, which the header has, too, and a checksum over all frames up to it."""
_BIG_ENDIAN = bytes.fromhex("377f0683")
"""The first bytes of a WAL whose checksums are over big-endian words."""
_PART = 1 << 20
"""Bytes that are compared at a time."""
_DAMAGED = "-wal.damaged-"
_LEFT = "-wal.left-"
"""What stands in the names of copies between the log's own and the time."""


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


def copies_of(path: Path) -> list[Path]:
    """Return the files that `set_aside` and `keep_unread` made beside a log."""
    prefixes = (f"{path.name}{_DAMAGED}", f"{path.name}{_LEFT}")
    with contextlib.suppress(OSError):
        return sorted(file for file in path.parent.iterdir() if file.name.startswith(prefixes))
    return []


def unread_of(path: Path, db: apsw.Connection) -> str | None:
    """Return what to say where damage to its WAL hides committed transactions; None where it hides none, or a
    copy has them.

    A power cut may tear the last transaction, which was not acknowledged then; but one that others follow was
    whole once. So damage to the last one does not show.

    Args:
        path: the log.
        db: a connection to it, outside a transaction.
    """
    while (header := wal_of(path)) is not None and (frames := _frames_read(db)) >= 0:
        hidden = _hidden(path, header, frames, int(db.pragma("page_size")))
        if hidden is None or any(_ends_alike(Path(f"{path}-wal"), copy, hidden) for copy in copies_of(path)):
            break
        # Other processes may write meanwhile, or begin the WAL anew.
        if (wal_of(path), _frames_read(db)) == (header, frames):
            return (
                f"the WAL is damaged after frame {frames}, and what was committed behind it cannot be read; "
                "`cai log recover` saves it, before anything writes to the log"
            )
    return None


def keep_unread(path: Path, db: apsw.Connection, unread: str, *, read_only: bool) -> None:
    """Say what SQLite does not read of a WAL, and copy that before anything is written over it.

    Raises:
        LogError: it cannot be copied.
    """
    if read_only:
        say(logging.ERROR, "%s: %s", path, unread)
        return
    try:
        with _alone_in(path.parent):
            if unread_of(path, db) is None:  # another process was first
                return
            kept = _name(path, _DAMAGED)
            with whole.file(kept, mode=0o600) as work:
                shutil.copyfile(f"{path}-wal", work)
            say(
                logging.ERROR,
                "%s: %s. This may write to it, so the WAL was copied to %s: copy the log, too, put that "
                "beside the copy, under its name and -wal, and recover the copy",
                path,
                unread,
                kept,
            )
            # A reader may be in the way; then it stays, partly written over, until SQLite begins it anew.
            with contextlib.suppress(apsw.BusyError, apsw.LockedError):
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except OSError as error:
        raise LogError(f"{path}: {unread}; nor can it be copied: {error.strerror}") from error


def _frames_read(db: apsw.Connection) -> int:
    """Return how many frames SQLite reads; -1 where there is no WAL for it, or it cannot tell now."""
    try:
        return db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0]
    except (apsw.ReadOnlyError, apsw.BusyError, apsw.LockedError):
        return -1  # Busy: another process, which has looked, moves it into the file.


def _hidden(path: Path, header: bytes, frames: int, page_size: int) -> int | None:
    """Return where a transaction begins that was written on another behind the frames that SQLite reads of a
    WAL; None where there is none.
    """
    order = ">" if header.startswith(_BIG_ENDIAN) else "<"
    # Other salts are left from before the WAL began anew. Those of a damaged header are not known.
    salts = header[16:24] if _checksum(header[:24], bytes(8), order) == header[24:] else None
    size = _FRAME + page_size
    # The WAL may be removed while it is open; then there is nothing behind.
    with contextlib.suppress(FileNotFoundError), open(f"{path}-wal", "rb", buffering=0) as file:
        previous = bytes(_FRAME)
        for start in range(_HEADER + frames * size, os.fstat(file.fileno()).st_size - size + 1, size):
            frame = os.pread(file.fileno(), _FRAME, start)
            follows_commit = any(previous[4:8]) and frame[8:16] == previous[8:16]
            if follows_commit and salts in (None, frame[8:16]):
                page = os.pread(file.fileno(), page_size, start + _FRAME)
                if _checksum(frame[:8] + page, previous[16:], order) == frame[16:]:
                    return start
            previous = frame
    return None


def _ends_alike(wal: Path, copy: Path, start: int) -> bool:
    """Return whether a copy holds what a WAL holds from there on, at the same place."""
    with contextlib.suppress(OSError), wal.open("rb") as one, copy.open("rb") as other:
        one.seek(start)
        other.seek(start)
        while (part := one.read(_PART)) == other.read(_PART):
            if not part:
                return True
    return False


def _checksum(data: bytes, before: bytes, order: str) -> bytes:
    """Return the checksum that a WAL has of this data behind what `before` is the checksum of."""
    one, two = struct.unpack(">2I", before)
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for first, second in zip(words, words, strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return struct.pack(">2I", one, two)


def _clear(path: Path) -> None:
    wal = Path(f"{path}-wal")
    if wal_of(path) is not None:
        left = _name(path, _LEFT)
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


def _name(path: Path, kind: str) -> Path:
    """Return the name of a copy that is made now."""
    return Path(f"{path}{kind}{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")


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
