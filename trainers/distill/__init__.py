"""Runs all of Constitutional AI from one config: from prompts or a log to a better model and a report on it.

    trajectories   prompts are answered, judged and revised under the constitution; logs are copied in
    sft-data       accepted answers, as rows
    sft            the model is trained to give such answers directly (the supervised phase)
    feedback       that model answers each prompt twice; an AI judge compares the answers in both orders
    preferences    the judge's soft labels, as rows
    reward         a reward model is trained on them
    prompts        prompts for training the policy
    ppo            the policy is trained against the reward model; or rloo, grpo; or dpo, on the preferences
                   without a reward model
    evaluation     the model before training, after sft and after RL, on held-out prompts
    model          the weights of the last one, also as GGUF; OUTPUT can then be used as `local:OUTPUT`

Each is a `Step` of `pipeline`: its result is stored under the digest of what it depends on, resumed after an
interrupt, and skipped if nothing changed. Source: Bai et al. 2022, arXiv:2212.08073, sections 3 and 4.
"""

from __future__ import annotations

from trainers.distill.config import Config, Drafts, Evaluation, Feedback, Method, Rows
from trainers.distill.plan import pipeline, train

__all__ = ["Config", "Drafts", "Evaluation", "Feedback", "Method", "Rows", "pipeline", "train"]
