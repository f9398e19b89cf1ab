"""What an application hands over, as JSON: metadata, tags, context, and the arguments of tool calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["plain"]

_DEEPEST = 100
"""Levels of dicts and lists that are told. JSON's readers, and whoever walks a record, bear few more."""
_MOST = 100_000
"""Values that are told in all: a list may stand in another twice, that in one more twice, and so on."""
_WIDEST = 3000
"""Bits of a number that is told as one, about 900 digits; Python writes and reads no more than 4,300."""


def plain(value: Any) -> Any:
    """Return a value as JSON; what JSON cannot say is told by its repr.

    >>> plain({"n": float("nan"), "s": (1, "x")})
    {'n': 'nan', 's': [1, 'x']}
    """
    return _Telling().told(value)


class _Telling:
    def __init__(self) -> None:
        self._left = _MOST
        self._within: set[int] = set()
        """Which dicts and lists the value stands in that is told now."""

    def told(self, value: Any) -> Any:
        if not self._left:
            return f"[more than {_MOST} values]"
        self._left -= 1
        if isinstance(value, str):
            return str.__str__(value)  # of a subclass, which the log does not take, the text alone
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
    except Exception:  # the application's own, and no answer is lost for it
        return object.__repr__(value)
