"""Measures models that give probabilities: AUC, rates, calibration, 95 % intervals, and a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph.intervals import wilson
from trainers import calibrated, markdown, svg
from trainers.evaluation.figures import share

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = [
    "Curve",
    "Figure",
    "auc",
    "calibration",
    "figures_of",
    "interval",
    "plot_reliability",
    "table",
]

RESAMPLES = 1000


class Figure(NamedTuple):
    """One measured value with its 95 % interval."""

    head: str
    """The head that is measured: a head of the built-in probe, an aim or a principle."""
    measure: str
    """`auc`, `recall`, `precision`, `false alarms` (share of negatives flagged), `calibration error`."""
    setting: str
    """What was left out of training, and which rows were measured."""
    n: int
    """Rows measured."""
    positives: int
    """Rows among them that are labelled positive."""
    value: float
    """The value."""
    low: float
    """Lower end of its 95 % interval; for a `calibration error`, of the range in which the error of a
    calibrated critic lies 95 times in 100, on as many rows."""
    high: float
    """Upper end."""

    def rounded(self) -> dict[str, Any]:
        """Return the figure as JSON, with numbers rounded to four decimals."""
        return {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in self._asdict().items()
        }


def auc(scores: Array, y: Array) -> float:
    """Return P(a positive scores above a negative), where a tie counts one half."""
    import numpy

    _, place, counts = numpy.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place]
    positives = int(y.sum())
    negatives = len(y) - positives
    return float((ranks[y == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration(head: str, setting: str, probabilities: Array, y: Array) -> Figure:
    """Return the calibration error, with its range for a calibrated critic; see `trainers.calibrated`."""
    said = calibrated.error(probabilities, y)
    return Figure(
        head, "calibration error", setting, len(y), int(y.sum()), said, *calibrated.by_chance(probabilities)
    )


def interval(
    measure: Callable[[Array, Array], float], scores: Array, y: Array, groups: Array, seed: int
) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile over resamples of whole requests.

    If all resamples give the same value, such as an AUC of 1, they cannot show an error that did not occur in
    the data. The interval is then Wilson's, of this share over as many requests as have the rarer label:
    separating five positives from any number of negatives is evidence from five requests.
    """
    import numpy

    chance = numpy.random.default_rng(seed)
    _, numbers = numpy.unique(groups, return_inverse=True)
    members = [numpy.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
    values = []
    for _ in range(RESAMPLES):
        rows = numpy.concatenate(
            [members[number] for number in chance.integers(len(members), size=len(members))]
        )
        if 0 < y[rows].sum() < len(rows):
            values.append(measure(scores[rows], y[rows]))
    if not values:
        return math.nan, math.nan
    if min(values) == max(values):
        rarer = min(len(numpy.unique(groups[y == label])) for label in (0, 1))
        return wilson(values[0] * rarer, rarer)
    low, high = numpy.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def figures_of(
    head: str,
    setting: str,
    scores: Array,
    y: Array,
    groups: Array,
    *,
    cut: float | None = None,
    seed: int = 0,
) -> list[Figure]:
    """Return the AUC, or with a cut on the scores recall, precision and the false-alarm rate.

    The AUC has an interval over resamples of whole requests, the others that of `evaluation.figures.share`.
    If all rows have the same label, the result is empty.
    """
    if not 0 < y.sum() < len(y):
        return []
    counts = setting, len(y), int(y.sum())
    if cut is None:
        return [Figure(head, "auc", *counts, auc(scores, y), *interval(auc, scores, y, groups, seed))]
    flagged = scores >= cut
    shares = {
        "recall": (y == 1, flagged),
        "precision": (flagged, y == 1),
        "false alarms": (y == 0, flagged),
    }
    figures = []
    for name, (among, so) in shares.items():
        if among.any():  # if nothing is flagged, there is no precision
            by_request: dict[str, list[float]] = {}
            for group, yes in zip(groups[among].tolist(), so[among].tolist(), strict=True):
                by_request.setdefault(str(group), []).append(float(yes))
            figures.append(Figure(head, name, *counts, *share(by_request)[:3]))
    return figures


def table(figures: Iterable[Mapping[str, Any]]) -> str:
    """Return figures (`Figure.rounded`) as a Markdown table; an AUC below 0.90 is in bold.

    The range next to a calibration error is that of a calibrated critic, and not a confidence interval.
    """
    rows = []
    for figure in figures:
        value = f"{figure['value']:.3f}"
        if figure["measure"] == "auc" and figure["value"] < 0.9:
            value = markdown.bold(value)
        ends = f"{figure['low']:.3f} to {figure['high']:.3f}"
        if figure["measure"] == "calibration error":
            ends = f"calibrated: {ends}"
        named = (figure[name] for name in ("head", "setting", "n", "positives", "measure"))
        rows.append((*named, value, ends))
    head = ("head", "measured on", "n", "positive", "measure", "value", "95 % interval")
    return markdown.table(head, rows)


class Curve(NamedTuple):
    """One line of a reliability plot."""

    label: str
    """The data measured."""
    probabilities: Array
    """The predicted probabilities."""
    y: Array
    """The true labels, 0 or 1."""


def plot_reliability(path: Path, panels: Mapping[str, tuple[float, Sequence[Curve]]]) -> None:
    """Plot the observed frequency against the probability, as SVG: one panel by name, with its threshold.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    size = (3.0 * len(panels), 3.2)
    with svg.canvas("a reliability plot", size, columns=len(panels)) as (figure, row):
        for axes, (title, (threshold, curves)) in zip(row, panels.items(), strict=True):
            axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
            for curve in curves:
                points = [(one.said, one.true) for one in calibrated.bins(curve.probabilities, curve.y)]
                name = svg.label(curve.label)
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
            axes.axvline(threshold, color="0.6", linewidth=1, linestyle=":")
            axes.set(title=svg.label(title), xlabel="probability read", xlim=(0, 1), ylim=(0, 1))
            axes.legend(frameon=False, fontsize=7)
        row[0].set_ylabel("share that came true")
        svg.write(path, figure)
