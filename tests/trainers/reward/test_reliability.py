"""What margins are worth: accuracy, calibration and loss against numbers worked by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cai_graph.errors import DataError
from cai_graph.intervals import wilson
from trainers.reward.reliability import ALL, Pair, bins, figures, measured, plot

LOGIT_08 = math.log(0.8 / 0.2)


def test_a_model_that_says_08_and_is_right_in_8_of_10_is_calibrated() -> None:
    pairs = [Pair(LOGIT_08, 1.0, "a", "q")] * 8 + [Pair(LOGIT_08, 0.0, "a", "q")] * 2

    found = measured(pairs)[ALL]

    # Every confidence is the same, so every bin's is 0.8; of the two pairs a bin has, 1, ½ or 0 came true.
    one = bins(pairs, 1)
    assert one == [(10, pytest.approx(0.8), pytest.approx(0.8))]
    assert found.accuracy == pytest.approx(0.8)
    assert found.loss == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))


def test_confidence_that_does_not_come_true_is_the_calibration_error() -> None:
    sure_and_wrong = [Pair(30.0, 0.0, "a", "q")] * 10
    half_sure = [Pair(0.0, 0.5, "a", "q")] * 10

    assert measured(sure_and_wrong)[ALL].ece == pytest.approx(1.0)
    assert measured(half_sure)[ALL].ece == pytest.approx(0.0)


def test_a_soft_label_is_met_by_its_own_probability() -> None:
    pair = Pair(math.log(0.6 / 0.4), 0.6, "a", "q")

    found = measured([pair] * 20)[ALL]

    assert found.ece == pytest.approx(0.0)
    assert found.loss == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))  # H(0.6) = 0.6730


def test_swapping_chosen_and_rejected_changes_no_figure() -> None:
    pairs = [Pair(0.3 * number - 1, 0.1 * (number % 11), "a", "q") for number in range(23)]
    swapped = [Pair(-pair.margin, 1 - pair.p_chosen, pair.group, "q") for pair in pairs]

    # A label of exactly one half has no side to agree with.
    decided = [number for number, pair in enumerate(pairs) if pair.p_chosen != 0.5]
    one = measured([pairs[number] for number in decided])[ALL]
    other = measured([swapped[number] for number in decided])[ALL]

    assert one == pytest.approx(other)


def test_equal_confidences_stand_in_one_bin_whatever_came_true() -> None:
    pairs = [Pair(LOGIT_08, 1.0, "a", "q")] * 80 + [Pair(LOGIT_08, 0.0, "a", "q")] * 20

    assert bins(pairs) == [(100, pytest.approx(0.8), pytest.approx(0.8))]
    assert measured(pairs)[ALL].ece == pytest.approx(0.0)


def test_a_calibration_error_stands_beside_that_of_a_calibrated_model() -> None:
    """Twenty runs of a model that is right as often as it says; of one that is not, the error stands out."""
    inside = 0
    for seed in range(20):
        chance = random.Random(seed)
        margins = [abs(chance.gauss(0, 0.85)) for _ in range(200)]
        pairs = [Pair(m if chance.random() < 1 / (1 + math.exp(-m)) else -m, 1.0, "a", "q") for m in margins]
        found = measured(pairs)[ALL]
        inside += found.ece_calibrated_low <= found.ece <= found.ece_calibrated_high
    boastful = measured([Pair(pair.margin * 5, 1.0, "a", "q") for pair in pairs])[ALL]

    assert inside >= 17
    assert found.ece_calibrated_high > 0.05  # that much is noise
    assert boastful.ece > boastful.ece_calibrated_high


def test_pairs_of_one_prompt_are_no_more_evidence_than_the_prompt() -> None:
    """Of 40 prompts 28 are ranked right, four times each where a prompt has four pairs."""
    once = [Pair(1.0 if n < 28 else -1.0, 1.0, "a", str(n)) for n in range(40)]
    often = [Pair(pair.margin, 1.0, "a", pair.prompt) for pair in once for _ in range(4)]

    one, four = measured(once)[ALL], measured(often)[ALL]

    assert (four.pairs, four.prompts, four.accuracy) == (160, 40, 0.7)
    assert (one.accuracy_low, one.accuracy_high) == pytest.approx(wilson(28, 40))
    assert (four.accuracy_low, four.accuracy_high) == pytest.approx(wilson(28, 40))


def test_a_label_without_a_side_is_neither_right_nor_wrong() -> None:
    pairs = [Pair(1.0, 0.5, "a", "q"), Pair(-1.0, 0.5, "a", "q"), Pair(1.0, 0.9, "a", "q")]

    assert measured(pairs)[ALL].accuracy == 1
    undecided = measured(pairs[:2])[ALL]
    assert math.isnan(undecided.accuracy)
    assert (undecided.accuracy_low, undecided.accuracy_high) == (0, 1)


def test_a_margin_of_nothing_is_half_right_whichever_side_is_called_chosen() -> None:
    one, other = ([Pair(0.0, label, "a", "q")] * 10 for label in (1.0, 0.0))

    assert measured(one)[ALL] == measured(other)[ALL]
    assert measured(one)[ALL].ece == 0


def test_equal_rewards_are_a_miss() -> None:
    assert measured([Pair(0.0, 1.0, "a", "q"), Pair(0.0, 0.0, "a", "q")])[ALL].accuracy == 0


def test_groups_have_figures_of_their_own_beside_those_of_all() -> None:
    pairs = [Pair(1.0, 1.0, "harmless", "q")] * 3 + [Pair(-1.0, 1.0, "helpful", "q")]

    found = figures(measured(pairs))

    assert (found["accuracy"], found["harmless/accuracy"], found["helpful/accuracy"]) == (0.75, 1, 0)
    assert (found["pairs"], found["harmless/pairs"]) == (4, 3)
    assert found["accuracy_low"] < 0.75 < found["accuracy_high"]


def test_a_margin_that_is_no_number_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"pair 1 \(b\): its margin is nan"):
        measured([Pair(0.0, 1.0, "a", "q"), Pair(math.nan, 1.0, "b", "q")])
    with pytest.raises(DataError, match="no pair to measure"):
        measured([])


def test_margins_of_any_size_have_a_finite_loss() -> None:
    assert measured([Pair(1e4, 0.0, "a", "q")])[ALL].loss == pytest.approx(1e4)


def test_the_plot_shows_all_pairs_and_each_group(tmp_path: Path) -> None:
    pairs = [Pair(0.1 * n - 2, float(n % 3 > 0), ("harmless", "helpful")[n % 2], "q") for n in range(60)]

    plot(tmp_path / "reliability.svg", pairs, "tiny")

    text = (tmp_path / "reliability.svg").read_text()
    ElementTree.fromstring(text)
    assert all(word in text for word in ("calibrated", "all", "harmless", "helpful", "tiny"))
    plot(tmp_path / "again.svg", pairs, "tiny")
    assert (tmp_path / "again.svg").read_text() == text


def test_a_margin_without_bounds_is_refused_too() -> None:
    for margin in (math.inf, -math.inf):
        with pytest.raises(DataError, match=r"pair 0 \(a\): its margin is -?inf; the weights are broken"):
            measured([Pair(margin, 1.0, "a", "q")])
