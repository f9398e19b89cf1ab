"""Critics: they judge an answer and return a Critique, from a model's reply or from probabilities alone.

critic       the Critic protocol, and the critics by a chat model and by the probe
ladder       parses a model's reply into Verdicts: tool call, JSON, labelled line, or UNREADABLE
probe        linear heads on a local model's hidden state; the built-in heads are in heads/
trained      the user's own critics, made by `cai train critic`
cascades     a cheap critic first, and a strong one for the answers that it cannot clear
calibration  chooses the threshold of a cascade, from logged answers that both of its critics judged
"""

from cai_graph.critic.critic import (
    MAX_ANSWER_CHARS,
    Critic,
    ModelCritic,
    ProbeCritic,
    check_length,
    check_strategy,
    covered,
    critic_for,
    failed_principles,
)

__all__ = [
    "MAX_ANSWER_CHARS",
    "Critic",
    "ModelCritic",
    "ProbeCritic",
    "check_length",
    "check_strategy",
    "covered",
    "critic_for",
    "failed_principles",
]
