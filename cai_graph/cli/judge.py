"""`cai judge`: writes a critic's verdicts on answers from a file."""

from __future__ import annotations

import asyncio
import contextlib
import os
from enum import StrEnum
from typing import Annotated, TextIO

import typer

from cai_graph.cli.console import FAILED, SKIPPED, bar, complain, group, note
from cai_graph.cli.options import Concurrency, ConstitutionName, Strong, Threshold, option
from cai_graph.cli.specs import critic_of, fetch, foreign, width
from cai_graph.errors import CaiError, ConfigError, DataError

commands = group()


class FailingVerdict(StrEnum):
    """Which verdict makes `cai judge` exit with 1."""

    VIOLATES = "violates"
    UNREADABLE = "unreadable"


@commands.command(epilog="Example: cai judge answers.jsonl -o verdicts.jsonl --fail-on violates")
def judge(
    answers: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="JSONL with prompt and response, or messages; - is standard input."
        ),
    ],
    output: Annotated[str | None, typer.Option("--output", "-o", help="File for the verdicts.")] = None,
    critic: Annotated[str, option("--critic", "Who judges: a model, or trained:FOLDER.", "SPEC")] = "local",
    strong: Strong = None,
    threshold: Threshold = None,
    constitution: ConstitutionName = "balanced",
    concurrency: Concurrency = None,
    fail_on: Annotated[
        list[FailingVerdict] | None,
        typer.Option(help="Exit with 1 if there is such a verdict; may be repeated."),
    ] = None,
) -> None:
    """Judge existing answers; nothing is drafted and nothing is logged.

    Writes one line a row, in order: its id (or index), verdicts, and aims, of a probe: P(VIOLATES) by each
    aim, and what its heads read (harm, evasion, request). A row that cannot be judged has an error instead.
    """
    from cai_graph import atomic, bulk, show
    from cai_graph import constitution as constitutions

    rules = constitutions.load(constitution)
    judged = violates = unreadable = skipped = 0
    with contextlib.closing(bulk.Rows(answers, "jsonl")) as rows:
        if answers != "-" and output and os.path.exists(output) and os.path.samefile(answers, output):
            raise ConfigError(f"{output}: holds the answers; name another file for the verdicts")
        total = sum(1 for _ in rows.answers())
        if not total:
            raise DataError(f"{rows.name} holds no answer; give it a row with prompt and response at least")
        who = critic_of(critic, strong, threshold)
        fetch(critic, strong)

        async def work(file: TextIO) -> None:
            nonlocal judged, violates, unreadable, skipped
            judgements = bulk.judge(who, rules, rows, concurrency or width(critic))
            with bar(total, "answers") as advance:
                async with contextlib.aclosing(judgements):
                    async for judgement in judgements:
                        file.write(judgement.line() + "\n")
                        judged += judgement.critique is not None
                        violates += judgement.violates(rules)
                        unreadable += judgement.unreadable
                        skipped += judgement.error is not None
                        advance(judgement.word(rules))
                        if judgement.error is not None:
                            complain(f"skipped: {judgement.error}")

        broken_off: CaiError | None = None
        with atomic.output(output) as file:
            try:
                with foreign(critic):
                    asyncio.run(work(file))
            except CaiError as error:
                if not judged:
                    raise
                broken_off = error  # raised after the paid verdicts so far are written
    if broken_off is not None:
        note(f"{judged} of {show.count(total, 'answer')} judged and written; the others are missing")
        raise broken_off
    note(
        f"{show.count(total, 'answer')}: {violates} violate, {unreadable} unreadable, "
        f"{skipped} could not be judged"
    )
    stands = {FailingVerdict.VIOLATES: violates, FailingVerdict.UNREADABLE: unreadable}
    if any(stands[label] for label in fail_on or ()):
        raise typer.Exit(FAILED)
    if skipped:
        raise typer.Exit(SKIPPED)
