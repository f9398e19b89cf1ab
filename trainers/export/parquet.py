"""Arrow schemas of rows, with the note by which `datasets` gives JSON columns back as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from trainers.rows import Kind, Row, Turn

if TYPE_CHECKING:
    import pyarrow

__all__ = ["OPTIONAL", "Schema", "rows_schema", "verl_schema"]

OPTIONAL = frozenset({"name", "tool_calls", "tool_call_id"})
"""Fields of a turn that most datasets do without."""

Schema = Callable[[frozenset[str], bool], "pyarrow.Schema"]
"""From the optional fields that occur, and whether tool arguments are JSON columns or still plain text."""


def rows_schema(row: type[Row]) -> Schema:
    """Return the schema of our own rows, whose columns are a row's fields."""

    def schema(occur: frozenset[str], as_json: bool) -> pyarrow.Schema:
        import pyarrow

        hints, turn = get_type_hints(row), _turn(occur, as_json)
        named = {field.name: _arrow(hints[field.name], turn) for field in msgspec.structs.fields(row)}
        ordered = ["id", *(name for name in named if name not in ("id", "split")), "split"]
        return _with_features(pyarrow.schema([(name, named[name]) for name in ordered]))

    return schema


def verl_schema(kind: Kind) -> Schema:
    """Return the schema of what verl reads: messages, or its columns for the prompts of an RL run."""

    def schema(occur: frozenset[str], as_json: bool) -> pyarrow.Schema:
        import pyarrow

        text, turns = pyarrow.string(), pyarrow.list_(_turn(occur, as_json))
        if kind != "prompts":
            return _with_features(pyarrow.schema([("messages", turns)]))
        return _with_features(
            pyarrow.schema(
                [
                    ("data_source", text),
                    ("prompt", turns),
                    ("ability", text),
                    ("reward_model", pyarrow.struct([("style", text), ("ground_truth", text)])),
                    ("extra_info", pyarrow.struct([("split", text), ("id", text)])),
                ]
            )
        )

    return schema


def _arrow(hint: Any, turn: pyarrow.DataType) -> pyarrow.DataType:
    """Return the Arrow type of a row's field, given that of a turn."""
    import pyarrow

    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return pyarrow.list_(turn if inner[0] is Turn else _arrow(inner[0], turn))
    if origin in (Union, UnionType, Literal):
        return pyarrow.string()  # a closed set of words
    plain: dict[Any, pyarrow.DataType] = {
        str: pyarrow.string(),
        float: pyarrow.float64(),
        bool: pyarrow.bool_(),
    }
    return plain[hint]


def _turn(occur: frozenset[str], as_json: bool) -> pyarrow.DataType:
    import pyarrow

    text = pyarrow.string()
    function = pyarrow.struct([("name", text), ("arguments", pyarrow.json_() if as_json else text)])
    call = pyarrow.struct([("id", text), ("type", text), ("function", function)])
    optional = {"name": text, "tool_calls": pyarrow.list_(call), "tool_call_id": text}
    fields = [("role", text), ("content", text)]
    return pyarrow.struct(fields + [(name, kind) for name, kind in optional.items() if name in occur])


def _with_features(schema: pyarrow.Schema) -> pyarrow.Schema:
    """Return the schema with the note by which `datasets` gives JSON columns back as they were."""
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pyarrow.DataType) -> dict[str, Any]:
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return {"_type": "Json"}
    if pyarrow.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pyarrow.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}
