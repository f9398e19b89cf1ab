"""Files that appear whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from cai_graph.errors import DataError

__all__ = ["file", "output", "sync_folder", "write"]


@contextmanager
def file(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Give an empty file to fill that stands at `path` once the body has ended, on the disk, or goes away.

    What stood at `path` before stands until then. While it is filled, only its owner can read it.

    Args:
        path: the file to make, in a folder that is there.
        mode: who may read it in the end; 0o600 for what holds users' texts.

    Raises:
        OSError: it cannot be made or written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    work = Path(name)
    try:
        yield work
        work.chmod(mode)
        _sync(work)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a text file as UTF-8; see `file`.

    Raises:
        OSError: it cannot be written there.
    """
    with file(path, mode=mode) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def output(path: str | None) -> Iterator[TextIO]:
    """Give where the ASCII text that a command makes goes: a `file` readable by its owner alone.

    None is standard output, on which it appears as it is written.

    Raises:
        DataError: the file cannot be written there, or the shell has closed standard output.
    """
    if path is None:
        if sys.stdout is None:
            raise DataError("standard output is closed; name a file with -o")
        yield sys.stdout
        return
    target = Path(path)
    # Where even the look fails, the writing says why.
    if os.path.exists(target) and not os.path.isfile(target):
        raise DataError(f"{target}: is not a plain file; name one, or leave -o out for standard output")
    with ExitStack() as stack:
        try:
            work = stack.enter_context(file(target, mode=0o600))
        except OSError as error:
            raise DataError(f"{target}: cannot be written: {error.strerror}") from error
        yield stack.enter_context(work.open("w", encoding="ascii"))


def sync_folder(folder: Path) -> None:
    """Put on the disk which files a folder has.

    Raises:
        OSError: it cannot be read.
    """
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
