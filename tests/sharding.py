"""FSDP2 on CPUs: importing this has accelerate shard there. Torch can; accelerate starts it on GPUs only."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

_begin = AcceleratorState.__init__


def _sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
    _begin(self, *args, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _sharded  # type: ignore[method-assign]

if __name__ == "__main__":
    from cai_graph.cli import main

    main()
