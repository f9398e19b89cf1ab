"""Records the model calls that the wrapped app makes, by a LangChain callback handler."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage

from cai_graph.calls import Calls, call_of, prompt_digest
from cai_graph.messages import cut_short
from cai_graph.trajectory import Message, shown_of

if TYPE_CHECKING:
    from langchain_core.outputs import LLMResult

__all__ = ["DraftCalls"]


class DraftCalls(BaseCallbackHandler):
    """Counts the app's model calls against the budget and records them, under `name` where it is not None."""

    run_inline = True  # otherwise LangChain runs each event of an asynchronous app in another thread
    raise_error = True  # so that a call over the budget is not started

    def __init__(self, calls: Calls, name: str | None) -> None:
        self.calls = calls
        self.name = name
        self._replies: list[BaseMessage] = []
        self._begun: dict[UUID, tuple[float, str, str]] = {}

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Count a call of a chat model against the budget, and note its start."""
        if serialized.get("id", [])[-1:] == ["ConstitutionalChatModel"]:
            return  # a wrapped model inside the app: the calls that it makes count
        self.calls.admit("generation")
        self._begun[run_id] = (time.perf_counter(), self._model(kwargs), prompt_digest(messages[0]))

    def on_llm_start(
        self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Count a call of a text model against the budget, and note its start."""
        self.calls.admit("generation")
        self._begun[run_id] = (time.perf_counter(), self._model(kwargs), "")

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Record the call."""
        generation = response.generations[0][0] if response.generations and response.generations[0] else None
        reply = getattr(generation, "message", None)
        self._replies += [] if reply is None else [reply]
        self._record(run_id, reply, None)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Record the call that failed."""
        self._record(run_id, None, error)

    def cut(self, answer: Message) -> bool:
        """Return whether the reply that became the app's answer was cut off (see `cut_short`).

        That reply is found by its id or its text; where the app made only one call, it is that one. Other
        calls do not count, such as one that writes a title.
        """
        for reply in reversed(self._replies):
            if (answer.id is not None and reply.id == answer.id) or shown_of(reply) == shown_of(answer):
                return cut_short(reply) is not None
        return len(self._replies) == 1 and cut_short(self._replies[0]) is not None

    def _model(self, kwargs: Mapping[str, Any]) -> str:
        metadata = kwargs.get("metadata") or {}
        provider, name = metadata.get("ls_provider"), metadata.get("ls_model_name")
        return self.name or (
            f"{provider}:{name}" if provider and name else str(name or provider or "unknown")
        )

    def _record(self, run_id: UUID, reply: BaseMessage | None, error: BaseException | None) -> None:
        if run_id not in self._begun:
            return
        started, model, digest = self._begun.pop(run_id)
        seconds = time.perf_counter() - started
        self.calls.record(
            call_of("draft", model, reply, seconds=seconds, error=error, prompt_digest=digest or None)
        )
