"""Measures how reliable the margins of a reward model are on held-out pairs: accuracy and calibration.

A margin is the reward of the chosen answer minus that of the rejected one; sigma(margin) is the model's
probability that chosen is better (Bradley and Terry 1952). A label may be soft: if people prefer chosen
with p = 0.6, a model that gives 0.6 is calibrated, and one that gives 0.99 is not.

    measured     accuracy with its interval, calibration error and loss, of all pairs and by group
    plot         observed frequency against confidence, as SVG
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cai_graph.errors import DataError
from cai_graph.intervals import wilson
from trainers import calibrated, svg
from trainers.calibrated import BINS, Bin
from trainers.evaluation.figures import share

__all__ = ["ALL", "Pair", "Reliability", "bins", "figures", "measured", "plot"]

ALL = "all"
"""Name of the group of all pairs."""


class Pair(NamedTuple):
    """One pair that the model was not trained on."""

    margin: float
    """Reward of the chosen answer minus that of the rejected one."""
    p_chosen: float
    """P(chosen is better) according to its label, from 0 to 1."""
    group: str
    """Group that its figures are reported under, such as its source."""
    prompt: str
    """Identifier of its prompt: pairs of one prompt are not independent, so intervals are over prompts."""


class Reliability(NamedTuple):
    """Reliability figures of one group of pairs."""

    pairs: int
    """Number of pairs."""
    prompts: int
    """Number of distinct prompts."""
    accuracy: float
    """Share of pairs whose higher reward is on the side that the label prefers, among pairs whose label
    prefers a side; equal rewards count as a miss. NaN if no label prefers a side."""
    accuracy_low: float
    """Lower end of its 95 % interval over prompts; see `evaluation.figures.share`."""
    accuracy_high: float
    """Upper end."""
    ece: float
    """Expected calibration error of sigma(margin), in [0, 1]: the mean distance of confidence and outcome
    over bins of about equally many pairs (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    ece_calibrated_low: float
    """Lower end of the range that contains the ECE of a calibrated model on as many pairs 95 times in 100; an
    `ece` in this range may be due to chance."""
    ece_calibrated_high: float
    """Upper end."""
    loss: float
    """Mean cross-entropy of sigma(margin) and the label, in nats; random guessing has log 2 = 0.693."""


def measured(pairs: Sequence[Pair]) -> dict[str, Reliability]:
    """Return the figures of all pairs, as `ALL`, and of each group if there are several.

    Raises:
        DataError: there is no pair, or a margin is not finite; the message names the first.
    """
    if not pairs:
        raise DataError("no pair to measure a reward model on; keep some out of training")
    for number, pair in enumerate(pairs):
        if not math.isfinite(pair.margin):
            raise DataError(
                f"pair {number} ({pair.group}): its margin is {pair.margin}; the weights are broken"
            )
    groups = sorted({pair.group for pair in pairs})
    found = {ALL: _measured(pairs)}
    if len(groups) > 1:
        found |= {group: _measured([pair for pair in pairs if pair.group == group]) for group in groups}
    return found


def _measured(pairs: Sequence[Pair]) -> Reliability:
    decided = [pair for pair in pairs if pair.p_chosen != 0.5]
    right: dict[str, list[float]] = {}
    for pair in decided:
        right.setdefault(pair.prompt, []).append(float(pair.margin * (pair.p_chosen - 0.5) > 0))
    said, true = _confidences(pairs)
    return Reliability(
        len(pairs),
        len({pair.prompt for pair in pairs}),
        *(share(right)[:3] if decided else (math.nan, 0.0, 1.0)),
        calibrated.error(said, true),
        *calibrated.by_chance(said),
        math.fsum(map(_cross_entropy, pairs)) / len(pairs),
    )


def bins(pairs: Sequence[Pair], count: int = BINS) -> list[Bin]:
    """Group pairs by the model's confidence, into at most `count` bins of about equally many pairs."""
    return calibrated.bins(*_confidences(pairs), count)


def _confidences(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Return the model's probability of the side it prefers, from 0.5 to 1, and the label's for that side.

    So it does not matter which side is called chosen. If a model prefers neither side, both are 0.5.
    """
    said = [_sigma(abs(pair.margin)) for pair in pairs]
    true = [
        0.5 if not pair.margin else pair.p_chosen if pair.margin > 0 else 1 - pair.p_chosen for pair in pairs
    ]
    return said, true


def figures(found: dict[str, Reliability]) -> dict[str, float]:
    """Return figures under flat names, as a manifest stores them: `accuracy`, `harmless/accuracy`, …"""
    return {
        name if group == ALL else f"{group}/{name}": float(value)
        for group, one in found.items()
        for name, value in one._asdict().items()
    }


def _cross_entropy(pair: Pair) -> float:
    return pair.p_chosen * _softplus(-pair.margin) + (1 - pair.p_chosen) * _softplus(pair.margin)


def _softplus(x: float) -> float:
    """Return -log sigma(-x), for any x."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigma(x: float) -> float:
    """Return the logistic function of x >= 0."""
    return 1 / (1 + math.exp(-x))


def plot(path: Path, pairs: Sequence[Pair], title: str) -> None:
    """Plot the observed frequency against the confidence, as SVG; bars are 95 % intervals.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    with svg.canvas("a reliability plot", (4.2, 4)) as (figure, (axes,)):
        lines: list[Any] = axes.plot([0.5, 1], [0.5, 1], color="0.8", linewidth=1)
        groups = {ALL: pairs} | {name: [p for p in pairs if p.group == name] for name in _groups(pairs)}
        for name, part in groups.items():
            found = bins(part, BINS if name == ALL else BINS // 2)
            x, y = [one.said for one in found], [one.true for one in found]
            ends = [_interval(one) for one in found]
            below = [max(0.0, right - low) for right, (low, _) in zip(y, ends, strict=True)]
            above = [max(0.0, high - right) for right, (_, high) in zip(y, ends, strict=True)]
            lines.append(
                axes.errorbar(x, y, (below, above), marker="o", markersize=3, linewidth=1, elinewidth=0.5)
            )
        axes.set(xlabel="confidence", ylabel="share that came true", xlim=(0.5, 1), ylim=(0, 1))
        axes.set_title(svg.label(title))
        # Labels are passed here, because matplotlib omits a line whose own label begins with `_`.
        axes.legend(lines, ["calibrated", *map(svg.label, groups)], frameon=False, fontsize=7)
        svg.write(path, figure)


def _groups(pairs: Sequence[Pair]) -> list[str]:
    found = sorted({pair.group for pair in pairs})
    return found if len(found) > 1 else []


def _interval(one: Bin) -> tuple[float, float]:
    """Return the 95 % interval of a bin's observed frequency."""
    return wilson(round(one.true * one.cases), one.cases)
