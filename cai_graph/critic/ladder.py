"""From a critic model's reply to Verdicts, down a ladder.

The provider's structured output or tool call, JSON in the text, a labelled line. Only the two words of the
menu count, exactly; of several, the last. Nothing else is ever read as COMPLIES.

A critic quotes what it judges, and an answer may hold a forged verdict. So COMPLIES counts only where the
reply nowhere speaks otherwise of the principle, and in a reply that was cut only where the reply is the
critic's JSON from its first character. A labelled line off the menu speaks otherwise, and so does a violation
in a form that is not read: of the principles that its line names, and where it is a label that names none, of
all. Where the judged text itself has a verdict on a principle, only a reply of verdicts alone says that it
complies. What is left unread by that, the critic is asked about again.
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
"""How much of a critic's reply is read, from its end."""

_MENU = {label.value: label for label in (Label.VIOLATES, Label.COMPLIES)}
_FLAT_OBJECT = re.compile(r"\{[^{}]*\}")
_COMMA_AT_END = re.compile(r",\s*}$")
_THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL)
"""What a model thinks before it replies, as text; templates may open it in the prompt."""
_OPENED_THOUGHT = re.compile(r"\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_HYPHENS = dict.fromkeys(range(0x2010, 0x2016), "-")
"""What critics write for the hyphen of an id."""
_MENTION = re.compile(r'"principle"\s*:\s*"([^"\\]*)"')
_BEGINS_AS_JSON = re.compile(r'\s*(?:```\w*\s*)?\{[^{}]*"verdicts"')
_GOES_ON_AS_JSON = re.compile(r"\s*+(?:,\s*+(?:\{.*)?|\]\s*+(?:,.*)?[\s}`]*|[\s`]*)", re.DOTALL)
"""What stands behind the last verdict of a reply that is JSON and nothing else."""
_EMPHASIS = " \t*_`\"'.,"
"""What may stand around a name or a label on a labelled line."""
_BULLETS = ">#-•"
"""What may stand before the name, too."""
_NUMBER = re.compile(r"^\(?\d+[.)]\s+")
"""What may number the line."""
_WORD = re.compile(r"[\w.-]+")
_VIOLATION = re.compile(
    r"(?<!\bno )(?<!\bany )(?<!\bfor )(?<!\bwithout )violat(?:e[sd]|ing|ions?)(?![a-z])", re.IGNORECASE
)
"""How a critic says that something is violated."""
_AS_LABEL = re.compile(r"V(?:IOLATES|IOLATED|IOLATION|iolates|iolated)\b|violates\W*$")
"""How the label stands alone; in small letters within a sentence it is prose, unless a principle is named."""
_EVADES = re.compile(r'"evades"\s*:\s*"?(true|false|yes|no|1|0)\b', re.IGNORECASE)
_YES_OR_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_Said = tuple[str, Verdict | None]
"""A principle's id and the verdict on it; None where what is said is off the menu."""
_LABEL_IN_JSON = re.compile(r'"principle"\s*:\s*"([^"]+)"(?:(?!"principle")[^{}])*?"verdict"\s*:\s*"(\w)')


class Reading(NamedTuple):
    """What a reply says."""

    verdicts: dict[str, Verdict]
    """By principle id; an id that is missing could not be read."""
    evades: bool | None
    """Whether the critic reads the answer as an evasion; None where it does not say."""


def read_verdicts(reply: BaseMessage, ids: Sequence[str], *, judged: str = "") -> Reading:
    """Read the verdicts that stand in a reply, for the principles `ids`, down the ladder.

    `judged` is what the critic was shown, and may quote.

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
        doubted.update(ids)  # off the schema, so nobody knows what it speaks of
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
    """Return the last verdict on each principle, but no COMPLIES where VIOLATES is said, too, or in doubt."""
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
    """Yield the principles of which a text begins to speak in JSON."""
    found = map(_folded, _MENTION.findall(text))
    return (names[name] for name in found if name in names)


def _violated(text: str, names: Mapping[str, str]) -> set[str]:
    """Return the principles that a text says are violated: those that its line names, or else all."""
    found: set[str] = set()
    for line in text.splitlines():
        if _VIOLATION.search(line):
            named = names.keys() & {word.strip("-.") for word in _WORD.findall(_folded(line))}
            if named or _AS_LABEL.search(line):
                found.update(names[name] for name in named or names)
    return found


def _objects(text: str, names: Mapping[str, str]) -> tuple[list[Any], str, str]:
    """Return the JSON objects of verdicts that stand in a reply, the text around and that after them."""
    first, last = text.find("{"), text.rfind("}") + 1
    with contextlib.suppress(ValueError, RecursionError):
        found = _json(text[first:last]).get("verdicts")
        if isinstance(found, list) and found and all(_about(item, names) for item in found):
            return found, f"{text[:first]} {text[last:]}", text[last:]
    # Each verdict is an object without objects inside, so a reply that was cut still yields the whole ones.
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
    """Read JSON whose texts may hold line breaks; raises as `_once`."""
    return json.loads(text, object_pairs_hook=_once, strict=False)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, all of whose verdicts can be read.

    Raises:
        ValueError: a key stands there twice, or VIOLATES under another than `verdict`.
    """
    if len({key.casefold() for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    if any(key != "verdict" and _label(value) is Label.VIOLATES for key, value in pairs):
        raise ValueError("VIOLATES stands under a key of its own")
    return dict(pairs)


def _about(item: Any, names: Mapping[str, str]) -> str | None:
    """Return the principle of which an item of JSON speaks; None where it is none of these."""
    name = item.get("principle") if isinstance(item, dict) else None
    return names.get(_folded(name)) if isinstance(name, str) else None


def _from_objects(objects: Iterable[Any], names: Mapping[str, str], read_by: str) -> list[_Said]:
    """Return what the JSON of verdicts says, in its order."""
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
    """Return a severity from 1 to 5 that stands as a number or as text; None for anything else."""
    if type(value) in (str, float):
        with contextlib.suppress(ValueError):
            value = float(value)
    return int(value) if type(value) in (int, float) and value in (1, 2, 3, 4, 5) else None


def _lines_of_text(text: str) -> int:
    """Return how many lines there are, without those that are blank or frame JSON."""
    return sum(not line.isspace() and not line.startswith("```") for line in text.strip().splitlines())


def _lines(text: str, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the lines that begin with a principle, in their order: its id, and what stands behind it."""
    found: list[tuple[str, str]] = []
    for line in text.replace("：", ":").splitlines():
        name, separator, word = line.partition(":" if ":" in line else "=")
        name = _NUMBER.sub("", name.strip(_EMPHASIS + _BULLETS)).strip(_EMPHASIS + _BULLETS)
        identifier = names.get(_folded(name))
        if separator and identifier is not None:
            found.append((identifier, word.strip(_EMPHASIS)))
    return found


def _from_lines(lines: Iterable[tuple[str, str]]) -> Iterator[_Said]:
    """Yield what labelled lines say, in their order."""
    for identifier, word in lines:
        label = _label(word)
        yield identifier, Verdict(label=label, principle=identifier, read_by="line") if label else None


def _label(word: object) -> Label | None:
    """Return the label that `word` is, exactly but for case and space, or None off the menu."""
    return _MENU.get(word.strip().upper()) if isinstance(word, str) else None


def _with_probability(verdict: Verdict, probability: float | None) -> Verdict:
    if probability is None or (probability >= 0.5) != (verdict.label is Label.VIOLATES):
        return verdict  # a probability that contradicts the label was read at another place
    return msgspec.structs.replace(verdict, probability=probability)


def _label_probabilities(reply: BaseMessage, ids: Sequence[str]) -> dict[str, float]:
    """Return P(VIOLATES) by principle, from the log-probabilities of the tokens where labels begin."""
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
    """Return the reply's tokens with their log-probabilities; None where there are none of this shape."""
    logprobs = reply.response_metadata.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return content if isinstance(content, list) else None


def mass_on_violates(top_logprobs: Sequence[dict[str, Any]]) -> float | None:
    """Return P(VIOLATES) / (P(VIOLATES) + P(COMPLIES)) at the first token of a label.

    A token counts for the label that it begins. None where neither stands among the alternatives.
    """
    mass = {Label.VIOLATES: 0.0, Label.COMPLIES: 0.0}
    for alternative in top_logprobs:
        begun = alternative["token"].strip(" \n\"'*").upper()
        for label in mass:
            if begun and label.value.startswith(begun):
                mass[label] += math.exp(alternative["logprob"])
    total = sum(mass.values())
    return mass[Label.VIOLATES] / total if total > 0 else None
