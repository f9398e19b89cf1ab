"""What is known of a wrapped app: what is bound to it, and of a LangGraph graph how it is called, how it
answers, how it pauses and how it hands over. Also how a graph that stands around is written to.
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
"""Key of a configuration under which LangGraph hands an outer graph's stream to the graphs inside."""
CHECKPOINTER = "__pregel_checkpointer"
"""Key under which it hands them the checkpointer that keeps it."""
RESUMING = "__pregel_resuming"
"""Key under which it tells them that it was resumed, and so they go on, too."""
TASK = "__pregel_task_id"
"""Key under which it tells a node of its task."""
STEPS = "checkpoint_map"
"""Key under which it tells a node from which checkpoints the graphs around it go on."""
_PLACE = {"thread_id", "checkpoint_ns", "checkpoint_id", "checkpoint_map"}
"""Keys under which a call says where in a checkpointer a graph keeps its state."""
STEP_LIMIT = 10_000
"""How many steps a wrapped graph may take, unless its caller says: what LangGraph itself allows."""


def layers(app: Runnable[Any, Any]) -> list[Any]:
    """Return an app and what is inside its bindings, the outermost first."""
    found: list[Any] = [app]
    while isinstance(found[-1], RunnableBindingBase):
        found.append(found[-1].bound)
    return found


def graph_of(app: Runnable[Any, Any]) -> Pregel[Any, Any, Any, Any] | None:
    """Return the compiled LangGraph graph that an app is, whatever is bound to it; None where it is none."""
    innermost = layers(app)[-1]
    return innermost if isinstance(innermost, Pregel) else None


def is_graph(app: Runnable[Any, Any]) -> bool:
    """Return whether a wrapped app is a compiled LangGraph graph."""
    return graph_of(app) is not None


def names_given(app: Runnable[Any, Any]) -> list[str]:
    """Return the names that an app was given, and those that are bound to it for its runs."""
    given = [getattr(layer, "name", None) for layer in layers(app)]
    bound = [config.get("run_name") for config in _bound_configs(app) if isinstance(config, Mapping)]
    return [str(name) for name in (*given, *bound) if name]


def memory_in(app: Runnable[Any, Any]) -> object:
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


# --- how it is called ---------------------------------------------------------------------------------


def call_options(app: Runnable[Any, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call of an app, those that are bound to it included."""
    bound = [binding.kwargs for binding in layers(app)[:-1]]
    return {name: value for each in (*reversed(bound), options) for name, value in each.items()}


def configurable_of(app: Runnable[Any, Any], config: RunnableConfig) -> dict[str, Any]:
    """Return what a call of an app is configured with, such as its thread, what is bound to it included."""
    configs = (*reversed(_bound_configs(app)), config)
    return {name: value for each in configs for name, value in (each.get("configurable") or {}).items()}


def config_of(app: Runnable[Any, Any], given: RunnableConfig | None) -> RunnableConfig:
    """Return a call's configuration with what stands around it, as the app itself would have it.

    A graph that is called, or bound, to keep its state in a place of its own has nothing to do with where the
    graph around keeps its own; another one has what its caller leaves open. The name, tags and metadata that
    are bound to an app are the call's, too.
    """

    def told(config: RunnableConfig) -> RunnableConfig:
        names = ("run_name", "tags", "metadata")
        return cast("RunnableConfig", {name: value for name, value in config.items() if name in names})

    config = ensure_config(given)
    with apart():  # else LangChain merges what stands around over each of them
        own = ensure_config(given)
        config |= told(merge_configs(*map(told, reversed(_bound_configs(app))), told(config)))
    if is_graph(app):
        around = {} if _PLACE & configurable_of(app, own).keys() else _around().get("configurable") or {}
        config["configurable"] = {**around, **own["configurable"]}
    return config


def step_limit(app: Runnable[Any, Any], given: RunnableConfig | None) -> int | None:
    """Return how many steps a graph may take; None where an app is none.

    `given` is what its caller gave, as it was given: LangChain fills in a limit that looks like a caller's.
    Next to say is what is bound to the graph, then what stands around it, as without a constitution.
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
    """Return the configuration that LangChain and LangGraph carry to this place; empty where they do not."""
    return var_child_runnable_config.get() or {}


def outer_writer() -> Callable[[Any], None] | None:
    """Return what writes to the `custom` stream of the graph in whose node this is called; None outside."""
    try:
        return get_stream_writer()
    except (KeyError, RuntimeError):
        return None


# --- how it answers -----------------------------------------------------------------------------------


def gives_chunks(app: Runnable[Any, Any], options: Mapping[str, Any]) -> bool:
    """Return whether an `invoke` with these options returns what a graph streams: all modes but one do."""
    return is_graph(app) and call_options(app, options).get("stream_mode", "values") != "values"


def untyped(output: Any) -> Any:
    """Return what a graph returns, version 2 of LangGraph's outputs as version 1."""
    if not isinstance(output, GraphOutput):
        return output
    return {**output.value, "__interrupt__": [*output.interrupts]} if output.interrupts else output.value


def as_asked(output: Any, app: Runnable[Any, Any], options: Mapping[str, Any]) -> Any:
    """Return the output of a graph in the version that its caller asks for."""
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
    """The wrapped app waits for a person: nothing is judged or logged until it is resumed."""


def waits(output: object) -> bool:
    """Return whether an output, or a chunk of a stream, says that the app waits for a person."""
    return isinstance(output, Mapping) and "__interrupt__" in output


def is_pause(error: BaseException | None) -> bool:
    """Return whether an error says that nothing failed: an app waits for a person, or hands over."""
    return isinstance(error, GraphBubbleUp)


def resumes(input: object, app: Runnable[Any, Any]) -> bool:
    """Return whether an input resumes what was paused; from a breakpoint a graph goes on with None."""
    return isinstance(input, Command) or (input is None and is_graph(app))


# --- how it hands over --------------------------------------------------------------------------------

_HANDOFF = "__handoff__"
"""Under which key the update of a handoff says where the outer graph goes on."""


def handed_over(error: BaseException | None) -> dict[str, Any] | None:
    """Return the update that a graph hands to the graph around it, in the place of an output.

    None where an error is no handoff, its update no dict with an AI message, or the last one of these has no
    words: then nothing is to be judged.
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
    """Hands an update over with what leaves."""

    def __init__(self, command: Command[Any], output: Any, trajectory: Trajectory) -> None:
        super().__init__(command)
        self.output, self.trajectory = output, trajectory


def handoff(output: Any, trajectory: Trajectory) -> HandedOver | None:
    """Return what hands such an update over; None where an output is none."""
    if not isinstance(output, Mapping) or _HANDOFF not in output:
        return None
    update = {key: value for key, value in output.items() if key != _HANDOFF}
    to = output[_HANDOFF]
    goto = [way if isinstance(way, str) else Send(**way) for way in to["goto"]]
    return HandedOver(Command(graph=to["graph"], update=update, goto=goto), output, trajectory)


def without_words(output: Any) -> Any:
    """Return what a tool returned as readers may be told of it: a command without what a model said."""
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
    """Return where a command goes on, in one way or several."""
    return [*command.goto] if isinstance(command.goto, list | tuple) else [command.goto]


def _as_messages(value: Any) -> Any:
    """Return a list with messages in it as a state will have it: those that are told as dicts, too."""
    known = isinstance(value, list) and any(isinstance(each, BaseMessage) for each in value)
    return convert_to_messages(value) if known else value
