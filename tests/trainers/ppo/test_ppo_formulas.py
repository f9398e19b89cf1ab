"""PPO's mathematics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainers.ppo.formulas import adapted, gae, kl_rewards, policy_loss, value_loss, whiten

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
"""An answer of three tokens, and one of one token."""


def close(found: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_score_comes_at_the_last_token_and_the_kl_is_paid_at_every_one() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0], [-3.0, 7.0, 7.0]])

    found = kl_rewards(torch.tensor([2.0, -1.0]), logprobs, reference, MASK, 0.1)

    # -0.1 x (0.5, 0, -1) with 2 at the third token; -0.1 x 2 with -1 at the first.
    close(found, [[-0.05, 0.0, 2.1], [-1.2, 0.0, 0.0]])


def test_advantages_and_returns_are_those_of_the_paper() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 0.0], [1.0, 7.0, 7.0]])

    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.5)

    # δ = (1 + 0.9 x 1 - 0.5, 0 + 0.9 x 0 - 1, 2 - 0) = (1.4, -1, 2); from the end, times 0.45:
    # A3 = 2, A2 = -1 + 0.9 = -0.1, A1 = 1.4 - 0.045 = 1.355. The values beyond the second answer's end
    # do not count: A = 3 - 1.
    close(advantages, [[1.355, -0.1, 2.0], [2.0, 0.0, 0.0]])
    close(returns, [[1.855, 0.9, 2.0], [3.0, 0.0, 0.0]])


def test_with_lambda_one_and_no_discount_a_return_is_the_sum_of_the_rewards_to_come() -> None:
    rewards = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.0, 0.0]])
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    _, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)

    close(returns, [[3.0, 2.0, 4.0], [3.0, 0.0, 0.0]])


def test_with_lambda_zero_an_advantage_is_one_temporal_difference() -> None:
    rewards, values = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0]])

    advantages, _ = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.0)

    close(advantages, [[1.0, -2.5, 1.0]])


def test_whitened_values_have_mean_zero_and_variance_one_over_the_tokens_alone() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, -100.0]])

    # Mean 3, variance (4 + 1 + 0 + 9) / 4.
    spread = math.sqrt(3.5)
    close(whiten(values, MASK), [[-2 / spread, -1 / spread, 0.0], [3 / spread, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.4),  # beyond 1.2 nothing is gained
        (0.5, 2.0, -1.0),  # but what was lost counts in full
        (0.5, -2.0, 1.6),
        (1.5, -2.0, 3.0),
    ],
)
def test_the_surrogate_is_clipped_where_it_would_gain(ratio: float, advantage: float, loss: float) -> None:
    new = torch.tensor([[-1.0 + math.log(ratio)]], requires_grad=True)

    found = policy_loss(new, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), 0.2)
    found.backward()

    close(found.detach(), [[loss]])
    is_clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert new.grad is not None
    assert float(new.grad) == pytest.approx(0.0 if is_clipped else -advantage * ratio)


@pytest.mark.parametrize(
    ("value", "loss"),
    [
        (1.1, 0.5 * 0.9**2),
        (1.5, 0.5 * 0.8**2),  # moved 0.5, and 0.2 count
        (0.0, 0.5 * 2.0**2),  # moved away: counts in full
    ],
)
def test_a_value_gains_nothing_by_moving_beyond_its_clip(value: float, loss: float) -> None:
    found = value_loss(torch.tensor([[value]]), torch.tensor([[1.0]]), torch.tensor([[2.0]]), 0.2)

    close(found, [[loss]])


def test_the_kl_coefficient_follows_its_target_by_a_fifth_a_horizon_at_most() -> None:
    def next_of(kl: float) -> float:
        return adapted(0.1, kl, target=6.0, horizon=1000, answers=500)

    assert next_of(6.0) == pytest.approx(0.1)
    assert next_of(6.6) == pytest.approx(0.1 * 1.05)
    assert next_of(60.0) == pytest.approx(0.1 * 1.1)
    assert next_of(-3.0) == pytest.approx(0.1 * 0.9)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31))
def test_what_stands_beyond_an_answer_never_counts(tokens: int, beyond: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 1, tokens, generator=chance)
    wide = [torch.cat([one, torch.randn(1, beyond, generator=chance)], 1) for one in (rewards, values)]
    mask = torch.cat([torch.ones(1, tokens), torch.zeros(1, beyond)], 1)

    narrow = gae(rewards, values, torch.ones(1, tokens), gamma=0.9, lam=0.8)
    padded = gae(*wide, mask, gamma=0.9, lam=0.8)

    for one, other in zip(narrow, padded, strict=True):
        torch.testing.assert_close(other[:, :tokens], one)
        assert not other[:, tokens:].any()
