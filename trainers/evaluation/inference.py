"""Selects one of several answers to a prompt: ways to use more compute at inference, evaluated like a model.

Best-of-n selects the answer with the highest grade. Self-consistency needs no grader: it selects the answer
that agrees most with the others. For answers of one word or one number this is the majority vote (Wang et al.
2022, arXiv:2203.11171); for longer ones it is the answer of least Bayes risk, with word overlap as the
measure of agreement (Bertsch et al. 2023, arXiv:2310.01387, who show that the vote is a special case of it).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["best", "most_agreed", "overlap"]

_WORD = re.compile(r"[-+−]?\d+(?:[.,]\d+)*|\w+")
"""Matches a number with its sign and its decimals, or a word."""
_AROUND = "\"'`*()[]"


def best(values: Sequence[float | None]) -> int | None:
    """Return the index of the largest value, the first among equals; None if no value could be read.

    >>> best([0.2, None, 0.9, 0.9])
    2
    """
    known = [place for place, value in enumerate(values) if value is not None]
    return max(known, key=lambda place: (values[place] or 0.0, -place)) if known else None


def most_agreed(answers: Sequence[str]) -> int:
    """Return the index of the answer that overlaps most with the others, the first among equals.

    If each is one word or number, all characters count except quotes, brackets and punctuation at the end.

    >>> most_agreed(["41", "42", "forty-one", "42."]), most_agreed(["it is 5", "it is -5", "so it is -5"])
    (1, 1)
    """
    if all(len(answer.split()) < 2 for answer in answers):
        words = [Counter([_token(answer)]) for answer in answers]
    else:
        words = [Counter(_WORD.findall(answer.casefold())) for answer in answers]
    agreement = [
        sum(overlap(mine, other) for there, other in enumerate(words) if there != here)
        for here, mine in enumerate(words)
    ]
    return max(range(len(answers)), key=lambda place: (agreement[place], -place))


def _token(answer: str) -> str:
    return answer.strip().strip(_AROUND).rstrip(".,;:!?").strip(_AROUND).casefold()


def overlap(a: Counter[str], b: Counter[str]) -> float:
    """Return the F1 of two texts' words, from 0 to 1; two texts without a word agree.

    >>> overlap(Counter(["a", "b"]), Counter(["b", "c"]))
    0.5
    """
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0
