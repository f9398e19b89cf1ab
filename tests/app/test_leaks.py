"""The leak matrix: no stream shows a draft, a rejected revision or a critique; tracers see every call.

Each cell is a face, a way of calling it, a stream mode and an outcome. Every draft that is not released,
every rejected revision and every critique carries a canary.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import pytest
from langchain.agents import create_agent
from langchain_classic.callbacks import AsyncIteratorCallbackHandler
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, dispatch_custom_event
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState
from langgraph.types import Command, Send
from replies import RULES, answer_in, by_role, role_of, verdicts

from cai_graph import ScriptedModel, constitutional
from cai_graph.errors import AwaitsReview
from cai_graph.middleware import ConstitutionalMiddleware
from cai_graph.testing import everywhere, leaks

CANARY = "CANARY-7f3a"
SAID = "The first of the sentences is fine, and it is long enough to be a block of its own, so it is."
MENDED = "Something better follows."


class Case(NamedTuple):
    """What a cell's model says, and what must be seen of it."""

    draft: str
    revision: str
    settings: dict[str, Any]
    shown: tuple[str, ...]
    """What every way of calling shows of the answer: one of these."""


def case(mode: str, outcome: str) -> Case:
    bad = f"{SAID} Then it is unsafe. And so it ends."
    secret = bad.replace("unsafe", f"unsafe {CANARY}")
    if outcome == "kept":
        return Case(SAID, "never asked for", {}, (SAID,))
    if mode == "audit":  # the draft leaves, by the user's choice, but where nothing is streamed
        return Case(bad, MENDED, {}, (bad, MENDED))
    if outcome == "revised":
        return Case(secret, MENDED, {}, (MENDED,))
    rejected = f"This is as unsafe as before, says {CANARY}."
    if outcome == "refused":
        return Case(secret, rejected, {}, (RULES.refusal,))
    return Case(secret, rejected, {"on_violation": "raise"}, ())


def scripted(case: Case, *, fails: bool) -> ScriptedModel:
    def critique(messages: list[BaseMessage]) -> str | Exception:
        if fails:
            return RuntimeError("the critic is down")
        found = verdicts(*(["no-harm"] if "unsafe" in answer_in(messages) else []))
        return found.replace("breaks no-harm", CANARY)

    model = by_role(draft=case.draft, critique=critique, revise=case.revision)
    return model.model_copy(update={"streaming": True})  # so that its `invoke` tells tokens to callbacks


def chain(model: ScriptedModel, **settings: Any) -> Any:
    return constitutional(model | StrOutputParser(), critic=model, reviser=model, **settings)


def retrieval(model: ScriptedModel, **settings: Any) -> Any:
    app = RunnableParallel(answer=model | StrOutputParser(), documents=lambda _: ["a document"])
    return constitutional(app, critic=model, reviser=model, context_keys=["documents"], **settings)


def graph(model: ScriptedModel, **settings: Any) -> Any:
    async def anode(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    built = StateGraph(MessagesState)
    built.add_node("answer", RunnableLambda(node, anode))
    built.add_edge(START, "answer")
    built.add_edge("answer", END)
    return constitutional(built.compile(), critic=model, reviser=model, **settings)


def chat(model: ScriptedModel, **settings: Any) -> Any:
    return constitutional(model, **settings)


def agent(model: ScriptedModel, **settings: Any) -> Any:
    return create_agent(constitutional(model, **settings), tools=[])


def middleware(model: ScriptedModel, *, stream: str, **settings: Any) -> Any:
    assert stream == "buffer"  # it has no other
    return create_agent(model, tools=[], middleware=[ConstitutionalMiddleware(**settings)])


FACES: dict[str, tuple[Callable[..., Any], Any]] = {
    "chain": (chain, "hello"),
    "retrieval": (retrieval, "hello"),
    "graph": (graph, {"messages": [("user", "hello")]}),
    "chat": (chat, "hello"),
    "agent": (agent, {"messages": [("user", "hello")]}),
    "middleware": (middleware, {"messages": [("user", "hello")]}),
}
CELLS = [
    (face, mode, outcome)
    for face in FACES
    for mode in ("buffer", "blocks", "audit")
    for outcome in ("kept", "revised", "refused", "failed")
    if face != "middleware" or mode == "buffer"
]


class Tracer(BaseTracer):
    """Counts the runs of the model inside, as LangSmith's tracer sees them."""

    run_inline = True  # else each token costs a thread hop

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def _persist_run(self, run: Run) -> None:
        self.calls += _calls(run)


def _calls(run: Run) -> int:
    return (run.run_type == "llm" and run.name == "ScriptedModel") + sum(map(_calls, run.child_runs))


class Count:
    cells = 0
    canaries = 0


@pytest.fixture(scope="module")
def count(request: pytest.FixtureRequest) -> Iterator[Count]:
    counted = Count()
    yield counted
    terminal: Any = request.config.pluginmanager.get_plugin("terminalreporter")
    terminal.ensure_newline()
    terminal.write_line(f"leak matrix: {counted.cells} cells, {counted.canaries} canaries")


@pytest.mark.parametrize(("face", "mode", "outcome"), CELLS)
async def test_no_stream_shows_a_canary_and_the_tracer_sees_every_call(
    face: str, mode: str, outcome: str, count: Count
) -> None:
    made, tracer = case(mode, outcome), Tracer()
    model = scripted(made, fails=mode == "audit" and outcome == "failed")
    build, input = FACES[face]
    app = build(model, constitution=RULES, log=None, stream=mode, **made.settings)

    async for seen in everywhere(app, input, {"callbacks": [tracer]}):
        count.cells += 1
        count.canaries += CANARY in repr(seen)
        assert CANARY not in repr(seen), seen.way
        assert (seen.error is None) == (outcome != "failed"), (seen.way, seen.error)
        if seen.way.endswith("custom"):  # a wrapped graph's own stream has the app's words there only
            own = face == "graph" and seen.way.startswith("graph")
            assert own or "critiquing" in repr(seen.items), seen.way
        elif outcome != "failed":
            assert any(text in texts(seen.items) for text in made.shown), seen.way

    assert tracer.calls == len(model.calls)
    if mode != "audit" and outcome in ("refused", "revised"):
        assert {role_of(messages) for messages in model.calls} == {"draft", "critique", "revise"}


QUESTION = re.compile(r"\{'type': 'constitutional_review'.*?'thread_id': '[^']*'\}", re.DOTALL)


@pytest.mark.parametrize("face", ["chain", "retrieval", "graph", "chat"])
async def test_while_a_person_is_asked_only_the_question_has_the_draft(face: str) -> None:
    made, saver = case("buffer", "refused"), InMemorySaver()
    build, input = FACES[face]
    model = scripted(made, fails=False)
    app = build(model, constitution=RULES, log=None, on_violation="human", checkpointer=saver)

    async for seen in everywhere(app, input, {"configurable": {"thread_id": "1"}}):
        for kept in (saver.storage, saver.writes, saver.blobs):
            kept.clear()  # so that the next way asks, too
        assert CANARY not in QUESTION.sub("", repr(seen)), seen.way
        if face == "chat" and seen.way == "astream_events v3":
            continue  # LangChain does not tell a model its thread there, so that nothing leaves at all
        assert seen.error is None or isinstance(seen.error, AwaitsReview), seen.way
        if seen.way.endswith(("invoke", "stream", "transform", "events", "updates", "values")):
            assert seen.error or QUESTION.search(repr(seen.items)), seen.way


def texts(value: Any) -> str:
    """All texts in what a stream shows, in order, so that chunks add up."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseMessage):
        return value.text
    if isinstance(value, dict):
        return "".join(texts(item) for key, item in value.items() if key != "documents")
    if isinstance(value, tuple) and value and isinstance(value[0], BaseMessage):
        return value[0].text  # beside it stands the metadata of LangGraph's `messages` mode
    return "".join(map(texts, value)) if isinstance(value, list | tuple) else ""


async def test_a_leak_is_found_where_there_is_one() -> None:
    model = ScriptedModel(replies=lambda _: f"this is {CANARY}", streaming=True)

    found = await leaks(model, "hello", CANARY)

    assert {"stream", "astream_events", "node ainvoke, messages", "node stream, updates"} <= set(found)
    assert {f"{way}, tokens" for way in ("invoke", "stream", "ainvoke", "astream")} <= set(found)


async def test_a_wrapped_app_has_no_leak() -> None:
    made = case("blocks", "revised")

    assert await leaks(chat(scripted(made, fails=False), constitution=RULES, log=None), "hello", CANARY) == []


class Handing(ScriptedModel):
    """A model that takes tools."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind()


def team(model: ScriptedModel, *, sends: bool = False, **settings: Any) -> Any:
    """A graph with a guarded agent, which says something and hands over to `bob` with all of its messages."""

    @tool
    def hand_over(state: Annotated[dict[str, Any], InjectedState]) -> Any:
        """Hand over to Bob."""
        call = state["messages"][-1].tool_calls[0]["id"]
        update = {"messages": [*state["messages"], ToolMessage("handed over", tool_call_id=call)]}
        return Command(graph=Command.PARENT, goto=Send("bob", update) if sends else "bob", update=update)

    agent = create_agent(Handing(replies=model.replies), [hand_over], name="alice")
    guarded = constitutional(agent, constitution=RULES, log=None, critic=model, reviser=model, **settings)
    graph = StateGraph(MessagesState).add_node("alice", guarded, destinations=("bob",))
    return graph.add_node("bob", lambda state: {}).add_edge(START, "alice").compile()


def handing(case: Case) -> ScriptedModel:
    call: Any = {"name": "hand_over", "args": {}, "id": "c1"}
    said = scripted(case, fails=False).replies
    return ScriptedModel(
        replies=lambda asked: AIMessage(said(asked), tool_calls=[call] if role_of(asked) == "draft" else [])
    )


@pytest.mark.parametrize("outcome", ["kept", "revised"])
async def test_streams_show_what_is_said_beside_a_handoff(outcome: str) -> None:
    made, asked = case("buffer", outcome), {"messages": [("user", "hello")]}
    app = team(handing(made))

    messages = [message for message, _ in app.stream(asked, stream_mode="messages")]
    events = [event async for event in app.astream_events(asked, version="v2")]

    told = [event["data"]["chunk"] for event in events if event["event"] == "on_chat_model_stream"]
    ended = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"]
    (shown,) = made.shown
    assert [texts([*found]) for found in (messages, told, ended)] == [shown] * 3


@pytest.mark.parametrize("sends", [False, True])
async def test_no_stream_shows_a_rejected_word_beside_a_handoff(sends: bool) -> None:
    app = team(handing(case("buffer", "revised")), sends=sends)

    assert await leaks(app, {"messages": [("user", "hello")]}, CANARY) == []


async def test_events_show_what_a_tool_says_as_it_hands_over() -> None:
    app = team(handing(case("buffer", "revised")))

    events = [event async for event in app.astream_events({"messages": [("user", "hi")]}, version="v2")]

    (output,) = [event["data"]["output"] for event in events if event["event"] == "on_tool_end"]
    assert output.goto == "bob"
    assert [message.text for message in output.update["messages"]] == ["hi", "handed over"]


# --- handlers that hear tokens ------------------------------------------------------------------------


class Counter(BaseCallbackHandler):
    """Counts model ends as langchain-community's `get_openai_callback` does; its other methods are empty."""

    def __init__(self) -> None:
        self.ends = 0

    def on_llm_new_token(self, token: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        """Print out the token."""

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.ends += 1


class Follower(AsyncCallbackHandler):
    """Follows chains and shows tokens, as an interface's handler may."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []
        self.inner: list[str] = []

    async def on_chain_start(self, serialized: dict[str, Any], inputs: dict[str, Any], **kwargs: Any) -> None:
        self.inner.append(kwargs["name"])

    async def on_llm_new_token(self, token: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        self.tokens.append(token)


async def test_a_handler_that_counts_hears_every_call_and_one_that_follows_chains_no_draft() -> None:
    made = case("buffer", "revised")
    counter, follower = Counter(), Follower()
    model = scripted(made, fails=False)

    await chain(model, constitution=RULES, log=None).ainvoke("hello", {"callbacks": [counter, follower]})

    assert counter.ends == len(model.calls) == 4
    assert "".join(follower.tokens) == MENDED
    assert {"cai_graph", "RunnableSequence"} <= set(follower.inner)


async def test_what_iterates_over_tokens_ends_with_the_answer_and_not_with_a_draft() -> None:
    made, tokens = case("buffer", "revised"), AsyncIteratorCallbackHandler()
    app = chat(scripted(made, fails=False), constitution=RULES, log=None)

    answering = asyncio.create_task(app.ainvoke("hello", {"callbacks": [tokens]}))

    assert "".join([token async for token in tokens.aiter()]) == MENDED
    await answering


# --- what else the app does ---------------------------------------------------------------------------


@tool
def look_up(question: str) -> str:
    """Look a word up."""
    return f"{question} is in the book"


class Shelf(BaseRetriever):
    """Finds one page."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document("a page")]


def working(model: ScriptedModel, **settings: Any) -> Any:
    """An app that calls a tool, a retriever and an event of its own before it drafts."""

    def work(asked: str) -> str:
        dispatch_custom_event("worked", {"on": asked})
        return asked

    app = look_up | Shelf() | (lambda pages: "hello") | RunnableLambda(work) | model | StrOutputParser()
    return constitutional(app, critic=model, reviser=model, constitution=RULES, log=None, **settings)


WORK = ["on_tool_start", "on_tool_end", "on_retriever_start", "on_retriever_end", "on_custom_event"]


class Hears:
    """Notes what it hears of; to be mixed into a handler."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __init_subclass__(cls, events: list[str]) -> None:
        def note(event: str) -> Any:
            return lambda self, *args, **kwargs: self.heard.append(event)

        for event in events:
            setattr(cls, event, note(event))


class Worker(Hears, BaseCallbackHandler, events=WORK): ...


class Asked(Hears, BaseCallbackHandler, events=["on_chat_model_start"]): ...


class Failed(Hears, BaseCallbackHandler, events=["on_llm_error"]): ...


class Interface(Hears, BaseCallbackHandler, events=["on_llm_new_token", "on_llm_end", *WORK]): ...


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_handlers_hear_of_tools_retrievers_and_events_of_the_app(way: str) -> None:
    worker, asked, interface = Worker(), Asked(), Interface()
    model = scripted(case("buffer", "revised"), fails=False)
    app, config = working(model), RunnableConfig(callbacks=[worker, asked, interface])

    match way:
        case "invoke":
            app.invoke({"question": "it"}, config)
        case "stream":
            list(app.stream({"question": "it"}, config))
        case "ainvoke":
            await app.ainvoke({"question": "it"}, config)
        case _:
            [chunk async for chunk in app.astream({"question": "it"}, config)]

    assert [event for event in worker.heard if event != "on_custom_event"] == WORK[:4]
    assert worker.heard.count("on_custom_event") == 4, "the app's own, and three steps of ours"
    assert len(asked.heard) == len(model.calls) == 4
    assert [event for event in interface.heard if event not in WORK] == ["on_llm_new_token", "on_llm_end"]
    assert [event for event in interface.heard if event in WORK] == worker.heard


def test_what_logs_prompts_sees_a_wrapped_model_as_one() -> None:
    asked, model = Asked(), scripted(case("buffer", "revised"), fails=False)

    chat(model, constitution=RULES, log=None).invoke("hello", {"callbacks": [asked]})

    assert (len(asked.heard), len(model.calls)) == (1, 4)


async def test_events_show_tools_retrievers_and_events_of_the_app_under_its_run() -> None:
    app = working(scripted(case("buffer", "revised"), fails=False))

    events = [event async for event in app.astream_events({"question": "it"}, version="v2")]

    root = events[0]["run_id"]
    shown = [event for event in events if event["event"] in WORK and event["name"] != "cai_progress"]
    assert [event["event"] for event in shown] == WORK
    assert [event["parent_ids"] for event in shown] == [[root]] * 4 + [[]], "an event has its sender's run"
    assert shown[-1]["run_id"] == root
    assert CANARY not in repr(events)
    assert await leaks(app, {"question": "it"}, CANARY) == []


def test_a_call_that_fails_inside_is_heard_of() -> None:
    failed = Failed()
    model = by_role(draft=RuntimeError("the model is down"), critique="")

    with pytest.raises(RuntimeError, match="is down"):
        chain(model, constitution=RULES, log=None).invoke("hello", {"callbacks": [failed]})

    assert failed.heard == ["on_llm_error"]


async def test_what_iterates_over_tokens_ends_where_the_app_fails() -> None:
    tokens = AsyncIteratorCallbackHandler()
    app = chain(by_role(draft=RuntimeError("the model is down"), critique=""), constitution=RULES, log=None)

    answering = asyncio.create_task(app.ainvoke("hello", {"callbacks": [tokens]}))

    async with asyncio.timeout(5):
        assert [token async for token in tokens.aiter()] == []
    with pytest.raises(RuntimeError, match="is down"):
        await answering
