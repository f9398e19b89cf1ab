"""The stage of direct preference optimisation on soft labels, over TRL's DPOTrainer.

With the margin d = beta (log-ratio of chosen − log-ratio of rejected), the loss of a pair (Rafailov et al.
2023, eq. 7) is generalised to the cross-entropy of sigma(d) against P(chosen is better); see
`trainers.stages.soft`. With p = 1 it equals the paper's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from trainers.checkpoint import Checkpoint
from trainers.config import above, at_least
from trainers.stages import Run, StageConfig, run
from trainers.stages.encoding import Encoder, Row, Shape
from trainers.stages.soft import READS, Labelled, label_of, soft_loss

__all__ = ["Config", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Configuration of preference optimisation."""

    learning_rate: float = 5e-7
    """Highest learning rate, of AdamW."""
    beta: float = 0.1
    """Strength of the KL constraint to the reference, which is the model that training starts from."""
    sft_weight: float = 0.0
    """Weight of an SFT loss on chosen answers, averaged over the tokens of each; it keeps their probability
    from falling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        above(0, self, "beta")
        at_least(0, self, "sft_weight")


def train(config: Config) -> Checkpoint:
    """Train on pairs of answers, and return the Checkpoint.

    Rows are `prompt`, `chosen` and `rejected`, with `p_chosen` in [0, 1] (1 if absent) and `weight` above 0
    (1 if absent). The reference is the model that training starts from.

    Raises:
        CaiError: as documented in `trainers.stages.run`.
    """
    shape = Shape(stage="dpo", kinds=("preference",), reads=READS, encode=_encode)
    return run(config, shape, lambda begun: _trainer(begun, config))


def _encode(encoder: Encoder, row: Row) -> list[dict[str, Any]]:
    label = label_of(row)
    pair = encoder.pair(row)
    return [
        {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
            **label,
        }
    ]


def _trainer(begun: Run, config: Config) -> Any:
    from trl import DPOConfig

    arguments = DPOConfig(
        **begun.arguments(),
        max_length=None,
        disable_dropout=False,  # keeps the dropout of adapters, which was configured
        beta=config.beta,
        loss_type=["sigmoid"],
    )
    trainer = _soft_trainer()(
        model=begun.model(dropout=False),
        # With an adapter, the reference is the model with the adapter disabled.
        ref_model=None if config.lora else begun.model(dropout=False),
        args=arguments,
        train_dataset=begun.train,
        eval_dataset=begun.test,
        processing_class=begun.tokenizer,
        peft_config=begun.adapter(),
    )
    trainer.sft_weight = config.sft_weight
    return trainer


@cache
def _soft_trainer() -> Any:
    """Return TRL's trainer with the soft loss instead of its own."""
    import torch
    from trl import DPOTrainer

    class Seen:
        """A model that remembers the token log-probabilities of its last forward pass."""

        def __init__(self, model: Any) -> None:
            self.model = model
            self.log_probs: Any = None

        def __call__(self, **inputs: Any) -> Any:
            outputs = self.model(**inputs)
            self.log_probs = outputs.log_probs
            return outputs

    class SoftDPOTrainer(DPOTrainer):  # type: ignore[misc]
        """DPO with soft labels and weights, on rows that are token ids already."""

        data_collator: Any
        _signature_columns: Any
        sft_weight: float

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.data_collator = Labelled(self.data_collator)
            self.precompute_ref_logps = True  # done below, batch by batch: our loss needs them, too

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = sorted({*self._signature_columns, "p_chosen", "weight"})

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            p_chosen, weights = inputs.pop("p_chosen"), inputs.pop("weight")
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference
            seen = Seen(model)
            loss = super()._compute_loss(seen, inputs, False)
            learned = inputs["completion_mask"][:, 1:]
            chosen, rejected = seen.log_probs[:, -learned.size(1) :].sum(dim=1).chunk(2)
            margins = self.beta * ((chosen - reference[0]) - (rejected - reference[1]))
            ones = torch.ones_like(margins)
            # Replace the loss that TRL has for these pairs; any other terms remain.
            soft = soft_loss(margins, p_chosen, weights) - soft_loss(margins, ones, ones)
            # Averaged per answer: TRL's mean over the tokens of a forward pass depends on its other rows.
            sft = -chosen / learned.sum(dim=1).chunk(2)[0]
            return loss + (soft + self.sft_weight * sft).mean()

    return SoftDPOTrainer
