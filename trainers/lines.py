"""JSON Lines files that grow during a run; if the run is killed, at most the last line is lost and redone.

read     the rows of a complete file
resume   the rows of a file that grew until its run ended, in order to append more
append   adds a row
keep     removes the rows that are not wanted
Lines    a file that grows under a temporary name, and is renamed once it is complete
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from cai_graph.errors import DataError
from trainers import atomic

__all__ = ["Lines", "Row", "append", "keep", "read", "resume", "text"]

Row = dict[str, Any]

_ADVICE = "delete the file and run again"


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as lines of ASCII: no character inside a row ends a line, and lone surrogates survive."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path, advice: str = _ADVICE) -> list[Row]:
    """Return the rows of a complete file; an empty list if it does not exist.

    Args:
        path: the file.
        advice: what to do about a damaged file, for the error message.

    Raises:
        DataError: a line is not JSON; the message gives its number.
    """
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path} line {number}: no JSON: {error}; {advice}") from error
    return rows


def resume(path: Path, advice: str = _ADVICE) -> list[Row]:
    """Return the rows of a file that is to be appended to, like `read`; first cut off a torn last line.

    Only for the one process that writes the file: to any other, a line being written looks torn.

    Raises:
        DataError: a complete line is not JSON; the message gives its number.
        OSError: the file cannot be written.
    """
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return read(path, advice)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file that is complete or was resumed, or create the file.

    From then on the row survives a kill of this process, but not a power failure.

    Raises:
        OSError: it cannot be written; a part of it may be in the file, which `resume` cuts off.
    """
    with path.open("ab") as file:
        file.write(text([row]).encode("ascii"))


def keep(path: Path, wanted: Callable[[Row], bool], advice: str = _ADVICE) -> None:
    """Resume a file, and remove the rows that are not wanted; the file is rewritten atomically.

    Raises:
        DataError: a complete line is not JSON; the message gives its number.
        OSError: the file cannot be written.
    """
    if path.exists():
        atomic.write(path, text(row for row in resume(path, advice) if wanted(row)))


class Lines:
    """A file of rows. While it grows it is `NAME.part`; a kill loses at most its torn last line.

    Used as a context manager: the file is locked, so that two runs do not write it at the same time.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        """Open no file yet; `key` are the fields that together identify a row."""
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        """Rows of the file, by key."""
        self._key = tuple(key)
        self._part = path.with_name(f"{path.name}.part")
        self._lock: BinaryIO

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._part.open("ab")
        try:
            self._hold()
            self._take(read(self.path))
            self._take(resume(self._part))
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        with self._lock:  # hold the lock until the file is gone, so that no other run has opened it by then
            if not self._part.stat().st_size:
                self._part.unlink()

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{self.path}: another run is writing it; wait for its end") from error

    def _take(self, rows: Iterable[Row]) -> None:
        self.rows.update((tuple(row[field] for field in self._key), row) for row in rows)

    def add(self, row: Row) -> None:
        """Append a row; it is in the file, and survives a kill, when this returns.

        Raises:
            DataError: it cannot be written.
        """
        try:
            append(self._part, row)
        except OSError as error:
            raise DataError(
                f"{self._part}: cannot be written: {error.strerror}; make room, run again"
            ) from error
        self._take([row])

    def finish(self) -> None:
        """Write the final file, with all rows in the order of their keys; without rows no file is made.

        Raises:
            DataError: it cannot be written.
        """
        if not self.rows:
            return
        rows = (self.rows[key] for key in sorted(self.rows, key=json.dumps))
        try:
            atomic.write(self.path, text(rows))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._lock.truncate(0)
