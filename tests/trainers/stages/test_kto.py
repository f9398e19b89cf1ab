"""KTO on the tiny model: desirable answers become likelier than undesirable ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import rows, write_rows

from trainers import kto
from trainers.stages import Lora


def trained(tiny: Path, folder: Path, found: list[dict[str, Any]], **changes: Any) -> list[dict[str, float]]:
    """Lines of figures of a run over these rows."""
    fields: dict[str, Any] = {"model": str(tiny), "output": folder / "out", "log_steps": 1, "batch_size": 4}
    fields |= {"data": write_rows(folder / "rows.jsonl", found), "learning_rate": 1e-2}
    made = kto.train(kto.Config(**fields | changes))
    return [json.loads(line) for line in (made.path / "figures.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_desirable_answers_gain_on_undesirable_ones(tiny: Path, tmp_path: Path, lora: Lora | None) -> None:
    lines = trained(tiny, tmp_path, rows("unpaired", 16), epochs=4.0, lora=lora)

    margins = [line["rewards/margins"] for line in lines if "rewards/margins" in line]
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > 0.02


def test_a_prompt_is_paired_with_the_answer_of_another_row(tiny: Path, tmp_path: Path) -> None:
    """In each batch of 2 with the other one's, in the last batch of 1 with that of the row before."""
    import datasets

    found = datasets.Dataset.from_list([{"completion_ids": [number]} for number in range(5)])
    arguments = type("Arguments", (), {"per_device_train_batch_size": 2})
    trainer = kto._trainer_of_ids()

    paired = trainer._prepare_dataset(None, found, None, arguments, "train")
    assert [row["KL_completion_ids"] for row in paired] == [[1], [0], [3], [2], [3]]
