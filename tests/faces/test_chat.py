"""The face for chat models: a wrapped chat model has the tools and the counts of the bare one."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.callbacks import (
    BaseCallbackHandler,
    UsageMetadataCallbackHandler,
    get_usage_metadata_callback,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.runnables import ConfigurableField, Runnable, RunnableBinding, RunnableLambda
from langchain_core.tools import tool
from langgraph.config import get_config, get_store, get_stream_writer
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.store.memory import InMemoryStore
from replies import RULES, by_role, flags, role_of, verdicts

from cai_graph import ConstitutionalChatModel, ConstitutionalRunnable, ScriptedModel, constitutional
from cai_graph.errors import ConfigError

USAGE = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
CALL = {"name": "weather", "args": {"city": "Oslo"}, "id": "call-1", "type": "tool_call"}


class WithTools(ScriptedModel):
    """A scripted model that takes tools, and answers with the reply of its script."""

    bound: list[Any] = []  # noqa: RUF012 - a pydantic field

    def bind_tools(self, tools: Any, **kwargs: Any) -> Runnable[Any, AIMessage]:
        self.bound.append((tools, kwargs))
        return self.bind(tools=[each.name for each in tools], **kwargs)

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        self.bound.append({name: value for name, value in kwargs.items() if value is not None})
        return super()._generate(messages, *args, **kwargs)


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"rain in {city}"


def guard(model: BaseChatModel, **settings: Any) -> ConstitutionalChatModel:
    return constitutional(model, **{"constitution": RULES, "log": None, **settings})


def scripted(draft: Any, critique: Any = None, revise: Any = "better") -> WithTools:
    return WithTools(
        replies=by_role(draft=draft, critique=critique or flags("no-harm"), revise=revise).replies
    )


# --- answering ----------------------------------------------------------------------------------------


async def test_a_wrapped_chat_model_is_a_chat_model_in_every_way_of_calling() -> None:
    model = guard(by_role(critique=flags("no-harm")))

    answers = [
        model.invoke("hello"),
        await model.ainvoke([HumanMessage("hello")]),
        *await asyncio.to_thread(model.batch, ["hello", [("user", "hi")]]),
        *await model.abatch(["hello"]),
        model.generate([[HumanMessage("hello")]]).generations[0][0].message,  # type: ignore[union-attr]
    ]

    assert isinstance(model, BaseChatModel)
    assert [type(answer) for answer in answers] == [AIMessage] * 6
    assert [answer.content for answer in answers] == ["better"] * 6


def test_what_is_no_chat_model_is_wrapped_as_a_runnable() -> None:
    model = by_role(critique=flags("no-harm"))

    assert isinstance(
        constitutional(model.bind(stop=["x"]), critic=model, reviser=model, log=None), ConstitutionalRunnable
    )


class Tempered(ScriptedModel):
    """A model that answers with its temperature."""

    temperature: float = 0.7

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return ScriptedModel(replies=[f"at {self.temperature}"])._generate(*args, **kwargs)


def test_a_copy_with_another_setting_of_the_wrapped_model_answers_by_it() -> None:
    model = guard(Tempered(replies=[]), critic=by_role(critique=flags()))

    colder = model.model_copy(update={"temperature": 0.3, "tags": ["cold"]})

    assert (colder.temperature, model.temperature, colder.tags) == (0.3, 0.7, ["cold"])
    assert (colder.invoke("hello").text, model.invoke("hello").text) == ("at 0.3", "at 0.7")


def test_a_setting_can_be_made_configurable_at_each_call() -> None:
    model = guard(Tempered(replies=[]), critic=by_role(critique=flags()))

    chosen = model.configurable_fields(temperature=ConfigurableField("t"))

    assert chosen.invoke("hello").text == "at 0.7"
    assert chosen.with_config(configurable={"t": 0.3}).invoke("hello").text == "at 0.3"


@pytest.mark.parametrize("bound", [False, True])
def test_an_alternative_to_a_model_is_judged_as_the_model_is(bound: bool) -> None:
    judge = by_role(critique=flags("no-harm"))
    made = guard(WithTools(replies=["fine"]), critic=judge, reviser=judge)
    model = made.bind_tools([weather]) if bound else made

    chosen = model.configurable_alternatives(
        ConfigurableField("llm"), other=ScriptedModel(replies=["the draft"])
    )

    assert chosen.invoke("hello").text == "fine"
    assert chosen.invoke("hello", {"configurable": {"llm": "other"}}).text == "better"


def test_a_model_with_a_name_of_its_own_keeps_it() -> None:
    assert guard(ScriptedModel(replies=[], name="mine")).get_name() == "mine"
    assert guard(ScriptedModel(replies=[])).get_name() == "ConstitutionalScriptedModel"


def test_a_setting_that_a_copy_could_not_take_is_refused() -> None:
    class Remade(Tempered):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return Tempered(replies=[], temperature=0.1).bind(tools=tools)

    bound = guard(Remade(replies=[])).bind_tools([weather]).bound

    with pytest.raises(ConfigError, match="temperature cannot be changed after tools were bound"):
        bound.model_copy(update={"temperature": 0.3})  # type: ignore[attr-defined]


class Routing(ScriptedModel):
    """A model that tells which route its call is configured with."""

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> AIMessage:
        return super().invoke((config or {}).get("configurable", {}).get("route", "none"), config, **kwargs)

    async def ainvoke(self, input: Any, config: Any = None, **kwargs: Any) -> AIMessage:
        return self.invoke(input, config, **kwargs)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream"])
async def test_what_a_call_is_configured_with_reaches_the_wrapped_model(way: str) -> None:
    model = guard(Routing(replies=lambda messages: messages[-1].text), critic=by_role(critique=flags()))
    config: Any = {"configurable": {"route": "east"}}

    if way == "stream":
        answers = [*model.stream("hello", config), *model.stream("hello")]
    elif way == "invoke":
        answers = [model.invoke("hello", config), model.invoke("hello")]  # type: ignore[list-item]
    else:
        answers = [await model.ainvoke("hello", config), await model.ainvoke("hello")]  # type: ignore[list-item]

    assert [answer.text for answer in answers] == ["east", "none"]


# --- in the place where it is called ------------------------------------------------------------------


def in_a_node(model: Runnable[Any, BaseMessage]) -> Any:
    graph = StateGraph(MessagesState)
    answered = (
        RunnableLambda(lambda state: state["messages"]) | model | (lambda answer: {"messages": [answer]})
    )
    graph.add_node("model", answered)
    graph.add_edge(START, "model")
    graph.add_edge("model", END)
    return graph.compile(store=InMemoryStore())


class Aware(ScriptedModel):
    """Tells of the node that it runs in, at its every word."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self.look()
        return super()._generate(*args, **kwargs)

    def _stream(self, *args: Any, **kwargs: Any) -> Any:
        for chunk in super()._stream(*args, **kwargs):
            self.look()
            yield chunk

    def look(self) -> None:
        get_stream_writer()({"user": get_config()["configurable"]["user"], "store": get_store() is not None})


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_in_a_node_a_model_finds_the_nodes_surroundings(way: str) -> None:
    aware = Aware(replies=lambda messages: "all is well")
    model = guard(aware, critic=by_role(critique=flags()), stream="audit")

    def call(messages: list[BaseMessage]) -> BaseMessage:
        if way == "invoke":
            return model.invoke(messages)
        parts = []
        for part in model.stream(messages):
            assert get_config()["configurable"]["user"] == "ada"  # the node's own surroundings stay
            parts.append(part)
        return sum(parts[1:], parts[0])

    async def acall(messages: list[BaseMessage]) -> BaseMessage:
        if way == "ainvoke":
            return await model.ainvoke(messages)
        parts = []
        async for part in model.astream(messages):
            assert get_config()["configurable"]["user"] == "ada"
            parts.append(part)
        return sum(parts[1:], parts[0])

    graph, config = in_a_node(RunnableLambda(call, acall)), {"configurable": {"user": "ada"}}
    asked: Any = {"messages": [("user", "hello")]}
    if way.startswith("a"):
        said = [part async for part in graph.astream(asked, config, stream_mode="custom")]
    else:
        said = [*graph.stream(asked, config, stream_mode="custom")]

    assert said.count({"user": "ada", "store": True}) == (1 if way.endswith("invoke") else 3)


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_handlers_of_a_synchronous_call_are_told_in_its_thread(way: str) -> None:
    heard: list[tuple[str, threading.Thread]] = []

    class Bound(BaseCallbackHandler):
        """Tells of the run that it heard begin first, which is the wrapped model's."""

        first: Any = None

        def on_chat_model_start(self, *args: Any, run_id: Any, **kwargs: Any) -> None:
            self.first = self.first or run_id
            self.note("start", run_id)

        def on_llm_new_token(self, *args: Any, run_id: Any, **kwargs: Any) -> None:
            self.note("token", run_id)

        def on_llm_end(self, *args: Any, run_id: Any, **kwargs: Any) -> None:
            self.note("end", run_id)

        def note(self, event: str, run_id: Any) -> None:
            if run_id == self.first:
                heard.append((event, threading.current_thread()))

    model, config = guard(by_role(critique=flags())), {"callbacks": [Bound()]}
    model.invoke("hello", config) if way == "invoke" else [*model.stream("hello", config)]  # type: ignore[arg-type]

    here = threading.current_thread()
    assert heard == [("start", here), ("token", here), ("end", here)]


# --- tools --------------------------------------------------------------------------------------------


def test_tools_are_bound_to_the_drafts_and_to_no_critic_or_reviser() -> None:
    inner = scripted("the draft")
    model = guard(inner)

    bound = model.bind_tools([weather], tool_choice="any")
    answer = bound.invoke("hello")

    assert isinstance(bound, RunnableBinding)  # as LangChain's own models have it
    assert bound.kwargs == {"tools": ["weather"], "tool_choice": "any"}
    assert answer.content == "better"
    assert inner.bound[0] == ([weather], {"tool_choice": "any"})
    assert inner.bound[1:] == [{"tools": ["weather"], "tool_choice": "any"}, {}, {}, {}]
    inner.bound.clear()
    model.invoke("hello")  # the model itself has none
    assert inner.bound == [{}, {}, {}, {}]


def test_configuration_and_arguments_survive_the_binding_of_tools() -> None:
    inner = scripted("fine")
    seen: list[list[str]] = []

    class Tags(UsageMetadataCallbackHandler):
        def on_chat_model_start(self, *args: Any, tags: Any = None, **kwargs: Any) -> None:
            seen.append(list(tags))

    handler = Tags()
    model = guard(inner).with_config(tags=["nostream"], callbacks=[handler]).bind(stop=["x"])
    model.bind_tools([weather]).invoke("hello")

    assert inner.bound[1] == {"tools": ["weather"], "stop": ["x"]}
    assert role_of(inner.calls[0]) == "draft"
    assert len(seen) == 3
    assert all("nostream" in tags for tags in seen)


def test_a_call_of_a_tool_passes_through_unjudged() -> None:
    asks = AIMessage("", tool_calls=[CALL], id="a1")
    model = guard(scripted(asks))

    answer = model.bind_tools([weather]).invoke("hello")

    assert answer.tool_calls == [CALL]
    assert answer.id == "a1"
    assert answer.response_metadata["cai"]["outcome"] == "KEPT"


async def test_an_answer_with_text_and_tool_calls_keeps_its_calls_through_a_revision() -> None:
    asks = AIMessage("the draft", tool_calls=[CALL], id="a1")
    inner = scripted(asks)

    answer = await guard(inner).bind_tools([weather]).ainvoke("hello")

    assert (answer.content, answer.id) == ("better", "a1")
    assert answer.tool_calls == [CALL]
    judged = inner.calls[-1][1].text
    assert '[calls the tool weather with {"city": "Oslo"}]' in judged.rpartition("<answer>")[2]


def test_a_refused_answer_calls_no_tool() -> None:
    asks = AIMessage("the draft", tool_calls=[CALL])
    model = guard(scripted(asks, critique=verdicts("no-harm")))

    answer = model.bind_tools([weather]).invoke("hello")

    assert answer.content == RULES.refusal
    assert answer.tool_calls == []


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_an_agent_runs_on_a_wrapped_model(way: str) -> None:
    def draft(messages: list[BaseMessage]) -> AIMessage:
        if isinstance(messages[-1], ToolMessage):
            return AIMessage("the draft")
        return AIMessage("", tool_calls=[CALL])

    agent = create_agent(guard(scripted(draft)), [weather])
    asked: Any = {"messages": [("user", "hello")]}

    if way == "invoke":
        state = await asyncio.to_thread(agent.invoke, asked)
    else:
        state = await agent.ainvoke(asked)

    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert [message.text for message in state["messages"][2:]] == ["rain in Oslo", "better"]


# --- usage --------------------------------------------------------------------------------------------


def counted(model_name: str = "m") -> ScriptedModel:
    """A model that counts 12 tokens a call, and whose draft is revised."""
    says = by_role(critique=flags("no-harm")).replies
    assert callable(says)

    def reply(messages: list[BaseMessage]) -> AIMessage:
        text = says(messages)
        assert isinstance(text, str)
        usage = {**USAGE, "output_token_details": {"reasoning": 1}}
        return AIMessage(text, usage_metadata=usage, response_metadata={"model_name": model_name})  # type: ignore[arg-type]

    return ScriptedModel(replies=reply)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "answered"])
async def test_usage_is_the_drafts_and_the_sum_over_all_calls_stands_beside_it_itemised(way: str) -> None:
    model = guard(counted())

    if way == "answered":
        answer = (await model.answered("hello")).output
    elif way == "ainvoke":
        answer = await model.ainvoke("hello")
    else:
        answer = await asyncio.to_thread(model.invoke, "hello")

    assert answer.usage_metadata == {**USAGE, "output_token_details": {"reasoning": 1}}
    assert answer.response_metadata["cai"]["usage"] == {
        "input_tokens": 40,
        "output_tokens": 8,
        "total_tokens": 48,
        "output_token_details": {"reasoning": 1},
    }
    items = answer.response_metadata["cai"]["calls"]
    assert [item["role"] for item in items] == ["draft", "critique", "revise", "critique"]
    assert sum(item["input_tokens"] + item["output_tokens"] for item in items) == 48


async def test_answered_keeps_what_is_bound() -> None:
    bare = scripted("fine", critique=verdicts())
    bare.bound.clear()
    bound = guard(bare).bind_tools([weather]).bind(stop=["END"]).with_config(tags=["mine"])

    trajectory = (await bound.answered("hello", {"metadata": {"user": 1}}, seed=3)).trajectory

    assert {"tools": ["weather"], "stop": ["END"], "seed": 3} in bare.bound
    assert trajectory.tags == ("mine",)
    assert trajectory.metadata["user"] == 1


def test_callbacks_count_each_token_once() -> None:
    model = guard(counted())
    handler = UsageMetadataCallbackHandler()

    with get_usage_metadata_callback() as ambient:
        answer = model.invoke("hello", {"callbacks": [handler]})

    spent = answer.response_metadata["cai"]["usage"]["total_tokens"]
    for counter in (handler, ambient):
        assert counter.usage_metadata["m"]["total_tokens"] == spent == 48


def test_a_turn_looks_as_large_to_middleware_as_it_was() -> None:
    def reply(messages: list[BaseMessage]) -> AIMessage:
        text = verdicts() if role_of(messages) == "critique" else "fine"
        about = {"model_provider": "scriptedmodel"}
        return AIMessage(text, usage_metadata=USAGE, response_metadata=about)  # type: ignore[arg-type]

    summaries = ScriptedModel(replies=lambda messages: "a summary")
    summing = SummarizationMiddleware(model=summaries, trigger=("tokens", 20), keep=("messages", 1))
    agent = create_agent(guard(ScriptedModel(replies=reply)), [], middleware=[summing])

    told: Any = [HumanMessage("hello")]
    for _ in range(2):
        told = agent.invoke({"messages": told})["messages"] + [HumanMessage("again")]

    assert [message.text for message in told] == ["hello", "fine", "again", "fine", "again"]


async def test_streams_are_shown_the_usage_and_who_counts_counts_once() -> None:
    model, handler = guard(counted()), UsageMetadataCallbackHandler()

    class Printing(BaseCallbackHandler):
        usages: list[Any] = []  # noqa: RUF012 - one handler, one test

        def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
            self.usages.append(chunk.message.usage_metadata)

    config: Any = {"callbacks": [handler, Printing()]}
    events = [event async for event in model.astream_events("hello", config, version="v2")]
    asked: Any = {"messages": [("user", "hello")]}
    shown = [chunk for chunk, _ in in_a_node(model).stream(asked, stream_mode="messages")]

    (end,) = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"]
    assert end.usage_metadata["total_tokens"] == shown[-1].usage_metadata["total_tokens"] == 12
    assert end.response_metadata["cai"]["usage"]["total_tokens"] == 48
    assert handler.usage_metadata["m"]["total_tokens"] == 48
    assert Printing.usages == [None]


async def v2_end(app: Any, asked: Any, config: Any) -> Any:
    events = [event async for event in app.astream_events(asked, config, version="v2")]
    (end,) = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"]
    return end


async def v3_end(app: Any, asked: Any, config: Any) -> Any:
    output: Any = (await app.astream_events(asked, config, version="v3")).output
    return await (output() if callable(output) else output)  # a graph has a method


async def v3_end_in_a_thread(app: Any, asked: Any, config: Any) -> Any:
    return await asyncio.to_thread(lambda: app.stream_events(asked, config, version="v3").output)


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol", "ignore:.*is in beta")
@pytest.mark.parametrize("stream", ["buffer", "blocks"])
@pytest.mark.parametrize("agent", [False, True], ids=["alone", "in an agent"])
@pytest.mark.parametrize("read", [v2_end, v3_end, v3_end_in_a_thread])
async def test_readers_of_events_are_shown_the_usage_and_who_counts_counts_once(
    read: Any, agent: bool, stream: str
) -> None:
    ends: list[str] = []

    class Hearing(BaseCallbackHandler):
        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            ends.append(str(response))

    model, counter = guard(counted(), stream=stream), UsageMetadataCallbackHandler()
    app, asked = (create_agent(model, []), {"messages": [("user", "hello")]}) if agent else (model, "hello")

    end = await read(app, asked, {"callbacks": [counter, Hearing()]})

    while len(ends) < 5:  # of four calls and of the model's own run, which may come later than its output
        await asyncio.sleep(0.01)
    message = end["messages"][-1] if isinstance(end, dict) else end
    assert message.usage_metadata["total_tokens"] == 12
    assert message.response_metadata["cai"]["usage"]["total_tokens"] == 48
    assert counter.usage_metadata["m"]["total_tokens"] == 48
    assert not any("draft_usage" in said for said in (str(end), *ends))


def test_langchains_own_entry_has_what_a_chat_model_says_beside_its_answer() -> None:
    about = {"finish_reason": "stop", "model_name": "m", "system_fingerprint": "fp"}
    usage = {**USAGE, "input_token_details": {"cache_read": 4}, "output_token_details": {"reasoning": 1}}
    draft = AIMessage("fine", usage_metadata=usage, response_metadata=about)  # type: ignore[arg-type]
    result = guard(by_role(draft=draft, critique=verdicts())).generate([[HumanMessage("hello")]])

    assert result.generations[0][0].generation_info == {"finish_reason": "stop"}
    assert result.llm_output == {
        "token_usage": {
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
        "model_name": "m",
        "system_fingerprint": "fp",
    }


class Sampling(ScriptedModel):
    n: int | None = None


def test_several_candidates_are_refused_since_one_is_judged() -> None:
    says: Any = lambda messages: verdicts() if role_of(messages) == "critique" else "fine"  # noqa: E731
    model = guard(Sampling(replies=says))

    with pytest.raises(ConfigError, match=r"n=2 asks for 2 candidates.*model\.batch\(\[input\] \* 2\)"):
        model.generate([[HumanMessage("hello")]], n=2)
    with pytest.raises(ConfigError, match="n=3"):
        guard(Sampling(replies=says, n=3)).invoke("hello")
    with pytest.raises(ConfigError, match="n=2"):
        [*model.bind(n=2).stream("hello")]
    assert model.invoke("hello", n=1).text == "fine"


def test_a_model_that_does_not_count_has_no_usage() -> None:
    assert guard(by_role(critique=flags())).invoke("hello").usage_metadata is None


# --- what of a draft must not leave beside its words --------------------------------------------------

CANARY = "CANARY-51c0"


def test_nothing_that_tells_of_a_rejected_drafts_words_leaves_with_the_revision() -> None:
    draft = AIMessage(
        [
            {"type": "reasoning", "reasoning": CANARY},
            {"type": "text", "text": f"the draft {CANARY}", "annotations": [CANARY]},
            {"type": "image", "url": "https://example.org/kept.png"},
        ],
        additional_kwargs={"parsed": CANARY, "reasoning_content": CANARY, "own": 1},
        response_metadata={"logprobs": {"content": [{"token": CANARY}]}, "model_name": "m"},
    )
    critic = lambda messages: verdicts(*(["no-harm"] if CANARY in messages[1].text else []))  # noqa: E731

    answer = guard(by_role(draft=draft, critique=critic)).invoke("hello")

    assert CANARY not in str(answer)
    assert answer.content == [{"type": "text", "text": "better"}, draft.content[2]]
    assert answer.additional_kwargs == {"own": 1}
    assert answer.response_metadata["model_name"] == "m"


def test_thoughts_stay_beside_the_calls_that_came_of_them() -> None:
    thought = {"type": "thinking", "thinking": "it rains", "signature": "s"}
    draft = AIMessage([thought, {"type": "text", "text": "the draft"}], tool_calls=[CALL])

    answer = guard(scripted(draft)).bind_tools([weather]).invoke("hello")

    assert answer.content == [thought, {"type": "text", "text": "better"}]


def test_a_revision_of_a_cut_draft_is_not_said_to_be_cut() -> None:
    cut = AIMessage("the draft", response_metadata={"finish_reason": "length", "model_name": "m"})

    answer = guard(by_role(draft=cut, critique=flags("no-harm"))).invoke("hello")

    assert answer.content == "better"
    assert "finish_reason" not in answer.response_metadata


def test_what_a_kept_draft_says_of_itself_stays() -> None:
    logprobs = {"content": [{"token": "fine", "logprob": -0.1}]}
    about = {"finish_reason": "stop", "model_name": "m", "logprobs": logprobs}
    draft = AIMessage("fine", id="a1", response_metadata=about, additional_kwargs={"parsed": {"a": 1}})

    answer = guard(by_role(draft=draft, critique=verdicts())).invoke("hello")

    assert answer.id == "a1"
    assert {name: answer.response_metadata[name] for name in about} == about
    assert answer.additional_kwargs == draft.additional_kwargs
