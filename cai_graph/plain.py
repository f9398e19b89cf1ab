"""What an application hands over, as JSON: metadata, tags, context, and the arguments of tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["plain"]

_DEEPEST = 100
"""Levels of dicts and lists that are told. JSON's readers, and whoever walks a record, bear few more."""


def plain(value: Any) -> Any:
    """Return a value as JSON; what JSON cannot say is told by its repr.

    >>> plain({"n": float("nan"), "s": (1, "x")})
    {'n': 'nan', 's': [1, 'x']}
    """
    return _told(value, _DEEPEST)


def _told(value: Any, levels: int) -> Any:
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, which the log does not take, the text alone
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else repr(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        if not levels:
            return f"[nested deeper than {_DEEPEST} levels]"
        if isinstance(value, Mapping):
            return {_told(str(key), 0): _told(item, levels - 1) for key, item in value.items()}
        return [_told(item, levels - 1) for item in value]
    return value if value is None or isinstance(value, bool | int) else _repr(value)


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # the application's own, and no answer is lost for it
        return object.__repr__(value)
