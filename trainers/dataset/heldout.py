"""Keeps the prompts of evaluation sets out of training data.

A prompt is held out if one of its user messages, normalised, equals a prompt of a set, or shares 13
consecutive words with one (the n-gram length of Brown et al. 2020, appendix C). Punctuation is ignored unless
it changes the question.
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
"""Punctuation in Unicode, but not ignored here: they distinguish C# from C."""
_BLANK = re.compile(r"(?<!\d) | (?!\d)")
_MAY_GO = bytes(code for code in range(256) if code >= 128 or not chr(code).isalnum())
"""Bytes of UTF-8 that may be punctuation or white space, or part of such a character."""


class HeldOut:
    """The prompts of evaluation sets."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        """Read the sets.

        Raises:
            DataError: a file cannot be read, or contains no prompt.
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
        """Read one more set with `trainers.tables.prompt_rows`; return how many rows it has, and how many of
        these have no readable prompt.

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
        """Return whether a user message of the conversation matches a prompt of one of the sets."""
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
    """Return a lower bound of the number of characters in the words of a normalised text."""
    return len(normal.encode("utf-8", "surrogatepass").translate(None, _MAY_GO))


def _words(normal: str) -> list[str]:
    """Return the words of a normalised text without punctuation; with it if there is nothing else."""
    marks, minus = _punctuation()
    # Arithmetic signs are not punctuation in Unicode, so the ASCII spellings are replaced by such signs.
    text = minus.sub("\N{MINUS SIGN}", normal).replace("!=", "\N{NOT EQUAL TO}")
    return marks.sub("", text).split() or normal.split()


@cache
def _punctuation() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return patterns for the punctuation to ignore, and for dashes that are minus signs.

    Punctuation between digits is not ignored, as it changes the number. A dash before a number is a minus
    sign, unless it follows a letter: then it is a hyphen.
    """
    # Python searches fast only for characters below U+10000; above are marks of ancient scripts.
    signs = [sign for sign in map(chr, range(0x10000)) if unicodedata.category(sign)[0] == "P"]
    found = "".join(re.escape(sign) for sign in signs if sign != "_" and sign not in _OPERATORS)
    dashes = "".join(re.escape(sign) for sign in signs if unicodedata.category(sign) == "Pd")
    return (
        # Runs of signs without a digit on at least one side. Python searches fast for a pattern's first set.
        re.compile(rf"[{found}](?<![{found}]{{2}})(?:(?<!\d.)[{found}]*+|[{found}]*+(?!\d))"),
        re.compile(rf"[{dashes}](?= ?\d)(?<![^\W\d_].)"),
    )


def _key(words: Sequence[str]) -> bytes:
    # Blanks are removed, as texts that differ only in them are equal; but not between two numbers.
    text = _BLANK.sub("", " ".join(words))
    return xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _grams(words: Sequence[str]) -> Iterator[int]:
    for start in range(len(words) - _WORDS + 1):
        yield xxh3_64_intdigest(" ".join(words[start : start + _WORDS]).encode("utf-8", "surrogatepass"))
