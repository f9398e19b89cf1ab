"""Converts an app's output to a form that a LangGraph checkpointer can store, and back.

In its strict mode (LANGGRAPH_STRICT_MSGPACK) LangGraph does not restore objects of classes that it does not
know. So a pydantic object or a dataclass instance is stored as the name of its class and its JSON.
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
"""Key with the module and name of a packed object's class; None: the value is a dict that has this key."""


def pack(value: Any) -> Any:
    """Return a value whose objects are replaced by JSON, except those that JSON does not restore."""
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
        RunError: the value contains an object whose class is not loaded in this process.
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
    """Return whether a value is a pydantic or dataclass class, but not a message class: these are known."""
    if not isinstance(kind, type) or issubclass(kind, BaseMessage):
        return False
    return issubclass(kind, BaseModel) or is_dataclass(kind)


def _loaded(module: str, name: str) -> Any:
    """Return a loaded class by its name. Imports nothing: whoever writes to the checkpointer sets the name.

    Raises:
        RunError: no pydantic or dataclass class of this name is loaded.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    if not _has_fields(found):
        raise RunError(
            f"what the app returned is a {module}:{name}, a class that is not loaded here; import it before "
            "the request goes on"
        )
    return found
