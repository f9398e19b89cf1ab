"""PPO: a policy learns from any reward, on torch and accelerate alone.

A token is a step and an answer is an episode: the state is the text so far, the action the next token. One
update draws `rollout_size` answers, scores them, and takes `ppo_epochs` passes over them in minibatches of
batch_size x accumulate x processes answers. The mathematics stand in `formulas`, the loop in `loop`, and how
processes share a policy and take a step of it in `ways`.

Sources: Schulman et al. 2017 (PPO, arXiv:1707.06347), Schulman et al. 2015 (GAE, arXiv:1506.02438), Ziegler
et al. 2019 (KL in the reward of every token, adaptive coefficient, arXiv:1909.08593), Stiennon et al. 2020
(arXiv:2009.01325), Ouyang et al. 2022 (arXiv:2203.02155), and, for what their code does beside, Huang et al.
2024 (arXiv:2403.17031): Adam's epsilon of 1e-5, whitened advantages, no dropout, a penalty for a missing end.

Where this differs: a loss is the sum over the tokens of a whole minibatch by their number, so that it does
not matter how a minibatch is cut into forward passes or spread over processes. And every draw is seeded by
(seed, update), so that a run that was killed goes on exactly as it would have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_graph.errors import CaiError, ConfigError
from trainers import whole
from trainers.checkpoint import Checkpoint
from trainers.config import above, at_least
from trainers.identity import identity_of_reward
from trainers.rewards import Spec, folders
from trainers.stages import StageConfig, check_machine, partial
from trainers.watch import WatchConfig

__all__ = ["Config", "Diverged", "train"]


class Diverged(CaiError):  # noqa: N818
    """A loss or a gradient is no number any more; names the update and its prompts."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """What a PPO run is told. `epochs` are passes over the prompts, and `max_steps` counts updates."""

    reward: Spec
    """What answers are worth; see `trainers.rewards.parse`."""
    watch: WatchConfig | None
    """When the run is observed and stopped; null: by nobody."""
    value_model: str | None = None
    """A reward model with the policy's tokenizer that becomes the value model (Stiennon et al. 2020); None: a
    head on the policy's last hidden state (Ziegler et al. 2019)."""
    learning_rate: float = 3e-6
    """Of the policy."""
    value_learning_rate: float = 1e-5
    """Of the value head, or of the value model."""
    rollout_size: int = 64
    """Answers drawn for an update, over all processes."""
    rollout_batch: int = 32
    """Answers written at once on one device."""
    ppo_epochs: int = 4
    """Passes over the answers of an update."""
    max_answer: int = 128
    """Longest answer; prompts may fill the rest of `max_tokens`."""
    temperature: float = 1.0
    """Of the draw, and of the log-probabilities."""
    gamma: float = 1.0
    """Discount of later rewards, in [0, 1]."""
    lam: float = 0.95
    """λ of GAE, in [0, 1]."""
    clip: float = 0.2
    """How far the probability of a token may profitably move in an update, as a ratio: 1 ± clip."""
    value_clip: float = 0.2
    """The same of a value, in units of reward."""
    value_coefficient: float = 0.1
    """Weight of the value loss."""
    kl_coefficient: float = 0.05
    """Price of a nat of KL to the reference, in units of reward; the first one where it adapts."""
    kl_target: float | None = None
    """KL of an answer, in nats, that the coefficient is adapted to; None: it stays as it is."""
    kl_horizon: float = 10_000
    """Answers over which an adaptive coefficient changes by at most 20 %; no fewer than `rollout_size`."""
    missing_eos_penalty: float = 1.0
    """Taken from the score of an answer that was cut at `max_answer`."""
    max_grad_norm: float = 1.0
    """Longest gradient of a minibatch; a longer one is scaled down."""
    log_steps: int = 1
    """Updates between two lines of figures."""
    save_steps: int = 10
    """Updates between two states that an interrupted run goes on from."""

    @property
    def learns_from(self) -> tuple[Path, ...]:
        """Folders of the reward models, and of the value model."""
        return tuple(folders(self.reward) + folders(self.value_model or []))

    @property
    def contents(self) -> dict[str, Any]:
        """What names the content behind the reward and the watch."""
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
        """Make sure that so many processes can train together: each update is cut into whole minibatches.

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
    """Train a policy, and return its Checkpoint; take up where an interrupted run of this config stood.

    Args:
        config: what to do. Under `accelerate launch` every process calls this with the same one.
        tell: told (updates done, updates in all) after each update, in the first process.

    Raises:
        ConfigError: the config cannot work here; says why.
        DataError: prompts cannot be trained on; says which.
        ModelError: models cannot be loaded, or the Checkpoint cannot be written.
        RewardError: the reward is out. The state is kept, and the same call goes on from it.
        Diverged: a loss or a gradient is no number. The last good state is kept.
        MissingExtra: a package is not installed.
    """
    check_machine(config, "ppo")
    whole.absent(config.output)
    from trainers.ppo.loop import Run, processes

    with partial.held(config.output, is_main=processes().is_main_process):
        return Run(config).train(tell)
