"""Converts verdicts to rows: those of critics on every answer, and those of people on the draft."""

from __future__ import annotations

from collections.abc import Sequence

from cai_graph.trajectory import Review
from trainers.dataset.answers import UNREADABLE, VIOLATES, Drop, answer_of, draft_of, prompt_of
from trainers.dataset.evidence import Evidence
from trainers.dataset.reading import Logged
from trainers.dataset.reviews import agreed_side, standing
from trainers.ledger import Reason
from trainers.rows import CriticRow, Source, Turn

__all__ = ["critic_rows"]


def critic_rows(logged: Logged, evidence: Evidence, terms: object) -> list[CriticRow]:
    """Return a row for every readable verdict on every answer; on the draft, people's labels replace it.

    A verdict on the whole answer gives no row, as it trains no head. The draft gets no label under a
    principle on which its reviewers' labels differ, nor one VIOLATES of the critic if all reviewers prefer
    the draft to its revision.
    """
    prompt = prompt_of(logged)
    draft = draft_of(logged)
    by_people = _labels_of(standing(evidence.reviews))
    preferred = agreed_side(evidence.reviews) == "draft"
    rows: list[CriticRow] = []
    missing = Reason.UNJUDGED

    def add(answer: Turn, source: Source, judge: str, about: str, violates: bool, p_violates: float) -> None:
        rows.append(
            CriticRow(
                trajectory_id=logged.id,
                source=source,
                constitution=logged.constitution.digest,
                judge=judge,
                principles=(about,),
                p_violates=p_violates,
                prompt=prompt,
                completion=(answer,),
                principle=about,
                violates=violates,
            )
        )

    judged = [(draft, round_.critique) for round_ in logged.rounds[:1]]
    judged += [
        (revision.answer, revision.critique)
        for round_ in logged.rounds
        for revision in round_.revisions
        if revision.critique is not None
    ]
    for answer, critique in judged:
        try:
            completion = answer_of(answer)
        except Drop:
            continue
        for verdict in critique.verdicts:
            if verdict.label == UNREADABLE:
                missing = Reason.UNREADABLE_VERDICT
                continue
            if verdict.about is None:
                missing = Reason.NO_PRINCIPLE
                continue
            violates = verdict.label == VIOLATES
            if answer is draft and (verdict.about in by_people or (preferred and violates)):
                continue
            p_violates = float(violates) if verdict.probability is None else verdict.probability
            add(completion, "critique", critique.critic or "", verdict.about, violates, p_violates)
    for about, (label, reviewer) in by_people.items():
        if label is not None:
            add(answer_of(draft), "human", reviewer, about, label, float(label))
    if not rows:
        raise Drop(Reason.DISAGREEMENT if preferred or by_people else missing)
    return rows


def _labels_of(reviews: Sequence[Review]) -> dict[str, tuple[bool | None, str]]:
    """Return by principle or aim whether the draft violates it (None: reviewers differ), and a reviewer."""
    found: dict[str, tuple[bool | None, str]] = {}
    for review in reviews:
        for verdict in review.verdicts:
            about = verdict.about
            if about is None or verdict.label.value == UNREADABLE:
                continue
            violates = verdict.label.value == VIOLATES
            label, reviewer = found.get(about, (violates, review.reviewer))
            found[about] = (violates if label == violates else None, reviewer)
    return found
