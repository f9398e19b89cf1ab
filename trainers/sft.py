"""Supervised fine-tuning: answers to imitate, over TRL's SFTTrainer.

The loss is on the answer alone: on the last turn of a conversation, or on all of a plain text. This is the
supervised phase of Constitutional AI (Bai et al. 2022, section 3) where the answers are revisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cai_graph.errors import DataError
from trainers.checkpoint import Checkpoint
from trainers.stages import Run, StageConfig, run
from trainers.stages.encoding import Encoder, Row, Shape

__all__ = ["Config", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """What supervised fine-tuning is told."""

    learning_rate: float = 2e-5
    """Highest learning rate, of AdamW."""
    packing: bool = False
    """Put several rows into one of max_tokens, so that nothing is padded; rows do not see one another."""


def train(config: Config) -> Checkpoint:
    """Train on answers, and return the Checkpoint.

    Rows are `prompt` and `completion`, `messages`, or `text`.

    Raises:
        CaiError: as `trainers.stages.run` says.
    """
    shape = Shape(stage="sft", kinds=("sft", "critique-sft"), encode=_encode)
    return run(config, shape, lambda begun: _trainer(begun, config))


def _encode(encoder: Encoder, row: Row) -> list[dict[str, Any]]:
    if "messages" in row:
        row = _last_turn(row)
    if "prompt" in row:
        prompt, answer = encoder.answer(row)
    else:
        prompt, answer = encoder.answer({**row, "prompt": ""}, answer="text")
    return [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}]


def _last_turn(row: Row) -> Row:
    turns = row["messages"]
    last = turns[-1] if isinstance(turns, list) and len(turns) > 1 else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise DataError("'messages' does not end with a turn of the assistant, and that is what is learned")
    return {**row, "prompt": turns[:-1], "completion": turns[-1:]}


def _trainer(begun: Run, config: Config) -> Any:
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **begun.arguments(),
        packing=config.packing,
        max_length=config.max_tokens if config.packing else None,
    )
    return SFTTrainer(
        model=begun.model(),
        args=arguments,
        train_dataset=begun.train,
        eval_dataset=begun.test,
        processing_class=begun.tokenizer,
        peft_config=begun.adapter(),
    )
