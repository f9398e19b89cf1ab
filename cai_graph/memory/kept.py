"""What a wrapped graph keeps of a request: its thread in a checkpointer.

A graph with a checkpointer has written its draft there before anybody judged it, and shows it to its model
in the next turn. So what leaves in the draft's place is put into its place there, too; where nothing leaves,
the refusal is. A run that broke off on its way may have left a draft there, too: the next request puts the
refusal into its place.

A memory that cannot be reached from here, such as that of a graph inside a chain, is warned of.
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
    """What an app keeps of a request."""

    app: Runnable[Any, Any]
    """The wrapped app."""
    turn: Turn = field(default_factory=Turn)
    """When the request may use the thread."""
    memory: Memory | None = None
    """The thread; None where there is none that could be read."""
    begun: RunnableConfig | None = None
    """Says at which checkpoint of it the run begins, where it is not the last one."""
    pauses: _Pauses = field(default_factory=lambda: _Pauses())
    """Where the run stopped."""
    met: list[Any] = field(default_factory=list)
    """The states that the request met, where it read them: the last one, and that at which it begins."""

    @classmethod
    def of(cls, app: Runnable[Any, Any], config: RunnableConfig, caller: bridge.Caller | None = None) -> Kept:
        """Return what an app keeps under its caller's configuration.

        Args:
            app: the wrapped app.
            config: says which thread.
            caller: the thread that waits for the answer, where it is a synchronous one.
        """
        compiled = graph_of(app)
        if compiled is None or not getattr(compiled, "checkpointer", None):
            return cls(app)
        given = configurable_of(app, config)
        keeper = given.get(CHECKPOINTER, compiled.checkpointer)
        if keeper is None:  # a graph around says so, as it has none itself
            return cls(app)
        if (name := given.get("thread_id")) is None:  # the graph itself says that it needs one
            return cls(app)
        # The run may have begun at an earlier checkpoint; what it came to stands in the thread's last one.
        thread = {key: value for key, value in given.items() if key not in (STREAM, "checkpoint_id")}
        at = given.get("checkpoint_id")
        turn = Turn((id(keeper), str(name), given.get("checkpoint_ns") or ""))
        begun = RunnableConfig(configurable={**thread, "checkpoint_id": at}) if at is not None else None
        return cls(app, turn, Memory(compiled, RunnableConfig(configurable=thread), caller), begun)

    @property
    def listener(self) -> BaseCallbackHandler | None:
        """What is to hear the run, so that `stopped` can be told."""
        return None if self.memory is None else self.pauses

    async def stopped(self) -> bool:
        """Return whether the run stopped at a breakpoint, from which it goes on when it is resumed.

        False where that cannot be told, as another run has written into the thread meanwhile.
        """
        if self.memory is None or not self.pauses.at:
            return False
        return self.pauses.is_one(await self.memory.state())

    def stopped_here(self) -> bool:
        """Return the same, in this thread."""
        if self.memory is None or not self.pauses.at:
            return False
        return self.pauses.is_one(self.memory.state_here())

    async def begin(self, calls: Calls) -> bool:
        """Wait until no other request uses the thread; return whether one did.

        Raises:
            BudgetExceeded: the request's seconds are over.
            RunError: it would wait for ever.
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
        """Put a refusal into the place of what nobody was given, since the run that said it broke off.

        A thread that cannot be read or changed stays as it is, which is logged.

        Args:
            calls: the request's; its seconds bound the work.
            shape: where in the thread's state an answer is.
            refusal: what to put there.
            options: those of the call.
            resumed: whether the request goes on with the last run, of which then nothing is replaced.
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
        """Put a refusal into the place of what this request's run said, of which nobody heard.

        Where it returned nothing, it was cancelled while its last checkpoint was being written; one that can
        go on is left as it is. So is what stood in the thread before.

        Args:
            shape: where in the thread's state an answer is.
            refusal: what to put there.
            swap: does so where the run returned something.
            resumed: whether the request went on with the last run.
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
                # The answer of a run that goes on may be one that was shown at a pause.
                goes_on = self._goes_on(memory, resumed)
                swaps += beside([swap], [state for state in self.met if not (state.next and goes_on)])
            for each in swaps:
                await memory.replace(each)
        except Exception as error:  # that of the request is raised
            memory.stays(error)

    async def replace(self, swap: Callable[[], Swap]) -> None:
        """Put what leaves into the draft's place, wherever the app keeps it; warn where that cannot be.

        A caller who is cancelled meanwhile is held until it is done. `swap` is asked where there is a state:
        not every output has a place for an answer.
        """
        if self.memory is not None:
            await to_the_end(self.memory.replace(swap()))
        else:
            self._cannot_reach()

    def _cannot_reach(self) -> None:
        found = memory_in(self.app)
        if found is not None and found is not graph_of(self.app):  # that one is reached, or not in use
            warn(f"the memory of the {type(found).__name__} inside cannot be reached")

    def _goes_on(self, memory: Memory, resumed: bool) -> bool:
        """Return whether this request goes on with the last run; so does one in a graph that is resumed."""
        return resumed or bool(memory.config["configurable"].get(RESUMING))


class _Pauses(GraphCallbackHandler):
    """Hears at which checkpoints a graph stops, and the graphs that it calls."""

    run_inline = True  # else it costs an asynchronous app a thread hop
    ignore_llm = ignore_chat_model = ignore_chain = ignore_agent = True
    ignore_retriever = ignore_retry = ignore_custom_event = True

    def __init__(self) -> None:
        self.at: set[str] = set()

    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        """Take down where a graph stops."""
        self.at.add(event.checkpoint_id)

    def is_one(self, state: Any) -> bool:
        """Return whether a graph's state is one at which it stopped, and from which it goes on."""
        return bool(state.next) and state.config["configurable"].get("checkpoint_id") in self.at
