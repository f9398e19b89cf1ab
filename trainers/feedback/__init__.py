"""AI feedback (Bai et al. 2022, section 4): two answers to a prompt, compared by a judge in both orders.

feedback    over a log: draws the pairs, asks, appends Comparisons; resumable
judge       which of two answers is better under a principle, read from a model
positions   what a judge is worth: its liking for a place, its ties, what it could not say
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
