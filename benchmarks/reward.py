"""Trains and measures reward models on the human labels of Anthropic's HH-RLHF, with the embedded 135M model.

One is trained on pairs that were compared for harmlessness, one on those compared for helpfulness, and one on
both. Each is measured on the test pairs of both.

The data are read from the folder in CAI_BENCH_DATA, from `hh_rlhf/*.pairs.jsonl.gz`. Train and test parts are
both taken from the official test splits, so the figures are not comparable with those of the HH benchmark.

The head is fitted to the hidden states of the frozen model (`trains: head`). These take a pass through the
lowest layers for each pair, and are stored at once, so that the same command continues after an interrupt.
CAI_BENCH_TOKENS is the maximum length of a row in tokens (256), CAI_BENCH_LAYERS how many of the model's 30
layers are tried (10): with these a CPU needs some minutes. CAI_BENCH_TOKENS=2048 CAI_BENCH_LAYERS=30 uses all
rows and layers.

The Checkpoints are stored in the local cache, in `benchmarks/reward`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cai_graph import local
from cai_graph.errors import ConfigError
from cai_graph.intervals import wilson
from trainers import reward
from trainers.checkpoint import Checkpoint
from trainers.policy import load_reward, score

MODEL = "local:smollm2"
TOKENS = int(os.environ.get("CAI_BENCH_TOKENS", "256"))
LAYERS = int(os.environ.get("CAI_BENCH_LAYERS", "10"))
FOLDER = local.cache_dir() / "benchmarks" / "reward"
CHECKED = 32
"""Number of pairs whose rewards are computed again, by the loader that PPO and evaluation use."""

AIMS = ("harmless", "helpful")

Row = dict[str, Any]


def rows(part: str) -> list[Row]:
    """Return the pairs of one part, ordered by a hash of their ids, which mixes the two sets."""
    folder = Path(os.environ.get("CAI_BENCH_DATA") or "") / "hh_rlhf"
    files = sorted(folder.glob(f"*.{part}.pairs.jsonl.gz"))
    if not files:
        raise ConfigError(
            "set CAI_BENCH_DATA to the folder that holds hh_rlhf/, with its pairs.jsonl.gz files"
        )
    found = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                aim = "harmless" if file.name.startswith("harmless") else "helpful"
                found.append(
                    {**{key: row[key] for key in ("id", "prompt", "chosen", "rejected")}, "aim": aim}
                )
    return sorted(found, key=lambda row: hashlib.sha256(f"{row['id']}{part}".encode()).digest())


def dataset(folder: Path, aims: Sequence[str]) -> Path:
    """Write pairs in the format of `cai train reward`, for testing those of all aims; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, wanted in (("train", aims), ("test", AIMS)):
        found = [row for row in rows(part) if row["aim"] in wanted]
        lines = "".join(json.dumps({**row, "p_chosen": 1.0}) + "\n" for row in found)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def trained(aims: Sequence[str]) -> Checkpoint:
    """Return the reward model for these aims; it is trained first if no earlier run has."""
    name = f"{'-'.join(aims)}-{TOKENS}-{LAYERS}"
    if (FOLDER / name).exists():
        return Checkpoint.open(FOLDER / name)
    return reward.train(
        reward.Config(
            model=MODEL,
            data=dataset(FOLDER / f"data-{name}", aims),
            output=FOLDER / name,
            trains="head",
            layers=LAYERS,
            max_tokens=TOKENS,
            allow=("drop-long", "drop-unfit"),
            by="aim",
        )
    )


def by_words(train: Sequence[Row], test: Sequence[Row]) -> list[bool]:
    """Return for each test pair whether a logistic regression on the words predicts people's choice."""
    import numpy
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegressionCV

    def answers(found: Iterable[Row], side: str) -> list[str]:
        return [row[side][-1]["content"] for row in found]

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    words.fit(answers(train, "chosen") + answers(train, "rejected"))
    apart = words.transform(answers(train, "chosen")) - words.transform(answers(train, "rejected"))
    both, labels = vstack([apart, -apart]), numpy.repeat([1, 0], len(train))
    fold = numpy.tile(
        [hashlib.sha256(json.dumps(row["prompt"][0]).encode()).digest()[0] % 5 for row in train], 2
    )
    folds = [(numpy.flatnonzero(fold != one), numpy.flatnonzero(fold == one)) for one in range(5)]
    model = LogisticRegressionCV(
        Cs=(0.03, 0.1, 0.3, 1, 3),
        cv=folds,
        fit_intercept=False,
        max_iter=500,
        scoring="neg_log_loss",
        l1_ratios=(0,),
        use_legacy_attributes=False,
    ).fit(both, labels)
    told = (words.transform(answers(test, "chosen")) - words.transform(answers(test, "rejected"))) @ (
        model.coef_.ravel()
    )
    return [bool(value > 0) for value in told]


def kept(made: Checkpoint, found: Sequence[Row]) -> list[Row]:
    """Return the rows that the checkpoint was trained or measured on: those of at most `TOKENS` tokens."""
    tokenizer: Any = load_reward(made.path).tokenizer

    def length(row: Row) -> int:
        return max(
            len(tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=True, return_dict=False))
            for side in ("chosen", "rejected")
        )

    return [row for row in found if length(row) <= TOKENS]


def again(made: Checkpoint, found: Sequence[Row]) -> float:
    """Return the largest difference between a margin from training and the ordinary loader's, on a sample."""
    loaded = load_reward(made.path)
    some = found[:CHECKED]
    sides = [
        score(
            loaded, [row["prompt"] for row in some], [row[side][0]["content"] for row in some], batch_size=8
        )
        for side in ("chosen", "rejected")
    ]
    lines = (made.path / reward.HELD_OUT).read_text(encoding="utf-8").splitlines()[:CHECKED]
    written = [json.loads(line) for line in lines]
    return max(
        abs((chosen - rejected) - (one["chosen"] - one["rejected"]))
        for chosen, rejected, one in zip(*sides, written, strict=True)
    )


def _share(right: Sequence[bool]) -> str:
    low, high = wilson(sum(right), len(right))
    return f"{sum(right) / len(right):.3f} ({low:.3f} to {high:.3f})"


def _cells(right: Sequence[bool], test: Sequence[Row]) -> str:
    """Return the shares that are right, of the harmless and of the helpful pairs, as table cells."""
    return " | ".join(
        _share([yes for yes, row in zip(right, test, strict=True) if row["aim"] == aim]) for aim in AIMS
    )


def run() -> str:
    """Return the section of RESULTS.md."""
    made = {aims: trained(aims) for aims in ((AIMS[0],), (AIMS[1],), AIMS)}
    both = made[AIMS]
    train, test = kept(both, rows("train")), kept(both, rows("test"))
    section = [
        "## Reward models on HH-RLHF",
        "",
        f"SmolLM2-135M, frozen, its lowest layers with a fitted head, on pairs of at most {TOKENS} tokens. "
        f"Share of test pairs ({sum(row['aim'] == 'harmless' for row in test)} harmless, "
        f"{sum(row['aim'] == 'helpful' for row in test)} helpful) in which the answer that people chose has "
        "the higher reward, with 95 % intervals (Wilson):",
        "",
        "| way | trained on | harmless | helpful |",
        "|---|---|---|---|",
    ]
    facts = []
    for aims, one in made.items():
        assert one.manifest is not None
        lines = (one.path / reward.HELD_OUT).read_text(encoding="utf-8").splitlines()
        right = [pair["chosen"] > pair["rejected"] for pair in map(json.loads, lines)]
        metrics, counts = one.manifest.metrics, one.manifest.data
        name = " and ".join(aims)
        section.append(f"| reward model | {counts['rows']:,} {name} | {_cells(right, test)} |")
        facts.append(
            f"| {name} | {metrics['cv_depth']:.0f} | {metrics['cv_penalty']:g} "
            f"| {metrics['cv_accuracy']:.3f} | "
            + " | ".join(f"{metrics[f'eval_{aim}/ece']:.3f}" if aim in aims else "" for aim in AIMS)
            + " | "
            + " | ".join(f"{metrics[f'eval_{aim}/loss']:.4f}" if aim in aims else "" for aim in AIMS)
            + f" | {again(one, test):.3f} | {one.digest[:12]} |"
        )
    for aims in made:
        some = [row for row in train if row["aim"] in aims]
        told = _cells(by_words(some, test), test)
        section.append(f"| words of the answers | {len(some):,} {' and '.join(aims)} | {told} |")
    longer = [len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in test]
    section.append(f"| the longer answer | | {_cells(longer, test)} |")
    section += [
        "",
        "This is as of this cut of the official test splits, never the HH benchmark. Published small reward "
        "models, trained on the official training splits (GPT-2-large, 774M): about 0.74 harmless and 0.73 "
        "helpful by their model cards, unverified here.",
        "",
        "Of the reward models: depth in layers and penalty, chosen by five folds over training prompts, with "
        "the accuracy there; calibration error and cross-entropy of sigma(margin) on the test pairs of their "
        f"own aim ({math.log(2):.4f} nats is no knowledge); how far the margins of {CHECKED} pairs differ at "
        "most when the ordinary loader computes them, in float32; and how the weights' digest begins.",
        "",
        "| trained on | depth | penalty | folds | ece, harmless | ece, helpful | loss, harmless "
        "| loss, helpful | loader | digest |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *facts,
    ]
    return "\n".join(section)
