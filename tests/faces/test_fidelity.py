"""What a wrapped app is besides its answers: each thing held against the same thing of the bare app."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import StreamingStdOutCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, message_chunk_to_message
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import ConfigurableField, Runnable, RunnableConfig, RunnablePassthrough
from langchain_core.tools import tool
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from openai import InternalServerError
from replies import RULES, by_role, flags, verdicts
from repository import fenced, read_page
from wire import Reply, Script, Server, role, serving

from cai_graph import (
    ConstitutionalChatModel,
    ConstitutionalMiddleware,
    ScriptedModel,
    constitutional,
    open_log,
)
from cai_graph.constitution import load

LOGPROBS = [{"token": "fine", "logprob": -0.1, "bytes": None, "top_logprobs": []}]


def script(body: dict[str, Any]) -> str | Reply:
    """A model whose answers comply."""
    if role(body) == "critique":
        return verdicts()
    return Reply(
        f"fine: {body['messages'][-1]['content']}", logprobs=LOGPROBS if body.get("logprobs") else None
    )


@contextmanager
def both(
    answers: Script = script, **settings: Any
) -> Iterator[tuple[Server, ChatOpenAI, ConstitutionalChatModel]]:
    """A bare model, and the same under a constitution."""
    with serving(answers) as server:
        bare = ChatOpenAI(
            model="gpt-test",
            base_url=server.url,
            api_key="unused",  # type: ignore[arg-type]
            temperature=0.5,
            max_retries=0,
            **settings,
        )
        yield server, bare, constitutional(bare, constitution=RULES, log=None)


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"rain in {city}"


# --- a chat model -------------------------------------------------------------------------------------

TEXT = {"type": "text", "text": "see"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}

ASKS: dict[str, Callable[[Any], Any]] = {
    "a string": lambda model: model.invoke("hello"),
    "messages": lambda model: model.invoke(
        [("system", "be brief"), ("user", "hello"), ("ai", "hi"), ("user", "so?")]
    ),
    "a picture and a sound": lambda model: model.invoke(
        [HumanMessage([{"type": "text", "text": "see"}, PICTURE, SOUND])]
    ),
    "a message with a name": lambda model: model.invoke([HumanMessage("hello", name="ann")]),
    "stop": lambda model: model.invoke("hello", stop=["x"]),
    "bound stop": lambda model: model.bind(stop=["x"]).invoke("hello"),
    "another model": lambda model: model.invoke("hello", model="gpt-other"),
    "logprobs": lambda model: model.bind(logprobs=True, top_logprobs=2).invoke("hello"),
    "tools": lambda model: model.bind_tools([weather], tool_choice="auto", strict=True).invoke("hello"),
    "arguments of a call": lambda model: model.invoke("hello", seed=3, temperature=0.1, max_tokens=9),
    "generate": lambda model: model.generate([[HumanMessage("hello")]], stop=["x"]).generations[0][0].message,
}


@pytest.mark.parametrize("ask", ASKS)
def test_the_request_that_is_sent_and_the_message_that_returns_are_the_bare_models(ask: str) -> None:
    with both() as (server, bare, guarded):
        expected = ASKS[ask](bare)
        answer = ASKS[ask](guarded)

    sent_by_bare, sent_by_guarded, judged = server.requests
    assert sent_by_guarded == sent_by_bare
    assert role(judged) == "critique"
    told = {**answer.response_metadata}
    assert told.pop("cai")["outcome"] == "KEPT"
    same = {"usage_metadata": None, "id": None}
    assert answer.model_copy(update={**same, "response_metadata": told}) == expected.model_copy(update=same)
    assert answer.id.startswith("lc_run--")


def calling(body: dict[str, Any]) -> str | Reply:
    """A model that fills a schema, and calls a tool, where it is given one."""
    if role(body) == "critique":
        return verdicts()
    if "response_format" in body:
        return '{"city": "Oslo"}'
    call = {"name": "weather", "args": {"city": "Oslo"}, "id": "call-1"}
    return Reply("I shall look.", tool_calls=[call] if "tools" in body else ())


def wrapped(app: Runnable[Any, Any]) -> Any:
    judge = by_role(critique=lambda _: verdicts())
    return constitutional(app, constitution=RULES, critic=judge, reviser=judge, log=None)


def total(chunks: Iterable[Any]) -> Any:
    return reduce(operator.add, chunks)


def shown(graph: Any) -> Any:
    asked = {"messages": [("user", "hello")]}
    return total(chunk for chunk, _ in graph.stream(asked, stream_mode="messages"))


def in_a_node(model: Any) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    return graph.add_edge(START, "model").compile()


def an_agent(model: Any, wrap: Any) -> Any:
    middleware = [] if wrap is not wrapped else [ConstitutionalMiddleware(constitution=RULES, log=None)]
    return create_agent(model, [], middleware=middleware)


async def told(app: Any) -> Any:
    return [event async for event in app.astream_events("hello", version="v2")][-1]["data"]["output"]


PLACE = {"title": "Place", "type": "object", "properties": {"city": {"type": "string"}}}
STREAMED: dict[str, Callable[[Any, Any], Any]] = {
    "a model": lambda m, wrap: total(wrap(m).stream("hello")),
    "its tools": lambda m, wrap: total(wrap(m).bind_tools([weather]).stream("hello")),
    "its form": lambda m, wrap: [*wrap(m).with_structured_output(PLACE).stream("hello")][-1],
    "its events": lambda m, wrap: asyncio.run(told(wrap(m))),
    "a chain": lambda m, wrap: total(wrap(m | StrOutputParser()).stream("hello")),
    "in a graph": lambda m, wrap: shown(in_a_node(wrap(m))),
    "a chain in a graph": lambda m, wrap: shown(in_a_node(wrap(RunnablePassthrough() | m))),
    "an agent": lambda m, wrap: shown(an_agent(m, wrap)),
}


@pytest.mark.parametrize("way", STREAMED)
def test_who_streams_has_the_draft_streamed_and_gets_what_the_bare_stream_adds_up_to(way: str) -> None:
    with both(calling, stream_usage=True) as (server, bare, _):
        expected, answer = STREAMED[way](bare, lambda app: app), STREAMED[way](bare, wrapped)

    sent_by_bare, sent_by_guarded = [body for body in server.requests if role(body) != "critique"]
    assert sent_by_guarded["stream"]
    assert sent_by_guarded == sent_by_bare
    if isinstance(answer, AIMessage):
        about = {**answer.response_metadata}
        assert about.pop("cai")["outcome"] == "KEPT"
        answer = answer.model_copy(update={"id": expected.id, "response_metadata": about})
        answer, expected = message_chunk_to_message(answer), message_chunk_to_message(expected)
    assert answer == expected


def test_who_prints_tokens_has_the_draft_asked_for_as_without_a_constitution() -> None:
    with both() as (server, bare, guarded):
        for model in (bare, guarded):
            model.invoke("hello", {"callbacks": [StreamingStdOutCallbackHandler()]})

    assert server.requests[1] == server.requests[0]
    assert not server.requests[0].get("stream")


def test_settings_and_profile_are_the_bare_models() -> None:
    with both(profile={"max_input_tokens": 1000, "tool_calling": True}) as (_, bare, guarded):
        for name in ("model_name", "temperature", "max_retries", "profile", "openai_api_base", "_llm_type"):
            assert getattr(guarded, name) == getattr(bare, name)
        assert guarded._get_ls_params(stop=["x"]) == bare._get_ls_params(stop=["x"])
        assert guarded._get_invocation_params(stop=["x"]) == bare._get_invocation_params(stop=["x"])
        assert guarded.asdict() == {**bare.asdict(), "constitution": RULES.digest}
        assert not hasattr(guarded, "no_such_setting")
        assert not hasattr(guarded, "bind_functions_of_old")
        with pytest.raises(AttributeError, match="no_such_setting"):
            _ = guarded.no_such_setting  # type: ignore[attr-defined]


def test_nothing_of_the_bare_model_that_answers_is_reached_past_the_constitution() -> None:
    class Open(ScriptedModel):
        def answer_directly(self) -> str:
            return "unjudged"

    guarded = constitutional(Open(replies=[]), log=None)

    assert not hasattr(guarded, "answer_directly")


def test_tokens_are_counted_as_by_the_bare_model() -> None:
    class Counting(ScriptedModel):
        def get_num_tokens_from_messages(self, messages: Any, tools: Any = None, **_: Any) -> int:
            return 1000 * len(messages) + len(tools or ())

    bare = Counting(replies=[], custom_get_token_ids=lambda text: list(map(ord, text)))
    guarded = constitutional(bare, log=None)

    assert guarded.get_token_ids("abc") == [97, 98, 99]
    assert guarded.get_num_tokens("abc") == 3
    assert guarded.get_num_tokens_from_messages([HumanMessage("abc")], [weather]) == 1001


def test_a_caller_cannot_tell_the_schemas_and_the_graph_apart() -> None:
    with both() as (_, bare, guarded):
        for schema in ("get_input_jsonschema", "get_output_jsonschema", "get_config_jsonschema"):
            ours, theirs = getattr(guarded, schema)(), getattr(bare, schema)()
            ours.pop("title"), theirs.pop("title")
            assert ours == theirs
        assert guarded.get_graph().to_json() == bare.get_graph().to_json()
        assert (guarded.InputType, guarded.OutputType) == (bare.InputType, bare.OutputType)
        assert guarded.config_specs == bare.config_specs


class Runs(BaseTracer):
    """Keeps the runs that it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.roots.append(run)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "batch", "abatch"])
async def test_the_run_that_tracers_see_is_the_bare_models(way: str) -> None:
    seen: dict[str, Run] = {}
    with both(tags=["own"], metadata={"own": 1}) as (_, bare, guarded):
        for name, model in {"bare": bare, "guarded": guarded}.items():
            runs, identifier = Runs(), uuid4()
            config: RunnableConfig = {
                "callbacks": [runs],
                "run_name": "asked",
                "tags": ["t"],
                "metadata": {"user": "u"},
                "run_id": identifier,
            }
            match way:
                case "invoke":
                    await asyncio.to_thread(model.invoke, "hello", config)
                case "ainvoke":
                    await model.ainvoke("hello", config)
                case "stream":
                    await asyncio.to_thread(lambda m=model, c=config: list(m.stream("hello", c)))
                case "astream":
                    _ = [chunk async for chunk in model.astream("hello", config)]
                case "batch":
                    await asyncio.to_thread(model.batch, ["hello"], config)
                case "abatch":
                    await model.abatch(["hello"], config)
            (seen[name],) = runs.roots
            assert seen[name].id == identifier

    bare_run, run = seen["bare"], seen["guarded"]
    assert (run.name, run.run_type, run.inputs) == (bare_run.name, bare_run.run_type, bare_run.inputs)
    assert set(run.tags or ()) == set(bare_run.tags or ())
    told = (bare_run.extra or {})["metadata"]
    assert {key: (run.extra or {})["metadata"].get(key) for key in told} == told
    below = [child.name for child in run.child_runs]
    assert below == ["cai_graph"]
    assert bare_run.child_runs == []


def test_a_failing_provider_is_retried_and_replaced_as_with_the_bare_model() -> None:
    failures = iter([True, False] * 2)

    def flaky(body: dict[str, Any]) -> str | Reply:
        if role(body) == "draft" and next(failures):
            return Reply("overloaded", status=500)
        return script(body)

    retry = {"retry_if_exception_type": (InternalServerError,), "wait_exponential_jitter": False}
    with both(flaky) as (_, bare, guarded):
        answers = [model.with_retry(**retry).invoke("hello").text for model in (bare, guarded)]

    assert answers == ["fine: hello"] * 2


def test_fallbacks_stand_in_for_a_wrapped_model_and_take_its_tools() -> None:
    def broken(body: dict[str, Any]) -> Reply:
        return Reply("overloaded", status=500)

    with both(broken) as (_, bare, guarded), both() as (server, _, instead):
        answers = [
            model.with_fallbacks([instead]).bind_tools([weather]).invoke("hello").text  # type: ignore[attr-defined]
            for model in (bare, guarded)
        ]

    assert answers == ["fine: hello"] * 2
    assert all("tools" in body for body in server.requests if role(body) == "draft")


# --- what the caches and rate limiters of the wrapped model do -----------------------------------------


class Counted(BaseRateLimiter):
    """Lets every call through, and counts them."""

    passed = 0

    def acquire(self, *, blocking: bool = True) -> bool:
        self.passed += 1
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        return self.acquire()


async def test_the_rate_limiter_is_asked_once_a_call() -> None:
    limiter = Counted()
    with both(rate_limiter=limiter) as (server, _, guarded):
        await guarded.ainvoke("hello")

    assert limiter.passed == len(server.requests) == 2


@pytest.mark.parametrize("everywhere", [False, True])
async def test_a_cached_draft_costs_nothing_and_is_judged_and_logged_all_the_same(
    everywhere: bool, tmp_path: Path
) -> None:
    """The caches are the models' own, as before: what is kept is a draft or a verdict, never an answer."""
    cache = InMemoryCache()
    if everywhere:
        set_llm_cache(cache)
    try:
        with (
            both(cache=None if everywhere else cache) as (server, bare, _),
            open_log(tmp_path / "cai.db") as log,
        ):
            guarded = constitutional(bare, constitution=RULES, log=log)
            answers = [await guarded.ainvoke("hello") for _ in range(3)]
            records = list(log.read(kind="trajectory"))
    finally:
        set_llm_cache(None)

    assert [answer.text for answer in answers] == ["fine: hello"] * 3
    assert [role(body) for body in server.requests] == ["draft", "critique"]
    assert len(records) == 3


# --- ways of calling that every Runnable has ----------------------------------------------------------


def chain(model: Runnable[Any, Any]) -> Runnable[Any, Any]:
    return ChatPromptTemplate.from_template("{question}") | model | StrOutputParser()


PROMPT = {"question": "hello"}
MADE: dict[str, Callable[[Runnable[Any, Any]], Runnable[Any, Any]]] = {
    "itself": lambda app: app,
    "pipe": lambda app: app.pipe(lambda text: text.upper()),
    "before and after": lambda app: (lambda given: given) | app | (lambda text: {"said": text}),
    "assign": lambda app: RunnablePassthrough.assign(said=app),
    "pick": lambda app: RunnablePassthrough.assign(said=app).pick("said"),
    "map": lambda app: (lambda given: [given, given]) | app.map(),
    "with_config": lambda app: app.with_config(tags=["t"], max_concurrency=1),
    "with_retry": lambda app: app.with_retry(stop_after_attempt=2),
    "with_fallbacks": lambda app: app.with_fallbacks([app]),
    "with_types": lambda app: app.with_types(input_type=dict[str, str]),
    "with_listeners": lambda app: app.with_listeners(on_end=lambda run: None),
    "as_tool": lambda app: app.as_tool(name="asks", description="Asks.", arg_types={"question": str}),
}
WAYS: dict[str, Callable[[Runnable[Any, Any]], Any]] = {
    "invoke": lambda app: app.invoke(PROMPT),
    "ainvoke": lambda app: app.ainvoke(PROMPT),
    "batch": lambda app: app.batch([PROMPT, PROMPT], {"max_concurrency": 2}),
    "abatch": lambda app: app.abatch([PROMPT, PROMPT]),
    "batch_as_completed": lambda app: sorted(
        app.batch_as_completed([PROMPT, PROMPT]), key=lambda pair: pair[0]
    ),
    "stream": lambda app: _sum(app.stream(PROMPT)),
    "transform": lambda app: _sum(app.transform(iter([PROMPT]))),
}


def _sum(parts: Iterator[Any]) -> Any:
    total, *others = parts
    for part in others:
        total = total + part
    return total


@pytest.mark.filterwarnings("ignore:This API is in beta")  # as_tool
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("made", MADE)
async def test_a_wrapped_chain_composes_and_answers_as_the_bare_one(made: str, way: str) -> None:
    model, judge = (
        ScriptedModel(replies=lambda messages: f"fine: {messages[-1].text}"),
        by_role(critique=flags()),
    )
    bare = chain(model)
    guarded = constitutional(bare, critic=judge, reviser=judge, constitution=RULES, log=None)

    async def called(app: Runnable[Any, Any]) -> Any:
        given = MADE[made](app)
        if way.startswith("a"):
            return await WAYS[way](given)
        return await asyncio.to_thread(WAYS[way], given)

    assert await called(guarded) == await called(bare)


async def test_abatch_as_completed_and_exceptions_of_a_batch_are_as_the_bare_ones() -> None:
    def fails_for_no(messages: list[Any]) -> str | Exception:
        return ValueError("no") if messages[-1].text == "no" else "fine"

    judge = by_role(critique=flags())
    bare = chain(ScriptedModel(replies=fails_for_no))
    guarded = constitutional(bare, critic=judge, reviser=judge, constitution=RULES, log=None)
    asked = [{"question": "yes"}, {"question": "no"}]

    def told(found: Any) -> list[Any]:
        return [str(item) if isinstance(item, Exception) else item for item in found]

    for app in (bare, guarded):
        assert told(await app.abatch(asked, return_exceptions=True)) == ["fine", "no"]
        completed = {
            index: output async for index, output in app.abatch_as_completed(asked, return_exceptions=True)
        }
        assert told(completed[index] for index in (0, 1)) == ["fine", "no"]


def test_a_wrapped_chain_shows_the_schemas_graph_and_fields_of_the_bare_one() -> None:
    model = ChatOpenAI(model="gpt-test", api_key="unused")  # type: ignore[arg-type]
    bare = chain(model.configurable_fields(temperature=ConfigurableField(id="heat")))
    judge = by_role(critique=flags())
    guarded = constitutional(bare, critic=judge, reviser=judge, constitution=RULES, log=None)

    assert guarded.get_input_jsonschema() == bare.get_input_jsonschema()
    assert guarded.get_output_jsonschema() == bare.get_output_jsonschema()
    assert guarded.get_config_jsonschema()["$defs"] == bare.get_config_jsonschema()["$defs"]
    assert guarded.config_specs == bare.config_specs
    assert [spec.id for spec in guarded.config_specs] == ["heat"]
    assert guarded.get_graph().to_json() == bare.get_graph().to_json()
    assert guarded.get_prompts() == bare.get_prompts()


def test_a_configurable_field_of_a_wrapped_chain_reaches_it() -> None:
    with both() as (server, bare, _):
        app = chain(bare.configurable_fields(temperature=ConfigurableField(id="heat")))
        guarded = constitutional(app, critic=bare, reviser=bare, constitution=RULES, log=None)
        guarded.with_config(configurable={"heat": 0.9}).invoke(PROMPT)
        guarded.invoke(PROMPT, {"configurable": {"heat": 0.1}})

    assert [body["temperature"] for body in server.requests if role(body) == "draft"] == [0.9, 0.1]


def test_a_wrapped_model_is_a_model_wherever_one_is_asked_for() -> None:
    with both() as (_, bare, guarded):
        assert isinstance(guarded, BaseChatModel)
        assert chain(guarded).invoke(PROMPT) == chain(bare).invoke(PROMPT) == "fine: hello"
        alternatives = bare.configurable_alternatives(ConfigurableField(id="llm"), judged=guarded)
        answer = alternatives.with_config(configurable={"llm": "judged"}).invoke("hello")
    assert isinstance(answer, AIMessage)
    assert answer.response_metadata["cai"]["outcome"] == "KEPT"


def test_the_blocks_of_the_page_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = read_page("chat-models.md")
    ids = [principle.id for principle in load("balanced")]

    def answers(body: dict[str, Any]) -> str:
        if role(body) == "critique":
            return verdicts(ids=ids)
        return '{"steps": ["look at the harbour"]}' if "response_format" in body else "Nine to five."

    monkeypatch.chdir(tmp_path)
    with serving(answers) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        names: dict[str, Any] = {}
        for block in fenced(page, "python"):
            exec(block, names)
        state = names["agent"].invoke({"messages": [("user", "When are you open in Oslo?")]})

    assert names["plan"].steps == ["look at the harbour"]
    assert state["messages"][-1].text == "Nine to five."
