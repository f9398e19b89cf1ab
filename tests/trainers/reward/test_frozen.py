"""Heads on frozen states: the states are a classifier's own, and the fit finds the optimum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from tiny import tiny_model

from cai_graph.errors import ConfigError, DataError
from trainers.reward import frozen

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

PAIRS = [
    ([5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20]),
    ([5, 9], [5, 6, 7, 20, 30, 31]),
    ([5, 6, 7], [5, 6, 7, 8]),
    ([40, 41, 42, 43], [44, 45]),
]
"""Tokens of chosen and rejected: the one may be longer, or the other's beginning, or alike in nothing."""


FOLDS = numpy.arange(200) % 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), layers=6)


def classifier(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


def rewards(model: Any, rows: list[list[int]]) -> list[float]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in rows]


def test_a_state_times_the_head_is_the_reward_of_the_classifier_of_that_depth(
    folder: Path, tmp_path: Path
) -> None:
    found = frozen.states(classifier(folder), PAIRS, (2, 4, 6), tmp_path)

    assert found.shape == (4, 2, 3, 16)
    for place, depth in enumerate((2, 4, 6)):
        weight = numpy.linspace(-1, 1, 16)
        built = frozen.build(classifier(folder), depth, weight)
        flat = [row for pair in PAIRS for row in pair]
        told = found[:, :, place].astype(float) @ weight
        assert told.ravel() == pytest.approx(rewards(built, flat), abs=5e-3)  # float16 states


def test_where_the_token_that_ends_an_answer_also_pads_its_state_is_not_taken_for_the_answers(
    folder: Path, tmp_path: Path
) -> None:
    end = 2
    pairs = [([*chosen, end], [*rejected, end, end]) for chosen, rejected in PAIRS]
    model, built = classifier(folder), frozen.build(classifier(folder), 6, numpy.linspace(-1, 1, 16))
    model.config.pad_token_id = built.config.pad_token_id = end

    found = frozen.states(model, pairs, (6,), tmp_path)

    told = found[:, :, 0].astype(float) @ numpy.linspace(-1, 1, 16)
    assert told.ravel() == pytest.approx(rewards(built, [row for pair in pairs for row in pair]), abs=5e-3)


def test_a_built_classifier_is_loaded_again_with_its_layers_and_head(folder: Path, tmp_path: Path) -> None:
    built = frozen.build(classifier(folder), 3, numpy.ones(16))
    built.save_pretrained(tmp_path / "built")
    loaded = classifier(tmp_path / "built")

    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 3
    assert rewards(loaded, [PAIRS[0][0]]) == rewards(built, [PAIRS[0][0]])


def test_a_pair_read_in_one_pass_gives_the_states_of_two(folder: Path) -> None:
    decoder = classifier(folder).base_model
    with torch.inference_mode():
        for pair in PAIRS:
            shared, ends = frozen._read_shared(decoder, *pair)
            apart, alone = frozen._read_apart(decoder, *pair)
            for one, other in zip(shared, apart, strict=True):
                torch.testing.assert_close(one[list(ends)], other[list(alone)], atol=1e-5, rtol=1e-4)


def test_a_sliding_window_that_only_long_pairs_reach_is_kept_to(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForSequenceClassification

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": 0}
    config = MistralConfig(vocab_size=64, sliding_window=8, initializer_range=0.5, **sizes, **heads)
    model: Any = MistralForSequenceClassification(config).eval()
    long = [1 + 7 * place % 60 for place in range(40)]
    pairs = [([5, 6, 7], [5, 6, 8]), ([*long, 7, 8], [*long, 9])]

    found = frozen.states(model, pairs, (2,), tmp_path)

    told = found[:, :, 0].astype(float) @ model.score.weight.detach().numpy()[0]
    assert told.ravel() == pytest.approx(rewards(model, [row for pair in pairs for row in pair]), abs=5e-2)


def test_an_interrupted_run_over_pairs_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    pairs = [([5, 6, number], [5, 6, number + 1]) for number in range(7, 147)]  # three chunks
    model = classifier(folder)

    def stop(*read: Any) -> None:
        if len(list(tmp_path.iterdir())) == 2:
            raise KeyboardInterrupt

    hook = model.base_model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        frozen.states(model, pairs, (6,), tmp_path)
    hook.remove()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 2
    found = frozen.states(model, pairs, (6,), tmp_path)

    assert len(list(tmp_path.iterdir())) == 3
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert numpy.array_equal(found, frozen.states(model, pairs, (6,), tmp_path / "anew"))


def test_states_of_other_weights_are_not_taken_from_the_cache(folder: Path, tmp_path: Path) -> None:
    before = frozen.states(classifier(folder), PAIRS, (6,), tmp_path)
    other = tiny_model(tmp_path / "other", seed=1, layers=6)

    assert not numpy.array_equal(before, frozen.states(classifier(other), PAIRS, (6,), tmp_path))


def test_broken_weights_are_named_by_the_pair(folder: Path, tmp_path: Path) -> None:
    model = classifier(folder)
    model.base_model.embed_tokens.weight.data[45] = math.nan

    with pytest.raises(DataError, match="pair 3: a hidden state is not finite"):
        frozen.states(model, PAIRS, (6,), tmp_path)


def test_the_fit_of_a_soft_label_of_06_ends_at_the_entropy_of_06() -> None:
    # One dimension, one state: the loss is least where sigma(v) = 0.6, and is H(0.6) there.
    margins, p, weights = numpy.ones((50, 1)), numpy.full(50, 0.6), numpy.ones(50)

    found = frozen.fit(margins, p, weights, penalty=1e-6)

    assert found.loss == pytest.approx(0.6730, abs=1e-4)
    assert found.weight == pytest.approx([math.log(0.6 / 0.4)], abs=1e-3)


def test_a_pair_of_weight_2_counts_as_two_pairs() -> None:
    rng = numpy.random.default_rng(0)
    margins, p = rng.normal(size=(30, 4)), rng.uniform(0.5, 1, 30)
    weights = numpy.where(numpy.arange(30) < 10, 2.0, 1.0)

    once = frozen.fit(margins, p, weights, penalty=1.0).weight
    twice = numpy.concatenate([margins, margins[:10]]), numpy.concatenate([p, p[:10]])

    assert once == pytest.approx(frozen.fit(*twice, numpy.ones(40), penalty=1.0).weight, rel=1e-3)


def test_the_depth_that_tells_the_label_is_chosen() -> None:
    rng = numpy.random.default_rng(0)
    p = numpy.ones(200)
    states = rng.normal(size=(200, 2, 2, 8))
    states[:, 0, 1, 3] += 2.0  # at the second depth, chosen answers stand out

    best, *rest = frozen.choose(states, (2, 4), p, numpy.ones(200), FOLDS)

    assert best.depth == 4
    assert best.accuracy > 0.85
    assert best.loss == min(one.loss for one in [*rest, best])


def test_states_that_say_nothing_are_not_believed() -> None:
    states = numpy.random.default_rng(0).normal(size=(200, 2, 1, 32))

    best = frozen.choose(states, (2,), numpy.ones(200), numpy.ones(200), FOLDS)[0]

    assert best.loss == pytest.approx(math.log(2), abs=0.01)
    assert best.penalty >= 100


def test_pairs_of_one_prompt_are_left_out_together_and_each_fold_has_as_many_prompts() -> None:
    prompts = [b"%d" % (n % 50) for n in range(100)]
    found = frozen.folds_of(prompts).tolist()

    assert found[:50] == found[50:]
    assert sorted(found[:50].count(fold) for fold in range(5)) == [10] * 5
    assert len(set(frozen.folds_of([b"a", b"b"]).tolist())) == 2
    with pytest.raises(DataError, match="all pairs are of one prompt"):
        frozen.folds_of([b"a", b"a"])


def test_more_layers_than_the_model_has_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="layers is 9, and the model has 6"):
        frozen.build(classifier(folder), 9)
