"""PPO against TRL's PPOTrainer, which TRL dropped after 1.12.0, on one toy task and the same settings.

It is installed without its dependencies into a folder of its own, and runs in a process that sees it first.
`CAI_TRL_PPO=1 pytest tests/trainers/ppo/test_ppo_trl.py -s` runs it and prints the figures of all seeds.
"""

from __future__ import annotations

import json
import os
import statistics
import string
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
from repository import SUPPORT
from tiny import reward_model, tiny_model, turn, write_rows

from trainers import ppo
from trainers.policy import Messages

pytestmark = pytest.mark.skipif(
    not os.environ.get("CAI_TRL_PPO"), reason="CAI_TRL_PPO=1 installs trl 1.12.0 aside and compares"
)

ANSWER = 10
LETTERS = string.ascii_lowercase
SEEDS = 5
UPDATES = 12
RATE = 1e-2
LAST = 3
"""Updates at the end of which the mean counts."""


def letters(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
    """The toy reward: lower-case letters by the longest answer."""
    return [sum(c in LETTERS for c in answer) / ANSWER for answer in answers]


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        "trl==1.12.0",
    ]
    subprocess.run(pip, check=True, timeout=300)
    return folder


def within_noise(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two means differ by less than three standard errors of their difference."""
    error = (statistics.variance(one) / len(one) + statistics.variance(other) / len(other)) ** 0.5
    return abs(statistics.fmean(one) - statistics.fmean(other)) < 3 * error


def test_it_learns_as_trl_did(trl: Path, tmp_path: Path) -> None:
    model, value_model = tiny_model(tmp_path / "model"), reward_model(tmp_path / "value")
    prompts = [f"{number:02}?" for number in range(32)]
    settings = {
        "model": str(model),
        "value_model": str(value_model),
        "prompts": prompts,
        "letters": LETTERS,
        "max_answer": ANSWER,
        "learning_rate": RATE,
        "kl_coefficient": 0.05,
        "batch_size": 16,
        "rollout_size": 32,
        "updates": UPDATES,
        "seeds": SEEDS,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "trl_ppo.py"), str(tmp_path / "settings.json")],
        env={**os.environ, "PYTHONPATH": str(trl), "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": [turn("user", text)]} for text in prompts])
    found: dict[str, dict[int, list[dict[str, float]]]] = {
        "trl": defaultdict(list),
        "ours": defaultdict(list),
    }
    for line in done.stdout.splitlines():
        if line.startswith('{"seed"'):
            told = json.loads(line)
            found["trl"][told["seed"]].append(told)
    for seed in range(SEEDS):
        made = ppo.train(
            ppo.Config(
                model=str(model),
                data=data,
                output=tmp_path / f"ours-{seed}",
                reward="test_ppo_trl:letters",
                watch=None,
                value_model=str(value_model),
                seed=seed,
                learning_rate=RATE,
                value_learning_rate=RATE,
                schedule="constant",
                rollout_size=32,
                rollout_batch=32,
                batch_size=16,
                max_answer=ANSWER,
                max_tokens=80,
                max_steps=UPDATES,
                missing_eos_penalty=0.0,
                max_grad_norm=1e9,  # TRL's scales no gradient
                save_steps=99,
            )
        )
        lines = (made.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        found["ours"][seed] = [json.loads(line) for line in lines]

    ends = {
        name: {
            who: [statistics.fmean(line[name] for line in lines[-LAST:]) for lines in seeds.values()]
            for who, seeds in found.items()
        }
        for name in ("reward", "kl")
    }
    for name, both in ends.items():
        for who, values in both.items():
            first = statistics.fmean(lines[0][name] for lines in found[who].values())
            print(
                f"{name}, {who}: first {first:.3f}, last {LAST} of {UPDATES} updates "
                f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f} "
                f"({', '.join(f'{value:.3f}' for value in values)})"
            )
    for name, both in ends.items():
        for who, values in both.items():
            assert len(values) == SEEDS
            firsts = [lines[0][name] for lines in found[who].values()]
            assert statistics.fmean(values) > statistics.fmean(firsts) + 0.05
        assert within_noise(both["trl"], both["ours"]), ends
