"""The README's blocks run as they stand, and its commands exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from cli_support import cai
from replies import verdicts
from repository import ROOT, fenced, read_page
from wire import role, serving

from cai_graph.constitution import load
from trainers.reward import Config

README = read_page("README.md")


def test_python_blocks_run_in_order_behind_the_real_openai_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fine = verdicts(ids=[principle.id for principle in load("balanced")])
    script = lambda body: fine if role(body) == "critique" else "Soap, and patience."  # noqa: E731
    with serving(script) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        names: dict[str, object] = {}
        for block in fenced(README, "python"):
            exec(block, names)
    said = capsys.readouterr().out
    assert "'outcome': 'KEPT'" in said
    assert "Is it safe to mix bleach and vinegar?" in said
    assert said.count("Soap, and patience.") == 2
    assert (tmp_path / "cai.db").exists()


def test_every_command_of_the_readme_exists(tmp_path: Path) -> None:
    commands = [
        shlex.split(line, comments=True)
        for block in fenced(README, "sh")
        for line in block.splitlines()
        if line.startswith("cai ")
    ]
    assert commands
    for command in commands:
        words = [word for word in command[1:] if re.fullmatch(r"[a-z]+", word)]
        shown = cai(tmp_path, *words[:2], "--help").stdout
        options = [word for word in command if word.startswith("-")]
        assert all(option in shown for option in options), command


def test_the_reward_model_is_trained_on_what_was_built_and_by_settings_that_exist() -> None:
    lines = [line for block in fenced(README, "sh") for line in block.splitlines()]
    (trained,) = [line for line in lines if line.startswith("cai train reward ")]
    (built,) = [line for line in lines if line.startswith("cai dataset build ")]
    said = dict(pair.split("=") for pair in shlex.split(trained) if "=" in pair)
    assert said.keys() <= {field.name for field in fields(Config)}
    assert f"-o {said['data']} " in built


def test_files_that_the_readme_names_exist() -> None:
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
