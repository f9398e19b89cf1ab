"""Records out of a log and into it: `export` to JSONL or Parquet, `import_` from either."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeVar, Unpack
from uuid import UUID

import msgspec

from cai_graph import whole
from cai_graph.errors import ConfigError, DataError, LogError, MissingExtra
from cai_graph.log import CURRENT_END, Filters, Log, Redactor, open_log, place_of
from cai_graph.log.redaction import is_withheld
from cai_graph.log.store import Duplicate
from cai_graph.log.writer import redacted_row
from cai_graph.trajectory import (
    ConstitutionRef,
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Record,
    Revision,
    Round,
    Trajectory,
    Verdict,
    decode,
    encode,
    new_id,
    now,
    shown_of,
)

if TYPE_CHECKING:
    import pyarrow

    from cai_graph.log.commit import Commit

__all__ = [
    "IMPORTED",
    "BrokenLine",
    "Format",
    "Import",
    "content_id",
    "export",
    "import_",
    "redacted",
    "under_content_id",
    "windows",
]

R = TypeVar("R", bound=Record)

Format = Literal["jsonl", "parquet"]
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_OF_A_LOG = ("", "-wal", "-shm", "-journal")
_ROW_GROUP = 1000
_ROW_GROUP_BYTES = 16 << 20
_WINDOW = 500
_WINDOW_BYTES = 4 << 20


# --- export -------------------------------------------------------------------------------------------


def export(
    url: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    **filters: Unpack[Filters],
) -> int:
    """Write the records that pass the filters to a file, and return how many they are.

    What was said about a Trajectory leaves with it, and alone it does not leave: see `with_appended` of
    `Filters`, which is always so here.

    The file appears whole or not at all, readable by its owner alone. JSONL holds each record as one line.
    Parquet holds a row a record: the columns that one filters and plots by, and the whole record as JSON in
    `json`. `import_` reads both back byte for byte.

    Args:
        url: the log.
        path: the file to write; one that is there is replaced.
        format: `jsonl` or `parquet`; by default what the file's name ends in.

    Raises:
        ConfigError: no format is given and the name does not say one; or it names the log, or no plain file.
        MissingExtra: Parquet is asked for and pyarrow is not installed.
        LogError: the log cannot be read, or the file cannot be written.
    """
    target = Path(path)
    place = place_of(url)
    if place.path is not None and os.path.realpath(target) in {f"{place.path}{end}" for end in _OF_A_LOG}:
        raise ConfigError(f"{target}: is the log itself; name another file")
    # Where even the look fails, the writing says why.
    if os.path.exists(target) and not os.path.isfile(target):
        raise ConfigError(f"{target}: is not a plain file; name one")
    target = target.resolve()  # what a link names is written, and the link stays
    chosen = format or _SUFFIXES.get(target.suffix.lower())
    if chosen is None:
        raise ConfigError(f"{target}: the name does not say which format; end it in .jsonl or .parquet")
    filters["with_appended"] = True
    write = _write_jsonl if chosen == "jsonl" else _parquet_writer()
    with open_log(url, read_only=True) as log:
        try:
            with whole.file(target, mode=0o600) as work, work.open("wb") as file:
                count = write(log, filters, file)
            whole.sync_folder(target.parent)
        except OSError as error:
            raise LogError(f"{target}: cannot be written: {error.strerror or error}") from error
    return count


def _write_jsonl(log: Log, filters: Filters, file: BinaryIO) -> int:
    count = 0
    for line in log.lines(**filters):
        file.write(line)
        count += 1
    return count


def _pyarrow(needed_by: str) -> tuple[ModuleType, ModuleType]:
    """Return pyarrow and its part that reads and writes Parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(needed_by, "pyarrow", "train") from error
    return pyarrow, pyarrow.parquet


def _parquet_writer() -> Callable[[Log, Filters, BinaryIO], int]:
    pa, pq = _pyarrow("a Parquet export")
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("record", pa.string()),
            ("at", pa.timestamp("us", tz="UTC")),
            ("trajectory_id", pa.string()),
            ("mode", pa.string()),
            ("outcome", pa.string()),
            ("constitution", pa.string()),
            ("constitution_digest", pa.string()),
            ("source", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("violated", pa.list_(pa.string())),
            ("prompt", pa.string()),
            ("draft", pa.string()),
            ("released", pa.string()),
            ("calls", pa.int64()),
            ("seconds", pa.float64()),
            ("json", pa.string()),
        ]
    )

    def write(log: Log, filters: Filters, file: BinaryIO) -> int:
        count = 0
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in _groups(log.lines(**filters), _ROW_GROUP, _ROW_GROUP_BYTES):
                writer.write_table(_table(pa, schema, group))
                count += len(group)
        return count

    return write


def windows(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield lines as many at a time as an import adds in one go: some hundreds, of a few megabytes in all."""
    return _groups(lines, _WINDOW, _WINDOW_BYTES)


def _groups(lines: Iterable[bytes], count: int, size: int) -> Iterator[list[bytes]]:
    """Yield groups of `count` lines, or of fewer where these are more than `size` bytes already."""
    group: list[bytes] = []
    length = 0
    for line in lines:
        group.append(line)
        length += len(line)
        if len(group) == count or length > size:
            yield group
            group, length = [], 0
    if group:
        yield group


def _table(pa: Any, schema: pyarrow.Schema, lines: list[bytes]) -> pyarrow.Table:
    return pa.Table.from_pylist([_parquet_row(line) for line in lines], schema=schema)


def _parquet_row(line: bytes) -> dict[str, Any]:
    record = decode(line)
    row: dict[str, Any] = {
        "id": _storable(record.id),
        "record": type(record).__struct_config__.tag,
        "json": line[:-1].decode("ascii"),
    }
    if not isinstance(record, Trajectory):
        return row | {"at": record.at, "trajectory_id": _storable(record.trajectory_id)}
    return row | {
        "at": record.started_at,
        "mode": _storable(record.mode),
        "outcome": record.outcome.value,
        "constitution": _storable(record.constitution.name),
        "constitution_digest": _storable(record.constitution.digest),
        "source": _storable(record.source),
        "tags": [_storable(tag) for tag in record.tags],
        "violated": [_storable(name) for name in record.violated],
        "prompt": _storable(record.prompt),
        "draft": None if record.draft is None else _storable(shown_of(record.draft.answer)),
        "released": None if record.released is None else _storable(shown_of(record.released)),
        "calls": len(record.calls),
        "seconds": record.seconds,
    }


def _storable(text: str | None) -> str | None:
    # Parquet's strings are UTF-8; the column `json` keeps a lone surrogate as it was.
    return None if text is None else text.encode("utf-8", "replace").decode()


# --- import -------------------------------------------------------------------------------------------


class BrokenLine(NamedTuple):
    """A line that was skipped."""

    line: int
    """Its number, from 1."""
    what: str
    """What is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """What `import_` did with each line."""

    records: int
    """Records of a log that were added."""
    demonstrations: int
    """Demonstrations that were added, each as a Trajectory of the mode `imported`."""
    present: int
    """Lines whose record was in the log already."""
    removed: int
    """Lines whose record `gc` removed from this log; they stay away."""
    broken: tuple[BrokenLine, ...]
    """Lines that were skipped."""
    truncated: bool
    """Whether the last line is cut in the middle, as an interrupted writer leaves it."""


_DEMONSTRATION = ("prompt", "draft", "critique", "revision", "principle", "label")
IMPORTED = ConstitutionRef(name="imported", version="1", digest=hashlib.sha256(b"imported").hexdigest())


def import_(
    url: str | os.PathLike[str], path: str | os.PathLike[str], *, redact: Redactor | None = None
) -> Import:
    """Add the records of a file to a log; a line that cannot be read is reported and skipped.

    The file is JSONL, or Parquet as `export` writes it, each row of which is a line. A line is a record as
    `export` writes it, or a demonstration that a person wrote: an object with `prompt`, `draft` and, where
    they apply, `critique`, `revision`, `principle` and `label` (`VIOLATES` where there is a revision,
    otherwise `COMPLIES`); without a principle the label is of the whole answer. Other keys go to `metadata`.
    What is in the log already, by id, is not added again; a demonstration's id follows from its content, as
    `redact` leaves it. One whose redaction fails is added each time.

    Args:
        url: the log; made where it is absent.
        path: the file; what it is shows in its first bytes.
        redact: see `open_log`.

    Raises:
        DataError: the file cannot be read.
        MissingExtra: it is Parquet, and pyarrow is not installed.
        LogError: the log cannot be written; the lines before are in it, and importing again goes on.
    """
    source = Path(path)
    try:
        file = source.open("rb")
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    with file:
        begin = file.peek(16)[:16]
        if begin == b"SQLite format 3\0":
            raise DataError(
                f"{source}: is an SQLite database; if it is a log, `cai log export all.jsonl --log {source}` "
                "writes a file to import"
            )
        if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{source}: is written in UTF-16; save the file as UTF-8")
        parquet = begin.startswith(b"PAR1")
        lines = _parquet_lines(file, source) if parquet else file  # before the log, which opening makes
        with open_log(url) as log:
            importer = _Importer(log, redact)
            for window in windows(lines):
                importer.take(window)
            return importer.result()


def _parquet_lines(file: BinaryIO, source: Path) -> Iterator[bytes]:
    """Return the records of a Parquet export, as the lines of one in JSONL.

    Raises:
        DataError: it is no Parquet export, or damaged; the latter perhaps not until it is read.
    """
    pa, pq = _pyarrow("a Parquet import")
    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source}: is no whole Parquet file: {error}") from error
    found = table.schema_arrow
    texts = (pa.string(), pa.large_string(), pa.string_view())  # the last two where pandas or polars wrote it
    if "json" not in found.names or found.field("json").type not in texts:
        raise DataError(f"{source}: has no column 'json' of texts, which `cai log export` writes")

    def read() -> Iterator[bytes]:
        try:
            for group in range(table.num_row_groups):  # a batch of several would be as large as they are
                for batch in table.iter_batches(_WINDOW, row_groups=[group], columns=["json"]):
                    for text in batch.column(0):
                        yield (text.as_py() or "null").encode() + b"\n"
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{source}: cannot be read to its end: {error}") from error

    return read()


class _Importer:
    def __init__(self, log: Log, redact: Redactor | None) -> None:
        self.log = log
        self.redact = redact
        self.lines = 0
        self.records = self.demonstrations = self.present = self.removed = 0
        self.broken: list[BrokenLine] = []
        self.truncated = False

    def take(self, window: list[bytes]) -> None:
        """Add the next lines, and wait until they are committed."""
        parsed: dict[str, _Line] = {}
        for number, line in enumerate(window, self.lines + 1):
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if not text:
                continue
            try:
                read = _parse(number, text, self.redact)
            except DataError as error:
                if line.endswith(b"\n"):
                    self.broken.append(BrokenLine(number, str(error)))
                else:
                    self.truncated = True
                    what = "the last line is cut in the middle; the file was not written to its end"
                    self.broken.append(BrokenLine(number, what))
                continue
            first = parsed.setdefault(read.record.id, read)
            if first is not read:
                self._compare(read, first.record)
        self.lines += len(window)
        known = self.log.known(list(parsed))
        waiting: list[tuple[_Line, Commit]] = []
        for id, read in parsed.items():
            if id in known:
                self._meet(read)
            else:
                waiting.append((read, self.log.append_encoded(read.record, read.payload)))
        for read, future in waiting:
            try:
                future.result()
            except Duplicate:  # another import was quicker
                self._meet(read)
                continue
            except DataError as error:
                self.broken.append(BrokenLine(read.number, str(error)))
                continue
            self.demonstrations += read.demonstration
            self.records += not read.demonstration

    def _meet(self, read: _Line) -> None:
        """Count a line whose id the log knows."""
        try:
            stored = self.log.get(read.record.id)
        except DataError:
            self.removed += 1
            return
        self._compare(read, stored)

    def _compare(self, read: _Line, other: Record) -> None:
        # A demonstration's id is its content; a redacted record differs from its line on purpose.
        if read.demonstration or self.redact is not None or read.record == other:
            self.present += 1
        else:
            what = f"a different record of the id {read.record.id!r} is there already; records never change"
            self.broken.append(BrokenLine(read.number, what))

    def result(self) -> Import:
        return Import(
            records=self.records,
            demonstrations=self.demonstrations,
            present=self.present,
            removed=self.removed,
            broken=tuple(sorted(self.broken)),
            truncated=self.truncated,
        )


class _Line(NamedTuple):
    number: int
    record: Record
    payload: bytes | None
    """The line, where it can be stored as it stands, so that another export equals the first."""
    demonstration: bool


def _parse(number: int, line: bytes, redact: Redactor | None) -> _Line:
    try:
        # Of bytes `json` guesses the encoding, line by line.
        data = json.loads(line.decode("utf-8-sig", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"a line is a JSON object, found {type(data).__name__}")
    if "record" in data:
        exact = redact is None and line.isascii() and line.endswith(CURRENT_END)
        record = redacted(decode(line), redact)
        return _Line(number, record, line if exact else None, demonstration=False)
    if "prompt" in data:
        record = redacted(_demonstration(data), redact)
        said = [getattr(record, name) for name in ("messages", "draft", "rounds", "released", "metadata")]
        return _Line(number, under_content_id(record, ["demonstration", *said]), None, demonstration=True)
    raise DataError(
        "neither a record (it would have 'record') nor a demonstration (it would have 'prompt' and 'draft'); "
        f"found {', '.join(map(repr, data)) or 'no key'}"
    )


def _demonstration(data: dict[str, Any]) -> Trajectory:
    for name in _DEMONSTRATION:
        value = data.get(name)
        if value is None and name in ("prompt", "draft"):
            raise DataError(f"demonstration: {name!r} is missing")
        if value is not None and not isinstance(value, str):
            raise DataError(f"demonstration: {name!r} is text, found {type(value).__name__}")
        if value is not None and not value.strip() and name in ("prompt", "draft", "revision"):
            raise DataError(f"demonstration: {name!r} is empty")
    prompt, draft = str(data["prompt"]), str(data["draft"])
    critique, revision, principle, label = (data.get(name) for name in _DEMONSTRATION[2:])
    if label is None:
        label = Label.COMPLIES if revision is None else Label.VIOLATES
    if label not in set(Label):
        raise DataError(f"demonstration: 'label' is one of {', '.join(Label)}, found {label!r}")
    verdict = Verdict(label=Label(label), principle=principle or None, read_by="imported")
    answer = Message(role="assistant", content=draft)
    revised = None if revision is None else Message(role="assistant", content=revision)
    if revised is not None:
        outcome = Outcome.REVISED
    else:
        outcome = Outcome.EXHAUSTED if verdict.label is Label.VIOLATES else Outcome.KEPT
    metadata = {name: value for name, value in data.items() if name not in _DEMONSTRATION}
    return Trajectory(
        id=new_id(),
        started_at=now(),
        seconds=0.0,
        mode="imported",
        constitution=IMPORTED,
        outcome=outcome,
        messages=(Message(role="user", content=prompt),),
        draft=Draft(answer=answer),
        rounds=(
            Round(
                critique=Critique(verdicts=(verdict,), reasoning=critique or "", critic="human"),
                revisions=() if revised is None else (Revision(answer=revised, accepted=True),),
            ),
        ),
        released=revised or answer,
        released_from="draft" if revised is None else "revision",
        metadata=metadata,
    )


def redacted(record: R, redact: Redactor | None) -> R:
    """Return the record that a log with this hook stores."""
    if redact is None:
        return record
    stored = decode(redacted_row(encode(record), redact).payload)
    assert isinstance(stored, type(record))
    return stored


def under_content_id(record: R, content: Sequence[Any]) -> R:
    """Return the record under the id that follows from its content; one that is withheld, under its own.

    The content is what `redact` has left, since what was redacted could be guessed by its digest.
    """
    return record if is_withheld(record) else msgspec.structs.replace(record, id=content_id(content))


def content_id(content: Sequence[Any]) -> str:
    """Return a UUIDv8 (RFC 9562, section 5.8) that follows from the content: JSON, and parts of records.

    Raises:
        DataError: it is nested too deep.
    """
    try:
        text = json.dumps(content, sort_keys=True, default=msgspec.to_builtins)
    except RecursionError as error:
        raise DataError(f"it is nested too deep: {error}") from error
    digest = hashlib.sha256(text.encode()).digest()
    value = int.from_bytes(digest[:16])
    value = value & ~(0xF << 76) | 0x8 << 76  # version
    value = value & ~(0x3 << 62) | 0x2 << 62  # variant
    return str(UUID(int=value))
