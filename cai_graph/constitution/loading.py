"""Loads a Constitution from a name, a file or plain data, applies its `extends`, and validates it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cai_graph.constitution.foreign import own_format
from cai_graph.constitution.principles import (
    RESOLVED,
    Constitution,
    Example,
    File,
    Principle,
    Texts,
    contradictions,
    nearest,
    same_ids,
)
from cai_graph.constitution.source import Source, read, short
from cai_graph.errors import ConstitutionError

__all__ = ["builtin", "load"]

_PACKAGE = Path(__file__).parents[1]
_MAX_SENTENCES = 10  # most errors reported at once for one file


def load(source: object) -> Constitution:
    """Return the constitution that `source` names or contains.

    Args:
        source: a built-in name (see `builtin`); a path to a YAML or JSON file in our own format, to a
            Python file with LangChain's principles (parsed, never run), to a list of
            {name, critique_request, revision_request}, or to a file of {"constitutions": [{critic,
            revision}]}; a mapping or list of the same shapes; a list of Principles or of LangChain's
            ConstitutionalPrinciple objects; or a Constitution, which is returned as it is. Foreign
            principles without an aim get the aim "general".

    Raises:
        ConstitutionError: it cannot be read, or is wrong; the message names file, line and field, and says
            what to do.
    """
    if isinstance(source, Constitution):
        return source
    if isinstance(source, str | os.PathLike):
        path = _find(os.fspath(source), Path(), "")
        return _build(_file(path), (path,), {})
    if isinstance(source, Mapping | list | tuple):
        return _build(own_format(Source(type(source).__name__, source)), (), {})
    raise ConstitutionError(
        f"cannot read a constitution from {type(source).__name__} {source!r}; "
        "give a built-in name, a path, a mapping, a list of principles, or a Constitution"
    )


def builtin() -> tuple[str, ...]:
    """Return the names of the built-in constitutions, sorted."""
    return tuple(sorted(path.stem for path in _builtin_folder(_PACKAGE).glob("*.yaml")))


def _builtin_folder(package: Path) -> Path:
    """Return the folder of the built-in constitutions, for the package folder of a wheel or a repository."""
    for folder in (package / "constitutions", package.parent / "constitutions"):
        if (folder / "balanced.yaml").is_file():
            return folder
    raise ConstitutionError(
        f"the built-in constitutions are missing beside {package}; install cai-graph again"
    )


def _find(name: str, folder: Path, asked_by: str) -> Path:
    """Return the file for a built-in name or a path; a relative path is relative to `folder`."""
    names = builtin()
    if name in names:
        return (_builtin_folder(_PACKAGE) / f"{name}.yaml").resolve()
    try:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path.resolve()
        if name and path.is_dir():
            raise ConstitutionError(f"{asked_by}{name!r} is a folder; name a file in it")
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, ~ of an unknown user
        raise ConstitutionError(
            f"{asked_by}{short(name)} is not a path: {getattr(error, 'strerror', error)}"
        ) from error
    close = difflib.get_close_matches(name, names, n=1)
    raise ConstitutionError(
        f"{asked_by}{short(name)} is neither a built-in constitution nor a file; "
        + (f"did you mean {close[0]!r}? " if close else "")
        + f"built in are {', '.join(names)}"
    )


def _file(path: Path) -> Source:
    return own_format(read(path), name=path.name.split(".")[0])


def _build(source: Source, chain: tuple[Path, ...], built: dict[Path, Constitution]) -> Constitution:
    """Return the constitution of a source, with its parents (`extends`) and `remove` applied.

    Args:
        source: the data that was read, in our own format.
        chain: the files from the one that was asked for down to this one, to detect cycles.
        built: the parents built so far, filled here, so that a shared parent is built only once.
    """
    file = _checked(source)
    for problem in same_ids(file.principles):
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
        if path not in built:
            built[path] = _build(_file(path), (*chain, path), built)
        parent = built[path]
        principles |= {p.id: p for p in parent}
        examples += [e for e in parent.examples if e not in examples]
        own = parent.refusal if "refusal" in parent.model_fields_set else None
        refusal = _refusal(refusal, own, parent.refusal_translations)

    for i, principle_id in enumerate(file.remove):
        if principle_id not in principles:
            raise ConstitutionError(
                f"{source.at(('remove', i))}: 'remove' names {principle_id!r}, which no parent has; "
                f"{nearest(principle_id, principles)}"
            )
        del principles[principle_id]
    examples = [e for e in examples if e.principle is None or e.principle in principles]
    principles |= {p.id: p for p in file.principles}
    refusal = _refusal(refusal, file.refusal, file.refusal_translations)

    for problem in contradictions(tuple(principles.values()), file.examples):
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
        context=RESOLVED,
    )


def _refusal(inherited: dict[str, Any], own: str | None, translations: dict[str, str]) -> dict[str, Any]:
    """Return the fields of the refusal: the file's own, or the inherited one with more translations."""
    if own is not None:
        return {"refusal": own, "refusal_translations": translations}
    return {**inherited, "refusal_translations": inherited.get("refusal_translations", {}) | translations}


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


def _checked(source: Source) -> File:
    """Return the validated data; raise ConstitutionError with one sentence for each wrong field."""
    if not isinstance(source.data, Mapping):
        raise ConstitutionError(
            f"{source.label}: found {short(source.data)} where a constitution should be; "
            "write 'name:' and 'principles:'"
        )
    try:
        return File.model_validate(source.data)
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


def _sentence(detail: Any, source: Source) -> str:
    """Return one of pydantic's errors as a sentence: the place, what was found, and what to write instead."""
    kind, found = detail["type"], detail["input"]
    path = tuple(part for part in detail["loc"] if part != "[key]")
    owner, where = _owner(source.data, path), source.at(path)
    name = next((part for part in reversed(path) if isinstance(part, str)), "constitution")
    if kind == "missing" or (found is None and name in _TO_ADD):
        return f"{where}: {owner} has no {name!r}; {_TO_ADD.get(name, 'add it')}"
    if kind == "extra_forbidden":
        return f"{where}: {owner} has the unknown field {name!r}; {nearest(name, _fields_at(path))}"
    if kind == "value_error":
        return f"{where}: {owner}: {detail['ctx']['error']}"
    if kind == "string_too_short":
        return f"{where}: {owner} has an empty {name!r}; {_TO_ADD.get(name, 'write it or take it out')}"
    if len(path) == 2 and kind == "model_type":
        return f"{where}: {owner} is {short(found)}; write its fields: {', '.join(_fields_at((*path, '')))}"
    if kind == "string_pattern_mismatch" and "[key]" in detail["loc"]:
        return f"{where}: {owner} has the language {found!r}; write a code such as de or pt-BR"
    advice = _PATTERN_IN_WORDS.get(name) if kind.startswith("string_") and kind != "string_type" else None
    advice = advice or _IN_WORDS.get(kind) or detail["msg"][0].lower() + detail["msg"][1:]
    return f"{where}: {owner}: {name!r} is {short(found)}; {advice}"


def _owner(data: Any, path: tuple[str | int, ...]) -> str:
    """Return the words for the part of a constitution that a field belongs to."""
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
    model: type[BaseModel] = File
    if len(path) > 2:
        model = Example if path[0] == "examples" else Texts if path[2] == "translations" else Principle
    return list(model.model_fields)
