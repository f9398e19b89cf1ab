"""What the calls of a request cost in tokens: summed, and told once.

Every inner call tells the callback handlers its own usage, and the request's run would tell them the sum once
more. So the sum is set aside while callbacks look at a message, and put into its place for the caller.
"""

from __future__ import annotations

import itertools
from typing import TypeVar, cast

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import UsageMetadata, add_usage
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult

from cai_graph.app.streams import Piece
from cai_graph.messages import END_REASONS
from cai_graph.trajectory import Trajectory

__all__ = ["chunk_of", "counted", "result_of", "usage_of", "with_usage"]

M = TypeVar("M", bound=AIMessage)


def result_of(message: AIMessage, usage: UsageMetadata | None) -> ChatResult:
    """Return the message as a chat model's result, its usage set aside from the callbacks."""
    beside = (*END_REASONS, "logprobs")  # what providers say of a generation, beside its message
    info = {key: value for key, value in message.response_metadata.items() if key in beside}
    return ChatResult(generations=[ChatGeneration(message=_set_aside(message, usage), generation_info=info)])


def chunk_of(piece: Piece) -> AIMessageChunk:
    """Return a piece as a chat model's chunk, its usage set aside from the callbacks."""
    message = cast("AIMessageChunk", piece.output)
    if piece.trajectory is None:
        return message.model_copy(update={"usage_metadata": None})
    return _set_aside(message, usage_of(piece.whole, piece.trajectory))


def _set_aside(message: M, usage: UsageMetadata | None) -> M:
    about = {**message.response_metadata.get("cai", {}), "usage": usage}
    update = {"usage_metadata": None, "response_metadata": {**message.response_metadata, "cai": about}}
    return message.model_copy(update=update)


def with_usage(message: AIMessageChunk) -> AIMessageChunk:
    """Return what callers and streams see of a chunk: the last one has the usage."""
    about = message.response_metadata.get("cai")
    return message if about is None else message.model_copy(update={"usage_metadata": about["usage"]})


def counted(result: LLMResult) -> LLMResult:
    """Return the result with the usage of each message in its place, after the callbacks have seen it."""
    total: UsageMetadata | None = None
    names: set[str] = set()
    for generation in itertools.chain(*result.generations):
        message = getattr(generation, "message", None)
        if isinstance(message, AIMessage) and "cai" in message.response_metadata:
            message.usage_metadata = message.response_metadata["cai"].get("usage")
            total = add_usage(total, message.usage_metadata)
            names.add(message.response_metadata.get("model_name", ""))
    output = dict(result.llm_output or {})
    if total is not None:  # in OpenAI's words, which all who read it there know
        asked, written = total["input_tokens"], total["output_tokens"]
        spent = {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}
        output["token_usage"] = spent
    if len(names) == 1 and "" not in names:
        (output["model_name"],) = names
    result.llm_output = output
    return result


def usage_of(message: AIMessage, trajectory: Trajectory | None) -> UsageMetadata | None:
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
