"""What people said: of each reviewer the last decision that stands, of each end user the last score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

from cai_graph.trajectory import Feedback, Review

__all__ = ["SIDES", "Side", "agreed_side", "scores", "standing"]

Side = Literal["revision", "draft", "edit", "tie"]

SIDES: Mapping[str, Side] = {
    "approve": "revision",
    "flip": "draft",
    "draft": "draft",
    "edit": "edit",
    "tie": "tie",
}
"""Which answer a decision is for; one that rejects or flags is for none."""


def standing(reviews: Iterable[Review]) -> list[Review]:
    """Return the last decision of each reviewer, the latest at the end; `undo` takes one back."""
    by_reviewer: dict[str, list[Review]] = {}
    for review in sorted(reviews, key=_when):
        decisions = by_reviewer.setdefault(review.reviewer, [])
        if review.decision == "undo":
            del decisions[-1:]
        elif review.decision != "skip":
            decisions.append(review)
    return sorted((decisions[-1] for decisions in by_reviewer.values() if decisions), key=_when)


def scores(feedback: Iterable[Feedback]) -> list[float]:
    """Return the last score of each end user, by its time; one without a name is a user of its own."""
    last = {one.user if one.user is not None else (one.id,): one for one in sorted(feedback, key=_when)}
    return [one.score for one in last.values()]


def _when(record: Review | Feedback) -> tuple[datetime, str]:
    # Not the place in the log: a person may have spoken in two of them.
    return record.at if record.at.tzinfo else record.at.replace(tzinfo=UTC), record.id


def agreed_side(reviews: Iterable[Review]) -> Side | None:
    """Return the side that all reviewers are on; None where there is none, or they are on several."""
    sides = {SIDES.get(review.decision) for review in standing(reviews)}
    return sides.pop() if len(sides) == 1 else None
