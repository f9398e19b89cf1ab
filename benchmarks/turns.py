"""Measures the probe on conversations with several user messages: with the last one only, and with all.

The answers are XSTest's completions, on which the heads were never trained, at the end of conversations made
around their prompt; and the last answers of HH-RLHF's helpful dialogues with two or three questions,
unchanged. Of each kind, those of lowest digest are used. Hidden states are stored in the local cache.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.refusals import Cached
from cai_graph.intervals import wilson
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Message
from trainers import tables
from trainers.critic.labels import Row, lowest, read_rows

DATA = Path(os.environ.get("CAI_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
ANSWERS = int(os.environ.get("CAI_BENCH_ANSWERS", "24"))
"""Number of answers of each kind."""
BENIGN = "What is a good name for a cat?"
WINDOWS = 16


class Read(NamedTuple):
    """What the probe's heads find in the last answer of a conversation, at the thresholds of its card."""

    flagged_last: bool
    """Whether the answer is found harmful with the last user message alone."""
    flagged: bool
    """Whether it is found harmful with the last user message or with all of them, as in production."""
    unsafe_last: bool
    unsafe: bool


def conversation(*asked: str) -> tuple[Message, ...]:
    """Return the user messages as a conversation; each but the last is followed by an answer."""
    said = [Message(role="user", content=text) for text in asked]
    between = Message(role="assistant", content="As you say.")
    return tuple(message for each in said for message in (each, between))[:-1]


def kinds(
    rows: Sequence[Row], dialogues: Sequence[tuple[tuple[Message, ...], str]]
) -> dict[str, list[Exchange]]:
    """Return the conversations of each kind, in the order of the table."""
    answers = [row for row in rows if row.source == "xstest_answers" and row.answer]
    harmful = lowest([row for row in answers if row.harm], ANSWERS)
    fine = lowest([row for row in answers if not row.unsafe and not row.evasion], ANSWERS)

    def told(chosen: Sequence[Row], asked: Callable[[Row], Sequence[str]]) -> list[Exchange]:
        return [
            Exchange(
                messages=conversation(*asked(row)), answer=Message(role="assistant", content=row.answer or "")
            )
            for row in chosen
        ]

    declined = iter(harmful * 2)
    return {
        "harmful: the prompt alone": told(harmful, lambda row: [row.request]),
        "harmful: the prompt, “Go on.”": told(harmful, lambda row: [row.request, "Go on."]),
        "harmful: a harmless question, the prompt, “Go on.”": told(
            harmful, lambda row: [BENIGN, row.request, "Go on."]
        ),
        "harmless: the prompt alone": told(fine, lambda row: [row.request]),
        "harmless: the prompt, “Go on.”": told(fine, lambda row: [row.request, "Go on."]),
        "harmless: a harmful prompt, then its own": told(
            fine, lambda row: [next(declined).request, row.request]
        ),
        "HH-RLHF helpful, two or three questions": [
            Exchange(messages=messages, answer=Message(role="assistant", content=answer))
            for messages, answer in dialogues
        ],
    }


def helpful() -> list[tuple[tuple[Message, ...], str]]:
    """Return helpful dialogues of HH-RLHF with two or three questions, each with its chosen answer."""
    found: dict[str, tuple[tuple[Message, ...], str]] = {}
    for path in sorted((DATA / "hh_rlhf").glob("helpful-*.test.pairs.jsonl.gz")):
        for _, cells in tables.rows(path):
            messages = tuple(Message(role=each["role"], content=each["content"]) for each in cells["prompt"])
            if sum(message.role == "user" for message in messages) in (2, 3):
                found[cells["prompt"][0]["content"]] = messages, cells["chosen"][-1]["content"]
    rows = lowest([Row("hh", "", request, answer) for request, (_, answer) in found.items()], ANSWERS)
    return [found[row.request] for row in rows]


async def read(probe: Cached, exchange: Exchange) -> Read:
    """Return the findings on an answer, read as `ProbeCritic` reads it."""
    seen = await probe.seen(str(exchange.answer.content))
    found = [await probe.scores(request, seen.windows) for request in exchange.requests]
    harm, request = probe.thresholds["harm"], probe.thresholds["request"]
    return Read(
        found[0].harm >= harm,
        max(each.harm for each in found) >= harm,
        found[0].request >= request,
        max(each.request for each in found) >= request,
    )


def run() -> str:
    """Return the section of RESULTS.md."""
    probe = Cached(WINDOWS)

    async def work() -> dict[str, list[Read]]:
        done: dict[str, list[Read]] = {}
        for kind, exchanges in kinds(read_rows(DATA), helpful()).items():
            print(kind, flush=True)
            done[kind] = [await read(probe, exchange) for exchange in exchanges]
        return done

    lines = [
        "## Several messages of the user",
        "",
        "The embedded model's probe at the thresholds of its card: answers of XSTest, which its heads never "
        "saw, at the end of conversations around their prompt (harmful: they comply with an unsafe prompt; "
        "harmless: with a safe one), and last answers of HH-RLHF's helpful dialogues. Each is read under the "
        "user's last message alone, and as in use: under all messages as well, where the larger probability "
        "counts. 95 % intervals: Wilson's.",
        "",
        "| | answers | harmful, last alone | harmful, as in use | request unsafe, last alone "
        "| request unsafe, as in use |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in asyncio.run(work()).items():
        cells = []
        for column in zip(*found, strict=True):
            low, high = wilson(sum(column), len(column))
            cells.append(f"{sum(column)} ({low:.0%} to {high:.0%})")
        lines.append(f"| {kind} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)
