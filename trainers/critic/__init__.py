"""Critics of one's own: P(VIOLATES) by aim or principle, from verdicts, reviews and labels; no token written.

verdicts     verdicts as labels, out of a dataset of the kind `critic`
states       hidden states of the embedded engine, kept on disk, so that an interrupted run resumes
heads        linear heads on them: fitted, calibrated, given a threshold, written
classifier   a sequence classifier by LoRA, where a head is not enough
critic       the stage: Config and train
figures      AUC, rates, calibration, 95 % intervals, and a plot
labels       labelled answers and requests out of a data folder
probe        trains from them the heads that cai_graph itself carries
"""

from __future__ import annotations

from trainers.critic.critic import Config, train

__all__ = ["Config", "train"]
