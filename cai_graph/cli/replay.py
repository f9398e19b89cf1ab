"""`cai replay`: judges logged answers again, as a regression test for constitutions and critics."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cai_graph.addresses import without_password
from cai_graph.cli.console import (
    DEFAULT_LOG,
    FAILED,
    SKIPPED,
    again,
    complain,
    drive,
    group,
    interrupted,
    note,
    out,
    print_json,
)
from cai_graph.cli.options import AsJson, Concurrency, LogUrl, OutcomeFilter, Since, Source, Tag, option
from cai_graph.cli.specs import fetch, foreign, judging, width

if TYPE_CHECKING:
    from trainers.replay import Judged, Report

commands = group()


class FailingChange(StrEnum):
    """Which change makes `cai replay` exit with 1."""

    MORE_VIOLATIONS = "more-violations"
    FEWER_VIOLATIONS = "fewer-violations"
    ANY_CHANGE = "any-change"
    UNREADABLE = "unreadable"


@commands.command(epilog="Example: cai replay --constitution new.yaml --limit 200 --fail-on more-violations")
def replay(
    constitution: Annotated[
        str, option("--constitution -c", "Judge by this built-in constitution, or file.", "NAME|FILE")
    ] = "balanced",
    critic: Annotated[str, option("--critic", "Who judges: a model, or trained:FOLDER.", "SPEC")] = "local",
    log: LogUrl = DEFAULT_LOG,
    output: Annotated[
        Path | None, option("--output -o", "File that keeps the judgements; by default one in the cache.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of trajectories, a random sample.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random sample.")] = 0,
    outcome: OutcomeFilter = None,
    tag: Tag = None,
    source: Source = None,
    since: Since = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Maximum number of examples to show for each kind of change.")
    ] = 3,
    fail_on: Annotated[
        list[FailingChange] | None, typer.Option(help="Exit with 1 on such a change; may be repeated.")
    ] = None,
    concurrency: Concurrency = None,
    as_json: AsJson = False,
) -> None:
    """Judge logged answers again under another constitution or with another critic, and show what changes.

    Exits with 3 where answers that are unreadable now may hide what --fail-on names.

    The log is only read. After an interrupt, run the same command again to resume.
    """
    from cai_graph import constitution as constitutions
    from cai_graph import show
    from cai_graph.critic import critic_for
    from cai_graph.log import open_log
    from trainers.replay import Replay

    rules = constitutions.load(constitution)
    with open_log(log, read_only=True) as opened:
        job = Replay(
            opened,
            critic_for(judging(critic)),
            rules,
            kept=output,
            filters={"outcome": outcome, "tag": tag, "source": source, "since": since},
            limit=limit,
            seed=seed,
            examples=examples,
        )
        if job.done:
            note(f"{job.done} of {job.total} answers were judged before, in {job.path}")
        fetch(critic)
        with foreign(critic):
            stopped = drive(
                lambda stopped: job.results(concurrency or width(critic), stopped=stopped),
                job.total - job.done,
                "answers",
                line=_line,
                report=_report,
            )
    report = job.report
    if as_json:
        judge = without_password(critic)
        print_json({"constitution": rules.digest, "critic": judge, **report.summary()})
    else:
        _show(report)
    if stopped:
        raise interrupted()
    if not job.total:
        complain(f"{without_password(log)} has no answer to judge")
        raise typer.Exit(FAILED)
    if found := [rule for rule in fail_on or () if _broken(rule, report)]:
        complain(f"failed: {', '.join(found)}")
        raise typer.Exit(FAILED)
    if unsure := [rule for rule in fail_on or () if _broken(rule, report, at_worst=True)]:
        unread = show.count(report.now_unreadable, "answer")
        complain(f"{', '.join(unsure)}: not known, since {unread} that could be read cannot be read now")
    if report.failed:
        complain(f"{show.count(report.failed, 'answer')} could not be judged; to try {again()}")
    if unsure or report.failed:
        raise typer.Exit(SKIPPED)


def _broken(rule: FailingChange, report: Report, *, at_worst: bool = False) -> bool:
    """Return whether a report has a change; with `at_worst`, whether new unreadable verdicts may hide it."""
    newly, cleared = report.newly, report.cleared
    match rule:
        case FailingChange.MORE_VIOLATIONS:
            return newly + at_worst * report.standings["complies", "unreadable"] > cleared
        case FailingChange.FEWER_VIOLATIONS:
            return cleared + at_worst * report.standings["violates", "unreadable"] > newly
        case FailingChange.ANY_CHANGE:
            return bool(newly or cleared or report.now_unreadable)
        case FailingChange.UNREADABLE:
            return report.now_unreadable > 0


def _line(judged: Judged) -> str:
    from cai_graph import show

    return f"{show.one_line(judged.answer.key, 50)}  {judged.before} → {judged.after}"


def _report(judged: Judged) -> None:
    if judged.failed is not None:
        complain(f"{judged.answer.key} failed: {judged.failed}")


def _show(report: Report) -> None:
    from cai_graph import show

    before, after = report.share("before"), report.share("after")
    out.print(Text(f"{show.count(report.judged, 'answer')} judged again."))
    if before.of:
        out.print(Text(f"Violate: {before} in the log, {after} now."))
    else:
        out.print(Text("No answer was readable both in the log and now, so no share is compared."))
    out.print(
        Text(
            f"{report.newly} newly violate, {report.cleared} are cleared, "
            f"{report.now_unreadable} are unreadable now."
        )
    )
    rows = [
        (name, row.compared, row.before, row.after, row.newly, row.cleared, row.violates_only_now)
        for name, row in sorted(report.principles.items())
    ]
    if rows := [row for row in rows if any(row[1:])]:
        out.print()
        of_rules = ("principle or aim", "compared", "violated", "violate now", "newly", "cleared", "new rule")
        out.print(show.table(rows, of_rules))
    if report.outcomes:
        out.print()
        ended = [
            (
                name,
                row.drafts,
                row.drafts_before,
                row.drafts_after,
                row.drafts_unreadable,
                row.released,
                row.released_after,
            )
            for name, row in sorted(report.outcomes.items())
        ]
        headers = (
            "outcome",
            "drafts",
            "violated",
            "violate now",
            "unreadable now",
            "revisions",
            "violate now",
        )
        out.print(show.table(ended, headers))
    for change, found in report.shown.items():
        out.print()
        out.print(Text(change, "bold"))
        for example in found:
            named = f"{example.trajectory_id} ({example.of}) {', '.join(example.principles)}"
            out.print(Text(f"  {show.clean(named)}"))
            for label, text in (
                ("asked", example.prompt),
                ("answer", example.answer),
                ("why", example.reason),
            ):
                if text:
                    out.print(Text(f"    {label:<7} {show.one_line(text, 160)}"), soft_wrap=True)
