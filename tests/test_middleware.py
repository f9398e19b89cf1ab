"""The face for agents, inside real agents: what the model drafted is seen by nobody but critic and tracer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse, ModelRetryMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.tools import tool
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from pydantic import BaseModel
from replies import IDS, RULES, answer_in, by_role, principle, role_of, verdicts

from cai_graph import ConstitutionalMiddleware, ScriptedModel, installed
from cai_graph.constitution import Constitution
from cai_graph.errors import ConfigError, Refused, Violation
from cai_graph.log import Log, open_log
from cai_graph.trajectory import Label, Outcome, Rejection, Trajectory

CANARY = "CANARY-7f3a"
RELEASED = "rain, I am afraid"
CALL = {"name": "weather", "args": {"city": "Oslo"}, "id": "call-1", "type": "tool_call"}
THREAD: Any = {"configurable": {"thread_id": "1"}}
ASKED: Any = {"messages": [HumanMessage("How is the weather in Oslo?", id="asked")]}


class Streaming(ScriptedModel):
    """A scripted model that takes tools and streams its words."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Runnable[Any, AIMessage]:
        return self.bind(tools=tools, **kwargs)

    def _stream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        message = self._generate(messages).generations[0].message
        assert isinstance(message, AIMessage)
        run_manager = kwargs.get("run_manager")
        for word in message.text.split(" ") if message.text else []:
            chunk = ChatGenerationChunk(message=AIMessageChunk(f"{word} ", id=message.id))
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
        calls = [
            {"name": c["name"], "args": str(c["args"]).replace("'", '"'), "id": c["id"], "index": 0}
            for c in message.tool_calls
        ]
        last = AIMessageChunk("", id=message.id, tool_call_chunks=calls)  # type: ignore[arg-type]
        yield ChatGenerationChunk(message=last)

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        kwargs.pop("run_manager", None)
        for chunk in self._stream(messages):
            yield chunk


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    get_stream_writer()(f"looking at {city}")
    return f"rain in {city}"


def flags_canary(messages: list[BaseMessage]) -> str:
    asked = [identifier for identifier in IDS if f"\n{identifier}: " in messages[0].text]
    return verdicts(*(["no-harm"] if CANARY in answer_in(messages) else []), ids=asked)


def agents_model(
    draft: Callable[[list[BaseMessage]], str | AIMessage] | None = None,
    critique: Any = flags_canary,
    revise: Any = RELEASED,
) -> Streaming:
    """A model that asks for the weather first, and then answers with the canary."""

    def first_the_tool(messages: list[BaseMessage]) -> str | AIMessage:
        if isinstance(messages[-1], ToolMessage):
            return AIMessage(f"{CANARY} it rains, you fool", id="answer")
        return AIMessage("", id="call", tool_calls=[CALL])

    model = by_role(draft=draft or first_the_tool, critique=critique, revise=revise)
    return Streaming(replies=model.replies)


def guarded(model: Any = None, *, tools: Any = (weather,), middleware: Any = (), **options: Any) -> Any:
    settings = {"constitution": RULES, "log": None, **options.pop("settings", {})}
    face = ConstitutionalMiddleware(**settings)
    return create_agent(model or agents_model(), list(tools), middleware=[*middleware, face], **options)


async def run(agent: Any, way: str, asked: Any = ASKED, config: Any = THREAD) -> Any:
    if way == "invoke":
        return await asyncio.to_thread(agent.invoke, asked, config)
    return await agent.ainvoke(asked, config)


both_ways = pytest.mark.parametrize("way", ["invoke", "ainvoke"])


# --- nothing of a draft -------------------------------------------------------------------------------


@both_ways
async def test_the_agents_messages_hold_what_was_released_under_the_drafts_id(
    way: str, tmp_path: Path
) -> None:
    saver = InMemorySaver()
    with open_log(tmp_path / "cai.db") as log:
        agent = guarded(checkpointer=saver, settings={"log": log})
        state = await run(agent, way)
        trajectories = logged(log)

    assert [(m.type, m.text) for m in state["messages"]] == [
        ("human", "How is the weather in Oslo?"),
        ("ai", ""),
        ("tool", "rain in Oslo"),
        ("ai", RELEASED),
    ]
    assert state["messages"][1].tool_calls == [CALL]
    assert state["messages"][-1].id == "answer"
    assert state["messages"][-1].response_metadata["cai"]["outcome"] == "REVISED"
    assert agent.get_state(THREAD).values["messages"] == state["messages"]
    assert CANARY not in stored(saver)
    assert [t.outcome for t in trajectories] == [Outcome.KEPT, Outcome.REVISED]
    assert [len(t.calls) for t in trajectories] == [1, 4]  # the turn that calls a tool costs nothing


def logged(log: Log) -> list[Trajectory]:
    log.flush()
    return [record for record in log.read() if isinstance(record, Trajectory)]


def stored(saver: InMemorySaver) -> str:
    return str((dict(saver.storage), dict(saver.writes), dict(saver.blobs)))


def test_the_search_for_canaries_would_find_one() -> None:
    saver = InMemorySaver()
    bare = create_agent(agents_model(), [weather], checkpointer=saver)

    bare.invoke(ASKED, THREAD)

    assert CANARY in stored(saver)


@pytest.mark.parametrize("mode", ["messages", "updates", "custom", "values", "tasks", "debug", "checkpoints"])
@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_no_stream_of_the_agent_shows_a_draft(mode: Any, way: str) -> None:
    saver = InMemorySaver()
    agent = guarded(checkpointer=saver)

    if way == "stream":
        parts = await asyncio.to_thread(
            lambda: list(agent.stream(ASKED, THREAD, stream_mode=mode, subgraphs=True))
        )
    else:
        parts = [part async for part in agent.astream(ASKED, THREAD, stream_mode=mode, subgraphs=True)]

    assert CANARY not in str(parts) + stored(saver)
    assert ("looking at Oslo" if mode == "custom" else RELEASED) in str(parts)


async def test_no_event_shows_a_draft_and_a_tracer_sees_every_call() -> None:
    class Tracer(BaseTracer):
        runs: list[Run] = []  # noqa: RUF012 - one tracer, one test

        def _persist_run(self, run: Run) -> None:
            self.runs.append(run)

    tracer = Tracer()
    config: Any = {**THREAD, "callbacks": [tracer]}

    events = [event async for event in guarded().astream_events(ASKED, config, version="v2")]

    assert CANARY not in str(events)
    assert RELEASED in str(events)

    def calls(run: Run) -> list[str]:
        below = [said for child in run.child_runs for said in calls(child)]
        return [str(run.outputs), *below] if run.run_type == "llm" else below

    assert [run.name for run in tracer.runs] == ["LangGraph"]
    assert [CANARY in said for said in calls(tracer.runs[0])] == [False, True, False, False, False]


async def test_events_show_what_is_released_as_a_models_answer() -> None:
    events = [event async for event in guarded().astream_events(ASKED, THREAD, version="v2")]
    told = [event for event in events if event["event"].startswith("on_chat_model")]

    assert [event["event"].removeprefix("on_chat_model_") for event in told] == ["start", "stream", "end"] * 2
    assert {event["metadata"]["langgraph_node"] for event in told} == {"model"}
    assert [call["name"] for call in told[2]["data"]["output"].tool_calls] == ["weather"]
    assert [event["data"]["chunk"].text for event in told if "chunk" in event["data"]] == ["", RELEASED]


@pytest.mark.parametrize("known_by", [{"include_tags": ["final"]}, {"include_names": ["Streaming"]}])
async def test_readers_of_events_find_the_model_that_answers(known_by: Any) -> None:
    model = agents_model().model_copy(update={"tags": ["final"], "metadata": {"of": "final"}})

    events = [event async for event in guarded(model).astream_events(ASKED, THREAD, version="v2", **known_by)]
    shown = [about async for _, about in guarded(model).astream(ASKED, THREAD, stream_mode="messages")]

    assert [e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream"] == ["", RELEASED]
    told = [about for about in shown if about["langgraph_node"] == "model"]
    assert [(about["of"], about["tags"]) for about in told] == [("final", ["final"])] * 2


def test_a_message_that_was_streamed_comes_once_though_its_model_gave_it_no_id() -> None:
    class Nameless(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> ModelResponse[Any]:
            return ModelResponse(result=[AIMessage("no model is asked")])

    face = ConstitutionalMiddleware(constitution=RULES, critic=by_role(critique=flags_canary), log=None)
    agent: Any = create_agent(agents_model(), [], middleware=[face, Nameless()])
    shown = [message.text for message, _ in agent.stream(ASKED, stream_mode="messages")]

    assert shown == ["no model is asked"]


def test_a_stream_shows_a_refusal_that_the_model_gives_as_a_part() -> None:
    parts: list[Any] = [{"type": "text", "text": "Well: "}, {"type": "refusal", "refusal": "I will not."}]
    face = ConstitutionalMiddleware(constitution=RULES, critic=by_role(critique=flags_canary), log=None)

    def shown(*middleware: Any) -> list[Any]:
        model = ScriptedModel(replies=[AIMessage(parts, id="1")])
        agent: Any = create_agent(model, [], middleware=middleware)
        return [message.content for message, _ in agent.stream(ASKED, stream_mode="messages")]

    assert shown(face) == shown() == [parts]


def test_handlers_that_show_tokens_are_told_in_the_callers_thread() -> None:
    heard: list[tuple[str, threading.Thread]] = []

    class Printing(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            heard.append((token, threading.current_thread()))

    node: list[threading.Thread] = []

    class Where(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            node.append(threading.current_thread())
            return handler(request)

    guarded(middleware=[Where()]).invoke(ASKED, {**THREAD, "callbacks": [Printing()]})

    assert [each for each in heard if each[0]] == [(RELEASED, node[-1])]


async def test_who_reads_tokens_is_told_where_none_come() -> None:
    heard: list[str] = []

    class Printing(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            heard.append(token)

        def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
            heard.append(type(error).__name__)

    agent = guarded(settings={"max_rounds": 0, "on_violation": "raise"})
    with pytest.raises(Violation):
        await agent.ainvoke(ASKED, {**THREAD, "callbacks": [Printing()]})

    assert heard[-1] == "Violation"
    assert CANARY not in str(heard)


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
async def test_the_third_version_of_events_shows_no_draft() -> None:
    run = await guarded().astream_events(ASKED, version="v3")
    events = [event async for event in run]
    events += await asyncio.to_thread(lambda: list(guarded().stream_events(ASKED, version="v3")))

    assert CANARY not in str(events)
    assert str(events).count(RELEASED) >= 2


# --- turns that call tools ----------------------------------------------------------------------------


PAYS = Constitution(
    name="pays",
    principles=(
        principle("no-harm", "harmless"),
        principle("no-orders", "policy", tools=True),
    ),
    refusal="I would rather not.",
)


@tool
def order(item: str) -> str:
    """Order something."""
    raise AssertionError("an order that a principle forbids was carried out")


ORDER = {"name": "order", "args": {"item": "a yacht"}, "id": "call-2", "type": "tool_call"}


def ordering(critique: Any, revise: Any = "Shall I order the yacht?") -> Streaming:
    return agents_model(lambda _: AIMessage("", id="call", tool_calls=[ORDER]), critique, revise)


def finds_the_order(messages: list[BaseMessage]) -> str:
    asked = [rule.id for rule in PAYS if f"\n{rule.id}: " in messages[0].text]
    called = "[calls the tool order with" in messages[-1].text
    assert asked == (["no-orders"] if called else ["no-harm", "no-orders"])  # words are judged by all
    broken = ["no-orders"] if called else ["no-harm"] if CANARY in answer_in(messages) else []
    return verdicts(*broken, ids=asked)


@both_ways
async def test_a_call_that_a_principle_of_tools_forbids_gives_way_to_words(way: str, tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        agent = guarded(ordering(finds_the_order), tools=[order], settings={"constitution": PAYS, "log": log})
        state = await run(agent, way)
        (trajectory,) = logged(log)

    last = state["messages"][-1]
    assert (last.text, last.tool_calls, last.id) == ("Shall I order the yacht?", [], "call")
    assert trajectory.outcome is Outcome.REVISED
    assert trajectory.constitution.digest == PAYS.digest
    assert [v.principle for v in trajectory.rounds[0].critique.verdicts] == ["no-orders"]
    assert trajectory.draft is not None
    assert trajectory.draft.answer.tool_calls[0].name == "order"
    assert trajectory.released is not None
    assert trajectory.released.tool_calls == ()


@pytest.mark.parametrize("strategy", ["batched", "parallel"])
def test_words_that_stand_in_for_a_call_are_judged_by_every_principle(strategy: str) -> None:
    settings = {"constitution": PAYS, "max_rounds": 1, "strategy": strategy}

    def critique(messages: list[BaseMessage]) -> str:
        asked = [rule.id for rule in PAYS if f"\n{rule.id}: " in messages[0].text]
        called = "[calls the tool order with" in messages[-1].text
        broken = {"no-orders": called, "no-harm": CANARY in answer_in(messages)}
        assert not (called and "no-harm" in asked)
        return verdicts(*[name for name in asked if broken[name]], ids=asked)

    refused = guarded(ordering(critique, f"{CANARY} words"), tools=[order], settings=settings)
    mended = guarded(ordering(critique), tools=[order], settings=settings)

    assert refused.invoke(ASKED)["messages"][-1].text == "I would rather not."
    assert mended.invoke(ASKED)["messages"][-1].text == "Shall I order the yacht?"


@both_ways
async def test_a_refused_call_leaves_without_its_calls(way: str) -> None:
    agent = guarded(
        ordering(finds_the_order),
        tools=[order],
        checkpointer=(saver := InMemorySaver()),
        settings={"constitution": PAYS, "max_rounds": 0},
    )

    state = await run(agent, way)

    last = state["messages"][-1]
    assert (last.text, last.tool_calls, last.id) == ("I would rather not.", [], "call")
    assert "yacht" not in stored(saver)


def test_a_call_that_complies_is_carried_out() -> None:
    def allowed(messages: list[BaseMessage]) -> str:
        return verdicts(ids=[rule.id for rule in PAYS if f"\n{rule.id}: " in messages[0].text])

    agent = guarded(agents_model(critique=allowed), settings={"constitution": PAYS})

    state = agent.invoke(ASKED)

    assert [m.type for m in state["messages"]] == ["human", "ai", "tool", "ai"]


def test_words_beside_a_call_are_judged_and_the_call_stays() -> None:
    def draft(messages: list[BaseMessage]) -> str | AIMessage:
        if isinstance(messages[-1], ToolMessage):
            return "done"
        return AIMessage(f"{CANARY} wait", tool_calls=[CALL])

    state = guarded(agents_model(draft)).invoke(ASKED)

    assert [m.text for m in state["messages"]][1:] == [RELEASED, "rain in Oslo", "done"]
    assert state["messages"][1].tool_calls == [CALL]


def test_only_a_principle_that_speaks_of_tools_has_it_in_its_digest() -> None:
    spoken, silent, plain = (
        Constitution(name="x", principles=(principle("no-harm", "harmless", **fields),))
        for fields in ({"tools": True}, {"tools": False}, {})
    )

    assert silent.digest == plain.digest != spoken.digest


# --- structured answers -------------------------------------------------------------------------------


class Report(BaseModel):
    """A weather report."""

    sky: str
    degrees: int


MENDED = 'Here it is:\n{"sky": "rain", "degrees": 4}'


def reporting(strategy: str, revise: Any = MENDED) -> tuple[Streaming, Any]:
    bad = {"sky": CANARY, "degrees": 4}
    if strategy == "tool":
        called = {"name": "Report", "args": bad, "id": "call-3", "type": "tool_call"}
        return agents_model(
            lambda _: AIMessage("", id="r", tool_calls=[called]), revise=revise
        ), ToolStrategy(Report)
    text = f'{{"sky": "{CANARY}", "degrees": 4}}'
    said: Any = text if strategy == "provider" else [{"type": "text", "text": text}]
    return agents_model(lambda _: AIMessage(said, id="r"), revise=revise), ProviderStrategy(Report)


@both_ways
@pytest.mark.parametrize("strategy", ["tool", "provider", "provider, in parts"])
async def test_a_structured_answer_is_revised_in_its_form_everywhere(way: str, strategy: str) -> None:
    model, wanted = reporting(strategy)
    saver = InMemorySaver()

    state = await run(guarded(model, response_format=wanted, checkpointer=saver), way)

    assert state["structured_response"] == Report(sky="rain", degrees=4)
    assert CANARY not in str(state) + stored(saver)
    answer = next(m for m in state["messages"] if isinstance(m, AIMessage))
    if strategy == "tool":
        assert answer.tool_calls[0]["args"] == {"sky": "rain", "degrees": 4}
        assert state["messages"][-1].text == "Returning structured response: sky='rain' degrees=4"
    else:
        assert answer.text == '{"sky": "rain", "degrees": 4}'
        assert isinstance(answer.content, list) == (strategy == "provider, in parts")
    prompt = next(call for call in model.calls if role_of(call) == "revise")
    assert '"degrees"' in prompt[-1].text.partition("<requests>")[2]


def test_another_call_beside_a_structured_answer_is_judged_with_it() -> None:
    calls: Any = [
        {"name": "Report", "args": {"sky": "fine", "degrees": 4}, "id": "call-3"},
        {"name": "weather", "args": {"city": CANARY}, "id": "call-4"},
    ]
    model = agents_model(lambda _: AIMessage("", id="r", tool_calls=calls), revise=MENDED)

    state = guarded(model, response_format=ToolStrategy(Report)).invoke(ASKED)

    assert state["structured_response"] == Report(sky="rain", degrees=4)
    assert CANARY not in str(state)


@pytest.mark.parametrize("strategy", ["tool", "provider"])
def test_a_structured_answer_that_complies_is_left_as_it_is(strategy: str) -> None:
    model, wanted = reporting(strategy)
    model.replies = by_role(draft=model.replies, critique=verdicts()).replies  # type: ignore[arg-type]

    state = guarded(model, response_format=wanted).invoke(ASKED)

    assert state["structured_response"] == Report(sky=CANARY, degrees=4)


@pytest.mark.parametrize("revision", ["It rains.", '{"sky": "rain"}', '{"sky": "rain", "degrees": "warm"}'])
def test_a_revision_that_breaks_the_form_is_rejected_and_a_refusal_cannot_be_typed(
    revision: str, tmp_path: Path
) -> None:
    model, wanted = reporting("tool", revise=revision)
    with open_log(tmp_path / "cai.db") as log:
        agent = guarded(model, response_format=wanted, settings={"log": log, "max_rounds": 1})
        with pytest.raises(Refused) as raised:
            agent.invoke(ASKED)
        (trajectory,) = logged(log)

    rejected = trajectory.rounds[0].revisions[0]
    assert rejected.rejection is Rejection.BAD_SCHEMA
    assert rejected.detail
    assert trajectory.outcome is Outcome.REFUSED
    assert raised.value.trajectory_id == trajectory.id


# --- among other middleware ---------------------------------------------------------------------------


class Notes(AgentMiddleware[Any, Any, Any]):
    """Notes what it sees of each model call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.seen: list[str] = []

    @property
    def name(self) -> str:
        return self._name

    def wrap_model_call(self, request: ModelRequest[Any], handler: Any) -> ModelResponse[Any]:
        response = handler(request.override(system_message=None))
        self.seen.append(response.result[0].text)
        get_stream_writer()(f"{self._name} was here")
        return response  # type: ignore[no-any-return]

    async def awrap_model_call(self, request: ModelRequest[Any], handler: Any) -> ModelResponse[Any]:
        response = await handler(request)
        self.seen.append(response.result[0].text)
        get_stream_writer()(f"{self._name} was here")
        return response  # type: ignore[no-any-return]


@both_ways
async def test_middleware_before_it_sees_what_is_released_and_middleware_after_it_is_part_of_the_app(
    way: str,
) -> None:
    outer, inner = Notes("outer"), Notes("inner")
    face = ConstitutionalMiddleware(constitution=RULES, log=None)
    agent = create_agent(agents_model(), [weather], middleware=[outer, face, inner])

    if way == "invoke":
        written = await asyncio.to_thread(lambda: list(agent.stream(ASKED, stream_mode="custom")))
    else:
        written = [part async for part in agent.astream(ASKED, stream_mode="custom")]

    assert outer.seen == ["", RELEASED]
    assert [seen.strip() for seen in inner.seen] == ["", f"{CANARY} it rains, you fool"]
    said = [part for part in written if isinstance(part, str)]
    steps = [part["cai_progress"]["step"] for part in written if isinstance(part, dict)]
    assert said == ["inner was here", "outer was here", "looking at Oslo", "inner was here", "outer was here"]
    assert steps == ["drafting", "drafting", "critiquing", "revising 1/2"]


def test_a_retry_inside_is_one_request_and_its_failed_call_is_recorded(tmp_path: Path) -> None:
    tries: list[int] = []

    def draft(messages: list[BaseMessage]) -> Any:
        tries.append(1)
        return ValueError("overloaded") if len(tries) == 1 else "fine"

    with open_log(tmp_path / "cai.db") as log:
        face = ConstitutionalMiddleware(constitution=RULES, log=log)
        retry = ModelRetryMiddleware(max_retries=1, initial_delay=0)
        agent = create_agent(agents_model(draft), [], middleware=[face, retry])
        agent.invoke(ASKED)
        (trajectory,) = logged(log)

    assert [call.error for call in trajectory.calls] == ["ValueError: overloaded", None, None]


def test_critic_and_reviser_are_the_model_of_the_call_unless_given() -> None:
    other = agents_model(lambda _: "from the other model")

    class Other(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: ModelRequest[Any], handler: Any) -> Any:
            return handler(request.override(model=other))

    own = agents_model()
    state = guarded(own, middleware=[Other()]).invoke(ASKED)
    judge, writer = agents_model(), agents_model(revise="written by the writer")
    third = guarded(own, settings={"critic": judge, "reviser": writer}).invoke(ASKED)

    assert state["messages"][-1].text == "from the other model"
    assert [role_of(call) for call in other.calls] == ["draft", "critique"]
    assert third["messages"][-1].text == "written by the writer"
    assert {role_of(call) for call in judge.calls} == {"critique"}
    assert {role_of(call) for call in writer.calls} == {"revise"}
    assert {role_of(call) for call in own.calls} == {"draft"}


@pytest.mark.parametrize(
    "bind",
    [
        lambda model: model.bind(stop=["x"]),
        lambda model: model.with_retry(),
        lambda model: model.with_config(tags=["t"]),
        lambda model: model.with_retry().with_fallbacks([agents_model()]),
    ],
    ids=["bind", "with_retry", "with_config", "with_fallbacks"],
)
def test_a_model_with_something_bound_to_it_judges_itself(bind: Callable[[Any], Any]) -> None:
    own = agents_model(lambda _: f"{CANARY} you fool")

    state = guarded(bind(own), tools=()).invoke(ASKED)

    assert state["messages"][-1].text == RELEASED
    assert [role_of(call) for call in own.calls] == ["draft", "critique", "revise", "critique"]


def test_where_no_chat_model_is_found_the_error_says_to_name_who_judges() -> None:
    model: Any = RunnableLambda(lambda messages: AIMessage("fine"))
    judge = agents_model()

    with pytest.raises(ConfigError, match="the agent's model is a RunnableLambda and cannot judge"):
        guarded(model, tools=()).invoke(ASKED)
    named = guarded(model, tools=(), settings={"critic": judge, "reviser": judge})
    assert named.invoke(ASKED)["messages"][-1].text == "fine"


class Adds(AgentMiddleware[Any, Any, Any]):
    """Adds a message to what the model says."""

    def __init__(self, text: str) -> None:
        self._text = text

    def wrap_model_call(self, request: ModelRequest[Any], handler: Any) -> ModelResponse[Any]:
        said = handler(request)
        return ModelResponse(result=[*said.result, AIMessage(self._text)])


@pytest.mark.parametrize("added", ["P.S. bye", f"P.S. {CANARY}"])
def test_messages_that_other_middleware_adds_are_judged_with_the_answer(added: str, tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        face = ConstitutionalMiddleware(constitution=RULES, log=log)
        agent = create_agent(agents_model(lambda _: "fine"), [], middleware=[face, Adds(added)])
        said = [message.text for message in agent.invoke(ASKED)["messages"][1:]]
        (trajectory,) = logged(log)

    assert trajectory.draft is not None
    assert trajectory.draft.answer.content == f"fine\n\n{added}"
    assert said == ([RELEASED] if CANARY in added else ["fine", added])


# --- the record, the policies, the arguments ----------------------------------------------------------


def test_the_record_has_the_conversation_the_system_prompt_and_the_users_metadata(tmp_path: Path) -> None:
    config = {**THREAD, "metadata": {"user": "u1"}, "tags": ["t1"]}
    with open_log(tmp_path / "cai.db") as log:
        agent = guarded(settings={"log": log}, system_prompt="Be brief.", checkpointer=InMemorySaver())
        agent.invoke(ASKED, config)
        _, trajectory = logged(log)

    assert [m.role for m in trajectory.messages] == ["system", "user", "assistant", "tool"]
    assert trajectory.prompt == "How is the weather in Oslo?"
    assert trajectory.metadata == {"user": "u1", "thread_id": "1"}
    assert trajectory.tags == ("t1",)
    assert trajectory.rounds[0].critique.verdicts[0].label is Label.VIOLATES


@both_ways
async def test_an_error_that_the_policy_raises_leaves_the_agent(way: str) -> None:
    agent = guarded(settings={"on_violation": "raise", "max_rounds": 0})

    with pytest.raises(Violation):
        await run(agent, way)


def test_arguments_that_cannot_work_are_named() -> None:
    with pytest.raises(ConfigError, match=r"ConstitutionalMiddleware\(\) has no setting 'max_round'"):
        ConstitutionalMiddleware(max_round=1, log=None)


def test_importing_the_package_loads_no_langchain_and_the_middleware_says_what_is_missing() -> None:
    code = """
        import sys, cai_graph
        assert not {"langchain", "langgraph"} & set(sys.modules)
        sys.modules["langchain"] = None
        try:
            cai_graph.ConstitutionalMiddleware
        except cai_graph.CaiError as error:
            print(error)
    """

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.stderr == ""
    assert done.stdout == f"ConstitutionalMiddleware needs langchain; {installed.command('agents')}\n"
