"""A chat model at the place where its caller called it."""

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
    """A model at the place where its caller called it.

    A request's graph has surroundings of its own. In a node of another one, a model may look for that node's
    runtime, store and stream writer.
    """

    place: dict[str, Any]
    """The configuration that LangChain or LangGraph carries there."""

    @classmethod
    def at(cls, place: RunnableConfig, model: Runnable[LanguageModelInput, AIMessage]) -> Placed:
        """Return the model at the place of this configuration."""
        # A graph inside the model streams nothing of a draft to the graph around.
        known = {key: value for key, value in place.get("configurable", {}).items() if key != STREAM}
        return cls(bound=model, kwargs={}, config={}, place={**place, "configurable": known})

    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Answer."""
        with self._here(config):
            return self.bound.invoke(input, config, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        """Answer."""
        with self._here(config):
            return await self.bound.ainvoke(input, config, **kwargs)

    # Between two chunks the surroundings are the reader's.

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessage]:
        """Answer in chunks."""
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
        """Answer in chunks."""
        made = cast("AsyncGenerator[AIMessage]", self.bound.astream(input, config, **kwargs))
        async with aclosing(made) as chunks:
            while True:
                with self._here(config):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk

    def _here(self, config: RunnableConfig | None) -> within:
        # What runs in the model is traced under the request, by callbacks that feed no stream.
        return within(cast("RunnableConfig", {**self.place, "callbacks": (config or {}).get("callbacks")}))
