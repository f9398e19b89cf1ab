"""The page on the settings of training: its tables are the fields, defaults and menus of the code."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import msgspec
import pytest
import yaml
from repository import read_page

from trainers import critic, dpo, kto, online, ppo, reward, sft
from trainers.distill import Config
from trainers.distill.config import Drafts, Evaluation, Feedback, Rows
from trainers.stages import Lora, StageConfig
from trainers.watch import WatchConfig

PAGE = read_page("training-settings.md")

TABLES: dict[str, tuple[Any, Any]] = {
    "Every stage": (StageConfig, None),
    "lora": (Lora, None),
    "sft": (sft.Config, StageConfig),
    "dpo": (dpo.Config, StageConfig),
    "kto": (kto.Config, StageConfig),
    "reward": (reward.Config, StageConfig),
    "online": (online.Config, StageConfig),
    "online's vllm": (online.Vllm, None),
    "ppo": (ppo.Config, StageConfig),
    "watch": (WatchConfig, None),
    "critic": (critic.Config, None),
    "distill": (Config, None),
    "distill's drafts": (Drafts, None),
    "distill's rows": (Rows, None),
    "distill's feedback": (Feedback, None),
    "distill's evaluation": (Evaluation, None),
}
"""By heading: the config, and the one whose settings stand in a table of their own already."""

ELSEWHERE = {("critic", "turns")}
"""Defaults that the page says in words."""


def told(heading: str) -> dict[str, tuple[str, str]]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", section, re.MULTILINE)
    return {name: (default, effect) for name, default, effect in rows}


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def fields(cls: Any, shared: Any) -> dict[str, Any]:
    """Return the defaults of what a config has, without what the shared one has with the same default."""
    known = {one.name: default_of(one) for one in dataclasses.fields(shared)} if shared else {}
    found = {one.name: default_of(one) for one in dataclasses.fields(cls)}
    return {name: value for name, value in found.items() if name not in known or known[name] != value}


def menus(hint: Any) -> list[str]:
    """Return the words that a setting is chosen from."""
    if typing.get_origin(hint) is typing.Literal:
        return [word for word in typing.get_args(hint) if isinstance(word, str)]
    return [word for one in typing.get_args(hint) for word in menus(one)]


def test_no_table_is_of_nothing() -> None:
    assert re.findall(r"^## (.+)$", PAGE, re.MULTILINE) == list(TABLES)


@pytest.mark.parametrize("heading", TABLES)
def test_every_setting_stands_in_its_table_with_its_default_and_menu(heading: str) -> None:
    cls, shared = TABLES[heading]
    rows, found, hints = told(heading), fields(cls, shared), typing.get_type_hints(cls)

    assert sorted(rows) == sorted(found)
    for name, value in found.items():
        said, effect = rows[name]
        if (heading, name) in ELSEWHERE:
            assert "`" not in said
        elif dataclasses.is_dataclass(value):
            assert said.startswith("[its own](#"), name
        elif value is dataclasses.MISSING:
            assert said == "", name
        else:
            # As a config file is read: YAML 1.1 takes 1e-5 for text.
            read = msgspec.convert(yaml.safe_load(said.strip("`")), hints[name], strict=False)
            assert (read, said[0]) == (value, "`"), name
        for word in menus(hints[name]):
            assert f"`{word}`" in effect, (name, word)
