"""Train a policy with PPO on any reward; needs only torch and accelerate.

A token is a step and an answer is an episode: the state is the text so far, the action the next token. One
update draws `rollout_size` answers, scores them, and makes `ppo_epochs` passes over them in minibatches of
batch_size x accumulate x processes answers. `formulas` has the mathematics, `loop` the training loop, and
`ways` how processes share a policy and take an optimizer step on it.

Sources: Schulman et al. 2017 (PPO, arXiv:1707.06347), Schulman et al. 2015 (GAE, arXiv:1506.02438), Ziegler
et al. 2019 (KL in the reward of every token, adaptive coefficient, arXiv:1909.08593), Stiennon et al. 2020
(arXiv:2009.01325), Ouyang et al. 2022 (arXiv:2203.02155), and, for details found in their code only, Huang et
al. 2024 (arXiv:2403.17031): Adam's epsilon of 1e-5, whitened advantages, no dropout, a penalty for a missing
end-of-text token.

Two differences from these sources: a loss is the sum over all tokens of a minibatch divided by their number,
so that it does not matter how a minibatch is split into forward passes or over processes. And every random
draw is seeded by (seed, update), so that a run that was killed resumes exactly as it would have continued.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_graph.errors import CaiError, ConfigError
from trainers import atomic
from trainers.checkpoint import Checkpoint
from trainers.config import above, at_least
from trainers.identity import identity_of_reward
from trainers.rewards import Spec, folders
from trainers.stages import StageConfig, check_machine, partial
from trainers.watch import WatchConfig

__all__ = ["Config", "Diverged", "train"]


class Diverged(CaiError):  # noqa: N818
    """A loss or a gradient is not finite; the message names the update and its prompts."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Configuration of a PPO run. `epochs` are passes over the prompts, and `max_steps` counts updates."""

    reward: Spec
    """Reward of the answers; see `trainers.rewards.parse`."""
    watch: WatchConfig | None
    """When the run is measured and when it is stopped; null: no watch."""
    value_model: str | None = None
    """A reward model with the policy's tokenizer, to initialise the value model (Stiennon et al. 2020); None:
    the values come from a head on the policy's last hidden state (Ziegler et al. 2019)."""
    learning_rate: float = 3e-6
    """Learning rate of the policy."""
    value_learning_rate: float = 1e-5
    """Learning rate of the value head, or of the value model."""
    rollout_size: int = 64
    """Answers sampled for an update, over all processes."""
    rollout_batch: int = 32
    """Answers sampled in one batch on one device."""
    ppo_epochs: int = 4
    """Passes over the answers of an update."""
    max_answer: int = 128
    """Maximum tokens of an answer; prompts may fill the rest of `max_tokens`."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are computed at it, too."""
    gamma: float = 1.0
    """Discount of later rewards, in [0, 1]."""
    lam: float = 0.95
    """λ of GAE, in [0, 1]."""
    clip: float = 0.2
    """ε of PPO: beyond a probability ratio of 1 ± clip, a token gains nothing more in this update."""
    value_clip: float = 0.2
    """The same limit for a value, as a difference in units of reward."""
    value_coefficient: float = 0.1
    """Weight of the value loss."""
    kl_coefficient: float = 0.05
    """Price of a nat of KL to the reference, in units of reward; the initial price if it adapts."""
    kl_target: float | None = None
    """KL per answer, in nats, that the coefficient adapts to; None: the coefficient is constant."""
    kl_horizon: float = 10_000
    """Answers over which an adaptive coefficient changes by at most 20 %; at least `rollout_size`."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of an answer that was cut off at `max_answer`."""
    max_grad_norm: float = 1.0
    """Maximum norm of a minibatch's gradient; a longer one is scaled down."""
    log_steps: int = 1
    """Updates between two lines of logged figures."""
    save_steps: int = 10
    """Updates between two saved states, from which an interrupted run resumes."""

    @property
    def learns_from(self) -> tuple[Path, ...]:
        """Folders of the reward models, and of the value model."""
        return tuple(folders(self.reward) + folders(self.value_model or []))

    @property
    def contents(self) -> dict[str, Any]:
        """Identities of the reward's and the watch's contents, by setting; see `trainers.identity`."""
        watched = {} if self.watch is None else self.watch.contents
        of_watch = {f"watch.{setting}": named for setting, named in watched.items()}
        return {"reward": identity_of_reward(self.reward), **of_watch}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None:
            self.lora.refuse_dropout("PPO")
        at_least(1, self, "rollout_size", "rollout_batch", "ppo_epochs", "max_answer")
        at_least(0, self, "kl_coefficient", "value_coefficient", "missing_eos_penalty")
        above(0, self, "temperature", "clip", "value_clip", "value_learning_rate")
        above(0, self, "kl_horizon", "max_grad_norm")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share from 0 to 1, found {getattr(self, name)!r}")
        if self.kl_target is not None and not self.kl_target > 0:
            raise ConfigError(f"kl_target is a number of nats above 0, found {self.kl_target!r}")
        if self.kl_target is not None and self.kl_horizon < self.rollout_size:
            raise ConfigError(
                f"kl_horizon ({self.kl_horizon:g}) is below rollout_size ({self.rollout_size}); the price of "
                "KL would change by more than 20 % in an update, and could fall below 0"
            )
        if self.max_answer >= self.max_tokens:
            raise ConfigError(
                f"max_answer ({self.max_answer:,}) leaves no room for a prompt in max_tokens "
                f"({self.max_tokens:,}); raise max_tokens"
            )
        self.check_processes(1)

    def check_processes(self, count: int) -> None:
        """Check that this many processes can train together: each update is cut into whole minibatches.

        Raises:
            ConfigError: they cannot.
        """
        minibatch = self.batch_size * self.accumulate * count
        if self.rollout_size % minibatch:
            raise ConfigError(
                f"rollout_size ({self.rollout_size}) is no multiple of batch_size x accumulate x processes "
                f"({self.batch_size} x {self.accumulate} x {count}); an update is cut into whole minibatches"
            )


def train(config: Config, tell: Callable[[int, int], None] = lambda done, total: None) -> Checkpoint:
    """Train a policy and return its Checkpoint; resume an interrupted run of the same config.

    Args:
        config: the configuration. Under `accelerate launch` every process passes the same one.
        tell: called with (updates done, updates in all) after each update, in the first process.

    Raises:
        ConfigError: the config cannot be run here; the message gives the reason.
        DataError: prompts cannot be trained on; the message names them.
        ModelError: models cannot be loaded, or the Checkpoint cannot be written.
        RewardError: the reward failed. The state is saved, and the same call resumes from it.
        Diverged: a loss or a gradient is not finite. The last good state is kept.
        MissingExtra: a package is not installed.
    """
    check_machine(config, "ppo")
    atomic.absent(config.output)
    from trainers.ppo.loop import Run, processes

    with partial.held(config.output, is_main=processes().is_main_process):
        return Run(config).train(tell)
