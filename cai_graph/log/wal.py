"""Saves a copy of an orphaned or damaged WAL before SQLite would lose the records in it.

SQLite assumes that any `cai.db-wal` belongs to `cai.db`. If the file is moved away while a process has it
open, or after a crash, its WAL stays behind with committed records. SQLite deletes a WAL that it finds beside
a new, empty file, and would apply it to another file that was put in the old one's place.

Of a WAL that a crash left, SQLite reads the frames before the first damaged one, and overwrites the rest.
Format: https://www.sqlite.org/fileformat2.html#walformat.
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

from cai_graph import atomic
from cai_graph.errors import LogError
from cai_graph.log.alarm import say

__all__ = ["copies_of", "is_at_rest", "keep_unread", "make", "set_aside", "unread_of", "wal_of"]

_HEADER = 32
"""Bytes before the first frame."""
_FRAME = 24
"""Bytes of a frame before its page: the page's number; the size of the file if the frame ends a transaction,
else 0; the salts of the header; and a checksum over all frames up to this one."""
_BIG_ENDIAN = bytes.fromhex("377f0683")
"""The first bytes of a WAL whose checksums are computed over big-endian words."""
_PART = 1 << 20
"""Bytes that are compared at a time."""
_DAMAGED = "-wal.damaged-"
_LEFT = "-wal.left-"
"""Infixes in the names of copies, between the log's name and the time."""


def wal_of(path: Path) -> bytes | None:
    """Return the header of a file's WAL, which identifies it; None if there is no WAL or it is empty."""
    try:
        with open(f"{path}-wal", "rb", buffering=0) as file:
            header = file.read(_HEADER)  # includes two random salts
            return header if file.read(1) else None
    except OSError:
        return None


def make(path: Path) -> None:
    """Create an empty file if there is none, and set aside any WAL beside an empty one.

    Raises:
        OSError: the file cannot be created.
    """
    with _alone_in(path.parent):
        if not path.exists():
            _clear(path)
            # Readable by its owner only, since it will contain users' texts. O_EXCL: closing a descriptor of
            # a file that SQLite has open would release SQLite's locks on it.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        elif path.stat().st_size == 0 and wal_of(path) is not None:
            _clear(path)


def set_aside(path: Path, wal: bytes) -> None:
    """Set aside the WAL beside a path if it still is `wal`, of a file that is no longer at the path."""
    with contextlib.suppress(OSError), _alone_in(path.parent):  # the folder may be gone, too
        if wal_of(path) == wal:
            _clear(path)


def is_at_rest(path: Path) -> bool:
    """Return whether a log has no WAL, so that no process has it open, and this process cannot create one."""
    return not os.path.exists(f"{path}-wal") and not os.access(path.parent, os.W_OK)


def copies_of(path: Path) -> list[Path]:
    """Return the files that `set_aside` and `keep_unread` made beside a log."""
    prefixes = (f"{path.name}{_DAMAGED}", f"{path.name}{_LEFT}")
    with contextlib.suppress(OSError):
        return sorted(file for file in path.parent.iterdir() if file.name.startswith(prefixes))
    return []


def unread_of(path: Path, db: apsw.Connection) -> str | None:
    """Return a message if damage to the WAL hides committed transactions; None if it hides none, or if a copy
    already has them.

    A power cut may tear the last transaction, which was then not acknowledged; but one that is followed by
    another was complete. So damage to the last transaction is not reported.

    Args:
        path: the log.
        db: a connection to it, outside a transaction.
    """
    while (header := wal_of(path)) is not None and (frames := _frames_read(db)) >= 0:
        hidden = _hidden(path, header, frames, int(db.pragma("page_size")))
        if hidden is None or any(_ends_alike(Path(f"{path}-wal"), copy, hidden) for copy in copies_of(path)):
            break
        # Checked again, as other processes may have written meanwhile, or restarted the WAL.
        if (wal_of(path), _frames_read(db)) == (header, frames):
            return (
                f"the WAL is damaged after frame {frames}, and what was committed behind it cannot be read; "
                "`cai log recover` saves it, before anything writes to the log"
            )
    return None


def keep_unread(path: Path, db: apsw.Connection, unread: str, *, read_only: bool) -> None:
    """Log that part of a WAL is unreadable for SQLite, and copy the WAL before that part is overwritten.

    With `read_only` it is only logged, as nothing will be overwritten.

    Args:
        path: the log.
        db: a connection to it, outside a transaction.
        unread: the message of `unread_of`.
        read_only: whether the connection only reads.

    Raises:
        LogError: the WAL cannot be copied.
    """
    if read_only:
        say(logging.ERROR, "%s: %s", path, unread)
        return
    try:
        with _alone_in(path.parent):
            if unread_of(path, db) is None:  # another process was first
                return
            kept = _name(path, _DAMAGED)
            with atomic.file(kept, mode=0o600) as work:
                shutil.copyfile(f"{path}-wal", work)
            say(
                logging.ERROR,
                "%s: %s. This may write to it, so the WAL was copied to %s: copy the log, too, put that "
                "beside the copy, under its name and -wal, and recover the copy",
                path,
                unread,
                kept,
            )
            # If a reader blocks this, the WAL remains, partly overwritten, until SQLite restarts it.
            with contextlib.suppress(apsw.BusyError, apsw.LockedError):
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except OSError as error:
        raise LogError(f"{path}: {unread}; nor can it be copied: {error.strerror}") from error


def _frames_read(db: apsw.Connection) -> int:
    """Return how many frames of the WAL SQLite reads; -1 if it has no WAL, or the number is not available."""
    try:
        return db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0]
    except (apsw.ReadOnlyError, apsw.BusyError, apsw.LockedError):
        return -1  # Busy: another process, which has done this check, is checkpointing.


def _hidden(path: Path, header: bytes, frames: int, page_size: int) -> int | None:
    """Return the offset of a transaction that follows another one and is beyond the frames that SQLite reads
    of a WAL; None if there is none.
    """
    order = ">" if header.startswith(_BIG_ENDIAN) else "<"
    # Frames with other salts are from before the WAL was restarted. If the header is damaged, its salts are
    # unknown.
    salts = header[16:24] if _checksum(header[:24], bytes(8), order) == header[24:] else None
    size = _FRAME + page_size
    # The WAL may be removed in the meantime; then it hides nothing.
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
    """Return whether a copy has the same bytes as a WAL from offset `start` to the end."""
    with contextlib.suppress(OSError), wal.open("rb") as one, copy.open("rb") as other:
        one.seek(start)
        other.seek(start)
        while (part := one.read(_PART)) == other.read(_PART):
            if not part:
                return True
    return False


def _checksum(data: bytes, before: bytes, order: str) -> bytes:
    """Return the WAL checksum of `data`, continued from the checksum `before`."""
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
    # Processes that still have the old file open keep sharing the deleted -shm file among themselves.
    Path(f"{path}-shm").unlink(missing_ok=True)


def _name(path: Path, kind: str) -> Path:
    """Return the path of a copy that is made now."""
    return Path(f"{path}{kind}{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock the folder, so that no other process creates a log or sets a WAL aside in it."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
