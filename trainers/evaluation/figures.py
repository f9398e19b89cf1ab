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

from cai_graph.errors import DataError
from cai_graph.intervals import wilson

__all__ = ["RESAMPLES", "Estimate", "Figure", "estimate", "paired", "resampled", "share"]

RESAMPLES = 1000
"""Of the bootstrap."""

_PRIOR = 2
"""Degrees of freedom with which answers to a prompt are taken to be all alike before any is seen. With 0, the
intervals over 30 prompts of which 3 % always fail cover the share 79 % of the time, with 2 95 %."""

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


def estimate(values: Mapping[str, Sequence[float]], *, bounded: bool) -> Estimate:
    """Return the mean over prompts of what the answers to each came to.

    The interval of bounded numbers is Wilson's of 1927, of their sum: no numbers in [0, 1] of mean m vary by
    more than m(1 - m) (Bhatia and Davis 2000, "A better bound on the variance"), which is what it assumes, so
    it is too wide rather than too narrow. Student's t would be far too narrow where few answers fail, for
    their spread shows only in those that did. With several answers to a prompt Wilson's would be much too
    wide: there it is of as many answers as `share` counts. For other numbers, which have no bounds, the
    interval is Student's t; of numbers that are all alike it would have no width: those have none, and
    neither has one prompt.

    Args:
        values: what each answer came to, by prompt; a prompt without a value does not count.
        bounded: whether they can only lie in [0, 1]: shares, win rates with a half for a tie, probabilities.

    Raises:
        DataError: a bounded number lies elsewhere.

    >>> estimate({"a": [1], "b": [0], "c": [1, 1], "d": [0]}, bounded=True)
    Estimate(value=0.5, low=0.1500..., high=0.8499..., n=4)
    """
    given = [found for found in values.values() if found]
    means = [fmean(found) for found in given]
    if not means:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    if not bounded:
        return _by_t(means)
    if not 0 <= min(means) <= max(means) <= 1:
        raise DataError(f"a share or a probability lies in [0, 1], found {min(means)} to {max(means)}")
    if all(len(found) == 1 for found in given):
        return Estimate(fmean(means), *wilson(sum(means), len(means)), len(means))
    return _by_wilson([(mean, 1) for mean in means], math.inf)


def share(answers: Mapping[str, Sequence[float]]) -> Estimate:
    """Return the share of all answers, by prompt, that are so; each is 1, or 0, or between.

    Other than in `estimate` a prompt counts by its answers, as it does in a recall or a precision. The
    interval is Wilson's, of as many independent answers as would let the share vary as much as it does
    between prompts; of as many as there are prompts where these do not differ (Dean and Pagano 2015,
    "Evaluating confidence interval methods for binomial proportions in clustered surveys").

    >>> share({"a": [1, 1], "b": [0, 0], "c": [1], "d": [1]})
    Estimate(value=0.6666..., low=0.2235..., high=0.9328..., n=4)
    """
    sizes = [(sum(found), len(found)) for found in answers.values() if found]
    if not sizes:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    return _by_wilson(sizes, sum(size for _, size in sizes))


def _by_wilson(prompts: Sequence[tuple[float, int]], most: float) -> Estimate:
    """Return the share over prompts with Wilson's interval, of as many answers as their spread allows.

    The fewer prompts make that spread, the less is known of it, and the nearer it is taken to what it would
    be if all answers to a prompt were alike, as if that had been seen before (Smyth 2004, "Linear models and
    empirical Bayes methods"): an answer that fails may stand for a prompt that fails.

    Args:
        prompts: how much of a prompt's answers is so, and what the prompt counts.
        most: as many answers as there are, at most.
    """
    n, of = len(prompts), sum(size for _, size in prompts)
    value = sum(so for so, _ in prompts) / of
    # Of a ratio, linearised (Cochran 1977, "Sampling techniques", section 2.11).
    squares = [((so - value * size) / of) ** 2 for so, size in prompts]
    found = sum(squares)
    if found <= 1e-12:
        return Estimate(value, *wilson(value * n, n), n)
    alike = value * (1 - value) * sum(size**2 for _, size in prompts) / of**2
    # Degrees of freedom of a variance, by the spread of what it is the sum of (Satterthwaite 1946).
    spread = sum(square**2 for square in squares) / found**2 - 1 / n
    freedom = min(n - 1, 2 / spread) if spread > 1e-12 else n - 1
    variance = (freedom * found + _PRIOR * alike) / (freedom + _PRIOR)
    worth = min(most, value * (1 - value) / variance)
    return Estimate(value, *wilson(value * worth, worth), n)


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
