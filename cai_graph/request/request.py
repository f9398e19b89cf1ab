"""One request, and the run that it becomes."""

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
    """An app's answer that leaves in blocks."""

    async def next(self, calls: Calls, config: RunnableConfig) -> Draft:
        """Return the draft up to the end of its next block; unfinished where the app still writes."""
        ...

    async def release(self, draft: Draft) -> None:
        """Send the text of a draft, which complies, as far as it has not left yet."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request."""

    messages: tuple[Message, ...]
    """The conversation."""
    asked: Callable[[], tuple[Message, ...]] | None = None
    """Tells the conversation anew once the app has answered, since the app may have known more of it."""
    draft: Callable[[Calls, RunnableConfig], Awaitable[Draft]]
    """Runs the wrapped app under the node's configuration, records its calls, and returns its answer."""
    blocks: Blocks | None = None
    """Hands the app's answer over in blocks; then `draft` is asked only to hear the rest of it out."""
    written: Callable[[], Draft | None] = lambda: None
    """What has left of the app's answer so far, where it leaves as it is written (mode `audit`)."""
    tell: Callable[[str], Awaitable[None]] | None = None
    """Hears which step is under way: `drafting`, `critiquing`, `revising 1/2`."""
    context: Callable[[], Mapping[str, str]] = dict
    """Other material for the critic; asked for after the draft, since the app may have produced it."""
    form: Callable[[], Form | None] = lambda: None
    """What a structured answer must be, where the draft is one; asked for after the draft."""
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
    """When it came in, UTC."""
    started: float = field(default_factory=time.perf_counter)
    """The same by the clock that durations are read from."""
    made: Sequence[Call] = ()
    """Model calls that were made before the run."""
    failed: BaseException | None = None
    """What the app raised, where it ran before; then there is nothing to judge."""
    unjudged: Literal["sample", "overload", "shutdown"] | None = None
    """Why no critic is to judge the answer: then it is only logged (mode `shadow`)."""
    recorded: Callable[[Trajectory], None] = lambda trajectory: None
    """Hears the Trajectory before it goes to the log."""
    lost: Callable[[BaseException], None] = lambda error: None
    """Hears why it could not be committed, where the answer leaves all the same."""


@dataclass(kw_only=True)
class Run:
    """A request under way: what the graph's nodes need beside the state."""

    plan: Plan
    request: Request
    calls: Calls
    messages: tuple[Message, ...]
    """The conversation, as far as it is known."""
    reached: Progress | None = None
    """What the last node reached: what is logged when the next one fails."""
    paused: BaseException | None = None
    """What the app raised to wait for a person."""
    failed: Exception | None = None
    """What the app raised."""
    held: Exception | None = None
    """The error that ended the graph early and that a policy keeps from leaving."""

    @cached_property
    def random(self) -> random.Random:
        """What draws for this request: the same again from the same seed, and another for each prompt."""
        seed = self.plan.settings.seed
        asked = [text_of(message) for message in self.messages]
        return random.Random(None if seed is None else ascii((seed, asked)))

    def exchange(self, answer: Message, *, unfinished: bool = False) -> Exchange:
        """Return an answer as critics and revisers are shown it."""
        context = self.request.context()
        return Exchange(messages=self.messages, answer=answer, context=context, unfinished=unfinished)

    async def tell(self, step: str) -> None:
        """Tell who listens which step is under way."""
        if self.request.tell is not None:
            await self.request.tell(step)
