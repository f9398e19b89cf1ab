"""An app that writes word by word, a model that judges it, and what its stream gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableGenerator
from replies import IDS, RULES, answer_in, by_role, verdicts

from cai_graph import ScriptedModel, constitutional

ONE = "This is the first group of sentences, and it is as long as the first block has to be."
TWO = (
    " The second one is unsafe, and it says so at once, for a hundred and sixty characters and more, which is"
    " how long the second block has to be before it may end, so that it goes on until here, the end of it."
)
THREE = " And the third one is the last."
DRAFT = ONE + TWO + THREE
FINE = DRAFT.replace("unsafe", "harmless")


def unsafe(messages: list[BaseMessage]) -> str:
    """The reply of a critic that finds `unsafe` in an answer, batched or parallel."""
    asked = [identifier for identifier in IDS if f"\n{identifier}: " in messages[0].text]
    found = [identifier for identifier in asked[:1] if "unsafe" in answer_in(messages)]
    return verdicts(*found, ids=asked)


Critique = Callable[[list[BaseMessage]], str | AIMessage | Exception]


def judge(critique: Critique = unsafe, revise: str = "It ends well.") -> ScriptedModel:
    """A critic that finds `critique`, and a reviser that writes `revise`."""

    def answers_afresh(messages: list[BaseMessage]) -> str:
        raise AssertionError("the app drafts, not this model")

    return by_role(draft=answers_afresh, critique=critique, revise=revise)


class Typist:
    """An app that writes word by word; what it has written, where, and whether it was stopped."""

    def __init__(self, text: str = DRAFT, *, before: Callable[[str], Any] = lambda word: None) -> None:
        self.words = [word + " " for word in text.split(" ")]
        self.words[-1] = self.words[-1].removesuffix(" ")
        self.before = before
        self.waits_at: dict[str, int] = {}
        """Word -> how many chunks of the stream must have been seen before it is written."""
        self.seen = 0
        self.written: list[str] = []
        self.threads: set[threading.Thread] = set()
        self.stopped = False

    @property
    def app(self) -> Runnable[Any, str]:
        return RunnableGenerator(self._write, self._awrite)

    def _write(self, input: Iterator[Any]) -> Iterator[str]:
        list(input)
        try:
            for word in self.words:
                self.before(word)
                self._wrote(word)
                yield word
        except GeneratorExit:
            self.stopped = True
            raise

    async def _awrite(self, input: AsyncIterator[Any]) -> AsyncIterator[str]:
        [part async for part in input]
        try:
            for word in self.words:
                if (waiting := self.before(word)) is not None:
                    await waiting
                while self.seen < self.waits_at.get(word.strip(), 0):
                    await asyncio.sleep(0)
                await asyncio.sleep(0)
                self._wrote(word)
                yield word
        except (GeneratorExit, asyncio.CancelledError):
            self.stopped = True
            raise

    def _wrote(self, word: str) -> None:
        self.written.append(word)
        self.threads.add(threading.current_thread())


def guarded(
    app: Runnable[Any, Any], model: ScriptedModel | None = None, *, stream: str = "blocks", **settings: Any
) -> Any:
    model = model or judge()
    settings = {"log": None, "constitution": RULES} | settings
    return constitutional(app, critic=model, reviser=model, stream=stream, **settings)


async def drawn(app: Any, input: Any = "hello", config: Any = None, *, at_pace_of: Any = None) -> list[Any]:
    """The chunks of a stream; a typist `at_pace_of` it writes a group of sentences once the last is seen."""
    chunks = []
    if at_pace_of is not None:
        at_pace_of.waits_at = {"The": 1, "And": 2}
    async for chunk in app.astream(input, config):
        chunks.append(chunk)
        if at_pace_of is not None:
            at_pace_of.seen += 1
    return chunks


async def until_error(app: Any) -> tuple[list[Any], Exception | None]:
    """The chunks of a stream, and what it raises at its end."""
    chunks = []
    try:
        async for chunk in app.astream("hello"):
            chunks.append(chunk)
    except Exception as error:
        return chunks, error
    return chunks, None
