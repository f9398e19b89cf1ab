"""Linear heads on hidden states: fits, calibrates and writes them, and chooses their thresholds.

    fit          standardise, logistic regression with a strong L2 penalty
    out_of_fold  a score for each row, from a head trained without it and without other answers to its request
    calibrate    Platt's sigmoid, and the threshold for a given false-alarm rate, from such scores

Standardisation and calibration are affine, so a head is one weight vector and one bias. Needs no torch: the
regression is scikit-learn's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = [
    "FOLDS",
    "Head",
    "Platt",
    "calibrate",
    "fit",
    "folds",
    "groups_of",
    "inputs",
    "out_of_fold",
    "platt",
    "scores",
    "threshold_over",
    "weights",
    "write_heads",
]

FOLDS = 5


class Platt(NamedTuple):
    """Converts a score to a probability, and a probability to a verdict."""

    scale: float = 1.0
    """The logit of the probability is scale times the score plus shift."""
    shift: float = 0.0
    """See `scale`."""
    threshold: float = 0.5
    """The probability from which the verdict is positive."""

    @property
    def cut(self) -> float:
        """The threshold as a score."""
        return (math.log(self.threshold / (1 - self.threshold)) - self.shift) / self.scale

    def probabilities(self, found: Array) -> Array:
        """Return the probabilities of scores."""
        import numpy

        return 1 / (1 + numpy.exp(-self.logits(found)))

    def logits(self, found: Array) -> Array:
        """Return the logits of the probabilities of scores."""
        return self.scale * found + self.shift


class Head(NamedTuple):
    """A linear head."""

    weight: Array
    """(2 · dimensions,) weights of the head."""
    bias: float
    """Added to the product of weights and input."""
    platt: Platt = Platt()
    """Its calibration."""


def inputs(states: Sequence[Array], reads: tuple[int, int] = (1, 1)) -> Array:
    """Return (rows, 2 · dimensions): the first window of each row, with zeros for a vector that is not used.

    Args:
        states: one per row, (windows, 2, dimensions); see `cai_graph.critic.probe.States`.
        reads: which of the two vectors a head uses, 1 or 0 each.
    """
    import numpy

    return numpy.stack([(state[0] * numpy.array(reads)[:, None]).ravel() for state in states])


def scores(head: Head, states: Sequence[Array], *, largest: bool) -> Array:
    """Return a score per row: that of its first window or, as at inference, the largest over its windows."""
    import numpy

    if not largest:
        return inputs(states) @ head.weight + head.bias
    found = [state.reshape(-1, head.weight.size) @ head.weight for state in states]
    return numpy.array([each.max() for each in found]) + head.bias


def fit(x: Array, y: Array, sources: Array, penalty: float) -> Head:
    """Fit one head; the rows are weighted by `weights`."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread == 0] = 1
    model = LogisticRegression(C=1 / penalty, max_iter=1000)
    model.fit((x - mean) / spread, y, sample_weight=weights(y, sources))
    weight = model.coef_[0] / spread
    return Head(weight, float(model.intercept_[0] - mean @ weight))


def weights(y: Array, sources: Array) -> Array:
    """Return row weights: both labels weigh the same, and within one a source by the root of its size."""
    import numpy

    found = numpy.zeros(len(y))
    for label in (0, 1):
        for source in set(sources[y == label]):
            cell = (y == label) & (sources == source)
            found[cell] = cell.sum() ** -0.5
        found[y == label] *= len(y) / 2 / found[y == label].sum()
    return found


def groups_of(requests: Sequence[str], answers: Sequence[str | None]) -> Array:
    """Return a group number per row: the same for all rows of a request; without a request, by answer."""
    import numpy

    keys = [
        " ".join(request.casefold().split()) or answer
        for request, answer in zip(requests, answers, strict=True)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return numpy.array([numbers[key] for key in keys])


def folds(y: Array, groups: Array, seed: int) -> list[tuple[Array, Array]]:
    """Return (kept, left out) for each fold; all rows of a request are on the same side."""
    from sklearn.model_selection import StratifiedGroupKFold

    return list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(y, y, groups))


def out_of_fold(
    fitted: Callable[[Array], Head],
    states: Sequence[Array],
    y: Array,
    groups: Array,
    *,
    largest: bool,
    seed: int,
) -> Array:
    """Return a score per row, from a head trained without the row and without other answers to its request.

    `fitted` returns a head trained on the rows with the given indices.
    """
    import numpy

    found = numpy.empty(len(y))
    for kept, left in folds(y, groups, seed):
        found[left] = scores(fitted(kept), [states[row] for row in left], largest=largest)
    return found


def platt(name: str, found: Array, y: Array, counted: Array, false_alarms: float) -> Platt:
    """Return Platt's sigmoid and the threshold, both determined from out-of-fold scores.

    Args:
        name: name of the head, for the error message.
        found: the scores.
        y: the labels, 0 or 1.
        counted: which rows count for the threshold.
        false_alarms: share of their negatives that the threshold may flag.

    Raises:
        DataError: the scores rank no better than chance.

    Source: Platt 1999, "Probabilistic outputs for support vector machines".
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6).fit(found[:, None], y)
    scale, shift = float(model.coef_[0, 0]), float(model.intercept_[0])
    if scale <= 0:
        raise DataError(
            f"{name!r}: out of fold it ranks no better than chance; more or other rows are needed"
        )
    read = Platt(scale, shift).logits(found)
    return Platt(scale, shift, threshold_over(read[(y == 0) & counted], read[y == 1], false_alarms))


def threshold_over(negatives: Array, positives: Array, false_alarms: float) -> float:
    """Return the probability from which a row is flagged, so that at most a share of the negatives is.

    It is just above the highest negative that must not be flagged, or halfway from there to the next
    positive: if the labels are well separated, it is at the edge of neither. It has four decimals, as in a
    card, from 0.01 to 0.99: negatives above 0.99 are flagged even if they are more than the share.

    Args:
        negatives: logits of the negatives, at least one.
        positives: logits of the rows that should be flagged.
        false_alarms: the share, in (0, 1).
    """
    import numpy

    # No interpolation: a cut between two negatives that are far apart, or on one, would flag one too many.
    allowed = math.floor(false_alarms * len(negatives) + 1e-9)
    cut = float(numpy.sort(negatives)[len(negatives) - allowed - 1])
    if (above := positives[positives > cut]).size:
        cut = (cut + float(above.min())) / 2
    probability = 1 / (1 + math.exp(-cut))
    return min(0.99, max(0.01, (math.floor(probability * 1e4) + 1) / 1e4))


def calibrate(head: Head, name: str, found: Array, y: Array, counted: Array, false_alarms: float) -> Head:
    """Return the head with a calibration determined from its out-of-fold scores; see `platt`."""
    return head._replace(platt=platt(name, found, y, counted, false_alarms))


def write_heads(path: Path, heads: Mapping[str, Head]) -> None:
    """Write the safetensors file that `cai_graph.critic.probe` reads, with the calibration folded in."""
    import numpy
    from safetensors.numpy import save

    tensors = {}
    for name, head in heads.items():
        scale, shift, _ = head.platt
        tensors[f"{name}.weight"] = (scale * head.weight).reshape(2, -1).astype(numpy.float32)
        tensors[f"{name}.bias"] = numpy.array([scale * head.bias + shift], dtype=numpy.float32)
    path.write_bytes(save(tensors))
