"""A reward model on human labels: the embedded 135M model on Anthropic's HH-RLHF, harmless and helpful apart.

CAI_BENCH_DATA names the folder that holds `hh_rlhf/*.pairs.jsonl.gz`. Its parts are cut from the official
test splits, so the figures are as of this cut, never of the HH benchmark.

The head is fitted to the frozen model's states (`trains: head`): a pass through the lowest layers for each
pair, kept as it is made, so that the same command goes on after an interrupt. CAI_BENCH_TOKENS is the longest
row in tokens (256), CAI_BENCH_LAYERS how many of the model's 30 layers are tried (10): what a CPU does in
some minutes. CAI_BENCH_TOKENS=2048 CAI_BENCH_LAYERS=30 takes all rows and layers.

The Checkpoint stays in the local cache, in `benchmarks/reward`.
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
from cai_graph.calibration import wilson
from cai_graph.errors import ConfigError
from trainers import reward
from trainers.checkpoint import Checkpoint
from trainers.policy import load_reward, score

MODEL = "local:smollm2"
TOKENS = int(os.environ.get("CAI_BENCH_TOKENS", "256"))
LAYERS = int(os.environ.get("CAI_BENCH_LAYERS", "10"))
FOLDER = local.cache_dir() / "benchmarks" / "reward"
CHECKED = 32
"""Pairs whose rewards are computed again, by the loader that PPO and evaluation use."""

Row = dict[str, Any]


def rows(part: str) -> list[Row]:
    """Return the pairs of one part in an order of their ids' hash, which mixes the sets."""
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


def dataset(folder: Path) -> Path:
    """Write the pairs as `cai train reward` reads them; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        lines = "".join(json.dumps({**row, "p_chosen": 1.0}) + "\n" for row in rows(part))
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def trained() -> Checkpoint:
    """Return the reward model; what an earlier run has trained is taken."""
    data = dataset(FOLDER / "hh_rlhf")
    output = FOLDER / f"smollm2-hh-{TOKENS}-{LAYERS}"
    if output.exists():
        return Checkpoint.open(output)
    return reward.train(
        reward.Config(
            model=MODEL,
            data=data,
            output=output,
            trains="head",
            layers=LAYERS,
            max_tokens=TOKENS,
            allow=("drop-long", "drop-unfit"),
            by="aim",
        )
    )


def by_words(train: Sequence[Row], test: Sequence[Row]) -> list[bool]:
    """Return for each test pair whether a logistic regression on the answers' words is right."""
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
    """Return the rows that the checkpoint was trained or measured on: those that are not too long."""
    tokenizer: Any = load_reward(made.path).tokenizer

    def length(row: Row) -> int:
        return max(
            len(tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=True, return_dict=False))
            for side in ("chosen", "rejected")
        )

    return [row for row in found if length(row) <= TOKENS]


def again(made: Checkpoint, found: Sequence[Row]) -> float:
    """Return the largest difference of a margin from that of the ordinary loader, over a sample."""
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


def run() -> str:
    """Return the section of RESULTS.md."""
    made = trained()
    assert made.manifest is not None
    train, test = kept(made, rows("train")), kept(made, rows("test"))
    metrics, counts = made.manifest.metrics, made.manifest.data
    words = by_words(train, test)
    longer = [len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in test]
    lines = (made.path / reward.HELD_OUT).read_text(encoding="utf-8").splitlines()
    right = [one["chosen"] > one["rejected"] for one in map(json.loads, lines)]
    assert len(right) == len(test)
    ways = {"reward model": right, "words of the answers": words, "the longer answer": longer}
    left_out = counts["read"] - counts["rows"]
    section = [
        "## A reward model on HH-RLHF",
        "",
        f"SmolLM2-135M, frozen, its first {metrics['cv_depth']:.0f} layers with a fitted head, on "
        f"{counts['rows']:,} training pairs of at most {TOKENS} tokens ({left_out:,} longer ones left out); "
        f"measured on {len(test):,} test pairs of the same length. Share of pairs in which the answer that "
        "people chose has the higher reward, with 95 % intervals (Wilson):",
        "",
        "| way | all | harmless | helpful |",
        "|---|---|---|---|",
    ]
    for name, told in ways.items():
        cells = [_share(told)]
        for aim in ("harmless", "helpful"):
            cells.append(_share([yes for yes, row in zip(told, test, strict=True) if row["aim"] == aim]))
        section.append(f"| {name} | {' | '.join(cells)} |")
    section += [
        "",
        f"n = {len(test)}: {sum(row['aim'] == 'harmless' for row in test)} harmless, "
        f"{sum(row['aim'] == 'helpful' for row in test)} helpful. Calibration error of sigma(margin) "
        f"{metrics['eval_ece']:.3f}, cross-entropy {metrics['eval_loss']:.4f} against {math.log(2):.4f} of "
        f"no knowledge. Depth and penalty ({metrics['cv_penalty']:g}) by five folds over training prompts, "
        f"where accuracy was {metrics['cv_accuracy']:.3f}.",
        "",
        "This is as of this cut of the official test splits, never the HH benchmark. Published small reward "
        "models, trained on the official training splits (GPT-2-large, 774M): about 0.74 harmless and 0.73 "
        "helpful by their model cards, unverified here.",
        "",
        f"Margins by the ordinary loader (float32, {CHECKED} pairs) differ from those above by at most "
        f"{again(made, test):.3f}. Weights of the checkpoint: sha256 {made.digest[:16]}.",
    ]
    return "\n".join(section)
