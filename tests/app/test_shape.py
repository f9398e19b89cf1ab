"""Where an answer stands in an output, and by which one rule copies of a draft are replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel
from replies import RULES, answer_in, by_role, flags, verdicts

from cai_graph import ScriptedModel, constitutional, open_log
from cai_graph.testing import leaks

THREAD: Any = {"configurable": {"thread_id": "1"}}


def guard(app: Any, *answers: str, **settings: Any) -> Any:
    model = by_role(critique=flags("no-harm", answers=answers or ("the draft",)))
    settings = {"constitution": RULES, "log": None, "critic": model, "reviser": model} | settings
    return constitutional(app, **settings)


# --- copies of the draft ------------------------------------------------------------------------------


class State(MessagesState):
    answer: str
    intent: str
    notes: list[Any]


def graph(said: str, **options: Any) -> Any:
    built = StateGraph(State)
    message = AIMessage(said, id="m1")
    notes = [said, {"last": message, "other": f"it said: {said}"}]
    built.add_node(
        "model", lambda state: {"messages": [message], "answer": said, "intent": said, "notes": notes}
    )
    built.add_edge(START, "model")
    return built.compile(**options)


def plain(state: dict[str, Any]) -> Any:
    note, rest = state["notes"]
    told = [state["messages"][-1].text, state["answer"], state["intent"], note]
    return [*told, rest["last"].text, rest["other"]]


ASKED: Any = {"messages": [("user", "hello")]}


@pytest.mark.parametrize(
    ("said", "key", "left"),
    [
        ("the draft", "messages", ["better", "better", "better", "better", "better"]),
        ("No", "messages", ["better", "No", "No", "No", "better"]),
        ("the draft", "answer", ["better", "better", "better", "better", "better"]),
        ("No", "answer", ["No", "better", "No", "No", "No"]),
    ],
)
def test_a_copy_of_the_draft_is_replaced_in_output_stream_and_memory_alike(
    said: str, key: str, left: list[str]
) -> None:
    app = graph(said, checkpointer=InMemorySaver())
    guarded = guard(app, said, output_key=key)

    output = guarded.invoke(ASKED, THREAD)
    *_, streamed = guarded.stream(ASKED, {"configurable": {"thread_id": "2"}}, stream_mode="values")

    assert plain(output) == [*left, f"it said: {said}"]
    assert plain(app.get_state(THREAD).values) == plain(output)
    assert plain(streamed) == plain(output)


def team(*others: Any, **options: Any) -> Any:
    """A graph whose last node says again what the one before it said, the draft; `others` come between."""
    built = StateGraph(MessagesState)
    built.add_sequence(
        [
            ("alice", lambda state: {"messages": [AIMessage("the draft", name="alice")]}),
            ("others", lambda state: {"messages": [*others]}),
            ("bob", lambda state: {"messages": [AIMessage("the draft", name="bob")]}),
        ]
    )
    built.add_edge(START, "alice")
    return built.compile(**options)


def test_what_another_message_of_the_turn_says_alike_is_replaced_in_output_stream_and_memory() -> None:
    calls: Any = [{"name": "ask", "args": {}, "id": "c1"}]
    told_by_tool = ToolMessage([text("the draft")], tool_call_id="c1", id="t")
    others = (AIMessage("", tool_calls=calls, id="a"), told_by_tool)
    app = team(*others, checkpointer=InMemorySaver())
    guarded = guard(app)

    output = guarded.invoke(ASKED, THREAD)
    *_, streamed = guarded.stream(ASKED, {"configurable": {"thread_id": "2"}}, stream_mode="values")
    tokens = [*guarded.stream(ASKED, {"configurable": {"thread_id": "3"}}, stream_mode="messages")]
    steps = [*guarded.stream(ASKED, {"configurable": {"thread_id": "4"}})]

    told = ["hello", "better", "", "better", "better"]
    for state in (output, streamed, app.get_state(THREAD).values):
        assert [message.text for message in state["messages"]] == told
        assert [call["id"] for call in state["messages"][2].tool_calls] == ["c1"]
        assert state["messages"][3].content == [text("better")]
    assert [message.text for message, _ in tokens if message.text] == ["better"] * 3
    assert "the draft" not in repr(steps)


def test_the_tokens_of_a_message_that_says_alike_are_not_told() -> None:
    class Typed(ScriptedModel):
        def _stream(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            for word in ("the ", "draft"):
                yield ChatGenerationChunk(message=AIMessageChunk(word))

    model, again = Typed(replies=["the draft"]), Typed(replies=["the draft"])
    built = StateGraph(MessagesState)
    built.add_node("alice", lambda state: {"messages": [model.invoke("hi")]})
    built.add_node("bob", lambda state: {"messages": [again.invoke("hi")]})
    built.add_edge(START, "alice")
    built.add_edge("alice", "bob")

    tokens = [*guard(built.compile()).stream(ASKED, stream_mode="messages")]

    assert [message.text for message, _ in tokens if message.text] == ["better"] * 2


@pytest.mark.parametrize("ids", [True, False])
def test_what_was_said_alike_in_an_earlier_turn_stays(ids: bool) -> None:
    earlier = [HumanMessage("hi", id="1" if ids else None), AIMessage("the draft", id="2" if ids else None)]
    app = team(checkpointer=InMemorySaver())
    app.update_state(THREAD, {"messages": earlier}, as_node="bob")

    output = guard(app).invoke(ASKED, THREAD)
    listed = guard(RunnableLambda(lambda given: [*given, AIMessage("the draft")])).invoke(
        [*earlier, HumanMessage("hello")]
    )

    told = ["hi", "the draft", "hello", "better", "better"]
    assert [message.text for message in output["messages"]] == told
    assert [message.text for message in app.get_state(THREAD).values["messages"]] == told
    assert [message.text for message in listed] == told[:4]


def holding_itself() -> Any:
    notes: list[Any] = []
    notes += [notes, AIMessage("the draft")]
    built = StateGraph(State)
    built.add_node("model", lambda state: {"messages": [AIMessage("the draft")], "notes": [notes]})
    built.add_edge(START, "model")
    return built.compile()


def test_a_list_of_messages_has_what_leaves_in_each_copy() -> None:
    said = [AIMessage("the draft", name="alice"), AIMessage("the draft", name="bob")]

    output = guard(RunnableLambda(lambda asked: said)).invoke("hello")

    assert [(message.name, message.text) for message in output] == [("alice", "better"), ("bob", "better")]


def test_an_output_that_holds_itself_leaves_with_what_is_released_in_each_place() -> None:
    def answer(asked: str) -> Any:
        output: dict[str, Any] = {"answer": "the draft", "parts": [AIMessage("the draft")]}
        output["self"] = output
        output["parts"].append(output["parts"])
        return output

    output = guard(RunnableLambda(answer)).invoke("hello")
    *_, streamed = guard(holding_itself()).stream(ASKED, stream_mode="values")

    assert streamed["notes"][0][0] is streamed["notes"][0]
    assert streamed["notes"][0][1].text == "better"
    assert output["answer"] == output["self"]["answer"] == output["self"]["self"]["answer"] == "better"
    assert output["parts"][0].text == output["parts"][1][1][0].text == "better"


def test_a_refused_message_keeps_the_calls_whose_results_stand_behind_it() -> None:
    call: Any = {"name": "ask", "args": {}, "id": "c1"}
    said = [AIMessage("the draft", tool_calls=[call]), ToolMessage("done", tool_call_id="c1")]
    built = StateGraph(MessagesState).add_node("model", lambda state: {"messages": said})

    output = guard(built.add_edge(START, "model").compile(), max_rounds=0).invoke(ASKED)

    _, refused, result = output["messages"]
    assert (refused.text, result.text) == (RULES.refusal, "done")
    assert [each["id"] for each in refused.tool_calls] == ["c1"]


def test_a_kept_answer_is_streamed_with_its_outcome() -> None:
    (update,) = guard(graph("fine")).stream(ASKED)

    assert update["model"]["messages"][0].response_metadata["cai"]["outcome"] == "KEPT"
    assert update["model"]["answer"] == "fine"


async def test_a_copy_of_a_refused_draft_leaks_nowhere() -> None:
    def answer(state: Any) -> Any:
        return {"messages": [AIMessage("a CANARY sings")], "answer": "a CANARY sings"}

    built = StateGraph(State)
    built.add_node("model", answer)
    built.add_edge(START, "model")

    assert await leaks(guard(built.compile(), "a CANARY sings", max_rounds=0), ASKED, "CANARY") == []


def test_a_sentence_without_spaces_is_no_label() -> None:
    said = "我不能帮助您完成这件事情"

    output = guard(RunnableLambda(lambda _: {"answer": said, "copy": said}), said).invoke("hello")

    assert output == {"answer": "better", "copy": "better"}


def test_what_is_no_copy_leaves_as_the_app_returned_it() -> None:
    pages = ({"a page"}, ["the draft of a law"])
    output = {"answer": "the draft", "pages": pages, "question": "What is this?"}

    left = guard(RunnableLambda(lambda _: output)).invoke("hello")

    assert left == {**output, "answer": "better"}
    assert left["pages"] is pages


# --- parts of a message -------------------------------------------------------------------------------

THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}
CALL = {"type": "tool_use", "id": "c1", "name": "look", "input": {}}
CALLS: Any = [{"name": "look", "args": {}, "id": "c1"}]


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


@pytest.mark.parametrize("way", ["invoke", "stream", "node"])
@pytest.mark.parametrize(
    ("content", "left"),
    [
        ([THOUGHT, text("the draft"), CALL], [THOUGHT, text("better"), CALL]),
        ([THOUGHT, text("the "), text("draft"), CALL], [THOUGHT, text("better"), CALL]),
        ([THOUGHT, "the draft", CALL], [THOUGHT, text("better"), CALL]),
        ([THOUGHT, {"type": "refusal", "refusal": "the draft"}, CALL], [THOUGHT, text("better"), CALL]),
        ([THOUGHT, text("fine"), CALL], [THOUGHT, text("fine"), CALL]),
        ([THOUGHT, text("the "), text("draft")], [text("better")]),
        ([text("the draft", index=1, id="msg_1", annotations=[{"url": "x"}])], [text("better", index=1)]),
        (["the draft"], [text("better")]),
        ([text("f", citations=[{"cited_text": "x"}]), THOUGHT, text("ine")], None),
        ([CALL], None),
    ],
)
def test_parts_of_a_message_keep_their_order(content: list[Any], left: list[Any] | None, way: str) -> None:
    calls = CALLS if CALL in content else []
    app = RunnableLambda(lambda _: AIMessage(content, id="m1", tool_calls=calls))
    guarded = guard(app)

    if way == "invoke":
        message = guarded.invoke("hello")
    elif way == "stream":
        (message,) = guarded.stream("hello")
    else:
        built = StateGraph(MessagesState)
        built.add_node("model", lambda state: {"messages": [guarded.invoke("hello")]})
        built.add_edge(START, "model")
        ((message, _),) = built.compile().stream(ASKED, stream_mode="messages")

    assert message.content == (content if left is None else left)
    assert [call["name"] for call in message.tool_calls] == [call["name"] for call in calls]


def watchful(app: Any, **settings: Any) -> Any:
    """The app under a critic that finds SECRET wherever it is shown."""
    found = by_role(critique=lambda m: verdicts(*(["no-harm"] if "SECRET" in answer_in(m) else [])))
    return guard(app, critic=found, reviser=found, **settings)


BROKEN: Any = [{"name": "look", "args": "SECRET {", "id": "c2", "error": "no JSON: SECRET"}]


@pytest.mark.parametrize("stream", ["buffer", "blocks"])
@pytest.mark.parametrize(
    "message",
    [
        AIMessage([{"type": "text-plain", "text": "SECRET", "mime_type": "text/plain"}]),
        AIMessage([text("fine"), {"type": "executable_code", "executable_code": "SECRET"}]),
        AIMessage("", additional_kwargs={"audio": {"id": "a1", "transcript": "the SECRET", "data": "UklGR"}}),
        AIMessage("", invalid_tool_calls=BROKEN),
        AIMessage("fine", invalid_tool_calls=BROKEN),
    ],
)
async def test_whatever_a_model_says_is_judged_and_goes(message: AIMessage, stream: str) -> None:
    model = ScriptedModel(replies=lambda _: message.model_copy())

    assert await leaks(watchful(model, stream=stream), "hello", "SECRET") == []
    assert watchful(model, stream=stream).invoke("hello").text == "better"


@pytest.mark.parametrize("stream", ["buffer", "blocks"])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "web_fetch_tool_result", "content": {"source": {"type": "text", "data": "the SECRET"}}},
        {"type": "web_search_call", "action": {"query": "the SECRET"}},
        {"type": "code_execution_result", "code_execution_result": "SECRET"},
        {"type": "server_tool_call", "args": {"code": "print(SECRET, 1)"}},
        {"type": "server_tool_result", "output": [{"of": "the SECRET"}]},
        {"type": "non_standard", "value": {"type": "new", "of": "the SECRET"}},
        {"type": "compaction", "content": "the SECRET"},
    ],
)
async def test_what_a_providers_tool_fetched_is_not_judged_but_goes_with_a_rejected_answer(
    part: dict[str, Any], stream: str
) -> None:
    fine = ScriptedModel(replies=lambda _: AIMessage([text("fine"), part]))
    draft = ScriptedModel(replies=lambda _: AIMessage([text("the draft, so to say"), part]))
    model = by_role(
        critique=lambda m: verdicts(*(["no-harm"] if "draft" in answer_in(m) else [])), revise="better"
    )

    (left,) = watchful(fine, stream=stream).stream("hello")

    assert (left.content, left.response_metadata["cai"]["outcome"]) == ([text("fine"), part], "KEPT")
    guarded = guard(draft, critic=model, reviser=model, stream=stream)
    assert await leaks(guarded, "hello", "SECRET") == []
    assert guarded.invoke("hello").content == [text("better")]


def test_a_turn_that_calls_a_tool_and_one_of_its_providers_passes_without_a_critic_call() -> None:
    parts = [{"type": "web_search_call", "action": {"query": "the weather"}}, CALL]
    model = by_role(critique=verdicts())

    guard(RunnableLambda(lambda _: AIMessage(parts, tool_calls=CALLS)), critic=model).invoke("hello")

    assert model.calls == []


@pytest.mark.parametrize("reply", ["better", "the draft again"])
def test_of_a_revision_its_text_leaves_and_nothing_that_stands_beside_it(reply: str) -> None:
    parts = [{"type": "executable_code", "executable_code": "1+1"}, text(reply)]
    model = by_role(
        critique=lambda m: verdicts(*(["no-harm"] if "the draft" in answer_in(m) else [])),
        revise=AIMessage(parts),
    )

    for said in ("the draft", AIMessage("the draft")):
        app = RunnableLambda(lambda _, said=said: said)
        left = guard(app, critic=model, reviser=model, on_violation="open").invoke("hello")
        told = left if isinstance(left, str) else left.content
        assert told == ("better" if reply == "better" else "the draft")


@pytest.mark.parametrize("stream", ["buffer", "blocks", "audit"])
async def test_a_spoken_answer_that_is_kept_leaves_as_the_app_gave_it(stream: Any) -> None:
    said = ["It is a fine sentence that goes on until the first block may end. ", "And so it does here. "] * 2

    async def app(_: Any) -> AsyncIterator[AIMessageChunk]:
        for number, words in enumerate(said):
            told = {"transcript": words, "data": "QUJD"} | ({} if number else {"id": "a1"})
            yield AIMessageChunk("", id="m1", additional_kwargs={"audio": told})

    chunks = [chunk async for chunk in guard(RunnableLambda(app), stream=stream).astream("hello")]

    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.content == ""
    assert total.additional_kwargs == {"audio": {"id": "a1", "transcript": "".join(said), "data": "QUJD" * 4}}


@pytest.mark.parametrize("stream", ["buffer", "blocks"])
def test_a_kept_message_leaves_with_all_its_parts(stream: str) -> None:
    parts = [text("Let us see."), {"type": "executable_code", "executable_code": "1+1"}]
    model = ScriptedModel(replies=lambda _: AIMessage([*parts], invalid_tool_calls=CALLS_BROKEN))

    (left,) = watchful(model, stream=stream).stream("hello")

    assert left.content == parts
    assert left.invalid_tool_calls == CALLS_BROKEN
    assert left.response_metadata["cai"]["outcome"] == "KEPT"


CALLS_BROKEN: Any = [
    {"name": "look", "args": "[1", "id": "c2", "error": None, "type": "invalid_tool_call"},
]


def test_a_revision_keeps_of_its_draft_what_has_no_words() -> None:
    picture = {
        "type": "image",
        "base64": "aGVsbG8=",
        "mime_type": "image/png",
        "extras": {"alt": "of SECRET"},
    }
    calls: Any = [{"name": "look", "args": {}, "id": "c1"}]
    broken_use = {"type": "tool_use", "id": "c2", "name": "look", "input": {}, "partial_json": "SECRET {"}
    thought = {"type": "reasoning_content", "reasoning_content": {"text": "hm", "signature": "s"}}
    signature = {"type": "function_call_signature", "signature": "c2ln" * 99, "index": 0}
    packed = {"type": "compaction", "id": "cmp_1", "encrypted_content": "c2ln" * 99}
    own = {"type": "custom_tool_call", "id": "ctc_1", "call_id": "c1", "name": "look", "input": "some words"}
    wrapped = {"type": "non_standard", "value": own}
    told = {
        "model_name": "GPT 5 mini",
        "finish_reason": "stop",
        "token_usage": {"total_tokens": 7, "details": None, "note": "said SECRET"},
        "citations": ["the SECRET"],
        "grounding": {"query": "the SECRET", "score": 0.5},
    }
    draft = AIMessage(
        [
            thought,
            picture,
            text("the SECRET"),
            {"type": "server_tool_result", "output": "42"},
            packed,
            CALL,
            own,
            wrapped,
            signature,
            broken_use,
        ],
        tool_calls=calls,
        invalid_tool_calls=BROKEN,
        response_metadata=told,
        additional_kwargs={"annotations": [{"q": "SECRET"}], "signatures": {"c1": "c2ln" * 99}},
    )

    left = watchful(RunnableLambda(lambda _: draft)).invoke("hello")

    silent = {**picture, "extras": {"alt": ""}}
    assert left.content == [thought, silent, text("better"), packed, CALL, own, wrapped, signature]
    assert left.additional_kwargs == {"signatures": {"c1": "c2ln" * 99}}
    assert left.tool_calls == [{**calls[0], "type": "tool_call"}]
    assert left.invalid_tool_calls == []
    assert left.response_metadata.pop("cai")["outcome"] == "REVISED"
    assert left.response_metadata == {
        "model_name": "GPT 5 mini",
        "finish_reason": "stop",
        "token_usage": {"total_tokens": 7, "details": None},
        "grounding": {"score": 0.5},
    }


def test_a_broken_call_is_logged_as_what_was_judged(tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        model = ScriptedModel(replies=lambda _: AIMessage("fine", invalid_tool_calls=BROKEN))
        watchful(model, log=log).invoke("hello")
        (record,) = log.read(kind="trajectory")

    assert record.draft.answer.content == [  # type: ignore[union-attr]
        {"type": "text", "text": "fine"},
        {"type": "invalid_tool_call", "name": "look", "args": "SECRET {", "id": "c2"},
    ]


@pytest.mark.parametrize(("said", "id"), [("the draft", None), ("fine", "resp_1")])
def test_the_providers_id_of_a_draft_leaves_with_the_draft_only(said: str, id: str | None) -> None:
    metadata = {"id": "resp_1", "model_name": "m"}
    app = RunnableLambda(lambda _: AIMessage(said, response_metadata=metadata))

    left = guard(app).invoke("hello").response_metadata

    assert (left.get("id"), left["model_name"]) == (id, "m")


# --- inputs -------------------------------------------------------------------------------------------


class Asked(BaseModel):
    question: str = ""
    answer: str = ""


@dataclass
class Given:
    question: str = ""
    answer: str = ""


@pytest.mark.parametrize("kind", [Asked, Given])
def test_a_state_of_fields_is_read_as_the_dict_that_it_stands_for(kind: Any) -> None:
    built = StateGraph(kind)
    built.add_node("model", lambda state: {"answer": "the draft"})
    built.add_edge(START, "model")

    output = guard(built.compile(), context_keys=["question"]).invoke(kind(question="What is this?"))

    assert output == {"question": "What is this?", "answer": "better"}


@pytest.mark.parametrize("mode", ["updates", ["values", "updates"], "messages"])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_an_invoke_of_another_stream_mode_returns_the_chunks(way: str, mode: Any) -> None:
    app = guard(graph("the draft"))
    input: Any = {"messages": [HumanMessage("hello", id="q")]}

    if way == "invoke":
        chunks = app.invoke(input, stream_mode=mode)
    else:
        chunks = await app.ainvoke(input, stream_mode=mode)

    assert len(chunks) == len(graph("the draft").invoke(input, stream_mode=mode))
    assert "better" in repr(chunks)
    assert "content='the draft" not in repr(chunks)
