"""Runs steps and stores their results under a digest of what they depend on, so that nothing is done twice.

The name of a step's folder has the digest of its settings and its inputs' digests: OUT/stages/sft-3f2a…. A
change in a config gives new names to the steps that depend on it; the other steps are found and skipped, and
going back to an older config finds the older folders. A step is finished once its `stage.json` exists, which
is written last; until then the step resumes in its folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cai_graph.errors import CaiError, ConfigError, DataError
from cai_graph.failures import describe
from trainers import atomic

__all__ = [
    "CHECKPOINT",
    "DONE",
    "EVALUATION",
    "LOG",
    "ROWS",
    "Done",
    "Folders",
    "Needs",
    "Pipeline",
    "State",
    "Step",
    "StepFailed",
    "Tell",
]

DONE = "stage.json"
"""File in the folder of every finished step."""
LOG, ROWS, CHECKPOINT, EVALUATION = "log.db", "rows", "checkpoint", "evaluation"
"""Names of a step's results in its folder, by their kind."""

State = Literal["done", "begun", "new"]
Figures = Mapping[str, Any]


class StepFailed(CaiError):  # noqa: N818
    """A step of a pipeline failed; the message names the step and has its cause's message."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step


class Needs(NamedTuple):
    """Estimated use of one model by a step, in tokens."""

    parameters: float | None
    """Approximate number of weights; None if another machine computes."""
    read: int = 0
    """Tokens of prompts."""
    written: int = 0
    """Tokens generated."""
    trained: int = 0
    """Tokens of forward and backward passes, over all epochs."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One unit of work, with its own folder."""

    name: str
    """Unique in its pipeline."""
    settings: Mapping[str, Any]
    """Everything that affects the result besides the inputs, as JSON; files are given by their digest."""
    inputs: tuple[Step, ...] = ()
    """Steps whose folders it reads."""
    work: Callable[[Folders], Figures] = field(compare=False)
    """Does the work in `folders.own`, resuming from what is there, and returns figures to record."""
    check: Callable[[], None] = field(default=lambda: None, compare=False)
    """Raises errors that can be detected before any work is done."""
    needs: tuple[Needs, ...] = ()
    """Estimated use of each model."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the settings and the inputs' digests, in hexadecimal."""
        shaping = [self.name, self.settings, [one.digest for one in self.inputs]]
        text = json.dumps(shaping, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Folders:
    """The folder a step works in, and those of its inputs."""

    own: Path
    """The step's folder; it exists."""
    inputs: Mapping[str, Path]
    """The finished folder of each input, by name."""

    def __getitem__(self, name: str) -> Path:
        return self.inputs[name]


class Done(NamedTuple):
    """A finished step."""

    path: Path
    """Its folder."""
    figures: Figures
    """The figures that its work returned."""
    seconds: float
    """Duration of the work, not counting interrupted attempts."""
    skipped: bool
    """Whether it was finished by an earlier run."""


Tell = Callable[[Step, Literal["skipped", "begins", "goes on", "done"], float], None]
"""Callback for progress: called with each step, the event and the duration in seconds."""


class Pipeline:
    """Steps in an order in which each one comes after its inputs."""

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        """Set up the pipeline; no file is read yet.

        Raises:
            ConfigError: two steps have the same name, or a step comes before one of its inputs.
        """
        seen: list[Step] = []
        for step in steps:
            if step.name in {one.name for one in seen}:
                raise ConfigError(f"two steps are called {step.name!r}")
            if any(one not in seen for one in step.inputs):
                raise ConfigError(f"step {step.name!r} stands before one of its inputs")
            seen.append(step)
        self.folder, self.steps = folder, tuple(steps)

    def path(self, step: Step) -> Path:
        """Return the folder of a step."""
        return self.folder / "stages" / f"{step.name}-{step.digest[:12]}"

    def state(self, step: Step) -> State:
        """Return whether a step is done, was begun and interrupted, or is new."""
        path = self.path(step)
        if (path / DONE).exists():
            return "done"
        return "begun" if path.is_dir() else "new"

    def done(self, step: Step) -> Done | None:
        """Return a finished step, or None if it is not finished.

        Raises:
            DataError: its stage.json cannot be read.
        """
        path = self.path(step)
        try:
            found = json.loads((path / DONE).read_text(encoding="utf-8"))
            return Done(path, found["figures"], found["seconds"], True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path / DONE}: cannot be read ({error}); remove {path}") from error

    def check(self) -> None:
        """Check every step that is not finished: a skipped step needs no API key, package or GPU.

        Raises:
            CaiError: whatever a step's `check` raises.
        """
        for step in self.steps:
            if self.state(step) != "done":
                step.check()

    def run(
        self, tell: Tell, finish: Callable[[Mapping[str, Done]], None] = lambda finished: None
    ) -> dict[str, Done]:
        """Run the steps that are not finished, in order, and return all steps by name.

        Args:
            tell: called for each step.
            finish: called with all steps at the end, while the folder is still locked against other runs.

        Raises:
            StepFailed: a step failed. Its partial results are kept, and the next run resumes from them.
            ConfigError: another run uses the folder.
        """
        finished: dict[str, Done] = {}
        with self._alone():
            for step in self.steps:
                found = self.done(step)
                if found is None:
                    tell(step, "goes on" if self.state(step) == "begun" else "begins", 0.0)
                    found = self._do(step, finished)
                    tell(step, "done", found.seconds)
                else:
                    tell(step, "skipped", found.seconds)
                finished[step.name] = found
            finish(finished)
        return finished

    def _do(self, step: Step, finished: Mapping[str, Done]) -> Done:
        path = self.path(step)
        started = time.monotonic()
        try:
            path.mkdir(parents=True, exist_ok=True)
            folders = Folders(path, {one.name: finished[one.name].path for one in step.inputs})
            figures = step.work(folders)
            seconds = round(time.monotonic() - started, 3)
            note = {
                "step": step.name,
                "digest": step.digest,
                "settings": step.settings,
                "inputs": {one.name: one.digest for one in step.inputs},
                "seconds": seconds,
                "figures": figures,
            }
            atomic.write(path / DONE, json.dumps(note, indent=2, default=str) + "\n")
        except CaiError as error:
            raise StepFailed(step.name, str(error)) from error
        except OSError as error:
            raise StepFailed(step.name, f"{error}; what is done is kept, type the command again") from error
        except Exception as error:
            if type(error).__module__ == "builtins":  # a bug, which needs its traceback
                error.add_note(f"in the step {step.name}, {path}")
                raise
            raise StepFailed(step.name, describe(error)) from error
        return Done(path, figures, seconds, False)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"{self.folder}: another run works here; wait for its end") from error
            yield
