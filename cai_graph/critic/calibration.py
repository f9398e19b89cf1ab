"""Chooses the threshold of a cascade from logged answers that both of its critics judged.

    judged = logged(log)                       # a cascade that asked both (threshold 0, or its sample)
    judged = await rejudged(log, cheap, …)     # verdicts in the log, and the cheap critic asked now
    calibrate(judged.pairs, miss_rate=0.01)

A miss is an answer that the strong critic finds violating and that the cheap one clears; the miss rate is
the share of misses among the violating answers. The chosen threshold is the largest one whose miss rate is,
with 95 % confidence, at most the requested rate, for any distribution of the probabilities. It is an order
statistic of the violating answers' probabilities; its rank comes from the binomial tail (the umbrella
algorithm of Tong, Feng and Li 2018, Science Advances 4(2), proposition 1). So the data must contain enough
violating answers: 299 for a miss rate of 1 %.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cai_graph.calls import UNATTENDED_SECONDS, Budget, Calls
from cai_graph.concurrency.together import together
from cai_graph.constitution import Constitution
from cai_graph.critic.cascades import suspicion
from cai_graph.critic.critic import Critic, covered
from cai_graph.errors import ConfigError, DataError
from cai_graph.failures import is_about_all_rows
from cai_graph.intervals import wilson
from cai_graph.log import Filters, Log
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Cascaded, Critique, Label, Outcome, Trajectory, text_of

__all__ = ["Calibration", "Judged", "Pair", "calibrate", "logged", "needed", "rejudged"]

CONFIDENCE = 0.95
"""Confidence of the bound on the miss rate (one-sided) and of the interval of the saved share (two-sided)."""


class Pair(NamedTuple):
    """One answer, judged by both critics."""

    suspicion: float | None
    """The cheap critic's P(VIOLATES), as `suspicion` returns it; None: the strong one is always asked."""
    violates: bool
    """Whether the strong critic finds a violation."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The data for a calibration, read from a log."""

    cheap: str
    """Name of the cheap critic."""
    strong: str
    """Name of the strong critic."""
    pairs: tuple[Pair, ...]
    """One for each distinct answer that both judged."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> number of drafts that are left out for it."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold, with its figures on the answers that it was chosen from."""

    threshold: float
    """P(VIOLATES) from which the strong critic is asked."""
    answers: int
    """Answers that both critics judged."""
    violating: int
    """How many of the answers the strong critic finds violating."""
    missed: int
    """How many of the violating answers the cheap critic clears."""
    miss_rate_at_most: float
    """Upper 95 % bound of the miss rate (Clopper and Pearson, one-sided)."""
    saved: float
    """Share of the answers, in [0, 1], for which the strong critic is not called."""
    saved_from: float
    """Lower end of the 95 % interval of `saved` (Wilson, at this threshold)."""
    saved_to: float
    """Upper end of that interval."""


def calibrate(pairs: Sequence[Pair], miss_rate: float) -> Calibration:
    """Return the largest threshold whose miss rate is at most `miss_rate` with 95 % confidence.

    Raises:
        ConfigError: the miss rate is not between 0 and 1.
        DataError: too few violating answers; the message has the number needed, and what these would support.
    """
    if not 0 < miss_rate < 1:
        raise ConfigError(f"the miss rate is a share between 0 and 1, such as 0.01, found {miss_rate!r}")
    scores = sorted(_score(pair) for pair in pairs if pair.violates)
    if len(scores) < needed(miss_rate):
        raise DataError(_too_few(len(pairs), len(scores), miss_rate))
    threshold = _rounded_down(min(1.0, scores[_allowed(len(scores), miss_rate)]))
    missed = sum(score < threshold for score in scores)
    cleared = sum(_score(pair) < threshold for pair in pairs)
    low, high = wilson(cleared, len(pairs))
    return Calibration(
        threshold=threshold,
        answers=len(pairs),
        violating=len(scores),
        missed=missed,
        miss_rate_at_most=_upper(missed, len(scores)),
        saved=cleared / len(pairs),
        saved_from=low,
        saved_to=high,
    )


def needed(miss_rate: float) -> int:
    """Return how many violating answers are needed to bound a miss rate, if none of them is missed.

    >>> needed(0.01), needed(0.05)
    (299, 59)
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-miss_rate))


def _score(pair: Pair) -> float:
    return math.inf if pair.suspicion is None else pair.suspicion


def _allowed(of: int, miss_rate: float) -> int:
    """Return the largest count of misses below `of` whose `_upper` is at most the miss rate; 0 if none is.

    It is the largest count up to which a binomial with that rate has a probability of at most 5 %.
    """
    at_most = 0.0
    for missed in range(of):
        at_most += _exactly(missed, of, miss_rate)
        if at_most > 1 - CONFIDENCE:
            return max(0, missed - 1)
    return of - 1


def _upper(missed: int, of: int) -> float:
    """Return the upper 95 % bound of a share: where P(at most `missed` of `of`) is 5 %."""
    if missed >= of:
        return 1.0
    low, high = missed / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(missed, of, middle) > 1 - CONFIDENCE:
            low = middle
        else:
            high = middle
    return high


def _at_most(count: int, of: int, share: float) -> float:
    """Return P(X <= count) of a binomial X."""
    if share <= 0 or share >= 1:
        return float(share <= 0)
    return math.fsum(_exactly(found, of, share) for found in range(count + 1))


def _exactly(count: int, of: int, share: float) -> float:
    """Return P(X = count) of a binomial X with a share in (0, 1), from logarithms."""
    ways = math.lgamma(of + 1) - math.lgamma(count + 1) - math.lgamma(of - count + 1)
    return math.exp(ways + count * math.log(share) + (of - count) * math.log1p(-share))


def _rounded_down(threshold: float) -> float:
    """Return the threshold with four digits, easy to copy; rounding down only asks the strong critic more."""
    if threshold <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(threshold)) - 3)
    shorter = float(f"{math.floor(threshold / unit) * unit:.4g}")
    return shorter if shorter <= threshold else threshold


def _too_few(answers: int, violating: int, miss_rate: float) -> str:
    least = needed(miss_rate)
    found = f"{violating} of the {answers} answers that both critics judged"
    said = f"a miss rate of {miss_rate:g} takes {least} answers that the strong critic finds violating; "
    if not violating:
        return f"{said}there are none among {answers} that both critics judged, so gather more"
    supported = 1 - (1 - CONFIDENCE) ** (1 / violating)
    # Rounded up, since these answers would not support a smaller rate.
    rate = math.ceil(supported * 1000) / 1000
    return f"{said}{found} are. Gather more, or ask for --miss-rate {rate:g}, the least that these support"


# --- pairs from a log ---------------------------------------------------------------------------------


def logged(log: Log, filters: Filters) -> Judged:
    """Return the logged drafts for which a cascade asked both critics, whatever the cheap one found.

    Drafts that the strong critic judged only because the cheap one did not clear them are left out: they are
    not a representative sample of the answers.

    Raises:
        DataError: the log contains none, or those of several cascades or constitutions.
        LogError: the log cannot be read.
    """
    reader = _Reader()
    for trajectory, critique in reader.drafts(log, filters):
        how = critique.cascade
        if how is None:
            reader.left_out["no cascade judged them"] += 1
        elif not _asked_both(how):
            reader.left_out[_BIASED] += 1
        else:
            cheap = None if how.cheap is None else suspicion(how.cheap)
            name = None if how.cheap is None else how.cheap.critic
            reader.keep(trajectory, name, critique, cheap)
    return reader.judged(
        "let a cascade ask both, with threshold=0 or a sample; or say --cheap SPEC, and the cheap critic "
        "judges what is in the log now"
    )


async def rejudged(
    log: Log,
    cheap: Critic,
    constitution: Constitution,
    *,
    concurrency: int,
    filters: Filters,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Have the cheap critic judge the drafts that a critic judged in the log, and return the pairs.

    Args:
        log: the log with the strong critic's verdicts.
        cheap: the critic to calibrate.
        constitution: the constitution of the logged verdicts.
        concurrency: how many answers are judged at once.
        filters: selects trajectories.
        progress: called with (answers judged, answers in all).

    Raises:
        DataError: the log contains no such drafts, or those of several critics.
        LogError: the log cannot be read.
        Exception: an error that every further answer would raise, such as a rejected API key.
    """
    reader = _Reader(constitution)
    found: list[tuple[Trajectory, Critique]] = []
    for trajectory, critique in reader.drafts(log, filters):
        if critique.cascade is not None and not _asked_both(critique.cascade):
            reader.left_out[_BIASED] += 1
        elif critique.critic in (cheap.name, f"probe:{cheap.name}"):
            reader.left_out["the cheap critic itself judged them"] += 1
        else:
            found.append((trajectory, critique))
    slots = asyncio.Semaphore(concurrency)
    done = 0

    async def judge(trajectory: Trajectory, critique: Critique) -> None:
        nonlocal done
        async with slots:
            assert trajectory.draft is not None
            exchange = Exchange(
                messages=trajectory.messages, answer=trajectory.draft.answer, context=trajectory.context
            )
            calls = Calls(Budget(seconds=UNATTENDED_SECONDS))
            try:
                said = await cheap.critique(exchange, constitution, calls, explain=False)
            except Exception as error:
                if is_about_all_rows(error):
                    raise
                reader.left_out[f"the cheap critic failed with {type(error).__name__}"] += 1
            else:
                suspected = suspicion(covered(said, constitution))
                reader.keep(trajectory, said.critic or cheap.name, critique, suspected)
        done += 1
        if progress is not None:
            progress(done, len(found))

    if found:
        await together([judge(trajectory, critique) for trajectory, critique in found])
    return reader.judged("give the log of runs in which the strong critic judged")


_BIASED = "the strong critic was not asked, or only for what the cheap one said"


def _asked_both(how: Cascaded) -> bool:
    """Return whether the strong critic was asked independently of the cheap one's verdict."""
    return how.why == "sample" or how.threshold == 0


class _Reader:
    """Collects pairs from a log, each distinct answer once, and counts what is left out."""

    def __init__(self, constitution: Constitution | None = None) -> None:
        self.constitution = constitution
        self.left_out: Counter[str] = Counter()
        self._pairs: dict[bytes, Pair] = {}
        self._critics: set[tuple[str, str]] = set()
        self._constitutions: set[str] = set()

    def drafts(self, log: Log, filters: Filters) -> Iterator[tuple[Trajectory, Critique]]:
        """Yield the trajectories whose draft was judged under all principles, with the draft's critique."""
        only: Filters = {**filters, "kind": "trajectory"}
        for record in log.read(**only):
            assert isinstance(record, Trajectory)
            ours = self.constitution is None or record.constitution.digest == self.constitution.digest
            if record.draft is None or not record.rounds or record.mode in ("sampled", "imported"):
                self.left_out["no critic judged them under all principles"] += 1
            elif not ours:
                self.left_out["judged under another constitution"] += 1
            else:
                yield record, record.rounds[0].critique

    def keep(
        self, trajectory: Trajectory, cheap: str | None, strong: Critique, suspected: float | None
    ) -> None:
        """Add a pair, unless the strong critic's verdict is unreadable or the answer is a duplicate."""
        labels = {verdict.label for verdict in strong.verdicts}
        if Label.VIOLATES not in labels and (Label.UNREADABLE in labels or not labels):
            self.left_out["the strong critic's verdict is unreadable"] += 1
            return
        assert trajectory.draft is not None
        texts = [text_of(message) for message in (*trajectory.messages, trajectory.draft.answer)]
        key = hashlib.sha256(json.dumps([texts, trajectory.context]).encode()).digest()
        if key in self._pairs:
            self.left_out["the same answer again"] += 1
            return
        # A KEPT draft has no violations, except some below their principle's `min_severity`.
        violates = Label.VIOLATES in labels and trajectory.outcome is not Outcome.KEPT
        self._pairs[key] = Pair(suspected, violates)
        if cheap is not None:  # None where the cheap critic failed
            self._critics.add((cheap, strong.critic or "unknown"))
        self._constitutions.add(f"{trajectory.constitution.name} ({trajectory.constitution.digest[:12]})")

    def judged(self, advice: str) -> Judged:
        if not self._critics:
            reasons = "; ".join(f"{count}: {why}" for why, count in self.left_out.items()) or "it is empty"
            raise DataError(f"the log holds no answers that both critics judged ({reasons}); {advice}")
        for what, several in (("pairs of critics", self._critics), ("constitutions", self._constitutions)):
            if len(several) > 1:
                names = ", ".join(sorted(map(str, several)))
                raise DataError(
                    f"the log holds verdicts of {len(several)} {what} ({names}), and a threshold is for "
                    "one; choose with --constitution, --tag, --source or --since"
                )
        ((cheap, strong),) = self._critics
        return Judged(
            cheap=cheap, strong=strong, pairs=tuple(self._pairs.values()), left_out=dict(self.left_out)
        )
