"""Writes and reads the files of a dataset, in any format."""

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
"""The dataset card, which the hub and `datasets` read."""

PROVENANCE = "provenance.jsonl"
"""File with the provenance of rows, in the order of the files' rows, all of `train` before `test`."""


class Sink(Protocol):
    """Writes a dataset's files in one format."""

    def write(self, split: Split, lines: bytes) -> None:
        """Write rows, each one line of JSON in the form of `read_row`, in the order of the dataset."""

    def close(self) -> None:
        """Finish the files."""


def sink_for(format: Format, kind: Kind, folder: Path) -> Sink:
    """Return a sink that writes rows of a kind to a folder.

    Raises:
        ConfigError: the format does not exist, or does not support this kind.
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
    """Return a function that tests whether a row, given as a line, fits the format; None: every row does."""
    shape = SHAPES.get(format, {}).get(kind)
    return None if shape is None else lambda line: shape(read_row(kind, line)) is not None


def loading(
    folder: Path, kind: Kind, format: Literal["jsonl", "parquet"], occur: Collection[str] | None = None
) -> dict[str, Any]:
    """Return the metadata of a card from which `datasets` learns a dataset's splits and column types.

    Args:
        folder: the dataset.
        kind: the kind of its rows.
        format: the format of its files.
        occur: optional fields of a turn that occur in it; None: the files are searched for them.

    Parquet files have their types in them. For JSON lines `datasets` would infer the types from the first ten
    megabytes of `train`, and fail if the first name, principle or call comes later, or only in `test`.
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
    """Yield one line of JSON for each row of a dataset, with at least its Provenance, `id` first."""
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
    """Yield the rows of a dataset in one of our own formats.

    Raises:
        DataError: a file cannot be read, or a line is not a row of this kind; the message says which.
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
    """Writes lines unchanged to `train.jsonl` and `test.jsonl`."""

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
    """Writes JSON lines, and records which optional fields of a turn occur in them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._occur: set[str] = set()

    def write(self, split: str, lines: bytes) -> None:
        self._occur |= optional_in(lines)
        super().write(split, lines)


class _Rows(_Noted):
    """Writes rows unchanged as JSON lines, and a card from which `datasets` learns the columns."""

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
    """Writes JSON lines first, then converts them to Parquet once it is known which fields occur."""

    ROWS = 1024
    """Rows per row group, and the maximum number in memory."""

    def __init__(self, folder: Path, columns: Callable[[frozenset[str]], Feature]) -> None:
        super().__init__(folder)
        self.columns = columns
        try:
            import pyarrow.parquet  # noqa: F401 - imported here to fail before anything is converted
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
                    # pyarrow cannot build a JSON column from Python values, but can cast one from text.
                    out.write_table(pyarrow.Table.from_pylist(rows, plain).cast(schema))
            lines.unlink()


class _Shaped:
    """Writes converted rows of a foreign format to another sink, with provenance and a config."""

    def __init__(self, format: Format, kind: Kind, shape: Shape, folder: Path, files: _JsonLines) -> None:
        self.format = format
        self.kind = kind
        self.shape = shape
        self.folder = folder
        self.files = files
        self._provenance = (folder / PROVENANCE).open("wb")
        self._of_test = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed at the end

    def write(self, split: Split, lines: bytes) -> None:
        each = lines.splitlines(keepends=True)  # JSON escapes all other line-end characters
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
