"""Finds drafts in a thread of a graph's memory that were never returned to a caller, as their run failed.

A run that fails after its draft was written leaves the draft in the thread, and so does a run that ends while
its request is cancelled. The functions here find such drafts and return swaps that replace them by a refusal;
they change nothing themselves. Anything that may have been returned to a caller, or that the thread's owner
wrote, is left unchanged.
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
    """Return swaps that put a refusal in the place of what the last run wrote and did not return to a caller.

    The list is empty if that run did not fail. Texts that were overwritten since are not included.

    Args:
        memory: the thread.
        state: its last state.
        shape: where in a state an answer is.
        refusal: the text of the refusal.
        options: the options of the call, including those bound to the graph.
    """
    if not state.next and _writer(state) not in ("update", "fork"):  # its owner may have ended it so
        return []
    last = state if _writer(state) in ("loop", "input") else await memory.last_of_a_run()
    if last is None:
        return []
    past = await memory.state(last.config)  # as written: a thread's last state looks different
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
    """Return swaps that put a refusal in the place of the answer of a run that has just ended, if one has.

    Args:
        memory: the thread.
        met: the states of the thread that were read before the run.
        shape: where in a state an answer is.
        refusal: the text of the refusal.
    """
    state = await memory.state()
    if state.next or _writer(state) != "loop" or _checkpoint(state) in map(_checkpoint, met):
        return []
    return _unjudged(memory, state, shape, refusal)


def beside(swaps: Sequence[Swap], known: Sequence[Any]) -> list[Swap]:
    """Return the swaps whose draft no known state contains; they do not change these states' messages."""
    new = [swap for swap in swaps if not any(_holds(state, swap) for state in known)]
    return [reduce(lambda swap, state: swap.sparing(state.values), known, swap) for swap in new]


async def _was_shown(memory: Memory, state: Any, options: Mapping[str, Any]) -> bool:
    """Return whether a run returned to its caller at a state: it ended there, or paused there.

    It did not if one branch waits for a person and another one failed.
    """
    if not state.next or await _is_at_breakpoint(memory, state, options):
        return True
    return bool(state.interrupts) and not any(task.error and not task.interrupts for task in state.tasks)


async def _is_at_breakpoint(memory: Memory, state: Any, options: Mapping[str, Any]) -> bool:
    """Return whether the graph may have stopped at a state by a breakpoint, given a call's options."""
    before = options.get("interrupt_before") or memory.graph.interrupt_before_nodes
    after = options.get("interrupt_after") or memory.graph.interrupt_after_nodes
    if _has_any(before, state.next):
        return True
    if not after:
        return False
    parent = await memory.state(state.parent_config) if state.parent_config else None
    if parent is None or not parent.metadata or parent.metadata["step"] + 1 != state.metadata["step"]:
        return True  # it is not known which node ran last
    return _has_any(after, parent.next)


def _unjudged(memory: Memory, state: Any, shape: Shape, refusal: str) -> list[Swap]:
    """Return `Shape.unjudged` for the part of a state that the graph returns."""
    if isinstance(memory.graph.stream_channels_asis, str):  # its state is a single value, which it returns
        return shape.unjudged(state.values, None, refusal)
    shown = memory.graph.output_channels
    return shape.unjudged(state.values, [shown] if isinstance(shown, str) else shown, refusal)


def _writer(state: Any) -> Any:
    """Return the source that wrote a state: `input` or `loop` (a run), `update`, `fork`; None if unknown."""
    return state.metadata and state.metadata.get("source")


def _checkpoint(state: Any) -> Any:
    return state.config["configurable"].get("checkpoint_id")


def _holds(state: Any, swap: Swap) -> bool:
    """Return whether a state contains a swap's draft verbatim."""
    values = state.values
    if not isinstance(values, Mapping):
        places = [values]
    else:
        places = [values[swap.key]] if swap.key in values else [*values.values()]
    return any(swap.draft in each if isinstance(each, list) else swap.draft == each for each in places)


def _is_opened(state: Any, swap: Swap) -> bool:
    """Return whether a user's message in the state marks where the draft's turn begins."""
    found = state.values[swap.key] if isinstance(state.values, Mapping) else state.values
    return isinstance(found, list) and any(isinstance(each, HumanMessage) for each in found)


def _has_any(nodes: str | Sequence[str], names: Sequence[str]) -> bool:
    """Return whether any of the nodes is among the names; `*` is LangGraph's wildcard for all nodes."""
    return bool(names) and (nodes == "*" or not set(nodes).isdisjoint(names))
