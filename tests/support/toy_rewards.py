"""Rewards that tests name in specs."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.policy import Messages


def length(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
    """A reward that likes long answers."""
    return [float(len(answer)) for answer in answers]
