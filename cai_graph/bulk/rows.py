"""Reads files of rows, in JSONL, CSV or text: each row becomes a Prompt or an Answer, or is Broken."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from langchain_core.messages import BaseMessage, HumanMessage, convert_to_messages

from cai_graph.errors import ConfigError, DataError
from cai_graph.messages import from_langchain
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Message

__all__ = ["Answer", "Broken", "Format", "Prompt", "Rows"]

Format = Literal["jsonl", "csv", "text"]
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}

_FIRST = 20
"""How many rows `Rows.check` reads to find the column of the prompt."""


@dataclass(frozen=True)
class Prompt:
    """A row with a prompt."""

    index: int
    """Place among the rows, from 0; blank lines do not count."""
    line: int
    """Line of the file in which it begins, from 1."""
    messages: list[BaseMessage]
    """The conversation."""
    metadata: dict[str, Any]
    """The row's other fields that are text, numbers or booleans."""


@dataclass(frozen=True)
class Answer:
    """A row with an answer."""

    index: int
    """Place among the rows, from 0."""
    line: int
    """Line of the file in which it begins, from 1."""
    id: Any
    """The row's `id`, or else its index."""
    exchange: Exchange
    """The answer, in its conversation."""


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read."""

    index: int
    """Place among the rows, from 0."""
    line: int
    """Line of the file in which it begins, from 1."""
    id: Any
    """The row's `id`, or else its index."""
    why: str
    """What was found, and what to do."""


class Rows:
    """An open file of rows. Each iteration starts from its first row.

    An input that cannot be read twice, such as standard input, is copied to a temporary file first.
    """

    def __init__(self, path: str, format: Format | None = None) -> None:
        """Open `path`; `-` is standard input. By default the file name's suffix decides the format.

        Raises:
            ConfigError: no format is given and the file name has none of the known suffixes.
            DataError: the file cannot be read.
        """
        if path != "-" and Path(path).is_dir():
            raise DataError(f"{path} is a directory; name a file")
        suffix = Path(path).suffix.lower()
        chosen = format or _SUFFIXES.get(suffix)
        if chosen is None:
            found = (
                "standard input has no name to" if path == "-" else f"the name {Path(path).name!r} does not"
            )
            raise ConfigError(f"{found} say how the rows are written; add --format jsonl, csv or text")
        self.name = "standard input" if path == "-" else path
        """Name of the file in messages."""
        self.format: Format = chosen
        """Format of the file."""
        self._file = _readable_twice(path)
        self.digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        """sha256 of the file's bytes, in hex."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def check(self, column: str | None = None) -> None:
        """Read the first rows, and raise an error where they show that the file has no prompts.

        Raises:
            ConfigError: none of these rows has the column or key of the prompt; the message names the keys.
            DataError: the file has no rows, or cannot be read.
        """
        self._file.seek(0)
        if all(not line.strip() for _, line in _lines(self._file)):
            raise DataError(f"{self.name} holds no row; give it a prompt at least")
        first = [row for _, _, row in islice(self._each(column), _FIRST)]
        if not first:
            raise DataError(f"{self.name} holds no row; give it a prompt at least")
        rows = [row for row in first if not isinstance(row, str)]
        wanted = ("messages", "prompt") if column is None else (column,)
        if rows and not any(key in row for row in rows for key in wanted):
            found = ", ".join(map(repr, dict.fromkeys(key for row in rows for key in row))) or "(none)"
            named = " or ".join(map(repr, wanted))
            raise ConfigError(
                f"no key {named}: the file's rows have the keys {found}; say which with --column"
            )

    def prompts(self, column: str | None = None) -> Iterator[Prompt | Broken]:
        """Yield each row as a Prompt.

        Args:
            column: column or key of the prompt; by default `messages` or `prompt`, in a CSV file `prompt` or
                the only column. An only column whose name contains a `;` or a tab must be given here. A text
                file has one prompt in each line, and no columns.

        Raises:
            ConfigError: the file has no such column.
            DataError: the file cannot be read, or its separator is not a comma.
        """
        for index, line, row in self._each(column):
            if isinstance(row, str):
                yield Broken(index, line, index, row)
                continue
            try:
                key = column or ("messages" if "messages" in row else "prompt")
                yield Prompt(index, line, _asking(_conversation(row, key), key), _scalars(row, without=key))
            except DataError as error:
                yield Broken(index, line, row.get("id", index), str(error))

    def answers(self) -> Iterator[Answer | Broken]:
        """Yield each row as an Answer: `prompt` and `response`, or `messages` that end in the answer.

        Raises:
            DataError: the file cannot be read.
        """
        for index, line, row in self._each(None):
            if isinstance(row, str):
                yield Broken(index, line, index, row)
                continue
            id = row.get("id", index)
            try:
                yield Answer(index, line, id, _exchange(row))
            except DataError as error:
                yield Broken(index, line, id, str(error))

    def _each(self, column: str | None) -> Iterator[tuple[int, int, dict[str, Any] | str]]:
        """Yield the index and line of each row, with the row or, as text, what is wrong with it."""
        self._file.seek(0)
        read = {"jsonl": _jsonl, "csv": _csv, "text": _text}[self.format]
        try:
            if self._file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{self.name}: is written in UTF-16; save the file as UTF-8")
            for index, (line, row) in enumerate(read(self._file, column)):
                yield index, line, row
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror}") from error


_File = io.BufferedReader | io.BufferedRandom


def _readable_twice(path: str) -> _File:
    try:
        if path == "-":
            if sys.stdin is None:
                raise DataError("standard input is closed; name a file, or redirect one into it")
            return _copy(sys.stdin.buffer)
        file = open(path, "rb")  # noqa: SIM115 - `Rows.close`
        if file.seekable():
            return file
        with file:
            return _copy(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _copy(file: BinaryIO) -> _File:
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - `Rows.close`
    shutil.copyfileobj(file, copy)
    copy.seek(0)
    return copy


_Read = Iterator[tuple[int, dict[str, Any] | str]]


def _text(file: _File, column: str | None) -> _Read:
    if column is not None:
        raise ConfigError(f"text has one prompt a line and no column {column!r}; leave --column out")
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            yield number, {"prompt": line.decode("utf-8").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield number, f"not UTF-8: {error.reason} at byte {error.start} of the line"


def _jsonl(file: _File, column: str | None) -> _Read:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            # Decoded here, since `json` would guess the encoding of bytes for each line.
            row = json.loads(line.decode("utf-8-sig", "surrogatepass"))
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON: {error}"
            continue
        if isinstance(row, str):
            row = {column or "prompt": row}
        if isinstance(row, dict):
            yield number, {key: value for key, value in row.items() if value is not None}
        else:
            yield number, f"a row is an object, found {type(row).__name__}"


def _lines(file: _File) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, 1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _csv(file: _File, column: str | None) -> _Read:
    # Bytes that are not UTF-8 become lone surrogates, so that one bad row does not stop the reading.
    csv.field_size_limit(1 << 30)
    texts = (line.decode("utf-8", "surrogateescape") for _, line in _lines(file))
    # A line may end in a bare carriage return.
    lines = _Lines(line for text in texts for line in io.StringIO(text, newline=""))
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"the header in line 1 is not CSV: {error}; name the columns there") from error
    if (
        len(header) == 1
        and column != header[0]
        and (mark := next((m for m in ";\t" if m in header[0]), None))
    ):
        raise DataError(
            f"the columns of the header {header[0]!r} are separated by {mark!r}, and those of CSV by ','; "
            "save the file with commas, or, where it is one column, name it with --column"
        )
    wanted = column or (header[0] if len(header) == 1 else "prompt")
    if wanted not in header:
        found = f"the file has the columns {', '.join(map(repr, header)) or '(none)'}"
        raise ConfigError(f"no column {wanted!r}: {found}; say which with --column")
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise DataError(f"the header names the column {twice!r} twice; give one another name, or none")
    while True:
        line = lines.begin()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            why = f"not CSV: {error}"
            if lines.number > line:
                why += f", in line {lines.number}; is a quote of line {line} not closed?"
                lines.go_back(to=line + 1)
            yield line, why
            continue
        if not fields:
            continue
        if len(fields) != len(header):
            yield line, f"{len(fields)} fields, and the header has {len(header)}; is a quote missing?"
        elif any("\udc80" <= char <= "\udcff" for item in fields if not item.isascii() for char in item):
            yield line, "not UTF-8; save the file as UTF-8"
        else:
            row: dict[str, Any] = dict(zip(header, fields, strict=True))
            if column is None:
                row["prompt"] = row.pop(wanted)
            yield line, row


class _Lines:
    """An iterator over the lines of a file that can go back to a line of the current row."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self._row: list[str] = []
        self.number = 0
        """How many lines have been returned."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._row.append(line)
        self.number += 1
        return line

    def begin(self) -> int:
        """Begin a new row, and return the number of its first line."""
        self._row.clear()
        return self.number + 1

    def go_back(self, to: int) -> None:
        """Go back, so that the next line is the one of this number."""
        again = self._row[to - 1 - self.number :]
        self._again.extendleft(reversed(again))
        self.number -= len(again)


def _conversation(row: Mapping[str, Any], key: str) -> list[BaseMessage]:
    if key not in row:
        found = ", ".join(map(repr, row)) or "(none)"
        raise DataError(f"no {key!r} among the keys {found}; say where the prompt is with --column")
    value = row[key]
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{key!r} is empty")
        return [HumanMessage(value)]
    if not isinstance(value, list) or not value:
        raise DataError(f"{key!r} is text or a list of messages, found {str(value)[:60]!r}")
    try:
        return convert_to_messages(value)
    except Exception as error:  # LangChain raises many classes here, all about the messages
        raise DataError(f"{key!r} is no list of messages: {str(error).splitlines()[0][:200]}") from error


def _asking(messages: list[BaseMessage], key: str) -> list[BaseMessage]:
    """Return `messages`, after checking that they can be answered.

    Raises:
        DataError: they end in an answer, or have no text by the user.
    """
    if messages[-1].type == "ai":
        raise DataError(
            f"{key!r} end in an answer; `cai judge` judges it, or leave it out to have another one written"
        )
    asked = [message.content for message in messages if message.type == "human"]
    if not asked:
        raise DataError(f"{key!r} hold no message of the role 'user'")
    last = asked[-1]
    if not (last.strip() if isinstance(last, str) else last):
        raise DataError(f"the last message of the role 'user' in {key!r} is empty")
    return messages


def _scalars(row: Mapping[str, Any], *, without: str) -> dict[str, Any]:
    return {
        key: value
        for key, value in row.items()
        if key and key != without and isinstance(value, str | int | float)
    }


def _exchange(row: Mapping[str, Any]) -> Exchange:
    if "messages" in row and "response" not in row:
        *before, last = map(from_langchain, _conversation(row, "messages"))
        if last.role != "assistant":
            raise DataError(f"'messages' end in a message of the role {last.role!r}; the answer comes last")
        return Exchange(messages=tuple(before), answer=last)
    response = row.get("response")
    if not isinstance(response, str):
        found = ", ".join(map(repr, row)) or "(none)"
        raise DataError(f"no text under 'response' among the keys {found}; a row has prompt and response")
    asked = _conversation(row, "messages" if "messages" in row else "prompt")
    return Exchange(
        messages=tuple(map(from_langchain, asked)), answer=Message(role="assistant", content=response)
    )
