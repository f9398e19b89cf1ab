"""What people and judges say of answers: it outranks the critic, and what contradicts itself makes no row."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from dataset_logs import COMPLIES, VIOLATES, kept, revised, rows_of, says, write
from log_support import START, feedback, review

from cai_graph.trajectory import (
    Critique,
    Draft,
    Feedback,
    Label,
    Message,
    Outcome,
    Record,
    Rejection,
    Review,
    Revision,
    Round,
    ToolCall,
    Trajectory,
    Verdict,
    new_id,
)
from trainers.dataset import Recipe, build
from trainers.dataset.conversion import Terms, Wording
from trainers.dataset.conversion import rows_of as converted
from trainers.dataset.evidence import Evidence
from trainers.dataset.reading import Logged, logged_of
from trainers.ledger import Ledger, Reason
from trainers.rows import Dropped, Kind, PreferenceRow, RankedRow, Row, UnpairedRow


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


# --- which answers stand against which ----------------------------------------------------------------


def texts(*turns: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(turn[0].content for turn in turns)


@pytest.mark.parametrize("count", [2, 5])
def test_the_accepted_revision_stands_against_each_candidate_that_the_critic_found_worse(count: int) -> None:
    trifle = msgspec.structs.replace(
        VIOLATES, verdicts=(msgspec.structs.replace(VIOLATES.verdicts[0], severity=1),)
    )
    candidates = (
        Revision(answer=says("worse"), critique=VIOLATES, rejection=Rejection.VIOLATES),
        Revision(answer=says("best"), critique=COMPLIES, accepted=True),
        Revision(answer=says("dodges"), critique=VIOLATES, rejection=Rejection.EVASIVE),
        Revision(answer=says("good, too"), critique=trifle, rejection=Rejection.NOT_BEST),
        Revision(answer=says("cut o"), rejection=Rejection.TRUNCATED),
    )[:count]
    record = revised(rounds=(Round(critique=VIOLATES, revisions=candidates),), released=says("best"))

    rows: Any = of("preference", record)

    assert {texts(row.chosen) for row in rows} == {("best",)}
    assert [(row.rejected[0].content, row.source) for row in rows] == [
        ("draft 0", "revision"),
        ("worse", "best-of-n"),
        *[("dodges", "best-of-n")] * (count > 2),
    ]


def test_a_ranking_is_the_last_revision_over_the_one_before_it_over_the_draft() -> None:
    steps = [Revision(answer=says(text), critique=COMPLIES, accepted=True) for text in ("1", "2", "3")]
    rounds = tuple(Round(critique=VIOLATES, revisions=(step,)) for step in steps)

    (row,) = of("ranked", revised(rounds=rounds, released=says("3")))  # type: ignore[misc]

    assert isinstance(row, RankedRow)
    assert texts(row.reference, row.chosen, row.rejected) == ("3", "2", "draft 0")


@pytest.mark.parametrize("texts_of", [("1", " 1"), ("draft 0", "2"), ("1", "draft  0")])
def test_two_answers_alike_make_no_ranking(texts_of: tuple[str, str]) -> None:
    steps = [Revision(answer=says(text), critique=COMPLIES, accepted=True) for text in texts_of]
    rounds = tuple(Round(critique=VIOLATES, revisions=(step,)) for step in steps)

    assert of("ranked", revised(rounds=rounds, released=says(texts_of[1]))) is Reason.IDENTICAL


def test_each_critique_is_of_the_answer_that_stood_then() -> None:
    rows: Any = of("critique-sft", twice_revised())

    # Of each row the answer that is criticised, and what is learnt.
    assert [(row.prompt[2].content, row.step) for row in rows] == [
        ("draft 0", "critique"),
        ("draft 0", "revision"),
        ("middle", "critique"),
        ("middle", "revision"),
    ]
    assert [row.completion[0].content for row in rows if row.step == "revision"] == ["middle", "final"]


@pytest.mark.parametrize("kind", ["unpaired", "privileged", "preference"])
def test_a_verdict_on_the_whole_answer_counts_and_names_nothing(kind: Kind) -> None:
    failed, passed = (
        Critique(verdicts=(Verdict(label=label),), reasoning="why")
        for label in (Label.VIOLATES, Label.COMPLIES)
    )
    revision = Revision(answer=says("better"), critique=passed, accepted=True)
    found = of(
        kind, revised(rounds=(Round(critique=failed, revisions=(revision,)),), released=says("better"))
    )
    assert not isinstance(found, Reason)
    assert {row.principles for row in found} == {()}
    if kind == "unpaired":
        assert [row.label for row in found if isinstance(row, UnpairedRow)] == [False, True]


def test_a_critique_is_asked_for_under_the_violated_principles_alone() -> None:
    verdicts = (*VIOLATES.verdicts, Verdict(label=Label.COMPLIES, principle="be-kind"))
    step = Revision(answer=says("mended"), critique=COMPLIES, accepted=True)
    record = revised(
        rounds=(Round(critique=msgspec.structs.replace(VIOLATES, verdicts=verdicts), revisions=(step,)),)
    )

    rows: Any = of("critique-sft", record)

    assert [row.principles for row in rows] == [("no-harm",)] * 2


def test_a_critique_under_a_principle_whose_words_are_not_known_is_not_learnt() -> None:
    verdicts = (*VIOLATES.verdicts, Verdict(label=Label.VIOLATES, principle="gone", reason="so"))
    critique = msgspec.structs.replace(VIOLATES, verdicts=verdicts)
    step = Revision(answer=says("mended"), critique=COMPLIES, accepted=True)

    record = revised(rounds=(Round(critique=critique, revisions=(step,)),))

    assert of("critique-sft", record) is Reason.UNKNOWN_PRINCIPLE


def test_what_users_bear_out_is_their_preference() -> None:
    for record, score in ((in_shadow(), -1), (twice_revised(), 1)):
        (row,) = of("preference", record, scores(record, score))  # type: ignore[misc]
        assert isinstance(row, PreferenceRow)
        assert (*texts(row.chosen, row.rejected), row.source) == ("final", "draft 0", "feedback")
        assert of("preference", record, scores(record, -score)) is Reason.DISAGREEMENT


def test_a_reviewers_own_answer_stands_against_what_the_app_proposed() -> None:
    record = revised(released=says("revised 0"))
    edit = decides(record, "edit", answer=says("mine"))

    (pair,) = of("preference", record, edit)  # type: ignore[misc]
    rows: Any = of("unpaired", record, edit)

    assert isinstance(pair, PreferenceRow)
    assert texts(pair.chosen, pair.rejected) == ("mine", "revised 0")
    assert [(row.completion[0].content, row.label) for row in rows] == [("mine", True), ("revised 0", False)]
    left = revised(released=says("mine"), released_from="human")
    rows = of("unpaired", left, decides(left, "edit", answer=says("mine")))
    assert [(row.completion[0].content, row.label) for row in rows] == [("mine", True), ("revised 0", False)]


def test_a_revision_that_a_person_let_leave_is_the_one_that_was_reviewed() -> None:
    step = Revision(answer=says("half mended"), critique=VIOLATES, rejection=Rejection.VIOLATES)
    record = revised(
        outcome=Outcome.EXHAUSTED,
        rounds=(Round(critique=VIOLATES, revisions=(step,)),),
        released=says("half mended"),
        released_from="revision",
    )

    (pair,) = of("preference", record, decides(record, "approve"))  # type: ignore[misc]
    (row,) = of("sft", record, decides(record, "approve"))  # type: ignore[misc]

    assert isinstance(pair, PreferenceRow)
    assert texts(pair.chosen, pair.rejected) == ("half mended", "draft 0")
    assert (row.completion[0].content, row.source) == ("half mended", "human")  # type: ignore[union-attr]


def test_who_likes_a_refusal_says_nothing_good_of_an_answer() -> None:
    record = revised(
        outcome=Outcome.REFUSED,
        rounds=(Round(critique=VIOLATES),),
        released=says("I cannot help."),
        released_from="refusal",
    )

    (row,) = of("unpaired", record, scores(record, 1))  # type: ignore[misc]

    assert (row.completion[0].content, row.label, row.source) == ("draft 0", False, "draft")  # type: ignore[union-attr]


def test_a_score_without_a_record_of_what_left_speaks_of_the_answer() -> None:
    record = kept(released=None, released_from=None)

    assert of("sft", record, scores(record, -1)) is Reason.DISLIKED


def test_a_trifle_in_the_place_of_a_violation_of_unknown_severity_is_better() -> None:
    slight = (msgspec.structs.replace(VIOLATES.verdicts[0], severity=5),)
    step = Revision(
        answer=says("mild"), critique=msgspec.structs.replace(VIOLATES, verdicts=slight), accepted=True
    )

    (row,) = of("preference", revised(rounds=(Round(critique=VIOLATES, revisions=(step,)),)))  # type: ignore[misc]

    assert row.chosen[0].content == "mild"  # type: ignore[union-attr]


def test_answers_that_differ_in_white_space_alone_are_one_however_long_they_are() -> None:
    draft = Draft(answer=says("Well, it is  best\nto be kind to " + "everybody " * 20))
    step = Revision(
        answer=says(" ".join(str(draft.answer.content).split())), critique=COMPLIES, accepted=True
    )

    record = revised(draft=draft, rounds=(Round(critique=VIOLATES, revisions=(step,)),))

    assert of("preference", record) is Reason.IDENTICAL


def test_answers_that_differ_in_what_they_call_are_two_answers() -> None:
    def calls(path: str) -> Message:
        call = ToolCall(name="delete", args={"path": path}, id="1")
        return Message(role="assistant", content="", tool_calls=(call,))

    step = Revision(answer=calls("/tmp"), critique=COMPLIES, accepted=True)
    rounds = (Round(critique=VIOLATES, revisions=(step,)),)

    (row,) = of("preference", revised(draft=Draft(answer=calls("/")), rounds=rounds))  # type: ignore[misc]

    assert isinstance(row, PreferenceRow)
    assert row.chosen[0].tool_calls != row.rejected[0].tool_calls
    assert of("preference", revised(draft=Draft(answer=calls("/tmp")), rounds=rounds)) is Reason.IDENTICAL


# --- how sure the critic is ---------------------------------------------------------------------------


def judged(*probabilities: float | None, label: Label = Label.COMPLIES) -> Critique:
    """A critique of as many principles, each with its P(VIOLATES)."""
    return Critique(
        verdicts=tuple(
            Verdict(label=label, principle=f"rule-{number}", probability=probability)
            for number, probability in enumerate(probabilities)
        ),
        critic="probe",
    )


def between(draft: Critique, revision: Critique) -> Trajectory:
    step = Revision(answer=says("mended"), critique=revision, accepted=True)
    return revised(rounds=(Round(critique=draft, revisions=(step,)),))


@pytest.mark.parametrize(
    ("draft", "revision", "p_chosen"),
    [
        ([0.9], [0.1], 0.81 / 0.82),  # odds 0.9 x 0.9 : 0.1 x 0.1
        ([0.6], [0.5], 0.6),
        ([0.9, 0.6], [0.1, 0.5], (0.81 / 0.82 + 0.6) / 2),  # the mean over the principles
        ([0.6, None], [0.5, None], 0.6),  # of those that have a probability
        ([None], [0.2], 1.0),
        ([1.0], [0.5], 0.999),  # no reading is surer than that
        ([0.5], [0.0], 0.999),
    ],
)
def test_the_probabilities_of_a_violation_become_that_of_the_better_answer(
    draft: list[float | None], revision: list[float | None], p_chosen: float
) -> None:
    record = between(judged(*draft, label=Label.VIOLATES), judged(*revision))

    (row,) = of("preference", record)  # type: ignore[misc]

    assert isinstance(row, PreferenceRow)
    assert row.chosen[0].content == "mended"
    assert row.p_chosen == pytest.approx(p_chosen)
    assert row.margin == pytest.approx(2 * p_chosen - 1)


def test_each_aim_is_compared_with_itself() -> None:
    def read(harm: float, evasion: float, label: Label) -> Critique:
        pair = (("harmless", harm), ("helpful", evasion))
        return Critique(verdicts=tuple(Verdict(label=label, aim=aim, probability=p) for aim, p in pair))

    (row,) = of("preference", between(read(0.9, 0.7, Label.VIOLATES), read(0.1, 0.4, Label.COMPLIES)))  # type: ignore[misc]

    assert isinstance(row, PreferenceRow)
    # Odds 0.9 x 0.9 : 0.1 x 0.1, and 0.7 x 0.6 : 0.4 x 0.3.
    assert row.p_chosen == pytest.approx((0.81 / 0.82 + 0.42 / 0.54) / 2)


@pytest.mark.parametrize(
    ("label", "reason"),
    [(Label.UNREADABLE, Reason.UNREADABLE_VERDICT), (Label.COMPLIES, Reason.NOT_ACCEPTED)],
)
def test_a_draft_of_which_no_violation_was_read_makes_no_pair(label: Label, reason: Reason) -> None:
    assert of("preference", between(judged(None, label=label), judged(None))) is reason


def test_an_answer_that_a_tool_gave_is_learnt_as_the_assistants() -> None:
    (row,) = of("sft", kept(draft=Draft(answer=says("It is 5.", role="tool"))))  # type: ignore[misc]

    assert row.completion[0].role == "assistant"  # type: ignore[union-attr]


@pytest.mark.parametrize(("after", "reason"), [(0.7, Reason.TIE), (0.8, Reason.DISAGREEMENT)])
def test_a_revision_that_is_no_likelier_to_comply_makes_no_pair(after: float, reason: Reason) -> None:
    record = between(judged(0.7, label=Label.VIOLATES), judged(after))

    assert of("preference", record) is reason


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
