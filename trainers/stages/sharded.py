"""Helper for models that FSDP2 shards over the processes that train them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["reshard"]


def reshard(model: nn.Module) -> None:
    """Reshard parameters that a forward pass without gradients left gathered.

    FSDP keeps the root module's weights gathered after a forward pass, for the backward pass that usually
    follows. Values written into the gathered weights are lost when they are freed.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            kept: Any = module
            kept.reshard()
