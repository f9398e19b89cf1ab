"""`cai` for tests: run in this process or in one of its own; its commands, and what it logged."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from cai_graph import cli, open_log
from cai_graph.cli import console
from cai_graph.constitution import load
from cai_graph.trajectory import Trajectory

BALANCED = load("balanced")
OPTIONAL = (
    "accelerate",
    "anthropic",
    "datasets",
    "fastapi",
    "gguf",
    "langchain",
    "langchain_anthropic",
    "langchain_openai",
    "matplotlib",
    "numpy",
    "openai",
    "peft",
    "psycopg",
    "py3langid",
    "pyarrow",
    "ray",
    "rensa",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
    "trl",
    "uvicorn",
    "xllamacpp",
)
"""Packages that only the extras bring."""


class Ended(NamedTuple):
    """What a finished `cai` said."""

    stdout: str
    stderr: str


def cai(
    folder: Path, *args: str, input: bytes = b"", status: int = 0, env: Mapping[str, str] | None = None
) -> Ended:
    """Run `cai` to its end in this process, and check its exit status. A traceback fails the test."""
    streams = (io.StringIO(), io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["cai", *args])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input)))
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        for name in ("out", "err"):
            patch.setattr(getattr(console, name), "_width", 200)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = Ended(streams[0].getvalue(), streams[1].getvalue())
    assert ended.value.code == status, said.stderr
    return said


def start(folder: Path, *args: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `cai` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cai_graph.cli", *args],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def without(folder: Path, *packages: str) -> dict[str, str]:
    """The environment of a `cai` that finds none of these packages."""
    blocks = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"
    (folder / "sitecustomize.py").write_text(blocks)
    return {"PYTHONPATH": str(folder)}


def trajectories(folder: Path) -> list[Trajectory]:
    """What `cai` logged in a folder."""
    with open_log(folder / "cai.db", read_only=True) as log:
        return list(log.read(kind="trajectory"))


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command, and the words it is called by."""

    def walk(path: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk((*path, name), inner)
        else:
            yield path, command

    return walk((), typer.main.get_command(cli.app))
