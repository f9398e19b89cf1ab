"""A dataset's files, written and read again in any format."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import yaml

from cai_graph.errors import ConfigError, DataError, MissingExtra
from trainers import tables
from trainers.export.configs import axolotl_config, llama_factory_info
from trainers.export.features import Feature, for_card, optional_in, rows_features, verl_features
from trainers.export.parquet import schema_of
from trainers.export.shapes import FORMATS, SHAPES, Format, Shape
from trainers.rows import KINDS, Kind, Provenance, Row, Split, provenance_of, read_row

__all__ = ["CARD", "PROVENANCE", "Sink", "fits_in", "loading", "provenances", "read_rows", "sink_for"]

CARD = "README.md"
"""What the hub and `datasets` read about a dataset."""

PROVENANCE = "provenance.jsonl"
"""Where rows came from, in the order of the files' rows, all of `train` before `test`."""


class Sink(Protocol):
    """What writes a dataset's files in one format."""

    def write(self, split: Split, lines: bytes) -> None:
        """Write rows, each one line of JSON as `read_row` reads it, in the order of the dataset."""

    def close(self) -> None:
        """Finish the files."""


def sink_for(format: Format, kind: Kind, folder: Path) -> Sink:
    """Return what writes rows of a kind into a folder.

    Raises:
        ConfigError: there is no such format, or it has no place for this kind.
        MissingExtra: the format is Parquet, and pyarrow is not installed.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is one of {', '.join(FORMATS)}; found {format!r}")
    if format == "jsonl":
        return _Rows(folder, kind)
    if format == "parquet":
        return _Parquet(folder, partial(rows_features, KINDS[kind]))
    shapes = SHAPES[format]
    if kind not in shapes:
        raise ConfigError(f"{format} has no place for the kind {kind!r}; it takes {', '.join(shapes)}")
    files = _Parquet(folder, partial(verl_features, kind)) if format == "verl" else _JsonLines(folder)
    return _Shaped(format, kind, shapes[kind], folder, files)


def fits_in(format: Format, kind: Kind) -> Callable[[bytes], bool] | None:
    """Return whether the format holds a row whole, as a function of its line; None: it holds every row."""
    shape = SHAPES.get(format, {}).get(kind)
    return None if shape is None else lambda line: shape(read_row(kind, line)) is not None


def loading(
    folder: Path, kind: Kind, format: Literal["jsonl", "parquet"], occur: Collection[str] | None = None
) -> dict[str, Any]:
    """Return what a card says to `datasets` of a dataset's files: the splits, and what columns hold.

    Args:
        folder: the dataset.
        kind: the kind of its rows.
        format: the format of its files.
        occur: optional fields of a turn that occur in it; None: it is read through for them.

    Parquet says itself what it holds. Of JSON lines `datasets` would go by the first ten megabytes of
    `train`, and fail where the first name, principle or call comes later, or stands in `test` alone.
    """
    files = {s: path for s in ("train", "test") if (path := folder / f"{s}.{format}").exists()}
    found = [{"split": split, "path": path.name} for split, path in files.items()]
    configs = {"configs": [{"config_name": "default", "data_files": found}]}
    if format == "parquet":
        return configs
    if occur is None:
        occur = {name for path in files.values() for line in _lines(path) for name in optional_in(line)}
    return {"dataset_info": {"features": for_card(rows_features(KINDS[kind], frozenset(occur)))}, **configs}


def provenances(folder: Path, format: Format) -> Iterator[bytes]:
    """Yield a line of JSON for each row of a dataset, with at least its Provenance, `id` first."""
    if format == "parquet":
        names = [field.name for field in msgspec.structs.fields(Provenance)]
        ordered = ["id", *(name for name in names if name != "id")]
        for path in sorted(folder.glob("*.parquet")):
            for row in tables.parquet(path, ordered):
                yield msgspec.json.encode({name: row[name] for name in ordered})
        return
    for path in sorted(folder.glob("*.jsonl")) if format == "jsonl" else [folder / PROVENANCE]:
        with path.open("rb") as file:
            yield from file


def read_rows(folder: Path, kind: Kind, format: Literal["jsonl", "parquet"]) -> Iterator[Row]:
    """Yield the rows of a dataset whose format holds them as they are.

    Raises:
        DataError: a file cannot be read, or a line is no row of this kind; says which.
    """
    for split in ("train", "test"):
        path = folder / f"{split}.{format}"
        if path.exists():
            for number, line in enumerate(_lines(path), 1):
                try:
                    yield read_row(kind, line)
                except msgspec.MsgspecError as error:
                    raise DataError(f"{path}: row {number} is no row of the kind {kind}: {error}") from error


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            yield from file
        return
    for row in tables.parquet(path):
        yield msgspec.json.encode(tables.without_nulls(row))


class _JsonLines:
    """`train.jsonl` and `test.jsonl`, made of lines as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}

    def write(self, split: str, lines: bytes) -> None:
        file = self._files.get(split)
        if file is None:
            file = self._files[split] = (self.folder / f"{split}.jsonl").open("wb")
        file.write(lines)

    def close(self) -> None:
        for file in self._files.values():
            with file:
                file.flush()
                os.fsync(file.fileno())


class _Noted(_JsonLines):
    """JSON lines of which it is noted, as they come, which optional fields of a turn occur."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._occur: set[str] = set()

    def write(self, split: str, lines: bytes) -> None:
        self._occur |= optional_in(lines)
        super().write(split, lines)


class _Rows(_Noted):
    """JSON lines of rows as they are, and a card by which `datasets` reads them."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        super().__init__(folder)
        self.kind = kind

    def close(self) -> None:
        super().close()
        metadata = yaml.safe_dump(loading(self.folder, self.kind, "jsonl", self._occur), sort_keys=False)
        said = (
            f"Rows of the kind `{self.kind}`, by `cai dataset build`. `cai dataset report` writes the card."
        )
        (self.folder / CARD).write_text(f"---\n{metadata}---\n\n{said}\n")


class _Parquet(_Noted):
    """`train.parquet` and `test.parquet`, made of JSON lines once it is known which fields occur."""

    ROWS = 1024
    """Rows of a row group, and at most so many in memory."""

    def __init__(self, folder: Path, columns: Callable[[frozenset[str]], Feature]) -> None:
        super().__init__(folder)
        self.columns = columns
        try:
            import pyarrow.parquet  # noqa: F401 - asked for before anything is converted
        except ImportError as error:
            raise MissingExtra("a dataset in Parquet", "pyarrow", "train") from error

    def close(self) -> None:
        import pyarrow
        import pyarrow.parquet

        super().close()
        columns = self.columns(frozenset(self._occur))
        plain, schema = schema_of(columns, as_json=False), schema_of(columns, as_json=True)
        for split in self._files:
            lines = self.folder / f"{split}.jsonl"
            target = self.folder / f"{split}.parquet"
            with lines.open("rb") as source, pyarrow.parquet.ParquetWriter(target, schema) as out:
                for rows in _stretches(source, self.ROWS):
                    # pyarrow makes no JSON column out of Python values, and casts one out of text.
                    out.write_table(pyarrow.Table.from_pylist(rows, plain).cast(schema))
            lines.unlink()


class _Shaped:
    """A foreign format: shaped rows in files of another sink, provenance and a config beside them."""

    def __init__(self, format: Format, kind: Kind, shape: Shape, folder: Path, files: _JsonLines) -> None:
        self.format = format
        self.kind = kind
        self.shape = shape
        self.folder = folder
        self.files = files
        self._provenance = (folder / PROVENANCE).open("wb")
        self._of_test = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed at the end

    def write(self, split: Split, lines: bytes) -> None:
        each = lines.splitlines(keepends=True)  # JSON escapes whatever else ends a line
        shaped = [self.shape(read_row(self.kind, line)) for line in each]
        self.files.write(split, b"".join(msgspec.json.encode(row) + b"\n" for row in shaped))
        file = self._provenance if split == "train" else self._of_test
        file.write(b"".join(map(provenance_of, each)))

    def close(self) -> None:
        self.files.close()
        with self._provenance as file, self._of_test as of_test:
            of_test.seek(0)
            shutil.copyfileobj(of_test, file)
            file.flush()
            os.fsync(file.fileno())
        splits = [split for split in ("train", "test") if any(self.folder.glob(f"{split}.*"))]
        if self.format == "llama-factory":
            info = {f"{self.kind}_{split}": llama_factory_info(self.kind, split) for split in splits}
            (self.folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
        if self.format == "axolotl":
            (self.folder / "datasets.yaml").write_text(
                yaml.safe_dump(axolotl_config(self.kind, splits), sort_keys=False)
            )


def _stretches(source: Any, count: int) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for line in source:
        rows.append(_arguments_as_text(json.loads(line)))
        if len(rows) == count:
            yield rows
            rows = []
    if rows:
        yield rows


def _arguments_as_text(row: dict[str, Any]) -> dict[str, Any]:
    for value in row.values():
        for turn in value if isinstance(value, list) else ():
            for call in turn.get("tool_calls", ()) if isinstance(turn, dict) else ():
                function = call["function"]
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return row
