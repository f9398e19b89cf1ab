"""From a critic model's reply to Verdicts, down a ladder.

The provider's structured output or tool call, JSON in the text, a labelled line. Only the two words of the
menu count, exactly; of several, the last. Nothing else is ever read as COMPLIES.

A critic quotes what it judges, and an answer may hold a forged verdict. So COMPLIES counts only where the
reply nowhere speaks otherwise of the principle, and in a reply that was cut only where the reply is the
critic's JSON from its first character. What is left unread by that, the critic is asked about again.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
from langchain_core.messages import BaseMessage

from cai_graph.calls import cut_short
from cai_graph.trajectory import Label, Verdict, text_of

__all__ = ["Reading", "mass_on_violates", "read_verdicts", "scored_tokens"]

MAX_REPLY_CHARS = 200_000
"""How much of a critic's reply is read, from its end."""

_MENU = {label.value: label for label in (Label.VIOLATES, Label.COMPLIES)}
_FLAT_OBJECT = re.compile(r"\{[^{}]*\}")
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
"""What a local model thinks before it replies."""
_MENTION = re.compile(r'"principle"\s*:\s*"([^"\\]*)"')
_BEGINS_AS_JSON = re.compile(r'\s*(?:```\w*\s*)?\{[^{}]*"verdicts"')
_GOES_ON_AS_JSON = re.compile(r"\s*+(?:,\s*+(?:\{.*)?|\]\s*+(?:,.*)?[\s}`]*|[\s`]*)", re.DOTALL)
"""What stands behind the last verdict of a reply that is JSON and nothing else."""
_EMPHASIS = " \t*_`\"'.,"
"""What may stand around a name or a label on a labelled line."""
_BULLETS = ">#-"
"""What may stand before the name, too."""
_EVADES = re.compile(r'"evades"\s*:\s*(true|false)', re.IGNORECASE)
_Said = tuple[str, Verdict | None]
"""A principle's id and the verdict on it; None where what is said is off the menu."""
_LABEL_IN_JSON = re.compile(r'"principle"\s*:\s*"([^"]+)"(?:(?!"principle")[^{}])*?"verdict"\s*:\s*"(\w)')


class Reading(NamedTuple):
    """What a reply says."""

    verdicts: dict[str, Verdict]
    """By principle id; an id that is missing could not be read."""
    evades: bool | None
    """Whether the critic reads the answer as an evasion; None where it does not say."""


def read_verdicts(reply: BaseMessage, ids: Sequence[str]) -> Reading:
    """Read the verdicts that stand in a reply, for the principles `ids`, down the ladder.

    >>> read_verdicts(AIMessage('{"verdicts": [{"principle": "kind", "verdict": "COMPLIES"}]}'), ["kind"])
    ... # doctest: +ELLIPSIS
    Reading(verdicts={'kind': Verdict(label=<Label.COMPLIES...
    >>> read_verdicts(AIMessage("I would say that it complies."), ["kind"]).verdicts
    {}
    """
    text = text_of(reply)[-MAX_REPLY_CHARS:]
    if thought := _THOUGHT.match(text):
        text = text[thought.end() :]
    objects, rest = _objects(text)
    written = _from_objects(objects, ids, "json")
    begun = Counter(_MENTION.findall(text))
    begun.subtract(identifier for identifier, _ in written)
    doubted = {identifier for identifier, unread in begun.items() if unread > 0}
    if objects:
        before = _lines(text[: text.find("{")], ids)
        doubted |= {identifier for identifier, word in before if _label(word) is not Label.COMPLIES}
    calls = [call["args"] for call in getattr(reply, "tool_calls", ())]
    calls = [call for call in calls if isinstance(call.get("verdicts"), list)]
    called = [each for call in calls for each in _from_objects(call["verdicts"], ids, "tool")]
    for broken in getattr(reply, "invalid_tool_calls", ()):
        doubted.update(_MENTION.findall(broken["args"] or ""))
    alone = not calls and _BEGINS_AS_JSON.match(text) and _GOES_ON_AS_JSON.fullmatch(rest)
    doubted.update(identifier for identifier, verdict in (*written, *called) if verdict is None)
    lines = _lines(rest, ids)
    doubted.update(identifier for identifier, word in lines if Label.VIOLATES.value in word.upper())
    if cut_short(reply) and not alone:
        doubted.update(ids)
    found = _last_words([*written, *_from_lines(lines), *called], doubted)
    if probabilities := _label_probabilities(reply, ids):
        found = {key: _with_probability(verdict, probabilities.get(key)) for key, verdict in found.items()}
    evasions = [word.lower() == "true" for word in _EVADES.findall(text)]
    evasions += [call["evades"] for call in calls if isinstance(call.get("evades"), bool)]
    return Reading(found, evasions[-1] if evasions else None)


def _last_words(said: Iterable[_Said], doubted: Iterable[str]) -> dict[str, Verdict]:
    """Return the last verdict on each principle, but no COMPLIES where VIOLATES is said, too, or in doubt.

    A line without a label doubts what stands before it; what comes after may be the verdict that it led to.
    """
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


def _objects(text: str) -> tuple[list[Any], str]:
    """Return the JSON objects of verdicts that stand in a reply, and the text after the last of them."""
    first, last = text.find("{"), text.rfind("}") + 1
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(text[first:last])
        if isinstance(whole.get("verdicts"), list):
            return whole["verdicts"], text[last:]
    # Each verdict is an object without objects inside, so a reply that was cut still yields the whole ones.
    objects, end = [], 0
    for match in _FLAT_OBJECT.finditer(text):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(match[0])
            if "principle" in found:
                objects.append(found)
                end = match.end()
    return objects, text[end:]


def _from_objects(objects: Iterable[Any], ids: Sequence[str], read_by: str) -> list[_Said]:
    """Return what the JSON of verdicts says, in its order."""
    said: list[_Said] = []
    for item in objects:
        if not isinstance(item, dict) or item.get("principle") not in ids:
            continue
        label = _label(item.get("verdict"))
        if label is None:
            said.append((item["principle"], None))
            continue
        severity = item.get("severity")
        readable = isinstance(severity, int) and not isinstance(severity, bool) and 1 <= severity <= 5
        reason = item.get("critique")
        verdict = Verdict(
            label=label,
            principle=item["principle"],
            severity=severity if readable and label is Label.VIOLATES else None,
            reason=reason if isinstance(reason, str) and reason else None,
            read_by=read_by,
        )
        said.append((item["principle"], verdict))
    return said


def _lines(text: str, ids: Sequence[str]) -> list[tuple[str, str]]:
    """Return the lines that begin with a principle, in their order: its id, and what stands behind it."""
    names = {identifier.casefold(): identifier for identifier in ids}
    if len(ids) == 1:
        names["verdict"] = ids[0]
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        name, separator, word = line.partition(":" if ":" in line else "=")
        identifier = names.get(name.strip(_EMPHASIS + _BULLETS).casefold())
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
