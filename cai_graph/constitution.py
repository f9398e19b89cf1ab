"""Constitutions: the principles that answers are judged and revised under, and where they come from.

A Constitution is read by name (`load("balanced")`), from a YAML or JSON file, from a mapping, or from a
foreign principle list; it is immutable, complete (its `extends` is applied) and known by a `digest`.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from cai_graph.errors import ConstitutionError

__all__ = [
    "Constitution",
    "Difference",
    "Example",
    "Finding",
    "Principle",
    "Texts",
    "builtin",
    "diff",
    "json_schema",
    "lint",
    "load",
]

DEFAULT_REFUSAL = (
    "I don't have a good answer to give for this as it stands. "
    "Tell me what you are trying to achieve, and I will gladly help with what I can."
)

MAX_FILE_BYTES = 1 << 20  # the largest built-in file is about 1/50 of this
MAX_REQUEST_CHARS = 240  # beyond it a batched critique of ten principles crowds out the conversation
KNOWN_AIMS = ("harmless", "helpful", "honest")
_MAX_SENTENCES = 10  # errors told at once for one file
_NEAR_DUPLICATE = 0.7  # share of words that two critique requests have in common

Language = Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]
_Text = Annotated[str, StringConstraints(min_length=1)]
_Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+([-_.][a-z0-9]+)*$", max_length=64)]
_Aim = Annotated[str, StringConstraints(pattern=r"^[^\W\d_][\w-]*$", max_length=64)]
_Model = TypeVar("_Model", bound=BaseModel)


class _Record(BaseModel):
    """What all parts of a constitution share: immutable, no unknown field, no blank at either end."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


def _with_question(data: Any) -> Any:
    """Give a principle that states no preference question one made from its critique request."""
    if isinstance(data, Mapping) and data.get("critique_request") and not data.get("preference_question"):
        return {**data, "preference_question": _plain_question(str(data["critique_request"]))}
    return data


def _plain_question(critique_request: str) -> str:
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
    translations: dict[Language, Texts] = Field(
        default_factory=dict, description="The same texts in other languages, by code such as de or pt-BR."
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
    return [value] if isinstance(value, str | os.PathLike) else value


_Names = Annotated[
    tuple[str, ...],
    BeforeValidator(_one_or_more),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
_RESOLVED = object()  # validation context of a Constitution whose parents have been applied


class _File(_Record):
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

    Iterating gives the principles; `len` counts them; `constitution["no-harm"]` is one of them. Made by
    `load`; made directly it raises pydantic's ValidationError (a ValueError) on wrong content.
    """

    name: _Text
    """What it is called; does not enter the digest."""
    version: str = "1"
    """The author's own count; does not enter the digest."""
    description: str | None = None
    """What it is for; does not enter the digest."""
    extends: tuple[str, ...] = Field(default=(), exclude=True)
    """Parents it was made from, already applied; left out of a dump, which is complete without them."""
    principles: tuple[Principle, ...]
    """At least one, ids unique, in the order in which a critic reads them."""
    refusal: _Text = DEFAULT_REFUSAL
    """What the user reads when the policy is `closed` and no acceptable answer was found."""
    refusal_translations: dict[Language, _Text] = Field(default_factory=dict)
    """The refusal in other languages."""
    examples: tuple[Example, ...] = ()
    """Worked examples; each serves all principles or the one it names."""

    @model_validator(mode="after")
    def _holds_together(self, info: ValidationInfo) -> Constitution:
        if self.extends and info.context is not _RESOLVED:
            raise ValueError("'extends' is applied by load(); pass it the same fields as a mapping")
        for problem in _contradictions(self.principles, self.examples):
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
        """Return the principle of that id; raise ConstitutionError, with the nearest id, if none has it."""
        try:
            return self._by_id[principle_id]
        except KeyError:
            raise ConstitutionError(
                f"constitution {self.name!r} has no principle {principle_id!r}; "
                f"{_nearest(principle_id, self._by_id)}"
            ) from None

    @cached_property
    def _by_id(self) -> dict[str, Principle]:
        return {principle.id: principle for principle in self.principles}

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, over what models are sent and what a verdict counts for.

        In it: principles in order with all texts, aims, weights and severity thresholds, the refusal,
        the examples. Not in it: name, version, description, and the sources of principles.
        """
        content = {
            # Defaults are left out, so that a field added by a later release leaves old digests alone.
            "principles": [p.model_dump(exclude={"source"}, exclude_defaults=True) for p in self.principles],
            "refusal": {"": self.refusal, **self.refusal_translations},
            "examples": [e.model_dump(exclude_defaults=True) for e in self.examples],
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def select(self, principle_ids: Iterable[str]) -> Constitution:
        """Return the constitution with these principles only, in its own order.

        Examples of principles that are left out go with them.

        Raises:
            ConstitutionError: an id is unknown, or none is given.
        """
        chosen = {self[principle_id].id for principle_id in principle_ids}
        if not chosen:
            raise ConstitutionError(f"no principle of {self.name!r} was selected; name at least one")
        principles = tuple(p for p in self.principles if p.id in chosen)
        examples = tuple(e for e in self.examples if e.principle is None or e.principle in chosen)
        fields = dict(self.__dict__) | {"principles": principles, "examples": examples}
        return Constitution.model_validate(
            {name: fields[name] for name in type(self).model_fields}, context=_RESOLVED
        )

    def without(self, principle_ids: Iterable[str]) -> Constitution:
        """Return the constitution less these principles and their examples.

        Raises:
            ConstitutionError: an id is unknown, or no principle would be left.
        """
        dropped = {self[principle_id].id for principle_id in principle_ids}
        return self.select(p.id for p in self.principles if p.id not in dropped)

    def refusal_in(self, language: str | None = None) -> str:
        """Return the refusal in `language`, or as it stands where there is no translation."""
        return _in_language(self.refusal_translations, language) or self.refusal


_Value = TypeVar("_Value")


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
class _Contradiction:
    path: tuple[str | int, ...]
    message: str


def _contradictions(
    principles: tuple[Principle, ...], examples: tuple[Example, ...]
) -> Iterator[_Contradiction]:
    """Yield what no single field shows: no principle, an id twice, an example of an unknown principle."""
    if not principles:
        yield _Contradiction(("principles",), "there is no principle to judge by; add at least one")
    yield from _same_ids(principles)
    known = [principle.id for principle in principles]
    for i, example in enumerate(examples):
        if example.principle is not None and example.principle not in known:
            yield _Contradiction(
                ("examples", i, "principle"),
                f"example {i + 1} names the unknown principle {example.principle!r}; "
                f"{_nearest(example.principle, known)}",
            )


def _same_ids(principles: tuple[Principle, ...]) -> Iterator[_Contradiction]:
    seen: set[str] = set()
    for i, principle in enumerate(principles):
        if principle.id in seen:
            yield _Contradiction(
                ("principles", i, "id"), f"two principles have the id {principle.id!r}; rename one of them"
            )
        seen.add(principle.id)


def _nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, or which there are."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(names)) or 'none'}"


# --- loading ---------------------------------------------------------------------------------------------


def load(source: object) -> Constitution:
    """Return the constitution that `source` names, holds or describes.

    Args:
        source: a built-in name (see `builtin`); a path to a YAML or JSON file in our own format, to a
            Python file with LangChain's principles (parsed, never run), to a list of
            {name, critique_request, revision_request}, or to a file of {"constitutions": [{critic,
            revision}]}; a mapping or list of the same shapes; a list of Principles or of LangChain's
            ConstitutionalPrinciple objects; or a Constitution, which comes back as it is. Foreign
            principles that name no aim get the aim "general".

    Raises:
        ConstitutionError: names file, line and field, and what to do.
    """
    if isinstance(source, Constitution):
        return source
    if isinstance(source, str | os.PathLike):
        path = _find(os.fspath(source), Path(), "")
        return _build(_read(path), (path,))
    if isinstance(source, Mapping | list | tuple):
        return _build(_own_format(_Source(type(source).__name__, source)), ())
    raise ConstitutionError(
        f"cannot read a constitution from {type(source).__name__} {source!r}; "
        "give a built-in name, a path, a mapping, a list of principles, or a Constitution"
    )


def builtin() -> tuple[str, ...]:
    """Return the names of the built-in constitutions, sorted."""
    return tuple(sorted(path.stem for path in _builtin_folder(Path(__file__).parent).glob("*.yaml")))


def _builtin_folder(package: Path) -> Path:
    """Return the folder of the built-in constitutions, for the package folder of a wheel or a repository."""
    for folder in (package / "constitutions", package.parent / "constitutions"):
        if (folder / "balanced.yaml").is_file():
            return folder
    raise ConstitutionError(
        f"the built-in constitutions are missing beside {package}; install cai-graph again"
    )


def _find(name: str, folder: Path, asked_by: str) -> Path:
    """Return the file of a built-in name or of a path; a relative path starts at `folder`."""
    names = builtin()
    if name in names:
        return (_builtin_folder(Path(__file__).parent) / f"{name}.yaml").resolve()
    try:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path.resolve()
        if name and path.is_dir():
            raise ConstitutionError(f"{asked_by}{name!r} is a folder; name a file in it")
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, ~ of an unknown user
        raise ConstitutionError(
            f"{asked_by}{_short(name)} is not a path: {getattr(error, 'strerror', error)}"
        ) from error
    close = difflib.get_close_matches(name, names, n=1)
    raise ConstitutionError(
        f"{asked_by}{_short(name)} is neither a built-in constitution nor a file; "
        + (f"did you mean {close[0]!r}? " if close else "")
        + f"built in are {', '.join(names)}"
    )


@dataclass(frozen=True)
class _Source:
    """What was read, where from, and on which line each part of it stands."""

    label: str
    data: object
    lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict)
    folder: Path = Path()

    def at(self, path: tuple[str | int, ...]) -> str:
        """Return "label line N" for the innermost part of `path` whose line is known."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return f"{self.label} line {self.lines[path[:end]]}"
        return self.label


def _build(source: _Source, chain: tuple[Path, ...]) -> Constitution:
    """Apply `extends` and `remove`; `chain` holds the files from the first one asked for to this one."""
    file = _checked(source)
    for problem in _same_ids(file.principles):
        raise ConstitutionError(f"{source.at(problem.path)}: {problem.message}")

    principles: dict[str, Principle] = {}
    examples: list[Example] = []
    refusal: dict[str, Any] = {}
    for i, name in enumerate(file.extends):
        where = source.at(("extends", i))
        path = _find(name, source.folder, f"{where}: extends ")
        if path in chain:
            cycle = " -> ".join(p.name for p in (*chain[chain.index(path) :], path))
            raise ConstitutionError(f"{where}: 'extends' goes in a circle: {cycle}; take one of them out")
        parent = _build(_read(path), (*chain, path))
        principles |= {p.id: p for p in parent}
        examples += [e for e in parent.examples if e not in examples]
        if "refusal" in parent.model_fields_set:
            refusal = {"refusal": parent.refusal, "refusal_translations": parent.refusal_translations}

    for i, principle_id in enumerate(file.remove):
        if principle_id not in principles:
            raise ConstitutionError(
                f"{source.at(('remove', i))}: 'remove' names {principle_id!r}, which no parent has; "
                f"{_nearest(principle_id, principles)}"
            )
        del principles[principle_id]
    examples = [e for e in examples if e.principle is None or e.principle in principles]
    principles |= {p.id: p for p in file.principles}
    if file.refusal is not None:
        refusal = {"refusal": file.refusal, "refusal_translations": file.refusal_translations}
    elif file.refusal_translations:
        inherited = refusal.get("refusal_translations", {})
        refusal = {**refusal, "refusal_translations": inherited | file.refusal_translations}

    for problem in _contradictions(tuple(principles.values()), file.examples):
        raise ConstitutionError(f"{source.at(problem.path)}: {problem.message}")
    return Constitution.model_validate(
        {
            "name": file.name,
            "version": file.version,
            "description": file.description,
            "extends": file.extends,
            "principles": tuple(principles.values()),
            "examples": (*examples, *file.examples),
            **refusal,
        },
        context=_RESOLVED,
    )


_TO_ADD = {
    "name": "add the name of the constitution",
    "id": "add a short slug such as 'no-harm'",
    "aim": "add what it serves: harmless, helpful, honest, or a word of your own",
    "critique_request": "add the sentence that says what to look for",
    "revision_request": "add the sentence that asks for the rewrite",
    "prompt": "add what the user asked",
    "draft": "add the answer that is judged",
    "verdict": "add VIOLATES or COMPLIES",
    "critique": "add the reasoning that leads to the verdict",
}


def _checked(source: _Source) -> _File:
    """Validate what was read; raise ConstitutionError with one sentence for each wrong field."""
    if not isinstance(source.data, Mapping):
        raise ConstitutionError(
            f"{source.label}: found {_short(source.data)} where a constitution should be; "
            "write 'name:' and 'principles:'"
        )
    try:
        return _File.model_validate(source.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        sentences = [_sentence(detail, source) for detail in details[:_MAX_SENTENCES]]
        if len(details) > _MAX_SENTENCES:
            sentences.append(f"{source.label}: and {len(details) - _MAX_SENTENCES} more")
        raise ConstitutionError("\n".join(dict.fromkeys(sentences))) from error


_IN_WORDS = {
    "tuple_type": "write a list, each item after '- '",
    "dict_type": "write 'field: value' lines",
    "model_type": "write 'field: value' lines",
    "string_type": "write text",
    "float_parsing": "write a number",
    "finite_number": "write a finite number",
    "int_parsing": "write a whole number",
    "string_unicode": "take out the broken character",
}
_PATTERN_IN_WORDS = {
    "aim": "write one word, such as harmless",
    "id": "use small letters, digits and hyphens, at most 64 of them",
    "principle": "write the id of a principle",
    "remove": "write the id of a principle",
}


def _sentence(detail: Any, source: _Source) -> str:
    """Say where a field is wrong, what was found, and what to write instead."""
    kind, found = detail["type"], detail["input"]
    path = tuple(part for part in detail["loc"] if part != "[key]")
    owner, where = _owner(source.data, path), source.at(path)
    name = next((part for part in reversed(path) if isinstance(part, str)), "constitution")
    if kind == "missing" or (found is None and name in _TO_ADD):
        return f"{where}: {owner} has no {name!r}; {_TO_ADD.get(name, 'add it')}"
    if kind == "extra_forbidden":
        return f"{where}: {owner} has the unknown field {name!r}; {_nearest(name, _fields_at(path))}"
    if kind == "value_error":
        return f"{where}: {owner}: {detail['ctx']['error']}"
    if kind == "string_too_short":
        return f"{where}: {owner} has an empty {name!r}; {_TO_ADD.get(name, 'write it or take it out')}"
    if len(path) == 2 and kind == "model_type":
        return f"{where}: {owner} is {_short(found)}; write its fields: {', '.join(_fields_at((*path, '')))}"
    if kind == "string_pattern_mismatch" and "[key]" in detail["loc"]:
        return f"{where}: {owner} has the language {found!r}; write a code such as de or pt-BR"
    advice = _PATTERN_IN_WORDS.get(name) if kind.startswith("string_") and kind != "string_type" else None
    advice = advice or _IN_WORDS.get(kind) or detail["msg"][0].lower() + detail["msg"][1:]
    return f"{where}: {owner}: {name!r} is {_short(found)}; {advice}"


def _owner(data: Any, path: tuple[str | int, ...]) -> str:
    """Name the part of a constitution that a field belongs to."""
    if len(path) >= 2 and path[0] in ("principles", "examples") and isinstance(path[1], int):
        if path[0] == "examples":
            return f"example {path[1] + 1}"
        try:
            principle_id = data["principles"][path[1]]["id"]
        except (LookupError, TypeError):
            return f"principle {path[1] + 1}"
        language = f" in {path[3]!r}" if len(path) > 4 and path[2] == "translations" else ""
        return f"principle {principle_id!r}{language}"
    return "the constitution"


def _fields_at(path: tuple[str | int, ...]) -> list[str]:
    model: type[BaseModel] = _File
    if len(path) > 2:
        model = Example if path[0] == "examples" else Texts if path[2] == "translations" else Principle
    return list(model.model_fields)


def _short(value: object) -> str:
    """Return what was found in a few words: "a list", "nothing", or the value itself cut to 60 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- files -----------------------------------------------------------------------------------------------


def _read(path: Path) -> _Source:
    label = _label(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConstitutionError(f"{label}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConstitutionError(f"{label}: larger than {MAX_FILE_BYTES >> 20} MiB; is it a constitution?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConstitutionError(f"{label} line {line}: not UTF-8; save the file as UTF-8") from error
    try:
        if ".py" in path.suffixes:
            data, lines = _parse_python(text, label)
        elif path.suffix == ".json":
            data, lines = _parse_json(text, label)
        else:
            data, lines = _parse_yaml(text, label)
    except RecursionError as error:
        raise ConstitutionError(f"{label}: nested too deeply to be a constitution") from error
    return _own_format(_Source(label, data, lines, path.parent), name=path.name.split(".")[0])


def _label(path: Path) -> str:
    """Return a path as a reader would write it: relative to where he stands, if it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


_Parsed = tuple[object, dict[tuple[str | int, ...], int]]


def _parse_yaml(text: str, label: str) -> _Parsed:
    """Return plain dicts, lists and text, and the line of each part.

    Every scalar is text: YAML 1.1 would read the language code `no` as false and the version 1.10 as 1.1.
    Aliases are refused (they can expand a small file into gigabytes), as are tags and a key given twice.
    """
    import yaml

    lines: dict[tuple[str | int, ...], int] = {}

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()  # type: ignore[no-untyped-call]
                raise ConstitutionError(
                    f"{label} line {event.start_mark.line + 1}: the YAML alias '*{event.anchor}' is refused; "
                    "write out what it stands for"
                )
            return super().compose_node(parent, index)

    def plain(node: yaml.Node, path: tuple[str | int, ...]) -> object:
        line = node.start_mark.line + 1
        lines.setdefault(path, line)
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            raise ConstitutionError(f"{label} line {line}: the YAML tag {node.tag!r} is refused; remove it")
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, object] = {}
            for key_node, value_node in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ConstitutionError(f"{label} line {key_line}: a field name must be plain text")
                key = str(key_node.value)
                if key in mapping:
                    raise ConstitutionError(
                        f"{label} line {key_line}: {key!r} is given twice, first on line "
                        f"{lines[*path, key]}; keep one"
                    )
                lines[*path, key] = key_line
                mapping[key] = plain(value_node, (*path, key))
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [plain(item, (*path, i)) for i, item in enumerate(node.value)]
        return None if node.tag.endswith(":null") else str(node.value)

    try:
        node = Loader(text).get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # An unprintable character is reported by its position, everything else by a mark.
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ConstitutionError(
            f"{label} line {line}: not valid YAML: {problem}; check indentation, quotes and colons there"
        ) from error
    if node is None:
        raise ConstitutionError(f"{label}: the file is empty; write 'name:' and 'principles:'")
    return plain(node, ()), lines


def _parse_json(text: str, label: str) -> _Parsed:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConstitutionError(f"{label}: {twice!r} is given twice in one object; keep one")
        return mapping

    try:
        data: object = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ConstitutionError(f"{label} line {error.lineno}: not valid JSON: {error.msg}") from error
    try:
        # JSON is YAML but for rare escapes, and the YAML reader knows lines.
        return data, _parse_yaml(text, label)[1]
    except ConstitutionError:
        return data, {}


def _parse_python(text: str, label: str) -> _Parsed:
    """Return the arguments of each ConstitutionalPrinciple(...) call; the source is never run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError) as error:
        line, problem = getattr(error, "lineno", None), getattr(error, "msg", error)
        where = f"{label} line {line}" if line else label
        raise ConstitutionError(f"{where}: not valid Python: {problem}") from error
    items: list[object] = []
    lines: dict[tuple[str | int, ...], int] = {}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _called(n) == "ConstitutionalPrinciple"]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        item: dict[str, object] = {}
        lines[(len(items),)] = call.lineno
        for keyword in call.keywords:
            if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
                raise ConstitutionError(
                    f"{label} line {keyword.value.lineno}: {keyword.arg!r} is computed; "
                    "the file is not run, so write the text itself"
                )
            item[keyword.arg] = keyword.value.value
            lines[len(items), keyword.arg] = keyword.value.lineno
        items.append(item)
    if not items:
        raise ConstitutionError(f"{label}: no ConstitutionalPrinciple(...) in this Python file")
    return items, lines


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


# --- foreign formats -------------------------------------------------------------------------------------


def _own_format(source: _Source, name: str = "custom") -> _Source:
    """Turn a foreign principle list into the fields of our own format; leave our own as it is."""
    if isinstance(source.data, list | tuple):
        lines = {("principles", *path): line for path, line in source.lines.items()}
        return replace(source, data={"name": name, "principles": _own_principles(source.data)}, lines=lines)
    if isinstance(source.data, Mapping) and "constitutions" in source.data:
        return _from_pairs(source, source.data, name)
    return source


def _from_pairs(source: _Source, data: Mapping[str, Any], name: str) -> _Source:
    """Read {"constitutions": [{critic, revision}], "system_chat": [conversation, ...]}."""
    pairs = data["constitutions"]
    if not isinstance(pairs, list):
        raise ConstitutionError(
            f"{source.at(('constitutions',))}: 'constitutions' holds {_short(pairs)}; "
            "it should be a list of {critic, revision}"
        )
    own_name = {"critic": "critique_request", "revision": "revision_request"}
    principles = _own_principles(
        {own_name.get(key, key): value for key, value in pair.items()} if isinstance(pair, Mapping) else pair
        for pair in pairs
    )
    ids = {str(p.get("critique_request")): p["id"] for p in principles if isinstance(p, Mapping)}
    examples = _chat_examples(data.get("system_chat") or [], source, ids)
    lines = {
        ("principles", *(own_name.get(str(part), part) for part in path[1:])): line
        for path, line in source.lines.items()
        if path[:1] == ("constitutions",)
    }
    return replace(source, data={"name": name, "principles": principles, "examples": examples}, lines=lines)


def _own_principles(items: Iterable[object]) -> list[Any]:
    """Name the fields of each item as we do; give an id to those without one, and the aim "general".

    What is no principle is left for validation to refuse.
    """
    principles: list[Any] = []
    taken: set[str] = set()
    for number, item in enumerate(items, 1):
        if isinstance(item, Principle):
            fields = item.model_dump()
        elif isinstance(item, Mapping):
            fields = dict(item)
        elif hasattr(item, "critique_request") and hasattr(item, "revision_request"):
            # LangChain's ConstitutionalPrinciple, known by its attributes: LangChain need not be installed.
            fields = {
                "name": getattr(item, "name", None),
                "critique_request": item.critique_request,
                "revision_request": item.revision_request,
            }
        else:
            principles.append(item)
            continue
        if "id" not in fields:
            words = re.findall(r"[a-z0-9]+", str(fields.pop("name", None) or "").lower())
            base = unique = "-".join(words)[:60].rstrip("-") or f"principle-{number:02d}"
            copy = 1
            while unique in taken:
                copy += 1
                unique = f"{base}-{copy}"
            fields["id"] = unique
        taken.add(str(fields["id"]))
        principles.append({"aim": "general", **fields})
    return principles


def _chat_examples(chats: Any, source: _Source, ids: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return worked examples from conversations of request, draft, critique request, critique, revision.

    The format states no verdict: a revision that hardly touches the draft says that it complied.

    Args:
        chats: conversations, each a list of six {role, content}.
        source: where they were read.
        ids: principle ids by critique request.
    """
    examples: list[dict[str, Any]] = []
    try:
        for chat in chats:
            prompt, draft, request, critique, _, revision = (str(turn["content"]) for turn in chat[:6])
            alike = difflib.SequenceMatcher(None, draft.split(), revision.split(), autojunk=False).ratio()
            examples.append(
                {
                    "prompt": prompt,
                    "draft": draft,
                    "verdict": "COMPLIES" if alike >= 0.9 else "VIOLATES",
                    "critique": critique,
                    "revision": revision,
                    "principle": ids.get(request),
                }
            )
    except (TypeError, KeyError, ValueError) as error:
        raise ConstitutionError(
            f"{source.at(('system_chat', len(examples)))}: conversation {len(examples) + 1} of 'system_chat' "
            "is not six turns {role, content}: request, draft, critique request, critique, revision "
            "request, revision"
        ) from error
    return examples


# --- lint, diff, schema ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something about a constitution that is allowed but probably not meant."""

    message: str
    """What was found and what to do."""
    principle: str | None = None
    """Id of the principle it is about; None for the constitution as a whole."""
    field: str | None = None
    """The field it is about."""


def lint(constitution: Constitution) -> list[Finding]:
    """Return what is allowed but probably not meant; an empty list is a clean bill.

    Looks for principles that say the same (and contradict each other in weight), requests longer than a
    batched critique bears, missing translations, preference questions that were made up for lack of one,
    misspelt aims, and examples that show only one verdict.
    """
    return [
        *_lint_wording(constitution),
        *_lint_duplicates(constitution),
        *_lint_languages(constitution),
        *_lint_examples(constitution),
    ]


def _lint_wording(constitution: Constitution) -> Iterator[Finding]:
    for principle in constitution:
        for name in ("critique_request", "revision_request"):
            length = len(getattr(principle, name))
            if length > MAX_REQUEST_CHARS:
                advice = f"{length} characters; keep it to {MAX_REQUEST_CHARS}, or split the principle"
                yield Finding(advice, principle.id, name)
        if principle.preference_question == _plain_question(principle.critique_request):
            yield Finding(
                "made from the critique request; write which of two answers is better",
                principle.id,
                "preference_question",
            )
        if _words(principle.critique_request) == _words(principle.revision_request):
            yield Finding("says the same as the critique request", principle.id, "revision_request")
        close = difflib.get_close_matches(principle.aim.lower(), KNOWN_AIMS, n=1, cutoff=0.8)
        if close and principle.aim not in KNOWN_AIMS:
            yield Finding(f"{principle.aim!r}: did you mean {close[0]!r}?", principle.id, "aim")


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
    """What happened on the way from the first to the second."""
    principle: str | None
    """Id of the principle; None for a field of the constitution."""
    field: str | None
    """The field that changed; None where a whole principle was added, removed or moved."""
    before: object
    """Value in the first: of the field, the Principle removed, or its position among the common ones."""
    after: object
    """The same in the second."""


def diff(a: Constitution, b: Constitution) -> list[Difference]:
    """Return how `b` differs from `a`: constitution fields first, then principles in the order of `b`."""
    found = [
        Difference("changed", None, name, getattr(a, name), getattr(b, name))
        for name in type(a).model_fields
        if name not in ("principles", "extends") and getattr(a, name) != getattr(b, name)
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
        found += [
            Difference("changed", new.id, name, getattr(old, name), getattr(new, name))
            for name in type(new).model_fields
            if getattr(old, name) != getattr(new, name)
        ]
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a constitution file, for editors to complete by."""
    schema = _File.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Constitution",
        "anyOf": [{"required": ["principles"]}, {"required": ["extends"]}],
    }
