from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_graph.errors import DataError
from cai_graph.intervals import wilson
from trainers.evaluation.figures import estimate, paired, resampled, share
from trainers.evaluation.ratings import ELO, MEAN, Contest, elo, front


def test_a_share_of_prompts_has_wilsons_interval() -> None:
    found = estimate({str(number): [float(number < 50)] for number in range(100)}, bounded=True)

    assert found.n == 100
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.404, 0.596), abs=0.001)


def test_a_share_of_nothing_still_has_an_interval() -> None:
    found = estimate({str(number): [0.0] for number in range(30)}, bounded=True)

    assert found.value == 0
    assert found.high == pytest.approx(0.1135, abs=0.001)


@pytest.mark.parametrize(
    ("wins", "low", "high"),
    [
        ([1.0] * 9 + [0.5], 0.655, 0.995),  # Wilson's of 9.5 in 10
        ([0.5] * 3, 0.125, 0.875),  # and of 1.5 in 3
        ([0.5], 0.054, 0.946),
    ],
)
def test_a_win_rate_with_ties_has_wilsons_interval(wins: list[float], low: float, high: float) -> None:
    found = estimate({str(number): [won] for number, won in enumerate(wins)}, bounded=True)

    assert (found.low, found.high) == pytest.approx((low, high), abs=0.001)


def test_a_share_that_is_the_same_for_every_prompt_has_an_interval() -> None:
    found = estimate({"a": [0, 1], "b": [1, 0], "c": [0, 1]}, bounded=True)

    assert (found.low, found.high) == pytest.approx((0.125, 0.875), abs=0.001)


def test_numbers_that_are_all_alike_have_no_interval() -> None:
    assert str(estimate({"a": [97.0], "b": [97.0]}, bounded=False)) == "97.00 (n = 2)"
    assert str(paired({"a": [0.7], "b": [0.5]}, {"a": [0.6], "b": [0.4]})) == "0.10 (n = 2)"


def test_a_mean_has_students_interval() -> None:
    """Of 1, 2, 3, 4: mean 2.5, standard error 0.6455, t(3) at 97.5 % is 3.1824."""
    found = estimate({"a": [1.0], "b": [2.0], "c": [3.0], "d": [4.0]}, bounded=False)

    assert found.value == 2.5
    assert found.high - found.value == pytest.approx(3.1824 * 0.6455, abs=0.001)


def test_several_answers_to_a_prompt_count_as_one_prompt() -> None:
    once = estimate({"a": [2], "b": [4], "c": [9]}, bounded=False)
    often = estimate({"a": [1, 3], "b": [4] * 7, "c": [9] * 3}, bounded=False)

    assert often == pytest.approx(once)


def test_a_share_over_several_answers_stays_between_0_and_1() -> None:
    """Of 1/2, 0 and 0 the mean varies by 1/54 with 2 degrees of freedom; were answers to a prompt all alike,
    by 5/108. The mean of both, with 2 for the latter, too, is that of 4.29 answers."""
    found = estimate({"a": [0, 1], "b": [0, 0], "c": [0, 0]}, bounded=True)

    assert found.value == pytest.approx(1 / 6)
    assert (found.low, found.high) == pytest.approx((0.023, 0.625), abs=0.001)


def test_one_failure_more_does_not_make_a_share_surer() -> None:
    """None of 50 times 8 answers fails, or one does: nothing is known of how others of its prompt fare."""
    answers = {str(number): [0.0] * 8 for number in range(50)}
    none = estimate(answers, bounded=True)
    one = estimate(answers | {"0": [1.0, *[0.0] * 7]}, bounded=True)

    assert none.high == pytest.approx(0.071, abs=0.001)
    assert one.high > 0.5 * none.high
    assert one == share(answers | {"0": [1.0, *[0.0] * 7]})


def test_the_interval_of_a_share_covers_it_where_few_prompts_fail() -> None:
    """Of 30 prompts 3 % always fail, and of the others an answer in 500."""
    chance = random.Random(0)

    def answers() -> list[float]:
        fails = 1.0 if chance.random() < 0.03 else 0.002
        return [float(chance.random() < fails) for _ in range(8)]

    runs = [estimate({str(n): answers() for n in range(30)}, bounded=True) for _ in range(300)]

    truth = 0.03 + 0.97 * 0.002
    assert sum(found.low <= truth <= found.high for found in runs) >= 0.92 * len(runs)


def test_rewards_that_happen_to_lie_between_0_and_1_are_no_shares() -> None:
    """Of 0.4 and 0.6 and such, moved by 1, the interval is moved by 1."""
    rewards = {str(number): [0.5 + 0.01 * (number % 5)] for number in range(30)}
    found = estimate(rewards, bounded=False)
    moved = estimate({prompt: [reward + 1] for prompt, (reward,) in rewards.items()}, bounded=False)

    assert found.high - found.low < 0.02
    assert moved[:3] == pytest.approx([end + 1 for end in found[:3]])


def test_a_share_above_1_is_refused() -> None:
    with pytest.raises(DataError, match=r"found 0\.5 to 2"):
        estimate({"a": [0.5], "b": [2]}, bounded=True)


def test_one_prompt_has_no_interval_and_none_has_no_value() -> None:
    assert estimate({"a": [3.0]}, bounded=False).json() == {"value": 3.0, "low": None, "high": None, "n": 1}
    assert estimate({"a": []}, bounded=False).json() == {"value": None, "low": None, "high": None, "n": 0}


def test_probabilities_of_which_few_fail_have_wilsons_interval_within_0_and_1() -> None:
    """19 answers at 0.99 and one at 0.05 sum up to 18.86 of 20; Student's t would end at 1.04."""
    found = estimate({str(number): [0.99] for number in range(19)} | {"bad": [0.05]}, bounded=True)

    assert (found.low, found.high) == pytest.approx((0.754, 0.989), abs=0.001)


def test_the_interval_of_probabilities_covers_their_mean() -> None:
    chance = random.Random(0)
    truth = 0.95 * 0.99 + 0.05 * 0.05
    runs = [
        estimate({str(n): [0.05 if chance.random() < 0.05 else 0.99] for n in range(20)}, bounded=True)
        for _ in range(300)
    ]

    assert sum(found.low <= truth <= found.high for found in runs) >= 0.93 * len(runs)


def test_a_share_of_answers_is_as_sure_as_its_prompts_allow() -> None:
    once = share({str(number): [float(number < 80)] for number in range(100)})
    copied = share({str(number): [float(number < 80)] * 9 for number in range(100)})
    apart = share({str(number): [1, 1, 1, number % 2, number % 2] for number in range(100)})

    assert copied == pytest.approx(once)
    assert once == pytest.approx(
        estimate({str(number): [float(number < 80)] for number in range(100)}, bounded=True)
    )
    assert (apart.value, apart.n) == (pytest.approx(0.8), 100)
    assert once.low < apart.low < 0.8
    assert str(share({str(number): [1, 1] for number in range(20)})) == "1.00 (0.84 to 1.00, n = 20)"


def test_a_difference_is_paired_by_prompt() -> None:
    """The prompts differ widely and the subjects by 0.1 on each, so pairing leaves hardly any noise."""
    before = {str(number): [float(number)] for number in range(20)}
    after = {prompt: [values[0] + 0.1 + 0.001 * (int(prompt) % 2)] for prompt, values in before.items()}

    found = paired(after | {"only after": [1000.0]}, before)

    assert found.n == 20
    assert found.low > 0.099
    assert found.high < 0.102


def test_the_bootstrap_draws_whole_prompts() -> None:
    """Ten copies of each answer say no more than one: the interval must not shrink."""
    answers = [(str(number), float(number % 2)) for number in range(40)]

    def mean(items: object) -> float:
        values = [value for _, value in items]  # type: ignore[attr-defined]
        return sum(values) / len(values)

    once = resampled(answers, lambda item: item[0], mean)
    copied = resampled(answers * 10, lambda item: item[0], mean)

    assert copied == pytest.approx(once)
    assert once.low < 0.5 < once.high


def test_resamples_that_are_all_alike_have_no_interval() -> None:
    found = resampled([("a", 1.0), ("b", 1.0), ("c", 1.0)], lambda item: item[0], lambda items: 1.0)

    assert found.json() == {"value": 1.0, "low": None, "high": None, "n": 3}


def test_two_subjects_rate_as_far_apart_as_their_odds() -> None:
    """Of 100 contests a wins 75; with the one further tie the odds are 75.5 to 25.5."""
    contests = [Contest(str(number), "a", "b", float(number < 75)) for number in range(100)]

    rated = elo(contests)

    assert rated["a"].value - rated["b"].value == pytest.approx(ELO * math.log(75.5 / 25.5), abs=0.01)
    assert sum(found.value for found in rated.values()) / 2 == pytest.approx(MEAN)
    assert list(rated) == ["a", "b"]
    assert rated["b"].high < rated["a"].low


def test_ratings_recover_the_strengths_that_made_the_contests() -> None:
    chance = random.Random(0)
    truth = {"weak": -1.0, "middle": 0.0, "strong": 1.0}
    pairs = [("weak", "middle"), ("middle", "strong"), ("strong", "weak")]
    contests = [
        Contest(str(number), a, b, float(chance.random() < 1 / (1 + math.exp(truth[b] - truth[a]))))
        for number in range(600)
        for a, b in pairs
    ]

    rated = elo(contests)

    for name, strength in truth.items():
        assert rated[name].low < MEAN + ELO * strength < rated[name].high
        assert rated[name].n == 600


def test_a_subject_that_won_everything_has_a_finite_rating() -> None:
    rated = elo([Contest(str(number), "a", "b", 1.0) for number in range(10)])

    assert math.isfinite(rated["a"].value)
    assert rated["a"].value > rated["b"].value


@pytest.mark.parametrize(("p_a", "prompts"), [(1.0, 12), (0.5, 2)])
def test_contests_that_all_came_out_alike_leave_a_rating_unsure(p_a: float, prompts: int) -> None:
    """With the one further tie: 12.5 to 0.5 in 13, and 1.5 to 1.5 in 3; Wilson's of these are as wide."""
    games = prompts + 1
    of_a = (prompts * p_a + 0.5) / games

    rated = elo([Contest(str(number), "a", "b", p_a) for number in range(prompts)])

    half = ELO * 1.96 / 2 / math.sqrt(games * of_a * (1 - of_a))
    for name in ("a", "b"):
        value, low, high, n = rated[name]
        assert n == prompts
        assert (value - low, high - value) == pytest.approx((half, half))


def test_a_subject_that_won_everything_is_rated_no_surer_where_others_share_their_contests() -> None:
    """Resamples move the first by what the others do to each other alone."""
    contests = [
        contest
        for number in range(12)
        for contest in (
            Contest(str(number), "a", "b", 1.0),
            Contest(str(number), "a", "c", 1.0),
            Contest(str(number), "b", "c", number % 2),
        )
    ]
    first = elo(contests)["a"]

    assert first.low < first.value - 100
    assert first.high > first.value + 100


def test_subjects_that_never_met_are_not_rated_together() -> None:
    with pytest.raises(DataError, match="compares c, d with a"):
        elo([Contest("1", "a", "b", 1.0), Contest("1", "c", "d", 1.0)])


def test_no_contest_is_an_error() -> None:
    with pytest.raises(DataError, match="no comparison has a readable outcome"):
        elo([])


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_the_front_is_what_no_other_surpasses(points: dict[str, tuple[int, int]]) -> None:
    best = front({name: (float(x), float(y)) for name, (x, y) in points.items()})

    assert best
    for name, (x, y) in points.items():
        surpassed = any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
        assert (name in best) is not surpassed


def test_prompts_that_differ_less_than_chance_are_worth_no_more_than_their_answers() -> None:
    found = share({**{str(number): [1.0, 0.0] for number in range(30)}, "other": [1.0, 1.0]})

    assert (found.low, found.high) == pytest.approx(wilson(32, 62))
