"""Judges the answers of a file with a critic, and yields the results in the order of the rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cai_graph.bulk.rows import Answer, Broken, Rows
from cai_graph.calls import UNATTENDED_SECONDS, Budget, Calls
from cai_graph.concurrency.together import side_by_side, until
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic, failed_principles
from cai_graph.failures import describe, is_about_all_rows
from cai_graph.trajectory import Critique, Label

__all__ = ["Judgement", "judge"]


@dataclass(frozen=True)
class Judgement:
    """The result of judging one row."""

    index: int
    """Place among the rows, from 0."""
    id: Any
    """The row's `id`, or else its index."""
    critique: Critique | None
    """The critic's Critique; None where there is an error."""
    error: str | None = None
    """Why there is no critique; None where there is one."""

    def violates(self, constitution: Constitution) -> bool:
        """Return whether the answer fails a principle, by the principles' `min_severity`."""
        return self.critique is not None and bool(failed_principles(self.critique, constitution))

    @property
    def unreadable(self) -> bool:
        """Whether a verdict could not be read."""
        return self.critique is not None and any(
            verdict.label is Label.UNREADABLE for verdict in self.critique.verdicts
        )

    def word(self, constitution: Constitution) -> str:
        """Return the result in one word: skipped, violates, unreadable or complies."""
        if self.critique is None:
            return "skipped"
        return "violates" if self.violates(constitution) else "unreadable" if self.unreadable else "complies"

    def line(self) -> str:
        """Return the result as one line of ASCII JSON: `id`, `verdicts` and `aims`, or `id` and `error`."""
        if self.critique is None:
            return json.dumps({"id": self.id, "error": self.error})
        verdicts: Sequence[dict[str, Any]] = msgspec.to_builtins(self.critique.verdicts)
        by_aim = {v.aim: v.probability for v in self.critique.verdicts if v.aim and v.probability is not None}
        aims = {**by_aim, **self.critique.readings}
        return json.dumps({"id": self.id, "verdicts": verdicts, "aims": aims})


async def judge(
    critic: Critic, constitution: Constitution, rows: Rows, concurrency: int
) -> AsyncGenerator[Judgement, None]:
    """Yield the judgement of each row, in the order of the rows.

    Raises:
        DataError: the file cannot be read.
        Exception: an error that every further row would raise, such as a rejected API key; raised once the
            judgements of all rows in progress have been yielded.
    """
    succeeded = False
    fatal: list[Exception] = []

    async def work(row: Answer | Broken) -> Judgement | None:
        nonlocal succeeded
        if isinstance(row, Broken):
            return Judgement(row.index, row.id, None, f"line {row.line}: {row.why}")
        try:
            calls = Calls(Budget(seconds=UNATTENDED_SECONDS))
            critique = await critic.critique(row.exchange, constitution, calls, explain=False)
        except Exception as error:
            if is_about_all_rows(error, succeeded=succeeded):
                fatal.append(error)
                return None
            return Judgement(row.index, row.id, None, f"line {row.line}: {describe(error)}")
        succeeded = True
        return Judgement(row.index, row.id, critique)

    early: dict[int, Judgement] = {}
    following = 0
    begun = until(rows.answers(), lambda: bool(fatal))
    async with contextlib.aclosing(side_by_side(begun, work, concurrency)) as ended:
        async for judgement in ended:
            if judgement is not None:
                early[judgement.index] = judgement
            while following in early:
                yield early.pop(following)
                following += 1
    for index in sorted(early):  # those after a row with a fatal error
        yield early[index]
    if fatal:
        raise fatal[0]
