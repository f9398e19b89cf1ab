"""Collects the Comparisons, Reviews and Feedback about each Trajectory, for lookup while its rows are made.

They may be appended to the log long after the Trajectory. So they are collected in a temporary database, by
Trajectory id, before any row is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import apsw

from cai_graph.trajectory import Comparison, Feedback, Review, decode
from trainers.dataset.reading import Stretch, appended

__all__ = ["NO_EVIDENCE", "Evidence", "EvidenceFile", "Gathered", "Mapped", "gather"]

_BATCH = 500
_BUSY_MS = 60_000


class Evidence(NamedTuple):
    """What was appended about one Trajectory, in the order of the log."""

    comparisons: tuple[Comparison, ...] = ()
    reviews: tuple[Review, ...] = ()
    feedback: tuple[Feedback, ...] = ()


NO_EVIDENCE = Evidence()


class EvidenceFile:
    """The evidence of a whole build on disk; several processes may write and read it concurrently."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = apsw.Connection(str(path))
        self._db.set_busy_timeout(_BUSY_MS)
        # Temporary: if the build fails, the file is discarded, so it need not survive a crash.
        self._db.execute("PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS evidence (about TEXT, place INTEGER, payload BLOB, "
            "PRIMARY KEY (about, place)) WITHOUT ROWID"
        )

    def add(self, rows: list[tuple[str, int, bytes]]) -> None:
        """Add rows of (Trajectory id, place in the log, encoded record)."""
        with self._db:
            self._db.executemany("INSERT INTO evidence VALUES (?, ?, ?)", rows)

    def trajectories(self) -> int:
        """Return the number of Trajectories with evidence."""
        return int(next(self._db.execute("SELECT count(DISTINCT about) FROM evidence"))[0])

    def of(self, trajectory_id: str) -> Evidence:
        """Return the evidence about a Trajectory; the object `NO_EVIDENCE` if there is none."""
        sql = "SELECT payload FROM evidence WHERE about = ? ORDER BY place"
        records = [decode(payload) for (payload,) in self._db.execute(sql, (_key(trajectory_id),))]
        if not records:
            return NO_EVIDENCE
        return Evidence(
            tuple(record for record in records if isinstance(record, Comparison)),
            tuple(record for record in records if isinstance(record, Review)),
            tuple(record for record in records if isinstance(record, Feedback)),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()


class Gathered(NamedTuple):
    """The result of `gather`."""

    path: Path | None
    """The file for `EvidenceFile`; None if there is no evidence."""
    trajectories: int
    """Number of Trajectories with evidence."""


Mapped = Callable[..., Iterable[Any]]
"""A function like `map`, which may run in this process or in others."""


def gather(mapped: Mapped, path: Path, stretches: Sequence[Stretch]) -> Gathered:
    """Collect the Comparisons, Reviews and Feedback of the stretches in a file at `path`."""
    if not any(list(mapped(partial(_gather, path), stretches, range(len(stretches))))):
        return Gathered(None, 0)
    with EvidenceFile(path) as file:
        return Gathered(path, file.trajectories())


def _gather(path: Path, stretch: Stretch, number: int) -> bool:
    """Add the evidence of one stretch; return whether there was any."""
    with contextlib.ExitStack() as stack:
        file = None
        rows: list[tuple[str, int, bytes]] = []
        for place, (about, payload) in enumerate(appended(stretch), number << 40):
            file = file or stack.enter_context(EvidenceFile(path))
            rows.append((_key(about), place, payload))
            if len(rows) == _BATCH:
                file.add(rows)
                rows = []
        if file is not None:
            file.add(rows)
        return file is not None


def _key(trajectory_id: str) -> str:
    # Escaped, since a lone surrogate has no UTF-8 form.
    return trajectory_id.encode("utf-8", "backslashreplace").decode()
