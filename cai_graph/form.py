"""Structured answers: what a revision of one must be to stand in its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Form"]


@dataclass(frozen=True)
class Form:
    """The form of a structured answer."""

    schema: Mapping[str, Any]
    """Its JSON Schema, which revisers are told."""
    parse: Callable[[dict[str, Any]], Any]
    """Makes the answer that callers get out of its JSON; raises ValueError where it does not fit."""

    def read(self, text: str) -> str:
        """Return the JSON object that stands in a text, alone.

        Raises:
            ValueError: there is none, or it does not fit.

        >>> Form({"type": "object"}, dict).read('Here you are: {"a": 1}')
        '{"a": 1}'
        """
        first, last = text.find("{"), text.rfind("}") + 1
        try:
            found = json.loads(text[first:last])
        except RecursionError as error:
            raise ValueError("the JSON is nested too deeply") from error
        if missing := [key for key in self.schema.get("required", ()) if key not in found]:
            raise ValueError(f"the JSON lacks {', '.join(map(repr, missing))}")
        self.parse(found)
        return json.dumps(found, ensure_ascii=False)
