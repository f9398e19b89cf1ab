"""Draws plots as reproducible SVG, without reading or changing the caller's matplotlib settings.

    canvas   a figure and its axes, to draw on
    text     the figure as an SVG element, for a page
    write    the figure, as a file
    label    an untrusted text, made safe for a figure

Every text is drawn literally, including `$` and `_`; none is parsed as a formula. It stays text in the SVG,
shown in a font of the viewer. The same drawing gives the same bytes on every machine.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_graph.errors import MissingExtra
from trainers import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["canvas", "label", "text", "write"]

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cai_graph",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_HARMLESS = (
    # The viewer's font is used, not the one that the text was measured with.
    "Glyph .* missing from",
    # If labels leave no room for the axes, the axes keep their size, and the figure grows around the labels.
    "constrained_layout not applied",
)
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not allow: control characters, and halves of surrogate pairs."""


@contextmanager
def canvas(
    what: str, size: tuple[float, float], *, rows: int = 1, columns: int = 1, sharex: bool = False
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure and its axes, row by row, to be drawn on and saved in the body.

    Args:
        what: name of the drawing, for the error.
        size: width and height in inches; the figure grows if its labels need more.
        rows: rows of axes.
        columns: axes in a row.
        sharex: whether all axes share one x axis.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(what, "matplotlib", "train") from error
    with style.context(["default", _SETTINGS]), warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        figure = Figure(figsize=size, layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False, sharex=sharex).flat)


def text(figure: Figure) -> str:
    """Return a figure of `canvas` as an SVG element, without XML declaration and doctype."""
    document = _document(figure)
    return document[document.index("<svg") :]


def write(path: Path, figure: Figure) -> None:
    """Write a figure of `canvas` to a file, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    atomic.write(path, _document(figure))


def _document(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    return out.getvalue()


def label(text: str) -> str:
    """Return a text with a replacement character for each character that SVG does not allow.

    >>> label("cost $x_{$ \\x00")
    'cost $x_{$ \ufffd'
    """
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
