"""The supervised fine-tuning stage: trains on answers to imitate, over TRL's SFTTrainer.

The loss is on the answer only: on the last turn of a conversation, or on all of a plain text. If the answers
are revisions, this is the supervised phase of Constitutional AI (Bai et al. 2022, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from cai_graph.errors import DataError
from trainers.checkpoint import Checkpoint
from trainers.stages import Run, StageConfig, run
from trainers.stages.encoding import Encoder, Row, Shape

__all__ = ["Config", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Configuration of supervised fine-tuning."""

    learning_rate: float = 2e-5
    """Highest learning rate, of AdamW."""
    packing: bool = False
    """Pack several rows into one of max_tokens, without padding; rows do not attend to one another."""


def train(config: Config) -> Checkpoint:
    """Train on answers, and return the Checkpoint.

    Rows are `prompt` and `completion`, `messages`, or `text`.

    Raises:
        CaiError: as documented in `trainers.stages.run`.
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
    from trl import SFTConfig

    arguments = SFTConfig(
        **begun.arguments(),
        packing=config.packing,
        max_length=config.max_tokens if config.packing else None,
    )
    return _by_token()(
        model=begun.model(),
        args=arguments,
        train_dataset=begun.train,
        eval_dataset=begun.test,
        processing_class=begun.tokenizer,
        peft_config=begun.adapter(),
    )


@cache
def _by_token() -> Any:
    """Return TRL's trainer, with held-out figures averaged over tokens."""
    import torch
    from trl import SFTTrainer

    class TokenTrainer(SFTTrainer):  # type: ignore[misc]
        """SFT whose held-out figures do not depend on which rows are in the same batch."""

        _metrics: Any

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Measure a batch; also add its loss to TRL's figures, which replace transformers' mean."""
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
            tokens = (inputs["labels"][:, 1:] != -100).sum()
            nats, tokens = self.accelerator.reduce(torch.stack([loss * tokens, tokens]))
            self._metrics["eval"]["loss"].append((nats / tokens.clamp(min=1)).item())
            self.tokens.append(tokens.item())
            return loss, *rest

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            """Measure all batches, and weight the figures of each by its tokens."""
            self.tokens: list[float] = []
            found = super().evaluation_loop(*args, **kwargs)
            for values in self._metrics["eval"].values():
                if len(values) == len(self.tokens):  # otherwise it is not a figure per batch
                    pairs = zip(values, self.tokens, strict=True)
                    values[:] = [sum(value * tokens for value, tokens in pairs) / max(1, sum(self.tokens))]
            return found

    return TokenTrainer
