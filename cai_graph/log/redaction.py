"""Redaction: hooks that change a record's texts before it is first written to the log.

A hook is any `Callable[[Record], Record]`. `redact_texts` makes one from a function over strings. If a hook
fails, the record is stored without its texts (`withhold`): it is neither stored raw nor lost.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import msgspec

from cai_graph.trajectory import (
    Call,
    Cascaded,
    Comparison,
    ConstitutionRef,
    Critique,
    Feedback,
    Message,
    Record,
    Review,
    Revision,
    Round,
    ToolCall,
    Trajectory,
    Verdict,
)

__all__ = ["WITHHELD", "Redactor", "apply", "is_withheld", "redact_texts", "withhold"]

Redactor = Callable[[Record], Record]
"""Takes a record and returns the record to store instead, with the same id."""

WITHHELD = "[withheld: redaction failed]"
"""Replaces each text of a record whose redaction failed."""

_NOT_TEXT: dict[type, frozenset[str]] = {
    # Ids, names of models and principles, and fields with a fixed set of values. A field that is not listed
    # here is treated as text, so that a field added later is redacted unless it is listed.
    Trajectory: frozenset({"id", "mode", "settings", "source", "released_from", "unjudged"}),
    Comparison: frozenset(
        {"id", "trajectory_id", "origins", "judge", "method", "principle", "settings", "source"}
    ),
    Review: frozenset({"id", "trajectory_id", "reviewer", "decision"}),
    Feedback: frozenset({"id", "trajectory_id", "user"}),
    Message: frozenset({"role", "tool_call_id", "id"}),
    ToolCall: frozenset({"name", "id"}),
    Verdict: frozenset({"principle", "aim", "read_by"}),
    Critique: frozenset({"critic", "readings"}),
    Cascaded: frozenset({"why"}),
    Round: frozenset({"of"}),
    Revision: frozenset(),
    Call: frozenset({"role", "model", "kind", "prompt_digest"}),
    ConstitutionRef: frozenset({"name", "version", "digest"}),
}
_NO_FIELD: frozenset[str] = frozenset()


def redact_texts(redact: Callable[[str], str]) -> Redactor:
    """Return a hook that applies `redact` to every text of a record.

    Texts are what people and models wrote: contents of messages and their names, tool arguments, context,
    reasoning, reasons, details, errors, notes, tags, and the strings in the user's metadata, keys included.
    Ids, roles, names of models and principles, the source key and the settings of the run are unchanged, and
    so are `reviewer` and `user`, which serve to join records; a custom hook can change those.

    Example:
        >>> import re
        >>> hook = redact_texts(lambda text: re.sub(r"[\\w.]+@[\\w.]+", "[email]", text))
    """

    def hook(record: Record) -> Record:
        redacted: Record = _map(record, redact, partial(_redacted_json, redact=redact))
        return redacted

    return hook


def apply(redactor: Redactor, record: Record) -> Record:
    """Return the record that the hook returns, or the record without its texts if the hook fails.

    In both, the calls' `prompt_digest` is removed, as it would let a reader confirm a guess of the text.
    """
    record = _without_digests(record)
    try:
        redacted = redactor(record)
    except BaseException:  # Any kind, so that the writer's thread survives. It may quote the text: drop it.
        return withhold(record)
    if type(redacted) is not type(record) or redacted.id != record.id:
        return withhold(record)
    return redacted


def withhold(record: Record) -> Record:
    """Return the record with every text replaced by WITHHELD, marked for `is_withheld`."""
    bare: Record = _map(_without_digests(record), lambda _: WITHHELD, _withheld_json)
    replace = msgspec.structs.replace
    match record:
        case Trajectory():
            contexts = {f"withheld-{n}": WITHHELD for n in range(len(record.context))}
            return replace(bare, metadata={"redaction": "failed"}, tags=(), context=contexts)
        case Comparison():
            return replace(bare, metadata={"redaction": "failed"})
        case Review():
            return replace(bare, note=WITHHELD, reviewer=WITHHELD)
        case Feedback():
            return replace(bare, note=WITHHELD, user=None if record.user is None else WITHHELD)


def is_withheld(record: Record) -> bool:
    """Return whether the record was stored without its texts because redaction failed."""
    if isinstance(record, Trajectory | Comparison):
        return record.metadata.get("redaction") == "failed"
    return record.note == WITHHELD


def _without_digests(record: Record) -> Record:
    if not isinstance(record, Trajectory | Comparison):
        return record
    replace = msgspec.structs.replace
    return replace(record, calls=tuple(replace(call, prompt_digest=None) for call in record.calls))


def _map(value: Any, redact: Callable[[str], str], json: Callable[[Any], Any]) -> Any:
    """Return a value of a record with its texts redacted.

    Args:
        redact: maps a text to the redacted one.
        json: maps plain JSON, such as a tool's arguments or the parts of a message, to the redacted one.
    """
    if isinstance(value, str):
        return value if isinstance(value, Enum) else redact(value)
    if isinstance(value, msgspec.Struct):
        fixed = _NOT_TEXT.get(type(value), _NO_FIELD)
        changes: dict[str, Any] = {}
        for name in value.__struct_fields__:
            if name in fixed:
                continue
            before = getattr(value, name)
            after = _map(before, redact, json)
            if after is not before:
                changes[name] = after
        return msgspec.structs.replace(value, **changes) if changes else value
    if isinstance(value, tuple):
        return tuple(_map(item, redact, json) for item in value)
    return json(value) if isinstance(value, list | dict) else value


_OF_PARTS = frozenset({"type", "text"})
"""Keys that mark a part of a message as text; they are not redacted."""


def _redacted_json(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [_redacted_json(item, redact) for item in value]
    if not isinstance(value, dict):
        return value
    redacted: dict[str, Any] = {}
    for key, item in value.items():
        name = key if key in _OF_PARTS else redact(key)
        if name in redacted:  # redaction made two keys equal
            name = f"{name} {len(redacted)}"
        # The value of {"type": "text"} marks a message part as text, and must not be redacted.
        redacted[name] = item if (key, item) == ("type", "text") else _redacted_json(item, redact)
    return redacted


def _withheld_json(value: Any) -> Any:
    # Not traversed: it may be nested too deep for that.
    return {} if isinstance(value, dict) else WITHHELD
