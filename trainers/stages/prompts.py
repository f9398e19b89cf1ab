"""Reads the prompts to train a policy on, for the stages that sample answers themselves.

Only the prompts of the rows are used. PPO reads all of them before it starts, so that rows that do not fit
are reported first.
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
"""Kinds of dataset whose rows have a prompt; answers in the rows are ignored."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a dataset."""

    source: Source
    """The files that they were read from."""
    train: list[Messages]
    """Conversations to answer in training."""
    rows: list[int]
    """The row number of each prompt in its file, from 1."""
    heldout: list[Messages]
    """Conversations of the test file; empty where there is none."""
    counts: Counts
    """Counts of the rows of the training file."""


def prompt_shape(stage: str, max_answer: int) -> Shape:
    """Return a Shape that encodes a row as its `prompt`, in JSON, if `max_answer` more tokens fit."""

    def encode(encoder: Encoder, row: Row) -> list[dict[str, Any]]:
        # As JSON text: Arrow would add to every message all fields that any message has.
        return [{"prompt": json.dumps(encoder.prompt(row, max_answer))}]

    # Columns that weigh or label answers do not concern the prompt, so they may be ignored.
    return Shape(stage=stage, kinds=KINDS, reads=SIGNALS, encode=encode)


def read_prompts(source: Source, shape: Shape, encoder: Encoder, allow: Sequence[Hazard] = ()) -> Prompts:
    """Return the prompts of a dataset.

    Args:
        source: the dataset.
        shape: a Shape of `prompt_shape`.
        encoder: the policy's Encoder.
        allow: hazards of the rows that the user accepts.

    Raises:
        DataError: as documented in `trainers.stages.encoding.fitting`.
    """
    counts = Counts()
    rows, train = zip(*fitting(source.train, shape, encoder, allow, counts), strict=True)
    heldout: list[Any] = []
    if source.test is not None:
        # Leaving out test rows changes no weights.
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
