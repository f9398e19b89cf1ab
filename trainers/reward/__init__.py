"""Trains reward models on soft labels: one, or an ensemble and the average of its weights.

reward        the stage: Config and train, over TRL's RewardTrainer
frozen        trains the head alone, on hidden states of a frozen model: feasible on a CPU
averaging     the average of several models' weights (WARM)
reliability   accuracy and calibration of the margins on held-out pairs
"""

from __future__ import annotations

from trainers.reward.reward import HELD_OUT, KINDS, MEMBERS, Config, members, train

__all__ = ["HELD_OUT", "KINDS", "MEMBERS", "Config", "members", "train"]
