"""Reads and updates a thread in the checkpointer of a wrapped graph.

    Memory     the thread that the caller's configuration names, in the checkpointer of a compiled graph
    as_owner   uses the checkpointer in the caller's thread, or in this event loop

A change is an update of the thread's state: earlier checkpoints are not changed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.constants import END, START
from langgraph.errors import InvalidUpdateError
from langgraph.func import entrypoint
from langgraph.types import Overwrite

from cai_graph.app.shape import Swap
from cai_graph.concurrency import bridge
from cai_graph.concurrency.context import apart

__all__ = ["Memory", "as_owner", "warn"]

logger = logging.getLogger("cai_graph")

T = TypeVar("T")


async def as_owner(
    caller: bridge.Caller | None, directly: Callable[[], T], awaited: Callable[[], Awaitable[T]]
) -> T:
    """Use a checkpointer as its owner would: from the caller's thread, or in this event loop.

    Args:
        caller: the thread that waits for the answer; None under an asynchronous call.
        directly: called in the caller's thread, if there is one.
        awaited: does the same in an event loop; called if there is no caller.
    """

    def alone() -> T:
        with apart():
            return directly()

    if caller is not None:
        return await caller.call(alone)
    with apart():
        return await awaited()


@dataclass(frozen=True)
class Memory:
    """The thread of a wrapped graph that has a checkpointer."""

    graph: Any
    """The compiled graph."""
    config: RunnableConfig
    """Names the thread."""
    caller: bridge.Caller | None
    """The OS thread that waits for the answer; None under an asynchronous call."""

    async def state(self, at: RunnableConfig | None = None) -> Any:
        """Return the thread's last state, or the one at the checkpoint `at`."""
        place = {**self.config["configurable"], **at["configurable"]} if at else self.config["configurable"]
        config = RunnableConfig(configurable=place)  # a state's own config lacks an outer checkpointer
        return await as_owner(
            self.caller, lambda: self.graph.get_state(config), lambda: self.graph.aget_state(config)
        )

    def state_here(self) -> Any:
        """Return the thread's last state, read in the current OS thread."""
        with apart():
            return self.graph.get_state(self.config)

    async def last_of_a_run(self) -> Any:
        """Return the last state written by a run of the graph, not by an update; None if there is none."""
        last: dict[str, Any] = {"filter": {"source": "loop"}, "limit": 1}

        def directly() -> list[Any]:
            return [*self.graph.get_state_history(self.config, **last)]

        async def awaited() -> list[Any]:
            return [each async for each in self.graph.aget_state_history(self.config, **last)]

        found = await as_owner(self.caller, directly, awaited)
        return found[0] if found else None

    def stays(self, why: object) -> None:
        """Log a warning that the thread is not changed, and why."""
        name = self.config["configurable"]["thread_id"]
        logger.warning("thread %r stays as it is, though a run of it may have broken off: %s", name, why)

    # --- changes ---

    async def replace(self, swap: Swap) -> None:
        """Replace the draft by the released answer everywhere in the state; warn if that is not possible."""
        state = await self.state()
        if _PREVIOUS in self.graph.channels:
            update = await self._of_function(state, swap)
        elif isinstance(state.values, Mapping):
            update = self._of_channels(state.values, swap)
        else:
            warn(f"it is a {type(state.values).__name__} and has no channels")
            return
        if update is None:
            return
        try:
            await self._put(update)
            # The update evaluated the node's edges again. If the turn had ended, end it again; otherwise
            # another run is in progress.
            if not state.next and (await self.state()).next:
                await self._update(None, as_node=END)
        except InvalidUpdateError as error:
            warn(str(error))

    def _of_channels(self, state: Mapping[str, Any], swap: Swap) -> dict[str, Any] | None:
        """Return the update of a graph with channels; None if no channel contains the draft."""
        update: dict[str, Any] = {}
        for key, before in state.items():
            wanted = swap(before, key)
            if wanted is not before and wanted != before:
                update[key] = _write(self.graph.channels[key], before, wanted)
        for key in [key for key, value in update.items() if value is _UNWRITABLE]:
            warn(f"in {key!r} nothing can be replaced")
            del update[key]
        return update or None

    async def _of_function(self, state: Any, swap: Swap) -> Any:
        """Return the update for LangGraph's functional API: the function's return value and its saved value.

        None if these cannot be read.
        """
        saver = self.graph.checkpointer
        if not isinstance(saver, BaseCheckpointSaver):
            warn("the checkpointer is an outer graph's")
            return None
        found = await as_owner(
            self.caller, lambda: saver.get_tuple(state.config), lambda: saver.aget_tuple(state.config)
        )
        saved = found.checkpoint["channel_values"].get(_PREVIOUS) if found is not None else None
        return entrypoint.final(value=swap(state.values), save=swap(saved))

    async def _put(self, update: Any) -> None:
        """Update the state as the node that ran last; as another node, if several ran last or its edges fail.

        The first other node is START: its edges are usually unconditional, and no join waits for it.
        """
        try:
            await self._update(update)
            return
        except Exception as error:
            failed = error  # e.g. for agents, whose last node LangGraph takes for the one before it
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


_PREVIOUS = "__previous__"
"""Channel in which LangGraph's functional API saves the value that a function receives in the next turn."""


def warn(why: str) -> None:
    """Warn that a draft remains in the app's memory, and why."""
    warnings.warn(
        "the wrapped app remembers a draft that did not leave, and shows it to its model in the next turn: "
        f"the state cannot be changed ({why}). Judge inside the app instead, with ConstitutionalMiddleware "
        "or a wrapped chat model",
        RuntimeWarning,
        stacklevel=2,
    )


_UNWRITABLE = object()


def _write(channel: Any, before: Any, wanted: Any) -> Any:
    """Return an update with which the channel's reducer turns `before` into `wanted`; else _UNWRITABLE."""
    values = [wanted, Overwrite(wanted)]
    if isinstance(before, list):  # `add_messages` replaces by id
        values.insert(0, [new for old, new in zip(before, wanted, strict=True) if new is not old])
    for value in values:
        try:
            tried = channel.from_checkpoint([*before] if isinstance(before, list) else before)
            tried.update([value])
            if tried.get() == wanted:
                return value
        except Exception:  # one of the app's own reducers, which may reject it
            continue
    return _UNWRITABLE
