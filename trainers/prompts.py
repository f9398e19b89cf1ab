"""Prompts to train a policy on: read whole before training starts, so that nothing is left out unsaid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_graph.errors import DataError
from trainers.encoding import Hazard, Source, open_data, read_rows
from trainers.policy import Messages, prompt_ids
from trainers.rows import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["KINDS", "Prompts", "read_prompts"]

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
    dropped: dict[str, int]
    """Rows of the train part that were left out, by the reason."""

    def to_json(self) -> dict[str, Any]:
        """Return what a manifest says of the data."""
        return {
            "path": str(self.source.path),
            "digest": self.source.digest,
            "log_digest": self.source.log_digest,
            "rows": len(self.train),
            "dropped": self.dropped,
            "heldout": len(self.heldout),
        }


def read_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, room: int, allow: Sequence[Hazard] = ()
) -> Prompts:
    """Return the prompts of a dataset's folder, or of a file in TRL's form.

    A prompt that is a text, not a list of turns, is what a user says.

    Args:
        path: folder or file.
        tokenizer: the policy's, whose chat template writes them.
        room: tokens that a prompt may fill.
        allow: `drop-long`: longer ones are left out; `drop-unfit`: those that the chat template refuses.

    Raises:
        ConfigError: there is no such data.
        DataError: rows cannot be trained on, and are not allowed to be left out; says which.
    """
    source = open_data(path, KINDS)
    dropped: Counter[str] = Counter()
    train, rows = _fitting(source.train, tokenizer, room, allow, dropped)
    heldout: list[Messages] = []
    if source.test is not None:
        heldout, _ = _fitting(source.test, tokenizer, room, ("drop-long", "drop-unfit"), Counter())
    return Prompts(source=source, train=train, rows=rows, heldout=heldout, dropped=dict(dropped))


def _fitting(
    file: Path, tokenizer: Any, room: int, allow: Sequence[Hazard], dropped: Counter[str]
) -> tuple[list[Messages], list[int]]:
    found: list[Messages] = []
    rows: list[int] = []
    refused: dict[Hazard, list[str]] = {}
    for number, row in read_rows(file):
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not prompt:
            raise DataError(
                f"{file} row {number}: has no prompt; give it a list of turns with role and content"
            )
        try:
            length = len(prompt_ids(tokenizer, prompt))
        except DataError as error:
            dropped["the chat template refuses it"] += 1
            refused.setdefault("drop-unfit", []).append(f"row {number}: {error}")
            continue
        if length > room:
            dropped["it is too long"] += 1
            refused.setdefault("drop-long", []).append(
                f"row {number}: has {length:,} tokens, and there is room for {room:,}; raise max_tokens"
            )
            continue
        found.append(prompt)
        rows.append(number)
    for hazard, said in refused.items():
        if hazard not in allow:
            more = f", and {len(said) - 1:,} more like it" if len(said) > 1 else ""
            raise DataError(f"{file} {said[0]}{more}; or allow {hazard}, and they are left out")
    if not found:
        raise DataError(f"{file}: holds no prompt to train on")
    return found, rows
