"""People in the loop: what waits for a decision, what the decision does, and what the log has of it."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, dynamic_prompt
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from pydantic import BaseModel
from replies import RULES, answer_in, by_role, flags, principle, verdicts
from test_middleware import (
    ASKED,
    CALL,
    CANARY,
    PAYS,
    agents_model,
    guarded,
    order,
    ordering,
    reporting,
    stored,
    weather,
)

from cai_graph import constitutional
from cai_graph.constitution import Constitution
from cai_graph.errors import AwaitsReview, ConfigError, DataError, LogError, RunError
from cai_graph.log import Log, open_log
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Label, Outcome, Review, Trajectory
from trainers.dataset import Recipe, build
from trainers.rows import CriticRow, read_row

THREAD: Any = {"configurable": {"thread_id": "1"}}

both_ways = pytest.mark.parametrize("way", ["invoke", "ainvoke"])


@pytest.fixture
def saver() -> InMemorySaver:
    return InMemorySaver()


def model(**says: Any) -> ScriptedModel:
    """Drafts what violates two principles, and revises it to what still violates one."""
    broken = {"the draft": ["no-harm", "be-kind"], "hardly better": ["be-kind"]}

    def critique(messages: list[BaseMessage]) -> str:
        return flags(*broken.get(answer_in(messages), []), answers=list(broken))(messages)

    return by_role(**{"critique": critique, "revise": "hardly better", **says})


def guard(app: Any, saver: Any, log: Log | None = None, **settings: Any) -> Any:
    judge = {} if isinstance(app, ScriptedModel) else {"critic": model(), "reviser": model()}
    given = {"constitution": RULES, "log": log, "checkpointer": saver, "max_rounds": 1, **judge}
    return constitutional(app, **{**given, "on_violation": "human", **settings})


async def run(app: Any, way: str, given: Any, config: Any = THREAD, **options: Any) -> Any:
    if way == "invoke":
        return await asyncio.to_thread(app.invoke, given, config, **options)
    return await app.ainvoke(given, config, **options)


def decide(decision: str, **more: Any) -> Command[Any]:
    return Command(resume={"decision": decision, **more})


def records(log: Log) -> tuple[list[Trajectory], list[Review]]:
    log.flush()
    found = list(log.read())
    return [r for r in found if isinstance(r, Trajectory)], [r for r in found if isinstance(r, Review)]


# --- pausing and resuming -----------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    ("decision", "released", "origin", "outcome"),
    [
        (decide("approve"), "hardly better", "revision", Outcome.EXHAUSTED),
        (decide("draft", reviewer="ada"), "the draft", "draft", Outcome.EXHAUSTED),
        (decide("edit", answer="my own words", note="too harsh"), "my own words", "human", Outcome.REVISED),
        (decide("reject"), RULES.refusal, "refusal", Outcome.REFUSED),
    ],
)
async def test_a_person_decides_what_leaves_and_nothing_is_paid_for_twice(
    way: str, decision: Any, released: str, origin: str, outcome: Outcome, log: Log, saver: InMemorySaver
) -> None:
    judge, drafts = model(), model()
    app = guard(drafts | RunnableLambda(lambda m: m.text), saver, log, critic=judge, reviser=judge)

    with pytest.raises(AwaitsReview) as waits:
        await run(app, way, "hello")
    assert records(log) == ([], [])
    calls = len(judge.calls), len(drafts.calls)
    answer = await run(app, way, decision)

    assert answer == released
    assert (len(judge.calls), len(drafts.calls)) == calls
    ((trajectory,), (review,)) = records(log)
    assert trajectory.id == waits.value.question["trajectory_id"] == review.trajectory_id
    assert (trajectory.outcome, trajectory.released_from) == (outcome, origin)
    assert trajectory.released is not None
    assert trajectory.released.content == released
    assert [call.role for call in trajectory.calls] == ["draft", "critique", "revise", "critique"]
    assert review.decision == decision.resume["decision"]
    assert review.reviewer == decision.resume.get("reviewer", "unnamed")
    assert review.note == decision.resume.get("note")
    assert (review.answer.content if review.answer else None) == decision.resume.get("answer")
    assert "the draft" not in stored(saver)  # its thread is gone


def test_a_persons_labels_of_the_draft_are_what_a_critic_learns(
    log: Log, saver: InMemorySaver, tmp_path: Path
) -> None:
    app = guard(model(), saver, log)
    with pytest.raises(AwaitsReview):
        app.invoke("hello", THREAD)
    said = {"no-harm": "COMPLIES", "honest": "VIOLATES"}
    app.invoke(decide("approve", verdicts=said, reviewer="ada"), THREAD)

    (_, (review,)) = records(log)
    assert [(v.principle, v.aim, v.label, v.read_by) for v in review.verdicts] == [
        ("no-harm", None, Label.COMPLIES, "human"),
        (None, "honest", Label.VIOLATES, "human"),
    ]
    made = build([log.name], tmp_path / "rows", Recipe(kind="critic", test_share=0.0))
    rows = [read_row("critic", line) for line in (made.path / "train.jsonl").read_bytes().splitlines()]
    of_the_draft = [
        (row.principle, row.violates, row.source)
        for row in rows
        if isinstance(row, CriticRow) and row.completion[0].content == "the draft"
    ]
    assert ("no-harm", False, "human") in of_the_draft
    assert ("honest", True, "human") in of_the_draft
    assert ("no-harm", True, "critique") not in of_the_draft


def test_the_question_says_all_that_a_person_needs(saver: InMemorySaver) -> None:
    with pytest.raises(AwaitsReview, match="thread '1' waits for a person's decision") as waits:
        guard(model(), saver).invoke("hello", THREAD)

    question = waits.value.question
    assert waits.value.thread_id == question["thread_id"] == "1"
    assert question["type"] == "constitutional_review"
    assert question["request"] == "hello"
    assert (question["draft"], question["proposed"]) == ("the draft", "hardly better")
    assert question["reason"] == "every answer violates the constitution 'rules': no-harm, be-kind"
    assert question["decisions"] == ["approve", "edit", "draft", "reject"]
    assert [(f["principle"], f["label"], f["reason"]) for f in question["findings"]] == [
        ("no-harm", "VIOLATES", "breaks no-harm"),
        ("be-kind", "VIOLATES", "breaks be-kind"),
    ]


@both_ways
async def test_an_app_that_returns_a_dict_says_that_it_waits_as_langgraph_does(
    way: str, saver: InMemorySaver
) -> None:
    app = guard(RunnableLambda(lambda _: {"answer": "the draft", "source": "s"}), saver)

    paused = await run(app, way, {"question": "hello"})
    with pytest.raises(AwaitsReview):
        await app.answered({"question": "hello"}, {"configurable": {"thread_id": "2"}})
    resumed = await app.answered(decide("edit", answer="mine"), {"configurable": {"thread_id": "2"}})

    assert list(paused) == ["__interrupt__"]
    assert paused["__interrupt__"][0].value["draft"] == "the draft"
    assert await run(app, way, decide("draft")) == {"answer": "the draft", "source": "s"}
    assert resumed.output == {"answer": "mine", "source": "s"}
    assert resumed.trajectory.released_from == "human"


@both_ways
async def test_a_wrapped_chat_model_waits_and_goes_on(way: str, saver: InMemorySaver) -> None:
    usage: Any = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    app = guard(model(draft=AIMessage("the draft", id="m1", usage_metadata=usage)), saver)

    with pytest.raises(AwaitsReview):
        await run(app, way, [HumanMessage("hello")])
    answer = await run(app, way, decide("edit", answer="mine"))

    assert (answer.content, answer.id, answer.usage_metadata) == ("mine", "m1", usage)
    with pytest.raises(AwaitsReview):
        list(app.stream("hello", THREAD))


async def test_a_chat_model_that_waits_goes_on_by_a_stream(saver: InMemorySaver) -> None:
    usage: Any = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    app = guard(model(draft=AIMessage("the draft", id="m1", usage_metadata=usage)), saver)
    other: Any = {"configurable": {"thread_id": "2"}}

    for thread in (THREAD, other):
        with pytest.raises(AwaitsReview):
            app.invoke("hello", thread)
    chunks = list(app.stream(decide("edit", answer="mine"), THREAD))
    later = [chunk async for chunk in app.astream(decide("reject"), other)]

    assert all(isinstance(chunk, AIMessageChunk) for chunk in (*chunks, *later))
    assert [(chunk.content, chunk.id, chunk.usage_metadata) for chunk in chunks] == [("mine", "m1", usage)]
    assert "".join(chunk.text for chunk in later) == RULES.refusal


class Starts(BaseCallbackHandler):
    """Notes the tags and metadata of runs as they begin."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], dict[str, Any]]] = []

    def on_chain_start(self, *about: Any, tags: Any = None, metadata: Any = None, **more: Any) -> None:
        self.seen.append((tags or [], metadata or {}))


@pytest.mark.parametrize("called", ["invoke", "stream"])
def test_a_model_that_may_ask_runs_under_its_own_tags_metadata_and_callbacks(
    called: str, saver: InMemorySaver
) -> None:
    starts = Starts()
    about: Any = {"tags": ["nostream"], "metadata": {"team": "x"}}
    app = guard(model(draft="fine").model_copy(update=about), saver)
    app.callbacks = [starts]

    answered = getattr(app, called)("hello", THREAD)

    assert (answered.text if called == "invoke" else "".join(chunk.text for chunk in answered)) == "fine"
    tags, metadata = starts.seen[0]
    assert (tags, metadata["team"]) == (["nostream"], "x")


async def test_streams_say_that_they_wait(saver: InMemorySaver) -> None:
    app = guard(RunnableLambda(lambda _: {"answer": "the draft"}), saver)

    chunks = [chunk async for chunk in app.astream({"question": "hello"}, THREAD)]
    resumed = [chunk async for chunk in app.astream(decide("approve"), THREAD)]

    assert [list(chunk) for chunk in chunks] == [["__interrupt__"]]
    assert resumed == [{"answer": "hardly better"}]


def test_what_complies_or_was_mended_leaves_at_once(log: Log, saver: InMemorySaver) -> None:
    app = guard(model(revise="better"), saver, log)

    assert app.invoke("hello", THREAD).content == "better"
    assert records(log)[0][0].outcome is Outcome.REVISED
    assert list(saver.list(None)) == []


def test_a_person_is_asked_about_a_verdict_that_cannot_be_read(log: Log, saver: InMemorySaver) -> None:
    app = guard(model(critique="gibberish"), saver, log, on_violation="closed", on_unreadable="human")

    with pytest.raises(AwaitsReview) as waits:
        app.invoke("hello", THREAD)
    assert "no verdict could be read" in waits.value.question["reason"]
    assert app.invoke(decide("approve"), THREAD).content == "the draft"
    assert records(log)[0][0].outcome is Outcome.EXHAUSTED


def test_a_person_is_asked_about_an_answer_that_a_failing_critic_left_unjudged(
    log: Log, saver: InMemorySaver
) -> None:
    app = guard(model(critique=OSError("down")), saver, log, on_violation="closed", on_error="human")

    with pytest.raises(AwaitsReview) as waits:
        app.invoke("hello", THREAD)
    assert waits.value.question["reason"] == "down"
    assert app.invoke(decide("edit", answer="mine"), THREAD).content == "mine"
    ((trajectory,), _) = records(log)
    assert trajectory.error == "OSError: down"
    assert [call.error for call in trajectory.calls] == [None, "OSError: down"]


@pytest.mark.parametrize("strategy", ["parallel", "batched"])
def test_both_strategies_ask(strategy: str, saver: InMemorySaver) -> None:
    app = guard(model(), saver, strategy=strategy)

    with pytest.raises(AwaitsReview):
        app.invoke("hello", THREAD)
    assert app.invoke(decide("draft"), THREAD).content == "the draft"


def test_text_that_no_checkpointer_takes_waits_all_the_same(log: Log, saver: InMemorySaver) -> None:
    app = guard(
        RunnableLambda(lambda _: "the draft"), saver, log, critic=model(critique="?"), on_unreadable="human"
    )

    with pytest.raises(AwaitsReview) as waits:
        app.invoke("half a smile: \ud83d", THREAD)
    assert waits.value.question["request"] == "half a smile: ?"
    assert app.invoke(decide("approve"), THREAD) == "the draft"
    assert records(log)[0][0].prompt == "half a smile: \ud83d"


@pytest.mark.parametrize(
    ("decision", "pair", "labels"),
    [
        (decide("edit", answer="mine"), ("mine", "the draft"), {"mine": True, "the draft": False}),
        (
            decide("approve"),
            ("hardly better", "the draft"),
            {"hardly better": True, "the draft": False},
        ),
        (decide("draft"), None, {"the draft": True}),
    ],
)
def test_a_decision_becomes_a_preference_of_a_person(
    decision: Any, pair: tuple[str, str] | None, labels: dict[str, bool], saver: InMemorySaver, tmp_path: Path
) -> None:
    where = f"sqlite:///{tmp_path}/cai.db"
    with open_log(where) as log:
        app = guard(model(), saver, log)
        with pytest.raises(AwaitsReview):
            app.invoke("hello", THREAD)
        app.invoke(decision, THREAD)

    def rows(kind: Any) -> list[Any]:
        out = tmp_path / kind
        try:
            build([where], out, Recipe(kind=kind))
        except DataError:
            return []
        return [json.loads(line) for path in out.glob("t*.jsonl") for line in path.read_text().splitlines()]

    pairs = [
        (r["chosen"][0]["content"], r["rejected"][0]["content"], r["source"]) for r in rows("preference")
    ]
    assert pairs == ([(*pair, "human")] if pair else [])
    assert {r["completion"][0]["content"]: r["label"] for r in rows("unpaired")} == labels


# --- what cannot work ---------------------------------------------------------------------------------


def test_what_a_pause_needs_is_checked_before_anything_is_paid_for() -> None:
    silent = ScriptedModel(replies=[])

    with pytest.raises(ConfigError, match="policy 'human' waits in a checkpointer"):
        guard(silent, None)
    with pytest.raises(ConfigError, match="checkpointer is a LangGraph checkpointer, found str"):
        guard(silent, "memory")
    with pytest.raises(ConfigError, match="policy 'human' has no stream 'blocks'"):
        guard(silent, InMemorySaver(), stream="blocks")
    with pytest.raises(ConfigError, match="which thread waits"):
        guard(silent, InMemorySaver()).invoke("hello")


class Keeps(BaseCheckpointSaver[Any]):
    """A checkpointer that cannot delete."""

    def __init__(self) -> None:
        super().__init__()
        inner = InMemorySaver()
        self.get_tuple, self.put, self.put_writes = inner.get_tuple, inner.put, inner.put_writes  # type: ignore[method-assign]


def test_a_checkpointer_that_cannot_delete_is_named_before_anything_is_paid_for() -> None:
    silent = ScriptedModel(replies=[])

    with pytest.raises(ConfigError, match="Keeps has no delete_thread"):
        guard(silent, Keeps())
    with pytest.raises(ConfigError, match="Keeps has no delete_thread"):
        outer(guard(silent, InMemorySaver()), "invoke", Keeps()).invoke({"question": "hello"}, THREAD)  # type: ignore[arg-type]


class DeletesDirectly(InMemorySaver):
    """Deletes for synchronous callers only."""

    adelete_thread = BaseCheckpointSaver.adelete_thread


class DeletesAwaited(InMemorySaver):
    """Deletes for callers in an event loop only."""

    delete_thread = BaseCheckpointSaver.delete_thread

    async def adelete_thread(self, thread_id: str) -> None:
        InMemorySaver.delete_thread(self, thread_id)


@both_ways
@pytest.mark.parametrize("kind", [DeletesDirectly, DeletesAwaited])
async def test_a_checkpointer_may_delete_for_one_kind_of_callers_only(
    kind: type[InMemorySaver], way: str
) -> None:
    saver = kind()
    app = guard(model(), saver)

    with pytest.raises(AwaitsReview):
        await run(app, way, "hello")

    assert (await run(app, way, decide("approve"))).content == "hardly better"
    assert list(saver.list(None)) == []


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("approve", "a decision is a dict, .* found str"),
        ({"decision": "yes"}, "decision is one of approve, edit, draft, reject, found 'yes'"),
        ({"decision": "edit"}, "the decision 'edit', and no other, comes with the answer"),
        ({"decision": "approve", "answer": "mine"}, "the decision 'edit', and no other, comes with"),
        ({"decision": "edit", "answer": " "}, "answer is text, found ' '"),
        ({"decision": "approve", "by": "ada"}, "found also 'by'"),
        ({"decision": "approve", "verdicts": "bad"}, "verdicts is a dict .* found 'bad'"),
        (
            {"decision": "approve", "verdicts": {"no-ham": "VIOLATES"}},
            "verdicts: 'rules' has no-harm, harmless, be-kind, be-true, honest, not 'no-ham'",
        ),
        (
            {"decision": "approve", "verdicts": {"no-harm": "bad"}},
            "verdicts: a label is VIOLATES or COMPLIES, found 'bad'",
        ),
    ],
)
def test_a_decision_that_cannot_be_read_is_named_and_the_request_goes_on_waiting(
    said: Any, problem: str, saver: InMemorySaver
) -> None:
    app = guard(model(), saver)
    with pytest.raises(AwaitsReview):
        app.invoke("hello", THREAD)

    with pytest.raises(DataError, match=problem):
        app.invoke(Command(resume=said), THREAD)

    assert app.invoke(decide("approve"), THREAD).content == "hardly better"


def test_a_thread_that_waits_takes_no_new_request_and_another_thread_does(saver: InMemorySaver) -> None:
    drafts = model()
    app = guard(drafts, saver)
    with pytest.raises(AwaitsReview) as first:
        app.invoke("hello", THREAD)
    calls = len(drafts.calls)

    with pytest.raises(AwaitsReview) as again:
        app.invoke("and another thing", THREAD)
    with pytest.raises(AwaitsReview):
        app.invoke("hello", {"configurable": {"thread_id": "2"}})

    assert again.value.question == first.value.question
    assert len(drafts.calls) == calls + 4


def of_two_apps(by: str, saver: Any, logs: list[Log]) -> list[Any]:
    """Two apps that differ in the name of their constitution, or in their own."""
    made = []
    for name, log in zip(("sales", "support"), logs, strict=True):
        rules = Constitution(
            name=name if by == "constitution" else "rules", principles=RULES.principles, refusal=f"{name}: no"
        )
        chain: Any = model(draft=f"the draft of {name}") | StrOutputParser()
        if by == "run name":
            chain = chain.with_config(run_name=name)
        elif by == "name":
            chain.name = name
        judge = model(critique=verdicts("no-harm"))
        made.append(guard(chain, saver, log, constitution=rules, critic=judge, reviser=judge, max_rounds=0))
    return made


@pytest.mark.parametrize("by", ["constitution", "name", "run name"])
def test_apps_that_share_a_thread_wait_and_are_decided_each_by_itself(
    by: str, saver: InMemorySaver, tmp_path: Path
) -> None:
    logs = [open_log(tmp_path / f"{name}.db") for name in ("sales", "support")]
    sales, support = of_two_apps(by, saver, logs)

    with pytest.raises(AwaitsReview):
        sales.invoke("hello", THREAD)
    with pytest.raises(RunError, match="nothing waits for a decision in thread '1'"):
        support.invoke(decide("reject"), THREAD)
    with pytest.raises(AwaitsReview) as waits:
        support.invoke("and to you", THREAD)

    assert (waits.value.question["request"], waits.value.question["draft"]) == (
        "and to you",
        "the draft of support",
    )
    assert sales.invoke(decide("draft"), THREAD) == "the draft of sales"
    assert support.invoke(decide("reject"), THREAD) == "support: no"
    assert [[t.prompt for t in records(log)[0]] for log in logs] == [["hello"], ["and to you"]]


def test_what_waits_from_before_each_app_had_a_place_of_its_own_is_found(
    log: Log, saver: InMemorySaver
) -> None:
    app = guard(model(), saver, log)
    with pytest.raises(AwaitsReview) as waits:
        app.invoke("hello", THREAD)
    before = "9d17b8a3-1ee9-5cb6-9bf7-e1fd23f657ac"  # the place of thread "1"
    lying = next(saver.list(None)).config["configurable"]["thread_id"]
    saver.storage[before] = saver.storage.pop(lying)
    for kept in (saver.writes, saver.blobs):
        for key in [*kept]:
            kept[(before, *key[1:])] = kept.pop(key)  # type: ignore[attr-defined, index]

    with pytest.raises(AwaitsReview) as again:
        app.invoke("and another thing", THREAD)
    others = Constitution(name="others", principles=RULES.principles)
    with pytest.raises(RunError, match="nothing waits"):
        guard(model(), saver, log, constitution=others).invoke(decide("approve"), THREAD)

    assert again.value.question == waits.value.question
    assert app.invoke(decide("approve"), THREAD).content == "hardly better"
    assert list(saver.list(None)) == []


def test_a_request_goes_on_under_a_constitution_that_was_amended_meanwhile(saver: InMemorySaver) -> None:
    with pytest.raises(AwaitsReview):
        guard(model(), saver).invoke("hello", THREAD)
    amended = Constitution(name="rules", version="2", principles=RULES.principles[:2], refusal="No.")

    assert guard(model(), saver, constitution=amended).invoke(decide("reject"), THREAD).content == "No."


def test_a_decision_that_nobody_waits_for_is_an_error(saver: InMemorySaver) -> None:
    app = guard(model(), saver)

    with pytest.raises(RunError, match="nothing waits for a decision in thread '1'"):
        app.invoke(decide("approve"), THREAD)


def test_a_decision_that_could_not_be_logged_is_kept_and_logged_at_the_next_try(
    log: Log, saver: InMemorySaver, tmp_path: Path
) -> None:
    closed = open_log(tmp_path / "closed.db")
    closed.close()
    app = guard(model(), saver, closed, on_log_error="raise")
    with pytest.raises(AwaitsReview):
        app.invoke("hello", THREAD)

    with pytest.raises(LogError):
        app.invoke(decide("edit", answer="mine", reviewer="ada"), THREAD)
    answer = guard(model(), saver, log).invoke(decide("reject"), THREAD)

    assert answer.content == "mine"  # what was decided first
    assert records(log)[1][0].reviewer == "ada"


def test_what_the_log_did_not_take_is_logged_before_the_threads_next_request(
    log: Log, saver: InMemorySaver, tmp_path: Path
) -> None:
    closed = open_log(tmp_path / "closed.db")
    closed.close()
    app = guard(model(), saver, closed, on_log_error="raise")
    with pytest.raises(AwaitsReview):
        app.invoke("hello", THREAD)
    with pytest.raises(LogError):
        app.invoke(decide("edit", answer="mine"), THREAD)

    answer = guard(model(draft="fine"), saver, log).invoke("something else", THREAD)

    assert answer.content == "fine"
    assert [t.prompt for t in records(log)[0]] == ["hello", "something else"]
    assert len(records(log)[1]) == 1


async def test_of_two_requests_that_come_to_wait_at_once_none_is_lost(log: Log, saver: InMemorySaver) -> None:
    both = asyncio.Barrier(2)

    async def draft(_: str) -> str:
        await both.wait()
        return "the draft"

    app = guard(RunnableLambda(lambda _: "", afunc=draft), saver, log)

    ends = await asyncio.gather(
        *(app.ainvoke(asked, THREAD) for asked in ("left", "right")), return_exceptions=True
    )
    (waits,) = [end for end in ends if isinstance(end, AwaitsReview)]
    (lost,) = [end for end in ends if not isinstance(end, AwaitsReview)]
    await app.ainvoke(decide("approve"), THREAD)

    assert "another request of thread '1' came to wait" in str(lost)
    trajectories, _ = records(log)
    assert {t.outcome for t in trajectories} == {Outcome.FAILED, Outcome.EXHAUSTED}
    assert sorted(t.prompt for t in trajectories) == ["left", "right"]
    assert waits.question["request"] in ("left", "right")


@pytest.mark.parametrize("second", ["approve", "reject"])
async def test_of_two_decisions_at_once_one_leaves_and_the_log_has_that_one(
    second: str, log: Log, saver: InMemorySaver, caplog: pytest.LogCaptureFixture
) -> None:
    app = guard(model(), saver, log)
    with pytest.raises(AwaitsReview):
        await app.ainvoke("hello", THREAD)

    ends = await asyncio.gather(
        *(app.ainvoke(decide(said), THREAD) for said in ("approve", second)), return_exceptions=True
    )

    (answer,) = [end for end in ends if not isinstance(end, BaseException)]
    (refused,) = [end for end in ends if isinstance(end, RunError)]
    ((trajectory,), (review,)) = records(log)
    assert "another call has decided what leaves in thread '1'" in str(refused)
    assert refused.trajectory_id == trajectory.id
    assert (answer.content, review.decision) == ("hardly better", "approve")
    assert trajectory.released is not None
    assert trajectory.released.content == answer.content
    assert "LOST" not in caplog.text


@pytest.mark.parametrize("second", ["approve", "reject"])
def test_of_decisions_in_two_processes_the_first_in_the_log_leaves(
    second: str, log: Log, saver: InMemorySaver, caplog: pytest.LogCaptureFixture
) -> None:
    app = guard(model(), saver, log)
    with pytest.raises(AwaitsReview):
        app.invoke("hello", THREAD)
    other = InMemorySaver()  # what another process has read before this one has decided
    for mine, theirs in ((saver.storage, other.storage), (saver.writes, other.writes)):
        theirs.update(copy.deepcopy(dict(mine)))
    other.blobs.update(saver.blobs)

    app.invoke(decide("approve", reviewer="ada"), THREAD)
    with pytest.raises(RunError, match="another call has decided"):
        guard(model(), other, log).invoke(decide(second, reviewer="bob"), THREAD)

    ((trajectory,), (review,)) = records(log)
    assert (review.reviewer, trajectory.outcome) == ("ada", Outcome.EXHAUSTED)
    assert "LOST" not in caplog.text
    with pytest.raises(RunError, match="nothing waits"):
        guard(model(), other, log).invoke(decide("approve"), THREAD)


class Slow(InMemorySaver):
    """Says when it begins to write, and goes on when it may."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__()
        self.begins, self.may = asyncio.Event(), asyncio.Event()
        self.fault = fault

    async def aput(self, *given: Any) -> Any:
        self.begins.set()
        await self.may.wait()
        if self.fault is not None:
            raise self.fault
        return await super().aput(*given)


async def test_a_request_that_is_cancelled_while_it_is_kept_waits_all_the_same(log: Log) -> None:
    said: Any = lambda _: {"messages": [AIMessage("the draft", id="a")]}  # noqa: E731
    memory, saver = InMemorySaver(), Slow()
    graph = StateGraph(MessagesState).add_node("say", said).add_edge(START, "say").compile(memory)
    app = guard(graph, saver, log)

    request = asyncio.create_task(app.ainvoke({"messages": "hello"}, THREAD))
    await saver.begins.wait()
    request.cancel()
    saver.may.set()
    with pytest.raises(asyncio.CancelledError):
        await request
    state = await app.ainvoke(decide("draft"), THREAD)

    assert state["messages"][-1].text == graph.get_state(THREAD).values["messages"][-1].text == "the draft"
    assert [len(each) for each in records(log)] == [1, 1]


@pytest.mark.parametrize("cancelled", ["it alone", "all that runs"])
async def test_a_request_that_is_cancelled_and_not_kept_is_logged(cancelled: str, log: Log) -> None:
    saver = Slow(OSError("down"))
    before = asyncio.all_tasks()

    request = asyncio.create_task(guard(model(), saver, log).ainvoke("hello", THREAD))
    await saver.begins.wait()
    for task in [request] if cancelled == "it alone" else asyncio.all_tasks() - before:
        task.cancel()
    saver.may.set()
    with pytest.raises(asyncio.CancelledError):
        await request

    ((trajectory,), _) = records(log)
    assert (trajectory.outcome, len(trajectory.calls)) == (Outcome.FAILED, 4)
    assert trajectory.error == ("OSError: down" if cancelled == "it alone" else "CancelledError: ")


class Advice(BaseModel):
    answer: str


def test_an_app_returns_its_own_type_out_of_a_checkpointer_that_knows_no_classes() -> None:
    strict = InMemorySaver(serde=JsonPlusSerializer(allowed_msgpack_modules=None))
    critic = model(critique=verdicts("no-harm"))
    app = guard(RunnableLambda(lambda _: Advice(answer="the draft")), strict, critic=critic, max_rounds=0)

    for decision, left in (("draft", "the draft"), ("edit", "mine")):
        with pytest.raises(AwaitsReview):
            app.invoke("hello", THREAD)
        more = {} if decision == "draft" else {"answer": json.dumps({"answer": left})}
        assert app.invoke(decide(decision, **more), THREAD) == Advice(answer=left)


def test_what_lies_in_a_checkpointer_is_found_by_the_callers_thread(saver: InMemorySaver) -> None:
    app = guard(model(), saver)
    with pytest.raises(AwaitsReview):
        app.invoke("hello", THREAD)

    found = {
        each.config["configurable"]["thread_id"] for each in saver.list(None, filter={"cai_thread": "1"})
    }

    assert len(found) == 1
    saver.delete_thread(found.pop())
    with pytest.raises(RunError, match="nothing waits"):
        app.invoke(decide("approve"), THREAD)


# --- inside another graph -----------------------------------------------------------------------------


class Chat(TypedDict, total=False):
    question: str
    answer: str


def outer(app: Any, way: str, saver: InMemorySaver | None) -> Any:
    def node(state: Chat, config: RunnableConfig) -> Chat:
        return {"answer": app.invoke(state["question"], config)}

    async def anode(state: Chat) -> Chat:
        return {"answer": await app.ainvoke(state["question"])}

    return of_one(node if way == "invoke" else anode, saver)


def of_one(node: Any, saver: InMemorySaver | None) -> Any:
    """A graph of one node."""
    graph = StateGraph(Chat)
    graph.add_node("answer", node)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile(checkpointer=saver)


@both_ways
async def test_inside_a_graph_the_pause_is_that_graphs_and_its_resumption_pays_nothing(
    way: str, log: Log, saver: InMemorySaver
) -> None:
    judge, drafts = model(), model()
    chain = drafts | RunnableLambda(lambda m: m.text)
    unused = InMemorySaver()
    graph = outer(guard(chain, unused, log, critic=judge, reviser=judge), way, saver)

    paused = await run(graph, way, {"question": "hello"})
    state = graph.get_state(THREAD)
    calls = len(judge.calls), len(drafts.calls)
    again = await run(graph, way, Command(resume={"decision": "maybe"}))
    answer = await run(graph, way, decide("edit", answer="mine"))

    assert paused["__interrupt__"][0].value["draft"] == "the draft"
    assert "answer" not in paused
    assert state.next == ("answer",)
    assert state.tasks[0].interrupts[0].value["type"] == "constitutional_review"
    assert "decision is one of" in again["__interrupt__"][0].value["problem"]
    assert answer == {"question": "hello", "answer": "mine"}
    assert (len(judge.calls), len(drafts.calls)) == calls
    ((trajectory,), (review,)) = records(log)
    assert trajectory.released_from == "human"
    assert review.decision == "edit"
    assert list(unused.list(None)) == []


def numbered() -> ScriptedModel:
    """Drafts something else each time, and nothing that complies."""
    drafts = (f"draft {number}" for number in itertools.count(1))
    return by_role(draft=lambda _: next(drafts), critique=verdicts("no-harm"))


def asked_about(state: Any) -> str:
    """The draft that a paused graph shows a person."""
    (pause,) = state["__interrupt__"]
    return str(pause.value["draft"])


@both_ways
async def test_a_node_that_fails_after_a_decision_gets_the_decided_answer_again(
    way: str, log: Log, saver: InMemorySaver
) -> None:
    failures, drafts = [OSError("down")], numbered()
    app = guard(drafts, saver, log)

    def end(answer: AIMessage) -> Chat:
        if failures:
            raise failures.pop()
        return {"answer": answer.text}

    async def anode(state: Chat) -> Chat:
        return end(await app.ainvoke(state["question"]))

    node = anode if way == "ainvoke" else lambda state: end(app.invoke(state["question"]))
    graph = of_one(node, saver)
    paused = await run(graph, way, {"question": "hello"})
    calls = len(drafts.calls)
    with pytest.raises(OSError, match="down"):
        await run(graph, way, decide("draft", reviewer="ada"))
    state = await run(graph, way, None)

    assert state["answer"] == asked_about(paused) == "draft 1"
    assert len(drafts.calls) == calls
    ((trajectory,), (review,)) = records(log)
    assert (review.reviewer, review.trajectory_id) == ("ada", trajectory.id)


@both_ways
async def test_a_node_may_ask_a_person_something_itself_after_an_answer_was_decided(
    way: str, log: Log, saver: InMemorySaver
) -> None:
    app = guard(numbered(), saver, log)

    async def anode(state: Chat) -> Chat:
        answer = (await app.ainvoke(state["question"])).text
        return {"answer": f"{answer}, sent: {interrupt({'send?': answer})}"}

    def node(state: Chat) -> Chat:
        answer = app.invoke(state["question"]).text
        return {"answer": f"{answer}, sent: {interrupt({'send?': answer})}"}

    graph = of_one(node if way == "invoke" else anode, saver)
    await run(graph, way, {"question": "hello"})
    asks = await run(graph, way, Command(resume={"decision": "maybe"}))
    sends = await run(graph, way, decide("draft"))
    state = await run(graph, way, Command(resume="yes"))

    assert "problem" in asks["__interrupt__"][0].value
    assert sends["__interrupt__"][0].value == {"send?": "draft 1"}
    assert state["answer"] == "draft 1, sent: yes"
    assert [len(each) for each in records(log)] == [1, 1]


def test_a_node_may_have_several_guarded_calls_and_questions_between_them(log: Log) -> None:
    app = guard(numbered(), InMemorySaver(), log)

    def node(state: Chat) -> Chat:
        said = [app.invoke("one").text, interrupt("and?"), app.invoke("two").text]
        return {"answer": ", ".join(said)}

    graph = of_one(node, InMemorySaver())
    first = graph.invoke({"question": "hello"}, THREAD)
    between = graph.invoke(decide("draft"), THREAD)
    second = graph.invoke(Command(resume="go on"), THREAD)
    state = graph.invoke(decide("reject"), THREAD)

    assert [asked_about(paused) for paused in (first, second)] == ["draft 1", "draft 2"]
    assert between["__interrupt__"][0].value == "and?"
    assert state["answer"] == f"draft 1, go on, {RULES.refusal}"
    assert [len(each) for each in records(log)] == [2, 2]


def test_a_decision_that_the_log_did_not_take_is_no_answer_to_what_the_node_asks_itself(
    log: Log, saver: InMemorySaver, tmp_path: Path
) -> None:
    closed = open_log(tmp_path / "closed.db")
    closed.close()

    def graph(log: Log) -> Any:
        app = guard(numbered(), saver, log, on_log_error="raise")

        def node(state: Chat) -> Chat:
            return {"answer": f"{app.invoke(state['question']).text}, sent: {interrupt('send?')}"}

        return of_one(node, saver)

    paused = graph(closed).invoke({"question": "hello"}, THREAD)
    with pytest.raises(LogError):
        graph(closed).invoke(Command(resume={paused["__interrupt__"][0].id: {"decision": "draft"}}), THREAD)
    sends = graph(log).invoke(None, THREAD)
    state = graph(log).invoke(Command(resume="yes"), THREAD)

    assert sends["__interrupt__"][0].value == "send?"
    assert state["answer"] == "draft 1, sent: yes"
    assert [len(each) for each in records(log)] == [1, 1]


@both_ways
async def test_a_decision_is_never_applied_to_a_draft_that_nobody_saw(
    way: str, log: Log, saver: InMemorySaver
) -> None:
    drafts, changed = numbered(), Constitution(name="rules", principles=RULES.principles, refusal="No.")
    chain, judge = drafts | StrOutputParser(), {"critic": drafts, "reviser": drafts}
    before = outer(guard(chain, saver, log, **judge), way, saver)
    after = outer(guard(chain, saver, log, constitution=changed, **judge), way, saver)

    first = await run(before, way, {"question": "hello"})
    second = await run(after, way, decide("draft", reviewer="ada"))
    state = await run(after, way, decide("draft", reviewer="bob"))

    assert [asked_about(paused) for paused in (first, second)] == ["draft 1", "draft 2"]
    assert state["answer"] == "draft 2"
    ((trajectory,), (review,)) = records(log)
    assert (review.reviewer, review.trajectory_id) == ("bob", trajectory.id)


def test_what_was_decided_lies_in_the_checkpointer_until_the_thread_next_asks(saver: InMemorySaver) -> None:
    graph = outer(guard(model() | StrOutputParser(), saver), "invoke", saver)

    def lying() -> set[str]:
        found = saver.list(None, filter={"cai_thread": "1"})
        return {each.config["configurable"]["thread_id"] for each in found}

    graph.invoke({"question": "hello"}, THREAD)
    first = lying()
    graph.invoke(decide("draft"), THREAD)
    decided = lying()
    graph.invoke({"question": "and now?"}, THREAD)
    second = lying()

    assert decided == first
    assert len(first) == len(second) == 1
    assert first != second


async def test_nodes_that_wait_at_once_are_decided_one_by_one(log: Log, saver: InMemorySaver) -> None:
    class Both(TypedDict, total=False):
        question: str
        left: str
        right: str

    app = guard(RunnableLambda(lambda _: "the draft"), saver, log)
    graph = StateGraph(Both)
    graph.add_node("to_left", lambda state: {"left": app.invoke(state["question"])})
    graph.add_node("to_right", lambda state: {"right": app.invoke(state["question"])})
    graph.add_edge(START, "to_left")
    graph.add_edge(START, "to_right")
    compiled = graph.compile(checkpointer=saver)

    paused = compiled.invoke({"question": "hello"}, THREAD)
    first, second = paused["__interrupt__"]
    answer = compiled.invoke(
        Command(resume={first.id: {"decision": "draft"}, second.id: {"decision": "edit", "answer": "mine"}}),
        THREAD,
    )

    assert sorted((answer["left"], answer["right"])) == ["mine", "the draft"]
    assert len(records(log)[1]) == 2


def test_a_graph_without_a_checkpointer_around_it_is_named_before_anything_is_paid_for() -> None:
    silent = ScriptedModel(replies=[])

    with pytest.raises(ConfigError, match="that graph needs a checkpointer"):
        outer(guard(silent, InMemorySaver()), "invoke", None).invoke({"question": "hello"})
    with pytest.raises(ConfigError, match="that graph needs a checkpointer"):
        guarded(agents_model(), settings={"on_violation": "human"}).invoke(ASKED)


# --- inside an agent ----------------------------------------------------------------------------------


@both_ways
async def test_an_agent_pauses_at_its_model_call_and_goes_on_with_what_was_decided(
    way: str, log: Log, saver: InMemorySaver
) -> None:
    agents = agents_model(revise=f"{CANARY} again")
    agent = guarded(
        agents, checkpointer=saver, settings={"on_violation": "human", "max_rounds": 1, "log": log}
    )

    paused = await run(agent, way, ASKED)
    calls = len(agents.calls)
    seen = agent.get_state(THREAD).values["messages"]
    state = await run(agent, way, decide("edit", answer="It rains."))

    assert paused["__interrupt__"][0].value["draft"].startswith(CANARY)
    assert CANARY not in str(seen)
    assert [m.text for m in state["messages"]][2:] == ["rain in Oslo", "It rains."]
    assert state["messages"][-1].id == "answer"
    assert len(agents.calls) == calls
    assert CANARY not in str(state)
    trajectories, reviews = records(log)
    assert [t.outcome for t in trajectories] == [Outcome.KEPT, Outcome.REVISED]
    assert [r.decision for r in reviews] == ["edit"]


@pytest.mark.parametrize(("tools", "calls"), [(False, ["call-1"]), (True, [])])
def test_an_edit_of_the_words_beside_a_call_keeps_it_unless_the_call_is_at_fault(
    tools: bool, calls: list[str], log: Log, saver: InMemorySaver
) -> None:
    def draft(messages: list[BaseMessage]) -> AIMessage:
        if isinstance(messages[-1], ToolMessage):
            return AIMessage("It rains.")
        return AIMessage(f"{CANARY} I look", tool_calls=[CALL])

    rules = [principle("no-harm", "harmless", tools=tools), principle("be-kind", "harmless", tools=True)]
    settings = {
        "constitution": Constitution(name="rules", principles=tuple(rules), refusal="No."),
        "on_violation": "human",
        "max_rounds": 0,
        "log": log,
    }
    agent = guarded(agents_model(draft), checkpointer=saver, settings=settings)

    agent.invoke(ASKED, THREAD)
    state = agent.invoke(decide("edit", answer="I look."), THREAD)

    said, *after = state["messages"][1:]
    assert (said.text, [call["id"] for call in said.tool_calls]) == ("I look.", calls)
    assert [message.text for message in after] == (["rain in Oslo", "It rains."] if calls else [])
    (review,) = records(log)[1]
    assert review.answer is not None
    assert [call.id for call in review.answer.tool_calls] == calls


def test_an_edit_stands_in_the_place_of_a_call_without_words(saver: InMemorySaver) -> None:
    settings = {"constitution": PAYS, "on_unreadable": "human"}
    agent = guarded(ordering("gibberish"), tools=[order], checkpointer=saver, settings=settings)

    paused = agent.invoke(ASKED, THREAD)
    state = agent.invoke(decide("edit", answer="Shall I order it?"), THREAD)

    assert paused["__interrupt__"][0].value["tool_calls"][0]["name"] == "order"
    assert (state["messages"][-1].text, state["messages"][-1].tool_calls) == ("Shall I order it?", [])


def test_an_agent_that_drafts_anew_when_it_is_resumed_asks_anew(saver: InMemorySaver) -> None:
    hours = itertools.count(9)

    @dynamic_prompt
    def clock(request: ModelRequest[Any]) -> str:
        return f"It is {next(hours)} o'clock."

    drafts = (f"{CANARY} {number}" for number in itertools.count(1))
    agents = agents_model(lambda _: next(drafts), revise=f"{CANARY} again")
    agent = guarded(
        agents, middleware=[clock], checkpointer=saver, settings={"on_violation": "human", "max_rounds": 1}
    )

    paused = agent.invoke(ASKED, THREAD)
    again = agent.invoke(decide("draft"), THREAD)

    assert [asked_about(state) for state in (paused, again)] == [f"{CANARY} 1", f"{CANARY} 2"]


@pytest.mark.parametrize("strategy", ["tool", "provider"])
def test_an_edit_of_a_structured_answer_keeps_its_form(strategy: str, saver: InMemorySaver) -> None:
    agents, wanted = reporting(strategy, revise="no form at all")
    settings = {"on_violation": "human", "max_rounds": 1}
    agent = guarded(agents, response_format=wanted, checkpointer=saver, settings=settings)

    agent.invoke(ASKED, THREAD)
    again = agent.invoke(decide("edit", answer="It rains."), THREAD)
    state = agent.invoke(decide("edit", answer='{"sky": "rain", "degrees": 3}'), THREAD)

    assert "this is not" in again["__interrupt__"][0].value["problem"]
    assert state["structured_response"].degrees == 3
    assert CANARY not in str(state)


def test_an_agent_of_a_wrapped_model_pauses_too(saver: InMemorySaver) -> None:
    wrapped = constitutional(
        agents_model(revise=f"{CANARY} again"), constitution=RULES, log=None, max_rounds=1,
        on_violation="human", checkpointer=saver,
    )  # fmt: skip
    agent = create_agent(wrapped, [weather], checkpointer=saver)

    paused = agent.invoke(ASKED, THREAD)
    state = agent.invoke(decide("reject"), THREAD)

    assert paused["__interrupt__"][0].value["type"] == "constitutional_review"
    assert state["messages"][-1].text == RULES.refusal
