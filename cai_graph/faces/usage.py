"""What the calls of a request cost in tokens: what its answer says of it, summed and told once.

An answer's `usage_metadata` is its draft's: by it others tell how much of the model's window a turn fills.
The sum over all calls stands in `response_metadata["cai"]["usage"]`. Every inner call tells the callback
handlers its own usage, and the request's run would tell them the draft's once more: they are told of the
answer without it (`Told`, `hide_usage`).
"""

from __future__ import annotations

import itertools
from functools import reduce
from typing import Any, TypeVar, cast

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import UsageMetadata, add_usage
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult

from cai_graph.app.streams import Piece
from cai_graph.messages import END_REASONS
from cai_graph.trajectory import Trajectory

__all__ = ["chunk_of", "counted", "result_of", "summed"]

M = TypeVar("M", bound=AIMessage)


def result_of(message: AIMessage, trajectory: Trajectory | None) -> ChatResult:
    """Return the message as a chat model's result."""
    beside = (*END_REASONS, "logprobs")  # what providers say of a generation, beside its message
    info = {key: value for key, value in message.response_metadata.items() if key in beside}
    told = summed(message, message, trajectory)
    return ChatResult(generations=[ChatGeneration(message=told, generation_info=info)])


def chunk_of(piece: Piece) -> AIMessageChunk:
    """Return a piece as a chat model's chunk; the last one has the usage."""
    message = cast("AIMessageChunk", piece.output)
    usage = None if piece.trajectory is None else piece.whole.usage_metadata
    message = message.model_copy(update={"usage_metadata": usage})
    return message if piece.trajectory is None else summed(message, piece.whole, piece.trajectory)


def summed(message: M, whole: AIMessage, trajectory: Trajectory | None) -> M:
    """Return what leaves of the answer `whole`, a message or its last chunk, with the sum of all calls."""
    about = {**message.response_metadata.get("cai", {}), "usage": _sum(whole, trajectory)}
    return message.model_copy(update={"response_metadata": {**message.response_metadata, "cai": about}})


def counted(result: LLMResult) -> LLMResult:
    """Return the result as its caller sees it, after the callbacks have; it says what all calls cost."""
    messages = [cast("ChatGeneration", each).message for each in itertools.chain(*result.generations)]
    costs = [message.response_metadata["cai"]["usage"] for message in messages]
    output = dict(result.llm_output or {})
    if any(costs):
        output["token_usage"] = _in_openais_words(reduce(add_usage, costs))
    for name in ("model_name", "system_fingerprint"):
        said = {message.response_metadata.get(name) for message in messages}
        if len(said) == 1 and (value := said.pop()):
            output[name] = value
    result.llm_output = output
    return result


def _in_openais_words(usage: UsageMetadata) -> dict[str, Any]:
    """Return the usage in the words that all know who read it in `llm_output`."""
    spent: dict[str, Any] = {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
    }
    if (cached := usage.get("input_token_details", {}).get("cache_read")) is not None:
        spent["prompt_tokens_details"] = {"cached_tokens": cached}
    if (thought := usage.get("output_token_details", {}).get("reasoning")) is not None:
        spent["completion_tokens_details"] = {"reasoning_tokens": thought}
    return spent


def _sum(message: AIMessage, trajectory: Trajectory | None) -> UsageMetadata | None:
    """Return the sum over all calls of a request; None where no provider counts."""
    assert trajectory is not None  # a chat model waits for nobody
    total = message.usage_metadata  # the draft's, in the provider's detail
    for call in trajectory.calls:
        if call.role == "draft" or call.input_tokens is None:
            continue
        asked, written = call.input_tokens, call.output_tokens or 0
        own = UsageMetadata(input_tokens=asked, output_tokens=written, total_tokens=asked + written)
        if call.cached_input_tokens is not None:
            own["input_token_details"] = {"cache_read": call.cached_input_tokens}
        total = add_usage(total, own)
    return total
