"""Redaction: what happens to a record's texts before the first write.

A hook is any `Callable[[Record], Record]`. `redact_texts` makes one out of a function over strings. Where
a hook fails, the record is stored without its texts (`withhold`): never raw, and never lost.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
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
"""Takes a record, returns the record to store in its place, under the same id."""

WITHHELD = "[withheld: redaction failed]"
"""Stands for each text of a record whose redaction failed."""

_NOT_TEXT: dict[type, frozenset[str]] = {
    # Ids, names of models and principles, and closed sets. A field that is not named here is text, so
    # that a field added later is redacted until somebody decides otherwise.
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
    reasoning, reasons, details, errors, notes, tags, and the strings in the user's metadata. Ids, roles,
    names of models and principles, the source key and the settings of the run are left as they are, and
    so are `reviewer` and `user`, by which records are joined; a hook of your own can change those.

    Example:
        >>> import re
        >>> hook = redact_texts(lambda text: re.sub(r"[\\w.]+@[\\w.]+", "[email]", text))
    """

    def hook(record: Record) -> Record:
        redacted: Record = _map(record, redact)
        return redacted

    return hook


def apply(redactor: Redactor, record: Record) -> Record:
    """Return what the hook makes of the record, or the record without its texts where the hook fails."""
    try:
        redacted = redactor(record)
    except BaseException:  # Of any kind, since the writer lives on. It may quote the text: drop it.
        return withhold(record)
    if type(redacted) is not type(record) or redacted.id != record.id:
        return withhold(record)
    return redacted


def withhold(record: Record) -> Record:
    """Return the record with every text replaced and the fact noted (`is_withheld`)."""
    bare: Record = _map(record, lambda _: WITHHELD)
    replace = msgspec.structs.replace
    match bare:
        case Trajectory():
            contexts = {f"withheld-{n}": WITHHELD for n in range(len(bare.context))}
            return replace(bare, metadata={"redaction": "failed"}, tags=(), context=contexts)
        case Comparison():
            return replace(bare, metadata={"redaction": "failed"})
        case Review():
            return replace(bare, note=WITHHELD, reviewer=WITHHELD)
        case Feedback():
            return replace(bare, note=WITHHELD, user=None if bare.user is None else WITHHELD)


def is_withheld(record: Record) -> bool:
    """Return whether the record was stored without its texts because redaction failed."""
    if isinstance(record, Trajectory | Comparison):
        return record.metadata.get("redaction") == "failed"
    return record.note == WITHHELD


def _map(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return value if isinstance(value, Enum) else redact(value)
    if isinstance(value, msgspec.Struct):
        fixed = _NOT_TEXT.get(type(value), _NO_FIELD)
        changes: dict[str, Any] = {}
        for name in value.__struct_fields__:
            if name in fixed:
                continue
            before = getattr(value, name)
            after = _map(before, redact)
            if after is not before:
                changes[name] = after
        return msgspec.structs.replace(value, **changes) if changes else value
    if isinstance(value, tuple):
        return tuple(_map(item, redact) for item in value)
    if isinstance(value, list):
        return [_map(item, redact) for item in value]
    if isinstance(value, dict):
        # Of a message's parts the one of type "text" is its text, and stays that.
        return {
            key: item if (key, item) == ("type", "text") else _map(item, redact)
            for key, item in value.items()
        }
    return value
