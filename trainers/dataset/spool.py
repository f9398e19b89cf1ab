"""Stores candidate rows on disk in spools, by the first bits of their id, and decides which to keep.

Rows with the same content have the same id, so they are in one spool, and one of them is kept: the one with
the best evidence, then with the lowest `order`. Contradictory rows are in the same spool, too: those with the
best evidence are kept, or none if both sides have it. A spool is read in portions of some megabytes, for up
to 8 GB of rows in all, and no decision depends on the order of reading.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from trainers.ledger import Reason

__all__ = [
    "KEPT_DRAFT",
    "NOBODY",
    "REMOVED",
    "SPOOLS",
    "Candidate",
    "Limit",
    "Mix",
    "Portion",
    "Spooled",
    "Spooling",
    "Spools",
    "candidate_of",
    "decided",
    "load",
    "pack",
    "portions",
]

SPOOLS = 64
"""Number of spools; a row's spool is given by the first six bits of its digest."""
_SHIFT = 2
_BUFFER = 64 << 10
_PORTION_BYTES = 8 << 20
_MOST_PORTIONS = 16
"""Maximum portions of one spool; limited, since each portion reads all headers of the spool."""

KEPT_DRAFT, REMOVED = 1, 2
"""Flags of a candidate: its answer is a kept draft; it belongs to a user or tenant to remove."""
NOBODY = b"\0" * 8
"""The value of `user` or `tenant` for a candidate without one."""

_HEADER = Struct("<16sBQ16s8s8sQHBI")


pack = _HEADER.pack
"""Packs the fields of a candidate, and returns its header."""


class Candidate(NamedTuple):
    """The data of a row on which its selection depends. Candidates sort in order of precedence."""

    digest: bytes
    """The row's id."""
    rank: int
    """Rank of its source; of rows with the same content, the one with the lowest rank is kept."""
    order: int
    """A hash of the trajectory's id; of rows with the same rank, the one with the lowest is kept."""
    prompt: bytes
    """Key of its prompt."""
    user: bytes
    """A hash of the user."""
    tenant: bytes
    """A hash of the tenant."""
    trajectory: int
    """Number of its trajectory among those read; unique within a build."""
    siblings: int
    """Number of rows that its trajectory made."""
    flags: int
    """A combination of KEPT_DRAFT and REMOVED."""
    length: int
    """Bytes of its JSON."""


def candidate_of(head: bytes) -> Candidate:
    """Return the candidate with a packed header."""
    return Candidate._make(_HEADER.unpack(head))


class Block(NamedTuple):
    """Candidates of one spool that were written together: their headers, then their bodies."""

    at: int
    """First byte in the file."""
    heads: int
    """Bytes of headers."""
    bodies: int
    """Bytes of bodies."""


class Spooled(NamedTuple):
    """The candidates of one stretch on disk, in one file."""

    path: Path
    """The file."""
    blocks: list[list[Block]]
    """Where the candidates of each spool are."""


class Spools:
    """Writes the candidates of one stretch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")
        self._at = 0
        self._heads: list[list[bytes]] = [[] for _ in range(SPOOLS)]
        self._bodies: list[list[bytes]] = [[] for _ in range(SPOOLS)]
        self._sizes = [0] * SPOOLS
        self._blocks: list[list[Block]] = [[] for _ in range(SPOOLS)]

    def add(self, candidates: Iterable[tuple[bytes, bytes]]) -> None:
        """Add candidates: the `_HEADER` of each, packed, and its JSON."""
        heads, bodies, sizes = self._heads, self._bodies, self._sizes
        for head, body in candidates:
            number = head[0] >> _SHIFT
            heads[number].append(head)
            bodies[number].append(body)
            sizes[number] += len(body)
            if sizes[number] > _BUFFER:
                self._flush(number)

    def finish(self) -> Spooled:
        """Write pending candidates, and return where all are stored."""
        for number, size in enumerate(self._sizes):
            if size:
                self._flush(number)
        self._file.flush()
        return Spooled(self.path, self._blocks)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _flush(self, number: int) -> None:
        heads, bodies = self._heads[number], self._bodies[number]
        block = Block(self._at, len(heads) * _HEADER.size, self._sizes[number])
        heads += bodies
        self._file.write(b"".join(heads))
        heads.clear()
        bodies.clear()
        self._sizes[number] = 0
        self._at += block.heads + block.bodies
        self._blocks[number].append(block)


class Portion(NamedTuple):
    """Candidates that are decided together: those of one spool in one of several equal ranges of ids."""

    blocks: list[tuple[Path, list[Block]]]
    """The spool's blocks in each file."""
    part: int
    """Number of the range, from 0."""
    parts: int
    """Number of ranges in the spool."""

    def holds(self, digest: bytes) -> bool:
        """Return whether a candidate of the spool is in this portion."""
        return (int.from_bytes(digest[:4]) & _BEHIND_SPOOL) * self.parts >> 26 == self.part


_BEHIND_SPOOL = (1 << 26) - 1
"""Mask for the bits after the spool's number in the first 32 bits of a digest."""


def portions(spooled: Sequence[Spooled]) -> Iterator[Portion]:
    """Yield all portions, in the order of the ids."""
    for number in range(SPOOLS):
        blocks = [(path, blocks[number]) for path, blocks in spooled]
        size = sum(block.heads + block.bodies for _, some in blocks for block in some)
        parts = min(_MOST_PORTIONS, 1 + size // _PORTION_BYTES)
        for part in range(parts):
            yield Portion(blocks, part, parts)


Spooling = tuple[Candidate, bytes]
"""A candidate and its row, as `encode_row` returns it; empty if only candidates were loaded."""


def load(portion: Portion, *, bodies: bool = True) -> list[Spooling]:
    """Return the candidates of a portion, with or without their bodies."""
    found: list[Spooling] = []
    at_once = bodies and portion.parts == 1
    for path, blocks in portion.blocks:
        with path.open("rb", buffering=0) as file:
            for block in blocks:
                data = os.pread(file.fileno(), block.heads + (block.bodies if at_once else 0), block.at)
                at = block.heads
                for candidate in map(Candidate._make, _HEADER.iter_unpack(data[: block.heads])):
                    end = at + candidate.length
                    if portion.parts == 1 or portion.holds(candidate.digest):
                        if at_once or not bodies:
                            body = data[at:end]
                        else:
                            body = os.pread(file.fileno(), candidate.length, block.at + at)
                        found.append((candidate, body))
                    at = end
    return found


# --- selection ----------------------------------------------------------------------------------------


class Limit:
    """Keeps at most `cap` rows of each group: those with the lowest `order`.

    First call `see` for every candidate that would be kept without this limit, then `settle`, then `forbids`.
    """

    def __init__(self, reason: Reason, group: Callable[[Candidate], bytes], cap: int) -> None:
        self.reason = reason
        self.group = group
        self.cap = cap
        self._places: dict[bytes, array[int]] = {}
        self._last: dict[bytes, int] = {}

    def see(self, candidate: Candidate) -> None:
        """Take a candidate into account."""
        group = self.group(candidate)
        if group == NOBODY:
            return
        places = self._places.get(group)
        if places is None:
            places = self._places[group] = array("Q")
        places.append(candidate.order)
        if len(places) > 2 * self.cap + 64:  # Candidates beyond the cap now will remain beyond it.
            self._places[group] = array("Q", sorted(places)[: self.cap + 1])

    def settle(self) -> None:
        """Decide which candidates to drop, after all were seen."""
        for group, places in self._places.items():
            if len(places) > self.cap:
                self._last[group] = sorted(places)[self.cap - 1] if self.cap else -1
        self._places.clear()

    def forbids(self, candidate: Candidate) -> bool:
        """Return whether the limit drops the candidate."""
        last = self._last.get(self.group(candidate))
        return last is not None and candidate.order > last


def _is_kept(candidate: Candidate) -> bytes:
    return b"kept" if candidate.flags & KEPT_DRAFT else NOBODY


class Mix(Limit):
    """Keeps at most `ratio` kept drafts for each other row."""

    def __init__(self, ratio: float) -> None:
        super().__init__(Reason.MIX, _is_kept, sys.maxsize)
        self.ratio = ratio
        self.others = 0

    def see(self, candidate: Candidate) -> None:
        """Take a candidate into account."""
        self.others += not candidate.flags & KEPT_DRAFT
        super().see(candidate)

    def settle(self) -> None:
        """Decide which candidates to drop, after all were seen."""
        # 0.29 of 100 must be 29: compute with the decimal number, not with the nearest float.
        self.cap = int(Fraction(str(self.ratio)) * self.others)
        super().settle()


def decided(
    spooling: Iterable[Spooling], limits: Sequence[Limit]
) -> Iterator[tuple[Candidate, bytes, Reason | None]]:
    """Yield the candidates of one portion in order of their ids, each with the reason if it is dropped."""
    for _, rivals in groupby(sorted(spooling), _question):
        for candidate, body, reason in _weighed(list(rivals)):
            if reason is None:
                for limit in limits:
                    if limit.forbids(candidate):
                        reason = limit.reason
                        break
                else:
                    if candidate.flags & REMOVED:
                        reason = Reason.REMOVED
            yield candidate, body, reason


def _question(spooling: Spooling) -> bytes:
    """Return the part of the digest that is equal for rows that agree or contradict each other."""
    return spooling[0].digest[:8]


def _weighed(rivals: list[Spooling]) -> list[tuple[Candidate, bytes, Reason | None]]:
    """Return the rows of one question in order of their ids, each with the reason if another row drops it."""
    if len(rivals) == 1:
        return [(*rivals[0], None)]
    best = min(candidate.rank for candidate, _ in rivals)
    sides = {candidate.digest for candidate, _ in rivals if candidate.rank == best}
    stays = sides.pop() if len(sides) == 1 else None
    before = None
    weighed: list[tuple[Candidate, bytes, Reason | None]] = []
    for candidate, body in rivals:
        reason = None
        if candidate.digest != stays:
            reason = Reason.DISAGREEMENT
        elif candidate.digest == before:
            reason = Reason.DUPLICATE
        before = candidate.digest
        weighed.append((candidate, body, reason))
    return weighed
