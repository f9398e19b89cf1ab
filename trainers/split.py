"""Which side of the split a prompt is on, decided before anything is made of it.

The key of a conversation is its first user message, normalised: all later turns of a conversation repeat
it, so none of them can stand on the other side.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import xxhash

from trainers.rows import Split, Turn

__all__ = ["normalise", "prompt_key", "prompt_text", "side"]

_HASHES = 1 << 64


def normalise(text: str) -> str:
    """Return a text as it is compared: NFKC, case folded, each run of whitespace one space.

    >>> normalise("  Ｗhat\\n IS this? ")
    'what is this?'
    """
    if text.isascii():  # What follows would not change more.
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_text(prompt: Sequence[Turn]) -> str:
    """Return the normalised first user message of a conversation."""
    for turn in prompt:
        if turn.role == "user":
            return normalise(turn.content)
    return ""


def prompt_key(text: str) -> bytes:
    """Return 16 bytes that stand for a normalised text."""
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def side(key: bytes, test_share: float) -> Split:
    """Return the side of a prompt: as if at random, and the same in every build.

    Args:
        key: as `prompt_key` gives it.
        test_share: share of prompts that go to `test`, in [0, 1].
    """
    return "test" if int.from_bytes(key[:8]) < test_share * _HASHES else "train"
