"""What of a record's texts comes into a log that redacts, in each database."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from log_support import comparison, everything, feedback, records, review, store_of, trajectory

from cai_graph import trajectory as records_of
from cai_graph.log import WITHHELD, open_log, redact_texts, redaction
from cai_graph.log.redaction import is_withheld, withhold
from cai_graph.trajectory import (
    Call,
    Comparison,
    Critique,
    Message,
    Outcome,
    Record,
    Revision,
    Round,
    ToolCall,
    Trajectory,
    decode,
    encode,
)


def test_redaction_comes_before_the_first_write(url: str) -> None:
    secret = "ann@example.org"
    record = trajectory(
        messages=(Message(role="user", content=[{"type": "text", "text": f"I am {secret}"}], name=secret),),
        context={"documents": f"mail of {secret}"},
        metadata={"who": [{"mail": secret}], secret: {"seen": secret}},
        tags=(secret,),
        error=f"KeyError: {secret}",
        source="run:1",
    )
    call = ToolCall(name="send", args={"to": {secret: "Ann", f"{secret}/home": "Ann, too"}})
    record = msgspec.structs.replace(record, released=Message(role="assistant", tool_calls=(call,)))
    with open_log(url, redact=redact_texts(lambda text: text.replace(secret, "[mail]"))) as log:
        log.append(record).result()
        stored = log.get(record.id)
        written = everything(url)
    assert b"[mail]" in written
    assert secret.encode() not in written
    assert isinstance(stored, Trajectory)
    assert stored.prompt == "I am [mail]"
    assert stored.metadata == {"who": [{"mail": "[mail]"}], "[mail]": {"seen": "[mail]"}}
    assert stored.source == "run:1"
    assert stored.rounds == record.rounds
    assert not is_withheld(stored)


@pytest.mark.parametrize("hook", [lambda record: record, withhold, lambda record: None])
def test_no_digest_by_which_a_redacted_prompt_could_be_guessed_is_written(url: str, hook) -> None:
    call = Call(role="draft", model="fake:app", prompt_digest="0f" * 8)
    with open_log(url, redact=hook) as log:
        for record in (trajectory(calls=(call,)), comparison("t", calls=(call,))):
            log.append(record).result()
        stored = [record for record in log.read() if isinstance(record, Trajectory | Comparison)]
    assert [call.prompt_digest for record in stored for call in record.calls] == [None, None]


def test_keys_that_redaction_makes_the_same_lose_no_value() -> None:
    redacted = redact_texts(lambda text: "x")(trajectory(metadata={"a": 1, "b": 2, "c": [3]}))

    assert isinstance(redacted, Trajectory)
    assert [*redacted.metadata.values()] == [1, 2, [3]]


def test_a_hook_is_given_the_record_as_it_was_when_it_was_appended(url: str) -> None:
    metadata = {"user": "ann"}
    with open_log(url, redact=lambda record: record) as log:
        with store_of(log)._writing:  # type: ignore[attr-defined]  # so that the hook comes later
            first = log.append(trajectory())
            appended = log.append(record := trajectory(metadata=metadata))
            metadata["user"] = "bob"
        first.result()
        appended.result()
        stored = log.get(record.id)
    assert isinstance(stored, Trajectory)
    assert stored.metadata == {"user": "ann"}


def walking_hook(record: Record) -> Record:
    def walked(value: Any) -> Any:
        return {key: walked(item) for key, item in value.items()}

    assert isinstance(record, Trajectory)
    return msgspec.structs.replace(record, metadata=walked(record.metadata))


def test_a_record_that_is_too_deep_for_the_hook_is_withheld_and_its_neighbours_are_not(url: str) -> None:
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(600):
        inner["secret"] = inner = {}
    call = ToolCall(name="look", args=deep)
    made = [
        trajectory(),
        trajectory(1, metadata=deep, released=Message(role="assistant", tool_calls=(call,))),
        trajectory(2),
    ]
    with open_log(url, redact=walking_hook) as log:
        for appended in [log.append(record) for record in made]:
            appended.result()
        stored = list(log.read())
        written = everything(url)
    assert [is_withheld(record) for record in stored] == [False, True, False]
    assert b"secret" not in written


def masking_hook(record: Record) -> Record:
    return redact_texts(lambda text: re.sub(r"\w", "#", text))(record)


@pytest.mark.parametrize("hook", [masking_hook, withhold])
def test_a_hook_that_masks_or_fails_leaves_the_structure_of_a_record(hook) -> None:
    first = Round(critique=Critique(), revisions=(Revision(answer=Message(role="assistant", content="x")),))
    record = trajectory(
        messages=(Message(role="user", content=[{"type": "text", "text": "secret"}]),),
        rounds=(first, Round(critique=Critique(), of="revision:0:0")),
    )

    stored = decode(encode(hook(record)))

    assert isinstance(stored, Trajectory)
    assert [turn.of for turn in stored.rounds] == ["draft", "revision:0:0"]
    assert stored.prompt in ("######", WITHHELD)


def test_no_redaction_takes_a_word_of_a_closed_set_for_text() -> None:
    kinds = [kind for kind in vars(records_of).values() if isinstance(kind, type)]
    for kind in filter(lambda kind: issubclass(kind, msgspec.Struct), kinds):
        for name, hint in get_type_hints(kind).items():
            if Literal in (get_origin(hint), *map(get_origin, get_args(hint))):
                assert name in redaction._NOT_TEXT[kind], f"{kind.__name__}.{name}"


def broken_hook(record: Record) -> Record:
    raise ValueError(f"cannot handle {record!r}")


def absent_hook(record: Record) -> Record:
    return None  # type: ignore[return-value]


def renaming_hook(record: Record) -> Record:
    return msgspec.structs.replace(record, id="another")


def unstorable_hook(record: Record) -> Record:
    return trajectory(id=record.id, seconds=float("nan"))


@pytest.mark.parametrize("wrong", [None, 5, ["x"]])
def test_a_hook_that_makes_no_text_of_a_text_withholds_it(url: str, wrong: Any) -> None:
    record = trajectory(messages=(Message(role="user", content="secret"),))
    with open_log(url, redact=redact_texts(lambda text: wrong)) as log:
        log.append(record).result()
        assert [is_withheld(stored) for stored in log.read()] == [True]


@pytest.mark.parametrize("hook", [broken_hook, absent_hook, renaming_hook, unstorable_hook])
def test_a_hook_that_fails_withholds_the_texts_and_keeps_the_record(url: str, hook) -> None:
    made: list[Record] = [
        trajectory(
            context={"secret": "secret"}, tags=("secret",), metadata={"secret": "secret"}, error="secret"
        ),
        feedback("t", note="secret", user="secret"),
        review("t", note="secret", reviewer="secret", answer=Message(role="user", content="secret")),
        comparison(
            "t", metadata={"secret": "secret"}, answers=(Message(role="secret", content="secret"),) * 2
        ),
    ]
    made[0] = msgspec.structs.replace(
        made[0], messages=(Message(role="user", content="secret", name="secret"),)
    )
    made[3] = msgspec.structs.replace(made[3], answers=(Message(role="user", content="secret"),) * 2)
    with open_log(url, redact=hook) as log:
        for record in made:
            log.append(record).result()
        stored = list(log.read())
        written = everything(url)
        assert log.stats().withheld == 4
    assert b"secret" not in written
    assert [record.id for record in stored] == [record.id for record in made]
    assert all(is_withheld(record) for record in stored)
    assert isinstance(stored[0], Trajectory)
    assert stored[0].prompt == WITHHELD
    assert stored[0].outcome is Outcome.REVISED
    assert len(stored[0].calls) == 2


@settings(max_examples=100)
@given(records)
def test_any_record_can_be_withheld(record: Record) -> None:
    bare = withhold(record)
    assert is_withheld(bare)
    assert bare.id == record.id
    encode(bare)
