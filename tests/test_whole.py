"""Text files are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainers import whole


def test_a_write_that_fails_leaves_the_older_file_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.json"
    whole.write(path, "old")

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        whole.write(path, "new")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
