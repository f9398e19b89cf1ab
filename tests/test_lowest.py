"""The lowest versions that pyproject.toml allows: the wheel does its main job with them.

The other tests run with those of constraints.txt. `make soak` installs these, from the index, into an
environment of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from replies import verdicts
from repository import ROOT, fenced, read_page
from wire import role, serving

from cai_graph.constitution import load

pytestmark = [
    pytest.mark.skipif(not os.environ.get("CAI_LOWEST"), reason="CAI_LOWEST=1 installs the lowest versions"),
    pytest.mark.timeout(1200),
]

EXTRAS = ("openai", "anthropic", "postgres", "serve")
"""The first is what the README's blocks need; the others can at least be installed with it."""


def lowest() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    return [
        f"{required.name}=={bound.version}"
        for required in map(Requirement, dict.fromkeys([*project["dependencies"], *extras]))
        for bound in required.specifier
        if bound.operator == ">="
    ]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `python` and `cai` of an environment are that has the wheel and the lowest of what it needs."""
    folder = tmp_path_factory.mktemp("lowest")
    run = lambda *command: subprocess.run(list(map(str, command)), check=True, cwd=folder)  # noqa: E731
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    run(sys.executable, "-m", "venv", folder / "venv")
    (wheel,) = folder.glob("*.whl")
    run(folder / "venv/bin/pip", "install", "--quiet", f"{wheel}[{','.join(EXTRAS)}]", *lowest())
    return folder / "venv" / "bin"


def test_the_readme_runs_with_the_lowest_versions(programs: Path, tmp_path: Path) -> None:
    fine = verdicts(ids=[principle.id for principle in load("balanced")])

    def said_by(*command: str) -> str:
        done = subprocess.run(
            [programs / command[0], *command[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": "", "OPENAI_API_KEY": "unused", "OPENAI_BASE_URL": server.url},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "LOST" not in done.stderr
        return done.stdout

    with serving(lambda body: fine if role(body) == "critique" else "Soap, and patience.") as server:
        blocks = "\n".join(fenced(read_page("README.md"), "python"))
        assert "'outcome': 'KEPT'" in said_by("python", "-c", blocks)
        assert "Soap, and patience." in said_by(
            "cai", "ask", "Hi?", "--model", server.spec, "--critic", server.spec
        )
    assert "Hi?" in said_by("cai", "log", "list")
