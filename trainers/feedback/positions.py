"""Measures the reliability of a judge: position bias, ties and unreadable comparisons, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cai_graph.intervals import wilson
from cai_graph.log import Log
from cai_graph.trajectory import Comparison, Review, revision_at
from trainers.dataset.compared import same_answer
from trainers.dataset.reviews import Side, agreed_side
from trainers.evaluation.figures import share

__all__ = ["ByTrajectory", "Positions", "Share", "decided", "positions"]


class Share(NamedTuple):
    """A share of a number of cases, with its 95 % interval."""

    yes: int
    """Cases that have the property."""
    of: int
    """All cases."""

    @property
    def value(self) -> float:
        """The share, from 0 to 1; NaN if there are no cases."""
        return self.yes / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson 1927; (0, 1) if there are no cases."""
        return wilson(self.yes, self.of) if self.of else (0.0, 1.0)

    def json(self) -> dict[str, Any]:
        """Return share, interval and number of cases; share and interval are None if there are no cases."""
        known = (self.value, self.interval) if self.of else (None, None)
        return {"share": known[0], "interval": known[1], "n": self.of}

    def __str__(self) -> str:
        if not self.of:
            return "none"
        low, high = self.interval
        return f"{self.value:.0%} ({low:.0%} to {high:.0%}, n = {self.of})"


@dataclass
class ByTrajectory:
    """A share of comparisons, whose interval accounts for several comparisons on one Trajectory."""

    found: dict[str, list[float]] = field(default_factory=dict)
    """By Trajectory, 1 for each comparison that has the property, and 0 for each other."""

    def add(self, trajectory_id: str, so: bool) -> None:
        """Count one comparison."""
        self.found.setdefault(trajectory_id, []).append(float(so))

    @property
    def yes(self) -> int:
        """Number of comparisons that have the property."""
        return sum(int(sum(some)) for some in self.found.values())

    @property
    def of(self) -> int:
        """Number of all comparisons."""
        return sum(map(len, self.found.values()))

    def json(self) -> dict[str, Any]:
        """Return share, 95 % interval, comparisons and n of Trajectories; the first two None if n is 0."""
        value, low, high, n = share(self.found)
        known = (value, (low, high)) if n else (None, None)
        return {"share": known[0], "interval": known[1], "comparisons": self.of, "n": n}

    def __str__(self) -> str:
        value, low, high, n = share(self.found)
        if not n:
            return "none"
        of = f"n = {n}" if n == self.of else f"{self.of} comparisons on {n} trajectories"
        return f"{value:.0%} ({low:.0%} to {high:.0%}, {of})"


def positions(log: Log) -> dict[str, Positions]:
    """Return statistics of the comparisons in a log, by judge; reads the comparisons once.

    Raises:
        LogError: the log cannot be read.
    """
    people = decided(log)
    found: dict[str, Positions] = {}
    for record in log.read(kind="comparison"):
        counted = found.setdefault(record.judge, Positions(record.judge))
        counted.add(record, people.get(record.trajectory_id))
    return found


def decided(log: Log) -> dict[str, Side]:
    """Return the answer that reviewers chose, by Trajectory, where they agree."""
    reviews: dict[str, list[Review]] = {}
    for record in log.read(kind="review"):
        reviews.setdefault(record.trajectory_id, []).append(record)
    sides = {id: agreed_side(found) for id, found in reviews.items()}
    return {id: side for id, side in sides.items() if side is not None}


@dataclass
class Positions:
    """Statistics of the comparisons of one judge."""

    judge: str
    """The judge's name."""
    comparisons: int = 0
    """Number of comparisons, not counting pairs of the same text."""
    unreadable: int = 0
    """Comparisons of which at least one order could not be read."""
    first: int = 0
    """Readable comparisons in which the answer shown first was chosen in both orders."""
    second: int = 0
    """Readable comparisons in which the answer shown second was chosen in both orders."""
    ties: int = 0
    """Readable comparisons that prefer neither answer, though the orders do not disagree."""
    identical: int = 0
    """Pairs of the same text, about which no judge was asked."""
    unordered: int = 0
    """Readable comparisons without an order: imported, or by a critic that judges each answer alone."""
    shift: float = 0.0
    """Sum over readable comparisons of (P(A) with A first − P(A) with B first) / 2."""
    bias: ByTrajectory = field(default_factory=ByTrajectory)
    """Share of readable comparisons that chose the same position in both orders, for either answer."""
    agreement: ByTrajectory = field(default_factory=ByTrajectory)
    """Share of clear comparisons of a draft and its revision that prefer the revision, as the critic did."""
    agreement_with_people: ByTrajectory = field(default_factory=ByTrajectory)
    """Share of clear comparisons of a draft and its revision that agree with people, if people chose one."""
    _counted: set[str] = field(default_factory=set, init=False, repr=False)
    """Keys of the comparisons that were counted."""

    def add(self, comparison: Comparison, people: Side | None = None) -> None:
        """Count one comparison of this judge; of several with the same key only the first.

        Args:
            comparison: the comparison.
            people: the answer that people chose in that Trajectory, if they agree.
        """
        if comparison.source is not None:  # two labellings at the same time make the same comparisons
            if comparison.source in self._counted:
                return
            self._counted.add(comparison.source)
        if same_answer(*comparison.answers):
            self.identical += 1
            return
        self.comparisons += 1
        first, second = comparison.p_a
        p = comparison.preference
        if p is None or first is None or second is None:
            self.unreadable += 1
            return
        about = comparison.trajectory_id
        if comparison.method in (None, "critic"):
            self.unordered += 1
        else:
            self.bias.add(about, comparison.orders_disagree)
        self.shift += (first - second) / 2
        if comparison.orders_disagree:
            self.first += first > second
            self.second += first < second
            return
        if p == 0.5:
            self.ties += 1
            return
        a, b = comparison.origins
        if a == "draft" and revision_at(b) is not None:
            self.agreement.add(about, p < 0.5)
            if people in ("draft", "revision"):
                self.agreement_with_people.add(about, (p < 0.5) == (people == "revision"))

    @property
    def readable(self) -> int:
        """Number of comparisons of which both orders could be read."""
        return self.comparisons - self.unreadable

    @property
    def clear(self) -> int:
        """Number of readable comparisons that prefer the same answer in both orders."""
        return self.readable - self.first - self.second - self.ties

    @property
    def mean_shift(self) -> float:
        """Mean effect of the position on P: above 0 in favour of the first shown; 0 without comparisons."""
        return self.shift / self.readable if self.readable else 0.0

    def summary(self) -> dict[str, Any]:
        """Return counts, and shares with their intervals, as JSON."""
        counts = ("comparisons", "unreadable", "first", "second", "ties", "identical", "unordered", "clear")
        return {
            "judge": self.judge,
            **{name: getattr(self, name) for name in counts},
            "mean_shift": self.mean_shift,
            "position_bias": self.bias.json(),
            "revision_preferred": self.agreement.json(),
            "agreement_with_people": self.agreement_with_people.json(),
        }
