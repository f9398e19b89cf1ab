"""Reward models on soft labels: one, or an ensemble with its average.

reward        the stage: Config and train, over TRL's RewardTrainer
frozen        the head alone, on the states of a frozen model: a fit for a CPU
averaging     the average of several models' weights (WARM)
reliability   what margins are worth: how often right, and how far they may be believed
"""

from __future__ import annotations

from trainers.reward.reward import HELD_OUT, KINDS, MEMBERS, Config, members, train

__all__ = ["HELD_OUT", "KINDS", "MEMBERS", "Config", "members", "train"]
