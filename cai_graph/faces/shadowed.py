"""The face for chat models in mode `shadow`: the wrapped model's own runs, which are judged behind it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config

from cai_graph.app.handlers import ModelRun, unstreamed
from cai_graph.faces.chat import ConstitutionalChatModel, options_of
from cai_graph.faces.runnable import Answered, ConstitutionalRunnable
from cai_graph.faces.usage import result_of

if TYPE_CHECKING:
    from langchain_core.callbacks import BaseCallbackManager

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
        run = self._formed(kwargs).overheard(input, ensure_config(config))
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
        run = self._formed(kwargs).overheard(input, ensure_config(config))
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
        return self._formed(kwargs).overheard(input, ensure_config(config)).stream(options_of(stop, kwargs))

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Answer in the wrapped model's chunks."""
        run = self._formed(kwargs).overheard(input, ensure_config(config))
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
        run = self._formed(kwargs).overheard(messages, self._behind(run_manager))
        message = run.invoke(options_of(stop, kwargs))
        return result_of(message, message.usage_metadata)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        run = self._formed(kwargs).overheard(messages, self._behind(run_manager))
        message = await run.ainvoke(options_of(stop, kwargs))
        return result_of(message, message.usage_metadata)

    def _behind(self, run_manager: ModelRun | None) -> RunnableConfig:
        """Return the configuration of the wrapped model's own run, below the one that LangChain made here."""
        config = self._below(run_manager)
        callbacks = cast("BaseCallbackManager", config["callbacks"])
        return {**config, "callbacks": unstreamed(callbacks)}  # streams are shown this model's run

    def generate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer each conversation; LangChain's own entry to a chat model."""
        return _untouched(super().generate(*args, **kwargs))

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer each conversation; LangChain's own entry to a chat model."""
        return _untouched(await super().agenerate(*args, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in (
            self._formed(kwargs).overheard(messages, RunnableConfig()).stream(options_of(stop, kwargs))
        ):
            yield ChatGenerationChunk(message=chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        run = self._formed(kwargs).overheard(messages, RunnableConfig())
        async with aclosing(run.astream(options_of(stop, kwargs))) as chunks:
            async for chunk in chunks:
                yield ChatGenerationChunk(message=chunk)


def _untouched(result: LLMResult) -> LLMResult:
    """Return the result without the note by which the usage came past the callbacks."""
    for generation in itertools.chain(*result.generations):
        metadata = generation.message.response_metadata if isinstance(generation, ChatGeneration) else {}
        if metadata.get("cai", {}).keys() == {"usage"}:
            del metadata["cai"]
    return result
