"""Compares the embedded engine with other engines on the same small weights: tokens a second.

Run `python -m benchmarks.engines`. Every rival engine gets its own virtual environment in the cache, which is
created on demand; if it cannot be installed, it is skipped and the reason is reported. Rounds are
interleaved, so that a busy moment of the machine affects all engines.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_graph import local

ROUNDS = 3
_INSTALL_S = 900

# The common beginning of every program below. A program is given the path of the weights; for each line on
# stdin it runs one round, and prints one line of JSON: {measure: [tokens, wall seconds, CPU seconds]}.
_COMMON = """
import json, sys, time
path = sys.argv[1]
TEXT = "The committee met on Tuesday to discuss the new rules for the garden. " * 24
STORY = "Once upon a time"
NEW, BATCH = 48, 8

def measure(run):
    wall, cpu = time.perf_counter(), CPU()
    tokens = run()
    return [tokens, time.perf_counter() - wall, CPU() - cpu]

def rounds(**runs):
    for run in runs.values():
        run()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({name: measure(run) for name, run in runs.items()}), flush=True)
"""

_OURS = """
import concurrent.futures, os, httpx
from pathlib import Path
from cai_graph import local
engine = local.engine(Path(path), "chat")

def CPU():  # of the engine's own process
    user, system = Path(f"/proc/{engine._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

def complete(prompt, tokens):
    body = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False}
    headers = {"Authorization": f"Bearer {engine.key}"}
    return httpx.post(engine.url + "/completion", json=body, headers=headers, timeout=600).json()["timings"]

def batch():
    with concurrent.futures.ThreadPoolExecutor(BATCH) as pool:
        return sum(t["predicted_n"] for t in pool.map(lambda _: complete(STORY, NEW), range(BATCH)))

rounds(prompt=lambda: complete(TEXT, 1)["prompt_n"], alone=lambda: complete(STORY, NEW)["predicted_n"],
       batch=batch)
"""

_OPENVINO = """
import openvino_genai as ov
CPU = time.process_time
pipe = ov.LLMPipeline(path, "CPU", scheduler_config=ov.SchedulerConfig())
count = pipe.get_tokenizer().encode(TEXT).input_ids.shape[1]

def generate(prompts, tokens):
    pipe.generate(prompts, max_new_tokens=tokens, ignore_eos=True, do_sample=False, apply_chat_template=False)
    return tokens * len(prompts)

rounds(prompt=lambda: generate([TEXT], 1) and count, alone=lambda: generate([STORY], NEW),
       batch=lambda: generate([STORY] * BATCH, NEW))
"""

_LLAMA_CPP_PYTHON = """
from llama_cpp import Llama
CPU = time.process_time
model = Llama(path, n_ctx=4096, n_batch=512, verbose=False)
text, story = model.tokenize(TEXT.encode()), model.tokenize(STORY.encode())

def prompt():
    model.reset()
    model.eval(text)
    return len(text)

def alone():
    model.reset()
    for made, _ in enumerate(model.generate(story, temp=0), 1):
        if made == NEW:
            return made

rounds(prompt=prompt, alone=alone)
"""

_TRANSFORMERS = """
import os, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
CPU = time.process_time
where = {"pretrained_model_name_or_path": os.path.dirname(path), "gguf_file": os.path.basename(path)}
tokenizer = AutoTokenizer.from_pretrained(**where)
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16).eval()
text, story = tokenizer(TEXT, return_tensors="pt"), tokenizer(STORY, return_tensors="pt")

@torch.inference_mode()
def prompt():
    model(**text)
    return text["input_ids"].numel()

def generate(rows):
    ids = story["input_ids"].repeat(rows, 1)
    model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=NEW, max_new_tokens=NEW,
                   do_sample=False, pad_token_id=0)
    return NEW * rows

rounds(prompt=prompt, alone=lambda: generate(1), batch=lambda: generate(BATCH))
"""


@dataclass(frozen=True)
class _Rival:
    name: str
    requirements: tuple[str, ...]
    program: str


RIVALS = (
    _Rival("openvino-genai", ("openvino-genai",), _OPENVINO),
    _Rival("llama-cpp-python", ("llama-cpp-python",), _LLAMA_CPP_PYTHON),
    _Rival("transformers bf16", ("torch", "transformers", "gguf", "accelerate"), _TRANSFORMERS),
)


class _Runner:
    """One engine's program in its own process, loaded and warm."""

    def __init__(self, python: str, program: str, weights: Path) -> None:
        self.process = subprocess.Popen(
            [python, "-c", _COMMON + program, str(weights)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        raise RuntimeError((self.process.stderr.read().strip().splitlines() or ["it ended"])[-1])

    def round(self) -> dict[str, list[float]]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _python_of(rival: _Rival) -> str:
    """Return the Python interpreter of the rival's environment, which is created on the first call."""
    folder = local.cache_dir() / "rivals" / rival.name.replace(" ", "-")
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        known = Path(__file__).parent.parent / "constraints.txt"  # pins the CPU build of torch, among others
        command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(known)]
        command += rival.requirements
        result = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
        if result.returncode != 0:
            raise RuntimeError((result.stderr.strip().splitlines() or ["pip failed"])[-1])
        done.touch()
    return str(python)


def run() -> str:
    """Return the section of RESULTS.md: median tokens per wall second and per CPU second of every engine."""
    weights = local.fetch(local.find("smollm2"))
    runners = {"cai_graph (xllamacpp)": _Runner(sys.executable, _OURS, weights)}
    skipped: dict[str, str] = {}
    for rival in RIVALS:
        try:
            runners[rival.name] = _Runner(_python_of(rival), rival.program, weights)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            skipped[rival.name] = str(error)[:200]
    results: dict[str, list[dict[str, list[float]]]] = {name: [] for name in runners}
    try:
        for _ in range(ROUNDS):
            for name, runner in runners.items():
                results[name].append(runner.round())
    finally:
        for runner in runners.values():
            runner.close()
    lines = [
        "## Engines for the local model",
        "",
        f"SmolLM2-135M-Instruct Q4_1, {local.usable_cores()} cores, median of {ROUNDS} interleaved rounds; "
        "tokens a second, wall / by CPU second.",
        "",
        "| engine | prompt | generated, alone | generated, batch of 8 |",
        "|---|---|---|---|",
    ]
    for name, rounds in results.items():
        lines.append(
            f"| {name} | " + " | ".join(_cell(rounds, m) for m in ("prompt", "alone", "batch")) + " |"
        )
    lines += [f"| {name} | skipped: {reason} | | |" for name, reason in skipped.items()]
    return "\n".join(lines) + "\n"


def _cell(rounds: list[dict[str, list[float]]], measure: str) -> str:
    rows = [one[measure] for one in rounds if measure in one]
    if not rows:
        return "none"
    wall = statistics.median(tokens / seconds for tokens, seconds, _ in rows)
    cpu = statistics.median(tokens / max(busy, 0.01) for tokens, _, busy in rows)
    return f"{wall:,.0f} / {cpu:,.0f}"


if __name__ == "__main__":
    print(run())
