"""Prompts to train a policy on: what the stages that draw answers read of rows.

PPO reads them whole before it starts, so that nothing is left out unsaid.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainers.policy import Messages
from trainers.rows import Kind
from trainers.stages.encoding import (
    SIGNALS,
    Counts,
    Encoder,
    Hazard,
    NothingLeft,
    Row,
    Shape,
    Source,
    fitting,
)

__all__ = ["KINDS", "Prompts", "prompt_shape", "read_prompts"]

KINDS: tuple[Kind, ...] = ("prompts", "sft", "preference", "unpaired")
"""Kinds of dataset whose rows have a prompt; of the others' answers nothing is read."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a dataset."""

    source: Source
    """Where they lie."""
    train: list[Messages]
    """Conversations to answer in training."""
    rows: list[int]
    """The row of each in its file, counted from 1."""
    heldout: list[Messages]
    """Conversations of the test part; empty where there is none."""
    counts: Counts
    """What became of the rows of the train part."""


def prompt_shape(stage: str, max_answer: int) -> Shape:
    """Return what a stage reads of rows that answers of so many tokens are drawn to: `prompt`, as JSON."""

    def encode(encoder: Encoder, row: Row) -> list[dict[str, Any]]:
        # As text: Arrow would give every turn all fields that one turn has.
        return [{"prompt": json.dumps(encoder.prompt(row, max_answer))}]

    # What weighs or labels the answers of a row says nothing about its prompt.
    return Shape(stage=stage, kinds=KINDS, reads=SIGNALS, encode=encode)


def read_prompts(source: Source, shape: Shape, encoder: Encoder, allow: Sequence[Hazard] = ()) -> Prompts:
    """Return the prompts of a dataset.

    Args:
        source: the dataset.
        shape: of `prompt_shape`.
        encoder: of the policy.
        allow: hazards of its rows that are known and wanted.

    Raises:
        DataError: as `trainers.stages.encoding.fitting`.
    """
    counts = Counts()
    rows, train = zip(*fitting(source.train, shape, encoder, allow, counts), strict=True)
    heldout: list[Any] = []
    if source.test is not None:
        # What is left out of the test rows changes no weights.
        found = fitting(source.test, shape, encoder, (*allow, "drop-long", "drop-unfit"), Counts())
        with contextlib.suppress(NothingLeft):
            heldout += [one for _, one in found]
    return Prompts(
        source=source,
        train=[json.loads(one["prompt"]) for one in train],
        rows=list(rows),
        heldout=[json.loads(one["prompt"]) for one in heldout],
        counts=counts,
    )
