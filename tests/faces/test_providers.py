"""What providers do, to each part of a request: over the real clients of OpenAI and Anthropic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI
from replies import IDS, RULES, by_role, verdicts
from wire import Reply, Script, Server, role, serving, under

from cai_graph import constitutional, open_log
from cai_graph.trajectory import Label, Outcome, Rejection, Trajectory, text_of

KEY = "unused"


def openai_native(server: Server, **settings: Any) -> BaseChatModel:
    """A model that LangChain knows to have native structured output."""
    fixed: dict[str, Any] = {"api_key": KEY, "base_url": server.url, "use_responses_api": False}
    return ChatOpenAI(model="gpt-5-mini", **fixed, **{"max_retries": 0, **settings})


def openai_plain(server: Server, **settings: Any) -> BaseChatModel:
    """A model that LangChain knows nothing of."""
    fixed: dict[str, Any] = {"api_key": KEY, "base_url": server.url, "use_responses_api": False}
    return ChatOpenAI(model="my-own", **fixed, **{"max_retries": 0, **settings})


def anthropic(server: Server, **settings: Any) -> BaseChatModel:
    fixed: dict[str, Any] = {"api_key": KEY, "base_url": server.url.removesuffix("/v1")}
    return ChatAnthropic(model_name="claude-sonnet-5", **fixed, **{"max_retries": 0, **settings})


Provider = Callable[..., BaseChatModel]
PROVIDERS: tuple[Provider, ...] = (openai_native, openai_plain, anthropic)
each_provider = pytest.mark.parametrize("provider", PROVIDERS)
NAMES = {
    openai_native: "#gpt-5-mini",
    openai_plain: "#my-own",
    anthropic: "anthropic:claude-sonnet-5",
}


def instead(where: str, reply: Reply) -> Script:
    """A model that drafts badly, judges it, revises well, and in one of the three says `reply` instead."""
    usual = under(RULES, violates=lambda shown: "<answer>\nanswer to" in shown)
    return lambda body: reply if role(body) == where else usual(body)


async def run(provider: Provider, script: Script, tmp_path: Path, **settings: Any) -> Trajectory:
    """Answer one request, and return its record."""
    with serving(script) as server, open_log(tmp_path / "log.db") as log:
        guarded = constitutional(provider(server), constitution=RULES, log=log, on_error="closed", **settings)
        await guarded.ainvoke("hello")
        (record,) = log.read(kind="trajectory")
    return record


# --- errors -------------------------------------------------------------------------------------------

MEANINGS = {
    400: "the provider rejected the request (status 400); its message says why",
    401: "the provider refused the API key; check the environment variable that holds it",
    404: "the provider has no such model, or the address is wrong",
    429: "the provider is busy or the quota is spent",
    500: "the provider failed (status 500); try later",
    529: "",
}
WORK = {"draft": "the app", "critique": "the critique by ", "revise": "the revision by "}


@each_provider
@pytest.mark.parametrize("where", WORK)
@pytest.mark.parametrize("status", MEANINGS)
async def test_an_error_leaves_as_the_clients_own_with_a_sentence_on_who_failed_and_what_to_do(
    provider: Provider, where: str, status: int
) -> None:
    with serving(instead(where, Reply("said the provider", status=status))) as server:
        guarded = constitutional(provider(server), constitution=RULES, log=None)
        with pytest.raises(Exception, match="said the provider") as raised:
            await guarded.ainvoke("hello")

    assert getattr(raised.value, "status_code", None) == status
    (note,) = (n for n in raised.value.__notes__ if n.startswith("cai_graph: "))
    assert note.startswith(f"cai_graph: {WORK[where]}")
    assert where == "draft" or NAMES[provider] in note
    meaning = MEANINGS[status] or "the provider is overloaded"
    assert f" failed: {meaning}" in note


@each_provider
async def test_the_record_names_the_error_the_call_and_its_meaning(
    provider: Provider, tmp_path: Path
) -> None:
    record = await run(provider, instead("critique", Reply("no", status=401)), tmp_path)

    assert record.outcome is Outcome.REFUSED  # on_error="closed"
    assert record.error is not None
    assert "Error code: 401" in record.error
    assert "the provider refused the API key" in record.error
    assert [(call.role, call.error is None) for call in record.calls][:2] == [
        ("draft", True),
        ("critique", False),
    ]


@each_provider
@pytest.mark.parametrize("where", WORK)
@pytest.mark.parametrize("status", [429, 500, 529])
async def test_the_client_tries_again_as_the_provider_asks_and_one_call_is_recorded(
    provider: Provider, where: str, status: int, tmp_path: Path
) -> None:
    usual = instead("nowhere", Reply())
    refused: list[str] = []

    def script(body: dict[str, Any]) -> str | Reply:
        if role(body) == where and not refused:
            refused.append(where)
            return Reply("not now", status=status, headers={"Retry-After": "0", "retry-after-ms": "1"})
        return usual(body)

    record = await run(lambda server: provider(server, max_retries=2), script, tmp_path)

    assert record.outcome is Outcome.REVISED
    assert refused == [where]
    assert [call.role for call in record.calls] == ["draft", "critique", "revise", "critique"]
    assert all(call.error is None for call in record.calls)


@each_provider
async def test_a_server_that_does_not_answer_in_time_is_said_to(provider: Provider) -> None:
    import threading

    wait = threading.Event()
    usual = instead("nowhere", Reply())

    def script(body: dict[str, Any]) -> str | Reply:
        if role(body) == "critique":
            wait.wait(10)
        return usual(body)

    with serving(script) as server:
        guarded = constitutional(
            provider(server), critic=provider(server, timeout=0.2), constitution=RULES, log=None
        )
        with pytest.raises(Exception, match="timed out") as raised:
            await guarded.ainvoke("hello")
        wait.set()

    assert any("did not answer in time; raise the model's timeout" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("provider", [openai_plain, anthropic])
async def test_no_connection_is_said_to_be_none(provider: Provider) -> None:
    with serving(instead("nowhere", Reply())) as server:
        gone = provider(server)
    with serving(instead("nowhere", Reply())) as server:
        guarded = constitutional(provider(server), critic=gone, constitution=RULES, log=None)
        with pytest.raises(Exception, match="Connection error") as raised:
            await guarded.ainvoke("hello")

    assert any("there is no connection to the provider" in note for note in raised.value.__notes__)


# --- replies that are none ----------------------------------------------------------------------------


@pytest.mark.parametrize("provider", [openai_native, openai_plain])
@pytest.mark.parametrize("where", WORK)
async def test_a_reply_without_a_choice_is_said_to_be_one(provider: Provider, where: str) -> None:
    with serving(instead(where, Reply(choices=False))) as server:
        guarded = constitutional(provider(server), constitution=RULES, log=None)
        with pytest.raises(IndexError) as raised:
            await guarded.ainvoke("hello")

    assert any(
        note.startswith(f"cai_graph: {WORK[where]}") and "a reply without a choice" in note
        for note in raised.value.__notes__
    )


CUT = {
    "length": "it was cut at its token limit",
    "content_filter": "the provider's filter stopped it",
}


@each_provider
@pytest.mark.parametrize("finish", CUT)
async def test_a_critique_that_is_cut_is_unreadable_and_says_why(
    provider: Provider, finish: str, tmp_path: Path
) -> None:
    record = await run(provider, instead("critique", Reply('{"verdicts": [', finish=finish)), tmp_path)

    (turn,) = record.rounds
    assert {verdict.label for verdict in turn.critique.verdicts} == {Label.UNREADABLE}
    assert {CUT[finish] in (verdict.reason or "") for verdict in turn.critique.verdicts} == {True}
    assert record.outcome is Outcome.REFUSED
    assert [call.role for call in record.calls] == ["draft", "critique", "critique"]  # asked once more


@pytest.mark.parametrize("provider", [openai_native, openai_plain])
async def test_of_a_cut_critique_the_verdicts_that_are_whole_count(
    provider: Provider, tmp_path: Path
) -> None:
    whole = verdicts("no-harm")
    cut = whole[: whole.index('"be-true"')]

    def script(body: dict[str, Any]) -> str | Reply:
        if role(body) != "critique":
            return "the draft"
        asked_again = "I could not read a verdict" in str(body["messages"][-1]["content"])
        return "be-true: COMPLIES" if asked_again else Reply(cut, finish="length")

    record = await run(provider, script, tmp_path, max_rounds=0)

    labels = {v.principle: v.label.value for v in record.rounds[0].critique.verdicts}
    assert labels == {"no-harm": "VIOLATES", "be-kind": "COMPLIES", "be-true": "COMPLIES"}


@pytest.mark.parametrize("provider", [openai_native, openai_plain])
async def test_a_critic_that_refuses_is_unreadable_in_its_own_words(
    provider: Provider, tmp_path: Path
) -> None:
    record = await run(provider, instead("critique", Reply(refusal="I will not judge this.")), tmp_path)

    assert record.outcome is Outcome.REFUSED
    for verdict in record.rounds[0].critique.verdicts:
        assert verdict.label is Label.UNREADABLE
        assert "the critic refused: 'I will not judge this.'" in (verdict.reason or "")


@each_provider
@pytest.mark.parametrize(
    ("reply", "rejection"),
    [
        (Reply("half an ans", finish="length"), Rejection.TRUNCATED),
        (Reply("half an ans", finish="content_filter"), Rejection.TRUNCATED),
        (Reply(""), Rejection.EMPTY),
    ],
    ids=["cut", "filtered", "empty"],
)
async def test_a_revision_that_is_none_is_rejected(
    provider: Provider, reply: Reply, rejection: Rejection, tmp_path: Path
) -> None:
    record = await run(provider, instead("revise", reply), tmp_path)

    assert record.outcome is Outcome.REFUSED
    assert {r.rejection for turn in record.rounds for r in turn.revisions} == {rejection}


@each_provider
@pytest.mark.parametrize("finish", CUT)
async def test_a_draft_that_is_cut_is_judged_as_far_as_it_goes_and_recorded_as_cut(
    provider: Provider, finish: str, tmp_path: Path
) -> None:
    record = await run(provider, instead("draft", Reply("half an ans", finish=finish)), tmp_path)

    assert record.outcome is Outcome.KEPT
    assert record.draft is not None
    assert record.draft.truncated


@pytest.mark.parametrize("provider", [openai_native, openai_plain])
async def test_a_refusal_in_a_field_of_its_own_is_the_draft_that_is_judged(
    provider: Provider, tmp_path: Path
) -> None:
    shown: list[str] = []

    def script(body: dict[str, Any]) -> str | Reply:
        if role(body) == "critique":
            shown.append(str(body["messages"][-1]["content"]))
            return verdicts()
        return Reply(refusal="I will not write that.")

    record = await run(provider, script, tmp_path)

    assert "<answer>\nI will not write that.\n</answer>" in shown[0]
    assert record.released is not None
    assert text_of(record.released) == "I will not write that."


# --- forms of a verdict -------------------------------------------------------------------------------


def form_of(body: dict[str, Any]) -> str | None:
    """Which form a request asks for."""
    if "response_format" in body or "output_config" in body:
        return "structured"
    return "tool" if body.get("tools") else None


@pytest.mark.parametrize(
    ("provider", "form"), [(openai_native, "structured"), (openai_plain, None), (anthropic, "structured")]
)
async def test_native_structured_output_is_used_where_the_model_has_it_and_plain_json_where_not(
    provider: Provider, form: str | None, tmp_path: Path
) -> None:
    bodies: list[dict[str, Any]] = []

    def script(body: dict[str, Any]) -> str | Reply:
        bodies.append(body)
        return instead("nowhere", Reply())(body)

    record = await run(provider, script, tmp_path)

    assert record.outcome is Outcome.REVISED
    assert [form_of(body) for body in bodies if role(body) == "critique"] == [form, form]
    assert {form_of(body) for body in bodies if role(body) != "critique"} == {None}
    (critique, *_) = (body for body in bodies if role(body) == "critique")
    if form == "structured":
        assert all(json.dumps(identifier) in json.dumps(critique) for identifier in IDS)


@pytest.mark.parametrize("provider", [openai_native, anthropic])
async def test_a_provider_that_rejects_the_form_is_asked_in_plain_text_from_then_on(
    provider: Provider,
) -> None:
    forms: list[str | None] = []

    def script(body: dict[str, Any]) -> str | Reply:
        if role(body) == "critique":
            forms.append(form_of(body))
            if forms[-1] is not None:
                return Reply("no such parameter", status=400)
        return instead("nowhere", Reply())(body)

    with serving(script) as server:
        guarded = constitutional(provider(server), constitution=RULES, log=None)
        assert (await guarded.ainvoke("hello")).text == "a better answer"
        assert (await guarded.ainvoke("again")).text == "a better answer"

    assert forms == ["structured", None, None, None, None]


async def test_a_model_with_tools_alone_gives_its_verdicts_in_a_call(tmp_path: Path) -> None:
    profile = {"tool_calling": True, "tool_choice": True}
    found = [{"principle": i, "critique": "", "verdict": "COMPLIES", "severity": 1} for i in IDS]

    def script(body: dict[str, Any]) -> str | Reply:
        if form_of(body) == "tool":
            args = {"verdicts": found, "evades": False}
            return Reply("", tool_calls=[{"name": "verdicts", "args": args, "id": "call"}])
        return "the draft"

    record = await run(lambda server: openai_plain(server, profile=profile), script, tmp_path)

    assert record.outcome is Outcome.KEPT
    assert {verdict.read_by for verdict in record.rounds[0].critique.verdicts} == {"tool"}


# --- tools and thoughts of the app's ------------------------------------------------------------------

CALL = {"name": "search", "args": {"q": "tea"}, "id": "call_1", "type": "tool_call"}


@each_provider
def test_a_call_of_a_tool_passes_as_the_model_made_it(provider: Provider) -> None:
    tool = {
        "name": "search",
        "description": "Searches.",
        "input_schema": {"type": "object", "properties": {}},
    }
    if provider is not anthropic:
        tool = {
            "name": "search",
            "description": "Searches.",
            "parameters": {"type": "object", "properties": {}},
        }
    with serving(lambda body: Reply("", tool_calls=[CALL])) as server:
        bare, guarded = (
            model.bind_tools([tool])
            for model in (provider(server), constitutional(provider(server), constitution=RULES, log=None))
        )
        assert guarded.invoke("tea?").tool_calls == bare.invoke("tea?").tool_calls == [CALL]
        chunks = list(guarded.stream("tea?"))

    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [("search", {"q": "tea"})]


async def test_thoughts_are_no_part_of_the_answer_and_those_of_a_rejected_draft_do_not_leave(
    tmp_path: Path,
) -> None:
    shown: list[str] = []
    usual = instead("draft", Reply("answer to it", reasoning="CANARY, I think"))

    def script(body: dict[str, Any]) -> str | Reply:
        if role(body) == "critique":
            shown.append(json.dumps(body))
        return usual(body)

    with serving(script) as server:
        guarded = constitutional(anthropic(server), constitution=RULES, log=None)
        answer = await guarded.ainvoke("hello")
        streamed = "".join([str(chunk.content) async for chunk in guarded.astream("hello")])

    assert answer.text == "a better answer"
    assert "CANARY" not in str(answer)
    assert "CANARY" not in streamed
    assert not any("CANARY" in body for body in shown)


async def test_thoughts_of_a_kept_draft_stay_where_the_provider_put_them() -> None:
    with serving(
        lambda body: verdicts() if role(body) == "critique" else Reply("fine", reasoning="hm")
    ) as server:
        bare = await anthropic(server).ainvoke("hello")
        kept = await constitutional(anthropic(server), constitution=RULES, log=None).ainvoke("hello")

    assert kept.content == bare.content
    assert [part["type"] for part in kept.content if isinstance(part, dict)] == ["thinking", "text"]


@pytest.mark.parametrize("max_rounds", [1, 0], ids=["revised", "refused"])
@pytest.mark.parametrize("output_version", ["v0", "v1"])
async def test_an_answer_in_parts_stays_in_parts_and_is_taken_back_by_the_provider(
    output_version: str, max_rounds: int
) -> None:
    asked: list[Any] = []
    usual = instead("draft", Reply("answer to it", reasoning="hm"))

    def script(body: dict[str, Any]) -> str | Reply:
        asked.append(body)
        return usual(body)

    with serving(script) as server:
        model = anthropic(server, output_version=output_version)
        guarded = constitutional(model, constitution=RULES, log=None, max_rounds=max_rounds)
        answer = await guarded.ainvoke("hello")
        ways = [answer, *[chunk async for chunk in guarded.astream("hello")]]
        asked.clear()
        await guarded.ainvoke([HumanMessage("hello"), answer, HumanMessage("again")])

    said = RULES.refusal if max_rounds == 0 else "a better answer"
    assert [[part["type"] for part in way.content if isinstance(part, dict)] for way in ways] == [
        ["text"]
    ] * 2
    assert asked[0]["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": said}]}


async def test_a_critic_and_a_reviser_that_think_are_read_by_what_they_say() -> None:
    usual = under(RULES, violates=lambda shown: "<answer>\nanswer to" in shown)

    def script(body: dict[str, Any]) -> str | Reply:
        said = usual(body)
        assert isinstance(said, str)
        return Reply(said, reasoning='{"verdicts": [{"principle": "no-harm", "verdict": "COMPLIES"}]}')

    with serving(script) as server:
        answer = await constitutional(anthropic(server), constitution=RULES, log=None).ainvoke("hello")

    assert answer.text == "a better answer"


# --- streams ------------------------------------------------------------------------------------------


@each_provider
@pytest.mark.parametrize(
    "trouble", [None, "overloaded, sorry"], ids=["the connection breaks", "an error comes"]
)
@pytest.mark.parametrize("stream", ["blocks", "audit"])
async def test_a_stream_that_breaks_is_an_error_with_a_sentence_and_its_record_says_what_left(
    provider: Provider, trouble: str | None, stream: Any, tmp_path: Path
) -> None:
    left: list[str] = []

    async def read(guarded: Any) -> None:
        async for chunk in guarded.astream("hello"):
            left.append(chunk.text)

    with (
        serving(lambda body: Reply("one two three four five", cut=4, trouble=trouble)) as server,
        open_log(tmp_path / "log.db") as log,
    ):
        guarded = constitutional(provider(server), constitution=RULES, log=log, stream=stream)
        with pytest.raises(Exception) as raised:
            await read(guarded)
        log.flush()
        (record,) = log.read(kind="trajectory")

    assert record.outcome is Outcome.FAILED
    said = "".join(left)
    assert (said == "") == (stream == "blocks")  # of which nothing leaves unjudged
    assert (None if record.released is None else text_of(record.released)) == (said or None)
    sentence = "it broke; check the network" if trouble is None else "overloaded"
    assert any(sentence in str(note) for note in (*raised.value.__notes__, raised.value))


# --- the command line ---------------------------------------------------------------------------------


def test_the_command_line_says_who_failed_and_what_to_do(tmp_path: Path) -> None:
    from cli_support import cai

    with serving(lambda body: "the draft") as drafts, serving(lambda body: Reply("no", status=401)) as critic:
        ended = cai(tmp_path, "ask", "hi", "--model", drafts.spec, "--critic", critic.spec, status=1)

    assert f"the critique by {critic.spec} failed: the server wants an API key; set" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == 1


_REFUSAL = {"type": "refusal", "refusal": "I cannot.", "id": "msg_1"}


@pytest.mark.parametrize("part", [_REFUSAL, {"type": "non_standard", "value": _REFUSAL}], ids=["v0", "v1"])
async def test_a_refusal_among_the_parts_is_the_answer_that_is_judged(part: Any, tmp_path: Path) -> None:
    """As OpenAI's Responses API has it, and as LangChain's content of version 1 wraps that."""
    model = by_role(draft=AIMessage([part]), critique=verdicts())
    with open_log(tmp_path / "log.db") as log:
        answer = await constitutional(model, constitution=RULES, log=log).ainvoke("hello")
        (record,) = log.read(kind="trajectory")

    assert record.draft is not None
    assert text_of(record.draft.answer) == "I cannot."
    assert "I cannot." in str(model.calls[1])
    assert answer.content == [part]
