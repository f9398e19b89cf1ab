"""Estimates means, shares and differences over prompts, each with the number of prompts and a 95 % interval.

The unit is the prompt. Several answers to one prompt carry less information than as many prompts do, so they
are averaged before anything is estimated, and comparisons of two subjects are paired by prompt.
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
"""Number of bootstrap resamples."""

_PRIOR = 2
"""Prior degrees of freedom for the assumption that all answers to a prompt are alike. With 0, the intervals
over 30 prompts of which 3 % always fail cover the true share 79 % of the time, with 2 95 %."""

T = TypeVar("T")


class Estimate(NamedTuple):
    """An estimate over prompts."""

    value: float
    """The estimate; NaN if there is no prompt."""
    low: float
    """Lower end of the 95 % interval; minus infinity if the prompts are too few or too alike for one."""
    high: float
    """Upper end; infinity if there is no interval."""
    n: int
    """Number of prompts."""

    def json(self) -> dict[str, Any]:
        """Return the estimate as JSON, with None for NaN and infinity, which JSON lacks."""
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
    """The model or system that was evaluated."""
    suite: str
    """`harmlessness`, `helpfulness` or `over-refusal`."""
    measure: str
    """What was estimated, such as `harmless`, `full refusal` or `win rate`."""
    by: str
    """The grader."""
    estimate: Estimate
    """The value."""
    against: str | None = None
    """The other subject, if two are compared."""
    left_out: int = 0
    """Prompts without a readable judgement; they are not in any estimate."""
    note: str = ""
    """A sentence that a reader must know."""

    def json(self) -> dict[str, Any]:
        """Return the figure as flat JSON."""
        fields = {**asdict(self), **self.estimate.json()}
        del fields["estimate"]
        return fields


def estimate(values: Mapping[str, Sequence[float]], *, bounded: bool) -> Estimate:
    """Return the mean over prompts of the mean value of their answers.

    The interval of bounded numbers is Wilson's of 1927, applied to their sum. It assumes a variance of
    m(1-m), and numbers in [0, 1] of mean m never vary by more (Bhatia and Davis 2000, "A better bound on the
    variance"), so it is too wide rather than too narrow. Student's t would be far too narrow if few answers
    fail, since the spread shows only in those that do. With several answers to a prompt Wilson's would be
    much too wide; it is then computed for the effective number of answers that `share` uses. Unbounded
    numbers get Student's t; if they are all alike, or of one prompt only, they get no interval, since its
    width would be zero or undefined.

    Args:
        values: the value of each answer, by prompt; a prompt without a value does not count.
        bounded: whether they can only lie in [0, 1]: shares, win rates with a half for a tie, probabilities.

    Raises:
        DataError: a bounded number lies outside.

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
    """Return the share of all answers, given by prompt, that have a property; each is 1, 0 or in between.

    Unlike in `estimate`, a prompt is weighted by its number of answers, as in a recall or a precision. The
    interval is Wilson's for an effective number of independent answers: as many as would let the share vary
    as much as it does between prompts, or the number of prompts if these do not differ (Dean and Pagano 2015,
    "Evaluating confidence interval methods for binomial proportions in clustered surveys").

    >>> share({"a": [1, 1], "b": [0, 0], "c": [1], "d": [1]})
    Estimate(value=0.6666..., low=0.2235..., high=0.9328..., n=4)
    """
    sizes = [(sum(found), len(found)) for found in answers.values() if found]
    if not sizes:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    return _by_wilson(sizes, sum(size for _, size in sizes))


def _by_wilson(prompts: Sequence[tuple[float, int]], most: float) -> Estimate:
    """Return the share over prompts with Wilson's interval, for an effective number of answers.

    The fewer prompts contribute to the observed spread, the less reliable it is, and the more it is shrunk
    towards the spread that would result if all answers to a prompt were alike, as with a prior observation of
    that (Smyth 2004, "Linear models and empirical Bayes methods"): one failing answer may be a sign of a
    prompt that always fails.

    Args:
        prompts: for each prompt, its value times its weight, and its weight.
        most: upper bound of the effective number of answers.
    """
    n, of = len(prompts), sum(size for _, size in prompts)
    value = sum(so for so, _ in prompts) / of
    # Variance of a ratio, linearised (Cochran 1977, "Sampling techniques", section 2.11).
    squares = [((so - value * size) / of) ** 2 for so, size in prompts]
    found = sum(squares)
    if found <= 1e-12:
        return Estimate(value, *wilson(value * n, n), n)
    alike = value * (1 - value) * sum(size**2 for _, size in prompts) / of**2
    # Degrees of freedom of a variance estimate, from the spread of its summands (Satterthwaite 1946).
    spread = sum(square**2 for square in squares) / found**2 - 1 / n
    freedom = min(n - 1, 2 / spread) if spread > 1e-12 else n - 1
    variance = (freedom * found + _PRIOR * alike) / (freedom + _PRIOR)
    worth = min(most, value * (1 - value) / variance)
    return Estimate(value, *wilson(value * worth, worth), n)


def paired(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> Estimate:
    """Return the mean over prompts of `after` minus `before`, with Student's t interval.

    Only prompts with a value in both count. If all differences are alike, there is no interval.
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

    Use it for a measure that is neither a mean nor a share, such as Cohen's kappa; those have better
    intervals. If all resamples give the same value, for instance if two raters always agree, there is no
    interval.

    Args:
        items: the items to measure.
        cluster: the prompt that an item belongs to; `n` is the number of prompts.
        measure: may be NaN on a resample that does not allow it; such resamples are ignored.
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
