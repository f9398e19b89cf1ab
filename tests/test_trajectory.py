"""The records: loss-free JSON, versions, ids, and the way from and to LangChain's messages."""

from __future__ import annotations

import ast
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from log_support import feedback, records, trajectory

import cai_graph.trajectory as module
from cai_graph.errors import DataError
from cai_graph.messages import from_langchain, to_langchain
from cai_graph.trajectory import SCHEMA_VERSION, Message, Record, ToolCall, decode, encode, new_id, text_of


@settings(max_examples=300)
@given(records)
def test_any_record_reads_back_equal(record: Record) -> None:
    data = encode(record)
    assert data.isascii()
    assert b"\n" not in data
    again = decode(data)
    assert again == record
    assert type(again) is type(record)
    assert encode(again) == data
    json.loads(data)


@pytest.mark.parametrize(
    "text", ["\ud800", "a\udfffb", "\ude00\ud83d", "😀", "\0", "\u2028", '"\\', "null", "\x7f"]
)
def test_unusual_text_survives(text: str) -> None:
    record = trajectory(metadata={"text": text, text: 1}, source=text)
    assert decode(encode(record)) == record


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["seconds", "metadata"])
def test_nan_and_infinity_are_refused(number: float, where: str) -> None:
    record = trajectory(**{where: number if where == "seconds" else {"deep": [{"number": number}]}})
    with pytest.raises(DataError, match=f"{record.id} cannot be written as JSON"):
        encode(record)


@pytest.mark.parametrize("number", [1e16, 1e-7, -0.0, 5e-324, 1.7976931348623157e308, 0.1 + 0.2])
def test_floats_keep_every_bit(number: float) -> None:
    again = decode(encode(trajectory(seconds=number, metadata={"number": number})))
    assert math.copysign(1, again.seconds) == math.copysign(1, number)  # type: ignore[union-attr]
    assert again.seconds == number  # type: ignore[union-attr]
    assert again.metadata["number"] == number  # type: ignore[union-attr]


def test_an_object_that_json_lacks_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be written as JSON"):
        encode(trajectory(metadata={"thing": object()}))


def test_a_loop_in_metadata_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    with pytest.raises(DataError, match="cannot be written as JSON"):
        encode(trajectory(metadata=loop))


def test_every_record_says_its_version() -> None:
    data = json.loads(encode(trajectory()))
    assert data["schema"] == SCHEMA_VERSION
    assert data["record"] == "trajectory"
    assert encode(feedback("x")).endswith(b'"schema":%d}' % SCHEMA_VERSION)


def test_a_newer_version_is_refused_by_its_number() -> None:
    data = json.loads(encode(trajectory())) | {"schema": SCHEMA_VERSION + 1}
    with pytest.raises(DataError, match=f"schema version {SCHEMA_VERSION + 1}, this release reads"):
        decode(json.dumps(data))


def test_an_earlier_version_is_brought_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    record = trajectory()
    old = json.loads(encode(record))
    old["duration"] = old.pop("seconds")

    def upgrade(data: dict[str, Any]) -> dict[str, Any]:
        return {("seconds" if name == "duration" else name): value for name, value in data.items()}

    monkeypatch.setattr(module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    monkeypatch.setitem(module._UPGRADES, SCHEMA_VERSION, upgrade)
    assert decode(json.dumps(old)) == msgspec.structs.replace(record, schema=SCHEMA_VERSION + 1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "not a JSON record"),
        (b'{"record":"traj', "not a JSON record"),
        (b"[]", "a record is a JSON object, found list"),
        (b"{}", "not a record of this log"),
        (b'{"record":"novel"}', "not a record of this log"),
        (b'{"record":"feedback","schema":"one"}', "'schema' is the version"),
        (b'{"record":"feedback","schema":0}', "'schema' is the version"),
        (b'{"record":"feedback","score":NaN}', "NaN is not JSON"),
        (b"\xff\xfe", "not a JSON record"),
        (b"[" * 100_000, "not a JSON record"),
    ],
)
def test_a_broken_line_is_explained(line: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        decode(line)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        trajectory().outcome = "KEPT"  # type: ignore[misc, assignment]


def test_a_pair_of_surrogates_reads_back_as_its_character() -> None:
    again = decode(encode(trajectory(source="\ud83d\ude00")))
    assert again.source == "\N{GRINNING FACE}"  # type: ignore[union-attr]


def test_every_field_of_every_record_is_described() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, following in zip(kind.body, [*kind.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(following, ast.Expr), f"{kind.name}.{ast.unparse(field.target)}"
                assert isinstance(following.value, ast.Constant)


def test_ids_are_version_7_and_follow_the_clock() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {UUID(id).version for id in ids} == {7}
    assert {UUID(id).variant for id in ids} == {UUID(int=0x8 << 60).variant}
    assert [id[:13] for id in ids] == sorted(id[:13] for id in ids)
    made = datetime.fromtimestamp(int(ids[0].replace("-", "")[:12], 16) / 1000)
    assert abs((datetime.now() - made).total_seconds()) < 60


def test_the_prompt_is_the_last_user_message() -> None:
    record = trajectory(
        messages=(
            Message(role="user", content="first"),
            Message(role="user", content=[{"type": "text", "text": "sec"}, {"type": "image"}, "ond"]),
            Message(role="assistant", content="hm"),
        )
    )
    assert record.prompt == "second"
    assert trajectory(messages=()).prompt == ""


def test_messages_go_to_langchain_and_back() -> None:
    messages = [
        Message(role="system", content="s", id="1"),
        Message(role="user", content=[{"type": "text", "text": "hello"}], name="ann"),
        Message(role="assistant", content="", tool_calls=(ToolCall(name="add", args={"a": 1}, id="c1"),)),
        Message(role="tool", content="2", tool_call_id="c1"),
        Message(role="narrator", content="meanwhile"),
    ]
    theirs = to_langchain(messages)
    kinds = [SystemMessage, HumanMessage, AIMessage, ToolMessage, ChatMessage]
    assert [type(message) for message in theirs] == kinds
    assert [from_langchain(message) for message in theirs] == messages


def test_a_chunk_counts_as_the_message_it_adds_up_to() -> None:
    assert from_langchain(AIMessageChunk(content="part")) == Message(role="assistant", content="part")
    assert text_of(AIMessageChunk(content=[{"type": "text", "text": "a"}, "b"])) == "ab"
