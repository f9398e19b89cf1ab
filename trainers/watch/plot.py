"""Plots the watch's readings of a run as one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainers import svg
from trainers.watch.figures import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

_PANELS: list[tuple[str, tuple[str, ...]]] = [
    ("held-out score", ("heldout",)),
    ("reward", ("reward",)),
    ("agreement of reward and held-out score", ("agreement",)),
    ("KL, nats an answer; entropy, nats a token", ("kl", "entropy")),
    ("shares", ("refusal_rate", "boilerplate")),
    ("correlation of reward and length; disagreement", ("length_correlation", "disagreement")),
]
"""The panels: title, and the fields of a Reading that it shows."""


def plot(readings: Sequence[Reading], path: Path) -> None:
    """Plot the readings of a run into one SVG file.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    with svg.canvas("the plot of the watch", (11, 9), rows=3, columns=2, sharex=True) as (figure, panels):
        for axes, (title, names) in zip(panels, _PANELS, strict=True):
            axes.set_title(title, fontsize=10)
            for name in names:
                points = [(one.step, value) for one in readings if (value := getattr(one, name)) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
            if len(names) > 1 and axes.lines:
                axes.legend(frameon=False, fontsize=8)
            _mark(axes, names[0], readings)
        for axes in panels[-2:]:
            axes.set_xlabel("step")
        svg.write(path, figure)


def _mark(axes: Axes, name: str, readings: Sequence[Reading]) -> None:
    """Draw the noise bands of held-out score and agreement, and a line at the best step."""
    import numpy

    seen = [one for one in readings if one.heldout is not None]
    if not seen:
        return
    steps = [one.step for one in seen]
    if name == "heldout":
        best = max(seen, key=lambda one: one.heldout or 0.0)
        axes.axvline(best.step, color="#7a8794", linewidth=0.8, linestyle=":")
        values = numpy.array([one.heldout for one in seen], float)
        noise = numpy.array([one.heldout_noise or 0.0 for one in seen])
        axes.fill_between(steps, values - noise, values + noise, alpha=0.15)
    elif name == "agreement":
        noise = numpy.array([one.agreement_noise or 0.0 for one in seen])
        axes.fill_between(steps, -noise, noise, alpha=0.15, color="#7a8794")
