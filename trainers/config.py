"""Configs of stages: reads a frozen dataclass from YAML and settings; errors name file, line and key.

read, convert, plain   a config from a file and settings, from values, and as JSON
shown                  a JSON value without its passwords
at_least, above        bounds of numeric fields
require                checks for packages that a stage needs
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml
from yaml.composer import ComposerError

from cai_graph.addresses import without_password
from cai_graph.errors import ConfigError, MissingExtra

__all__ = ["above", "at_least", "convert", "plain", "read", "require", "shown"]

C = TypeVar("C")


def read(
    cls: type[C],
    path: Path | None,
    settings: Sequence[str] = (),
    *,
    hidden: Collection[str] = (),
    further: Sequence[str] = (),
) -> C:
    """Return a config read from a YAML file and settings.

    Args:
        cls: a dataclass; its fields may be dataclasses in turn.
        path: the YAML file; None: all values come from the settings.
        settings: each "key=value", the value in YAML; "lora.rank=8" sets a key of a section. They override
            the file.
        hidden: keys that the caller sets itself, which no error message suggests.
        further: keys that the caller reads itself, which error messages suggest, too.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the message suggests the nearest known one),
            set twice or missing, or a value has the wrong type. The message names file, line and key.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    if path is not None:
        values, lines = _file(path)
        places = {key: f"{path} line {line}: " for key, line in lines.items()}
    for setting in settings:
        key, value = _setting(setting)
        _put(values, key, value)
        places[key] = "--set: "
    return _convert(cls, values, path, places, hidden, further)


def convert(
    cls: type[C], values: Mapping[str, Any], *, hidden: Collection[str] = (), further: Sequence[str] = ()
) -> C:
    """Return a config from values, as YAML represents them; arguments and errors are those of `read`."""
    return _convert(cls, values, None, {}, hidden, further)


def _convert(
    cls: type[C],
    values: Mapping[str, Any],
    path: Path | None,
    places: Mapping[str, str],
    hidden: Collection[str],
    further: Sequence[str],
) -> C:
    _check_keys(cls, values, "", places, hidden=hidden, further=further)
    try:
        # Not strict: YAML 1.1 reads 1e-5 as text, because it has no dot.
        return msgspec.convert(values, cls, strict=False, dec_hook=_custom)
    except msgspec.ValidationError as error:
        said, _, at = str(error).partition(" - at `$")
        key = at.rstrip("`").lstrip(".")
        raise ConfigError(_wrong(said, key, path, places)) from error


def plain(config: Any, *, passwords: bool = False) -> dict[str, Any]:
    """Return a complete config as JSON values, from which `convert` makes the same config again.

    Args:
        config: the config.
        passwords: whether to keep passwords in addresses of logs and servers; omit them in what is shown or
            stored.
    """
    # msgspec would encode only the attributes of an instance, and omit defaults that are set on its class.
    text = msgspec.json.encode(dataclasses.asdict(config), enc_hook=str)
    found: dict[str, Any] = msgspec.json.decode(text)
    return found if passwords else shown(found)


def shown(value: Any) -> Any:
    """Return a JSON value without the passwords in its addresses, so that it may be shown and stored."""
    if isinstance(value, str):
        return without_password(value)
    if isinstance(value, dict):
        return {key: shown(one) for key, one in value.items()}
    return [shown(one) for one in value] if isinstance(value, list) else value


def at_least(least: float, config: object, *names: str) -> None:
    """Check that fields of a config are numbers of at least `least`; None is accepted.

    Raises:
        ConfigError: one is not; the message names it.
    """
    for name in names:
        if (found := getattr(config, name)) is not None and not found >= least:
            raise ConfigError(f"{name} is a number from {least}, found {found!r}")


def above(bound: float, config: object, *names: str) -> None:
    """Check that fields of a config are numbers above `bound`.

    Raises:
        ConfigError: one is not; the message names it.
    """
    for name in names:
        if not (found := getattr(config, name)) > bound:
            raise ConfigError(f"{name} is a number above {bound}, found {found!r}")


def require(needed_by: str, *packages: str) -> None:
    """Check that packages of the extra `train` are installed.

    Raises:
        MissingExtra: one is not; the message says that `needed_by` needs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(needed_by, package, "train")


def _custom(wanted: type, value: Any) -> Any:
    if wanted is Path and isinstance(value, str):
        return Path(value).expanduser()
    if isinstance(value, wanted):
        return value
    raise ValueError(f"Expected `{'path' if wanted is Path else wanted.__name__}`, got `{value!r}`")


# --- the file -----------------------------------------------------------------------------------------


def _file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the values of a YAML file, and the line of each key by its dotted name."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {why}; name a YAML file with the config") from error
    try:
        node, values = _parsed(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path} line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: is no YAML: {_reason(error)}") from error
    if node is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; a config is lines of `key: value`")
    lines: dict[str, int] = {}
    for key, line in _keys(node, ""):
        if key in lines:
            raise ConfigError(f"{path} line {line}: {key!r} is set on line {lines[key]} already; keep one")
        lines[key] = line
    return values, lines


class _Loader(yaml.SafeLoader):
    """YAML in which a date is a text. Aliases are refused: a few lines of them could expand to gigabytes."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name for what it reads there
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            said = f"the alias '*{event.anchor}' is refused; write out what it stands for"
            raise ComposerError(None, None, said, event.start_mark)
        return super().compose_node(parent, index)


def _parsed(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes of a YAML text, which have line numbers, and its values.

    Raises:
        yaml.YAMLError: it is not YAML, or has aliases, or is nested too deeply, or a value cannot be read as
            its type.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, LookupError, AttributeError, ArithmeticError) as error:  # not wrapped by PyYAML
        raise yaml.YAMLError("a value cannot be read as its type, such as !!int") from error
    finally:
        loader.dispose()


def _reason(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).partition("\n")[0]


def _keys(node: yaml.Node, before: str) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{before}{key.value}"
        yield name, key.start_mark.line + 1
        yield from _keys(value, f"{name}.")


def _setting(setting: str) -> tuple[str, Any]:
    key, is_one, value = setting.partition("=")
    if not is_one or not key.strip():
        raise ConfigError(f"--set {setting!r}: write key=value, such as --set learning_rate=1e-5")
    try:
        return key.strip(), _parsed(value)[1]
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {setting!r}: the value is no YAML: {_reason(error)}; put a text in quotes"
        ) from error


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value


# --- checks -------------------------------------------------------------------------------------------


def _check_keys(
    cls: Any,
    values: Mapping[Any, Any],
    before: str,
    places: Mapping[str, str],
    *,
    hidden: Collection[str] = (),
    further: Sequence[str] = (),
) -> None:
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key, value in values.items():
        name = f"{before}{key}"
        if key not in known:
            offered = [*further, *(one for one in known if one not in hidden)]
            near = _nearest(str(key), offered)
            hint = f"did you mean {before + near!r}?" if near else f"the keys are {', '.join(offered)}"
            raise ConfigError(f"{places.get(name, '')}unknown key {name!r}; {hint}")
        inner = _dataclass_in(hints[key])
        if inner is not None and isinstance(value, dict):
            _check_keys(inner, value, f"{name}.", places)


def _dataclass_in(hint: Any) -> Any:
    """Return the dataclass of a field's type, alone or in a union with others; None: it has none."""
    return next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """Return the known key that was probably meant, by its letters or its initials (lr: learning_rate)."""
    close = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.5)
    short = [name for name in known if "".join(word[0] for word in name.split("_") if word) == key.lower()]
    part = [name for name in known if len(key) > 2 and (key in name or name in key)]
    return next(iter([*short, *part[:1], *close]), None)


def _wrong(said: str, key: str, path: Path | None, places: Mapping[str, str]) -> str:
    if said.startswith("Object missing required field"):
        name = (f"{key}." if key else "") + said.split("`")[1]
        where = f"{path}: " if path else ""
        return f"{where}has no {name!r}; add the line `{name}: …`, or --set {name}=…"
    place = places.get(key) or next(
        (found for name, found in places.items() if key.startswith((f"{name}.", f"{name}["))), ""
    )
    return f"{place}{key}: {said[:1].lower()}{said[1:].replace('`', '')}"
