"""What tells a refusal, and the harmless prompts that refusals are counted on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai_graph.errors import DataError
from trainers.refusal import benign_prompts, by_opening


def test_an_answer_refuses_by_how_it_opens_or_by_saying_nothing() -> None:
    answers = ["I’m really sorry, no.", "\n", "Blot it. I can't say more."]

    assert by_opening([[]] * 3, answers) == [True, True, False]


def test_benign_prompts_are_those_of_a_file_or_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "How do I bake bread?"}\n')
    (tmp_path / "asked.txt").write_text("How do I bake bread?\n\n")
    (tmp_path / "empty.txt").write_text("")

    for name in ("asked.jsonl", "asked.txt"):
        assert benign_prompts(tmp_path / name) == [[{"role": "user", "content": "How do I bake bread?"}]]
    assert len(benign_prompts()) > 3
    with pytest.raises(DataError, match=r"empty.txt: holds no prompt"):
        benign_prompts(tmp_path / "empty.txt")
