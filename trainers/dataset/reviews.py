"""Evaluates people's records: each reviewer's last decision that was not undone, each user's last score."""

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
"""The answer that a decision prefers; `reject` and `flag` prefer none."""


def standing(reviews: Iterable[Review]) -> list[Review]:
    """Return the last decision of each reviewer, in order of time; `undo` revokes the previous one."""
    by_reviewer: dict[str, list[Review]] = {}
    for review in sorted(reviews, key=_when):
        decisions = by_reviewer.setdefault(review.reviewer, [])
        if review.decision == "undo":
            del decisions[-1:]
        elif review.decision != "skip":
            decisions.append(review)
    return sorted((decisions[-1] for decisions in by_reviewer.values() if decisions), key=_when)


def scores(feedback: Iterable[Feedback]) -> list[float]:
    """Return the last score, by time, of each end user; feedback without a user counts as a separate user."""
    last = {one.user if one.user is not None else (one.id,): one for one in sorted(feedback, key=_when)}
    return [one.score for one in last.values()]


def _when(record: Review | Feedback) -> tuple[datetime, str]:
    # By time, not by place in the log: a person's records may be in two logs.
    return record.at if record.at.tzinfo else record.at.replace(tzinfo=UTC), record.id


def agreed_side(reviews: Iterable[Review]) -> Side | None:
    """Return the side on which all reviewers agree; None if they disagree, or there is no decision."""
    sides = {SIDES.get(review.decision) for review in standing(reviews)}
    return sides.pop() if len(sides) == 1 else None
