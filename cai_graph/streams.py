"""Streams: what of an app's answer leaves when, while the app still writes it.

    buffer   the answer, once the graph has decided
    blocks   groups of sentences, each once it is judged (`request.Blocks`); what follows goes on after them
    audit    the app's own chunks as they come; the verdict afterwards

The app writes in a task of its own, a bounded number of chunks ahead of its reader, since what iterates an
app's stream must be one task from its beginning to its end. What it has written while a block was judged is
the next block. Closing a stream ends that task and the graph's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Generic, NamedTuple, TypeVar, cast
from uuid import UUID

from langchain_core.callbacks import (
    AsyncCallbackManager,
    BaseCallbackHandler,
    BaseCallbackManager,
)
from langchain_core.callbacks.manager import AsyncCallbackManagerForLLMRun
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, message_chunk_to_message
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.utils import AddableDict
from langchain_core.tracers.base import AsyncBaseTracer, BaseTracer

from cai_graph.calls import Calls
from cai_graph.errors import DataError
from cai_graph.shape import Shape
from cai_graph.told import is_stream
from cai_graph.trajectory import Draft, Message, Trajectory, said_in, text_of

__all__ = [
    "AHEAD",
    "PROGRESS",
    "Batch",
    "Piece",
    "Send",
    "Shown",
    "Writing",
    "batches",
    "block_end",
    "feeds_streams",
    "part_of_message",
    "progress",
    "relay",
    "under_a_model",
    "unstreamed",
    "whole",
]

T = TypeVar("T")

FIRST_BLOCK = 80
"""Least characters of the first block: about a sentence, so that a reader waits as little as can be."""
LARGEST_BLOCK = 1280
"""Least characters of the largest block. Each is twice the one before: long answers cost few calls."""
AHEAD = 1024
"""How many chunks the app may be ahead of what is judged."""


class Piece(NamedTuple):
    """A part of an output that leaves."""

    output: Any
    """The chunk: of the same kind as the app's own, so that the chunks of a stream add up to its output. None
    where the last piece has nothing to add."""
    text: str
    """What it holds of the answer's text."""
    trajectory: Trajectory | None = None
    """The record, with the last piece."""
    whole: Any = None
    """The app's output with what leaves in the answer's place, with the last piece."""
    id: str | None = None
    """Of the answer, where it is a message."""


Send = Callable[[T], Awaitable[None]]


async def relay(
    work: Callable[[Send[T]], Coroutine[Any, Any, None]], room: int = 1
) -> AsyncGenerator[T, None]:
    """Yield what `work` sends while it runs in a task of its own, at most `room` items ahead of the reader.

    Raises what `work` raises. Closing cancels it, and waits until it has cleaned up.
    """
    async with aclosing(batches(work, room)) as made:
        async for batch in made:
            for item in batch.items:
                yield item


class Batch(NamedTuple, Generic[T]):
    """What a relayed task has sent since."""

    items: list[T]
    """In order; at least one."""
    last: bool
    """Whether nothing comes any more."""


async def batches(
    work: Callable[[Send[T]], Coroutine[Any, Any, None]], room: int
) -> AsyncGenerator[Batch[T], None]:
    """Yield as `relay` does, but each time all that there is."""
    sent: asyncio.Queue[Any] = asyncio.Queue()
    free = asyncio.Semaphore(room)

    async def send(item: T) -> None:
        await free.acquire()
        sent.put_nowait(item)

    task = asyncio.ensure_future(work(send))
    task.add_done_callback(lambda _: sent.put_nowait(_END))
    try:
        while (item := await sent.get()) is not _END:
            batch = [item]
            while not sent.empty() and (item := sent.get_nowait()) is not _END:
                batch.append(item)
            ended = item is _END
            yield Batch(batch, last=ended and not task.cancelled() and task.exception() is None)
            if ended:
                break
            for _ in batch:
                free.release()
        await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


_END = object()

# --- where a block ends -------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?<!\d)[.!?…]+[\"'”’)\]*_]*(?=\s)|[。！？]+[”’」』）]*|(?=\n)")


def block_end(text: str, start: int, least: int) -> int | None:
    """Return where the block of `text` that begins at `start` ends; None while more text is needed to say.

    It ends with the last whole sentence or line, after at least `least` characters; where none ends within
    as many again, between two words.

    >>> block_end("One. Two. Three. Fo", 0, 6)
    16
    """
    ends = [found.end() for found in _SENTENCE_END.finditer(text, start + least)]
    if ends and text[start : ends[-1]].strip():
        return ends[-1]
    if len(text) - start > 2 * least:
        gap = text.rfind(" ", start + least)
        return gap if gap > 0 and text[start:gap].strip() else None
    return None


# --- the app's answer as it is written ----------------------------------------------------------------


class Writing:
    """An app's answer while it is written, and how much of it has left. A request's `Blocks`."""

    def __init__(
        self,
        open: Callable[[Calls, RunnableConfig], AsyncGenerator[Batch[Any], None]],
        shape: Shape,
        send: Send[Piece],
        *,
        at_once: bool,
    ) -> None:
        self._open = open
        self._shape = shape
        self._send = send
        self._at_once = at_once
        """Whether chunks leave as they come."""
        self._chunks: AsyncGenerator[Batch[Any], None] | None = None
        self.output: Any = None
        """The sum of the app's chunks so far."""
        self.text = ""
        """The text of the answer in it."""
        self._finished = False
        self._ends: list[int] = []
        """Where in the text the blocks so far end."""
        self._sent = 0
        """How many characters of the text have left."""
        self._sent_beside: dict[str, Any] = {}
        """What has left of the output's other keys."""
        self.cut: Callable[[Message], bool] = lambda answer: False
        """Whether the model's reply that became an answer stopped before its end."""

    async def next(self, calls: Calls, config: RunnableConfig) -> Draft:
        """Return the draft up to the end of its next block; unfinished where the app still writes."""
        start = self._ends[-1] if self._ends else 0
        least = min(FIRST_BLOCK << len(self._ends), LARGEST_BLOCK)
        while self._finished or (end := block_end(self.text, start, least)) is None:
            if not await self._read(calls, config):
                return self._draft()
        self._ends.append(end)
        return Draft(answer=Message(role="assistant", content=self.text[:end]), unfinished=True)

    async def whole(self, calls: Calls, config: RunnableConfig) -> Draft:
        """Return the draft once the app has written all of it."""
        while await self._read(calls, config):
            pass
        return self._draft()

    def so_far(self) -> Draft | None:
        """Return what the app has written; None where that is nothing yet."""
        if self._finished:
            return self._draft()
        if not self.text:
            return None
        return Draft(answer=Message(role="assistant", content=self.text), unfinished=True)

    def _draft(self) -> Draft:
        answer = self._shape.answer(self.output)
        return Draft(answer=answer, truncated=self.cut(answer))

    async def _read(self, calls: Calls, config: RunnableConfig) -> bool:
        """Take what the app has written since; return whether that was anything."""
        if self._finished:
            return False
        if self._chunks is None:
            self._chunks = self._open(calls, config)
        async with calls.deadline():
            batch = await anext(self._chunks, None)
        for chunk in [] if batch is None else batch.items:
            await self._add(chunk)
        if batch is None or batch.last:
            self._finished = True
            self._shape.answer(self.output)  # raises where there is none
        return batch is not None

    async def _add(self, chunk: Any) -> None:
        try:
            self.output = chunk if self.output is None else self.output + chunk
        except TypeError:  # what does not add up replaces what came before, as LangChain has it
            self.output = chunk
        before, self.text = self.text, self._written()
        goes_on = self.text[: self._sent] == before[: self._sent]
        if self._at_once:
            new = self.text[self._sent :] if goes_on else self.text  # else another message is the answer now
            self._sent = len(self.text)
            await self._send(Piece(chunk, new, id=self._id() if self.text else None))
        elif not goes_on:
            raise DataError(
                "the app's stream took back text that has left already; use stream='buffer' for this app"
            )

    def _written(self) -> str:
        try:
            return text_of(self._shape.answer(self.output))
        except DataError:  # the part with the answer has not come yet
            return self.text

    async def close(self) -> None:
        """Stop the app where it still writes."""
        if self._chunks is not None:
            await self._chunks.aclose()

    # --- what leaves ---

    async def release(self, draft: Draft) -> None:
        """Send the text of a draft as far as it has not left yet."""
        text = text_of(draft.answer)[self._sent :]
        self._sent += len(text)
        await self._send(Piece(self._part(self.output, text), text, id=self._id()))

    async def rest(self, output: Any, trajectory: Trajectory) -> None:
        """Send of the output that leaves what has not left yet."""
        text = text_of(self._shape.answer(output))[self._sent :]
        chunk = self._verdict(output) if self._at_once else self._part(output, text, last=True)
        await self._send(Piece(chunk, text, trajectory, _as_message(output), self._id()))

    def _id(self) -> str | None:
        return self._shape.answer(self.output).id

    def _part(self, output: Any, text: str, *, last: bool = False) -> Any:
        """Return a chunk with this much of the answer's text; the last one has all that is not text."""
        if isinstance(output, str):
            return None if last and not text and self._sent else text
        if isinstance(output, BaseMessage):
            return part_of_message(output, text, last=last)
        if isinstance(output, Mapping):
            key = self._shape.output_in(output)
            others = {
                name: self._beside(name, value)
                for name, value in output.items()
                if name != key and self._is_new(name, value) and (last or not self._repeats(value))
            }
            return AddableDict({**others, key: self._part(output[key], text, last=last)})
        return output if last else []

    def _is_new(self, name: str, value: Any) -> bool:
        return name not in self._sent_beside or value is not self._sent_beside[name]

    def _beside(self, name: str, value: Any) -> Any:
        """Return of a value beside the answer what has not left yet."""
        before = self._sent_beside.get(name)
        self._sent_beside[name] = value
        if isinstance(before, str | list) and isinstance(value, type(before)):
            return value[len(before) :] if value[: len(before)] == before else value
        return value

    def _repeats(self, value: Any) -> bool:
        """Return whether a value beside the answer says what it says, and so waits until all is judged."""
        begun = self.text[: self._ends[0]].strip()
        return any(begun in said or said in self.text for said in _texts_in(value) if said)

    def _verdict(self, output: Any) -> Any:
        """Return the chunk that says what became of an answer that has left; None where it cannot be said."""
        if isinstance(output, AIMessage):
            return AIMessageChunk(
                content="", id=output.id, response_metadata={"cai": output.response_metadata["cai"]}
            )
        if isinstance(output, Mapping):
            key = self._shape.output_in(output)
            verdict = self._verdict(output[key])
            return None if verdict is None else AddableDict({key: verdict})
        return None


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str | BaseMessage):
        yield text_of(value) if isinstance(value, BaseMessage) else value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


def part_of_message(message: BaseMessage, text: str, *, last: bool) -> BaseMessage:
    """Return a chunk of `message` with this much of its text; the last one has all that is not text."""
    content: str | list[Any] = text
    if last and text == text_of(message):
        content = message.content  # nothing of it has left: it leaves in its own order
    elif isinstance(message.content, list):
        texts = [part for part in message.content if isinstance(part, dict) and part.get("type") == "text"]
        content = [{**(texts[0] if texts else {"type": "text"}), "text": text}] if text else []
        if last:
            content += [part for part in message.content if said_in(part) is None]
    if not isinstance(message, AIMessage):
        return message.model_copy(update={"content": content})
    if not last:
        return AIMessageChunk(content=content, id=message.id, name=message.name)
    fields = message.model_dump(exclude={"type", "content", "chunk_position"})
    return AIMessageChunk(content=content, **fields, chunk_position="last")


def whole(output: Any, shape: Shape, trajectory: Trajectory | None, *, told: bool = False) -> Piece:
    """Return an output that leaves in one piece; with `told` it has left, and only the record is new."""
    chunk = None if told else output
    if isinstance(chunk, Mapping):
        chunk = AddableDict({key: _as_chunk(value) for key, value in chunk.items()})
    if trajectory is None:
        return Piece(_as_chunk(chunk), "", whole=output)
    answer = shape.answer(output)
    return Piece(_as_chunk(chunk), text_of(answer), trajectory, output, answer.id)


def _as_message(output: Any) -> Any:
    """Return a sum of chunks as the app returns it whole."""
    if isinstance(output, Mapping):
        return {key: _as_message(value) for key, value in output.items()}
    return message_chunk_to_message(output) if isinstance(output, AIMessageChunk) else output


def _as_chunk(value: Any) -> Any:
    return part_of_message(value, text_of(value), last=True) if isinstance(value, AIMessage) else value


# --- the streams that stand around --------------------------------------------------------------------

PROGRESS = "cai_progress"
"""Name of the custom event that says which step is under way, and its key in LangGraph's `custom` mode."""


def progress(
    callbacks: BaseCallbackManager, writer: Callable[[Any], None] | None
) -> Callable[[str], Awaitable[None]] | None:
    """Return what tells callbacks and an outer graph's `custom` stream of a step; None where nobody hears.

    The event's data is `{"step": "revising 1/2"}`: never a word of a draft.
    """
    hearing = [handler for handler in callbacks.handlers if _hears(handler, "on_custom_event")]
    if not hearing and writer is None:
        return None
    manager = AsyncCallbackManager(
        handlers=hearing,
        parent_run_id=callbacks.parent_run_id,
        tags=callbacks.tags,
        metadata=callbacks.metadata,
    )

    async def tell(step: str) -> None:
        if writer is not None:
            writer({PROGRESS: {"step": step}})
        await manager.on_custom_event(PROGRESS, {"step": step}, run_id=manager.parent_run_id)

    return tell


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
    if not feeds_streams(handler):
        return handler
    if is_stream(handler) or not _hears(handler, "on_chain_start"):
        return _Aside(handler, run_id)
    return _Deaf(handler)


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
                hear = getattr(handler, event)
                setattr(self, event, hear if run_id is None else _told(hear, {known_as: run_id}))


_ASIDE = {
    **{f"on_tool_{when}": ("ignore_agent", "parent_run_id") for when in ("start", "end", "error")},
    **{f"on_retriever_{when}": ("ignore_retriever", "parent_run_id") for when in ("start", "end", "error")},
    "on_custom_event": ("ignore_custom_event", "run_id"),
}
"""Events without a word of an answer: what ignores them, and which argument names a run that is not shown."""


def _told(hear: Callable[..., Any], about: dict[str, Any]) -> Callable[..., Any]:
    """Return `hear` with these arguments, whatever its caller says."""

    async def tell_async(*args: Any, **kwargs: Any) -> Any:
        return await hear(*args, **{**kwargs, **about})

    def tell(*args: Any, **kwargs: Any) -> Any:
        return hear(*args, **{**kwargs, **about})

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


_TOKENS = ("on_llm_new_token", "on_stream_event")
"""Events that hand over an answer while it is written."""


def _hear_nothing(*args: Any, **kwargs: Any) -> None: ...


async def _hear_nothing_async(*args: Any, **kwargs: Any) -> None: ...


class Shown:
    """Shows what leaves to the handlers that show an answer, as the chat model's answer that it is.

    `astream_events` and the `messages` mode of a LangGraph graph live on a chat model's tokens, and of the
    models inside no token may reach them; nor those that show tokens, such as one that prints them. Tracers
    are told nothing: they saw the calls that were made.
    """

    def __init__(self, config: RunnableConfig, messages: list[BaseMessage], name: str) -> None:
        callbacks = cast("BaseCallbackManager", config["callbacks"])
        self._manager = AsyncCallbackManager(
            handlers=[handler for handler in callbacks.handlers if feeds_streams(handler)],
            parent_run_id=callbacks.parent_run_id,
            tags=callbacks.tags,
            metadata=callbacks.metadata,
        )
        self._messages = messages
        self._name = name
        self._run: AsyncCallbackManagerForLLMRun | None = None
        self._all: AIMessageChunk | None = None

    async def piece(self, piece: Piece) -> None:
        """Show a piece."""
        if not self._manager.handlers or not (piece.text or piece.trajectory):
            return
        run = await self._begun()
        chunk = piece.output
        if not isinstance(chunk, AIMessageChunk):
            chunk = AIMessageChunk(content=piece.text, id=piece.id or f"lc_run--{run.run_id}")
        self._all = chunk if self._all is None else self._all + chunk
        await run.on_llm_new_token(piece.text, chunk=ChatGenerationChunk(message=chunk))

    async def end(self) -> None:
        """Say that the answer is whole."""
        if self._run is not None and self._all is not None:
            message = message_chunk_to_message(self._all)
            await self._run.on_llm_end(LLMResult(generations=[[ChatGeneration(message=message)]]))

    async def error(self, error: BaseException) -> None:
        """Say that nothing more comes, also where nothing came: who reads tokens waits for an end."""
        if self._manager.handlers:
            await (await self._begun()).on_llm_error(error)

    async def _begun(self) -> AsyncCallbackManagerForLLMRun:
        if self._run is None:
            (self._run,) = await self._manager.on_chat_model_start({}, [self._messages], name=self._name)
        return self._run


def _hears(handler: BaseCallbackHandler, event: str) -> bool:
    """Return whether a handler does anything at an event; LangChain's own override many by a docstring."""
    code = getattr(getattr(handler, event), "__code__", None)
    return code is None or bool(code.co_names or code.co_freevars)  # what names nothing does nothing


def feeds_streams(handler: BaseCallbackHandler) -> bool:
    """Return whether a handler shows an answer as it hears it: to a stream, as those of LangChain and
    LangGraph do, or token by token, as `StreamingStdOutCallbackHandler` does."""
    return is_stream(handler) or _shows_tokens(handler)


def _shows_tokens(handler: BaseCallbackHandler) -> bool:
    heard = [getattr(handler, event) for event in _TOKENS if _hears(handler, event)]
    return any(getattr(hear, "__func__", hear) not in _RECORDS for hear in heard)


_RECORDS = (BaseTracer.on_llm_new_token, AsyncBaseTracer.on_llm_new_token)
"""Tracers record the tokens of the calls that they follow, and show them to nobody."""
