"""Models that are sharded by FSDP2 over the processes that train them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["reshard"]


def reshard(model: nn.Module) -> None:
    """Let go of what a pass without gradients gathered, so that a parameter is the shard that is trained.

    FSDP keeps the outermost weights gathered behind a pass, for the backward pass that usually follows. What
    is written into them then is lost with them.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            kept: Any = module
            kept.reshard()
