"""The face for chat models in mode `shadow`: the wrapped model's own runs, which are judged behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config

from cai_graph.chat import ConstitutionalChatModel, options_of
from cai_graph.runnable import Answered, ConstitutionalRunnable

__all__ = ["ShadowedChatModel"]


class ShadowedChatModel(ConstitutionalChatModel):
    """A chat model whose answers leave untouched. Made by `constitutional` in mode `shadow`."""

    def invoke(
        self,
        input: LanguageModelInput | Any,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer."""
        run = self._guard.overheard(input, ensure_config(config))
        return cast("AIMessage", run.invoke(options_of(stop, kwargs)))

    async def ainvoke(
        self,
        input: LanguageModelInput | Any,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer."""
        run = self._guard.overheard(input, ensure_config(config))
        return cast("AIMessage", await run.ainvoke(options_of(stop, kwargs)))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Answer in the wrapped model's chunks."""
        return self._guard.overheard(input, ensure_config(config)).stream(options_of(stop, kwargs))

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Answer in the wrapped model's chunks."""
        run = self._guard.overheard(input, ensure_config(config))
        async with aclosing(run.astream(options_of(stop, kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def answered(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        source: str | None = None,
        **kwargs: Any,
    ) -> Answered:
        """Answer, and return the Trajectory beside the message once it is there."""
        runnable = ConstitutionalRunnable[LanguageModelInput, AIMessage](self._guard)
        return await runnable.answered(input, config, source=source, **kwargs)

    # What LangChain calls on the way of `generate` and of its streams of version 3.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        message = self._guard.overheard(messages, RunnableConfig()).invoke(options_of(stop, kwargs))
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        message = await self._guard.overheard(messages, RunnableConfig()).ainvoke(options_of(stop, kwargs))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._guard.overheard(messages, RunnableConfig()).stream(options_of(stop, kwargs)):
            yield ChatGenerationChunk(message=chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        run = self._guard.overheard(messages, RunnableConfig())
        async with aclosing(run.astream(options_of(stop, kwargs))) as chunks:
            async for chunk in chunks:
                yield ChatGenerationChunk(message=chunk)
