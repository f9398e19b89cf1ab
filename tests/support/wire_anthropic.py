"""Anthropic's wire format, for the server of `wire`: a reply whole or as server-sent events.

Prompts are cached as Anthropic does: what stands up to a `cache_control` is written at its first coming, and
read when the same bytes come again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wire import Reply

ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


def error(status: int, message: str) -> dict[str, Any]:
    """The body of an error."""
    return {"type": "error", "error": {"type": ERRORS.get(status, "api_error"), "message": message}}


def conversation(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The request's messages as OpenAI has them, the system prompt first."""
    system = body.get("system")
    if not system:
        return list(body["messages"])
    return [{"role": "system", "content": _text(system)}] + [
        {"role": turn["role"], "content": _text(turn["content"])} for turn in body["messages"]
    ]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def message(body: Mapping[str, Any], reply: Reply, seen: set[str]) -> dict[str, Any]:
    """The reply as a whole message; `seen` holds the prefixes that are cached."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": _blocks(reply),
        "stop_reason": _stop(reply),
        "stop_sequence": None,
        "usage": _usage(body, reply, seen),
    }


def events(body: Mapping[str, Any], reply: Reply, seen: set[str]) -> Iterator[dict[str, Any]]:
    """The reply as events, texts word by word."""
    whole = message(body, reply, seen)
    usage = {**whole["usage"], "output_tokens": 0}
    yield {
        "type": "message_start",
        "message": {**whole, "content": [], "stop_reason": None, "usage": usage},
    }
    for index, block in enumerate(whole["content"]):
        empty, deltas = _deltas(block)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": whole["stop_reason"], "stop_sequence": None},
        "usage": {"output_tokens": whole["usage"]["output_tokens"]},
    }
    yield {"type": "message_stop"}


def _blocks(reply: Reply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.reasoning:
        blocks.append({"type": "thinking", "thinking": reply.reasoning, "signature": "signed"})
    if reply.text:
        blocks.append({"type": "text", "text": reply.text})
    for call in reply.tool_calls:
        blocks.append({"type": "tool_use", "id": call["id"], "name": call["name"], "input": call["args"]})
    return blocks


def _deltas(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The block as it starts, and what is added to it."""
    if block["type"] == "text":
        words = re.findall(r"\s*\S+|\s+$", block["text"])
        return {**block, "text": ""}, [{"type": "text_delta", "text": word} for word in words]
    if block["type"] == "thinking":
        return {**block, "thinking": "", "signature": ""}, [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    said = json.dumps(block["input"])
    half = len(said) // 2
    return {**block, "input": {}}, [
        {"type": "input_json_delta", "partial_json": part} for part in (said[:half], said[half:])
    ]


def _stop(reply: Reply) -> str:
    if reply.tool_calls and reply.finish == "stop":
        return "tool_use"
    return {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}.get(
        reply.finish, reply.finish
    )


def _usage(body: Mapping[str, Any], reply: Reply, seen: set[str]) -> dict[str, int]:
    prefix = _cached_prefix(body)
    words = len(" ".join(_text(turn["content"]) for turn in conversation(body)).split())
    static = 0 if prefix is None else len(prefix.split())
    read = static if prefix in seen else 0
    if prefix is not None:
        seen.add(prefix)
    return {
        "input_tokens": max(0, words - static),
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": static - read,
        "output_tokens": len(reply.text.split()) + len(reply.tool_calls),
    }


def _cached_prefix(body: Mapping[str, Any]) -> str | None:
    """What stands before the last `cache_control`, tools included; None where there is none."""
    system = body.get("system")
    parts = system if isinstance(system, list) else []
    marked = [number for number, part in enumerate(parts) if part.get("cache_control")]
    if not marked:
        return None
    tools = json.dumps(body.get("tools"), sort_keys=True)
    return tools + "".join(part["text"] for part in parts[: marked[-1] + 1])
