from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import (
    ConfigurableField,
    RunnableConfig,
    RunnableLambda,
    RunnablePassthrough,
)
from langchain_core.tracers.context import collect_runs
from langgraph.graph import START, MessagesState, StateGraph
from replies import JUDGE, RULES, by_role, flags, guard, role_of, verdicts
from repository import SUPPORT

from cai_graph.chain import constitutional
from cai_graph.constitution import Constitution
from cai_graph.errors import ConfigError, DataError, Violation
from cai_graph.log import open_log
from cai_graph.log import writer as log_writer
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Outcome

asked_by: ContextVar[str] = ContextVar("asked_by", default="nobody")


def app_of(output: Any) -> RunnableLambda[Any, Any]:
    return RunnableLambda(lambda _: output)


# --- shapes -------------------------------------------------------------------------------------------


def test_a_string_stays_a_string() -> None:
    assert guard(app_of("the draft")).invoke("hello") == "better"
    assert guard(app_of("fine")).invoke("hello") == "fine"


def test_a_message_keeps_everything_but_its_text() -> None:
    draft = AIMessage(
        "the draft",
        id="m1",
        name="bot",
        additional_kwargs={"k": 1},
        response_metadata={"model_name": "x"},
        usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
    )

    output = guard(app_of(draft)).invoke("hello")

    assert (output.content, output.id, output.name) == ("better", "m1", "bot")
    assert output.additional_kwargs == {"k": 1}
    assert output.usage_metadata == draft.usage_metadata
    assert output.response_metadata["model_name"] == "x"
    assert output.response_metadata["cai"]["outcome"] == "REVISED"
    assert draft.content == "the draft"


def test_parts_of_the_content_that_are_no_text_are_kept() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    draft = AIMessage([{"type": "text", "text": "the "}, image, {"type": "text", "text": "draft"}])

    output = guard(app_of(draft)).invoke("hello")

    assert output.text == "better"
    assert image in output.content


def test_the_last_ai_message_of_messages_is_judged_and_replaced_in_its_place() -> None:
    first, tool = AIMessage("a moment", id="a"), HumanMessage("more?", id="h")
    last = AIMessage("the draft", id="b")
    state = {"messages": [HumanMessage("hello"), first, last, tool], "other": object()}

    output = guard(app_of(state)).invoke("hello")

    assert [message.content for message in output["messages"]] == ["hello", "a moment", "better", "more?"]
    assert output["messages"][2].id == "b"
    assert output["messages"][1] is first
    assert output["other"] is state["other"]


def test_a_list_of_messages_is_a_conversation() -> None:
    output = guard(app_of([HumanMessage("hello"), AIMessage("the draft")])).invoke("hello")

    assert [message.content for message in output] == ["hello", "better"]


@pytest.mark.parametrize("key", ["answer", "output", "text"])
def test_the_only_usual_key_of_a_dict_is_the_answer(key: str) -> None:
    source = object()

    output = guard(app_of({key: "the draft", "source": source})).invoke({"question": "hello"})

    assert output == {key: "better", "source": source}
    assert output["source"] is source


def test_output_key_says_which_key_is_the_answer() -> None:
    app = app_of({"answer": "fine", "summary": "the draft"})

    assert guard(app, output_key="summary").invoke("hello") == {"answer": "fine", "summary": "better"}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"reply": "x"}, r"the output has the keys 'reply'; .* found none; say which with output_key="),
        ({}, "found none"),
        ({"answer": "x", "text": "y"}, "found 'answer' and 'text'; say which with output_key="),
        (42, "the app returned a int"),
        (None, "the app returned a NoneType"),
        ([], "the app returned a list"),
        ({"answer": 42}, "the app returned a int"),
        ({"messages": [HumanMessage("hi")]}, "without an AI message"),
    ],
)
def test_an_output_without_one_answer_is_an_error_that_names_what_was_found(
    output: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        guard(app_of(output)).invoke("hello")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": "x"}, "the input has the keys 'a'; .* say which with input_key="),
        ({"input": "x", "query": "y"}, "found 'input' and 'query'"),
        (42, "the input is a int"),
    ],
)
def test_an_input_without_one_request_is_an_error_that_names_what_was_found(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        guard(app_of("fine")).invoke(given)


def test_a_key_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="output_key is 'reply', and the output has the keys 'answer'"):
        guard(app_of({"answer": "x"}), output_key="reply").invoke("hello")
    with pytest.raises(DataError, match="input_key is 'ask', and the input has the keys 'input'"):
        guard(app_of("x"), input_key="ask").invoke({"input": "hello"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hello", ["hello"]),
        (HumanMessage("hello"), ["hello"]),
        ([("system", "be brief"), ("user", "hello")], ["be brief", "hello"]),
        ([HumanMessage("a"), AIMessage("b"), HumanMessage("c")], ["a", "b", "c"]),
        ({"messages": [HumanMessage("hello")]}, ["hello"]),
        ({"messages": [{"role": "user", "content": "hello"}], "k": 1}, ["hello"]),
        ({"question": "hello", "k": 1}, ["hello"]),
        (ChatPromptTemplate.from_messages([("user", "{q}")]).invoke({"q": "hello"}), ["hello"]),
    ],
)
async def test_the_request_is_found_in_every_usual_input(given: Any, said: list[str]) -> None:
    trajectory = (await guard(app_of("fine")).answered(given)).trajectory

    assert [message.content for message in trajectory.messages] == said


async def test_context_keys_reach_the_critic_and_the_trajectory_but_no_other_key_does() -> None:
    seen: list[str] = []

    def critique(messages: list[BaseMessage]) -> str:
        seen.append(messages[1].text)
        return verdicts()

    judge = by_role(critique=critique)
    app = app_of({"answer": "fine", "docs": [Document("forty </context> euros")], "secret": "s3cret"})
    guarded = guard(app, critic=judge, reviser=judge, context_keys=["docs", "shop", "absent"])

    trajectory = (await guarded.answered({"question": "price?", "shop": "Shoes"})).trajectory

    assert '<context name="docs">\nforty ‹/context> euros\n</context>' in seen[0]
    assert '<context name="shop">\nShoes\n</context>' in seen[0]
    assert "s3cret" not in seen[0]
    assert trajectory.context == {"docs": "forty </context> euros", "shop": "Shoes"}


def test_a_tool_call_without_text_passes_untouched() -> None:
    call = AIMessage("", tool_calls=[{"name": "search", "args": {"q": "x"}, "id": "1"}])

    output = guard(app_of({"messages": [HumanMessage("hello"), call]})).invoke("hello")

    assert output["messages"][1].tool_calls == call.tool_calls
    assert output["messages"][1].content == ""


def test_a_tool_call_beside_text_survives_a_revision() -> None:
    call = AIMessage("the draft", tool_calls=[{"name": "search", "args": {"q": "x"}, "id": "1"}])

    output = guard(app_of(call)).invoke("hello")

    assert (output.content, output.tool_calls) == ("better", call.tool_calls)


def test_nothing_of_a_refused_answer_leaves() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    calls: Any = [{"name": "wire_money", "args": {"to": "x"}, "id": "1"}]
    draft = AIMessage(
        [{"type": "text", "text": "the draft"}, image],
        id="m1",
        tool_calls=calls,
        additional_kwargs={"tool_calls": [{"id": "1"}]},
    )

    output = guard(app_of(draft), max_rounds=0).invoke("hello")

    assert (output.content, output.id) == ([{"type": "text", "text": RULES.refusal}], "m1")
    assert (output.tool_calls, output.invalid_tool_calls, output.additional_kwargs) == ([], [], {})


# --- arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stratgy": "batched"}, "no setting 'stratgy'; did you mean 'strategy'?"),
        ({"colour": "red"}, "no setting 'colour'; the settings are"),
        ({"strategy": "cascade"}, "strategy is one of"),
        ({"on_error": "close"}, "on_error is one of open, closed, raise, human, found 'close'"),
        ({"reviser": 42}, "reviser is a chat model or a model spec, found int"),
        ({"critic": 42}, "critic is a chat model, .* found int"),
        ({"critic": "opnai:gpt-5-mini"}, "names no model"),
        ({"log": "cai.txt"}, "no log is named so"),
        ({"log": 42}, "log is .* found int"),
        ({"context_keys": "docs"}, "context_keys is a list of keys, found 'docs'"),
    ],
)
def test_an_argument_that_cannot_work_is_named_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        guard(ScriptedModel(replies=[]), **arguments)


@pytest.mark.parametrize("missing", ["critic", "reviser"])
def test_around_another_runnable_the_critic_and_the_reviser_must_be_said(missing: str) -> None:
    arguments: Any = {"critic": JUDGE, "reviser": JUDGE}
    del arguments[missing]

    said = rf"RunnableLambda is not a chat model.*name a {missing}: .*{missing}=\"openai:"
    with pytest.raises(ConfigError, match=said):
        constitutional(app_of("x"), log=None, **arguments)


def test_what_is_no_runnable_is_named() -> None:
    with pytest.raises(ConfigError, match="wraps a LangChain Runnable, found function"):
        constitutional(lambda x: x)  # type: ignore[arg-type]


def test_a_wrong_argument_leaves_no_log_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError):
        constitutional(ScriptedModel(replies=[]), strategy="cascade")

    assert list(tmp_path.iterdir()) == []


def test_the_default_log_is_a_file_beside_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    constitutional(ScriptedModel(replies=["fine", verdicts()]), constitution=RULES).invoke("hello")

    with open_log("sqlite:///cai.db", read_only=True) as log:
        (trajectory,) = log.read(kind="trajectory")
    assert trajectory.outcome is Outcome.KEPT


def test_the_language_of_the_settings_is_that_of_the_principles_sent() -> None:
    texts = {"critique_request": "Suche Unhöfliches.", "revision_request": "Sei höflich."}
    principles = (RULES["no-harm"], RULES["be-kind"].model_copy(update={"translations": {}}))
    german = Constitution.model_validate(
        {
            "name": "de",
            "principles": [
                *(p.model_dump() for p in principles[:1]),
                {**principles[1].model_dump(), "translations": {"de": texts}},
            ],
        }
    )
    ids = ["no-harm", "be-kind"]
    model = ScriptedModel(replies=["d", verdicts("be-kind", ids=ids), "besser", verdicts(ids=ids)])

    guard(model, constitution=german, language="de").invoke("hallo")

    assert "be-kind: Suche Unhöfliches." in model.calls[1][0].text
    assert "Sei höflich." in model.calls[2][1].text


# --- a drop-in ----------------------------------------------------------------------------------------


async def test_every_way_to_call_gives_the_same_answer() -> None:
    guarded = guard(by_role(critique=flags("no-harm")))
    several: list[Any] = ["a", "b", "c"]

    outputs = [guarded.invoke("a"), await guarded.ainvoke("a")]
    outputs += guarded.batch(several)
    outputs += await guarded.abatch(several)
    outputs += [output for _, output in guarded.batch_as_completed(several)]
    outputs += list(guarded.stream("a"))
    outputs += [chunk async for chunk in guarded.astream("a")]

    assert {output.content for output in outputs} == {"better"}


def test_a_batch_can_return_its_exceptions() -> None:
    model = by_role(critique=lambda m: verdicts("no-harm") if "bad" in m[1].text else verdicts())

    kept, failed = guard(model, on_violation="raise", max_rounds=0).batch(
        ["good", "bad"], return_exceptions=True
    )

    assert kept.content == "the draft"
    assert isinstance(failed, Violation)


def test_it_composes_as_any_runnable() -> None:
    guarded = guard(by_role(critique=flags("no-harm")))
    prompt = ChatPromptTemplate.from_messages([("user", "{question}")])

    assert (prompt | guarded | StrOutputParser()).invoke({"question": "hello"}) == "better"
    assert guarded.pipe(StrOutputParser()).invoke("hello") == "better"
    assigned = RunnablePassthrough.assign(reply=(lambda x: x["q"]) | guarded).invoke({"q": "hello"})
    assert assigned["reply"].content == "better"
    assert [output.content for output in guarded.map().invoke(["a", "b"])] == ["better", "better"]
    kept = guard(app_of({"answer": "the draft"})).pick("answer").invoke("hello")
    assert kept == "better"


def test_retries_and_fallbacks_wrap_it() -> None:
    flaky = iter([ConnectionError("down"), "the draft"])
    model = by_role(draft=lambda _: next(flaky), critique=flags("no-harm"))
    failing = guard(by_role(critique=verdicts("no-harm")), on_violation="raise", max_rounds=0)

    retried = guard(model).with_retry(
        retry_if_exception_type=(ConnectionError,), wait_exponential_jitter=False, stop_after_attempt=2
    )
    fallen = failing.with_fallbacks([app_of("instead")], exceptions_to_handle=(Violation,))

    assert retried.invoke("hello").content == "better"
    assert fallen.invoke("hello") == "instead"


def test_it_shows_the_face_of_what_it_wraps() -> None:
    model = ScriptedModel(replies=[])
    guarded = guard(model)

    assert guarded.get_name() == "ConstitutionalScriptedModel"
    assert guarded.get_input_schema().model_json_schema() == model.get_input_schema().model_json_schema()
    assert guarded.get_output_schema().model_json_schema() == model.get_output_schema().model_json_schema()
    assert guarded.InputType == model.InputType
    assert guarded.OutputType == model.OutputType
    assert guarded.config_specs == model.config_specs


def named_graph() -> Any:
    """A graph with a name of its own."""
    made = StateGraph(MessagesState)
    made.add_node("say", lambda state: {"messages": [AIMessage("fine")]})
    made.add_edge(START, "say")
    return made.compile(name="researcher")


async def test_an_app_with_a_name_of_its_own_is_known_by_it() -> None:
    graph = named_graph()
    outer = StateGraph(MessagesState)
    outer.add_node(guard(graph))
    outer.add_edge(START, "researcher")
    chain: Any = RunnableLambda(lambda said: said).with_config(run_name="qa") | (lambda said: said)
    events = guard(chain.with_config(run_name="asked")).astream_events("x", version="v2")

    said = outer.compile().invoke({"messages": [("user", "hello")]})

    assert said["messages"][-1].text == "fine"
    assert guard(graph.with_config(run_name="x")).name == guard(graph.with_retry()).name == "researcher"
    assert guard(chain).get_name() == "ConstitutionalRunnableSequence"
    assert {event["name"] async for event in events if event["event"] == "on_chain_start"} == {"asked"}


async def test_a_graph_says_of_itself_what_it_says_unwrapped() -> None:
    graph = named_graph()
    guarded: Any = guard(graph)

    assert guarded.get_input_jsonschema() == graph.get_input_jsonschema()
    assert guarded.get_output_jsonschema() == graph.get_output_jsonschema()
    assert (await guarded.aget_graph()).to_json() == (await graph.aget_graph()).to_json()


def test_what_is_configurable_of_a_chain_is_configurable_of_the_wrapped_one() -> None:
    chain = RunnableLambda(lambda said: said) | (lambda said: "fine")
    guarded = guard(chain).configurable_alternatives(
        ConfigurableField("which"), default_key="fine", draft=app_of("the draft")
    )
    spoken: Any = RunnableLambda(lambda asked, said: said).bind(said="fine")
    saying = guard(spoken).configurable_fields(kwargs=ConfigurableField("how"))

    assert guarded.invoke("hello") == "fine"
    assert guarded.with_config(configurable={"which": "draft"}).invoke("hello") == "better"
    assert saying.invoke("hello") == "fine"
    assert saying.with_config(configurable={"how": {"said": "the draft"}}).invoke("hello") == "better"


@pytest.mark.parametrize("kind", ["chain", "model"])
def test_a_deep_copy_is_judged_by_the_same(kind: str) -> None:
    model = FakeListChatModel(responses=["the draft"])
    guarded: Any = guard(model | StrOutputParser() if kind == "chain" else model, critic=JUDGE, reviser=JUDGE)

    copy = deepcopy(guarded)

    assert copy.app is not guarded.app
    assert copy.plan is guarded.plan
    assert copy.invoke("hello") == "better" if kind == "chain" else copy.invoke("hello").text == "better"


def test_options_of_a_call_reach_the_app_whatever_their_names() -> None:
    seen: list[dict[str, Any]] = []

    def app(_: str, **options: Any) -> str:
        seen.append(options)
        return "fine"

    options = {"stop": ["x"], "source": "web", "caller": 1, "kept": 2, "options": 3}

    guard(RunnableLambda(app)).invoke("hello", **options)

    assert seen == [options]


def test_wrapping_twice_judges_twice() -> None:
    inner = guard(by_role(critique=flags("no-harm")))
    critic = by_role(critique=flags("be-kind", answers=["better"]), revise="best")

    assert guard(inner, critic=critic, reviser=critic).invoke("hello").content == "best"


async def test_wrapping_twice_judges_twice_in_async_code_too() -> None:
    inner = guard(by_role(critique=flags("no-harm")))
    critic = by_role(critique=flags("be-kind", answers=["better"]), revise="best")

    output, trajectory = await guard(inner, critic=critic, reviser=critic).answered("hello")

    assert output.content == "best"
    assert trajectory.draft is not None
    assert trajectory.draft.answer.content == "better"
    assert [call.role for call in trajectory.calls] == ["draft"] * 4 + ["critique", "revise", "critique"]


# --- threads, loops, processes ------------------------------------------------------------------------


def test_under_a_synchronous_call_the_app_runs_in_the_callers_thread_and_context() -> None:
    seen: list[Any] = []

    def app(_: str) -> str:
        seen.append((threading.current_thread(), asked_by.get()))
        return "fine"

    token = asked_by.set("me")
    try:
        guard(RunnableLambda(app)).invoke("hello")
    finally:
        asked_by.reset(token)

    assert seen == [(threading.current_thread(), "me")]


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_who_shows_tokens_is_told_in_the_callers_thread_and_counts_nothing_twice(way: str) -> None:
    heard: list[Any] = []

    class Printing(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
            heard.append((token, threading.current_thread(), chunk.message.usage_metadata))

    draft = AIMessage("fine", usage_metadata={"input_tokens": 1, "output_tokens": 1, "total_tokens": 2})
    guarded: Any = guard(app_of("hello") | by_role(draft=draft, critique=""))
    config = {"callbacks": [Printing()]}
    guarded.invoke("hello", config) if way == "invoke" else [*guarded.stream("hello", config)]

    assert heard == [("fine", threading.current_thread(), None)]


async def test_under_an_asynchronous_call_the_app_runs_in_the_callers_loop_and_context() -> None:
    seen: list[Any] = []

    async def app(_: str) -> str:
        seen.append((asyncio.get_running_loop(), asked_by.get()))
        return "fine"

    token = asked_by.set("me")
    try:
        await guard(RunnableLambda(app)).ainvoke("hello")
    finally:
        asked_by.reset(token)

    assert seen == [(asyncio.get_running_loop(), "me")]


async def test_a_synchronous_call_inside_a_running_loop_answers() -> None:
    assert guard(by_role(critique=flags("no-harm"))).invoke("hello").content == "better"


def test_a_synchronous_call_from_inside_a_critic_answers() -> None:
    other = guard(by_role(critique=flags("no-harm")))

    def critique(messages: list[BaseMessage]) -> str:
        assert other.invoke("hello").content == "better"
        return verdicts()

    assert guard(by_role(critique=critique)).invoke("hello").content == "the draft"


def test_many_threads_are_answered_at_once(tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        guarded = guard(by_role(critique=flags("no-harm")), log=log)
        with ThreadPoolExecutor(16) as pool:
            outputs = list(pool.map(guarded.invoke, [f"q{number}" for number in range(64)]))
        log.flush()
        logged = list(log.read(kind="trajectory"))

    assert {output.content for output in outputs} == {"better"}
    assert len(logged) == 64


async def test_a_log_that_cannot_keep_up_holds_up_the_answers_and_not_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "MAX_PENDING_BYTES", 100_000)
    may_write = threading.Event()
    with open_log(tmp_path / "cai.db") as log:
        store = log._shared.store
        insert = store.insert
        monkeypatch.setattr(store, "insert", lambda rows: may_write.wait() and insert(rows))
        guarded = guard(by_role(critique=flags("no-harm")), log=log)
        tasks = [asyncio.create_task(guarded.ainvoke("q" * 10_000)) for _ in range(40)]
        try:
            async with asyncio.timeout(20):
                while not log.is_full:
                    await asyncio.sleep(0)
            for _ in range(100):  # all have their answers by now, and wait for room
                await asyncio.sleep(0.001)
            under_way = [not task.done() for task in tasks]
        finally:
            may_write.set()
        outputs = await asyncio.gather(*tasks)
        logged = list(log.read())

    assert all(under_way)
    assert {output.content for output in outputs} == {"better"}
    assert len(logged) == 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_answer_and_log(tmp_path: Path) -> None:
    code = f"""
        import os, sys
        sys.path.insert(0, {str(SUPPORT)!r})
        from replies import RULES, by_role, flags
        from cai_graph import constitutional, open_log

        log = open_log({str(tmp_path / "cai.db")!r})
        guarded = constitutional(by_role(critique=flags("no-harm")), constitution=RULES, log=log)
        assert guarded.invoke("parent").content == "better"
        child = os.fork()
        if child == 0:
            os._exit(0 if guarded.invoke("child").content == "better" else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert guarded.invoke("parent again").content == "better"
        log.flush()
        print(len(list(log.read(kind="trajectory"))))
    """

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


# --- who reads runs -----------------------------------------------------------------------------------


def saying(text: str, tag: str) -> Any:
    """A model known by a tag, a name and metadata."""
    model = ScriptedModel(replies=lambda messages: text)
    return model.with_config(tags=[tag], run_name=f"the {tag} model", metadata={"of": tag})


async def titled(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
    """A node that answers, and then has another model find a title."""
    answer = await saying("fine and well", "final").ainvoke(state["messages"], config)
    await saying("a title", "title").ainvoke("hello", config)
    return {"messages": [answer]}


def graph_of(name: str, node: Any) -> Any:
    return StateGraph(MessagesState).add_node(name, node).add_edge(START, name).compile()


KNOWN_BY: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "its tag": ("hello", lambda event: "final" in event["tags"]),
    "its name": ("hello", lambda event: event["name"] == "the final model"),
    "its metadata": ("hello", lambda event: event["metadata"].get("of") == "final"),
    "no node": ("hello", lambda event: "langgraph_node" not in event["metadata"]),
    "its node": (
        {"messages": [("user", "hello")]},
        lambda event: event["metadata"].get("langgraph_node") == "agent" and "final" in event["tags"],
    ),
}


@pytest.mark.parametrize("stream", ["buffer", "blocks"])
@pytest.mark.parametrize("known_by", KNOWN_BY)
async def test_readers_of_events_find_the_model_that_answers(known_by: str, stream: str) -> None:
    asked, known = KNOWN_BY[known_by]
    app = (
        saying("fine and well", "final") | StrOutputParser()
        if asked == "hello"
        else graph_of("agent", titled)
    )

    async def read(app: Any) -> str:
        events = [event async for event in app.astream_events(asked, version="v2") if known(event)]
        return "".join(e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream")

    assert await read(guard(app, stream=stream)) == await read(app) == "fine and well"


@pytest.mark.parametrize("stream", ["buffer", "blocks", "audit"])
@pytest.mark.parametrize("kind", ["chain", "graph"])
async def test_readers_of_events_are_shown_the_drafts_usage_once(kind: str, stream: str) -> None:
    usage: Any = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    model = ScriptedModel(replies=lambda messages: AIMessage("fine and well", usage_metadata=usage))

    async def node(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"], config)]}

    app = model | StrOutputParser() if kind == "chain" else graph_of("agent", node)
    asked = "hello" if kind == "chain" else {"messages": [("user", "hello")]}

    async def read(app: Any) -> list[Any]:
        events = [event async for event in app.astream_events(asked, version="v2")]
        chunks = [e["data"]["chunk"] for e in events if e["event"] == "on_chat_model_stream"]
        (end,) = [e["data"]["output"] for e in events if e["event"] == "on_chat_model_end"]
        return [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata] + [end.usage_metadata]

    assert await read(guard(app, stream=stream)) == await read(app) == [usage, usage]


async def test_readers_of_an_outer_graph_find_its_node() -> None:
    outer = graph_of("outer", guard(graph_of("agent", titled)))
    asked: Any = {"messages": [("user", "hello")]}

    shown = [about async for _, about in outer.astream(asked, stream_mode="messages")]

    assert {about["langgraph_node"] for about in shown} == {"outer"}


def test_who_collects_runs_has_the_requests_as_the_root_of_all() -> None:
    identifier = uuid4()

    with collect_runs() as collected:
        guard(saying("fine", "final") | StrOutputParser()).invoke("hello", {"run_id": identifier})

    (root,) = collected.traced_runs
    assert root.id == identifier
    waiting, kinds = [root], list[str]()
    while waiting:
        run = waiting.pop()
        kinds.append(run.run_type)
        waiting += run.child_runs
    assert kinds.count("llm") == 2  # draft and critique


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_tags_and_metadata_that_are_bound_to_an_app_are_the_requests(tmp_path: Path, mode: str) -> None:
    heard: list[Any] = []

    class Roots(BaseCallbackHandler):
        def on_chain_start(self, *args: Any, parent_run_id: Any = None, **about: Any) -> None:
            if parent_run_id is None:
                heard.append((about["tags"], about["metadata"]))

    bound = app_of("fine").with_config(tags=["prod"], metadata={"tenant": "x", "seen": 1})
    with open_log(f"sqlite:///{tmp_path}/cai.db") as log:
        guarded = guard(bound, log=log, mode=mode)
        guarded.invoke("hello", {"tags": ["mine"], "metadata": {"seen": 2}, "callbacks": [Roots()]})
        if guarded.shadow is not None:
            guarded.shadow.close()
        (record,) = log.read(kind="trajectory")

    assert set(record.tags) == {"prod", "mine"}
    assert record.metadata == {"tenant": "x", "seen": 2}
    assert [(set(tags), metadata) for tags, metadata in heard] == [
        ({"prod", "mine"}, {"tenant": "x", "seen": 2})
    ]


# --- tracing ------------------------------------------------------------------------------------------


class Traced(BaseCallbackHandler):
    """Remembers who started under whom."""

    run_inline = True

    def __init__(self) -> None:
        self.parents: dict[Any, Any] = {}
        self.models: list[tuple[Any, str]] = []
        self.ended = 0
        self.metadata: list[dict[str, Any]] = []
        self.tags: list[list[str]] = []

    def on_chain_start(self, *args: Any, run_id: Any, parent_run_id: Any = None, **kwargs: Any) -> None:
        self.parents[run_id] = parent_run_id

    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        self.parents[run_id] = parent_run_id
        self.models.append((run_id, role_of(messages[0])))
        self.metadata.append(kwargs.get("metadata") or {})
        self.tags.append(kwargs.get("tags") or [])

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended += 1

    def root_of(self, run_id: Any) -> Any:
        while self.parents[run_id] is not None:
            run_id = self.parents[run_id]
        return run_id


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("strategy", ["batched", "parallel"])
async def test_a_tracer_sees_the_drafts_run_and_the_critics_as_descendants(way: str, strategy: str) -> None:
    traced = Traced()
    guarded = guard(by_role(critique=flags("no-harm")), strategy=strategy)
    config: RunnableConfig = {"callbacks": [traced], "metadata": {"user": "u1"}, "tags": ["t1"]}

    if way == "invoke":
        await asyncio.to_thread(guarded.invoke, "hello", config)
    else:
        await guarded.ainvoke("hello", config)

    judges = 3 if strategy == "parallel" else 1
    _own, *roles = [role for _, role in traced.models]  # the first is the wrapped model's own run
    assert roles == ["draft"] + ["critique"] * judges + ["revise"] + ["critique"] * judges
    assert traced.ended == len(roles) + 1
    assert len({traced.root_of(run_id) for run_id, _ in traced.models}) == 1
    assert all(metadata["user"] == "u1" for metadata in traced.metadata)
    assert all("t1" in tags for tags in traced.tags)


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_the_app_gets_the_callers_configuration(way: str, tmp_path: Path) -> None:
    seen: list[RunnableConfig] = []

    def app(_: str, config: RunnableConfig) -> str:
        seen.append(config)
        return "fine"

    config: RunnableConfig = {
        "tags": ["t1"],
        "metadata": {"user": "u1"},
        "configurable": {"thread_id": "7"},
        "max_concurrency": 3,
    }
    with open_log(tmp_path / "cai.db") as log:
        guarded = guard(RunnableLambda(app), log=log)
        if way == "invoke":
            guarded.invoke("hello", config)
        else:
            await guarded.ainvoke("hello", config)
        log.flush()
        (trajectory,) = log.read(kind="trajectory")

    (given,) = seen
    assert given["tags"] == ["t1"]
    assert given["metadata"] == {"user": "u1"}
    assert given["configurable"] == {"thread_id": "7"}
    assert given["max_concurrency"] == 3
    assert (trajectory.tags, trajectory.metadata) == (("t1",), {"user": "u1"})


async def test_metadata_that_is_no_json_is_told_by_its_repr() -> None:
    config: RunnableConfig = {"metadata": {"at": {1, 2}.__class__, "x": float("nan"), "k": {"deep": object}}}

    trajectory = (await guard(app_of("fine")).answered("hello", config)).trajectory

    assert trajectory.metadata == {"at": "<class 'set'>", "x": "nan", "k": {"deep": "<class 'object'>"}}
