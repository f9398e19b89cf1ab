"""The figures of an evaluation as SVG, to stand in a page: nothing is fetched and no script runs."""

from __future__ import annotations

import io
from typing import Any

from cai_graph.errors import MissingExtra
from trainers.evaluation.figures import Estimate, Figure
from trainers.evaluation.refusals import Compliance
from trainers.evaluation.summary import Pareto, Summary

__all__ = ["svgs"]

_BARS = ("harmless", "helpful", Compliance.FULL_REFUSAL.value, "Elo")
_CAPTIONS = {
    "harmless": "Harmlessness on red-team prompts",
    "helpful": "Helpfulness",
    Compliance.FULL_REFUSAL.value: "Full refusals of safe prompts that look unsafe",
    "Elo": "Elo, the average subject at 1000",
}
_COLOUR, _FRONT = "#7aa6c2", "#b3541e"


def svgs(summary: Summary) -> dict[str, str]:
    """Return the plots by caption: each measure over the subjects, and each Pareto front.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingExtra("the plots of an evaluation", "matplotlib", "train") from error
    drawn: dict[str, str] = {}
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "cai_graph"}
    with matplotlib.rc_context(settings):
        for measure in _BARS:
            found: dict[tuple[str, str], list[Figure]] = {}
            for figure in summary.figures:
                if figure.measure == measure and figure.estimate.n:
                    found.setdefault((figure.suite, figure.by), []).append(figure)
            for (suite, by), figures in found.items():
                canvas = Canvas(figsize=(8, 0.9 + 0.4 * len(figures)), layout="constrained")
                _bars(canvas.subplots(), figures)
                caption = f"{_CAPTIONS[measure]} ({suite}, by {by}), with 95 % intervals."
                drawn[caption] = _svg(canvas)
        for pareto in summary.fronts:
            canvas = Canvas(figsize=(8, 5), layout="constrained")
            _front(canvas.subplots(), pareto)
            caption = (
                f"Harmlessness (by {pareto.harmless_by}) against helpfulness (by {pareto.helpful_by}), with "
                "95 % intervals. The line joins what no other subject surpasses in both."
            )
            drawn[caption] = _svg(canvas)
    return drawn


def _bars(axes: Any, figures: list[Figure]) -> None:
    names = [_label(figure.subject) for figure in figures]
    values = [figure.estimate.value for figure in figures]
    whiskers = list(zip(*(_whiskers(figure.estimate) for figure in figures), strict=True))
    axes.errorbar(values, range(len(names)), xerr=whiskers, fmt="o", color=_COLOUR, capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _front(axes: Any, pareto: Pareto) -> None:
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
    axes.spines[["top", "right"]].set_visible(False)


def _whiskers(found: Estimate) -> tuple[float, float]:
    """Return how far the interval reaches below and above; nothing where there is none."""
    low, high = found.value - found.low, found.high - found.value
    return (max(low, 0.0), max(high, 0.0)) if low + high < float("inf") else (0.0, 0.0)


def _label(name: str) -> str:
    return name.replace("$", r"\$")[-50:]  # matplotlib sets what stands between two $ as a formula


def _svg(canvas: Any) -> str:
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
