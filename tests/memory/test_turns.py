"""Requests at once on one thread of a graph's memory: each is judged, and none is given another's draft."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from replies import RULES, by_role, flags

from cai_graph import Budget, ScriptedModel, constitutional, open_log
from cai_graph.errors import AwaitsReview, BudgetExceeded, RunError
from cai_graph.memory import turns

THREAD: Any = {"configurable": {"thread_id": "1"}}


def asks(text: str) -> Any:
    return {"messages": [("user", text)]}


def texts(state: Any) -> list[str]:
    return [message.text for message in state["messages"]]


def graph(answer: Callable[[MessagesState], Any]) -> Any:
    built = StateGraph(MessagesState)
    built.add_node("answer", answer)
    built.add_edge(START, "answer")
    return built.compile(checkpointer=InMemorySaver())


def says(state: MessagesState) -> Any:
    """Answer `one` with the draft, and ask somebody about an `order`."""
    asked = state["messages"][-1].text
    if asked == "order":
        return {"messages": [AIMessage(f"ordered: {interrupt('really?')}")]}
    return {"messages": [AIMessage("the draft" if asked == "one" else "fine")]}


def guard(app: Any, critic: Any = None, **settings: Any) -> Any:
    model = by_role(critique=flags("no-harm"))
    settings = {"constitution": RULES, "log": None, "critic": critic or model, "reviser": model} | settings
    return constitutional(app, **settings)


class Gate(ScriptedModel):
    """A critic that says nothing until it is let."""

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        self._asked.set()
        while not self._let.is_set():
            await asyncio.sleep(0.001)
        return self._generate(messages, *args, **kwargs)

    _asked: threading.Event
    _let: threading.Event

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        self._asked, self._let = threading.Event(), threading.Event()

    async def asked(self) -> None:
        """Wait until an answer is being judged."""
        while not self._asked.is_set():
            await asyncio.sleep(0.001)

    async def let(self) -> None:
        """Go on, once all others have come as far as they can."""
        await asyncio.sleep(0.05)
        self._let.set()


def gate() -> Gate:
    judging = by_role(critique=flags("no-harm")).replies
    return Gate(replies=judging)


@pytest.fixture(autouse=True)
def no_turn_is_left() -> Any:
    yield
    assert turns._queues == {}


# --- another run of the thread ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_an_answer_is_judged_though_another_run_stands_in_the_thread(
    way: str, mode: Any, tmp_path: Path
) -> None:
    app = graph(says)

    def meanwhile(run: Any) -> None:  # as another process would
        other = threading.Thread(target=app.invoke, args=(asks("two"), THREAD), kwargs=STANDS)
        other.start()
        other.join()

    with open_log(tmp_path / "cai.db") as log:
        guarded = guard(app.with_listeners(on_end=meanwhile), log=log, mode=mode)
        match way:
            case "invoke":
                output = guarded.invoke(asks("one"), THREAD)
            case "ainvoke":
                output = await guarded.ainvoke(asks("one"), THREAD)
            case "stream":
                *_, output = guarded.stream(asks("one"), THREAD, stream_mode="values")
            case _:
                output = await last(guarded.astream(asks("one"), THREAD, stream_mode="values"))
        if guarded.shadow is not None:
            await guarded.shadow.aclose()
            assert guarded.shadow.tally.judged == 1
        log.flush()
        (record,) = log.read(kind="trajectory")

    assert texts(output) == ["one", "the draft" if mode == "shadow" else "better"]
    assert record.released.content == texts(output)[-1]  # type: ignore[union-attr]
    if mode == "enforce":
        assert texts(app.get_state(THREAD).values) == ["one", "better", "two"]


STANDS: dict[str, Any] = {"interrupt_before": ["answer"]}


@pytest.mark.parametrize("way", ["batch", "abatch"])
async def test_requests_at_once_are_answered_one_after_the_other(way: str) -> None:
    app = graph(says)
    guarded = guard(app)
    many = [asks("one")] * 6
    if way == "batch":
        outputs = await asyncio.to_thread(guarded.batch, many, THREAD)
    else:
        outputs = await guarded.abatch(many, THREAD)

    assert sorted(len(output["messages"]) for output in outputs) == [2, 4, 6, 8, 10, 12]
    assert all(texts(output) == ["one", "better"] * (len(output["messages"]) // 2) for output in outputs)
    assert texts(app.get_state(THREAD).values) == ["one", "better"] * 6


async def test_who_comes_while_an_answer_is_judged_is_not_given_its_draft() -> None:
    critic = gate()
    app = graph(says)
    guarded = guard(app, critic)

    first = asyncio.create_task(guarded.ainvoke(asks("one"), THREAD))
    await critic.asked()
    second = asyncio.create_task(asyncio.to_thread(guarded.invoke, asks("two"), THREAD))
    await critic.let()

    assert texts(await first) == ["one", "better"]
    assert texts(await second) == ["one", "better", "two", "fine"]
    assert texts(app.get_state(THREAD).values) == ["one", "better", "two", "fine"]


async def test_other_threads_do_not_wait() -> None:
    critic = gate()
    guarded, other = guard(graph(says), critic), guard(graph(says))
    first = asyncio.create_task(guarded.ainvoke(asks("one"), THREAD))
    await critic.asked()

    assert texts(await other.ainvoke(asks("one"), THREAD)) == ["one", "better"]  # of another checkpointer
    waiting = asyncio.create_task(guarded.ainvoke(asks("two"), {"configurable": {"thread_id": "2"}}))
    await critic.let()

    assert texts(await waiting) == ["two", "fine"]
    assert texts(await first) == ["one", "better"]


async def test_a_pause_that_comes_while_an_answer_is_judged_can_be_resumed() -> None:
    critic = gate()
    app = graph(says)
    guarded = guard(app, critic)
    first = asyncio.create_task(guarded.ainvoke(asks("one"), THREAD))
    await critic.asked()
    second = asyncio.create_task(guarded.ainvoke(asks("order"), THREAD))
    await critic.let()

    assert texts(await first) == ["one", "better"]
    assert "__interrupt__" in await second
    resumed = await guarded.ainvoke(Command(resume="yes"), THREAD)
    assert texts(resumed) == ["one", "better", "order", "ordered: yes"]


async def test_who_waited_while_a_request_came_to_wait_for_a_person_is_told_so() -> None:
    critic = gate()
    app = graph(says)
    never = by_role(critique="", revise="the draft")
    guarded = guard(app, critic, reviser=never, on_violation="human", checkpointer=InMemorySaver())
    first = asyncio.create_task(guarded.ainvoke(asks("one"), THREAD))
    await critic.asked()
    second = asyncio.create_task(guarded.ainvoke(asks("two"), THREAD))
    await critic.let()

    assert "__interrupt__" in await first
    with pytest.raises(AwaitsReview):
        await second
    decided = await guarded.ainvoke(Command(resume={"decision": "reject"}), THREAD)
    assert texts(decided) == texts(app.get_state(THREAD).values) == ["one", RULES.refusal]


# --- waiting ------------------------------------------------------------------------------------------


async def test_waiting_counts_against_the_seconds_and_can_be_cancelled() -> None:
    critic = gate()
    app = graph(says)
    guarded, hasty = guard(app, critic), guard(app, critic, budget=Budget(seconds=0.05))
    first = asyncio.create_task(guarded.ainvoke(asks("one"), THREAD))
    await critic.asked()
    second = asyncio.create_task(guarded.ainvoke(asks("two"), THREAD))
    third = asyncio.create_task(guarded.ainvoke(asks("three"), THREAD))

    with pytest.raises(BudgetExceeded):
        await hasty.ainvoke(asks("four"), THREAD)
    second.cancel()
    await asyncio.wait([second])
    assert texts(app.get_state(THREAD).values) == ["one", "the draft"]  # it is still being judged
    await critic.let()

    assert texts(await first) == ["one", "better"]
    assert texts(await third) == ["one", "better", "three", "fine"]
    with pytest.raises(asyncio.CancelledError):
        await second


async def test_a_synchronous_call_does_not_wait_for_the_loop_that_it_blocks() -> None:
    critic = gate()
    guarded = guard(graph(says), critic)
    first = asyncio.create_task(guarded.ainvoke(asks("one"), THREAD))
    await critic.asked()

    with pytest.raises(RunError, match="blocks what it runs in"):
        guarded.invoke(asks("two"), THREAD)
    await critic.let()

    assert texts(await first) == ["one", "better"]


def test_a_turn_whose_event_loop_has_gone_keeps_nobody_waiting() -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(turns.Turn("thread").begin(None))
    loop.close()

    async def come() -> None:
        turn = turns.Turn("thread")
        assert not await asyncio.wait_for(turn.begin(None), 5)
        turn.end()

    asyncio.run(come())


async def test_a_turn_that_was_given_to_one_who_is_cancelled_is_given_on() -> None:
    first, second, third = (turns.Turn("thread") for _ in range(3))
    await first.begin(None)
    waiting = [asyncio.create_task(turn.begin(None)) for turn in (second, third)]
    await asyncio.sleep(0)

    first.end()
    waiting[0].cancel()  # it has the turn by now, and does not know it yet
    assert await asyncio.wait_for(waiting[1], 5)
    third.end()


# --- inside a turn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_a_graph_may_ask_itself_on_its_own_thread(way: str) -> None:
    own: list[Any] = []

    def answer(state: MessagesState) -> Any:
        if state["messages"][-1].text == "one":
            return says(state)
        inner = own[0].invoke(asks("one"), THREAD)
        return {"messages": [AIMessage(f"it says {inner['messages'][-1].text}")]}

    async def aanswer(state: MessagesState) -> Any:
        if state["messages"][-1].text == "one":
            return says(state)
        inner = await own[0].ainvoke(asks("one"), THREAD)
        return {"messages": [AIMessage(f"it says {inner['messages'][-1].text}")]}

    guarded = guard(graph(answer if way in ("invoke", "stream") else aanswer), budget=Budget(seconds=5))
    own.append(guarded)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "invoke": lambda: asyncio.to_thread(guarded.invoke, asks("outer"), THREAD),
        "ainvoke": lambda: guarded.ainvoke(asks("outer"), THREAD),
        "stream": lambda: asyncio.to_thread(
            lambda: [*guarded.stream(asks("outer"), THREAD, stream_mode="values")][-1]
        ),
        "astream": lambda: last(guarded.astream(asks("outer"), THREAD, stream_mode="values")),
    }

    assert texts(await calls[way]())[-1] == "it says better"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_graphs_that_ask_each_other_do_not_wait_for_each_other(way: str) -> None:
    both: dict[str, Any] = {}
    met = threading.Barrier(2)

    def asking(other: str) -> Any:
        def answer(state: MessagesState) -> Any:
            if state["messages"][-1].text == "one":
                return says(state)
            met.wait(5)  # each has its own turn
            inner = both[other].invoke(asks("one"), THREAD)
            return {"messages": [AIMessage(f"it says {inner['messages'][-1].text}")]}

        async def aanswer(state: MessagesState) -> Any:
            if state["messages"][-1].text == "one":
                return says(state)
            await asyncio.to_thread(met.wait, 5)
            inner = await both[other].ainvoke(asks("one"), THREAD)
            return {"messages": [AIMessage(f"it says {inner['messages'][-1].text}")]}

        return graph(answer if way == "invoke" else aanswer)

    for name, other in (("a", "b"), ("b", "a")):
        both[name] = guard(asking(other), budget=Budget(seconds=5))

    def call(name: str) -> Awaitable[Any]:
        if way == "invoke":
            return asyncio.to_thread(both[name].invoke, asks("outer"), THREAD)
        return both[name].ainvoke(asks("outer"), THREAD)

    outputs = await asyncio.gather(call("a"), call("b"))

    assert [texts(output)[-1] for output in outputs] == ["it says better"] * 2


async def last(chunks: Any) -> Any:
    return [chunk async for chunk in chunks][-1]
