"""`cai log`: shows, exports, imports, verifies, recovers and prunes a log."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cai_graph.cli.console import (
    DEFAULT_LOG,
    FAILED,
    SKIPPED,
    complain,
    group,
    imported,
    is_attended,
    note,
    out,
    print_lines,
    print_record,
)
from cai_graph.cli.options import AsJson, ExportFormat, LogUrl, OutcomeFilter, Since, Source, Tag

if TYPE_CHECKING:
    from cai_graph.log import Filters, FiltersOfKind
    from cai_graph.log.upkeep import Removal
    from cai_graph.trajectory import Trajectory

commands = group("Read and keep the log.")

Until = Annotated[datetime | None, typer.Option(help="Only before this time, UTC.")]


@commands.command("list", epilog="Example: cai log list --outcome REVISED --limit 5")
def log_list(
    log: LogUrl = DEFAULT_LOG,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of trajectories, the latest first.")] = 20,
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

    filters: FiltersOfKind = {
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
            print_lines(opened.lines(kind="trajectory", **filters))
            return
        rows = [_row(record) for record in opened.read(kind="trajectory", **filters)]
    out.print(show.table(rows, ("id", "at", "outcome", "prompt")))


def _row(record: Trajectory) -> tuple[str, str, str, str]:
    from cai_graph import show

    at = record.started_at.strftime("%Y-%m-%d %H:%M")
    return record.id, at, record.outcome.value, show.one_line(record.prompt, 60)


@commands.command("show", epilog="Example: cai log show 019a2f6e-7c1b-7d3a-9f2e-5b8c0d1e2f3a")
def log_show(
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a record, as `cai log list` prints it.")],
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


@commands.command("stats", epilog="Example: cai log stats --json")
def log_stats(log: LogUrl = DEFAULT_LOG, as_json: AsJson = False) -> None:
    """Print counts of what the log holds."""
    from cai_graph.log import open_log

    with open_log(log, read_only=True) as opened:
        print_record(opened.stats(), as_json)


@commands.command("export", epilog="Example: cai log export --outcome REVISED revised.jsonl")
def log_export(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A .jsonl or .parquet file; - is standard output, as JSONL."),
    ],
    log: LogUrl = DEFAULT_LOG,
    format: Annotated[ExportFormat | None, typer.Option(help="If the name does not say it.")] = None,
    outcome: OutcomeFilter = None,
    tag: Tag = None,
    source: Source = None,
    since: Since = None,
    until: Until = None,
) -> None:
    """Write the log's records to a file, each in full.

    Filters select trajectories; the comparisons, reviews and feedback about them are included.
    """
    from cai_graph import show
    from cai_graph.log import open_log, transfer

    filters: Filters = {
        "outcome": outcome,
        "tag": tag,
        "source": source,
        "since": since,
        "until": until,
        "with_appended": True,
    }
    if file == "-":
        if format == "parquet":
            raise typer.BadParameter("standard output takes JSONL alone; name a file", param_hint="--format")
        with open_log(log, read_only=True) as opened:
            print_lines(opened.lines(**filters))
        return
    count = transfer.export(log, file, format=format, **filters)
    note(f"{show.count(count, 'record')} written to {file}")


@commands.command("import", epilog="Example: cai log import demonstrations.jsonl")
def log_import(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Exported records as JSONL or Parquet, or demonstrations as JSONL."
        ),
    ],
    log: LogUrl = DEFAULT_LOG,
) -> None:
    """Add records or human-written demonstrations to the log.

    A demonstration is an object with prompt and draft, and where they apply critique, revision, principle
    and label. Records that the log already has are not added again.
    """
    from cai_graph import show
    from cai_graph.log import transfer

    done = transfer.import_(log, file)
    imported(
        f"{show.count(done.records, 'record')} and {show.count(done.demonstrations, 'demonstration')} added; "
        f"{done.present} were there already, {done.removed} had been removed",
        done.broken,
    )


@commands.command("verify", epilog="Example: cai log verify")
def log_verify(log: LogUrl = DEFAULT_LOG, as_json: AsJson = False) -> None:
    """Check every record's checksum, each writer's sequence, and the file's structure."""
    from cai_graph.log import upkeep

    found = upkeep.verify(log)
    print_record(found, as_json)
    if not found.ok:
        complain(
            "damage was found; `cai log recover` saves what is intact in a file; restore a database's backup"
        )
        raise typer.Exit(FAILED)


@commands.command("recover", epilog="Example: cai log recover saved.db --log damaged.db")
def log_recover(
    into: Annotated[str, typer.Argument(metavar="NEW", help="The new log; must not exist.")],
    log: LogUrl = DEFAULT_LOG,
    as_json: AsJson = False,
) -> None:
    """Save every intact record of a damaged log into a new one; exit with 3 where others are lost."""
    from cai_graph import show
    from cai_graph.log import upkeep

    found = upkeep.recover(log, into)
    print_record(found, as_json)
    if found.damaged or found.gaps:
        missing = sum(gap.records for gap in found.gaps)
        damaged = show.count(len(found.damaged), "damaged record")
        complain(f"{damaged} could not be saved; by the writers' numbers {missing} are missing in all")
        raise typer.Exit(SKIPPED)


@commands.command("gc", epilog="Example: cai log gc --days 90 --dry-run")
def log_gc(
    days: Annotated[float, typer.Option(min=0, help="Remove trajectories older than this many days.")],
    log: LogUrl = DEFAULT_LOG,
    why: Annotated[
        str, typer.Option(help="Reason, stored in the log with the id of each removed trajectory.")
    ] = "retention",
    also_reviewed: Annotated[
        bool, typer.Option("--also-reviewed", help="Also remove reviewed trajectories.")
    ] = False,
    keep_tag: Annotated[str | None, typer.Option(help="Keep trajectories with this tag.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print how many would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old trajectories, with everything appended about them.

    Prints how many, and asks for confirmation. Without a terminal, pass --yes or --dry-run.
    """
    from cai_graph.log import upkeep

    try:
        before = datetime.now(UTC) - timedelta(days=days)
    except (OverflowError, ValueError) as error:
        reason = f"{days} days ago is no date; say how many days of the log are to stay, such as 90"
        raise typer.BadParameter(reason, param_hint="--days") from error
    sweep = partial(
        upkeep.gc, log, before=before, why=why, keep_reviewed=not also_reviewed, keep_tag=keep_tag
    )
    if not (dry_run or yes):
        _ask(sweep)
    removal = sweep(dry_run=dry_run)
    if as_json:
        print_record(removal, as_json)
    else:
        _show_removal(removal, dry_run)


def _ask(sweep: Callable[..., Removal]) -> None:
    """Ask the user to confirm a removal; return if nothing would be removed, or the user agrees.

    Raises:
        typer.Abort: the user does not agree.
        typer.BadParameter: there is no terminal for the prompt.
    """
    from cai_graph import show

    if not is_attended():
        raise typer.BadParameter(
            "what is removed is gone for good, and there is no terminal to ask at; say it", param_hint="--yes"
        )
    found = sweep(dry_run=True)
    if not (found.trajectories or found.others):
        return
    old = show.count(found.trajectories, "trajectory", "trajectories")
    others = show.count(found.others, "record")
    try:
        agreed = typer.confirm(f"Remove {old} for good, and {others} about them?", err=True)
    except typer.Abort:  # the prompt raises it on Ctrl-C
        raise KeyboardInterrupt from None
    if not agreed:
        raise typer.Abort


def _show_removal(removal: Removal, dry_run: bool) -> None:
    from cai_graph import show

    done = "would be removed" if dry_run else "removed"
    rows: list[tuple[str, object]] = [
        (f"{done}: trajectories", removal.trajectories),
        (f"{done}: about them", removal.others),
        ("kept: reviewed or tagged", removal.kept),
    ]
    if not dry_run:
        rows.append(("overwritten on the disk", "yes" if removal.erased else "not yet"))
        rows.append(("space given back to the disk", "yes" if removal.compacted else "no"))
    out.print(show.table(rows))
    for copy in removal.copies:
        complain(f"{copy}: saved of a WAL, may hold what was removed; recover from it, then delete it")
