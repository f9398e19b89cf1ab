"""The stage of Kahneman-Tversky optimisation, on answers that are desirable or not, over TRL's KTOTrainer.

Source: Ethayarajh et al. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from cai_graph.errors import ConfigError, DataError
from trainers.checkpoint import Checkpoint
from trainers.config import above
from trainers.stages import Run, StageConfig, run
from trainers.stages.encoding import Encoder, Row, Shape

__all__ = ["Config", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Configuration of KTO."""

    learning_rate: float = 1e-6
    """Highest learning rate, of AdamW."""
    beta: float = 0.1
    """Strength of the KL constraint to the reference, which is the model that training starts from."""
    desirable_weight: float = 1.0
    """Weight of desirable answers; the paper advises weight x count to be 1 to 4/3 times the others'."""
    undesirable_weight: float = 1.0
    """Weight of undesirable answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise ConfigError("batch_size 1: KTO pairs each prompt with another one's answer; set 2 or more")
        above(0, self, "beta", "desirable_weight", "undesirable_weight")


def train(config: Config) -> Checkpoint:
    """Train on single answers, and return the Checkpoint.

    Rows are `prompt`, `completion` and `label`; a pair (`chosen`, `rejected`) counts as two of them.

    Raises:
        CaiError: as documented in `trainers.stages.run`.
    """
    shape = Shape(stage="kto", kinds=("unpaired", "preference"), reads=frozenset({"label"}), encode=_encode)
    return run(config, shape, lambda begun: _trainer(begun, config))


def _encode(encoder: Encoder, row: Row) -> list[dict[str, Any]]:
    if "chosen" in row:
        pair = encoder.pair(row)
        answers = ((pair.chosen, True), (pair.rejected, False))
        return [{"prompt_ids": pair.prompt, "completion_ids": ids, "label": label} for ids, label in answers]
    label = row.get("label")
    if not isinstance(label, bool):
        raise DataError(f"'label' is true or false, found {label!r}")
    prompt, answer = encoder.answer(row)
    return [{"prompt_ids": prompt, "completion_ids": answer, "label": label}]


def _trainer(begun: Run, config: Config) -> Any:
    from trl import KTOConfig

    arguments = KTOConfig(
        **begun.arguments(),
        max_length=None,
        disable_dropout=False,  # keeps the dropout of adapters, which was configured
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    return _trainer_of_ids()(
        model=begun.model(dropout=False),
        ref_model=None if config.lora else begun.model(dropout=False),
        args=arguments,
        # Shuffled here, since batches are taken in order: their answers are paired with each other's prompts.
        train_dataset=begun.train.shuffle(seed=config.seed),
        eval_dataset=begun.test,
        processing_class=begun.tokenizer,
        peft_config=begun.adapter(),
    )


@cache
def _trainer_of_ids() -> Any:
    """Return TRL's trainer for rows that are token ids already."""
    from trl import KTOTrainer

    class Trainer(KTOTrainer):  # type: ignore[misc]
        """KTO on token ids."""

        def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, name: str) -> Any:
            size = args.per_device_train_batch_size
            answers = dataset["completion_ids"]

            def other(row: dict[str, Any], at: int) -> dict[str, Any]:
                """Add the previous answer of the batch, as TRL does; for a batch of one, another batch's."""
                first, last = at - at % size, min(at - at % size + size, len(answers)) - 1
                return {"KL_completion_ids": answers[at - 1 if at > first or first == last else last]}

            return dataset.map(other, with_indices=True)

    return Trainer
