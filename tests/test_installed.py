"""What brings an extra is what installed cai-graph."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from cai_graph.errors import MissingExtra
from cai_graph.installed import command

FOLDER = {"url": "file:///my%20apps/cai-graph"}
REPOSITORY = {"url": "https://example.com/cai-graph", "vcs_info": {"vcs": "git", "commit_id": "4f1c"}}


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        ({**FOLDER, "dir_info": {"editable": True}}, ["-e", "/my apps/cai-graph[local]"]),
        ({**FOLDER, "dir_info": {}}, ["cai-graph[local] @ file:///my%20apps/cai-graph"]),
        ({"url": "file:///a.whl", "archive_info": {}}, ["cai-graph[local] @ file:///a.whl"]),
        (REPOSITORY, ["cai-graph[local] @ git+https://example.com/cai-graph@4f1c"]),
        (None, ["cai-graph[local]"]),
    ],
)
def test_an_extra_comes_from_where_cai_graph_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, wanted: list[str]
) -> None:
    installed = tmp_path / "cai_graph-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: cai-graph\nVersion: 0.1.0\n")
    if origin is not None:
        (installed / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)

    assert shlex.split(command("local")) == ["pip", "install", *wanted]
    assert str(MissingExtra("the probe", "numpy", "local")) == f"the probe needs numpy; {command('local')}"


def test_what_was_only_unpacked_is_installed_from_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert command().endswith(f"-e {shlex.quote(str(Path(__file__).parents[1]))}")
