"""No stream shows a draft, a critique or a rejected revision; tracers see every call."""

from __future__ import annotations

from typing import Any, TypedDict

import pytest
from langchain_core.messages import AnyMessage
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.graph import END, START, StateGraph
from replies import RULES, by_role, verdicts

from cai_graph import constitutional
from cai_graph.chain import ConstitutionalRunnable

CANARY = "CANARY-7f3a"
RELEASED = "a better answer"


def guarded() -> ConstitutionalRunnable[Any, Any]:
    """A wrapped model whose draft carries the canary and is revised."""
    critic = lambda messages: verdicts(*(["no-harm"] if CANARY in messages[-1].text else []))  # noqa: E731
    model = by_role(draft=f"{CANARY} is in the draft", critique=critic, revise=RELEASED)
    return constitutional(model, constitution=RULES, log=None)


class State(TypedDict):
    messages: list[AnyMessage]


def outer() -> Any:
    """An application's graph with the wrapped model in a node."""
    app = guarded()

    async def node(state: State) -> State:
        return {"messages": [await app.ainvoke(state["messages"])]}

    graph = StateGraph(State)
    graph.add_node("answer", node)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile()


async def test_astream_events_shows_no_draft_and_the_released_answer() -> None:
    events = [event async for event in guarded().astream_events("hello", version="v2")]

    assert CANARY not in str(events)
    assert RELEASED in str(events)


async def test_astream_and_stream_yield_the_released_answer_only() -> None:
    chunks = [chunk async for chunk in guarded().astream("hello")]
    chunks += list(guarded().stream("hello"))

    assert CANARY not in str(chunks)
    assert [chunk.content for chunk in chunks] == [RELEASED] * 2


@pytest.mark.parametrize("mode", ["values", "updates", "messages", "custom", "tasks"])
async def test_no_stream_mode_of_an_outer_graph_shows_a_draft(mode: Any) -> None:
    shown = [
        part
        async for part in outer().astream({"messages": [("user", "hello")]}, stream_mode=mode, subgraphs=True)
    ]

    assert CANARY not in str(shown)
    if mode == "messages":
        assert RELEASED in str(shown)


async def test_a_tracer_still_sees_every_inner_call() -> None:
    class Tracer(BaseTracer):
        runs: list[Run] = []  # noqa: RUF012 - one tracer, one test

        def _persist_run(self, run: Run) -> None:
            self.runs.append(run)

    tracer = Tracer()
    async for _ in guarded().astream_events("hello", {"callbacks": [tracer]}, version="v2"):
        pass

    def calls(run: Run) -> int:
        return (run.run_type == "llm") + sum(map(calls, run.child_runs))

    assert sum(map(calls, tracer.runs)) == 1 + 4  # the wrapped model's own run, and what it took
