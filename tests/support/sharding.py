"""Sharded training on CPUs: importing this has accelerate start there what it would on GPUs alone.

Torch shards by FSDP2 on CPUs, and DeepSpeed by ZeRO, as they do on GPUs.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

_begin = AcceleratorState.__init__


def _sharded(self: Any, mixed_precision: Any = None, cpu: bool = False, **settings: Any) -> None:
    by_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    _begin(self, mixed_precision, cpu and not by_deepspeed, **settings)
    plugin = settings.get("fsdp_plugin")
    if plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
        self.fsdp_plugin = plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _sharded  # type: ignore[method-assign]

if __name__ == "__main__":
    from cai_graph.cli import main

    main()
