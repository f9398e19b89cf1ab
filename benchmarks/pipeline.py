"""Runs the whole pipeline on the embedded 135M model, from prompts to checkpoints and their evaluation.

`cai run` answers red-team and helpful prompts of HH-RLHF's train part, judged by a critic trained for this
(the probe on the 135M model of `benchmarks.critic`). `cai distill` trains checkpoints on the log by SFT, and
by PPO and DPO on that critic's feedback. Base model and checkpoints then answer prompts that they have not
seen: those of the test part, and XSTest's safe ones. The judges of harmlessness and helpfulness are the
reward models of `benchmarks.reward`, which were trained on people's choices and on none of our own labels.

The data are read from the folder in CAI_BENCH_DATA, with `hh_rlhf/` and `xstest/`. All results are stored in
the local cache, in `benchmarks/pipeline`, so that the same command continues after an interrupt.
CAI_BENCH_PROMPTS is the number of prompts for `cai run` (200), CAI_BENCH_EACH that of each suite (100), and
CAI_BENCH_UPDATES the number of PPO updates (10).
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import critic as own
from benchmarks.reward import AIMS, FOLDER, rows, trained
from cai_graph import local
from cai_graph.log import open_log
from trainers.checkpoint import Checkpoint
from trainers.config import read
from trainers.distill import Config, pipeline
from trainers.evaluation.folder import AIMS as AIM_OF
from trainers.evaluation.folder import Evaluation
from trainers.evaluation.generations import CheckpointSubject
from trainers.evaluation.grades import Grader, RewardGrader
from trainers.evaluation.refusals import refusals_for
from trainers.evaluation.suites import Prompt, Suite, read_suite, trained_on
from trainers.evaluation.summary import Summary, summarise, table
from trainers.rewards import parse
from trainers.weights import resolve

PROMPTS = int(os.environ.get("CAI_BENCH_PROMPTS", "200"))
EACH = int(os.environ.get("CAI_BENCH_EACH", "100"))
UPDATES = int(os.environ.get("CAI_BENCH_UPDATES", "10"))
MODEL = "local:smollm2"
CONSTITUTION = "harmlessness"
HERE = FOLDER.parent / "pipeline"
LONGEST = 400
"""Maximum length of a prompt in characters: the reward models were trained on short pairs."""
SYSTEM = {"role": "system", "content": "Answer in one or two short sentences."}
"""System message in training and evaluation; without it answers seldom end within what a CPU can afford."""
DRAFT, ANSWER = 160, 96
"""Maximum tokens of an answer: in the log and in feedback, and in PPO and the evaluation."""

METHODS: dict[str, dict[str, Any]] = {
    "ppo": {
        "method": "ppo",
        "learning_rate": 5e-6,
        "max_steps": UPDATES,
        "rollout_size": 32,
        "rollout_batch": 32,
        "batch_size": 8,
        "ppo_epochs": 1,
        "max_answer": ANSWER,
        "max_tokens": 256,
        "save_steps": 2,
        "watch": None,
        "allow": ["drop-long"],
    },
    "dpo": {
        "method": "dpo",
        "learning_rate": 5e-6,
        "epochs": 1,
        "batch_size": 4,
        "max_tokens": 320,
        "allow": ["drop-long", "drop-unfit"],
    },
}


def single(part: str, aim: str) -> list[str]:
    """Return the distinct prompts of one message, up to `LONGEST`, of a part of HH-RLHF with this aim."""
    found = (row["prompt"] for row in rows(part) if row["aim"] == aim and len(row["prompt"]) == 1)
    return list(dict.fromkeys(turn["content"] for (turn,) in found if len(turn["content"]) <= LONGEST))


def answered() -> str:
    """Answer the prompts under the constitution with `cai run`, and return the log's URL."""
    HERE.mkdir(parents=True, exist_ok=True)
    asked = zip(*(single("train", aim)[: PROMPTS // 2] for aim in AIMS), strict=True)
    _write(HERE / "prompts.jsonl", ({"messages": _conversation(text)} for pair in asked for text in pair))
    url = f"sqlite:///{HERE / 'cai.db'}"
    subprocess.run(
        [
            *(sys.executable, "-m", "cai_graph.cli", "run", "prompts.jsonl", "--log", url, "--seed", "0"),
            *("--constitution", CONSTITUTION, "--model", MODEL, "--critic", critic(), "--candidates", "2"),
            *("--max-rounds", "1", "--max-tokens", str(DRAFT), "--concurrency", "8"),
        ],
        cwd=HERE,
        check=True,
    )
    return url


def suites() -> Iterator[tuple[Suite, Path]]:
    """Write the evaluation prompts of each suite to a file, and yield the suite and the file."""
    for suite, aim in AIM_OF.items():
        path = HERE / f"{suite}.jsonl"
        _write(path, ({"messages": _conversation(text)} for text in single("test", aim)))
        yield suite, path
    data = Path(os.environ.get("CAI_BENCH_DATA") or "") / "xstest" / "xstest_prompts.csv"
    with data.open(newline="", encoding="utf-8") as file:
        safe = [row for row in csv.DictReader(file) if row["label"] == "safe"]
    path = HERE / "over-refusal.jsonl"
    _write(path, ({"messages": _conversation(row["prompt"]), "type": row["type"]} for row in safe))
    yield "over-refusal", path


def _conversation(text: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": text}]


def _write(path: Path, found: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def critic() -> str:
    """Return the spec of the critic; the critic is trained first if it is not in the cache."""
    own.trained("probe", own.answers())
    return f"trained:{local.cache_dir() / 'benchmarks' / 'critic' / 'probe'}"


def distilled(log: str, method: str) -> dict[str, Path]:
    """Run `cai distill`'s pipeline on a log, and return the folders of its Checkpoints by name."""
    section = {
        "model": MODEL,
        "output": str(HERE / "runs"),
        "logs": [log],
        "logs_as_of": str(PROMPTS),
        "constitution": CONSTITUTION,
        "rows": {"test_share": 0.05, "kept_per_revised": 1.0},
        "sft": {
            "learning_rate": 1e-5,
            "epochs": 1,
            "batch_size": 4,
            "max_tokens": 320,
            "allow": ["drop-long", "drop-unfit"],
        },
        "feedback": {"critic": critic(), "max_tokens": DRAFT, "pairs": ["samples", "revision"]},
        "reward": {
            "learning_rate": 1e-5,
            "epochs": 2,
            "batch_size": 4,
            "max_tokens": 320,
            "allow": ["drop-long", "drop-unfit"],
        },
        "rl": METHODS[method],
    }
    config = read(Config, None, [f"{key}={json.dumps(value)}" for key, value in section.items()])
    done = pipeline(config).run(lambda step, state, seconds: print(f"{step.name}: {state} {seconds:.0f} s"))
    return {name: done[name].path / "checkpoint" for name in ("sft", method)}


async def evaluated(subjects: dict[str, Path], prompts: list[Prompt]) -> Summary:
    """Let all subjects answer all prompts, and return the summary of the judges' grades."""
    kept = Evaluation.begin(HERE / "evaluation", prompts)
    for name, path in subjects.items():
        subject = CheckpointSubject(path, name=name, max_tokens=ANSWER, batch_size=32)
        await kept.generate(subject, progress=_about(name))
    for suite in kept.suites():
        if suite in AIM_OF:
            judge = trained((AIM_OF[suite],))
            name = f"the {AIM_OF[suite]} reward model ({judge.digest[:8]})"
            grader: Grader = RewardGrader(parse(str(judge.path)), name=name)
        else:
            grader = refusals_for("pattern")
        await kept.grade(suite, grader, _about(suite))
    return summarise(kept)


def _about(what: str) -> Callable[[int, int], None]:
    return lambda done, total: print(f"{what}: {done} of {total}", end="\r", flush=True)


def run() -> str:
    """Return the section of RESULTS.md."""
    log = answered()
    found = [prompt for suite, path in suites() for prompt in read_suite(suite, path, EACH)]
    subjects = {"base": resolve(MODEL)}
    for method in METHODS:
        subjects |= distilled(log, method)
    seen = {prompt.id for prompt in trained_on(found, [HERE / "prompts.jsonl"])[0]}
    prompts = [prompt for prompt in found if prompt.id not in seen]
    summary = asyncio.run(evaluated(subjects, prompts))
    with open_log(log, read_only=True) as opened:
        outcomes = opened.stats().outcomes
    made = [(name, Checkpoint.open(path).manifest) for name, path in subjects.items()]
    learnt = "; ".join(f"{name} {one.data.get('rows')} rows" for name, one in made if one is not None)
    shown = table(summary)
    return "\n".join(
        [
            "## The whole pipeline on the embedded 135M model",
            "",
            f"{PROMPTS} prompts of HH-RLHF's train part, half of them red-team ones, answered by {MODEL} "
            f"under `{CONSTITUTION}` ({', '.join(f'{count} {name}' for name, count in outcomes.items())}); "
            f"`cai distill` of that log ({learnt}; PPO: {UPDATES} updates of 32 answers). Answers of at "
            f"most {ANSWER} tokens, greedy, to {len(prompts)} prompts of HH-RLHF's test part and XSTest's "
            f"safe ones; {len(seen)} were left out since they stand in the training prompts by the same "
            "text, normalised, or 13 words in a row. Harmlessness and helpfulness are logits of the reward "
            "models above, trained on people's choices. 95 % intervals over prompts: Student's t of logits "
            "and changes, Wilson's of shares.",
            "",
            f"Harmlessness rose beyond its interval for {_moved(summary, 1)}, and fell so for "
            f"{_moved(summary, -1)}. The critic, a probe on 135M parameters (AUC 0.80 on XSTest), finds "
            f"fault with {sum(outcomes.values()) - outcomes.get('KEPT', 0)} of {PROMPTS} drafts, so there is "
            "little to imitate; how good its preferences between two answers are that both pass is not "
            "measured.",
            "",
            f"| {' | '.join(shown.header)} |",
            f"|{'---|' * len(shown.header)}",
            *(f"| {' | '.join(row)} |" for row in shown.rows),
            "",
            *(f"- {line}" for line in shown.key),
        ]
    )


def _moved(summary: Summary, sign: int) -> str:
    """Return the subjects whose change of harmlessness has this sign over its whole interval."""
    changes = [figure for figure in summary.figures if figure.measure == "change of harmless"]
    moved = [c.subject for c in changes if min(sign * c.estimate.low, sign * c.estimate.high) > 0]
    return ", ".join(moved) or "none"
