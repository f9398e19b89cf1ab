"""Helpers for tests of wrapped apps: a chat model with scripted replies, and a search for leaked drafts."""

from __future__ import annotations

import asyncio
import re
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

from langchain_core.callbacks import (
    AsyncCallbackHandler,
    CallbackManagerForLLMRun,
    StreamingStdOutCallbackHandler,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import merge_configs
from pydantic import PrivateAttr, SkipValidation

__all__ = ["ScriptedModel", "Seen", "everywhere", "leaks"]

Reply = str | AIMessage | Exception


class ScriptedModel(BaseChatModel):
    """A chat model with scripted replies; a stream has one chunk for each word.

    >>> model = ScriptedModel(replies=["one", "two"])
    >>> model.invoke("hello").content, model.invoke("again").content
    ('one', 'two')
    >>> model.invoke("once more")
    Traceback (most recent call last):
    AssertionError: the script has 2 replies, and this is call 3: [human] once more
    """

    replies: SkipValidation[Sequence[Reply] | Callable[[list[BaseMessage]], Reply]]
    """Replies in order, or a function from the messages to a reply; an exception is raised."""

    streaming: bool = False
    """Whether `invoke` streams, too, as with other chat models that are made with `streaming=True`."""

    _calls: list[list[BaseMessage]] = PrivateAttr(default_factory=list)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @property
    def calls(self) -> list[list[BaseMessage]]:
        """The messages of each call so far."""
        return self._calls

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._reply(messages))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        reply = self._reply(messages)
        words = re.findall(r"\S+\s*|^\s+", reply.content) if isinstance(reply.content, str) else []
        fields = reply.model_dump(exclude={"type", "content"})
        for word in words[:-1]:
            yield ChatGenerationChunk(message=AIMessageChunk(content=word, id=reply.id))
        last = AIMessageChunk(content=words[-1] if words else reply.content, **fields, chunk_position="last")
        yield ChatGenerationChunk(message=last)

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream(messages, *args, **kwargs):
            yield chunk

    def _reply(self, messages: list[BaseMessage]) -> AIMessage:
        with self._lock:
            self._calls.append(messages)
            number = len(self._calls)
        if callable(self.replies):
            reply = self.replies(messages)
        elif number <= len(self.replies):
            reply = self.replies[number - 1]
        else:
            last = messages[-1]
            raise AssertionError(
                f"the script has {len(self.replies)} replies, and this is call {number}: "
                f"[{last.type}] {last.text[:500]}"
            )
        if isinstance(reply, Exception):
            raise reply
        return AIMessage(reply) if isinstance(reply, str) else reply

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate(messages, *args, **kwargs)  # nothing here blocks, so no thread is needed


# --- output of an app by all ways of calling it -------------------------------------------------------


class Seen(NamedTuple):
    """The output of an app for one way of calling it."""

    way: str
    """Such as `astream`, or `node astream, messages`: in a node of an outer graph, streamed in that mode."""
    items: list[Any]
    """The result, chunks or events, in order."""
    error: Exception | None
    """The error that was raised at the end, if any."""


async def leaks(app: Runnable[Any, Any], input: Any, canary: str) -> list[str]:
    """Return the ways of calling `app` whose output contains `canary`, a word of a draft not to be released.

    >>> import asyncio
    >>> asyncio.run(leaks(ScriptedModel(replies=lambda _: "a bad word"), "hello", "bad"))[:3]
    ['invoke', 'stream', 'transform']
    """
    return [seen.way async for seen in everywhere(app, input) if canary in repr(seen)]


async def everywhere(
    app: Runnable[Any, Any], input: Any, config: RunnableConfig | None = None
) -> AsyncIterator[Seen]:
    """Call `app` in every way that LangChain and LangGraph have, and yield the output of each.

    It is called synchronously and asynchronously, by itself and in a node of an outer graph, which is
    streamed in all modes at once with its subgraphs. An app that is itself a graph is streamed in all modes,
    too. The tokens that LangChain's callback handlers receive are yielded as `invoke, tokens` and so on;
    under `invoke` a model sends them tokens only where it was made with `streaming=True`.
    """
    alone: dict[str, Callable[[], Any]] = {
        "invoke": lambda: app.invoke(input, config),
        "stream": lambda: app.stream(input, config),
        "transform": lambda: app.transform(iter([input]), config),
        "ainvoke": lambda: app.ainvoke(input, config),
        "astream": lambda: app.astream(input, config),
        "atransform": lambda: app.atransform(_only(input), config),
        "astream_events": lambda: app.astream_events(input, config, version="v2"),
    }
    if hasattr(type(app), "stream_mode") or isinstance(app, BaseChatModel):  # others have no version 3
        alone["astream_events v3"] = lambda: _third(app, input, config)
    for way, call in alone.items():
        yield Seen(way, *await _collected(call, asynchronous=way.startswith("a")))
    for way in ("invoke", "stream", "ainvoke", "astream"):
        hearing = _Queue() if way.startswith("a") else _StdOut()
        listened = merge_configs(config, {"callbacks": [hearing]})
        ask = lambda: getattr(app, way)(input, listened)  # noqa: B023, E731
        _, error = await _collected(ask, asynchronous=way.startswith("a"))
        yield Seen(f"{way}, tokens", hearing.tokens, error)
    for way in ("invoke", "stream", "ainvoke", "astream"):
        under: RunnableConfig = {**(config or {}), "configurable": {"thread_id": way}}
        events = lambda: _third(_around(app, way), {"input": input}, under)  # noqa: B023, E731
        if way.startswith("a"):
            yield Seen(f"node {way}, astream_events v3", *await _collected(events, asynchronous=True))
        async for seen in _modes(f"node {way}", _around(app, way), {"input": input}, config):
            yield seen
    if hasattr(app, "stream_mode"):  # it is a graph
        for way in ("stream", "astream"):
            async for seen in _modes(f"graph {way}", app, input, config):
                yield seen


class _StdOut(StreamingStdOutCallbackHandler):
    """Collects the tokens that LangChain's handler would print."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []

    def on_llm_new_token(self, token: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        self.tokens.append(token)


class _Queue(AsyncCallbackHandler):
    """Collects the tokens that a reader of LangChain's `AsyncIteratorCallbackHandler` gets."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []
        self._ended = False

    async def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], **kwargs: Any) -> None:
        self._ended = False

    async def on_llm_new_token(self, token: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        self.tokens += [] if self._ended else [token]

    async def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self._ended = True


_MODES = ("values", "updates", "messages", "custom", "tasks", "debug")


async def _modes(way: str, graph: Any, input: Any, config: RunnableConfig | None) -> AsyncIterator[Seen]:
    """Stream a graph in all modes at once, and yield the output of each mode."""
    modes = [*_MODES, "checkpoints"] if graph.checkpointer else [*_MODES]
    asynchronous = way.partition(" ")[2].startswith("a")
    stream = graph.astream if asynchronous else graph.stream
    under: RunnableConfig = {**(config or {}), "configurable": {"thread_id": way}}
    items, error = await _collected(
        lambda: stream(input, under, stream_mode=modes, subgraphs=True), asynchronous=asynchronous
    )
    for mode in modes:
        yield Seen(f"{way}, {mode}", [shown for _, told, shown in items if told == mode], error)


def _around(app: Runnable[Any, Any], way: str) -> Any:
    """Return an outer graph with a checkpointer and one node, which calls `app` in the given way."""
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import END, START, StateGraph

    nodes = {
        "invoke": lambda state: {"output": app.invoke(state["input"])},
        "stream": lambda state: {"output": list(app.stream(state["input"]))},
    }

    async def ainvoke(state: _State) -> dict[str, Any]:
        return {"output": await app.ainvoke(state["input"])}

    async def astream(state: _State) -> dict[str, Any]:
        return {"output": [chunk async for chunk in app.astream(state["input"])]}

    graph = StateGraph(_State)
    graph.add_node("answer", {**nodes, "ainvoke": ainvoke, "astream": astream}[way])
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile(checkpointer=InMemorySaver())


class _State(TypedDict, total=False):
    input: Any
    output: Any


async def _third(app: Any, input: Any, config: RunnableConfig | None) -> AsyncIterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LangChain warns that version 3 may change
        async for event in await app.astream_events(input, config, version="v3"):
            yield event


async def _only(item: Any) -> AsyncIterator[Any]:
    yield item


async def _collected(call: Callable[[], Any], *, asynchronous: bool) -> tuple[list[Any], Exception | None]:
    """Return the result of a call, item by item where it streams, and the error that it raises."""
    items: list[Any] = []

    def consume() -> None:
        made = call()
        if isinstance(made, Iterator):
            for item in made:  # one by one, to keep the items before an error
                items.append(item)
        else:
            items.append(made)

    try:
        if not asynchronous:
            await asyncio.to_thread(consume)  # a thread without an event loop
        elif isinstance(made := call(), AsyncIterator):
            async for item in made:
                items.append(item)
        else:
            items.append(await made)
    except Exception as error:
        return items, error
    return items, None
