"""What the margins of a reward model are worth: how often they are right, and how far they may be believed.

A margin is the reward of the chosen answer less that of the rejected one; sigma(margin) is the probability,
by the model, that chosen is better (Bradley and Terry 1952). A label may be soft: where people prefer chosen
with p = 0.6, a model that says 0.6 is calibrated, and one that says 0.99 is not.

    measured     accuracy with its interval, calibration error and loss, of all pairs and by group
    plot         how often each confidence came true, as SVG
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
"""The group of all pairs."""


class Pair(NamedTuple):
    """One pair that the model was not trained on."""

    margin: float
    """Reward of the chosen answer less that of the rejected one."""
    p_chosen: float
    """P(chosen is better) by its label, from 0 to 1."""
    group: str
    """What its figures are kept apart by, such as its source."""
    prompt: str
    """What stands for its prompt: pairs of one prompt say less than as many of others."""


class Reliability(NamedTuple):
    """What margins are worth on one group of pairs."""

    pairs: int
    """How many."""
    prompts: int
    """How many prompts they have."""
    accuracy: float
    """Share in which the model prefers the side that the label prefers, of the pairs of which it prefers one;
    equal rewards are a miss. NaN where no label prefers a side."""
    accuracy_low: float
    """Lower end of its 95 % interval over prompts; see `evaluation.figures.share`."""
    accuracy_high: float
    """Upper end."""
    ece: float
    """Expected calibration error of sigma(margin), in [0, 1]: the mean distance of confidence and outcome
    over bins of about as many pairs each (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    ece_calibrated_low: float
    """Lower end between which that of a calibrated model lies on as many pairs, in 95 of 100; an `ece` in
    between may be chance."""
    ece_calibrated_high: float
    """Upper end."""
    loss: float
    """Mean cross-entropy of sigma(margin) and the label, in nats; that of no knowledge is log 2 = 0.693."""


def measured(pairs: Sequence[Pair]) -> dict[str, Reliability]:
    """Return the figures of all pairs, as `ALL`, and of each group where there are several.

    Raises:
        DataError: there is no pair, or a margin is not finite; names the first.
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
    """Return pairs by the confidence of the model, in at most `count` bins of about as many pairs each."""
    return calibrated.bins(*_confidences(pairs), count)


def _confidences(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Return the model's probability of the side that it prefers, from 0.5 to 1, and that by the label.

    So it does not matter which side is called chosen. A model that prefers neither is half right.
    """
    said = [_sigma(abs(pair.margin)) for pair in pairs]
    true = [
        0.5 if not pair.margin else pair.p_chosen if pair.margin > 0 else 1 - pair.p_chosen for pair in pairs
    ]
    return said, true


def figures(found: dict[str, Reliability]) -> dict[str, float]:
    """Return figures under flat names, as a manifest holds them: `accuracy`, `harmless/accuracy`, …"""
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
    """Draw, as SVG, how often each confidence came true; bars are 95 % intervals of as many prompts.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: it cannot be written there.
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
        # Named here, for matplotlib leaves out a line whose own label begins with `_`.
        axes.legend(lines, ["calibrated", *map(svg.label, groups)], frameon=False, fontsize=7)
        svg.write(path, figure)


def _groups(pairs: Sequence[Pair]) -> list[str]:
    found = sorted({pair.group for pair in pairs})
    return found if len(found) > 1 else []


def _interval(one: Bin) -> tuple[float, float]:
    """Return the 95 % interval of a bin's share that came true."""
    return wilson(round(one.true * one.cases), one.cases)
