"""The callback handlers around a request, and what each kind of them is told.

    steps     which one is under way, as a custom event
    inside    of the runs below: tracers hear all of them, what shows an answer hears no word of a draft
    leaving   of the answer that leaves: a chat model's run, from its start to its end

Under a synchronous call they are told of what leaves in its caller's thread, where a handler may have a
connection or a thread-local of its own.
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
    "ModelRun",
    "Shown",
    "Streaming",
    "Told",
    "chosen",
    "collected",
    "hide_usage",
    "is_stream",
    "manager_for",
    "only",
    "progress",
    "shows_answers",
    "under_a_model",
    "unstreamed",
]

M = TypeVar("M", bound=BaseCallbackManager)
T = TypeVar("T")

# --- which handlers -----------------------------------------------------------------------------------


def shows_answers(handler: BaseCallbackHandler) -> bool:
    """Return whether a handler shows an answer as it hears it: to a stream, as those of LangChain and
    LangGraph do, or token by token, as `StreamingStdOutCallbackHandler` does."""
    return is_stream(handler) or _shows_tokens(handler)


def is_stream(handler: BaseCallbackHandler) -> bool:
    """Return whether a handler is a stream's, as LangChain and LangGraph tell theirs from others."""
    # The method is what the protocol _StreamingCallbackHandler asks for; isinstance takes long with one.
    return isinstance(handler, _V2StreamingCallbackHandler) or hasattr(handler, "tap_output_aiter")


def _shows_tokens(handler: BaseCallbackHandler) -> bool:
    heard = [getattr(handler, event) for event in _TOKENS if _hears(handler, event)]
    return any(getattr(hear, "__func__", hear) not in _RECORDS for hear in heard)


_TOKENS = ("on_llm_new_token", "on_stream_event")
"""Events that hand over an answer while it is written."""
_RECORDS = (BaseTracer.on_llm_new_token, AsyncBaseTracer.on_llm_new_token)
"""Tracers record the tokens of the calls that they follow, and show them to nobody."""


def _hears(handler: BaseCallbackHandler, event: str) -> bool:
    """Return whether a handler does anything at an event; LangChain's own override many by a docstring."""
    code = getattr(getattr(handler, event), "__code__", None)
    return code is None or bool(code.co_names or code.co_freevars)  # what names nothing does nothing


def chosen(kind: type[M], callbacks: BaseCallbackManager, wanted: Callable[[BaseCallbackHandler], bool]) -> M:
    """Return a manager of this kind that tells the wanted ones of these callbacks of runs at their place."""
    return kind(
        handlers=[handler for handler in callbacks.handlers if wanted(handler)],
        parent_run_id=callbacks.parent_run_id,
        tags=callbacks.tags,
        metadata=callbacks.metadata,
    )


# --- steps --------------------------------------------------------------------------------------------

PROGRESS = "cai_progress"
"""Name of the custom event that says which step is under way, and its key in LangGraph's `custom` mode."""


def progress(
    callbacks: BaseCallbackManager, writer: Callable[[Any], None] | None
) -> Callable[[str], Awaitable[None]] | None:
    """Return what tells callbacks and an outer graph's `custom` stream of a step; None where nobody hears.

    The event's data is `{"step": "revising 1/2"}`: never a word of a draft.
    """
    manager = chosen(AsyncCallbackManager, callbacks, lambda handler: _hears(handler, "on_custom_event"))
    if not manager.handlers and writer is None:
        return None

    async def tell(step: str) -> None:
        if writer is not None:
            writer({PROGRESS: {"step": step}})
        await manager.on_custom_event(PROGRESS, {"step": step}, run_id=manager.parent_run_id)

    return tell


# --- inside -------------------------------------------------------------------------------------------


def unstreamed(callbacks: BaseCallbackManager) -> BaseCallbackManager:
    """Return the callbacks as runs inside may have them: no word of a draft reaches what shows an answer.

    Tracers see every inner call, and so does whatever shows nothing, such as what counts tokens or logs
    prompts. https://github.com/langchain-ai/langchain/issues/35011
    What shows an answer is told of the app's tools, retrievers and custom events; where it follows chains,
    of everything but tokens.
    """
    inside: dict[int, BaseCallbackHandler] = {}
    for handler in (*callbacks.handlers, *callbacks.inheritable_handlers):
        if id(handler) not in inside:
            inside[id(handler)] = _inside(handler, callbacks.parent_run_id)
    if all(id(kept) == of for of, kept in inside.items()):
        return callbacks  # nobody changes them below: LangChain makes copies of its own
    made = callbacks.copy()
    for handlers in (made.handlers, made.inheritable_handlers):
        handlers[:] = [inside[id(handler)] for handler in handlers]
    return made


def _inside(handler: BaseCallbackHandler, run_id: UUID | None) -> BaseCallbackHandler:
    """Return a handler as runs inside the run `run_id` may have it."""
    if not shows_answers(handler):
        return handler
    if is_stream(handler) or not _hears(handler, "on_chain_start"):
        return _Aside(handler, run_id)
    return _Deaf(handler)


class Streaming(BaseCallbackHandler):
    """Hears nothing, but has the models below it asked for a stream, as a reader's stream around them would.

    So a request that is streamed keeps its provider's connection alive while the whole answer is awaited. It
    has what LangChain takes for a stream's handler, and does not inherit it, by which LangGraph tells one.
    """

    ignore_llm = ignore_chat_model = ignore_chain = ignore_retry = True
    ignore_agent = ignore_retriever = ignore_custom_event = True
    run_inline = True

    def tap_output_aiter(self, run_id: UUID, output: T) -> T:
        """Return what a run streams."""
        return output

    def tap_output_iter(self, run_id: UUID, output: T) -> T:
        """Return what a run streams."""
        return output


def under_a_model(handlers: list[BaseCallbackHandler], run_id: UUID) -> list[BaseCallbackHandler]:
    """Return the handlers of a chat model's run `run_id` as those below it may have them.

    What hears neither a model end nor chains, such as what logs prompts, sees one model as it always did.
    """
    return [
        handler
        if _hears(handler, "on_llm_end") or _hears(handler, "on_chain_start")
        else _Aside(handler, run_id)
        for handler in handlers
    ]


class _Aside(BaseCallbackHandler):
    """A handler that is told of the app's tools, retrievers and custom events, and of nothing else inside.

    To it they happen right under the run `run_id`, since it knows of no run between.
    """

    ignore_llm = ignore_chat_model = ignore_chain = ignore_retry = True
    ignore_agent = ignore_retriever = ignore_custom_event = False

    def __init__(self, handler: BaseCallbackHandler, run_id: UUID | None) -> None:
        self.raise_error, self.run_inline = handler.raise_error, handler.run_inline
        for event, (ignored, known_as) in _ASIDE.items():
            if _hears(handler, event) and not getattr(handler, ignored):
                about = {} if run_id is None else {known_as: run_id}
                setattr(self, event, _aside(getattr(handler, event), about))


_ASIDE = {
    **{f"on_tool_{when}": ("ignore_agent", "parent_run_id") for when in ("start", "end", "error")},
    **{f"on_retriever_{when}": ("ignore_retriever", "parent_run_id") for when in ("start", "end", "error")},
    "on_custom_event": ("ignore_custom_event", "run_id"),
}
"""Events without a word of an answer: what ignores them, and which argument names a run that is not shown."""


def _aside(hear: Callable[..., Any], about: dict[str, Any]) -> Callable[..., Any]:
    """Return `hear` with these arguments, whatever its caller says, and without what a model said."""

    async def tell_async(*args: Any, **kwargs: Any) -> Any:
        return await hear(*map(without_words, args), **{**kwargs, **about})

    def tell(*args: Any, **kwargs: Any) -> Any:
        return hear(*map(without_words, args), **{**kwargs, **about})

    return tell_async if asyncio.iscoroutinefunction(hear) else tell


class _Deaf(BaseCallbackHandler):
    """A handler to all who ask, but one that hears no tokens."""

    def __init__(self, handler: BaseCallbackHandler) -> None:
        self._handler = handler
        asynchronous = asyncio.iscoroutinefunction(handler.on_llm_new_token)
        self._hear = _hear_nothing_async if asynchronous else _hear_nothing

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__
        return own(self, "_hear") if name in _TOKENS else getattr(own(self, "_handler"), name)


def _hear_nothing(*args: Any, **kwargs: Any) -> None: ...


async def _hear_nothing_async(*args: Any, **kwargs: Any) -> None: ...


def collected(callbacks: BaseCallbackManager) -> BaseCallbackManager:
    """Return the callbacks with what LangChain's `collect_runs` collects by.

    It hears of each run that LangChain begins, but of none that LangGraph does: the runs below those would be
    roots to it.
    """
    if (collector := run_collector_var.get()) is None:
        return callbacks
    made = callbacks.copy()
    made.add_handler(collector)
    return made


# --- leaving ------------------------------------------------------------------------------------------

ModelRun: TypeAlias = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun
"""A chat model's run as LangChain has it."""


def manager_for(caller: bridge.Caller | None) -> type[CallbackManager] | type[AsyncCallbackManager]:
    """Return the class of managers whose handlers are told in the caller's thread, or else in this loop."""
    return AsyncCallbackManager if caller is None else CallbackManager


class Told:
    """A chat model's run, as its handlers are told of it.

    Streams are shown the answer's usage; other handlers are not, since they count each call where it is made.

    Args:
        run: synchronous where a caller waits, else asynchronous.
        caller: the thread that waits.
    """

    def __init__(self, run: ModelRun, caller: bridge.Caller | None) -> None:
        self.run = run
        self._caller = caller
        self._streams = only(run, is_stream)
        self._others = only(run, lambda handler: not is_stream(handler))
        self.all: AIMessageChunk | None = None
        """What was shown so far."""

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
        self.all = part if self.all is None else self.all + part
        for run, shown in self._each(part):
            chunk = ChatGenerationChunk(message=shown)
            await _tell(partial(run.on_llm_new_token, chunk.text, chunk=chunk), self._caller)

    async def end(self, whole: AIMessage | None = None) -> None:
        """Say that nothing more comes; `whole` is the answer, if not the sum of its parts."""
        for run, shown in self._each(whole or self.all):
            await _tell(partial(run.on_llm_end, _result(shown)), self._caller)

    async def error(self, error: BaseException) -> None:
        """Say that nothing more comes, and why."""
        for run, shown in self._each(self.all):
            await _tell(partial(run.on_llm_error, error, response=_result(shown)), self._caller)

    def _each(self, message: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the run as each kind of handlers is told of it, and what they see of a message."""
        if self._streams.handlers:
            yield self._streams, message
        if self._others.handlers:
            hidden = {"usage_metadata": None}
            yield self._others, None if message is None else message.model_copy(update=hidden)


def only(run: ModelRun, wanted: Callable[[BaseCallbackHandler], bool]) -> ModelRun:
    """Return the run as the wanted ones of its handlers are told of it."""
    return type(run)(
        run_id=run.run_id,
        handlers=[handler for handler in run.handlers if wanted(handler)],
        inheritable_handlers=[],
        parent_run_id=run.parent_run_id,
        tags=run.tags,
        metadata=run.metadata,
    )


def hide_usage(run: ModelRun | None) -> None:
    """Have those of a run's handlers that are no streams hear of its end without the usage.

    They count each call where it is made, and LangChain, which tells them, would have them count it twice.
    """
    if run is not None:
        run.handlers = [each if is_stream(each) else _Uncounting(each) for each in run.handlers]


class _Uncounting(BaseCallbackHandler):
    """A handler to all who ask, but one that hears a model's end without the usage."""

    def __init__(self, handler: BaseCallbackHandler) -> None:
        self._handler = handler

    def __getattribute__(self, name: str) -> Any:
        handler = object.__getattribute__(self, "_handler")
        heard = getattr(handler, name)
        if name != "on_llm_end":
            return heard

        async def tell_async(response: LLMResult, **about: Any) -> Any:
            return await heard(_without_usage(response), **about)

        def tell(response: LLMResult, **about: Any) -> Any:
            return heard(_without_usage(response), **about)

        return tell_async if asyncio.iscoroutinefunction(heard) else tell


def _without_usage(response: LLMResult) -> LLMResult:
    """Return a chat model's result without the usage of its messages."""
    hidden = {"usage_metadata": None}
    generations = [
        [each.model_copy(update={"message": each.message.model_copy(update=hidden)}) for each in said]
        for said in cast("list[list[ChatGeneration]]", response.generations)
    ]
    return response.model_copy(update={"generations": generations})


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


class Shown:
    """Shows what leaves to the handlers that show an answer, as the chat model's answer that it is.

    `astream_events` and the `messages` mode of a LangGraph graph live on a chat model's tokens, and of the
    models inside no token may reach them; nor those that show tokens, such as one that prints them. Tracers
    are told nothing: they saw the calls that were made. Its readers find it by the name, tags and metadata of
    the model that drafted.
    """

    def __init__(
        self, config: RunnableConfig, messages: list[BaseMessage], name: str, caller: bridge.Caller | None
    ) -> None:
        callbacks = cast("BaseCallbackManager", config["callbacks"])
        self._manager = chosen(manager_for(caller), callbacks, shows_answers)
        self._messages, self._name, self._caller = messages, name, caller
        self._told: Told | None = None
        self.drafting = _Drafting()
        """Is to hear the app's own run."""

    async def piece(self, piece: Piece) -> None:
        """Show a piece."""
        if not self._manager.handlers or not (piece.text or piece.trajectory):
            return
        drafted = None if piece.trajectory is None else piece.trajectory.draft
        draft = piece.text if drafted is None else shown_of(drafted.answer)
        told = await self._begun(draft)
        chunk = piece.output
        if not isinstance(chunk, AIMessageChunk):
            chunk = AIMessageChunk(content=piece.text, id=piece.id or f"lc_run--{told.run.run_id}")
        if drafted is not None and not any(each and each.usage_metadata for each in (chunk, told.all)):
            chunk = chunk.model_copy(update={"usage_metadata": self.drafting.usage_of(draft)})
        await told.piece(chunk)

    async def end(self) -> None:
        """Say that the answer is whole."""
        if self._told is not None and self._told.all is not None:
            await self._told.end(cast("AIMessage", message_chunk_to_message(self._told.all)))

    async def error(self, error: BaseException) -> None:
        """Say that nothing more comes, also where nothing came: who reads tokens waits for an end."""
        if self._manager.handlers:
            await (await self._begun()).error(error)

    async def _begun(self, draft: str | None = None) -> Told:
        if self._told is None:
            model = self.drafting.model_of(draft) or _Model({}, self._name, [], {})
            self._manager.add_tags(model.tags, inherit=False)
            # In a graph's node it is that node's answer, whatever nodes it came from inside.
            self._manager.metadata = {**model.metadata, **self._manager.metadata}
            about: dict[str, Any] = {"serialized": model.serialized, "name": model.name}
            self._told = await Told.begin(self._manager, self._messages, self._caller, **about)
        return self._told


class _Model(NamedTuple):
    """What LangChain says of a model's run as it begins."""

    serialized: dict[str, Any]
    name: str | None
    tags: list[str]
    metadata: dict[str, Any]

    @classmethod
    def begun(cls, serialized: dict[str, Any] | None, about: Mapping[str, Any]) -> _Model:
        return cls(serialized or {}, about.get("name"), about.get("tags") or [], about.get("metadata") or {})


class _Drafting(BaseCallbackHandler):
    """Hears which models an app asks."""

    run_inline = True  # else each event of an asynchronous app costs a thread hop

    def __init__(self) -> None:
        self._models: dict[UUID, _Model] = {}
        self._texts: dict[UUID, str] = {}
        self._usages: dict[UUID, UsageMetadata | None] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: UUID, **about: Any) -> None:
        """Take down who is asked."""
        self._models[run_id] = _Model.begun(serialized, about)

    def on_llm_start(self, serialized: Any, prompts: Any, *, run_id: UUID, **about: Any) -> None:
        """Take down who is asked."""
        self._models[run_id] = _Model.begun(serialized, about)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **about: Any) -> None:
        """Take down what it said, and what that cost."""
        for each in response.generations[0][:1] if response.generations else []:
            self._texts[run_id] = each.text
            self._usages[run_id] = getattr(getattr(each, "message", None), "usage_metadata", None)

    def model_of(self, draft: str | None) -> _Model | None:
        """Return who wrote a draft."""
        run_id = self._run_of(draft)
        return None if run_id is None else self._models[run_id]

    def usage_of(self, draft: str | None) -> UsageMetadata | None:
        """Return what a draft cost, where its model counts."""
        run_id = self._run_of(draft)
        return None if run_id is None else self._usages.get(run_id)

    def _run_of(self, draft: str | None) -> UUID | None:
        """Return the run of who said the same as a draft to the letter, or else of who was asked last."""
        asked: list[UUID | None] = [None, *self._models]
        wrote = [run_id for run_id in self._models if self._texts.get(run_id) == draft]
        return wrote[-1] if wrote else asked[-1]
