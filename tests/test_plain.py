"""What an application hands over is told as JSON, so that no record is lost for it."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from replies import RULES, by_role, flags

from cai_graph import constitutional, open_log, plain
from cai_graph.trajectory import Trajectory, decode


class Markup(str):
    """Text of a class of its own, as template engines and numpy have."""


class Tag(StrEnum):
    PROD = "prod"


def nested(levels: int) -> dict[str, Any]:
    return json.loads('{"a":' * levels + "1" + "}" * levels)


def test_what_is_nested_deeply_is_told_to_a_depth() -> None:
    told = json.dumps(plain.plain({"deep": [nested(400)]}))

    assert "nested deeper than 100 levels" in told


def test_what_holds_itself_is_told_once() -> None:
    parent: dict[str, Any] = {"name": "p"}
    parent["children"] = [{"parent": parent}, {"parent": parent}]
    twice = ["x"]

    told = plain.plain({"tree": parent, "twice": [twice, twice]})

    child = {"parent": "[a value that holds this one]"}
    assert told == {"tree": {"name": "p", "children": [child, child]}, "twice": [["x"], ["x"]]}


def test_what_holds_another_twice_and_so_on_is_told_to_a_number() -> None:
    shared: list[Any] = ["x"]
    for _ in range(60):
        shared = [shared, shared]

    told = json.dumps(plain.plain({"shared": shared}))

    assert told.count('"x"') > 10_000
    assert "[more than 100000 values]" in told
    assert len(told) < 5_000_000


def test_a_number_of_any_size_is_told() -> None:
    huge = 10**5000

    told = plain.plain({"n": huge, "m": -huge, "i": 10**900, huge: 1})

    assert (told["n"], told["m"], told["i"]) == (hex(huge), hex(-huge), 10**900)
    assert len(json.loads(json.dumps(told))) == 4


class Unsaid:
    def __repr__(self) -> str:
        raise ValueError("it says nothing of itself")


def test_what_cannot_be_told_is_told_by_its_class() -> None:
    (told,) = plain.plain([Unsaid()])

    assert "Unsaid object at" in told


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_what_an_app_hands_over_costs_no_record(tmp_path: Path, mode: Any) -> None:
    args = {"amount": float("nan"), "most": float("inf"), "to": Markup("bob"), "deep": nested(300)}
    call = {"name": "pay", "args": args, "id": "1"}
    config: RunnableConfig = {
        "tags": [Tag.PROD, Markup("z"), 4711],
        "metadata": {"user": {"id": Markup("u")}},
    }  # type: ignore[list-item]

    def app(asked: dict[str, Any]) -> dict[str, Any]:
        return {"answer": AIMessage("fine", tool_calls=[call]), "notes": Markup("seen")}

    with open_log(tmp_path / "cai.db") as log:
        guarded: Any = constitutional(
            RunnableLambda(app),
            constitution=RULES,
            critic=by_role(critique=flags()),
            reviser=by_role(critique=""),
            log=log,
            context_keys=["notes"],
            mode=mode,
        )
        guarded.invoke({"question": "Pay bob."}, config)
        if mode == "shadow":
            guarded.shadow.close()
        (payload,) = log.payloads()
    record = decode(payload)
    assert isinstance(record, Trajectory)
    assert record.tags == ("prod", "z", "4711")
    assert record.context == {"notes": "seen"}
    assert record.metadata == {"user": {"id": "u"}}
    assert record.draft is not None
    told = record.draft.answer.tool_calls[0].args
    assert (told["amount"], told["most"], told["to"]) == ("nan", "inf", "bob")


def test_metadata_is_recorded_as_it_was_when_the_app_was_called(tmp_path: Path) -> None:
    metadata = {"user": {"id": 1}}
    with open_log(tmp_path / "cai.db") as log:
        guarded: Any = constitutional(
            RunnableLambda(lambda asked: "fine"),
            constitution=RULES,
            critic=by_role(critique=flags()),
            reviser=by_role(critique=""),
            log=log,
            mode="shadow",
        )
        guarded.invoke("hello", {"metadata": metadata})
        metadata["user"]["id"] = 2
        guarded.shadow.close()
        (record,) = log.read()
    assert isinstance(record, Trajectory)
    assert record.metadata == {"user": {"id": 1}}
