"""Runs the prompts of a file through a wrapped model, which logs the answers; resumes earlier runs."""

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
from cai_graph.chain import ConstitutionalChatModel
from cai_graph.concurrency.together import side_by_side, until
from cai_graph.failures import describe, is_about_all_rows
from cai_graph.log import Log
from cai_graph.trajectory import Outcome, Trajectory

__all__ = ["Failed", "Run", "Summary"]


@dataclass(frozen=True)
class Failed:
    """A row that was read but could not be answered; the next run of the file retries it."""

    index: int
    """Place among the rows, from 0."""
    line: int
    """Line of the file in which it begins, from 1."""
    why: str
    """Class and message of the error."""


@dataclass
class Summary:
    """The counts of a run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Trajectories by outcome."""
    violated: Counter[str] = field(default_factory=Counter)
    """Principle id or aim -> Trajectories whose draft violated it."""
    calls: int = 0
    """Calls that wrote tokens."""
    forward_passes: int = 0
    """Calls of kind `forward`."""
    input_tokens: int = 0
    """Tokens of prompts, where the provider reports them."""
    output_tokens: int = 0
    """Tokens written, where the provider reports them."""
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
    """A run of the prompts of a file through a wrapped model, which logs each Trajectory.

    Attributes:
        prefix: prefix of the source key of each of its Trajectories.
        rows: how many rows it has, up to the limit.
        done: how many of them earlier runs have answered.
        summary: the counts of the run, including those of earlier runs that it resumes.
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
        """Read all rows and the log, so that errors in them are raised before the first model call.

        Args:
            guarded: the wrapped chat model; it must have a log.
            rows: the prompts.
            drafting: what else affects the drafts, as JSON: the model's name and its settings.
            column: see `Rows.prompts`.
            limit: the number of rows to use, from the first; None: all.

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
        """Return the indexes of the rows that the log has answers for, and add these to the summary.

        A row that failed is not among them, so that it is retried.
        """
        done: set[int] = set()
        for record in log.read(kind="trajectory", source=self.prefix):
            index = int((record.source or "").removeprefix(self.prefix))
            # A row may have two answers, where two runs were made at once.
            if record.outcome is not Outcome.FAILED and index < self.rows and index not in done:
                done.add(index)
                self.summary.add(record)
        return done

    async def results(
        self, concurrency: int, *, stopped: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[Trajectory | Broken | Failed, None]:
        """Answer the rows that are not done, and yield each result once it is in `summary`, in any order.

        Args:
            concurrency: how many rows are answered at once.
            stopped: once it returns True, no further row is begun, and those in progress are finished.

        Raises:
            ConfigError, MissingExtra, LogError: an error that every further row would raise.
            Exception: such an error of a provider, for example a rejected API key.
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
