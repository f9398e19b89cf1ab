"""Stages under `accelerate launch`: several processes train what one would have."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import rows, tiny_model, write_rows

from trainers import dpo, kto, sft
from trainers.checkpoint import Checkpoint
from trainers.config import plain
from trainers.stages import StageConfig

BOTH = """
import sys
from pathlib import Path
from trainers import dpo, kto, sft
from trainers.config import read
for module in (sft, dpo, kto):
    module.train(read(module.Config, Path(sys.argv[1]) / f"{module.__name__.rpartition('.')[2]}.yaml"))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def settings(module: Any, model: Path, folder: Path, found: list[dict[str, Any]], size: int) -> StageConfig:
    """Of one update over all the rows, so that it does not matter which process has which."""
    name = module.__name__.rpartition(".")[2]
    config: StageConfig = module.Config(
        model=str(model),
        data=write_rows(folder / f"{name}.jsonl", found),
        output=folder / name,
        batch_size=size,
        learning_rate=1e-3,
        max_steps=1,
    )
    return config


def differ(one: Path, other: Path) -> float:
    """Return the largest difference of a weight."""
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    return max((weight - right[name]).abs().max().item() for name, weight in left.items())


def test_two_processes_train_what_one_would_have(tmp_path: Path) -> None:
    """SFT and DPO alike; KTO pairs rows within a process's batch, so its update is another one."""
    model = tiny_model(tmp_path / "model")
    stages = [(sft, rows("sft", 8)), (dpo, rows("preference", 8)), (kto, rows("unpaired", 8))]
    (tmp_path / "both").mkdir()
    (tmp_path / "alone").mkdir()
    for module, found in stages:
        config = settings(module, model, tmp_path / "both", found, 4)
        (tmp_path / "both" / f"{config.output.name}.yaml").write_text(yaml.safe_dump(plain(config)))
    (tmp_path / "both.py").write_text(BOTH)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", str(free_port()), str(tmp_path / "both.py"), str(tmp_path / "both")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    for module, found in stages:
        both = Checkpoint.open(tmp_path / "both" / module.__name__.rpartition(".")[2])
        assert both.manifest is not None
        assert both.manifest.hardware.endswith("2 processes")
        if module is not kto:
            alone = module.train(settings(module, model, tmp_path / "alone", found, 8))
            assert differ(alone.path, both.path) < 2e-5
            assert differ(model, both.path) == pytest.approx(1e-3, rel=0.1)  # an update of AdamW
    assert not list(tmp_path.glob("both/*.partial"))
