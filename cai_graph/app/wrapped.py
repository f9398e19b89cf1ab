"""Reads how a wrapped app is configured and called, and how it answers, pauses or hands over.

    layers, graph_of …       the app inside its bindings (`.bind`, `.with_config`), and whether it is a graph
    config_of, step_limit …  a call's configuration, merged from the call, the bindings and an outer graph
    untyped, as_asked …      the output of a LangGraph graph in either version
    Paused, waits, resumes   interrupts, at which a graph waits for a person
    handed_over, handoff …   a graph that ends with a `Command` to its parent graph

No function here runs the app or changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import ensure_config, merge_configs, var_child_runnable_config
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp, ParentCommand
from langgraph.pregel import Pregel
from langgraph.types import Command, GraphOutput, Send

from cai_graph.concurrency.context import apart
from cai_graph.messages import from_langchain
from cai_graph.trajectory import Trajectory, shown_of

__all__ = [
    "CHECKPOINTER",
    "RESUMING",
    "STEPS",
    "STEP_LIMIT",
    "STREAM",
    "TASK",
    "HandedOver",
    "ParentCommand",
    "Paused",
    "as_asked",
    "call_options",
    "config_of",
    "configurable_of",
    "gives_chunks",
    "graph_of",
    "handed_over",
    "handoff",
    "is_graph",
    "is_pause",
    "layers",
    "memory_in",
    "names_given",
    "outer_writer",
    "resumes",
    "step_limit",
    "untyped",
    "waits",
    "without_words",
]

STREAM = "__pregel_stream"
"""Configuration key with which LangGraph passes an outer graph's stream to the graphs inside."""
CHECKPOINTER = "__pregel_checkpointer"
"""Configuration key with the outer graph's checkpointer."""
RESUMING = "__pregel_resuming"
"""Configuration key that is true if the outer graph was resumed, so that the graphs inside resume, too."""
TASK = "__pregel_task_id"
"""Configuration key with the id of the task that runs a node."""
STEPS = "checkpoint_map"
"""Configuration key with the checkpoints from which the graphs around a node continue."""
_PLACE = {"thread_id", "checkpoint_ns", "checkpoint_id", "checkpoint_map"}
"""Configuration keys that locate a graph's state in a checkpointer."""
STEP_LIMIT = 10_000
"""Maximum number of steps of a wrapped graph if nobody sets a limit; about LangGraph's own default."""


def layers(app: Runnable[Any, Any]) -> list[Any]:
    """Return an app and the runnables inside its bindings, the outermost first."""
    found: list[Any] = [app]
    while isinstance(found[-1], RunnableBindingBase):
        found.append(found[-1].bound)
    return found


def graph_of(app: Runnable[Any, Any]) -> Pregel[Any, Any, Any, Any] | None:
    """Return the compiled LangGraph graph inside an app's bindings; None if the app is not a graph."""
    innermost = layers(app)[-1]
    return innermost if isinstance(innermost, Pregel) else None


def is_graph(app: Runnable[Any, Any]) -> bool:
    """Return whether a wrapped app is a compiled LangGraph graph."""
    return graph_of(app) is not None


def names_given(app: Runnable[Any, Any]) -> list[str]:
    """Return the names of an app and of the runnables in its bindings, and the run names bound to it."""
    given = [getattr(layer, "name", None) for layer in layers(app)]
    bound = [config.get("run_name") for config in _bound_configs(app) if isinstance(config, Mapping)]
    return [str(name) for name in (*given, *bound) if name]


def memory_in(app: Runnable[Any, Any]) -> object:
    """Return a part of an app that has a memory, as far as its parts are visible; None if none has."""
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
            waiting += part.deps  # the runnables that its function refers to
    return None


# --- how it is called ---------------------------------------------------------------------------------


def call_options(app: Runnable[Any, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call of an app, including those that are bound to it."""
    bound = [binding.kwargs for binding in layers(app)[:-1]]
    return {name: value for each in (*reversed(bound), options) for name, value in each.items()}


def configurable_of(app: Runnable[Any, Any], config: RunnableConfig) -> dict[str, Any]:
    """Return the `configurable` values of a call, such as its thread, including those bound to the app."""
    configs = (*reversed(_bound_configs(app)), config)
    return {name: value for each in configs for name, value in (each.get("configurable") or {}).items()}


def config_of(app: Runnable[Any, Any], given: RunnableConfig | None) -> RunnableConfig:
    """Return a call's configuration, merged with that of an outer graph as the app itself would merge it.

    A graph inherits the outer graph's `configurable` values that the call does not set. It inherits none if
    the call, or a binding, sets where its own state is stored, such as a thread. The run name, tags and
    metadata that are bound to the app are included.
    """

    def named(config: RunnableConfig) -> RunnableConfig:
        names = ("run_name", "tags", "metadata")
        return cast("RunnableConfig", {name: value for name, value in config.items() if name in names})

    config = ensure_config(given)
    with apart():  # else LangChain merges the outer configuration over each of them
        own = ensure_config(given)
        if bound := [about for each in reversed(_bound_configs(app)) if (about := named(each))]:
            config |= named(merge_configs(*bound, named(config)))
    if is_graph(app):
        around = {} if _PLACE & configurable_of(app, own).keys() else _around().get("configurable") or {}
        config["configurable"] = {**around, **own["configurable"]}
    return config


def step_limit(app: Runnable[Any, Any], given: RunnableConfig | None) -> int | None:
    """Return the maximum number of steps of a graph; None if the app is not a graph.

    The limit of the caller's configuration comes first, then one bound to the graph, then an outer graph's,
    as without a constitution. `given` must be the caller's configuration as it was passed, since LangChain
    fills in a default that looks like a caller's limit.
    """
    if not is_graph(app):
        return None
    for config in (given or {}, *_bound_configs(app), _around()):
        if "recursion_limit" in config:
            return config["recursion_limit"]
    return STEP_LIMIT


def _bound_configs(app: Runnable[Any, Any]) -> list[RunnableConfig]:
    found = (getattr(layer, "config", None) for layer in layers(app))
    return [cast("RunnableConfig", config) for config in found if isinstance(config, Mapping)]


def _around() -> RunnableConfig:
    """Return the configuration in LangChain's context variable, such as an outer graph's; empty if unset."""
    return var_child_runnable_config.get() or {}


def outer_writer() -> Callable[[Any], None] | None:
    """Return the writer of the `custom` stream of the graph whose node calls this; None outside a node."""
    try:
        return get_stream_writer()
    except (KeyError, RuntimeError):
        return None


# --- how it answers -----------------------------------------------------------------------------------


def gives_chunks(app: Runnable[Any, Any], options: Mapping[str, Any]) -> bool:
    """Return whether `invoke` with these options returns a list of chunks (any stream mode but `values`)."""
    return is_graph(app) and call_options(app, options).get("stream_mode", "values") != "values"


def untyped(output: Any) -> Any:
    """Return a graph's output in version 1 of LangGraph's output format; version 2 is converted."""
    if not isinstance(output, GraphOutput):
        return output
    return {**output.value, "__interrupt__": [*output.interrupts]} if output.interrupts else output.value


def as_asked(output: Any, app: Runnable[Any, Any], options: Mapping[str, Any]) -> Any:
    """Return a graph's output in the version of LangGraph's output format that its caller asks for."""
    if (
        call_options(app, options).get("version") != "v2"
        or not is_graph(app)
        or isinstance(output, GraphOutput)
    ):
        return output
    interrupts = output.get("__interrupt__", ()) if isinstance(output, Mapping) else ()
    if interrupts:
        output = {key: value for key, value in output.items() if key != "__interrupt__"}
    return GraphOutput(value=output, interrupts=tuple(interrupts))


# --- how it pauses ------------------------------------------------------------------------------------


class Paused(GraphBubbleUp):
    """Raised when the wrapped app waits for a person: nothing is judged or logged until it is resumed."""


def waits(output: object) -> bool:
    """Return whether an output, or a chunk of a stream, contains an interrupt: the app waits for a person."""
    return isinstance(output, Mapping) and "__interrupt__" in output


def is_pause(error: BaseException | None) -> bool:
    """Return whether an exception is not a failure: the app waits for a person, or hands over."""
    return isinstance(error, GraphBubbleUp)


def resumes(input: object, app: Runnable[Any, Any]) -> bool:
    """Return whether an input resumes a paused app: a `Command`, or for a graph at a breakpoint also None."""
    return isinstance(input, Command) or (input is None and is_graph(app))


# --- how it hands over --------------------------------------------------------------------------------

_HANDOFF = "__handoff__"
"""Key in the update of a handoff with the target graph and the nodes at which it continues."""


def handed_over(error: BaseException | None) -> dict[str, Any] | None:
    """Return the update that a graph passes to its outer graph in place of an output, with its targets.

    None if the error is not a handoff, or its update is not a dict with an AI message, or the last AI message
    has no text: then there is nothing to judge.
    """
    if not isinstance(error, ParentCommand):
        return None
    command = error.args[0]
    given = command.update if isinstance(command.update, Mapping) else {}
    update = {key: _as_messages(value) for key, value in given.items()}
    said = [each for value in update.values() for each in (value if isinstance(value, list) else [value])]
    by_model = [each for each in said if isinstance(each, AIMessage)]
    if not by_model or not shown_of(from_langchain(by_model[-1])).strip():
        return None
    goto = [
        {"node": way.node, "arg": way.arg, "timeout": way.timeout} if isinstance(way, Send) else way
        for way in _ways(command)
    ]
    return {**update, _HANDOFF: {"graph": command.graph, "goto": goto}}


class HandedOver(ParentCommand):
    """A handoff to the outer graph, raised like a `ParentCommand`, whose update has the released answer."""

    def __init__(self, command: Command[Any], output: Any, trajectory: Trajectory) -> None:
        super().__init__(command)
        self.output, self.trajectory = output, trajectory


def handoff(output: Any, trajectory: Trajectory) -> HandedOver | None:
    """Return the handoff to raise for an output made by `handed_over`; None for any other output."""
    if not isinstance(output, Mapping) or _HANDOFF not in output:
        return None
    update = {key: value for key, value in output.items() if key != _HANDOFF}
    to = output[_HANDOFF]
    goto = [way if isinstance(way, str) else Send(**way) for way in to["goto"]]
    return HandedOver(Command(graph=to["graph"], update=update, goto=goto), output, trajectory)


def without_words(output: Any) -> Any:
    """Return a tool's output for readers of events: commands without AI messages and `Send` arguments."""
    if isinstance(output, list):
        return [without_words(each) for each in output]
    if not isinstance(output, Command):
        return output
    update: dict[str, Any] = {}
    for key, value in (output.update if isinstance(output.update, Mapping) else {}).items():
        if isinstance(value, list):
            update[key] = [each for each in _as_messages(value) if not isinstance(each, AIMessage)]
        elif not isinstance(value, AIMessage):
            update[key] = value
    goto = [way.node if isinstance(way, Send) else way for way in _ways(output)]
    return replace(output, update=update, goto=output.goto if isinstance(output.goto, str) else goto)


def _ways(command: Command[Any]) -> list[Any]:
    """Return the targets of a command as a list."""
    return [*command.goto] if isinstance(command.goto, list | tuple) else [command.goto]


def _as_messages(value: Any) -> Any:
    """Return a value; in a list with messages, those given in another form, such as dicts, are converted."""
    known = isinstance(value, list) and any(isinstance(each, BaseMessage) for each in value)
    return convert_to_messages(value) if known else value
