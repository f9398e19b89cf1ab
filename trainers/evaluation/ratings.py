"""Computes Elo ratings from comparisons, and the Pareto front of subjects in harmlessness and helpfulness.

The model is that of Bradley and Terry 1952: P(a beats b) = 1 / (1 + exp(b − a)), fitted by maximum
likelihood, with a tie counted as half a win for each side. Elo is the same scale multiplied so that 400
points are odds of ten to one, with the mean of all subjects at 1000. Each pair that met gets one additional
tie, since the maximum for a subject that won or lost everything would be at infinity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph.errors import DataError
from trainers.evaluation.figures import RESAMPLES, Estimate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[Any]

__all__ = ["ELO", "MEAN", "Contest", "elo", "front"]

ELO = 400 / math.log(10)
"""Elo points per unit of log-odds."""
MEAN = 1000.0
"""Elo of the average subject."""
_STEPS = 100
_PRECISION = 1e-10


class Contest(NamedTuple):
    """Two subjects' answers to one prompt, compared."""

    prompt: str
    """Key of the prompt."""
    a: str
    """A subject."""
    b: str
    """The other one."""
    p_a: float
    """1 if a's answer is better, 0 if b's is, 0.5 for a tie; a judge may give any value between."""


def elo(contests: Sequence[Contest]) -> dict[str, Estimate]:
    """Return the Elo of each subject, best first, with intervals over resamples of whole prompts.

    `n` of an estimate is the number of prompts in which the subject took part. The interval is that of the
    distance to the average subject, so two subjects may differ significantly although their intervals
    overlap: use a win rate to test that. The interval is never narrower than the one from the likelihood's
    curvature for as many independent contests: if all outcomes are alike, resamples show no other outcome.

    Raises:
        DataError: there is no contest, or the subjects fall into groups that never met.
    """
    import numpy

    if not contests:
        raise DataError("no comparison has a readable outcome, so nobody can be rated")
    names = list(dict.fromkeys(name for contest in contests for name in (contest.a, contest.b)))
    places = {name: place for place, name in enumerate(names)}
    prompts = list(dict.fromkeys(contest.prompt for contest in contests))
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    wins = numpy.zeros((len(prompts), len(names), len(names)))
    for contest in contests:
        a, b = places[contest.a], places[contest.b]
        wins[numbers[contest.prompt], a, b] += contest.p_a
        wins[numbers[contest.prompt], b, a] += 1 - contest.p_a
    met = wins.sum(axis=0)
    _check_connected(met, names)
    # The additional tie for each pair that met is in each resample, too, so that all have a finite maximum.
    prior = numpy.where(met + met.T > 0, 0.5, 0.0)
    best = _strengths(met + prior)
    chance = numpy.random.default_rng(0)
    drawn = chance.integers(len(prompts), size=(RESAMPLES, len(prompts)))
    counts = numpy.stack([numpy.bincount(row, minlength=len(prompts)) for row in drawn])
    resampled = numpy.tensordot(counts, wins, axes=1) + prior
    spread = numpy.stack([_strengths(found) for found in resampled])
    low, high = numpy.percentile(spread, [2.5, 97.5], axis=0)
    half = 1.96 * _errors(met + prior, best)
    low, high = numpy.minimum(low, best - half), numpy.maximum(high, best + half)
    stood = (wins.sum(axis=2) + wins.sum(axis=1) > 0).sum(axis=0)
    points = {
        name: [float(MEAN + ELO * side[place]) for side in (best, low, high)]
        for place, name in enumerate(names)
    }
    rated = {
        name: Estimate(value, low, high, int(stood[places[name]]))
        for name, (value, low, high) in points.items()
    }
    return dict(sorted(rated.items(), key=lambda item: -item[1].value))


def _strengths(wins: Matrix) -> Matrix:
    """Return the maximum-likelihood log-strengths, centred to mean 0, by Newton's method.

    Args:
        wins: (subjects, subjects): how often the row subject beat the column subject.
    """
    import numpy

    games = wins + wins.T
    strengths = numpy.zeros(len(wins))
    for _ in range(_STEPS):
        expected = _expected(strengths)
        gradient = (wins - games * expected).sum(axis=1)
        step = numpy.linalg.solve(_curvature(games, expected), gradient)
        # A whole Newton step may overshoot far from the maximum.
        strengths += step * min(1.0, 2.0 / max(numpy.abs(step).max(), 1e-300))
        if numpy.abs(step).max() < _PRECISION:
            break
    centred: Matrix = strengths - strengths.mean()
    return centred


def _errors(wins: Matrix, strengths: Matrix) -> Matrix:
    """Return the standard errors of log-strengths, from the curvature of the likelihood at its maximum."""
    import numpy

    curvature = _curvature(wins + wins.T, _expected(strengths))
    errors: Matrix = numpy.sqrt(numpy.diag(numpy.linalg.inv(curvature)) - 1 / len(wins))
    return errors


def _expected(strengths: Matrix) -> Matrix:
    """Return P(the row subject beats the column subject)."""
    import numpy

    expected: Matrix = 1 / (1 + numpy.exp(strengths[None, :] - strengths[:, None]))
    return expected


def _curvature(games: Matrix, expected: Matrix) -> Matrix:
    """Return minus the second derivatives of the log-likelihood, with 1/subjects added to every cell.

    The likelihood depends only on differences; the added term fixes their mean, and changes no Newton step.
    """
    import numpy

    weights = games * expected * (1 - expected)
    curvature: Matrix = numpy.diag(weights.sum(axis=1)) - weights + 1 / len(games)
    return curvature


def _check_connected(met: Matrix, names: Sequence[str]) -> None:
    reached, border = {0}, [0]
    while border:
        place = border.pop()
        for other in range(len(names)):
            if other not in reached and met[place, other] + met[other, place] > 0:
                reached.add(other)
                border.append(other)
    if len(reached) < len(names):
        apart = [name for place, name in enumerate(names) if place not in reached]
        raise DataError(
            f"nothing that could be read compares {', '.join(apart)} with {names[0]} or with whom it met, so "
            "they stand on no common scale"
        )


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names that no other dominates (as good in both, better in one), by the first coordinate.

    >>> front({"base": (0.9, 0.4), "sft": (0.8, 0.8), "worse": (0.7, 0.7)})
    ['sft', 'base']
    """
    return sorted(
        (
            name
            for name, (x, y) in points.items()
            if not any(
                other >= x and above >= y and (other, above) != (x, y) for other, above in points.values()
            )
        ),
        key=lambda name: points[name],
    )
