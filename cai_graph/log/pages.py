"""Records out of the raw pages of a damaged log file, past SQLite.

Every table leaf is looked at, in the file and in its WAL, whether the tree still leads to it or not; where
a page's own list of cells is damaged, every offset is tried. A row counts only if its checksum holds, so
nothing is found that was not written. The format: https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cai_graph.errors import CaiError, LogError
from cai_graph.log.sqlite import PAGE_SIZE
from cai_graph.log.store import Row, column_text, digest_of, row_of
from cai_graph.trajectory import decode

__all__ = ["Found", "scan"]

_LEAF = 13
_OTHER_TREE_PAGES = {2, 5, 10}
_RECORD_COLUMNS = 15
_TOMBSTONE_COLUMNS = 9
_MAX_PAYLOAD = 1 << 30
_HEADER = re.compile(rb"[\x0a-\x40](?=\0)")
"""How the header of a row of ours begins: its length, and NULL for the column that is the row's number."""
_BEFORE_HEADER = 14
"""Bytes that may stand before it: the row's size (up to 5) and number (up to 9)."""


class _Place(NamedTuple):
    """Where a row begins."""

    number: int
    version: int
    offset: int


class _Cell(NamedTuple):
    """One row as its page holds it."""

    position: int
    values: list[Any]
    """Its columns; empty where the table is not ours."""
    overflow: list[int]
    """Pages that it goes on in."""


@dataclass
class Found:
    """What the pages hold."""

    records: int
    """Number of intact records, each id once, without those that were removed and not appended again."""
    rows: Iterator[Row]
    """Those records, by position, read again as they are asked for."""
    damaged: list[tuple[int, str | None, str]]
    """Position, id and fault of records that can be read but do not match their checksum."""
    tombstones: list[tuple[Any, ...]]
    """Rows of the table of tombstones, without their positions."""
    sequences: dict[str, set[int]]
    """Sequence numbers of the intact records and tombstones, by writer."""


class _Pages:
    """Pages by number, each in all versions that the file and the WAL hold; the newest first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
            wal = Path(f"{path}-wal")
            self._wal = wal.open("rb") if wal.exists() else None
        except OSError as error:
            raise LogError(f"{path}: cannot be read: {error.strerror}") from error
        header = self._read(self._file, 0, 32)
        wal_header = self._read(self._wal, 0, 32)
        size = int.from_bytes(header[16:18]) or int.from_bytes(wal_header[8:12])
        self.size = 65536 if size == 1 else size
        if self.size not in {512 << n for n in range(8)}:
            self.size = PAGE_SIZE  # The header is damaged; this is what every log is made with.
        # No log reserves bytes at the end of a page, so a number there is damage.
        self._bytes = os.fstat(self._file.fileno()).st_size
        self.count = -(-self._bytes // self.size)
        self._frames: dict[int, list[int]] = {}
        wal_bytes = 0 if self._wal is None else os.fstat(self._wal.fileno()).st_size
        for start in range(32, wal_bytes - 24 - self.size + 1, 24 + self.size):
            number = int.from_bytes(self._read(self._wal, start, 4))
            if 0 < number < 1 << 31:
                self._frames.setdefault(number, []).insert(0, start + 24)

    def close(self) -> None:
        self._file.close()
        if self._wal is not None:
            self._wal.close()

    def _read(self, file: BinaryIO | None, offset: int, size: int) -> bytes:
        if file is None:
            return b""
        try:
            return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise LogError(f"{self._path}: cannot be read at byte {offset}: {error.strerror}") from error

    def numbers(self) -> Iterator[int]:
        yield from range(1, self.count + 1)
        yield from sorted(number for number in self._frames if number > self.count)

    def versions(self, number: int) -> Iterator[bytes]:
        for start in self._frames.get(number, ()):
            yield self._read(self._wal, start, self.size)
        start = (number - 1) * self.size
        if 0 <= start < self._bytes:
            yield self._read(self._file, start, self.size).ljust(self.size, b"\0")


@contextlib.contextmanager
def scan(path: Path) -> Iterator[Found]:
    """Find every intact record in a log file and its WAL; the rows can be read until the context ends.

    Raises:
        LogError: the file cannot be read.
    """
    pages = _Pages(path)
    try:
        scanner = _Scanner(pages)
        scanner.run()
        yield scanner.found()
    finally:
        pages.close()


class _Scanner:
    def __init__(self, pages: _Pages) -> None:
        self.pages = pages
        self.records: dict[str, tuple[int, _Place]] = {}
        self.tombstones: dict[str, tuple[int, tuple[Any, ...]]] = {}
        self.suspects: dict[tuple[int, str | None], str] = {}
        self.sequences: dict[str, set[int]] = defaultdict(set)
        self.claimed: set[int] = set()

    def run(self) -> None:
        doubtful: list[int] = []
        for number in self.pages.numbers():
            for version, page in enumerate(self.pages.versions(number)):
                base = 100 if number == 1 else 0
                kind = page[base]
                if kind == _LEAF:
                    if not self._leaf(page, base, number, version):
                        doubtful.append(number)
                elif kind not in _OTHER_TREE_PAGES:
                    doubtful.append(number)
        for number in doubtful:
            # What is left after the intact records' overflow pages: damaged leaves, and little else.
            if number in self.claimed:
                continue
            for version, page in enumerate(self.pages.versions(number)):
                for header in _HEADER.finditer(page):
                    for offset in range(max(0, header.start() - _BEFORE_HEADER), header.start() - 1):
                        self._take(page, _Place(number, version, offset), lenient=False)

    def found(self) -> Found:
        # An id may be appended again after it was removed: what came last holds.
        intact = sorted(
            place
            for id, place in self.records.items()
            if id not in self.tombstones or place[0] > self.tombstones[id][0]
        )
        return Found(
            records=len(intact),
            rows=self._rows(intact),
            damaged=[
                (position, id, what)
                for (position, id), what in sorted(self.suspects.items(), key=lambda item: item[0][0])
                if id not in self.records and id not in self.tombstones
            ],
            tombstones=[stone for _, (_, stone) in sorted(self.tombstones.items())],
            sequences=self.sequences,
        )

    def _rows(self, intact: list[tuple[int, _Place]]) -> Iterator[Row]:
        for _, (number, version, offset) in intact:
            page = next(islice(self.pages.versions(number), version, None))
            cell = self._cell(page, offset)
            assert cell is not None
            payload = cell.values[-1]
            yield row_of(decode(payload), payload)

    def _leaf(self, page: bytes, base: int, number: int, version: int) -> bool:
        """Take the rows of a table leaf; return whether each of its cells is a sound one."""
        count = int.from_bytes(page[base + 3 : base + 5])
        if base + 8 + 2 * count > len(page):
            return False
        sound = True
        for at in range(base + 8, base + 8 + 2 * count, 2):
            place = _Place(number, version, int.from_bytes(page[at : at + 2]))
            sound &= self._take(page, place, lenient=True)
        return sound

    def _take(self, page: bytes, place: _Place, *, lenient: bool) -> bool:
        """Take the row that begins here if there is a sound one; return whether there is.

        Args:
            lenient: a row of a table that is not ours is sound, and a damaged row of ours is noted.
        """
        cell = self._cell(page, place.offset)
        if cell is None:
            return False
        match len(cell.values):
            case 0:
                return lenient
            case n if n == _TOMBSTONE_COLUMNS:
                return self._take_tombstone(cell)
            case _:
                return self._take_record(cell, place, lenient)

    def _cell(self, page: bytes, offset: int) -> _Cell | None:
        try:
            size, offset = _varint(page, offset)
            position, offset = _varint(page, offset)
            position -= (position >> 63) << 64  # what `recover` wrote stands at negative ones
            if not 0 < size < _MAX_PAYLOAD:
                return None
            # The first bytes of a row say how many columns it has; only rows of ours are read on.
            header, at = _varint(page, offset)
            types: list[int] = []
            while at < offset + header:
                serial, at = _varint(page, at)
                types.append(serial)
            if at != offset + header or sum(map(_width, types)) + header != size:
                return None
            if len(types) not in (_RECORD_COLUMNS, _TOMBSTONE_COLUMNS) or types[0] != 0:
                return _Cell(position, [], [])
            body, overflow = self._body(page, offset, size)
            return _Cell(position, list(_values(body, header, types)), overflow)
        except (IndexError, ValueError):
            return None

    def _body(self, page: bytes, offset: int, size: int) -> tuple[bytes, list[int]]:
        usable = self.pages.size
        most = usable - 35
        if size <= most:
            return page[offset : offset + size], []
        least = (usable - 12) * 32 // 255 - 23
        local = least + (size - least) % (usable - 4)
        local = local if local <= most else least
        parts = [page[offset : offset + local]]
        number = int.from_bytes(page[offset + local : offset + local + 4])
        left = size - local
        chain: list[int] = []
        while left > 0:
            versions = self.pages.versions(number)
            following = next(versions, None)
            if following is None or number in chain[-1:]:
                raise ValueError("the chain of overflow pages is broken")
            chain.append(number)
            parts.append(following[4 : 4 + min(left, usable - 4)])
            left -= usable - 4
            number = int.from_bytes(following[:4])
        return b"".join(parts), chain

    def _take_record(self, cell: _Cell, place: _Place, lenient: bool) -> bool:
        (_, id, _, writer, sequence, *_, digest, _, payload) = cell.values
        try:
            name = writer.decode("ascii")
            if digest_of(name, sequence, payload) != digest:
                raise ValueError("its bytes do not match its checksum")
            record = decode(payload)
        except (AttributeError, TypeError, ValueError, CaiError) as error:
            if lenient:
                text = id.decode("utf-8", "replace") if isinstance(id, bytes) else None
                self.suspects.setdefault((cell.position, text), str(error))
            return False
        self.claimed.update(cell.overflow)
        self.sequences[name].add(sequence)
        found = self.records.get(column_text(record.id))
        if found is None or found[0] < cell.position:
            self.records[column_text(record.id)] = (cell.position, place)
        return True

    def _take_tombstone(self, cell: _Cell) -> bool:
        (_, id, kind, writer, sequence, digest, chain, removed_at, why) = cell.values
        try:
            texts = [text.decode() for text in (id, kind, writer, why)]
            if len(digest) != 16 or len(chain) != 16 or not isinstance(sequence, int):
                return False
        except (AttributeError, TypeError, UnicodeDecodeError):
            return False
        self.sequences[texts[2]].add(sequence)
        if texts[0] not in self.tombstones or self.tombstones[texts[0]][0] < cell.position:
            stone = (*texts[:3], sequence, digest, chain, removed_at, texts[3])
            self.tombstones[texts[0]] = (cell.position, stone)
        return True


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """Return the number at the offset, and the offset behind it."""
    value = 0
    for n in range(9):
        byte = data[offset + n]
        if n == 8:
            return value << 8 | byte, offset + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, offset + n + 1
    raise AssertionError("unreachable")


_INTEGER_WIDTHS = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)


def _width(serial: int) -> int:
    return _INTEGER_WIDTHS[serial] if serial < 12 else (serial - 12) // 2


def _values(body: bytes, start: int, types: list[int]) -> Iterator[Any]:
    """Yield the columns: None, int, or bytes for text and blob."""
    for serial in types:
        width = _width(serial)
        data = body[start : start + width]
        if len(data) != width:
            raise ValueError("the row is cut")
        start += width
        if serial == 0:
            yield None
        elif serial < 7:
            yield int.from_bytes(data, signed=True)
        elif serial in (8, 9):
            yield serial - 8
        elif serial < 12:
            raise ValueError("a kind of column that no log has")
        else:
            yield data
