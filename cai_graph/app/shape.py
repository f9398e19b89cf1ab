"""Finds the conversation, the answer and the context in an app's input and output, and replaces the answer.

The answer to judge is found in the app's output by its shape, and the released answer is put in the same
place, so that callers receive the types that the app returns.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from msgspec.structs import replace
from pydantic import BaseModel

from cai_graph.app.packed import pack, unpack
from cai_graph.errors import DataError, Refused
from cai_graph.messages import END_REASONS, from_langchain
from cai_graph.parts import CALLS, THOUGHTS, is_words, kind_of, left_of, said_in, unwrapped
from cai_graph.request.form import Form
from cai_graph.trajectory import Call, Message, Trajectory, shown_of

__all__ = ["Shape", "Swap", "added", "leaves", "refused"]

_INPUT_KEYS = ("input", "question", "query", "prompt")
_OUTPUT_KEYS = ("answer", "output", "text")
_TYPED = "structured_response"
"""The key of the structured answer in the output of LangChain's agents, beside the messages."""
_OR_TYPED = ", or wrap the model: constitutional(model).with_structured_output(…)"
"""A hint for error messages: a dict may be a structured answer, all of which would have to be judged."""


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
    """Whether an answer cannot be streamed in parts, and so is released in one piece."""

    def conversation(self, value: object) -> tuple[Message, ...]:
        """Return the conversation in an input."""
        value = _by_key(value)
        if isinstance(value, Mapping):
            value = value[self._key(value, self.input_key, _INPUT_KEYS, "input")]
            if isinstance(value, Mapping) or (isinstance(value, tuple) and _is_message(value)):
                value = [value]  # one message, which LangGraph treats as a list
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
        """Return the conversation that an output answers; for an app with a memory, all earlier messages.

        `given` is the conversation in the input; it is returned if the output does not continue it. It is
        empty if the input resumes an app that had paused.
        """
        found = output[self.output_in(output)] if isinstance(output, Mapping) else output
        if isinstance(found, list):
            before = tuple(map(from_langchain, found[: _last_of_model(found)]))
            last = [(m.role, m.content) for m in given[-1:]]
            return before if not given or last[0] in [(m.role, m.content) for m in before] else given
        return given or self.conversation(output)

    def answer(self, output: object) -> Message:
        """Return the answer in an output, as a Message."""
        found = self.answer_in(output)
        if isinstance(found, BaseMessage):
            message = from_langchain(found)
            if isinstance(found, ToolMessage):  # a tool answered in the model's place
                message = replace(message, role="assistant", name=None, tool_call_id=None)
            return message
        return Message(role="assistant", content=str(found))  # parsers return subclasses of str

    def context(self, given: object, output: object) -> dict[str, str]:
        """Return the context that the critic sees, by key."""
        found: dict[str, str] = {}
        for key in self.context_keys:
            for place in (output, _by_key(given)):
                if isinstance(place, Mapping) and key in place:
                    found[key] = _as_text(place[key])
                    break
        return found

    def form(self, output: object) -> Form | None:
        """Return the form that the answer must have, if it is a structured one that callers receive parsed.

        None for other answers, and for one that was given as a tool call, which is not changed.
        """
        typed = self.typed_in(output)
        if typed is None or getattr(self.answer_in(output), "tool_calls", None):
            return None
        return Form.like(typed)

    def typed_in(self, output: Any) -> Any:
        """Return the structured answer in an output: the answer itself, or the object beside it; or None."""
        if isinstance(output, Mapping):
            beside = output.get(_TYPED)
            return self.typed_in(output[self.output_in(output)]) if beside is None else beside
        return output if isinstance(output, BaseModel) and not isinstance(output, BaseMessage) else None

    def pack(self, output: Any) -> Any:
        """Return an output in a form that a checkpointer can store."""
        return pack(output)

    def unpack(self, packed: Any) -> Any:
        """Return the output that `pack` packed. Raises RunError if one of its classes is not loaded here."""
        return unpack(packed)

    def put(self, output: Any, released: Message, trajectory: Trajectory) -> Any:
        """Return the output with the released answer in the answer's place.

        Raises:
            Refused: the answer is a structured one, and the released answer cannot have its type.
        """
        kept = trajectory.released_from == "draft"
        typed = None if kept else self.typed_in(output)
        if typed is not None:
            form = self.form(output)
            if trajectory.released_from == "refusal" or (form is None and not released.tool_calls):
                raise Refused(
                    f"the structured answer was refused: {shown_of(released)}", trajectory_id=trajectory.id
                )
            if form is not None:
                released = replace(released, content=form.read(shown_of(released)))
                typed = form.parse(json.loads(shown_of(released)))
        if isinstance(output, str):
            return output if kept else shown_of(released)
        if isinstance(output, BaseMessage):
            return _left(output, released, trajectory)
        if isinstance(output, BaseModel):
            return output if kept else typed
        answer = self.answer_in(output)

        def put_into(value: Any) -> Any:
            if isinstance(value, list) and isinstance(answer, BaseMessage):
                new = _left(answer, released, trajectory, among=value)
                return [new if item is answer else item for item in value]
            return self.put(value, released, trajectory)

        if not isinstance(output, Mapping):
            left = put_into(output)
            return left if kept else self.swap(output, left)(left)
        key = self.output_in(output)
        left = {**output, key: put_into(output[key])}
        if typed is not None and output.get(_TYPED) is not None:
            left[_TYPED] = typed
        if kept:
            return left
        swap = self.swap(output, left)
        return {k: swap(value, k) for k, value in left.items()}

    def swap(self, output: Any, left: Any) -> Swap:
        """Return a Swap that replaces the draft by the released answer, wherever the draft is.

        Args:
            output: the app's output.
            left: the same output with the released answer in place.
        """
        key = self.output_in(output) if isinstance(output, Mapping) else None
        answer = self.answer_in(output)
        typed = self.typed_in(output), self.typed_in(left)
        return Swap(answer, self.answer_in(left), key, _earlier(output, answer), *typed)

    def refusing(self, output: Any, refusal: str, state: Any = None) -> Swap:
        """Return a Swap that replaces an answer by a refusal, for an answer of which nothing was released.

        Args:
            output: the output with the answer.
            refusal: the text of the refusal.
            state: the whole state that the output is part of; None: the output is all.
        """
        key = self.output_in(output) if isinstance(output, Mapping) else None
        answer = self.answer_in(output)
        left = refused(answer, refusal, output if key is None else output[key])
        return Swap(
            answer, left, key, _earlier(output if state is None else state, answer), self.typed_in(output)
        )

    def unjudged(self, state: Any, keys: Collection[str] | None, refusal: str) -> list[Swap]:
        """Return Swaps that replace by a refusal whatever may be an answer in the last turn of a state.

        These are the answer, if there is one, and all texts of the model after the user's last message: if a
        run failed, it is unknown which of them would have been the answer.

        Args:
            state: the values of an app's channels, or its single value.
            keys: the channels that the app returns; None: it returns the whole state.
            refusal: the text of the refusal.
        """
        swaps: list[Swap] = []
        returned = state if keys is None else {key: state[key] for key in state if key in keys}
        answer: str | BaseMessage | None = None
        try:
            swaps.append(self.refusing(returned, refusal, state))
            answer = swaps[0].draft
        except DataError:  # the run did not reach an answer
            pass
        for name, value in state.items() if isinstance(state, Mapping) else ():
            if isinstance(value, list):
                said = [each for each in value[_turn(value) :] if isinstance(each, AIMessage)]
                swaps += [
                    Swap(each, refused(each, refusal, value), name, _earlier(state, each))
                    for each in said
                    if each is not answer and shown_of(each).strip()
                ]
        return swaps

    def output_in(self, output: Mapping[str, Any]) -> str:
        """Return the key of the answer in an output."""
        return self._key(output, self.output_key, _OUTPUT_KEYS, "output")

    def answer_in(self, output: object) -> str | BaseMessage:
        """Return the answer in an output: a text, or the message object itself.

        Among messages it is the last AI message; if that has no text, and the last message is a tool's, it is
        the tool's message. For a pydantic object it is its JSON.

        Raises:
            DataError: no answer can be found in the output.
        """
        inside = output[self.output_in(output)] if isinstance(output, Mapping) else output
        if isinstance(inside, Mapping):
            return self.answer_in(inside)
        if isinstance(inside, str | BaseMessage):
            return inside
        if isinstance(inside, BaseModel):
            return inside.model_dump_json(by_alias=True)
        if isinstance(inside, list) and inside and all(isinstance(item, BaseMessage) for item in inside):
            messages: list[BaseMessage] = inside
            found, last = messages[_last_of_model(messages)], messages[-1]
            # An agent also reports its structured answer in a tool's message, which is not an answer itself.
            typed = isinstance(output, Mapping) and output.get(_TYPED) is not None
            if isinstance(last, ToolMessage) and not typed and not shown_of(from_langchain(found)).strip():
                return last
            return found
        raise DataError(
            f"the app returned a {type(inside).__name__}, and an answer is read from a string, a message, "
            f"messages, a pydantic object, or a dict with one of them; say where with output_key={_OR_TYPED}"
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
            hint = _OR_TYPED if side == "output" and not present else ""
            raise DataError(
                f"the {side} has the keys {keys}; exactly one of 'messages', "
                f"{', '.join(map(repr, usual))} is expected, found {found}; say which with {side}_key={hint}"
            )
        return present[0]


@dataclass(frozen=True)
class Swap:
    """Replaces a draft by the released answer wherever it is: in an output, a stream, a state.

    A message is identified by its id. A text is the draft under the answer's key if it is equal; elsewhere it
    must also not be a mere label, such as "yes". The same applies to the text of a model's or a tool's
    message in this turn; in an earlier turn it was that turn's released answer, and is not changed.
    """

    draft: str | BaseMessage
    released: str | BaseMessage
    key: str | None
    """Key of the answer in the app's output; None if the output has no keys."""
    earlier: frozenset[str | int] = frozenset()
    """The messages of earlier turns, identified as by `_named`."""
    typed: Any = None
    """The draft as a structured answer, whose copies are found by equality; None if it is not structured."""
    typed_left: Any = None
    """The structured answer that replaces it."""

    def sparing(self, state: Any) -> Swap:
        """Return a Swap that does not change messages whose ids are in another state, too.

        The draft's id is excepted, since that state may already have the released answer under it.
        """
        values = state.values() if isinstance(state, Mapping) else [state]
        messages = [each for value in values if isinstance(value, list) for each in value]
        ids = {each.id for each in messages if isinstance(each, BaseMessage) and each.id}
        own = {self.draft.id} if isinstance(self.draft, BaseMessage) else set()
        known = isinstance(state, Mapping) and state.get(_TYPED) == self.typed
        return dataclasses.replace(
            self, earlier=self.earlier | (ids - own), typed=None if known else self.typed
        )

    def __call__(self, value: Any, key: str | None = None) -> Any:
        """Return the value at `key` with the draft replaced; the same object if it does not contain it."""
        return self._in(value, key, {})

    def _in(self, value: Any, key: str | None, around: dict[int, Any]) -> Any:
        """Do so recursively; `around` maps the ids of the enclosing values, which may contain themselves, to
        their results."""
        if id(value) in around:
            return around[id(value)]
        if self.typed and type(value) is type(self.typed) and value == self.typed:
            return self.typed_left
        if isinstance(value, BaseMessage):
            return self._message(value)
        if isinstance(value, str):
            same = value == self._text and (self._is_place(key) or not _is_label(value))
            return self._new_text if same else value
        if isinstance(value, Mapping):
            by_key: dict[Any, Any] = {}
            around = {**around, id(value): by_key}
            by_key.update((name, self._in(item, name, around)) for name, item in value.items())
            return by_key if any(by_key[name] is not value[name] for name in value) else value
        if isinstance(value, list | tuple):
            items: list[Any] = []
            around = {**around, id(value): items}
            items.extend(self._in(item, key, around) for item in value)
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            if isinstance(value, list):
                return items
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    def _message(self, message: BaseMessage) -> BaseMessage:
        draft, text = self.draft, self._text
        if _named(message) in self.earlier:
            return message
        if isinstance(draft, BaseMessage) and (message.id == draft.id if message.id else message == draft):
            return self.released if isinstance(self.released, BaseMessage) else message
        if self._new_text == text or _is_label(text):
            return message
        if not isinstance(message, AIMessage | ToolMessage) or shown_of(message) != text:
            return message
        update = {
            "content": _saying(message.content, self._new_text),
            "additional_kwargs": _of_others(message.additional_kwargs),
            "response_metadata": _of_others(message.response_metadata),
            **_without(message),
        }
        return message.model_copy(update=update)

    def _is_place(self, key: str | None) -> bool:
        return isinstance(self.draft, str) and self.key in (None, key)

    @property
    def _text(self) -> str:
        return self.draft if isinstance(self.draft, str) else shown_of(self.draft)

    @property
    def _new_text(self) -> str:
        return self.released if isinstance(self.released, str) else shown_of(self.released)


_LABEL = 24
"""Maximum bytes of a label: one word, or a few characters in scripts without spaces between words."""


def _is_label(text: str) -> bool:
    """Return whether a text is so short that an equal text elsewhere may be unrelated to the answer."""
    return len(text.split()) < 2 and len(text.encode("utf-8", "surrogatepass")) <= _LABEL


def _turn(messages: Sequence[Any], end: int | None = None) -> int:
    """Return the index of the user's last message before `end`, with which a turn begins; 0 if none."""
    asked = [index for index, each in enumerate(messages[:end]) if isinstance(each, HumanMessage)]
    return asked[-1] if asked else 0


def _named(message: BaseMessage) -> str | int:
    """Return what identifies a message: its id, or else the object's identity."""
    return message.id or id(message)


def _earlier(output: Any, answer: str | BaseMessage) -> frozenset[str | int]:
    """Return the messages in an output before the turn of its answer, identified as by `_named`."""
    found: set[str | int] = set()
    for value in output.values() if isinstance(output, Mapping) else [output]:
        if isinstance(value, list):
            end = next((index for index, each in enumerate(value) if each is answer), None)
            found |= {_named(each) for each in value[: _turn(value, end)] if isinstance(each, BaseMessage)}
    return frozenset(found)


def leaves(value: Any) -> Iterator[str | BaseMessage]:
    """Yield the texts and messages in an app's output, in no particular order; it may contain itself."""
    waiting, seen = [value], dict[int, Any]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str | BaseMessage):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen[id(value)] = value  # referenced, so that its id is not reused
            waiting.extend(value.values() if isinstance(value, Mapping) else value)


def added(total: Any, part: Any) -> Any:
    """Return the sum of a stream's chunks so far and one more.

    A chunk that cannot be added replaces the sum, as in LangChain.
    """
    try:
        return total + part
    except TypeError:
        return part


def _by_key(value: object) -> object:
    """Convert a state that is a pydantic model or a dataclass to a dict of its fields."""
    if isinstance(value, BaseModel) and not isinstance(value, BaseMessage | PromptValue):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _is_message(value: tuple[Any, ...]) -> bool:
    """Return whether a tuple is a message in LangChain's form (role, text)."""
    return len(value) == 2 and all(isinstance(part, str) for part in value)


def _itemised(call: Call) -> dict[str, Any]:
    """Return the role, model and token counts of a call as a dict."""
    return {
        "role": call.role,
        "model": call.model,
        "input_tokens": call.input_tokens,
        "output_tokens": call.output_tokens,
    }


def _last_of_model(messages: Sequence[BaseMessage]) -> int:
    for index in range(len(messages) - 1, -1, -1):
        if isinstance(messages[index], AIMessage):
            return index
    raise DataError("the app returned messages without an AI message among them; there is no answer to judge")


def emptied(message: BaseMessage, text: str) -> dict[str, Any]:
    """Return the update that replaces all content of a message by a text.

    Nothing else remains: no picture, and no tool call that the app would execute.
    """
    content = _saying(message.content, text)
    return {"content": content, "additional_kwargs": {}, **_without(message, "tool_calls")}


def _left(
    message: BaseMessage, released: Message, trajectory: Trajectory, among: Sequence[Any] = ()
) -> BaseMessage:
    """Return the draft's message with the released answer in it; `among` are the messages around it."""
    kept = trajectory.released_from == "draft"
    about = {
        "trajectory_id": trajectory.id,
        "outcome": trajectory.outcome.value,
        "calls": [_itemised(call) for call in trajectory.calls],
    }
    told = message.response_metadata if kept else _of_others(message.response_metadata)
    if not kept and trajectory.draft is not None and trajectory.draft.truncated:
        told = {name: value for name, value in told.items() if name not in END_REASONS}
    update: dict[str, Any] = {"response_metadata": {**told, "cai": about}}
    dropped = bool(getattr(message, "tool_calls", None)) and not released.tool_calls
    if trajectory.released_from == "refusal" or dropped:
        update |= _without_calls(message, shown_of(released), among)
    elif not kept:
        update |= _mended(message, shown_of(released))
    return message.model_copy(update=update)


def refused(draft: str | BaseMessage, refusal: str, among: Any = None) -> str | BaseMessage:
    """Return a refusal that takes the place of a draft, as a text or a message, as the draft is.

    `among` is the value around the draft. If it is a list of messages with a result of one of the draft's
    tool calls, the calls are kept.
    """
    if isinstance(draft, str):
        return refusal
    update = _without_calls(draft, refusal, among if isinstance(among, list) else [])
    return draft.model_copy(update={**update, "response_metadata": {}})


def _without_calls(message: BaseMessage, text: str, among: Sequence[Any]) -> dict[str, Any]:
    """Return the update that replaces a message's content by a text, and removes its tool calls.

    If the messages around it (`among`) contain a result of one of its calls, the calls are kept: providers
    reject a tool result without its call.
    """
    known = {each.tool_call_id for each in among if isinstance(each, ToolMessage)}
    answered = any(call["id"] in known for call in getattr(message, "tool_calls", ()))
    return _mended(message, text) if answered else emptied(message, text)


def _mended(message: BaseMessage, text: str) -> dict[str, Any]:
    """Return the update that replaces a message's text; calls and parts or metadata without text are kept."""
    calls = frozenset(call["id"] for call in getattr(message, "tool_calls", ()))
    return {
        "content": _in_place(message.content, text, calls),
        "additional_kwargs": _of_others(message.additional_kwargs, calls=bool(calls)),
        **_without(message),
    }


def _without(message: BaseMessage, *names: str) -> dict[str, Any]:
    """Return the update that empties a message's invalid calls, call chunks, artifact and fields `names`."""
    # A message chunk derives its calls from its call chunks again.
    lists = ("invalid_tool_calls", "tool_call_chunks", *names)
    left: dict[str, Any] = {name: [] for name in lists if hasattr(message, name)}
    return left | {"artifact": None} if hasattr(message, "artifact") else left


_OF_THE_WORDS = {
    "id",  # OpenAI can continue from the answer that it stores under this id
    "logprobs",
    "parsed",
    "refusal",
    "reasoning",
    "reasoning_content",
    "reasoning_details",
    "audio",
}
"""Metadata keys with which providers describe or repeat an answer's text; kept only with that same text."""
_OF_THE_MODEL = {"model", "model_name", "model_provider"}
"""Metadata keys that name the model; their values are kept even if they consist of several words."""
_LONGEST = 128
"""Maximum length in characters of a metadata value that is kept as a label, such as a model's name."""


def _of_others(told: Mapping[str, Any], *, calls: bool = False) -> dict[str, Any]:
    """Return a provider's metadata about an answer, without what may reveal the answer's text.

    Only numbers and short labels are kept. If the message keeps its tool calls (`calls`), so are labels of
    any length: they may be signatures, which a provider requires in the next request.
    """
    left: dict[str, Any] = {}
    for name, value in told.items():
        if name in _OF_THE_WORDS or is_words(str(name)):
            continue
        if isinstance(value, Mapping):
            left[name] = _of_others(value, calls=calls)
        elif isinstance(value, str):
            if (name in _OF_THE_MODEL or not is_words(value)) and (calls or len(value) <= _LONGEST):
                left[name] = value
        elif value is None or isinstance(value, int | float):
            left[name] = value
    return left


def _in_place(content: str | list[Any], text: str, calls: Set[str | None]) -> str | list[Any]:
    """Return message content whose text is replaced by `text`, at the place where its text begins.

    Parts without text, such as pictures, are kept in their order. If there are tool calls (`calls`, their
    ids), these and the model's thoughts are kept, too: a provider whose model thinks before it calls a tool
    requires the thoughts in the next request, and Anthropic requires them at their original place.
    """
    if isinstance(content, str):
        return text
    parts: list[Any] = []
    new: dict[str, Any] | None = _as_part(text, content)
    for part in content:
        kind = "text" if said_in(part) is not None else kind_of(part)  # a refusal part counts as text
        if kind == "text":
            parts += [] if new is None else [new]
            new = None
        elif kind in CALLS:
            named = unwrapped(part)
            parts += [part] if {named.get("id"), named.get("call_id")} & calls else []
        elif kind in THOUGHTS:
            parts += [part] if calls else []
        elif (left := left_of(part)) is not None:
            parts.append(left)
    return parts if new is None else [*parts, new]


def _saying(content: str | list[Any], text: str) -> str | list[Any]:
    """Return content that is only a text; it is a list with one part if `content` is a list of parts."""
    return text if isinstance(content, str) else [_as_part(text, content)]


def _as_part(text: str, content: list[Any]) -> dict[str, Any]:
    """Return a text as one part that replaces all text parts of `content`.

    LangChain joins the chunks of a stream by their index. The part has the index of the last text part, so
    that what is streamed next continues it.
    """
    said = [part for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    place = {"index": said[-1]["index"]} if said and "index" in said[-1] else {}
    return {"type": "text", "text": text, **place}


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return "\n\n".join(map(_as_text, value))
    page: Callable[[], str] | str | None = getattr(value, "page_content", None)
    return page if isinstance(page, str) else str(value)
