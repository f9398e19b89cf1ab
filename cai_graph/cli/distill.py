"""`cai distill`: runs the whole pipeline from prompts or a log to a trained model, in one command."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cai_graph.cli.console import err, group, measured, out, resumable
from cai_graph.cli.options import option
from cai_graph.cli.specs import fetch, foreign

if TYPE_CHECKING:
    from trainers.distill import Config
    from trainers.distill.pipeline import Pipeline

commands = group()


@commands.command(epilog="Example: cai distill examples/distill-small.yaml --dry-run")
def distill(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; docs/distill.md has one.")],
    settings: Annotated[
        list[str] | None,
        option("--set -s", "A key of the config, such as sft.max_steps=12; may be repeated.", "KEY=VALUE"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only print the steps, with their tokens and an estimate of their time."
        ),
    ] = False,
) -> None:
    """Train a model under a constitution: trajectories, sft, AI feedback, reward, RL, evaluation, report.

    After an interrupt, run the same command again to resume. Steps whose inputs have not changed are
    skipped.
    """
    from trainers.config import read
    from trainers.distill import Config, pipeline, train

    wanted = read(Config, config, settings or ())
    steps = pipeline(wanted)  # raises config errors before weights are downloaded
    if dry_run:
        _plan(steps)
        return
    fetch(wanted.model, *_others(wanted))
    # TRL's output is not a result of the command.
    with resumable(), _progress() as (tell, progress), foreign(str(config)), redirect_stdout(sys.stderr):
        checkpoint, page = train(wanted, tell, progress)
    out.print(Text(f"The model is {checkpoint.path}, and the report is {page}. Next:"))
    if (checkpoint.path / "model.gguf").exists():
        out.print(Text(f'    cai ask "…" --model local:{checkpoint.path}'), soft_wrap=True)


def _others(config: Config) -> Iterator[str | None]:
    yield from (config.drafts.model, config.drafts.critic, config.drafts.reviser)
    yield from (config.feedback.judge, config.feedback.critic, config.feedback.sampler)
    yield config.evaluation.critic


def _plan(steps: Pipeline) -> None:
    """Print the steps that a run would do, with estimates."""
    from rich import box
    from rich.table import Table

    from trainers.distill.sizes import estimate

    states = {"done": "skipped", "begun": "goes on", "new": ""}
    seconds = estimate(steps)
    table = Table(box=box.SIMPLE)
    for name in ("step", "state", "tokens read", "written", "trained", "about"):
        table.add_column(name, justify="left" if name in ("step", "state") else "right")
    for step in steps.steps:
        read, written, trained = (
            sum(getattr(one, name) for one in step.needs) for name in ("read", "written", "trained")
        )
        state = steps.state(step)
        needed = seconds[step.name]
        table.add_row(
            step.name,
            states[state],
            *(f"{number:,}" if number else "" for number in (read, written, trained)),
            "" if state == "done" else "a server decides" if needed is None else _duration(needed),
        )
    out.print(table)
    total = _duration(sum(needed or 0.0 for needed in seconds.values()))
    out.print(
        Text(f"About {total} on these processors if nothing else runs, give or take a factor of three.")
    )
    out.print(Text(f"Everything is kept in {steps.folder}."), soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Any, Any]]:
    """Yield two callbacks that print progress: of the steps, and of the rows within a step."""
    with contextlib.ExitStack() as stack:
        bars: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = stack.enter_context(measured(what))
            bars[what](done, total)

        def tell(step: Any, said: str, seconds: float) -> None:
            stack.close()
            bars.clear()
            words = {"skipped": "nothing has changed, skipped", "done": f"done in {_duration(seconds)}"}
            err.print(Text(f"{step.name}: {words.get(said, said)}"), soft_wrap=True)

        yield tell, progress
