"""The prompts of a file through a wrapped model into its log, and what they came to."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from cai_graph.bulk.rows import Broken, Prompt, Rows
from cai_graph.calls import describe
from cai_graph.chain import ConstitutionalChatModel
from cai_graph.concurrency.together import side_by_side, until
from cai_graph.failures import is_about_all_rows
from cai_graph.log import Log
from cai_graph.trajectory import Outcome, Trajectory

__all__ = ["Failed", "Run", "Summary"]


@dataclass(frozen=True)
class Failed:
    """A row that was read and could not be answered; the next run of the file tries it again."""

    index: int
    """Place among the rows, from 0."""
    line: int
    """Line of the file in which it begins, from 1."""
    why: str
    """Class and message of the error."""


@dataclass
class Summary:
    """What the Trajectories of a run came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Trajectories by outcome."""
    violated: Counter[str] = field(default_factory=Counter)
    """Trajectories whose draft violated it, by principle id or aim."""
    calls: int = 0
    """Generations."""
    forward_passes: int = 0
    """Calls that wrote no token."""
    input_tokens: int = 0
    """Tokens of prompts, where the provider counts."""
    output_tokens: int = 0
    """Tokens written, where the provider counts."""
    skipped: list[Broken | Failed] = field(default_factory=list)
    """Rows without an answer."""

    @property
    def answered(self) -> int:
        """Rows with an answer."""
        return sum(self.outcomes.values())

    @property
    def revised_share(self) -> float:
        """Share of the answers that are revisions, from 0 to 1."""
        return self.outcomes[Outcome.REVISED] / self.answered if self.outcomes else 0.0

    def add(self, trajectory: Trajectory) -> None:
        """Count one Trajectory."""
        self.outcomes[trajectory.outcome.value] += 1
        self.violated.update(trajectory.violated)
        for call in trajectory.calls:
            self.calls += call.kind == "generation"
            self.forward_passes += call.kind == "forward"
            self.input_tokens += call.input_tokens or 0
            self.output_tokens += call.output_tokens or 0


class Run:
    """The prompts of a file, through a wrapped model into its log.

    Attributes:
        prefix: what the source key of each of its Trajectories starts with.
        rows: how many rows it has, up to the limit.
        done: how many of them were answered before.
        summary: what the run came to, earlier parts of it included.
    """

    def __init__(
        self,
        guarded: ConstitutionalChatModel,
        rows: Rows,
        *,
        drafting: Mapping[str, Any],
        column: str | None = None,
        limit: int | None = None,
    ) -> None:
        """Read the rows once and the log, so that what cannot work is said before the first call.

        Args:
            guarded: the wrapped chat model; it must have a log.
            rows: the prompts.
            drafting: what else shapes the drafts, as JSON: the model's name and its settings.
            column: see `Rows.prompts`.
            limit: only so many rows, from the first.

        Raises:
            ConfigError: the column is missing.
            DataError: the file cannot be read.
            LogError: the log cannot be read.
        """
        assert guarded.plan.log is not None
        self._guarded = guarded
        self._read = partial(rows.prompts, column)
        self._limit = limit
        shaping = {
            "constitution": guarded.plan.constitution.digest,
            "settings": guarded.plan.recorded_settings,
            "drafting": drafting,
            "column": column,
            "format": rows.format,
        }
        digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode("ascii")).hexdigest()
        self.prefix = f"run:{rows.digest[:16]}/{digest[:16]}/"
        self.rows = sum(1 for _ in self._prompts())
        self.summary = Summary()
        self._done = self._answered(guarded.plan.log)
        self.done = len(self._done)

    def _prompts(self) -> Iterator[Prompt | Broken]:
        return islice(self._read(), self._limit)

    def _answered(self, log: Log) -> set[int]:
        """Return the rows that need no further call, and count them. A row that failed is tried again."""
        done: set[int] = set()
        for record in log.read(kind="trajectory", source=self.prefix):
            index = int((record.source or "").removeprefix(self.prefix))
            # Two runs at once answer a row twice.
            if record.outcome is not Outcome.FAILED and index < self.rows and index not in done:
                done.add(index)
                self.summary.add(record)
        return done

    async def results(
        self, concurrency: int, *, stopped: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[Trajectory | Broken | Failed, None]:
        """Yield what becomes of each row that is not done, as each ends; all are in `summary` by then.

        Args:
            concurrency: how many rows are under way at once.
            stopped: once it returns True, no further row is begun, and those under way are finished.

        Raises:
            ConfigError, MissingExtra, LogError: what would fail every further row.
            Exception: the same of a provider, such as a refused key.
        """
        waiting = (row for row in self._prompts() if isinstance(row, Broken) or row.index not in self._done)
        begun = until(waiting, stopped)
        async with contextlib.aclosing(side_by_side(begun, self._answer, concurrency)) as ended:
            async for result in ended:
                if isinstance(result, Trajectory):
                    self.summary.add(result)
                else:
                    self.summary.skipped.append(result)
                yield result

    async def _answer(self, row: Prompt | Broken) -> Trajectory | Broken | Failed:
        if isinstance(row, Broken):
            return row
        try:
            answered = await self._guarded.answered(
                row.messages, {"metadata": row.metadata}, source=f"{self.prefix}{row.index}"
            )
        except Exception as error:
            if is_about_all_rows(error, succeeded=self.summary.answered > 0):
                raise
            return Failed(row.index, row.line, describe(error))
        return answered.trajectory
