"""Evaluation sets that no training row may come from.

A prompt is held out where one of its user messages is the same text, normalised, as a prompt of the set, or
shares 13 words in a row with one (the n-gram of Brown et al. 2020, appendix C). Punctuation does not count
where it does not make another question.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from cai_graph.errors import DataError
from trainers.dataset.split import normalise
from trainers.rows import Turn
from trainers.tables import COLUMNS, prompt_rows, user_messages

__all__ = ["HeldOut"]

_WORDS = 13
_OPERATORS = "#%&*/@\\"
"""Punctuation to Unicode; but they tell C# from C."""
_BLANK = re.compile(r"(?<!\d) | (?!\d)")
_MAY_GO = bytes(code for code in range(256) if code >= 128 or not chr(code).isalnum())
"""Bytes of UTF-8 that may be punctuation or white space, or a part of it."""


class HeldOut:
    """The prompts of evaluation sets."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        """Read the sets.

        Raises:
            DataError: a file cannot be read, or holds no prompt.
            MissingExtra: a file is Parquet, and pyarrow is not installed.
        """
        self._keys: set[bytes] = set()
        self._grams: set[int] = set()
        self._longest = 0
        for path in paths:
            rows, without = self.add(Path(path))
            if rows == without:
                raise DataError(f"{path}: holds no prompt; its column is one of {', '.join(COLUMNS)}")

    def add(self, path: Path) -> tuple[int, int]:
        """Read one more set, as `trainers.tables.prompt_rows` does; return how many rows it has, and how many
        of them have no prompt that can be read.

        Raises:
            DataError: the file cannot be read.
            MissingExtra: it is Parquet, and pyarrow is not installed.
        """
        rows = without = 0
        for row in prompt_rows(path):
            found = [words for text in user_messages(row) if (words := _words(normalise(text)))]
            for words in found:
                self._keys.add(_key(words))
                self._longest = max(self._longest, len("".join(words)))
                self._grams.update(_grams(words))
            rows += 1
            without += not found
        return rows, without

    def holds(self, prompt: Iterable[Turn]) -> bool:
        """Return whether a user message of the conversation stands in one of the sets."""
        return any(turn.role == "user" and self._has(turn.content) for turn in prompt)

    def _has(self, text: str) -> bool:
        normal = normalise(text)
        if not self._grams and _least(normal) > self._longest:
            return False
        words = _words(normal)
        if _key(words) in self._keys:
            return True
        return bool(self._grams) and any(gram in self._grams for gram in _grams(words))


def _least(normal: str) -> int:
    """Return how many characters are left of a normalised text, at least, when its words are made."""
    return len(normal.encode("utf-8", "surrogatepass").translate(None, _MAY_GO))


def _words(normal: str) -> list[str]:
    """Return the words of a normalised text, without punctuation unless there is nothing else."""
    marks, minus = _punctuation()
    # Signs of arithmetic are no punctuation to Unicode, so what is written for one is made one.
    text = minus.sub("\N{MINUS SIGN}", normal).replace("!=", "\N{NOT EQUAL TO}")
    return marks.sub("", text).split() or normal.split()


@cache
def _punctuation() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return what is left out of texts, and what of it is a minus.

    Left out is punctuation, but not between digits, which it makes other numbers. A dash before a number is a
    minus, but after a letter a hyphen.
    """
    # Python looks fast for characters of two bytes alone; beyond them are marks of ancient scripts.
    signs = [sign for sign in map(chr, range(0x10000)) if unicodedata.category(sign)[0] == "P"]
    found = "".join(re.escape(sign) for sign in signs if sign != "_" and sign not in _OPERATORS)
    dashes = "".join(re.escape(sign) for sign in signs if unicodedata.category(sign) == "Pd")
    return (
        # Runs of signs that have no digit on one side. What a pattern begins with is looked for fast.
        re.compile(rf"[{found}](?<![{found}]{{2}})(?:(?<!\d.)[{found}]*+|[{found}]*+(?!\d))"),
        re.compile(rf"[{dashes}](?= ?\d)(?<![^\W\d_].)"),
    )


def _key(words: Sequence[str]) -> bytes:
    # Texts that differ by blanks alone are the same, but two numbers are not one.
    text = _BLANK.sub("", " ".join(words))
    return xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _grams(words: Sequence[str]) -> Iterator[int]:
    for start in range(len(words) - _WORDS + 1):
        yield xxh3_64_intdigest(" ".join(words[start : start + _WORDS]).encode("utf-8", "surrogatepass"))
