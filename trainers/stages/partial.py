"""OUTPUT.partial, the folder of an unfinished training run: everything that it needs to resume.

It is removed once the Checkpoint is in OUTPUT. A lock lets only one run at a time work in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cai_graph.errors import ConfigError
from trainers import atomic
from trainers.config import shown

__all__ = ["changed", "folder", "held", "same_plan", "unwritable"]

_LOCK = "lock"


def folder(output: Path) -> Path:
    """Return the folder of the run that makes `output`."""
    return output.with_name(f"{output.name}.partial")


@contextlib.contextmanager
def held(output: Path, *, is_main: bool) -> Iterator[Path]:
    """Yield the folder, locked against other runs until the body ends; it is kept, so that a run can resume.

    Args:
        output: the Checkpoint folder that the run creates.
        is_main: whether this is the one of the processes training together that creates and locks the folder.

    Raises:
        ConfigError: another run has locked the folder, or it cannot be created.
    """
    work = folder(output)
    if not is_main:
        yield work
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / _LOCK, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ConfigError(f"{work}: cannot be made: {error.strerror}") from error
    try:
        _hold(lock, work)
        try:
            yield work
        except BaseException:
            if os.listdir(work) == [_LOCK]:  # nothing was written yet
                shutil.rmtree(work)
            raise
    finally:
        os.close(lock)


def _hold(lock: int, work: Path) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"{work}: another process trains there; wait for it, or name another output"
        ) from error


def same_plan(work: Path, plan: Mapping[str, Any], may_change: Collection[str], *, points: str) -> None:
    """Record the plan of a new run, or check that an interrupted run was started with the same plan.

    If the plans differ and the run has no saved state yet, the folder is cleared and the run starts anew.

    Args:
        work: the folder.
        plan: `config`, as JSON, and the other inputs that identify the run, such as digests of its data.
        may_change: keys of the config that may differ.
        points: a glob pattern of the names of saved states.

    Raises:
        ConfigError: the run has saved states and another plan; names the differences.
    """
    path, now = work / "plan.json", json.loads(json.dumps(plan))
    if path.exists() and (
        otherwise := changed(json.loads(path.read_text(encoding="utf-8")), now, may_change)
    ):
        if any(work.glob(points)):
            raise ConfigError(
                f"{work}: holds a run that was begun otherwise: {'; '.join(otherwise)}. Go on with what it "
                "was begun with, or remove the folder to start again"
            )
        for name in set(os.listdir(work)) - {_LOCK}:
            left = work / name
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not path.exists():
        atomic.write(path, json.dumps(now, indent=2) + "\n")


def changed(begun: dict[str, Any], now: dict[str, Any], may_change: Collection[str]) -> list[str]:
    """Return the differences between two plans of `same_plan`, in words; empty: the plans are the same.

    Entries that an earlier version did not record are taken to be the same.
    """
    before = shown(begun["config"])  # earlier versions recorded passwords, too
    found = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in now["config"].items()
        if key not in may_change and before.get(key) != value
    ]
    beside = (key for key in now if key != "config" and key in begun)
    return found + [f"the {key} changed" for key in beside if begun[key] != now[key]]


def unwritable() -> tuple[type[Exception], ...]:
    """Return the exceptions that mean that weights cannot be written.

    torch and safetensors raise different ones for a full disk.
    """
    from safetensors import SafetensorError

    return (OSError, RuntimeError, SafetensorError)
