"""Structured output of a wrapped chat model: its JSON is judged, and a revision is JSON of the same form.

A chat model's `with_structured_output` returns the model with bound arguments, followed by a parser. The
constitution is applied between the two: the model drafts in its provider's way (native JSON, a tool call,
JSON in the text), the released JSON replaces the draft's in the message, and the parser reads that message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableParallel, RunnableSequence
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.utils.function_calling import convert_to_json_schema
from msgspec.structs import replace

from cai_graph.app.shape import Shape
from cai_graph.app.wrapped import call_options, layers
from cai_graph.errors import ConfigError, Refused
from cai_graph.messages import from_langchain, spelt_out
from cai_graph.request.form import Form
from cai_graph.trajectory import Message, Trajectory, shown_of, text_of

__all__ = ["Typed", "form_asked", "form_of", "with_model"]


def form_of(schema: Any) -> Form:
    """Return the form that a schema (a pydantic class, a TypedDict, a JSON Schema, or None) requires."""
    try:
        described = convert_to_json_schema(schema)
    except (ValueError, TypeError):  # JSON mode: any object
        described = dict(schema) if isinstance(schema, dict) else {"type": "object"}
    for name in ("model_validate", "parse_obj"):  # of pydantic 2, of pydantic 1
        if isinstance(schema, type) and (parse := getattr(schema, name, None)) is not None:
            return Form(described, parse)
    return Form(described, dict)


def form_asked(app: Runnable[Any, Any], options: Mapping[str, Any]) -> Form | None:
    """Return the form that `response_format` requires of a chat model's answer; None if it requires none.

    `response_format` is an argument of the call, is bound to the model, or is in the model's `model_kwargs`.
    """
    model = layers(app)[-1]
    if not isinstance(model, BaseChatModel):
        return None
    own = getattr(model, "model_kwargs", None) or {}
    wanted = {**own, **call_options(app, options)}.get("response_format")
    if isinstance(wanted, type):
        return form_of(wanted)
    if not isinstance(wanted, Mapping):
        return None
    if "json_schema" in wanted:
        named = wanted["json_schema"]
        return Form({"title": named.get("name", "answer"), **named.get("schema", {})}, dict)
    return Form({"type": "object"}, dict) if wanted.get("type") == "json_object" else None  # JSON mode


def with_model(
    structured: Runnable[Any, Any], made: Callable[[Runnable[Any, AIMessage]], Runnable[Any, AIMessage]]
) -> Runnable[Any, Any]:
    """Return what `with_structured_output` returned, with its chat model replaced by `made(model)`.

    Raises:
        ConfigError: it contains no chat model, so its answers could not be judged.
    """
    found = _with_model(structured, made)
    if found is None:
        raise ConfigError(
            f"the model's with_structured_output() returned a {type(structured).__name__}, and no chat model "
            "stands in it; where that returns a pydantic object, wrap it instead: constitutional(structured, "
            "critic=…, reviser=…)"
        )
    return found


def _with_model(
    runnable: Runnable[Any, Any], made: Callable[[Runnable[Any, AIMessage]], Runnable[Any, AIMessage]]
) -> Runnable[Any, Any] | None:
    """Return the Runnable with its chat models replaced; None if it contains none."""
    if isinstance(layers(runnable)[-1], BaseChatModel):
        return made(runnable)
    if isinstance(runnable, RunnableBindingBase):
        bound = _with_model(runnable.bound, made)
        return None if bound is None else runnable.model_copy(update={"bound": bound})
    if isinstance(runnable, RunnableSequence):
        steps = [(step, _with_model(step, made)) for step in runnable.steps]
        if all(new is None for _, new in steps):
            return None
        return RunnableSequence(*[old if new is None else new for old, new in steps], name=runnable.name)
    if isinstance(runnable, RunnableParallel):
        parts = {key: (step, _with_model(step, made)) for key, step in runnable.steps__.items()}
        if all(new is None for _, new in parts.values()):
            return None
        return RunnableParallel({key: old if new is None else new for key, (old, new) in parts.items()})
    return None


@dataclass(frozen=True, kw_only=True)
class Typed(Shape):
    """Where a message has a structured answer: in a tool call with the form's name, or else in its text."""

    wanted: Form
    """The form that the answer must have."""
    whole: ClassVar[bool] = True

    def form(self, output: object) -> Form | None:
        """Return the required form; None if the model calls another tool instead of answering."""
        calls_another = bool(_message(output).tool_calls) and self._call(output) is None
        return None if calls_another else self.wanted

    def answer(self, output: object) -> Message:
        """Return the answer's JSON as a Message; the whole message if it is not just the required JSON."""
        message = from_langchain(_message(output))
        if self._call(output) is not None:
            return spelt_out(message)
        if self.form(output) is None:
            return message
        try:
            return replace(message, content=self.wanted.alone(text_of(message)))
        except ValueError:  # if this is released, the caller's parser reads it, and raises if it has no JSON
            return message

    def put(self, output: Any, released: Message, trajectory: Trajectory) -> Any:
        """Return the message with the draft's JSON replaced by the released JSON.

        Raises:
            Refused: a refusal would be released, which does not have the required form.
        """
        if trajectory.released_from == "refusal":
            raise Refused(
                f"the structured answer was refused: {shown_of(released)}", trajectory_id=trajectory.id
            )
        calls = from_langchain(_message(output)).tool_calls
        left = super().put(output, replace(released, tool_calls=calls), trajectory)
        if trajectory.released_from == "draft" or self.form(output) is None:
            return left
        data = json.loads(self.wanted.read(shown_of(released)))
        more = {**left.additional_kwargs}
        if (parsed := output.additional_kwargs.get("parsed")) is not None:  # OpenAI's parser reads it
            more["parsed"] = data if isinstance(parsed, dict) else self.wanted.parse(data)
        update: dict[str, Any] = {"additional_kwargs": more}
        if (call := self._call(output)) is not None:
            use = {"type": "tool_use", "id": call["id"], "name": call["name"], "input": data}
            among = any(isinstance(part, dict) and part.get("type") == "tool_use" for part in output.content)
            update |= {"content": [use] if among else "", "tool_calls": [{**call, "args": data}]}
        return left.model_copy(update=update)

    def _call(self, output: Any) -> Any:
        """Return the tool call with the answer; None if the answer is in the text."""
        name = self.wanted.schema.get("title")
        return next((call for call in _message(output).tool_calls if call["name"] == name), None)


def _message(output: Any) -> AIMessage:
    assert isinstance(output, AIMessage)  # a chat model's answer
    return output
