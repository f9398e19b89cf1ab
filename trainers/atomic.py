"""Writes folders atomically: complete or not at all, even if interrupted; also exports cai_graph.atomic."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cai_graph.atomic import file, sync_folder, write
from cai_graph.errors import ConfigError

__all__ = ["absent", "file", "folder", "readable", "sync", "sync_folder", "write"]

_MARK = ".unfinished"
"""Name of a file in an unfinished folder, locked by the process that writes the folder."""


def absent(path: Path) -> None:
    """Check that a path where a folder is to be created does not exist.

    Raises:
        ConfigError: it exists.
    """
    if path.exists():
        raise ConfigError(f"{path}: is there already; name a new folder, or remove it first")


@contextmanager
def folder(path: Path, *, mode: int = 0o755) -> Iterator[Path]:
    """Yield a work folder that is synced and renamed to `path` when the body ends, or removed if it fails.

    Work folders for the same path that killed processes left behind are removed first.

    Args:
        path: the folder to create.
        mode: its permissions.

    Raises:
        OSError: it cannot be created or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*/{_MARK}"):
        if _is_abandoned(left):
            shutil.rmtree(left.parent, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _marked(work):
            yield work
            readable(work, work / _MARK)
            work.chmod(mode)
            sync(work)
        os.replace(work, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def readable(folder: Path, like: Path) -> None:
    """Give the weights in a folder the mode of the file `like`: safetensors writes them for the owner only.

    Raises:
        OSError: one of them belongs to another user.
    """
    for path in folder.rglob("*.safetensors"):
        path.chmod(stat.S_IMODE(like.stat().st_mode))


def sync(folder: Path) -> None:
    """Sync every file of a folder to disk.

    Raises:
        OSError: one cannot be read or written.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path not in _own:  # closing it would release its lock
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


_own: set[Path] = set()
"""Locked mark files of this process: opening and closing one would release its lock."""


@contextmanager
def _marked(work: Path) -> Iterator[None]:
    """Mark a folder as being written by this process while the body runs."""
    mark, new = work / _MARK, work / f"{_MARK}.new"
    with new.open("w") as file:
        _lock(file.fileno())
        _own.add(mark)
        new.rename(mark)  # renamed once locked, so that no process sees an unlocked mark
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)
            _own.discard(mark)


def _is_abandoned(mark: Path) -> bool:
    """Return whether the process that was writing a folder has ended."""
    if mark in _own:
        return False
    with contextlib.suppress(OSError), mark.open("r+") as file:
        return _lock(file.fileno()) and mark.exists()  # it is gone if the folder was finished just now
    return False


def _lock(file: int) -> bool:
    """Lock a file until this process closes it, and return whether that worked; forks do not inherit it."""
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
