"""Content parts of a message: extracts the text that critics judge, and what may stay when text is replaced.

LangChain and the providers have many kinds of parts. Text by the model is judged. The requests and results of
a provider's own tools are not judged, nor is other data in a part; but they are removed when the answer is
rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CALLS", "THOUGHTS", "is_words", "kind_of", "left_of", "said_in", "unwrapped", "words_in"]

THOUGHTS = frozenset(
    {"reasoning", "reasoning_content", "thinking", "redacted_thinking", "function_call_signature"}
)
"""Kinds of a model's reasoning, and of Gemini's signature over its reasoning before a call."""
CALLS = frozenset(
    {"tool_use", "tool_call", "tool_call_chunk", "input_json_delta", "function_call", "custom_tool_call"}
)
"""Kinds that repeat a message's tool calls in a provider's format; not those of a provider's own tools."""
_PICTURES = frozenset(
    {"image", "image_url", "input_image", "image_generation_call", "video", "file", "file_data", "media"}
)
"""Kinds of pictures, videos and files. Audio is not among them: it is the answer itself, spoken."""
_PAYLOADS = frozenset({"base64", "data", "file_data", "image_url", "result", "url"})
"""The keys under which such parts have their data."""
_WORDS = ("text", "transcript", "executable_code")
"""The keys under which a part has text by the model."""


def kind_of(part: str | Mapping[str, Any]) -> str:
    """Return the kind of a part, also of one that LangChain's content version 1 has wrapped."""
    return "text" if isinstance(part, str) else str(unwrapped(part).get("type"))


def unwrapped(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part as its provider wrote it, without the wrapper of LangChain's content version 1."""
    value = part.get("value")
    if part.get("type") == "non_standard" and isinstance(value, Mapping):
        return unwrapped(value)
    return part


def said_in(part: str | Mapping[str, Any]) -> str | None:
    """Return the text of a part that is plain text or a refusal; None for a part of any other kind.

    OpenAI's Responses API has refusals as parts, which LangChain's content version 1 wraps.
    """
    if isinstance(part, str):
        return part
    kind, value = part.get("type"), part.get("value")
    if kind == "non_standard" and isinstance(value, Mapping):
        return said_in(value) if value.get("type") == "refusal" else None
    said = part.get(kind) if kind in ("text", "refusal") else None
    return said if isinstance(said, str) else None


def words_in(part: str | Mapping[str, Any]) -> str:
    """Return the words by the model in a part that is not plain text; "" where there are none.

    These are code that it shows, the transcript of speech, and a tool call that cannot be made. Its reasoning
    is not included, nor are its tool calls, which a message has in a field of their own.

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
    """Return whether a text may be words, rather than a label, a number, an address or encoded bytes.

    >>> is_words("some words"), is_words("说话"), is_words("gpt-5-mini"), is_words("aGVsbG8=")
    (True, True, False, False)
    """
    return not text.isascii() or len(text.split(maxsplit=1)) > 1


def left_of(part: str | Mapping[str, Any]) -> Any:
    """Return the rest of a part that may stay beside a replaced text; None where nothing may.

    This is a picture, a video or a file without any words in it, or a conversation that its provider has
    compacted into bytes.
    """
    if kind_of(part) in _PICTURES:
        return _silent(part)
    return part if kind_of(part) == "compaction" and _silent(part) == part else None


def _silent(value: Any, name: str = "") -> Any:
    """Return a value with its words removed. The data of a picture does not count as words."""
    if isinstance(value, str):
        speaks = name not in _PAYLOADS and (name in _WORDS or is_words(value))
        return "" if speaks else value
    if isinstance(value, Mapping):
        return {key: _silent(item, str(key)) for key, item in value.items() if not is_words(str(key))}
    return [_silent(item, name) for item in value] if isinstance(value, list | tuple) else value
