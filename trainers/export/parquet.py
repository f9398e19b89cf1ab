"""Arrow schemas of rows, with the metadata that lets `datasets` restore JSON columns exactly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from trainers.export.features import Feature

if TYPE_CHECKING:
    import pyarrow

__all__ = ["schema_of"]


def schema_of(columns: Feature, *, as_json: bool) -> pyarrow.Schema:
    """Return the schema of columns; with `as_json`, JSON has Arrow's own type, otherwise it is plain text."""
    import pyarrow

    fields = [(name, _arrow(feature, as_json)) for name, feature in columns.items()]
    note = json.dumps({"info": {"features": columns}})
    return pyarrow.schema(fields).with_metadata({"huggingface": note})


def _arrow(feature: Feature, as_json: bool) -> pyarrow.DataType:
    import pyarrow

    match feature.get("_type"):
        case "Value":
            return pyarrow.type_for_alias(feature["dtype"])
        case "Json":
            return pyarrow.json_() if as_json else pyarrow.string()
        case "List":
            return pyarrow.list_(_arrow(feature["feature"], as_json))
        case _:
            return pyarrow.struct([(name, _arrow(inner, as_json)) for name, inner in feature.items()])
