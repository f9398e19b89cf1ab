"""The face for chat models in mode `shadow`: it returns the model's answers and judges them later."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableBinding, RunnableConfig
from langchain_core.runnables.config import ensure_config

from cai_graph.app.handlers import ModelRun, unstreamed
from cai_graph.concurrency.together import together
from cai_graph.faces.chat import ConstitutionalChatModel, options_of
from cai_graph.faces.runnable import Answered, ConstitutionalRunnable

if TYPE_CHECKING:
    from langchain_core.callbacks import BaseCallbackManager, Callbacks

__all__ = ["ShadowedChatModel"]


class ShadowedChatModel(ConstitutionalChatModel):
    """A chat model whose answers are returned unchanged. Created by `constitutional` in mode `shadow`."""

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
        """Answer, wait until the answer is judged, and return the message with its Trajectory."""
        runnable = ConstitutionalRunnable[LanguageModelInput, AIMessage](self._guard)
        return await runnable.answered(input, config, source=source, **kwargs)

    def generate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        """Answer each conversation by the wrapped model's `generate`, and return all of its candidates."""
        results: list[LLMResult] = []
        for conversation, config, options in _requests(messages, stop, *args, **kwargs):
            guard = self._formed(options)
            app = _Candidates(bound=guard.app, kwargs={}, config={})
            replace(guard, app=app).overheard(conversation, config).invoke(options)
            results += app.results
        return self._joined(results)

    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        """Answer each conversation; see `generate`."""

        async def answer(conversation: list[BaseMessage], config: RunnableConfig, options: Any) -> LLMResult:
            guard = self._formed(options)
            app = _Candidates(bound=guard.app, kwargs={}, config={})
            await replace(guard, app=app).overheard(conversation, config).ainvoke(options)
            return app.results[0]

        requests = _requests(messages, stop, *args, **kwargs)
        return self._joined(await together([answer(*request) for request in requests]))

    def _joined(self, results: list[LLMResult]) -> LLMResult:
        if len(results) == 1:
            return results[0]
        return LLMResult(
            generations=[generations for result in results for generations in result.generations],
            llm_output=self._model._combine_llm_outputs([result.llm_output for result in results]),
            run=[run for result in results for run in result.run or ()] or None,
        )

    # LangChain's event streams of version 3 call these methods.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _as_chat_result(self.generate([messages], stop, self._behind(run_manager), **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _as_chat_result(await self.agenerate([messages], stop, self._behind(run_manager), **kwargs))

    def _behind(self, run_manager: ModelRun | None) -> BaseCallbackManager:
        """Return the callbacks for the wrapped model's run, a child of the run that LangChain started."""
        callbacks = cast("BaseCallbackManager", self._below(run_manager)["callbacks"])
        return unstreamed(callbacks)  # streams receive the parent run instead

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


class _Candidates(RunnableBinding[LanguageModelInput, AIMessage]):
    """Calls a model by its `generate`; the first candidate is the answer that is judged."""

    results: list[LLMResult] = []  # noqa: RUF012 - a pydantic field
    """The result of each call."""

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """Answer."""
        return self._first(cast("Any", self.bound).generate([input], **(config or {}), **kwargs))

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """Answer."""
        return self._first(await cast("Any", self.bound).agenerate([input], **(config or {}), **kwargs))

    def _first(self, result: LLMResult) -> AIMessage:
        self.results.append(result)
        return cast("AIMessage", cast("ChatGeneration", result.generations[0][0]).message)


def _requests(
    messages: list[list[BaseMessage]],
    stop: list[str] | None,
    callbacks: Callbacks = None,
    *,
    run_id: UUID | None = None,
    **kwargs: Any,
) -> Iterator[tuple[list[BaseMessage], RunnableConfig, Mapping[str, Any]]]:
    """Yield each conversation of a call of `generate`, with its configuration and options."""
    about = {name: kwargs.pop(name) for name in ("tags", "metadata", "run_name") if name in kwargs}
    for conversation in messages:
        yield (
            conversation,
            cast("RunnableConfig", {"callbacks": callbacks, "run_id": run_id, **about}),
            options_of(stop, kwargs),
        )
        run_id = None  # it is only for the first run, as in LangChain


def _as_chat_result(result: LLMResult) -> ChatResult:
    generations = cast("list[ChatGeneration]", result.generations[0])
    return ChatResult(generations=generations, llm_output=result.llm_output)
