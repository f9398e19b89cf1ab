"""Files of rows, as others write them: JSON lines, a JSON array, Parquet; sets of prompts also CSV or text.

rows           the rows of a file, each with its place
each           the same, where a row that cannot be read costs no other
parquet        the rows of a Parquet file alone
without_nulls  a row as it was before Arrow filled it up
prompts_in     the user messages of a set of prompts
prompt_rows    its rows; `prompt_in` is the prompt of one, `user_messages` what the user says there, `text_in`
               the text of a message

A file's name says how it is written: `.jsonl` and `.ndjson`, `.json` (an array, an object that holds one, a
row; or lines, which such files often are), `.parquet`. All but Parquet may be compressed (`.gz`).
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
    """Yield each row with its number from 1: its line, or in an array or in Parquet its place.

    Args:
        path: the file.
        bare: the key of a value that is no object, which is then a row, too.

    Raises:
        ConfigError: the file's name does not say how it is written.
        DataError: the file, or a row, cannot be read; names file and row.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    for number, row in each(path, bare=bare):
        if isinstance(row, DataError):
            place = "row" if _form(path) == ".json" else "line"
            raise DataError(f"{path} {place} {number}: {row}") from row
        yield number, row


def each(path: Path, *, bare: str | None = None) -> Iterator[tuple[int, Row | DataError]]:
    """Yield as `rows` does, and in the place of a row that cannot be read the error that says why.

    Raises as `rows` does for the file, not for a row.
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
    """Yield the rows of a Parquet file, of which no more than a batch is in memory.

    Args:
        path: the file.
        columns: which to read; all by default.

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

    Arrow fills in the fields that another row has, and knows arguments, which differ from call to call, as
    text; chat templates stumble over both. Arguments that are no JSON stay as they are.
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
    """Open a file, unpacked, and say of which file it is what goes wrong as it is read."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield cast("BinaryIO", file)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _values(file: BinaryIO, form: str, *, bare: bool) -> Iterator[tuple[int, Any]]:
    """Yield what a file of JSON holds, each value with its number; in a broken line's place its error."""
    lines = _lines(file)
    begun = list(islice(lines, 2))
    table = _table(file, begun, form, bare=bare)
    if table is not None:
        yield from enumerate(table, 1)
        return
    for number, line in chain(begun, lines):
        yield number, _value(line)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | DataError]]:
    """Yield the lines that are not blank, without the mark that some write in front."""
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
    """Return the rows of a file that is one JSON value; None: each line is one.

    The first two lines tell, so that a file of lines is never held in memory. An array is one whatever the
    file's name says.
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
    """Return whether an array is of rows, and not one prompt: messages, or a user's turns."""
    return not bare or all(isinstance(item, dict) and "role" not in item for item in array)


def _is_row(found: Row) -> bool:
    """Return whether an object is a row and no table, although what it holds may be arrays."""
    if not found.keys().isdisjoint(("chosen", "rejected", "completion", "messages", "turns")):
        return True
    asked = prompt_in(found)
    if isinstance(asked, list):  # messages, and not a column of prompts
        return all(isinstance(message, dict) and "role" in message for message in asked)
    return isinstance(asked, str)


def _rows_in(found: Any, *, bare: bool) -> list[Any]:
    """Return the array that a JSON file is, the only one in the object that it is, or the row that it is."""
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
"""Where a row's prompt may stand, the first that is there, in small letters or with a capital."""

_BESIDE = {"behavior": "ContextString", "instruction": "input"}
"""Where the text stands that a prompt is about, by its column: HarmBench's and Alpaca's."""


def prompts_in(path: Path) -> Iterator[str]:
    """Yield the user messages in a set of prompts. Raises as `prompt_rows`."""
    for row in prompt_rows(path):
        yield from user_messages(row)


def user_messages(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the user says in the prompt of a row."""
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
    """Yield the rows of a set of prompts: as `rows` reads them, CSV, or else text with a prompt a line.

    A row that is a text, or a list of messages, is its prompt.

    Raises:
        DataError: the file, or a row, cannot be read.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    form = _form(path)
    if form in (*_JSON, ".parquet"):
        for _, row in rows(path, bare="prompt"):
            yield row
        return
    # Spreadsheets write a mark in front, which would be a part of the first prompt or column.
    with _opened(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        if form == ".csv":
            yield from csv.DictReader(text)
        else:
            yield from ({"prompt": line.rstrip("\r\n")} for line in text if line.strip())


def prompt_in(row: Mapping[str, Any]) -> Any:
    """Return what stands in the prompt's column of a row: a text, messages, or a user's turns; else None.

    What a text is about stands below it, where the row has that in a column of its own. Of a pair of whole
    conversations without a column for the prompt it is the better one.
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
    """Return the text of a message as providers write it: a text, or parts of which some are texts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, str | dict)] if isinstance(content, list) else []
    return text_of(Message(role="user", content=parts))
