"""Streams an app's answer while the app is still writing it; the mode decides what is released when.

    buffer   the whole answer, once the graph has decided
    blocks   groups of sentences, each once it is judged (`request.Blocks`)
    audit    the app's own chunks at once; the verdict afterwards

The app's stream is read in a task of its own, since one task must iterate it from beginning to end; the task
is at most a fixed number of chunks ahead of the reader. The text written while a block was judged forms the
next block. Closing a stream ends this task and the graph's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Generic, NamedTuple, TypeVar

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, message_chunk_to_message
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.utils import AddableDict

from cai_graph.app.shape import Shape, added, leaves
from cai_graph.calls import Calls
from cai_graph.errors import DataError
from cai_graph.parts import kind_of, said_in
from cai_graph.trajectory import Draft, Message, Trajectory, shown_of

__all__ = [
    "AHEAD",
    "Batch",
    "Piece",
    "Send",
    "Writing",
    "batches",
    "block_end",
    "in_one_piece",
    "relay",
    "whole_chunk",
]

T = TypeVar("T")

FIRST_BLOCK = 80
"""Minimum characters of the first block: about a sentence, so that the reader waits as little as possible."""
LARGEST_BLOCK = 1280
"""Largest minimum of a block's characters. It doubles with each block, so that long answers cost few
calls."""
AHEAD = 1024
"""How many chunks the app may be ahead of the judged text."""


class Piece(NamedTuple):
    """A released part of an output."""

    output: Any
    """The chunk, of the same type as the app's chunks, so that the chunks of a stream add up to its output.
    None if the last piece adds nothing."""
    text: str
    """The part of the answer's text in it."""
    trajectory: Trajectory | None = None
    """The Trajectory; set on the last piece."""
    whole: Any = None
    """The app's output with the released answer in place; set on the last piece."""
    id: str | None = None
    """Id of the answer, if it is a message."""


Send = Callable[[T], Awaitable[None]]


async def relay(
    work: Callable[[Send[T]], Coroutine[Any, Any, None]], room: int = 1
) -> AsyncGenerator[T, None]:
    """Yield the items that `work` sends, while it runs in a task of its own, at most `room` items ahead.

    Raises what `work` raises. Closing cancels the task and waits for its cleanup.
    """
    async with aclosing(batches(work, room)) as made:
        async for batch in made:
            for item in batch.items:
                yield item


class Batch(NamedTuple, Generic[T]):
    """The items that a relayed task has sent since the last batch."""

    items: list[T]
    """The items, in order; at least one."""
    last: bool
    """Whether the task has ended without an error, so that no batch follows."""


async def batches(
    work: Callable[[Send[T]], Coroutine[Any, Any, None]], room: int
) -> AsyncGenerator[Batch[T], None]:
    """Run `work` as `relay` does, but yield all available items at once."""
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

# Possessive, so that a run of marks is scanned only once, from its start: a user can request thousands.
_SENTENCE_END = re.compile(r"(?<![\d.!?…])[.!?…]++[\"'”’)\]*_]*+(?=\s)|[。！？]++[”’」』）]*+|(?=\n)")


def block_end(text: str, start: int, least: int) -> int | None:
    """Return the end of the block of `text` that begins at `start`; None if more text is needed to decide.

    A block has at least `least` characters and ends with the last complete sentence or line. If there is none
    within twice as many characters, it ends between two words; if there is no space within four times as
    many, it ends after these.

    >>> block_end("One. Two. Three. Fo", 0, 6)
    16
    """
    ends = [found.end() for found in _SENTENCE_END.finditer(text, start + least)]
    if ends and text[start : ends[-1]].strip():
        return ends[-1]
    if len(text) - start > 2 * least:
        gap = text.rfind(" ", start + least)
        if gap > 0 and text[start:gap].strip():
            return gap
    if len(text) - start >= 4 * least and text[start:].strip():
        return start + 4 * least
    return None


# --- the app's answer as it is written ----------------------------------------------------------------


class Writing:
    """An app's answer while the app writes it, and how much of it was sent; a request's `Blocks`."""

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
        """Whether each chunk is sent as soon as it arrives (mode `audit`)."""
        self._chunks: AsyncGenerator[Batch[Any], None] | None = None
        self.output: Any = None
        """The sum of the app's chunks so far."""
        self.text = ""
        """The answer's text so far."""
        self._finished = False
        self._ends: list[int] = []
        """Offsets in the text at which the blocks so far end."""
        self._sent = 0
        """How many characters of the text were sent."""
        self._sent_beside: dict[str, Any] = {}
        """The values of the output's other keys that were sent, by key."""
        self.cut: Callable[[Message], bool] = lambda answer: False
        """Returns whether the model's reply that became an answer was truncated."""

    async def next(self, calls: Calls, config: RunnableConfig) -> Draft:
        """Return the draft up to the end of its next block; `unfinished` if the app is still writing."""
        start = self._ends[-1] if self._ends else 0
        least = min(FIRST_BLOCK << len(self._ends), LARGEST_BLOCK)
        while self._finished or (end := self._block_end(start, least)) is None:
            if not await self._read(calls, config):
                return self._draft()
        self._ends.append(end)
        return Draft(answer=Message(role="assistant", content=self.text[:end]), unfinished=True)

    def _block_end(self, start: int, least: int) -> int | None:
        """Return where a block ends; None also for answers that cannot be split: structured ones, and those
        whose text is not in the content, such as spoken ones."""
        if self.text and self._shape.form(self.output) is not None:
            return None
        found = self._shape.answer_in(self.output) if self.text else self.text
        apart = isinstance(found, BaseMessage) and not found.content
        return None if apart else block_end(self.text, start, least)

    async def whole(self, calls: Calls, config: RunnableConfig) -> Draft:
        """Wait until the app has finished, and return the whole draft."""
        while await self._read(calls, config):
            pass
        return self._draft()

    def so_far(self) -> Draft | None:
        """Return the draft that the app has written so far; None if there is no text yet."""
        if self._finished:
            return self._draft()
        if not self.text:
            return None
        return Draft(answer=Message(role="assistant", content=self.text), unfinished=True)

    def _draft(self) -> Draft:
        answer = self._shape.answer(self.output)
        return Draft(answer=answer, truncated=self.cut(answer))

    async def _read(self, calls: Calls, config: RunnableConfig) -> bool:
        """Read the app's next batch of chunks; return False if there is none."""
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
            self._shape.answer(self.output)  # raises if there is no answer
        return batch is not None

    async def _add(self, chunk: Any) -> None:
        self.output = chunk if self.output is None else added(self.output, chunk)
        before, self.text = self.text, self._written()
        goes_on = self.text[: self._sent] == before[: self._sent]
        if self._at_once:
            new = self.text[self._sent :] if goes_on else self.text  # another message may be the answer now
            self._sent = len(self.text)
            await self._send(Piece(chunk, new, id=self._id() if self.text else None))
        elif not goes_on:
            raise DataError(
                "the app's stream took back text that has left already; use stream='buffer' for this app"
            )

    def _written(self) -> str:
        try:
            return shown_of(self._shape.answer(self.output))
        except DataError:  # the answer's part has not arrived yet
            return self.text

    async def close(self) -> None:
        """Stop the app if it is still writing."""
        if self._chunks is not None:
            await self._chunks.aclose()

    # --- sending ---

    async def release(self, draft: Draft) -> None:
        """Send the part of a draft's text that was not sent yet."""
        text = shown_of(draft.answer)[self._sent :]
        chunk = self._part(self.output, text)
        self._sent += len(text)
        await self._send(Piece(chunk, text, id=self._id()))

    async def rest(self, output: Any, trajectory: Trajectory) -> None:
        """Send the part of the released output that was not sent yet; all of it unchanged, if none was."""
        if not self._at_once and not self._sent:
            await self._send(in_one_piece(_as_message(output), self._shape, trajectory))
            return
        text = shown_of(self._shape.answer(output))[self._sent :]
        chunk = self._verdict(output) if self._at_once else self._part(output, text, last=True)
        await self._send(Piece(chunk, text, trajectory, _as_message(output), self._id()))

    def _id(self) -> str | None:
        return self._shape.answer(self.output).id

    def _part(self, output: Any, text: str, *, last: bool = False) -> Any:
        """Return a chunk with `text` of the answer; the last one also has everything that is not text."""
        if isinstance(output, str):
            return None if last and not text and self._sent else text
        if isinstance(output, BaseMessage):
            return _part_of_message(output, self._sent, text, last=last)
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
        """Return the part of another key's value that was not sent yet, and mark it as sent."""
        before = self._sent_beside.get(name)
        self._sent_beside[name] = value
        if isinstance(before, str | list) and isinstance(value, type(before)):
            return value[len(before) :] if value[: len(before)] == before else value
        return value

    def _repeats(self, value: Any) -> bool:
        """Return whether another key's value repeats the answer, and so must wait until all is judged."""
        begun = self.text[: self._ends[0]].strip()
        return any(begun in said or said in self.text for said in _texts_in(value) if said)

    def _verdict(self, output: Any) -> Any:
        """Return the chunk with the verdict on an answer that was already sent; None if it has no place."""
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
    return (shown_of(each) if isinstance(each, BaseMessage) else each for each in leaves(value))


def _part_of_message(message: BaseMessage, start: int, text: str, *, last: bool) -> BaseMessage:
    """Return a chunk of `message` with `text`, found at `start` of its text; the last has all its rest."""
    content: str | list[Any] = text
    if last and not start:
        content = message.content  # nothing of it was sent
    elif isinstance(message.content, list):
        content = [*_parts_between(message.content, start, start + len(text), last=last)]
    if not isinstance(message, AIMessage):
        return message.model_copy(update={"content": content})
    if not last:
        return AIMessageChunk(content=content, id=message.id, name=message.name)
    fields = message.model_dump(exclude={"type", "content", "chunk_position"})
    return AIMessageChunk(content=content, **fields, chunk_position="last")


def _parts_between(content: list[Any], start: int, end: int, *, last: bool) -> Iterator[Any]:
    """Yield the text of a multi-part content from `start` to `end`, part by part; if `last`, the rest, too.

    LangChain merges chunks of a part by its index. So each text is sent under its part's index, the part's
    other fields are sent last, and a part that has no text is represented by a placeholder with its index
    until then.
    """
    at = 0
    for part in content:
        said = said_in(part)
        begin, at = at, at + len(said or "")
        if said is None:
            if last:
                yield part
            elif start <= begin < end and "index" in part:
                yield _place_of(part)
            continue
        new = said[max(start - begin, 0) : max(end - begin, 0)]
        if last and isinstance(part, dict) and part.keys() - _OF_TEXT:
            yield _saying(part, new)
        elif new:
            yield _saying(part if isinstance(part, str) else {k: part[k] for k in part if k in _OF_TEXT}, new)


_OF_TEXT = {"type", "index", "id", "text", "refusal", "value"}
"""Keys of a part that are sent with its text."""


def _saying(part: Any, text: str) -> Any:
    """Return a part with its text replaced; see `said_in`."""
    if isinstance(part, str):
        return text
    wrapped = part["type"] == "non_standard"
    return {**part, **({"value": _saying(part["value"], text)} if wrapped else {part["type"]: text})}


def _place_of(part: dict[str, Any]) -> dict[str, Any]:
    """Return a placeholder for a part: its type and index without its content."""
    place = {"type": part.get("type"), "index": part["index"]}
    return {**place, "value": {"type": kind_of(part)}} if place["type"] == "non_standard" else place


def whole_chunk(message: BaseMessage) -> BaseMessage:
    """Return a message as a single chunk that contains all of it."""
    return _part_of_message(message, 0, shown_of(message), last=True)


def in_one_piece(
    output: Any, shape: Shape, trajectory: Trajectory | None, *, already_left: bool = False
) -> Piece:
    """Return an output as a single piece; with `already_left` only the record is added."""
    chunk = None if already_left else output
    if isinstance(chunk, Mapping):
        chunk = AddableDict({key: _as_chunk(value) for key, value in chunk.items()})
    if trajectory is None:
        return Piece(_as_chunk(chunk), "", whole=output)
    answer = shape.answer(output)
    return Piece(_as_chunk(chunk), shown_of(answer), trajectory, output, answer.id)


def _as_message(output: Any, around: Mapping[int, Any] = {}) -> Any:
    """Convert a sum of chunks to the output that the app's `invoke` returns.

    `around` maps the ids of the enclosing mappings to their results, since a mapping may contain itself.
    """
    if isinstance(output, Mapping):
        if id(output) in around:
            return around[id(output)]
        by_key: dict[Any, Any] = {}
        around = {**around, id(output): by_key}
        by_key.update((key, _as_message(value, around)) for key, value in output.items())
        return by_key
    return message_chunk_to_message(output) if isinstance(output, AIMessageChunk) else output


def _as_chunk(value: Any) -> Any:
    return whole_chunk(value) if isinstance(value, AIMessage) else value
