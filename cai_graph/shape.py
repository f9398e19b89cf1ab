"""Where an app's input and output hold the conversation, the answer and the context.

What is judged is found in the app's output by its shape, and what leaves is put back into the same place,
so that callers see the types that they always saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue

from cai_graph.errors import DataError
from cai_graph.form import Form
from cai_graph.trajectory import Call, Message, Trajectory, from_langchain, text_of

__all__ = ["Shape"]

_INPUT_KEYS = ("input", "question", "query", "prompt")
_OUTPUT_KEYS = ("answer", "output", "text")


@dataclass(frozen=True)
class Shape:
    """Where in an app's input and output the conversation, the answer and the context are."""

    input_key: str | None = None
    """Key of the request in a dict; None: `messages`, else the only one present of the usual keys."""
    output_key: str | None = None
    """Key of the answer in a dict; None: `messages`, else the only one present of the usual keys."""
    context_keys: tuple[str, ...] = ()
    """Keys of the output, or else of the input, that the critic sees as context."""

    whole: ClassVar[bool] = False
    """Whether an answer cannot be told part by part, and so leaves in one piece."""

    def conversation(self, value: object) -> tuple[Message, ...]:
        """Return the conversation that an input asks in."""
        if isinstance(value, Mapping):
            value = value[self._key(value, self.input_key, _INPUT_KEYS, "input")]
            if isinstance(value, Mapping) or (isinstance(value, tuple) and _is_message(value)):
                value = [value]  # one message, which LangGraph takes for a list of it
        if isinstance(value, PromptValue):
            value = value.to_messages()
        if isinstance(value, str):
            return (Message(role="user", content=str(value)),)
        if isinstance(value, BaseMessage):
            return (from_langchain(value),)
        if isinstance(value, Sequence):
            return tuple(map(from_langchain, convert_to_messages(value)))
        raise DataError(
            f"the input is a {type(value).__name__}, and a request is read from a string, messages, or a "
            "dict with one of them; say where with input_key="
        )

    def asked(self, given: tuple[Message, ...], output: Any) -> tuple[Message, ...]:
        """Return the conversation that an output answers; of an app that keeps one, all that came before.

        `given` is what the input says, and it holds where the output does not go on from it; it is empty
        where the input is the resumption of an app that had paused.
        """
        found = output[self.output_in(output)] if isinstance(output, Mapping) else output
        if isinstance(found, list):
            before = tuple(map(from_langchain, found[: _last_answer(found)]))
            last = [(m.role, m.content) for m in given[-1:]]
            return before if not given or last[0] in [(m.role, m.content) for m in before] else given
        return given or self.conversation(output)

    def answer(self, output: object) -> Message:
        """Return the answer that stands in an output."""
        found = self.answer_in(output)
        if isinstance(found, BaseMessage):
            return from_langchain(found)
        return Message(role="assistant", content=str(found))  # parsers return subclasses of str

    def context(self, given: object, output: object) -> dict[str, str]:
        """Return the context that the critic sees, by key."""
        found: dict[str, str] = {}
        for key in self.context_keys:
            for place in (output, given):
                if isinstance(place, Mapping) and key in place:
                    found[key] = _as_text(place[key])
                    break
        return found

    def form(self, output: object) -> Form | None:
        """Return what the answer must be, where it is a structured one that callers see parsed."""
        return None

    def pack(self, output: Any) -> Any:
        """Return an output as a checkpointer can keep it."""
        return output

    def unpack(self, packed: Any) -> Any:
        """Return the output that `pack` packed."""
        return packed

    def put(self, output: Any, released: Message, trajectory: Trajectory) -> Any:
        """Return the output with the released answer in the answer's place."""
        kept = trajectory.released_from == "draft"
        if isinstance(output, str):
            return output if kept else text_of(released)
        if isinstance(output, BaseMessage):
            about = {
                "trajectory_id": trajectory.id,
                "outcome": trajectory.outcome.value,
                "calls": [_itemised(call) for call in trajectory.calls],
            }
            metadata = output.response_metadata
            if not kept:
                cut = trajectory.draft is not None and trajectory.draft.truncated
                told = _OF_THE_WORDS | (_OF_THE_END if cut else set())
                metadata = {name: value for name, value in metadata.items() if name not in told}
            update: dict[str, Any] = {"response_metadata": {**metadata, "cai": about}}
            dropped = bool(getattr(output, "tool_calls", None)) and not released.tool_calls
            if trajectory.released_from == "refusal" or dropped:
                # Nothing of a refused answer leaves: no image, and no call that the app would carry out.
                update |= {"content": text_of(released), "additional_kwargs": {}}
                update |= {key: [] for key in ("tool_calls", "invalid_tool_calls") if hasattr(output, key)}
            elif not kept:
                # A provider that thinks before it calls a tool wants its thoughts back with the calls.
                thoughts = bool(getattr(output, "tool_calls", None))
                update["content"] = _in_place(output.content, text_of(released), thoughts=thoughts)
                more = output.additional_kwargs
                update["additional_kwargs"] = {k: more[k] for k in more if k not in _OF_THE_WORDS}
            return output.model_copy(update=update)
        if isinstance(output, Mapping):
            key = self.output_in(output)
            return {**output, key: self.put(output[key], released, trajectory)}
        at = _last_answer(output)
        return [*output[:at], self.put(output[at], released, trajectory), *output[at + 1 :]]

    def output_in(self, output: Mapping[str, Any]) -> str:
        """Return the key of the answer in an output."""
        return self._key(output, self.output_key, _OUTPUT_KEYS, "output")

    def answer_in(self, output: object) -> str | BaseMessage:
        """Return the answer itself, as it stands in an output."""
        if isinstance(output, Mapping):
            return self.answer_in(output[self.output_in(output)])
        if isinstance(output, str | BaseMessage):
            return output
        if isinstance(output, list) and output and all(isinstance(item, BaseMessage) for item in output):
            found: BaseMessage = output[_last_answer(output)]
            return found
        raise DataError(
            f"the app returned a {type(output).__name__}, and an answer is read from a string, a message, "
            "messages, or a dict with one of them; say where with output_key="
        )

    def _key(self, value: Mapping[str, Any], chosen: str | None, usual: Sequence[str], side: str) -> str:
        keys = ", ".join(repr(key) for key in value)
        if chosen is not None:
            if chosen not in value:
                raise DataError(f"{side}_key is {chosen!r}, and the {side} has the keys {keys}")
            return chosen
        if "messages" in value:
            return "messages"
        present = [key for key in usual if key in value]
        if len(present) != 1:
            found = "none" if not present else " and ".join(repr(key) for key in present)
            raise DataError(
                f"the {side} has the keys {keys}; exactly one of 'messages', "
                f"{', '.join(map(repr, usual))} is expected, found {found}; say which with {side}_key="
            )
        return present[0]


def _is_message(value: tuple[Any, ...]) -> bool:
    """Return whether a tuple is a message as LangChain takes one: its role and its text."""
    return len(value) == 2 and all(isinstance(part, str) for part in value)


def _itemised(call: Call) -> dict[str, Any]:
    """Return what a call cost, as an item of an account."""
    return {
        "role": call.role,
        "model": call.model,
        "input_tokens": call.input_tokens,
        "output_tokens": call.output_tokens,
    }


def _last_answer(messages: Sequence[BaseMessage]) -> int:
    for index in range(len(messages) - 1, -1, -1):
        if isinstance(messages[index], AIMessage):
            return index
    raise DataError("the app returned messages without an AI message among them; there is no answer to judge")


_OF_THE_WORDS = {
    "logprobs",
    "parsed",
    "refusal",
    "reasoning",
    "reasoning_content",
    "reasoning_details",
    "audio",
}
"""Under which names providers tell of an answer's words, or repeat them: they leave with those words only."""
_OF_THE_END = {"finish_reason", "stop_reason", "done_reason"}
"""Under which names they say why an answer ends."""
_THOUGHTS = {"reasoning", "thinking", "redacted_thinking"}
"""Types of content parts in which a model thinks about its answer."""


def _in_place(content: str | list[Any], text: str, *, thoughts: bool) -> str | list[Any]:
    """Return message content with its text replaced and every other part kept, thoughts if `thoughts`."""
    if isinstance(content, str):
        return text
    gone = {"text"} if thoughts else {"text", *_THOUGHTS}
    others = [part for part in content if not isinstance(part, str) and part.get("type") not in gone]
    return [{"type": "text", "text": text}, *others] if others else text


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return "\n\n".join(map(_as_text, value))
    page: Callable[[], str] | str | None = getattr(value, "page_content", None)
    return page if isinstance(page, str) else str(value)
