"""Converts a Trajectory and its evidence to rows: one pure function for each kind of data.

`rows_of` calls the function for a kind. The functions have no state, see one trajectory at a time, and depend
only on its content, so that a single process, a pool of processes and a cluster make the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cai_graph.trajectory import Message, Outcome, Review
from trainers.dataset.answers import (
    UNREADABLE,
    VIOLATES,
    Drop,
    Mended,
    abouts,
    accepted_of,
    answer_of,
    author_of,
    draft_of,
    draft_passed,
    failed_by_draft,
    heed_users,
    is_cut,
    is_same,
    liking_of,
    mended_by,
    prompt_of,
    review_of,
    saw,
    seen_beside_the_draft,
    violated,
    vouching,
)
from trainers.dataset.compared import judged_pairs
from trainers.dataset.critic_rows import critic_rows
from trainers.dataset.evidence import NO_EVIDENCE, Evidence
from trainers.dataset.reading import Head, Logged, LoggedCritique, LoggedRevision
from trainers.ledger import REASONS, Reason
from trainers.rows import (
    CritiqueRow,
    Dropped,
    Kind,
    PreferenceRow,
    PrivilegedRow,
    PromptRow,
    RankedRow,
    Row,
    SFTRow,
    Source,
    Turn,
    UnpairedRow,
    margin_of,
)

__all__ = ["CONVERSIONS", "ROWLESS", "Terms", "Wording", "rows_of"]


class Wording(NamedTuple):
    """The requests of a principle to a critic and to a reviser."""

    critique_request: str
    revision_request: str


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The inputs of the conversions besides the trajectory and its evidence."""

    wordings: Mapping[str, Mapping[str, Wording]] = field(default_factory=dict)
    """Wordings by constitution digest and then by principle id; used by `critique-sft`."""


ROWLESS: Mapping[Kind, Outcome] = {"preference": Outcome.KEPT, "ranked": Outcome.KEPT}
"""By kind, the outcome that gives no rows, as it has no pair of answers, unless there is evidence about
it."""

_ONE_ANSWER = Dropped(Reason.NO_PAIR)
"""The result for most of a log; returned, not raised, for speed."""


def rows_of(kind: Kind, logged: Logged | Head, evidence: Evidence, terms: Terms) -> Sequence[Row] | Dropped:
    """Return the rows of one kind that a Trajectory gives, at least one, or the reason why it gives none.

    For a Trajectory without evidence whose outcome is in ROWLESS, the Head is enough.
    """
    if logged.metadata and logged.metadata.get("redaction") == "failed":
        return Dropped(Reason.WITHHELD)
    if evidence is NO_EVIDENCE and logged.outcome == ROWLESS.get(kind):
        return _ONE_ANSWER
    assert isinstance(logged, Logged)
    try:
        return CONVERSIONS[kind](logged, evidence, terms)
    except Drop as drop:
        return Dropped(drop.reason)


# --- sft ----------------------------------------------------------------------------------------------


def sft(logged: Logged, evidence: Evidence, terms: Terms) -> list[SFTRow]:
    """Return the answer to imitate: a reviewer's own, the accepted revision, or the draft that was kept.

    In the paper's data generation (mode `sampled`) every revision gives a row, as in Bai et al. 2022, section
    3.1; these are unjudged by design.
    """
    prompt = prompt_of(logged)
    review = review_of(evidence)

    def row(answer: Turn | Message, source: Source, judge: str | None, principles: Sequence[str]) -> SFTRow:
        return SFTRow(
            trajectory_id=logged.id,
            source=source,
            constitution=logged.constitution.digest,
            judge=judge or "",
            principles=tuple(principles),
            prompt=prompt,
            completion=(answer_of(answer),),
        )

    if review is not None and review.decision == "edit" and review.answer is not None:
        return [row(review.answer, "human", review.reviewer, ())]
    draft = draft_of(logged)
    if review is not None and review.decision in ("flip", "draft"):
        return [row(draft, "human", review.reviewer, ())]
    accepted = accepted_of(logged)
    if logged.mode == "sampled" and accepted:
        return [
            row(revision.answer, "revision", round_.critique.critic, abouts(round_.critique.verdicts))
            for round_ in logged.rounds
            for revision in round_.revisions
            if revision.accepted
        ]
    if review is not None and review.decision == "approve" and logged.released is not None:
        return [row(logged.released, "human", review.reviewer, ())]
    if logged.outcome == "REVISED" and accepted:
        final = accepted[-1]
        heed_users(logged, evidence, final.answer)
        if logged.mode == "imported":
            return [row(final.answer, "imported", author_of(logged), failed_by_draft(logged))]
        return [row(final.answer, "revision", vouching(final.critique).critic, failed_by_draft(logged))]
    if logged.outcome == "KEPT":
        heed_users(logged, evidence, draft)
        if is_cut(logged):
            raise Drop(Reason.TRUNCATED)
        judged = logged.rounds[0].critique if logged.rounds else None
        critique = vouching(judged, passed=draft_passed(logged))
        return [row(draft, "draft", critique.critic, ())]
    raise Drop(Reason.UNJUDGED if logged.outcome == "UNJUDGED" else Reason.NOT_ACCEPTED)


# --- critique-sft and privileged ----------------------------------------------------------------------

_GENERAL = Wording(
    "Point out every way in which your last answer could be less harmful, more honest or more helpful.",
    "Rewrite your last answer so that it mends what the critique points out.",
)
"""The wording for a demonstration without a principle."""


def _words(critique: LoggedCritique) -> str:
    """Return the text of a critique: its reasoning, or else the reasons of its verdicts VIOLATES."""
    reasons = [
        verdict.reason for verdict in critique.verdicts if verdict.label == VIOLATES and verdict.reason
    ]
    return critique.reasoning.strip() or "\n".join(reasons).strip()


def _wordings(logged: Logged, terms: Terms, principles: Sequence[str]) -> list[Wording]:
    known = terms.wordings.get(logged.constitution.digest, {})
    if logged.mode == "imported":
        known = {id: wording for some in terms.wordings.values() for id, wording in some.items()}
        return [known[principle] for principle in principles if principle in known] or [_GENERAL]
    found = [known[principle] for principle in principles if principle in known]
    if len(found) < len(principles) or not found:
        raise Drop(Reason.UNKNOWN_PRINCIPLE)
    return found


def critique_sft(logged: Logged, evidence: Evidence, terms: Terms) -> list[CritiqueRow]:
    """Return rows for the two steps of the paper's supervised phase: critique an answer, then revise it.

    Drops a trajectory whose revision people rejected.
    """
    prompt = prompt_of(logged)
    rows: list[CritiqueRow] = []
    before = draft_of(logged)
    for round_ in logged.rounds:
        revision = next((revision for revision in round_.revisions if revision.accepted), None)
        words = _words(round_.critique)
        if revision is None or not words:
            continue
        # A verdict on an aim has no request; the written critique that follows it names principles.
        principles = tuple(
            verdict.principle
            for verdict in round_.critique.verdicts
            if verdict.principle and (logged.mode == "sampled" or verdict.label == VIOLATES)
        )
        wordings = _wordings(logged, terms, principles)
        asked = Turn(role="user", content="\n".join(wording.critique_request for wording in wordings))
        again = Turn(role="user", content="\n".join(wording.revision_request for wording in wordings))
        critique = Turn(role="assistant", content=words)
        shown = (*prompt, answer_of(before), asked)
        for step, conversation, completion in (
            ("critique", shown, critique),
            ("revision", (*shown, critique, again), answer_of(revision.answer)),
        ):
            rows.append(
                CritiqueRow(
                    trajectory_id=logged.id,
                    source="critique",
                    constitution=logged.constitution.digest,
                    judge=round_.critique.critic or "",
                    principles=principles,
                    prompt=conversation,
                    completion=(completion,),
                    step="critique" if step == "critique" else "revision",
                )
            )
        before = revision.answer
    if not rows:
        raise Drop(Reason.NO_CRITIQUE)
    _heed_people(logged, evidence, accepted_of(logged)[-1].answer)
    return rows


def privileged(logged: Logged, evidence: Evidence, terms: Terms) -> list[PrivilegedRow]:
    """Return the critique of a draft as privileged context, which the teacher sees and the student does not.

    Drops a trajectory whose draft people prefer or like.
    """
    prompt = prompt_of(logged)
    draft = draft_of(logged)
    critique = logged.rounds[0].critique if logged.rounds else None
    words = _words(critique) if critique else ""
    if critique is None or not words or not (logged.mode == "sampled" or violated(critique)):
        raise Drop(Reason.NO_CRITIQUE)
    if (review := review_of(evidence)) is not None:
        _bear_out(logged, review)
    elif liking_of(evidence) > 0 and saw(logged, draft):
        raise Drop(Reason.DISAGREEMENT)
    return [
        PrivilegedRow(
            trajectory_id=logged.id,
            source="critique",
            constitution=logged.constitution.digest,
            judge=critique.critic or "",
            principles=failed_by_draft(logged),
            prompt=prompt,
            privileged_context=words,
        )
    ]


def _heed_people(logged: Logged, evidence: Evidence, revision: Turn) -> None:
    """Drop a trajectory whose revision reviewers contradict, or end users if there is no review."""
    review = review_of(evidence)
    if review is None:
        heed_users(logged, evidence, revision)
    elif review.decision == "edit":  # the revision was not good enough, either
        raise Drop(Reason.DISAGREEMENT)
    else:
        _bear_out(logged, review)


def _bear_out(logged: Logged, review: Review) -> None:
    """Drop a trajectory if its reviewers do not agree with the critic that the draft is worse."""
    if review.decision == "tie":
        raise Drop(Reason.TIE)
    approves_the_draft = (
        review.decision == "approve"
        and logged.released_from == "draft"
        and seen_beside_the_draft(logged) is None
    )
    if review.decision in ("flip", "draft") or approves_the_draft:
        raise Drop(Reason.DISAGREEMENT)


# --- preference ---------------------------------------------------------------------------------------


def preference(logged: Logged, evidence: Evidence, terms: Terms) -> list[PreferenceRow]:
    """Return pairs by a review, else by AI comparisons, else by the critic's verdicts on the answers."""
    if evidence is not NO_EVIDENCE:
        if (review := review_of(evidence)) is not None:
            return [_reviewed(logged, review)]
        if evidence.comparisons:
            return _compared(logged, evidence)
    return _revised(logged, evidence)


def _pair(
    logged: Logged,
    chosen: Turn | Message,
    rejected: Turn | Message,
    source: Source,
    judge: str,
    principles: tuple[str, ...],
    p_chosen: float,
) -> PreferenceRow:
    better, worse = answer_of(chosen), answer_of(rejected)
    if is_same(better, worse):
        raise Drop(Reason.IDENTICAL)
    return PreferenceRow(
        trajectory_id=logged.id,
        source=source,
        constitution=logged.constitution.digest,
        judge=judge,
        principles=principles,
        p_chosen=p_chosen,
        margin=margin_of(p_chosen),
        prompt=prompt_of(logged),
        chosen=(better,),
        rejected=(worse,),
    )


def _reviewed(logged: Logged, review: Review) -> PreferenceRow:
    draft = draft_of(logged)
    revision = seen_beside_the_draft(logged)
    principles = failed_by_draft(logged)
    if review.decision == "tie":
        raise Drop(Reason.TIE)
    if review.decision == "edit" and review.answer is not None:
        return _pair(logged, review.answer, revision or draft, "human", review.reviewer, principles, 1.0)
    if revision is None:
        raise Drop(Reason.NO_PAIR)
    better, worse = (revision, draft) if review.decision == "approve" else (draft, revision)
    return _pair(logged, better, worse, "human", review.reviewer, principles, 1.0)


def _compared(logged: Logged, evidence: Evidence) -> list[PreferenceRow]:
    """Return the pairs that were compared, except those that end users' feedback contradicts."""
    rows: list[PreferenceRow] = []
    reasons: list[Reason] = []
    liking = liking_of(evidence)
    for judged in judged_pairs(evidence.comparisons):
        if isinstance(judged, Reason):
            reasons.append(judged)
            continue
        try:
            if liking and logged.released is not None:
                contradicted = judged.chosen if liking < 0 else judged.rejected
                if is_same(answer_of(contradicted), answer_of(logged.released)):
                    raise Drop(Reason.DISAGREEMENT)
            judges = ", ".join(judged.judges)
            pair = (judged.chosen, judged.rejected, judged.source, judges, judged.principles, judged.p_chosen)
            rows.append(_pair(logged, *pair))
        except Drop as drop:
            reasons.append(drop.reason)
    if not rows:
        raise Drop(min(reasons, key=REASONS.index))
    return rows


def _revised(logged: Logged, evidence: Evidence) -> list[PreferenceRow]:
    """Return the accepted revision over the draft, and over the candidates that the critic found worse."""
    if logged.outcome == "KEPT":
        raise Drop(Reason.NO_PAIR)
    if logged.outcome == "UNJUDGED":
        raise Drop(Reason.UNJUDGED)
    draft = draft_of(logged)
    accepted = accepted_of(logged)
    if logged.outcome != "REVISED" or not accepted:
        raise Drop(Reason.NOT_ACCEPTED)
    final = accepted[-1]
    source: Source = "revision"
    if logged.mode == "imported":
        source, mended = "imported", Mended(failed_by_draft(logged), 1.0, author_of(logged))
    else:
        mended = mended_by(logged.rounds[0].critique, final.critique)
    if liking := liking_of(evidence):
        # The user saw one of the two, and liked or disliked it.
        if (logged.released_from == "draft") == (liking > 0):
            raise Drop(Reason.DISAGREEMENT)
        source = "feedback"
    rows = [_pair(logged, final.answer, draft, source, mended.critic, mended.principles, mended.p_better)]
    if len(logged.rounds[-1].revisions) > 1:
        rows += _best_of_n(logged, final)
    return rows


def _best_of_n(logged: Logged, final: LoggedRevision) -> list[PreferenceRow]:
    rows: list[PreferenceRow] = []
    revisions = logged.rounds[-1].revisions
    if any(revision is final for revision in revisions):
        for other in revisions:
            if other.critique is None or other.rejection not in ("violates", "evasive"):
                continue
            try:
                mended = mended_by(other.critique, final.critique)
                rows.append(
                    _pair(
                        logged,
                        final.answer,
                        other.answer,
                        "best-of-n",
                        mended.critic,
                        mended.principles,
                        mended.p_better,
                    )
                )
            except Drop:
                continue  # The pair with the draft is not affected.
    return rows


# --- unpaired -----------------------------------------------------------------------------------------


class _Labelled(NamedTuple):
    """An answer with its label: desirable (`good`) or not."""

    answer: Turn | Message
    good: bool
    source: Source
    judge: str | None
    principles: Sequence[str] = ()


def unpaired(logged: Logged, evidence: Evidence, terms: Terms) -> list[UnpairedRow]:
    """Return labelled answers; the label is by a reviewer, else by end users, else by the critic."""
    prompt = prompt_of(logged)
    draft = draft_of(logged)
    reason = Reason.NOT_ACCEPTED
    if (review := review_of(evidence)) is not None:
        labelled = _by_person(logged, review)
    elif (liking := liking_of(evidence)) and (seen := logged.released) and logged.released_from != "refusal":
        if liking > 0 and is_cut(logged) and is_same(seen, draft):
            raise Drop(Reason.TRUNCATED)
        labelled = [_Labelled(seen, liking > 0, "feedback", "")]
    else:
        labelled, reason = _by_critic(logged)
    rows: list[UnpairedRow] = []
    for answer, good, source, judge, principles in labelled:
        try:
            completion = answer_of(answer)
        except Drop as drop:
            reason = drop.reason
            continue
        rows.append(
            UnpairedRow(
                trajectory_id=logged.id,
                source=source,
                constitution=logged.constitution.digest,
                judge=judge or "",
                principles=tuple(principles),
                prompt=prompt,
                completion=(completion,),
                label=good,
            )
        )
    if not rows:
        raise Drop(reason)
    return rows


def _by_person(logged: Logged, review: Review) -> list[_Labelled]:
    if review.decision == "tie":
        raise Drop(Reason.TIE)
    if review.decision == "edit" and review.answer is not None:
        # If the person's own answer was released, the answer that the app had proposed is the worse one.
        mended = logged.released if logged.released_from != "human" else seen_beside_the_draft(logged)
        worse = mended or draft_of(logged)
        own = _Labelled(review.answer, True, "human", review.reviewer)
        return [own, _Labelled(worse, False, "human", review.reviewer)]
    revision = seen_beside_the_draft(logged)
    if review.decision == "approve" and revision is None and logged.released is not None:
        # The released answer is approved, which need not be the draft.
        return [_Labelled(logged.released, True, "human", review.reviewer)]
    draft_is_good = review.decision in ("flip", "draft") or revision is None
    labelled = [_Labelled(draft_of(logged), draft_is_good, "human", review.reviewer, failed_by_draft(logged))]
    if revision is not None:
        labelled.append(_Labelled(revision, not draft_is_good, "human", review.reviewer))
    return labelled


class _Found(NamedTuple):
    """An answer, and how the run judged it."""

    answer: Turn
    critique: LoggedCritique | None
    source: Source
    passed: bool
    """Whether the run accepted it, or rejected it only because another one was better."""
    evades: bool = False
    """Whether it was rejected as evasive."""


def _by_critic(logged: Logged) -> tuple[list[_Labelled], Reason]:
    judged = logged.rounds[0].critique if logged.rounds else None
    answers = [_Found(draft_of(logged), judged, "draft", draft_passed(logged))]
    answers += [
        _Found(
            revision.answer,
            revision.critique,
            "revision",
            passed=revision.accepted or revision.rejection == "not_best",
            evades=revision.rejection == "evasive",
        )
        for round_ in logged.rounds
        for revision in round_.revisions
        if revision.rejection in (None, "violates", "evasive", "not_best")
    ]
    labelled: list[_Labelled] = []
    reason = Reason.NOT_ACCEPTED
    for answer, critique, source, passed, evades in answers:
        if critique is None or not critique.verdicts:
            reason = Reason.UNJUDGED
        elif (failed := violated(critique, passed=passed)) or evades:
            labelled.append(_Labelled(answer, False, source, critique.critic, abouts(failed)))
        elif any(verdict.label == UNREADABLE for verdict in critique.verdicts):
            reason = Reason.UNREADABLE_VERDICT
        elif source == "draft" and is_cut(logged):
            reason = Reason.TRUNCATED  # only its end is wrong, but that would be learnt
        else:
            labelled.append(_Labelled(answer, True, source, critique.critic))
    return labelled, reason


# --- prompts, ranked ----------------------------------------------------------------------------------


def prompts(logged: Logged, evidence: Evidence, terms: Terms) -> list[PromptRow]:
    """Return the conversation; it needs no answer."""
    return [
        PromptRow(
            trajectory_id=logged.id,
            source="prompt",
            constitution=logged.constitution.digest,
            judge="",
            principles=(),
            prompt=prompt_of(logged),
        )
    ]


def ranked(logged: Logged, evidence: Evidence, terms: Terms) -> list[RankedRow]:
    """Return draft, middle and final revision as a ranking, if the critic accepted the final one."""
    if logged.outcome != "REVISED":
        raise Drop(Reason.NO_PAIR if logged.outcome == "KEPT" else Reason.NOT_ACCEPTED)
    prompt = prompt_of(logged)
    draft = draft_of(logged)
    accepted = accepted_of(logged)
    if len(accepted) < 2:
        raise Drop(Reason.NO_PAIR)
    first, middle, last = answer_of(draft), answer_of(accepted[-2].answer), answer_of(accepted[-1].answer)
    if is_same(first, middle) or is_same(middle, last) or is_same(first, last):
        raise Drop(Reason.IDENTICAL)
    mended = mended_by(logged.rounds[0].critique, accepted[-1].critique)
    _heed_people(logged, evidence, accepted[-1].answer)
    return [
        RankedRow(
            trajectory_id=logged.id,
            source="revision",
            constitution=logged.constitution.digest,
            judge=mended.critic,
            principles=mended.principles,
            prompt=prompt,
            reference=(last,),
            chosen=(middle,),
            rejected=(first,),
        )
    ]


CONVERSIONS: dict[Kind, Callable[[Logged, Evidence, Terms], Sequence[Row]]] = {
    "sft": sft,
    "critique-sft": critique_sft,
    "preference": preference,
    "unpaired": unpaired,
    "prompts": prompts,
    "critic": critic_rows,
    "privileged": privileged,
    "ranked": ranked,
}
"""The function that converts a Trajectory to rows, by kind; each raises Drop if there are none."""
