"""Evaluation sets that no training row may come from.

A prompt is held out where one of its user messages is the same text, normalised, as a prompt of the set, or
shares 13 words in a row with one (the n-gram of Brown et al. 2020, appendix C).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from xxhash import xxh3_64_intdigest

from cai_graph.errors import DataError
from trainers.dataset.split import key_of, normalise
from trainers.rows import Turn
from trainers.tables import COLUMNS, prompts_in

__all__ = ["HeldOut"]

_WORDS = 13


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
