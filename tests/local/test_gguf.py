from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from cai_graph.digests import sha256_of
from cai_graph.errors import DataError
from cai_graph.local.gguf import block_count, first_blocks


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GGUF file of three blocks whose every number tells where it stands."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(str(path), "qwen2")
    writer.add_block_count(3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "<|im_end|>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_tensor("output.weight", np.full((3, 5), 9, np.float32))
    writer.add_tensor("token_embd.weight", np.full((3, 5), 7, np.float32))
    for block in range(3):
        writer.add_tensor(f"blk.{block}.attn_norm.weight", np.full(5, block, np.float32))
        writer.add_tensor(f"blk.{block}.ffn_up.weight", np.full((7, 5), block + 0.5, np.float16))
    writer.add_tensor("output_norm.weight", np.full(5, 8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_first_blocks_keep_their_bytes_and_all_settings(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    digest = first_blocks(model, 2, short)
    assert digest == sha256_of(short)
    before, after = GGUFReader(model), GGUFReader(short)
    kept = {tensor.name: tensor.data for tensor in after.tensors}
    assert sorted(kept) == [
        "blk.0.attn_norm.weight",
        "blk.0.ffn_up.weight",
        "blk.1.attn_norm.weight",
        "blk.1.ffn_up.weight",
        "output_norm.weight",
        "token_embd.weight",
    ]
    for tensor in before.tensors:
        if tensor.name in kept:
            assert np.array_equal(kept[tensor.name], tensor.data)
    for key, field in before.fields.items():
        if key not in ("GGUF.tensor_count", "qwen2.block_count"):
            assert after.fields[key].contents() == field.contents()
    assert block_count(model) == 3
    assert block_count(short) == 2


def test_the_same_model_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    assert first_blocks(model, 1, tmp_path / "a.gguf") == first_blocks(model, 1, tmp_path / "b.gguf")


@pytest.mark.parametrize("blocks", [0, 4])
def test_blocks_that_are_not_there_are_an_error(model: Path, tmp_path: Path, blocks: int) -> None:
    with pytest.raises(DataError, match=f"has 3 blocks, {blocks} were asked for"):
        first_blocks(model, blocks, tmp_path / "short.gguf")
    assert not (tmp_path / "short.gguf").exists()


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(DataError, match="not a GGUF model file"):
        first_blocks(other, 1, tmp_path / "short.gguf")


@pytest.mark.parametrize("left", [10, 60, 300])
def test_a_cut_header_is_an_error(model: Path, tmp_path: Path, left: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:left])
    with pytest.raises(DataError, match="ends inside its header"):
        first_blocks(cut, 1, tmp_path / "short.gguf")


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "an array of 2^62 bytes": (0, _text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 62)),
    "an array in an array in …": (0, _text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000),
    "a tensor of 2^32 dimensions": (
        1,
        _text(b"x.block_count") + struct.pack("<II", 4, 4) + _text(b"t") + struct.pack("<I", 0xFFFFFFFF),
    ),
}


@pytest.mark.parametrize(("tensors", "header"), HOSTILE.values(), ids=HOSTILE)
def test_a_header_may_ask_for_anything(tmp_path: Path, tensors: int, header: bytes) -> None:
    hostile = tmp_path / "hostile.gguf"
    hostile.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, 1) + header)
    with pytest.raises(DataError, match=r"ends inside its header|value type 9"):
        block_count(hostile)


def test_a_tensor_beyond_any_file_is_an_error(model: Path, tmp_path: Path) -> None:
    last = struct.pack("<Q", len(b"output_norm.weight")) + b"output_norm.weight"
    data = bytearray(model.read_bytes())
    offset = data.index(last) + len(last) + 4 + 8 + 4  # its dimensions, their one size, its type
    data[offset : offset + 8] = b"\xff" * 8
    model.write_bytes(data)
    with pytest.raises(DataError, match=r"ends inside tensor 'output_norm.weight'"):
        first_blocks(model, 1, tmp_path / "short.gguf")


def test_cut_tensors_are_an_error_and_leave_nothing(model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-200])
    with pytest.raises(DataError, match="ends inside tensor"):
        first_blocks(cut, 3, tmp_path / "short.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "model.gguf"]
