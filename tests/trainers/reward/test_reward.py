"""The stage `reward`: soft labels to their floor, centred rewards, members and their average, figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from repository import read_page
from tiny import rows, tiny_model, turn, write_rows
from typer.testing import CliRunner

from cai_graph import cli
from cai_graph.errors import ConfigError, DataError

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from trainers.checkpoint import Checkpoint  # noqa: E402
from trainers.policy import load_reward, score  # noqa: E402
from trainers.reward import Config, frozen, members, reward, train  # noqa: E402
from trainers.stages import Lora, stages  # noqa: E402
from trainers.stages.soft import label_of, soft_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

H_06 = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
"""0.6730 nats."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("tiny") / "model", layers=3))


def dataset(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir()
    write_rows(folder / "train.jsonl", train)
    if test is not None:
        write_rows(folder / "test.jsonl", test)
    return folder


def polite(n: int, **more: Any) -> list[dict[str, Any]]:
    """Pairs whose better answer says yes, from two sources."""
    return [
        {**row, "source": ("human", "feedback")[number % 2], **more}
        for number, row in enumerate(rows("preference", n))
    ]


def rewards_of(checkpoint: Checkpoint, found: list[dict[str, Any]], side: str) -> list[float]:
    loaded = load_reward(checkpoint.path)
    return score(
        loaded, [row["prompt"] for row in found], [row[side][0]["content"] for row in found], batch_size=8
    )


# --- the loss -----------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_against_the_soft_label() -> None:
    margins = torch.tensor([0.0, 2.0, -1.0])
    found = soft_loss(margins, torch.tensor([1.0, 0.6, 0.0]), torch.tensor([1.0, 1.0, 3.0]))

    sigma = [1 / (1 + math.exp(-d)) for d in (0.0, 2.0, -1.0)]
    assert found.tolist() == pytest.approx(
        [
            math.log(2),  # no margin, whatever the label
            -(0.6 * math.log(sigma[1]) + 0.4 * math.log(1 - sigma[1])),
            -3 * math.log(1 - sigma[2]),  # rejected is better for sure, three times over
        ]
    )


def test_the_loss_of_a_label_of_06_is_least_at_its_logit_and_is_its_entropy_there() -> None:
    margins = torch.linspace(-2, 2, 4001)
    found = soft_loss(margins, torch.tensor(0.6), torch.tensor(1.0))

    assert margins[found.argmin()].item() == pytest.approx(math.log(0.6 / 0.4), abs=1e-3)
    assert found.min().item() == pytest.approx(H_06, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"p_chosen": 1.2}, "'p_chosen' is a probability, found 1.2"),
        ({"p_chosen": "high"}, "'p_chosen' is a probability, found 'high'"),
        ({"weight": 0}, "'weight' is a number above 0, found 0"),
        ({"margin": 0.5}, "has a 'margin' and no 'p_chosen'"),
    ],
)
def test_a_label_that_is_none_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        label_of(row)


# --- training -----------------------------------------------------------------------------------------


def test_trained_on_labels_of_06_the_loss_ends_at_their_entropy(model: str, tmp_path: Path) -> None:
    found = polite(8)
    data = dataset(tmp_path / "data", [{**row, "p_chosen": 0.6, "margin": 0.2} for row in found], found)
    config = Config(
        model=model,
        data=data,
        output=tmp_path / "out",
        learning_rate=1e-2,
        schedule="constant",
        max_steps=60,
        log_steps=5,
        center_rewards_coefficient=0.0,
    )

    made = train(config)

    assert made.manifest is not None
    assert made.manifest.metrics["loss"] == pytest.approx(H_06, abs=2e-3)
    margins = [
        chosen - rejected
        for chosen, rejected in zip(
            rewards_of(made, found, "chosen"), rewards_of(made, found, "rejected"), strict=True
        )
    ]
    assert sum(margins) / 8 == pytest.approx(math.log(0.6 / 0.4), abs=0.1)


def test_a_reward_model_prefers_what_it_was_shown_and_says_how_sure_it_may_be(
    model: str, tmp_path: Path
) -> None:
    found = polite(24)
    data = dataset(tmp_path / "data", found[:16], found[16:])

    made = train(Config(model=model, data=data, output=tmp_path / "out", learning_rate=1e-2, epochs=15))

    metrics = made.manifest.metrics if made.manifest else {}
    assert (
        metrics["eval_accuracy"] == metrics["eval_human/accuracy"] == metrics["eval_feedback/accuracy"] == 1
    )
    assert metrics["eval_pairs"] == metrics["eval_prompts"] == 8
    assert metrics["eval_accuracy_low"] < 1
    assert metrics["eval_ece"] < 0.3
    assert metrics["eval_loss"] < math.log(2)
    assert "<svg" in (made.path / "reliability.svg").read_text()
    assert "eval_human/accuracy" in (made.path / "README.md").read_text()
    held_out = [json.loads(line) for line in (made.path / "heldout.jsonl").read_text().splitlines()]
    assert [one["chosen"] for one in held_out] == pytest.approx(
        rewards_of(made, found[16:], "chosen"), abs=1e-4
    )


def test_the_mean_reward_of_the_reference_set_is_0_wherever_the_checkpoint_is_loaded(
    model: str, tmp_path: Path
) -> None:
    found = polite(16)
    data = dataset(tmp_path / "data", found[:8], found[8:])

    made = train(Config(model=model, data=data, output=tmp_path / "out", learning_rate=1e-2, max_steps=8))

    assert abs(made.manifest.metrics["reward_shift"]) > 1e-3 if made.manifest else False
    both = rewards_of(made, found[8:], "chosen") + rewards_of(made, found[8:], "rejected")
    assert sum(both) / 16 == pytest.approx(0, abs=1e-5)


def test_all_held_out_answers_make_the_reference_set(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward, "REFERENCE", 2)
    other = [{**row, "chosen": [turn("assistant", "z" * n)]} for n, row in enumerate(polite(8), 2)]
    data = dataset(tmp_path / "data", polite(8), [*polite(4), *other])

    made = train(Config(model=model, data=data, output=tmp_path / "out", learning_rate=1e-2, max_steps=8))

    held_out = [json.loads(line) for line in (made.path / "heldout.jsonl").read_text().splitlines()]
    assert sum(one["chosen"] + one["rejected"] for one in held_out) == pytest.approx(0, abs=1e-4)


def test_dropout_of_adapters_has_an_effect(model: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", polite(8))
    digests = [
        train(
            Config(
                model=model,
                data=data,
                output=tmp_path / str(dropout),
                learning_rate=1e-2,
                max_steps=2,
                lora=Lora(rank=2, dropout=dropout),
            )
        ).digest
        for dropout in (0.0, 0.5)
    ]
    assert digests[0] != digests[1]


def test_the_pull_of_rewards_to_0_makes_them_small(model: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", polite(8))
    sizes = []
    for pull in (0.0, 10.0):
        config = Config(
            model=model,
            data=data,
            output=tmp_path / f"pull-{pull}",
            learning_rate=1e-2,
            max_steps=30,
            log_steps=1,
            center_rewards_coefficient=pull,
        )
        metrics = train(config).manifest.metrics  # type: ignore[union-attr]
        sizes.append(abs(metrics["mean_reward"]))

    assert sizes[1] < 0.1 * sizes[0] or sizes[1] < 1e-2


def test_one_batch_of_8_trains_as_8_batches_of_1(model: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", [{**row, "weight": 1.0 + n} for n, row in enumerate(polite(8))])
    found = []
    for batch, accumulate in ((8, 1), (1, 8)):
        config = Config(
            model=model,
            data=data,
            output=tmp_path / f"batch-{batch}",
            learning_rate=1e-3,
            max_steps=3,
            batch_size=batch,
            accumulate=accumulate,
        )
        found.append(rewards_of(train(config), polite(8), "chosen"))

    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_rows_that_trl_would_drop_without_a_word_are_refused_with_their_number(
    model: str, tmp_path: Path
) -> None:
    long = {**polite(1)[0], "chosen": [turn("assistant", "yes. " * 400)]}
    config = Config(model=model, data=dataset(tmp_path / "data", [*polite(8), long]), output=tmp_path / "out")

    with pytest.raises(DataError, match="1 are longer than max_tokens"):
        train(config)
    assert not config.output.exists()


def test_a_trained_adapter_is_in_the_weights_and_its_head_with_it(model: str, tmp_path: Path) -> None:
    found = polite(16)
    data = dataset(tmp_path / "data", found[:8], found[8:])
    lora = Lora(rank=4, alpha=8)

    made = train(
        Config(model=model, data=data, output=tmp_path / "out", learning_rate=2e-2, max_steps=20, lora=lora)
    )

    held_out = [json.loads(line) for line in (made.path / "heldout.jsonl").read_text().splitlines()]
    assert [one["chosen"] for one in held_out] == pytest.approx(
        rewards_of(made, found[8:], "chosen"), abs=1e-3
    )


# --- the head alone -----------------------------------------------------------------------------------


def test_a_head_on_a_frozen_model_is_fitted_and_saved_as_an_ordinary_reward_model(
    model: str, tmp_path: Path
) -> None:
    found = polite(48)
    data = dataset(tmp_path / "data", found[:32], found[32:])

    # A batch that the pairs do not fill is nothing to a fit.
    config = Config(
        model=model, data=data, output=tmp_path / "out", trains="head", precision="fp32", batch_size=64
    )
    made = train(config)

    metrics = made.manifest.metrics if made.manifest else {}
    assert metrics["eval_accuracy"] == 1
    assert metrics["cv_depth"] in (1, 2, 3)
    held_out = [json.loads(line) for line in (made.path / "heldout.jsonl").read_text().splitlines()]
    assert [one["chosen"] for one in held_out] == pytest.approx(
        rewards_of(made, found[32:], "chosen"), abs=3e-2
    )
    assert load_reward(made.path).model.config.num_hidden_layers == metrics["cv_depth"]
    choices = [json.loads(line) for line in (made.path / "choices.jsonl").read_text().splitlines()]
    assert choices[0]["loss"] == min(one["loss"] for one in choices)


def test_prompts_that_begin_alike_are_told_apart_and_one_prompt_is_refused_before_states_are_read(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadError(Exception):
        pass

    def read(*args: Any) -> None:
        raise ReadError

    monkeypatch.setattr(frozen, "states", read)
    system = turn("system", "You are the assistant of Example Corp. " * 4)
    found = [{**row, "prompt": [system, *row["prompt"]]} for row in polite(8)]
    several = dataset(tmp_path / "several", found)
    one = dataset(tmp_path / "one", [{**row, "prompt": found[0]["prompt"]} for row in found])

    with pytest.raises(ReadError):
        train(Config(model=model, data=several, output=tmp_path / "out", trains="head"))
    with pytest.raises(DataError, match="all pairs are of one prompt"):
        train(Config(model=model, data=one, output=tmp_path / "other", trains="head"))


def test_the_lowest_layers_are_kept_where_a_number_is_set(model: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", polite(8))

    made = train(Config(model=model, data=data, output=tmp_path / "out", layers=2, max_steps=1))

    loaded = load_reward(made.path).model
    assert loaded.config.num_hidden_layers == 2
    assert not any(".layers.2." in name for name, _ in loaded.named_parameters())


# --- several ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(model: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("ensemble")
    found = polite(24)
    data = dataset(folder / "data", found[:16], found[16:])
    return train(
        Config(model=model, data=data, output=folder / "out", learning_rate=3e-3, epochs=8, members=2)
    )


def test_members_of_an_ensemble_differ_and_are_checkpoints_themselves(ensemble: Checkpoint) -> None:
    one, two = (Checkpoint.open(folder) for folder in members(ensemble.path))

    assert one.digest != two.digest
    assert [made.manifest.seed for made in (one, two) if made.manifest] == [0, 1]
    assert members(one.path) == ()


def test_the_checkpoint_of_an_ensemble_is_the_average_of_its_members(ensemble: Checkpoint) -> None:
    whole, one, two = (
        load_reward(folder).model.state_dict() for folder in (ensemble.path, *members(ensemble.path))
    )

    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


def test_the_average_of_members_trained_by_adapters_in_bf16_is_in_32_bits(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the base is read in bf16 beside adapters: the average must not be rounded to it."""
    monkeypatch.setattr(stages, "computes_in_bf16", lambda config: True)
    data = dataset(tmp_path / "data", polite(8))
    config = Config(
        model=model, data=data, output=tmp_path / "out", max_steps=2, learning_rate=1e-5, members=2
    )

    made = train(dataclasses.replace(config, lora=Lora(rank=2)))

    whole, one, two = (load_file(folder / "model.safetensors") for folder in (made.path, *members(made.path)))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, atol=0, rtol=0)


def test_the_manifest_compares_the_average_with_the_members_and_with_their_mean_reward(
    ensemble: Checkpoint,
) -> None:
    metrics = ensemble.manifest.metrics if ensemble.manifest else {}
    read = [
        [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
        for folder in members(ensemble.path)
    ]

    apart = [
        abs(a[side] - b[side]) / 2 for a, b in zip(*read, strict=True) for side in ("chosen", "rejected")
    ]
    assert metrics["ensemble_disagreement"] == pytest.approx(sum(apart) / len(apart))
    assert metrics["ensemble_disagreement"] > 0
    assert {"eval_accuracy", "ensemble_accuracy", "members_accuracy", "ensemble_ece"} <= metrics.keys()


def test_an_interrupted_ensemble_keeps_the_members_that_it_has(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path / "data", polite(8))
    config = Config(model=model, data=data, output=tmp_path / "out", max_steps=1, members=2)
    interrupted(config, monkeypatch)
    kept = Checkpoint.open(tmp_path / "out.members" / "0").digest
    with pytest.raises(ConfigError, match=r"members/0: is a member of .*: learning_rate was .* and is 0.1"):
        train(dataclasses.replace(config, learning_rate=0.1))
    made = train(dataclasses.replace(config, log_steps=1))

    assert Checkpoint.open(members(made.path)[0]).digest == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the first member alone."""
    one = reward._one

    def only_the_first(config: Config, head_seed: int) -> Checkpoint:
        if config.seed == 1:
            raise KeyboardInterrupt
        return one(config, head_seed)

    with monkeypatch.context() as patched:
        patched.setattr(reward, "_one", only_the_first)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_members_of_another_model_are_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base")
    data = dataset(tmp_path / "data", polite(8))
    config = Config(model=str(base), data=data, output=tmp_path / "out", max_steps=1, members=2)
    interrupted(config, monkeypatch)
    shutil.rmtree(base)
    tiny_model(base, seed=7)

    with pytest.raises(
        ConfigError, match="is a member of a run that was begun otherwise: the models changed"
    ):
        train(config)


def test_members_that_were_measured_on_other_rows_are_not_averaged(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rewards are centred on the test rows."""
    data = dataset(tmp_path / "data", polite(8), polite(4))
    config = Config(model=model, data=data, output=tmp_path / "out", max_steps=1, members=2)
    interrupted(config, monkeypatch)
    write_rows(data / "test.jsonl", polite(6))

    with pytest.raises(ConfigError, match="was begun otherwise: the test data changed"):
        train(config)


# --- configs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"members": 0}, "members is a number from 1, found 0"),
        ({"layers": 0}, "layers is a number from 1, found 0"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient is a number from 0"),
        ({"center_rewards_coefficient": float("nan")}, "center_rewards_coefficient is a number from 0"),
        ({"trains": "head", "members": 3}, "one optimum"),
        ({"trains": "head", "lora": Lora()}, "lora changes it"),
        (
            {"trains": "head", "center_rewards_coefficient": 0.0},
            "coefficient 0 has no effect with trains: head",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(model="m", data=Path("d"), output=Path("o"), **settings)


def test_a_column_that_no_row_has_keeps_no_figures_apart(model: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", polite(8))
    config = Config(model=model, data=data, output=tmp_path / "out", max_steps=1, by="sourze")

    with pytest.raises(ConfigError, match=r"by: no row of .*data has a column 'sourze'"):
        train(config)
    assert train(dataclasses.replace(config, by="source")).path.exists()


# --- the page -----------------------------------------------------------------------------------------


def test_the_blocks_of_the_page_run_as_they_stand(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = read_page("training.md")
    section = page[page.index("## Reward models") :]
    section = section[: (section.find("\n## ", 1) + 1) or None]
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```", section, re.DOTALL | re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "pairs", polite(8), polite(4))
    Path("reward.yaml").write_text(blocks["yaml"])

    commands = [shlex.split(line)[1:] for line in blocks["sh"].splitlines()]
    for command in commands:  # on a smaller model
        done = CliRunner().invoke(cli.app, [*command, "--set", f"model={model}"])
        assert done.exit_code == 0, done.output
    exec(compile(blocks["python"], "docs/training.md", "exec"), {})

    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 2
    assert len(members(Path("reward"))) == 3
    assert load_reward("head").model.config.num_hidden_layers <= 3
