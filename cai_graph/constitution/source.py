"""Parses files of constitutions into plain data with line numbers; nothing in a file is ever executed."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cai_graph.errors import ConstitutionError

__all__ = ["MAX_FILE_BYTES", "Source", "read", "short"]

MAX_FILE_BYTES = 1 << 20  # the largest built-in file is about 1/50 of this


@dataclass(frozen=True)
class Source:
    """Data that was read, with its origin and, by path, the line number of each part."""

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


def read(path: Path) -> Source:
    """Return the data of a YAML, JSON or Python file.

    Raises:
        ConstitutionError: it cannot be read or parsed; the message names the line.
    """
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
    return Source(label, data, lines, path.parent)


def _label(path: Path) -> str:
    """Return a path relative to the current directory where it is below that, else as it is."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


_Parsed = tuple[object, dict[tuple[str | int, ...], int]]


def _parse_yaml(text: str, label: str) -> _Parsed:
    """Return plain dicts, lists and strings, and the line number of each part.

    Every scalar is a string: YAML 1.1 would read the language code `no` as false and the version 1.10 as 1.1.
    Aliases are rejected (they can expand a small file into gigabytes), as are tags and duplicate keys.
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
        # Apart from rare escapes JSON is YAML, and the YAML parser reports lines.
        return data, _parse_yaml(text, label)[1]
    except ConstitutionError:
        return data, {}


def _parse_python(text: str, label: str) -> _Parsed:
    """Return the arguments of each ConstitutionalPrinciple(...) call; the file is never executed."""
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


def short(value: object) -> str:
    """Return a few words for a value: "a list", "a mapping", "nothing", or its repr, cut to 60 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
