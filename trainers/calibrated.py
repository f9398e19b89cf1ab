"""Measures calibration: predicted probabilities against observed outcomes, over bins of equal count.

    bins       cases grouped by probability; equal probabilities are in one bin
    error      the expected calibration error (ECE)
    by_chance  the range of the ECE, on as many cases, if every probability is true

Binning alone causes an error: even for a calibrated model, the expected distance is the sampling noise of a
bin's share. So an error is meaningful only in comparison with the one by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BINS", "Bin", "bins", "by_chance", "error"]

BINS = 10
_DRAWS = 400
_AT_ONCE = 1 << 22
"""Random numbers drawn in one batch."""


class Bin(NamedTuple):
    """Cases with similar probabilities."""

    cases: int
    """Number of cases."""
    said: float
    """Mean probability."""
    true: float
    """Share of positive outcomes, or the mean of soft labels."""


def bins(
    probabilities: Sequence[float] | Array, outcomes: Sequence[float] | Array, count: int = BINS
) -> list[Bin]:
    """Return cases grouped by probability, in at most `count` bins of about equally many cases.

    Equal probabilities are never split between bins, since that would depend on the order of the cases.
    """
    import numpy

    said, true = numpy.asarray(probabilities, float), numpy.asarray(outcomes, float)
    order = numpy.argsort(said, kind="stable")
    said, true = said[order], true[order]
    return [
        Bin(stop - start, float(said[start:stop].mean()), float(true[start:stop].mean()))
        for start, stop in _stretches(said, count)
    ]


def error(probabilities: Sequence[float] | Array, outcomes: Sequence[float] | Array) -> float:
    """Return the mean distance between probability and outcome over bins, in [0, 1] (ECE).

    Source: Naeini et al. 2015, with bins of equal count (Nixon et al. 2019).
    """
    found = bins(probabilities, outcomes)
    return sum(one.cases * abs(one.said - one.true) for one in found) / sum(one.cases for one in found)


def by_chance(probabilities: Sequence[float] | Array) -> tuple[float, float]:
    """Return the range that contains 95 % of the errors if each case comes true with its probability.

    For soft labels, which vary less than 0 and 1, the true range is lower.
    """
    import numpy

    said = numpy.sort(numpy.asarray(probabilities, float))
    chance = numpy.random.default_rng(0)
    errors = numpy.zeros(_DRAWS)
    for start, stop in _stretches(said, BINS):
        part = said[start:stop]
        true = numpy.zeros(_DRAWS)
        step = max(1, _AT_ONCE // _DRAWS)
        for begin in range(0, len(part), step):
            some = part[begin : begin + step]
            true += (chance.random((_DRAWS, len(some)), numpy.float32) < some).sum(axis=1)
        errors += abs(true - part.sum()) / len(said)
    low, high = numpy.percentile(errors, [2.5, 97.5])
    return float(low), float(high)


def _stretches(ordered: Array, count: int) -> Iterable[tuple[int, int]]:
    """Return the start and end of each bin of sorted probabilities."""
    import numpy

    size = len(ordered)
    wanted = [size * number // count for number in range(1, count)]
    ends = numpy.searchsorted(
        ordered, [ordered[max(0, end - 1)] for end in wanted if end], side="right"
    ).tolist()
    cuts = sorted({0, *ends, size})
    return pairwise(cuts)
