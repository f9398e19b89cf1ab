"""Buffers a graph's stream until its answer is judged, then replays it with the released answer.

LangGraph streams states, updates, tokens and more, in the modes that the caller requests. All chunks are
recorded while the graph runs. In `messages` mode only tokens of messages that remain in the final state are
replayed, as other models of the graph may have written drafts. If another answer than the draft is released,
the draft's message and its copies are replaced everywhere, and the `custom` stream, which may contain
anything, is omitted. If a person is asked about the answer, only the question is streamed; when the decision
arrives, which takes no run of the graph, only the released answer is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.runnables import Runnable

from cai_graph.app.shape import Shape, leaves
from cai_graph.app.streams import whole_chunk
from cai_graph.app.wrapped import call_options, graph_of, waits
from cai_graph.trajectory import Trajectory

__all__ = ["Held"]


class _Part(NamedTuple):
    """A recorded chunk of a graph's stream."""

    chunk: Any
    """The chunk as LangGraph streamed it."""
    path: tuple[str, ...]
    """Path of the subgraph that streamed it; empty for the graph itself."""
    mode: str
    data: Any


class Held:
    """The recorded stream of a graph.

    Args:
        app: the compiled graph, or a binding of it.
        options: the caller's options for `stream`, such as `stream_mode` and `subgraphs`.
    """

    def __init__(self, app: Runnable[Any, Any], options: Mapping[str, Any]) -> None:
        compiled, options = graph_of(app), call_options(app, options)
        assert compiled is not None
        asked = options.get("stream_mode") or compiled.stream_mode
        self._listed = not isinstance(asked, str)
        self._asked: list[str] = [asked] if isinstance(asked, str) else list(asked)
        self._typed = options.get("version") == "v2"
        self._subgraphs = bool(options.get("subgraphs"))
        modes = [*self._asked, *({"values", "updates"} - set(self._asked))]
        self.options = {**options, "stream_mode": modes}
        """The options to pass to the graph's `stream`."""
        self._parts: list[_Part] = []
        self._state: Any = None
        self._interrupts: list[Any] = []

    @property
    def output(self) -> Any:
        """The output that the graph's `invoke` would have returned."""
        if self._interrupts:
            return {**(self._state or {}), "__interrupt__": self._interrupts}
        return self._state

    def take(self, chunk: Any) -> None:
        """Record a chunk of the graph's stream."""
        if self._typed:
            part = _Part(chunk, tuple(chunk["ns"]), chunk["type"], chunk["data"])
        else:
            path = tuple(chunk[0]) if self._subgraphs else ()
            part = _Part(chunk, path, chunk[-2], chunk[-1])
        self._parts.append(part)
        if part.path:
            return
        if part.mode == "values":
            self._state = part.data
        elif part.mode == "updates" and isinstance(part.data, Mapping):
            self._interrupts += part.data.get("__interrupt__", ())

    def replay(self, shape: Shape, output: Any, trajectory: Trajectory | None) -> Iterator[Any]:
        """Yield the recorded chunks, in the modes and form that the caller requested.

        Args:
            shape: where the answer is in the output.
            output: the released output; without a trajectory, the output of a pause for a person.
            trajectory: the record; None if the request waits for a person.
        """
        parts = [part for part in self._parts if part.mode in self._asked]
        if trajectory is None and (self._interrupts or not waits(output)):  # the graph itself paused
            yield from (self._as_asked(part, part.data) for part in parts)
            return
        if trajectory is None:
            question = {"__interrupt__": tuple(output["__interrupt__"])}
            yield from self._made({"updates": question, "values": question})
            return
        if not self._parts:  # a person's decision was settled without a run
            yield from self._made(_decided(shape, output))
            return
        swap = shape.swap(self.output, output)
        released = swap.released
        stays = {message.id for message in _messages(output)}
        kept, shown = trajectory.released_from == "draft", False
        said = () if kept else _messages(self.output)
        replaced = {message.id: new for message in said if (new := swap(message)) is not message}
        tokens = [] if isinstance(released, ToolMessage) else [part for part in parts if _is_token(part)]
        last = tokens[-1] if tokens else None
        told: set[str | None] = set()
        for part in parts:
            data = part.data
            if part.mode == "messages":
                message, about = data
                if isinstance(message, AIMessage) and message.id not in stays:
                    if shown or part is not last:
                        continue
                    data = (_chunk(released), about)  # this answer's tokens have another id, or none
                elif message.id in replaced:
                    if message.id in told:
                        continue
                    told.add(message.id)
                    data = (_chunk(replaced[message.id]), about)
                elif not kept:
                    data = (swap(message), about)
                shown = shown or data[0].id == _id(released) or part is last
            elif part.mode == "custom" and not kept:
                continue
            else:
                data = swap(data)
            yield self._as_asked(part, data)

    def _made(self, by_mode: Mapping[str, Any]) -> Iterator[Any]:
        """Yield chunks that no run of the graph streamed, in the modes that the caller requested."""
        for mode in filter(by_mode.__contains__, self._asked):
            data, chunk = by_mode[mode], {"type": mode, "ns": ()}
            if self._typed and mode == "values":  # v2 chunks have interrupts beside the state
                chunk["interrupts"], data = (data["__interrupt__"], {}) if waits(data) else ((), data)
            yield self._as_asked(_Part(chunk, (), mode, data), data)

    def _as_asked(self, part: _Part, data: Any) -> Any:
        if self._typed:
            return {**part.chunk, "data": data}
        told: list[Any] = [part.path] if self._subgraphs else []
        told += [part.mode] if self._listed else []
        return (*told, data) if told else data


def _decided(shape: Shape, output: Any) -> dict[str, Any]:
    """Return the chunks for an output about which a person decided, by mode.

    They look like the output of a node named `review`.
    """
    answer, update = shape.answer_in(output), output
    if isinstance(output, Mapping):
        key = shape.output_in(output)
        update = {key: [answer] if isinstance(output[key], list) else output[key]}
    about = {"langgraph_node": "review"}
    return {"messages": (_chunk(answer), about), "updates": {"review": update}, "values": output}


def _is_token(part: _Part) -> bool:
    return part.mode == "messages" and isinstance(part.data[0], AIMessage)


def _id(answer: str | BaseMessage) -> str | None:
    return answer.id if isinstance(answer, BaseMessage) else None


def _chunk(answer: str | BaseMessage) -> BaseMessage:
    return whole_chunk(AIMessage(answer) if isinstance(answer, str) else answer)


def _messages(value: Any) -> Iterator[BaseMessage]:
    return (each for each in leaves(value) if isinstance(each, BaseMessage))
