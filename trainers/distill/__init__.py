"""All of Constitutional AI from one config: from prompts or a log to a better model, and a report on it.

    trajectories   prompts are answered, judged and revised under the constitution; logs are copied in
    sft-data       what the constitution let pass, as rows
    sft            the model learns to answer so at once (the supervised phase)
    feedback       two answers a prompt from that model; an AI judge says which is better, in both orders
    preferences    its soft labels, as rows
    reward         a reward model learns them
    prompts        what the policy practises on
    ppo            … against the reward model; or rloo, grpo; or dpo, on the preferences without one
    evaluation     the model before, after sft and after RL, on held-out prompts
    model          the weights of the last one, also as GGUF; OUTPUT is then `local:OUTPUT`

Each is a `Step` of `pipeline`: kept under the digest of what it depends on, resumed where it was
interrupted, skipped where nothing changed. Source: Bai et al. 2022, arXiv:2212.08073, sections 3 and 4.
"""

from __future__ import annotations

from trainers.distill.config import Config, Drafts, Evaluation, Feedback, Method, Rows
from trainers.distill.plan import pipeline, train

__all__ = ["Config", "Drafts", "Evaluation", "Feedback", "Method", "Rows", "pipeline", "train"]
