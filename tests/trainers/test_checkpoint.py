"""Checkpoints: whole or not there, and they know where they came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import manifest

from cai_graph.errors import ConfigError, DataError, ModelError
from trainers.checkpoint import Checkpoint, save, seal


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_what_was_saved_opens_with_its_manifest_and_digest(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "watch.jsonl").write_text("{}\n")

    saved = save(tmp_path / "out", *loaded(tiny), manifest(), beside=tmp_path / "logs")
    opened = Checkpoint.open(tmp_path / "out")

    assert opened == saved
    assert opened.manifest == manifest()
    assert opened.digest == Checkpoint(tmp_path / "out").digest  # by the files, without the manifest
    assert opened.digest == Checkpoint.open(tiny).digest  # the same weights
    assert (tmp_path / "out" / "watch.jsonl").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "logs"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "12 rows of rows" in card
    assert r"a\|b &lt;script>" in card


def test_a_card_says_where_the_watch_stopped_a_run_and_what_the_weights_are_of(
    tiny: Path, tmp_path: Path
) -> None:
    watched = {"stopped_at": 30, "reason": "the held-out score has fallen", "weights_of_step": 10}
    stopped = manifest(data={"path": "rows", "watch": watched})
    save(tmp_path / "out", *loaded(tiny), stopped)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "at step 30, because the held-out score has fallen; the weights are those of step 10" in card
    assert manifest(data={"watch": {**watched, "stopped_at": None, "reason": None}}).stopped is None


def test_who_may_read_one_file_may_read_all(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(tiny)
    saved = save(tmp_path / "saved", model, tokenizer, manifest())
    model.save_pretrained(tmp_path / "written")
    tokenizer.save_pretrained(tmp_path / "written")
    sealed = seal(tmp_path / "sealed", tmp_path / "written", manifest())
    for made in (saved, sealed):
        files = [path for path in made.path.rglob("*") if path.is_file()]
        assert len({path.stat().st_mode for path in files}) == 1, files


def test_the_digest_follows_the_weights(tiny: Path, tmp_path: Path) -> None:
    import torch

    model, tokenizer = loaded(tiny)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert save(tmp_path / "out", model, tokenizer, manifest()).digest != Checkpoint.open(tiny).digest


def test_weights_that_were_changed_in_place_are_others(tiny: Path, tmp_path: Path) -> None:
    saved = save(tmp_path / "out", *loaded(tiny), manifest())
    before = saved.digest
    weights = tmp_path / "out" / "model.safetensors"
    body = weights.read_bytes()
    weights.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))

    assert Checkpoint.open(tmp_path / "out").digest != before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_an_adapter_to_a_base_in_bf16_is_not_rounded_away(tiny: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded(tiny)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    assert model.dtype == torch.bfloat16
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    module = adapted.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        module.lora_B["default"].weight.mul_(1e-4)
    save(tmp_path / "out", adapted, tokenizer, manifest())

    merged = loaded(tmp_path / "out")[0].model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(
        merged - module.base_layer.weight, module.get_delta_weight("default").float(), atol=1e-8, rtol=1e-3
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_an_adapter_is_merged_and_stands_beside(tiny: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded(tiny)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save(tmp_path / "out", adapted, tokenizer, manifest())

    inputs = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        adapted.eval()
        merged = loaded(tmp_path / "out")[0](inputs).logits
        torch.testing.assert_close(merged, adapted(inputs).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(merged, loaded(tiny)[0](inputs).logits)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_a_folder_that_is_there_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        save(tmp_path, *loaded(tiny), manifest())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    import resource
    import signal

    model, tokenizer = loaded(tiny)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write itself then fails, as on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(ModelError, match=r"out: cannot be written: .*nothing of it was left"):
            save(tmp_path / "out", model, tokenizer, manifest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("model.safetensors", "holds no weights"),
        ("config.json", "no config.json"),
        ("tokenizer.json", "has weights and no tokenizer; copy tokenizer.json"),
    ],
)
def test_a_folder_that_lacks_a_part_says_which(tiny: Path, tmp_path: Path, without: str, said: str) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / without).unlink()

    with pytest.raises(ModelError, match=said):
        Checkpoint.open(tmp_path / "m")


def test_pickled_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")

    with pytest.raises(ModelError, match=r"pickled weights \(\*\.bin\)"):
        Checkpoint.open(tmp_path / "m")
    with pytest.raises(ModelError, match="is no folder"):
        Checkpoint.open(tmp_path / "none")


def test_weights_that_were_cut_in_a_copy_are_seen(tiny: Path, tmp_path: Path) -> None:
    save(tmp_path / "out", *loaded(tiny), manifest())
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])

    with pytest.raises(ModelError, match=r"model\.safetensors: has [\d,]+ bytes, and the manifest says"):
        Checkpoint.open(tmp_path / "out")


def test_a_broken_manifest_is_named(tiny: Path, tmp_path: Path) -> None:
    save(tmp_path / "out", *loaded(tiny), manifest())
    path = tmp_path / "out" / "manifest.json"
    body = json.loads(path.read_text())
    del body["manifest"]["stage"]
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"manifest\.json: is no manifest of this release"):
        Checkpoint.open(tmp_path / "out")
    path.write_text(json.dumps({**body, "weights": []}))
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read as a manifest"):
        Checkpoint.open(tmp_path / "out")
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        Checkpoint.open(tmp_path / "out")
