"""The model calls of one request: `Calls` makes them, records each, and enforces the request's budget."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

from langchain_core.messages import AIMessage, BaseMessage, SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig

from cai_graph.concurrency.context import apart
from cai_graph.errors import BudgetExceeded, ConfigError
from cai_graph.failures import annotate, describe
from cai_graph.trajectory import Call

__all__ = [
    "UNATTENDED_SECONDS",
    "Budget",
    "Calls",
    "call_of",
    "prompt_digest",
]


UNATTENDED_SECONDS = 3600.0
"""Deadline of one item of a bulk run. It is long, since no user waits and the machine may be slow."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds of one request; None means no bound.

    A call that would exceed a bound is not started. A call that runs when `seconds` are over is cancelled. An
    app that runs synchronously in its caller's thread cannot be cancelled: its next model call is rejected.
    """

    calls: int | None = 100
    """Generations: calls that write tokens, the app's own included."""
    forward_passes: int | None = 1000
    """Passes that write no reply, such as a probe's."""
    tokens: int | None = None
    """Tokens in and out, as the providers report them; a model that reports none counts as 0."""
    seconds: float | None = 600.0
    """Wall time of the whole request."""

    def __post_init__(self) -> None:
        for name in ("calls", "forward_passes", "tokens", "seconds"):
            value = getattr(self, name)
            number = isinstance(value, int | float if name == "seconds" else int) and value is not True
            if value is not None and not (number and value > 0):
                raise ConfigError(f"budget: {name} must be a number above 0 or None, found {value!r}")


@dataclass
class Calls:
    """The model calls of one request, and what of its budget they have spent."""

    budget: Budget
    config: RunnableConfig = field(default_factory=lambda: RunnableConfig())
    """The configuration that the calls inherit, so that tracing sees them."""
    made: list[Call] = field(default_factory=list)
    """The records of the calls so far, in order of completion."""
    started: float = field(default_factory=time.perf_counter)
    """When the request began, by `time.perf_counter`."""
    spent: dict[str, int] = field(default_factory=lambda: {"generation": 0, "forward": 0, "tokens": 0})
    """What counts against the budget so far: calls by kind, and tokens."""

    def under(self, config: RunnableConfig) -> Calls:
        """Return a view with another configuration; records and spending are shared with this object."""
        return replace(self, config=config)

    @property
    def seconds(self) -> float:
        """Wall seconds since the request began."""
        return time.perf_counter() - self.started

    def admit(self, kind: Literal["generation", "forward"], count: int = 1) -> None:
        """Count `count` calls that are about to start.

        Raises:
            BudgetExceeded: a bound is reached; the message names it.
        """
        budget = self.budget
        bounds = (
            ("calls", self.spent["generation"] + count * (kind == "generation"), budget.calls),
            ("forward passes", self.spent["forward"] + count * (kind == "forward"), budget.forward_passes),
            ("tokens", self.spent["tokens"] + 1, budget.tokens),
        )
        for name, needed, bound in bounds:
            if bound is not None and needed > bound:
                raise BudgetExceeded(
                    f"the budget of {bound} {name} is spent; raise Budget.{name.replace(' ', '_')}"
                )
        if budget.seconds is not None and self.seconds >= budget.seconds:
            raise self.late()
        self.spent[kind] += count

    def record(self, call: Call) -> None:
        """Add the record of a finished call, and count its tokens."""
        self.made.append(call)
        self.spent["tokens"] += (call.input_tokens or 0) + (call.output_tokens or 0)

    def deadline(self) -> AbstractAsyncContextManager[None]:
        """Return an async context manager that cancels its body when the request's seconds are over.

        Raises:
            BudgetExceeded: at the end of the body, where it was cancelled so.
        """
        return _Deadline(self)

    def late(self) -> BudgetExceeded:
        """Return the error for a request whose seconds are over."""
        return BudgetExceeded(
            f"the deadline of {self.budget.seconds} s is over; raise Budget.seconds, or use a faster model"
        )

    async def generate(
        self,
        role: str,
        model: Runnable[Any, Any],
        name: str,
        messages: Sequence[BaseMessage],
        kind: Literal["generation", "forward"] = "generation",
    ) -> AIMessage:
        """Call a chat model, record the call, and return the reply.

        Args:
            role: see `Call.role`.
            model: the chat model.
            name: its name in the record.
            messages: the prompt.
            kind: `forward` where the call is made for the probabilities of one token only.

        Raises:
            BudgetExceeded: no call is left, or the deadline passed.
            Exception: whatever the model raises.
        """
        self.admit(kind)
        started = time.perf_counter()
        reply: AIMessage | None = None
        error: BaseException | None = None
        try:
            async with self.deadline():
                with apart():
                    reply = await model.ainvoke(_marked(role, name, messages), self.config)
                return reply
        except BaseException as raised:
            error = raised
            annotate(raised, f"the {_WORK.get(role, role)} by {name}")
            raise
        finally:
            self.record(
                call_of(
                    role,
                    name,
                    reply,
                    seconds=time.perf_counter() - started,
                    error=error,
                    prompt_digest=prompt_digest(messages),
                    kind=kind,
                )
            )

    @asynccontextmanager
    async def forward(self, role: str, model: str, passes: int) -> AsyncIterator[_Forward]:
        """Count `passes` forward passes, which the body makes, and record them as one call.

        Raises:
            BudgetExceeded: fewer passes are left, or the deadline passed.
        """
        self.admit("forward", passes)
        started = time.perf_counter()
        made = _Forward()
        error: BaseException | None = None
        try:
            async with self.deadline():
                yield made
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.record(
                Call(
                    role=role,
                    model=model,
                    kind="forward",
                    input_tokens=made.tokens,
                    seconds=time.perf_counter() - started,
                    error=None if error is None else describe(error),
                )
            )


@dataclass
class _Forward:
    """Forward passes that are being made."""

    tokens: int | None = None
    """Tokens of all passes; set by the body, and None where it failed."""


class _Deadline:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def __aenter__(self) -> None:
        seconds = self._calls.budget.seconds
        self._timeout = asyncio.timeout(None if seconds is None else seconds - self._calls.seconds)
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as timeout:  # our own deadline: a TimeoutError of the body does not come this way
            raise self._calls.late() from timeout


_WORK = {"critique": "critique", "revise": "revision", "compare": "comparison", "rate": "rating"}
"""Role of a call -> the word for it in error notes."""


def _marked(role: str, name: str, messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """Return the messages; for a critique by Anthropic, with the static part marked for its prompt cache.

    Anthropic caches only marked parts; other providers cache prefixes by themselves.
    https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching
    """
    first, *others = messages
    if role != "critique" or not name.startswith("anthropic:") or not isinstance(first, SystemMessage):
        return [first, *others]
    part = {"type": "text", "text": first.text, "cache_control": {"type": "ephemeral"}}
    return [SystemMessage([part]), *others]


def call_of(
    role: str,
    model: str,
    reply: BaseMessage | None,
    *,
    seconds: float,
    error: BaseException | None = None,
    prompt_digest: str | None = None,
    kind: Literal["generation", "forward"] = "generation",
) -> Call:
    """Return the record of a call, with the tokens from its reply's usage metadata."""
    usage: Any = getattr(reply, "usage_metadata", None) or {}
    return Call(
        role=role,
        model=model,
        kind=kind,
        prompt_digest=prompt_digest,
        input_tokens=usage.get("input_tokens"),
        cached_input_tokens=(usage.get("input_token_details") or {}).get("cache_read"),
        output_tokens=usage.get("output_tokens"),
        seconds=seconds,
        error=None if error is None else describe(error),
    )


def prompt_digest(messages: Sequence[BaseMessage]) -> str:
    """Return the first 16 hex digits of the sha256 over the roles and contents of `messages`."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(f"{message.type}\0{message.content}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
