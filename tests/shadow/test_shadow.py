"""Shadow mode: the answer leaves untouched and at once, and nothing that left goes missing."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain_core.callbacks import (
    BaseCallbackHandler,
    UsageMetadataCallbackHandler,
    get_usage_metadata_callback,
)
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from replies import RULES, by_role, flags, logged, verdicts
from repository import fenced, read_page
from wire import role, serving

from cai_graph import Settings, constitutional, open_log
from cai_graph.concurrency import bridge
from cai_graph.constitution import load
from cai_graph.errors import ConfigError, LogError
from cai_graph.log import Log
from cai_graph.log.commit import Commit, resolve
from cai_graph.shadow import shadow
from cai_graph.shadow.shadow import Tally
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Outcome, text_of


class Gate:
    """A critic's model that says nothing until it is opened."""

    def __init__(self, *violated: str) -> None:
        self.open = threading.Event()
        self.asked = 0
        said = flags(*violated, answers=("the draft",))

        class Waiting(ScriptedModel):
            async def _agenerate(model, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:  # noqa: N805
                self.asked += 1
                while not self.open.is_set():
                    await asyncio.sleep(0.005)
                return model._generate(messages, *args, **kwargs)

        self.model = Waiting(replies=lambda messages: said(messages))


def behind(app: Runnable[Any, Any], log: Log | None, critic: Any = None, **settings: Any) -> Any:
    judge = critic if critic is not None else by_role(critique=flags("no-harm"))
    return constitutional(
        app,
        constitution=RULES,
        critic=judge,
        reviser=by_role(critique="", revise="better"),
        log=log,
        mode="shadow",
        **settings,
    )


def drafting(**extra: Any) -> ScriptedModel:
    return ScriptedModel(replies=lambda messages: AIMessage("the draft", **extra))


def agent(model: Runnable[Any, Any]) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile()


def remembering(*, waits: bool = False, **options: Any) -> Any:
    def answer(state: MessagesState) -> Any:
        said = interrupt("may I?") if waits else len(state["messages"])
        return {"messages": [AIMessage(f"answer {said}")]}

    graph = StateGraph(MessagesState)
    graph.add_node("prepare", lambda state: {})
    graph.add_node("answer", answer)
    graph.add_edge(START, "prepare")
    graph.add_edge("prepare", "answer")
    return graph.compile(checkpointer=InMemorySaver(), **options)


@pytest.mark.parametrize("waits", ["never", "interrupt", "breakpoint"])
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
@pytest.mark.parametrize("sample", [1.0, 0.0])
async def test_an_app_that_remembers_is_recorded_with_what_came_before(
    waits: str, way: str, sample: float, log: Log
) -> None:
    options = {"interrupt_before": ["answer"]} if waits == "breakpoint" else {}
    guarded = behind(remembering(waits=waits == "interrupt", **options), log, sample=sample)
    config: Any = {"configurable": {"thread_id": "1"}}

    async def call(given: Any) -> None:
        match way:
            case "invoke":
                guarded.invoke(given, config)
            case "ainvoke":
                await guarded.ainvoke(given, config)
            case "stream":
                list(guarded.stream(given, config))
            case "astream":
                [chunk async for chunk in guarded.astream(given, config)]

    for question, said in (("first", "1"), ("second", "3")):
        await call({"messages": [HumanMessage(question)]})
        if waits != "never":
            await call(Command(resume=said) if waits == "interrupt" else None)
    await guarded.shadow.aclose()

    found = [[text_of(message) for message in (*t.messages, t.released)] for t in logged(log)]
    assert sorted(found) == [["first", "answer 1"], ["first", "answer 1", "second", "answer 3"]]
    assert {t.outcome for t in logged(log)} == {Outcome.KEPT if sample else Outcome.UNJUDGED}


# --- untouched ----------------------------------------------------------------------------------------

ASKED = {"messages": [HumanMessage("hello", id="1")]}
APPS: dict[str, tuple[Callable[[], Runnable[Any, Any]], Any]] = {
    "model": (lambda: drafting(response_metadata={"x": 1}, id="answer"), "hello"),
    "chain": (lambda: drafting() | StrOutputParser(), "hello"),
    "graph": (lambda: agent(drafting(id="answer")), ASKED),
}


@pytest.mark.parametrize("kind", APPS)
async def test_what_leaves_is_what_the_bare_app_gives(kind: str, log: Log) -> None:
    make, asked = APPS[kind]
    bare, guarded = make(), behind(make(), log)

    assert guarded.invoke(asked) == bare.invoke(asked)
    assert await guarded.ainvoke(asked) == await bare.ainvoke(asked)
    assert _plain(list(guarded.stream(asked))) == _plain(list(bare.stream(asked)))
    assert _plain([c async for c in guarded.astream(asked)]) == _plain([c async for c in bare.astream(asked)])
    assert guarded.batch([asked, asked]) == bare.batch([asked, asked])

    await guarded.shadow.aclose()
    found = logged(log)
    assert [(t.mode, t.outcome, t.released_from) for t in found] == [("shadow", Outcome.REVISED, "draft")] * 6
    assert {t.released and text_of(t.released) for t in found} == {"the draft"}
    assert {t.rounds[0].revisions[0].accepted for t in found} == {True}
    assert {t.prompt for t in found} == {"hello"}
    assert {tuple(call.role for call in t.calls) for t in found} == {
        ("draft", "critique", "revise", "critique")
    }
    assert guarded.shadow.tally == Tally(answers=6, judged=6)


def _plain(chunks: list[Any]) -> list[Any]:
    """Chunks without the ids that LangChain makes up."""
    return [(type(c), c.content) if isinstance(c, BaseMessage) else c for c in chunks]


def test_langchains_own_entry_to_a_model_passes_too(log: Log) -> None:
    usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    guarded = behind(drafting(usage_metadata=usage, response_metadata={"model_name": "m"}), log)
    counter = UsageMetadataCallbackHandler()
    with get_usage_metadata_callback() as ambient:
        result = guarded.generate([[HumanMessage("hello")]], callbacks=[counter])

    message = result.generations[0][0].message
    assert (message.usage_metadata, "cai" in message.response_metadata) == (usage, False)
    assert counter.usage_metadata["m"] == ambient.usage_metadata["m"] == usage
    guarded.shadow.close()
    assert [t.outcome for t in logged(log)] == [Outcome.REVISED]


class Sampled(ScriptedModel):
    """A model that answers with two candidates, and says what they cost."""

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        said = [ChatGeneration(message=AIMessage(text)) for text in ("one", "two")]
        return ChatResult(generations=said, llm_output={"cost": 1})

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate()

    def _combine_llm_outputs(self, outputs: list[dict[str, Any] | None], /) -> dict[str, Any]:
        return {"cost": sum(output["cost"] for output in outputs if output)}


@pytest.mark.parametrize("way", ["generate", "agenerate"])
async def test_all_candidates_leave_and_the_first_is_judged(log: Log, way: str) -> None:
    guarded = behind(Sampled(replies=[]), log)
    asked: Any = [[HumanMessage("hello")], [HumanMessage("hi")]]

    async def answers(model: Any, **kwargs: Any) -> LLMResult:
        if way == "agenerate":
            return await model.agenerate(asked, **kwargs)
        return await asyncio.to_thread(model.generate, asked, **kwargs)

    result = await answers(guarded, tags=["mine"])
    guarded.shadow.close()

    texts = [[each.text for each in candidates] for candidates in result.generations]
    assert texts == [["one", "two"]] * 2
    assert (result.llm_output, len(result.run or ())) == ({"cost": 2}, 2)
    judged = {(t.prompt, text_of(t.draft.answer), t.tags) for t in logged(log) if t.draft is not None}
    assert judged == {("hello", "one", ("mine",)), ("hi", "one", ("mine",))}


def test_json_that_a_call_asks_for_is_revised_as_json(log: Log) -> None:
    revisions = iter(["I would not say so.", '{"city": "Oslo"}'])
    guarded = constitutional(
        ScriptedModel(replies=['{"city": "the draft"}']),
        constitution=RULES,
        critic=by_role(critique=flags("no-harm", answers=['{"city": "the draft"}'])),
        reviser=by_role(critique="", revise=lambda _: next(revisions)),
        log=log,
        mode="shadow",
    )
    guarded.invoke("hello", response_format={"type": "json_object"})
    assert guarded.shadow is not None
    guarded.shadow.close()

    (record,) = logged(log)
    assert record.outcome is Outcome.REVISED
    assert text_of(record.rounds[-1].revisions[0].answer) == '{"city": "Oslo"}'


async def test_events_of_a_stream_are_those_of_the_bare_model(log: Log) -> None:
    async def events(model: Any) -> list[tuple[str, str]]:
        return [(e["event"], e["name"]) async for e in model.astream_events("hello", version="v2")]

    assert await events(behind(drafting(), log)) == await events(drafting())


def test_a_graphs_tokens_stream_as_they_do_without_it(log: Log) -> None:
    def tokens(app: Any) -> list[str]:
        return [chunk.content for chunk, _ in app.stream(ASKED, stream_mode="messages")]

    inner = behind(drafting(), log)
    assert tokens(agent(inner)) == tokens(agent(drafting())) == ["the ", "draft"]
    assert tokens(behind(agent(drafting()), log)) == ["the ", "draft"]
    inner.shadow.close()


def test_tools_stay_bound(log: Log) -> None:
    class Bindable(ScriptedModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self.bind(tools=tools)

    call = {"name": "search", "args": {"q": "x"}, "id": "1", "type": "tool_call"}
    model = Bindable(replies=[AIMessage("", tool_calls=[call])])
    guarded = behind(model, log).bind_tools([{"name": "search"}])

    assert guarded.invoke("hello").tool_calls == [call]


async def test_an_agents_turns_pass_and_are_judged_behind(log: Log) -> None:
    from langchain.agents import create_agent

    from cai_graph.middleware import ConstitutionalMiddleware

    def conversation(**extra: Any) -> list[tuple[str, str]]:
        agent = create_agent(drafting(id="answer"), **extra)
        return [(m.type, m.text) for m in agent.invoke(ASKED)["messages"]]

    guard = ConstitutionalMiddleware(
        constitution=RULES,
        critic=by_role(critique=flags("no-harm")),
        reviser=by_role(critique="", revise="better"),
        log=log,
        mode="shadow",
    )
    assert conversation(middleware=[guard]) == conversation()
    agent = create_agent(drafting(id="answer"), middleware=[guard])
    streamed = [c.content async for c, _ in agent.astream(ASKED, stream_mode="messages")]
    assert streamed == ["the ", "draft"]
    assert guard.shadow is not None
    await guard.shadow.aclose()

    assert [(t.outcome, t.released_from) for t in logged(log)] == [(Outcome.REVISED, "draft")] * 2


def test_the_app_runs_in_the_callers_thread(log: Log) -> None:
    seen: list[threading.Thread] = []

    def app(asked: str) -> str:
        seen.append(threading.current_thread())
        return "fine"

    behind(RunnableLambda(app), log).invoke("hello")

    assert seen == [threading.current_thread()]


# --- at once ------------------------------------------------------------------------------------------


def test_the_answer_does_not_wait_for_its_critic(log: Log) -> None:
    gate = Gate()
    guarded = behind(drafting(), log, gate.model)

    assert guarded.invoke("hello").content == "the draft"
    assert guarded.shadow.tally == Tally(answers=1, waiting=1)
    gate.open.set()
    guarded.shadow.close()
    assert guarded.shadow.tally == Tally(answers=1, judged=1)


def test_a_loop_that_ends_leaves_the_judgement_going(log: Log) -> None:
    gate = Gate()
    guarded = behind(drafting(), log, gate.model)

    for _ in range(2):
        asyncio.run(guarded.ainvoke("hello"))
    gate.open.set()
    guarded.shadow.close()

    assert [t.outcome for t in logged(log)] == [Outcome.KEPT] * 2


async def test_answered_waits_for_the_record(log: Log) -> None:
    output, trajectory = await behind(drafting() | StrOutputParser(), log).answered("hello", source="row 1")

    assert output == "the draft"
    assert (trajectory.outcome, trajectory.source) == (Outcome.REVISED, "row 1")


async def test_who_gives_up_waiting_for_the_record_leaves_it_to_the_log(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    guarded = behind(drafting(), log, gate.model)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(guarded.answered("hello"), 0.05)
    gate.open.set()
    await guarded.shadow.aclose()
    await asyncio.to_thread(bridge.run, settled)

    assert [t.outcome for t in logged(log)] == [Outcome.KEPT]
    assert not caplog.text


async def settled(caller: bridge.Caller) -> None:
    """Until what the bridge's loop has ended is let go of, and has said what went wrong."""
    await asyncio.sleep(0)
    gc.collect()


def test_each_judgement_runs_in_its_own_callers_context(log: Log) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")
    seen: list[str] = []

    def critique(messages: list[BaseMessage]) -> str:
        seen.append(tenant.get())
        return verdicts()

    guarded = behind(drafting(), log, ScriptedModel(replies=critique), shadow_concurrency=1)
    for name in ("a", "b", "c"):
        contextvars.copy_context().run(lambda name=name: (tenant.set(name), guarded.invoke("hello")))
    guarded.shadow.close()

    assert seen == ["a", "b", "c"]


def test_tracers_see_the_calls_behind_and_the_callers_metadata_is_recorded(log: Log) -> None:
    class Tracer(BaseCallbackHandler):
        seen: int = 0

        def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
            self.seen += 1

    tracer = Tracer()
    guarded = behind(drafting() | StrOutputParser(), log)
    guarded.invoke("hello", {"callbacks": [tracer], "metadata": {"user": "u1"}, "tags": ["beta"]})
    guarded.shadow.close()

    assert tracer.seen == 4
    (found,) = logged(log)
    assert (found.metadata, found.tags) == ({"user": "u1"}, ("beta",))


# --- what goes wrong ----------------------------------------------------------------------------------


def test_the_apps_own_error_leaves_and_is_logged(log: Log) -> None:
    guarded = behind(ScriptedModel(replies=[ValueError("app broke")]), log)

    with pytest.raises(ValueError, match="app broke"):
        guarded.invoke("hello")
    guarded.shadow.close()

    (found,) = logged(log)
    assert (found.outcome, found.draft, found.released) == (Outcome.FAILED, None, None)
    assert found.error == "ValueError: app broke"
    assert guarded.shadow.tally == Tally(answers=1, failed=1)


def test_a_critic_that_fails_costs_the_verdict_and_not_the_answer(log: Log) -> None:
    guarded = behind(drafting(), log, ScriptedModel(replies=[OSError("critic down")]))

    assert guarded.invoke("hello").content == "the draft"
    guarded.shadow.close()

    (found,) = logged(log)
    assert (found.outcome, found.error) == (Outcome.FAILED, "OSError: critic down")
    assert found.released is not None
    assert found.released_from == "draft"


@pytest.mark.parametrize("policy", ["raise", "closed", "open"])
def test_the_outcome_is_what_the_policies_would_have_done(policy: Any, log: Log) -> None:
    stubborn = by_role(critique=flags("no-harm", answers=("the draft", "better")))
    guarded = behind(drafting(), log, stubborn, on_violation=policy)

    assert guarded.invoke("hello").content == "the draft"
    guarded.shadow.close()

    would = {"raise": Outcome.FAILED, "closed": Outcome.REFUSED, "open": Outcome.EXHAUSTED}
    (found,) = logged(log)
    assert (found.outcome, found.released_from) == (would[policy], "draft")


def test_an_invoke_of_another_stream_mode_is_judged_as_what_the_graph_came_to(log: Log) -> None:
    guarded = behind(remembering(), log)
    thread: Any = {"configurable": {"thread_id": "1"}}

    chunks = guarded.invoke({"messages": [("user", "hello")]}, thread, stream_mode="updates")
    guarded.shadow.close()

    assert isinstance(chunks, list)
    (found,) = logged(log)
    assert (found.outcome, found.error) == (Outcome.KEPT, None)


def test_an_input_without_a_request_passes_and_is_logged_as_such(log: Log) -> None:
    asked, answered = (behind(RunnableLambda(app), log) for app in (str, lambda asked: 7))

    assert (asked.invoke(7), answered.invoke("hello")) == ("7", 7)
    asked.shadow.close()
    answered.shadow.close()

    assert [(t.outcome, (t.error or "")[:10]) for t in logged(log)] == [(Outcome.FAILED, "DataError:")] * 2


def test_a_stream_that_its_reader_closes_is_logged_as_far_as_it_left(log: Log) -> None:
    guarded = behind(drafting(), log)
    chunks = guarded.stream("hello")
    assert next(chunks).content == "the "
    chunks.close()
    guarded.shadow.close()

    (found,) = logged(log)
    assert (found.outcome, found.error) == (Outcome.FAILED, "RunError: the reader closed the stream")
    assert found.released is not None
    assert text_of(found.released) == "the "


def test_an_app_that_waits_for_a_person_logs_nothing_until_it_is_resumed(log: Log) -> None:
    class State(TypedDict, total=False):
        input: str
        output: str

    def ask(state: State) -> State:
        return {"output": interrupt("may I?")}

    graph = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    guarded = behind(graph.compile(checkpointer=InMemorySaver()), log)
    assert "__interrupt__" in guarded.invoke({"input": "hello"}, {"configurable": {"thread_id": "1"}})
    assert guarded.shadow.tally == Tally()


# --- sampling -----------------------------------------------------------------------------------------


def test_a_sample_is_judged_and_the_rest_is_logged_unjudged(log: Log) -> None:
    guarded = behind(drafting(), log, sample=0.3)
    for number in range(60):
        guarded.invoke(f"question {number}")
    guarded.shadow.close()

    found = logged(log)
    drawn = [t for t in found if t.unjudged is None]
    assert 5 <= len(drawn) <= 35
    assert {t.outcome for t in drawn} == {Outcome.REVISED}
    rest = [t for t in found if t.unjudged is not None]
    assert {(t.outcome, t.unjudged, t.rounds, t.released_from) for t in rest} == {
        (Outcome.UNJUDGED, "sample", (), "draft")
    }
    assert guarded.shadow.tally == Tally(answers=60, judged=len(drawn), unjudged=len(rest))
    # The record says itself whether it was drawn, and by which share.
    assert all((int(t.id[-12:], 16) / (1 << 48) < 0.3) == (t.unjudged is None) for t in found)
    assert {t.settings["sample"] for t in found} == {0.3}


def test_with_a_seed_the_conversation_decides(log: Log) -> None:
    def drawn(seed: int) -> list[bool]:
        guarded = behind(drafting(), log, sample=0.5, seed=seed)
        for number in range(30):
            guarded.invoke(f"question {number}")
        guarded.shadow.close()
        answered = sorted(logged(log)[-30:], key=lambda t: int(t.prompt.split()[1]))
        return [t.unjudged is None for t in answered]

    first = drawn(1)
    assert {True, False} == set(first)
    assert drawn(1) == first
    assert drawn(2) != first


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"mode": "shade"}, "mode is one of enforce, shadow"),
        ({"mode": "shadow", "sample": 1.5}, "sample is a share from 0 to 1"),
        ({"sample": 0.5}, "mode 'enforce' judges every answer"),
        ({"mode": "shadow", "strategy": "sampled"}, "leave out strategy 'sampled'"),
        ({"mode": "shadow", "stream": "blocks"}, "leave out stream 'blocks'"),
        ({"mode": "shadow", "on_violation": "human"}, "leave out policy 'human'"),
        ({"mode": "shadow", "shadow_concurrency": 0}, "shadow_concurrency must be a whole number from 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**bad)


# --- overload -----------------------------------------------------------------------------------------


def test_what_is_over_the_bound_is_logged_unjudged_counted_and_warned_of(
    log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shadow, "WAITING", 3)
    gate = Gate()
    guarded = behind(drafting(), log, gate.model, shadow_concurrency=1)
    guarded.invoke("first")
    _until(lambda: gate.asked == 1)
    with caplog.at_level(logging.WARNING, "cai_graph"):
        for number in range(10):
            assert guarded.invoke(f"question {number}").content == "the draft"
            _until(lambda number=number: guarded.shadow.tally.unjudged == max(0, number - 2))
    gate.open.set()
    guarded.shadow.close()

    assert guarded.shadow.tally == Tally(answers=11, judged=4, unjudged=7)
    assert sum(t.unjudged == "overload" for t in logged(log)) == 7
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # at most one in ten seconds
    assert said[0].startswith(
        "shadow mode is overloaded: of 5 answers 0 were logged unjudged and 0 were lost"
    )


def test_bytes_are_bounded_too(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "WAITING_BYTES", 10_000)
    gate = Gate()
    guarded = behind(drafting(), log, gate.model)
    guarded.invoke("x" * 9_000)
    guarded.invoke("y" * 9_000)
    gate.open.set()
    guarded.shadow.close()

    assert [t.unjudged for t in sorted(logged(log), key=lambda t: t.prompt)] == [None, "overload"]


def test_room_that_was_taken_is_given_back(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "WAITING", 3)
    monkeypatch.setattr(shadow, "WAITING_BYTES", 10_000)
    gate = Gate()
    guarded = behind(drafting(), log, gate.model, shadow_concurrency=2)
    for number in range(5):
        guarded.invoke(f"question {number}")
        _until(lambda number=number: gate.asked == min(number + 1, 2))
    assert guarded.shadow.drain(0.05) is False
    gate.open.set()
    for _ in range(3):
        guarded.invoke("x" * 9_000)
        guarded.shadow.close()

    assert guarded.shadow.tally == Tally(answers=8, judged=3, unjudged=5)


def test_what_the_log_does_not_take_is_bounded_in_bytes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = threading.Event()

    def redact(record: Any) -> Any:  # runs on the log's writer thread, before anything is written
        open_.wait(20)
        return record

    monkeypatch.setattr(shadow, "WAITING_BYTES", 10_000)
    with open_log(tmp_path / "stuck.db", redact=redact) as stuck:
        guarded = behind(drafting(), stuck, sample=0)
        for _ in range(4):
            guarded.invoke("x" * 9_000)
        assert guarded.shadow.tally == Tally(answers=4, lost=2, waiting=2)
        open_.set()
        guarded.shadow.close()


def test_where_the_log_itself_is_stuck_the_loss_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_ = threading.Event()

    def redact(record: Any) -> Any:  # runs on the log's writer thread, before anything is written
        open_.wait(20)
        return record

    monkeypatch.setattr(shadow, "WAITING", 2)
    with open_log(tmp_path / "stuck.db", redact=redact) as stuck:
        guarded = behind(drafting(), stuck, sample=0)
        with caplog.at_level(logging.WARNING, "cai_graph"):
            for _ in range(7):
                assert guarded.invoke("hello").content == "the draft"

        assert guarded.shadow.tally == Tally(answers=7, lost=3, waiting=4)
        assert [r.levelno for r in caplog.records if "1 were lost" in r.getMessage()] == [logging.ERROR]
        open_.set()
        guarded.shadow.close()
        assert guarded.shadow.tally == Tally(answers=7, lost=3, unjudged=4)
        assert len(logged(stuck)) == 4


@pytest.mark.parametrize("at_once", [True, False])
def test_what_could_not_be_committed_is_lost_whatever_came_of_it(at_once: bool) -> None:
    class Full:
        is_full = False

        def append(self, record: Any) -> Any:
            if at_once:
                raise LogError("no space left on device")
            failed = Commit(condition := threading.Condition())
            threading.Timer(
                0.05, resolve, (condition, [(failed, LogError("no space left on device"))])
            ).start()
            return failed

        def flush(self) -> None: ...

    def failing(_: Any) -> str:
        raise ConnectionError("no route")

    judged, unjudged = behind(drafting(), Full()), behind(drafting(), Full(), sample=0)
    failed = behind(RunnableLambda(failing), Full())
    for _ in range(3):
        judged.invoke("hello")
        unjudged.invoke("hello")
        with pytest.raises(ConnectionError):
            failed.invoke("hello")

    for guarded in (judged, unjudged, failed):
        guarded.shadow.close()
        assert guarded.shadow.tally == Tally(answers=3, lost=3)


def test_a_drain_that_runs_out_of_time_logs_the_rest_unjudged(log: Log) -> None:
    gate = Gate()
    guarded = behind(drafting(), log, gate.model, shadow_concurrency=2)
    for number in range(5):
        guarded.invoke(f"question {number}")
    _until(lambda: gate.asked == 2)

    assert guarded.shadow.drain(0.05) is False
    assert guarded.shadow.tally == Tally(answers=5, unjudged=5)
    assert [(t.outcome, t.unjudged, t.error) for t in logged(log)] == [
        (Outcome.UNJUDGED, "shutdown", None)
    ] * 5
    gate.open.set()
    guarded.invoke("one more")  # and it goes on
    guarded.shadow.close()
    assert guarded.shadow.tally.judged == 1


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


# --- documentation ------------------------------------------------------------------------------------


def test_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = read_page("shadow.md")
    fine = verdicts(ids=[principle.id for principle in load("balanced")])
    monkeypatch.chdir(tmp_path)
    with serving(lambda body: fine if role(body) == "critique" else "Peppermint oil.") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        names: dict[str, Any] = {}
        for block in fenced(page, "python"):
            exec(block, names)

    assert "Peppermint oil.\nTally(answers=1, " in capsys.readouterr().out
    assert names["guarded"].shadow.tally.waiting == 0
