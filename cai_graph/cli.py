"""`cai`: parses, wires, prints; no logic of its own.

What is heavy is imported inside the command that needs it, so that `cai --help` answers at once. Results
go to standard output, progress and complaints to standard error. Exit status: 0 fine, 1 an error or a
failed check, 2 wrong usage, 3 finished but some rows were skipped, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from cai_graph.errors import CaiError, ModelError

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from rich.progress import ProgressColumn

    from cai_graph.bulk import Broken, Failed, Run, Summary
    from cai_graph.chain import ConstitutionalRunnable
    from cai_graph.log import Filters
    from cai_graph.trajectory import Trajectory

__all__ = ["main"]

FAILED, SKIPPED, INTERRUPTED = 1, 3, 130

BULK_SECONDS = 3600.0
"""Deadline of one row of a bulk run. Nobody waits for it, and a slow machine may need it."""
API_RETRIES = 8
"""How often a request to an API is tried again, after the wait that its Retry-After asks for."""

out = Console(highlight=False, markup=False, emoji=False)
err = Console(highlight=False, markup=False, emoji=False, stderr=True)

_settings = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(
    help="Prompts under a constitution: drafted, critiqued, revised, and every trajectory logged.",
    epilog='Start with: cai demo, then cai ask "…". Exit status: 0 fine, 1 error, 2 usage, '
    "3 rows were skipped, 130 interrupted.",
    **_settings,  # type: ignore[arg-type]
)
log_app = typer.Typer(help="Read and keep the log.", **_settings)  # type: ignore[arg-type]
constitution_app = typer.Typer(help="Read and check constitutions.", **_settings)  # type: ignore[arg-type]
model_app = typer.Typer(help="Models that run on this machine.", **_settings)  # type: ignore[arg-type]
train_app = typer.Typer(help="Train on labels and logs.", **_settings)  # type: ignore[arg-type]
app.add_typer(log_app, name="log")
app.add_typer(constitution_app, name="constitution")
app.add_typer(model_app, name="model")
app.add_typer(train_app, name="train")

# The closed sets stand in cai_graph/policy.py, which is too heavy to import for --help.
Strategy = Literal["batched", "parallel", "sampled"]
Policy = Literal["open", "closed", "raise"]
RowFormat = Literal["jsonl", "csv", "text"]
ExportFormat = Literal["jsonl", "parquet"]
OutcomeName = Literal["KEPT", "REVISED", "EXHAUSTED", "REFUSED", "FAILED"]


class FailOn(StrEnum):
    """Which verdict makes `cai judge` exit with 1."""

    VIOLATES = "violates"
    UNREADABLE = "unreadable"
    NEVER = "never"


def _option(names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names.split(), help=help, metavar=metavar)


Model = Annotated[
    str,
    _option("--model -m", "Who drafts: local, local:FILE.gguf, openai:…, anthropic:…, http://…/v1#…", "SPEC"),
]
Critic = Annotated[str | None, _option("--critic", "Who judges; the model by default.", "SPEC")]
Reviser = Annotated[str | None, _option("--reviser", "Who rewrites; the model by default.", "SPEC")]
ConstitutionName = Annotated[
    str, _option("--constitution -c", "A built-in constitution, or a file.", "NAME|FILE")
]
LogUrl = Annotated[str, _option("--log", "Where the log is.", "URL")]
StrategyName = Annotated[Strategy, _option("--strategy", "How principles are judged.")]
MaxRounds = Annotated[
    int | None, typer.Option(min=0, help="Most rounds of critique and revision; 0 only judges.")
]
Candidates = Annotated[int | None, typer.Option(min=1, help="Revisions written in a round.")]
OnViolation = Annotated[Policy, _option("--on-violation", "What leaves when every revision still fails.")]
OnUnreadable = Annotated[Policy, _option("--on-unreadable", "What leaves when the verdict is unreadable.")]
OnError = Annotated[Policy, _option("--on-error", "What leaves when a critic or reviser fails.")]
Seed = Annotated[int | None, typer.Option(help="Seed of what is random: principles, the local model.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest draft, in tokens; a revision may be twice as long.")
]
Concurrency = Annotated[
    int | None, typer.Option(min=1, help="Rows under way at once; 4 on the local model and 16 on others.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]

DEFAULT_LOG = "sqlite:///cai.db"


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    try:
        app()
    except CaiError as error:
        _complain(str(error))
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    raise AssertionError("the app exits by itself")


# --- ask ----------------------------------------------------------------------------------------------


@app.command(epilog='Example: cai ask "How do I sharpen a kitchen knife?" --model openai:gpt-5-mini')
def ask(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    model: Model = "local",
    critic: Critic = None,
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
    as_json: AsJson = False,
) -> None:
    """Ask one question, and see its draft, verdicts, critique and revision."""
    from cai_graph import show
    from cai_graph.trajectory import encode

    guarded = _guarded(
        model,
        critic,
        reviser,
        constitution,
        log,
        max_tokens=max_tokens,
        seed=seed,
        strategy=strategy,
        max_rounds=max_rounds,
        candidates=candidates,
        on_violation=on_violation,
        on_unreadable=on_unreadable,
        on_error=on_error,
    )
    with _closing(guarded), _foreign(model):
        _fetch(model, critic, reviser)
        with err.status("drafting") as status:
            watch = show.stages(status.update, guarded.plan.settings.rounds)
            answered = asyncio.run(guarded.answered(prompt, {"callbacks": [watch]}))
    if as_json:
        typer.echo(encode(answered.trajectory).decode("ascii"))
    else:
        out.print(show.trajectory(answered.trajectory))


def _guarded(
    model: str,
    critic: str | None,
    reviser: str | None,
    constitution: str,
    log: str,
    *,
    max_tokens: int | None,
    seed: int | None,
    **settings: Any,
) -> ConstitutionalRunnable[Any, Any]:
    """Return the chat model of a spec under a constitution. Nothing is fetched."""
    from cai_graph import chain
    from cai_graph import constitution as constitutions
    from cai_graph.log import open_log

    rules = constitutions.load(constitution)
    return chain.constitutional(
        _loaded(model, seed=seed, max_tokens=max_tokens),
        constitution=rules,
        critic=_loaded(critic or model),
        reviser=_loaded(reviser or model, max_tokens=None if max_tokens is None else 2 * max_tokens),
        log=open_log(log),
        seed=seed,
        **settings,
    )


def _loaded(spec: str, *, seed: int | None = None, max_tokens: int | None = None) -> BaseChatModel:
    """Return the model of a spec; weights are not fetched."""
    from cai_graph import models

    settings: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    if not _is_local(spec):
        settings["max_retries"] = API_RETRIES
    elif seed is not None:
        settings["seed"] = seed
    return models.load(spec, **settings)


def _is_local(spec: str) -> bool:
    return spec.partition(":")[0] == "local"


def _fetch(*specs: str | None) -> None:
    """Fetch the weights that the local ones of these specs need."""
    for spec in dict.fromkeys(specs):
        if spec is not None and _is_local(spec):
            _fetched(spec.partition(":")[2])


def _fetched(name: str) -> str:
    """Return the path of local weights; show how they arrive."""
    from rich.progress import DownloadColumn

    from cai_graph import local

    with _measured(f"fetching {name or local.DEFAULT_MODEL}", DownloadColumn()) as tell:
        return str(local.weights(name, tell))


@contextlib.contextmanager
def _measured(what: str, column: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """Show how far a long piece of work is: gives what is told (done, in all); silent until it is."""
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        column,
        progress.TimeRemainingColumn(),
        console=err,
    )
    task = bar.add_task(what, total=None)

    def tell(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()


@contextlib.contextmanager
def _closing(guarded: ConstitutionalRunnable[Any, Any]) -> Iterator[None]:
    try:
        yield
    finally:
        if guarded.plan.log is not None:
            guarded.plan.log.close()


@contextlib.contextmanager
def _foreign(model: str) -> Iterator[None]:
    """Translate what a provider's client raises; a builtin exception is a bug and keeps its traceback."""
    from cai_graph.calls import describe

    try:
        yield
    except (CaiError, asyncio.CancelledError):
        raise
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise
        raise ModelError(f"{model}: {describe(error)}") from error


# --- run ----------------------------------------------------------------------------------------------


@app.command(epilog="Example: cai run prompts.csv --column question --limit 40")
def run(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="A JSONL, CSV or text file; - is standard input.")
    ],
    column: Annotated[str | None, typer.Option(help="Column or key of the prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows, from the first.")] = None,
    format: Annotated[RowFormat | None, typer.Option(help="If the name does not say it.")] = None,
    concurrency: Concurrency = None,
    model: Model = "local",
    critic: Critic = None,
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
    """Answer every prompt of a file into the log.

    Type the same command again after an interrupt, and it goes on where it stopped. Rows that failed are
    tried again; rows that cannot be read are reported and skipped.
    """
    from cai_graph import bulk, models
    from cai_graph.calls import Budget

    with contextlib.closing(bulk.Rows(prompts, format)) as rows:
        guarded = _guarded(
            model,
            critic,
            reviser,
            constitution,
            log,
            max_tokens=max_tokens,
            seed=seed,
            strategy=strategy,
            max_rounds=max_rounds,
            candidates=candidates,
            on_violation=on_violation,
            on_unreadable=on_unreadable,
            on_error=on_error,
            on_log_error="raise",
            budget=Budget(seconds=BULK_SECONDS),
        )
        with _closing(guarded):
            drafting = {"model": models.name_of(guarded.app), "max_tokens": max_tokens}
            job = bulk.Run(guarded, rows, drafting=drafting, column=column, limit=limit)
            if job.done:
                _note(f"{job.done} of {job.rows} rows were answered before; going on with the others")
            _fetch(model, critic, reviser)
            with _foreign(model):
                interrupted = _drive(job, concurrency or _width(model))
    _sum_up(job, log, interrupted)


def _width(model: str) -> int:
    return 4 if _is_local(model) else 16


def _drive(job: Run, concurrency: int) -> bool:
    """Run a bulk job with progress; return whether it was interrupted."""
    from cai_graph import show
    from cai_graph.trajectory import Trajectory

    stop = _Stop()

    async def work() -> None:
        stop.listen()
        results = job.results(concurrency, stopped=lambda: stop.asked)
        async with contextlib.aclosing(results):
            with _bar(job.rows - job.done, "prompts") as advance:
                async for result in results:
                    if isinstance(result, Trajectory):
                        line = f"{result.outcome.value:<9} {show.one_line(result.prompt, 80)}"
                        advance(f"{line}  {result.seconds:.1f} s")
                    else:
                        advance("skipped")
                        _report(result)

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(work())
    return stop.asked


class _Stop:
    """Ctrl-C: the first time it asks to end after what is under way, the second time it ends that too."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def interrupted() -> None:
            if self.asked:
                task.cancel()
                return
            self.asked = True
            _note("finishing the prompts that are under way; Ctrl-C again drops them")

        with contextlib.suppress(NotImplementedError):  # Windows has no signals in event loops
            loop.add_signal_handler(signal.SIGINT, interrupted)


@contextlib.contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """Show progress: a bar in a terminal, a line a row elsewhere. Gives what is called after each row."""
    from rich import progress

    if not err.is_terminal:
        count = 0

        def line(said: str) -> None:
            nonlocal count
            count += 1
            err.print(Text(f"{count}/{total} {said}"), soft_wrap=True)

        yield line
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=err) as bar:
        task = bar.add_task(what, total=total)
        yield lambda said: bar.advance(task)


def _report(row: Broken | Failed) -> None:
    _complain(f"line {row.line} skipped: {row.why}")


def _sum_up(job: Run, log: str, interrupted: bool) -> None:
    from cai_graph import show

    summary = job.summary
    out.print(Text(f"{summary.answered} of {job.rows} prompts are answered."))
    out.print(show.summary(summary))
    at = _at(log)
    out.print(Text(f"The log is {log}. Next: cai log list{at}, or cai log export{at} run.jsonl"))
    if interrupted:
        _note(f"interrupted; to go on, type again: {_this_command()}")
        raise typer.Exit(INTERRUPTED)
    if summary.skipped:
        _complain(f"{len(summary.skipped)} rows were skipped; to try again: {_this_command()}")
        raise typer.Exit(SKIPPED)


def _this_command() -> str:
    return shlex.join(["cai", *sys.argv[1:]])


# --- judge --------------------------------------------------------------------------------------------


@app.command(epilog="Example: cai judge answers.jsonl -o verdicts.jsonl --fail-on violates")
def judge(
    answers: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="JSONL with prompt and response, or messages; - is standard input."
        ),
    ],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Where the verdicts go.")] = None,
    critic: Annotated[str, _option("--critic", "Who judges.", "SPEC")] = "local",
    constitution: ConstitutionName = "balanced",
    concurrency: Concurrency = None,
    fail_on: Annotated[
        list[FailOn] | None,
        typer.Option(help="Exit with 1 if such a verdict stands; may be given twice."),
    ] = None,
) -> None:
    """Judge answers that exist already; nothing is drafted and nothing is logged.

    Writes one line a row, in order: its id (or index), verdicts, and aims (probabilities by aim). A row
    that cannot be judged has an error in their place.
    """
    from cai_graph import bulk
    from cai_graph import constitution as constitutions
    from cai_graph.critic import critic_for

    rules = constitutions.load(constitution)
    violates = unreadable = skipped = 0
    with contextlib.closing(bulk.Rows(answers, "jsonl")) as rows:
        total = sum(1 for _ in rows.answers())
        who = critic_for(_loaded(critic))
        _fetch(critic)

        async def work() -> None:
            nonlocal violates, unreadable, skipped
            judgements = bulk.judge(who, rules, rows, concurrency or _width(critic))
            with bulk.written_whole(output) as file, _bar(total, "answers") as advance:
                async with contextlib.aclosing(judgements):
                    async for judgement in judgements:
                        file.write(judgement.line() + "\n")
                        violates += judgement.violates(rules)
                        unreadable += judgement.unreadable
                        skipped += judgement.error is not None
                        advance(judgement.word(rules))
                        if judgement.error is not None:
                            _complain(f"skipped: {judgement.error}")

        with _foreign(critic):
            asyncio.run(work())
    _note(f"{total} answers: {violates} violate, {unreadable} unreadable, {skipped} could not be judged")
    stands = {FailOn.VIOLATES: violates, FailOn.UNREADABLE: unreadable}
    if any(stands.get(label) for label in fail_on or ()):
        raise typer.Exit(FAILED)
    if skipped:
        raise typer.Exit(SKIPPED)


# --- demo ---------------------------------------------------------------------------------------------

DEMO_TOKENS = 120
"""Longest draft of the demo, so that it ends in minutes on two cores."""


@app.command(epilog="Example: cai demo")
def demo(model: Model = "local", log: LogUrl = DEFAULT_LOG) -> None:
    """Watch the project's own sample prompts go through a model.

    Exits with 1 if no prompt is revised, or a benign one is refused.
    """
    from cai_graph import bulk, show
    from cai_graph.calls import Budget
    from cai_graph.trajectory import Trajectory, now

    trajectories: list[Trajectory] = []

    async def work() -> None:
        async with contextlib.aclosing(job.results(_width(model))) as results:
            async for result in results:
                if isinstance(result, Trajectory):
                    trajectories.append(result)
                    out.print(show.brief(result, about=str(result.metadata["kind"])))
                else:
                    _report(result)

    sample = resources.files("cai_graph") / "sample" / "prompts.jsonl"
    with resources.as_file(sample) as path, contextlib.closing(bulk.Rows(str(path))) as rows:
        guarded = _guarded(
            model,
            None,
            None,
            "balanced",
            log,
            max_tokens=DEMO_TOKENS,
            seed=0,
            on_log_error="raise",
            budget=Budget(seconds=BULK_SECONDS),
        )
        with _closing(guarded), _foreign(model):
            # The time makes each demo a run of its own, since one that resumes shows nothing.
            job = bulk.Run(guarded, rows, drafting={"demo": now().isoformat()})
            _fetch(model)
            _note(f"{job.rows} prompts, drafted, judged and revised by {model} …")
            asyncio.run(work())
    _sum_up_demo(job.summary, trajectories, log)


def _sum_up_demo(summary: Summary, trajectories: list[Trajectory], log: str) -> None:
    from cai_graph import show
    from cai_graph.trajectory import Outcome

    out.print(show.summary(summary))
    revised = [t.id for t in trajectories if t.outcome is Outcome.REVISED]
    benign = [t for t in trajectories if t.metadata["kind"] == "benign"]
    refused = [t for t in benign if t.outcome is Outcome.REFUSED]
    at = _at(log)
    out.print(Text(f"{len(benign)} prompts are benign, and {len(refused) or 'none'} of them was refused."))
    out.print(Text(f"Every trajectory is in {log}. Next:"))
    for command in (
        f"cai log list{at}",
        f"cai log show{at} {revised[0] if revised else 'ID'}",
        f"cai log export{at} demo.jsonl",
        f'cai ask{at} "…"',
    ):
        out.print(Text(f"    {command}"), soft_wrap=True)
    if summary.skipped:
        raise typer.Exit(SKIPPED)
    if refused or not revised:
        _complain("a benign prompt was refused" if refused else "no prompt was revised")
        raise typer.Exit(FAILED)


def _at(log: str) -> str:
    return "" if log == DEFAULT_LOG else f" --log {shlex.quote(log)}"


# --- log ----------------------------------------------------------------------------------------------

OutcomeFilter = Annotated[
    OutcomeName | None, typer.Option("--outcome", help="Only trajectories that ended so.")
]
Tag = Annotated[str | None, typer.Option(help="Only trajectories with this tag.")]
Source = Annotated[str | None, typer.Option(help="Only trajectories whose source key starts so.")]
Since = Annotated[datetime | None, typer.Option(help="Only from this time on, UTC.")]
Until = Annotated[datetime | None, typer.Option(help="Only before this time, UTC.")]


@log_app.command("list", epilog="Example: cai log list --outcome REVISED --limit 5")
def log_list(
    log: LogUrl = DEFAULT_LOG,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the latest first.")] = 20,
    outcome: OutcomeFilter = None,
    tag: Tag = None,
    source: Source = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """List the latest trajectories."""
    from cai_graph import show
    from cai_graph.log import open_log

    filters: Filters = {
        "kind": "trajectory",
        "outcome": outcome,
        "tag": tag,
        "source": source,
        "since": since,
        "until": until,
        "limit": limit,
        "newest_first": True,
    }
    with open_log(log, read_only=True) as opened:
        if as_json:
            for line in opened.lines(**filters):
                sys.stdout.write(line.decode("ascii"))
            return
        rows = [_row(record) for record in opened.read(**filters)]  # type: ignore[arg-type]
    out.print(show.table(rows, ("id", "at", "outcome", "prompt")))


def _row(record: Trajectory) -> tuple[str, str, str, str]:
    from cai_graph import show

    at = record.started_at.strftime("%Y-%m-%d %H:%M")
    return record.id, at, record.outcome.value, show.one_line(record.prompt, 60)


@log_app.command("show", epilog="Example: cai log show 019a2f6e-7c1b-7d3a-9f2e-5b8c0d1e2f3a")
def log_show(
    id: Annotated[str, typer.Argument(help="Id of a record, as `cai log list` prints it.")],
    log: LogUrl = DEFAULT_LOG,
    as_json: AsJson = False,
) -> None:
    """Show one record: draft, verdicts, critique, revisions, outcome."""
    from cai_graph import show
    from cai_graph.log import open_log
    from cai_graph.trajectory import Trajectory, encode

    with open_log(log, read_only=True) as opened:
        record = opened.get(id)
    if as_json or not isinstance(record, Trajectory):
        typer.echo(encode(record).decode("ascii"))
    else:
        out.print(show.trajectory(record))


@log_app.command("stats", epilog="Example: cai log stats --json")
def log_stats(log: LogUrl = DEFAULT_LOG, as_json: AsJson = False) -> None:
    """Count what the log holds."""
    from cai_graph.log import open_log

    with open_log(log, read_only=True) as opened:
        _print_record(opened.stats(), as_json)


@log_app.command("export", epilog="Example: cai log export --outcome REVISED revised.jsonl")
def log_export(
    file: Annotated[str, typer.Argument(help="A .jsonl or .parquet file; - is standard output, as JSONL.")],
    log: LogUrl = DEFAULT_LOG,
    format: Annotated[ExportFormat | None, typer.Option(help="If the name does not say it.")] = None,
    outcome: OutcomeFilter = None,
    tag: Tag = None,
    source: Source = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Write the log's records to a file, each whole."""
    from cai_graph.log import open_log, transfer

    filters: Filters = {"outcome": outcome, "tag": tag, "source": source, "since": since, "until": until}
    if file == "-":
        with open_log(log, read_only=True) as opened:
            for line in opened.lines(**filters):
                sys.stdout.write(line.decode("ascii"))
        return
    count = transfer.export(log, file, format=format, **filters)
    _note(f"{count} records written to {file}")


@log_app.command("import", epilog="Example: cai log import demonstrations.jsonl")
def log_import(
    file: Annotated[str, typer.Argument(help="Exported records, or demonstrations, as JSONL.")],
    log: LogUrl = DEFAULT_LOG,
) -> None:
    """Add records or human-written demonstrations to the log.

    A demonstration is an object with prompt and draft, and where they apply critique, revision, principle
    and label. What is in the log already is not added again.
    """
    from cai_graph.log import transfer

    done = transfer.import_(log, file)
    for broken in done.broken:
        _complain(f"line {broken.line} skipped: {broken.what}")
    _note(
        f"{done.records} records and {done.demonstrations} demonstrations added; "
        f"{done.present} were there already, {done.removed} had been removed"
    )
    if done.broken:
        raise typer.Exit(SKIPPED)


@log_app.command("verify", epilog="Example: cai log verify")
def log_verify(log: LogUrl = DEFAULT_LOG, as_json: AsJson = False) -> None:
    """Check every record's checksum, each writer's sequence, and the file's structure."""
    from cai_graph.log import upkeep

    found = upkeep.verify(log)
    _print_record(found, as_json)
    if not found.ok:
        _complain("damage was found; `cai log recover` saves every intact record")
        raise typer.Exit(FAILED)


@log_app.command("recover", epilog="Example: cai log recover saved.db --log damaged.db")
def log_recover(
    into: Annotated[str, typer.Argument(help="The new log; must not exist.")],
    log: LogUrl = DEFAULT_LOG,
    as_json: AsJson = False,
) -> None:
    """Save every intact record of a damaged log into a new one."""
    from cai_graph.log import upkeep

    _print_record(upkeep.recover(log, into), as_json)


@log_app.command("gc", epilog="Example: cai log gc --days 90 --dry-run")
def log_gc(
    days: Annotated[float, typer.Option(min=0, help="Trajectories older than so many days are removed.")],
    log: LogUrl = DEFAULT_LOG,
    why: Annotated[
        str, typer.Option(help="Kept in the log beside the id of what was removed.")
    ] = "retention",
    also_reviewed: Annotated[
        bool, typer.Option("--also-reviewed", help="Remove reviewed ones as well.")
    ] = False,
    keep_tag: Annotated[str | None, typer.Option(help="Keep trajectories with this tag.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old trajectories, with everything appended about them."""
    from cai_graph.log import upkeep

    removal = upkeep.gc(
        log,
        before=datetime.now(UTC) - timedelta(days=days),
        why=why,
        keep_reviewed=not also_reviewed,
        keep_tag=keep_tag,
        dry_run=dry_run,
    )
    _print_record(removal, as_json)


# --- constitution -------------------------------------------------------------------------------------

Named = Annotated[str, typer.Argument(help="A built-in constitution, or a file.", metavar="NAME|FILE")]


@constitution_app.command("list", epilog="Example: cai constitution list")
def constitution_list(as_json: AsJson = False) -> None:
    """List the built-in constitutions."""
    from cai_graph import constitution, show

    found = [constitution.load(name) for name in constitution.builtin()]
    if as_json:
        _print_json(
            [
                {"name": c.name, "version": c.version, "principles": len(c), "digest": c.digest}
                | {"description": c.description}
                for c in found
            ]
        )
        return
    rows = [(c.name, c.version, f"{len(c)} principles", c.description or "") for c in found]
    out.print(show.table(rows))


@constitution_app.command("show", epilog="Example: cai constitution show balanced")
def constitution_show(name: Named, as_json: AsJson = False) -> None:
    """Show a constitution as it is after `extends`."""
    from cai_graph import constitution, show

    rules = constitution.load(name)
    if as_json:
        _print_json(rules.model_dump(mode="json") | {"digest": rules.digest})
        return
    out.print(Text(show.clean(f"{rules.name}, version {rules.version}, digest {rules.digest[:12]}"), "bold"))
    if rules.description:
        out.print(Text(show.clean(rules.description)))
    out.print()
    out.print(show.table(((p.id, p.aim, p.critique_request) for p in rules), ("principle", "aim", "asks")))


@constitution_app.command("lint", epilog="Example: cai constitution lint helpful.yaml")
def constitution_lint(name: Named, as_json: AsJson = False) -> None:
    """Say what is allowed in a constitution but probably not meant; exit with 1 if there is anything."""
    from dataclasses import asdict

    from cai_graph import constitution, show

    findings = constitution.lint(constitution.load(name))
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    elif findings:
        out.print(show.table((f.principle or "(all)", f.field or "", f.message) for f in findings))
    else:
        out.print(Text("nothing found"))
    if findings:
        raise typer.Exit(FAILED)


@constitution_app.command("diff", epilog="Example: cai constitution diff balanced mine.yaml")
def constitution_diff(a: Named, b: Named, as_json: AsJson = False) -> None:
    """Show how the second constitution differs from the first."""
    from dataclasses import asdict

    from pydantic_core import to_jsonable_python

    from cai_graph import constitution, show

    found = constitution.diff(constitution.load(a), constitution.load(b))
    if as_json:
        _print_json([to_jsonable_python(asdict(difference)) for difference in found])
        return
    for difference in found:
        about = " ".join(filter(None, (difference.principle, difference.field)))
        out.print(Text(show.clean(f"{difference.change} {about}"), "bold"))
        if difference.change == "changed":
            out.print(show.word_diff(str(difference.before), str(difference.after)))
    if not found:
        out.print(Text("no difference"))


@constitution_app.command("schema", epilog="Example: cai constitution schema > constitution.schema.json")
def constitution_schema() -> None:
    """Print the JSON Schema by which an editor completes a constitution file."""
    from cai_graph import constitution

    _print_json(constitution.json_schema())


# --- model --------------------------------------------------------------------------------------------

LocalName = Annotated[str, typer.Argument(help="A name that `cai model list` prints.", metavar="[NAME]")]


@model_app.command("list", epilog="Example: cai model list")
def model_list(as_json: AsJson = False) -> None:
    """List the local models that can be fetched, and those that are here."""
    from cai_graph import local, show

    found = [(model, local.cached(model)) for model in local.CATALOGUE]
    if as_json:
        _print_json(
            [
                {"name": m.name, "size": m.size, "licence": m.licence, "sha256": m.sha256}
                | {"path": None if path is None else str(path)}
                for m, path in found
            ]
        )
        return
    rows = [
        (f"local:{m.name}", f"{m.size / 1e6:,.0f} MB", m.licence, str(path or "not fetched"))
        for m, path in found
    ]
    out.print(show.table(rows))


@model_app.command("get", epilog="Example: cai model get smollm2")
def model_get(name: LocalName = "") -> None:
    """Fetch a local model, check its hash, and print its path."""
    typer.echo(_fetched(name))


@model_app.command("path", epilog="Example: cai model path smollm2")
def model_path(name: LocalName = "", as_json: AsJson = False) -> None:
    """Print where a local model is; exit with 1 if it is not here."""
    from cai_graph import local

    model = local.find(name or local.DEFAULT_MODEL)
    path = local.cached(model)
    if path is None:
        raise ModelError(f"local:{model.name} is not here; `cai model get {model.name}` fetches it")
    if as_json:
        _print_json({"name": model.name, "path": str(path)})
    else:
        typer.echo(path)


# --- doctor and train ---------------------------------------------------------------------------------


@app.command(epilog="Example: cai doctor")
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what is missing, and how to get it."""
    from dataclasses import asdict

    from cai_graph import show
    from cai_graph.doctor import checks

    found = checks()
    if as_json:
        _print_json([asdict(check) for check in found])
        return
    out.print(show.table((check.name, check.status, check.found, check.remedy) for check in found))


@train_app.command("probe", epilog="Example: cai train probe labels --output heads --model local")
def train_probe(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder with the labelled sources.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the heads and their card.")],
    model: Annotated[
        str, _option("--model -m", "The local model whose hidden state is read.", "SPEC")
    ] = "local",
) -> None:
    """Train the linear heads by which a local model judges, and measure them.

    Type the same command again after an interrupt, and it goes on where it stopped.
    """
    from pathlib import Path

    from rich.progress import MofNCompleteColumn

    from trainers import probe

    config = probe.Config(data=Path(data), output=Path(output), model=model)
    _fetch(model)
    with _measured("forward passes", MofNCompleteColumn()) as tell:
        folder = probe.train(config, tell)
    _note(f"the heads are in {folder}; its CARD.md has the figures")


# --- printing -----------------------------------------------------------------------------------------


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_record(record: Any, as_json: bool) -> None:
    """Print a flat record of counts."""
    from dataclasses import asdict

    from cai_graph import show

    fields = asdict(record)
    if as_json:
        typer.echo(json.dumps(fields, indent=2, default=str))
        return
    out.print(show.table((name.replace("_", " "), _plain(value)) for name, value in fields.items()))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
    if isinstance(value, tuple | builtins.list):
        return "\n".join(map(str, value)) or "none"
    return str(value)


def _note(sentence: str) -> None:
    from cai_graph import show

    err.print(Text(show.clean(sentence)), soft_wrap=True)


def _complain(sentence: str) -> None:
    from cai_graph import show

    err.print(Text(show.clean(sentence), "red"), soft_wrap=True)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"cai-graph {version('cai-graph')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
