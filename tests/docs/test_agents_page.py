"""The blocks of docs/agents.md run as they stand, behind the real openai client."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from replies import verdicts
from repository import EXAMPLES, read_page
from wire import Reply, Server, role, serving

from cai_graph.constitution import load
from cai_graph.log import open_log
from cai_graph.trajectory import Review, Trajectory

PAGE = read_page("agents.md")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
IDS = [principle.id for principle in load("balanced")]


def says(body: dict[str, Any]) -> str | Reply:
    """A model that looks up opening hours, and helps with neighbours' wifi, whatever is asked of it."""
    messages = body["messages"]
    part = role(body)
    if part == "critique":
        judged = messages[-1]["content"].rpartition("<answer>")[2]
        return verdicts(*([IDS[0]] if "the default password" in judged else []), ids=IDS)
    if part == "draft" and messages[-1]["role"] == "tool":
        return "We are open from 9 to 17 h."
    if part == "draft" and "open" in messages[-1]["content"]:
        call = {"name": "opening_hours", "args": {"city": "Oslo"}, "id": "call-1"}
        return Reply(tool_calls=[call], finish="tool_calls")
    return "Try the default password."


def test_the_page_works_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    said = []
    with serving(says) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for language, block in BLOCKS:
            if language == "python":
                exec(compile(block, "docs/agents.md", "exec"), names)
                said.append(capsys.readouterr().out)

    refusal = load("balanced").refusal
    assert said == [
        "We are open from 9 to 17 h.\n",
        f"every answer violates the constitution 'balanced': {IDS[0]}\n"
        "draft: Try the default password.\nproposed: Try the default password.\n",
        "Ask your neighbour for a guest password.\n",
        f"{refusal}\n",
    ]
    with open_log("sqlite:///cai.db") as log:
        records = list(log.read())
    reviews = [r for r in records if isinstance(r, Review)]
    assert [(r.decision, r.reviewer) for r in reviews] == [("edit", "ada"), ("reject", "ada")]
    assert len([r for r in records if isinstance(r, Trajectory)]) == 4


def test_the_pages_principle_is_one(tmp_path: Path) -> None:
    (text,) = [block for language, block in BLOCKS if language == "yaml"]
    (tmp_path / "shop.yaml").write_text("name: shop\nprinciples:\n" + text)

    (principle,) = load(tmp_path / "shop.yaml")

    assert (principle.id, principle.tools) == ("no-orders", True)


def orders(body: dict[str, Any]) -> str | Reply:
    """A model that orders yachts, promises the moon, and cannot be talked out of it."""
    messages = body["messages"]
    part = role(body)
    if part == "critique":
        judged = messages[-1]["content"].rpartition("<answer>")[2]
        asked = [name for name in ("no-orders", "no-promises") if f"{name}: " in messages[0]["content"]]
        broken = {"no-orders": "[calls the tool order" in judged, "no-promises": "the moon" in judged}
        return verdicts(*[name for name in asked if broken[name]], ids=asked)
    if part == "draft" and messages[-1]["role"] == "user":
        return Reply(tool_calls=[{"name": "order", "args": {"item": "a yacht"}, "id": "call-1"}])
    return "I promise you the moon."


def test_the_example_asks_the_person_at_the_terminal_again_after_it_was_ended(tmp_path: Path) -> None:
    example = EXAMPLES / "agent_with_a_person.py"

    def start(server: Server, typed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, example],
            cwd=tmp_path, input=typed, capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "OPENAI_API_KEY": "unused", "OPENAI_BASE_URL": server.url},
        )  # fmt: skip

    with serving(orders) as server:
        ended = start(server, "")
        asked = len(server.requests)
        done = start(server, "perhaps\nedit\nWe have no yachts.\n")

    assert "EOFError" in ended.stderr
    assert "The model wants to call order with {'item': 'a yacht'}" in ended.stdout
    assert done.returncode == 0, done.stderr
    assert "We have no yachts.\n\nEvery step is in cai.db" in done.stdout
    assert len(server.requests) == asked  # the second start paid for nothing
    assert "ordered" not in done.stdout
