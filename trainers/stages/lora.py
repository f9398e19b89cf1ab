"""Low-rank adapters (LoRA): their config, and checks that a model can be trained with them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from cai_graph.errors import ConfigError

__all__ = ["Lora", "without_dropout"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021) in place of all weights."""

    rank: int = 16
    """Rank of the update of each matrix, from 1."""
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapter, in [0, 1)."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter; empty: all except the output layer."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is a number from 1, found {self.rank!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is a share from 0 to below 1, found {self.dropout!r}")

    def adapter(self, task: str = "CAUSAL_LM") -> Any:
        """Return peft's config of the adapter; `task` is one of peft's TaskType."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets) or "all-linear",
            task_type=task,
        )

    def check(self, model: Any) -> None:
        """Check that a model has each of the targets, and that an adapter to it can be merged.

        Raises:
            ConfigError: it has no layer of that name (peft raises only if no target matches at all); or the
                layer's matrix is tied to another layer's, so that a merged adapter would change both.
        """
        layers = {name for name, module in model.named_modules() if _takes_an_adapter(module)}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        shared = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
        for target in self.targets:
            meant = {name for name in layers if name == target or name.endswith(f".{target}")}
            if not meant:
                known = sorted({name.rpartition(".")[2] for name in layers})
                near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
                raise ConfigError(f"lora.targets: the model has no linear layer {target!r}; {hint}")
            if both := sorted(meant & shared):
                raise ConfigError(
                    f"lora.targets: {both[0]!r} has its matrix in common with another layer (embedding and "
                    "output are tied), and a merged adapter would change both; leave it out"
                )

    def refuse_dropout(self, stage: str) -> None:
        """Check that a policy samples answers from the same probabilities that are trained.

        Raises:
            ConfigError: the adapters have dropout; the message names the stage.
        """
        if self.dropout:
            raise ConfigError(
                f"lora.dropout is {self.dropout!r}; {stage} trains the policy as it draws answers, without "
                "dropout: leave it out"
            )


def _takes_an_adapter(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def without_dropout(model: Any) -> Any:
    """Switch off a model's own dropout; the model is changed in place and returned."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model
