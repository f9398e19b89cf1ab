"""What a wrapped graph keeps of a request: its thread in a checkpointer.

A graph with a checkpointer has written its draft there before anybody judged it, and shows it to its model
in the next turn. So what leaves in the draft's place is put into its place there, too, as an update of the
thread's state; where nothing leaves, the refusal is. A run that broke off on its way may have left a draft
there, too: the next request puts the refusal into its place. What may have been given to somebody stays, and
so does what the thread's owner wrote. Checkpoints before that one keep the draft. A memory that cannot be
reached from here, such as that of a graph inside a chain, is warned of.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import HumanMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.constants import END, START
from langgraph.errors import InvalidUpdateError
from langgraph.func import entrypoint
from langgraph.pregel import Pregel
from langgraph.types import Overwrite

from cai_graph import bridge
from cai_graph.calls import Calls, apart
from cai_graph.shape import Shape, Swap
from cai_graph.turns import Turn
from cai_graph.wrapped import CHECKPOINTER, RESUMING, STREAM, call_options, configurable_of, graph_of

__all__ = ["Kept", "as_owner"]

logger = logging.getLogger("cai_graph")

T = TypeVar("T")


async def as_owner(
    caller: bridge.Caller | None, directly: Callable[[], T], awaited: Callable[[], Awaitable[T]]
) -> T:
    """Use a checkpointer as its owner does: from the caller's thread, or in this event loop.

    Args:
        caller: the thread that waits for the answer, where it is a synchronous one.
        directly: what to do in the caller's thread.
        awaited: the same in an event loop.
    """

    def alone() -> T:
        with apart():
            return directly()

    if caller is not None:
        return await caller.call(alone)
    with apart():
        return await awaited()


# --- the thread ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What an app keeps of a request. This one has no thread that could be read."""

    app: Runnable[Any, Any]
    """The wrapped app."""
    turn: Turn
    """When the request may use the thread."""

    @staticmethod
    def of(app: Runnable[Any, Any], config: RunnableConfig, caller: bridge.Caller | None = None) -> Kept:
        """Return what an app keeps under its caller's configuration.

        Args:
            app: the wrapped app.
            config: says which thread.
            caller: the thread that waits for the answer, where it is a synchronous one.
        """
        compiled = graph_of(app)
        if compiled is None or not getattr(compiled, "checkpointer", None):
            return Kept(app, Turn())
        given = configurable_of(app, config)
        if (name := given.get("thread_id")) is None:  # the graph itself says that it needs one
            return Kept(app, Turn())
        # The run may have begun at an earlier checkpoint; what it came to stands in the thread's last one.
        thread = {key: value for key, value in given.items() if key not in (STREAM, "checkpoint_id")}
        at = given.get("checkpoint_id")
        keeper = given.get(CHECKPOINTER) or compiled.checkpointer
        turn = Turn((id(keeper), str(name), given.get("checkpoint_ns") or ""))
        begun = RunnableConfig(configurable={**thread, "checkpoint_id": at}) if at is not None else None
        return Thread(app, turn, compiled, RunnableConfig(configurable=thread), begun, caller)

    @property
    def listener(self) -> BaseCallbackHandler | None:
        """What is to hear the run, so that `stopped` can be told."""
        return None

    async def stopped(self) -> bool:
        """Return whether the run stopped at a breakpoint, from which it goes on when it is resumed."""
        return False

    def stopped_here(self) -> bool:
        """Return the same, in this thread."""
        return False

    async def begin(self, calls: Calls) -> bool:
        """Wait until no other request uses the thread; return whether one did."""
        return False

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

        Args:
            calls: the request's; its seconds bound the work.
            shape: where in the thread's state an answer is.
            refusal: what to put there.
            options: those of the call.
            resumed: whether the request goes on with the last run, of which then nothing is replaced.
        """

    async def forget(
        self, shape: Shape, refusal: Callable[[], str], swap: Swap | None, *, resumed: bool
    ) -> None:
        """Put a refusal into the place of what this request's run said, of which nobody heard.

        Args:
            shape: where in the thread's state an answer is.
            refusal: what to put there.
            swap: does so where the run returned something.
            resumed: whether the request went on with the last run.
        """
        if swap is not None:
            await self.replace(lambda: swap)

    async def replace(self, swap: Callable[[], Swap]) -> None:
        """Put what leaves into the draft's place, wherever the app keeps it; warn where that cannot be.

        `swap` is asked where there is a state: not every output has a place for an answer.
        """
        if (memory := _memory_in(self.app)) is not None:
            _warn(f"the memory of the {type(memory).__name__} inside cannot be reached")


@dataclass(frozen=True)
class Thread(Kept):
    """The thread of a wrapped graph that has a checkpointer."""

    graph: Any
    """The compiled graph."""
    config: RunnableConfig
    """Says which thread."""
    begun: RunnableConfig | None
    """Says at which checkpoint of it the run begins, where it is not the last one."""
    caller: bridge.Caller | None
    """The thread that waits for the answer, where it is a synchronous one."""
    pauses: _Pauses = field(default_factory=lambda: _Pauses())
    """Where the run stopped."""
    met: list[Any] = field(default_factory=list)
    """The states that the request met, where it read them: the last one, and that at which it begins."""

    @property
    def listener(self) -> BaseCallbackHandler:
        """What is to hear the run, so that `stopped` can be told."""
        return self.pauses

    async def stopped(self) -> bool:
        """Return whether the run stopped at a breakpoint, from which it goes on when it is resumed.

        False where that cannot be told, as another run has written into the thread meanwhile.
        """
        return bool(self.pauses.at) and self.pauses.is_one(await self._state())

    def stopped_here(self) -> bool:
        """Return the same, in this thread."""
        with apart():
            return bool(self.pauses.at) and self.pauses.is_one(self.graph.get_state(self.config))

    async def begin(self, calls: Calls) -> bool:
        """Wait until no other request uses the thread; return whether one did.

        Raises:
            BudgetExceeded: the request's seconds are over.
            RunError: it would wait for ever.
        """
        async with calls.deadline():
            return await self.turn.begin(self.caller)

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
        """
        under_way = self.turn.is_inside or self._goes_on(resumed)
        async with calls.deadline():
            try:
                state = await self._state()
                self.met.append(state)
                if self.begun is not None:
                    self.met.append(await self._state(self.begun))
                # Its owner may have closed it by hand since.
                may_have_broken_off = state.next or _writer(state) in ("update", "fork")
                if may_have_broken_off and not under_way:
                    for swap in await self._broken_off(state, shape, refusal(), options):
                        await self._replace(swap)
                    self.met[0] = await self._state()
            except Exception as error:
                self._leave(error)

    async def forget(
        self, shape: Shape, refusal: Callable[[], str], swap: Swap | None, *, resumed: bool
    ) -> None:
        """Put a refusal into the place of what this request's run said, of which nobody heard.

        Where it returned nothing, it was cancelled while its last checkpoint was being written; one that can
        go on is left as it is. So is what stood in the thread before.
        """
        if swap is not None or (self.met and self.turn.has_it()):
            await _to_the_end(self._forget(shape, refusal, swap, resumed))

    async def _forget(
        self, shape: Shape, refusal: Callable[[], str], swap: Swap | None, resumed: bool
    ) -> None:
        try:
            others = await self._unheard(shape, refusal()) if self.met and self.turn.has_it() else []
            swaps = _beside(others, self.met)
            if swap is not None:
                swaps = [each for each in swaps if each.draft != swap.draft]
                # The answer of a run that goes on may be one that was shown at a pause.
                shown = [state for state in self.met if not (state.next and self._goes_on(resumed))]
                swaps += _beside([swap], shown)
            for each in swaps:
                await self._replace(each)
        except Exception as error:  # that of the request is raised
            self._leave(error)

    async def _unheard(self, shape: Shape, refusal: str) -> list[Swap]:
        """Return what puts a refusal into the place of what a run said that ended, where this one did."""
        state = await self._state()
        met = [_checkpoint(each) for each in self.met]
        if state.next or _writer(state) != "loop" or _checkpoint(state) in met:
            return []
        return self._unjudged(state, shape, refusal)

    def _goes_on(self, resumed: bool) -> bool:
        """Return whether this request goes on with the last run; so does one in a graph that is resumed."""
        return resumed or bool(self.config["configurable"].get(RESUMING))

    def _leave(self, why: object) -> None:
        name = self.config["configurable"]["thread_id"]
        logger.warning("thread %r stays as it is, though a run of it may have broken off: %s", name, why)

    # --- runs that broke off ---

    async def _broken_off(
        self, state: Any, shape: Shape, refusal: str, options: Mapping[str, Any]
    ) -> list[Swap]:
        """Return what puts a refusal into the place of what the last run said since anybody heard of it.

        There is nothing where that run did not break off, and nothing that has been written over since.
        """
        last = state if _writer(state) in ("loop", "input") else await self._last_of_a_run()
        if last is None:
            return []
        past = await self._state(last.config)  # as it was written: a thread's last state is shown otherwise
        if await self._was_shown(past, options):
            return []
        while past is not None and _writer(past) == "loop":
            past = await self._state(past.parent_config) if past.parent_config else None
            if past is not None and await self._was_shown(past, options):
                break
        swaps = [each for each in self._unjudged(last, shape, refusal) if _holds(state, each)]
        if past is not None and _writer(past) is not None:
            return _beside(swaps, [past])
        opened = [each for each in swaps if _is_opened(state, each)]
        if len(opened) < len(swaps):
            self._leave("what it found there is not kept")
        return opened

    async def _last_of_a_run(self) -> Any:
        """Return the last state that a run wrote, not its owner or this; None where none is kept."""
        last: dict[str, Any] = {"filter": {"source": "loop"}, "limit": 1}

        def directly() -> list[Any]:
            return [*self.graph.get_state_history(self.config, **last)]

        async def awaited() -> list[Any]:
            return [each async for each in self.graph.aget_state_history(self.config, **last)]

        found = await as_owner(self.caller, directly, awaited)
        return found[0] if found else None

    async def _was_shown(self, state: Any, options: Mapping[str, Any]) -> bool:
        """Return whether a run came to its caller with a state: it ended there, or was to go on later.

        It was not where one branch waits for a person and another one failed.
        """
        if not state.next or await self._is_at_breakpoint(state, options):
            return True
        return bool(state.interrupts) and not any(task.error and not task.interrupts for task in state.tasks)

    def _unjudged(self, state: Any, shape: Shape, refusal: str) -> list[Swap]:
        """Return `Shape.unjudged` of what the graph returns of a state."""
        if isinstance(self.graph.stream_channels_asis, str):  # it has one value, and returns that
            return shape.unjudged(state.values, None, refusal)
        shown = self.graph.output_channels
        return shape.unjudged(state.values, [shown] if isinstance(shown, str) else shown, refusal)

    async def _is_at_breakpoint(self, state: Any, options: Mapping[str, Any]) -> bool:
        """Return whether a state may be one at which the graph stops by itself, under a call's options."""
        bound = call_options(self.app, options)
        before = bound.get("interrupt_before") or self.graph.interrupt_before_nodes
        after = bound.get("interrupt_after") or self.graph.interrupt_after_nodes
        if _has_any(before, state.next):
            return True
        if not after:
            return False
        parent = await self._state(state.parent_config) if state.parent_config else None
        if parent is None or not parent.metadata or parent.metadata["step"] + 1 != state.metadata["step"]:
            return True  # which node ran last is not kept
        return _has_any(after, parent.next)

    async def replace(self, swap: Callable[[], Swap]) -> None:
        """Put what leaves into the draft's place, wherever the thread's state has it.

        Warns where the state cannot be so changed. A caller who is cancelled meanwhile is held until it is.
        """
        await _to_the_end(self._replace(swap()))

    async def _replace(self, swap: Swap) -> None:
        state = await self._state()
        if _PREVIOUS in self.graph.channels:
            update = await self._of_function(state, swap)
        elif isinstance(state.values, Mapping):
            update = self._of_channels(state.values, swap)
        else:
            _warn(f"it is a {type(state.values).__name__} and has no channels")
            return
        if update is None:
            return
        try:
            await self._put(update)
            # Edges were asked again. Where the turn had ended it stays so; else another run is under way.
            if not state.next and (await self._state()).next:
                await self._update(None, as_node=END)
        except InvalidUpdateError as error:
            _warn(str(error))

    def _of_channels(self, state: Mapping[str, Any], swap: Swap) -> dict[str, Any] | None:
        """Return the update of a graph of channels; None where none of them has the draft."""
        update: dict[str, Any] = {}
        for key, before in state.items():
            wanted = swap(before, key)
            if wanted is not before and wanted != before:
                update[key] = _write(self.graph.channels[key], before, wanted)
        for key in [key for key, value in update.items() if value is _UNWRITABLE]:
            _warn(f"in {key!r} nothing can be replaced")
            del update[key]
        return update or None

    async def _of_function(self, state: Any, swap: Swap) -> Any:
        """Return the update of LangGraph's functional API: what a function returned, and what it saved.

        None where that cannot be read.
        """
        saver = self.graph.checkpointer
        if not isinstance(saver, BaseCheckpointSaver):
            _warn("the checkpointer is an outer graph's")
            return None
        found = await as_owner(
            self.caller, lambda: saver.get_tuple(state.config), lambda: saver.aget_tuple(state.config)
        )
        saved = found.checkpoint["channel_values"].get(_PREVIOUS) if found is not None else None
        return entrypoint.final(value=swap(state.values), save=swap(saved))

    async def _state(self, at: RunnableConfig | None = None) -> Any:
        config = at or self.config
        return await as_owner(
            self.caller, lambda: self.graph.get_state(config), lambda: self.graph.aget_state(config)
        )

    async def _put(self, update: Any) -> None:
        """Update the state as the node that ran last; as another one, where several did or its edges fail.

        The first of them is the graph's beginning. As a rule nothing is asked on its edge, and no join counts
        it among those that it waits for.
        """
        try:
            await self._update(update)
            return
        except Exception as error:
            failed = error  # such as an agent's, whose last node LangGraph takes for the one before
        for node in [START, *(node for node in self.graph.nodes if node != START)]:
            with suppress(Exception):
                await self._update(update, as_node=node)
                return
        raise failed

    async def _update(self, values: Any, as_node: str | None = None) -> None:
        await as_owner(
            self.caller,
            lambda: self.graph.update_state(self.config, values, as_node),
            lambda: self.graph.aupdate_state(self.config, values, as_node),
        )


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Do some work to its end; who is cancelled meanwhile is held until then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:  # anyio, and so Starlette, cancels again and again
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


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


def _writer(state: Any) -> Any:
    """Return what wrote a state: a run's `input` or `loop`, an `update`, a `fork`; None: it is not kept."""
    return state.metadata and state.metadata.get("source")


def _checkpoint(state: Any) -> Any:
    return state.config["configurable"].get("checkpoint_id")


def _holds(state: Any, swap: Swap) -> bool:
    """Return whether a draft stands in a state, word for word."""
    values = state.values
    if not isinstance(values, Mapping):
        places = [values]
    else:
        places = [values[swap.key]] if swap.key in values else [*values.values()]
    return any(swap.draft in each if isinstance(each, list) else swap.draft == each for each in places)


def _beside(swaps: Sequence[Swap], known: Sequence[Any]) -> list[Swap]:
    """Return those of which no known state holds the draft, and which leave alone what these states have."""
    new = [swap for swap in swaps if not any(_holds(state, swap) for state in known)]
    return [reduce(lambda swap, state: swap.sparing(state.values), known, swap) for swap in new]


def _is_opened(state: Any, swap: Swap) -> bool:
    """Return whether the turn of a draft in a state is told from those before by what the user says."""
    found = state.values[swap.key] if isinstance(state.values, Mapping) else state.values
    return isinstance(found, list) and any(isinstance(each, HumanMessage) for each in found)


def _has_any(nodes: str | Sequence[str], names: Sequence[str]) -> bool:
    """Return whether there is one of these nodes among the names; LangGraph has `*` for all of them."""
    return bool(names) and (nodes == "*" or not set(nodes).isdisjoint(names))


_PREVIOUS = "__previous__"
"""Channel in which LangGraph's functional API saves what a function is given in the next turn."""


def _memory_in(app: Runnable[Any, Any]) -> object:
    """Return what remembers inside an app, as far as its parts can be seen; None where nothing does."""
    waiting, seen = [app], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, BaseLanguageModel):  # a model has no memory
            continue
        seen.add(id(part))
        if isinstance(part, RunnableWithMessageHistory) or (isinstance(part, Pregel) and part.checkpointer):
            return part
        if (memory := getattr(part, "memory", None)) is not None:  # a classic chain's
            return memory
        for value in vars(part).values():
            many = value.values() if isinstance(value, Mapping) else value
            inside = [*many] if isinstance(value, Mapping | list | tuple) else [value]
            waiting += [each for each in inside if isinstance(each, Runnable)]
        if isinstance(part, RunnableLambda):
            waiting += part.deps  # what its function closes over
    return None


def _warn(why: str) -> None:
    warnings.warn(
        "the wrapped app remembers a draft that did not leave, and shows it to its model in the next turn: "
        f"the state cannot be changed ({why}). Judge inside the app instead, with ConstitutionalMiddleware "
        "or a wrapped chat model",
        RuntimeWarning,
        stacklevel=2,
    )


_UNWRITABLE = object()


def _write(channel: Any, before: Any, wanted: Any) -> Any:
    """Return the update that makes a channel's value the wanted one, as its reducer has it."""
    values = [wanted, Overwrite(wanted)]
    if isinstance(before, list):  # `add_messages` replaces by id
        values.insert(0, [new for old, new in zip(before, wanted, strict=True) if new is not old])
    for value in values:
        try:
            tried = channel.from_checkpoint([*before] if isinstance(before, list) else before)
            tried.update([value])
            if tried.get() == wanted:
                return value
        except Exception:  # a reducer of the app's own, which may not take it
            continue
    return _UNWRITABLE
