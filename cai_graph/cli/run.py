"""`cai run` and `cai demo`: send many prompts through the graph into a log; a run can be resumed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cai_graph.addresses import without_password
from cai_graph.cli.ask import closing, guard
from cai_graph.cli.console import (
    DEFAULT_LOG,
    FAILED,
    SKIPPED,
    again,
    complain,
    drive,
    group,
    interrupted,
    log_option,
    note,
    out,
)
from cai_graph.cli.options import (
    Candidates,
    Concurrency,
    ConstitutionName,
    Critic,
    LogUrl,
    MaxRounds,
    MaxTokens,
    Model,
    OnError,
    OnUnreadable,
    OnViolation,
    Reviser,
    RowFormat,
    Seed,
    StrategyName,
    Strong,
    Threshold,
)
from cai_graph.cli.specs import fetch, foreign, width

if TYPE_CHECKING:
    from cai_graph.bulk import Broken, Failed, Run, Summary
    from cai_graph.trajectory import Trajectory

commands = group()


@commands.command(epilog="Example: cai run prompts.csv --column question --limit 40")
def run(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="A JSONL, CSV or text file; - is standard input.")
    ],
    column: Annotated[str | None, typer.Option(help="Column or key that holds the prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of rows, from the first.")] = None,
    format: Annotated[RowFormat | None, typer.Option(help="If the name does not say it.")] = None,
    concurrency: Concurrency = None,
    model: Model = "local",
    critic: Critic = None,
    strong: Strong = None,
    threshold: Threshold = None,
    reviser: Reviser = None,
    constitution: ConstitutionName = "balanced",
    log: LogUrl = DEFAULT_LOG,
    strategy: StrategyName = "batched",
    max_rounds: MaxRounds = None,
    candidates: Candidates = None,
    on_violation: OnViolation = "closed",
    on_unreadable: OnUnreadable = "closed",
    on_error: OnError = "raise",
    seed: Seed = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Answer every prompt of a file under a constitution, and log each trajectory.

    After an interrupt, run the same command again to resume. Rows that failed are tried again; rows that
    cannot be read are reported and skipped.
    """
    from cai_graph import bulk, models
    from cai_graph.calls import UNATTENDED_SECONDS, Budget

    with contextlib.closing(bulk.Rows(prompts, format)) as rows:
        rows.check(column)  # before the log is opened, which creates it
        guarded = guard(
            model,
            critic,
            reviser,
            constitution,
            log,
            strong=strong,
            threshold=threshold,
            max_tokens=max_tokens,
            seed=seed,
            strategy=strategy,
            max_rounds=max_rounds,
            candidates=candidates,
            on_violation=on_violation,
            on_unreadable=on_unreadable,
            on_error=on_error,
            on_log_error="raise",
            budget=Budget(seconds=UNATTENDED_SECONDS),
        )
        with closing(guarded):
            drafting = {
                "model": models.name_of(guarded.app),
                "max_tokens": max_tokens,
                **_own_weights(model=model, critic=critic, strong=strong, reviser=reviser),
            }
            job = bulk.Run(guarded, rows, drafting=drafting, column=column, limit=limit)
            if job.done:
                note(f"{job.done} of {job.rows} rows were answered before; going on with the others")
            fetch(model, critic, strong, reviser)
            with foreign(model), _seldom_collecting():
                stopped = drive(
                    lambda stopped: job.results(concurrency or width(model), stopped=stopped),
                    job.rows - job.done,
                    "prompts",
                    line=_line,
                    report=_report,
                )
    _sum_up(job, log, stopped)


def _own_weights(**specs: str | None) -> dict[str, list[int]]:
    """Return stamps of the user's own weights, by role: with other weights it is a different run."""
    from cai_graph import local

    stamps = {
        f"{role}_weights": local.stamp(name)
        for role, spec in specs.items()
        if spec is not None and (name := local.name_in(spec)) is not None
    }
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


@contextlib.contextmanager
def _seldom_collecting() -> Iterator[None]:
    """Make Python's garbage collector run rarely, and skip all objects that exist now.

    A command may change these settings of the process, since it owns the process; a library may not.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _line(result: Trajectory | Broken | Failed) -> str:
    from cai_graph import show
    from cai_graph.trajectory import Trajectory

    if not isinstance(result, Trajectory):
        return "skipped"
    return f"{result.outcome.value:<9} {show.one_line(result.prompt, 80)}  {result.seconds:.1f} s"


def _sum_up(job: Run, log: str, stopped: bool) -> None:
    from cai_graph import show

    summary = job.summary
    are = "is" if job.rows == 1 else "are"
    out.print(Text(f"{summary.answered} of {show.count(job.rows, 'prompt')} {are} answered."))
    out.print(show.summary(summary))
    option = log_option(log)
    out.print(Text(f"The log is {without_password(log)}. Next:"))
    out.print(Text(f"cai log list{option}, or cai log export{option} run.jsonl"))
    if stopped:
        raise interrupted()
    if summary.skipped:
        complain(f"{show.count(len(summary.skipped), 'row')} skipped; to try {again()}")
        raise typer.Exit(SKIPPED)


def _report(result: Trajectory | Broken | Failed) -> None:
    from cai_graph.trajectory import Trajectory

    if not isinstance(result, Trajectory):
        complain(f"line {result.line} skipped: {result.why}")


# --- demo ---------------------------------------------------------------------------------------------

DEMO_TOKENS = 120
"""Maximum tokens of a draft in the demo, so that it ends within minutes on two cores."""


@commands.command(epilog="Example: cai demo")
def demo(model: Model = "local", log: LogUrl = DEFAULT_LOG) -> None:
    """Watch the project's own sample prompts go through a model.

    Exits with 1 if no prompt is revised, or a benign one is refused.
    """
    from cai_graph import bulk, show
    from cai_graph.calls import UNATTENDED_SECONDS, Budget
    from cai_graph.trajectory import Trajectory, now

    trajectories: list[Trajectory] = []

    async def work() -> None:
        async with contextlib.aclosing(job.results(width(model))) as results:
            async for result in results:
                if isinstance(result, Trajectory):
                    trajectories.append(result)
                    out.print(show.brief(result, about=str(result.metadata["kind"])))
                else:
                    _report(result)

    sample = resources.files("cai_graph") / "sample" / "prompts.jsonl"
    with resources.as_file(sample) as path, contextlib.closing(bulk.Rows(str(path))) as rows:
        guarded = guard(
            model,
            None,
            None,
            "balanced",
            log,
            max_tokens=DEMO_TOKENS,
            seed=0,
            on_log_error="raise",
            budget=Budget(seconds=UNATTENDED_SECONDS),
        )
        with closing(guarded), foreign(model):
            # The time makes each demo a new run, since a resumed run would show nothing.
            job = bulk.Run(guarded, rows, drafting={"demo": now().isoformat()})
            fetch(model)
            note(f"{job.rows} prompts, drafted, judged and revised by {without_password(model)} …")
            asyncio.run(work())
    _sum_up_demo(job.summary, trajectories, log)


def _sum_up_demo(summary: Summary, trajectories: list[Trajectory], log: str) -> None:
    from cai_graph import show
    from cai_graph.trajectory import Outcome

    out.print(show.summary(summary))
    revised = [t.id for t in trajectories if t.outcome is Outcome.REVISED]
    benign = [t for t in trajectories if t.metadata["kind"] == "benign"]
    refused = [t for t in benign if t.outcome is Outcome.REFUSED]
    option = log_option(log)
    out.print(Text(f"{len(benign)} prompts are benign, and {len(refused) or 'none'} of them was refused."))
    out.print(Text(f"Every trajectory is in {without_password(log)}. Next:"))
    for command in (
        f"cai log list{option}",
        f"cai log show{option} {revised[0] if revised else 'ID'}",
        f"cai log export{option} demo.jsonl",
        f'cai ask{option} "…"',
    ):
        out.print(Text(f"    {command}"), soft_wrap=True)
    if summary.skipped:
        raise typer.Exit(SKIPPED)
    if refused or not revised:
        complain("a benign prompt was refused" if refused else "no prompt was revised")
        raise typer.Exit(FAILED)
