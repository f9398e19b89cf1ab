"""Comparisons of one trajectory become pairs with a soft label, or a reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_support import comparison, feedback, trajectory

from cai_graph.trajectory import Comparison, Message, ToolCall, encode
from trainers.dataset.compared import Judged, judged_pairs
from trainers.dataset.conversion import Terms, rows_of
from trainers.dataset.evidence import Evidence
from trainers.dataset.reading import Logged, read_logged
from trainers.ledger import Reason
from trainers.rows import Dropped, PreferenceRow, Row


def said(text: str) -> Message:
    return Message(role="assistant", content=text)


def between(a: str, b: str, *p_a: float | None, **fields: Any) -> Comparison:
    return comparison("t", answers=(said(a), said(b)), p_a=p_a, **fields)


def sampled(a: str, b: str, p: float, labelling: str = "label:1/t/x", **fields: Any) -> Comparison:
    origins = (f"sample:{a}:m", f"sample:{b}:m")
    return between(a, b, p, p, origins=origins, source=labelling, **fields)


def test_principles_and_judges_are_averaged_whichever_answer_was_a() -> None:
    (found,) = judged_pairs(
        [
            between("good", "bad", 0.9, 0.7, principle="no-harm", judge="j1"),
            between("bad", "good", 0.4, 0.4, principle="be-kind", judge="j2"),
        ]
    )
    assert isinstance(found, Judged)
    assert (found.chosen.content, found.rejected.content, found.source) == ("good", "bad", "comparison")
    assert found.p_chosen == pytest.approx((0.8 + 0.6) / 2)
    assert (found.judges, found.principles) == (("j1", "j2"), ("be-kind", "no-harm"))


@pytest.mark.parametrize(
    ("comparisons", "reason"),
    [
        ([between("a", "b", 0.5, 0.5)], Reason.TIE),
        ([between("a", "b", 0.8, 0.8), between("a", "b", 0.2, 0.2)], Reason.TIE),
        ([between("a", "b", 0.9, 0.3)], Reason.DISAGREEMENT),
        ([between("a", "b", 0.9, None)], Reason.UNREADABLE_VERDICT),
        ([between("a", "b", 0.9, 0.9, settings={"truncated": ["sample:0:m"]})], Reason.TRUNCATED),
        ([between("a", " a\n", 0.5, 0.5)], Reason.IDENTICAL),
    ],
)
def test_what_prefers_neither_answer_has_its_reason(comparisons: list[Comparison], reason: Reason) -> None:
    assert judged_pairs(comparisons) == [reason]


def test_judges_on_different_sides_disagree_however_sure_one_is() -> None:
    one, other = between("a", "b", 0.95, 0.95, judge="j1"), between("a", "b", 0.1, 0.1, judge="j2")
    again = between("a", "b", 0.9, 0.9, judge="j1", principle="be-kind")

    assert judged_pairs([one, other]) == judged_pairs([one, again, other]) == [Reason.DISAGREEMENT]


def test_judges_count_alike_however_many_principles_each_is_asked_about() -> None:
    often = [between("a", "b", 0.9, 0.9, judge="j1", principle=f"p{n}") for n in range(3)]

    (found,) = judged_pairs([*often, between("a", "b", 0.6, 0.6, judge="j2")])
    assert isinstance(found, Judged)
    assert found.p_chosen == pytest.approx((0.9 + 0.6) / 2)


def test_a_disagreement_under_one_principle_leaves_what_another_says() -> None:
    (found,) = judged_pairs([between("a", "b", 0.9, 0.3), between("a", "b", 0.8, 0.7)])
    assert isinstance(found, Judged)
    assert found.p_chosen == pytest.approx(0.75)


def test_the_label_of_a_judge_that_reasoned_is_clamped() -> None:
    (found,) = judged_pairs([between("a", "b", 1.0, 1.0, band=(0.4, 0.6))])
    assert isinstance(found, Judged)
    assert found.p_chosen == pytest.approx(0.6)


def test_of_several_samples_the_best_stands_against_the_worst() -> None:
    (found,) = judged_pairs([sampled("0", "1", 0.7), sampled("0", "2", 0.9), sampled("1", "2", 0.6)])
    assert isinstance(found, Judged)
    assert (found.chosen.content, found.rejected.content, found.source) == ("0", "2", "best-of-n")
    assert found.p_chosen == pytest.approx(0.9)


def test_samples_that_beat_each_other_in_a_circle_give_no_pair() -> None:
    assert judged_pairs([sampled("0", "1", 0.9), sampled("1", "2", 0.9), sampled("0", "2", 0.1)])[0] in (
        Reason.DISAGREEMENT,
        Reason.TIE,
    )


def test_two_labellings_are_two_tournaments() -> None:
    found = judged_pairs([sampled("0", "1", 0.9), sampled("2", "3", 0.2, "label:2/t/x")])
    assert {one.chosen.content for one in found if isinstance(one, Judged)} == {"0", "3"}
    assert {one.source for one in found if isinstance(one, Judged)} == {"comparison"}


@given(st.tuples(st.floats(0, 1), st.floats(0, 1)), st.none() | st.just((0.4, 0.6)))
def test_swapping_a_and_b_gives_the_same_pair(p_a: tuple[float, float], band: Any) -> None:
    (there,) = judged_pairs([between("x", "y", *p_a, band=band)])
    (back,) = judged_pairs([between("y", "x", 1 - p_a[1], 1 - p_a[0], band=band)])
    if isinstance(there, Judged) and isinstance(back, Judged):
        assert (there.chosen, there.rejected) == (back.chosen, back.rejected)
        assert there.p_chosen == pytest.approx(back.p_chosen)
    else:
        near = abs(p_a[0] - 0.5) < 1e-8 or abs(p_a[1] - 0.5) < 1e-8 or abs(sum(p_a) - 1) < 1e-8
        assert there == back or near


def converted(score: float, p: float) -> Sequence[Row] | Dropped:
    record = trajectory()
    logged = read_logged(encode(record))
    assert isinstance(logged, Logged)
    one = between("draft 0", "revised 0", p, p)
    evidence = Evidence((one,), (), (feedback(record.id, score=score),))
    return rows_of("preference", logged, evidence, Terms())


def test_end_users_who_contradict_the_judge_drop_the_pair() -> None:
    assert converted(-1, 0.2) == Dropped(Reason.DISAGREEMENT)
    assert converted(1, 0.8) == Dropped(Reason.DISAGREEMENT)
    for score, p in ((1, 0.2), (-1, 0.8), (0, 0.8)):
        (row,) = converted(score, p)
        assert isinstance(row, PreferenceRow)
        assert row.p_chosen == pytest.approx(0.8)


def test_only_answers_that_were_all_sampled_make_a_tournament() -> None:
    origins = [(f"sample:{text}:m", "draft") for text in "01"]
    found = judged_pairs([between(o[0], "draft", 0.9, 0.9, origins=o, source="label:1/t/x") for o in origins])
    assert [one.source for one in found if isinstance(one, Judged)] == ["comparison"] * 2


def test_answers_that_were_cut_for_one_of_two_judges_give_no_pair() -> None:
    cut = between("a", "b", 0.9, 0.9, judge="j2", settings={"truncated": ["sample:0:m"]})
    assert judged_pairs([between("a", "b", 0.9, 0.9), cut]) == [Reason.TRUNCATED]


def test_a_sample_of_which_less_is_known_is_judged_by_what_is_known() -> None:
    (found,) = judged_pairs([sampled("0", "1", 0.95), sampled("0", "2", 0.5), sampled("1", "2", 0.6)])
    assert isinstance(found, Judged)
    assert (found.chosen.content, found.rejected.content) == ("0", "1")


def test_a_best_and_a_worst_sample_that_were_never_compared_give_no_pair() -> None:
    assert judged_pairs([sampled("0", "1", 0.9), sampled("1", "2", 0.9)]) == [Reason.TIE]


def test_a_best_sample_that_loses_to_the_worst_one_gives_no_pair() -> None:
    against_the_rest = [sampled(a, b, p) for a, p in (("0", 0.99), ("3", 0.01)) for b in "12"]
    assert judged_pairs([*against_the_rest, sampled("0", "3", 0.4)]) == [Reason.DISAGREEMENT]


def test_a_judge_who_could_not_be_read_is_not_named() -> None:
    (found,) = judged_pairs([between("a", "b", 0.9, 0.9), between("a", "b", 0.9, None, judge="other")])
    assert isinstance(found, Judged)
    assert found.judges == ("fake:judge",)


def test_answers_that_differ_in_their_tool_calls_are_two() -> None:
    one, other = (
        Message(role="assistant", content="", tool_calls=(ToolCall(name="f", args={"n": n}),)) for n in (1, 2)
    )
    (found,) = judged_pairs([comparison("t", answers=(one, other), p_a=(0.9, 0.9))])
    assert isinstance(found, Judged)
    assert found.chosen.tool_calls == one.tool_calls
