"""Which side of the split a prompt is on, decided before anything is made of it.

The key of a conversation is its first user message, normalised: all later turns of a conversation repeat
it, so none of them can stand on the other side.
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
    # What Unicode has as default ignorable: soft hyphens, joiners, marks of direction, variation selectors.
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def normalise(text: str) -> str:
    """Return a text as it is compared: NFKC, case folded, each run of whitespace one space, and nothing that
    is not seen.

    >>> normalise("  Ｗhat\\n IS this? ")
    'what is this?'
    """
    if text.isascii():  # What follows would not change more.
        return " ".join(text.encode().translate(_LOWER, _CONTROLS).decode().split())
    return " ".join(unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold().split())


def prompt_text(prompt: Sequence[Turn]) -> str:
    """Return a conversation's first user message, normalised."""
    return next((normalise(turn.content) for turn in prompt if turn.role == "user"), "")


def prompt_key(prompt: Sequence[Turn]) -> bytes:
    """Return 16 bytes that stand for a conversation: for its first user message, normalised."""
    for turn in prompt:
        if turn.role == "user":
            return key_of(turn.content)
    return key_of("")


def key_of(text: str) -> bytes:
    """Return 16 bytes that stand for a normalised text. All its whitespace is left out: that is faster to do
    than to fold it, and texts that differ by it alone have one key either way.
    """
    if text.isascii():
        return xxhash.xxh3_128_digest(text.encode().translate(_LOWER, _NOT_SEEN))
    return xxhash.xxh3_128_digest("".join(normalise(text).split()).encode("utf-8", "surrogatepass"))


def test_keys(share: float) -> bytes:
    """Return the key below which a prompt goes to `test`: as if at random, and the same in every build.

    Args:
        share: share of prompts that go to `test`, in [0, 1).
    """
    return int(share * _HASHES).to_bytes(8)
