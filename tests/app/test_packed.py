"""What an app returns, through a checkpointer that gives back no class it does not know, and out again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel, Field

from cai_graph.app.packed import pack, unpack
from cai_graph.errors import RunError

STRICT = JsonPlusSerializer(allowed_msgpack_modules=None)


class Risk(Enum):
    LOW = "low"


class Part(BaseModel):
    risk: Risk = Risk.LOW


class Advice(BaseModel):
    text: str = Field(alias="said")
    parts: list[Part] = []

    class Inner(BaseModel):
        number: int = 0


@dataclass(frozen=True)
class Noted:
    text: str
    parts: list[Part] = field(default_factory=list)


def kept(value: Any) -> Any:
    return unpack(STRICT.loads_typed(STRICT.dumps_typed(pack(value))))


@pytest.mark.parametrize(
    "value",
    [
        Advice(said="hello", parts=[Part()]),
        Advice.Inner(number=1),
        Noted("hello", [Part()]),
        {"messages": [AIMessage("hello", id="a")], "structured_response": Part(), "docs": [Document("d")]},
        {"answer": "hello", "n": [1, 2.5, None, {"deep": Noted("x")}]},
        "hello",
    ],
)
def test_what_a_checkpointer_keeps_has_the_types_that_it_had(value: Any) -> None:
    assert kept(value) == value
    assert type(kept(value)) is type(value)


def test_a_dict_that_looks_like_a_packed_object_stays_a_dict() -> None:
    forged = pack(Part())

    assert kept(forged) == forged
    assert kept({"deep": [forged]}) == {"deep": [forged]}


@pytest.mark.parametrize("name", ["os:system", "json:JSONDecoder", "never_loaded:Part", f"{__name__}:Risk"])
def test_no_class_is_restored_but_a_loaded_one_that_has_fields(name: str) -> None:
    packed = {**pack(Part()), "__cai_class__": name.split(":")}

    with pytest.raises(RunError, match=f"is a {name}, .* import"):
        unpack(packed)


def test_what_cannot_be_told_as_json_is_left_to_the_checkpointer() -> None:
    class Local(BaseModel):
        text: str = "hello"

    class_of_no_module, not_a_number = Local(), Number(value=math.nan)

    assert pack(class_of_no_module) is class_of_no_module
    assert pack(not_a_number) is not_a_number


class Number(BaseModel):
    value: float
