"""Markdown for cards: texts of users and models stand in it as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["cell", "table"]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table, a line each for its head, the rule below it and its rows; see `cell`."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(head), "|---" * len(head) + "|", *(line(map(cell, row)) for row in rows)])


def cell(value: Any) -> str:
    """Return a text, or another value as JSON, on one line in which nothing opens a column or a tag."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
