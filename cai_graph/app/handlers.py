"""Which events of a request each kind of LangChain callback handler receives.

    steps     the step that is running, as a custom event
    inside    the runs of the app, critic and reviser: tracers receive all of their events; handlers that show
              an answer to a reader receive no text of a draft
    released  the released answer, as a chat model's run from its start to its end

Under a synchronous call the released answer's events are emitted in the caller's thread, since a handler may
use a connection or a thread-local of that thread.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast
from uuid import UUID

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackHandler,
    BaseCallbackManager,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, message_chunk_to_message
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers._streaming import _V2StreamingCallbackHandler
from langchain_core.tracers.base import AsyncBaseTracer, BaseTracer
from langchain_core.tracers.context import run_collector_var

from cai_graph.app.streams import Piece
from cai_graph.app.wrapped import without_words
from cai_graph.concurrency import bridge
from cai_graph.trajectory import shown_of

__all__ = [
    "PROGRESS",
    "AnswerEvents",
    "AsksForStreams",
    "ModelRun",
    "RunEvents",
    "collected",
    "filtered_manager",
    "filtered_run",
    "hide_usage",
    "is_stream",
    "manager_for",
    "progress",
    "shows_answers",
    "under_a_model",
    "unstreamed",
]

M = TypeVar("M", bound=BaseCallbackManager)
T = TypeVar("T")

# --- which handlers -----------------------------------------------------------------------------------


def shows_answers(handler: BaseCallbackHandler) -> bool:
    """Return whether a handler shows a reader the answer while it is written: the handlers behind the streams
    of LangChain and LangGraph do, and those that print tokens, such as `StreamingStdOutCallbackHandler`."""
    return is_stream(handler) or _shows_tokens(handler)


def is_stream(handler: BaseCallbackHandler) -> bool:
    """Return whether a handler feeds a stream of LangChain's or LangGraph's, by the tests that these use."""
    # The protocol _StreamingCallbackHandler requires this method; isinstance with a protocol is slow.
    return isinstance(handler, _V2StreamingCallbackHandler) or hasattr(handler, "tap_output_aiter")


def _shows_tokens(handler: BaseCallbackHandler) -> bool:
    heard = [getattr(handler, event) for event in _TOKENS if _handles(handler, event)]
    return any(getattr(hear, "__func__", hear) not in _RECORDS for hear in heard)


_TOKENS = ("on_llm_new_token", "on_stream_event")
"""Events with parts of an answer while it is written."""
_RECORDS = (BaseTracer.on_llm_new_token, AsyncBaseTracer.on_llm_new_token)
"""Tracers record tokens and show them to no reader."""


def _handles(handler: BaseCallbackHandler, event: str) -> bool:
    """Return whether a handler implements an event; LangChain's handlers override many with empty methods."""
    code = getattr(getattr(handler, event), "__code__", None)
    return code is None or bool(code.co_names or code.co_freevars)  # code that uses no name does nothing


def filtered_manager(
    kind: type[M], callbacks: BaseCallbackManager, wanted: Callable[[BaseCallbackHandler], bool]
) -> M:
    """Return a manager of class `kind` under the same parent run, with the handlers that `wanted` accepts."""
    return kind(
        handlers=[handler for handler in callbacks.handlers if wanted(handler)],
        parent_run_id=callbacks.parent_run_id,
        tags=callbacks.tags,
        metadata=callbacks.metadata,
    )


# --- steps --------------------------------------------------------------------------------------------

PROGRESS = "cai_progress"
"""Name of the custom event for each step, and its key in LangGraph's `custom` stream mode."""


def progress(
    callbacks: BaseCallbackManager, writer: Callable[[Any], None] | None
) -> Callable[[str], Awaitable[None]] | None:
    """Return a function that reports a step to callbacks and to an outer graph's `custom` stream.

    None where neither exists. The event's data is `{"step": "revising 1/2"}`, never any text of a draft.
    """
    manager = filtered_manager(
        AsyncCallbackManager, callbacks, lambda handler: _handles(handler, "on_custom_event")
    )
    if not manager.handlers and writer is None:
        return None

    async def tell(step: str) -> None:
        if writer is not None:
            writer({PROGRESS: {"step": step}})
        await manager.on_custom_event(PROGRESS, {"step": step}, run_id=manager.parent_run_id)

    return tell


# --- inside -------------------------------------------------------------------------------------------


def unstreamed(callbacks: BaseCallbackManager) -> BaseCallbackManager:
    """Return the callbacks for the runs inside: handlers that show an answer receive no text of a draft.

    Tracers, and handlers that show nothing, such as token counters and prompt loggers, receive every event of
    the inner calls. https://github.com/langchain-ai/langchain/issues/35011
    Handlers that show an answer receive the events of the app's tools and retrievers and custom events; if
    they implement chain events, they receive everything except tokens.
    """
    inside: dict[int, BaseCallbackHandler] = {}
    for handler in (*callbacks.handlers, *callbacks.inheritable_handlers):
        if id(handler) not in inside:
            inside[id(handler)] = _inside(handler, callbacks.parent_run_id)
    if all(id(kept) == of for of, kept in inside.items()):
        return callbacks  # not modified by runs below: LangChain copies them
    made = callbacks.copy()
    for handlers in (made.handlers, made.inheritable_handlers):
        handlers[:] = [inside[id(handler)] for handler in handlers]
    return made


def _inside(handler: BaseCallbackHandler, run_id: UUID | None) -> BaseCallbackHandler:
    """Return a handler for the runs inside the run `run_id`."""
    if not shows_answers(handler):
        return handler
    if is_stream(handler) or not _handles(handler, "on_chain_start"):
        return _WithoutModels(handler, run_id)
    return _WithoutTokens(handler)


class AsksForStreams(BaseCallbackHandler):
    """Ignores all events; its presence makes LangChain call the models below in streaming mode.

    So the provider's connection of a streamed request stays alive while the whole answer is awaited. It has
    the methods by which LangChain recognises a streaming handler, but not the base class by which LangGraph
    does.
    """

    ignore_llm = ignore_chat_model = ignore_chain = ignore_retry = True
    ignore_agent = ignore_retriever = ignore_custom_event = True
    run_inline = True

    def tap_output_aiter(self, run_id: UUID, output: T) -> T:
        """Return the stream of a run unchanged."""
        return output

    def tap_output_iter(self, run_id: UUID, output: T) -> T:
        """Return the stream of a run unchanged."""
        return output


def under_a_model(handlers: list[BaseCallbackHandler], run_id: UUID) -> list[BaseCallbackHandler]:
    """Return the handlers of a chat model's run `run_id` for the runs below it.

    A handler that implements neither `on_llm_end` nor `on_chain_start`, such as a prompt logger, receives the
    events of one model, as it would without a constitution.
    """
    return [
        handler
        if _handles(handler, "on_llm_end") or _handles(handler, "on_chain_start")
        else _WithoutModels(handler, run_id)
        for handler in handlers
    ]


class _WithoutModels(BaseCallbackHandler):
    """Passes on only the events of the app's tools and retrievers, and custom events.

    They appear as children of the run `run_id`, since the handler receives no events of the runs between.
    """

    ignore_llm = ignore_chat_model = ignore_chain = ignore_retry = True
    ignore_agent = ignore_retriever = ignore_custom_event = False

    def __init__(self, handler: BaseCallbackHandler, run_id: UUID | None) -> None:
        self.raise_error, self.run_inline = handler.raise_error, handler.run_inline
        for event, (ignored, known_as) in _SHOWN_INSIDE.items():
            if _handles(handler, event) and not getattr(handler, ignored):
                about = {} if run_id is None else {known_as: run_id}
                setattr(self, event, _adapted(getattr(handler, event), without_words, about))


_SHOWN_INSIDE = {
    **{f"on_tool_{when}": ("ignore_agent", "parent_run_id") for when in ("start", "end", "error")},
    **{f"on_retriever_{when}": ("ignore_retriever", "parent_run_id") for when in ("start", "end", "error")},
    "on_custom_event": ("ignore_custom_event", "run_id"),
}
"""By event that is passed on: the handler's flag to ignore it, and the argument that is set to `run_id`."""


def _adapted(
    hear: Callable[..., Any], change: Callable[[Any], Any], about: dict[str, Any]
) -> Callable[..., Any]:
    """Return `hear` with `change` applied to its positional arguments, and `about` overriding the others."""

    async def tell_async(*args: Any, **kwargs: Any) -> Any:
        return await hear(*map(change, args), **{**kwargs, **about})

    def tell(*args: Any, **kwargs: Any) -> Any:
        return hear(*map(change, args), **{**kwargs, **about})

    return tell_async if asyncio.iscoroutinefunction(hear) else tell


class _WithoutTokens(BaseCallbackHandler):
    """A proxy for a handler that drops its token events."""

    def __init__(self, handler: BaseCallbackHandler) -> None:
        self._handler = handler
        asynchronous = asyncio.iscoroutinefunction(handler.on_llm_new_token)
        self._hear = _ignore_async if asynchronous else _ignore

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__
        return own(self, "_hear") if name in _TOKENS else getattr(own(self, "_handler"), name)


def _ignore(*args: Any, **kwargs: Any) -> None: ...


async def _ignore_async(*args: Any, **kwargs: Any) -> None: ...


def collected(callbacks: BaseCallbackManager) -> BaseCallbackManager:
    """Return the callbacks with the handler of LangChain's `collect_runs`, where one is active.

    LangChain adds that handler to the runs that it starts itself, but LangGraph does not: without it here,
    the runs below a graph's would be collected as roots.
    """
    if (collector := run_collector_var.get()) is None:
        return callbacks
    made = callbacks.copy()
    made.add_handler(collector)
    return made


# --- released -----------------------------------------------------------------------------------------

ModelRun: TypeAlias = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun
"""LangChain's callback manager of a chat model's run."""


def manager_for(caller: bridge.Caller | None) -> type[CallbackManager] | type[AsyncCallbackManager]:
    """Return the class of callback managers: synchronous where a caller's thread waits, else asynchronous."""
    return AsyncCallbackManager if caller is None else CallbackManager


class RunEvents:
    """Emits the events of a chat model's run: start, tokens, and end or error.

    Only handlers of streams receive the answer's usage: other handlers have counted it at the inner calls.

    Args:
        run: the run to emit for; synchronous where a caller waits, else asynchronous.
        caller: the thread that waits, in which handlers are called; None: this event loop.
    """

    def __init__(self, run: ModelRun, caller: bridge.Caller | None) -> None:
        self.run = run
        self._caller = caller
        self._streams = filtered_run(run, is_stream)
        self._others = filtered_run(run, lambda handler: not is_stream(handler))
        self.all: AIMessageChunk | None = None
        """The sum of the parts so far; None before the first."""

    @classmethod
    async def begin(
        cls,
        manager: CallbackManager | AsyncCallbackManager,
        messages: list[BaseMessage],
        caller: bridge.Caller | None,
        *,
        serialized: dict[str, Any] | None = None,
        **about: Any,
    ) -> RunEvents:
        """Emit the start of a run, and return the run. `about` are arguments of `on_chat_model_start`."""
        start = partial(manager.on_chat_model_start, serialized or {}, [messages], **about)
        (run,) = await _tell(start, caller if manager.handlers else None)
        return cls(run, caller)

    async def piece(self, part: AIMessageChunk) -> None:
        """Emit a part of the answer."""
        self.all = part if self.all is None else self.all + part
        for run, shown in self._each(part):
            chunk = ChatGenerationChunk(message=shown)
            await _tell(partial(run.on_llm_new_token, chunk.text, chunk=chunk), self._caller)

    async def end(self, whole: AIMessage | None = None) -> None:
        """Emit the end of the run; `whole` is the answer, if it is not the sum of the parts."""
        for run, shown in self._each(whole or self.all):
            await _tell(partial(run.on_llm_end, _result(shown)), self._caller)

    async def error(self, error: BaseException) -> None:
        """Emit the error that ended the run."""
        for run, shown in self._each(self.all):
            await _tell(partial(run.on_llm_error, error, response=_result(shown)), self._caller)

    def _each(self, message: Any) -> Iterator[tuple[Any, Any]]:
        """Yield, for each kind of handler, its run and the message that it receives."""
        if self._streams.handlers:
            yield self._streams, message
        if self._others.handlers:
            hidden = {"usage_metadata": None}
            yield self._others, None if message is None else message.model_copy(update=hidden)


def filtered_run(run: ModelRun, wanted: Callable[[BaseCallbackHandler], bool]) -> ModelRun:
    """Return the run with only the handlers that `wanted` accepts."""
    return type(run)(
        run_id=run.run_id,
        handlers=[handler for handler in run.handlers if wanted(handler)],
        inheritable_handlers=[],
        parent_run_id=run.parent_run_id,
        tags=run.tags,
        metadata=run.metadata,
    )


def hide_usage(run: ModelRun | None) -> None:
    """Remove the usage from the end event of a run for all of its handlers except those of streams.

    These handlers have counted the usage at the inner calls, and would count it a second time.
    """
    if run is not None:
        run.handlers = [each if is_stream(each) else _WithoutUsage(each) for each in run.handlers]


class _WithoutUsage(BaseCallbackHandler):
    """A proxy for a handler that removes the usage from `on_llm_end`."""

    def __init__(self, handler: BaseCallbackHandler) -> None:
        self._handler = handler

    def __getattribute__(self, name: str) -> Any:
        hear = getattr(object.__getattribute__(self, "_handler"), name)
        return _adapted(hear, _without_usage, {}) if name == "on_llm_end" else hear


def _without_usage(response: LLMResult) -> LLMResult:
    """Return a chat model's result without the usage of its messages."""
    hidden = {"usage_metadata": None}
    generations = [
        [each.model_copy(update={"message": each.message.model_copy(update=hidden)}) for each in said]
        for said in cast("list[list[ChatGeneration]]", response.generations)
    ]
    return response.model_copy(update={"generations": generations})


async def _tell(event: Callable[[], Any], caller: bridge.Caller | None) -> Any:
    """Call the handlers of an event, in the caller's thread if it still waits."""
    made = event() if caller is None or caller.gone else await caller.call(event)
    return await made if inspect.isawaitable(made) else made


def _result(message: AIMessage | None) -> LLMResult:
    if message is None:
        return LLMResult(generations=[])
    if isinstance(message, AIMessageChunk):
        return LLMResult(generations=[[ChatGenerationChunk(message=message)]])
    return LLMResult(generations=[[ChatGeneration(message=message)]])


class AnswerEvents:
    """Emits the released answer as a chat model's run, to the handlers that show an answer.

    `astream_events` and the `messages` mode of a LangGraph graph show a chat model's tokens, and so do
    handlers that print tokens; none of them may receive the tokens of the models inside. Tracers receive
    nothing here: they have recorded the calls that were made. The run has the name, tags and metadata of the
    model that wrote the draft, so that filters of readers still match.
    """

    def __init__(
        self, config: RunnableConfig, messages: list[BaseMessage], name: str, caller: bridge.Caller | None
    ) -> None:
        callbacks = cast("BaseCallbackManager", config["callbacks"])
        self._manager = filtered_manager(manager_for(caller), callbacks, shows_answers)
        self._messages, self._name, self._caller = messages, name, caller
        self._run: RunEvents | None = None
        self.drafting = _Drafting()
        """A handler to add to the app's own run; it records which model drafts."""

    async def piece(self, piece: Piece) -> None:
        """Emit a piece of the answer."""
        if not self._manager.handlers or not (piece.text or piece.trajectory):
            return
        drafted = None if piece.trajectory is None else piece.trajectory.draft
        draft = piece.text if drafted is None else shown_of(drafted.answer)
        run = await self._begun(draft)
        chunk = piece.output
        if not isinstance(chunk, AIMessageChunk):
            chunk = AIMessageChunk(content=piece.text, id=piece.id or f"lc_run--{run.run.run_id}")
        if drafted is not None and not any(each and each.usage_metadata for each in (chunk, run.all)):
            chunk = chunk.model_copy(update={"usage_metadata": self.drafting.usage_of(draft)})
        await run.piece(chunk)

    async def end(self) -> None:
        """Emit the end of the answer, if any of it was emitted."""
        if self._run is not None and self._run.all is not None:
            await self._run.end(cast("AIMessage", message_chunk_to_message(self._run.all)))

    async def error(self, error: BaseException) -> None:
        """Emit the error, also where no token was emitted: a reader of tokens waits for the end of a run."""
        if self._manager.handlers:
            await (await self._begun()).error(error)

    async def _begun(self, draft: str | None = None) -> RunEvents:
        if self._run is None:
            model = self.drafting.model_of(draft) or _Model({}, self._name, [], {})
            self._manager.add_tags(model.tags, inherit=False)
            # In a graph's node the answer belongs to that node, whichever inner node drafted it.
            self._manager.metadata = {**model.metadata, **self._manager.metadata}
            about: dict[str, Any] = {"serialized": model.serialized, "name": model.name}
            self._run = await RunEvents.begin(self._manager, self._messages, self._caller, **about)
        return self._run


class _Model(NamedTuple):
    """What LangChain passes to `on_chat_model_start` about a model."""

    serialized: dict[str, Any]
    name: str | None
    tags: list[str]
    metadata: dict[str, Any]

    @classmethod
    def begun(cls, serialized: dict[str, Any] | None, about: Mapping[str, Any]) -> _Model:
        return cls(serialized or {}, about.get("name"), about.get("tags") or [], about.get("metadata") or {})


class _Drafting(BaseCallbackHandler):
    """Records the model runs of an app: which model, its text, and its usage."""

    run_inline = True  # else each event of an asynchronous app costs a thread hop

    def __init__(self) -> None:
        self._models: dict[UUID, _Model] = {}
        self._texts: dict[UUID, str] = {}
        self._usages: dict[UUID, UsageMetadata | None] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: UUID, **about: Any) -> None:
        """Record the model."""
        self._models[run_id] = _Model.begun(serialized, about)

    def on_llm_start(self, serialized: Any, prompts: Any, *, run_id: UUID, **about: Any) -> None:
        """Record the model."""
        self._models[run_id] = _Model.begun(serialized, about)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **about: Any) -> None:
        """Record the text and the usage."""
        for each in response.generations[0][:1] if response.generations else []:
            self._texts[run_id] = each.text
            self._usages[run_id] = getattr(getattr(each, "message", None), "usage_metadata", None)

    def model_of(self, draft: str | None) -> _Model | None:
        """Return the model that wrote a draft; None if no model ran."""
        run_id = self._run_of(draft)
        return None if run_id is None else self._models[run_id]

    def usage_of(self, draft: str | None) -> UsageMetadata | None:
        """Return the usage of a draft; None if its provider reports none."""
        run_id = self._run_of(draft)
        return None if run_id is None else self._usages.get(run_id)

    def _run_of(self, draft: str | None) -> UUID | None:
        """Return the last run whose text is exactly the draft, or else the run that started last."""
        asked: list[UUID | None] = [None, *self._models]
        wrote = [run_id for run_id in self._models if self._texts.get(run_id) == draft]
        return wrote[-1] if wrote else asked[-1]
