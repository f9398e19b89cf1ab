"""`cai feedback`: compares answers of the log with a judge, and records the feedback of end users."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cai_graph.cli.console import (
    DEFAULT_LOG,
    SKIPPED,
    again,
    complain,
    drive,
    group,
    imported,
    interrupted,
    note,
    out,
    print_json,
)
from cai_graph.cli.options import AsJson, Concurrency, ConstitutionName, LogUrl, option
from cai_graph.cli.specs import fetch, foreign, judging, loaded, width

if TYPE_CHECKING:
    from trainers.feedback import Labelled, Labelling
    from trainers.feedback.positions import Positions


class Pairs(StrEnum):
    """Which answers are compared; defined in trainers/feedback, which is too heavy to import for --help."""

    REVISION = "revision"
    REJECTED = "rejected"
    SAMPLES = "samples"


commands = group("Which of two answers is better: ask a judge, or record what people say.")


@commands.command("label", epilog="Example: cai feedback label --judge openai:gpt-5-mini --principles 2")
def label(
    log: LogUrl = DEFAULT_LOG,
    judge: Annotated[
        str | None, option("--judge", "Who compares: a model that reads both answers.", "SPEC")
    ] = None,
    critic: Annotated[
        str | None, option("--critic", "Compare by a critic instead, which judges each answer alone.", "SPEC")
    ] = None,
    constitution: ConstitutionName = "balanced",
    pairs: Annotated[
        list[Pairs] | None,
        option("--pairs", "What is compared: revision by default, samples with --model; may be repeated."),
    ] = None,
    principles: Annotated[
        int, typer.Option(min=1, help="Number of principles that each pair is compared under.")
    ] = 1,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="The judge reasons first; its probabilities are clamped.")
    ] = False,
    band: Annotated[
        tuple[float, float], typer.Option(help="The band of a judge that reasons.", metavar="LOW HIGH")
    ] = (0.4, 0.6),
    votes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sample this many replies for each order, instead of reading log-probabilities."
        ),
    ] = None,
    model: Annotated[
        str | None, option("--model -m", "Draw new answers from this model, and compare those.", "SPEC")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Number of answers sampled for each prompt.")] = 2,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens of a sampled answer.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature of the answers.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the random choice of principles.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of trajectories, from the first.")
    ] = None,
    concurrency: Concurrency = None,
    as_json: AsJson = False,
) -> None:
    """Compare answers of the log, in both orders, and append each comparison to the log.

    Beside the progress, P(A) is how likely A is the better of two answers: the draft, the candidate that was
    rejected, or the sample that was drawn first.

    After an interrupt, run the same command again to resume.
    """
    from cai_graph import constitution as constitutions
    from cai_graph import show
    from cai_graph.critic import critic_for
    from cai_graph.log import open_log
    from trainers.feedback import Config, Labelling
    from trainers.feedback.judge import Judge

    if judge is None and critic is None:
        raise typer.BadParameter(
            "name who compares: --judge SPEC, a large model that reads both answers, or --critic SPEC, which "
            "judges each alone (--critic local: the embedded model's probe); docs/feedback.md says what they "
            "are worth"
        )
    if judge is not None and critic is not None:
        raise typer.BadParameter("--judge and --critic are two ways to compare; name one of them")
    who = critic or judge or ""
    usual = Pairs.REVISION if model is None else Pairs.SAMPLES
    with open_log(log, read_only=True):
        pass  # an absent log is an error, since there is nothing to compare
    with contextlib.closing(open_log(log)) as opened:
        job = Labelling(
            opened,
            Judge(loaded(who), reasoning=reasoning, votes=votes)
            if critic is None
            else critic_for(judging(critic)),
            constitutions.load(constitution),
            Config(
                pairs=tuple(pair.value for pair in pairs or [usual]),
                principles=principles,
                samples=samples,
                seed=seed,
                band=band,
                limit=limit,
            ),
            sampler=None if model is None else loaded(model, max_tokens=max_tokens, temperature=temperature),
            sampling="" if model is None else f"{temperature:g}/{max_tokens}",
        )
        if job.done:
            note(f"{job.done} of {job.total} trajectories were labelled before; going on with the others")
        fetch(who, model)
        with foreign(who):
            failed = 0

            def report(result: Labelled) -> None:
                nonlocal failed
                if result.failed is not None:
                    failed += 1
                    complain(f"{result.trajectory.id} failed: {result.failed}")

            stopped = drive(
                lambda stopped: job.results(concurrency or width(who), stopped=stopped),
                job.total - job.done,
                "trajectories",
                line=_line,
                report=report,
            )
    _sum_up(job, as_json)
    if stopped:
        raise interrupted()
    if failed:
        count = show.count(failed, "trajectory", "trajectories")
        complain(f"{count} failed; to try {again()}")
        raise typer.Exit(SKIPPED)


def _line(result: Labelled) -> str:
    from cai_graph import show

    said = [
        "unreadable" if (p := comparison.preference) is None else f"P(A) {p:.2f}"
        for comparison in result.comparisons
    ]
    return f"{show.one_line(result.trajectory.prompt, 60)}  {', '.join(said)}"


def _sum_up(job: Labelling, as_json: bool) -> None:
    if as_json:
        print_json(job.positions.summary())
    elif not job.total:
        out.print(Text("No trajectory of this log has answers to compare."))
    else:
        _show(job.positions)


def _show(found: Positions) -> None:
    from cai_graph import show

    rows: list[tuple[str, Any]] = [
        ("judge", found.judge),
        ("comparisons", found.comparisons),
        ("clear, of use for training", found.clear),
        ("the two orders disagree", f"{found.first + found.second}: position bias {found.bias}"),
        ("  the first shown was chosen", found.first),
        ("  the second shown was chosen", found.second),
        ("mean shift towards the first", f"{found.mean_shift:+.3f}"),
        ("ties", found.ties),
        ("unreadable", found.unreadable),
        ("pairs of the same text", found.identical),
        ("revision preferred over draft", str(found.agreement)),
        ("preferred as reviewers did", str(found.agreement_with_people)),
    ]
    out.print(show.table(rows))


@commands.command("stats", epilog="Example: cai feedback stats --json")
def stats(log: LogUrl = DEFAULT_LOG, as_json: AsJson = False) -> None:
    """Report how reliable each judge in the log is: position bias, ties, unreadable comparisons."""
    from cai_graph.log import open_log
    from trainers.feedback.positions import positions

    with open_log(log, read_only=True) as opened:
        found = positions(opened)
    if as_json:
        print_json([one.summary() for one in found.values()])
        return
    for number, one in enumerate(found.values()):
        if number:
            out.print()
        _show(one)
    if not found:
        out.print(Text("This log holds no comparison; cai feedback label makes them."))


@commands.command("add", epilog="Example: cai feedback add 019a2f6e-7c1b-7d3a-9f2e-5b8c0d1e2f3a --score 1")
def add(
    trajectory: Annotated[str, typer.Argument(metavar="TRAJECTORY_ID", help="Id of the trajectory.")],
    score: Annotated[float, typer.Option(min=-1, max=1, help="-1 (bad) to 1 (good).")],
    user: Annotated[str | None, typer.Option(help="The application's id of the user.")] = None,
    note_: Annotated[str | None, typer.Option("--note", help="The user's words.")] = None,
    log: LogUrl = DEFAULT_LOG,
) -> None:
    """Append an end user's feedback on an answer."""
    from cai_graph.errors import DataError
    from cai_graph.log import open_log
    from cai_graph.log.feedback import new_feedback
    from cai_graph.trajectory import Trajectory

    made = new_feedback(trajectory, score, user, note_)
    with open_log(log, read_only=True) as opened:
        if not isinstance(opened.get(trajectory), Trajectory):
            raise DataError(f"{trajectory} is no trajectory; feedback is about one")
    with open_log(log) as opened:
        opened.append(made).result()
    typer.echo(made.id)


@commands.command("import", epilog="Example: cai feedback import thumbs.jsonl")
def import_(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="JSONL with trajectory_id, score and, where known, user, note and at."
        ),
    ],
    log: LogUrl = DEFAULT_LOG,
) -> None:
    """Append end users' feedback from a file. Feedback that the log already has is not added again."""
    from cai_graph.log.feedback import import_feedback

    done = import_feedback(log, file)
    imported(f"{done.added} added; {done.present} were there already", done.broken)
