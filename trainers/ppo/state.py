"""States of a PPO run, to go on from after an interrupt: each is whole or not there.

OUTPUT.partial/config.json      the config that the run was begun with
OUTPUT.partial/state-000012/    weights, optimizer and KL coefficient after update 12
OUTPUT.partial/best-000010/     the same after the update with the best held-out score, where one is watched
OUTPUT.partial/record/          log.jsonl, a line of figures an update, and what the watch wrote; all of it
                                goes along into the Checkpoint
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from cai_graph.errors import ConfigError, ModelError
from trainers import partial, whole
from trainers.config import plain
from trainers.ppo import Config

__all__ = ["Progress", "States", "Which", "record"]

MAY_CHANGE = frozenset(
    {"learning_rate", "value_learning_rate", "schedule", "warmup", "epochs", "max_steps"}
    | {"report_to", "log_steps", "save_steps"}
)
"""What a run that is taken up again may be told anew."""

Which = Literal["state", "best"]


@dataclass
class Progress:
    """What a state holds beside weights and optimizer."""

    update: int = 0
    """Updates done."""
    kl_coefficient: float = 0.0
    """Price of a nat in the next update."""
    seconds: float = 0.0
    """Of training so far, over all resumptions."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of the last update."""


def record(output: Path) -> Path:
    """Return the folder in a run's folder whose files go into the Checkpoint, beside its weights."""
    return partial.folder(output) / "record"


class States:
    """The folder of a run, and the states in it. All processes call the same methods."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        """Make the folder, or open that of the interrupted run.

        Raises:
            ConfigError: the run was begun with another config; names the keys.
        """
        self.folder = partial.folder(config.output)
        self.record = record(config.output)
        self._accelerator = accelerator
        told = json.loads(json.dumps(plain(config)))  # as it comes back from the file
        path = self.folder / "config.json"
        if accelerator.is_main_process:
            self.record.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                whole.write(path, json.dumps(told, indent=2) + "\n")
        accelerator.wait_for_everyone()
        before = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(key for key in told if key not in MAY_CHANGE and told[key] != before.get(key))
        if other:
            raise ConfigError(
                f"{self.folder}: the run was begun with another {', '.join(other)}; go on with what it was, "
                "remove the folder, or name another output"
            )

    def last(self, which: Which = "state") -> Path | None:
        """Return the last whole state, or the best one."""
        return max(self.folder.glob(f"{which}-*"), default=None)

    def load(self, which: Which = "state") -> Progress | None:
        """Put the last or the best state into models and optimizer, and return how far it is; None: none."""
        state = self.last(which)
        if state is None:
            return None
        self._accelerator.load_state(str(state))
        return Progress(**json.loads((state / "progress.json").read_text(encoding="utf-8")))

    def save(self, progress: Progress, which: Which = "state") -> None:
        """Keep a state, in place of the one before.

        Raises:
            ModelError: it cannot be written, for instance on a full disk; the one before it stays.
        """
        state = self.folder / f"{which}-{progress.update:06}"
        accelerator = self._accelerator
        if state.exists():
            return
        work = self.folder / "unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(work, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            with _quiet():
                accelerator.save_state(str(work))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (work / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
                whole.sync(work)
                os.replace(work, state)
                for older in sorted(self.folder.glob(f"{which}-*"))[:-1]:
                    shutil.rmtree(older)
        except partial.unwritable() as error:
            shutil.rmtree(work, ignore_errors=True)
            raise ModelError(f"{state}: cannot be written: {error}; the state before it is kept") from error
        accelerator.wait_for_everyone()

    def log(self, update: int, figures: dict[str, float]) -> None:
        """Write a line of figures."""
        with (self.record / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"update": update, **figures}) + "\n")

    def forget_after(self, update: int) -> None:
        """Drop the lines of figures after an update, which a run that is taken up writes again."""
        path = self.record / "log.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut off
                if json.loads(line)["update"] <= update:
                    kept.append(line + "\n")
        whole.write(path, "".join(kept))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what accelerate says of tied weights: they are written once, and tied when read."""
    logger = logging.getLogger("accelerate.utils.other")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
