"""Compares judging long answers claim by claim with judging them as a whole, by the embedded model's probe.

The answers are XSTest's, on which the probe's heads were never trained, of at least `LONG` characters: those
that comply with an unsafe prompt are harmful, the others are not. Both kinds are equally many, those of
lowest digest.
"""

from __future__ import annotations

import asyncio
import os
from typing import NamedTuple

import numpy
from sklearn.metrics import roc_auc_score

from benchmarks.refusals import DATA, Cached
from cai_graph.constitution import load
from cai_graph.critic import Critic, ProbeCritic, critic_for
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Message
from trainers.critic.labels import Row, lowest, read_rows
from trainers.evaluation.claims import ByClaim, claims
from trainers.evaluation.figures import Estimate, estimate, resampled
from trainers.evaluation.grades import CriticGrader

EACH = int(os.environ.get("CAI_BENCH_EACH", "12"))
"""Number of harmful answers, and of harmless ones."""
LONG = 800
CLAIM = 250
"""Minimum length of a claim in characters."""


class Judged(NamedTuple):
    row: Row
    whole: float
    """P(harmful) of the answer as a whole."""
    by_claim: float
    """The highest P(harmful) of any claim."""


async def measure() -> list[Judged]:
    long = [r for r in read_rows(DATA) if r.source == "xstest_answers" and len(r.answer or "") >= LONG]
    rows = [each for harm in (True, False) for each in lowest([r for r in long if r.harm is harm], EACH)]
    model = critic_for("local")
    assert isinstance(model, ProbeCritic)
    critic = ProbeCritic(model.model, Cached(most=16))
    ways: list[Critic] = [critic, ByClaim(critic, least=CLAIM)]
    graders = [CriticGrader(way, load("balanced"), "harmless") for way in ways]
    judged = []
    for row in rows:
        exchange = Exchange(
            messages=(Message(role="user", content=row.request),),
            answer=Message(role="assistant", content=row.answer or ""),
        )
        values = [(await grader.grade([exchange]))[0].value for grader in graders]
        whole, by_claim = (1 - value if value is not None else float("nan") for value in values)
        judged.append(Judged(row, whole, by_claim))
        print(f"{len(judged)}/{len(rows)}", end="\r", flush=True)
    return judged


def _over(judged: list[Judged], measure: object) -> Estimate:
    return resampled(judged, lambda each: each.row.request, measure)  # type: ignore[arg-type]


def _auc(items: list[Judged], field: str) -> float:
    truth = [bool(each.row.harm) for each in items]
    if len(set(truth)) < 2:
        return float("nan")
    return float(roc_auc_score(truth, [getattr(each, field) for each in items]))


def run() -> str:
    judged = asyncio.run(measure())
    threshold = Cached().thresholds["harm"]

    def flagged(field: str, harm: bool) -> Estimate:
        found: dict[str, list[float]] = {}
        for each in judged:
            if each.row.harm is harm:
                found.setdefault(each.row.request, []).append(float(getattr(each, field) >= threshold))
        return estimate(found, bounded=True)

    whole, by_claim = (_over(judged, lambda i, f=f: _auc(i, f)) for f in ("whole", "by_claim"))
    difference = _over(judged, lambda items: _auc(items, "by_claim") - _auc(items, "whole"))
    parts = [len(claims(each.row.answer or "", least=CLAIM)) for each in judged]
    lines = [
        "## Oversight by decomposition: claim by claim, or as a whole",
        "",
        f"{len(judged)} answers of XSTest of at least {LONG} characters, half of them harmful (they comply "
        "with an unsafe prompt), judged by the embedded model's probe under the aim harmless: as a whole, "
        f"and as the worst of {numpy.mean(parts):.1f} claims on average, of at least {CLAIM} characters. "
        "The heads never saw these answers. 95 % intervals, of the AUC from 1000 resamples of whole prompts, "
        "and none where the ranking is perfect in all; n counts prompts.",
        "",
        "| | as a whole | claim by claim |",
        "|---|---|---|",
        f"| AUC | {whole} | {by_claim} |",
        f"| harmful ones flagged, at the card's threshold | {flagged('whole', True)} | "
        f"{flagged('by_claim', True)} |",
        f"| harmless ones flagged | {flagged('whole', False)} | {flagged('by_claim', False)} |",
        "",
        f"AUC claim by claim minus as a whole: {difference}.",
    ]
    return "\n".join(lines)
