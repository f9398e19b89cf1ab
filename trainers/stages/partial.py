"""OUTPUT.partial, the folder of a training run under way: all that it goes on from after an interrupt.

It goes away once the Checkpoint stands in OUTPUT, and one run at a time works in it.
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
    """Give the folder, which no other run has until the body ends; it stays, to go on from.

    Args:
        output: what the run makes.
        is_main: whether this is the process, of those that train together, that makes and holds the folder.

    Raises:
        ConfigError: another run works there, or the folder cannot be made.
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
            if os.listdir(work) == [_LOCK]:  # nothing was begun
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
    """Write down what a run does, or make sure that the interrupted one was begun to do the same.

    A run that has no point to go on from begins anew, whatever it was begun to do.

    Args:
        work: the folder.
        plan: `config`, as JSON, and beside it what else makes the run, such as digests of what it reads.
        may_change: keys of the config that may be told anew.
        points: a pattern of the names of what a run can go on from.

    Raises:
        ConfigError: the run was begun otherwise; names what changed.
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
    """Return in words what makes another run of a plan, as `same_plan` takes it; nothing: it is the same.

    What a run of an earlier version did not write down is taken for the same.
    """
    before = shown(begun["config"])  # a run of an earlier version kept passwords, too
    found = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in now["config"].items()
        if key not in may_change and before.get(key) != value
    ]
    beside = (key for key in now if key != "config" and key in begun)
    return found + [f"the {key} changed" for key in beside if begun[key] != now[key]]


def unwritable() -> tuple[type[Exception], ...]:
    """Return what is raised where weights cannot be written: torch and safetensors say a full disk each in
    their own way.
    """
    from safetensors import SafetensorError

    return (OSError, RuntimeError, SafetensorError)
