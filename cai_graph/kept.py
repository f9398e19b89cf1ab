"""What a wrapped graph keeps of a request: its thread in a checkpointer, and what resumes it.

A graph with a checkpointer has written its draft there before anybody judged it, and shows it to its model
in the next turn. So what leaves in the draft's place is put into its place there, too, as an update of the
thread's state; where nothing leaves, the refusal is. Checkpoints before that one keep the draft.
"""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.errors import InvalidUpdateError
from langgraph.types import Command, GraphOutput, Overwrite

from cai_graph import bridge, graph
from cai_graph.calls import apart
from cai_graph.trajectory import text_of

__all__ = ["Kept", "as_asked", "as_owner", "refused", "replaced", "resumes", "untyped"]

T = TypeVar("T")


def resumes(input: object, app: Runnable[Any, Any]) -> bool:
    """Return whether an input resumes what was paused; from a breakpoint a graph goes on with None."""
    return isinstance(input, Command) or (input is None and graph.is_graph(app))


# --- outputs of version 2 -----------------------------------------------------------------------------


def untyped(output: Any) -> Any:
    """Return what a graph returns as its version 1 does."""
    if not isinstance(output, GraphOutput):
        return output
    return {**output.value, "__interrupt__": [*output.interrupts]} if output.interrupts else output.value


def as_asked(output: Any, app: Runnable[Any, Any], options: Mapping[str, Any]) -> Any:
    """Return the output of a graph in the version that its caller asks for."""
    if options.get("version") != "v2" or not graph.is_graph(app) or isinstance(output, GraphOutput):
        return output
    interrupts = output.get("__interrupt__", ()) if isinstance(output, Mapping) else ()
    if interrupts:
        output = {key: value for key, value in output.items() if key != "__interrupt__"}
    return GraphOutput(value=output, interrupts=tuple(interrupts))


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
    """The thread of a wrapped graph that has a checkpointer."""

    app: Any
    """The compiled graph."""
    config: RunnableConfig
    """Says which thread."""
    caller: bridge.Caller | None
    """The thread that waits for the answer, where it is a synchronous one."""

    @classmethod
    def of(
        cls, app: Runnable[Any, Any], config: RunnableConfig, caller: bridge.Caller | None = None
    ) -> Kept | None:
        """Return what an app keeps under its caller's configuration; None where it keeps nothing."""
        if not graph.is_graph(app) or not getattr(app, "checkpointer", None):
            return None
        given = config.get("configurable") or {}
        # The run may have begun at an earlier checkpoint; what it came to stands in the thread's last one.
        thread = {key: value for key, value in given.items() if key not in (graph.STREAM, "checkpoint_id")}
        return cls(app, RunnableConfig(configurable=thread), caller)

    async def stopped(self) -> bool:
        """Return whether the graph stands at a breakpoint, from which it goes on when it is resumed."""
        return bool((await self._state()).next)

    def stopped_here(self) -> bool:
        """Return the same, in this thread."""
        with apart():
            return bool(self.app.get_state(self.config).next)

    async def replace(self, draft: str | BaseMessage, released: str | BaseMessage) -> None:
        """Put what leaves into the draft's place, wherever the thread's state has it.

        Warns where the state cannot be so changed.
        """
        state = (await self._state()).values
        update: dict[str, Any] = {}
        for key, before in state.items():
            wanted = replaced(before, draft, released)
            if wanted != before:
                update[key] = _write(self.app.channels[key], before, wanted)
        for key in [key for key, value in update.items() if value is _UNWRITABLE]:
            _warn(f"in {key!r} nothing can be replaced")
            del update[key]
        if not update:
            return
        try:
            await as_owner(
                self.caller,
                lambda: self.app.update_state(self.config, update),
                lambda: self.app.aupdate_state(self.config, update),
            )
        except InvalidUpdateError as error:
            _warn(str(error))

    async def _state(self) -> Any:
        return await as_owner(
            self.caller,
            lambda: self.app.get_state(self.config),
            lambda: self.app.aget_state(self.config),
        )


def _warn(why: str) -> None:
    warnings.warn(
        "the wrapped graph's checkpointer keeps a draft that did not leave, and the next turn shows it to "
        f"its model: the state cannot be changed ({why}). Judge inside the graph instead, with "
        "ConstitutionalMiddleware or a wrapped chat model",
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
    update: dict[str, Any] = {"content": refusal, "additional_kwargs": {}, "response_metadata": {}}
    update |= {key: [] for key in ("tool_calls", "invalid_tool_calls") if hasattr(draft, key)}
    return draft.model_copy(update=update)


def replaced(value: Any, draft: str | BaseMessage, released: str | BaseMessage) -> Any:
    """Return the value with the released answer wherever the draft stands."""
    if isinstance(value, BaseMessage):
        same = value.id == getattr(draft, "id", None) if value.id else value == draft
        return released if same and isinstance(draft, BaseMessage) else value
    if isinstance(value, str):
        text = draft if isinstance(draft, str) else text_of(draft)
        return (released if isinstance(released, str) else text_of(released)) if value == text else value
    if isinstance(value, Mapping):
        return {key: replaced(item, draft, released) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, draft, released) for item in value]
    if isinstance(value, tuple):
        items = [replaced(item, draft, released) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
