"""Draws the figures of an evaluation as SVG, for a page without scripts or external resources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers import svg
from trainers.evaluation.figures import Estimate, Figure
from trainers.evaluation.refusals import Compliance
from trainers.evaluation.summary import Pareto, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["svgs"]

_BARS = ("harmless", "helpful", Compliance.FULL_REFUSAL.value, "Elo")
_CAPTIONS = {
    "harmless": "Harmlessness on red-team prompts",
    "helpful": "Helpfulness",
    Compliance.FULL_REFUSAL.value: "Full refusals of safe prompts that look unsafe",
    "Elo": "Elo, the average subject at 1000",
}
_WHAT = "the plots of an evaluation"
_COLOUR, _FRONT = "#7aa6c2", "#b3541e"


def svgs(summary: Summary) -> dict[str, str]:
    """Return the plots by caption: each measure over the subjects, and each Pareto front.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    drawn: dict[str, str] = {}
    for measure in _BARS:
        found: dict[tuple[str, str], list[Figure]] = {}
        for one in summary.figures:
            if one.measure == measure and one.estimate.n:
                found.setdefault((one.suite, one.by), []).append(one)
        for (suite, by), figures in found.items():
            with svg.canvas(_WHAT, (8, 0.9 + 0.4 * len(figures))) as (figure, (axes,)):
                _bars(axes, figures)
                caption = f"{_CAPTIONS[measure]} ({suite}, by {by}), with 95 % intervals."
                drawn[caption] = svg.text(figure)
    for pareto in summary.fronts:
        with svg.canvas(_WHAT, (8, 5)) as (figure, (axes,)):
            _front(axes, pareto)
            caption = (
                f"Harmlessness (by {pareto.harmless_by}) against helpfulness (by {pareto.helpful_by}), with "
                "95 % intervals. The line joins what no other subject surpasses in both."
            )
            drawn[caption] = svg.text(figure)
    return drawn


def _bars(axes: Axes, figures: list[Figure]) -> None:
    names = [_label(figure.subject) for figure in figures]
    values = [figure.estimate.value for figure in figures]
    whiskers = list(zip(*(_whiskers(figure.estimate) for figure in figures), strict=True))
    axes.errorbar(values, range(len(names)), xerr=whiskers, fmt="o", color=_COLOUR, capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="0.92")


def _front(axes: Axes, pareto: Pareto) -> None:
    for name, (x, y) in pareto.points.items():
        on_front = name in pareto.front
        (left, right), (down, up) = _whiskers(x), _whiskers(y)
        axes.errorbar(
            [x.value],
            [y.value],
            xerr=[[left], [right]],
            yerr=[[down], [up]],
            fmt="o",
            color=_FRONT if on_front else _COLOUR,
            elinewidth=0.8,
        )
        axes.annotate(
            f"{_label(name)} (n = {x.n}, {y.n})",
            (x.value, y.value),
            xytext=(6, 6),
            textcoords="offset points",
        )
    line = [pareto.points[name] for name in pareto.front]
    axes.plot([x.value for x, _ in line], [y.value for _, y in line], color=_FRONT, linewidth=1, zorder=0)
    axes.set(xlabel="helpful", ylabel="harmless")


def _whiskers(found: Estimate) -> tuple[float, float]:
    """Return the lengths of the interval below and above the value; zeros if there is no interval."""
    low, high = found.value - found.low, found.high - found.value
    return (max(low, 0.0), max(high, 0.0)) if low + high < float("inf") else (0.0, 0.0)


def _label(name: str) -> str:
    return svg.label(name[-50:])
