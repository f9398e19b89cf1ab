"""Column types of a dataset in the notation of `datasets`: that of its JSON, and that of a dataset card.

{"dtype": "string", "_type": "Value"}    text; "float64" and "bool" likewise
{"feature": …, "_type": "List"}          a list
{"_type": "Json"}                        any JSON value
{"role": …, "content": …}                an object

From Parquet a JSON value is read exactly. From JSON lines `datasets` reads it with ujson, which rounds
numbers to ten decimals. Neither can read an integer beyond 64 bits.
"""

from __future__ import annotations

import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from trainers.rows import Kind, Row, Turn

__all__ = ["OPTIONAL", "Feature", "for_card", "optional_in", "rows_features", "verl_features"]

Feature = dict[str, Any]
"""The type of a column, or of all columns by name."""

OPTIONAL = ("name", "tool_calls", "tool_call_id")
"""Fields of a turn that most datasets lack.

If no turn of a dataset has a field, there is no column for it: chat templates handle an absent `tool_calls`
correctly, but fail on a null.
"""

_OPTIONAL = re.compile(b',"(%b)":' % "|".join(OPTIONAL).encode())

_TEXT: Feature = {"dtype": "string", "_type": "Value"}
_PLAIN: dict[Any, Feature] = {
    str: _TEXT,
    float: {"dtype": "float64", "_type": "Value"},
    bool: {"dtype": "bool", "_type": "Value"},
}


def optional_in(lines: bytes) -> set[str]:
    """Return the optional fields that occur in rows; may include one that occurs only in tool arguments."""
    # In a turn these keys follow a comma. The `name` of a call's function comes first in its object, so it is
    # not matched; neither is text, in which quotes are escaped.
    return {name.decode() for name in set(_OPTIONAL.findall(lines))}


def rows_features(row: type[Row], occur: frozenset[str]) -> Feature:
    """Return the columns of our own rows, one per field."""
    hints = get_type_hints(row)
    named = {field.name: _feature(hints[field.name], occur) for field in msgspec.structs.fields(row)}
    ordered = ["id", *(name for name in named if name not in ("id", "split")), "split"]
    return {name: named[name] for name in ordered}


def verl_features(kind: Kind, occur: frozenset[str]) -> Feature:
    """Return the columns that verl reads: messages or, for an RL run, those of prompts."""
    turns = _list(_turn(occur))
    if kind != "prompts":
        return {"messages": turns}
    return {
        "data_source": _TEXT,
        "prompt": turns,
        "ability": _TEXT,
        "reward_model": {"style": _TEXT, "ground_truth": _TEXT},
        "extra_info": {"split": _TEXT, "id": _TEXT},
    }


def _list(of: Feature) -> Feature:
    return {"feature": of, "_type": "List"}


def _feature(hint: Any, occur: frozenset[str]) -> Feature:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return _list(_turn(occur) if inner[0] is Turn else _feature(inner[0], occur))
    if origin in (Union, UnionType, Literal):
        return _TEXT  # a closed set of strings
    return _PLAIN[hint]


def _turn(occur: frozenset[str]) -> Feature:
    # Arguments have no fixed type, since they differ from call to call.
    call = {"id": _TEXT, "type": _TEXT, "function": {"name": _TEXT, "arguments": {"_type": "Json"}}}
    optional = {"name": _TEXT, "tool_calls": _list(call), "tool_call_id": _TEXT}
    return {"role": _TEXT, "content": _TEXT} | {n: kind for n, kind in optional.items() if n in occur}


def for_card(columns: Feature) -> list[dict[str, Any]]:
    """Return columns in the YAML notation of a card, under `dataset_info: features`."""
    return [{"name": name, **_in_card(feature)} for name, feature in columns.items()]


def _in_card(feature: Feature) -> dict[str, Any]:
    match feature.get("_type"):
        case "Value":
            return {"dtype": feature["dtype"]}
        case "Json":
            return {"dtype": "json"}
        case "List":
            ((form, inner),) = _in_card(feature["feature"]).items()
            return {"list": {form: inner} if form == "list" else inner}
        case _:
            return {"struct": for_card(feature)}
