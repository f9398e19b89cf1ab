"""Trains custom critics that give P(VIOLATES) by aim or principle, without generating any token.

verdicts     verdicts as labels, from a dataset of the kind `critic`
states       hidden states of the embedded engine, cached on disk, so that an interrupted run resumes
heads        linear heads on them: fitted, calibrated, given a threshold, written
classifier   a sequence classifier by LoRA, for cases in which a head is not enough
critic       the stage: Config and train
figures      AUC, rates, calibration, 95 % intervals, and a plot
labels       labelled answers and requests from a data folder
probe        trains the heads that cai_graph itself ships, from these labels
"""

from __future__ import annotations

from trainers.critic.critic import Config, train

__all__ = ["Config", "train"]
