"""Comparisons: how a choice is read, in both orders, from probabilities, votes and reasons."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judges import first_shown, letter, top
from langchain_core.messages import BaseMessage
from wire import Reply, serving

from cai_graph import constitution
from cai_graph.calls import Budget, Calls
from cai_graph.errors import ConfigError, ModelError
from cai_graph.prompts import Exchange
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Comparison, Message, new_id, now
from trainers.feedback.judge import LEAST_MASS, VOTES, Judge, Opinion, expected_rating, p_first, read_choice

QUESTION = "Which answer is kinder?"
KIND, RUDE = (Message(role="assistant", content=text) for text in ("Gladly.", "No."))
ASKED = Exchange(messages=(Message(role="user", content="Help me?"),), answer=KIND)


async def compare(judge: Judge, calls: Calls | None = None, a: Message = KIND, b: Message = RUDE) -> Opinion:
    exchange = Exchange(messages=ASKED.messages, answer=a)
    return await judge.compare(exchange, b, QUESTION, calls or Calls(Budget()))


def comparison(p_a: tuple[float | None, float | None], **fields: Any) -> Comparison:
    return Comparison(
        id=new_id(),
        at=now(),
        trajectory_id="t",
        answers=(KIND, RUDE),
        origins=("draft", "revision:0:0"),
        judge="j",
        p_a=p_a,
        **fields,
    )


async def test_probabilities_of_the_labels_are_read_in_both_orders() -> None:
    with serving(lambda body: letter(0.9 if first_shown(body) == "Gladly." else 0.4, "\n", "**")) as server:
        calls = Calls(Budget())
        opinion = await compare(Judge(server.spec), calls)

    assert opinion.p_a == (pytest.approx(0.9), pytest.approx(0.6))
    assert (opinion.method, opinion.votes, opinion.reasoning) == ("logprob", None, None)
    assert [first_shown(body) for body in server.requests] == ["Gladly.", "No."]
    assert all(body["logprobs"] and body["temperature"] == 0 for body in server.requests)
    assert [call.role for call in calls.made] == ["compare", "compare"]


async def test_turning_the_pair_round_turns_the_opinion_round() -> None:
    script = lambda body: letter(0.8 if first_shown(body) == "Gladly." else 0.3)  # noqa: E731
    with serving(script) as server:
        judge = Judge(server.spec)
        there, back = await compare(judge), await compare(judge, a=RUDE, b=KIND)

    assert back.p_a == tuple(pytest.approx(1 - p) for p in reversed(there.p_a) if p is not None)


probabilities = st.none() | st.floats(0, 1)


@given(st.tuples(probabilities, probabilities), st.none() | st.just((0.4, 0.6)))
def test_swapping_a_and_b_flips_the_label(
    p_a: tuple[float | None, float | None], band: tuple[float, float] | None
) -> None:
    first, second = p_a
    swapped = (None if second is None else 1 - second, None if first is None else 1 - first)
    one, other = comparison(p_a, band=band), comparison(swapped, band=band)

    if one.preference is None:
        assert other.preference is None
    else:
        assert other.preference == pytest.approx(1 - one.preference)
    assert one.orders_disagree == other.orders_disagree or 0.5 in (first, second)


def test_what_is_unreadable_in_one_order_is_no_tie_and_no_preference() -> None:
    assert comparison((0.9, None)).preference is None
    assert not comparison((0.9, None)).orders_disagree
    assert comparison((0.5, 0.5)).preference == 0.5


def test_each_order_is_clamped_into_the_band_before_the_average() -> None:
    assert comparison((1.0, 0.55), band=(0.4, 0.6)).preference == pytest.approx(0.575)
    assert comparison((1.0, 0.55)).preference == pytest.approx(0.775)


async def test_a_reasoning_judge_writes_first_and_its_letter_is_read_after_that() -> None:
    def script(body: dict[str, Any]) -> str | Reply:
        return letter(0.7) if len(body["messages"]) > 2 else f"{first_shown(body)} stands first."

    with serving(script) as server:
        opinion = await compare(Judge(server.spec, reasoning=True))

    assert opinion.reasoning == ("Gladly. stands first.", "No. stands first.")
    assert opinion.p_a == (pytest.approx(0.7), pytest.approx(0.3))
    assert "naming a winner" in server.requests[0]["messages"][-1]["content"]
    assert server.requests[1]["messages"][-2] == {"role": "assistant", "content": "Gladly. stands first."}


@pytest.mark.parametrize("refusal", [Reply("logprobs are not supported", status=400), "A"])
async def test_a_model_without_log_probabilities_is_sampled_and_not_asked_for_them_again(
    refusal: str | Reply,
) -> None:
    with serving(lambda body: refusal if body.get("logprobs") else "A") as server:
        judge = Judge(server.spec)
        opinion = await compare(judge)
        asked = len(server.requests)
        await compare(judge)

    assert (opinion.p_a, opinion.method, opinion.votes) == ((1.0, 0.0), "votes", VOTES)
    assert len(server.requests) - asked == 2 * VOTES


async def test_an_error_that_is_not_about_log_probabilities_is_raised_and_changes_nothing() -> None:
    failing = True

    def script(body: dict[str, Any]) -> str | Reply:
        return Reply("too long for this model", status=400) if failing else letter(0.6)

    with serving(script) as server:
        judge = Judge(server.spec)
        with pytest.raises(Exception, match="too long"):
            await compare(judge)
        failing = False
        assert (await compare(judge)).method == "logprob"


def voting(says: Callable[[int], str]) -> ScriptedModel:
    counted = iter(range(1000))

    def reply(messages: list[BaseMessage]) -> str:
        return says(next(counted))

    return ScriptedModel(replies=reply)


async def test_votes_are_shares_of_the_readable_replies() -> None:
    model = voting(lambda call: ("A", "B", "neither", "A", "B")[call % 5])
    opinion = await compare(Judge(model, votes=5))

    assert opinion.p_a == (0.5, 0.5)
    assert opinion.votes == 5
    assert len(model.calls) == 10


async def test_an_order_of_which_most_replies_are_unreadable_is_unreadable() -> None:
    opinion = await compare(Judge(voting(lambda call: "A" if call < 3 or call == 4 else "hm")))

    assert opinion.p_a == (1.0, None)


async def test_a_voting_judge_that_reasons_ends_in_a_labelled_line() -> None:
    opinion = await compare(
        Judge(voting(lambda call: "A is warm, B is cold.\nBetter: A"), reasoning=True, votes=1)
    )

    assert opinion.p_a == (1.0, 0.0)
    assert opinion.reasoning == ("A is warm, B is cold.\nBetter: A",) * 2


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A", "A"),
        ("  (B).\n", "B"),
        ("**A**", "A"),
        ("At first A, but no.\n\n- Better: B\n", "B"),
        ("Better: A\nOn second thought\nbetter : B", "B"),
        ("Better: A\nBetter: both", None),
        ("A good question.", None),
        ("A or B", None),
        ("a", None),
        ("C", None),
        ("", None),
    ],
)
def test_only_a_label_of_the_menu_is_a_choice_and_the_last_counts(reply: str, choice: str | None) -> None:
    assert read_choice(reply) == choice


def test_labels_that_are_unlikely_together_are_unreadable() -> None:
    least = LEAST_MASS / 2
    assert p_first([{"token": "I", "top_logprobs": top(I=0.95, A=least * 0.9, B=least * 0.9)}]) is None
    assert p_first([{"token": "A", "top_logprobs": top(A=0.3, I=0.6)}]) == 1.0
    assert p_first([{"token": "A", "top_logprobs": None}]) is None
    assert p_first([{"token": "\n", "top_logprobs": top(A=1.0)}]) is None
    assert p_first([]) is None


def test_the_spellings_of_a_label_are_added_up() -> None:
    shown = [("A", 0.3), (" A", 0.3), ("B", 0.2)]
    alternatives = [{"token": token, "logprob": math.log(p)} for token, p in shown]

    assert p_first([{"token": "A", "top_logprobs": alternatives}]) == pytest.approx(0.75)


async def test_half_of_the_replies_is_no_majority() -> None:
    opinion = await compare(Judge(voting(lambda call: "A" if call % 2 else "hm"), votes=2))

    assert opinion.p_a == (None, None)


def test_words_that_begin_with_a_label_are_not_the_label() -> None:
    assert p_first([{"token": "Answer", "top_logprobs": top(Answer=0.8, Both=0.15)}]) is None


async def test_an_answer_that_no_judge_reads_whole_is_an_error() -> None:
    with pytest.raises(ModelError, match="400,001 characters"):
        await compare(Judge(ScriptedModel(replies=[])), b=Message(role="assistant", content="x" * 400_001))


def test_votes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="votes is a number of replies from 1"):
        Judge(ScriptedModel(replies=[]), votes=0)


@pytest.mark.local
async def test_the_local_model_compares_from_its_log_probabilities(tiny_weights: object) -> None:
    calls = Calls(Budget())
    long = Message(role="assistant", content="word " * 4000)
    judge = Judge("local:smollm2")
    opinion, clipped = await compare(judge, calls), await compare(judge, b=long)

    assert opinion.method == "logprob"
    assert all(p is None or 0 <= p <= 1 for p in opinion.p_a)
    assert len(calls.made) == 2
    assert (opinion.clipped, clipped.clipped) == (False, True)


# --- ratings of one answer ----------------------------------------------------------------------------


async def test_a_rating_is_the_one_that_the_probabilities_expect() -> None:
    shown = [
        {"token": "9", "logprob": math.log(0.5)},
        {"token": " 1", "logprob": math.log(0.25)},
        {"token": "The", "logprob": math.log(0.25)},
    ]
    reply = Reply("9", logprobs=[{"token": "9", "logprob": 0, "bytes": None, "top_logprobs": shown}])
    with serving(lambda body: reply) as server:
        calls = Calls(Budget())
        rating = await Judge(server.spec).rate(ASKED, constitution.load("balanced"), calls)

    assert rating == pytest.approx((0.5 * 1 + 0.25 * -1) / 0.75)
    assert [call.role for call in calls.made] == ["rate"]
    assert "<rules>" in str(server.requests[0]["messages"][0]["content"])


async def test_a_model_without_log_probabilities_is_sampled_and_what_is_no_digit_is_unreadable() -> None:
    replies = iter(["?", "9", "It is fine.", "7", "well", "9 or 8", "no"])  # the first one asks for logprobs
    with serving(lambda body: next(replies)) as server:
        judge = Judge(server.spec)
        first = await judge.rate(ASKED, constitution.load("balanced"), Calls(Budget()))
        second = await judge.rate(ASKED, constitution.load("balanced"), Calls(Budget()))

    assert (first, second) == (pytest.approx(0.75), None)


def test_a_rating_that_is_unlikely_beside_other_words_is_unreadable() -> None:
    shown = [*top(The=0.95), {"token": "9", "logprob": math.log(LEAST_MASS / 2)}]

    assert expected_rating([{"token": "The", "top_logprobs": shown}]) is None
