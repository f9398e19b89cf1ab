"""Critics: from an answer to a Critique, by the words of a model or by probabilities alone.

critic       the Critic that every plan has; by a chat model, or by heads on a hidden state
ladder       from a model's reply to Verdicts: JSON, labelled line, or UNREADABLE
probe        the linear heads of the local model, which lie in heads/
trained      critics of one's own, which `cai train critic` makes
cascades     a cheap critic first, a strong one for what it cannot clear
calibration  the threshold of a cascade, from a log that both judged
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
