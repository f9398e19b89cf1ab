"""What people and judges say of answers: it outranks the critic, and what contradicts itself makes no row."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from log_support import START, feedback, review
from test_dataset import COMPLIES, VIOLATES, kept, revised, rows_of, says, write

from cai_graph.trajectory import (
    Draft,
    Feedback,
    Outcome,
    Record,
    Review,
    Revision,
    Round,
    Trajectory,
    new_id,
)
from trainers.dataset import Recipe, build
from trainers.dataset.conversion import Terms, Wording
from trainers.dataset.conversion import rows_of as converted
from trainers.dataset.evidence import Evidence
from trainers.dataset.reading import Logged, logged_of
from trainers.ledger import Ledger, Reason
from trainers.rows import Dropped, Kind, PreferenceRow, Row, UnpairedRow


def of(kind: Kind, record: Trajectory, *said: Review | Feedback) -> Sequence[Row] | Reason:
    """Return the rows that a trajectory gives after what was said of it, or why there are none."""
    logged = logged_of(record)
    assert isinstance(logged, Logged)
    evidence = Evidence(
        reviews=tuple(one for one in said if isinstance(one, Review)),
        feedback=tuple(one for one in said if isinstance(one, Feedback)),
    )
    wordings = {record.constitution.digest: {"no-harm": Wording("Criticise.", "Revise.")}}
    found = converted(kind, logged, evidence, Terms(wordings=wordings))
    return found.reason if isinstance(found, Dropped) else found


def twice_revised(**changes: Any) -> Trajectory:
    steps = [Revision(answer=says(text), critique=COMPLIES, accepted=True) for text in ("middle", "final")]
    rounds = tuple(Round(critique=VIOLATES, revisions=(step,)) for step in steps)
    return revised(rounds=rounds, **{"released": says("final")} | changes)


def decides(record: Trajectory, decision: str, minute: int = 0, **fields: Any) -> Review:
    return review(record.id, decision=decision, at=START + timedelta(minutes=minute), **fields)


def scores(record: Trajectory, score: float, user: str | None = "u", minute: int = 0) -> Feedback:
    return feedback(record.id, score=score, user=user, at=START + timedelta(minutes=minute))


REVISED: list[Kind] = ["critique-sft", "ranked", "privileged"]
"""Kinds that learn from a revision, or from the critique that asked for it."""


@pytest.mark.parametrize("kind", REVISED)
@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        ("reject", Reason.REVIEWED_OUT),
        ("flag", Reason.REVIEWED_OUT),
        ("flip", Reason.DISAGREEMENT),
        ("draft", Reason.DISAGREEMENT),
        ("tie", Reason.TIE),
    ],
)
def test_what_a_reviewer_does_not_bear_out_is_learnt_in_no_kind(
    kind: Kind, decision: str, reason: Reason
) -> None:
    record = twice_revised()

    assert not isinstance(of(kind, record, decides(record, "approve")), Reason)
    assert of(kind, record, decides(record, decision)) is reason


@pytest.mark.parametrize("kind", ["critique-sft", "ranked", "sft"])
def test_a_revision_that_users_dislike_is_not_imitated(kind: Kind) -> None:
    record = twice_revised()

    assert of(kind, record, scores(record, -1)) is Reason.DISLIKED
    assert not isinstance(of(kind, record, scores(record, 1)), Reason)


def in_shadow() -> Trajectory:
    """A request whose user saw the draft, and whose revision stands in the log alone."""
    return twice_revised(mode="shadow", released=says("draft 0"), released_from="draft")


@pytest.mark.parametrize("kind", ["critique-sft", "ranked", "sft"])
def test_a_score_speaks_of_the_answer_that_the_user_saw(kind: Kind) -> None:
    record = in_shadow()

    assert not isinstance(of(kind, record, scores(record, -1)), Reason)
    assert of(kind, record, scores(record, 1)) is Reason.DISAGREEMENT


def test_a_draft_that_users_or_reviewers_like_is_no_lesson_for_a_teacher() -> None:
    let_out = revised(
        outcome=Outcome.EXHAUSTED,
        rounds=(Round(critique=VIOLATES),),
        released=says("draft 0"),
        released_from="draft",
    )

    for record in (in_shadow(), let_out):
        assert not isinstance(of("privileged", record, scores(record, -1)), Reason)
        assert of("privileged", record, scores(record, 1)) is Reason.DISAGREEMENT
    assert of("privileged", let_out, decides(let_out, "approve")) is Reason.DISAGREEMENT


@pytest.mark.parametrize("kind", [*REVISED, "sft"])
def test_a_reviewer_outranks_users_whatever_they_say(kind: Kind) -> None:
    record, shadowed = twice_revised(), in_shadow()
    differ = (scores(record, -1), scores(record, 1, "v"))

    for said in ((scores(record, -1),), differ):
        assert not isinstance(of(kind, record, decides(record, "approve"), *said), Reason)
    assert not isinstance(of(kind, shadowed, decides(shadowed, "approve"), scores(shadowed, 1)), Reason)


@pytest.mark.parametrize("kind", ["critique-sft", "privileged"])
def test_people_who_like_a_draft_that_the_critic_let_pass_contradict_nobody(kind: Kind) -> None:
    record = kept()

    for said in (decides(record, "approve"), decides(record, "draft"), scores(record, 1), scores(record, -1)):
        assert of(kind, record, said) is Reason.NO_CRITIQUE


def test_the_last_score_of_a_user_counts_and_users_who_differ_disagree() -> None:
    record = kept()
    changed = [scores(record, 1), scores(record, 1, minute=1), scores(record, -1, minute=2)]

    for said in (changed, changed[::-1]):
        (row,) = of("unpaired", record, *said)  # type: ignore[misc]
        assert isinstance(row, UnpairedRow)
        assert row.label is False
        assert of("sft", record, *said) is Reason.DISLIKED
    for other in ("v", None):
        both = (scores(record, 1), scores(record, -1, other))
        assert of("unpaired", record, *both) is of("sft", record, *both) is Reason.DISAGREEMENT


def test_the_last_decision_of_a_reviewer_counts_in_whatever_order_logs_are_read() -> None:
    record = revised()
    changed = [decides(record, "approve"), decides(record, "flip", minute=1)]

    for said in (changed, changed[::-1]):
        (row,) = of("preference", record, *said)  # type: ignore[misc]
        assert isinstance(row, PreferenceRow)
        assert row.chosen[0].content == "draft 0"


def test_of_two_reviewers_answers_the_latest_is_learnt() -> None:
    record = revised()
    said = [
        decides(record, "edit", answer=says("first")),
        decides(record, "edit", minute=1, reviewer="bob", answer=says("second")),
        decides(record, "edit", minute=2, answer=says("third")),
    ]

    (row,) = of("sft", record, *said)  # type: ignore[misc]
    assert row.completion[0].content == "third"  # type: ignore[union-attr]


def test_an_answer_that_was_cut_off_is_not_desirable_although_users_like_it() -> None:
    record = kept(draft=Draft(answer=says("draft 0"), truncated=True))

    assert of("unpaired", record, scores(record, 1)) is Reason.TRUNCATED


def test_who_approves_of_a_refusal_says_nothing_good_of_the_draft() -> None:
    record = revised(
        outcome=Outcome.REFUSED,
        rounds=(Round(critique=VIOLATES),),
        released=says("I cannot help."),
        released_from="refusal",
    )

    rows = of("unpaired", record, decides(record, "approve"))

    assert [(row.completion[0].content, row.label) for row in rows] == [("I cannot help.", True)]  # type: ignore[union-attr]


# --- over several trajectories ------------------------------------------------------------------------


def asked_again(one: Trajectory) -> Trajectory:
    """The same request with the same answers, as another trajectory."""
    return msgspec.structs.replace(one, id=new_id())


def made(tmp_path: Path, kind: Kind, records: list[Record], **recipe: Any) -> tuple[Ledger, list[Row]]:
    log = write(tmp_path / "log.jsonl", [*records, revised(99), kept(98)])
    ledger = build([log], tmp_path / "out", Recipe(kind=kind, test_share=0, **recipe)).ledger
    others = {record.id for record in records}
    return ledger, [row for row in rows_of(tmp_path / "out", kind) if row.trajectory_id in others]


def test_reviewers_of_the_same_pair_in_two_trajectories_disagree(tmp_path: Path) -> None:
    one = revised()
    two, three = asked_again(one), asked_again(one)
    said = [decides(one, "approve"), decides(two, "flip", reviewer="bob")]

    ledger, rows = made(tmp_path, "preference", [one, two, three, *said])

    assert rows == []
    assert ledger.dropped_rows == {Reason.DISAGREEMENT: 3}


def test_users_of_the_same_answer_in_two_trajectories_disagree(tmp_path: Path) -> None:
    one, other = kept(), kept(1)
    two = asked_again(one)
    said = [scores(one, 1), scores(two, -1, "v"), scores(other, -1)]

    ledger, rows = made(tmp_path, "unpaired", [one, two, other, *said])

    assert [(row.completion[0].content, row.label) for row in rows] == [("draft 1", False)]  # type: ignore[union-attr]
    assert ledger.dropped_rows == {Reason.DISAGREEMENT: 2}


@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_of_opposite_rows_those_of_the_stronger_evidence_stay(tmp_path: Path, kind: Kind) -> None:
    one = revised(messages=(says('Write {"chosen":[1]},"label":true.', "user"),))
    again = [asked_again(one) for _ in range(2)]

    ledger, rows = made(tmp_path, kind, [one, *again, decides(one, "flip")])

    assert {row.trajectory_id for row in rows} == {one.id}
    assert {row.source for row in rows} == {"human"}
    sides = 1 if kind == "preference" else 2
    assert ledger.dropped_rows == {Reason.DISAGREEMENT: 2 * sides}
