"""Parts of a message's content: what each of them says, and what of it may stay beside other words.

LangChain and the providers know many kinds of parts. What the model says is judged. What a provider's own
tools were asked and returned is not, nor what else a part holds; but it goes when the answer is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CALLS", "THOUGHTS", "is_words", "kind_of", "left_of", "said_in", "unwrapped", "words_in"]

THOUGHTS = frozenset(
    {"reasoning", "reasoning_content", "thinking", "redacted_thinking", "function_call_signature"}
)
"""Kinds in which a model thinks about its answer, and in which Gemini signs what it thought before a call."""
CALLS = frozenset(
    {"tool_use", "tool_call", "tool_call_chunk", "input_json_delta", "function_call", "custom_tool_call"}
)
"""Kinds that repeat a message's calls, as providers write them. The tools that a provider runs are others."""
_PICTURES = frozenset(
    {"image", "image_url", "input_image", "image_generation_call", "video", "file", "file_data", "media"}
)
"""Kinds that hold something other than words. Not sound: that is the answer, spoken."""
_PAYLOADS = frozenset({"base64", "data", "file_data", "image_url", "result", "url"})
"""Under which names they hold it."""
_WORDS = ("text", "transcript", "executable_code")
"""Under which names a part has what the model says."""


def kind_of(part: str | Mapping[str, Any]) -> str:
    """Return the kind of a part, which LangChain's content of version 1 may have wrapped."""
    return "text" if isinstance(part, str) else str(unwrapped(part).get("type"))


def unwrapped(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part as its provider wrote it, where LangChain's content of version 1 has wrapped it."""
    value = part.get("value")
    if part.get("type") == "non_standard" and isinstance(value, Mapping):
        return unwrapped(value)
    return part


def said_in(part: str | Mapping[str, Any]) -> str | None:
    """Return what a part says as the message's text: text, or a refusal; None where it is of another kind.

    OpenAI's Responses API has refusals as parts, which LangChain's content of version 1 wraps.
    """
    if isinstance(part, str):
        return part
    kind, value = part.get("type"), part.get("value")
    if kind == "non_standard" and isinstance(value, Mapping):
        return said_in(value) if value.get("type") == "refusal" else None
    said = part.get(kind) if kind in ("text", "refusal") else None
    return said if isinstance(said, str) else None


def words_in(part: str | Mapping[str, Any]) -> str:
    """Return what the model says in a part that is no text; empty where it says nothing.

    That is code that it shows, what it speaks, and a call that cannot be made, but not its thoughts, nor its
    calls, which a message has apart.

    >>> words_in({"type": "executable_code", "executable_code": "1+1", "language": "python"})
    '1+1'
    """
    kind = kind_of(part)
    if isinstance(part, str) or said_in(part) is not None or kind in THOUGHTS | CALLS:
        return ""
    names = ("args",) if kind == "invalid_tool_call" else _WORDS
    found = [unwrapped(part).get(name) for name in names]
    return "\n".join(said for said in found if isinstance(said, str))


def is_words(text: str) -> bool:
    """Return whether a text may be words, and is no label, number, address or encoded bytes.

    >>> is_words("some words"), is_words("说话"), is_words("gpt-5-mini"), is_words("aGVsbG8=")
    (True, True, False, False)
    """
    return not text.isascii() or len(text.split(maxsplit=1)) > 1


def left_of(part: str | Mapping[str, Any]) -> Any:
    """Return what of a part may stay beside other words; None where nothing may.

    That is a picture, a film or a file, without what it says in words, and a conversation that its provider
    has packed in bytes.
    """
    if kind_of(part) in _PICTURES:
        return _silent(part)
    return part if kind_of(part) == "compaction" and _silent(part) == part else None


def _silent(value: Any, name: str = "") -> Any:
    """Return a value without its words; a picture's payload is none, however it is encoded."""
    if isinstance(value, str):
        speaks = name not in _PAYLOADS and (name in _WORDS or is_words(value))
        return "" if speaks else value
    if isinstance(value, Mapping):
        return {key: _silent(item, str(key)) for key, item in value.items() if not is_words(str(key))}
    return [_silent(item, name) for item in value] if isinstance(value, list | tuple) else value
