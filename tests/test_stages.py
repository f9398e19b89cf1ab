"""What the TRL stages share: their config, the hazards of data, resuming, failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cai_graph.errors import ConfigError
from trainers.config import plain, read
from trainers.stages import Lora, StageConfig


def config(**changes: Any) -> StageConfig:
    return StageConfig(**{"model": "m", "data": Path("d"), "output": Path("o")} | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size is a number from 1, found 0"),
        ({"learning_rate": 0.0}, "learning_rate is a number above 0"),
        ({"quantized": True}, "set lora, too"),
        ({"allow": ("everything",)}, "allow takes drop-long, cut-long"),
        ({"allow": ("drop-long", "cut-long")}, "keep one"),
        ({"warmup": 1.0}, "warmup is a share"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_config_comes_back_from_its_yaml(tmp_path: Path) -> None:
    import yaml

    whole = config(lora=Lora(rank=4, targets=("q_proj",)), allow=("cut-long",), report_to=("tensorboard",))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(plain(whole)))
    assert read(StageConfig, tmp_path / "x.yaml") == whole
