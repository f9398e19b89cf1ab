"""Evaluates the answers of a trajectory: which were accepted, by whom, and with what probability.

Human review takes precedence over all other evidence. Contradictory evidence is never averaged: it raises
`Drop`, which the ledger counts as a tie or a disagreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from cai_graph.trajectory import Label, Message, Review
from trainers.dataset.evidence import NO_EVIDENCE, Evidence
from trainers.dataset.reading import Logged, LoggedCritique, LoggedRevision, LoggedVerdict, NotText, turn
from trainers.dataset.reviews import SIDES, scores, standing
from trainers.ledger import Reason
from trainers.rows import Turn

__all__ = [
    "COMPLIES",
    "UNREADABLE",
    "VIOLATES",
    "Drop",
    "Mended",
    "abouts",
    "accepted_of",
    "answer_of",
    "author_of",
    "draft_of",
    "draft_passed",
    "failed_by_draft",
    "heed_users",
    "is_cut",
    "is_same",
    "liking_of",
    "mended_by",
    "prompt_of",
    "review_of",
    "saw",
    "seen_beside_the_draft",
    "violated",
    "vouching",
]

VIOLATES, COMPLIES, UNREADABLE = Label.VIOLATES.value, Label.COMPLIES.value, Label.UNREADABLE.value
_ROLES = frozenset({"system", "user", "assistant", "tool"})
_CERTAIN = 0.999
"""Probabilities are clamped to between one minus this and this."""
_GRAVEST = 5
"""The highest severity of a Verdict."""


class Drop(Exception):  # noqa: N818 - signals that there is no row, which is not an error
    """Raised where a trajectory gives no row; has the reason."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


# --- turns --------------------------------------------------------------------------------------------


def prompt_of(logged: Logged) -> tuple[Turn, ...]:
    """Return the conversation. Drops one without a user message, or with a role unknown to templates."""
    asked = False
    for message in logged.messages:
        role = message.role
        if role == "user":
            asked = True
        elif role not in _ROLES:
            raise Drop(Reason.UNKNOWN_ROLE)
    if not asked:
        raise Drop(Reason.NO_PROMPT)
    return logged.messages


def answer_of(answer: Turn | Message) -> Turn:
    """Return an answer as an assistant turn. Drops an empty one."""
    if isinstance(answer, Message):
        try:
            answer = turn(answer)
        except NotText:
            raise Drop(Reason.NOT_TEXT) from None
    content = answer.content
    if (not content or content.isspace()) and not answer.tool_calls:
        raise Drop(Reason.EMPTY)
    return answer if answer.role == "assistant" else msgspec.structs.replace(answer, role="assistant")


def is_same(a: Turn, b: Turn) -> bool:
    """Return whether two answers differ by whitespace at most."""
    if a.content != b.content:
        # Comparing the first two words distinguishes most answers at a fraction of the cost.
        first, second = a.content[:64].split(None, 2), b.content[:64].split(None, 2)
        if len(first) == len(second) == 3 and first[:2] != second[:2]:
            return False
        if a.content.split() != b.content.split():
            return False
    return a.tool_calls == b.tool_calls


def draft_of(logged: Logged) -> Turn:
    """Return the draft. Drops a trajectory that has none."""
    if logged.draft is None:
        raise Drop(Reason.NO_ANSWER)
    return logged.draft.answer


def is_cut(logged: Logged) -> bool:
    """Return whether the draft was cut off at the model's token limit."""
    return logged.draft is not None and logged.draft.truncated


def accepted_of(logged: Logged) -> list[LoggedRevision]:
    """Return the revisions that replaced the answer before them, in order."""
    return [revision for round_ in logged.rounds for revision in round_.revisions if revision.accepted]


def seen_beside_the_draft(logged: Logged) -> Turn | None:
    """Return the revision that a reviewer saw: the accepted one, or the one that a person released."""
    accepted = accepted_of(logged)
    if accepted:
        return accepted[-1].answer
    return logged.released if logged.released_from == "revision" else None


def author_of(logged: Logged) -> str:
    """Return the author of an imported trajectory: the name of a preference set, or `human`."""
    return (logged.rounds[0].critique.critic if logged.rounds else None) or "human"


# --- people -------------------------------------------------------------------------------------------


def review_of(evidence: Evidence) -> Review | None:
    """Return the decision of the reviewers, if any.

    Drops a trajectory that a reviewer rejected or flagged, or on which two reviewers disagree.
    """
    if not evidence.reviews:
        return None
    last = standing(evidence.reviews)
    if not last:
        return None
    if any(review.decision in ("reject", "flag") for review in last):
        raise Drop(Reason.REVIEWED_OUT)
    if len({SIDES[review.decision] for review in last}) > 1:
        raise Drop(Reason.DISAGREEMENT)
    return last[-1]


def liking_of(evidence: Evidence) -> int:
    """Return whether end users like the answer that they saw (1) or dislike it (-1); 0 without feedback.

    The last score of each user counts. Drops an answer that one user likes and another dislikes.
    """
    if evidence is NO_EVIDENCE or not evidence.feedback:
        return 0
    said = scores(evidence.feedback)
    liked, disliked = any(score > 0 for score in said), any(score < 0 for score in said)
    if liked and disliked:
        raise Drop(Reason.DISAGREEMENT)
    return liked - disliked


def saw(logged: Logged, answer: Turn) -> bool:
    """Return whether an answer is the one that the end user saw; if none was released, any may be."""
    return logged.released is None or is_same(logged.released, answer)


def heed_users(logged: Logged, evidence: Evidence, answer: Turn) -> None:
    """Drop a training answer that end users saw and dislike, or that differs from one that they like."""
    if liking := liking_of(evidence):
        seen = saw(logged, answer)
        if seen and liking < 0:
            raise Drop(Reason.DISLIKED)
        if not seen and liking > 0:
            raise Drop(Reason.DISAGREEMENT)


# --- critics ------------------------------------------------------------------------------------------


def abouts(verdicts: Iterable[LoggedVerdict]) -> tuple[str, ...]:
    """Return the principle ids or aims of verdicts. A verdict on the whole answer has none."""
    return tuple(verdict.about for verdict in verdicts if verdict.about is not None)


def violated(critique: LoggedCritique, *, passed: bool = False) -> list[LoggedVerdict]:
    """Return the verdicts by which the answer violates the constitution.

    Args:
        critique: the judgement of the answer.
        passed: whether the run accepted the answer. Then a violation with a severity was below its
            principle's `min_severity`, and does not count; the constitution itself may no longer exist.
    """
    return [
        verdict
        for verdict in critique.verdicts
        if verdict.label == VIOLATES and not (passed and verdict.severity is not None)
    ]


def draft_passed(logged: Logged) -> bool:
    """Return whether the run accepted the draft; False in mode `sampled`, which rejects no answer."""
    return logged.outcome == "KEPT" and logged.mode != "sampled"


def failed_by_draft(logged: Logged) -> tuple[str, ...]:
    """Return the principles or aims that the draft violates."""
    return abouts(violated(logged.rounds[0].critique)) if logged.rounds else ()


def vouching(critique: LoggedCritique | None, *, passed: bool = True) -> LoggedCritique:
    """Return the critique if it accepts its answer. Drops an unjudged, unreadable or violating answer.

    `passed` is whether the run accepted the answer; see `violated`.
    """
    if critique is None or not critique.verdicts:
        raise Drop(Reason.UNJUDGED)
    labels = {verdict.label for verdict in critique.verdicts}
    if UNREADABLE in labels:
        raise Drop(Reason.UNREADABLE_VERDICT)
    if VIOLATES in labels and violated(critique, passed=passed):
        raise Drop(Reason.NOT_ACCEPTED)
    return critique


class Mended(NamedTuple):
    """How a revision is better than an answer that violates the constitution."""

    principles: tuple[str, ...]
    """Principles or aims that the answer violates, and the revision does not, or less severely."""
    p_better: float
    """P(the revision is the better one), above 0.5."""
    critic: str
    """Name of the critic that judged the revision; empty if unknown."""


def mended_by(before: LoggedCritique, after: LoggedCritique | None) -> Mended:
    """Return a critic's evidence that a revision is better. Drops a revision that the critic did not accept.

    Args:
        before: the judgement of the answer.
        after: the judgement of the revision.

    If the critic gives probabilities of a violation, d for the answer and r for the revision, then given that
    exactly one of the two violates the principle, the odds that it is the answer are d(1 − r) : r(1 − d).
    Over several principles the mean of these probabilities is used. Without probabilities the label is
    certain.
    """
    vouched = vouching(after)
    mended: list[LoggedVerdict] = []
    sure: list[float] = []
    readable = False
    for failed in before.verdicts:
        if failed.label == VIOLATES:
            for passed in vouched.verdicts:
                if _is_mended(failed, passed):
                    mended.append(failed)
                    if failed.probability is not None and passed.probability is not None:
                        odds = _log_odds(failed.probability) - _log_odds(passed.probability)
                        sure.append(1 / (1 + math.exp(-odds)))
                    break
        elif failed.label == COMPLIES:
            readable = True
    if not mended:
        raise Drop(Reason.NOT_ACCEPTED if readable else Reason.UNREADABLE_VERDICT)
    p_better = sum(sure) / len(sure) if sure else 1.0
    if p_better <= 0.5:
        raise Drop(Reason.TIE if p_better == 0.5 else Reason.DISAGREEMENT)
    return Mended(abouts(mended), p_better, vouched.critic or "")


def _is_mended(failed: LoggedVerdict, passed: LoggedVerdict) -> bool:
    """Return whether a revision that passed does better than the answer under the same principle or aim."""
    if passed.principle != failed.principle or passed.aim != failed.aim:
        return False
    milder = (passed.severity or 0) < (failed.severity or _GRAVEST + 1)
    return passed.label == COMPLIES or milder


def _log_odds(probability: float) -> float:
    bounded = min(max(probability, 1 - _CERTAIN), _CERTAIN)
    return math.log(bounded / (1 - bounded))
