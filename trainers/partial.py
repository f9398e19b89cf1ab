"""OUTPUT.partial, the folder of a training run under way: all that it goes on from after an interrupt.

It goes away once the Checkpoint stands in OUTPUT, and one run at a time works in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cai_graph.errors import ConfigError

__all__ = ["folder", "held", "unwritable"]

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
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"{work}: another process trains there; wait for it, or name another output"
        ) from error


def unwritable() -> tuple[type[Exception], ...]:
    """Return what is raised where weights cannot be written: torch and safetensors say a full disk each in
    their own way.
    """
    from safetensors import SafetensorError

    return (OSError, RuntimeError, SafetensorError)
