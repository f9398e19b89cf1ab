"""Evaluation sets that no training row may come from.

A prompt is held out where one of its user messages is the same text, normalised, as a prompt of the set, or
shares 13 words in a row with one (the n-gram of Brown et al. 2020, appendix C).
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from xxhash import xxh3_64_intdigest

from cai_graph.errors import DataError, MissingExtra
from cai_graph.trajectory import Message, text_of
from trainers.dataset.split import key_of, normalise
from trainers.rows import Turn

__all__ = ["COLUMNS", "HeldOut", "prompt_in", "prompts_in", "read_set", "text_in"]

_WORDS = 13
COLUMNS = (
    "prompt",
    "question",
    "goal",
    "behavior",
    "forbidden_prompt",
    "instruction",
    "input",
    "text",
    "turns",
    "messages",
)
"""Where a set's prompts may stand, the first that is there, in small letters or with a capital."""


class HeldOut:
    """The prompts of evaluation sets."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Read the sets: JSONL, JSON (an array, or an object that holds one), CSV, Parquet, or text (a prompt
        a line); may end in .gz.

        Raises:
            DataError: a file cannot be read, or holds no prompt.
            MissingExtra: a file is Parquet, and pyarrow is not installed.
        """
        self._keys: set[bytes] = set()
        self._grams: set[int] = set()
        for path in paths:
            found = False
            for text in prompts_in(Path(path)):
                if normal := normalise(text):
                    found = True
                    self._keys.add(key_of(text))
                    self._grams.update(_grams(normal))
            if not found:
                raise DataError(f"{path}: holds no prompt; its column is one of {', '.join(COLUMNS)}")

    def holds(self, prompt: Iterable[Turn]) -> bool:
        """Return whether a user message of the conversation stands in one of the sets."""
        return any(turn.role == "user" and self._has(turn.content) for turn in prompt)

    def _has(self, text: str) -> bool:
        if key_of(text) in self._keys:
            return True
        return bool(self._grams) and any(gram in self._grams for gram in _grams(normalise(text)))


def _grams(normal: str) -> Iterator[int]:
    words = normal.split(" ")
    for start in range(len(words) - _WORDS + 1):
        yield xxh3_64_intdigest(" ".join(words[start : start + _WORDS]).encode("utf-8", "surrogatepass"))


def prompts_in(path: Path) -> Iterator[str]:
    """Yield the user messages in a set of prompts, in one of the forms that `HeldOut` reads.

    Raises:
        DataError: it cannot be read.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    for row in map(prompt_in, read_set(path)):
        if isinstance(row, str):
            yield row
        elif isinstance(row, list):  # messages, or the user's turns
            for message in row:
                if isinstance(message, str):
                    yield message
                elif isinstance(message, dict) and message.get("role") == "user":
                    yield text_in(message)


def read_set(path: Path) -> Iterator[Any]:
    """Yield the rows of an evaluation set in one of the forms that `HeldOut` reads: a dict or a text each.

    Raises:
        DataError: the file cannot be read.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    try:
        suffixes = [suffix.lower() for suffix in path.suffixes]
        packed = suffixes[-1:] == [".gz"]
        kind = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
        if kind == ".parquet":
            yield from _parquet(path)
            return
        # Spreadsheets write a mark in front, which would be a part of the first prompt or column.
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file:
            yield from _rows(file, kind)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def prompt_in(row: Any) -> Any:
    """Return what stands in the prompt's column of a row: a text, messages, or a user's turns; else None."""
    if not isinstance(row, dict):
        return row
    return next(
        (row[name] for column in COLUMNS for name in (column, column.capitalize()) if row.get(name)), None
    )


def text_in(message: Mapping[str, Any]) -> str:
    """Return the text of a message as providers write it: a text, or parts of which some are texts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, str | dict)] if isinstance(content, list) else []
    return text_of(Message(role="user", content=parts))


def _rows(file: TextIO, suffix: str) -> Iterator[Any]:
    if suffix in (".jsonl", ".ndjson"):
        for line in file:
            if line.strip():
                yield json.loads(line)
    elif suffix == ".json":
        yield from _array(json.load(file))
    elif suffix == ".csv":
        yield from csv.DictReader(file)
    else:
        yield from (line.rstrip("\r\n") for line in file if line.strip())


def _array(found: Any) -> list[Any]:
    """Return the array that a JSON file is, or the only one in the object that it is."""
    if isinstance(found, list):
        return found
    if isinstance(found, dict):
        arrays = [value for value in found.values() if isinstance(value, list)]
        if len(arrays) == 1 and not isinstance(prompt_in(found), str):
            return arrays[0]
    raise ValueError(
        f"it holds a JSON {'object' if isinstance(found, dict) else type(found).__name__}; give an array of "
        "prompts, an object with one array in it, or JSON lines"
    )


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("an evaluation set in Parquet", "pyarrow", "train") from error
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()
