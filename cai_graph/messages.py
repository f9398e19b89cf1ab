"""Converts LangChain's messages to the log's Message and back, and detects replies that were cut off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from cai_graph.plain import plain
from cai_graph.trajectory import Message, ToolCall, text_of

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

__all__ = ["END_REASONS", "cut_short", "from_langchain", "spelt_out", "to_langchain"]

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}


def from_langchain(message: BaseMessage) -> Message:
    """Return a LangChain message as a Message; a message chunk is treated as a message of its kind."""
    kind = (
        message.type.removesuffix("MessageChunk").lower() if message.type.endswith("Chunk") else message.type
    )
    role = getattr(message, "role", None) if kind == "chat" else _ROLES.get(kind, kind)
    content: str | list[Any] = message.content or _apart(message)
    # An app cannot run an invalid call, so it is a part of the content, to be judged as text.
    if broken := getattr(message, "invalid_tool_calls", ()):
        said = [{"type": "text", "text": content}] if isinstance(content, str) and content else [*content]
        content = [*said, *({"type": "invalid_tool_call", **_named(call)} for call in broken)]
    return Message(
        role=role or kind,
        content=str(content) if isinstance(content, str) else content,
        name=message.name,
        id=message.id,
        tool_calls=tuple(
            ToolCall(name=call["name"], args=plain(call["args"]), id=call["id"])
            for call in getattr(message, "tool_calls", ())
        ),
        tool_call_id=getattr(message, "tool_call_id", None),
    )


def spelt_out(message: Message) -> Message:
    """Return a message without tool calls, whose text has the arguments of each call appended as JSON."""
    said = [text_of(message), *(json.dumps(call.args, ensure_ascii=False) for call in message.tool_calls)]
    return replace(message, content="\n".join(filter(None, said)), tool_calls=())


def _apart(message: BaseMessage) -> str:
    """Return the refusal or audio transcript that OpenAI's models put beside an empty content, or ""."""
    told = message.additional_kwargs
    audio = told.get("audio")
    spoken = audio.get("transcript") if isinstance(audio, Mapping) else None
    return str(told.get("refusal") or spoken or "")


def _named(call: Mapping[str, Any]) -> dict[str, Any]:
    return {name: call.get(name) for name in ("name", "args", "id")}


def to_langchain(messages: Sequence[Message]) -> list[BaseMessage]:
    """Return Messages as LangChain messages."""
    from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

    simple: Mapping[str, type[BaseMessage]] = {"user": HumanMessage, "system": SystemMessage}
    converted: list[BaseMessage] = []
    for message in messages:
        common: dict[str, Any] = {"content": message.content, "name": message.name, "id": message.id}
        if message.role in simple:
            converted.append(simple[message.role](**common))
        elif message.role == "assistant":
            calls = [
                {"name": c.name, "args": c.args, "id": c.id, "type": "tool_call"} for c in message.tool_calls
            ]
            converted.append(AIMessage(**common, tool_calls=calls))
        elif message.role == "tool":
            converted.append(ToolMessage(**common, tool_call_id=message.tool_call_id or ""))
        else:
            converted.append(ChatMessage(**common, role=message.role))
    return converted


END_REASONS = ("finish_reason", "stop_reason", "done_reason")
"""The keys under which providers report why a reply ended."""
_CUT = {
    **dict.fromkeys(("length", "max_tokens", "model_length"), "it was cut at its token limit"),
    **dict.fromkeys(("content_filter", "refusal", "safety"), "the provider's filter stopped it"),
}
"""Provider's reason -> why the reply is incomplete, for the reasons that mean so."""


def cut_short(message: BaseMessage) -> str | None:
    """Return why a reply is incomplete, its token limit or the provider's filter; None if it is complete."""
    told = message.response_metadata
    reason = next((told[name] for name in END_REASONS if told.get(name)), None)
    return _CUT.get(reason.lower()) if isinstance(reason, str) else None
