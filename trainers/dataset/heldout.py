"""Evaluation sets that no training row may come from.

A prompt is held out where one of its user messages is the same text, normalised, as a prompt of the set, or
shares 13 words in a row with one (the n-gram of Brown et al. 2020, appendix C). Punctuation does not count.
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
from trainers.tables import COLUMNS, prompts_in

__all__ = ["HeldOut"]

_WORDS = 13
_OPERATORS = "#%&*/@\\"
"""Punctuation to Unicode; but they tell C# from C."""


class HeldOut:
    """The prompts of evaluation sets."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Read the sets, as `trainers.tables.prompt_rows` does.

        Raises:
            DataError: a file cannot be read, or holds no prompt.
            MissingExtra: a file is Parquet, and pyarrow is not installed.
        """
        self._keys: set[bytes] = set()
        self._grams: set[int] = set()
        for path in paths:
            found = False
            for text in prompts_in(Path(path)):
                if words := _words(text):
                    found = True
                    self._keys.add(_key(words))
                    self._grams.update(_grams(words))
            if not found:
                raise DataError(f"{path}: holds no prompt; its column is one of {', '.join(COLUMNS)}")

    def holds(self, prompt: Iterable[Turn]) -> bool:
        """Return whether a user message of the conversation stands in one of the sets."""
        return any(turn.role == "user" and self._has(turn.content) for turn in prompt)

    def _has(self, text: str) -> bool:
        words = _words(text)
        if _key(words) in self._keys:
            return True
        return bool(self._grams) and any(gram in self._grams for gram in _grams(words))


def _words(text: str) -> list[str]:
    """Return the words of a text, normalised, without punctuation unless there is nothing else."""
    normal = normalise(text)
    return _punctuation().sub("", normal).split() or normal.split()


@cache
def _punctuation() -> re.Pattern[str]:
    """Return what is left out of texts: punctuation, but not between digits, which it makes other numbers."""
    signs = (sign for sign in map(chr, range(0x20000)) if unicodedata.category(sign)[0] == "P")
    found = "".join(re.escape(sign) for sign in signs if sign != "_" and sign not in _OPERATORS)
    return re.compile(rf"[{found}](?:(?<!\d.)|(?!\d))")


def _key(words: Sequence[str]) -> bytes:
    return xxh3_128_digest("".join(words).encode("utf-8", "surrogatepass"))


def _grams(words: Sequence[str]) -> Iterator[int]:
    for start in range(len(words) - _WORDS + 1):
        yield xxh3_64_intdigest(" ".join(words[start : start + _WORDS]).encode("utf-8", "surrogatepass"))
