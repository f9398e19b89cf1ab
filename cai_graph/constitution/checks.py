"""Checks of constitutions: finds probable mistakes, compares two, and gives the files' JSON Schema."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cai_graph.constitution.principles import MAX_REQUEST_CHARS, Constitution, File, Texts, plain_question

__all__ = ["KNOWN_AIMS", "Difference", "Finding", "diff", "json_schema", "lint"]

KNOWN_AIMS = ("harmless", "helpful", "honest")
_NEAR_DUPLICATE = 0.7  # share of the words of two critique requests that both contain


@dataclass(frozen=True)
class Finding:
    """Something about a constitution that is allowed but probably not meant."""

    message: str
    """The problem, and what to do about it."""
    principle: str | None = None
    """Id of the principle concerned; None for the constitution as a whole."""
    field: str | None = None
    """Name of the field concerned."""


def lint(constitution: Constitution) -> list[Finding]:
    """Return what is allowed but probably not meant; an empty list means that nothing was found.

    The findings are: principles with nearly the same critique request (and with different weights), requests
    that are too long for a batched critique, missing translations, missing preference questions, misspelt
    aims, revision requests that repeat the critique request, and examples with only one of the verdicts.
    """
    return [
        *_lint_wording(constitution),
        *_lint_duplicates(constitution),
        *_lint_languages(constitution),
        *_lint_examples(constitution),
    ]


def _lint_wording(constitution: Constitution) -> Iterator[Finding]:
    for principle in constitution:
        for name, problem in _lint_texts(principle.texts()):
            yield Finding(problem, principle.id, name)
        for language, texts in principle.translations.items():
            for name, problem in _lint_texts(texts):
                yield Finding(f"{language!r} {name}: {problem}", principle.id, "translations")
        close = difflib.get_close_matches(principle.aim.lower(), KNOWN_AIMS, n=1, cutoff=0.8)
        if close and principle.aim not in KNOWN_AIMS:
            yield Finding(f"{principle.aim!r}: did you mean {close[0]!r}?", principle.id, "aim")


def _lint_texts(texts: Texts) -> Iterator[tuple[str, str]]:
    """Yield each field of a principle's texts in one language that has a problem, and the problem."""
    for name in ("critique_request", "revision_request"):
        length = len(getattr(texts, name))
        if length > MAX_REQUEST_CHARS:
            yield name, f"{length} characters; keep it to {MAX_REQUEST_CHARS}, or split the principle"
    if texts.preference_question == plain_question(texts.critique_request):
        yield "preference_question", "made from the critique request; write which of two answers is better"
    if _words(texts.critique_request) == _words(texts.revision_request):
        yield "revision_request", "says the same as the critique request"


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _lint_duplicates(constitution: Constitution) -> Iterator[Finding]:
    words = [(principle, _words(principle.critique_request)) for principle in constitution]
    for i, (first, first_words) in enumerate(words):
        for second, second_words in words[i + 1 :]:
            either = first_words | second_words
            if not either or len(first_words & second_words) / len(either) < _NEAR_DUPLICATE:
                continue
            same = first.critique_request == second.critique_request
            yield Finding(
                f"{'the same as' if same else 'nearly the same as'} that of {first.id!r}; drop one of them",
                second.id,
                "critique_request",
            )
            if first.weight != second.weight:
                yield Finding(
                    f"{second.weight:g} contradicts {first.weight:g} of {first.id!r}, which says the same",
                    second.id,
                    "weight",
                )


def _lint_languages(constitution: Constitution) -> Iterator[Finding]:
    languages = {language: None for principle in constitution for language in principle.translations}
    for language in languages:
        for principle in constitution:
            if language not in principle.translations:
                yield Finding(
                    f"no {language!r} texts, which other principles have", principle.id, "translations"
                )
        if language not in constitution.refusal_translations:
            yield Finding(f"no {language!r} text, which principles have", None, "refusal_translations")


def _lint_examples(constitution: Constitution) -> Iterator[Finding]:
    verdicts = {example.verdict for example in constitution.examples}
    if len(verdicts) == 1:
        only = verdicts.pop()
        other = "COMPLIES" if only == "VIOLATES" else "VIOLATES"
        yield Finding(
            f"every example {only}; a critic learns to say so; add one that {other}", None, "examples"
        )


@dataclass(frozen=True)
class Difference:
    """One way in which two constitutions differ."""

    change: Literal["added", "removed", "moved", "changed"]
    """The change from the first constitution to the second."""
    principle: str | None
    """Id of the principle; None for a field of the constitution."""
    field: str | None
    """The field that differs; None where a whole principle was added, removed or moved."""
    before: object
    """Value in the first: of the field or part, the removed Principle, or its place among the common ones."""
    after: object
    """Value in the second, likewise."""
    part: str | None = None
    """The part of the field that differs: the language of a translation, or the prompt of examples (whose
    values are tuples of Examples). None: the field as a whole; it `moved` where only its order differs."""


def diff(a: Constitution, b: Constitution) -> list[Difference]:
    """Return how `b` differs from `a`: constitution fields first, then principles in the order of `b`."""
    found = [
        difference
        for name in type(a).model_fields
        if name not in ("principles", "extends")
        for difference in _diff_field(None, name, getattr(a, name), getattr(b, name))
    ]
    found += [Difference("removed", p.id, None, p, None) for p in a if p.id not in b]
    order_a = [p.id for p in a if p.id in b]
    order_b = [p.id for p in b if p.id in a]
    for new in b:
        if new.id not in a:
            found.append(Difference("added", new.id, None, None, new))
            continue
        before, after = order_a.index(new.id), order_b.index(new.id)
        if before != after:
            found.append(Difference("moved", new.id, None, before, after))
        old = a[new.id]
        for name in type(new).model_fields:
            found += _diff_field(new.id, name, getattr(old, name), getattr(new, name))
    return found


def _diff_field(principle: str | None, name: str, before: object, after: object) -> Iterator[Difference]:
    if before == after:
        return
    old, new = _parts(before), _parts(after)
    if old == new:
        yield Difference("moved", principle, name, before, after)
    for part in {**old, **new}:
        if part not in new:
            yield Difference("removed", principle, name, old[part], None, part)
        elif part not in old:
            yield Difference("added", principle, name, None, new[part], part)
        elif old[part] != new[part]:
            yield Difference("changed", principle, name, old[part], new[part], part)


def _parts(value: object) -> dict[str | None, object]:
    """Return the parts of a value that are compared one by one: texts by language, examples by prompt."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return {one.prompt: tuple(e for e in value if e.prompt == one.prompt) for one in value}
    return {None: value}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a constitution file, for completion in editors."""
    schema = File.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Constitution",
        "anyOf": [{"required": ["principles"]}, {"required": ["extends"]}],
    }
