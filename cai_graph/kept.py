"""What a wrapped graph keeps of a request: its thread in a checkpointer.

A graph with a checkpointer has written its draft there before anybody judged it, and shows it to its model
in the next turn. So what leaves in the draft's place is put into its place there, too, as an update of the
thread's state; where nothing leaves, the refusal is. Checkpoints before that one keep the draft. A memory
that cannot be reached from here, such as that of a graph inside a chain, is warned of.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.constants import END, START
from langgraph.errors import InvalidUpdateError
from langgraph.func import entrypoint
from langgraph.pregel import Pregel
from langgraph.types import Overwrite

from cai_graph import bridge
from cai_graph.calls import apart
from cai_graph.shape import Swap, emptied
from cai_graph.wrapped import STREAM, configurable_of, graph_of

__all__ = ["Kept", "as_owner", "refused"]

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
            return Kept(app)
        given = configurable_of(app, config)
        # The run may have begun at an earlier checkpoint; what it came to stands in the thread's last one.
        thread = {key: value for key, value in given.items() if key not in (STREAM, "checkpoint_id")}
        return Thread(app, compiled, RunnableConfig(configurable=thread), caller)

    async def stopped(self) -> bool:
        """Return whether the app stands at a breakpoint, from which it goes on when it is resumed."""
        return False

    def stopped_here(self) -> bool:
        """Return the same, in this thread."""
        return False

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
    caller: bridge.Caller | None
    """The thread that waits for the answer, where it is a synchronous one."""

    async def stopped(self) -> bool:
        """Return whether the graph stands at a breakpoint, from which it goes on when it is resumed."""
        return bool((await self._state()).next)

    def stopped_here(self) -> bool:
        """Return the same, in this thread."""
        with apart():
            return bool(self.graph.get_state(self.config).next)

    async def replace(self, swap: Callable[[], Swap]) -> None:
        """Put what leaves into the draft's place, wherever the thread's state has it.

        Warns where the state cannot be so changed. A caller who is cancelled meanwhile is held until it is.
        """
        replacing = asyncio.ensure_future(self._replace(swap()))
        try:
            await asyncio.shield(replacing)
        except asyncio.CancelledError:
            await asyncio.wait([replacing])
            raise

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
            if (await self._state()).next:  # edges were asked again, about a turn that had ended
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

    async def _state(self) -> Any:
        return await as_owner(
            self.caller,
            lambda: self.graph.get_state(self.config),
            lambda: self.graph.aget_state(self.config),
        )

    async def _put(self, update: Any) -> None:
        """Update the state as the node that ran last; as another one, where the edges from there fail."""
        try:
            await self._update(update)
            return
        except InvalidUpdateError:
            raise
        except Exception as error:
            failed = error  # such as an agent's, whose last node LangGraph takes for the one before
        for node in [node for node in self.graph.nodes if node != START]:
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


def refused(draft: str | BaseMessage, refusal: str) -> str | BaseMessage:
    """Return the refusal as it stands in a draft's place where nothing left."""
    if isinstance(draft, str):
        return refusal
    return draft.model_copy(update={**emptied(draft, refusal), "response_metadata": {}})
