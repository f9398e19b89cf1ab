"""The shapes of what a stream gives: chunks that add up, what stands beside the answer, and events."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncIterator, Callable
from functools import reduce
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableGenerator, RunnableLambda, RunnableParallel
from langchain_core.runnables.utils import AddableDict
from langchain_core.tools import tool
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from replies import RULES, by_role
from typist import FINE, ONE, THREE, TWO, Typist, drawn, guarded, judge, unsafe

from cai_graph import ScriptedModel, constitutional
from cai_graph.errors import ConfigError, DataError

# --- shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["buffer", "blocks", "audit"])
async def test_the_chunks_of_a_chat_model_add_up_to_what_invoke_returns(stream: str) -> None:
    call = {"name": "look_up", "args": {"word": "x"}, "id": "1", "type": "tool_call"}
    usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
    said = AIMessage(FINE, tool_calls=[call], usage_metadata=usage, response_metadata={"model": "m"}, id="7")  # type: ignore[arg-type]
    model = by_role(draft=said, critique=unsafe)
    app = constitutional(model, constitution=RULES, log=None, stream=stream)  # type: ignore[arg-type]

    chunks = [chunk async for chunk in app.astream("hello")]

    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    total = reduce(operator.add, chunks)
    whole = await app.ainvoke("hello")
    for name in ("content", "tool_calls", "usage_metadata", "id"):
        assert getattr(total, name) == getattr(whole, name), name
    assert total.response_metadata["model"] == "m"
    assert total.response_metadata["cai"]["outcome"] == "KEPT"
    assert {chunk.id for chunk in chunks} == {"7"}


async def test_content_in_parts_stays_in_parts() -> None:
    async def write(input: AsyncIterator[Any]) -> AsyncIterator[AIMessageChunk]:
        for index, word in enumerate(FINE.split(" ")):
            part = {"type": "text", "text": word if index == 0 else f" {word}", "index": 0}
            yield AIMessageChunk(content=[part], id="7")
        yield AIMessageChunk(content=[{"type": "image", "url": "x", "index": 1}], id="7")

    chunks = await drawn(guarded(RunnableGenerator(write)))

    total = reduce(operator.add, chunks)
    assert len(chunks) == 3
    assert total.content == [
        {"type": "text", "text": FINE, "index": 0},
        {"type": "image", "url": "x", "index": 1},
    ]


def writing(parts: list[Any]) -> RunnableGenerator[Any, AIMessageChunk]:
    async def write(input: AsyncIterator[Any]) -> AsyncIterator[AIMessageChunk]:
        for part in parts:
            yield AIMessageChunk(content=[part], id="7")
            await asyncio.sleep(0.01)

    return RunnableGenerator(write)


THOUGHT = [
    {"type": "thinking", "thinking": "SECRET", "index": 0},
    {"type": "thinking", "signature": "sig", "index": 0},
]
CITED = [
    {"type": "text", "text": ONE, "index": 1, "id": "t"},
    {"type": "text", "citations": ["p. 1"], "index": 1},
]
MILD = TWO.replace("unsafe", "harmless")
LATER = [{"type": "text", "text": MILD, "index": 2}, {"type": "text", "text": THREE, "index": 2}]
SEARCH = [{"type": "server_tool_use", "name": "search", "input": {}, "index": 5}]
WRAPPED = [{"type": "non_standard", "value": {"type": "own", "data": "SECRET"}, "index": 6}]
PLAIN = [{"type": "text", "text": ONE}, MILD, {"type": "image", "url": "x"}, {"type": "text", "text": THREE}]


@pytest.mark.parametrize(
    "parts",
    [
        [*THOUGHT, *CITED, *LATER],
        [
            *CITED,
            *SEARCH,
            *LATER,
            {"type": "tool_use", "name": "look_up", "input": {}, "id": "1", "index": 3},
        ],
        [*WRAPPED, *CITED, *THOUGHT, *LATER],
        [*SEARCH, {"type": "refusal", "refusal": ONE, "index": 1}, *LATER],
        PLAIN,
    ],
)
async def test_the_blocks_of_content_in_parts_add_up_to_what_the_apps_own_chunks_do(parts: list[Any]) -> None:
    app = writing(parts)
    bare, chunks = await drawn(app), await drawn(guarded(app))

    assert len(chunks) > 2
    assert all("SECRET" not in str(chunk.content) for chunk in chunks[:-1])
    total, expected = reduce(operator.add, chunks), reduce(operator.add, bare)
    if parts is PLAIN:  # which LangChain never puts together
        assert total.text == expected.text
    else:
        assert total.content == expected.content


async def test_a_revision_goes_on_behind_the_parts_that_have_left_and_their_thoughts_stay_back() -> None:
    said = (" The", TWO.removeprefix(" The"), THREE)
    later = [{"type": "text", "text": text, "index": 2} for text in said]

    chunks = await drawn(guarded(writing([*THOUGHT, *CITED, *later])))

    total = reduce(operator.add, chunks)
    assert total.text == ONE + " It ends well."
    assert [(part["type"], part["index"]) for part in total.content] == [
        ("thinking", 0),
        ("text", 1),
        ("text", 2),
    ]
    assert not any(secret in str(chunks) for secret in ("SECRET", "sig", "p. 1", "unsafe"))


async def test_what_stands_beside_the_answer_leaves_with_the_first_block_once() -> None:
    typist = Typist(FINE)
    app = RunnableParallel(answer=typist.app, documents=RunnableLambda(lambda _: ["a document"]))

    chunks = await drawn(guarded(app, context_keys=["documents"]), at_pace_of=typist)

    assert [sorted(chunk) for chunk in chunks] == [["answer", "documents"], ["answer"], ["answer"]]
    total = reduce(operator.add, chunks)
    assert total == {"answer": FINE, "documents": ["a document"]}


async def test_what_grows_beside_the_answer_leaves_whole() -> None:
    seen = asyncio.Event()

    async def write(input: AsyncIterator[Any]) -> AsyncIterator[AddableDict]:
        yield AddableDict(pages=["one"], answer=ONE + " And")
        await seen.wait()
        yield AddableDict(pages=["two"], answer=" so it ends.")

    chunks = []
    async for chunk in guarded(RunnableGenerator(write)).astream("hello"):
        chunks.append(chunk)
        seen.set()

    assert chunks == [{"pages": ["one"], "answer": ONE}, {"pages": ["two"], "answer": " And so it ends."}]


@pytest.mark.parametrize("key", ["answer", "output"])
async def test_a_copy_beside_the_answer_waits_until_all_is_judged_and_is_replaced(key: str) -> None:
    async def write(input: AsyncIterator[Any]) -> AsyncIterator[AddableDict]:
        yield AddableDict(pages=["a page"], answer=ONE, output=ONE)
        yield AddableDict(answer=TWO + THREE, output=TWO + THREE)

    app = guarded(RunnableGenerator(write), output_key=key, max_rounds=0)

    chunks = await drawn(app)

    told = "".join(chunk.get("answer", "") + chunk.get("output", "") for chunk in chunks)
    assert "unsafe" not in told
    assert chunks[0]["pages"] == ["a page"]


@pytest.mark.parametrize("stream", ["buffer", "blocks", "audit"])
async def test_what_holds_itself_may_stand_beside_the_answer(stream: str) -> None:
    about: dict[str, Any] = {"pages": ["one"]}
    about["self"] = about

    async def write(input: AsyncIterator[Any]) -> AsyncIterator[AddableDict]:
        yield AddableDict(about=about)
        yield AddableDict(answer=FINE)

    total = reduce(operator.add, await drawn(guarded(RunnableGenerator(write), stream=stream)))

    assert (total["answer"], total["about"]["self"]["pages"]) == (FINE, ["one"])


@pytest.mark.parametrize("copy", [AIMessage(ONE), {"page": [(ONE,)]}], ids=["message", "nested"])
async def test_a_copy_waits_however_deep_it_stands_beside_the_answer(copy: Any) -> None:
    about: list[Any] = []
    about += [about, copy]

    async def write(input: AsyncIterator[Any]) -> AsyncIterator[AddableDict]:
        yield AddableDict(about=about, answer=ONE)
        yield AddableDict(answer=TWO + THREE)

    chunks = await drawn(guarded(RunnableGenerator(write), max_rounds=0))

    assert ["about" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def executor(*, replies: Callable[[list[BaseMessage]], Any]) -> Any:
    """LangChain's old agent; it streams its messages, which `invoke` does not return."""
    from langchain_classic.agents import AgentExecutor, create_tool_calling_agent

    class Agent(ScriptedModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self.bind(tools=["look"])

    @tool
    def look(q: str) -> str:
        """Look."""
        return f"found {q}"

    prompt = ChatPromptTemplate.from_messages([("user", "{input}"), ("placeholder", "{agent_scratchpad}")])
    agent = create_tool_calling_agent(Agent(replies=replies), [look], prompt)
    return AgentExecutor(agent=agent, tools=[look])


def words_then(answer: str) -> Callable[[list[BaseMessage]], Any]:
    call: Any = {"name": "look", "args": {"q": "x"}, "id": "1"}
    return lambda messages: answer if messages[-1].type == "tool" else AIMessage("I look.", tool_calls=[call])


async def test_blocks_of_an_old_agent_show_no_draft_under_another_key() -> None:
    said = "It is unsafe, said at length."

    chunks = await drawn(guarded(executor(replies=words_then(said)), max_rounds=0), {"input": "?"})

    assert "unsafe" not in repr(chunks)
    assert chunks[-1]["output"] == RULES.refusal


async def test_audit_follows_an_old_agent_that_speaks_before_it_calls_a_tool() -> None:
    app = guarded(executor(replies=words_then("It is fine.")), stream="audit")

    chunks = await drawn(app, {"input": "?"})

    assert [sorted(chunk) for chunk in chunks] == [
        ["actions", "messages"],
        ["messages", "steps"],
        ["messages", "output"],
    ]
    assert chunks[-1]["output"] == "It is fine."


async def test_an_app_that_takes_back_what_has_left_is_an_error() -> None:
    async def write(input: AsyncIterator[Any]) -> AsyncIterator[dict[str, str]]:
        for text in (ONE + " And", "Something else. And so on, and on, until the end of it."):
            yield {"answer": text}  # plain dicts do not add up: each replaces the one before

    with pytest.raises(DataError, match="took back text that has left"):
        await drawn(guarded(RunnableGenerator(write)))


async def test_an_app_that_repeats_itself_at_greater_length_is_streamed_by_what_is_new() -> None:
    model = by_role(draft='{"answer": "' + FINE + '"}', critique=unsafe)

    chunks = await drawn(guarded(model | JsonOutputParser(), model))

    assert chunks[0]["answer"].startswith(ONE)
    assert "".join(chunk["answer"] for chunk in chunks) == FINE


async def test_an_input_in_chunks_is_what_they_add_up_to() -> None:
    async def parts() -> AsyncIterator[str]:
        yield "hel"
        yield "lo"

    model = by_role(draft=lambda messages: f"{messages[0].text} to you", critique=unsafe)
    app = guarded(model | StrOutputParser(), model)

    assert [chunk async for chunk in app.atransform(parts())] == ["hello to you"]
    assert list(app.transform(iter(["hel", "lo"]))) == ["hello to you"]


# --- what stands around --------------------------------------------------------------------------------


async def test_a_stream_is_traced_under_the_name_and_tags_that_its_caller_gives() -> None:
    class Tracer(BaseTracer):
        def _persist_run(self, run: Run) -> None:
            self.run = run

    tracer = Tracer()
    config = {"callbacks": [tracer], "run_name": "mine", "tags": ["a tag"]}
    chunks = await drawn(guarded(Typist().app), "hello", config)

    assert (tracer.run.name, tracer.run.tags) == ("mine", ["a tag"])
    assert tracer.run.outputs == {"output": "".join(chunks)}


@pytest.mark.parametrize("stream", ["buffer", "blocks"])
async def test_progress_travels_as_custom_events_without_a_word_of_the_draft(stream: str) -> None:
    app = guarded(Typist().app, judge(revise="It stays unsafe."), stream=stream)

    events = [event async for event in app.astream_events("hello", version="v2")]

    steps = [event["data"]["step"] for event in events if event["event"] == "on_custom_event"]
    assert {event["name"] for event in events if event["event"] == "on_custom_event"} == {"cai_progress"}
    started = ["drafting", "critiquing"] * (2 if stream == "blocks" else 1)
    heard_out = ["drafting"] if stream == "blocks" else []
    assert steps == [*started, *heard_out, "revising 1/2", "revising 2/2"]


def test_a_setting_that_cannot_be_streamed_is_refused() -> None:
    with pytest.raises(ConfigError, match="stream is one of buffer, blocks, audit"):
        guarded(Typist().app, stream="live")
    with pytest.raises(ConfigError, match="strategy 'sampled' holds nothing back"):
        guarded(Typist().app, strategy="sampled")
