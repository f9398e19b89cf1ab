"""What a wrapped app keeps of a request, where another answer left than its draft."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError
from langgraph.func import entrypoint
from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import BaseModel
from replies import RULES, by_role, flags, verdicts

from cai_graph import ScriptedModel, constitutional, open_log

THREAD: Any = {"configurable": {"thread_id": "1"}}
HI: Any = {"messages": [("user", "hi")]}
TWO: Any = {"messages": [("user", "two")]}


def guard(app: Any, **settings: Any) -> Any:
    model = by_role(critique=flags("no-harm"))
    settings = {"constitution": RULES, "log": None, "critic": model, "reviser": model} | settings
    return constitutional(app, **settings)


def writer(seen: list[list[str]]) -> ScriptedModel:
    """A model that answers `hi` with the draft, and takes down what it is asked."""

    def reply(messages: list[BaseMessage]) -> str:
        seen.append([message.text for message in messages])
        return "the draft" if messages[-1].text == "hi" else "fine"

    return ScriptedModel(replies=reply)


def graph(model: ScriptedModel) -> Any:
    built = StateGraph(MessagesState)
    built.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    built.add_edge(START, "answer")
    return built.compile(checkpointer=InMemorySaver())


def stored(app: Any) -> list[str]:
    return [message.text for message in app.get_state(THREAD).values["messages"]]


# --- requests that are cancelled ----------------------------------------------------------------------


class Stuck(ScriptedModel):
    """A critic that never answers."""

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        self._generate(messages)  # by which its caller is told
        await asyncio.Event().wait()


@pytest.mark.parametrize("way", ["ainvoke", "astream"])
async def test_a_request_that_is_cancelled_before_its_verdict_leaves_no_draft_behind(way: str) -> None:
    app, asked = graph(writer([])), asyncio.Event()
    critic = Stuck(replies=lambda messages: asked.set() or "")
    guarded = guard(app, critic=critic)

    async def call() -> None:
        if way == "ainvoke":
            await guarded.ainvoke(HI, THREAD)
        else:
            [chunk async for chunk in guarded.astream(HI, THREAD)]

    calling = asyncio.create_task(call())
    await asked.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling

    assert stored(app) == ["hi", RULES.refusal]


def test_an_interrupt_before_the_verdict_leaves_no_draft_behind() -> None:
    app = graph(writer([]))
    critic = Stuck(replies=lambda messages: os.kill(os.getpid(), signal.SIGINT) or "")

    with pytest.raises(KeyboardInterrupt):
        guard(app, critic=critic).invoke(HI, THREAD)

    assert stored(app) == ["hi", RULES.refusal]


# --- graphs that are bound ----------------------------------------------------------------------------

BINDINGS: dict[str, Callable[[Any], Runnable[Any, Any]]] = {
    "with_types": lambda app: app.with_types(),
    "with_retry": lambda app: app.with_retry(),
    "with_listeners": lambda app: app.with_listeners(on_end=lambda run: None),
    "bind": lambda app: app.bind(durability="sync"),
    "twice": lambda app: app.with_types().with_retry(),
    "with its thread": lambda app: app.with_types().with_config(THREAD),
}


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_bound_graph_remembers_what_left_and_streams_what_it_streams(binding: str) -> None:
    seen: list[list[str]] = []
    app = graph(writer(seen))
    bound = BINDINGS[binding](app)
    guarded, config = guard(bound), None if binding == "with its thread" else THREAD

    (chunk,) = guarded.stream(HI, config, stream_mode="updates")
    assert chunk["answer"]["messages"][0].text == "better"
    guarded.invoke(TWO, config)

    assert seen[-1] == ["hi", "better", "two"]
    assert stored(app) == ["hi", "better", "two", "fine"]


def test_a_bound_stream_mode_is_the_graphs() -> None:
    app = graph(writer([])).bind(stream_mode="values")

    *_, last = guard(app).stream(HI, THREAD)

    assert [message.text for message in last["messages"]] == ["hi", "better"]


@pytest.mark.parametrize("limited", ["graph", "binding"])
def test_a_bound_limit_of_steps_holds(limited: str) -> None:
    built = StateGraph(MessagesState)
    built.add_node("prepare", lambda state: {})
    built.add_node("answer", lambda state: {"messages": [AIMessage("fine")]})
    built.add_edge(START, "prepare")
    built.add_edge("prepare", "answer")
    app = built.compile()
    bound = app if limited == "graph" else app.with_types()

    with pytest.raises(GraphRecursionError, match="limit of 1 reached"):
        guard(bound.with_config(recursion_limit=1)).invoke(HI, THREAD)


# --- what cannot be reached ---------------------------------------------------------------------------


class Lines(BaseChatMessageHistory):
    def __init__(self) -> None:
        self.messages: list[BaseMessage] = []

    def add_messages(self, messages: Any) -> None:
        self.messages += messages

    def clear(self) -> None:
        self.messages = []


def with_history(model: ScriptedModel) -> Any:
    lines = Lines()
    return RunnableWithMessageHistory(model, lambda session_id: lines)


@pytest.mark.filterwarnings("ignore:RunnableWithMessageHistory is deprecated")
@pytest.mark.parametrize(
    ("app", "of"),
    [
        (lambda model: RunnableLambda(lambda asked: HI) | graph(model), "CompiledStateGraph"),
        (lambda model: graph(model) | (lambda state: state["messages"][-1]), "CompiledStateGraph"),
        (
            lambda model: (lambda inner: RunnableLambda(lambda _, config: inner.invoke(HI, config)))(
                graph(model)
            ),
            "CompiledStateGraph",
        ),
        (with_history, "RunnableWithMessageHistory"),
    ],
    ids=["at the end", "at the beginning", "in a function", "history"],
)
def test_a_memory_inside_that_cannot_be_reached_is_warned_of(app: Any, of: str) -> None:
    made = app(writer([]))
    thread: Any = {"configurable": {"thread_id": "1", "session_id": "1"}}
    given = "hi" if of == "RunnableWithMessageHistory" else HI

    with pytest.warns(RuntimeWarning, match=f"memory of the {of} inside.*ConstitutionalMiddleware"):
        assert "better" in repr(guard(made).invoke(given, thread))


def test_nothing_is_warned_of_where_nothing_remembers_or_the_draft_left() -> None:
    guard(RunnableLambda(lambda asked: asked) | writer([])).invoke("hi")
    judge = by_role(critique=verdicts())
    guard(RunnableLambda(lambda asked: asked) | graph(writer([])), critic=judge).invoke(HI, THREAD)


# --- LangGraph's functional API -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("kind", ["a text", "a message", "a state", "all"])
async def test_a_function_that_remembers_is_given_what_left(kind: str, way: str) -> None:
    seen: list[list[str]] = []
    model = writer(seen)

    @entrypoint(checkpointer=InMemorySaver())
    def bot(words: list[str], *, previous: Any = None) -> Any:
        history = [*(previous or []), *map(HumanMessage, words)]
        reply = model.invoke(history)
        history.append(reply)
        value: Any = {"a text": reply.text, "a message": reply, "a state": {"messages": [reply]}}.get(kind)
        return history if kind == "all" else entrypoint.final(value=value, save=history)

    guarded = guard(bot)
    for words in (["hi"], ["two"]):
        left = guarded.invoke(words, THREAD) if way == "invoke" else await guarded.ainvoke(words, THREAD)
        assert "the draft" not in repr(left)

    assert seen == [["hi"], ["hi", "better", "two"]]


def test_in_a_graph_without_a_memory_there_is_none_and_nothing_is_logged_of_it(caplog: Any) -> None:
    outer = StateGraph(MessagesState).add_node("app", guard(graph(writer([])))).add_edge(START, "app")

    outer.compile().invoke(HI, THREAD)

    assert caplog.records == []


def test_a_graph_that_is_told_no_thread_says_so_itself() -> None:
    with pytest.raises(ValueError, match="Checkpointer requires"):
        guard(graph(writer([]))).invoke(HI)


def test_a_state_without_channels_is_warned_of() -> None:
    from langgraph.channels import LastValue
    from langgraph.pregel import NodeBuilder, Pregel

    app = Pregel(
        nodes={
            "answer": NodeBuilder().subscribe_only("asked").do(lambda asked: "the draft").write_to("said")
        },
        channels={"asked": LastValue(str), "said": LastValue(str)},
        input_channels="asked",
        output_channels="said",
        stream_channels="said",
        checkpointer=InMemorySaver(),
    )

    with pytest.warns(RuntimeWarning, match="it is a str and has no channels"):
        assert guard(app).invoke("hi", THREAD) == "better"


# --- the state afterwards -----------------------------------------------------------------------------


def test_a_thread_that_had_ended_stays_ended_though_its_edges_would_now_go_on() -> None:
    built = StateGraph(MessagesState)
    built.add_node("answer", lambda state: {"messages": [AIMessage("the draft")]})
    built.add_edge(START, "answer")
    built.add_conditional_edges(
        "answer", lambda state: END if "draft" in state["messages"][-1].text else "answer", [END, "answer"]
    )
    app = built.compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    for turn in (1, 2):
        guarded.invoke(HI, THREAD)
        assert app.get_state(THREAD).next == ()
        assert stored(app) == ["hi", "better"] * turn


def test_a_wrapped_graph_shows_its_state_and_nothing_that_answers() -> None:
    app = graph(writer([]))
    guarded = guard(app.with_types())
    guarded.invoke(HI, THREAD)

    assert guarded.get_state(THREAD).values["messages"][-1].text == "better"
    assert guarded.checkpointer is app.checkpointer
    guarded.update_state(THREAD, {"messages": [HumanMessage("more")]})
    assert len(list(guarded.get_state_history(THREAD))) == len(list(app.get_state_history(THREAD)))
    assert stored(app)[-1] == "more"
    for name in ("attach_node", "_defaults"):
        assert hasattr(app, name)
        assert not hasattr(guarded, name)


def test_what_is_set_at_a_wrapped_graph_is_the_graphs() -> None:
    app = graph(writer([]))
    guarded, saver = guard(app.with_types()), InMemorySaver()

    guarded.checkpointer, guarded.step_timeout, guarded.name = saver, 5, "guarded"

    assert (app.checkpointer, app.step_timeout, app.name) == (saver, 5, "LangGraph")
    assert (guarded.checkpointer, guarded.step_timeout, guarded.name) == (saver, 5, "guarded")
    guarded.invoke(HI, THREAD)
    assert stored(app) == ["hi", "better"]


def test_a_wrapped_graph_shows_the_graphs_inside() -> None:
    outer = StateGraph(MessagesState).add_node("inner", graph(writer([]))).add_edge(START, "inner").compile()

    shown = [guard(outer).get_graph(xray=xray).to_json() for xray in (True, False)]

    assert shown == [outer.get_graph(xray=xray).to_json() for xray in (True, False)]
    assert shown[0] != shown[1]


# --- an agent that ends with a tool's answer ----------------------------------------------------------


@tool(return_direct=True)
def look(query: str) -> str:
    """Look something up."""
    return "the draft"


@tool(return_direct=True)
def recall(query: str) -> str:
    """Find what was said."""
    return "found"


@tool
def search(query: str) -> str:
    """Search."""
    return "the draft"


class Caller(ScriptedModel):
    """A model that takes tools."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind()


def calling(name: str, **options: Any) -> Any:
    calls: Any = [{"name": name, "args": {"query": "x"}, "id": "c1"}]
    model = Caller(replies=lambda m: "fine" if m[-1].type == "tool" else AIMessage("", tool_calls=calls))
    return create_agent(model, [look, search] if name == "search" else [look], **options)


@pytest.mark.parametrize("mode", [None, "updates", "values", "messages"])
@pytest.mark.parametrize("kept", [True, False])
def test_the_answer_of_a_tool_that_ends_the_run_is_judged_and_replaced_in_its_place(
    kept: bool, mode: Any
) -> None:
    app = calling("look", checkpointer=InMemorySaver() if kept else None)

    if mode is None:
        told = guard(app).invoke(HI, THREAD)["messages"][-1:]
        assert told[0].response_metadata["cai"]["outcome"] == "REVISED"
        assert (told[0].type, told[0].name, told[0].tool_call_id) == ("tool", "look", "c1")
    else:
        told = [*guard(app).stream(HI, THREAD, stream_mode=mode)][-1:]

    assert "better" in repr(told)
    assert "the draft" not in repr(told)
    if kept:
        assert stored(app) == ["hi", "", "better"]
        assert app.get_state(THREAD).next == ()


async def test_the_answer_of_a_tool_is_logged_as_an_answer_to_what_was_asked(tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        record = (await guard(calling("look"), log=log).answered(HI)).trajectory

    assert [(message.role, message.content) for message in record.messages] == [("user", "hi")]
    assert (record.draft.answer.role, record.draft.answer.content) == ("assistant", "the draft")


@pytest.mark.parametrize("content", ["the draft", [{"type": "text", "text": "the draft"}]])
def test_words_beside_a_call_that_ends_the_run_are_the_answer(content: Any) -> None:
    calls: Any = [{"name": "recall", "args": {"query": "x"}, "id": "c1"}]
    model = Caller(replies=lambda _: AIMessage(content, tool_calls=calls))
    app = create_agent(model, [recall], checkpointer=InMemorySaver())

    output = guard(app).invoke(HI, THREAD)

    assert [message.text for message in output["messages"]] == ["hi", "better", "found"]
    assert output["messages"][1].tool_calls[0]["name"] == "recall"
    assert stored(app) == ["hi", "better", "found"]


def test_a_blank_beside_a_call_that_ends_the_run_is_no_answer() -> None:
    calls: Any = [{"name": "look", "args": {"query": "x"}, "id": "c1"}]
    app = create_agent(Caller(replies=lambda _: AIMessage("\n\n", tool_calls=calls)), [look])

    assert guard(app).invoke(HI)["messages"][-1].text == "better"


def test_a_tools_answer_in_mid_run_is_no_answer() -> None:
    app = calling("search", checkpointer=InMemorySaver(), interrupt_after=["tools"])
    guarded = guard(app)

    stopped = guarded.invoke(HI, THREAD)
    ended = guarded.invoke(None, THREAD)

    assert stopped["messages"][-1].text == "the draft"
    assert "cai" not in stopped["messages"][-1].response_metadata
    assert [message.text for message in ended["messages"]] == ["hi", "", "the draft", "fine"]


def test_an_agents_structured_answer_is_no_answer_of_a_tool() -> None:
    class Report(BaseModel):
        """A report."""

        sky: str

    calls: Any = [{"name": "Report", "args": {"sky": "rain"}, "id": "c1"}]
    agent = create_agent(
        Caller(replies=lambda _: AIMessage("", tool_calls=calls)), [], response_format=ToolStrategy(Report)
    )
    words = "Returning structured response: sky='rain'"
    critic = by_role(critique=flags("no-harm", answers=[words]))

    output = guard(agent, critic=critic, reviser=critic).invoke(HI)

    assert output["structured_response"] == Report(sky="rain")
    assert output["messages"][-1].text == words
    assert critic.calls == []
