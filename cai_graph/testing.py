"""A chat model for tests, ours and our users': it says what the script says."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import PrivateAttr, SkipValidation

__all__ = ["ScriptedModel"]

Reply = str | AIMessage | Exception


class ScriptedModel(BaseChatModel):
    """A chat model whose replies are written beforehand; streamed, they come word by word.

    >>> model = ScriptedModel(replies=["one", "two"])
    >>> model.invoke("hello").content, model.invoke("again").content
    ('one', 'two')
    >>> model.invoke("once more")
    Traceback (most recent call last):
    AssertionError: the script has 2 replies, and this is call 3: [human] once more
    """

    replies: SkipValidation[Sequence[Reply] | Callable[[list[BaseMessage]], Reply]]
    """Replies in order, or a function from the messages to a reply; an exception is raised."""

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
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))
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
        return self._generate(messages, *args, **kwargs)  # nothing here waits, so no thread is needed
