"""Replaces unreleased drafts in the checkpointer of a wrapped graph, so that its memory has none of them.

A graph with a checkpointer stores its draft in its thread before the draft is judged, and passes it to its
model in the next turn. So the released answer replaces the draft there, too; if nothing was released, the
refusal does. A run that failed or was cancelled may also leave a draft in the thread: the next request
replaces it by the refusal.

A memory that cannot be changed from here, such as that of a graph inside a chain, causes a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent

from cai_graph.app.shape import Shape, Swap
from cai_graph.app.wrapped import (
    CHECKPOINTER,
    RESUMING,
    STREAM,
    call_options,
    configurable_of,
    graph_of,
    memory_in,
)
from cai_graph.calls import Calls
from cai_graph.concurrency import bridge
from cai_graph.concurrency.together import to_the_end
from cai_graph.memory.memory import Memory, warn
from cai_graph.memory.turns import Turn
from cai_graph.memory.unheard import beside, broken_off, just_said

__all__ = ["Kept"]


@dataclass(frozen=True)
class Kept:
    """The memory of a wrapped app during one request; if it has none, most methods do nothing."""

    app: Runnable[Any, Any]
    """The wrapped app."""
    turn: Turn = field(default_factory=Turn)
    """The request's turn to use the thread, which one request at a time may use."""
    memory: Memory | None = None
    """The thread; None if the app has no checkpointer that can be read."""
    begun: RunnableConfig | None = None
    """Configuration with the checkpoint at which the run begins; None: the thread's last one."""
    pauses: _Pauses = field(default_factory=lambda: _Pauses())
    """Callback handler that records the checkpoints at which the run stopped."""
    met: list[Any] = field(default_factory=list)
    """The thread's states before the run, as far as read: the last one, and that of `begun` if set."""

    @classmethod
    def of(cls, app: Runnable[Any, Any], config: RunnableConfig, caller: bridge.Caller | None = None) -> Kept:
        """Return the memory of an app under its caller's configuration.

        Args:
            app: the wrapped app.
            config: names the thread.
            caller: the OS thread that waits for the answer; None under an asynchronous call.
        """
        compiled = graph_of(app)
        if compiled is None or not getattr(compiled, "checkpointer", None):
            return cls(app)
        given = configurable_of(app, config)
        keeper = given.get(CHECKPOINTER, compiled.checkpointer)
        if keeper is None:  # set by an outer graph that has no checkpointer itself
            return cls(app)
        if (name := given.get("thread_id")) is None:  # the graph itself raises an error without one
            return cls(app)
        # The run may begin at an earlier checkpoint; its result is in the thread's last one.
        thread = {key: value for key, value in given.items() if key not in (STREAM, "checkpoint_id")}
        at = given.get("checkpoint_id")
        turn = Turn((id(keeper), str(name), given.get("checkpoint_ns") or ""))
        begun = RunnableConfig(configurable={**thread, "checkpoint_id": at}) if at is not None else None
        return cls(app, turn, Memory(compiled, RunnableConfig(configurable=thread), caller), begun)

    @property
    def listener(self) -> BaseCallbackHandler | None:
        """The callback handler to add to the run, which `stopped` needs; None if the app has no thread."""
        return None if self.memory is None else self.pauses

    async def stopped(self) -> bool:
        """Return whether the run stopped at a breakpoint, from which it can be resumed.

        False if this is unknown since another run has written to the thread meanwhile.
        """
        if self.memory is None or not self.pauses.at:
            return False
        return self.pauses.is_one(await self.memory.state())

    def stopped_here(self) -> bool:
        """Return the same as `stopped`, but read the state synchronously, in the current OS thread."""
        if self.memory is None or not self.pauses.at:
            return False
        return self.pauses.is_one(self.memory.state_here())

    async def begin(self, calls: Calls) -> bool:
        """Wait until no other request uses the thread; return whether one did.

        Raises:
            BudgetExceeded: the request's time is over.
            RunError: the request would wait forever.
        """
        if self.memory is None:
            return False
        async with calls.deadline():
            return await self.turn.begin(self.memory.caller)

    async def meet(
        self,
        calls: Calls,
        shape: Shape,
        refusal: Callable[[], str],
        options: Mapping[str, Any],
        *,
        resumed: bool,
    ) -> None:
        """Read the thread's state, and replace by a refusal what the last run wrote but did not return.

        This applies to a last run that failed or was cancelled. If the thread cannot be read or changed, it
        stays as it is and a warning is logged.

        Args:
            calls: the calls of the request, whose time limit applies.
            shape: where in the thread's state an answer is.
            refusal: returns the text of the refusal.
            options: the options of the call.
            resumed: whether the request resumes the last run; then nothing is replaced.
        """
        memory = self.memory
        if memory is None:
            return
        async with calls.deadline():
            try:
                self.met.append(state := await memory.state())
                if self.begun is not None:
                    self.met.append(await memory.state(self.begun))
                if not (self.turn.is_inside or self._goes_on(memory, resumed)):
                    bound = call_options(self.app, options)
                    swaps = await broken_off(memory, state, shape, refusal(), bound)
                    for swap in swaps:
                        await memory.replace(swap)
                    if swaps:
                        self.met[0] = await memory.state()
            except Exception as error:
                memory.stays(error)

    async def forget(
        self, shape: Shape, refusal: Callable[[], str], swap: Swap | None, *, resumed: bool
    ) -> None:
        """Replace by a refusal what this request's run wrote, since none of it was released.

        A run that returned nothing may have been cancelled while its last checkpoint was being written; if it
        can still be resumed, its state is not changed. What was in the thread before is not changed either.

        Args:
            shape: where in the thread's state an answer is.
            refusal: returns the text of the refusal.
            swap: replaces the draft if the run returned an output; None if it did not.
            resumed: whether the request resumed the last run.
        """
        if self.memory is not None:
            await to_the_end(self._forget(self.memory, shape, refusal, swap, resumed))
        elif swap is not None:
            self._cannot_reach()

    async def _forget(
        self, memory: Memory, shape: Shape, refusal: Callable[[], str], swap: Swap | None, resumed: bool
    ) -> None:
        try:
            swaps: list[Swap] = []
            if self.met and self.turn.has_it():
                said = await just_said(memory, self.met, shape, refusal())
                swaps = [each for each in beside(said, self.met) if swap is None or each.draft != swap.draft]
            if swap is not None:
                # The answer of a resumed run may have been in the state at which it paused.
                goes_on = self._goes_on(memory, resumed)
                swaps += beside([swap], [state for state in self.met if not (state.next and goes_on)])
            for each in swaps:
                await memory.replace(each)
        except Exception as error:  # not raised: the request's own error is
            memory.stays(error)

    async def replace(self, swap: Callable[[], Swap]) -> None:
        """Replace the draft by the released answer in the app's memory; warn if that is not possible.

        If the caller is cancelled meanwhile, the replacement is completed first. `swap` is only called if
        there is a thread, since it raises for an output without a place for an answer.
        """
        if self.memory is not None:
            await to_the_end(self.memory.replace(swap()))
        else:
            self._cannot_reach()

    def _cannot_reach(self) -> None:
        found = memory_in(self.app)
        if found is not None and found is not graph_of(self.app):  # its own is reached, or not in use
            warn(f"the memory of the {type(found).__name__} inside cannot be reached")

    def _goes_on(self, memory: Memory, resumed: bool) -> bool:
        """Return whether this request resumes the last run, or runs in an outer graph that is resumed."""
        return resumed or bool(memory.config["configurable"].get(RESUMING))


class _Pauses(GraphCallbackHandler):
    """Callback handler that records the checkpoints at which a graph, or a graph that it calls, stops."""

    run_inline = True  # otherwise an asynchronous app would pay for a thread switch
    ignore_llm = ignore_chat_model = ignore_chain = ignore_agent = True
    ignore_retriever = ignore_retry = ignore_custom_event = True

    def __init__(self) -> None:
        self.at: set[str] = set()

    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        """Record the checkpoint at which a graph stops."""
        self.at.add(event.checkpoint_id)

    def is_one(self, state: Any) -> bool:
        """Return whether a graph stopped at this state and can be resumed from it."""
        return bool(state.next) and state.config["configurable"].get("checkpoint_id") in self.at
