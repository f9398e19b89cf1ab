"""Copies records between logs and files: `export` to JSONL or Parquet, `import_` from either."""

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

from cai_graph import atomic
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
    """Write the records that match the filters to a file, and return their number.

    Comparisons, reviews and feedback are exported together with their Trajectory, and never without it: the
    filter `with_appended` of `Filters` is always set here.

    The file is written atomically, readable by its owner only. In JSONL each record is one line. In Parquet
    it is one row, with columns for filters and plots, and the whole record as JSON in `json`. `import_`
    restores records from both byte for byte.

    Args:
        url: the log.
        path: the file to write; an existing file is replaced.
        format: `jsonl` or `parquet`; by default it follows from the suffix of the file's name.
        filters: see `Filters`.

    Raises:
        ConfigError: the format is neither given nor clear from the name; or the path names the log itself, or
            something that is not a regular file.
        MissingExtra: the format is Parquet, and pyarrow is not installed.
        LogError: the log cannot be read, or the file cannot be written.
    """
    target = Path(path)
    place = place_of(url)
    if place.path is not None and os.path.realpath(target) in {f"{place.path}{end}" for end in _OF_A_LOG}:
        raise ConfigError(f"{target}: is the log itself; name another file")
    # If this check itself fails, writing raises an error with the reason.
    if os.path.exists(target) and not os.path.isfile(target):
        raise ConfigError(f"{target}: is not a plain file; name one")
    target = target.resolve()  # write the target of a symbolic link, and keep the link
    chosen = format or _SUFFIXES.get(target.suffix.lower())
    if chosen is None:
        raise ConfigError(f"{target}: the name does not say which format; end it in .jsonl or .parquet")
    filters["with_appended"] = True
    write = _write_jsonl if chosen == "jsonl" else _parquet_writer()
    with open_log(url, read_only=True) as log:
        try:
            with atomic.file(target, mode=0o600) as work, work.open("wb") as file:
                count = write(log, filters, file)
            atomic.sync_folder(target.parent)
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
    """Return the modules `pyarrow` and `pyarrow.parquet`."""
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
    """Yield lists of lines, each as large as an import appends at once: some hundreds, of a few megabytes."""
    return _groups(lines, _WINDOW, _WINDOW_BYTES)


def _groups(lines: Iterable[bytes], count: int, size: int) -> Iterator[list[bytes]]:
    """Yield groups of `count` lines; a group with more than `size` bytes ends early."""
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
    # Parquet's strings are UTF-8, which has no lone surrogates; the column `json` has them escaped.
    return None if text is None else text.encode("utf-8", "replace").decode()


# --- import -------------------------------------------------------------------------------------------


class BrokenLine(NamedTuple):
    """A line that was skipped."""

    line: int
    """Its number, from 1."""
    what: str
    """The reason."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """What `import_` did with each line."""

    records: int
    """Records of a log that were added."""
    demonstrations: int
    """Demonstrations that were added, each as a Trajectory with the mode `imported`."""
    present: int
    """Lines whose record was already in the log."""
    removed: int
    """Lines whose record `gc` removed from this log; they are not added again."""
    broken: tuple[BrokenLine, ...]
    """Lines that were skipped."""
    truncated: bool
    """Whether the last line is incomplete, as when its writer was interrupted."""


_DEMONSTRATION = ("prompt", "draft", "critique", "revision", "principle", "label")
IMPORTED = ConstitutionRef(name="imported", version="1", digest=hashlib.sha256(b"imported").hexdigest())


def import_(
    url: str | os.PathLike[str], path: str | os.PathLike[str], *, redact: Redactor | None = None
) -> Import:
    """Add the records of a file to a log; a line that cannot be read is reported and skipped.

    The file is JSONL, or Parquet as `export` writes it, each row of which is a line. A line is a record as
    `export` writes it, or a demonstration that a person wrote: an object with `prompt`, `draft` and, where
    they apply, `critique`, `revision`, `principle` and `label` (default: `VIOLATES` if there is a revision,
    otherwise `COMPLIES`); without a principle the label is for the whole answer. Other keys go to `metadata`.
    A record whose id is already in the log is not added again; a demonstration's id is derived from its
    content after redaction. One whose redaction fails is added at every import.

    Args:
        url: the log; created if it does not exist.
        path: the file; its format is detected from its first bytes.
        redact: see `open_log`.

    Raises:
        DataError: the file cannot be read.
        MissingExtra: it is Parquet, and pyarrow is not installed.
        LogError: the log cannot be written; earlier lines may be in it, and a repeated import adds the rest.
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
        lines = _parquet_lines(file, source) if parquet else file  # before open_log, which may create the log
        with open_log(url) as log:
            importer = _Importer(log, redact)
            for window in windows(lines):
                importer.take(window)
            return importer.result()


def _parquet_lines(file: BinaryIO, source: Path) -> Iterator[bytes]:
    """Return the records of a Parquet export, as the lines of one in JSONL.

    Raises:
        DataError: the file is not a Parquet export, or damaged; damage may be found only while it is read.
    """
    pa, pq = _pyarrow("a Parquet import")
    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source}: is no whole Parquet file: {error}") from error
    found = table.schema_arrow
    texts = (pa.string(), pa.large_string(), pa.string_view())  # pandas and polars write the last two
    if "json" not in found.names or found.field("json").type not in texts:
        raise DataError(f"{source}: has no column 'json' of texts, which `cai log export` writes")

    def read() -> Iterator[bytes]:
        try:
            for group in range(table.num_row_groups):  # a batch over several would be as large as all of them
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
            except Duplicate:  # another import has just added it
                self._meet(read)
                continue
            except DataError as error:
                self.broken.append(BrokenLine(read.number, str(error)))
                continue
            self.demonstrations += read.demonstration
            self.records += not read.demonstration

    def _meet(self, read: _Line) -> None:
        """Count a line whose id is in the log or was removed from it."""
        try:
            stored = self.log.get(read.record.id)
        except DataError:
            self.removed += 1
            return
        self._compare(read, stored)

    def _compare(self, read: _Line, other: Record) -> None:
        # Demonstrations with one id have equal content; a redacted record differs from its line on purpose.
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
    """The line, if it can be stored unchanged, so that a new export yields the same bytes; else None."""
    demonstration: bool


def _parse(number: int, line: bytes, redact: Redactor | None) -> _Line:
    try:
        # Decoded here, since `json` would guess the encoding of bytes, for each line anew.
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
    """Return the record as a log with this hook would store it."""
    if redact is None:
        return record
    stored = decode(redacted_row(encode(record), redact).payload)
    assert isinstance(stored, type(record))
    return stored


def under_content_id(record: R, content: Sequence[Any]) -> R:
    """Return the record with the id derived from `content`; a withheld record keeps its own id.

    `content` is taken after redaction: a digest of the original would let a reader confirm a guess.
    """
    return record if is_withheld(record) else msgspec.structs.replace(record, id=content_id(content))


def content_id(content: Sequence[Any]) -> str:
    """Return a UUIDv8 (RFC 9562, section 5.8) derived from the content: JSON values and parts of records.

    Raises:
        DataError: the content is nested too deep.
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
