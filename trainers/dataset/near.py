"""Clusters of near-duplicate prompts, by MinHash (Broder 1997) over character 5-grams, white space left out.

    fingerprints   128 hashes a prompt; two agree in as large a share as the prompts' 5-grams do (Jaccard)
    clusters       prompts that agree enough, directly or through others

Prompts are looked at in an order of their keys, so the clusters do not depend on the order of the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any

from cai_graph.errors import MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = [
    "HASHES",
    "Clusters",
    "PromptFile",
    "algorithm",
    "clusters",
    "fingerprints",
    "hashed",
    "read_text",
    "required",
]

Clusters = dict[bytes, bytes]
"""Of each prompt that has near duplicates, the key that stands for its cluster."""

HASHES = 128
"""Hashes a fingerprint; the similarity is estimated to ±0.04 (one standard deviation, at 0.8)."""
BANDS, ROWS = 32, 4
"""Prompts that agree in all rows of a band are compared; at similarity 0.8 all but one in 10⁷ pairs are."""
GRAM = 5
"""Characters."""
READ = 20_000
"""Characters of a prompt that are read."""
SEED = 1
_BATCH = 2000
_HEAD = Struct("<16sI")
_MULTIPLIER = 0x9E3779B97F4A7C15


def required() -> None:
    """Raise MissingExtra where what is needed is not installed."""
    try:
        import numpy  # noqa: F401
        import rensa  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            "the search for near duplicates (--near-duplicates 0: none)", "rensa", "train"
        ) from error


def algorithm() -> str:
    """Return which hashes these are; others give other clusters."""
    import rensa

    return f"rensa RMinHash {rensa.RMinHash.ALGORITHM_VERSION}, {GRAM}-grams, white space left out"


class PromptFile:
    """The distinct prompts of one stretch on disk: key and normalised text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")
        self._seen: set[bytes] = set()

    def add(self, key: bytes, text: str) -> None:
        """Add a prompt; one that is there already is not added again."""
        if key not in self._seen:
            self._seen.add(key)
            data = read_text(text)
            self._file.write(_HEAD.pack(key, len(data)))
            self._file.write(data)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def read_text(text: str) -> bytes:
    """Return what is read of a prompt: what its key is made of, since prompts of one key are read once."""
    return "".join(text.split())[:READ].encode("utf-8", "replace")


def _read(path: Path) -> Iterator[tuple[bytes, str]]:
    with path.open("rb") as file:
        while head := file.read(_HEAD.size):
            key, length = _HEAD.unpack(head)
            yield key, file.read(length).decode()


def fingerprints(path: Path) -> tuple[bytes, Array]:
    """Return the keys of a prompt file, 16 bytes each, and the prompts' fingerprints, (N, HASHES) uint32."""
    import numpy

    keys: list[bytes] = []
    found: list[Array] = []
    prompts = _read(path)
    while batch := list(islice(prompts, _BATCH)):
        keys += [key for key, _ in batch]
        found.append(hashed([text for _, text in batch]))
    return b"".join(keys), numpy.concatenate(found) if found else numpy.empty((0, HASHES), numpy.uint32)


def hashed(texts: Sequence[str]) -> Array:
    """Return the fingerprints of texts, (N, HASHES) uint32."""
    import numpy
    from rensa import RMinHash

    # A text shorter than a gram is padded to one. A longer one is not: its last character would stand in
    # many more grams than any other, and a question without its mark would be far from itself.
    padded = [text.ljust(GRAM) for text in texts]
    codes = numpy.frombuffer("".join(padded).encode("utf-32-le", "replace"), numpy.uint32).astype(
        numpy.uint64
    )
    codes = numpy.concatenate([codes, numpy.zeros(GRAM, numpy.uint64)])
    size = len(codes) - GRAM
    grams = numpy.zeros(size, numpy.uint64)
    for offset in range(GRAM):
        grams = grams * numpy.uint64(_MULTIPLIER) + codes[offset : offset + size]
    ends = numpy.cumsum([len(text) for text in padded])
    inside = numpy.ones(size, bool)
    for offset in range(1, GRAM):
        inside[ends - offset] = False
    offsets = numpy.concatenate([[0], numpy.cumsum(inside)[ends - 1]]).astype(numpy.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams[inside], offsets, HASHES, SEED)
    return numpy.array(matrix.to_rows(), numpy.uint32)


def clusters(found: Iterable[tuple[bytes, Array]], similarity: float) -> Clusters:
    """Return the clusters of prompts, those that stand for their cluster left out.

    Args:
        found: keys and fingerprints, as `fingerprints` gives them.
        similarity: share of hashes in which two prompts must agree.
    """
    import numpy

    parts = list(found)
    halves = numpy.frombuffer(b"".join(keys for keys, _ in parts), ">u8").reshape(-1, 2)
    prints = numpy.concatenate([prints for _, prints in parts]) if parts else numpy.empty((0, HASHES))
    parts.clear()  # The fingerprints are most of what the build holds.
    # By their last eight bytes, since the first of a cluster stands for it, and the first eight say the side:
    # the least of many keys would be on the side of the low ones, `test`, nearly always.
    order = numpy.lexsort((halves[:, 0], halves[:, 1]))
    halves = halves[order]
    first = numpy.ones(len(halves), bool)
    first[1:] = (halves[1:] != halves[:-1]).any(axis=1)
    halves, prints = halves[first], prints[order[first]]
    parent = list(range(len(prints)))
    for band in range(BANDS):
        for a, b in _candidates(prints[:, band * ROWS : (band + 1) * ROWS]):
            near = (prints[a] == prints[b]).mean(axis=1) >= similarity
            for one, other in zip(a[near].tolist(), b[near].tolist(), strict=True):
                _join(parent, one, other)
    keys = [half.tobytes() for half in halves]
    roots = [_root(parent, index) for index in range(len(parent))]
    return {keys[index]: keys[root] for index, root in enumerate(roots) if root != index}


def _candidates(band: Array) -> Iterator[tuple[Array, Array]]:
    """Yield pairs of prompts that agree in a band: each with the first of them, and with the one before."""
    import numpy

    mixed = numpy.zeros(len(band), numpy.uint64)
    for row in range(ROWS):
        mixed = mixed * numpy.uint64(_MULTIPLIER) + band[:, row].astype(numpy.uint64)
    order = numpy.argsort(mixed, kind="stable")
    same = mixed[order][1:] == mixed[order][:-1]
    if not same.any():
        return
    places = numpy.arange(len(order))
    begins = numpy.maximum.accumulate(numpy.where(numpy.concatenate([[True], ~same]), places, 0))
    members = numpy.flatnonzero(same) + 1
    yield order[begins[members]], order[members]
    yield order[members - 1], order[members]


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index


def _join(parent: list[int], one: int, other: int) -> None:
    one, other = _root(parent, one), _root(parent, other)
    # The least index, the first in the order of the keys, stands for all.
    parent[max(one, other)] = min(one, other)
