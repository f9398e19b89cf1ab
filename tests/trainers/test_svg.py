"""Plots: texts are drawn as they stand, equal drawings are equal bytes, nothing of the caller changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy
import pytest

from cai_graph.errors import MissingExtra
from trainers import svg
from trainers.critic.figures import Curve, plot_reliability
from trainers.evaluation.figures import Estimate, Figure
from trainers.evaluation.plots import svgs
from trainers.evaluation.summary import Pareto, Summary
from trainers.reward import reliability
from trainers.watch import Reading
from trainers.watch.plot import plot as plot_watch

HOSTILE = ["cost $x_{$ a", "$x$ \\$y", "_own", "giá trị, 费用", "<b>&amp;</b>"]


def texts(document: str) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(document).iter() if "text" in one.tag]


def of_margins(path: Path, names: list[str]) -> None:
    pairs = [
        reliability.Pair(0.1 * n - 2, float(n % 3 > 0), names[n % len(names)], str(n)) for n in range(60)
    ]
    reliability.plot(path, pairs, names[0])


def of_heads(path: Path, names: list[str]) -> None:
    chance = numpy.linspace(0, 1, 20)
    panels = {name: (0.5, [Curve(f"curve {name}", chance, chance > 0.4)]) for name in names}
    plot_reliability(path, panels)


def of_evaluation(path: Path, names: list[str]) -> None:
    one = Estimate(0.5, 0.4, 0.6, 10)
    summary = Summary(
        subjects=tuple(names),
        figures=tuple(
            Figure(subject=name, suite="harmlessness", measure="harmless", by="judge", estimate=one)
            for name in names
        ),
        fronts=(Pareto("judge", "judge", dict.fromkeys(names, (one, one)), names[:1]),),
        notes=(),
    )
    bars, front = svgs(summary).values()
    assert [text for text in texts(front) if "(n = 10, 10)" in text] == [f"{n} (n = 10, 10)" for n in names]
    path.write_text(bars)


@pytest.mark.parametrize("draw", [of_margins, of_heads, of_evaluation])
def test_a_name_is_drawn_as_it_stands(tmp_path: Path, draw: Callable[[Path, list[str]], None]) -> None:
    draw(tmp_path / "one.svg", HOSTILE)

    assert set(HOSTILE) <= set(texts((tmp_path / "one.svg").read_text()))


def of_a_run(path: Path, names: list[str]) -> None:
    plot_watch([Reading(step=n, kl=n / 9, entropy=1.0, reward=n / 7, heldout=n % 5) for n in range(9)], path)


@pytest.mark.parametrize("draw", [of_margins, of_heads, of_evaluation, of_a_run])
def test_the_same_figures_give_the_same_bytes_whatever_the_caller_set(
    tmp_path: Path, draw: Callable[[Path, list[str]], None]
) -> None:
    draw(tmp_path / "one.svg", ["a", "b"])
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "svg.fonttype": "path"}):
        draw(tmp_path / "two.svg", ["a", "b"])

    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_characters_that_no_svg_can_hold_are_marked(tmp_path: Path) -> None:
    names = ["half \ud800", "bell \x07"]
    of_margins(tmp_path / "one.svg", names)

    assert {"half \ufffd", "bell \ufffd"} <= set(texts((tmp_path / "one.svg").read_text()))


def test_labels_that_leave_no_room_make_the_figure_grow() -> None:
    with svg.canvas("a plot", (4, 1)) as (figure, (axes,)):
        axes.barh([0], [1])
        axes.set_yticks([0], ["费" * 60])
        drawn = svg.text(figure)

    assert float(ElementTree.fromstring(drawn).attrib["width"].removesuffix("pt")) > 4 * 72


def test_a_plot_leaves_the_callers_matplotlib_as_it_is() -> None:
    code = """
import sys, matplotlib
before = matplotlib.rcParams.copy()
from trainers import svg
with svg.canvas("a plot", (2, 2)) as (figure, (axes,)):
    svg.text(figure)
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(MissingExtra, match=r"a plot needs matplotlib"), svg.canvas("a plot", (2, 2)):
        pass
