from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_graph.errors import DataError
from trainers.evaluation.figures import estimate, paired, resampled, share
from trainers.evaluation.ratings import ELO, MEAN, Contest, elo, front


def test_a_share_of_prompts_has_wilsons_interval() -> None:
    found = estimate({str(number): [float(number < 50)] for number in range(100)})

    assert found.n == 100
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.404, 0.596), abs=0.001)


def test_a_share_of_nothing_still_has_an_interval() -> None:
    found = estimate({str(number): [0.0] for number in range(30)})

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
    found = estimate({str(number): [won] for number, won in enumerate(wins)})

    assert (found.low, found.high) == pytest.approx((low, high), abs=0.001)


def test_a_share_that_is_the_same_for_every_prompt_has_an_interval() -> None:
    found = estimate({"a": [0, 1], "b": [1, 0], "c": [0, 1]})

    assert (found.low, found.high) == pytest.approx((0.125, 0.875), abs=0.001)


def test_numbers_that_are_all_alike_have_no_interval() -> None:
    assert str(estimate({"a": [97.0], "b": [97.0]})) == "97.00 (n = 2)"
    assert str(paired({"a": [0.7], "b": [0.5]}, {"a": [0.6], "b": [0.4]})) == "0.10 (n = 2)"


def test_a_mean_has_students_interval() -> None:
    """Of 1, 2, 3, 4: mean 2.5, standard error 0.6455, t(3) at 97.5 % is 3.1824."""
    found = estimate({"a": [1.0], "b": [2.0], "c": [3.0], "d": [4.0]})

    assert found.value == 2.5
    assert found.high - found.value == pytest.approx(3.1824 * 0.6455, abs=0.001)


def test_several_answers_to_a_prompt_count_as_one_prompt() -> None:
    once = estimate({"a": [2], "b": [4], "c": [9]})
    often = estimate({"a": [1, 3], "b": [4] * 7, "c": [9] * 3})

    assert often == pytest.approx(once)


def test_a_share_over_several_answers_stays_between_0_and_1() -> None:
    found = estimate({"a": [0, 1], "b": [0, 0], "c": [0, 0]})

    assert found.value == pytest.approx(1 / 6)
    assert (found.low, found.high) == (0, pytest.approx(0.884, abs=0.001))


def test_one_prompt_has_no_interval_and_none_has_no_value() -> None:
    assert estimate({"a": [3.0]}).json() == {"value": 3.0, "low": None, "high": None, "n": 1}
    assert estimate({"a": []}).json() == {"value": None, "low": None, "high": None, "n": 0}


def test_probabilities_of_which_few_fail_have_wilsons_interval_within_0_and_1() -> None:
    """19 answers at 0.99 and one at 0.05 sum up to 18.86 of 20; Student's t would end at 1.04."""
    found = estimate({str(number): [0.99] for number in range(19)} | {"bad": [0.05]})

    assert (found.low, found.high) == pytest.approx((0.754, 0.989), abs=0.001)


def test_the_interval_of_probabilities_covers_their_mean() -> None:
    chance = random.Random(0)
    truth = 0.95 * 0.99 + 0.05 * 0.05
    runs = [
        estimate({str(n): [0.05 if chance.random() < 0.05 else 0.99] for n in range(20)}) for _ in range(300)
    ]

    assert sum(found.low <= truth <= found.high for found in runs) >= 0.93 * len(runs)


def test_a_share_of_answers_is_as_sure_as_its_prompts_allow() -> None:
    once = share({str(number): [float(number < 80)] for number in range(100)})
    copied = share({str(number): [float(number < 80)] * 9 for number in range(100)})
    apart = share({str(number): [1, 1, 1, number % 2, number % 2] for number in range(100)})

    assert copied == pytest.approx(once)
    assert once == pytest.approx(estimate({str(number): [float(number < 80)] for number in range(100)}))
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


def test_subjects_that_never_met_are_not_rated_together() -> None:
    with pytest.raises(DataError, match="c, d never met a"):
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
