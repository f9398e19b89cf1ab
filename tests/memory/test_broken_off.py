"""What becomes of the words of runs that broke off, and that what somebody was given stays."""

from __future__ import annotations

import asyncio
import json
import operator
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from replies import RULES
from test_kept import HI, THREAD, TWO, Caller, Stuck, graph, guard, search, stored, writer

from cai_graph import Budget
from cai_graph.errors import BudgetExceeded

# --- runs that broke off ------------------------------------------------------------------------------


class Titled(MessagesState):
    title: str


def breaking(answer: Any = None, error: type[BaseException] | None = ConnectionError, **options: Any) -> Any:
    """A graph that answers `hi` with the draft, and breaks off behind that the first time."""
    runs: list[int] = []

    def says(state: Titled) -> Any:
        return {"messages": [AIMessage("the draft" if state["messages"][-1].text == "hi" else "fine")]}

    async def title(state: Titled) -> Any:
        runs.append(1)
        if len(runs) == 1 and error is not None:
            raise error("down")
        return {"title": "a title"}

    built = StateGraph(Titled)
    built.add_node("answer", answer or says)
    built.add_node("title", title)
    built.add_edge(START, "answer")
    built.add_edge("answer", "title")
    return built.compile(**{"checkpointer": InMemorySaver(), **options})


class Shallow(InMemorySaver):
    """Keeps the last checkpoint only."""

    def list(self, *args: Any, **kwargs: Any) -> Any:
        yield from [*super().list(*args, **kwargs)][:1]

    def get_tuple(self, config: Any) -> Any:
        given = config["configurable"]
        last = super().get_tuple({"configurable": {**given, "checkpoint_id": None}})
        asked = given.get("checkpoint_id")
        return last if last and asked in (None, last.checkpoint["id"]) else None


@pytest.mark.parametrize("saver", [InMemorySaver, Shallow])
@pytest.mark.parametrize("error", [ConnectionError, asyncio.CancelledError])
async def test_a_draft_that_a_broken_run_left_behind_gives_way_to_the_refusal(error: Any, saver: Any) -> None:
    app = breaking(error=error, checkpointer=saver())
    guarded = guard(app)

    with pytest.raises(error):
        await guarded.ainvoke(HI, THREAD)
    output = await guarded.ainvoke(TWO, THREAD)

    assert [message.text for message in output["messages"]] == ["hi", RULES.refusal, "two", "fine"]
    assert stored(app) == ["hi", RULES.refusal, "two", "fine"]


async def test_a_broken_run_that_is_resumed_goes_on_and_is_judged() -> None:
    app = breaking()
    guarded = guard(app)

    with pytest.raises(ConnectionError):
        await guarded.ainvoke(HI, THREAD)
    output = await guarded.ainvoke(None, THREAD)

    assert [message.text for message in output["messages"]] == ["hi", "better"]


async def test_in_a_graph_that_is_resumed_a_broken_run_goes_on_and_is_judged() -> None:
    inner = guard(breaking(checkpointer=True))

    async def answer(state: MessagesState, config: RunnableConfig) -> Any:
        return {"messages": (await inner.ainvoke(HI, config))["messages"][-1:]}

    built = StateGraph(MessagesState)
    built.add_node("answer", answer)
    built.add_edge(START, "answer")
    outer = built.compile(checkpointer=InMemorySaver())

    with pytest.raises(ConnectionError):
        await outer.ainvoke(HI, THREAD)
    output = await outer.ainvoke(None, THREAD)

    assert [message.text for message in output["messages"]] == ["hi", "better"]


async def test_in_a_graph_that_goes_on_a_draft_that_a_broken_run_left_behind_gives_way() -> None:
    inner, seen = guard(breaking(checkpointer=True)), []

    async def answer(state: MessagesState, config: RunnableConfig) -> Any:
        output = await inner.ainvoke({"messages": state["messages"][-1:]}, config)
        seen.append([message.text for message in output["messages"]])
        return {"messages": output["messages"][-1:]}

    outer = StateGraph(MessagesState).add_node("answer", answer).add_edge(START, "answer")
    app = outer.compile(checkpointer=InMemorySaver())

    with pytest.raises(ConnectionError):
        await app.ainvoke(HI, THREAD)
    await app.ainvoke(TWO, THREAD)

    assert seen == [["hi", RULES.refusal, "two", "fine"]]


@pytest.mark.parametrize(("said", "left"), [("fine", "fine"), ("the draft", "better")])
async def test_what_is_said_beside_a_handoff_stays(said: str, left: str, caplog: Any) -> None:
    seen: list[list[str]] = []

    def says(state: MessagesState) -> Any:
        seen.append([message.text for message in state["messages"]])
        return {"messages": [AIMessage(said)]}

    def hands_over(state: MessagesState) -> Any:
        return Command(graph=Command.PARENT, goto="bob", update={"messages": state["messages"][-1:]})

    built = StateGraph(MessagesState).add_node("says", says).add_node("hands over", hands_over)
    built.add_edge(START, "says").add_edge("says", "hands over")
    inner = guard(built.compile(checkpointer=True))

    async def answer(state: MessagesState, config: RunnableConfig) -> Any:
        return await inner.ainvoke({"messages": state["messages"][-1:]}, config)

    outer = StateGraph(MessagesState).add_node("answer", answer, destinations=("bob",))
    outer.add_node("bob", lambda state: {}).add_edge(START, "answer")
    app = outer.compile(checkpointer=InMemorySaver())
    await app.ainvoke(HI, THREAD)
    await app.ainvoke(TWO, THREAD)

    assert seen == [["hi"], ["hi", left, "two"]]
    assert caplog.records == []


async def test_a_run_that_broke_off_before_it_answered_leaves_earlier_turns_as_they_are() -> None:
    def answer(state: Titled) -> Any:
        if state["messages"][-1].text == "two":
            raise ConnectionError("down")
        return {"messages": [AIMessage("fine")]}

    app = breaking(answer, error=None)
    guarded = guard(app)
    await guarded.ainvoke(HI, THREAD)

    with pytest.raises(ConnectionError):
        await guarded.ainvoke(TWO, THREAD)
    await guarded.ainvoke(HI, THREAD)

    assert stored(app) == ["hi", "fine", "two", "hi", "fine"]


async def test_a_text_that_a_broken_run_left_behind_gives_way_too() -> None:
    class Asked(TypedDict, total=False):
        question: str
        answer: str
        seen: str

    def answer(state: Asked) -> Any:
        if state["question"] == "hi":
            return {"answer": "the draft"}
        return {"answer": "fine", "seen": state["answer"]}

    def title(state: Asked) -> Any:
        if state["question"] == "hi":
            raise ConnectionError("down")
        return {}

    built = StateGraph(Asked)
    built.add_node("write", answer)
    built.add_node("title", title)
    built.add_edge(START, "write")
    built.add_edge("write", "title")
    guarded = guard(built.compile(checkpointer=InMemorySaver()))

    with pytest.raises(ConnectionError):
        await guarded.ainvoke({"question": "hi"}, THREAD)

    assert (await guarded.ainvoke({"question": "two"}, THREAD))["seen"] == RULES.refusal


def test_a_broken_agent_keeps_its_calls_beside_what_came_of_them() -> None:
    calls: Any = [{"name": "search", "args": {"query": "x"}, "id": "c1"}]

    def says(messages: list[BaseMessage]) -> Any:
        if messages[-1].text == "hi":
            return AIMessage("I look it up", tool_calls=calls)
        return ConnectionError("down") if messages[-1].type == "tool" else "fine"

    app = create_agent(Caller(replies=says), [search], checkpointer=InMemorySaver())
    guarded = guard(app)

    with pytest.raises(ConnectionError):
        guarded.invoke(HI, THREAD)
    output = guarded.invoke(TWO, THREAD)

    assert [message.text for message in output["messages"]] == [
        "hi",
        RULES.refusal,
        "the draft",
        "two",
        "fine",
    ]
    assert [call["id"] for call in output["messages"][1].tool_calls] == ["c1"]


@pytest.mark.parametrize("durability", ["async", "exit"])
@pytest.mark.parametrize("stop", [{"interrupt_before": ["title"]}, {"interrupt_after": ["answer"]}])
async def test_what_was_shown_at_a_breakpoint_stays_though_nobody_went_on_from_there(
    stop: Any, durability: Any
) -> None:
    app = breaking(error=None, **stop)
    guarded = guard(app)

    await guarded.ainvoke(HI, THREAD, durability=durability)
    stopped = await guarded.ainvoke(TWO, THREAD, durability=durability)

    assert [message.text for message in stopped["messages"]] == ["hi", "the draft", "two", "fine"]


class Slow(InMemorySaver):
    """Takes a while to write a checkpoint, and says when it begins to write the last one."""

    def __init__(self, saving: asyncio.Event) -> None:
        super().__init__()
        self.saving = saving

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, versions: Any) -> Any:
        kept = await super().aput(config, checkpoint, metadata, versions)
        if "the draft" in repr(checkpoint["channel_values"]):
            self.saving.set()
            await asyncio.sleep(0.02)
        return kept


async def test_a_request_that_is_cancelled_while_its_run_ends_leaves_no_draft_behind() -> None:
    saving = asyncio.Event()
    built = StateGraph(MessagesState)
    built.add_node("answer", lambda state: {"messages": [AIMessage("the draft", id="a")]})
    built.add_edge(START, "answer")
    app = built.compile(checkpointer=Slow(saving))

    calling = asyncio.create_task(guard(app).ainvoke(HI, THREAD))
    await saving.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling

    assert stored(app) == ["hi", RULES.refusal]


async def test_a_request_that_fails_before_it_runs_leaves_earlier_turns_as_they_are() -> None:
    app = graph(writer([]))
    guarded = guard(app)
    await guarded.ainvoke(TWO, THREAD)

    with pytest.raises(ValueError, match="recursion_limit"):
        await guarded.ainvoke(HI, {**THREAD, "recursion_limit": 0})

    assert stored(app) == ["two", "fine"]


# --- what was given to somebody stays -----------------------------------------------------------------


def echoes(state: MessagesState) -> Any:
    return {"messages": [AIMessage(f"fine {state['messages'][-1].text}")]}


def noting(app: Any, note: BaseMessage, as_node: str) -> None:
    app.update_state(THREAD, {"messages": [note]}, as_node=as_node)


@pytest.mark.parametrize("note", [SystemMessage("note"), AIMessage("note"), HumanMessage("note")])
@pytest.mark.parametrize("as_node", ["__start__", "answer"])
async def test_what_an_owner_writes_between_requests_makes_no_run_one_that_broke_off(
    note: Any, as_node: str
) -> None:
    app = breaking(echoes, error=None)
    guarded = guard(app)

    await guarded.ainvoke(HI, THREAD)
    noting(guarded, note, as_node)
    assert guarded.get_state(THREAD).next
    await guarded.ainvoke(TWO, THREAD)

    assert stored(app) == ["hi", "fine hi", "note", "two", "fine two"]


async def test_what_an_owner_writes_behind_a_run_that_broke_off_stays_and_its_draft_does_not() -> None:
    app = breaking()
    guarded = guard(app)

    with pytest.raises(ConnectionError):
        await guarded.ainvoke(HI, THREAD)
    noting(guarded, AIMessage("we call you back"), "answer")
    await guarded.ainvoke(TWO, THREAD)

    assert stored(app) == ["hi", RULES.refusal, "we call you back", "two", "fine"]


async def test_a_thread_that_was_taken_back_to_an_earlier_step_keeps_what_left() -> None:
    app = breaking(echoes, error=None)
    guarded = guard(app)
    await guarded.ainvoke(HI, THREAD)
    await guarded.ainvoke(TWO, THREAD)

    past = next(state for state in guarded.get_state_history(THREAD) if state.next == ("title",))
    await guarded.aupdate_state(past.config, {"messages": [SystemMessage("note")]})
    output = await guarded.ainvoke(HI, THREAD)

    assert [message.text for message in output["messages"]] == [
        *("hi", "fine hi", "two", "fine two", "note"),
        *("hi", "fine hi"),
    ]


class Held(InMemorySaver):
    """Takes long to read a checkpoint, where it is to."""

    held = False

    async def aget_tuple(self, config: Any) -> Any:
        if self.held:
            await asyncio.sleep(0.2)
        return await super().aget_tuple(config)


@pytest.mark.parametrize("given", [None, Command(resume="yes")])
@pytest.mark.parametrize("way", ["fails", "out of time", "cancelled before its verdict"])
async def test_a_thread_that_had_ended_and_is_resumed_in_vain_keeps_what_left(given: Any, way: str) -> None:
    saver = Held()
    built = StateGraph(MessagesState)
    built.add_node("answer", echoes)
    built.add_edge(START, "answer")
    app = built.compile(checkpointer=saver)
    await guard(app).ainvoke(HI, THREAD)

    if way == "fails":
        with pytest.raises(ValueError, match="recursion_limit"):
            await guard(app).ainvoke(given, {**THREAD, "recursion_limit": 0})
    elif way == "out of time":
        saver.held = True
        with pytest.raises(BudgetExceeded):
            await guard(app, budget=Budget(seconds=0.05)).ainvoke(given, THREAD)
        saver.held = False
    else:
        asked = asyncio.Event()
        critic = Stuck(replies=lambda messages: asked.set() or "")
        calling = asyncio.create_task(guard(app, critic=critic).ainvoke(given, THREAD))
        await asked.wait()
        calling.cancel()
        await asyncio.wait([calling])

    assert stored(app) == ["hi", "fine hi"]


def test_a_thread_whose_edges_read_the_last_message_can_be_mended_and_goes_on() -> None:
    runs: list[int] = []

    def check(state: MessagesState) -> Any:
        runs.append(1)
        if len(runs) == 1:
            raise ConnectionError("down")
        return {}

    def route(state: MessagesState) -> str:
        return str(json.loads(state["messages"][-1].text)["to"])

    built = StateGraph(MessagesState)
    built.add_node("answer", lambda state: {"messages": [AIMessage('{"to": "check"}')]})
    built.add_node("check", check)
    built.add_edge(START, "answer")
    built.add_conditional_edges("answer", route, ["check"])
    built.add_conditional_edges("check", lambda state: END if route(state) else "answer", [END, "answer"])
    app = built.compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    with pytest.raises(ConnectionError):
        guarded.invoke(HI, THREAD)
    guarded.invoke(TWO, THREAD)

    assert stored(app) == ["hi", RULES.refusal, "two", '{"to": "check"}']


def test_a_thread_that_cannot_be_mended_stays_and_goes_on(caplog: Any) -> None:
    def route(state: Titled) -> str:
        json.loads(state["title"]) if RULES.refusal in repr(state["messages"]) else None
        return "answer"

    runs: list[int] = []

    def title(state: Titled) -> Any:
        runs.append(1)
        if len(runs) == 1:
            raise ConnectionError("down")
        return {}

    def route_on(state: Titled) -> str:
        route(state)
        return "title"

    built = StateGraph(Titled)
    built.add_node("answer", echoes)
    built.add_node("title", title)
    built.add_conditional_edges(START, route, ["answer"])
    built.add_conditional_edges("answer", route_on, ["title"])
    built.add_conditional_edges("title", lambda state: (route(state), END)[1], [END])
    app = built.compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    with pytest.raises(ConnectionError):
        guarded.invoke({**HI, "title": "no JSON"}, THREAD)
    guarded.invoke(TWO, THREAD)

    assert stored(app) == ["hi", "fine hi", "two", "fine two"]
    assert "thread '1' stays as it is, though a run of it may have broken off" in caplog.text


def test_a_run_that_broke_off_while_a_branch_of_it_asked_a_person_is_mended() -> None:
    def asks(state: MessagesState) -> Any:
        return {"messages": []} if state["messages"][-1].text == "fine" else interrupt("really?")

    def fails(state: MessagesState) -> Any:
        if state["messages"][-1].text == "the draft":
            raise ConnectionError("down")
        return {}

    built = StateGraph(MessagesState)
    model = writer([])
    built.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    built.add_node("ask", asks)
    built.add_node("fail", fails)
    built.add_edge(START, "answer")
    built.add_edge("answer", "ask")
    built.add_edge("answer", "fail")
    app = built.compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    with pytest.raises(ConnectionError):
        guarded.invoke(HI, THREAD)
    guarded.invoke(TWO, THREAD)

    assert stored(app) == ["hi", RULES.refusal, "two", "fine"]


def test_what_was_shown_at_a_pause_stays_though_the_run_broke_off_behind_it() -> None:
    def ask(state: MessagesState) -> Any:
        if state["messages"][-1].text != "fine":
            interrupt("really?")
            raise ConnectionError("down")

    built = StateGraph(MessagesState)
    model = writer([])
    built.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    built.add_node("ask", ask)
    built.add_edge(START, "answer")
    built.add_edge("answer", "ask")
    app = built.compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    assert guarded.invoke(HI, THREAD)["messages"][-1].text == "the draft"
    with pytest.raises(ConnectionError):
        guarded.invoke(Command(resume="yes"), THREAD)
    guarded.invoke(TWO, THREAD)

    assert stored(app) == ["hi", "the draft", "two", "fine"]


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_what_was_shown_at_a_breakpoint_of_the_call_stays(way: str) -> None:
    app = breaking(error=None)
    guarded = guard(app)

    for given in (HI, TWO):
        if way == "invoke":
            guarded.invoke(given, THREAD, interrupt_before=["title"])
        else:
            list(guarded.stream(given, THREAD, interrupt_before=["title"]))

    assert stored(app) == ["hi", "the draft", "two", "fine"]


class Questioned(TypedDict):
    question: str
    messages: Annotated[list[BaseMessage], operator.add]


@pytest.mark.parametrize("durability", ["async", "exit"])
@pytest.mark.parametrize("saver", [InMemorySaver, Shallow])
def test_of_turns_that_no_message_of_the_user_opens_only_the_one_that_broke_off_is_mended(
    durability: Any, saver: Any
) -> None:
    def title(state: Questioned) -> Any:
        if state["question"] == "three":
            raise ConnectionError("down")
        return {}

    built = StateGraph(Questioned)
    built.add_node("answer", lambda state: {"messages": [AIMessage(f"fine {state['question']}")]})
    built.add_node("title", title)
    built.add_edge(START, "answer")
    built.add_edge("answer", "title")
    app = built.compile(checkpointer=saver())
    guarded = guard(app)

    for question in ("one", "two"):
        guarded.invoke({"question": question}, THREAD, durability=durability)
    with pytest.raises(ConnectionError):
        guarded.invoke({"question": "three"}, THREAD, durability=durability)
    guarded.invoke({"question": "four"}, THREAD, durability=durability)

    # What came before it is not known to one that keeps the last checkpoint only.
    third = RULES.refusal if saver is InMemorySaver else "fine three"
    assert stored(app) == ["fine one", "fine two", third, "fine four"]


async def test_an_earlier_answer_in_the_same_words_stays_though_no_message_of_the_user_parts_them() -> None:
    def answer(state: Questioned) -> Any:
        return {"messages": [AIMessage("the same words", id=state["question"])]}

    async def title(state: Questioned) -> Any:
        if state["question"] == "two":
            raise ConnectionError("down")
        return {}

    built = StateGraph(Questioned)
    built.add_node("answer", answer)
    built.add_node("title", title)
    built.add_edge(START, "answer")
    built.add_edge("answer", "title")
    app = built.compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    await guarded.ainvoke({"question": "one"}, THREAD)
    with pytest.raises(ConnectionError):
        await guarded.ainvoke({"question": "two"}, THREAD)
    asked = asyncio.Event()
    critic = Stuck(replies=lambda messages: asked.set() or "")
    calling = asyncio.create_task(guard(app, critic=critic).ainvoke({"question": "three"}, THREAD))
    await asked.wait()
    calling.cancel()
    await asyncio.wait([calling])

    assert stored(app) == ["the same words", RULES.refusal, RULES.refusal]


async def test_an_answer_that_was_shown_at_a_pause_and_got_no_verdict_gives_way_to_the_refusal() -> None:
    app = breaking(error=None, interrupt_before=["title"])
    asked = asyncio.Event()
    critic = Stuck(replies=lambda messages: asked.set() or "")
    guarded = guard(app, critic=critic)

    await guarded.ainvoke(HI, THREAD)
    calling = asyncio.create_task(guarded.ainvoke(None, THREAD))
    await asked.wait()
    calling.cancel()
    await asyncio.wait([calling])

    assert stored(app) == ["hi", RULES.refusal]
