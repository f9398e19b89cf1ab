"""The models of PPO: a policy with its values, computed in one pass, and the frozen reference.

ActorCritic      log-probabilities and values of an answer's tokens
token_logprobs   log-probabilities alone, which is all that the reference is used for
load             the three models for a config
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cai_graph.errors import ConfigError
from trainers.policy import Policy, load_policy, load_reward
from trainers.ppo import Config
from trainers.stages.lora import without_dropout

__all__ = ["ActorCritic", "Batch", "Read", "as_reference", "load", "quiet", "token_logprobs", "whole_weights"]

T = TypeVar("T")


class Read(NamedTuple):
    """Results of one forward pass over the answers of a batch."""

    logprobs: Tensor
    """(B, A) log-probability of each token, in nats, at the temperature of sampling."""
    values: Tensor
    """(B, A) V of the text before each token."""
    entropy: Tensor | None
    """(B, A) entropy of the distribution that each token was drawn from, in nats; None if not requested."""


class Batch(NamedTuple):
    """Answers with their prompts, as model input."""

    ids: Tensor
    """(B, P + A) int64: prompts padded on the left, then answers padded on the right."""
    text: Tensor
    """(B, P + A) int64, 1 on tokens that are not padding."""
    mask: Tensor
    """(B, A) float32, 1 on the tokens of an answer."""


class ActorCritic(nn.Module):
    """A policy with its values, from a head on its last hidden state or from a separate model."""

    def __init__(self, policy: nn.Module, value_model: nn.Module | None = None) -> None:
        """Take a causal language model and, for separate values, a sequence classifier with one output."""
        super().__init__()
        self.policy = policy
        if value_model is None:
            config: Any = policy.config
            head = nn.Linear(config.get_text_config().hidden_size, 1)
            for parameter in head.parameters():
                nn.init.zeros_(parameter)  # so that the first values are 0, whatever the hidden state's scale
            self.value_head = head
        self.value_model = value_model
        self.config = policy.config  # DeepSpeed reads its hidden size to resolve "auto"
        self._no_split_modules = getattr(policy, "_no_split_modules", None)  # the layers that FSDP wraps

    def tie_weights(self) -> None:
        """Tie the policy's tied weights again, which FSDP calls after it has separated them."""
        tie: Any = self.policy.tie_weights
        tie()

    def around(self, work: Callable[[], T]) -> T:
        """Run `work`, which uses the policy without `forward`; FSDP gathers the outermost weights for it."""
        return work()

    def forward(self, batch: Batch, temperature: float, *, entropy: bool = False) -> Read:
        """Return log-probabilities and values of the answers' tokens."""
        width = batch.mask.shape[1]
        logprobs, entropies, hidden = token_logprobs(self.policy, batch, temperature, entropy=entropy)
        if self.value_model is None:
            values = self.value_head(hidden.to(self.value_head.weight.dtype))
        else:
            critic: Any = self.value_model
            trunk = getattr(critic, critic.base_model_prefix)
            states = trunk(
                input_ids=batch.ids,
                attention_mask=batch.text,
                position_ids=_positions(batch),
                use_cache=False,
            )
            values = critic.score(states.last_hidden_state[:, -width - 1 : -1])
            values = values - getattr(critic.config, "reward_shift", 0.0)  # as in every reward of this model
        return Read(logprobs, values.squeeze(-1).float(), entropies)


def token_logprobs(
    policy: nn.Module, batch: Batch, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return log-probabilities and entropies (B, A), and the hidden states (B, A, H) they come from."""
    width = batch.mask.shape[1]
    read = policy(
        input_ids=batch.ids,
        attention_mask=batch.text,
        position_ids=_positions(batch),
        logits_to_keep=width + 1,
        output_hidden_states=True,
        use_cache=False,
    )
    logits = read.logits[:, :-1].float() / temperature
    chosen = logits.gather(-1, batch.ids[:, -width:, None]).squeeze(-1)
    logprobs = chosen - logits.logsumexp(-1)
    spread = torch.special.entr(logits.softmax(-1)).sum(-1) if entropy else None
    return logprobs, spread, read.hidden_states[-1][:, -width - 1 : -1]


def _positions(batch: Batch) -> Tensor:
    return (batch.text.cumsum(1) - 1).clamp(min=0)


def whole_weights(actor: Any, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the policy's weights, gathered if they are sharded; all processes must call it."""
    found: dict[str, Tensor] = accelerator.get_state_dict(actor)
    policy: Any = accelerator.unwrap_model(actor).policy
    tied = getattr(policy, "all_tied_weights_keys", None) or {}
    weights = {name.removeprefix("policy."): one for name, one in found.items() if name.startswith("policy.")}
    return {name: one for name, one in weights.items() if tied.get(name) not in weights}


# --- loading ------------------------------------------------------------------------------------------


def load(config: Config, device: torch.device) -> tuple[Policy, ActorCritic, nn.Module | None]:
    """Return the policy, the same policy with its values, and its frozen reference.

    With an adapter there is no second copy: the reference is the policy without it, see `as_reference`.

    Raises:
        ConfigError, ModelError: a model cannot be read, adapters cannot be trained on it, or the value model
            has another vocabulary.
    """
    policy = _policy(config, device)
    reference = None
    if config.lora is None:
        reference = _policy(config, device).model.requires_grad_(False)
    else:
        from peft import get_peft_model

        config.lora.check(policy.model)
        with quiet():
            policy = Policy(get_peft_model(policy.model, config.lora.adapter()), policy.tokenizer)
    # With dropout, the policy that is trained would differ from the one that drew the answers.
    actor = without_dropout(ActorCritic(policy.model, _value_model(config, policy, device)).to(device))
    if config.recompute:
        model: Any = policy.model
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return policy, actor.train(config.recompute), reference


def _policy(config: Config, device: torch.device) -> Policy:
    # Weights that are trained stay in 32 bits, under autocast; the base weights of an adapter are only read.
    dtype = "auto" if config.lora and config.precision != "fp32" else "float32"
    return load_policy(config.model, dtype=dtype, device=str(device), quantized=config.quantized)


def _value_model(config: Config, policy: Policy, device: torch.device) -> nn.Module | None:
    if config.value_model is None:
        return None
    found = load_reward(config.value_model, dtype="float32", device=str(device))
    if found.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigError(
            f"value_model {config.value_model}: has another vocabulary than {config.model}, so it cannot "
            "read the policy's tokens; leave it out, and the values come from a head on the policy"
        )
    return found.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' FutureWarnings about names it will remove, which peft still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextlib.contextmanager
def as_reference(actor: ActorCritic, reference: nn.Module | None) -> Iterator[nn.Module]:
    """Yield the policy that training began with: the frozen copy, or this policy without its adapter."""
    if reference is not None:
        yield reference
        return
    policy: Any = actor.policy
    with policy.disable_adapter():
        yield policy
