"""The form of structured answers: a JSON Schema and a parser, which a revision must satisfy, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter

__all__ = ["Form"]


@dataclass(frozen=True)
class Form:
    """The form of a structured answer."""

    schema: Mapping[str, Any]
    """Its JSON Schema, which is part of the request for a revision."""
    parse: Callable[[dict[str, Any]], Any]
    """Turns its JSON into the answer that callers get; raises ValueError where the JSON does not fit."""

    @classmethod
    def like(cls, answer: Any) -> Form | None:
        """Return the form of an answer: its class's, or for a dict its keys; None where it has none.

        >>> Form.like({"a": 1}).read('{"a": 2}')
        '{"a": 2}'
        """
        if isinstance(answer, Mapping):
            return cls({"type": "object", "required": [*answer]}, dict)
        if isinstance(answer, BaseModel) or is_dataclass(answer):
            kind: TypeAdapter[Any] = TypeAdapter(type(answer))
            return cls(kind.json_schema(), kind.validate_python)
        return None

    def read(self, text: str) -> str:
        """Return the JSON object in a text, without the text around it.

        Raises:
            ValueError: there is none, or it does not fit.

        >>> Form({"type": "object"}, dict).read('Here you are: {"a": 1}')
        '{"a": 1}'
        """
        first, last = _place(text)
        try:
            found = json.loads(text[first:last])
        except RecursionError as error:
            raise ValueError("the JSON is nested too deeply") from error
        if missing := [key for key in self.schema.get("required", ()) if key not in found]:
            raise ValueError(f"the JSON lacks {', '.join(map(repr, missing))}")
        self.parse(found)
        return json.dumps(found, ensure_ascii=False)

    def alone(self, text: str) -> str:
        """Return the JSON object that a text consists of, apart from a Markdown code fence around it.

        Raises:
            ValueError: there is none, it does not fit, a key occurs twice, or the text contains more.

        >>> Form({"type": "object"}, dict).alone('```json\\n{"a":1}\\n```')
        '{"a": 1}'
        """
        first, last = _place(text)
        if (text[:first].strip().lower(), text[last:].strip()) not in _FENCES:
            raise ValueError("there is more than the JSON")
        try:
            json.loads(text[first:last], object_pairs_hook=_once)
        except RecursionError as error:
            raise ValueError("the JSON is nested too deeply") from error
        return self.read(text)


_FENCES = {("", ""), ("```", "```"), ("```json", "```")}


def _place(text: str) -> tuple[int, int]:
    """Return start and end of the JSON object in a text: from its first `{` to its last `}`."""
    return text.find("{"), text.rfind("}") + 1


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its pairs; raise ValueError where a key occurs twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands in the JSON twice")
    return found
