"""Compares the cost of the training stages with TRL's own scripts, on the same model, rows and settings.

Each run is a separate process, ours and TRL's in turn. `tokens/s` covers the training loop, as counted by TRL
itself for both. CPU seconds cover the whole process until the model is saved, including imports, encoding and
checks. Both save a state to resume from at the end, as is TRL's default. Peak memory is the process's
resident set. RLOO and GRPO sample their answers, so their numbers of tokens differ slightly between runs. PPO
is measured in `benchmarks.ppo`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.probe import ANSWERS
from trainers.weights import resolve

MODEL = "local:smollm2"
ROUNDS = int(os.environ.get("CAI_BENCH_ROUNDS", "2"))
STEPS = int(os.environ.get("CAI_BENCH_STEPS", "4"))
STAGES = ("sft", "dpo", "kto", "reward", "rloo", "grpo")
ONLINE = ("rloo", "grpo")
BATCH = int(os.environ.get("CAI_BENCH_BATCH", "4"))
ANSWER_TOKENS = 48
ROOT = Path(__file__).parents[1]


def brevity(prompts: Any, answers: list[str]) -> list[float]:
    """Return rewards that cost almost nothing to compute, in the signature of our stages."""
    return [1 / (1 + len(answer)) for answer in answers]


def brevity_for_trl(completions: list[Any], **_: Any) -> list[float]:
    """Return the same rewards, in the signature of TRL."""
    return brevity(None, [completion[-1]["content"] for completion in completions])


def rows(stage: str) -> list[dict[str, Any]]:
    """Return as many rows as the updates consume, in the format of the stage."""
    found: list[dict[str, Any]] = []
    for number in range(BATCH * STEPS):
        request, answer = ANSWERS[number % len(ANSWERS)]
        other = ANSWERS[(number + 1) % len(ANSWERS)][1]
        prompt = [{"role": "user", "content": f"{request} ({number})"}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (answer, other))
        if stage == "sft":
            found.append({"prompt": prompt, "completion": chosen})
        elif stage in ONLINE:
            found.append({"prompt": prompt})
        elif stage in ("dpo", "reward"):
            found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        else:
            label = number % 2 == 0
            found.append({"prompt": prompt, "completion": chosen if label else rejected, "label": label})
    return found


def ours(stage: str, model: Path, data: Path, output: Path) -> list[str]:
    settings = {"model": model, "data": data / "train.jsonl", "output": output, "max_steps": STEPS}
    settings |= {"batch_size": BATCH, "learning_rate": 1e-6, "log_steps": 1}
    if stage in ONLINE:
        settings |= {"algorithm": stage, "reward": "benchmarks.training:brevity", "watch": "null"}
        settings |= {"answers": BATCH, "max_answer": ANSWER_TOKENS, "beta": 0.05}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    name = "online" if stage in ONLINE else stage
    return [sys.executable, "-m", "cai_graph.cli", "train", name, *words]


def theirs(stage: str, model: Path, data: Path, output: Path) -> list[str]:
    online = [
        *("--reward_funcs", "benchmarks.training.brevity_for_trl", "--num_generations", str(BATCH)),
        *("--max_completion_length", str(ANSWER_TOKENS), "--beta", "0.05"),
    ]
    return [
        *(sys.executable, "-m", f"trl.scripts.{stage}", "--model_name_or_path", str(model)),
        *("--dataset_name", str(data), "--output_dir", str(output), "--max_steps", str(STEPS)),
        *("--per_device_train_batch_size", str(BATCH), "--learning_rate", "1e-6", "--logging_steps", "1"),
        *("--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False", "--report_to", "none"),
        *(online if stage in ONLINE else ()),
    ]


def timed(command: list[str], home: Path) -> dict[str, float]:
    """Run a command; return tokens, tokens per second, wall seconds, CPU seconds and peak memory in MiB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    said = home / "said.txt"
    begun = time.monotonic()
    with said.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    whole = time.monotonic() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    text = said.read_text(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{text[-3000:]}")
    figures: dict[str, Any] = {}
    for line in re.findall(r"\{'.*?\}", text):
        figures |= ast.literal_eval(line)
    tokens, seconds = float(figures["num_tokens"]), float(figures["train_runtime"])
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "tokens": tokens,
        "tokens/s": tokens / seconds,
        "whole": whole,
        "CPU": cpu,
        "MB": usage.ru_maxrss / 1024,
    }


def measure() -> dict[str, dict[str, list[dict[str, float]]]]:
    """Return the figures of all rounds, by stage and by contender (`ours` or `trl`)."""
    model = resolve(MODEL)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number in range(ROUNDS):
        for stage in STAGES:
            for name, command in (("ours", ours), ("trl", theirs)):
                with tempfile.TemporaryDirectory() as scratch:
                    folder = Path(scratch)
                    (folder / "data").mkdir()
                    lines = "".join(json.dumps(row) + "\n" for row in rows(stage))
                    (folder / "data" / "train.jsonl").write_text(lines)
                    one = timed(command(stage, model, folder / "data", folder / "out"), folder)
                print(f"round {number + 1} {stage} {name}: {one}", flush=True)
                found.setdefault(stage, {}).setdefault(name, []).append(one)
    return found


def run() -> str:
    found = measure()
    lines = [
        "## Training: the stages beside TRL's stock scripts",
        "",
        f"{MODEL} in fp32, all weights, {STEPS} updates of {BATCH} rows, {ROUNDS} interleaved rounds; "
        "medians. Ratios are ours to TRL's, in brackets the least and the largest of a round. Of tokens/s "
        "more is better, of CPU seconds of the whole process less. In the time of the loop is the point to "
        "go on from that both write at its end, weights and optimizer; ours waits until it is on the disk.",
        "",
        "| stage | tokens/s, ours | TRL | ratio | CPU s, ours | TRL | ratio | peak MB, ours | TRL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, ways in found.items():
        pairs = list(zip(ways["ours"], ways["trl"], strict=True))

        def cells(key: str, pairs: Any = pairs) -> str:
            ratios = sorted(one[key] / other[key] for one, other in pairs)
            left, right = (statistics.median(pair[side][key] for pair in pairs) for side in (0, 1))
            spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            return f"{left:.0f} | {right:.0f} | {statistics.median(ratios):.2f} {spread}"

        peaks = " | ".join(f"{max(one['MB'] for one in ways[name]):.0f}" for name in ("ours", "trl"))
        lines.append(f"| {stage} | {cells('tokens/s')} | {cells('CPU')} | {peaks} |")
    same = all(
        one["tokens"] == other["tokens"]
        for stage, ways in found.items()
        if stage not in ONLINE
        for one, other in zip(ways["ours"], ways["trl"], strict=True)
    )
    lines += [
        "",
        f"Both trained on the same number of tokens, but for rloo and grpo: {'yes' if same else 'NO'}.",
    ]
    return "\n".join(lines)
