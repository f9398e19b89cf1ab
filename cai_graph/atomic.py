"""Writes files atomically: a file appears complete or not at all, whatever interrupts the writing."""

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
    """Yield the path of an empty temporary file; when the body ends, it is synced and replaces `path`.

    Where the body raises, the temporary file is deleted and `path` stays as it was. While it is written, only
    its owner can read it.

    Args:
        path: the file to write, in an existing folder.
        mode: its permissions in the end; 0o600 for files with users' texts.

    Raises:
        OSError: it cannot be created or written.
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
    """Write a text file atomically, as UTF-8; see `file`.

    Raises:
        OSError: it cannot be written there.
    """
    with file(path, mode=mode) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def output(path: str | None) -> Iterator[TextIO]:
    """Yield the text stream for a command's ASCII output: an atomic `file` that only its owner can read.

    With None it is standard output, where text appears as it is written.

    Raises:
        DataError: the file cannot be written, or the shell has closed standard output.
    """
    if path is None:
        if sys.stdout is None:
            raise DataError("standard output is closed; name a file with -o")
        yield sys.stdout
        return
    target = Path(path)
    # Where the path cannot even be examined, opening it below raises the reason.
    if os.path.exists(target) and not os.path.isfile(target):
        raise DataError(f"{target}: is not a plain file; name one, or leave -o out for standard output")
    with ExitStack() as stack:
        try:
            work = stack.enter_context(file(target, mode=0o600))
        except OSError as error:
            raise DataError(f"{target}: cannot be written: {error.strerror}") from error
        yield stack.enter_context(work.open("w", encoding="ascii"))


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that files created, renamed or deleted in it stay so.

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
