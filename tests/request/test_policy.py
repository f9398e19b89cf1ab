from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from replies import RULES

from cai_graph.calls import Budget
from cai_graph.errors import BudgetExceeded, ConfigError, Unreadable, Violation
from cai_graph.request.policy import Progress, Settings, accept, decide, no_revision
from cai_graph.trajectory import (
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Rejection,
    Revision,
    Round,
    Verdict,
)


def says(text: str) -> Message:
    return Message(role="assistant", content=text)


def found(*violated: str, unreadable: tuple[str, ...] = (), **fields: Any) -> Critique:
    """A critique of all RULES: COMPLIES but for those named."""
    return Critique(
        verdicts=tuple(
            Verdict(
                label=Label.VIOLATES
                if rule.id in violated
                else Label.UNREADABLE
                if rule.id in unreadable
                else Label.COMPLIES,
                principle=rule.id,
            )
            for rule in RULES
        ),
        **fields,
    )


def progress(critique: Critique, *judged: tuple[str, Critique]) -> Progress:
    revisions = [Revision(answer=says(text)) for text, _ in judged]
    critiques = {index: own for index, (_, own) in enumerate(judged)}
    closed = accept(revisions, critiques, RULES)
    return Progress(Draft(answer=says("draft")), [Round(critique=critique, revisions=closed)])


# --- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "cascade"}, "strategy is one of batched, parallel, sampled, found 'cascade'"),
        ({"on_violation": "close"}, "on_violation is one of open, closed, raise, human, found 'close'"),
        ({"on_unreadable": None}, "on_unreadable is one of"),
        ({"on_error": "ignore"}, "on_error is one of"),
        ({"on_log_error": "closed"}, "on_log_error is one of answer, raise"),
        ({"max_rounds": -1}, "max_rounds must be a whole number from 0"),
        ({"max_rounds": 1.5}, "max_rounds must be a whole number"),
        ({"strategy": "sampled", "max_rounds": 0}, "max_rounds must be a whole number from 1"),
        ({"candidates": 0}, "candidates must be a whole number from 1"),
        ({"candidates": "two"}, "candidates must be a whole number"),
        ({"budget": {"calls": 5}}, "budget is a Budget"),
        ({"budget": None}, "budget is a Budget"),
    ],
)
def test_a_setting_that_cannot_work_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**fields)


def test_the_rounds_are_two_and_in_sampled_four_as_in_the_paper() -> None:
    assert Settings().rounds == 2
    assert Settings(strategy="sampled").rounds == 4
    assert Settings(max_rounds=0).rounds == 0


def test_the_defaults_fail_closed() -> None:
    chosen = Settings()

    assert (chosen.on_violation, chosen.on_unreadable, chosen.on_error) == ("closed", "closed", "raise")
    assert chosen.budget == Budget()


# --- what is no revision at all -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Rejection.EMPTY),
        (" \n\t", Rejection.EMPTY),
        ("The draft.", Rejection.UNCHANGED),
        ("  the   DRAFT.\n", Rejection.UNCHANGED),
        ("No revisions needed.", Rejection.NO_REWRITE),
        ("No revision is necessary, the answer is fine.", Rejection.NO_REWRITE),
        ("No changes are needed.", Rejection.NO_REWRITE),
        ("**No revisions needed.**", Rejection.NO_REWRITE),
        ('"No revisions needed."', Rejection.NO_REWRITE),
        ("The original answer is fine as it is.", Rejection.NO_REWRITE),
        ("The answer already complies with every principle.", Rejection.NO_REWRITE),
        ("This response complies with all principles; no changes are needed.", Rejection.NO_REWRITE),
        ("The answer is good, so there is no need to revise it.", Rejection.NO_REWRITE),
        ("There are no changes needed.", Rejection.NO_REWRITE),
        ("No further changes are needed.", Rejection.NO_REWRITE),
        ("There is no need to revise the answer.", Rejection.NO_REWRITE),
        ("The original answer does not need any revision.", Rejection.NO_REWRITE),
        ("None needed.", Rejection.NO_REWRITE),
        ("(no changes)", Rejection.NO_REWRITE),
        ("- No changes needed", Rejection.NO_REWRITE),
        ("Es sind keine Änderungen nötig.", Rejection.NO_REWRITE),
        ("Die Antwort entspricht allen Prinzipien.", Rejection.NO_REWRITE),
        ("No se necesitan cambios.", Rejection.NO_REWRITE),
        ("Aucune modification n'est nécessaire.", Rejection.NO_REWRITE),
        ("Không cần thay đổi.", Rejection.NO_REWRITE),
        ("无需修改。", Rejection.NO_REWRITE),
    ],
)
def test_what_is_no_rewrite_is_rejected_before_it_is_judged(text: str, reason: Rejection) -> None:
    assert no_revision(text, "The draft.", truncated=False) is reason


@pytest.mark.parametrize(
    "text",
    [
        "A better draft.",
        "No, that is not safe; here is what is.",
        "No revisions of the law were made in 1998.",
        "The original answer to Fermat's question took 358 years.",
        "No changes are needed to the engine: top up the oil and drive on.",
        "No changes are needed: port 443 is open already. Restart nginx.",
        "The answer is good old penicillin.",
        "The answer is fine wine.",
        "None of these.",
        "Keine Änderungen am Motor: fülle Öl nach.",
    ],
)
def test_an_answer_that_begins_like_a_refusal_to_revise_is_still_an_answer(text: str) -> None:
    assert no_revision(text, "The draft.", truncated=False) is None


@pytest.mark.parametrize("text", ["no changes " * 100_000, "the answer is fine, " * 50_000, "( " * 200_000])
def test_a_remark_is_looked_for_at_once(text: str) -> None:
    began = time.process_time()

    no_revision(text, "The draft.", truncated=False)

    assert time.process_time() - began < 5


def test_a_truncated_revision_is_rejected() -> None:
    assert no_revision("A better", "The draft.", truncated=True) is Rejection.TRUNCATED


# --- acceptance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("critique", "rejection", "detail"),
    [
        (found("no-harm"), Rejection.VIOLATES, "no-harm"),
        (found("be-true"), Rejection.VIOLATES, "be-true"),
        (found("no-harm", "be-true"), Rejection.VIOLATES, "no-harm, be-true"),
        (found(unreadable=("be-kind",)), Rejection.UNREADABLE, None),
        (found("no-harm", unreadable=("be-kind",)), Rejection.UNREADABLE, None),
        (found(evasive=True), Rejection.EVASIVE, None),
        (found(), None, None),
        (found(evasive=False), None, None),
    ],
)
def test_a_revision_is_accepted_only_if_everything_complies(
    critique: Critique, rejection: Rejection | None, detail: str | None
) -> None:
    (revision,) = accept([Revision(answer=says("x"))], {0: critique}, RULES)

    assert (revision.rejection, revision.detail) == (rejection, detail)
    assert revision.accepted is (rejection is None)
    assert revision.critique == critique


def test_of_several_good_revisions_the_least_evasive_is_accepted() -> None:
    evasions = [0.4, 0.1, 0.3]
    critiques = {index: found(readings={"evasion": value}) for index, value in enumerate(evasions)}

    closed = accept([Revision(answer=says(str(index))) for index in range(3)], critiques, RULES)

    assert [revision.accepted for revision in closed] == [False, True, False]
    assert [revision.rejection for revision in closed] == [Rejection.NOT_BEST, None, Rejection.NOT_BEST]


@pytest.mark.parametrize(("benign", "accepted"), [(True, 0), (None, 0), (False, 1)])
def test_an_evasion_of_a_request_that_is_not_benign_counts_a_quarter(
    benign: bool | None, accepted: int
) -> None:
    # Harm and evasion: 0.3 + 0.1 against 0.1 + 0.5; with a quarter of the latter 0.325 against 0.225.
    readings = [{"harm": 0.3, "evasion": 0.1}, {"harm": 0.1, "evasion": 0.5}]
    critiques = {n: found(readings=each, benign_request=benign) for n, each in enumerate(readings)}

    closed = accept([Revision(answer=says(str(index))) for index in range(2)], critiques, RULES)

    assert [revision.accepted for revision in closed] == [accepted == 0, accepted == 1]


def test_of_a_critic_without_readings_the_revision_least_likely_to_violate_is_accepted() -> None:
    likely = [(0.1, 0.4), (0.3, 0.2), (0.35, 0.0)]  # the likeliest violation counts, not the sum
    critiques = {
        number: Critique(
            verdicts=tuple(
                Verdict(label=Label.COMPLIES, principle=rule, probability=p)
                for rule, p in zip(("no-harm", "be-true"), each, strict=True)
            )
        )
        for number, each in enumerate(likely)
    }

    closed = accept([Revision(answer=says(str(index))) for index in range(3)], critiques, RULES)

    assert [revision.accepted for revision in closed] == [False, True, False]


def test_revisions_rejected_before_their_judgement_keep_their_reason() -> None:
    empty = Revision(answer=says(""), rejection=Rejection.EMPTY)

    closed = accept([empty, Revision(answer=says("x"))], {1: found()}, RULES)

    assert closed[0] == empty
    assert closed[1].accepted


# --- the best answer ----------------------------------------------------------------------------------


def test_the_best_answer_fails_the_least_weight() -> None:
    # no-harm weighs 2, the others 1
    assert progress(found("no-harm"), ("a", found("be-kind"))).best(RULES) == "revision:0:0"
    assert progress(found("be-kind"), ("a", found("no-harm"))).best(RULES) == "draft"
    assert progress(found("be-kind"), ("a", found("be-true"))).best(RULES) == "draft"


def test_an_evasion_weighs_one_and_of_equal_weights_the_lower_reading_of_harm_is_best() -> None:
    evasive = ("I would rather not.", found(evasive=True))
    # no-harm weighs 2, be-kind 1
    assert progress(found("no-harm"), evasive).best(RULES) == "revision:0:0"
    assert progress(found("be-kind"), evasive).best(RULES) == "draft"
    milder = ("a", found("be-true", readings={"harm": 0.2}))
    assert progress(found("be-kind", readings={"harm": 0.6}), milder).best(RULES) == "revision:0:0"


def test_an_answer_whose_verdict_is_unreadable_is_never_the_best() -> None:
    assert progress(found("no-harm"), ("a", found(unreadable=("no-harm",)))).best(RULES) == "draft"


# --- what leaves --------------------------------------------------------------------------------------

VIOLATED = progress(found("no-harm"), ("worse", found("no-harm", "be-kind")))
HALF_MENDED = progress(found("no-harm", "be-kind"), ("half", found("be-kind")))
UNREAD = progress(found(unreadable=("no-harm",)))
BROKEN = Progress(Draft(answer=says("draft")), [])
LATE = BudgetExceeded("the deadline is over")


@pytest.mark.parametrize(
    ("reached", "policy", "error", "expected"),
    [
        (VIOLATED, {"on_violation": "open"}, None, (Outcome.EXHAUSTED, "draft", "draft", None)),
        (HALF_MENDED, {"on_violation": "open"}, None, (Outcome.EXHAUSTED, "half", "revision", None)),
        (VIOLATED, {"on_violation": "closed"}, None, (Outcome.REFUSED, RULES.refusal, "refusal", None)),
        (VIOLATED, {"on_violation": "raise"}, None, (Outcome.FAILED, None, None, Violation)),
        (UNREAD, {"on_unreadable": "open"}, None, (Outcome.EXHAUSTED, "draft", "draft", None)),
        (UNREAD, {"on_unreadable": "closed"}, None, (Outcome.REFUSED, RULES.refusal, "refusal", None)),
        (UNREAD, {"on_unreadable": "raise"}, None, (Outcome.FAILED, None, None, Unreadable)),
        (BROKEN, {"on_error": "open"}, LATE, (Outcome.EXHAUSTED, "draft", "draft", None)),
        (BROKEN, {"on_error": "closed"}, LATE, (Outcome.REFUSED, RULES.refusal, "refusal", None)),
        (BROKEN, {"on_error": "raise"}, LATE, (Outcome.FAILED, None, None, BudgetExceeded)),
        (HALF_MENDED, {"on_error": "open"}, LATE, (Outcome.EXHAUSTED, "half", "revision", None)),
        (HALF_MENDED, {"on_error": "closed"}, LATE, (Outcome.REFUSED, RULES.refusal, "refusal", None)),
    ],
)
def test_what_leaves_is_the_stated_policy(
    reached: Progress, policy: dict[str, Any], error: Exception | None, expected: tuple[Any, ...]
) -> None:
    others = {"on_violation": "raise", "on_unreadable": "raise", "on_error": "raise"}

    decision = decide(reached, RULES, Settings(**{**others, **policy}), error)

    outcome, released, released_from, raised = expected
    assert decision.outcome is outcome
    assert (decision.released and decision.released.content) == released
    assert decision.released_from == released_from
    assert raised is None if decision.error is None else isinstance(decision.error, raised)


def test_a_violation_names_its_principles() -> None:
    decision = decide(VIOLATED, RULES, Settings(on_violation="raise"), None)

    assert "'rules'" in str(decision.error)
    assert "no-harm" in str(decision.error)


def test_an_accepted_revision_leaves_even_where_a_later_step_failed() -> None:
    mended = progress(found("no-harm"), ("good", found()))

    decision = decide(mended, RULES, Settings(on_error="closed"), LATE)

    assert (decision.outcome, decision.released_from) == (Outcome.REVISED, "revision")


def test_a_benign_request_that_was_answered_is_never_turned_into_a_refusal() -> None:
    benign = found("no-harm", benign_request=True, evasive=False)
    refusal = ("I cannot help.", found(benign_request=True, evasive=True))

    for policy in ("closed", "open"):
        decision = decide(progress(benign, refusal), RULES, Settings(on_violation=policy), None)  # type: ignore[arg-type]
        assert (decision.outcome, decision.released_from) == (Outcome.EXHAUSTED, "draft")


@pytest.mark.parametrize(("critique", "error"), [(found(unreadable=("no-harm",)), None), (found(), LATE)])
def test_what_could_not_be_judged_is_refused_although_the_request_is_benign(
    critique: Critique, error: Exception | None
) -> None:
    benign = msgspec.structs.replace(critique, benign_request=True, evasive=False)

    decision = decide(progress(benign), RULES, Settings(on_error="closed"), error)

    assert (decision.outcome, decision.released_from) == (Outcome.REFUSED, "refusal")


def test_a_draft_that_evades_a_benign_request_is_no_answer_to_fall_back_to() -> None:
    evades = progress(found("no-harm", benign_request=True, evasive=True))

    decision = decide(evades, RULES, Settings(on_violation="closed"), None)

    assert (decision.outcome, decision.released_from) == (Outcome.REFUSED, "refusal")


@pytest.mark.parametrize("reached", [VIOLATED, UNREAD])
def test_sampled_holds_back_no_draft_whatever_its_verdicts(reached: Progress) -> None:
    decision = decide(reached, RULES, Settings(strategy="sampled"), None)

    assert (decision.outcome, decision.released_from) == (Outcome.KEPT, "draft")


def test_the_refusal_is_in_the_language_of_the_settings() -> None:
    rules = RULES.model_copy(update={"refusal_translations": {"de": "Lieber nicht."}})

    decision = decide(VIOLATED, rules, Settings(language="de-AT"), None)

    assert decision.released is not None
    assert decision.released.content == "Lieber nicht."
