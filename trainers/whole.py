"""Files and folders that are whole or not there, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["folder", "sync", "sync_folder", "write"]

_MARK = ".unfinished"
"""In a folder under way: the id of the process that writes it, which holds a lock on the file."""


def write(path: Path, text: str) -> None:
    """Write a text file beside its place, put it on the disk, and rename it; an older one stands until then.

    Raises:
        OSError: it cannot be written there. Nothing half-written stays behind.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Give a folder that stands at `path` once the body has ended, on the disk, or goes away.

    What a process that was killed left of one for the same path goes away first.

    Raises:
        OSError: it cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*/{_MARK}"):
        if _is_abandoned(left):
            shutil.rmtree(left.parent, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _marked(work):
            yield work
        work.chmod(0o755)
        sync(work)
        os.replace(work, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sync(folder: Path) -> None:
    """Put every file of a folder on the disk.

    Raises:
        OSError: one cannot be read or written.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Put on the disk which files a folder has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _marked(work: Path) -> Iterator[None]:
    """Mark a folder as written by this process for as long as the body takes."""
    mark = work / _MARK
    with mark.with_suffix(".new").open("w") as file:
        file.write(str(os.getpid()))
        file.flush()
        _lock(file.fileno())
        os.rename(file.name, mark)  # so that nobody sees one that is not locked yet
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)


def _is_abandoned(mark: Path) -> bool:
    """Return whether the process that wrote a folder is gone."""
    with contextlib.suppress(OSError, ValueError), mark.open("r+") as file:
        return int(file.read()) != os.getpid() and _lock(file.fileno())
    return False


def _lock(file: int) -> bool:
    """Lock a file until it is closed, and return whether that worked; a child of a fork has no part in it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks, and what was left stays
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
