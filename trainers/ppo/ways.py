"""Ways to train one policy in several processes: how its weights are stored, and how a step is taken.

Whole    each process has all weights, under DDP or alone
Sharded  each has a part of every weight, under FSDP2
Zero     each has all weights and a part of the optimizer's state, under DeepSpeed's ZeRO 1 or 2

A step is the same in all of them: gradients accumulate over the parts of a minibatch, are reduced over the
processes with the last part and clipped, and the optimizer then updates the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from cai_graph.errors import ConfigError
from trainers.ppo import Config
from trainers.ppo.models import ActorCritic, whole_weights
from trainers.stages import computes_in_bf16

__all__ = ["Sharded", "Whole", "Zero", "way_of"]

ONE_WHOLE_MODEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Whole:
    """All weights in each process, kept in sync by accelerate."""

    in_step = False
    """Whether all processes must run the policy at the same time."""

    def __init__(self, accelerator: Accelerator, config: Config) -> None:
        self.accelerator, self.config = accelerator, config
        self.actor: Any = None
        self.optimizer: Any = None
        self.reference: nn.Module | None = None

    def prepare(self, actor: ActorCritic, reference: nn.Module | None) -> None:
        """Wrap the models of a run, and set `actor`, `optimizer` and `reference`."""
        optimizer = torch.optim.AdamW(_groups(actor, self.config), eps=1e-5, weight_decay=0.0, fused=True)
        self.actor, self.optimizer = self.accelerator.prepare(actor, optimizer)
        self.reference = reference

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the precision of the config, on weights of 32 bits."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def part(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Enclose forward and backward of one part of a minibatch; gradients are reduced in the last part."""
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.actor)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a loss, adding to the gradients of earlier parts; processes average theirs."""
        self.accelerator.backward(loss)

    def step(self) -> float:
        """Update the weights with the clipped gradient, and reset the gradient.

        Returns:
            The gradient's norm before clipping. If it is not finite, no weight was changed.
        """
        norm = float(self.accelerator.clip_grad_norm_(self.actor.parameters(), self.config.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def weights(self) -> dict[str, Tensor] | None:
        """Return the policy's weights to write; None: those in the model. All processes must call it."""
        return None


class Sharded(Whole):
    """A part of every weight in each process, under FSDP2."""

    in_step = True

    def prepare(self, actor: ActorCritic, reference: nn.Module | None) -> None:  # noqa: D102
        plugin: Any = self.accelerator.state.fsdp_plugin
        policy = plugin.mixed_precision_policy
        if policy is not None:  # compute in 16 bits, but return outputs and reduce gradients in 32
            plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)
        super().prepare(actor, reference)
        register_fsdp_forward_method(self.actor, "around")
        if reference is not None:
            self.reference = fsdp2_prepare_model(self.accelerator, reference)

    def weights(self) -> dict[str, Tensor] | None:  # noqa: D102
        return whole_weights(self.actor, self.accelerator)


class Zero(Whole):
    """All weights in each process, and a part of the optimizer's state, under DeepSpeed's ZeRO 1 or 2.

    The engine clips and steps in one call. Weights stay in 32 bits, under autocast, as in the other ways:
    with the engine's own 16 bits the trained policy would differ from the reference, and small steps would be
    lost in the Checkpoint.
    """

    def prepare(self, actor: ActorCritic, reference: nn.Module | None) -> None:  # noqa: D102
        config, told = self.config, self.accelerator.state.deepspeed_plugin.deepspeed_config
        told |= {
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "gradient_accumulation_steps": 1,  # accumulation over parts is done here
            "gradient_clipping": config.max_grad_norm,
            "torch_autocast": {
                "enabled": computes_in_bf16(config),
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # their gradients would be added up in 16 bits
            },
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": config.batch_size,
        }
        super().prepare(actor, reference)

    def autocast(self) -> AbstractContextManager[Any]:  # noqa: D102
        return torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=computes_in_bf16(self.config)
        )

    @contextlib.contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:  # noqa: D102
        self.actor.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:  # noqa: D102
        self.actor.backward(loss)

    def step(self) -> float:  # noqa: D102
        self.actor.step()
        return float(self.actor.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor] | None:
        """Return copies: the engine stores the weights as slices of one flat tensor."""
        return whole_weights(self.actor, self.accelerator)


def way_of(accelerator: Accelerator, config: Config) -> Whole:
    """Return the way of training that matches how accelerate was launched.

    Raises:
        ConfigError: a policy cannot be both sampled and trained that way, or DeepSpeed's settings contradict
            those of PPO.
    """
    kind, state = accelerator.distributed_type, accelerator.state
    if kind in ONE_WHOLE_MODEL:
        return Whole(accelerator, config)
    if kind == DistributedType.FSDP and accelerator.is_fsdp2:
        return Sharded(accelerator, config)
    if kind == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage in (1, 2):
        _check_told(state.deepspeed_plugin.deepspeed_config, config)
        return Zero(accelerator, config)
    name: str = kind.value
    if kind == DistributedType.FSDP:
        name = "FSDP 1"
    elif kind == DistributedType.DEEPSPEED:
        name = f"DeepSpeed's ZeRO stage {state.deepspeed_plugin.zero_stage}"
    raise ConfigError(
        "PPO runs with the whole model in every process, sharded by FSDP2, or under DeepSpeed's ZeRO stage 1 "
        f"or 2, and not under {name}; set fsdp_version: 2 or zero_stage: 2 in accelerate's config, or launch "
        "with --multi_gpu"
    )


def _check_told(told: dict[str, Any], config: Config) -> None:
    """Check that DeepSpeed's config does not contradict the config of PPO.

    Raises:
        ConfigError: it does; the message names the setting.
    """
    for key in ("optimizer", "scheduler"):
        if key in told:
            raise ConfigError(f"DeepSpeed's config has a {key!r}, and PPO brings its own; leave it out")
    fitting = {
        "gradient_accumulation_steps": ("accumulate", (1, config.accumulate)),
        "gradient_clipping": ("max_grad_norm", (config.max_grad_norm,)),
        "train_micro_batch_size_per_gpu": ("batch_size", (config.batch_size,)),
    }
    for key, (setting, values) in fitting.items():
        found = told.get(key, "auto")
        if found != "auto" and found not in values:
            raise ConfigError(
                f"{key} is {found!r} in DeepSpeed's config, and {setting} is {getattr(config, setting)!r} "
                f"here, which counts; set {key}: auto there, or leave it out"
            )


def _groups(actor: ActorCritic, config: Config) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: the policy, and the values."""
    named = [(name, one) for name, one in actor.named_parameters() if one.requires_grad]
    return [
        {"params": [one for name, one in named if name.startswith("policy.")], "lr": config.learning_rate},
        {
            "params": [one for name, one in named if not name.startswith("policy.")],
            "lr": config.value_learning_rate,
        },
    ]
