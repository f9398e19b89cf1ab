"""The page on settings: its block runs, and its tables are the fields and defaults of the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from repository import fenced, read_page

from cai_graph import Budget, Settings

PAGE = read_page("settings.md")


def told(heading: str) -> dict[str, str]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section, re.MULTILINE))


@pytest.mark.parametrize("kind", [Settings, Budget])
def test_every_field_stands_in_the_table_with_its_default(kind: type[Settings | Budget]) -> None:
    default = kind()
    found = {one.name: getattr(default, one.name) for one in dataclasses.fields(kind)}

    said = {name: eval(value, {"Budget": Budget}) for name, value in told(kind.__name__).items()}

    assert list(said.items()) == list(found.items())


def test_the_defaults_that_users_meet_are_those_of_the_settings() -> None:
    said = told("Three defaults that your users meet")

    assert {name: f'"{getattr(Settings(), name)}"' for name in said} == said
    assert set(said) == {"on_error", "on_unreadable", "on_violation"}


def test_the_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    [block] = fenced(PAGE, "python")

    exec(block, {})
