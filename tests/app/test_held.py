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


# --- a person decides ---------------------------------------------------------------------------------

THREAD: Any = {"configurable": {"thread_id": "1"}}
MODES: list[Any] = [None, "values", "updates", "messages", ["messages", "updates", "values"]]


def asking(app: Any) -> Any:
    """The app under a policy that has a person decide about what is unsafe."""
    return guarded(app, on_violation="human", max_rounds=0, checkpointer=InMemorySaver())


def invoked(app: Any, input: Any, **options: Any) -> list[Any]:
    """What `invoke` returns: the chunks of a stream, in all modes but `values`."""
    output = app.invoke(input, **options)
    return output if isinstance(output, list) else [output]


@pytest.mark.parametrize("draw", [streamed, astreamed, invoked])
@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_while_a_person_is_asked_a_stream_shows_the_question_and_nothing_else(
    draw: Any, remembers: bool, mode: Any
) -> None:
    agents = agent(UNSAFE)
    agents.checkpointer = InMemorySaver() if remembers else None
    options = {"config": THREAD} if mode is None else {"config": THREAD, "stream_mode": mode}

    parts = draw(asking(agents), ASK, **options)

    shown = [part[1] if isinstance(mode, list) else part for part in parts]
    assert len(shown) == (2 if isinstance(mode, list) else mode != "messages"), "as LangGraph tells a pause"
    for part in shown:
        (pause,) = part["__interrupt__"]
        assert list(part) == ["__interrupt__"]
        assert pause.value["draft"] == UNSAFE


def test_a_question_is_typed_where_version_2_is_asked_for() -> None:
    options = {"stream_mode": ["updates", "values"], "version": "v2"}

    update, value = streamed(asking(agent(UNSAFE)), ASK, config=THREAD, **options)

    assert (update["type"], update["ns"], list(update["data"])) == ("updates", (), ["__interrupt__"])
    assert (value["type"], value["data"], len(value["interrupts"])) == ("values", {}, 1)


async def test_events_show_the_question_and_nothing_of_the_run() -> None:
    app = asking(agent(UNSAFE))

    events = [event async for event in app.astream_events(ASK, THREAD, version="v2")]

    chunks = [event["data"]["chunk"] for event in events if event["event"] == "on_chain_stream"]
    assert chunks
    assert all(list(chunk) == ["__interrupt__"] for chunk in chunks)


@pytest.mark.parametrize("draw", [streamed, astreamed, invoked])
@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_brings_the_decision_shows_what_leaves(draw: Any, remembers: bool, mode: Any) -> None:
    agents = agent(UNSAFE)
    agents.checkpointer = InMemorySaver() if remembers else None
    app = asking(agents)
    options = {"config": THREAD} if mode is None else {"config": THREAD, "stream_mode": mode}
    app.invoke(ASK, THREAD)

    parts = draw(app, Command(resume={"decision": "reject"}), **options)

    assert CANARY not in repr(parts)
    told = [part if isinstance(mode, list) else (mode or "updates", part) for part in parts]
    if draw is invoked and mode is None:
        told = [("values", parts[0])]
    assert {kind for kind, _ in told} == set(mode if isinstance(mode, list) else [told[0][0]])
    for kind, part in told:
        if kind == "messages":
            assert (part[0].text, part[1]["langgraph_node"]) == (RULES.refusal, "review")
        elif kind == "updates":
            assert [m.text for m in part["review"]["messages"]] == [RULES.refusal]
        else:
            assert [m.text for m in part["messages"]][-2:] == ["4", RULES.refusal]


def test_what_leaves_is_typed_where_version_2_is_asked_for() -> None:
    app = asking(agent(UNSAFE))
    options = {"config": THREAD, "stream_mode": ["updates", "values"], "version": "v2", "subgraphs": True}
    streamed(app, ASK, **options)

    update, value = streamed(app, Command(resume={"decision": "reject"}), **options)

    assert (update["type"], update["ns"]) == ("updates", ())
    assert (value["type"], value["interrupts"]) == ("values", ())
    assert value["data"]["messages"][-1].text == RULES.refusal


@pytest.mark.parametrize("way", ["invoke", "stream"])
@pytest.mark.parametrize("mode", ["messages", "updates"])
def test_a_waiting_graph_in_a_node_goes_on_while_the_outer_graph_is_streamed(way: str, mode: str) -> None:
    app = asking(agent(UNSAFE))

    def node(state: MessagesState) -> dict[str, Any]:
        if way == "stream":
            (*_, last) = app.stream(state, stream_mode="values")
        else:
            last = app.invoke(state)
        return {"messages": last["messages"][-1:]}

    built = StateGraph(MessagesState)
    built.add_node("answer", node)
    built.add_edge(START, "answer")
    built.add_edge("answer", END)
    outer = built.compile(checkpointer=InMemorySaver())

    asked = streamed(outer, ASK, config=THREAD, stream_mode=mode)
    paused = outer.get_state(THREAD).interrupts
    told = streamed(outer, Command(resume={"decision": "reject"}), config=THREAD, stream_mode=mode)

    assert [pause.value["draft"] for pause in paused] == [UNSAFE]
    assert CANARY not in repr(asked).replace(repr(paused), "")
    assert RULES.refusal in repr(told)
    assert CANARY not in repr(told)
    assert outer.get_state(THREAD).values["messages"][-1].text == RULES.refusal
