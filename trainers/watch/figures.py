"""What is told of a step beside its rewards: answers that repeat one another, length, refusals."""

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
"""Words of an n-gram whose repetition across answers is boilerplate."""
FOLLOWS_LENGTH = 0.5
"""Correlation with length from which a reward is reported."""
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|\w+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What was seen at one step. What was not looked at then, or has no value, is None."""

    step: int
    """Updates of the policy so far; 0 is the policy that training begins with."""
    kl: float | None
    """KL to the reference, in nats an answer: of the answers that the last update was trained on, which the
    policy drew before it. So it lags the held-out figures by an update."""
    entropy: float | None
    """Of the policy's next-token distribution, in nats a token."""
    reward: float | None
    """Mean of the rewards that the step was trained on."""
    disagreement: float | None = None
    """Mean standard deviation between the members of a reward ensemble."""
    length_correlation: float | None = None
    """Correlation of reward and length in characters, over the answers that the step was trained on."""
    boilerplate: float | None = None
    """Share of answers with five words in a row that answers to many other prompts have, too, in [0, 1]; of
    the held-out answers where there are some, of the step's otherwise."""
    heldout: float | None = None
    """The held-out score: its mean over all held-out answers."""
    heldout_change: float | None = None
    """Mean paired difference to the best observation, cross-fitted (`trainers.watch.rules.fall`); None at the
    first."""
    heldout_noise: float | None = None
    """2.33 standard errors of that difference: what may be chance."""
    agreement: float | None = None
    """Correlation of reward and held-out score between answers to one prompt, in [-1, 1]."""
    agreement_noise: float | None = None
    """1.645 standard errors of it, where the two have nothing to do with one another."""
    refusal_rate: float | None = None
    """Share of the benign prompts that are refused or evaded, in [0, 1]."""


def boilerplate(prompts: Sequence[Messages], answers: Sequence[str], *, share: float = 0.1) -> float | None:
    """Return the share of answers that have `GRAM` words in a row which many prompts' answers have.

    Args:
        prompts: of each answer its prompt; answers to one prompt may well be alike, and count once.
        answers: as many.
        share: of the different prompts, from which an n-gram is boilerplate; at least 3 prompts.

    Returns:
        In [0, 1]; None where there are fewer than 3 different prompts.
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
    """Return a digest of a prompt's turns, by which equal ones are known."""
    return xxh3_128_hexdigest(json.dumps(prompt, sort_keys=True, default=str).encode())


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None of fewer than 3 values, or where one side does not vary."""
    import numpy

    a, b = numpy.asarray(one, float), numpy.asarray(other, float)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return None
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def refuses_more(refused: Sequence[Sequence[bool]]) -> list[str]:
    """Return a warning where benign prompts are refused more than at first, beyond chance."""
    import numpy

    if len(refused) < 2 or not refused[0]:
        return []
    rise = numpy.asarray(refused[-1], float) - numpy.asarray(refused[0], float)
    if rise.mean() <= AGAINST * rise.std() / math.sqrt(len(rise)):
        return []
    now, then = numpy.mean(refused[-1]), numpy.mean(refused[0])
    return [f"{now:.0%} of the benign prompts are refused, at first {then:.0%}"]


def follows_length(found: float | None, answers: int) -> list[str]:
    """Return a warning where a correlation of reward and length is high, beyond chance."""
    if found is None or answers < FEWEST:
        return []
    # Fisher's z: the one-sided lower bound of the correlation.
    bound = math.tanh(math.atanh(max(-0.999, min(0.999, found))) - AGAINST / math.sqrt(answers - 3))
    if bound <= FOLLOWS_LENGTH:
        return []
    return [f"the reward follows length (correlation {found:+.2f} over {answers} answers)"]
