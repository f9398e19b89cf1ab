"""Turns a config of PPO, RLOO or GRPO into the command that runs it on a cluster, with verl or OpenRLHF.

    verl       `python -m verl.trainer.main_ppo` with Hydra overrides
    openrlhf   `python -m openrlhf.cli.train_ppo_ray` with its arguments

The prompts are those of `cai dataset build --kind prompts --format verl`, or `openrlhf`. Settings that an
engine lacks or treats differently are listed next to the command, never omitted silently; the first of them
is the Goodhart watch, which neither engine has. Option names are those of verl 0.9.1 and OpenRLHF 0.11.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from cai_graph.addresses import without_password
from cai_graph.errors import ConfigError
from trainers import online, ppo
from trainers.dataset import read_manifest

__all__ = ["Command", "Engine", "command"]

Engine = Literal["verl", "openrlhf"]


class Command(NamedTuple):
    """The command that starts another engine."""

    arguments: tuple[str, ...]
    """The command as a list of words."""
    differs: tuple[str, ...]
    """Differences from our own stage, as sentences for the user."""


@dataclass(frozen=True)
class _Plan:
    """The settings that both engines need, in answers and tokens."""

    algorithm: Literal["ppo", "rloo", "grpo"]
    prompts: int
    """Prompts per update."""
    answers: int
    """Answers to each prompt."""
    minibatch: int
    """Answers between two optimizer steps."""
    beta: float
    passes: int
    """Passes over the answers of an update."""


def command(
    config: online.Config | ppo.Config, engine: Engine, data: Path, *, gpus: int = 8, nodes: int = 1
) -> Command:
    """Return the command with which an engine runs this config.

    Args:
        config: of the stage `ppo` or `online`; its `data` is not read.
        engine: `verl` or `openrlhf`.
        data: prompts in that engine's format.
        gpus: GPUs of a machine.
        nodes: machines; batch_size and accumulate of the config apply to each of their GPUs.

    Raises:
        ConfigError: the data is not in the engine's format or has too few prompts for an update, the reward
            is not a reward model, or an update's answers cannot be divided evenly among the GPUs.
        DataError: the dataset's manifest cannot be read.
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"engine is one of {', '.join(get_args(Engine))}; found {engine!r}")
    manifest = read_manifest(data)
    found = manifest.get("recipe", {}).get("kind"), manifest.get("format")
    if found != ("prompts", engine):
        raise ConfigError(
            f"{data}: holds {found[0]} for {found[1]}; build it with --kind prompts --format {engine}"
        )
    if not isinstance(config.reward, str) or not Path(config.reward).expanduser().is_dir():
        named = without_password(repr(config.reward))
        raise ConfigError(
            f"reward {named}: {engine} takes the folder of one reward model; average an ensemble's "
            "weights into one, or train here"
        )
    plan = _plan(config, gpus * nodes)
    rows = manifest["ledger"]["kept"].get("train", 0)
    if rows < plan.prompts:
        raise ConfigError(f"{data}: holds {rows:,} prompts, and an update draws {plan.prompts:,}")
    write = _verl if engine == "verl" else _openrlhf
    return write(config, plan, data, rows, gpus, nodes)


def _plan(config: online.Config | ppo.Config, processes: int) -> _Plan:
    update = config.batch_size * config.accumulate * processes
    if isinstance(config, ppo.Config):
        if config.rollout_size % update:
            raise ConfigError(
                f"rollout_size {config.rollout_size} is no multiple of the {update} answers of a minibatch "
                f"on {processes} GPUs (batch_size x accumulate x GPUs)"
            )
        return _Plan("ppo", config.rollout_size, 1, update, config.kl_coefficient, config.ppo_epochs)
    if update % config.answers:
        raise ConfigError(f"{update} answers of an update are no multiple of answers {config.answers}")
    return _Plan(config.algorithm, update // config.answers, config.answers, update, config.beta, 1)


def _epochs(config: online.Config | ppo.Config, updates: int) -> int:
    """Return the passes over the prompts, whole as engines need them; one pass has `updates` updates."""
    return max(1, round(config.epochs)) if config.max_steps is None else math.ceil(config.max_steps / updates)


def _differs(config: online.Config | ppo.Config, engine: Engine, epochs: int) -> list[str]:
    found = [] if config.watch is None else [f"watch: {engine} has none; nothing stops a run that is hacked"]
    if config.max_steps is None and config.epochs != epochs:
        found.append(f"epochs: {engine} makes whole passes over the prompts, here {epochs}")
    if isinstance(config, ppo.Config):
        if config.kl_target is not None and engine == "verl":
            found.append("kl_target: adapts in nats a token, here in nats an answer; set its target yourself")
        if config.missing_eos_penalty:
            found.append(f"missing_eos_penalty: not carried over to {engine}")
    if config.quantized:
        found.append(f"quantized: not carried over to {engine}")
    return found


def _verl(
    config: online.Config | ppo.Config, plan: _Plan, data: Path, rows: int, gpus: int, nodes: int
) -> Command:
    test = data / "test.parquet"
    epochs = _epochs(config, rows // plan.prompts)  # verl drops the last, incomplete batch of a pass
    actor = "actor_rollout_ref.actor"
    values: dict[str, Any] = {
        "algorithm.adv_estimator": "gae" if plan.algorithm == "ppo" else plan.algorithm,
        "data.train_files": data / "train.parquet",
        "data.val_files": test if test.exists() else data / "train.parquet",
        "data.prompt_key": "prompt",
        "data.train_batch_size": plan.prompts,
        "data.max_prompt_length": config.max_tokens - config.max_answer,
        "data.max_response_length": config.max_answer,
        "data.seed": config.seed,
        "actor_rollout_ref.model.path": config.model,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": plan.answers,
        "actor_rollout_ref.rollout.temperature": config.temperature,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": config.batch_size,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": config.batch_size,
        f"{actor}.ppo_mini_batch_size": plan.minibatch // plan.answers,
        f"{actor}.ppo_micro_batch_size_per_gpu": config.batch_size,
        f"{actor}.ppo_epochs": plan.passes,
        f"{actor}.optim.lr": config.learning_rate,
        f"{actor}.optim.lr_warmup_steps_ratio": config.warmup,
        f"{actor}.optim.lr_scheduler_type": "constant" if config.schedule == "constant" else "cosine",
        "reward.reward_model.enable": True,
        "reward.reward_model.model_path": config.reward,
        "reward.reward_model.rollout.name": "vllm",
        "trainer.n_gpus_per_node": gpus,
        "trainer.nnodes": nodes,
        "trainer.total_epochs": epochs,
        "trainer.save_freq": config.save_steps,
        "trainer.val_before_train": False,
        "trainer.logger": "[console]",
        "trainer.default_local_dir": config.output,
    }
    # The KL penalty is where our trainers have it: in GRPO's loss, and in the reward of the others.
    if plan.algorithm == "grpo":
        values |= {f"{actor}.use_kl_loss": plan.beta > 0, f"{actor}.kl_loss_coef": plan.beta}
    else:
        values |= {"algorithm.use_kl_in_reward": plan.beta > 0, "algorithm.kl_ctrl.kl_coef": plan.beta}
    if config.max_steps is not None:
        values["trainer.total_training_steps"] = config.max_steps
    if config.lora is not None:
        values["actor_rollout_ref.model.lora_rank"] = config.lora.rank
        values["actor_rollout_ref.model.lora_alpha"] = round(config.lora.alpha)
    if isinstance(config, ppo.Config):
        values |= {
            "algorithm.gamma": config.gamma,
            "algorithm.lam": config.lam,
            f"{actor}.clip_ratio": config.clip,
            "critic.model.path": config.value_model or config.model,
            "critic.optim.lr": config.value_learning_rate,
            "critic.cliprange_value": config.value_clip,
            "critic.ppo_micro_batch_size_per_gpu": config.batch_size,
        }
    differs = _differs(config, "verl", epochs)
    if config.schedule == "linear":
        differs.append("schedule: verl has no linear one; its cosine falls to the same end")
    overrides = (f"{key}={value}" for key, value in values.items())
    return Command(("python", "-m", "verl.trainer.main_ppo", *overrides), tuple(differs))


_OPENRLHF_ADVANTAGES = {"ppo": "gae", "rloo": "rloo", "grpo": "group_norm"}
_OPENRLHF_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def _openrlhf(
    config: online.Config | ppo.Config, plan: _Plan, data: Path, rows: int, gpus: int, nodes: int
) -> Command:
    a_pass = math.ceil(rows / plan.prompts)  # updates per pass; the last one may be smaller
    epochs = _epochs(config, a_pass)
    values: dict[str, Any] = {
        "actor.model_name_or_path": config.model,
        "reward.model_name_or_path": config.reward,
        "data.prompt_dataset": data / "train.jsonl",
        "data.input_key": "input",
        "data.label_key": "label",
        "data.max_len": config.max_tokens,
        "rollout.max_new_tokens": config.max_answer,
        "rollout.temperature": config.temperature,
        "rollout.batch_size": plan.prompts,
        "rollout.n_samples_per_prompt": plan.answers,
        "rollout.micro_batch_size": config.batch_size,
        "train.batch_size": plan.minibatch,
        "train.micro_batch_size": config.batch_size,
        "train.max_epochs": plan.passes,
        "train.num_episodes": epochs,
        "train.seed": config.seed,
        "algo.advantage.estimator": _OPENRLHF_ADVANTAGES[plan.algorithm],
        "algo.kl.init_coef": plan.beta,
        "actor.adam.lr": config.learning_rate,
        "actor.lr_scheduler": _OPENRLHF_SCHEDULES[config.schedule],
        "actor.lr_warmup_ratio": config.warmup,
        "actor.num_nodes": nodes,
        "actor.num_gpus_per_node": gpus,
        "ref.num_nodes": nodes,
        "ref.num_gpus_per_node": gpus,
        "reward.num_nodes": nodes,
        "reward.num_gpus_per_node": gpus,
        "vllm.num_engines": gpus * nodes,
        "ckpt.output_dir": config.output,
        "ckpt.save_steps": config.save_steps,
    }
    flags = ["--data.apply_chat_template", "--train.colocate_all", "--vllm.enable_sleep", "--ds.enable_sleep"]
    if plan.algorithm == "grpo":
        flags.append("--algo.kl.use_loss")
        values["algo.kl.estimator"] = "k3"
    differs = _differs(config, "openrlhf", epochs)
    if config.max_steps is not None:
        if epochs == 1:
            values["data.max_samples"] = config.max_steps * plan.prompts
        elif config.max_steps != epochs * a_pass:
            differs.append(f"max_steps: openrlhf makes whole passes, here {epochs * a_pass:,} updates")
    if config.lora is not None:
        values |= {"ds.lora.rank": config.lora.rank, "ds.lora.alpha": round(config.lora.alpha)}
    if isinstance(config, ppo.Config):
        values |= {
            "algo.advantage.gamma": config.gamma,
            "algo.advantage.lambd": config.lam,
            "actor.eps_clip": config.clip,
            "critic.model_name_or_path": config.value_model or config.model,
            "critic.adam.lr": config.value_learning_rate,
            "critic.value_clip": config.value_clip,
            "critic.num_nodes": nodes,
            "critic.num_gpus_per_node": gpus,
        }
        if config.kl_target is not None:
            values |= {"algo.kl.target": config.kl_target, "algo.kl.horizon": round(config.kl_horizon)}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return Command(("python", "-m", "openrlhf.cli.train_ppo_ray", *words, *flags), tuple(differs))
