"""Folders that are whole or not there, whatever interrupts the writing, and the files of cai_graph.whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cai_graph.errors import ConfigError
from cai_graph.whole import file, sync_folder, write

__all__ = ["absent", "file", "folder", "readable", "sync", "sync_folder", "write"]

_MARK = ".unfinished"
"""In a folder under way: a file that the process that writes it has locked."""


def absent(path: Path) -> None:
    """Make sure that nothing stands where a folder is to be made.

    Raises:
        ConfigError: something does.
    """
    if path.exists():
        raise ConfigError(f"{path}: is there already; name a new folder, or remove it first")


@contextmanager
def folder(path: Path, *, mode: int = 0o755) -> Iterator[Path]:
    """Give a folder that stands at `path` once the body has ended, on the disk, or goes away.

    What a process that was killed left of one for the same path goes away first.

    Args:
        path: the folder to make.
        mode: who may read it.

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
            readable(work, work / _MARK)
            work.chmod(mode)
            sync(work)
        os.replace(work, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def readable(folder: Path, like: Path) -> None:
    """Give the weights in a folder the mode of the file `like`: safetensors writes for its owner alone.

    Raises:
        OSError: one of them is another user's.
    """
    for path in folder.rglob("*.safetensors"):
        path.chmod(stat.S_IMODE(like.stat().st_mode))


def sync(folder: Path) -> None:
    """Put every file of a folder on the disk.

    Raises:
        OSError: one cannot be read or written.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path not in _own:  # to close it would let go of its lock
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


_own: set[Path] = set()
"""Marks of this process: to open one would end its lock."""


@contextmanager
def _marked(work: Path) -> Iterator[None]:
    """Mark a folder as written by this process for as long as the body takes."""
    mark, new = work / _MARK, work / f"{_MARK}.new"
    with new.open("w") as file:
        _lock(file.fileno())
        _own.add(mark)
        new.rename(mark)  # so that nobody sees one that is not locked yet
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)
            _own.discard(mark)


def _is_abandoned(mark: Path) -> bool:
    """Return whether the process that wrote a folder is gone."""
    if mark in _own:
        return False
    with contextlib.suppress(OSError), mark.open("r+") as file:
        return _lock(file.fileno()) and mark.exists()  # which it does not where the folder was just finished
    return False


def _lock(file: int) -> bool:
    """Lock a file until this process closes it, and return whether that worked; children have no part."""
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
