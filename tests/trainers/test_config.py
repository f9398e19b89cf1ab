"""Configs of stages: YAML and settings into a frozen dataclass; every error names its place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cai_graph.errors import ConfigError, MissingExtra
from trainers.config import above, at_least, plain, read, require


@dataclass(frozen=True, kw_only=True)
class Part:
    rank: int = 8
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Whole:
    model: str
    data: Path
    learning_rate: float = 1e-5
    max_steps: int | None = None
    lora: Part | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is above 0, found {self.learning_rate!r}")


@dataclass(frozen=True)
class Addresses:
    logs: tuple[str, ...]
    reward: Any


def written(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


def test_a_file_and_settings_make_a_config_and_settings_come_last(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\ndata: d.jsonl\nlearning_rate: 1e-6\nlora:\n  targets: [a, b]\n")

    config = read(Whole, path, ["learning_rate=2e-5", "lora.rank=4", "max_steps=7"])
    assert config == Whole(
        model="m",
        data=Path("d.jsonl"),
        learning_rate=2e-5,
        max_steps=7,
        lora=Part(rank=4, targets=("a", "b")),
    )


def test_plain_writes_defaults_too_and_what_json_holds(tmp_path: Path) -> None:
    config = read(Whole, written(tmp_path, "model: m\ndata: d"))

    assert plain(config).keys() == {field.name for field in dataclasses.fields(Whole)}
    assert json.loads(json.dumps(plain(config))) == plain(config)


def test_plain_shows_no_password() -> None:
    spec = "judge:http://ann:s3cret@host/v1#m"
    told = Addresses(("postgresql://ann:s3cret@host/logs",), [{"judge": spec}, spec])
    assert plain(told) == {
        "logs": ["postgresql://ann@host/logs"],
        "reward": [{"judge": "judge:http://host/v1#m"}, "judge:http://host/v1#m"],
    }
    whole = [f"{key}={json.dumps(value)}" for key, value in plain(told, passwords=True).items()]
    assert read(Addresses, None, whole) == told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: &a {b: *a}\n", r"x\.yaml line 1: is no YAML: the alias '\*a' is refused; write out what"),
        ("model: &a x\ndata: *a\n", r"x\.yaml line 2: is no YAML: the alias"),
        ("model: " + "[" * 3000, r"x\.yaml: is no YAML: it is nested too deeply"),
    ],
    ids=["no end", "alias", "deep"],
)
def test_yaml_that_expands_or_has_no_end_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(Whole, written(tmp_path, text))
    with pytest.raises(ConfigError, match="the value is no YAML"):
        read(Whole, None, [f"model={text.removeprefix('model: ')}"])


@pytest.mark.parametrize("value", ["!!int x", "!!bool x", "!!timestamp x", '!!float ""', "9" * 5000])
def test_yaml_that_is_not_what_its_type_says_is_an_error(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml: is no YAML: a value cannot be read as its type"):
        read(Whole, written(tmp_path, f"model: {value}\n"))
    with pytest.raises(ConfigError, match=r"--set 'model=.*: a value cannot be read as its type"):
        read(Whole, None, [f"model={value}"])


def test_a_setting_that_is_no_yaml_is_told_why() -> None:
    with pytest.raises(
        ConfigError, match=r"--set 'model=\*a': the value is no YAML: the alias '\*a' is refused"
    ):
        read(Whole, None, ["model=*a"])


@pytest.mark.parametrize("day", ["2026-02-28", "2026-02-30", "2026-02-28 10:00:00"])
def test_a_date_is_a_text(tmp_path: Path, day: str) -> None:
    assert read(Whole, written(tmp_path, f"model: {day}\ndata: d\n")).model == day
    assert read(Whole, None, [f"model={day}", "data=d"]).model == day


def test_what_plain_writes_reads_back_as_the_same_config(tmp_path: Path) -> None:
    import yaml

    config = Whole(model="m", data=Path("d"), lora=Part(targets=("a",)))
    assert read(Whole, written(tmp_path, yaml.safe_dump(plain(config)))) == config


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        (
            "model: m\ndata: d\nlearnign_rate: 1\n",
            [],
            r"x.yaml line 3: unknown key 'learnign_rate'; did you "
            r"mean 'learning_rate'\?",
        ),
        ("model: m\ndata: d\n", ["lr=1e-5"], r"--set: unknown key 'lr'; did you mean 'learning_rate'\?"),
        (
            "model: m\ndata: d\nlora:\n  rnak: 2\n",
            [],
            r"line 4: unknown key 'lora.rnak'; did you mean "
            r"'lora.rank'\?",
        ),
        ("model: m\ndata: d\nqqq: 2\n", [], "line 3: unknown key 'qqq'; the keys are model, data"),
        ("data: d\n", [], "x.yaml: has no 'model'; add the line `model: …`, or --set model=…"),
        ("model: m\ndata: d\nlearning_rate: fast\n", [], "x.yaml line 3: learning_rate: .*float.*str"),
        ("model: m\ndata: d\nlora:\n  rank: [1]\n", [], "x.yaml line 4: lora.rank: .*int.*array"),
        ("model: m\ndata: 3\n", [], "x.yaml line 2: data: expected path"),
        ("model: m\ndata: d\n", ["max_steps=many"], "--set: max_steps: "),
        ("model: m\nmodel: n\n", [], "x.yaml line 2: 'model' is set on line 1 already"),
        ("model: [m\n", [], "x.yaml line 2: is no YAML"),
        ("- m\n", [], "holds a list; a config is lines of"),
        ("model: m\ndata: d\nlearning_rate: 0\n", [], "learning_rate is above 0, found 0.0"),
        ("model: !!python/object:os.system m\n", [], "is no YAML"),
        ("", ["model"], "write key=value"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, text: str, settings: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        read(Whole, written(tmp_path, text), settings)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        read(Whole, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("check", "value", "said"),
    [
        (at_least, 0, "max_steps is a number from 1, found 0"),
        (at_least, float("nan"), "max_steps is a number from 1, found nan"),
        (above, 1, "max_steps is a number above 1, found 1"),
        (above, float("nan"), "max_steps is a number above 1, found nan"),
    ],
)
def test_a_number_out_of_bounds_is_named(check: Callable[..., None], value: float, said: str) -> None:
    config = SimpleNamespace(max_steps=value, warmup=2)
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check(1, config, "warmup", "max_steps")


def test_a_number_that_nobody_set_has_no_bounds() -> None:
    at_least(1, SimpleNamespace(max_steps=None), "max_steps")


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(MissingExtra, match="`cai train x` needs no_such_package; "):
        require("`cai train x`", "yaml", "no_such_package")
