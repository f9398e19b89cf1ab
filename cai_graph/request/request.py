"""The Request that a face hands to `run`, and the Run: its state while the graph works on it."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, Protocol

from langchain_core.runnables import RunnableConfig

from cai_graph.calls import Calls
from cai_graph.prompts import Exchange
from cai_graph.request.form import Form
from cai_graph.request.plan import Plan
from cai_graph.request.policy import Progress
from cai_graph.trajectory import Call, Draft, Message, Trajectory, new_id, now, text_of

__all__ = ["Blocks", "Request", "Run"]


class Blocks(Protocol):
    """An app's answer that is released in blocks (stream `blocks`)."""

    async def next(self, calls: Calls, config: RunnableConfig) -> Draft:
        """Return the draft up to the end of its next block; `unfinished` while the app is still writing."""
        ...

    async def release(self, draft: Draft) -> None:
        """Send the part of a complying draft's text that has not been sent yet."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to a wrapped app: its conversation, and the callbacks through which the app is called."""

    messages: tuple[Message, ...]
    """The conversation."""
    asked: Callable[[], tuple[Message, ...]] | None = None
    """Returns the conversation once the app has answered, where the app may have known more of it."""
    draft: Callable[[Calls, RunnableConfig], Awaitable[Draft]]
    """Runs the wrapped app under the node's configuration, records its calls, and returns its answer."""
    blocks: Blocks | None = None
    """Returns the app's answer in blocks. `draft` is then called only to read the rest of the answer."""
    written: Callable[[], Draft | None] = lambda: None
    """Returns the part of the app's answer that has been released so far, in modes that stream the draft
    as it is written."""
    tell: Callable[[str], Awaitable[None]] | None = None
    """Called with each step that begins: `drafting`, `critiquing`, `revising 1/2`."""
    context: Callable[[], Mapping[str, str]] = dict
    """Returns other material for the critic. Called after the draft, since the app may have produced it."""
    form: Callable[[], Form | None] = lambda: None
    """Returns the form of a structured answer, where the draft is one. Called after the draft."""
    mode: str = "enforce"
    """See `Trajectory.mode`."""
    source: str | None = None
    """See `Trajectory.source`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """See `Trajectory.metadata`."""
    tags: Sequence[str] = ()
    """See `Trajectory.tags`."""
    id: str = field(default_factory=new_id)
    """The id that its Trajectory will have."""
    started_at: datetime = field(default_factory=now)
    """When it arrived, UTC."""
    started: float = field(default_factory=time.perf_counter)
    """The same time by `time.perf_counter`, from which durations are computed."""
    made: Sequence[Call] = ()
    """Model calls that were made before the run."""
    failed: BaseException | None = None
    """The error that the app raised, where it ran before this run; then there is nothing to judge."""
    unjudged: Literal["sample", "overload", "shutdown"] | None = None
    """Why no critic judges the answer, which is then only logged (mode `shadow`); None: it is judged."""
    recorded: Callable[[Trajectory], None] = lambda trajectory: None
    """Called with the Trajectory before it is logged."""
    lost: Callable[[BaseException], None] = lambda error: None
    """Called with the error where the Trajectory could not be committed and the answer is released anyway."""


@dataclass(kw_only=True)
class Run:
    """A request that is being answered: the graph's context, which its nodes need beside the state."""

    plan: Plan
    request: Request
    calls: Calls
    messages: tuple[Message, ...]
    """The conversation, as far as it is known."""
    reached: Progress | None = None
    """The result of the last finished step, which is logged where the next one fails."""
    paused: BaseException | None = None
    """The interrupt that the app raised to wait for a person."""
    failed: Exception | None = None
    """The error that the app raised."""
    held: Exception | None = None
    """The error that ended the graph early and that `on_error` does not raise."""

    @cached_property
    def random(self) -> random.Random:
        """The random generator of this request. With a seed, it depends on the seed and the conversation."""
        seed = self.plan.settings.seed
        asked = [text_of(message) for message in self.messages]
        return random.Random(None if seed is None else ascii((seed, asked)))

    def exchange(self, answer: Message, *, unfinished: bool = False) -> Exchange:
        """Return an answer with its conversation and context, as critics and revisers are sent it."""
        context = self.request.context()
        return Exchange(messages=self.messages, answer=answer, context=context, unfinished=unfinished)

    async def tell(self, step: str) -> None:
        """Call `Request.tell`, if there is one, with the step that begins."""
        if self.request.tell is not None:
            await self.request.tell(step)
