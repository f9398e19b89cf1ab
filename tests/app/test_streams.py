"""What leaves of an answer when, while the app still writes it; and what the record says of it."""

from __future__ import annotations

import asyncio
import operator
import threading
from collections.abc import AsyncGenerator, Sequence
from functools import reduce
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.runnables import RunnableGenerator
from replies import IDS, RULES, answer_in, logged, role_of
from typist import DRAFT, FINE, ONE, THREE, TWO, Typist, drawn, guarded, judge, unsafe, until_error

from cai_graph import Budget, ScriptedModel
from cai_graph.app.shape import Shape
from cai_graph.app.streams import AHEAD, Batch, Piece, Writing, block_end, relay
from cai_graph.calls import Calls
from cai_graph.errors import BudgetExceeded, Unreadable, Violation
from cai_graph.log import Log
from cai_graph.trajectory import Outcome, Trajectory, text_of


def recorded(log: Log) -> Trajectory:
    (record,) = logged(log)
    return record


def prompts(model: ScriptedModel, role: str) -> Sequence[list[BaseMessage]]:
    return [messages for messages in model.calls if role_of(messages) == role]


# --- where a block ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "least", "block"),
    [
        ("One. Two. Three", 1, "One. Two."),
        ("One. Two. Three", 8, "One. Two."),
        ("One. Two. Three", 9, None),
        ('He said "no!" Then', 5, 'He said "no!"'),
        ("Really?! Yes", 5, "Really?!"),
        ("A line\nand another", 5, "A line"),
        ("\n\nA line\n", 5, "\n\nA line"),
        ("Version 1.5 is out. Yes", 5, "Version 1.5 is out."),
        ("So it is 1. Then", 8, None),
        ("これは文です。次の", 5, "これは文です。"),
        ("might go on.", 6, None),
        ("no end " * 3 + "no", 8, "no end no end no end"),
        ("x" * 33, 8, "x" * 32),
        ("Oh" + "!" * 12 + " Then", 5, "Oh" + "!" * 12),
    ],
)
def test_a_block_ends_with_a_sentence_or_a_line_or_else_between_words(
    text: str, least: int, block: str | None
) -> None:
    end = block_end(text, 0, least)

    assert (None if end is None else text[:end]) == block


def test_a_long_run_of_marks_is_looked_at_once() -> None:
    # From each mark to the end of the run, as it was, takes hours; a test is stopped after minutes.
    assert block_end("!" * 1_000_000, 0, 80) == 320


# --- relay ---------------------------------------------------------------------------------------------


async def test_each_block_is_twice_the_one_before_up_to_a_bound() -> None:
    sentence = "In each of the sentences are forty signs."

    async def written(*_: object) -> AsyncGenerator[Batch[str], None]:
        for _ in range(200):
            yield Batch([sentence + "\n"], last=False)

    async def send(piece: Piece) -> None:
        raise AssertionError("nothing is released here")

    writing = Writing(written, Shape(), send, at_once=False)
    drafts = [await writing.next(Calls(Budget()), {}) for _ in range(8)]
    ends = [len(text_of(draft.answer)) for draft in drafts]
    for end, after, least in zip(ends[:-1], ends[1:], (160, 320, 640, 1280, 1280, 1280, 1280), strict=True):
        assert least <= after - end < least + 2 * len(sentence)


async def test_a_relayed_task_is_a_bounded_number_of_items_ahead() -> None:
    sent: list[int] = []

    async def work(send: Any) -> None:
        for number in range(100):
            await send(number)
            sent.append(number)

    items = relay(work, room=3)
    first = await anext(items)
    for _ in range(20):
        await asyncio.sleep(0)

    assert (first, sent) == (0, [0, 1, 2])
    assert [item async for item in items] == list(range(1, 100))


async def test_the_error_of_a_relayed_task_comes_after_its_items() -> None:
    async def work(send: Any) -> None:
        await send(1)
        raise ValueError("mine")

    items = relay(work)

    assert await anext(items) == 1
    with pytest.raises(ValueError, match="mine"):
        await anext(items)


async def test_closing_a_relay_waits_until_its_task_has_cleaned_up() -> None:
    cleaned: list[bool] = []

    async def work(send: Any) -> None:
        try:
            while True:
                await send(1)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    items = relay(work)
    await anext(items)
    await items.aclose()

    assert cleaned == [True]


# --- blocks: what leaves, and the record ---------------------------------------------------------------


@pytest.mark.parametrize("revise", ["It is unsafe.", "It ends well."])
async def test_a_refused_turn_streams_no_call_and_a_revised_one_its_calls(revise: str) -> None:
    call: Any = {"name": "look", "args": {"at": "it"}, "id": "c1", "type": "tool_call"}
    drafts = ScriptedModel(replies=lambda _: AIMessage("unsafe", tool_calls=[call]))

    left = reduce(operator.add, await drawn(guarded(drafts, judge(revise=revise))))

    refused = revise == "It is unsafe."
    assert left.text == (RULES.refusal if refused else revise)
    assert left.tool_calls == ([] if refused else [call])


async def test_a_block_leaves_while_the_app_still_writes() -> None:
    typist = Typist(FINE)

    chunks = await drawn(guarded(typist.app), at_pace_of=typist)

    assert chunks == [ONE, TWO.replace("unsafe", "harmless"), THREE]


async def test_what_the_app_wrote_while_a_block_was_judged_is_the_next_block() -> None:
    model, typist = judge(), Typist(FINE)

    async def wait(messages: list[BaseMessage]) -> None:
        while len(typist.written) < len(typist.words):
            await asyncio.sleep(0)

    class Slow(ScriptedModel):
        async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
            await wait(messages)
            return self._generate(messages, *args, **kwargs)

    chunks = await drawn(guarded(typist.app, Slow(replies=model.replies)))

    assert chunks == [ONE, FINE.removeprefix(ONE)]


def test_a_synchronous_stream_needs_no_event_loop_and_the_app_writes_in_its_thread() -> None:
    typist = Typist()

    chunks = list(guarded(typist.app).stream("hello"))

    assert chunks == [ONE, " It ends well."]
    assert typist.threads == {threading.current_thread()}


async def test_a_kept_answer_is_judged_block_by_block_each_with_what_came_before(log: Log) -> None:
    model, typist = judge(), Typist(FINE)

    assert "".join(await drawn(guarded(typist.app, model, log=log), at_pace_of=typist)) == FINE

    assert [answer_in(messages) for messages in model.calls] == [ONE, FINE.removesuffix(THREE), FINE]
    assert ["still being written" in messages[1].text for messages in model.calls] == [True, True, False]
    record = recorded(log)
    assert record.draft is not None
    assert (record.outcome, record.mode, record.settings["stream"]) == (Outcome.KEPT, "enforce", "blocks")
    assert [(block.end, block.released) for block in record.draft.blocks] == [
        (len(ONE), True),
        (len(ONE + TWO.replace("unsafe", "harmless")), True),
        (len(FINE), False),
    ]
    assert record.rounds[0].critique == record.draft.blocks[-1].critique
    assert (text_of(record.draft.answer), record.draft.unfinished) == (FINE, False)
    assert record.released == record.draft.answer


async def test_in_parallel_each_block_has_the_verdicts_on_itself_alone(log: Log) -> None:
    typist = Typist(FINE)

    chunks = await drawn(guarded(typist.app, log=log, strategy="parallel"), at_pace_of=typist)

    assert "".join(chunks) == FINE
    record = recorded(log)
    assert record.draft is not None
    critiques = [block.critique for block in record.draft.blocks]
    assert [[verdict.principle for verdict in found.verdicts] for found in critiques] == [[*IDS]] * 3


async def test_an_answer_that_ends_with_a_block_is_not_judged_again() -> None:
    model = judge()

    assert await drawn(guarded(Typist(ONE + "\n").app, model)) == [ONE, "\n"]

    assert len(model.calls) == 1


async def test_a_call_behind_the_last_block_is_judged_with_it() -> None:
    model = judge()
    call: Any = {"name": "look", "args": "{}", "id": "c1", "index": 0, "type": "tool_call_chunk"}

    async def write(input: Any) -> Any:
        async for _ in input:
            yield AIMessageChunk(ONE + "\n")
            yield AIMessageChunk("", tool_call_chunks=[call], chunk_position="last")

    left = reduce(operator.add, await drawn(guarded(RunnableGenerator(write), model)))

    assert [made["name"] for made in left.tool_calls] == ["look"]
    assert ["[calls the tool look" in messages[1].text for messages in model.calls] == [False, True]


async def test_a_revision_goes_on_after_what_has_left_and_is_judged_with_it(log: Log) -> None:
    model = judge()

    chunks = await drawn(guarded(Typist().app, model, log=log))

    assert chunks == [ONE, " It ends well."]
    (asked,) = prompts(model, "revise")
    assert f"<said>\n{ONE}\n</said>" in asked[1].text
    assert answer_in(prompts(model, "critique")[-1]) == f"{ONE} It ends well."
    record = recorded(log)
    assert record.draft is not None
    assert record.released is not None
    assert (record.outcome, record.released_from) == (Outcome.REVISED, "revision")
    assert text_of(record.draft.answer) == DRAFT, "the app is heard out"
    assert [(block.end, block.released) for block in record.draft.blocks] == [
        (len(ONE), True),
        (len(ONE + TWO), False),
    ]
    assert text_of(record.released) == "".join(chunks)
    assert text_of(record.rounds[0].revisions[0].answer) == "".join(chunks)


async def test_what_a_writer_repeats_of_what_has_left_leaves_once() -> None:
    model = judge(revise=f"{ONE.replace(' ', '  ')}\nIt ends well.")

    assert await drawn(guarded(Typist().app, model)) == [ONE, " It ends well."]


async def test_a_writer_that_only_repeats_what_was_said_has_revised_nothing(log: Log) -> None:
    model = judge(revise=DRAFT.removeprefix(ONE).strip())

    chunks = await drawn(guarded(Typist().app, model, log=log, max_rounds=1))

    assert chunks == [ONE, f"\n\n{RULES.refusal}"]
    assert recorded(log).rounds[0].revisions[0].rejection == "unchanged"


@pytest.mark.parametrize("strategy", ["batched", "parallel"])
async def test_a_stream_that_cannot_go_on_ends_with_the_refusal(strategy: str, log: Log) -> None:
    model = judge(revise="It stays unsafe.")

    chunks = await drawn(guarded(Typist().app, model, log=log, strategy=strategy))

    assert chunks == [ONE, f"\n\n{RULES.refusal}"]
    record = recorded(log)
    assert record.released is not None
    assert (record.outcome, record.released_from) == (Outcome.REFUSED, "refusal")
    assert text_of(record.released) == "".join(chunks)


async def test_policy_open_lets_the_rest_of_the_draft_leave() -> None:
    model = judge(revise="It stays unsafe.")

    assert "".join(await drawn(guarded(Typist().app, model, on_violation="open"))) == DRAFT


async def test_policy_raise_raises_after_what_has_left_and_the_record_says_what_that_was(log: Log) -> None:
    app = guarded(Typist().app, judge(revise="unsafe"), log=log, on_violation="raise")

    chunks, error = await until_error(app)

    assert isinstance(error, Violation)
    assert chunks == [ONE]
    record = recorded(log)
    assert record.released is not None
    assert (record.outcome, text_of(record.released), record.released_from) == (Outcome.FAILED, ONE, "draft")


async def test_a_first_block_that_fails_lets_nothing_of_the_draft_leave() -> None:
    assert await drawn(guarded(Typist("It is unsafe. " + FINE).app)) == ["It ends well."]


@pytest.mark.parametrize("policy", ["closed", "open", "raise"])
async def test_an_unreadable_verdict_on_a_block_leaves_what_its_policy_says(policy: str) -> None:
    def critique(messages: list[BaseMessage]) -> str:
        return (
            "?"
            if "harmless" in messages[1].text or messages[-1].text.startswith("I could not")
            else unsafe(messages)
        )

    app = guarded(Typist(FINE).app, judge(critique), on_unreadable=policy)

    chunks, error = await until_error(app)

    rest = {"closed": [f"\n\n{RULES.refusal}"], "raise": []}
    assert "".join(chunks) == ONE + "".join(rest.get(policy, [FINE.removeprefix(ONE)]))
    assert isinstance(error, Unreadable) == (policy == "raise")


async def test_a_block_whose_verdict_is_unreadable_leaves_at_once_where_the_policy_is_open(log: Log) -> None:
    app = guarded(Typist(FINE).app, judge(lambda messages: "?"), on_unreadable="open", log=log)

    chunks = await drawn(app)

    assert (chunks[0], "".join(chunks)) == (ONE, FINE)
    record = recorded(log)
    assert record.draft is not None
    assert record.draft.blocks[0].released


@pytest.mark.parametrize("policy", ["closed", "open", "raise"])
async def test_a_critic_that_fails_in_the_middle_leaves_what_its_policy_says(policy: str) -> None:
    def critique(messages: list[BaseMessage]) -> str | Exception:
        return OSError("the critic is down") if "harmless" in messages[1].text else unsafe(messages)

    app = guarded(Typist(FINE).app, judge(critique), on_error=policy)

    chunks, error = await until_error(app)

    rest = {"closed": f"\n\n{RULES.refusal}", "raise": ""}
    assert "".join(chunks) == ONE + rest.get(policy, FINE.removeprefix(ONE))
    assert (error is None) == (policy != "raise")


@pytest.mark.parametrize("policy", ["closed", "open"])
async def test_the_apps_own_error_in_the_middle_is_raised_under_every_policy(policy: str, log: Log) -> None:
    def fail(word: str) -> None:
        if word == "last.":
            raise OSError("the app is down")

    app = guarded(Typist(FINE, before=fail).app, log=log, on_error=policy)

    chunks, error = await until_error(app)

    assert str(error) == "the app is down"
    record = recorded(log)
    assert record.draft is not None
    assert record.released is not None
    assert (record.outcome, record.draft.unfinished) == (Outcome.FAILED, True)
    assert text_of(record.released) == "".join(chunks)


async def test_the_deadline_ends_a_stream_whose_app_writes_too_slowly() -> None:
    typist = Typist(FINE, before=lambda word: asyncio.sleep(60) if word == "last." else None)
    app = guarded(typist.app, on_error="closed", budget=Budget(seconds=1.0))

    chunks = await drawn(app)

    assert (chunks[0], chunks[-1]) == (ONE, f"\n\n{RULES.refusal}")
    assert typist.stopped


async def test_the_deadline_raises_where_the_policy_is_raise() -> None:
    typist = Typist(FINE, before=lambda word: asyncio.sleep(60) if word == "last." else None)

    with pytest.raises(BudgetExceeded):
        await drawn(guarded(typist.app, budget=Budget(seconds=1.0)))


# --- closing early, and back-pressure ------------------------------------------------------------------


async def test_a_closed_stream_stops_the_app_and_is_logged_with_what_left(log: Log) -> None:
    typist = Typist(FINE + THREE * 500)

    stream = guarded(typist.app, log=log).astream("hello")
    assert await anext(stream) == ONE
    await stream.aclose()

    assert typist.stopped
    record = recorded(log)
    assert record.draft is not None
    assert record.released is not None
    assert (record.outcome, record.draft.unfinished) == (Outcome.FAILED, True)
    assert text_of(record.released).startswith(ONE)


def test_a_synchronous_stream_that_is_left_early_stops_the_app_and_is_logged(log: Log) -> None:
    typist = Typist(FINE + THREE * 500)

    for _ in guarded(typist.app, log=log).stream("hello"):
        break

    assert typist.stopped
    assert typist.threads == {threading.current_thread()}
    assert recorded(log).outcome is Outcome.FAILED


@pytest.mark.parametrize("stream", ["buffer", "blocks", "audit"])
async def test_a_cancelled_task_stops_the_app_and_is_logged(stream: str, log: Log) -> None:
    reached = asyncio.Event()

    def before(word: str) -> Any:
        if word != "last.":
            return None
        reached.set()
        return asyncio.sleep(60)

    typist = Typist(FINE, before=before)
    task = asyncio.create_task(drawn(guarded(typist.app, log=log, stream=stream)))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert typist.stopped
    record = recorded(log)
    assert record.outcome is Outcome.FAILED
    left = {"buffer": None, "blocks": FINE.removesuffix(THREE), "audit": FINE.removesuffix("last.")}[stream]
    assert (None if record.released is None else text_of(record.released)) == left


async def test_an_app_is_not_read_further_than_a_bounded_way_beyond_its_reader() -> None:
    typist = Typist(FINE + THREE * 2000)

    stream = guarded(typist.app).astream("hello")
    await anext(stream)
    for _ in range(10 * AHEAD):
        await asyncio.sleep(0)
    written = len(typist.written)
    await stream.aclose()

    assert written < 4 * AHEAD < len(typist.words)


async def test_events_that_nobody_reads_on_stop_the_app_too(log: Log) -> None:
    typist = Typist(FINE + THREE * 500)

    events = guarded(typist.app, log=log).astream_events("hello", version="v2")
    async for event in events:
        if event["event"] == "on_chain_stream":
            break
    await events.aclose()

    assert typist.stopped
    assert recorded(log).outcome is Outcome.FAILED


# --- audit ---------------------------------------------------------------------------------------------


async def test_in_audit_the_answer_leaves_before_the_verdict_and_the_record_says_so(log: Log) -> None:
    gone = asyncio.Event()

    class Late(ScriptedModel):
        async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
            await asyncio.wait_for(gone.wait(), 30)
            return self._generate(messages, *args, **kwargs)

    said = ""
    app = guarded(Typist().app, Late(replies=judge().replies), stream="audit", log=log)
    async for chunk in app.astream("hello"):
        said += chunk
        if said == DRAFT:
            gone.set()

    record = recorded(log)
    assert said == DRAFT
    assert (record.mode, record.outcome, record.released_from) == ("audit", Outcome.EXHAUSTED, "draft")
    assert [turn.revisions for turn in record.rounds] == [()]
    assert record.released is not None
    assert text_of(record.released) == DRAFT


async def test_an_audited_answer_that_complies_is_kept(log: Log) -> None:
    await drawn(guarded(Typist(FINE).app, stream="audit", log=log))

    assert (recorded(log).mode, recorded(log).outcome) == ("audit", Outcome.KEPT)


async def test_a_critic_that_fails_in_audit_raises_at_the_end_and_what_left_is_recorded(log: Log) -> None:
    app = guarded(Typist().app, judge(lambda messages: OSError("down")), stream="audit", log=log)

    chunks, error = await until_error(app)

    record = recorded(log)
    assert str(error) == "down"
    assert "".join(chunks) == DRAFT
    assert record.released is not None
    assert (record.outcome, text_of(record.released)) == (Outcome.FAILED, DRAFT)


async def test_audit_answers_an_invoke_as_every_mode_does() -> None:
    assert await guarded(Typist().app, stream="audit").ainvoke("hello") == "It ends well."
