"""docs/cli.md names each variable of the environment that the packages read."""

from __future__ import annotations

import re

from repository import ROOT, read_page

OF_LIBRARIES = {"LANGSMITH_TRACING", "PGPASSWORD", "RAY_ADDRESS"}
"""Read by what we stand on, and named for what they do here."""

SECTION = read_page("cli.md").partition("\n## Environment, files and network\n")[2].partition("\n## ")[0]


def read() -> set[str]:
    """Return the names that are read, and those that stand in the code as names of providers' keys."""
    found: set[str] = set()
    for package in ("cai_graph", "trainers"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            found |= set(re.findall(r"(?:environ\.get\(|environ\[|getenv\()\s*\"(\w+)\"", text))
            found |= set(re.findall(r"\"([A-Z]+_API_KEY)\"", text))
    return found


def test_every_variable_that_is_read_stands_in_the_table() -> None:
    said = {
        name
        for first in re.findall(r"^\| (`.*?) \|", SECTION, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", first)
    }
    assert {"CAI_CACHE", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "HF_HUB_OFFLINE"} <= read()
    assert said == read() | OF_LIBRARIES
