"""Reads the intact records from the raw pages of a damaged log file, bypassing SQLite.

Every page of the file and of its WAL is scanned, whether or not the B-tree still references it and whatever
page type its header declares; every byte sequence that looks like a row header is tried. A record is accepted
only if its checksum matches, so nothing is returned that was not written. Tombstones have no checksum: of two
at one position, the one in its page's cell list is used. Format: https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import contextlib
import os
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cai_graph.errors import CaiError, LogError
from cai_graph.log.sqlite import PAGE_SIZE
from cai_graph.log.store import Row, column_text, digest_of, row_of
from cai_graph.trajectory import Record, decode

__all__ = ["Found", "scan"]

_LEAF = 13
_RECORD_COLUMNS = 15
_TOMBSTONE_COLUMNS = 9
_MAX_PAYLOAD = 1 << 30
_HEADER_SIZES = range(10, 65)
"""Possible sizes in bytes of the header of a log's row, which lists its column types. The first column is the
rowid, whose type is NULL."""
_BEFORE_HEADER = 14
"""Most bytes before that header: the row's size (up to 5) and its rowid (up to 9)."""
_ZEROS = re.compile(rb"\0+")
"""Zero bytes, which may be that NULL. Payloads are ASCII and contain none, so the search is fast."""
_FAULTS = (AttributeError, TypeError, ValueError, CaiError)
"""Errors that reading a damaged row can raise, as it may contain anything."""


class _Place(NamedTuple):
    """Where a row begins: the page, its version (see `_Pages`), and the offset in the page."""

    number: int
    version: int
    offset: int


class _Row(NamedTuple):
    """One row of a log, as its first bytes describe it."""

    position: int
    start: int
    """Offset in the page at which its header begins; the columns follow the header."""
    size: int
    """Bytes of the header and the columns, including those on overflow pages."""
    header: int
    """Bytes of the header."""
    types: list[int]
    """SQLite's serial type of each column."""


@dataclass
class Found:
    """What the pages contain."""

    records: int
    """Number of intact records, each id once, except those that were removed and not appended again."""
    rows: Iterator[Row]
    """These records in the order of positions; each is read again from its page when it is yielded."""
    damaged: list[tuple[int, str | None, str]]
    """Position, id and fault of records that can be read but do not match their checksum."""
    tombstones: list[tuple[Any, ...]]
    """Rows of the table of tombstones, without their positions."""
    sequences: dict[str, set[int]]
    """Sequence numbers of the intact records and tombstones, by writer."""


class _Pages:
    """Pages by number, each in every version that the file and the WAL contain.

    A version is identified by the page's offset in the WAL; 0 is the version in the file.
    """

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
            self.size = PAGE_SIZE  # The header is damaged; every log is created with this size.
        # No log reserves bytes at the end of a page, so a nonzero value in that header field is damage.
        self._bytes = os.fstat(self._file.fileno()).st_size
        self.count = -(-self._bytes // self.size)
        self._frames: dict[int, list[int]] = {}
        self._commits: list[int] = []
        """Versions that end a transaction, in order; then the size of the WAL."""
        wal_bytes = 0 if self._wal is None else os.fstat(self._wal.fileno()).st_size
        for start in range(32 + 24, wal_bytes - self.size + 1, 24 + self.size):
            frame = self._read(self._wal, start - 24, 8)
            self._frames.setdefault(int.from_bytes(frame[:4]), []).append(start)
            if any(frame[4:]):
                self._commits.append(start)
        self._commits.append(wal_bytes)

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

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield the number and version of every page."""
        beyond = sorted(number for number in self._frames if not 0 < number <= self.count)
        for number in chain(range(1, self.count + 1), beyond):
            yield from ((number, version) for version in self._versions(number))

    def page(self, number: int, version: int) -> bytes:
        if version:
            return self._read(self._wal, version, self.size)
        return self._read(self._file, (number - 1) * self.size, self.size).ljust(self.size, b"\0")

    def as_of(self, number: int, version: int) -> bytes | None:
        """Return a page as of the end of the transaction that wrote `version`, a version of any page.

        Frames of later transactions are skipped, and so are frames from before the WAL was last restarted,
        which have other salts.
        """
        salts = self._salts(version)
        end = self._commits[bisect_left(self._commits, version)]
        for start in self._versions(number):
            if start == 0 or (start <= end and self._salts(start) == salts):
                return self.page(number, start)
        return None

    def newest(self, number: int, version: int) -> bytes | None:
        """Return the last version of a page in the WAL, or else the one in the file."""
        return next((self.page(number, start) for start in self._versions(number)), None)

    def _versions(self, number: int) -> Iterator[int]:
        """Yield the versions of a page, the newest first."""
        yield from reversed(self._frames.get(number, ()))
        if 0 < number <= self.count:
            yield 0

    def _salts(self, version: int) -> bytes:
        """Return the two salts of the frame with this version; empty for the file's."""
        return self._read(self._wal, version - 16, 8) if version else b""


@contextlib.contextmanager
def scan(path: Path) -> Iterator[Found]:
    """Find every intact record in a log file and its WAL; `Found.rows` is usable until the context ends.

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
        self.tombstones: dict[int, tuple[bool, tuple[Any, ...]]] = {}
        """By position: whether the row is in its page's cell list, and the row."""
        self.suspects: dict[tuple[int, str | None], str] = {}
        self.sequences: dict[str, set[int]] = defaultdict(set)

    def run(self) -> None:
        for number, version in self.pages.places():
            page = self.pages.page(number, version)
            seen = set()
            for offset in _listed(page, 100 if number == 1 else 0):
                if (row := _row_at(page, offset)) is not None:
                    seen.add(row.start)
                    self._take(page, row, _Place(number, version, offset), listed=True)
            # Rows that no cell list references, since the list or the page's type is damaged.
            for zeros in _ZEROS.finditer(page, 1):
                start = zeros.start() - 1
                if page[start] in _HEADER_SIZES and start not in seen and _types_at(page, start):
                    for offset in range(max(0, start - _BEFORE_HEADER), start - 1):
                        row = _row_at(page, offset)
                        if row is not None and row.start == start:
                            self._take(page, row, _Place(number, version, offset), listed=False)

    def found(self) -> Found:
        for _, (_, _, writer, sequence, *_) in self.tombstones.values():
            self.sequences[writer].add(sequence)
        # An id may be appended again after it was removed: the later of the two events counts.
        removed = {stone[0]: position for position, (_, stone) in sorted(self.tombstones.items())}
        intact = sorted(
            place for id, place in self.records.items() if id not in removed or place[0] > removed[id]
        )
        return Found(
            records=len(intact),
            rows=self._rows(intact),
            damaged=[
                (position, id, what)
                for (position, id), what in sorted(self.suspects.items(), key=lambda item: item[0][0])
                if id not in self.records and id not in removed
            ],
            tombstones=[self.tombstones[position][1] for position in sorted(removed.values())],
            sequences=self.sequences,
        )

    def _rows(self, intact: list[tuple[int, _Place]]) -> Iterator[Row]:
        for _, place in intact:
            page = self.pages.page(place.number, place.version)
            row = _row_at(page, place.offset)
            assert row is not None
            for columns in self._readings(page, row, place.version):
                with contextlib.suppress(*_FAULTS):
                    yield row_of(_record_of(columns), columns[-1])
                    break

    def _take(self, page: bytes, row: _Row, place: _Place, *, listed: bool) -> None:
        """Add a row if it is intact; record it as damaged if it is not and is in its page's cell list."""
        fault: tuple[str | None, str] | None = None
        for columns in self._readings(page, row, place.version):
            try:
                if len(columns) == _TOMBSTONE_COLUMNS:
                    self._take_tombstone(row.position, columns, listed=listed)
                else:
                    self._take_record(row.position, columns, place)
                return
            except _FAULTS as error:
                if len(columns) == _RECORD_COLUMNS:
                    id = columns[1].decode("utf-8", "replace") if isinstance(columns[1], bytes) else None
                    fault = fault or (id, str(error))
        if listed and fault is not None:
            id, what = fault
            self.suspects.setdefault((row.position, id), what)

    def _take_record(self, position: int, columns: list[Any], place: _Place) -> None:
        id = column_text(_record_of(columns).id)
        self.sequences[columns[3].decode()].add(columns[4])
        if id not in self.records or self.records[id][0] < position:
            self.records[id] = (position, place)

    def _take_tombstone(self, position: int, columns: list[Any], *, listed: bool) -> None:
        (_, id, kind, writer, sequence, digest, link, removed_at, why) = columns
        id, kind, writer, why = (text.decode() for text in (id, kind, writer, why))
        numbers = isinstance(sequence, int) and isinstance(removed_at, int)
        if len(digest) != 16 or len(link) != 16 or not numbers:
            raise ValueError("is no tombstone")
        # A row that is in no cell list may be a remnant, partly overwritten.
        if position not in self.tombstones or (listed and not self.tombstones[position][0]):
            stone = (id, kind, writer, sequence, digest, link, removed_at, why)
            self.tombstones[position] = (listed, stone)

    def _readings(self, page: bytes, row: _Row, version: int) -> Iterator[list[Any]]:
        """Yield the columns of a row; with overflow pages, once for each way to choose their versions."""
        usable = self.pages.size
        local = most = usable - 35
        if row.size > most:
            least = (usable - 12) * 32 // 255 - 23
            local = least + (row.size - least) % (usable - 4)
            local = local if local <= most else least
        end = row.start + min(local, row.size)
        for find in (self.pages.as_of, self.pages.newest) if row.size > local else (self.pages.as_of,):
            with contextlib.suppress(ValueError):
                body = page[row.start : end]
                if row.size > local:
                    first = int.from_bytes(page[end : end + 4])
                    body += self._overflow(first, row.size - local, partial(find, version=version))
                yield list(_values(body, row.header, row.types))

    def _overflow(self, number: int, left: int, find: Callable[[int], bytes | None]) -> bytes:
        parts: list[bytes] = []
        while left > 0:
            page = find(number)
            if page is None or int.from_bytes(page[:4]) == number:
                raise ValueError("the chain of overflow pages is broken")
            parts.append(page[4 : 4 + left])
            left -= len(parts[-1])
            number = int.from_bytes(page[:4])
        return b"".join(parts)


def _record_of(columns: list[Any]) -> Record:
    """Return the record of a row. Raises one of _FAULTS if its checksum does not match."""
    (_, _, _, writer, sequence, *_, digest, _, payload) = columns
    if digest_of(writer.decode("ascii"), sequence, payload) != digest:
        raise ValueError("its bytes do not match its checksum")
    return decode(payload)


def _listed(page: bytes, base: int) -> Iterator[int]:
    """Yield the offsets at which the rows of a table leaf page begin, from its cell list."""
    count = int.from_bytes(page[base + 3 : base + 5])
    if page[base] == _LEAF and base + 8 + 2 * count <= len(page):
        for at in range(base + 8, base + 8 + 2 * count, 2):
            yield int.from_bytes(page[at : at + 2])


def _row_at(page: bytes, offset: int) -> _Row | None:
    """Return the log row that begins at an offset of a page; None if none does."""
    try:
        size, at = _varint(page, offset)
        position, at = _varint(page, at)
    except IndexError:
        return None
    found = _types_at(page, at)
    if found is None or not 0 < size < _MAX_PAYLOAD:
        return None
    header, types = found
    if sum(map(_width, types)) + header != size:
        return None
    position -= (position >> 63) << 64  # `recover` writes tombstones at negative positions
    return _Row(position, at, size, header, types)


def _types_at(page: bytes, start: int) -> tuple[int, list[int]] | None:
    """Return the size and column types of the row header that begins at `start`; None if no log has such."""
    try:
        header, at = _varint(page, start)
        if page[at] != 0 or header > _HEADER_SIZES[-1]:
            return None
        types: list[int] = []
        while at < start + header:
            serial, at = _varint(page, at)
            types.append(serial)
    except IndexError:
        return None
    if at != start + header or len(types) not in (_RECORD_COLUMNS, _TOMBSTONE_COLUMNS):
        return None
    return header, types


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """Return the varint at the offset, and the offset after it."""
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
