"""What a judge is worth: its liking for a place, its ties, what it could not say, with intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cai_graph.calibration import wilson
from cai_graph.log import Log
from cai_graph.trajectory import Comparison, Review
from trainers.dataset.reviews import Side, agreed_side
from trainers.feedback.compared import same_answer

__all__ = ["Positions", "Share", "decided", "positions"]


class Share(NamedTuple):
    """A share of a number of cases, with its 95 % interval."""

    yes: int
    """Cases that are so."""
    of: int
    """All cases."""

    @property
    def value(self) -> float:
        """The share, from 0 to 1; NaN of no cases."""
        return self.yes / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson 1927; (0, 1) of no cases."""
        return wilson(self.yes, self.of) if self.of else (0.0, 1.0)

    def json(self) -> dict[str, Any]:
        """Return share, interval and number of cases; share and interval None of no cases."""
        known = (self.value, self.interval) if self.of else (None, None)
        return {"share": known[0], "interval": known[1], "n": self.of}

    def __str__(self) -> str:
        if not self.of:
            return "none"
        low, high = self.interval
        return f"{self.value:.0%} ({low:.0%} to {high:.0%}, n = {self.of})"


def positions(log: Log) -> dict[str, Positions]:
    """Return what the comparisons of a log came to, by judge; reads them once.

    Raises:
        LogError: the log cannot be read.
    """
    people = decided(log)
    found: dict[str, Positions] = {}
    for record in log.read(kind="comparison"):
        assert isinstance(record, Comparison)
        counted = found.setdefault(record.judge, Positions(record.judge))
        counted.add(record, people.get(record.trajectory_id))
    return found


def decided(log: Log) -> dict[str, Side]:
    """Return what reviewers chose, by Trajectory, where they agree."""
    reviews: dict[str, list[Review]] = {}
    for record in log.read(kind="review"):
        assert isinstance(record, Review)
        reviews.setdefault(record.trajectory_id, []).append(record)
    sides = {id: agreed_side(found) for id, found in reviews.items()}
    return {id: side for id, side in sides.items() if side is not None}


@dataclass
class Positions:
    """What the comparisons of one judge came to."""

    judge: str
    """Its name."""
    comparisons: int = 0
    """Made, pairs of the same text left out."""
    unreadable: int = 0
    """Of which one order at least could not be read."""
    first: int = 0
    """Readable ones in which the answer shown first was chosen in both orders."""
    second: int = 0
    """Readable ones in which the answer shown second was chosen in both orders."""
    ties: int = 0
    """Readable ones that prefer neither answer, though the orders do not disagree."""
    identical: int = 0
    """Pairs of the same text, which nobody was asked about."""
    shift: float = 0.0
    """Sum over readable ones of (P(A) with A first − P(A) with B first) / 2."""
    later_better: int = 0
    """Of the clear ones between a draft and its revision: those that prefer the revision."""
    revisions: int = 0
    """Clear ones between a draft and its revision."""
    unordered: int = 0
    """Readable ones that show no order: of a critic that judges each answer alone, or imported."""
    reviewed: int = 0
    """Clear ones between a draft and its revision of which people chose one."""
    as_people: int = 0
    """Those of them that prefer what people chose."""

    def add(self, comparison: Comparison, people: Side | None = None) -> None:
        """Count one comparison of this judge.

        Args:
            comparison: the comparison.
            people: what people chose in that Trajectory, if they agree.
        """
        if same_answer(*comparison.answers):
            self.identical += 1
            return
        self.comparisons += 1
        first, second = comparison.p_a
        p = comparison.preference
        if p is None or first is None or second is None:
            self.unreadable += 1
            return
        self.unordered += comparison.method in (None, "critic")
        self.shift += (first - second) / 2
        if comparison.orders_disagree:
            self.first += first > second
            self.second += first < second
            return
        if p == 0.5:
            self.ties += 1
            return
        a, b = comparison.origins
        if a == "draft" and b.startswith("revision:"):
            self.revisions += 1
            self.later_better += p < 0.5
            if people in ("draft", "revision"):
                self.reviewed += 1
                self.as_people += (p < 0.5) == (people == "revision")

    @property
    def readable(self) -> int:
        """Comparisons of which both orders could be read."""
        return self.comparisons - self.unreadable

    @property
    def clear(self) -> int:
        """Readable ones that prefer one answer, whatever the order."""
        return self.readable - self.first - self.second - self.ties

    @property
    def bias(self) -> Share:
        """Readable ones that chose the same place in both orders, whatever stood there."""
        return Share(self.first + self.second, self.readable - self.unordered)

    @property
    def agreement(self) -> Share:
        """Clear ones between draft and revision that prefer the revision, as the critic did."""
        return Share(self.later_better, self.revisions)

    @property
    def agreement_with_people(self) -> Share:
        """Clear ones between draft and revision that prefer what people chose."""
        return Share(self.as_people, self.reviewed)

    @property
    def mean_shift(self) -> float:
        """How much of P a place is worth: above 0 for the first shown; 0 of no comparison."""
        return self.shift / self.readable if self.readable else 0.0

    def summary(self) -> dict[str, Any]:
        """Return counts, and shares with their intervals, as JSON."""
        shares = {
            "position_bias": self.bias,
            "revision_preferred": self.agreement,
            "agreement_with_people": self.agreement_with_people,
        }
        return {
            **{name: value for name, value in asdict(self).items() if name != "shift"},
            "clear": self.clear,
            "mean_shift": self.mean_shift,
            **{name: share.json() for name, share in shares.items()},
        }
