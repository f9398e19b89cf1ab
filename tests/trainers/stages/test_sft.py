"""Supervised fine-tuning on the tiny model: what is learned, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_support import cai
from tiny import rows, turn, write_rows

from trainers import sft
from trainers.checkpoint import Checkpoint
from trainers.stages import Lora


def config(tiny: Path, folder: Path, **changes: Any) -> sft.Config:
    if "data" not in changes:
        changes["data"] = write_rows(folder / "rows.jsonl", rows("sft", 16))
    fields = {"model": str(tiny), "output": folder / "out", "learning_rate": 1e-2, "log_steps": 1}
    return sft.Config(**fields | {"batch_size": 4, "epochs": 2.0} | changes)


def losses(made: Checkpoint) -> list[float]:
    import json

    lines = (made.path / "figures.jsonl").read_text().splitlines()
    return [found["loss"] for found in map(json.loads, lines) if "loss" in found]


def test_the_loss_falls_and_the_checkpoint_says_how_it_was_made(tiny: Path, tmp_path: Path) -> None:
    made = sft.train(config(tiny, tmp_path, epochs=5.0))

    found = losses(made)
    assert found[-1] < 0.8 * found[0]
    opened = Checkpoint.open(made.path)
    assert opened.manifest is not None
    assert (opened.manifest.stage, opened.manifest.data["rows"]) == ("sft", 16)
    assert opened.manifest.parents == (Checkpoint.open(tiny).digest,)
    assert opened.digest not in opened.manifest.parents
    assert not (tmp_path / "out.partial").exists()
    assert not list(made.path.glob("*.bin"))  # nothing pickled


def test_a_seed_gives_the_same_weights_and_another_one_others(tiny: Path, tmp_path: Path) -> None:
    made = [
        sft.train(config(tiny, tmp_path, output=tmp_path / str(number), seed=seed)).digest
        for number, seed in enumerate([1, 1, 2])
    ]
    assert made[0] == made[1] != made[2]


def test_the_last_turn_alone_is_learned(tiny: Path) -> None:
    from transformers import AutoTokenizer

    from trainers.stages.encoding import Encoder

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    encoder = Encoder(tokenizer, 100, (), frozenset({tokenizer.eos_token_id}))
    turns = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]

    (row,) = sft._encode(encoder, {"messages": turns})
    learned = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learned) == "d<|im_end|>\n"
    assert len(row["labels"]) == len(row["input_ids"])
    assert tokenizer.decode(row["input_ids"]).count("<|im_start|>") == 4
    (row,) = sft._encode(encoder, {"text": "plain"})
    assert tokenizer.decode(row["labels"]) == "plain<|im_end|>"


def test_an_adapter_is_trained_and_merged(tiny: Path, tmp_path: Path) -> None:
    made = sft.train(config(tiny, tmp_path, lora=Lora(rank=2)))

    assert (made.path / "adapter" / "adapter_model.safetensors").exists()
    assert Checkpoint.open(made.path).digest != Checkpoint.open(tiny).digest
    assert losses(made)[-1] < losses(made)[0]


def test_the_command_reads_yaml_and_settings_and_trains(tiny: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows("sft", 8))
    (tmp_path / "x.yaml").write_text(f"model: {tiny}\ndata: {data}\nbatch_size: 4\nmax_steps: 9\n")
    out = tmp_path / "out"

    settings = [f"output={out}", "max_steps=1", "learning_rate=1e-5"]
    words = ["train", "sft", "--config", str(tmp_path / "x.yaml")]
    done = cai(tmp_path, *words, *(word for one in settings for word in ("--set", one)))
    assert f"the checkpoint is in {out}" in done.stderr
    assert done.stdout == f"{out}\n"
    wrong = cai(tmp_path, *words, "--set", "lr=1e-5", status=1)
    assert "--set: unknown key 'lr'; did you mean 'learning_rate'?" in wrong.stderr
    manifest = Checkpoint.open(out).manifest
    assert manifest is not None
    assert (manifest.config["learning_rate"], manifest.config["max_steps"]) == (1e-5, 1)


def test_packed_rows_do_not_see_one_another(tiny: Path, tmp_path: Path) -> None:
    """The loss before training is the same, for each row stands as if it were alone."""
    found = rows("sft", 8)
    (tmp_path / "first").mkdir()
    model = sft.train(config(tiny, tmp_path / "first", learning_rate=3e-2, epochs=5.0)).path
    changes = {"data": write_rows(tmp_path / "rows.jsonl", found), "max_steps": 1}
    plain = sft.train(config(model, tmp_path, output=tmp_path / "plain", batch_size=8, **changes))
    changes |= {"batch_size": 2, "packing": True, "max_tokens": 300}
    packed = sft.train(config(model, tmp_path, output=tmp_path / "packed", **changes))

    assert figure(packed, "num_tokens") == figure(plain, "num_tokens")
    assert losses(packed)[0] == pytest.approx(losses(plain)[0], abs=1e-4)


def test_held_out_figures_are_of_all_tokens_whatever_stands_in_a_batch(tiny: Path, tmp_path: Path) -> None:
    """One answer in four is long and soon learned; a mean over rows would count it as one in four."""
    found = rows("sft", 16)
    for number, row in enumerate(found):
        row["completion"] = [turn("assistant", f"zq{number}" if number % 4 else "a " * 20)]
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "test.jsonl", found)
    data = write_rows(tmp_path / "data" / "train.jsonl", found).parent
    model = sft.train(config(tiny, tmp_path, data=data, learning_rate=3e-2)).path
    fixed = {"data": data, "max_steps": 1, "learning_rate": 1e-12}
    made = [
        sft.train(config(model, tmp_path, output=tmp_path / str(n), **fixed, **changes))
        for n, changes in enumerate(
            [{"batch_size": 1}, {"batch_size": 3}, {"packing": True, "max_tokens": 200, "batch_size": 2}]
        )
    ]
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        one, three, packed = (figure(each, name) for each in made)
        assert one == pytest.approx(three, abs=1e-4)
        assert one == pytest.approx(packed, abs=1e-4)


def figure(made: Checkpoint, name: str) -> float:
    assert made.manifest is not None
    return made.manifest.metrics[name]


def test_nobody_is_told_that_a_model_is_trained_here(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL sends its makers a note of each trainer that is built, unless it is told not to."""
    from huggingface_hub.utils import _telemetry

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(_telemetry.constants, "is_offline_mode", lambda: False)
    sent: list[Any] = []
    monkeypatch.setattr(_telemetry._TELEMETRY_QUEUE, "put", sent.append)

    sft.train(config(tiny, tmp_path, max_steps=1))
    assert not sent
    _telemetry.send_telemetry("what would be sent")
    assert len(sent) == 1
