"""Parses a critic model's reply into Verdicts, trying one form after the other.

The forms (the rungs of the ladder) are: the provider's structured output or tool call, JSON in the text, and
a labelled line such as `ID: COMPLIES`, or `Verdict: COMPLIES` where there is one principle. A label is the
word VIOLATES or COMPLIES alone, in upper or lower case; where a principle has several, the last one counts.
Nothing else is ever read as COMPLIES.

A critic quotes the text that it judges, and that text may contain a forged verdict. So COMPLIES counts for a
principle only under the conditions below. Otherwise its verdict is unread, and the critic is asked again.

- Nothing else in the reply contradicts it. A contradiction is a verdict VIOLATES, a verdict with any other
  word, JSON of a verdict that cannot be parsed, or a mention of a violation outside the forms above. Such a
  mention is about the principles that its line names, or, if it is a label and names none, about all.
- The reply was not cut off, unless it is the critic's JSON from its first character on.
- If the judged text names the principle and contains the word COMPLIES, the reply has no other text beside
  its verdicts.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
from langchain_core.messages import BaseMessage

from cai_graph.messages import cut_short
from cai_graph.trajectory import Label, Verdict, text_of

__all__ = ["Reading", "mass_on_violates", "read_verdicts", "scored_tokens"]

MAX_REPLY_CHARS = 200_000
"""How many characters of a critic's reply are read, counted from its end."""

_MENU = {label.value: label for label in (Label.VIOLATES, Label.COMPLIES)}
_FLAT_OBJECT = re.compile(r"\{[^{}]*\}")
_COMMA_AT_END = re.compile(r",\s*}$")
_THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL)
"""A model's reasoning before its reply. Some templates put its opening tag into the prompt."""
_OPENED_THOUGHT = re.compile(r"\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_HYPHENS = dict.fromkeys(range(0x2010, 0x2016), "-")
"""Other dashes that critics write in place of the hyphen of an id."""
_MENTION = re.compile(r'"principle"\s*:\s*"([^"\\]*)"')
_BEGINS_AS_JSON = re.compile(r'\s*(?:```\w*\s*)?\{[^{}]*"verdicts"')
_GOES_ON_AS_JSON = re.compile(r"\s*+(?:,\s*+(?:\{.*)?|\]\s*+(?:,.*)?[\s}`]*|[\s`]*)", re.DOTALL)
"""What may follow the last verdict in a reply that is JSON and nothing else."""
_EMPHASIS = " \t*_`\"'.,"
"""Characters that may surround a name or a label on a labelled line."""
_BULLETS = ">#-•"
"""Further characters that may precede the name."""
_NUMBER = re.compile(r"^\(?\d+[.)]\s+")
"""A number that may precede the name."""
_WORD = re.compile(r"[\w.-]+")
_VIOLATION = re.compile(
    r"(?<!\bno )(?<!\bany )(?<!\bfor )(?<!\bwithout )violat(?:e[sd]|ing|ions?)(?![a-z])", re.IGNORECASE
)
"""Words for a violation in a critic's text."""
_AS_LABEL = re.compile(r"V(?:IOLATES|IOLATED|IOLATION|iolates|iolated)\b|violates\W*$")
"""A word for a violation that is used as a label; in lower case within a sentence it is prose."""
_EVADES = re.compile(r'"evades"\s*:\s*"?(true|false|yes|no|1|0)\b', re.IGNORECASE)
_YES_OR_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_Said = tuple[str, Verdict | None]
"""A principle's id and the verdict on it; None where the reply gives another word than the two labels."""
_LABEL_IN_JSON = re.compile(r'"principle"\s*:\s*"([^"]+)"(?:(?!"principle")[^{}])*?"verdict"\s*:\s*"(\w)')


class Reading(NamedTuple):
    """What was read from a reply."""

    verdicts: dict[str, Verdict]
    """The verdicts by principle id; for an id that is missing, none could be read."""
    evades: bool | None
    """Whether the critic judges the answer to be an evasion; None where the reply does not say."""


def read_verdicts(reply: BaseMessage, ids: Sequence[str], *, judged: str = "") -> Reading:
    """Return the verdicts on the principles `ids` that a reply contains; see the module for the rules.

    `judged` is the text that the critic was shown and may quote.

    >>> from langchain_core.messages import AIMessage
    >>> read_verdicts(AIMessage('{"verdicts": [{"principle": "kind", "verdict": "COMPLIES"}]}'), ["kind"])
    Reading(verdicts={'kind': Verdict(label=<Label.COMPLIES...
    >>> read_verdicts(AIMessage("I would say that it complies."), ["kind"]).verdicts
    {}
    """
    text = text_of(reply)[-MAX_REPLY_CHARS:]
    if thought := (_OPENED_THOUGHT if "/think" in judged else _THOUGHT).match(text):
        text = text[thought.end() :]
    names = {_folded(identifier): identifier for identifier in ids}
    titles = names if len(names) > 1 else {**names, **dict.fromkeys(["verdict"], *names.values())}
    objects, around, rest = _objects(text, names)
    written = _from_objects(objects, names, "json")
    begun = Counter(_mentions(text, names))
    begun.subtract(identifier for identifier, _ in written)
    doubted = {identifier for identifier, unread in begun.items() if unread > 0}
    doubted |= _violated(around, names)
    beside = _lines(around, titles)
    doubted |= {identifier for identifier, word in beside if word and _label(word) is not Label.COMPLIES}
    if judged and len(beside) < _lines_of_text(around):
        shown = _folded(judged)
        if _folded(Label.COMPLIES.value) in shown:
            doubted |= {identifier for title, identifier in titles.items() if title in shown}
    calls = [call["args"] for call in getattr(reply, "tool_calls", ())]
    calls = [call for call in calls if isinstance(call.get("verdicts"), list)]
    called = [each for call in calls for each in _from_objects(call["verdicts"], names, "tool")]
    if any(_about(item, names) is None for call in calls for item in call["verdicts"]):
        doubted.update(ids)  # an item outside the schema may be about any principle
    for broken in getattr(reply, "invalid_tool_calls", ()):
        args = broken["args"] or ""
        doubted |= {*_mentions(args, names), *_violated(args, names)}
    alone = not calls and _BEGINS_AS_JSON.match(text) and _GOES_ON_AS_JSON.fullmatch(rest)
    doubted.update(identifier for identifier, verdict in (*written, *called) if verdict is None)
    lines = _lines(rest, titles) if objects else beside
    if cut_short(reply) and not alone:
        doubted.update(ids)
    found = _last_words([*written, *_from_lines(lines), *called], doubted)
    if probabilities := _label_probabilities(reply, ids):
        found = {key: _with_probability(verdict, probabilities.get(key)) for key, verdict in found.items()}
    evasions = [*_EVADES.findall(text), *(str(call.get("evades")) for call in calls)]
    said = [_YES_OR_NO[word.lower()] for word in evasions if word.lower() in _YES_OR_NO]
    return Reading(found, said[-1] if said else None)


def _last_words(said: Iterable[_Said], doubted: Iterable[str]) -> dict[str, Verdict]:
    """Return the last verdict on each principle, without a COMPLIES that is doubted or beside a VIOLATES."""
    last: dict[str, Verdict | None] = {}
    otherwise = set(doubted)
    for identifier, verdict in said:
        last[identifier] = verdict
        if verdict is not None and not _complies(verdict):
            otherwise.add(identifier)
    return {
        identifier: verdict
        for identifier, verdict in last.items()
        if verdict is not None and not (_complies(verdict) and identifier in otherwise)
    }


def _complies(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.label is Label.COMPLIES


def _folded(name: str) -> str:
    folded = name.casefold().replace("_", "-")
    return folded if folded.isascii() else folded.translate(_HYPHENS)


def _mentions(text: str, names: Mapping[str, str]) -> Iterator[str]:
    """Yield the id of each principle for which a text begins a JSON verdict, complete or not."""
    found = map(_folded, _MENTION.findall(text))
    return (names[name] for name in found if name in names)


def _violated(text: str, names: Mapping[str, str]) -> set[str]:
    """Return the principles that a text's mentions of violations are about; see the module for the rule."""
    found: set[str] = set()
    for line in text.splitlines():
        if _VIOLATION.search(line):
            named = names.keys() & {word.strip("-.") for word in _WORD.findall(_folded(line))}
            if named or _AS_LABEL.search(line):
                found.update(names[name] for name in named or names)
    return found


def _objects(text: str, names: Mapping[str, str]) -> tuple[list[Any], str, str]:
    """Return the JSON objects of verdicts in a reply, the text around them, and the text after them."""
    first, last = text.find("{"), text.rfind("}") + 1
    with contextlib.suppress(ValueError, RecursionError):
        found = _json(text[first:last]).get("verdicts")
        if isinstance(found, list) and found and all(_about(item, names) for item in found):
            return found, f"{text[:first]} {text[last:]}", text[last:]
    # A verdict is an object without nested objects, so the complete ones of a reply that was cut can be read.
    objects, around, end = [], [], 0
    for match in _FLAT_OBJECT.finditer(text):
        with contextlib.suppress(ValueError, RecursionError):
            found = _json(_COMMA_AT_END.sub("}", match[0]))
            if _about(found, names):
                objects.append(found)
                around.append(text[end : match.start()])
                end = match.end()
    return objects, " ".join([*around, text[end:]]), text[end:]


def _json(text: str) -> Any:
    """Parse JSON whose strings may contain line breaks; raises ValueError, also as `_once` does."""
    return json.loads(text, object_pairs_hook=_once, strict=False)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its pairs, where no verdict in it is hidden.

    Raises:
        ValueError: a key occurs twice, or VIOLATES is the value of a key other than `verdict`.
    """
    if len({key.casefold() for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    if any(key != "verdict" and _label(value) is Label.VIOLATES for key, value in pairs):
        raise ValueError("VIOLATES stands under a key of its own")
    return dict(pairs)


def _about(item: Any, names: Mapping[str, str]) -> str | None:
    """Return the id of the principle that a JSON item is about; None where it is about none of `names`."""
    name = item.get("principle") if isinstance(item, dict) else None
    return names.get(_folded(name)) if isinstance(name, str) else None


def _from_objects(objects: Iterable[Any], names: Mapping[str, str], read_by: str) -> list[_Said]:
    """Return the principles and verdicts in JSON objects, in their order."""
    said: list[_Said] = []
    for item in objects:
        identifier = _about(item, names)
        if identifier is None:
            continue
        label = _label(item.get("verdict"))
        if label is None:
            said.append((identifier, None))
            continue
        reason = item.get("critique")
        verdict = Verdict(
            label=label,
            principle=identifier,
            severity=_severity(item.get("severity")) if label is Label.VIOLATES else None,
            reason=reason if isinstance(reason, str) and reason else None,
            read_by=read_by,
        )
        said.append((identifier, verdict))
    return said


def _severity(value: Any) -> int | None:
    """Return a severity from 1 to 5, given as a number or as text; None for anything else."""
    if type(value) in (str, float):
        with contextlib.suppress(ValueError):
            value = float(value)
    return int(value) if type(value) in (int, float) and value in (1, 2, 3, 4, 5) else None


def _lines_of_text(text: str) -> int:
    """Return how many lines a text has, apart from blank lines and Markdown code fences."""
    return sum(not line.isspace() and not line.startswith("```") for line in text.strip().splitlines())


def _lines(text: str, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the labelled lines, in their order: the principle's id, and the text after the colon or `=`."""
    found: list[tuple[str, str]] = []
    for line in text.replace("：", ":").splitlines():
        name, separator, word = line.partition(":" if ":" in line else "=")
        name = _NUMBER.sub("", name.strip(_EMPHASIS + _BULLETS)).strip(_EMPHASIS + _BULLETS)
        identifier = names.get(_folded(name))
        if separator and identifier is not None:
            found.append((identifier, word.strip(_EMPHASIS)))
    return found


def _from_lines(lines: Iterable[tuple[str, str]]) -> Iterator[_Said]:
    """Yield the principles and verdicts of labelled lines, in their order."""
    for identifier, word in lines:
        label = _label(word)
        yield identifier, Verdict(label=label, principle=identifier, read_by="line") if label else None


def _label(word: object) -> Label | None:
    """Return the label that `word` equals, apart from case and outer space; None for any other word."""
    return _MENU.get(word.strip().upper()) if isinstance(word, str) else None


def _with_probability(verdict: Verdict, probability: float | None) -> Verdict:
    if probability is None or (probability >= 0.5) != (verdict.label is Label.VIOLATES):
        return verdict  # a probability that contradicts the label belongs to another occurrence
    return msgspec.structs.replace(verdict, probability=probability)


def _label_probabilities(reply: BaseMessage, ids: Sequence[str]) -> dict[str, float]:
    """Return P(VIOLATES) by principle, from the log-probabilities of each label's first token."""
    if not (tokens := scored_tokens(reply)):
        return {}
    texts = [token["token"] for token in tokens]
    starts = list(accumulate(map(len, texts), initial=0))
    found: dict[str, float] = {}
    for match in _LABEL_IN_JSON.finditer("".join(texts)):
        token = tokens[bisect_right(starts, match.start(2)) - 1]
        probability = mass_on_violates(token.get("top_logprobs") or ())
        if match[1] in ids and probability is not None:
            found[match[1]] = probability
    return found


def scored_tokens(reply: BaseMessage) -> list[dict[str, Any]] | None:
    """Return the reply's tokens with their log-probabilities, in OpenAI's format; None where it has none."""
    logprobs = reply.response_metadata.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return content if isinstance(content, list) else None


def mass_on_violates(top_logprobs: Sequence[dict[str, Any]]) -> float | None:
    """Return P(VIOLATES) / (P(VIOLATES) + P(COMPLIES)) at the first token of a label, in [0, 1].

    A token counts for the label that begins with it. None where no alternative begins either label.
    """
    mass = {Label.VIOLATES: 0.0, Label.COMPLIES: 0.0}
    for alternative in top_logprobs:
        begun = alternative["token"].strip(" \n\"'*").upper()
        for label in mass:
            if begun and label.value.startswith(begun):
                mass[label] += math.exp(alternative["logprob"])
    total = sum(mass.values())
    return mass[Label.VIOLATES] / total if total > 0 else None
