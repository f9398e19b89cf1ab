"""Logs for tests: records made by hand, strategies that make any, and ways past the log to its database."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import apsw
import psycopg
from hypothesis import strategies as st

from cai_graph.log import Log, open_log
from cai_graph.log.store import Store
from cai_graph.trajectory import (
    Call,
    Comparison,
    ConstitutionRef,
    Critique,
    Draft,
    Feedback,
    Label,
    Message,
    Outcome,
    Record,
    Rejection,
    Review,
    Revision,
    Round,
    ToolCall,
    Trajectory,
    Verdict,
    new_id,
)

START = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)


def fill(log: Log, count: int) -> list[Trajectory]:
    """Append so many Trajectories, and return them once they are committed."""
    made = [trajectory(number) for number in range(count)]
    for future in [log.append(record) for record in made]:
        future.result()
    return made


def contents(url: str | Path) -> list[Record]:
    """Return every record of a log."""
    with open_log(url, read_only=True) as log:
        return list(log.read())


def store_of(log: Log) -> Store:
    """Return what is behind a log."""
    return log._shared.store


def execute(url: str | Path, sql: str, *bindings: Any) -> list[tuple[Any, ...]]:
    """Run one statement in a log's database, past the log; parameters are question marks."""
    if not str(url).startswith("postgresql"):
        db = apsw.Connection(str(url).removeprefix("sqlite:///"))
        rows = list(db.execute(sql, bindings))
        db.close()
        return rows
    with psycopg.connect(
        str(url).replace("+psycopg", ""), options="-c search_path=cai_log", autocommit=True
    ) as connection:
        cursor = connection.execute(sql.replace("?", "%s"), bindings)
        return cursor.fetchall() if cursor.description else []


def everything(url: str | Path) -> bytes:
    """Return all bytes that a log has in its database."""
    if str(url).startswith("postgresql"):
        sql = "SELECT records::text || convert_from(payload, 'UTF8') FROM records"
        return "".join(text for (text,) in execute(url, sql)).encode()
    path = Path(str(url).removeprefix("sqlite:///"))
    return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


def trajectory(number: int = 0, **changes: Any) -> Trajectory:
    """Return a revised request, with a new id; `number` is in its texts and moves its time by minutes."""
    failed = Critique(
        verdicts=(
            Verdict(
                label=Label.VIOLATES, principle="no-harm", severity=4, probability=0.75, reason="it harms"
            ),
            Verdict(label=Label.UNREADABLE, principle="honest", reason="no label"),
        ),
        reasoning=f"the answer {number} does harm",
        critic="fake:critic",
    )
    passed = Critique(verdicts=(Verdict(label=Label.COMPLIES, principle="no-harm"),))
    revised = Message(role="assistant", content=f"revised {number}")
    fields: dict[str, Any] = {
        "id": new_id(),
        "started_at": START + timedelta(minutes=number),
        "seconds": 1.5,
        "mode": "enforce",
        "constitution": ConstitutionRef(name="balanced", version="1", digest="d1" * 32),
        "outcome": Outcome.REVISED,
        "messages": (
            Message(role="system", content="be kind"),
            Message(role="user", content=f"ask {number}"),
        ),
        "draft": Draft(answer=Message(role="assistant", content=f"draft {number}")),
        "rounds": (
            Round(critique=failed, revisions=(Revision(answer=revised, critique=passed, accepted=True),)),
        ),
        "released": revised,
        "released_from": "revision",
        "calls": (
            Call(role="draft", model="fake:app", input_tokens=10, output_tokens=20, seconds=0.25),
            Call(role="critique", model="fake:critic", input_tokens=30, output_tokens=40, seconds=0.5),
        ),
        "settings": {"strategy": "batched"},
    }
    return Trajectory(**fields | changes)


def feedback(about: str, **changes: Any) -> Feedback:
    """Return a thumb up about a Trajectory."""
    fields: dict[str, Any] = {"id": new_id(), "at": START, "trajectory_id": about, "score": 1.0}
    return Feedback(**fields | changes)


def review(about: str, **changes: Any) -> Review:
    """Return an approval of a Trajectory."""
    fields: dict[str, Any] = {"id": new_id(), "at": START, "trajectory_id": about, "reviewer": "ann"}
    return Review(**fields | {"decision": "approve"} | changes)


def comparison(about: str, **changes: Any) -> Comparison:
    """Return a comparison of two answers."""
    fields: dict[str, Any] = {
        "id": new_id(),
        "at": START,
        "trajectory_id": about,
        "answers": (Message(role="assistant", content="a"), Message(role="assistant", content="b")),
        "origins": ("draft", "revision:0:0"),
        "judge": "fake:judge",
        "p_a": (0.25, None),
        "calls": (Call(role="compare", model="fake:judge", input_tokens=1, output_tokens=2),),
    }
    return Comparison(**fields | changes)


# --- strategies: any record ---------------------------------------------------------------------------

# Lone surrogates and NUL included. A high and a low surrogate side by side are not lone: JSON writes them
# as it writes the character they stand for, and so they are made that character here.
texts = st.text(st.characters(exclude_categories=()), max_size=40).map(
    lambda text: json.loads(json.dumps(text))
)
words = st.none() | texts
numbers = st.floats(allow_nan=False, allow_infinity=False)
probabilities = st.none() | st.floats(0, 1)
counts = st.none() | st.integers(0, 2**53)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, values, max_size=3)
zones = st.just(UTC) | st.integers(-12 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))
times = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=zones)


def several(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, max_size=2).map(tuple)


tool_calls = st.builds(ToolCall, name=texts, args=objects, id=words)
messages = st.builds(
    Message,
    role=texts,
    content=texts | st.lists(texts | objects, max_size=2),
    name=words,
    tool_calls=several(tool_calls),
    tool_call_id=words,
    id=words,
)
verdicts = st.builds(
    Verdict,
    label=st.sampled_from(Label),
    principle=words,
    aim=words,
    severity=st.none() | st.integers(1, 5),
    probability=probabilities,
    reason=words,
    read_by=words,
)
critiques = st.builds(
    Critique,
    verdicts=several(verdicts),
    reasoning=texts,
    readings=st.dictionaries(texts, numbers, max_size=2),
    benign_request=st.none() | st.booleans(),
    evasive=st.none() | st.booleans(),
    critic=words,
)
revisions = st.builds(
    Revision,
    answer=messages,
    from_draft=st.booleans(),
    critique=st.none() | critiques,
    accepted=st.booleans(),
    rejection=st.none() | st.sampled_from(Rejection),
    detail=words,
)
calls = st.builds(
    Call,
    role=texts,
    model=texts,
    kind=st.sampled_from(["generation", "forward"]),
    prompt_digest=words,
    input_tokens=counts,
    cached_input_tokens=counts,
    output_tokens=counts,
    seconds=numbers,
    error=words,
)
trajectories = st.builds(
    Trajectory,
    id=texts,
    started_at=times,
    seconds=numbers,
    mode=texts,
    constitution=st.builds(ConstitutionRef, name=texts, version=texts, digest=texts),
    outcome=st.sampled_from(Outcome),
    messages=several(messages),
    context=st.dictionaries(texts, texts, max_size=2),
    draft=st.none() | st.builds(Draft, answer=messages, truncated=st.booleans()),
    rounds=several(st.builds(Round, critique=critiques, revisions=several(revisions))),
    released=st.none() | messages,
    released_from=st.sampled_from([None, "draft", "revision", "refusal", "human"]),
    error=words,
    calls=several(calls),
    settings=objects,
    source=words,
    metadata=objects,
    tags=several(texts),
)
comparisons = st.builds(
    Comparison,
    id=texts,
    at=times,
    trajectory_id=texts,
    answers=st.tuples(messages, messages),
    origins=st.tuples(texts, texts),
    judge=texts,
    p_a=st.tuples(probabilities, probabilities),
    principle=words,
    calls=several(calls),
    metadata=objects,
)
reviews = st.builds(
    Review,
    id=texts,
    at=times,
    trajectory_id=texts,
    reviewer=texts,
    decision=st.sampled_from(["approve", "flip", "tie", "edit", "draft", "reject", "skip", "flag", "undo"]),
    answer=st.none() | messages,
    verdicts=several(verdicts),
    note=words,
)
feedbacks = st.builds(
    Feedback, id=texts, at=times, trajectory_id=texts, score=numbers, user=words, note=words
)
records: st.SearchStrategy[Record] = trajectories | comparisons | reviews | feedbacks
