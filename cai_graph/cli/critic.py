"""`cai critic`: calibrates a cascade of critics with the verdicts of a log."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cai_graph.cli.console import DEFAULT_LOG, group, measured, note, out, print_json
from cai_graph.cli.options import AsJson, Concurrency, LogUrl, Since, Source, Tag, option
from cai_graph.cli.specs import fetch, foreign, judging, width

if TYPE_CHECKING:
    from cai_graph.critic.calibration import Calibration, Judged
    from cai_graph.log import Filters

commands = group("Critics, by what the log says of them.")


@commands.command(
    epilog="Example: cai critic calibrate --log sqlite:///cai.db --miss-rate 0.01 --cheap local"
)
def calibrate(
    log: LogUrl = DEFAULT_LOG,
    miss_rate: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Largest share of violating answers that the cheap critic may clear."
        ),
    ] = 0.01,
    cheap: Annotated[
        str | None, option("--cheap", "Judges the log's answers now; else a cascade did before.", "SPEC")
    ] = None,
    constitution: Annotated[
        str | None,
        option("--constitution -c", "Only answers judged under it; balanced with --cheap.", "NAME|FILE"),
    ] = None,
    tag: Tag = None,
    source: Source = None,
    since: Since = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of trajectories, the latest first.")
    ] = None,
    concurrency: Concurrency = None,
    as_json: AsJson = False,
) -> None:
    """Choose the threshold of a cascade: how sure the cheap critic must be to clear an answer on its own.

    Takes answers that both critics judged, whatever the cheap one said: those of a cascade with threshold 0
    or with a sample, or, with --cheap, those that the strong critic judged in the log. Exits with 1 where
    they are too few for the miss rate.
    """
    from cai_graph import constitution as constitutions
    from cai_graph import show
    from cai_graph.critic import calibration
    from cai_graph.critic.cascades import probabilistic
    from cai_graph.log import open_log

    rules = constitutions.load(constitution or "balanced")
    filters: Filters = {"tag": tag, "source": source, "since": since, "limit": limit, "newest_first": True}
    with open_log(log, read_only=True) as opened:
        if cheap is None:
            if constitution is not None:
                filters["constitution"] = rules.digest
            judged = calibration.logged(opened, filters)
        else:
            fetch(cheap)
            with foreign(cheap), measured("judging") as tell:
                work = calibration.rejudged(
                    opened,
                    probabilistic(judging(cheap)),
                    rules,
                    concurrency=concurrency or width(cheap),
                    filters=filters,
                    progress=tell,
                )
                judged = asyncio.run(work)
    found = calibration.calibrate(judged.pairs, miss_rate)
    for why, count in judged.left_out.items():
        note(f"{show.count(count, 'draft')} left out: {why}")
    if as_json:
        names = {"cheap": judged.cheap, "strong": judged.strong, "left_out": judged.left_out}
        print_json({**asdict(found), "miss_rate": miss_rate, **names})
    else:
        out.print(Text(_said(found, judged)), soft_wrap=True)


def _said(found: Calibration, judged: Judged) -> str:
    return (
        f"threshold   {found.threshold:g}\n"
        f"critics     {judged.cheap} clears what is below, {judged.strong} judges the rest\n"
        f"saved       {found.saved:.1%} of the strong critic's calls "
        f"(95 % interval {found.saved_from:.1%} to {found.saved_to:.1%}, Wilson; {found.answers} answers)\n"
        f"missed      {found.missed} of {found.violating} violating answers; "
        f"the miss rate is at most {found.miss_rate_at_most:.2%} (95 %, one-sided, Clopper-Pearson)"
    )
