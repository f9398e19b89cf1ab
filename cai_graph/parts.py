"""Parts of a message's content: what each of them says, and what of it may stay beside other words.

LangChain and the providers know many kinds of parts. One that is not known here counts as words: it is judged
with the text, and goes when that is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["CALLS", "THOUGHTS", "is_words", "kind_of", "picture_in", "said_in", "words_in"]

THOUGHTS = frozenset({"reasoning", "reasoning_content", "thinking", "redacted_thinking"})
"""Kinds in which a model thinks about its answer."""
CALLS = frozenset({"tool_use", "tool_call", "tool_call_chunk", "input_json_delta", "function_call"})
"""Kinds that repeat a message's calls, as providers write them. The tools that a provider runs are others."""
_PICTURES = frozenset(
    {"image", "image_url", "input_image", "image_generation_call", "video", "file", "file_data", "media"}
)
"""Kinds that hold something other than words. Not sound: that is the answer, spoken."""
_PAYLOADS = frozenset({"base64", "data", "file_data", "image_url", "result", "url"})
"""Under which names they hold it."""
_WORDS = frozenset({"text", "args", "executable_code", "code_execution_result"})
"""Under which names a part has words, be they a single one."""


def kind_of(part: str | Mapping[str, Any]) -> str:
    """Return the kind of a part, which LangChain's content of version 1 may have wrapped."""
    if isinstance(part, str):
        return "text"
    value = part.get("value")
    if part.get("type") == "non_standard" and isinstance(value, Mapping):
        return kind_of(value)
    return str(part.get("type"))


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
    """Return the words of a part that is no text; empty where it has none.

    They are those of documents, of what a provider's own tools are asked and return, and of any other kind,
    but not of thoughts, nor of calls, which a message has apart.

    >>> words_in({"type": "code_execution_result", "code_execution_result": "42", "outcome": 1})
    '42'
    """
    if said_in(part) is not None or kind_of(part) in THOUGHTS | CALLS:
        return ""
    return "\n".join(_words(part, picture=kind_of(part) in _PICTURES))


def _words(value: Any, name: str = "", *, picture: bool) -> Iterator[str]:
    if isinstance(value, str):
        if _speaks(value, name, picture=picture):
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if is_words(str(key)):
                yield str(key)
            yield from _words(item, str(key), picture=picture)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item, name, picture=picture)


def _speaks(text: str, name: str, *, picture: bool) -> bool:
    """Return whether a part's string is words; in a picture the payload is none, however it is encoded."""
    return not (picture and name in _PAYLOADS) and (is_words(text) or (name in _WORDS and text != ""))


def is_words(text: str) -> bool:
    """Return whether a text may be words, and is no label, number, address or encoded bytes.

    >>> is_words("some words"), is_words("说话"), is_words("gpt-5-mini"), is_words("aGVsbG8=")
    (True, True, False, False)
    """
    return not text.isascii() or len(text.split(maxsplit=1)) > 1


def picture_in(part: str | Mapping[str, Any]) -> Any:
    """Return a part that is a picture, a film or a file without what it says in words; None if it is none."""
    return _silent(part) if kind_of(part) in _PICTURES else None


def _silent(value: Any, name: str = "") -> Any:
    """Return what a picture is without its words."""
    if isinstance(value, str):
        return "" if _speaks(value, name, picture=True) else value
    if isinstance(value, Mapping):
        return {key: _silent(item, str(key)) for key, item in value.items() if not is_words(str(key))}
    return [_silent(item, name) for item in value] if isinstance(value, list | tuple) else value
