"""Saves and loads the states of a PPO run, from which it resumes after an interrupt; a save is atomic.

OUTPUT.partial/plan.json        what the run was begun with: config, and digests of models and data
OUTPUT.partial/state-000012/    weights, optimizer and KL coefficient after update 12
OUTPUT.partial/best-000010/     the same after the update with the best held-out score, if a watch measures it
OUTPUT.partial/record/          log.jsonl, a line of figures per update, and the files of the watch; the whole
                                folder is copied into the Checkpoint
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from cai_graph.errors import ModelError
from trainers import atomic, lines
from trainers.ppo import Config
from trainers.stages import MAY_CHANGE, partial

__all__ = ["Progress", "States", "Which", "record"]

_MAY_CHANGE = MAY_CHANGE | {
    "epochs",
    "learning_rate",
    "max_steps",
    "schedule",
    "value_learning_rate",
    "warmup",
}
"""Settings that may differ when a run is resumed: a learning rate that was too high makes a run diverge."""

Which = Literal["state", "best"]


@dataclass
class Progress:
    """What a state contains besides weights and optimizer."""

    update: int = 0
    """Updates done."""
    kl_coefficient: float = 0.0
    """Price of a nat of KL in the next update."""
    seconds: float = 0.0
    """Training time so far, over all resumptions."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of the last update."""


def record(output: Path) -> Path:
    """Return the subfolder of a run's folder whose files go into the Checkpoint, next to its weights."""
    return partial.folder(output) / "record"


class States:
    """The folder of a run, and the states in it. All processes must call the same methods."""

    def __init__(self, config: Config, accelerator: Accelerator, plan: Mapping[str, Any]) -> None:
        """Create the folder, or open that of the interrupted run.

        Raises:
            ConfigError: the run was begun with another plan; the message lists what changed.
        """
        self.folder = partial.folder(config.output)
        self.record = record(config.output)
        self._figures = self.record / "log.jsonl"
        self._accelerator = accelerator
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.same_plan(self.folder, plan, _MAY_CHANGE, points="state-*")
            self.record.mkdir(exist_ok=True)
        accelerator.wait_for_everyone()

    def last(self) -> Path | None:
        """Return the folder of the last complete state; None: there is none."""
        return max(self.folder.glob("state-*"), default=None)

    def load(self) -> Progress | None:
        """Load the last state into models and optimizer, and return its progress; None: there is none."""
        state = self.last()
        return None if state is None else self._loaded(state)

    def load_best(self, update: int) -> Progress:
        """Load the state that was saved as the best one after this update into models and optimizer.

        Raises:
            ModelError: there is none.
        """
        state = self._path("best", update)
        if not state.exists():
            raise ModelError(
                f"{state}: the best weights are not there any more; remove the folder to start again"
            )
        return self._loaded(state)

    def _loaded(self, state: Path) -> Progress:
        self._accelerator.load_state(str(state))
        return Progress(**json.loads((state / "progress.json").read_text(encoding="utf-8")))

    def _path(self, which: Which, update: int) -> Path:
        return self.folder / f"{which}-{update:06}"

    def save(self, progress: Progress, which: Which = "state") -> None:
        """Save a state, which replaces the one before it.

        Raises:
            ModelError: it cannot be written, for instance on a full disk; the previous state is kept.
        """
        state = self._path(which, progress.update)
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
                atomic.sync(work)
                os.replace(work, state)
                self._drop_older()
        except partial.unwritable() as error:
            shutil.rmtree(work, ignore_errors=True)
            raise ModelError(f"{state}: cannot be written: {error}; the state before it is kept") from error
        accelerator.wait_for_everyone()

    def _drop_older(self) -> None:
        """Keep the last state, the best one, and the best one at the time that last state was written."""
        states, bests = (sorted(map(_update, self.folder.glob(f"{which}-*"))) for which in ("state", "best"))
        last = states[-1] if states else 0
        reachable = max((one for one in bests if one <= last), default=None)
        for update in states[:-1]:
            shutil.rmtree(self._path("state", update))
        for update in bests[:-1]:
            if update != reachable:
                shutil.rmtree(self._path("best", update))

    def log(self, update: int, figures: dict[str, float]) -> None:
        """Append a line of figures."""
        lines.append(self._figures, {"update": update, **figures})

    def forget_after(self, update: int) -> None:
        """Delete what was saved for later updates, since a resumed run repeats those updates.

        Raises:
            DataError: a line of figures is damaged.
        """
        for best in self.folder.glob("best-*"):
            if _update(best) > update:
                shutil.rmtree(best)
        lines.keep(self._figures, lambda row: row["update"] <= update, "delete the line and run again")


def _update(state: Path) -> int:
    """Return the update after which a state was saved."""
    return int(state.name.rpartition("-")[2])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress accelerate's warning about tied weights: they are written once, and tied again on loading."""
    logger = logging.getLogger("accelerate.utils.other")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
