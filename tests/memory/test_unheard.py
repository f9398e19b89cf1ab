"""Words of a run that nobody was given, since the request ended otherwise: none stays in a graph's memory."""

from __future__ import annotations

import asyncio
import operator
import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Any, TypedDict

import anyio
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import END, START, MessagesState, StateGraph
from replies import RULES, by_role, verdicts
from test_broken_off import Slow, breaking
from test_kept import HI, THREAD, TWO, Stuck, graph, guard, stored, writer

from cai_graph import ScriptedModel, open_log
from cai_graph.errors import RunError


class Lazy(InMemorySaver):
    """Takes a while to read and to write, in an event loop and out of it."""

    seconds = 0.02

    async def aget_tuple(self, config: Any) -> Any:
        await asyncio.sleep(self.seconds)
        return super().get_tuple(config)

    async def aput(self, *args: Any) -> Any:
        await asyncio.sleep(self.seconds)
        return await super().aput(*args)

    def get_tuple(self, config: Any) -> Any:
        time.sleep(self.seconds)
        return super().get_tuple(config)


def answering(saver: Any) -> Any:
    built = StateGraph(MessagesState)
    built.add_node(
        "answer",
        lambda state: {
            "messages": [AIMessage("the draft" if state["messages"][-1].text == "hi" else "fine")]
        },
    )
    built.add_edge(START, "answer")
    return built.compile(checkpointer=saver)


async def cancelled_before_its_verdict(app: Any) -> None:
    asked = asyncio.Event()
    guarded = guard(app, critic=Stuck(replies=lambda messages: asked.set() or ""))
    calling = asyncio.create_task(guarded.ainvoke(HI, THREAD))
    await asked.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


# --- how requests end -------------------------------------------------------------------------------


async def test_a_request_that_is_cancelled_again_and_again_leaves_no_draft_behind(tmp_path: Path) -> None:
    app, asked = answering(Lazy()), asyncio.Event()
    log = open_log(tmp_path / "log.db")
    guarded = guard(app, critic=Stuck(replies=lambda messages: asked.set() or ""), log=log)

    async def following() -> Any:
        await asked.wait()
        return await guard(app).ainvoke(TWO, THREAD)

    next_one = asyncio.create_task(following())
    async with anyio.create_task_group() as group:  # as Starlette does when its client is gone
        group.start_soon(guarded.ainvoke, HI, THREAD)
        await asked.wait()
        group.cancel_scope.cancel()
    await next_one

    assert stored(app) == ["hi", RULES.refusal, "two", "fine"]
    log.close()
    with open_log(tmp_path / "log.db", read_only=True) as log:
        (trajectory,) = log.read(kind="trajectory")
    assert trajectory.outcome == "FAILED"


def test_an_impatient_second_interrupt_does_not_hold_up_the_thread() -> None:
    saver = Lazy()
    app = answering(saver)

    def interrupts(messages: Any) -> str:
        saver.seconds = 0.5
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        return ""

    with pytest.raises(KeyboardInterrupt):
        guard(app, critic=Stuck(replies=interrupts)).invoke(HI, THREAD)
    saver.seconds = 0
    ended: list[Any] = []
    following = threading.Thread(target=lambda: ended.append(guard(app).invoke(TWO, THREAD)), daemon=True)
    following.start()
    following.join(30)

    assert ended
    assert ended[0]["messages"][-1].text == "fine"


class Odd(BaseException):
    """Such as Streamlit runs a script again by."""


class Reruns(BaseCallbackHandler):
    raise_error = True
    run_inline = True

    def on_chat_model_start(self, serialized: Any, messages: Any, **options: Any) -> None:
        if "careful reviewer" in messages[0][0].text:
            raise Odd


WAYS: dict[str, Any] = {
    "invoke": lambda guarded, config: guarded.invoke(HI, config),
    "ainvoke": lambda guarded, config: asyncio.run(guarded.ainvoke(HI, config)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_exception_leaves_no_draft_behind_either(way: str) -> None:
    app = graph(writer([]))

    with pytest.raises(Odd):
        WAYS[way](guard(app), {**THREAD, "callbacks": [Reruns()]})

    assert stored(app) == ["hi", RULES.refusal]


def test_a_request_that_cannot_be_kept_for_a_person_leaves_no_draft_behind() -> None:
    class Down(InMemorySaver):
        def put(self, *args: Any) -> Any:
            raise ConnectionError("down")

    app = graph(writer([]))
    critic = by_role(critique=lambda messages: verdicts("no-harm"))

    with pytest.raises(RunError, match="could not be kept"):
        guard(app, critic=critic, on_violation="human", checkpointer=Down()).invoke(HI, THREAD)

    assert stored(app) == ["hi", RULES.refusal]


async def test_a_state_that_could_not_be_read_once_leaves_no_draft_behind() -> None:
    class Hiccups(InMemorySaver):
        reads = 0

        async def aget_tuple(self, config: Any) -> Any:
            self.reads += 1
            if self.reads == 1:
                raise ConnectionError("down")
            return await super().aget_tuple(config)

    app = answering(Hiccups())
    await cancelled_before_its_verdict(app)

    assert stored(app) == ["hi", RULES.refusal]


# --- which words ------------------------------------------------------------------------------------


async def test_all_words_of_a_cancelled_run_give_way() -> None:
    built = StateGraph(MessagesState)
    built.add_node("writer", lambda state: {"messages": [AIMessage("the writer's draft")]})
    built.add_node("editor", lambda state: {"messages": [AIMessage("the editor's draft")]})
    built.add_edge(START, "writer")
    built.add_edge("writer", "editor")
    app = built.compile(checkpointer=InMemorySaver())

    await cancelled_before_its_verdict(app)

    assert stored(app) == ["hi", RULES.refusal, RULES.refusal]


class Answered(MessagesState):
    answer: str


class Returned(TypedDict):
    answer: str


@pytest.mark.parametrize("by", ["output_key", "output_schema"])
def test_messages_beside_the_answer_of_a_broken_run_give_way(by: str) -> None:
    seen: list[list[str]] = []
    model, runs = writer(seen), list[int]()

    def formed(state: Answered) -> Any:
        runs.append(1)
        if len(runs) == 1:
            raise ConnectionError("down")
        return {"answer": state["messages"][-1].text}

    built = StateGraph(Answered, **({"output_schema": Returned} if by == "output_schema" else {}))
    built.add_node("write", lambda state: {"messages": [model.invoke(state["messages"])]})
    built.add_node("form", formed)
    built.add_edge(START, "write")
    built.add_edge("write", "form")
    app = built.compile(checkpointer=InMemorySaver())
    guarded = guard(app, **({"output_key": "answer"} if by == "output_key" else {}))

    with pytest.raises(ConnectionError):
        guarded.invoke(HI, THREAD)
    guarded.invoke(TWO, THREAD)

    assert seen[-1] == ["hi", RULES.refusal, "two"]


@pytest.mark.parametrize("way", ["as its last node", "as its end"])
async def test_a_broken_run_that_its_owner_closed_leaves_no_draft_behind(way: str) -> None:
    app = breaking()
    guarded = guard(app)
    with pytest.raises(ConnectionError):
        await guarded.ainvoke(HI, THREAD)
    if way == "as its end":
        app.update_state(THREAD, None, as_node=END)
    else:
        app.update_state(THREAD, {"messages": [AIMessage("Something went wrong.")]}, as_node="title")

    await guarded.ainvoke(TWO, THREAD)

    assert stored(app)[:2] == ["hi", RULES.refusal]
    assert stored(app)[-2:] == ["two", "fine"]
    assert ("Something went wrong." in stored(app)) == (way == "as its last node")


async def test_a_replay_that_fails_does_not_bring_a_rejected_draft_back() -> None:
    app = breaking(error=None)
    await guard(app).ainvoke(HI, THREAD)
    past = next(state for state in app.get_state_history(THREAD) if state.next == ("title",))

    down = ScriptedModel(replies=lambda messages: OSError("down"))
    with pytest.raises(OSError, match="down"):
        await guard(app, critic=down, on_error="raise").ainvoke(None, past.config)

    assert stored(app) == ["hi", RULES.refusal]


async def test_a_function_that_is_cancelled_while_it_ends_leaves_no_draft_behind() -> None:
    saving = asyncio.Event()
    saver = Slow(saving)

    @entrypoint(checkpointer=saver)
    async def app(question: str, *, previous: Any = None) -> Any:
        return entrypoint.final(value="the draft, in words", save={"said": "the draft, in words"})

    calling = asyncio.create_task(guard(app).ainvoke("hi", THREAD))
    await saving.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling

    found: Any = saver.get_tuple(THREAD)
    assert found.checkpoint["channel_values"]["__previous__"] == {"said": RULES.refusal}


# --- how it is replaced -----------------------------------------------------------------------------


def test_a_replacement_leaves_the_joins_of_a_graph_as_they_are() -> None:
    class Traced(MessagesState):
        trace: Annotated[list[str], operator.add]

    def node(name: str) -> Any:
        return lambda state: {"trace": [f"{name} of {state['messages'][-1].text}"]}

    def joined(state: Traced) -> Any:
        return {"trace": [f"joined {'a of ' + state['messages'][-1].text in state['trace']}"]}

    built = StateGraph(Traced)
    for name in "abx":
        built.add_node(name, node(name))
    built.add_node("join", joined)
    built.add_node("answer", lambda state: {"messages": [AIMessage("the draft")]})
    built.add_node("remember", lambda state: {})
    for edge in ((START, "b"), (START, "x"), ("x", "a"), ("join", "answer"), ("join", "remember")):
        built.add_edge(*edge)
    built.add_edge(["a", "b"], "join")
    app = built.compile(checkpointer=InMemorySaver())

    for asked in (HI, TWO):
        guard(app).invoke(asked, THREAD)

    trace = app.get_state(THREAD).values["trace"]
    assert [said for said in trace if said.startswith("joined")] == ["joined True", "joined True"]
