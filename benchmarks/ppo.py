"""Compares our PPO with TRL 1.12's PPOTrainer: seconds per update and peak memory, on the embedded model.

TRL is installed without its dependencies into a temporary folder. Both sample, score and train on the same
number of answers to the same prompts, with the same models, minibatches and passes, in separate processes
that alternate. The first update of a process is a warm-up and is not counted.

    CAI_BENCH_PPO_ROUNDS    number of processes for each contender (2)
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import string
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROUNDS = int(os.environ.get("CAI_BENCH_PPO_ROUNDS", "2"))
WHO = {
    "cai_graph, value model": "as TRL has it: a value model of its own",
    "cai_graph, value head": "values from a head on the policy",
    "TRL 1.12 PPOTrainer": "a value model of its own, which it insists on",
}
SETTINGS: dict[str, Any] = {
    "prompts": [f"{number:02}?" for number in range(32)],
    "letters": string.ascii_lowercase,
    "max_answer": 32,
    "learning_rate": 1e-6,
    "kl_coefficient": 0.05,
    "batch_size": 4,
    "rollout_size": 8,
    "updates": 3,
    "seeds": 1,
}


def letters(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
    """Return the rewards: the number of lower-case letters in each answer, divided by 32."""
    return [sum(c in string.ascii_lowercase for c in answer) / 32 for answer in answers]


def run() -> str:
    """Return the section of RESULTS.md."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = _prepare(folder)
        trl = folder / "trl"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(trl)]
        subprocess.run([*pip, "trl==1.12.0"], check=True)
        found: dict[str, list[float]] = {who: [] for who in WHO}
        memory: dict[str, int] = dict.fromkeys(WHO, 0)
        for number in range(ROUNDS):
            for who in WHO:
                work = folder / f"{number}-{who.replace(' ', '-')}"
                work.mkdir()
                path = work / "settings.json"
                is_head = who == "cai_graph, value head"
                told = {**settings, "value_model": None if is_head else settings["value_model"]}
                path.write_text(json.dumps(told), encoding="utf-8")
                is_trl = who.startswith("TRL")
                what = (
                    [str(ROOT / "tests" / "support" / "trl_ppo.py")] if is_trl else ["-m", "benchmarks.ppo"]
                )
                seconds, kib = _timed([*what, str(path)], trl if is_trl else ROOT)
                found[who] += seconds
                memory[who] = max(memory[who], kib)
    base = statistics.median(found["TRL 1.12 PPOTrainer"])
    lines = [
        "## PPO: seconds an update, against TRL 1.12's PPOTrainer",
        "",
        f"SmolLM2-135M in float32 on one thread; an update draws {SETTINGS['rollout_size']} answers of at "
        f"most {SETTINGS['max_answer']} tokens and takes 4 passes over them in minibatches of "
        f"{SETTINGS['batch_size']}. {len(found['TRL 1.12 PPOTrainer'])} updates of each, from {ROUNDS} "
        "processes turn about; median, and the range.",
        "",
        "| | values | s an update | range | TRL's time : this one's | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {who} | {WHO[who]} | {statistics.median(times):.1f} | {min(times):.1f} to {max(times):.1f} | "
        f"{base / statistics.median(times):.2f} | {memory[who] / 1024:,.0f} |"
        for who, times in found.items()
    ]
    return "\n".join(lines)


def _prepare(folder: Path) -> dict[str, Any]:
    """Write the prompts and a value model; return the settings that all processes share."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trainers.weights import resolve

    model = resolve("local:smollm2")
    value_model = folder / "value"
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(value_model)
    AutoTokenizer.from_pretrained(model).save_pretrained(value_model)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in SETTINGS["prompts"]]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {**SETTINGS, "model": str(model), "value_model": str(value_model), "data": str(data)}


def _timed(command: list[str], path: Path) -> tuple[list[float], int]:
    """Run a process; return the seconds of each update except the first, and its peak memory in KiB."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seed"')]
    at = [line["seconds"] for line in lines]
    return [after - before for before, after in pairwise(at)], int(lines[-1]["kib"])


def _ours(path: Path) -> None:
    import time

    import torch

    from trainers import ppo

    torch.set_num_threads(1)
    told = json.loads(path.read_text(encoding="utf-8"))
    config = ppo.Config(
        model=told["model"],
        data=Path(told["data"]),
        output=path.parent / "out",
        reward="benchmarks.ppo:letters",
        watch=None,
        value_model=told["value_model"],
        learning_rate=told["learning_rate"],
        value_learning_rate=told["learning_rate"],
        rollout_size=told["rollout_size"],
        rollout_batch=told["rollout_size"],
        batch_size=told["batch_size"],
        max_answer=told["max_answer"],
        max_steps=told["updates"],
        save_steps=99,
    )

    def tell(done: int, total: int) -> None:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line = {"seed": 0, "update": done, "seconds": time.perf_counter(), "kib": kib}
        print(json.dumps(line), flush=True)

    ppo.train(config, tell)


if __name__ == "__main__":
    _ours(Path(sys.argv[1]))
