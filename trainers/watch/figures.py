"""Metrics of a training step besides its rewards: boilerplate in answers, dependence on length, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence

from xxhash import xxh3_128_hexdigest

from trainers.policy import Messages
from trainers.watch.rules import AGAINST, FEWEST

__all__ = [
    "Reading",
    "boilerplate",
    "correlation",
    "digest_of",
    "follows_length",
    "refuses_more",
]

GRAM = 5
"""Words of the n-grams whose repetition across answers counts as boilerplate."""
FOLLOWS_LENGTH = 0.5
"""Correlation of reward and length above which a warning is reported."""
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|\w+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The metrics of one step. A metric that was not measured at the step, or is undefined, is None."""

    step: int
    """Updates of the policy so far; 0 is the policy before training."""
    kl: float | None
    """KL to the reference, in nats per answer, over the answers that the last update was trained on. They
    were sampled before that update, so this lags the held-out metrics by one update."""
    entropy: float | None
    """Entropy of the policy's next-token distribution, in nats per token."""
    reward: float | None
    """Mean reward of the answers that the step was trained on."""
    disagreement: float | None = None
    """Mean standard deviation over the members of a reward ensemble."""
    length_correlation: float | None = None
    """Correlation of reward and length in characters, over the answers that the step was trained on."""
    boilerplate: float | None = None
    """Share of answers that share five consecutive words with answers to many other prompts, in [0, 1]; over
    the held-out answers if the step was observed, else over the step's answers."""
    heldout: float | None = None
    """The held-out score: its mean over all held-out answers."""
    heldout_change: float | None = None
    """Mean paired difference to the best observation, cross-fitted (`trainers.watch.rules.fall`); None at the
    first."""
    heldout_noise: float | None = None
    """2.33 standard errors of that difference: smaller differences may be chance."""
    agreement: float | None = None
    """Correlation of the differences of reward and of held-out score between answers to one prompt, in
    [-1, 1]."""
    agreement_noise: float | None = None
    """1.645 standard errors of that correlation, if reward and score were unrelated."""
    refusal_rate: float | None = None
    """Share of the benign prompts that are refused or evaded, in [0, 1]."""


def boilerplate(prompts: Sequence[Messages], answers: Sequence[str], *, share: float = 0.1) -> float | None:
    """Return the share of answers that contain an n-gram of `GRAM` words common to many prompts' answers.

    Args:
        prompts: the prompt of each answer; similar answers to one prompt are expected, and count once.
        answers: as many answers.
        share: share of the different prompts from which on an n-gram is boilerplate; at least 3 prompts.

    Returns:
        In [0, 1]; None if there are fewer than 3 different prompts.
    """
    keys = [digest_of(prompt) for prompt in prompts]
    grams = [_grams(answer) for answer in answers]
    where: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for key, found in zip(keys, grams, strict=True):
        for gram in found:
            where[gram].add(key)
    different = len(set(keys))
    if different < 3:
        return None
    least = max(3, math.ceil(share * different))
    stale = {gram for gram, places in where.items() if len(places) >= least}
    return sum(not stale.isdisjoint(found) for found in grams) / len(grams)


def _grams(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return {tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)}


def digest_of(prompt: Messages) -> str:
    """Return a digest of a prompt's messages; equal prompts have equal digests."""
    return xxh3_128_hexdigest(json.dumps(prompt, sort_keys=True, default=str).encode())


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None for fewer than 3 values, or if one side does not vary."""
    import numpy

    a, b = numpy.asarray(one, float), numpy.asarray(other, float)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return None
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def refuses_more(refused: Sequence[Sequence[bool]]) -> list[str]:
    """Return a warning if significantly more benign prompts are refused than in the first observation."""
    import numpy

    if len(refused) < 2 or not refused[0]:
        return []
    rise = numpy.asarray(refused[-1], float) - numpy.asarray(refused[0], float)
    if rise.mean() <= AGAINST * rise.std() / math.sqrt(len(rise)):
        return []
    now, then = numpy.mean(refused[-1]), numpy.mean(refused[0])
    return [f"{now:.0%} of the benign prompts are refused, at first {then:.0%}"]


def follows_length(found: float | None, answers: int) -> list[str]:
    """Return a warning if the correlation of reward and length is significantly high."""
    if found is None or answers < FEWEST:
        return []
    # Fisher's z: the one-sided lower bound of the correlation.
    bound = math.tanh(math.atanh(max(-0.999, min(0.999, found))) - AGAINST / math.sqrt(answers - 3))
    if bound <= FOLLOWS_LENGTH:
        return []
    return [f"the reward follows length (correlation {found:+.2f} over {answers} answers)"]
