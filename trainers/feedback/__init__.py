"""AI feedback (Bai et al. 2022, section 4): a judge compares two answers to a prompt, in both orders.

feedback    over a log: selects pairs, asks the judge, appends Comparisons; resumable
judge       asks a model which of two answers is better under a principle
positions   the reliability of a judge: its position bias, ties, unreadable replies
"""

from __future__ import annotations

from trainers.feedback.feedback import (
    BAND,
    Config,
    Labelled,
    Labelling,
    Pair,
    PairKind,
    draw,
    p_a_of,
    p_violates,
    pairs_of,
)
from trainers.feedback.judge import Judge

__all__ = [
    "BAND",
    "Config",
    "Judge",
    "Labelled",
    "Labelling",
    "Pair",
    "PairKind",
    "draw",
    "p_a_of",
    "p_violates",
    "pairs_of",
]
