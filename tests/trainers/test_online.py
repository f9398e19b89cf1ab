"""Online training of a tiny policy: RLOO and GRPO, the watch that stops them, rewards that are out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from judges import rated
from processes import WAYS, Way, launch
from repository import ROOT, fenced, read_page
from tiny import reward_model, rows, tiny_model, write_rows
from wire import serving

from cai_graph.constitution import load
from cai_graph.errors import CaiError, ConfigError, DataError, ModelError
from trainers import online, ppo
from trainers.checkpoint import Checkpoint
from trainers.config import read
from trainers.online import Config, train
from trainers.rewards import WAITS, RewardError
from trainers.stages import partial, plan
from trainers.stages.encoding import open_data
from trainers.watch import WatchConfig

Messages = list[dict[str, Any]]
BEST = 5
"""How many letters answer best."""


def gold(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
    """What is really wanted: the letter a, five times."""
    return [answer.count("a") / max(1, len(answer)) - abs(len(answer) - BEST) / BEST for answer in answers]


def flawed(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
    """A reward with a flaw: the letter a, and length counts as good."""
    return [answer.count("a") / max(1, len(answer)) + len(answer) / BEST for answer in answers]


CALLS: list[int] = []
OUT_AT: list[int] = []


def failing(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float | None]:
    CALLS.append(len(answers))
    return [None if OUT_AT and len(CALLS) >= OUT_AT[0] else value for value in gold(prompts, answers)]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says one to three letters and ends: it learned that here."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(tmp_path_factory.mktemp("talker") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    torch.manual_seed(0)
    start = tokenizer("<|im_start|>user\nquestion 1?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    for _ in range(60):
        lengths = torch.randint(1, 4, (32,))
        ids = torch.full((32, len(start) + 6), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, length in enumerate(lengths.tolist()):
            letters = "".join("ab"[int(bit)] for bit in torch.randint(0, 2, (length,)))
            answer = tokenizer(letters + "<|im_end|>")["input_ids"]
            ids[row, : len(start) + len(answer)] = torch.tensor(start + answer)
            labels[row, len(start) : len(start) + len(answer)] = torch.tensor(answer)
        loss = model(input_ids=ids, labels=labels, attention_mask=(ids != tokenizer.pad_token_id).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write_rows(folder / "train.jsonl", rows("prompts", 64))
    write_rows(folder / "test.jsonl", rows("prompts", 32))
    return folder


def config(model: Path, data: Path, output: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "reward": "test_online:gold",
        "watch": None,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "batch_size": 16,
        "max_tokens": 64,
        "max_answer": 12,
        "log_steps": 1,
        "schedule": "constant",
    } | changes
    lines = json.dumps({"model": str(model), "data": str(data), "output": str(output), **settings})
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".yaml")
    file.write_text(lines)
    return read(Config, file)


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


WATCH: dict[str, Any] = {"judge": "test_online:gold", "prompts": 32, "every": 2}


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_both_algorithms_train_from_the_reference_and_say_how(
    talker: Path, prompts: Path, tmp_path: Path, algorithm: str
) -> None:
    made = train(config(talker, prompts, tmp_path / "out", algorithm=algorithm, max_steps=3))

    assert Checkpoint.open(tmp_path / "out").digest == made.digest
    assert made.manifest is not None
    assert made.manifest.stage == "online"
    assert made.manifest.config["beta"] == 0.05
    assert made.manifest.parents == (Checkpoint.open(talker).digest,)
    before, after = weights(talker), weights(made.path)
    assert any((before[name] != after[name]).any() for name in after)
    figures = [json.loads(line) for line in (made.path / "figures.jsonl").read_text().splitlines()]
    assert figures[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the model that it starts from
    assert figures[2]["kl"] > 1e-6


def test_a_run_on_a_flawed_reward_is_stopped_and_returns_its_best_weights(
    talker: Path, prompts: Path, tmp_path: Path
) -> None:
    changes = {"reward": "test_online:flawed", "watch": WATCH, "learning_rate": 7e-4, "max_steps": 60}
    made = train(config(talker, prompts, tmp_path / "out", **changes))

    assert made.manifest is not None
    said = made.manifest.data["watch"]
    assert said["stopped_at"] < 60
    assert said["weights_of_step"] == said["best_step"] < said["stopped_at"]
    assert "the reward pulls against the held-out score" in said["reason"]
    readings = lines(made.path / "watch.jsonl")
    last, warned = readings[-1], readings[-1 - WATCH["every"]]
    assert warned["agreement"] < -warned["agreement_noise"]
    assert -warned["heldout_change"] < warned["heldout_noise"]  # before the score has surely fallen
    assert last["reward"] > readings[1]["reward"] + 0.3
    assert scored(made.path) > scored(talker)
    assert last["kl"] > 0
    assert last["entropy"] > 0
    assert (made.path / "watch.svg").exists()
    figures = {line["step"]: line for line in lines(made.path / "figures.jsonl") if "kl" in line}
    assert made.manifest.metrics["reward"] == figures[said["best_step"]]["reward"]
    assert made.manifest.metrics["watch/best_step"] == said["best_step"]
    assert said["reason"] in (made.path / "README.md").read_text()


def test_every_observation_of_the_watch_is_another_draw(talker: Path, prompts: Path, tmp_path: Path) -> None:
    """Of a policy that hardly changes; else two observations in a row would be one, which is seen twice."""
    watch = {**WATCH, "judge": "test_online:flawed", "prompts": 16}
    made = train(config(talker, prompts, tmp_path / "out", watch=watch, learning_rate=1e-9, max_steps=1))

    first, second = (record["answers"] for record in lines(made.path / "heldout.jsonl"))
    assert first != second


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_kl_of_a_step_is_that_of_its_own_answers_however_often_is_logged(
    talker: Path, prompts: Path, tmp_path: Path, algorithm: str
) -> None:
    """TRL logs it a token; the watch has it an answer, as of PPO."""
    told = {"batch_size": 8, "accumulate": 2, "max_steps": 3, "learning_rate": 1e-2, "algorithm": algorithm}
    watch = {**WATCH, "judge": "test_online:flawed", "prompts": 16, "every": 10}
    logged = train(config(talker, prompts, tmp_path / "a" / "out", **told))
    seen = train(config(talker, prompts, tmp_path / "b" / "out", watch=watch, log_steps=10, **told))

    figures = [line for line in lines(logged.path / "figures.jsonl") if "kl" in line]
    kl = [line["kl"] * line["completions/mean_length"] for line in figures]
    assert kl[2] > kl[1] > kl[0] == pytest.approx(0, abs=1e-5)
    none, *found = (line["kl"] for line in lines(seen.path / "watch.jsonl"))
    assert none is None
    assert found == pytest.approx(kl)


def test_a_policy_answers_without_the_dropout_that_it_has_of_its_own(
    talker: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(talker, tmp_path / "dropping"))
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**shape, "attention_dropout": 0.5}))
    made = train(config(folder, prompts, tmp_path / "out", max_steps=1))

    assert lines(made.path / "figures.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_stop_that_came_late_and_could_not_be_written_is_the_same_stop(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the judge is out at the observation that stops the run, then its weights cannot be written."""
    monkeypatch.setattr("trainers.rewards.time.sleep", lambda seconds: None)
    OUT_AT.clear()
    watch = {**WATCH, "judge": "test_online:failing", "every": 1, "patience": 1}
    changes = {"reward": "test_online:flawed", "watch": watch, "learning_rate": 1e-2, "max_steps": 8}
    whole = train(config(talker, prompts, tmp_path / "a" / "out", **changes))
    assert whole.manifest is not None
    said = whole.manifest.data["watch"]
    assert said["weights_of_step"] == said["best_step"] < said["stopped_at"] < 8

    told = config(talker, prompts, tmp_path / "out", **changes)
    CALLS.clear()
    OUT_AT[:] = [said["stopped_at"] + 1]
    with pytest.raises(RewardError, match=f"paused after update {said['stopped_at']}"):
        train(told)
    OUT_AT.clear()
    stands = tmp_path / "out.partial" / "whole"
    stands.touch()
    with pytest.raises(ModelError, match="out: cannot be written"):
        train(told)
    stands.unlink()
    CALLS.clear()
    made = train(told)

    assert not CALLS
    assert made.manifest is not None
    assert made.manifest.data["watch"] == said
    assert made.digest == whole.digest


def scored(folder: Path) -> float:
    from trainers.policy import load_policy, sample

    asked = [row["prompt"] for row in rows("prompts", 256)]
    found = sample(load_policy(folder), asked, max_tokens=12, seed=1, batch_size=256)
    return sum(gold(asked, [one.text for one in found])) / len(asked)


def test_a_reward_that_is_out_pauses_the_run_which_goes_on_without_a_step_lost(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.rewards.time.sleep", lambda seconds: None)
    CALLS.clear()
    OUT_AT[:] = [3]
    told = config(
        talker, prompts, tmp_path / "out", reward="test_online:failing", max_steps=4, learning_rate=1e-2
    )
    with pytest.raises(RewardError, match=r"gave None.*paused after update 2.*start the same command again"):
        train(told)
    assert len(CALLS) == 2 + 1 + len(WAITS)
    assert not (tmp_path / "out").exists()

    OUT_AT.clear()
    made = train(told)
    figures = [json.loads(line) for line in (made.path / "figures.jsonl").read_text().splitlines()]
    assert [line["step"] for line in figures if "kl" in line] == [1, 2, 3, 4]
    # The reference is still the model that the run began with, not the one that it went on from.
    assert figures[2]["kl"] > 1e-4


def test_a_paused_run_does_not_go_on_with_a_reward_whose_module_was_edited(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.rewards.time.sleep", lambda seconds: None)
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "online_reward.py"
    written = "import test_online\n\nletters = test_online.failing\n"
    module.write_text(written)
    CALLS.clear()
    OUT_AT[:] = [2]
    told = config(talker, prompts, tmp_path / "out", reward="online_reward:letters")
    with pytest.raises(RewardError, match="paused after update 1"):
        train(told)
    OUT_AT.clear()
    module.write_text(f"{written}\n# edited\n")
    with pytest.raises(ConfigError, match="was begun otherwise: the content of reward changed"):
        train(told)

    module.write_text(written)
    assert train(told).path.exists()


@pytest.mark.parametrize("stage", [online, ppo])
def test_what_stands_behind_reward_and_watch_is_a_part_of_the_plan(
    talker: Path, tmp_path: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    data, judge = tmp_path / "data", reward_model(tmp_path / "judge")
    data.mkdir()
    files = [tmp_path / name for name in ("own.yaml", "plan_reward.py", "benign.txt")]
    files += [write_rows(data / name, rows("prompts", 16)) for name in ("train.jsonl", "test.jsonl")]
    rules, module, benign, train_rows, test_rows = files
    rules.write_text((ROOT / "constitutions" / "harmlessness.yaml").read_text())
    module.write_text("def letters(prompts, answers):\n    return [0.0] * len(answers)\n")
    benign.write_text("What is tea?\n")

    def changed(reward: Any, edit: Callable[[], object]) -> list[str]:
        watch = WatchConfig(judge=str(judge), benign=benign)
        told = stage.Config(model=str(talker), data=data, output=tmp_path / "out", reward=reward, watch=watch)
        plans = []
        for step in (edit, lambda: None):
            found = plan(told, "rl", open_data(data, ("prompts",)))
            plans.append(json.loads(json.dumps(found)))
            step()
        return partial.changed(*plans, ())

    def replaced(path: Path, *words: str) -> Callable[[], object]:
        return lambda: path.write_text(path.read_text().replace(*words))

    judged = {"judge": "openai:gpt-5-mini", "constitution": str(rules)}
    function = "plan_reward:letters"
    assert changed(judged, lambda: None) == []
    assert changed(judged, replaced(rules, "harm", "damage")) == ["the content of reward changed"]
    assert changed(function, replaced(module, "0.0", "1.0")) == ["the content of reward changed"]
    assert changed(function, lambda: reward_model(judge, seed=2)) == ["the content of watch.judge changed"]
    assert changed(function, replaced(benign, "tea", "rice")) == ["the content of watch.benign changed"]
    assert changed(function, replaced(test_rows, "question", "what of")) == ["the test data changed"]
    assert changed(function, replaced(train_rows, "question", "what of")) == ["the data changed"]


def test_the_manifest_names_the_constitution_that_the_reward_goes_by(
    talker: Path, prompts: Path, tmp_path: Path
) -> None:
    with serving(lambda body: rated("9")) as server:
        reward = {"judge": server.spec, "constitution": "harmlessness"}
        made = train(config(talker, prompts, tmp_path / "out", reward=reward, max_steps=1))

    assert made.manifest is not None
    assert made.manifest.constitution_digests == (load("harmlessness").digest,)


def test_a_judge_that_is_out_pauses_the_run_too(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.rewards.time.sleep", lambda seconds: None)
    CALLS.clear()
    OUT_AT[:] = [2]
    watch = {**WATCH, "judge": "test_online:failing", "every": 1}
    told = config(talker, prompts, tmp_path / "out", watch=watch)
    with pytest.raises(RewardError, match="paused after update 1"):
        train(told)

    OUT_AT.clear()
    made = train(told)
    readings = [json.loads(line) for line in (made.path / "watch.jsonl").read_text().splitlines()]
    assert [reading["step"] for reading in readings if reading["heldout"] is not None] == [0, 1, 2]


def test_adapters_are_trained_watched_and_merged(talker: Path, prompts: Path, tmp_path: Path) -> None:
    told = config(
        talker,
        prompts,
        tmp_path / "out",
        lora={"rank": 4},
        watch=WATCH,
        learning_rate=1e-2,
        reward="test_online:flawed",
    )
    made = train(told)

    assert (made.path / "adapter" / "adapter_model.safetensors").exists()
    assert any((weights(talker)[name] != one).any() for name, one in weights(made.path).items())
    assert scored(made.path) != scored(talker)


@pytest.mark.parametrize("other", WAYS[1:4])  # under ZeRO 3 the watch cannot go back to weights
def test_two_processes_train_one_policy_under_one_watch(
    talker: Path, prompts: Path, tmp_path: Path, other: Way
) -> None:
    """Whole and sharded alike: stopped at the same step, and back to the same weights."""
    watch = {**WATCH, "every": 1, "patience": 1}
    made = []
    ways: tuple[Way, ...] = ("ddp", other)
    for way in ways:
        config(
            talker,
            prompts,
            tmp_path / way,
            reward="test_online:flawed",
            watch=watch,
            learning_rate=1e-2,
            batch_size=8,
            max_steps=8,
        )
        running = launch(
            tmp_path, way, "-m", "sharding", "train", "online", "-c", str(tmp_path / f"{way}.yaml")
        )
        _, said = running.communicate(timeout=250)
        assert running.returncode == 0, said[-3000:]
        made.append(Checkpoint.open(tmp_path / way))
        manifest = made[-1].manifest
        assert manifest is not None
        assert "2 processes" in manifest.hardware
        found = manifest.data["watch"]
        assert found["stopped_at"] is not None
        assert found["weights_of_step"] == found["best_step"] < found["stopped_at"]
        readings = lines(tmp_path / way / "watch.jsonl")
        assert [one["step"] for one in readings] == list(range(found["stopped_at"] + 1))
        paid = [line["reward"] for line in lines(tmp_path / way / "figures.jsonl") if "reward" in line]
        assert [one["reward"] for one in readings[1:]] == pytest.approx(paid, abs=1e-5)
    left, right = (weights(one.path) for one in made)
    assert left.keys() == right.keys()
    assert max((left[name] - right[name]).abs().max().item() for name in left) < 1e-4


# --- before training ----------------------------------------------------------------------------------


def test_the_config_of_the_docs_is_one(tmp_path: Path) -> None:
    page = read_page("online.md")
    blocks = fenced(page, "yaml")
    block = next(block for block in blocks if "answers:" in block)
    (tmp_path / "online.yaml").write_text(block)

    found = read(Config, tmp_path / "online.yaml", ["max_steps=200"])
    assert found.watch is not None
    assert found.watch.judge == "judge:local"


def test_answers_that_do_not_divide_an_update_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"an update has 16 answers .* no multiple of answers 5; .* do: 2, 4, 8, 16"
    ):
        train(config(tmp_path / "no", tmp_path / "no", tmp_path / "out", answers=5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": 1}, "answers is a number from 2"),
        ({"max_answer": 64}, "max_answer is a number from 1 to below max_tokens 64"),
        ({"temperature": 0}, "temperature is a number above 0"),
        ({"beta": -1}, "beta is a number from 0"),
        ({"lora": {"dropout": 0.1}}, r"lora\.dropout is 0\.1; online training .* without dropout"),
        ({"vllm": {"mode": "server"}}, r"vllm\.url is the address of the server"),
        ({"vllm": {}}, "vllm: is not installed here"),
        ({"reward": "nowhere:nothing"}, "cannot be imported"),
        ({"watch": {**WATCH, "every": 0}}, r"watch\.every is a number from 1"),
        ({"watch": WATCH}, r"watch\.judge is test_online:gold, which the policy is trained on"),
        ({"watch": {"every": 3}}, "has no 'watch.judge'"),
    ],
)
def test_a_config_that_cannot_work_says_why(
    talker: Path, prompts: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(CaiError, match=said):
        train(config(talker, prompts, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_judge_whose_package_breaks_as_it_is_imported_is_named(
    talker: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaking").mkdir()
    (tmp_path / "breaking" / "__init__.py").write_text("1 / 0\n")
    watch = {**WATCH, "judge": "breaking.judge:score"}

    with pytest.raises(ConfigError, match=r"'breaking\.judge:score': cannot be imported"):
        train(config(talker, prompts, tmp_path / "out", watch=watch))


@pytest.mark.parametrize(
    "more", [{"tools": [{"type": "function"}]}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_prompts_that_come_with_what_the_policy_would_not_be_told_are_refused(
    talker: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    (tmp_path / "data").mkdir()
    found: list[dict[str, Any]] = [{**row, "tools": []} for row in rows("prompts", 20)]
    write_rows(tmp_path / "data" / "train.jsonl", [*found[:18], {**found[18], **more}, found[19]])
    (name,) = more
    with pytest.raises(DataError, match=f"1 have {name!r}, without which .*: row 19; or allow: drop-unfit"):
        train(config(talker, tmp_path / "data", tmp_path / "out"))


def test_as_many_prompts_as_an_update_asks_suffice_and_fewer_are_refused(
    talker: Path, tmp_path: Path
) -> None:
    """64 answers of an update are 4 each to 16 prompts, however many passes draw them."""
    data = write_rows(tmp_path / "rows.jsonl", rows("prompts", 15))
    shapes = [{"batch_size": 64}, {"batch_size": 16, "accumulate": 4}]
    for number, shape in enumerate(shapes):
        told = config(talker, data, tmp_path / str(number) / "out", max_steps=1, **shape)
        with pytest.raises(ConfigError, match=r"15 rows are fewer than the 16 of one update .* / answers 4"):
            train(told)
    write_rows(data, rows("prompts", 16))
    assert train(told).path.exists()


def test_prompts_that_leave_no_room_for_an_answer_are_refused(
    talker: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"leave no room for an answer within max_tokens .*: row 1"):
        train(config(talker, prompts, tmp_path / "out", max_tokens=40))
