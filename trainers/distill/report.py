"""Writes the report of a `cai distill` run, as one HTML page, from the stored results of its steps."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cai_graph.trajectory import text_of
from trainers import atomic
from trainers.checkpoint import Checkpoint, Manifest
from trainers.config import plain
from trainers.distill.config import Config
from trainers.distill.pipeline import CHECKPOINT, EVALUATION, LOG, Done, Pipeline
from trainers.evaluation.folder import Evaluation
from trainers.evaluation.plots import svgs
from trainers.evaluation.summary import summarise
from trainers.page import document, figure, table

__all__ = ["REPORT", "report"]

REPORT = "report.html"
"""File name of the report, in the output folder."""

SAMPLES = 8
"""Number of prompts whose answers are shown before and after training."""
_CUT = 700


def report(output: Path, config: Config, steps: Pipeline, done: Mapping[str, Done]) -> None:
    """Write the results of a run to `REPORT` in its folder.

    The page is built from the stored results of the steps: figures side by side, plots of evaluation, reward
    model and watch, answers before and after, and the lineage of the model back to logs and constitution.
    """
    sections = [
        _section("Figures, side by side", _figures(done)),
        _section("Answers before and after", _answers(done)),
        _section("Plots", "".join(_plots(done))),
        _section("Training", _training(done)),
        _section("From the model back to the log", _lineage(config, steps, done)),
        _section("Steps", _steps(steps, done)),
        _section("Config", table([(key, _said(value)) for key, value in plain(config).items()], text=True)),
    ]
    title = f"{output.name}: {config.model} under {config.constitution}"
    atomic.write(output / REPORT, document(title, "".join(sections)))


def _section(heading: str, body: str) -> str:
    return f"<h2>{html.escape(heading)}</h2>\n{body}\n" if body else ""


def _figures(done: Mapping[str, Done]) -> str:
    if "evaluation" not in done:
        return "<p>Nothing was evaluated: the config names no suite.</p>"
    found = done["evaluation"].figures
    subjects: list[str] = found["subjects"]
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for one in found["figures"]:
        about = (one["suite"], one["measure"], one["by"])
        cells.setdefault(about, {})[one["subject"]] = _estimate(one)
    rows = [[*about, *(values.get(subject, "") for subject in subjects)] for about, values in cells.items()]
    numbers = range(3, 3 + len(subjects))
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in found["notes"])
    said = (
        "<p>Means, 95 % intervals, numbers of prompts. What could not be read, or had no judgement since the "
        "judge was out, is in no figure and is counted. Read the rows &quot;change of …&quot;, which are "
        "paired by prompt; a change is shown only where its interval leaves out 0.</p>"
    )
    return said + table(rows, header=("suite", "measure", "by", *subjects), numbers=numbers) + notes


def _estimate(one: Mapping[str, Any]) -> str:
    found = one.get("estimate", one)
    left_out = f", {one['left_out']} left out" if one.get("left_out") else ""
    if not found.get("n"):
        return f"none{left_out}"
    low, high = found.get("low"), found.get("high")
    between = f"({low:.3g} to {high:.3g}), " if low is not None and high is not None else ""
    beside = f"{between}n {found['n']}{left_out}".replace(" ", "\N{NO-BREAK SPACE}")
    return f"{found['value']:.3g} {beside}"


def _answers(done: Mapping[str, Done]) -> str:
    if "evaluation" not in done:
        return ""
    kept = _kept(done)
    answers = {name: {row["prompt"]: row["answer"] for row in kept.answers(name)} for name in kept.subjects}
    shown = ""
    # Sorted by id, which is a digest, so the choice is pseudo-random.
    for id, prompt in sorted(kept.prompts.items())[:SAMPLES]:
        asked = text_of(prompt.messages[-1])
        rows = [(f"prompt ({prompt.suite})", _cut(asked))]
        rows += [(name, _cut(given.get(id, "no answer"))) for name, given in answers.items()]
        shown += table(rows, text=True)
    return shown


def _kept(done: Mapping[str, Done]) -> Evaluation:
    return Evaluation.open(done["evaluation"].path / EVALUATION)


def _cut(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[:_CUT]} […]"


def _plots(done: Mapping[str, Done]) -> Iterable[str]:
    if "evaluation" in done:
        kept = _kept(done)
        for caption, svg in svgs(summarise(kept)).items():
            yield figure(svg, caption)
    for name, step in done.items():
        for path in sorted((step.path / CHECKPOINT).glob("*.svg")):
            yield figure(path.read_text(encoding="utf-8"), f"{name}: {path.stem}")


def _training(done: Mapping[str, Done]) -> str:
    said = "".join(
        f"<p>{html.escape(f'{name}: stopped by the watch {manifest.stopped}')}.</p>"
        for name, step in done.items()
        if (manifest := _manifest(step)) is not None and manifest.stopped is not None
    )
    rows = [
        (name, metric, f"{value:.6g}")
        for name, step in done.items()
        for metric, value in sorted(step.figures.get("metrics", {}).items())
    ]
    return said + table(rows, header=("step", "figure", "last value"), numbers=(2,)) if rows else said


def _manifest(step: Done) -> Manifest | None:
    """Return the manifest of a step's checkpoint; None if the step makes none, or it has no manifest."""
    folder = step.path / CHECKPOINT
    return Checkpoint.open(folder).manifest if folder.is_dir() else None


def _lineage(config: Config, steps: Pipeline, done: Mapping[str, Done]) -> str:
    """Return a table of steps, last first: digests, inputs, and the constitutions that judged their data."""
    rows: list[tuple[str, str]] = []
    for step in reversed(steps.steps):
        found = done[step.name]
        came_from = ", ".join(one.name for one in step.inputs) or "the config's prompts, logs and model"
        said = [f"digest {step.digest[:16]}, from {came_from}"]
        if (found.path / CHECKPOINT).is_dir():
            checkpoint = Checkpoint.open(found.path / CHECKPOINT)
            said.append(f"weights {checkpoint.digest[:16]}")
            if checkpoint.manifest is not None:
                manifest = checkpoint.manifest
                rows_digest = str(manifest.data.get("digest", ""))[:16]
                said.append(f"{manifest.data.get('rows', 0):,} rows, digest {rows_digest}")
                judged = ", ".join(one[:16] for one in manifest.constitution_digests)
                said += [f"constitutions {judged}"] if judged else []
        if step.name == "trajectories":
            said.append(f"{found.figures['trajectories']:,} trajectories in {found.path / LOG}")
            said.append(f"constitution {step.settings['constitution'][:16]} ({config.constitution})")
        rows.append((step.name, "\n".join(said)))
    return table(rows, text=True)


def _steps(steps: Pipeline, done: Mapping[str, Done]) -> str:
    rows = []
    for step in steps.steps:
        found = done[step.name]
        rows.append(
            (step.name, f"{found.seconds:,.1f} s", "kept" if found.skipped else "made", found.path.name)
        )
    return table(rows, header=("step", "took", "by this run", "folder in stages/"), numbers=(1,))


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
