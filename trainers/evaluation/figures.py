"""Means, shares and differences over prompts, each with its number of prompts and a 95 % interval.

The unit is the prompt. Several answers to one prompt say less than as many prompts do, so they are averaged
before anything is estimated, and what compares two subjects is paired by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

from cai_graph.calibration import wilson

__all__ = ["RESAMPLES", "Estimate", "Figure", "estimate", "paired", "resampled", "share"]

RESAMPLES = 1000
"""Of the bootstrap."""

T = TypeVar("T")


class Estimate(NamedTuple):
    """A value that was estimated over prompts."""

    value: float
    """The estimate; NaN of no prompt."""
    low: float
    """Lower end of the 95 % interval; minus infinity where the prompts, too few or all alike, give none."""
    high: float
    """Upper end; infinity where there is none."""
    n: int
    """Prompts."""

    def json(self) -> dict[str, Any]:
        """Return it as JSON, which has no word for NaN and infinity: None stands for them."""
        finite = {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}
        return {**finite, "n": self.n}

    def __str__(self) -> str:
        if not self.n:
            return "none"
        if not math.isfinite(self.high - self.low):
            return f"{self.value:.2f} (n = {self.n})"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}, n = {self.n})"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of an evaluation."""

    subject: str
    """Who was evaluated."""
    suite: str
    """`harmlessness`, `helpfulness` or `over-refusal`."""
    measure: str
    """What was estimated, such as `harmless`, `full refusal` or `win rate`."""
    by: str
    """Who judged."""
    estimate: Estimate
    """The value."""
    against: str | None = None
    """The other subject, where two are compared."""
    left_out: int = 0
    """Prompts without a readable judgement; they are in no estimate."""
    note: str = ""
    """What a reader must know, in a sentence."""

    def json(self) -> dict[str, Any]:
        """Return it as flat JSON."""
        fields = {**asdict(self), **self.estimate.json()}
        del fields["estimate"]
        return fields


def estimate(values: Mapping[str, Sequence[float]]) -> Estimate:
    """Return the mean over prompts of what the answers to each came to.

    The interval of numbers that all lie in [0, 1] (shares, win rates with a half for a tie, probabilities)
    is Wilson's of 1927, of their sum: no numbers in [0, 1] of mean m vary by more than m(1 - m) (Bhatia and
    Davis 2000, "A better bound on the variance"), which is what it assumes, so it is too wide rather than too
    narrow. Student's t would be far too narrow where few answers fail, for their spread shows only in those
    that did. With several answers to a prompt Wilson's would be much too wide: there the interval is
    Student's t over the prompts' means, within [0, 1], unless these are all alike or are 0 and 1. For other
    numbers, which have no bounds, it is Student's t. A t interval of numbers that are all alike would have no
    width: those have none, and neither has one prompt.

    Args:
        values: what each answer came to, by prompt; a prompt without a value does not count.

    >>> estimate({"a": [1], "b": [0], "c": [1, 1], "d": [0]})
    Estimate(value=0.5, low=0.1500..., high=0.8499..., n=4)
    """
    given = [found for found in values.values() if found]
    means = [fmean(found) for found in given]
    if not means:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    if any(not 0 <= value <= 1 for found in given for value in found):
        return _by_t(means)
    if all(len(found) == 1 for found in given) or all(mean in (0, 1) for mean in means) or _alike(means):
        return Estimate(fmean(means), *wilson(sum(means), len(means)), len(means))
    found = _by_t(means)
    return found._replace(low=max(0.0, found.low), high=min(1.0, found.high))


def share(answers: Mapping[str, Sequence[float]]) -> Estimate:
    """Return the share of all answers, by prompt, that are so; each is 1, or 0, or between.

    Other than in `estimate` a prompt counts by its answers, as it does in a recall or a precision. The
    interval is Wilson's, of as many independent answers as would let the share vary as much as it does
    between prompts; of as many as there are prompts where these do not differ (Dean and Pagano 2015,
    "Evaluating confidence interval methods for binomial proportions in clustered surveys").

    >>> share({"a": [1, 1], "b": [0, 0], "c": [1], "d": [1]})
    Estimate(value=0.6666..., low=0.2187..., high=0.9345..., n=4)
    """
    sizes = [(sum(found), len(found)) for found in answers.values() if found]
    of = sum(size for _, size in sizes)
    if not of:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    value = sum(so for so, _ in sizes) / of
    # Of a ratio, linearised (Cochran 1977, "Sampling techniques", section 2.11).
    variance = sum((so - value * size) ** 2 for so, size in sizes) / of**2
    worth = min(of, value * (1 - value) / variance) if variance > 1e-12 else len(sizes)
    return Estimate(value, *wilson(value * worth, worth), len(sizes))


def paired(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> Estimate:
    """Return the mean over prompts of `after` minus `before`, with Student's t interval.

    Only prompts count for which both have a value. Differences that are all alike have no interval.
    """
    differences = [
        fmean(found) - fmean(earlier)
        for prompt, found in after.items()
        if found and (earlier := before.get(prompt))
    ]
    if not differences:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    return _by_t(differences)


def _by_t(values: Sequence[float]) -> Estimate:
    mean, n = fmean(values), len(values)
    if _alike(values):
        return Estimate(mean, -math.inf, math.inf, n)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * stdev(values, mean) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def _alike(values: Sequence[float]) -> bool:
    """Return whether no two numbers differ by more than rounding."""
    return math.isclose(min(values), max(values), rel_tol=1e-9, abs_tol=1e-9)


def resampled(
    items: Iterable[T],
    cluster: Callable[[T], str],
    measure: Callable[[Sequence[T]], float],
) -> Estimate:
    """Return a measure of all items, with a bootstrap percentile interval over resamples of whole clusters.

    It is for what is no mean and no share, such as Cohen's kappa; those have better ones. Where all resamples
    come to the same value, as where two raters always agree, there is no interval.

    Args:
        items: what is measured.
        cluster: the prompt that an item belongs to; `n` counts them.
        measure: may be NaN where a resample does not allow it; such resamples are left out.
    """
    import numpy

    members: dict[str, list[T]] = {}
    for item in items:
        members.setdefault(cluster(item), []).append(item)
    clusters = list(members.values())
    whole = measure([item for found in clusters for item in found])
    if len(clusters) < 2:
        return Estimate(whole, -math.inf, math.inf, len(clusters))
    chance = numpy.random.default_rng(0)
    drawn = chance.integers(len(clusters), size=(RESAMPLES, len(clusters)))
    values = [measure([item for number in row for item in clusters[number]]) for row in drawn]
    finite = [value for value in values if math.isfinite(value)]
    if not finite or _alike(finite):
        return Estimate(whole, -math.inf, math.inf, len(clusters))
    low, high = numpy.percentile(finite, [2.5, 97.5])
    return Estimate(whole, float(low), float(high), len(clusters))
