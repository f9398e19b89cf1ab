"""What the stages share: the config that each one extends, and the run around TRL's trainers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cai_graph.errors import ConfigError

__all__ = ["Hazard", "Lora", "StageConfig"]

Hazard = Literal["drop-long", "cut-long", "drop-unfit", "shifted-prompt", "ignored-columns"]
"""What a stage refuses unless it is allowed:

drop-long          rows of more than max_tokens are left out
cut-long           their answers are cut; a prompt that fills max_tokens alone is left out with drop-long
drop-unfit         empty answers, identical pairs, texts with control tokens, and conversations that the chat
                   template refuses are left out
shifted-prompt     the chat template writes a prompt otherwise before an answer than before a generation
ignored-columns    a column that weighs or labels rows, and that the stage does not read, is ignored
"""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021) in place of all weights."""

    rank: int = 16
    """Rank of the update of each matrix, from 1."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapter, in [0, 1)."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one; empty: all of them but the output's."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is a number from 1, found {self.rank!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is a share from 0 to below 1, found {self.dropout!r}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage is told; each one adds its own and sets its paper's learning rate."""

    model: str
    """Where training starts: a folder with safetensors and tokenizer, `local` or `local:NAME`."""
    data: Path
    """A folder of `cai dataset build`, or a file of TRL's format in JSONL, JSON or Parquet."""
    output: Path
    """The Checkpoint to make; a run that is not finished stands in `OUTPUT.partial`."""
    seed: int = 0
    """Of everything random: order of rows, adapters, dropout."""
    learning_rate: float = 1e-5
    """Highest learning rate, of AdamW."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Updates, in place of `epochs`."""
    batch_size: int = 8
    """Rows of a forward pass on one device."""
    accumulate: int = 1
    """Forward passes of an update; batch_size x accumulate x processes rows make one update."""
    max_tokens: int = 1024
    """Longest row, in tokens: prompt and answer."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.0
    """Share of the updates over which the learning rate rises, in [0, 1)."""
    lora: Lora | None = None
    """Train adapters; None: all weights. The Checkpoint has them merged, and the adapter beside."""
    quantized: bool = False
    """Load the base in 4 bits (QLoRA, Dettmers et al. 2023); needs `lora`, a GPU and bitsandbytes."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What is computed in; `auto`: bf16 where the GPU has it, else fp32."""
    recompute: bool = False
    """Recompute activations in the backward pass (gradient checkpointing): less memory, more time."""
    allow: tuple[Hazard, ...] = ()
    """Hazards of the data that are known and wanted; each is refused otherwise."""
    report_to: tuple[str, ...] = ()
    """Trackers, as transformers names them: tensorboard, wandb, mlflow, trackio."""
    log_steps: int = 10
    """Updates between two lines of figures."""
    save_steps: int = 200
    """Updates between two points that an interrupted run goes on from."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "max_tokens", "log_steps", "save_steps", "max_steps"):
            if (found := getattr(self, name)) is not None and found < 1:
                raise ConfigError(f"{name} is a number from 1, found {found!r}")
        for name in ("learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is a number above 0, found {getattr(self, name)!r}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is a share from 0 to below 1, found {self.warmup!r}")
        if self.quantized and self.lora is None:
            raise ConfigError("quantized weights cannot be trained themselves; set lora, too")
        for hazard in self.allow:
            if hazard not in get_args(Hazard):
                raise ConfigError(f"allow takes {', '.join(get_args(Hazard))}; found {hazard!r}")
        if {"drop-long", "cut-long"} <= set(self.allow):
            raise ConfigError("allow says drop-long and cut-long; keep one")
