"""Runs a chat model under its caller's LangGraph configuration, instead of that of the request's graph."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing, closing
from typing import Any, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig

from cai_graph.app.wrapped import STREAM
from cai_graph.concurrency.context import within

__all__ = ["Placed"]


class Placed(RunnableBinding[LanguageModelInput, AIMessage]):
    """A model that runs under the configuration of the place where it was called.

    Inside a request's graph, LangGraph's context is that of this graph. But a model that is called in a node
    of the user's own graph may look up that node's runtime, store and stream writer.
    """

    place: dict[str, Any]
    """The configuration that LangChain or LangGraph had in the context at that place."""

    @classmethod
    def at(cls, place: RunnableConfig, model: Runnable[LanguageModelInput, AIMessage]) -> Placed:
        """Return a model that runs under this configuration."""
        # Without STREAM, so that a graph inside the model does not stream the draft to the enclosing graph.
        known = {key: value for key, value in place.get("configurable", {}).items() if key != STREAM}
        return cls(bound=model, kwargs={}, config={}, place={**place, "configurable": known})

    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Return the model's reply."""
        with self._here(config):
            return self.bound.invoke(input, config, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Return the model's reply."""
        with self._here(config):
            return await self.bound.ainvoke(input, config, **kwargs)

    # Between two chunks the reader's own context applies, so it is set for each chunk anew.

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessage]:
        """Yield the model's reply in chunks."""
        with closing(cast("Generator[AIMessage]", self.bound.stream(input, config, **kwargs))) as chunks:
            while True:
                with self._here(config):
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessage]:
        """Yield the model's reply in chunks."""
        made = cast("AsyncGenerator[AIMessage]", self.bound.astream(input, config, **kwargs))
        async with aclosing(made) as chunks:
            while True:
                with self._here(config):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk

    def _here(self, config: RunnableConfig | None) -> within:
        # Runs inside the model are traced under the request, with callbacks that feed no stream.
        return within(cast("RunnableConfig", {**self.place, "callbacks": (config or {}).get("callbacks")}))
