"""A wrapped graph streams what it streams by itself, with what is released in the answer's place."""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from replies import RULES, answer_in, by_role, role_of, verdicts

from cai_graph import ScriptedModel, constitutional

CANARY = "CANARY-7f3a"
SAFE, UNSAFE, MENDED = "It is four.", f"It is unsafe {CANARY}.", "It is better so."
ASK: dict[str, Any] = {"messages": [HumanMessage("What is two and two?", id="q")]}
ALL = ["values", "updates", "messages", "custom", "tasks", "debug"]


def judge() -> ScriptedModel:
    def critique(messages: list[BaseMessage]) -> str:
        return verdicts(*(["no-harm"] if "unsafe" in answer_in(messages) else []))

    return by_role(draft="never asked", critique=critique, revise=MENDED)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Agent(ScriptedModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def agent(answer: str) -> Any:
    call = {"name": "add", "args": {"a": 2, "b": 2}, "id": "c1", "type": "tool_call"}

    def reply(messages: list[BaseMessage]) -> AIMessage:
        if isinstance(messages[-1], ToolMessage):
            return AIMessage(answer, id="a")
        return AIMessage("Let me add.", tool_calls=[call], id="t")  # type: ignore[list-item]

    return create_agent(Agent(replies=reply), tools=[add])


def guarded(app: Any, **settings: Any) -> Any:
    model = judge()
    return constitutional(app, critic=model, reviser=model, constitution=RULES, log=None, **settings)


def streamed(app: Any, input: Any, **options: Any) -> list[Any]:
    return list(app.stream(input, **options))


def astreamed(app: Any, input: Any, **options: Any) -> list[Any]:
    async def collect() -> list[Any]:
        return [chunk async for chunk in app.astream(input, **options)]

    return asyncio.run(collect())


def plain(value: Any) -> Any:
    """What a stream shows, without ids, times and metadata that each run makes anew."""
    if isinstance(value, BaseMessage):
        calls = getattr(value, "tool_calls", None)
        return type(value).__name__.removesuffix("Chunk"), value.text, calls
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], BaseMessage):
        return plain(value[0]), value[1]["langgraph_node"]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@pytest.mark.parametrize("draw", [streamed, astreamed])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_mode": "values"},
        {"stream_mode": "messages"},
        {"stream_mode": ["updates", "messages"]},
        {"stream_mode": ["values"], "subgraphs": True},
        {"stream_mode": "updates", "subgraphs": True},
    ],
)
def test_a_kept_answer_is_streamed_as_the_graph_streams_it(draw: Any, options: dict[str, Any]) -> None:
    bare, wrapped = draw(agent(SAFE), ASK, **options), draw(guarded(agent(SAFE)), ASK, **options)

    assert plain(wrapped) == plain(bare)


def test_the_typed_parts_of_version_2_stay_typed() -> None:
    options = {"stream_mode": ["updates", "values"], "version": "v2"}

    parts = streamed(guarded(agent(UNSAFE)), ASK, **options)

    assert [part["type"] for part in parts] == [
        part["type"] for part in streamed(agent(UNSAFE), ASK, **options)
    ]
    assert parts[-1]["data"]["messages"][-1].text == MENDED
    assert CANARY not in repr(parts)


@pytest.mark.parametrize("draw", [streamed, astreamed])
def test_a_revised_answer_stands_wherever_the_draft_stood(draw: Any) -> None:
    parts = draw(guarded(agent(UNSAFE)), ASK, stream_mode=ALL, subgraphs=True)

    assert CANARY not in repr(parts)
    by_mode = {mode: [data for _, told, data in parts if told == mode] for mode in ALL}
    assert by_mode["values"][-1]["messages"][-1].text == MENDED
    assert by_mode["updates"][-1]["model"]["messages"][0].text == MENDED
    texts = [(chunk.text, about["langgraph_node"]) for chunk, about in by_mode["messages"] if chunk.text]
    assert texts[-2:] == [("4", "tools"), (MENDED, "model")]
    assert "".join(text for text, _ in texts[:-2]) == "Let me add."


def test_an_answer_that_is_a_text_in_the_state_is_replaced_too() -> None:
    class State(TypedDict, total=False):
        question: str
        answer: str

    writer = ScriptedModel(replies=lambda messages: UNSAFE)

    def node(state: State) -> State:
        get_stream_writer()({"token": UNSAFE})
        return {"answer": writer.invoke(state["question"]).text}

    built = StateGraph(State)
    built.add_node("answer", node)
    built.add_edge(START, "answer")
    built.add_edge("answer", END)

    parts = streamed(guarded(built.compile()), {"question": "?"}, stream_mode=ALL)

    assert CANARY not in repr(parts)
    assert ("updates", {"answer": {"answer": MENDED}}) in parts
    assert [data[0].text for mode, data in parts if mode == "messages"] == [MENDED]
    assert not [data for mode, data in parts if mode == "custom"], "it could hold anything"


def test_tokens_of_other_models_in_the_graph_are_not_told() -> None:
    thinker = ScriptedModel(replies=lambda messages: f"a thought, {CANARY}")

    def think(state: MessagesState) -> dict[str, Any]:
        thinker.invoke("think")
        return {"messages": [AIMessage(SAFE, id="a")]}

    built = StateGraph(MessagesState)
    built.add_node("answer", think)
    built.add_edge(START, "answer")
    built.add_edge("answer", END)

    parts = streamed(guarded(built.compile()), ASK, stream_mode="messages")

    assert [chunk.text for chunk, _ in parts] == [SAFE]


def test_a_graph_that_pauses_streams_its_pause_and_is_judged_when_it_is_resumed() -> None:
    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [AIMessage(f"{interrupt('sure?')}, {UNSAFE}", id="a")]}

    built = StateGraph(MessagesState)
    built.add_node("answer", node)
    built.add_edge(START, "answer")
    built.add_edge("answer", END)
    app = guarded(built.compile(checkpointer=InMemorySaver()))
    thread = {"configurable": {"thread_id": "1"}}

    paused = streamed(app, ASK, config=thread)
    resumed = streamed(app, Command(resume="yes"), config=thread)

    assert paused[-1]["__interrupt__"][0].value == "sure?"
    assert resumed[-1]["answer"]["messages"][0].text == MENDED
    assert [role_of(messages) for messages in app.plan.reviser.calls] == ["critique", "revise", "critique"]
