"""Builds Markdown for cards; texts of users and models are escaped, so that they are shown as plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["bold", "cell", "table"]

_SIGNS = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|<")
"""Characters that may open or close emphasis, code, a link, an image, a column, a formula, an entity or a
tag. An underscore within a word has no effect in Markdown."""
_WRITTEN = {"<": "&lt;", "&": "&amp;"}


class _Marked(str):
    """A cell that is Markdown already."""


def bold(value: Any) -> str:
    """Return a cell in bold; see `cell`."""
    return _Marked(f"**{cell(value)}**")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table: its head, the separator line and its rows, one line each; see `cell`."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(head), "|---" * len(head) + "|", *(line(map(cell, row)) for row in rows)])


def cell(value: Any) -> str:
    """Return a text, or another value as JSON, on one line and escaped: nothing in it is read as a column, a
    tag, an image, emphasis or a link with other text. A bare URL stays as it is, and may be shown as a link.
    """
    if isinstance(value, _Marked):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return _SIGNS.sub(lambda sign: _WRITTEN.get(sign[0], f"\\{sign[0]}"), " ".join(text.split()))
