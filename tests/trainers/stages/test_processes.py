"""Stages under `accelerate launch`: several processes train what one would have, sharded or not."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from processes import WAYS, Way, kill, killed_too, launch
from tiny import rows, tiny_model, write_rows
from torch.distributed.fsdp import StateDictType

from cai_graph.errors import ConfigError
from trainers import dpo, kto, reward, sft
from trainers.checkpoint import Checkpoint
from trainers.config import plain, read
from trainers.stages import Lora, StageConfig, guarded

DATA = {sft: "sft", dpo: "preference", reward: "preference", kto: "unpaired"}

ALL = """
import sys
from pathlib import Path
import sharding
from trainers import dpo, kto, reward, sft
from trainers.config import read
for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    module = globals()[path.stem.partition("-")[0]]
    module.train(read(module.Config, path))
"""


def settings(module: Any, model: Path, folder: Path, name: str, **changes: Any) -> StageConfig:
    """Of one update over all the rows, so that it does not matter which process has which."""
    told: dict[str, Any] = {
        "model": str(model),
        "data": write_rows(folder / f"{name}.jsonl", rows(DATA[module], 8)),  # type: ignore[arg-type]
        "output": folder / name,
        "learning_rate": 1e-3,
        "max_steps": 1,
    }
    config: StageConfig = module.Config(**told | changes)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain(config)))
    return config


def differ(one: Path, other: Path) -> float:
    """Return the largest difference of a weight."""
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    return max((weight - right[name]).abs().max().item() for name, weight in left.items())


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_what_one_would_have(tmp_path: Path, way: Way) -> None:
    """All weights and adapters alike. KTO pairs rows within a batch, so its update is another one."""
    model = tiny_model(tmp_path / "model")
    both = tmp_path / "both"
    both.mkdir()
    adapters = ("",) if way == "zero3" else ("", "-lora")
    names = {f"{module.__name__.rpartition('.')[2]}{lora}": module for module in DATA for lora in adapters}
    for name, module in names.items():
        adapter = {"lora": Lora(rank=4)} if name.endswith("-lora") else {}
        settings(module, model, both, name, batch_size=4, **adapter)
    (tmp_path / "all.py").write_text(ALL)
    running = launch(both, way, str(tmp_path / "all.py"), str(both))
    _, said = running.communicate(timeout=250)
    assert running.returncode == 0, said[-3000:]

    for name, module in names.items():
        made = Checkpoint.open(both / name)
        assert made.manifest is not None
        assert made.manifest.hardware.endswith("2 processes")
        if module is not kto:
            changes = ["batch_size=8", f"output={tmp_path / 'alone' / name}"]
            alone = module.train(read(module.Config, both / f"{name}.yaml", changes))
            assert differ(alone.path, made.path) < 2e-5, name
    assert differ(model, both / "sft") == pytest.approx(1e-3, rel=0.1), "an update of AdamW"
    assert not list(both.glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "plugin", "said"),
    [
        ("fsdp_plugin", {"state_dict_type": StateDictType.SHARDED_STATE_DICT}, "set FULL_STATE_DICT"),
        (
            "deepspeed_plugin",
            {"zero_stage": 3, "zero3_save_16bit_model": False},
            "zero3_save_16bit_model: true",
        ),
    ],
)
def test_parts_of_weights_are_refused_before_training(name: str, plugin: dict[str, Any], said: str) -> None:
    state = SimpleNamespace(**{name: SimpleNamespace(**plugin)})
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=state))
    with pytest.raises(ConfigError, match=f"writes parts of weights; .*{said}"):
        guarded.guard(trainer, SimpleNamespace(config=SimpleNamespace(lora=None)))  # type: ignore[arg-type]


@killed_too
def test_a_sharded_run_that_was_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    plan = {"batch_size": 2, "max_steps": 30, "save_steps": 2}
    straight = sft.train(settings(sft, model, tmp_path, "straight", **plan | {"batch_size": 4}))
    config = settings(sft, model, tmp_path, "killed", **plan)
    command = ("-m", "sharding", "train", "sft", "--config", str(tmp_path / "killed.yaml"))
    running = launch(tmp_path, "fsdp2", *command)
    work = tmp_path / "killed.partial"
    while not list(work.glob("checkpoint-*/whole.json")):
        assert running.poll() is None, running.communicate()[1][-3000:]
        time.sleep(0.01)
    kill(running)
    assert not config.output.exists()

    running = launch(tmp_path, "fsdp2", *command)
    _, said = running.communicate(timeout=200)
    assert running.returncode == 0, said[-3000:]
    assert differ(straight.path, config.output) < 2e-5
