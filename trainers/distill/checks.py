"""Checks a config before any work is done, with the same functions that the steps use.

No model is started and no request is made. Results of steps do not exist yet, and are not checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cai_graph import local
from cai_graph.addresses import without_password
from cai_graph.errors import CaiError, ConfigError, MissingExtra
from trainers import online, ppo, weights
from trainers.checkpoint import Checkpoint
from trainers.distill.who import unasked_reward
from trainers.refusal import by_probe
from trainers.rewards import Spec, folders, parse, sources
from trainers.stages import StageConfig, check_machine
from trainers.watch import WatchConfig
from trainers.watch.rules import FEWEST

__all__ = ["in_section", "machine", "model", "reward", "watch"]


@contextlib.contextmanager
def in_section(name: str) -> Iterator[None]:
    """Convert errors in the body to ConfigErrors that name a section of the config.

    Raises:
        ConfigError: with the message of the error.
        MissingExtra: a package is not installed.
    """
    try:
        yield
    except MissingExtra:
        raise
    except CaiError as error:
        raise ConfigError(f"{name}: {error}") from error


def model(spec: str) -> None:
    """Check weights on this machine; those of the catalogue or the model hub are downloaded when needed.

    Raises:
        CaiError: they cannot be trained from.
    """
    path, name = weights.path_of(spec), local.name_in(spec)
    if path is not None and path.is_dir():
        Checkpoint.open(path)
    elif spec.lower().endswith(".gguf"):
        local.weights(spec if name is None else name)
    elif name is not None:
        local.find(name)
    elif not weights.is_hub_name(spec):
        weights.resolve(spec)


def reward(spec: Spec) -> frozenset[str]:
    """Check a reward's spec, and return the sources of its numbers, as `trainers.rewards.sources` does.

    Raises:
        CaiError: there is no such reward.
    """
    for folder in folders(spec):
        Checkpoint.open(folder)
    return sources(parse(unasked_reward(spec)))


def watch(config: WatchConfig, trained_on: frozenset[str], held_out: float) -> None:
    """Check that a watch can work.

    Args:
        config: as the user wrote it.
        trained_on: sources of the reward that the policy is trained on.
        held_out: expected number of held-out prompts.

    Raises:
        CaiError: the judge or a file does not exist, or there are too few prompts.
    """
    with in_section("judge"):
        if reward(config.judge) & trained_on:
            judge = without_password(str(config.judge))
            raise ConfigError(f"{judge} is what the policy is trained on; name another judge")
    config.asks([])  # reads the benign prompts
    if config.evasion is not None:
        by_probe(config.evasion)
    if round(held_out) < FEWEST:
        raise ConfigError(
            f"about {held_out:.0f} prompts will be held out, and the watch tells nothing from noise below "
            f"{FEWEST}; raise rows.test_share, name more prompts, or go without it (watch: null)"
        )


def machine(config: StageConfig, module: str, processes: int | None, *, is_here: bool) -> None:
    """Check that a stage can be trained where it is going to run.

    Args:
        config: of the stage.
        module: the stage's name.
        processes: number of processes that train together; None if unknown.
        is_here: whether they run on this machine.

    Raises:
        ConfigError: a GPU or package that a setting needs is missing, or the stage cannot be trained in this
            number of processes.
        MissingExtra: a package that every stage needs is not installed.
    """
    if is_here:
        check_machine(config, module)
    if processes is not None and isinstance(config, online.Config | ppo.Config):
        config.check_processes(processes)
    trains: Any = getattr(config, "trains", None)
    if trains == "head" and processes is not None and processes > 1:
        raise ConfigError(
            f"trains: head is a fit of one process, and launch starts {processes}; leave launch out, or "
            "train weights"
        )
