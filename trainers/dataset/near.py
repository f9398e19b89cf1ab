"""Finds clusters of near-duplicate prompts by MinHash (Broder 1997) over character 5-grams.

    fingerprints   128 hashes for each prompt; the share of equal hashes of two prompts estimates their
                   similarity, the Jaccard index of their 5-grams
    clusters       prompts that are similar enough, directly or through others

White space is ignored. Prompts are processed in an order of their keys, so the clusters do not depend on the
order of the log.
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
"""Maps the key of each prompt that has near duplicates to the key that represents its cluster; the
representing prompts themselves are not included."""

HASHES = 128
"""Hashes in a fingerprint; the similarity is estimated to ±0.04 (one standard deviation, at 0.8)."""
BANDS, ROWS = 32, 4
"""Prompts whose hashes are equal in all rows of a band are compared; at similarity 0.8 all but one in 10⁷
pairs are."""
GRAM = 5
"""Characters in a gram."""
READ = 20_000
"""Characters of a prompt that are considered."""
SEED = 1
_BATCH = 2000
_HEAD = Struct("<16sI")
_MULTIPLIER = 0x9E3779B97F4A7C15


def required() -> None:
    """Raise MissingExtra if a package that is needed is not installed."""
    try:
        import numpy  # noqa: F401
        import rensa  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            "the search for near duplicates (--near-duplicates 0: none)", "rensa", "train"
        ) from error


def algorithm() -> str:
    """Return the name and version of the hash algorithm, on which the clusters depend."""
    import rensa

    return f"rensa RMinHash {rensa.RMinHash.ALGORITHM_VERSION}, {GRAM}-grams, white space left out"


class PromptFile:
    """Writes the distinct prompts of one stretch to disk: key and normalised text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")
        self._seen: set[bytes] = set()

    def add(self, key: bytes, text: str) -> None:
        """Add a prompt, unless it was added before."""
        if key not in self._seen:
            self._seen.add(key)
            data = read_text(text)
            self._file.write(_HEAD.pack(key, len(data)))
            self._file.write(data)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def read_text(text: str) -> bytes:
    """Return the text of a prompt to fingerprint: like its key, it ignores white space."""
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

    # A text shorter than a gram is padded to one. Longer texts are not padded: their last character would be
    # in more grams than others, and a question would differ much from itself without its question mark.
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
    """Return the clusters of prompts; see `Clusters`.

    Args:
        found: keys and fingerprints, as `fingerprints` returns them.
        similarity: minimum share of equal hashes of two near duplicates.
    """
    import numpy

    parts = list(found)
    halves = numpy.frombuffer(b"".join(keys for keys, _ in parts), ">u8").reshape(-1, 2)
    prints = numpy.concatenate([prints for _, prints in parts]) if parts else numpy.empty((0, HASHES))
    parts.clear()  # To free memory: the fingerprints are most of what the build uses.
    # Sort by the last eight bytes of the key. The first prompt in this order represents its cluster, and the
    # first eight bytes decide the split: the smallest of many keys would nearly always be in `test`.
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
    """Yield pairs of prompts that are equal in a band: each with the first of these and with the previous."""
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
    # The smallest index, the first in the order of the keys, represents the cluster.
    parent[max(one, other)] = min(one, other)
