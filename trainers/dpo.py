"""Direct preference optimisation on soft labels, over TRL's DPOTrainer.

The loss of a pair (Rafailov et al. 2023, eq. 7), with the margin d = beta (log-ratio of chosen − log-ratio of
rejected), is here the cross-entropy against P(chosen is better):

    w · −(p log σ(d) + (1 − p) log σ(−d))

With p = 1 it is the paper's; with p = 0.6 its least value is H(0.6) at d = logit 0.6, so that a pair about
which the judges were unsure pulls the answers no further apart than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from cai_graph.errors import ConfigError, DataError
from trainers.checkpoint import Checkpoint
from trainers.encoding import Encoder, Row, Shape
from trainers.stages import Run, StageConfig, run

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Config", "soft_loss", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """What preference optimisation is told."""

    learning_rate: float = 5e-7
    """Highest learning rate, of AdamW."""
    beta: float = 0.1
    """Strength of the pull to the reference: the model that training starts from."""
    sft_weight: float = 0.0
    """Weight of the log-likelihood of chosen answers, added to the loss; it keeps them from becoming rare."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ConfigError(f"beta is a number above 0, found {self.beta!r}")
        if self.sft_weight < 0:
            raise ConfigError(f"sft_weight is a number from 0, found {self.sft_weight!r}")


def train(config: Config) -> Checkpoint:
    """Train on pairs of answers, and return the Checkpoint.

    Rows are `prompt`, `chosen` and `rejected`, with `p_chosen` in [0, 1] (1 where it is absent) and `weight`
    above 0 (1 where it is absent). The reference is the model that training starts from.

    Raises:
        CaiError: as `trainers.stages.run` says.
    """
    reads = frozenset({"p_chosen", "weight", "margin"})
    shape = Shape(stage="dpo", kinds=("preference",), reads=reads, encode=_encode)
    return run(config, shape, lambda begun: _trainer(begun, config))


def soft_loss(margins: Tensor, p_chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of each pair in nats.

    Args:
        margins: (B,) beta times the difference of the log-ratios.
        p_chosen: (B,) P(chosen is better), in [0, 1].
        weights: (B,) above 0.

    Returns:
        (B,) weight times the cross-entropy.
    """
    from torch.nn.functional import logsigmoid

    # log σ(−d) = log σ(d) − d
    return weights * ((1 - p_chosen) * margins - logsigmoid(margins))


def _encode(encoder: Encoder, row: Row) -> list[dict[str, Any]]:
    p_chosen, weight = row.get("p_chosen", 1.0), row.get("weight", 1.0)
    if "margin" in row and "p_chosen" not in row:
        raise DataError(
            "has a 'margin' and no 'p_chosen', which is what dpo reads; p_chosen = (1 + margin) / 2"
        )
    if not isinstance(p_chosen, int | float) or not 0 <= p_chosen <= 1:
        raise DataError(f"'p_chosen' is a probability, found {p_chosen!r}")
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise DataError(f"'weight' is a number above 0, found {weight!r}")
    pair = encoder.pair(row)
    return [
        {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
            "p_chosen": float(p_chosen),
            "weight": float(weight),
        }
    ]


def _trainer(begun: Run, config: Config) -> Any:
    from trl import DPOConfig

    both = config.sft_weight > 0
    arguments = DPOConfig(
        **begun.arguments(),
        max_length=None,
        beta=config.beta,
        loss_type=["sigmoid", "sft"] if both else ["sigmoid"],
        loss_weights=[1.0, config.sft_weight] if both else None,
    )
    return _soft_trainer()(
        model=begun.model(),
        # Beside an adapter the reference is the model with the adapter switched off.
        ref_model=None if config.lora else begun.model(),
        args=arguments,
        train_dataset=begun.train,
        eval_dataset=begun.test,
        processing_class=begun.tokenizer,
        peft_config=begun.adapter(),
    )


@cache
def _soft_trainer() -> Any:
    """Return TRL's trainer with the soft loss in place of its own."""
    import torch
    from trl import DPOTrainer

    class Labelled:
        """A collator that keeps labels and weights beside what another one makes."""

        def __init__(self, pairs: Any) -> None:
            self.pairs = pairs

        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = self.pairs(rows)
            for name in ("p_chosen", "weight"):
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
            return batch

    class Seen:
        """A model that keeps the token log-probabilities of its last pass."""

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

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.data_collator = Labelled(self.data_collator)
            self.precompute_ref_logps = True  # below, batch by batch: the loss needs them, too

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
            answers = inputs["completion_mask"][:, 1:].size(1)
            chosen, rejected = seen.log_probs[:, -answers:].sum(dim=1).chunk(2)
            margins = self.beta * ((chosen - reference[0]) - (rejected - reference[1]))
            ones = torch.ones_like(margins)
            # What TRL has in its loss for these pairs is taken out again; the rest of it stays.
            soft = soft_loss(margins, p_chosen, weights) - soft_loss(margins, ones, ones)
            return loss + soft.mean()

    return SoftDPOTrainer
