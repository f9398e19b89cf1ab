"""The mathematics of PPO on a language model, as pure functions.

    kl_rewards    the score at the end of an answer, and a KL penalty to the reference at every token
    gae           advantage and return of every token
    whiten        advantages with mean 0 and variance 1
    policy_loss   the clipped surrogate
    value_loss    the clipped squared error
    adapted       the next KL coefficient

Shapes: B answers, A tokens of the longest one. A `mask` (B, A) is 1 on the tokens of an answer, including its
end-of-text token; answers begin at column 0 and are padded on the right.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adapted", "gae", "kl_rewards", "policy_loss", "value_loss", "whiten"]


def kl_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coefficient: float
) -> Tensor:
    """Return the reward of every token: the KL penalty everywhere, and the score at the last token.

    Args:
        scores: (B,) the reward of each whole answer.
        logprobs: (B, A) log π(token) of the policy that drew the answers, in nats.
        ref_logprobs: (B, A) the same of the reference.
        mask: (B, A).
        coefficient: β, the price of a nat.

    Returns:
        (B, A); 0 beyond an answer.

    Source: Ziegler et al. 2019, eq. 2: R = r - β log(π / ρ), token by token.
    """
    rewards = -coefficient * (logprobs - ref_logprobs) * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return the advantage and the return of every token. After an answer's last token the value is 0.

    Args:
        rewards: (B, A).
        values: (B, A) V of the text before each token.
        mask: (B, A).
        gamma: discount, in [0, 1].
        lam: λ in [0, 1]: 0 relies on the values alone, 1 on the rewards alone.

    Returns:
        advantages, returns: (B, A) each; 0 beyond an answer.

    Source: Schulman et al. 2015, eq. 16: A_t = Σ (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} - V_t.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return values with mean 0 and variance 1 over the masked places; 0 elsewhere. All are (B, A)."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return the loss of every token, before averaging. All are (B, A).

    Args:
        logprobs: of the policy as it is now.
        old_logprobs: of the policy that drew the answers.
        advantages: of each token.
        clip: ε; beyond a ratio of 1 ± ε the loss does not improve further.

    Source: Schulman et al. 2017, eq. 7, with the sign reversed.
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return half the squared error of every token, before averaging. All are (B, A).

    Moving a value further than `clip` from what it was when the answers were drawn does not lower the loss.

    Source: the code of Schulman et al. 2017; Huang et al. 2024, section 3.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def adapted(coefficient: float, kl: float, *, target: float, horizon: float, answers: int) -> float:
    """Return the next KL coefficient: higher if the KL was above its target, by at most 20 % per horizon.

    Args:
        coefficient: β so far.
        kl: of the answers just drawn, in nats per answer.
        target: desired KL, in nats per answer.
        horizon: answers over which the coefficient may change by 20 %.
        answers: drawn since the last adaptation.

    Source: Ziegler et al. 2019, section 2.2.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return coefficient * (1 + error * answers / horizon)
