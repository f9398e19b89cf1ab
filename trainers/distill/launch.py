"""Parses the command that starts a training stage in several processes, as far as possible."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import yaml

__all__ = ["is_here", "processes"]

_TOTAL, _PER_NODE, _NODES, _CONFIG = "num_processes", "nproc_per_node", "nnodes", "config_file"
_LAUNCHERS = ("accelerate", "torchrun", "python")


def processes(launch: Sequence[str]) -> int | None:
    """Return how many processes a command starts, over all machines; None if that cannot be determined.

    >>> processes(()), processes(("accelerate", "launch", "--num-processes=8")), processes(("mine.sh",))
    (1, 8, None)
    >>> processes(("torchrun", "--nproc_per_node", "4", "--nnodes", "2"))
    8
    """
    if not launch:
        return 1
    said: dict[str, str] = {}
    for word, following in zip(launch, (*launch[1:], ""), strict=True):
        name, is_one, value = word.partition("=")
        said[name.lstrip("-").replace("-", "_")] = value if is_one else following
    total = _number(said.get(_TOTAL))
    if total is None and _PER_NODE in said:
        here, nodes = _number(said[_PER_NODE]), _number(said.get(_NODES, "1"))
        return None if here is None or nodes is None else here * nodes
    if total is None and _CONFIG in said:
        with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, UnicodeDecodeError):
            found = yaml.safe_load(Path(said[_CONFIG]).expanduser().read_text(encoding="utf-8"))
            return _number(str(found.get(_TOTAL)))
    return total


def is_here(launch: Sequence[str]) -> bool:
    """Return whether a command starts processes on this machine, possibly among others."""
    return not launch or Path(launch[0]).name.startswith(_LAUNCHERS)


def _number(word: str | None) -> int | None:
    return int(word) if word is not None and word.isdecimal() and int(word) else None
