"""What callbacks are told of an answer that leaves: a chat model's run, from its start to its end.

Under a synchronous call they are told in its caller's thread, where a handler may have a connection or a
thread-local of its own. Streams are shown the answer's usage; other handlers are not, since they count each
call where it is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackHandler,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, LLMResult
from langchain_core.tracers._streaming import _V2StreamingCallbackHandler

from cai_graph import bridge

__all__ = ["ModelRun", "Told", "is_stream", "manager_for", "only"]

ModelRun: TypeAlias = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun
"""A chat model's run as LangChain has it."""


def manager_for(caller: bridge.Caller | None) -> type[CallbackManager] | type[AsyncCallbackManager]:
    """Return the class of managers whose handlers are told in the caller's thread, or else in this loop."""
    return AsyncCallbackManager if caller is None else CallbackManager


class Told:
    """A chat model's run, as its handlers are told of it.

    Args:
        run: synchronous where a caller waits, else asynchronous.
        caller: the thread that waits.
    """

    def __init__(self, run: ModelRun, caller: bridge.Caller | None) -> None:
        self.run = run
        self._caller = caller
        self._streams = only(run, [handler for handler in run.handlers if is_stream(handler)])
        self._others = only(run, [handler for handler in run.handlers if not is_stream(handler)])
        self._all: AIMessageChunk | None = None

    @classmethod
    async def begin(
        cls,
        manager: CallbackManager | AsyncCallbackManager,
        messages: list[BaseMessage],
        caller: bridge.Caller | None,
        *,
        serialized: dict[str, Any] | None = None,
        **about: Any,
    ) -> Told:
        """Say that a model is asked, and return its run. `about` is what LangChain says of a run."""
        start = partial(manager.on_chat_model_start, serialized or {}, [messages], **about)
        (run,) = await _tell(start, caller if manager.handlers else None)
        return cls(run, caller)

    async def piece(self, part: AIMessageChunk) -> None:
        """Show a part of the answer."""
        self._all = part if self._all is None else self._all + part
        for run, shown in self._each(part):
            chunk = ChatGenerationChunk(message=shown)
            await _tell(partial(run.on_llm_new_token, chunk.text, chunk=chunk), self._caller)

    async def end(self, whole: AIMessage | None = None) -> None:
        """Say that nothing more comes; `whole` is the answer, if not the sum of its parts."""
        for run, shown in self._each(whole or self._all):
            await _tell(partial(run.on_llm_end, _result(shown)), self._caller)

    async def error(self, error: BaseException) -> None:
        """Say that nothing more comes, and why."""
        for run, shown in self._each(self._all):
            await _tell(partial(run.on_llm_error, error, response=_result(shown)), self._caller)

    def _each(self, message: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the run as each kind of handlers is told of it, and what they see of a message."""
        if self._streams.handlers:
            yield self._streams, message
        if self._others.handlers:
            hidden = {"usage_metadata": None}
            yield self._others, None if message is None else message.model_copy(update=hidden)


def only(run: ModelRun, handlers: Sequence[BaseCallbackHandler]) -> ModelRun:
    """Return the run as these of its handlers are told of it."""
    return type(run)(
        run_id=run.run_id,
        handlers=[*handlers],
        inheritable_handlers=[],
        parent_run_id=run.parent_run_id,
        tags=run.tags,
        metadata=run.metadata,
    )


async def _tell(event: Callable[[], Any], caller: bridge.Caller | None) -> Any:
    """Have handlers hear an event, in the thread of a caller that still waits."""
    told = event() if caller is None or caller.gone else await caller.call(event)
    return await told if inspect.isawaitable(told) else told


def _result(message: AIMessage | None) -> LLMResult:
    if message is None:
        return LLMResult(generations=[])
    if isinstance(message, AIMessageChunk):
        return LLMResult(generations=[[ChatGenerationChunk(message=message)]])
    return LLMResult(generations=[[ChatGeneration(message=message)]])


def is_stream(handler: BaseCallbackHandler) -> bool:
    """Return whether a handler is a stream's, as LangChain and LangGraph tell theirs from others."""
    # The method is what the protocol _StreamingCallbackHandler asks for; isinstance takes long with one.
    return isinstance(handler, _V2StreamingCallbackHandler) or hasattr(handler, "tap_output_aiter")
