"""Structured output under a constitution: judged as JSON, revised as JSON, parsed as the bare model's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import pydantic.v1
import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel, Field
from replies import RULES, answer_in, by_role, flags, verdicts
from wire import Reply, Server, role, serving

from cai_graph import ConstitutionalChatModel, ScriptedModel, constitutional, open_log
from cai_graph.errors import ConfigError, DataError, Refused, Violation
from cai_graph.faces.typed import form_of
from cai_graph.testing import leaks
from cai_graph.trajectory import Outcome, Rejection

# langchain-openai warns of its own structured output, wrapped or not.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")


class Advice(BaseModel):
    """Advice."""

    text: str
    risk: int = Field(ge=0, le=5)


class AdviceDict(TypedDict):
    """Advice."""

    text: str
    risk: int


SCHEMAS = {"pydantic": Advice, "typeddict": AdviceDict, "json_schema": Advice.model_json_schema()}
METHODS = ["json_schema", "function_calling", "json_mode"]
BAD, GOOD = {"text": "mix them", "risk": 5}, {"text": "keep them apart", "risk": 0}


def as_form(body: dict[str, Any], data: dict[str, Any]) -> str | Reply:
    """Say `data` in the way that a request asks for: by its tool, or in words."""
    if tools := body.get("tools"):
        return Reply(tool_calls=[{"name": tools[0]["function"]["name"], "args": data, "id": "call-1"}])
    return json.dumps(data, indent=1)


def script(
    *, draft: dict[str, Any] = BAD, revise: Callable[[], str] = lambda: json.dumps(GOOD)
) -> Callable[[dict[str, Any]], str | Reply]:
    def reply(body: dict[str, Any]) -> str | Reply:
        match role(body):
            case "critique":
                shown = str(body["messages"][1]["content"])
                return verdicts(*(["no-harm"] if '"mix them"' in shown.rpartition("<answer>")[2] else []))
            case "revise":
                return revise()
            case _:
                return as_form(body, draft)

    return reply


@contextmanager
def served(
    answers: Callable[[dict[str, Any]], str | Reply], **settings: Any
) -> Iterator[tuple[Server, ConstitutionalChatModel]]:
    with serving(answers) as server:
        bare = ChatOpenAI(model="gpt-test", base_url=server.url, api_key="unused")  # type: ignore[arg-type]
        yield server, constitutional(bare, **{"constitution": RULES, "log": None, **settings})


@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("kind", SCHEMAS)
@pytest.mark.parametrize("method", METHODS)
async def test_a_violating_answer_is_revised_and_is_what_the_schema_makes_of_it(
    method: str, kind: str, include_raw: bool
) -> None:
    schema = SCHEMAS[kind]
    with served(script()) as (server, model):
        asked = model.with_structured_output(schema, method=method, include_raw=include_raw)
        outputs = [await asyncio.to_thread(asked.invoke, "hello"), await asked.ainvoke("hello")]

    expected = Advice(**GOOD) if kind == "pydantic" else GOOD
    for output in outputs:
        if include_raw:
            raw = output["raw"]
            assert "mix them" not in str(raw)
            assert raw.response_metadata["cai"]["outcome"] == "REVISED"
            assert output["parsing_error"] is None
        assert (output["parsed"] if include_raw else output) == expected
    assert [role(body) for body in server.requests[:4]] == ["draft", "critique", "revise", "critique"]


@pytest.mark.parametrize("kind", SCHEMAS)
@pytest.mark.parametrize("method", METHODS)
async def test_a_compliant_answer_is_the_bare_models(method: str, kind: str) -> None:
    with served(script(draft=GOOD)) as (_, model):
        bare = model.app
        assert isinstance(bare, ChatOpenAI)
        schema: Any = SCHEMAS[kind]
        ours = await model.with_structured_output(schema, method=method).ainvoke("hello")
        theirs = await bare.with_structured_output(schema, method=method).ainvoke("hello")  # type: ignore[arg-type]
        streamed = [
            part async for part in model.with_structured_output(schema, method=method).astream("hello")
        ]

    assert ours == theirs
    assert type(ours) is type(theirs)
    assert streamed[-1] == theirs


def test_a_class_of_pydantic_1_is_read_too() -> None:
    class Old(pydantic.v1.BaseModel):
        """Advice."""

        text: str
        risk: int

    with served(script()) as (_, model):
        output = model.with_structured_output(Old, method="function_calling").invoke("hello")

    assert output == Old(**GOOD)


@pytest.mark.parametrize(
    ("said", "detail"),
    [
        ("I would keep them apart.", ""),
        ('{"text": "keep them apart"}', "risk"),
        ('{"text": "keep them apart", "risk": 9}', "less than or equal to 5"),
        ('{"text": "keep them apart", "risk": ', ""),
    ],
)
async def test_a_revision_that_does_not_fit_the_schema_is_rejected(
    said: str, detail: str, tmp_path: Path
) -> None:
    said_first = iter([said, json.dumps(GOOD)])
    with (
        open_log(tmp_path / "cai.db") as log,
        served(script(revise=lambda: next(said_first)), log=log) as (_, model),
    ):
        output = await model.with_structured_output(Advice).ainvoke("hello")
        (trajectory,) = log.read(kind="trajectory")

    assert output == Advice(**GOOD)
    first, second = (turn.revisions[0] for turn in trajectory.rounds)
    assert first.rejection is Rejection.BAD_SCHEMA
    assert detail in (first.detail or "")
    assert second.accepted


@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("method", METHODS)
async def test_a_refusal_cannot_be_typed(method: str, include_raw: bool, tmp_path: Path) -> None:
    with (
        open_log(tmp_path / "cai.db") as log,
        served(script(revise=lambda: json.dumps(BAD)), log=log) as (_, model),
    ):
        asked = model.with_structured_output(Advice, method=method, include_raw=include_raw)
        with pytest.raises(Refused, match="I would rather not") as refused:
            await asked.ainvoke("hello")
        (trajectory,) = log.read(kind="trajectory")

    assert trajectory.outcome is Outcome.REFUSED
    assert refused.value.trajectory_id == trajectory.id


async def test_the_other_policies_hold_for_structured_answers() -> None:
    stubborn = script(revise=lambda: json.dumps(BAD))
    with served(stubborn, on_violation="raise") as (_, model), pytest.raises(Violation):
        await model.with_structured_output(Advice).ainvoke("hello")
    with served(stubborn, on_violation="open") as (_, model):
        assert await model.with_structured_output(Advice).ainvoke("hello") == Advice(**BAD)


async def test_an_answer_that_the_bare_model_could_not_parse_is_no_better_here() -> None:
    with served(script(draft={"text": "fine"})) as (_, model):
        raw = await model.with_structured_output(Advice, method="json_mode", include_raw=True).ainvoke(
            "hello"
        )

    assert raw["parsed"] is None
    assert "risk" in str(raw["parsing_error"])


async def test_configuration_and_arguments_survive_structured_output() -> None:
    with served(script(draft=GOOD)) as (server, model):
        set_up = model.with_config(tags=["mine"]).bind(seed=7)
        events = [
            event
            async for event in set_up.with_structured_output(Advice).astream_events("hello", version="v2")
        ]

    ours = [event for event in events if event["event"] == "on_chat_model_start"]
    assert [event["tags"] for event in ours] == [["seq:step:1", "mine"]]
    assert server.requests[0]["seed"] == 7
    assert "response_format" in server.requests[0]


@pytest.mark.parametrize("mode", ["blocks", "audit"])
async def test_a_structured_answer_leaves_in_one_piece_whatever_the_stream(mode: str) -> None:
    with served(script(), stream=mode) as (_, model):
        parts = [part async for part in model.with_structured_output(Advice).astream("hello")]

    assert parts == [Advice(**GOOD)]


async def test_another_tool_that_is_called_instead_passes() -> None:
    def search(query: str) -> str:
        """Search."""
        return ""

    def calls(body: dict[str, Any]) -> Reply:
        return Reply(tool_calls=[{"name": "search", "args": {"query": "x"}, "id": "call-1"}])

    with served(calls) as (server, model):
        asked = model.with_structured_output(Advice, include_raw=True, tools=[search], strict=True)
        raw = await asked.ainvoke("hello")

    assert [call["name"] for call in raw["raw"].tool_calls] == ["search"]
    assert len(server.requests) == 1


def test_a_model_without_structured_output_says_so_as_it_did() -> None:
    with pytest.raises(NotImplementedError):
        constitutional(ScriptedModel(replies=[]), log=None).with_structured_output(Advice)


def test_structured_output_without_a_model_in_it_is_an_error_that_says_what_to_do() -> None:
    class Odd(ScriptedModel):
        def with_structured_output(self, schema: Any, **kwargs: Any) -> Any:
            return RunnableLambda(lambda _: Advice(**GOOD))

    with pytest.raises(
        ConfigError, match="no chat model stands in it; where that returns a pydantic object, wrap it"
    ):
        constitutional(Odd(replies=[]), log=None).with_structured_output(Advice)


def test_a_call_among_content_parts_is_revised_in_all_its_places() -> None:
    """Anthropic's messages repeat the call among the parts of their content."""

    class Calling(ScriptedModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self.bind()

    call = {"name": "Advice", "args": BAD, "id": "call-1"}
    use = {"type": "tool_use", "name": "Advice", "input": BAD, "id": "call-1"}
    draft = AIMessage([{"type": "text", "text": "mix them"}, use], tool_calls=[{**call, "type": "tool_call"}])
    said = f"mix them\n{json.dumps(BAD)}"
    critic = by_role(critique=flags("no-harm", answers=[said]), revise=json.dumps(GOOD))
    model = constitutional(
        Calling(replies=[draft]), critic=critic, reviser=critic, constitution=RULES, log=None
    )

    output = model.with_structured_output(Advice, include_raw=True).invoke("hello")

    assert output["parsed"] == Advice(**GOOD)
    assert output["raw"].content == [{**use, "input": GOOD}]
    assert output["raw"].id is not None


def test_json_mode_without_a_schema_takes_any_object() -> None:
    assert form_of(None).read('Here: {"any": 1}') == '{"any": 1}'


JSON_MODE = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("said", "judged"),
    [
        ('SECRET first.\n{"a": "fine"}\nSECRET after.', None),
        ('```json\n{"a": "fine"}\n```\nSECRET after.', None),
        ('{"a": "SECRET", "a": "fine"}', None),
        ('{"a": "fine"} {"a": "SECRET"} {"a": "fine"}', None),
        ('\n```json\n{"a":"\\u0053ECRET"}\n```\n', '{"a": "SECRET"}'),
        ('\n```json\n{"a":"fine"}\n```\n', '{"a": "fine"}'),
    ],
)
def test_words_around_the_json_are_judged_with_it(said: str, judged: str | None, tmp_path: Path) -> None:
    watchful = by_role(
        critique=lambda messages: verdicts(*(["no-harm"] if "SECRET" in answer_in(messages) else [])),
        revise='{"a": "clean"}',
    )
    with open_log(tmp_path / "cai.db") as log:
        model = constitutional(
            ScriptedModel(replies=[said]), critic=watchful, reviser=watchful, constitution=RULES, log=log
        )
        left = model.bind(**JSON_MODE).invoke("hello").text
        (record,) = log.read(kind="trajectory")

    assert record.draft is not None
    assert record.draft.answer.content == (judged or said)
    assert left == (said if judged == '{"a": "fine"}' else '{"a": "clean"}')


@pytest.mark.parametrize("where", ["words", "second call", "another call", "broken call", "nowhere"])
def test_all_that_stands_beside_the_call_of_a_form_is_judged_with_it(where: str) -> None:
    class Calling(ScriptedModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self.bind()

    calls: list[Any] = [{"name": "Advice", "args": GOOD, "id": "1"}]
    if where == "second call":
        calls.append({"name": "Advice", "args": BAD, "id": "2"})
    if where == "another call":
        calls.append({"name": "look", "args": {"query": "mix them"}, "id": "2"})
    draft = AIMessage(
        "mix them" if where == "words" else "",
        tool_calls=calls,
        invalid_tool_calls=[{"name": "Advice", "args": "mix them", "id": "2", "error": None}]
        if where == "broken call"
        else [],
    )
    watchful = by_role(
        critique=lambda messages: verdicts(*(["no-harm"] if "mix them" in answer_in(messages) else [])),
        revise=json.dumps({**GOOD, "risk": 1}),
    )
    model = constitutional(
        Calling(replies=[draft]), critic=watchful, reviser=watchful, constitution=RULES, log=None
    )

    output = model.with_structured_output(Advice, include_raw=True).invoke("hello")

    assert "mix them" not in repr(output)
    assert len(output["raw"].tool_calls) == 1
    assert output["parsed"] == Advice(text="keep them apart", risk=0 if where == "nowhere" else 1)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "answered", "astream", "human"])
async def test_json_mode_bound_to_a_call_lets_no_prose_leave(way: str) -> None:
    revisions = iter(["I would keep them apart.", '{"city": "Oslo"}'])
    model = by_role(
        draft='{"city": "the draft"}',
        critique=flags("no-harm", answers=['{"city": "the draft"}']),
        revise=lambda _: next(revisions),
    )
    settings: dict[str, Any] = {}
    if way == "human":
        settings = {"on_violation": "human", "checkpointer": InMemorySaver()}
    bound = constitutional(model, constitution=RULES, log=None, **settings).bind(**JSON_MODE)

    if way == "astream":
        said = "".join([chunk.text async for chunk in bound.astream("hello")])
    elif way == "answered":
        said = (await bound.answered("hello")).output.text
    elif way == "invoke":
        said = (await asyncio.to_thread(bound.invoke, "hello")).text
    else:
        said = (await bound.ainvoke("hello", {"configurable": {"thread_id": "1"}})).text

    assert json.loads(said) == {"city": "Oslo"}


class City(BaseModel):
    city: str


@pytest.mark.parametrize("wanted", [City, JSON_MODE["response_format"]])
@pytest.mark.parametrize("where", ["call", "bound before", "bound after", "the model's own"])
def test_json_that_is_asked_for_anywhere_is_revised_as_json(where: str, wanted: Any) -> None:
    class Own(ScriptedModel):
        model_kwargs: dict[str, Any] = {}  # noqa: RUF012 - a pydantic field

    revisions = iter(["I would keep them apart.", '{"city": "Oslo"}'])
    says = by_role(
        draft='{"city": "the draft"}',
        critique=flags("no-harm", answers=['{"city": "the draft"}']),
        revise=lambda _: next(revisions),
    ).replies
    own = {"response_format": wanted} if where == "the model's own" else {}
    model: Any = Own(replies=says, model_kwargs=own)
    judges: Any = {"critic": model, "reviser": model, "constitution": RULES, "log": None}

    if where == "bound before":
        said = constitutional(model.bind(stop=["x"]).bind(response_format=wanted), **judges).invoke("hello")
    elif where == "bound after":
        said = constitutional(model, **judges).bind(response_format=wanted).invoke("hello")
    else:
        options = {"response_format": wanted} if where == "call" else {}
        said = constitutional(model, **judges).invoke("hello", **options)

    assert json.loads(said.text) == {"city": "Oslo"}


def test_a_call_that_takes_the_models_own_json_mode_back_is_answered_in_words() -> None:
    class Own(ScriptedModel):
        model_kwargs: dict[str, Any] = JSON_MODE

    says = by_role(draft="the draft", critique=flags("no-harm", answers=["the draft"]), revise="In words.")
    guarded = constitutional(Own(replies=says.replies), constitution=RULES, log=None)

    assert guarded.invoke("hello", response_format=None).text == "In words."


def test_a_refusal_in_json_mode_is_raised() -> None:
    model = by_role(draft='{"city": "the draft"}', critique=verdicts("no-harm"), revise="I would rather not.")
    bound = constitutional(model, constitution=RULES, log=None).bind(**JSON_MODE)

    with pytest.raises(Refused):
        bound.invoke("hello")


@pytest.mark.parametrize("said", ["I would keep them apart.", '{"text": "keep them apart"}'])
async def test_an_agent_with_a_response_format_of_the_provider_gets_its_revised_answer_parsed(
    said: str,
) -> None:
    revisions = iter([said, json.dumps(GOOD)])
    with served(script(revise=lambda: next(revisions))) as (_, model):
        agent: Any = create_agent(model, [], response_format=ProviderStrategy(Advice))
        state = await agent.ainvoke({"messages": [("user", "hello")]})

    assert state["structured_response"] == Advice(**GOOD)


def rewriting(*revisions: str) -> ScriptedModel:
    """A critic that finds fault with BAD only, and a reviser that writes these one after the other."""
    written = iter(revisions)
    finds = lambda asked: verdicts(*(["no-harm"] if "mix them" in answer_in(asked) else []))  # noqa: E731
    return by_role(critique=finds, revise=lambda _: next(written))


def around(app: Any, *revisions: str, **settings: Any) -> Any:
    judge = rewriting(*revisions)
    return constitutional(
        app, **{"constitution": RULES, "log": None, **settings}, critic=judge, reviser=judge
    )


def agent_of(server: Server, schema: Any) -> Any:
    model = ChatOpenAI(model="gpt-test", base_url=server.url, api_key="unused")  # type: ignore[arg-type]
    return create_agent(model, [], response_format=ProviderStrategy(schema), checkpointer=InMemorySaver())


@pytest.mark.parametrize("schema", [Advice, SCHEMAS["json_schema"]], ids=["pydantic", "json_schema"])
def test_a_revised_answer_of_an_agent_is_typed_in_output_stream_and_memory_alike(schema: Any) -> None:
    said = ("keep them apart", '{"text": "keep them apart"}', json.dumps(GOOD))
    with serving(lambda _: json.dumps(BAD)) as server:
        app = agent_of(server, schema)
        threads: Any = [{"configurable": {"thread_id": name}} for name in ("1", "2")]
        output = around(app, *said, max_rounds=3).invoke({"messages": [("user", "hello")]}, threads[0])
        *_, streamed = around(app, *said, max_rounds=3).stream(
            {"messages": [("user", "hello")]}, threads[1], stream_mode="values"
        )
        kept = app.get_state(threads[0]).values

    typed = GOOD if isinstance(schema, dict) else Advice(**GOOD)
    for state in (output, streamed, kept):
        assert state["structured_response"] == typed
        assert json.loads(state["messages"][-1].text) == GOOD


async def test_a_refused_answer_of_an_agent_is_raised_and_stands_nowhere() -> None:
    with serving(lambda _: json.dumps(BAD)) as server:
        app = agent_of(server, Advice)
        guarded, thread = around(app, max_rounds=0), {"configurable": {"thread_id": "1"}}
        with pytest.raises(Refused):
            await guarded.ainvoke({"messages": [("user", "hello")]}, thread)
        kept = app.get_state(thread).values

        assert kept["messages"][-1].text == RULES.refusal
        assert kept["structured_response"] is None
        assert await leaks(guarded, {"messages": [("user", "hello")]}, "mix them") == []


def test_a_call_that_gives_an_agents_answer_leaves_with_the_revised_words_beside_it() -> None:
    call = {"name": "Advice", "args": GOOD, "id": "c1"}
    model = Caller(replies=lambda _: AIMessage("mix them", tool_calls=[call]))
    app = create_agent(model, [], response_format=ToolStrategy(Advice))

    output = around(app, "Here it is.").invoke({"messages": [("user", "hello")]})

    assert output["structured_response"] == Advice(**GOOD)
    assert output["messages"][1].text == "Here it is."
    with pytest.raises(Refused):
        around(app, max_rounds=0).invoke({"messages": [("user", "hello")]})


class Caller(ScriptedModel):
    def bind_tools(self, *args: Any, **kwargs: Any) -> Any:
        return self


# --- an app whose answer is an object -----------------------------------------------------------------


def advising(data: dict[str, Any]) -> Any:
    return RunnableLambda(lambda _: Advice(**data))


@pytest.mark.parametrize("stream", ["buffer", "blocks"])
@pytest.mark.parametrize("place", [None, "plan"])
async def test_an_object_is_judged_as_json_and_revised_as_one(place: str | None, stream: str) -> None:
    def app(data: dict[str, Any]) -> Any:
        return advising(data) if place is None else advising(data) | (lambda found: {place: found})

    def read(output: Any) -> Any:
        return output if place is None else output[place]

    settings: dict[str, Any] = {"stream": stream, "output_key": place, "max_rounds": 3}
    said = ("keep them apart", '{"text": "keep them apart"}', json.dumps(GOOD))

    assert read(around(app(GOOD), **settings).invoke("hello")) == Advice(**GOOD)
    assert read(around(app(BAD), *said, **settings).invoke("hello")) == Advice(**GOOD)
    chunks = [chunk async for chunk in around(app(BAD), *said, **settings).astream("hello")]
    assert [read(chunk) for chunk in chunks] == [Advice(**GOOD)]
    with pytest.raises(Refused):
        around(app(BAD), stream=stream, output_key=place, max_rounds=0).invoke("hello")


def test_a_chain_that_ends_in_structured_output_answers_as_it_does(tmp_path: Path) -> None:
    with serving(script(draft=BAD)) as server, open_log(tmp_path / "cai.db") as log:
        model = ChatOpenAI(model="gpt-test", base_url=server.url, api_key="unused")  # type: ignore[arg-type]
        chain = ChatPromptTemplate.from_template("{question}") | model.with_structured_output(Advice)

        assert around(chain, json.dumps(GOOD), log=log).invoke({"question": "hello"}) == Advice(**GOOD)
        log.flush()
        (record,) = log.read(kind="trajectory")

    assert record.draft is not None
    assert json.loads(record.draft.answer.content) == BAD


def test_a_dict_without_a_usual_key_is_an_error_that_says_what_to_wrap() -> None:
    chain = RunnableLambda(lambda _: {"steps": ["keep them apart"]})

    with pytest.raises(DataError, match=r"'steps'.*constitutional\(model\)\.with_structured_output"):
        around(chain).invoke("hello")


@pytest.mark.parametrize("profile", ["words", "native", "tool"])
async def test_a_reviser_writes_in_the_form_by_its_providers_own_means(profile: str) -> None:
    profiles = {
        "words": {},
        "native": {"structured_output": True},
        "tool": {"tool_calling": True, "tool_choice": True},
    }
    with served(script()) as (server, model):
        bare = model.app.model_copy(update={"profile": profiles[profile]})  # type: ignore[attr-defined]
        critic = ChatOpenAI(model="critic", base_url=server.url, api_key="unused")  # type: ignore[arg-type]
        guarded = constitutional(bare, critic=critic, constitution=RULES, log=None)
        server.script = lambda body: as_form(body, GOOD) if role(body) == "revise" else script()(body)
        output = await guarded.with_structured_output(Advice).ainvoke("hello")

    asked = server.requests[2]
    assert output == Advice(**GOOD)
    assert role(asked) == "revise"
    assert ("response_format" in asked, "tools" in asked) == (profile == "native", profile == "tool")


async def test_a_provider_that_refuses_the_form_is_asked_in_words() -> None:
    def refusing(body: dict[str, Any]) -> str | Reply:
        if role(body) == "revise" and "response_format" in body:
            return Reply("no such format", status=400)
        return script()(body)

    with served(refusing) as (server, model):
        bare = model.app.model_copy(update={"profile": {"structured_output": True}})  # type: ignore[attr-defined]
        critic = ChatOpenAI(model="critic", base_url=server.url, api_key="unused")  # type: ignore[arg-type]
        guarded = constitutional(bare, critic=critic, constitution=RULES, log=None)
        output = await guarded.with_structured_output(Advice).ainvoke("hello")

    assert output == Advice(**GOOD)
    assert [role(body) for body in server.requests] == ["draft", "critique", "revise", "revise", "critique"]
