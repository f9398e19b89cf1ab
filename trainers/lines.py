"""JSON lines that grow, and survive a kill: it tears the last line at most, which is cut off and made again.

read     the rows of a file that is whole
resume   the rows of a file that grew until its run ended, to go on with
append   adds a row
keep     drops the rows that are not wanted
Lines    a file that grows beside its name, and takes it once it is whole
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from cai_graph.errors import DataError
from trainers import whole

__all__ = ["Lines", "Row", "append", "keep", "read", "resume", "text"]

Row = dict[str, Any]

_ADVICE = "delete the file and run again"


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as lines, in ASCII: no character of theirs ends a line, and lone surrogates survive."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path, advice: str = _ADVICE) -> list[Row]:
    """Return the rows of a file that is whole; none where it is not there.

    Args:
        path: the file.
        advice: what to do about a damaged one, for its error.

    Raises:
        DataError: a line is no JSON; names it.
    """
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path} line {number}: no JSON: {error}; {advice}") from error
    return rows


def resume(path: Path, advice: str = _ADVICE) -> list[Row]:
    """Return the rows of a file that is to grow on, as `read`; a torn last line is cut off before.

    Only for the one process that writes the file: to another, a line under way looks torn.

    Raises:
        DataError: a whole line is no JSON; names it.
        OSError: the file cannot be written.
    """
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return read(path, advice)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file that is whole or was resumed, or begin one.

    The row survives a kill of this process from then on, though not a failure of the power.

    Raises:
        OSError: it cannot be written; part of it may be, which `resume` cuts off.
    """
    with path.open("ab") as file:
        file.write(text([row]).encode("ascii"))


def keep(path: Path, wanted: Callable[[Row], bool], advice: str = _ADVICE) -> None:
    """Resume a file, and drop its rows that are not wanted; it is written anew, whole.

    Raises:
        DataError: a whole line is no JSON; names it.
        OSError: the file cannot be written.
    """
    if path.exists():
        whole.write(path, text(row for row in resume(path, advice) if wanted(row)))


class Lines:
    """A file of rows. While it grows it is `NAME.part`, of which a torn last line is lost and no more.

    Used as a context: it is locked, so that two runs do not write the same file.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        """Name a file; `key` are the fields that tell its rows apart."""
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        """What it holds, by key."""
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
        with self._lock:  # until the file is gone, so that it is not another run's by then
            if not self._part.stat().st_size:
                self._part.unlink()

    def _hold(self) -> None:
        import fcntl  # which Windows has not

        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{self.path}: another run is writing it; wait for its end") from error

    def _take(self, rows: Iterable[Row]) -> None:
        self.rows.update((tuple(row[field] for field in self._key), row) for row in rows)

    def add(self, row: Row) -> None:
        """Keep a row; it survives the process before the next one is asked for.

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
        """Give the file its name, with all rows in the order of their keys; of no row there is no file.

        Raises:
            DataError: it cannot be written.
        """
        if not self.rows:
            return
        rows = (self.rows[key] for key in sorted(self.rows, key=json.dumps))
        try:
            whole.write(self.path, text(rows))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._lock.truncate(0)
