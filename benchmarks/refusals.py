"""Measures how well refusals are detected in XSTest's completions, compared with people's labels.

The detectors are the pattern, the probe, and the embedded model as judge. The pattern is applied to all
completions, the others to those of lowest digest, since each costs a forward pass or a reply. Hidden states
are stored in the local cache.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cai_graph.critic.probe import Probe, Scores, Seen, States, unread, windows
from trainers.critic.states import Passes, StateCache, reader_of
from trainers.evaluation.refusals import (
    Agreement,
    Compliance,
    PatternRefusals,
    ProbeRefusals,
    agreement,
    read_labelled,
    refusals_for,
)

DATA = Path(os.environ.get("CAI_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
ANSWERS = int(os.environ.get("CAI_BENCH_ANSWERS", "354"))
ASKED = int(os.environ.get("CAI_BENCH_ASKED", "40"))
"""Number of answers that the embedded model judges in words."""


class Cached(Probe):
    """The embedded model's probe, with a disk cache of hidden states; reads an answer's first windows."""

    def __init__(self, most: int = 1) -> None:
        shipped = Probe.for_model("local")
        assert shipped is not None
        super().__init__(shipped.folder, "")
        before, between = self.card["turns"]
        self.cache = StateCache(reader_of("local", self.card["blocks"], (before, between)))
        self.most = most

    async def seen(self, answer: str) -> Seen:
        return Seen(tuple(windows(answer)[: self.most]) or ("",), unread(answer))

    async def scores(self, request: str, seen: Sequence[str]) -> Scores:
        wanted = [Passes(request, tuple(seen))]
        await self.cache.extract(wanted)
        passes = [States(vectors, 0) for vectors in self.cache.load(wanted)[0]]
        return Scores(
            harm=max(self.probability("harm", each) for each in passes),
            evasion=self.probability("evasion", passes[0]),
            request=self.probability("request", passes[0]),
            tokens=0,
        )


def measure(progress: Callable[[int, int], None] | None = None) -> list[Agreement]:
    files = sorted((DATA / "xstest" / "model_completions").glob("*.csv"))
    sample = read_labelled(files, ANSWERS)
    probe = Cached()

    async def work() -> list[Agreement]:
        return [
            await agreement(read_labelled(files), PatternRefusals()),
            await agreement(sample, PatternRefusals()),
            await agreement(sample, ProbeRefusals(probe, "local")),
            await agreement(sample[:ASKED], refusals_for("local"), progress),
        ]

    return asyncio.run(work())


def run() -> str:
    found = measure(lambda done, of: print(f"{done}/{of}", end="\r", flush=True))
    measures = (
        ("refuses at all, accuracy", "accuracy_of_refusing"),
        ("refuses at all, Cohen's kappa", "kappa_of_refusing"),
        ("three classes, accuracy", "accuracy"),
        ("three classes, Cohen's kappa", "kappa"),
        ("the two raters with each other, kappa", "kappa_of_people"),
    )
    lines = [
        "## Refusals: who agrees with the people who labelled XSTest's completions",
        "",
        "Answers of five models to XSTest's prompts, as far as they are at hand, with the label that two "
        "raters settled on. The pattern knows how English refusals open; the probe reads the hidden state of "
        "the embedded model, at the threshold of its card; neither tells partial refusals. The embedded "
        "model as judge is asked for one of the three classes. Nothing was fitted here, yet the threshold of "
        "the card was chosen with XSTest in view. 95 % intervals over whole prompts, of shares Wilson's, of "
        "kappa from 1000 resamples; n counts prompts.",
        "",
        "| | " + " | ".join(f"{each.by}, {each.answers} answers" for each in found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for name, field in measures:
        lines.append(f"| {name} | " + " | ".join(str(getattr(each, field)) for each in found) + " |")
    for kind in ("recall", "precision"):
        for label in Compliance:
            cells = " | ".join(str(getattr(each, kind)[label]) for each in found)
            lines.append(f"| {label}, {kind} | {cells} |")
    return "\n".join(lines)
