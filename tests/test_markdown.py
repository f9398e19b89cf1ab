"""Markdown of cards: what users and models wrote stays text."""

from __future__ import annotations

from trainers.markdown import table


def test_a_text_opens_no_column_no_line_and_no_tag() -> None:
    rows = [("a|b\nc", "<script>"), ("none", None), ("list", [1, "x|y"])]
    assert table(("name", "value"), rows).splitlines() == [
        "| name | value |",
        "|---|---|",
        r"| a\|b c | &lt;script> |",
        "| none | null |",
        r'| list | [1, "x\|y"] |',
    ]


def test_a_table_without_rows_keeps_its_head() -> None:
    assert table(("name",), []) == "| name |\n|---|"
