"""The code that all training stages share, from rows to a Checkpoint.

The stages themselves are the modules beside this package, such as `trainers.sft` and `trainers.online`.

stages     the config that each stage extends, and the run around TRL's trainers
encoding   rows → token ids: every row is encoded, or counted with the reason why not
prompts    prompts to train a policy on, for the stages that sample answers
lora       low-rank adapters
soft       soft labels of pairs, and the loss on them
guarded    TRL's trainers, guarded: a NaN, a full disk or an interrupt loses no saved state
partial    OUTPUT.partial, the folder of an unfinished run
sharded    models that are sharded with FSDP2
"""

from __future__ import annotations

from trainers.stages.encoding import Hazard
from trainers.stages.lora import Lora
from trainers.stages.stages import (
    MAY_CHANGE,
    Run,
    StageConfig,
    Tracker,
    check_machine,
    computes_in_bf16,
    manifest,
    plan,
    run,
)

__all__ = [
    "MAY_CHANGE",
    "Hazard",
    "Lora",
    "Run",
    "StageConfig",
    "Tracker",
    "check_machine",
    "computes_in_bf16",
    "manifest",
    "plan",
    "run",
]
