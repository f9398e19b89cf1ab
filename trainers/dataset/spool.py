"""Candidate rows on disk, apart by the first bits of their id, and the decision which of them stay.

Rows of the same content have the same id, so they meet in one spool and one of them stays: that of the best
evidence, then of the least `order`. Rows that say the opposite of each other meet there as well: those of the
best evidence stay, and none where that is on both sides. A spool is read again in portions of some megabytes,
up to 8 GB of rows in all, and no decision depends on the order of reading.
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
"""How many parts; the spool of a row is the first six bits of its digest."""
_SHIFT = 2
_BUFFER = 64 << 10
_PORTION_BYTES = 8 << 20
_MOST_PORTIONS = 16
"""Of one spool: each one reads all its headers."""

KEPT_DRAFT, REMOVED = 1, 2
"""Flags of a candidate: its answer is a kept draft; it is of a person or tenant to remove."""
NOBODY = b"\0" * 8
"""Stands for no user and no tenant."""

_HEADER = Struct("<16sBQ16s8s8sQHBI")


pack = _HEADER.pack
"""Returns the header of a candidate: its fields, packed."""


class Candidate(NamedTuple):
    """What is known of a row when it is decided whether it stays. Candidates sort in order of precedence."""

    digest: bytes
    """The row's id."""
    rank: int
    """Rank of its source; of rows of the same content the least stays."""
    order: int
    """Of those of the same rank the least stays; a hash of the trajectory's id."""
    prompt: bytes
    """Key of its prompt."""
    user: bytes
    """Stands for the user."""
    tenant: bytes
    """Stands for the tenant."""
    trajectory: int
    """Number of its trajectory among those read; unique within a build."""
    siblings: int
    """Rows that its trajectory made."""
    flags: int
    """KEPT_DRAFT, REMOVED."""
    length: int
    """Bytes of its JSON."""


def candidate_of(head: bytes) -> Candidate:
    """Return what is known of a row, unpacked."""
    return Candidate._make(_HEADER.unpack(head))


class Block(NamedTuple):
    """Candidates of one spool that were written at once: their headers, then their bodies."""

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
        """Write what is pending, and return where everything is."""
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
    """Candidates that are decided on at once: of one spool, those in one of several equal ranges of ids."""

    blocks: list[tuple[Path, list[Block]]]
    """Where the spool is: in each file, its blocks."""
    part: int
    """Which range, …"""
    parts: int
    """… of how many."""

    def holds(self, digest: bytes) -> bool:
        """Return whether a candidate of the spool belongs here."""
        return (int.from_bytes(digest[:4]) & _BEHIND_SPOOL) * self.parts >> 26 == self.part


_BEHIND_SPOOL = (1 << 26) - 1
"""Of the first 32 bits of a digest, those behind the number of its spool."""


def portions(spooled: Sequence[Spooled]) -> Iterator[Portion]:
    """Yield all portions, in the order of the ids."""
    for number in range(SPOOLS):
        blocks = [(path, blocks[number]) for path, blocks in spooled]
        size = sum(block.heads + block.bodies for _, some in blocks for block in some)
        parts = min(_MOST_PORTIONS, 1 + size // _PORTION_BYTES)
        for part in range(parts):
            yield Portion(blocks, part, parts)


Spooling = tuple[Candidate, bytes]
"""A candidate and its row, as `encode_row` gives it; empty where only the candidates were wanted."""


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


# --- which stay ---------------------------------------------------------------------------------------


class Limit:
    """At most `cap` rows of a group: those of the least `order`.

    It first sees every candidate that would stay without it; once settled, it says which go.
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
        if len(places) > 2 * self.cap + 64:  # What is beyond the cap now stays beyond it.
            self._places[group] = array("Q", sorted(places)[: self.cap + 1])

    def settle(self) -> None:
        """Decide, all candidates seen."""
        for group, places in self._places.items():
            if len(places) > self.cap:
                self._last[group] = sorted(places)[self.cap - 1] if self.cap else -1
        self._places.clear()

    def forbids(self, candidate: Candidate) -> bool:
        """Return whether the candidate goes."""
        last = self._last.get(self.group(candidate))
        return last is not None and candidate.order > last


def _is_kept(candidate: Candidate) -> bytes:
    return b"kept" if candidate.flags & KEPT_DRAFT else NOBODY


class Mix(Limit):
    """At most `ratio` kept drafts for each other row."""

    def __init__(self, ratio: float) -> None:
        super().__init__(Reason.MIX, _is_kept, sys.maxsize)
        self.ratio = ratio
        self.others = 0

    def see(self, candidate: Candidate) -> None:
        """Take a candidate into account."""
        self.others += not candidate.flags & KEPT_DRAFT
        super().see(candidate)

    def settle(self) -> None:
        """Decide, all candidates seen."""
        # 0.29 of 100 are 29: as it is written, and not as the float next to it.
        self.cap = int(Fraction(str(self.ratio)) * self.others)
        super().settle()


def decided(
    spooling: Iterable[Spooling], limits: Sequence[Limit]
) -> Iterator[tuple[Candidate, bytes, Reason | None]]:
    """Yield the candidates of one portion in the order of their ids, each with why it goes, if it does."""
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
    """Return what rows have in common that say the same, or the opposite."""
    return spooling[0].digest[:8]


def _weighed(rivals: list[Spooling]) -> list[tuple[Candidate, bytes, Reason | None]]:
    """Return the rows of one question in the order of their ids, each with why it goes for another, if so."""
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
