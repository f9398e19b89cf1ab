"""How far probabilities may be believed: what was said against what came true, over bins of like count.

    bins       cases of about the same probability; equal ones stand in one bin
    error      the calibration error (ECE)
    by_chance  between what ends it lies on so many cases where every probability is true

Bins make an error of chance, too: of a calibrated model the expected distance is no less than the noise of a
bin's share. So an error means something only beside the one by chance.
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
"""Numbers that are drawn at once."""


class Bin(NamedTuple):
    """Cases of about the same probability."""

    cases: int
    """How many."""
    said: float
    """Mean probability."""
    true: float
    """Share that came true, or where labels are soft their mean."""


def bins(
    probabilities: Sequence[float] | Array, outcomes: Sequence[float] | Array, count: int = BINS
) -> list[Bin]:
    """Return cases by their probability, in at most `count` bins of about as many each.

    Equal probabilities are never parted: a split among them would go by the order of the cases.
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
    """Return the mean distance of probability and truth over bins, in [0, 1] (ECE).

    Source: Naeini et al. 2015, with bins of equal count (Nixon et al. 2019).
    """
    found = bins(probabilities, outcomes)
    return sum(one.cases * abs(one.said - one.true) for one in found) / sum(one.cases for one in found)


def by_chance(probabilities: Sequence[float] | Array) -> tuple[float, float]:
    """Return the ends between which 95 % of the errors lie if each case comes true with its probability.

    Of soft labels, which vary less than yes and no, it is more than chance makes.
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
    """Return where each bin of sorted probabilities begins and ends."""
    import numpy

    size = len(ordered)
    wanted = [size * number // count for number in range(1, count)]
    ends = numpy.searchsorted(
        ordered, [ordered[max(0, end - 1)] for end in wanted if end], side="right"
    ).tolist()
    cuts = sorted({0, *ends, size})
    return pairwise(cuts)
