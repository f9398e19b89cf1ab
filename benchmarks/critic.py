"""Compares critics trained by a user with the built-in probe, on sources that neither was trained on.

The labels, harmful or not, are people's: of PyRIT, OpenAI moderation, HH-RLHF and everyday answers for
training, and of XSTest's answers for measuring. A critic trained here is stored in the local cache, and
later runs read its figures from its card. The data are read from the folder in CAI_DATA (../shared/data by
default).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cai_graph import local
from cai_graph.critic.probe import Probe, States
from trainers.critic import Config, train
from trainers.critic.figures import figures_of
from trainers.critic.heads import groups_of
from trainers.critic.labels import Row, lowest, read_rows
from trainers.critic.probe import Config as ProbeConfig
from trainers.critic.probe import chosen_rows, passes_of
from trainers.critic.states import StateCache
from trainers.rows import CriticRow, Turn, encode_row, line_of

MODEL = "local:smollm2"
PER_LABEL = int(os.environ.get("CAI_BENCH_PYRIT", "100"))
"""Number of PyRIT answers of each label, those of lowest hash."""
OTHERS = int(os.environ.get("CAI_BENCH_XSTEST", "80"))
"""Number of harmless XSTest answers, those of lowest hash; all harmful ones are used."""
UNSEEN = ("xstest_answers", "moderation")
LORA: dict[str, Any] = {"kind": "classifier", "epochs": 2, "max_tokens": 192}
RUNS: dict[str, dict[str, Any]] = {
    "probe": {"unseen": UNSEEN},
    "probe-pyrit": {"unseen": ("pyrit",)},
    "classifier": {**LORA, "unseen": UNSEEN},
    "classifier-pyrit": {**LORA, "unseen": ("pyrit",)},
}
"""Settings of each critic. Separate critics are trained without PyRIT, which has most harmful answers."""


def answers() -> list[Row]:
    """Return rows of the data on which the built-in probe's head `harm` was trained, and XSTest answers."""
    data = Path(os.environ.get("CAI_DATA", "../shared/data"))
    chosen = chosen_rows(read_rows(data), ProbeConfig(data=data, output=data, model=MODEL))
    rows = [row for row in chosen if row.answer is not None and row.harm is not None]
    cells = {
        (source, label): [row for row in rows if row.source == source and row.harm is label]
        for source in dict.fromkeys(row.source for row in rows)
        for label in (True, False)
    }
    limits = {("pyrit", True): PER_LABEL, ("pyrit", False): PER_LABEL, ("xstest_answers", False): OTHERS}
    return [row for cell, found in cells.items() for row in lowest(found, limits.get(cell, len(found)))]


def write_dataset(rows: Iterable[Row], folder: Path) -> Path:
    """Write the rows as a dataset of the kind `critic`; the judge is the source."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("wb") as file:
        for row in rows:
            made = CriticRow(
                trajectory_id=row.source,
                source="human",
                constitution="",
                judge=row.source,
                principles=("harmless",),
                p_violates=float(bool(row.harm)),
                prompt=(Turn(role="user", content=row.request),),
                completion=(Turn(role="assistant", content=row.answer or ""),),
                principle="harmless",
                violates=bool(row.harm),
            )
            file.write(line_of(*encode_row("critic", made), "train"))
    return folder


def trained(name: str, rows: list[Row]) -> dict[str, Any]:
    """Return the card of a critic; the critic is trained first if it is not in the cache."""
    home = local.cache_dir() / "benchmarks" / "critic"
    folder = home / name
    if not folder.exists():
        given = RUNS[name]
        # XSTest is for measuring only: it is passed only to critics that leave it out of training.
        mine = [row for row in rows if row.source != "xstest_answers" or row.source in given["unseen"]]
        data = write_dataset(mine, home / f"{name}-rows")
        config = Config(model=MODEL, data=data, output=folder, **given)
        train(config, lambda done, of: print(f"{name}: {done} of {of}", file=sys.stderr, flush=True))
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return card


def built_in(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Return the AUC of the built-in probe by setting: from its card, or for XSTest measured on `rows`."""
    probe = Probe.for_model("local")
    assert probe is not None
    found = {
        figure["setting"]: figure
        for figure in probe.card["figures"]
        if figure["head"] == "harm" and figure["measure"] == "auc"
    }
    import numpy

    unseen = [row for row in rows if row.source == "xstest_answers"]
    cache = StateCache(probe.reader())
    passes = [passes_of(row) for row in unseen]
    asyncio.run(cache.extract(passes))
    read = [max(probe.probability("harm", States(one, 0)) for one in each) for each in cache.load(passes)]
    groups = groups_of([row.request for row in unseen], [row.answer for row in unseen])
    y = numpy.array([int(bool(row.harm)) for row in unseen])
    (auc,) = figures_of("harm", "xstest_answers", numpy.array(read), y, groups)
    return {**found, "xstest_answers": auc.rounded()}


def run() -> str:
    """Return the section of RESULTS.md."""
    rows = answers()
    shipped = built_in(rows)
    columns: dict[str, dict[str, dict[str, Any] | None]] = {
        "the built-in probe (1.5B)": {
            "XSTest": shipped["xstest_answers"],
            "moderation": shipped["left out: moderation"],
            "PyRIT": shipped["left out: pyrit"],
        }
    }
    for name, title in (("probe", "a probe on smollm2 (135M)"), ("classifier", "LoRA on smollm2 (135M)")):
        figures = [*trained(name, rows)["figures"], *trained(f"{name}-pyrit", rows)["figures"]]
        aucs = {one["setting"]: one for one in figures if one["measure"] == "auc"}
        columns[title] = {
            "XSTest": aucs.get("xstest_answers, never trained on"),
            "moderation": aucs.get("moderation, never trained on"),
            "PyRIT": aucs.get("pyrit, never trained on"),
        }
    lines = [
        "## Critics of one's own against the built-in probe",
        "",
        "AUC for harmful answers by human labels, with the source left out of training; 95 % intervals from "
        "1000 resamples of whole requests. XSTest is unseen by all; the built-in probe is trained on "
        "moderation texts where it is measured on XSTest, the others are not. The built-in probe learns from "
        "586 answers less those left out, the others from 340 less those; LoRA (2 epochs, 192 tokens) keeps "
        "a fifth of them for its calibration.",
        "",
        f"| left out | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for source in ("XSTest", "moderation", "PyRIT"):
        lines.append(f"| {source} | {' | '.join(_cell(one[source]) for one in columns.values())} |")
    return "\n".join(lines)


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "not measured"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f}), n = {figure['n']}"


if __name__ == "__main__":  # python -m benchmarks.critic NAME: train one of RUNS alone
    trained(sys.argv[1], answers())
