"""What the stages share, from rows to a Checkpoint. The stages themselves stand beside this package.

stages     the config that each one extends, and the run around TRL's trainers
encoding   rows → token ids: every row is encoded, or counted with the reason why not
prompts    prompts to train a policy on: what the stages that draw answers read
lora       low-rank adapters
soft       soft labels of pairs, and the loss on them
guarded    TRL's trainers, guarded: NaN, full disks and interrupts lose nothing
partial    OUTPUT.partial, the folder of a run under way
sharded    models that are sharded by FSDP2
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
