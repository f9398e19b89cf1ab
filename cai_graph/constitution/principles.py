"""Constitution, Principle and Example: immutable, validated models, and the digest that identifies them."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from cai_graph.errors import ConstitutionError

__all__ = [
    "DEFAULT_REFUSAL",
    "MAX_REQUEST_CHARS",
    "RESOLVED",
    "Constitution",
    "Contradiction",
    "Example",
    "File",
    "Principle",
    "Texts",
    "contradictions",
    "nearest",
    "plain_question",
    "same_ids",
]

DEFAULT_REFUSAL = (
    "I don't have a good answer to give for this as it stands. "
    "Tell me what you are trying to achieve, and I will gladly help with what I can."
)

MAX_REQUEST_CHARS = 240  # ten longer ones in a batched critique leave little room for the conversation

Language = Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]
_Text = Annotated[str, StringConstraints(min_length=1)]
_Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+([-_.][a-z0-9]+)*$", max_length=64)]
_Aim = Annotated[str, StringConstraints(pattern=r"^[^\W\d_][\w-]*$", max_length=64)]


_Value = TypeVar("_Value")


class _Fixed(dict[str, _Value]):
    """An immutable dict, since the digest depends on its content."""

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise TypeError("a constitution is immutable; make another one with model_copy(update=...)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


class _Record(BaseModel):
    """Base of all parts of a constitution: immutable, without unknown fields, strings stripped."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with the fields of `update`, validated anew; `deep` has no effect.

        Raises:
            ValidationError: pydantic's; a field is unknown or wrong.
        """
        fields = {name: getattr(self, name) for name in self.model_fields_set} | dict(update or {})
        return self.model_validate(fields, context=RESOLVED)


def _with_question(data: Any) -> Any:
    """Add a preference question, made from the critique request, to the data of a principle without one."""
    if isinstance(data, Mapping) and data.get("critique_request") and not data.get("preference_question"):
        return {**data, "preference_question": plain_question(str(data["critique_request"]))}
    return data


def plain_question(critique_request: str) -> str:
    """Return the preference question of a principle that has none of its own."""
    return f"Which answer stands up better to this check? {critique_request.strip()}"


class Texts(_Record):
    """The wording of one principle in one language."""

    critique_request: _Text = Field(description="What the critic looks for in an answer.")
    revision_request: _Text = Field(
        description="How a violating answer is rewritten: what goes, and what stays."
    )
    preference_question: str = Field(
        default="", description="Asks which of two answers is better; made from critique_request if absent."
    )

    _fill = model_validator(mode="before")(_with_question)


class Principle(_Record):
    """One sentence to obey, with the wording that a critic, a reviser and a judge are given."""

    id: _Id = Field(description="Short slug, unique in the constitution, such as no-harm.")
    aim: _Aim = Field(description="What it serves: harmless, helpful, honest, or a word of your own.")
    critique_request: _Text = Field(
        description=f"What the critic looks for in an answer; at most {MAX_REQUEST_CHARS} characters."
    )
    revision_request: _Text = Field(
        description="How a violating answer is rewritten: what goes, and what stays."
    )
    preference_question: str = Field(
        default="", description="Asks which of two answers is better; made from critique_request if absent."
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Relative importance, above 0; 1 is ordinary."
    )
    source: str | None = Field(default=None, description="Where it is drawn from; never sent to a model.")
    min_severity: int | None = Field(
        default=None, ge=1, le=5, description="A violation less severe than this (1 to 5) does not count."
    )
    tools: bool = Field(
        default=False, description="Whether it also judges turns that only call tools, and what they call."
    )
    translations: Annotated[dict[Language, Texts], AfterValidator(_Fixed)] = Field(
        default_factory=_Fixed, description="The same texts in other languages, by code such as de or pt-BR."
    )

    _fill = model_validator(mode="before")(_with_question)

    def __hash__(self) -> int:
        return hash((self.id, self.critique_request, self.revision_request))

    def texts(self, language: str | None = None) -> Texts:
        """Return the wording in `language`, or the constitution's own where there is no translation.

        Args:
            language: code such as "de" or "pt-BR", in any case; "pt-BR" falls back to "pt".
        """
        found = _in_language(self.translations, language)
        return found or Texts(
            critique_request=self.critique_request,
            revision_request=self.revision_request,
            preference_question=self.preference_question,
        )


class Example(_Record):
    """A worked example that a critic and a reviser are shown."""

    prompt: _Text = Field(description="What the user asked.")
    draft: _Text = Field(description="The answer that was judged.")
    verdict: Literal["VIOLATES", "COMPLIES"] = Field(description="The right verdict on the draft.")
    critique: _Text = Field(description="The reasoning that leads to the verdict.")
    revision: _Text | None = Field(
        default=None, description="The answer rewritten; may be left out where the draft complies."
    )
    principle: _Id | None = Field(
        default=None, description="Id of the one principle it illustrates; left out, it serves all."
    )

    @model_validator(mode="after")
    def _violation_is_mended(self) -> Example:
        if self.verdict == "VIOLATES" and self.revision is None:
            raise ValueError("the draft VIOLATES but there is no 'revision'; add the answer rewritten")
        return self


def _one_or_more(value: Any) -> Any:
    values = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(values, list | tuple):
        return values
    return [os.fspath(each) if isinstance(each, os.PathLike) else each for each in values]


_Names = Annotated[
    tuple[str, ...],
    BeforeValidator(_one_or_more),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
RESOLVED = object()  # validation context: the parents of the Constitution have been applied


class File(_Record):
    """A constitution as it is written down, before `extends` is applied."""

    name: _Text = Field(description="What it is called; kept with every trajectory it judged.")
    version: str = Field(default="1", description="Yours to count up; it does not enter the digest.")
    description: str | None = Field(default=None, description="What it is for; never sent to a model.")
    extends: _Names = Field(
        default=(), description="Built-in names or file paths whose principles come first, in order."
    )
    remove: tuple[_Id, ...] = Field(default=(), description="Ids of inherited principles to drop.")
    principles: tuple[Principle, ...] = Field(
        default=(), description="In order; one with an inherited id replaces that one in its place."
    )
    refusal: _Text | None = Field(
        default=None, description="What the user reads when no acceptable answer was found."
    )
    refusal_translations: dict[Language, _Text] = Field(
        default_factory=dict, description="The refusal in other languages, by code such as de or pt-BR."
    )
    examples: tuple[Example, ...] = Field(
        default=(), description="Worked examples, harmful and harmless, that steady a small critic."
    )

    @field_validator("version", mode="before")
    @classmethod
    def _number_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Constitution(_Record):
    """Named, ordered, weighted Principles, complete and immutable.

    Iterating yields the principles, `len` counts them, and `constitution["no-harm"]` is the one of that id.
    It is made by `load`; the constructor raises pydantic's ValidationError (a ValueError) on wrong content.
    """

    name: _Text
    """Its name; not part of the digest."""
    version: str = "1"
    """Its version, chosen by the author; not part of the digest."""
    description: str | None = None
    """Its purpose; not part of the digest."""
    extends: tuple[str, ...] = Field(default=(), exclude=True)
    """The parents that were applied to make it. Not in a dump, which is complete without them."""
    principles: tuple[Principle, ...]
    """The principles, at least one, with unique ids, in the order in which a critic reads them."""
    refusal: _Text = DEFAULT_REFUSAL
    """The text that the user gets when the policy is `closed` and no acceptable answer was found."""
    refusal_translations: Annotated[dict[Language, _Text], AfterValidator(_Fixed)] = Field(
        default_factory=_Fixed
    )
    """The refusal in other languages."""
    examples: tuple[Example, ...] = ()
    """Worked examples; each serves all principles or the one it names."""

    @model_validator(mode="after")
    def _holds_together(self, info: ValidationInfo) -> Constitution:
        if self.extends and info.context is not RESOLVED:
            raise ValueError("'extends' is applied by load(); pass it the same fields as a mapping")
        for problem in contradictions(self.principles, self.examples):
            raise ValueError(problem.message)
        return self

    def __hash__(self) -> int:
        return hash(self.digest)

    def __iter__(self) -> Iterator[Principle]:  # type: ignore[override]
        return iter(self.principles)

    def __len__(self) -> int:
        return len(self.principles)

    def __contains__(self, principle_id: object) -> bool:
        return principle_id in self._by_id

    def __getitem__(self, principle_id: str) -> Principle:
        """Return the principle of that id; raise ConstitutionError, with a suggestion, if there is none."""
        try:
            return self._by_id[principle_id]
        except KeyError:
            raise ConstitutionError(
                f"constitution {self.name!r} has no principle {principle_id!r}; "
                f"{nearest(principle_id, self._by_id)}"
            ) from None

    @cached_property
    def _by_id(self) -> dict[str, Principle]:
        return {principle.id: principle for principle in self.principles}

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, over all content that is sent to models or affects what a verdict counts for.

        It covers the principles in order (all texts, aims, weights and severity thresholds), the refusal and
        the examples. It does not cover name, version, description, and the principles' sources.
        """
        content = {
            # Defaults are left out, so that a field added by a later release does not change old digests.
            "principles": [p.model_dump(exclude={"source"}, exclude_defaults=True) for p in self.principles],
            "refusal": {"": self.refusal, **self.refusal_translations},
            "examples": [e.model_dump(exclude_defaults=True) for e in self.examples],
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def select(self, principle_ids: Iterable[str]) -> Constitution:
        """Return the constitution with these principles only, in its own order.

        Examples that name a principle that is left out are left out, too.

        Raises:
            ConstitutionError: an id is unknown, or none is given.
        """
        chosen = {self[principle_id].id for principle_id in principle_ids}
        if not chosen:
            raise ConstitutionError(f"no principle of {self.name!r} was selected; name at least one")
        principles = tuple(p for p in self.principles if p.id in chosen)
        examples = tuple(e for e in self.examples if e.principle is None or e.principle in chosen)
        return self.model_copy(update={"principles": principles, "examples": examples})

    def without(self, principle_ids: Iterable[str]) -> Constitution:
        """Return the constitution without these principles and their examples.

        Raises:
            ConstitutionError: an id is unknown, or no principle would be left.
        """
        dropped = {self[principle_id].id for principle_id in principle_ids}
        return self.select(p.id for p in self.principles if p.id not in dropped)

    def refusal_in(self, language: str | None = None) -> str:
        """Return the refusal in `language`, or untranslated where there is no translation."""
        return _in_language(self.refusal_translations, language) or self.refusal


def _in_language(translations: Mapping[str, _Value], language: str | None) -> _Value | None:
    if not translations or not language:
        return None
    by_code = {code.lower(): value for code, value in translations.items()}
    code = language.lower().replace("_", "-")
    while code:
        if code in by_code:
            return by_code[code]
        code = code.rpartition("-")[0]
    return None


@dataclass(frozen=True)
class Contradiction:
    """A problem of a constitution in which each field by itself is valid."""

    path: tuple[str | int, ...]
    """Path of the field concerned."""
    message: str
    """The problem, and what to do."""


def contradictions(
    principles: tuple[Principle, ...], examples: tuple[Example, ...]
) -> Iterator[Contradiction]:
    """Yield the problems across fields: no principle, an id twice, an example of an unknown principle."""
    if not principles:
        yield Contradiction(("principles",), "there is no principle to judge by; add at least one")
    yield from same_ids(principles)
    known = [principle.id for principle in principles]
    for i, example in enumerate(examples):
        if example.principle is not None and example.principle not in known:
            yield Contradiction(
                ("examples", i, "principle"),
                f"example {i + 1} names the unknown principle {example.principle!r}; "
                f"{nearest(example.principle, known)}",
            )


def same_ids(principles: tuple[Principle, ...]) -> Iterator[Contradiction]:
    """Yield a problem for each id that repeats an earlier one; - counts as _, since critics confuse them."""
    seen: dict[str, str] = {}
    for i, principle in enumerate(principles):
        alike = principle.id.replace("_", "-")
        if first := seen.get(alike):
            said = (
                f"two principles have the id {first!r}"
                if first == principle.id
                else f"the ids {first!r} and {principle.id!r} differ by - and _ alone"
            )
            yield Contradiction(("principles", i, "id"), f"{said}; rename one of them")
        seen.setdefault(alike, principle.id)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the known name that was probably meant, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(names)) or 'none'}"
