"""Assigns prompts to `train` or `test` by a hash of the prompt, before any row is made from them.

The key of a conversation is its first user message, normalised. The logged requests of all later turns repeat
this message, so the whole conversation is in the same split.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import xxhash

from trainers.rows import Turn

__all__ = ["key_of", "normalise", "prompt_key", "prompt_text", "test_keys"]

_HASHES = 1 << 64
_LOWER = bytes(range(256)).lower()
_WHITESPACE = bytes(code for code in range(128) if chr(code).isspace())
_CONTROLS = bytes(code for code in (*range(32), 127) if not chr(code).isspace())
_NOT_SEEN = _WHITESPACE + _CONTROLS
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufff9-\ufffb"
    # Unicode's default ignorable characters: soft hyphens, joiners, direction marks, variation selectors.
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def normalise(text: str) -> str:
    """Normalise a text for comparison: NFKC, case folded, single spaces, no invisible characters.

    >>> normalise("  Ｗhat\\n IS this? ")
    'what is this?'
    """
    if text.isascii():  # For ASCII this has the same result as the line below, but is faster.
        return " ".join(text.encode().translate(_LOWER, _CONTROLS).decode().split())
    return " ".join(unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold().split())


def prompt_text(prompt: Sequence[Turn]) -> str:
    """Return a conversation's first user message, normalised."""
    return next((normalise(turn.content) for turn in prompt if turn.role == "user"), "")


def prompt_key(prompt: Sequence[Turn]) -> bytes:
    """Return the 16-byte key of a conversation: a hash of its first user message, normalised."""
    for turn in prompt:
        if turn.role == "user":
            return key_of(turn.content)
    return key_of("")


def key_of(text: str) -> bytes:
    """Return the 16-byte key of a text: a hash of it, normalised and without whitespace.

    Removing whitespace is faster than folding it. Texts that differ in it only have the same key.
    """
    if text.isascii():
        return xxhash.xxh3_128_digest(text.encode().translate(_LOWER, _NOT_SEEN))
    return xxhash.xxh3_128_digest("".join(normalise(text).split()).encode("utf-8", "surrogatepass"))


def test_keys(share: float) -> bytes:
    """Return the key below which a prompt is in `test`: a pseudo-random choice, the same in every build.

    Args:
        share: share of prompts that go to `test`, in [0, 1).
    """
    return int(share * _HASHES).to_bytes(8)
