"""Puts the token usage of a request into its answer, so that no call is counted twice.

An answer's `usage_metadata` is that of its draft, since applications read from it how much of the model's
context window a turn fills. The sum over all calls is in `response_metadata["cai"]["usage"]`. Callback
handlers receive the usage of every inner call. From the request's run they would receive the draft's once
more, so that run reports the answer without it, except to handlers of streams (`RunEvents`, `hide_usage`).
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
    """Return the message as a chat model's result, with the usage of all calls."""
    beside = (*END_REASONS, "logprobs")  # what providers report beside a generation's message
    info = {key: value for key, value in message.response_metadata.items() if key in beside}
    told = summed(message, message, trajectory)
    return ChatResult(generations=[ChatGeneration(message=told, generation_info=info)])


def chunk_of(piece: Piece) -> AIMessageChunk:
    """Return a piece as a chat model's chunk; only the last one has the usage."""
    message = cast("AIMessageChunk", piece.output)
    usage = None if piece.trajectory is None else piece.whole.usage_metadata
    message = message.model_copy(update={"usage_metadata": usage})
    return message if piece.trajectory is None else summed(message, piece.whole, piece.trajectory)


def summed(message: M, whole: AIMessage, trajectory: Trajectory | None) -> M:
    """Return `message`, which is the answer `whole` or its last chunk, with the usage of all calls."""
    about = {**message.response_metadata.get("cai", {}), "usage": _sum(whole, trajectory)}
    return message.model_copy(update={"response_metadata": {**message.response_metadata, "cai": about}})


def counted(result: LLMResult) -> LLMResult:
    """Return the result for the caller, with the usage of all calls; callbacks have received it without."""
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
    """Return the usage under OpenAI's names, which readers of `llm_output` expect."""
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
    """Return the sum over all calls of a request; None if no provider reports usage."""
    assert trajectory is not None  # None only if a graph or chain paused
    total = message.usage_metadata  # the draft's, with the provider's details
    for call in trajectory.calls:
        if call.role == "draft" or call.input_tokens is None:
            continue
        asked, written = call.input_tokens, call.output_tokens or 0
        own = UsageMetadata(input_tokens=asked, output_tokens=written, total_tokens=asked + written)
        if call.cached_input_tokens is not None:
            own["input_token_details"] = {"cache_read": call.cached_input_tokens}
        total = add_usage(total, own)
    return total
