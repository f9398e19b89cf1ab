"""Which words in a thread of a graph's memory nobody was given, since the run that said them came to nothing.

A run that breaks off behind its draft leaves it in the thread, and so does one that ends while its request is
cancelled. What may have been given to somebody stays, and so does what the thread's owner wrote. This only
reads; a refusal is put into the place of what is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from langchain_core.messages import HumanMessage

from cai_graph.app.shape import Shape, Swap
from cai_graph.memory.memory import Memory

__all__ = ["beside", "broken_off", "just_said"]


async def broken_off(
    memory: Memory, state: Any, shape: Shape, refusal: str, options: Mapping[str, Any]
) -> list[Swap]:
    """Return what puts a refusal into the place of what the last run said since anybody heard of it.

    There is nothing where that run did not break off, and nothing that has been written over since.

    Args:
        memory: the thread.
        state: its last state.
        shape: where in a state an answer is.
        refusal: what to put there.
        options: those of the call, with those that are bound to the graph.
    """
    if not state.next and _writer(state) not in ("update", "fork"):  # its owner may have closed it by hand
        return []
    last = state if _writer(state) in ("loop", "input") else await memory.last_of_a_run()
    if last is None:
        return []
    past = await memory.state(last.config)  # as it was written: a thread's last state is shown otherwise
    if await _was_shown(memory, past, options):
        return []
    while past is not None and _writer(past) == "loop":
        past = await memory.state(past.parent_config) if past.parent_config else None
        if past is not None and await _was_shown(memory, past, options):
            break
    swaps = [each for each in _unjudged(memory, last, shape, refusal) if _holds(state, each)]
    if past is not None and _writer(past) is not None:
        return beside(swaps, [past])
    opened = [each for each in swaps if _is_opened(state, each)]
    if len(opened) < len(swaps):
        memory.stays("what it found there is not kept")
    return opened


async def just_said(memory: Memory, met: Sequence[Any], shape: Shape, refusal: str) -> list[Swap]:
    """Return what puts a refusal into the place of what a run said that has just ended, where one did.

    Args:
        memory: the thread.
        met: its states before.
        shape: where in a state an answer is.
        refusal: what to put there.
    """
    state = await memory.state()
    if state.next or _writer(state) != "loop" or _checkpoint(state) in map(_checkpoint, met):
        return []
    return _unjudged(memory, state, shape, refusal)


def beside(swaps: Sequence[Swap], known: Sequence[Any]) -> list[Swap]:
    """Return those of which no known state holds the draft, and which leave alone what these states have."""
    new = [swap for swap in swaps if not any(_holds(state, swap) for state in known)]
    return [reduce(lambda swap, state: swap.sparing(state.values), known, swap) for swap in new]


async def _was_shown(memory: Memory, state: Any, options: Mapping[str, Any]) -> bool:
    """Return whether a run came to its caller with a state: it ended there, or was to go on later.

    It was not where one branch waits for a person and another one failed.
    """
    if not state.next or await _is_at_breakpoint(memory, state, options):
        return True
    return bool(state.interrupts) and not any(task.error and not task.interrupts for task in state.tasks)


async def _is_at_breakpoint(memory: Memory, state: Any, options: Mapping[str, Any]) -> bool:
    """Return whether a state may be one at which the graph stops by itself, under a call's options."""
    before = options.get("interrupt_before") or memory.graph.interrupt_before_nodes
    after = options.get("interrupt_after") or memory.graph.interrupt_after_nodes
    if _has_any(before, state.next):
        return True
    if not after:
        return False
    parent = await memory.state(state.parent_config) if state.parent_config else None
    if parent is None or not parent.metadata or parent.metadata["step"] + 1 != state.metadata["step"]:
        return True  # which node ran last is not kept
    return _has_any(after, parent.next)


def _unjudged(memory: Memory, state: Any, shape: Shape, refusal: str) -> list[Swap]:
    """Return `Shape.unjudged` of what the graph returns of a state."""
    if isinstance(memory.graph.stream_channels_asis, str):  # it has one value, and returns that
        return shape.unjudged(state.values, None, refusal)
    shown = memory.graph.output_channels
    return shape.unjudged(state.values, [shown] if isinstance(shown, str) else shown, refusal)


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


def _is_opened(state: Any, swap: Swap) -> bool:
    """Return whether the turn of a draft in a state is told from those before by what the user says."""
    found = state.values[swap.key] if isinstance(state.values, Mapping) else state.values
    return isinstance(found, list) and any(isinstance(each, HumanMessage) for each in found)


def _has_any(nodes: str | Sequence[str], names: Sequence[str]) -> bool:
    """Return whether there is one of these nodes among the names; LangGraph has `*` for all of them."""
    return bool(names) and (nodes == "*" or not set(nodes).isdisjoint(names))
