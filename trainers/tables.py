"""Reads files of rows: JSON lines, a JSON array or Parquet; files of prompts also as CSV or text.

rows           the rows of a file, each with its number
each           the same, with an error in the place of each row that cannot be read
parquet        the rows of a Parquet file
without_nulls  a row without the nulls that Arrow added
prompts_in     the user messages of a file of prompts
prompt_rows    the rows of a file of prompts
prompt_in      the prompt of such a row
user_messages  the user messages in the prompt of such a row
text_in        the text of a message

The format follows from the file's name: `.jsonl` and `.ndjson`, `.json` (an array, an object that contains
one, a single row; or lines, as such files often have), `.parquet`. All except Parquet may be compressed
(`.gz`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from cai_graph.errors import ConfigError, DataError, MissingExtra
from cai_graph.trajectory import Message, text_of

__all__ = [
    "COLUMNS",
    "Row",
    "each",
    "parquet",
    "prompt_in",
    "prompt_rows",
    "prompts_in",
    "rows",
    "text_in",
    "user_messages",
    "without_nulls",
]

Row = dict[str, Any]

_JSON = (".jsonl", ".ndjson", ".json")
_BATCH = 1000


def rows(path: Path, *, bare: str | None = None) -> Iterator[tuple[int, Row]]:
    """Yield each row with its number from 1: the line number, or the position in an array or in Parquet.

    Args:
        path: the file.
        bare: if given, a value that is not an object is accepted, too, as a row with this key.

    Raises:
        ConfigError: the file's name does not end in a known format.
        DataError: the file, or a row, cannot be read; names file and row.
        MissingExtra: the file is Parquet, and pyarrow is not installed.
    """
    for number, row in each(path, bare=bare):
        if isinstance(row, DataError):
            place = "row" if _form(path) == ".json" else "line"
            raise DataError(f"{path} {place} {number}: {row}") from row
        yield number, row


def each(path: Path, *, bare: str | None = None) -> Iterator[tuple[int, Row | DataError]]:
    """Yield the same as `rows`, but for a row that cannot be read yield its error.

    Raises the errors of `rows` for the file, but not for a row.
    """
    form = _form(path)
    if form == ".parquet":
        yield from enumerate(parquet(path), 1)
        return
    if form not in _JSON:
        ends = ", ".join((*_JSON, ".jsonl.gz", ".json.gz"))
        raise ConfigError(f"{path}: the name does not say how it is written; end it in {ends} or .parquet")
    with _opened(path) as file:
        for number, value in _values(file, form, bare=bare is not None):
            if isinstance(value, dict | DataError):
                yield number, value
            elif bare is not None:
                yield number, {bare: value}
            else:
                yield number, DataError(f"a row is an object, found {type(value).__name__}")


def parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a Parquet file, with no more than one batch in memory.

    Args:
        path: the file.
        columns: the columns to read; all by default.

    Raises:
        DataError: the file cannot be read.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("a Parquet file", "pyarrow", "train") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH, columns=columns):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def without_nulls(value: Any) -> Any:
    """Return a value without the fields that are null, and with the arguments of tool calls as objects.

    Arrow adds, as nulls, the fields that other rows have, and stores arguments, whose fields differ from call
    to call, as text; chat templates fail on both. Arguments that are not JSON are returned unchanged.
    """
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        present = {key: without_nulls(item) for key, item in value.items() if item is not None}
        if "name" in present and isinstance(written := present.get("arguments"), str):
            present["arguments"] = _arguments(written)
        return present
    return value


def _arguments(written: str) -> Any:
    try:
        return json.loads(written) if written.strip() else {}
    except ValueError:
        return written


def _form(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed; an error while it is read in the body is raised with its path."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield cast("BinaryIO", file)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _values(file: BinaryIO, form: str, *, bare: bool) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON file, each with its number; for a malformed line, its error."""
    lines = _lines(file)
    begun = list(islice(lines, 2))
    table = _table(file, begun, form, bare=bare)
    if table is not None:
        yield from enumerate(table, 1)
        return
    for number, line in chain(begun, lines):
        yield number, _value(line)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | DataError]]:
    """Yield the lines that are not blank, without a leading byte order mark."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield number, text
    except (EOFError, zlib.error) as error:
        yield number + 1, DataError(f"the compressed file is cut off or damaged: {error}")


def _value(text: bytes | DataError) -> Any:
    if isinstance(text, DataError):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"not JSON: {error}")


def _table(
    file: BinaryIO, begun: Sequence[tuple[int, bytes | DataError]], form: str, *, bare: bool
) -> list[Any] | None:
    """Return the rows of a file that is one JSON value; None if each line is a value.

    The first two lines decide, so that a file of lines is never read into memory as a whole. An array is
    recognised whatever the file's name is.
    """
    if not begun:
        return None
    (_, first), *more = begun
    is_array = isinstance(first, bytes) and first.lstrip().startswith(b"[")
    found = _value(first)
    if isinstance(found, DataError):
        if not is_array and form != ".json":
            return None
        after = file.tell()
        file.seek(0)
        found = _value(file.read())
        if isinstance(found, DataError):
            if is_array and form == ".json":
                raise ValueError(str(found))
            file.seek(after)
            return None
    elif more or (form != ".json" and not (isinstance(found, list) and _holds_rows(found, bare=bare))):
        return None
    return _rows_in(found, bare=bare)


def _holds_rows(array: list[Any], *, bare: bool) -> bool:
    """Return whether an array contains rows, and is not a single prompt (messages, or a user's turns)."""
    return not bare or all(isinstance(item, dict) and "role" not in item for item in array)


def _is_row(found: Row) -> bool:
    """Return whether an object is a single row, and not a table of columns or an object around an array."""
    if not found.keys().isdisjoint(("chosen", "rejected", "completion", "messages", "turns")):
        return True
    asked = prompt_in(found)
    if isinstance(asked, list):  # messages, not a column of prompts
        return all(isinstance(message, dict) and "role" in message for message in asked)
    return isinstance(asked, str)


def _rows_in(found: Any, *, bare: bool) -> list[Any]:
    """Return the rows of a parsed JSON file: an array, an object with exactly one array, or a single row."""
    if isinstance(found, list):
        return found
    if isinstance(found, dict):
        if _is_row(found):
            return [found]
        arrays = [value for value in found.values() if isinstance(value, list)]
        if len(arrays) == 1 and (bare or all(isinstance(item, dict) for item in arrays[0])):
            return arrays[0]
    raise ValueError(
        f"it holds a JSON {'object' if isinstance(found, dict) else type(found).__name__}; give an array of "
        "rows, an object with one array in it, or JSON lines"
    )


# --- sets of prompts ----------------------------------------------------------------------------------


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
"""Columns that may contain a row's prompt, the first match first; in lower case or capitalized."""

_BESIDE = {"behavior": "ContextString", "instruction": "input"}
"""The column with the text that a prompt refers to, by the prompt's column, in HarmBench and Alpaca."""


def prompts_in(path: Path) -> Iterator[str]:
    """Yield the user messages in a file of prompts. Raises the errors of `prompt_rows`."""
    for row in prompt_rows(path):
        yield from user_messages(row)


def user_messages(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of the user messages in the prompt of a row."""
    found = prompt_in(row)
    if isinstance(found, str):
        yield found
    elif isinstance(found, list):  # messages, or the user's turns
        for message in found:
            if isinstance(message, str):
                yield message
            elif isinstance(message, dict) and message.get("role") == "user":
                yield text_in(message)


def prompt_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of prompts: a format of `rows`, CSV, or otherwise text with a prompt per line.

    A text or a list of messages in the place of a row becomes a row with it as the `prompt`.

    Raises:
        DataError: the file, or a row, cannot be read.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    form = _form(path)
    if form in (*_JSON, ".parquet"):
        for _, row in rows(path, bare="prompt"):
            yield row
        return
    # Spreadsheets write a byte order mark, which would become a part of the first prompt or column name.
    with _opened(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        if form == ".csv":
            yield from csv.DictReader(text)
        else:
            yield from ({"prompt": line.rstrip("\r\n")} for line in text if line.strip())


def prompt_in(row: Mapping[str, Any]) -> Any:
    """Return the value of a row's prompt column: a text, messages, or a user's turns; None without one.

    If the row has the text that the prompt refers to in a separate column, it is appended to the prompt. A
    pair of whole conversations without a prompt column gives the conversation in `chosen`.
    """
    names = (name for column in COLUMNS for name in (column, column.capitalize()))
    name = next((name for name in names if row.get(name)), None)
    if name is None:
        return chosen if isinstance(chosen := row.get("chosen"), list) else None
    asked, about = row[name], row.get(_BESIDE.get(name.lower(), ""))
    if isinstance(asked, str) and isinstance(about, str) and about.strip():
        return f"{asked}\n\n{about}"
    return asked


def text_in(message: Mapping[str, Any]) -> str:
    """Return the text of a message in the providers' form: a text, or parts, some of which are texts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, str | dict)] if isinstance(content, list) else []
    return text_of(Message(role="user", content=parts))
