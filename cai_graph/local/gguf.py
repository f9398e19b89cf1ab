"""Writes the first blocks of a GGUF model as a smaller model file.

A probe reads the hidden state of a middle layer. llama.cpp returns the state after the last block of a file,
so the new file ends at that layer, which also makes the pass cheaper. It is a function of the old file alone
(its bytes are copied), so its SHA-256 can be pinned.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cai_graph import atomic
from cai_graph.errors import DataError

__all__ = ["block_count", "first_blocks"]

_CHUNK = 1 << 22
_ALIGNMENT = 32  # the format's default
_MAX_STRING = 1 << 26
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MAX_NESTING = 8  # arrays in arrays; models have none
_BLOCK = re.compile(rb"blk\.(\d+)\.")


class _Tensor(NamedTuple):
    name: bytes
    shape_and_type: bytes
    offset: int
    """Bytes from the start of the data section."""


class _Header(NamedTuple):
    version: int
    kv_count: int
    kv: bytes
    """All key-value pairs, as the bytes in the file."""
    block_count_at: int
    """Offset in `kv` of the four bytes of the block count."""
    block_count: int
    alignment: int
    tensors: list[_Tensor]
    data_start: int


def first_blocks(source: Path, blocks: int, destination: Path) -> str:
    """Write the first `blocks` blocks of the GGUF model `source` to `destination`; return its SHA-256.

    Token embedding and final norm are kept. The output matrix is left out (llama.cpp then ties it to the
    token embedding), since no token will be generated. The file is written atomically.

    Args:
        source: a GGUF file with at least `blocks` blocks.
        blocks: number of blocks to keep, at least 1.
        destination: the file to write, replaced if it exists.

    Raises:
        DataError: `source` is not a GGUF model, or has fewer blocks.
        OSError: no room, or no permission to write.
    """
    with source.open("rb") as file:
        header = _read_header(file, source)
        if not 1 <= blocks <= header.block_count:
            raise DataError(f"{source}: has {header.block_count} blocks, {blocks} were asked for")
        # A tensor's bytes extend to the next tensor, padding included.
        by_offset = sorted(header.tensors, key=lambda tensor: tensor.offset)
        ends = [tensor.offset for tensor in by_offset[1:]] + [source.stat().st_size - header.data_start]
        if by_offset and by_offset[-1].offset > ends[-1]:
            raise _cut(source, by_offset[-1])
        length = {tensor.name: end - tensor.offset for tensor, end in zip(by_offset, ends, strict=True)}
        kept = [tensor for tensor in by_offset if _kept(tensor.name, blocks)]

        kv = bytearray(header.kv)
        struct.pack_into("<I", kv, header.block_count_at, blocks)
        head = bytearray(b"GGUF" + struct.pack("<IQQ", header.version, len(kept), header.kv_count) + kv)
        offset = 0
        for tensor in kept:
            head += struct.pack("<Q", len(tensor.name)) + tensor.name + tensor.shape_and_type
            head += struct.pack("<Q", offset)
            offset += _padded(length[tensor.name], header.alignment)
        head += bytes(_padded(len(head), header.alignment) - len(head))

        destination.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with atomic.file(destination, mode=0o600) as work, work.open("wb") as out:

            def write(piece: bytes | bytearray) -> None:
                digest.update(piece)
                out.write(piece)

            write(head)
            for tensor in kept:
                file.seek(header.data_start + tensor.offset)
                left = length[tensor.name]
                while left:
                    piece = file.read(min(left, _CHUNK))
                    if not piece:
                        raise _cut(source, tensor)
                    write(piece)
                    left -= len(piece)
                padding = _padded(length[tensor.name], header.alignment) - length[tensor.name]
                write(bytes(padding))
    return digest.hexdigest()


def block_count(path: Path) -> int:
    """Return how many blocks a GGUF model has.

    Raises:
        DataError: the file is not a GGUF language model.
    """
    with path.open("rb") as file:
        return _read_header(file, path).block_count


def _cut(path: Path, tensor: _Tensor) -> DataError:
    return DataError(f"{path}: ends inside tensor {tensor.name.decode(errors='replace')!r}")


def _kept(name: bytes, blocks: int) -> bool:
    block = _BLOCK.match(name)
    if block:
        return int(block[1]) < blocks
    return name != b"output.weight"


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _read_header(file: BinaryIO, path: Path) -> _Header:
    size = path.stat().st_size

    # A count in a damaged file may have any value, so check it against the file's size first.
    def whole_up_to(end: int) -> None:
        if end > size:
            raise DataError(f"{path}: ends inside its header; fetch it again")

    def take(count: int) -> bytes:
        whole_up_to(file.tell() + count)
        return file.read(count)

    def skip(count: int) -> None:
        whole_up_to(file.tell() + count)
        file.seek(count, os.SEEK_CUR)

    def number(form: str) -> int:
        value: int = struct.unpack("<" + form, take(struct.calcsize("<" + form)))[0]
        return value

    def string() -> bytes:
        count = number("Q")
        if count > _MAX_STRING:
            raise DataError(f"{path}: a string of {count} bytes in the header; not a GGUF model")
        return take(count)

    def skip_value(kind: int, nesting: int = 0) -> None:
        if kind in _SCALAR_BYTES:
            skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            string()
        elif kind == _ARRAY and nesting < _MAX_NESTING:
            inner, count = number("I"), number("Q")
            if inner in _SCALAR_BYTES:
                skip(_SCALAR_BYTES[inner] * count)
            else:
                for _ in range(count):
                    skip_value(inner, nesting + 1)
        else:
            raise DataError(f"{path}: value type {kind} in the header; not a GGUF model this release reads")

    if file.read(4) != b"GGUF":
        raise DataError(f"{path}: not a GGUF model file")
    version, tensor_count, kv_count = number("I"), number("Q"), number("Q")
    if version not in (2, 3):
        raise DataError(f"{path}: GGUF version {version}; this release reads 2 and 3")
    kv_start = file.tell()
    counted: tuple[int, int] | None = None
    alignment = _ALIGNMENT
    for _ in range(kv_count):
        key, kind = string(), number("I")
        if kind == _UINT32 and key.endswith(b".block_count"):
            at = file.tell() - kv_start
            counted = at, number("I")
        elif kind == _UINT32 and key == b"general.alignment":
            alignment = number("I")
        else:
            skip_value(kind)
    kv_end = file.tell()
    if counted is None or alignment < 1:
        raise DataError(f"{path}: no block count in its header; not a language model")
    tensors = []
    for _ in range(tensor_count):
        name = string()
        dimensions = take(4)
        shape = take(8 * struct.unpack("<I", dimensions)[0])
        tensors.append(_Tensor(name, dimensions + shape + take(4), number("Q")))
    data_start = _padded(file.tell(), alignment)
    whole_up_to(data_start)
    file.seek(kv_start)
    kv = take(kv_end - kv_start)
    return _Header(version, kv_count, kv, counted[0], counted[1], alignment, tensors, data_start)
