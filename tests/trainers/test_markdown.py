"""Markdown of cards: what users and models wrote stays text."""

from __future__ import annotations

import html

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainers.markdown import bold, cell, table


def test_a_text_opens_no_column_no_line_and_no_tag() -> None:
    rows = [("a|b\nc", "<script>"), ("none", None), ("list", [1, "x|y"])]
    assert table(("name", "value"), rows).splitlines() == [
        "| name | value |",
        "|---|---|",
        r"| a\|b c | &lt;script> |",
        "| none | null |",
        r'| list | \[1, "x\|y"\] |',
    ]


def test_a_table_without_rows_keeps_its_head() -> None:
    assert table(("name",), []) == "| name |\n|---|"


@given(st.text("\\`*_[](){}!|~$&<>#;:ab1 -\n", min_size=1))
@example("![x](http://t/x.png) **bold** `c` [l](javascript:alert) _e_ &lt; a\\|b")
def test_a_text_is_read_as_it_stands(text: str) -> None:
    """By the parser that rich brings along, in a table."""
    markdown_it = pytest.importorskip("markdown_it")
    reader = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])

    read = reader.render(table(("name", "next"), [(text, "end")]))

    (_, name, end) = read.split("<td>")
    assert html.unescape(name.removesuffix("</td>\n")) == " ".join(text.split())
    assert end.startswith("end</td>")


def test_what_a_card_puts_in_bold_stays_bold_and_its_text_a_text() -> None:
    assert table(("value",), [(bold("0.8*"),)]).splitlines()[-1] == r"| **0.8\*** |"
    assert cell("no_harm _x_") == r"no_harm \_x\_"
