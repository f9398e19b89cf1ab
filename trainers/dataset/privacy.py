"""Detects personal data and secrets in text by their format, so that models do not memorise them.

Formats with a checksum are verified, and reserved addresses (example.com) are ignored. Names and streets have
no such format: they must be redacted before they are logged (`redact_texts`).
"""

from __future__ import annotations

import re

__all__ = ["personal"]

_LEAST_DIGITS = 8
_NOT_DIGITS = bytes(code for code in range(256) if not 48 <= code <= 57)

_EMAIL = re.compile(rb"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}")
_RESERVED = re.compile(rb"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.I)
_SECRETS = re.compile(
    rb"\b(?:sk-[A-Za-z0-9_-]{20,}|[sr]k_live_[A-Za-z0-9]{16,}|A[KS]IA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|"
    rb"github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|"
    rb"AIza[0-9A-Za-z_-]{35}|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_SIGNS = (
    *(b"sk-", b"k_live_", b"AKIA", b"ASIA", b"github_pat_", b"glpat-", b"hf_", b"xox", b"AIza", b".eyJ"),
    *(b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_"),  # "gh" alone occurs in most English texts
    b"PRIVATE KEY",
)

# Numbers, each by its own format, as other digits follow a number ("12/25", "24/7") as often as a word does.
# No match begins or ends within a longer run of digits, a decimal number, a version or a serial number.
_TOGETHER = re.compile(rb"\d(?:[ ().-]{0,2}\d){7}")  # is in all of these but IBANs; most texts have no match
_BEFORE, _AFTER = rb"(?<![\w.+-])", rb"(?![\w-]|\.\d)"
_CARDS = [
    re.compile(_BEFORE + digits + _AFTER)
    for digits in (
        rb"[3-6]\d{12,18}",
        rb"[3-6]\d{3}(?:[ .-]{1,2}\d{4}){3}",
        rb"[3-6]\d{3}(?:[ .-]{1,2}\d{4}){3}[ .-]{1,2}\d{3}",
        rb"3\d{3}[ .-]\d{6}[ .-]\d{4,5}",
    )
]
_SOCIAL = re.compile(_BEFORE + rb"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}" + _AFTER)
_INTERNATIONAL = re.compile(_BEFORE + rb"\+\d(?:[ ().-]{0,2}\d){7,14}" + _AFTER)
_AMERICAN = re.compile(
    _BEFORE + rb"(?:1[ .-])?(?!\d{3} \d{3} )(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}" + _AFTER
)
# With blanks only, it may be a list of numbers: a phone number has three, the first two from 200 up.
_SPACED = re.compile(
    rb"(?<!\d )" + _BEFORE + rb"(?:1[ .-])?[2-9]\d\d [2-9]\d\d \d{4}(?! \d++(?![\w/:]))" + _AFTER
)
_PHONES = (_INTERNATIONAL, _AMERICAN, _SPACED)
_IBAN = re.compile(rb"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|.)")


def personal(text: bytes, start: int = 0) -> str | None:
    """Return the kind of personal data or secret in UTF-8 text or JSON, from `start` on; None if none.

    >>> personal(b"write to jo@corp.de"), personal(b"write to jo@example.com"), personal(b"in 1989-2024")
    ('email address', None, None)
    """
    text = text[start:]
    if b"\\" in text:
        # Otherwise the n of JSON's \n would seem to be the first letter of the next line.
        text = _ESCAPE.sub(b"\n", text)
    if b"@" in text and any(not _RESERVED.search(found[0]) for found in _EMAIL.finditer(text)):
        return "email address"
    if any(sign in text for sign in _SECRET_SIGNS) and _SECRETS.search(text):
        return "secret"
    if len(text.translate(None, _NOT_DIGITS)) >= _LEAST_DIGITS:
        if _TOGETHER.search(text):
            if any(_is_card(found[0]) for form in _CARDS for found in form.finditer(text)):
                return "card number"
            if any(form.search(text) for form in _PHONES):
                return "phone number"
            if _SOCIAL.search(text):
                return "social security number"
        if any(_is_iban(found[0]) for found in _IBAN.finditer(text)):
            return "bank account"
    return None


def _is_card(number: bytes) -> bool:
    """Return whether a number passes Luhn's check."""
    digits = [code - 48 for code in number if 48 <= code <= 57]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: bytes) -> bool:
    """Return whether the text, or a part of it without its last words, passes ISO 7064's check, mod 97."""
    compact = text.replace(b" ", b"").decode()
    return (
        15 <= len(compact) <= 34
        and int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1
    ) or (b" " in text and _is_iban(text.rpartition(b" ")[0]))
