"""Builds a pipeline step that runs a training stage of `trainers` on what earlier steps made."""

from __future__ import annotations

import importlib
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cai_graph.errors import ConfigError, ModelError
from trainers import atomic, weights
from trainers.checkpoint import Checkpoint
from trainers.config import convert, plain
from trainers.distill import checks
from trainers.distill.config import Config, Section
from trainers.distill.launch import is_here, processes
from trainers.distill.pipeline import CHECKPOINT, ROWS, Folders, Step
from trainers.distill.sizes import Size
from trainers.identity import identity, identity_of_reward
from trainers.stages.encoding import open_data

__all__ = ["Training"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A stage of training in a pipeline."""

    config: Config
    """Config of the whole pipeline."""
    base: str
    """Identity of the pipeline's model; see `trainers.identity`."""
    size: Size
    """The estimated amount of training data."""
    stage: str
    """Name of the stage's module in `trainers`."""
    section: Section
    """The user's settings for the stage."""
    made: Mapping[str, Step]
    """The steps that make its `model`, `data` or `reward`. Without such a step, the model is the pipeline's,
    and data and reward are in the section."""

    def step(self, name: str) -> Step:
        """Return the stage as a pipeline step.

        Raises:
            ConfigError: the section has an unknown key, one that the pipeline sets, or an invalid value.
        """
        for key in self._ours:
            if key in self.section:
                raise ConfigError(f"{self._part}.{key}: is set by the pipeline; leave it out")
        return Step(
            name=name,
            settings=self._settings(),
            inputs=tuple(self.made.values()),
            work=self._work,
            check=self._check,
            needs=self.size.training(self.stage, self._planned),
        )

    @property
    def _part(self) -> str:
        """The section's name."""
        return self.stage if self.stage in ("sft", "reward") else "rl"

    @property
    def _ours(self) -> tuple[str, ...]:
        """Keys of the stage that users may not set. `reward` is not among them: users may name another
        reward, and then no reward model is trained."""
        return ("model", "output", *({"data"} & self.made.keys()))

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"trainers.{self.stage}")

    @cached_property
    def _planned(self) -> Any:
        """The stage's Config before any input exists, with "-" for its paths."""
        return self._read(dict.fromkeys(("model", "output", *self.made), Path("-")))

    def _read(self, paths: Mapping[str, Path]) -> Any:
        """Return the stage's Config; error messages name the section."""
        values = {**{key: str(path) for key, path in paths.items()}, "seed": self.config.seed, **self.section}
        further = ("method",) if self._part == "rl" else ()
        try:
            return convert(self._module.Config, values, hidden=self._ours, further=further)
        except ConfigError as error:
            raise ConfigError(f"{self._part}: {error}") from error

    @cached_property
    def _processes(self) -> int | None:
        return processes(self.config.launch)

    def _settings(self) -> dict[str, Any]:
        """Return the settings that affect the checkpoint besides the inputs; files are given by digest."""
        given = ("model", "output", *self.made)
        settings = {key: value for key, value in plain(self._planned).items() if key not in given}
        settings["processes"] = self._processes or list(self.config.launch)
        if "model" not in self.made:
            settings["model"] = self.base
        for key in ("data", "value_model"):
            if settings.get(key) is not None:
                settings[key] = identity(settings[key])
        if "reward" in settings:
            settings["reward"] = identity_of_reward(settings["reward"])
        if settings.get("watch") is not None:
            settings["watch"] |= self._planned.watch.contents
        return settings

    def _check(self) -> None:
        planned = self._planned
        if "model" not in self.made:
            with checks.in_section("model"):
                checks.model(self.config.model)
        with checks.in_section(self._part):
            checks.machine(planned, self.stage, self._processes, is_here=is_here(self.config.launch))
        if "data" not in self.made:
            with checks.in_section(f"{self._part}.data"):
                open_data(planned.data, self._module.KINDS)
        trained_on: frozenset[str] = frozenset()  # empty for a reward model that does not exist yet
        if "reward" not in self.made and hasattr(planned, "reward"):
            with checks.in_section(f"{self._part}.reward"):
                trained_on = checks.reward(planned.reward)
        if getattr(planned, "value_model", None) is not None:
            with checks.in_section(f"{self._part}.value_model"):
                checks.model(planned.value_model)
        if getattr(planned, "watch", None) is not None and self.size.prompts:
            with checks.in_section(f"{self._part}.watch"):
                held_out = self.size.prompts * self.config.rows.test_share
                checks.watch(planned.watch, trained_on, held_out)

    def _work(self, folders: Folders) -> dict[str, Any]:
        output = folders.own / CHECKPOINT
        if not output.exists():
            paths = {
                key: folders[step.name] / (ROWS if key == "data" else CHECKPOINT)
                for key, step in self.made.items()
            }
            if "model" not in paths:
                paths["model"] = weights.resolve(self.config.model)
            self._train(self._read({**paths, "output": output}), folders.own / "config.yaml")
        found = Checkpoint.open(output)
        metrics = {} if found.manifest is None else dict(found.manifest.metrics)
        return {"digest": found.digest, "metrics": metrics}

    def _train(self, config: Any, file: Path) -> None:
        """Train in this process, or run `cai train` under the launch command, with the config in a file."""
        if not self.config.launch:
            self._module.train(config)
            return
        text = yaml.safe_dump(plain(config, passwords=True), sort_keys=False)
        atomic.write(file, text, mode=0o600)
        command = [*self.config.launch, "-m", "cai_graph.cli", "train", self.stage, "--config", str(file)]
        try:
            status = subprocess.run(command, check=False).returncode
        except OSError as error:
            raise ConfigError(f"launch: {command[0]!r} cannot be started: {error.strerror}") from error
        if status:
            raise ModelError(f"`{shlex.join(command)}` ended with status {status}; it says why above")
