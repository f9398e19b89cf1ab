"""Weights go from the engine's file to a folder that can be trained, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai_graph import local
from cai_graph.errors import ConfigError, DataError, ModelError
from cai_graph.local.gguf import first_blocks
from trainers.weights import export, resolve, source_of, to_gguf

PROMPT = [{"role": "user", "content": "Name 3 rivers, and the year 1789 in one line."}]


@pytest.fixture(scope="module")
def short(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the tiny model's thirty blocks: real weights, a real tokenizer, quick."""
    path = tmp_path_factory.mktemp("short") / "short.gguf"
    first_blocks(tiny_weights, 2, path)
    return path


@pytest.fixture(scope="module")
def folder(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAI_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve(f"local:{short}")


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight differs from where it started, as after training."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = tmp_path_factory.mktemp("trained") / "sft"
    model = AutoModelForCausalLM.from_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in model.parameters():
            values.add_(torch.randn(values.shape, generator=random) * 0.2 * values.std())
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(folder).save_pretrained(made)
    (made / "manifest.json").write_text(json.dumps({"manifest": {"base": str(folder)}, "weights": {}}))
    return made


def transformers_says(folder: Path) -> tuple[int, dict[str, float]]:
    """Tokens of the prompt, and log p of each first token of the reply, in nats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0, -1]
    values, tokens = torch.log_softmax(logits.double(), -1).topk(20)
    said = (tokenizer.decode([token]) for token in tokens.tolist())
    return ids.shape[1], dict(zip(said, values.tolist(), strict=True))


def engine_says(model: str) -> tuple[int, dict[str, float]]:
    chat = local.chat_model(model, temperature=0, max_tokens=1)
    reply: Any = chat.bind(logprobs=True, top_logprobs=20).invoke([("user", PROMPT[0]["content"])])
    (token,) = reply.response_metadata["logprobs"]["content"]
    return reply.usage_metadata["input_tokens"], {
        one["token"]: one["logprob"] for one in token["top_logprobs"]
    }


def widest(left: dict[str, float], right: dict[str, float]) -> float:
    """The largest difference in nats over the tokens that both know; most of twenty must be the same."""
    common = {token for token in left.keys() & right.keys() if "\ufffd" not in token}
    assert len(common) >= 15
    return max(abs(left[token] - right[token]) for token in common)


@pytest.mark.local
def test_engine_and_transformers_agree_on_trained_weights(trained: Path, short: Path, tmp_path: Path) -> None:
    """The original differs from the trained weights by far more than the two engines do."""
    wanted_tokens, wanted = transformers_says(trained)
    for precision, nats in (("F16", 0.02), ("Q8_0", 0.25)):
        target = tmp_path / f"{precision}.gguf"
        to_gguf(trained, short, target, precision)
        tokens, theirs = engine_says(str(target))
        assert tokens == wanted_tokens
        assert widest(theirs, wanted) < nats
    _, untrained = engine_says(str(short))
    shared = untrained.keys() & wanted.keys()
    assert not shared or max(abs(untrained[token] - wanted[token]) for token in shared) > 1


@pytest.mark.local
def test_folder_says_what_its_file_says(short: Path, folder: Path) -> None:
    tokens, wanted = transformers_says(folder)
    their_tokens, theirs = engine_says(str(short))
    assert tokens == their_tokens
    assert widest(theirs, wanted) < 0.25  # the engine rounds activations to 8 bits beside 4-bit weights


@pytest.mark.local
def test_exported_checkpoint_is_a_local_model_by_its_folder(
    trained: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cai model export"):
        local.chat_model(str(trained))
    assert source_of(trained) == short
    assert export(trained) == trained / "model.gguf"
    chat = local.chat_model(str(trained), max_tokens=4)
    assert chat.invoke("Hello").response_metadata["model_name"] == "sft"
    assert resolve(f"local:{trained}") == trained
    monkeypatch.chdir(trained.parent)
    assert local.weights("sft") == trained / "model.gguf"


@pytest.mark.local
def test_dequantised_folder_is_whole_and_made_once(
    folder: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "source.json", "tokenizer.json"} <= names
    assert "quantization_config" not in (folder / "config.json").read_text()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("CAI_CACHE", str(folder.parents[1]))
    assert resolve(short) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.local
def test_a_full_disk_in_the_middle_of_dequantising_leaves_nothing(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("CAI_CACHE", str(tmp_path))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", full)
    with pytest.raises(ModelError, match="No space left on device; it takes 4 bytes a weight"):
        resolve(f"local:{short}")
    assert not [path for path in (tmp_path / "safetensors").iterdir() if path.is_dir()]


@pytest.mark.local
def test_folder_that_does_not_fit_its_source_is_named(
    trained: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="has no tensor for 'blk"):
        to_gguf(trained, tiny_weights, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.local
def test_added_tokens_are_named(trained: Path, short: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(trained / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:8]])
    (tmp_path / "wide").mkdir()
    save_file(tensors, tmp_path / "wide" / "model.safetensors")
    with pytest.raises(DataError, match="were tokens added in training"):
        to_gguf(tmp_path / "wide", short, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.json"):
        resolve(tmp_path)
    with pytest.raises(ConfigError, match="is no folder with weights"):
        resolve("smollm2")
    with pytest.raises(ConfigError, match="there is no local model 'smolm2'"):
        resolve("local:smolm2")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(DataError, match="cannot be read as a GGUF model"):
        to_gguf(tmp_path, tmp_path / "a.gguf", tmp_path / "b.gguf")


def test_weights_without_a_file_to_go_back_to_need_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--source"):
        source_of(tmp_path)


def test_a_model_that_a_checkpoint_was_trained_from_is_not_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"manifest": {"base": "model"}, "weights": {}}')
    (tmp_path / "model").mkdir()
    source = tmp_path / "model.gguf"
    source.touch()
    (tmp_path / "model" / "source.json").write_text(json.dumps({"file": str(source), "sha256": ""}))
    monkeypatch.chdir(tmp_path)
    assert source_of(tmp_path / "out") == source
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"was trained from model, which is not found from here .*--source"):
        source_of(tmp_path / "out")


def test_q8_0_keeps_matrices_that_do_not_divide_into_groups_at_16_bits() -> None:
    from types import SimpleNamespace

    from trainers.weights import _kind

    assert _kind(SimpleNamespace(shape=[48, 4]), "Q8_0").name == "F16"
    assert _kind(SimpleNamespace(shape=[64, 4]), "Q8_0").name == "Q8_0"
    assert _kind(SimpleNamespace(shape=[48]), "Q8_0").name == "F32"
