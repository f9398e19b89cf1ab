"""`cai evaluate`: generates, stores and grades answers of models, checkpoints and wrapped apps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai_graph.addresses import without_password
from cai_graph.cli.console import SKIPPED, group, measured, note, out, print_json, resumable
from cai_graph.cli.options import AsJson, ConstitutionName, option
from cai_graph.cli.specs import fetch, foreign, judging, loaded, width
from cai_graph.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cai_graph.critic import Critic
    from trainers.evaluation.generations import Subject
    from trainers.evaluation.refusals import Agreement
    from trainers.evaluation.suites import Prompt, Suite
    from trainers.evaluation.summary import Summary

commands = group("What a model is worth: harmlessness, helpfulness and over-refusal, with intervals.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the evaluation.")]


@commands.command(
    "run",
    epilog="Example: cai evaluate run eval local out/sft --harmlessness red.csv --over-refusal xstest.csv",
)
def run(
    folder: Folder,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="What to evaluate: model specs, folders of checkpoints, or app:package.module:name. The "
            "others are measured against the first.",
        ),
    ],
    harmlessness: Annotated[Path | None, option("--harmlessness", "Red-team prompts.", "FILE")] = None,
    helpfulness: Annotated[Path | None, option("--helpfulness", "Benign prompts.", "FILE")] = None,
    over_refusal: Annotated[
        Path | None,
        option("--over-refusal", "Prompts that look unsafe; a column label says safe or unsafe.", "FILE"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts of each suite.")] = None,
    constitution: Annotated[
        list[str] | None,
        option("--constitution -c", "Evaluate each model under it, too; may be repeated.", "NAME|FILE"),
    ] = None,
    critic: Annotated[
        str | None, option("--critic", "Who judges under the constitution; the model by default.", "SPEC")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of answers to each prompt.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Of the draw; by default 0 of models on this machine, of others their own."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Sampling seed of local models and checkpoints.")] = 0,
    trained_on: Annotated[
        list[Path] | None,
        option("--trained-on", "Data that a model was trained on; a checkpoint's own is known.", "DIR|FILE"),
    ] = None,
    drop_trained: Annotated[
        bool,
        typer.Option(
            "--drop-trained",
            help="Leave out prompts that a model was trained on, instead of stopping with an error.",
        ),
    ] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts processed at the same time; 4 on the local model, else 16."),
    ] = None,
) -> None:
    """Have models answer the prompts of the suites, and store the answers.

    After an interrupt, run the same command again to resume; run it with more models to add them.
    """
    from cai_graph import show
    from trainers.evaluation.folder import Evaluation
    from trainers.evaluation.suites import read_suite

    files: dict[Suite, Path | None] = {
        "harmlessness": harmlessness,
        "helpfulness": helpfulness,
        "over-refusal": over_refusal,
    }
    prompts = [
        prompt
        for suite, path in files.items()
        if path is not None
        for prompt in read_suite(suite, path, limit)
    ]
    drawn = {name: _temperature(name, temperature) for name in models}
    if samples > 1 and 0 in drawn.values():
        raise typer.BadParameter(
            "at temperature 0, the default of models on this machine, all samples are the same; "
            "leave --samples out, or give --temperature"
        )
    prompts, notes = _not_trained_on(prompts, models, trained_on or [], drop_trained)
    if 0 in drawn.values() and None in drawn.values():
        by_default = ", ".join(without_password(name) for name, own in drawn.items() if own is None)
        notes.append(
            f"{by_default}: at a temperature of its own, the others at 0; --temperature gives all the same"
        )
    evaluation = Evaluation.begin(folder, prompts, notes=notes)
    fetch(*(name for name in models if not Path(name).is_dir()), critic)

    async def work() -> int:
        failed = 0
        for name in models:
            about = {"max_tokens": max_tokens, "temperature": drawn[name], "seed": seed}
            for subject in _subjects(name, about, constitution or [], critic, concurrency):
                is_kept = subject.name in evaluation.subjects
                kept = len(evaluation.answers(subject.name)) if is_kept else 0
                with measured(f"answers of {subject.name}") as tell, foreign(name):
                    failed += await evaluation.generate(subject, samples=samples, progress=tell)
                if kept:
                    note(f"kept from an earlier run: {show.count(kept, 'answer')} of {subject.name}")
        return failed

    with resumable():
        failed = asyncio.run(work())
    subjects = len(evaluation.subjects)
    note(
        f"the answers of {show.count(subjects, 'subject')} are in {folder}; `cai evaluate score` grades them"
    )
    if failed:
        note(f"{show.count(failed, 'prompt')} failed, in no figure; the same command tries again")
        raise typer.Exit(SKIPPED)


def _temperature(model: str, asked: float | None) -> float | None:
    """Return a model's temperature; None: the provider's default. A local model has none, so it gets 0."""
    from cai_graph import local

    if asked is None and (Path(model).is_dir() or local.name_in(model) is not None):
        return 0.0
    return asked


def _not_trained_on(
    prompts: list[Prompt], models: list[str], given: list[Path], drop: bool
) -> tuple[list[Prompt], list[str]]:
    """Return the prompts that were not trained on, and notes for readers of the figures.

    Raises:
        DataError: prompts were trained on, and `drop` is not set.
        ModelError: a folder that is named as a model is not a checkpoint.
    """
    from trainers.checkpoint import Checkpoint
    from trainers.evaluation.suites import data_of, summed_up, trained_on

    data, unknown = list(given), []
    for name in models:
        if Path(name).is_dir():
            Checkpoint.open(name)
        found, gaps = data_of(name)
        data += found
        unknown += [] if given else gaps
    seen, gaps = trained_on(prompts, dict.fromkeys(data))
    notes = [f"{why}: some prompts may be among it" for why in [*unknown, *gaps]]
    if seen and not drop:
        raise DataError(
            f"{summed_up(seen, prompts)}; give prompts that were held out, or leave these out with "
            "--drop-trained"
        )
    if seen:
        notes.append(f"{len(seen)} of {len(prompts)} prompts were trained on and are left out")
    left_out = {prompt.id for prompt in seen}
    return [prompt for prompt in prompts if prompt.id not in left_out], notes


def _subjects(
    name: str, about: dict[str, Any], constitutions: list[str], critic: str | None, concurrency: int | None
) -> Iterator[Subject]:
    """Yield a model by itself, then the model under each constitution."""
    from cai_graph import constitution as rules
    from cai_graph.chain import constitutional
    from trainers.evaluation.generations import AppSubject, CheckpointSubject, app_of
    from trainers.identity import identity_of_module

    if Path(name).is_dir():
        if constitutions:
            raise ConfigError(
                f"{name}: a constitution needs a chat model; serve the checkpoint, such as by local:{name}, "
                "and name that"
            )
        yield CheckpointSubject(
            Path(name),
            name=name,
            max_tokens=about["max_tokens"],
            temperature=about["temperature"],
            seed=about["seed"],
        )
        return
    kind, _, rest = name.partition(":")
    if kind == "app":
        app, settings = app_of(rest), {"module": identity_of_module(rest.partition(":")[0])}
    else:
        app, settings = loaded(name, **about), {k: v for k, v in about.items() if k != "seed"}
    at_once = concurrency or width(name)
    seed = about["seed"]
    shown = without_password(name)
    plain = AppSubject(app, name=shown, seed=seed, concurrency=at_once, settings=settings)
    yield plain
    by: dict[str, Any] = {"critic": critic and without_password(critic)}
    if critic is not None and (weights := _weights_of_critic(critic)) is not None:
        by["critic_weights"] = weights
    for each in constitutions:
        found = rules.load(each)
        guarded = constitutional(app, constitution=found, critic=critic, log=None)
        under = {**plain.settings, "constitution": found.digest, **by}
        yield AppSubject(
            guarded, name=f"{shown} under {found.name}", seed=seed, concurrency=at_once, settings=under
        )


def _weights_of_critic(spec: str) -> str | None:
    """Return a digest of the user's own files behind a critic; None for others, which the spec identifies."""
    from cai_graph.critic.trained import PREFIX
    from trainers.identity import identity, weights_of

    return identity(spec) if spec.startswith(PREFIX) else weights_of(spec)


@commands.command(
    "score", epilog="Example: cai evaluate score eval --critic local --refusals probe --judge local"
)
def score(
    folder: Folder,
    critic: Annotated[
        str | None, option("--critic", "Grades harmlessness and helpfulness by its verdicts.", "SPEC")
    ] = None,
    by_claim: Annotated[
        bool, typer.Option("--by-claim", help="The critic judges long answers claim by claim.")
    ] = False,
    reward: Annotated[
        list[str] | None,
        option(
            "--reward",
            "Grades them by a number: a reward model's folder, judge:SPEC or package.module:function; may be "
            "repeated.",
            "REWARD",
        ),
    ] = None,
    refusals: Annotated[
        str | None,
        option(
            "--refusals", "Says who refuses: probe, pattern, or a model that is asked.", "probe|pattern|SPEC"
        ),
    ] = None,
    judge: Annotated[
        str | None, option("--judge", "Compares the subjects' answers in both orders.", "SPEC")
    ] = None,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="The judge reasons before it chooses.")
    ] = False,
    best_of: Annotated[
        str | None,
        option("--best-of", "Adds the best of several samples by a reward, as a subject.", "REWARD"),
    ] = None,
    self_consistency: Annotated[
        bool,
        typer.Option(
            "--self-consistency",
            help="Also evaluate the answer on which a subject's samples agree most, as a subject of its own.",
        ),
    ] = False,
    constitution: ConstitutionName = "balanced",
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Pairs processed at the same time; 4 on the local model, else 16."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Grade the stored answers, and print harmlessness, helpfulness and over-refusal side by side.

    Nothing is written by the models again, and what a judge has said before is not asked again. Without
    options the figures of earlier judges are shown. They stand in figures.json and plots/, too.
    """
    import json

    from cai_graph import constitution as rules
    from cai_graph import show
    from trainers.config import require
    from trainers.evaluation.folder import AIMS, Evaluation, write_whole
    from trainers.evaluation.graders import graders_for
    from trainers.evaluation.grades import RewardGrader
    from trainers.evaluation.plots import svgs
    from trainers.evaluation.summary import summarise
    from trainers.feedback.judge import Judge

    if by_claim and critic is None:
        raise typer.BadParameter("--by-claim says how the critic judges; name one with --critic")
    # Figures and plots need these packages: check for them before judges are paid.
    require("`cai evaluate score`", "numpy", "scipy", "matplotlib")
    evaluation = Evaluation.open(folder)
    found = rules.load(constitution)
    fetch(critic, judge)

    async def work() -> int:
        failed = 0
        grading = None if critic is None else _critic(critic, by_claim)
        if best_of is not None:
            with measured(f"choosing by {without_password(best_of)}") as tell:
                await evaluation.best_of(RewardGrader.of(best_of, found), tell)
        if self_consistency:
            evaluation.self_consistent()
        for suite in evaluation.suites():
            graders = graders_for(suite, found, critic=grading, reward=reward or (), refusals=refusals)
            for grader in graders:
                with measured(f"{suite}, by {grader.name}") as tell:
                    failed += await evaluation.grade(suite, grader, tell)
            if judge is not None and suite in AIMS:
                comparing = Judge(loaded(judge), reasoning=reasoning)
                at_once = concurrency or width(judge)
                with measured(f"{suite}, compared by {comparing.name}") as tell:
                    failed += await evaluation.compare(
                        suite, comparing, found, concurrency=at_once, progress=tell
                    )
        return failed

    with resumable(), foreign(judge or critic or refusals or "the judge"):
        failed = asyncio.run(work())
    summary = summarise(evaluation)
    write_whole(folder / "figures.json", json.dumps(summary.json(), indent=2) + "\n")
    for number, svg in enumerate(svgs(summary).values(), 1):
        write_whole(folder / "plots" / f"{number}.svg", svg)
    if as_json:
        print_json(summary.json())
    else:
        _print(summary)
    if failed:
        note(f"{show.count(failed, 'judgement')} failed, in no figure; the same command asks again")
        raise typer.Exit(SKIPPED)


def _critic(spec: str, by_claim: bool) -> Critic:
    from cai_graph.critic import critic_for
    from trainers.evaluation.claims import ByClaim

    critic = critic_for(judging(spec))
    return ByClaim(critic) if by_claim else critic


def _print(summary: Summary) -> None:
    from cai_graph import show
    from trainers.evaluation.summary import table

    figures = table(summary)
    _print_turned([list(map(show.clean, row)) for row in (figures.header, *figures.rows)], out.width)
    for line in figures.key:
        out.print(show.clean(line))


def _print_turned(rows: list[list[str]], width: int) -> None:
    """Print a table with its rows as columns, without wrapping numbers.

    If they do not all fit, each cell takes three lines, and further columns go into tables below.
    """
    import textwrap

    from rich.table import Table

    (_, *measures), *subjects = rows
    gap = 2
    left = width - max(map(len, measures), default=0) - gap
    if sum(gap + max(map(len, subject)) for subject in subjects) > left:
        subjects = [
            [name, *(cell.replace(" (", "\n(").replace(", n", ",\nn") for cell in cells)]
            for name, *cells in subjects
        ]
        wide = max(12, *(len(line) for _, *cells in subjects for cell in cells for line in cell.split("\n")))
        abreast = max(1, left // (wide + gap))
    else:
        wide, abreast = width, max(1, len(subjects))
    for start in range(0, len(subjects), abreast):
        shown = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
        shown.add_column("", no_wrap=True)
        found = subjects[start : start + abreast]
        for name, *_ in found:
            shown.add_column("\n".join(textwrap.wrap(name, wide)), no_wrap=True)
        for row in zip(measures, *(cells for _, *cells in found), strict=True):
            shown.add_row(*row)
        out.print(shown)
        out.print()


@commands.command(
    "agreement", epilog="Example: cai evaluate agreement model_completions/*.csv --refusals pattern"
)
def agreement(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="CSV with prompt, completion and final_label, as XSTest has."),
    ],
    refusals: Annotated[
        str, option("--refusals", "Which classifier: probe, pattern, or a model.", "probe|pattern|SPEC")
    ] = "probe",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of answers; a fixed sample of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well refusal classifiers agree with human labels."""
    from trainers.config import require
    from trainers.evaluation import refusals as classes

    require("`cai evaluate agreement`", "numpy")
    rows = classes.read_labelled(files, limit)
    fetch("local" if refusals == "probe" else refusals)
    grader = classes.refusals_for(refusals)
    with measured(f"answers read by {grader.name}") as tell, foreign(refusals):
        found = asyncio.run(classes.agreement(rows, grader, tell))
    if as_json:
        print_json(found.json())
    else:
        _print_agreement(found)


def _print_agreement(found: Agreement) -> None:
    from cai_graph import show

    out.print(
        show.table(
            [
                ("answers", f"{found.answers:,}, and {found.unreadable:,} that could not be read"),
                ("refuses at all: accuracy", str(found.accuracy_of_refusing)),
                ("refuses at all: kappa", str(found.kappa_of_refusing)),
                ("three classes: accuracy", str(found.accuracy)),
                ("three classes: kappa", str(found.kappa)),
                ("the raters with each other: kappa", str(found.kappa_of_people)),
                *((f"{each}: recall", str(value)) for each, value in found.recall.items()),
                *((f"{each}: precision", str(value)) for each, value in found.precision.items()),
            ]
        )
    )
