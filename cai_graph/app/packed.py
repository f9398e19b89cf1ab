"""What an app returned, as a checkpointer keeps it.

In its strict mode (LANGGRAPH_STRICT_MSGPACK) LangGraph gives back no object of a class that it does not know.
So an object of pydantic's, or of a dataclass, lies there as the name of its class and its JSON.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any

from langchain_core.messages import BaseMessage
from pydantic import BaseModel, TypeAdapter

from cai_graph.errors import RunError

__all__ = ["pack", "unpack"]

_CLASS = "__cai_class__"
"""Under which key a packed object has the module and name of its class; None: it is a dict with that key."""


def pack(value: Any) -> Any:
    """Return a value with its objects told as JSON, those that it tells in full."""
    if isinstance(value, dict):
        packed = {key: pack(each) for key, each in value.items()}
        return {_CLASS: None, "value": packed} if _CLASS in value else packed
    if isinstance(value, list):
        return [pack(each) for each in value]
    if _has_fields(type(value)):
        with suppress(Exception):
            kind = type(value)
            told = TypeAdapter(kind).dump_json(value, by_alias=True).decode()
            packed = {_CLASS: [kind.__module__, kind.__qualname__], "value": told}
            if unpack(packed) == value:
                return packed
    return value


def unpack(packed: Any) -> Any:
    """Return the value that `pack` packed.

    Raises:
        RunError: it has an object whose class is not loaded here.
    """
    if isinstance(packed, list):
        return [unpack(each) for each in packed]
    if not isinstance(packed, dict):
        return packed
    if packed.get(_CLASS) is not None:
        return TypeAdapter(_loaded(*packed[_CLASS])).validate_json(packed["value"])
    value = packed["value"] if _CLASS in packed else packed
    return {key: unpack(each) for key, each in value.items()}


def _has_fields(kind: object) -> bool:
    """Return whether a value is a class of pydantic's or a dataclass; those of messages are known."""
    if not isinstance(kind, type) or issubclass(kind, BaseMessage):
        return False
    return issubclass(kind, BaseModel) or is_dataclass(kind)


def _loaded(module: str, name: str) -> Any:
    """Return a class by its name. Nothing is imported, since whoever writes to the checkpointer names it."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    if not _has_fields(found):
        raise RunError(
            f"what the app returned is a {module}:{name}, a class that is not loaded here; import it before "
            "the request goes on"
        )
    return found
