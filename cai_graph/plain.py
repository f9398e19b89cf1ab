"""Converts an application's values to JSON for the log: metadata, tags, context, arguments of tool calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["plain"]

_DEEPEST = 100
"""Most levels of nested dicts and lists. JSON parsers and recursive code fail at not many more."""
_MOST = 100_000
"""Most values in all. Lists that contain each other repeatedly could grow without bound otherwise."""
_WIDEST = 3000
"""Most bits of an integer, about 900 digits; Python converts no more than 4,300 digits."""


def plain(value: Any) -> Any:
    """Return a value as JSON; what JSON cannot express is replaced by its repr.

    >>> plain({"n": float("nan"), "s": (1, "x")})
    {'n': 'nan', 's': [1, 'x']}
    """
    return _Telling().told(value)


class _Telling:
    def __init__(self) -> None:
        self._left = _MOST
        self._within: set[int] = set()
        """The ids of the dicts and lists around the current value."""

    def told(self, value: Any) -> Any:
        if not self._left:
            return f"[more than {_MOST} values]"
        self._left -= 1
        if isinstance(value, str):
            return str.__str__(value)  # a plain str, since the log does not accept subclasses
        if isinstance(value, float):
            return value if value == value and abs(value) != float("inf") else repr(value)
        if isinstance(value, int):
            return value if value.bit_length() <= _WIDEST else hex(value)
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            return self._opened(value)
        return value if value is None else _said(repr, value)

    def _opened(self, value: Any) -> Any:
        if id(value) in self._within:
            return "[a value that holds this one]"
        if len(self._within) == _DEEPEST:
            return f"[nested deeper than {_DEEPEST} levels]"
        self._within.add(id(value))
        if isinstance(value, Mapping):
            told: Any = {_said(str, key): self.told(item) for key, item in value.items()}
        else:
            told = [self.told(item) for item in value]
        self._within.remove(id(value))
        return told


def _said(say: Callable[[Any], str], value: Any) -> str:
    try:
        return str.__str__(say(value))
    except Exception:  # an error in the application's repr must not cost the answer
        return object.__repr__(value)
