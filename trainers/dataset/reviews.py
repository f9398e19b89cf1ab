"""What people decided: of each reviewer the last decision that stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from cai_graph.trajectory import Review

__all__ = ["SIDES", "Side", "agreed_side", "standing"]

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
    """Return the last decision of each reviewer, in the order of the log; `undo` takes one back."""
    by_reviewer: dict[str, list[Review]] = {}
    for review in reviews:
        decisions = by_reviewer.setdefault(review.reviewer, [])
        if review.decision == "undo":
            del decisions[-1:]
        elif review.decision != "skip":
            decisions.append(review)
    return [decisions[-1] for decisions in by_reviewer.values() if decisions]


def agreed_side(reviews: Iterable[Review]) -> Side | None:
    """Return the side that all reviewers are on; None where there is none, or they are on several."""
    sides = {SIDES.get(review.decision) for review in standing(reviews)}
    return sides.pop() if len(sides) == 1 else None
