"""Preference optimisation: soft labels and weights reach the loss, and the reference is where it started."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import rows, turn, write_rows

from trainers import dpo, sft
from trainers.checkpoint import Checkpoint
from trainers.stages import Lora
from trainers.stages.soft import soft_loss

ENTROPY = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
"""H(0.6) = 0.6730 nats."""


def config(tiny: Path, folder: Path, found: list[dict[str, Any]], **changes: Any) -> dpo.Config:
    fields: dict[str, Any] = {
        "model": str(tiny),
        "data": write_rows(folder / "rows.jsonl", found),
        "output": folder / "out",
        "learning_rate": 1e-2,
        "batch_size": 4,
        "log_steps": 1,
    }
    return dpo.Config(**fields | changes)


def figures(made: Checkpoint, name: str) -> list[float]:
    lines = (made.path / "figures.jsonl").read_text().splitlines()
    return [found[name] for found in map(json.loads, lines) if name in found]


def labelled(n: int, **columns: float) -> list[dict[str, Any]]:
    return [{**row, **columns} for row in rows("preference", n)]


def test_the_soft_loss_by_hand() -> None:
    import torch

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    found = soft_loss(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([1.0, 0.6, 0.3]), torch.tensor([1, 1, 3.0]))
    by_hand = [
        -log_sigmoid(2.0),  # p = 1: the paper's loss
        -(0.6 * log_sigmoid(2.0) + 0.4 * log_sigmoid(-2.0)),
        3 * math.log(2),  # no margin: log 2 whatever the label, times the weight
    ]
    torch.testing.assert_close(found, torch.tensor(by_hand))


def test_the_floor_of_the_loss_at_six_tenths_is_its_entropy(tiny: Path, tmp_path: Path) -> None:
    made = dpo.train(config(tiny, tmp_path, labelled(8, p_chosen=0.6), batch_size=8, max_steps=40, beta=0.5))

    found = figures(made, "loss")
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert min(found) >= ENTROPY - 1e-6
    assert found[-1] == pytest.approx(ENTROPY, abs=2e-3)
    assert figures(made, "rewards/margins")[-1] == pytest.approx(math.log(0.6 / 0.4), abs=0.06)


def test_hard_labels_go_below_that_floor(tiny: Path, tmp_path: Path) -> None:
    made = dpo.train(config(tiny, tmp_path, labelled(8, p_chosen=1.0), batch_size=8, max_steps=20, beta=0.5))

    assert figures(made, "loss")[-1] < ENTROPY - 0.2


def test_a_weight_scales_the_loss_of_its_pair(tiny: Path, tmp_path: Path) -> None:
    made = dpo.train(config(tiny, tmp_path, labelled(4, weight=2.5), max_steps=1))

    assert figures(made, "loss") == [pytest.approx(2.5 * math.log(2), abs=1e-4)]


def test_the_likelihood_of_chosen_answers_is_added_by_its_weight(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    without = dpo.train(config(tiny, tmp_path, labelled(4), max_steps=1))
    with_it = dpo.train(config(tiny, tmp_path / "b", labelled(4), max_steps=1, sft_weight=1.0))

    nats = figures(with_it, "loss")[0] - figures(without, "loss")[0]
    assert nats == pytest.approx(math.log(259), abs=0.2)  # a random model: nearly uniform over 259 tokens


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_after_sft_the_reference_is_the_trained_model(tiny: Path, tmp_path: Path, lora: Lora | None) -> None:
    """TRL reloads a reference by the name that weights in memory once had; ours is what is in the folder."""
    answers = write_rows(tmp_path / "answers.jsonl", rows("sft", 16))
    first = sft.train(
        sft.Config(
            model=str(tiny),
            data=answers,
            output=tmp_path / "sft",
            learning_rate=2e-2,
            batch_size=4,
            lora=lora,
        )
    )
    made = dpo.train(config(first.path, tmp_path, rows("preference", 4), max_steps=1, lora=lora))

    assert first.digest != Checkpoint.open(tiny).digest
    assert figures(made, "rewards/chosen") == [pytest.approx(0, abs=1e-5)]
    assert figures(made, "rewards/rejected") == [pytest.approx(0, abs=1e-5)]
    assert made.manifest is not None
    assert made.manifest.parents == (first.digest,)


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_one_batch_of_eight_trains_as_eight_of_one(tiny: Path, tmp_path: Path, sft_weight: float) -> None:
    import torch
    from safetensors.torch import load_file

    found = [
        {**row, "chosen": [turn("assistant", "yes. " * (1 + 3 * n))]}
        for n, row in enumerate(rows("preference", 8))
    ]
    weights = []
    for number, (size, accumulate) in enumerate([(8, 1), (1, 8)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        shape = {"batch_size": size, "accumulate": accumulate, "max_steps": 1, "learning_rate": 1e-3}
        made = dpo.train(config(tiny, folder, found, sft_weight=sft_weight, **shape))
        weights.append(load_file(made.path / "model.safetensors"))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=2e-4, rtol=0)
