"""Personal data and secrets in text, by their form: what should not be learnt by heart.

Forms with a check sum are checked, reserved addresses (example.com) pass. A form says nothing of a name or a
street: redaction before the log (`redact_texts`) is where those belong.
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["personal"]

_LEAST_DIGITS = 7
_NOT_DIGITS = bytes(code for code in range(256) if not 48 <= code <= 57)

_EMAIL = re.compile(rb"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}")
_RESERVED = re.compile(rb"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.I)
_NUMBERS = re.compile(rb"(?<![\w.+-])\+?\(?\d(?:[ ().-]{0,2}\d){6,18}(?![\w-])")
_PHONE = re.compile(rb"\+\d[\d ().-]{7,20}|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}")
_SOCIAL = re.compile(rb"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}")
_IBAN = re.compile(rb"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_SECRETS = re.compile(
    rb"\b(?:sk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|"
    rb"xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35})\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_SIGNS = (
    *(b"sk-", b"AKIA", b"xox", b"AIza", b"PRIVATE KEY"),
    *(b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_"),  # "gh" alone stands in most English texts
)
_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|.)")


def personal(text: bytes, start: int = 0) -> str | None:
    """Return which form of personal data or secret stands in UTF-8 text or JSON, from `start` on; None: none.

    >>> personal(b"write to jo@corp.de"), personal(b"write to jo@example.com"), personal(b"in 1989-2024")
    ('email address', None, None)
    """
    text = text[start:]
    if b"\\" in text:
        # What a line begins with would seem to begin with the letter of JSON's \n.
        text = _ESCAPE.sub(b"\n", text)
    if b"@" in text and any(not _RESERVED.search(found[0]) for found in _EMAIL.finditer(text)):
        return "email address"
    if any(sign in text for sign in _SECRET_SIGNS) and _SECRETS.search(text):
        return "secret"
    if len(text.translate(None, _NOT_DIGITS)) >= _LEAST_DIGITS:
        for found in _NUMBERS.finditer(text):
            for name, is_one in _FORMS.items():
                if is_one(found[0]):
                    return name
        if any(_is_iban(found[0]) for found in _IBAN.finditer(text)):
            return "bank account"
    return None


def _is_card(number: bytes) -> bool:
    """Return whether a number is of a card's length and passes Luhn's check."""
    digits = [code - 48 for code in number if 48 <= code <= 57]
    if not 13 <= len(digits) <= 19 or digits[0] not in (3, 4, 5, 6):
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(number: bytes) -> bool:
    """Return whether a number passes the check of ISO 7064, mod 97."""
    compact = number.replace(b" ", b"").decode()
    return (
        15 <= len(compact) <= 34
        and int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1
    )


_FORMS: dict[str, Callable[[bytes], bool]] = {
    "card number": _is_card,
    "phone number": lambda number: _PHONE.fullmatch(number) is not None,
    "social security number": lambda number: _SOCIAL.fullmatch(number) is not None,
}
