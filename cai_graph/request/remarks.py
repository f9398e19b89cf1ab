"""Removes thoughts, labels and tags around a revision, and detects a remark that replaces one.

Models often write more than the revision that they are asked for, such as "Here is the revised answer:", or
write "No revisions needed" in its place. Pure functions over texts.
"""

from __future__ import annotations

import re

__all__ = ["is_remark", "unwrapped"]

_THOUGHT = re.compile(
    r"(?:(?:\s*<think(?:ing)?>.*|.*\n)</think(?:ing)?>|\s*<think(?:ing)?>.*)\s*(?P<text>.*)",
    re.DOTALL | re.IGNORECASE,
)
"""The model's reasoning before its text. A chat template may open the tag in the prompt, so that only the end
tag is in the text; a thought without an end tag extends to the end, so no text remains."""
_LABEL = re.compile(
    r"[*_#\s]*(?:(?:sure|certainly|of course|absolutely|ok(?:ay)?)[,.!:]+\s+)?"
    r"(?:here(?:['’]s| is) )?(?:(?:the|my|an?) )?(?:revised|rewritten|improved|corrected|updated|new)"
    r" (?:answer|response|reply)[*_]*(?::[*_]*|(?=\n))\s*(?P<text>.*)",
    re.DOTALL | re.IGNORECASE,
)
"""A line or label that announces a revision, such as "Revised answer:"."""
_TAGGED = re.compile(
    r"\s*<(?P<tag>answer|turn|said)(?: [^<>\n]*)?>\s*(?P<text>.*)</(?P=tag)>\s*$", re.DOTALL | re.IGNORECASE
)
"""A revision between tags of ours, which the reviser saw in its prompt."""
_OPEN, _CLOSE = r"<(?:answer|turn|said)(?: [^<>\n]*)?>", r"</(?:answer|turn|said)>"
_WORDS = rf"(?:(?!{_OPEN}|{_CLOSE}).)*"
_OPENED = re.compile(
    rf"(?:{_WORDS}\n)?[ \t]*{_OPEN}\s*(?P<text>{_WORDS})(?:{_CLOSE}{_WORDS})?$", re.DOTALL | re.IGNORECASE
)
"""A revision between such tags with a remark before or after them, or without the end tag."""
_CLOSED = re.compile(rf"(?P<text>{_WORDS}){_CLOSE}[ \t]*(?:\n{_WORDS})?$", re.DOTALL | re.IGNORECASE)
"""A revision with the end tag only; a remark may follow it."""
_ANY_TAG = re.compile(rf"{_WORDS}(?:{_OPEN}|{_CLOSE})", re.DOTALL | re.IGNORECASE)
_WRAPPINGS = (
    (_THOUGHT, _THOUGHT),
    (_LABEL, _LABEL),
    (_TAGGED, _TAGGED),
    (_OPENED, _ANY_TAG),
    (_CLOSED, _ANY_TAG),
)
"""In order of removal: the pattern to remove, and the pattern that must not match the answer before, since
then the wrapping is the app's own."""


def unwrapped(text: str, standing: str) -> str:
    """Return a revision without a thought, a label or tags around it.

    One that `standing`, the answer under revision, also has is the app's own and is not removed. Remarks
    before or after the tags are removed with them if `standing` contains none of our tags.

    >>> unwrapped("Here is the revised answer:\\n\\n<answer>\\nHello\\n</answer>", "hello")
    'Hello'
    """
    for wrapping, own in _WRAPPINGS:
        if (found := wrapping.match(text)) and not own.match(standing):
            text = found["text"].rstrip()
    return text


_ANSWER = r"(?:the|this|your|my) (?:original |given |current |previous )?(?:answer|response|reply)"
_EDIT = r"(?:revisions?|rewrit(?:es?|ing)|changes?|edits?|modifications?|adjustments?|corrections?)"
_EDITED = r"(?:revised?|rewrite|rewritten|changed?|edit(?:ed)?|modify|modified|adjust(?:ed)?|corrected)"
_NEEDED = r"(?:needed|necessary|required)"
_RULES = (
    r"(?:(?:all|every|each|any|the|these|of|given) )*"
    r"(?:principles?|rules?|requests?|guidelines?|constitution)"
)
_REMARK = re.compile(
    "|".join(
        (
            rf"(?:there (?:is|are) )?no (?:further |other |more )?{_EDIT}(?: (?:is|are))?(?: {_NEEDED})?"
            r"(?: here| at all)?",
            rf"none(?: is| are)? {_NEEDED}",
            rf"(?:there is )?no need (?:for (?:any )?{_EDIT}|to {_EDITED}(?: (?:{_ANSWER}|it|anything))?)",
            rf"nothing (?:needs )?to (?:be )?{_EDITED}",
            rf"(?:{_ANSWER}|it) (?:already )?needs no {_EDIT}",
            rf"(?:{_ANSWER}|it) (?:does not|doesn['’]t) (?:need|require) "
            rf"(?:(?:any |an? )?(?:further )?{_EDIT}|to be {_EDITED})",
            rf"(?:{_ANSWER}|it) (?:already |fully )*complies(?: with {_RULES})?",
            rf"{_ANSWER} is (?:already |perfectly )?(?:fine|good|acceptable|compliant|appropriate)"
            r"(?: as (?:it )?(?:is|stands))?",
            r"(?:es (?:ist|sind) )?keine (?:weiteren? )?(?:änderung|überarbeitung|anpassung)(?:en)?"
            r"(?: (?:ist|sind))?(?: (?:nötig|notwendig|erforderlich))?",
            r"die (?:ursprüngliche )?antwort (?:ist (?:bereits )?(?:gut|in ordnung)(?: so)?"
            r"|entspricht (?:bereits )?(?:allen|den) (?:prinzipien|regeln))",
            r"no (?:se (?:necesitan?|requieren?)|es necesari[oa]|son necesari[oa]s|hacen? falta)"
            r"(?: ning[uú]na?)? (?:cambios?|revisi[oó]n(?:es)?|modificaci[oó]n(?:es)?)",
            r"aucune? (?:modification|changement|révision)(?: n['’]est)?(?: (?:nécessaire|requise?))?",
            r"không cần (?:thay đổi|chỉnh sửa|sửa đổi)(?: gì)?(?: thêm)?",
            r"(?:无需|无须|不需要)(?:任何|进行)?(?:修改|改动|更改)",
        )
    )
)
"""Remarks that nothing has to be changed, in the languages of the built-in refusals."""
_BETWEEN = re.compile(r'[.,;:!()*_"“”„«»#>—–。，；：！]|\b(?:and|because|since|so|therefore|und)\b')
"""Separators between such remarks: punctuation and conjunctions."""
_LONGEST_REMARK = 300
"""Maximum length in characters; a longer text has other content, too, and so is judged."""


def is_remark(text: str) -> bool:
    """Return whether a text consists only of remarks that nothing has to be changed.

    >>> [is_remark(text) for text in ("No changes are needed.", "No changes are needed: the port is open.")]
    [True, False]
    """
    if len(text) > _LONGEST_REMARK:
        return False
    said = [part.strip(" -'\n\t") for part in _BETWEEN.split(text.casefold())]
    return all(not part or _REMARK.fullmatch(part) for part in said) and any(said)
