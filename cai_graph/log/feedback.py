"""Imports end users' feedback on answers from a JSONL file into the log."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai_graph.errors import DataError
from cai_graph.log import Log, Redactor, open_log
from cai_graph.log.store import Duplicate
from cai_graph.log.transfer import BrokenLine, redacted, under_content_id, windows
from cai_graph.trajectory import Feedback, new_id, now

__all__ = ["FeedbackImport", "import_feedback", "new_feedback"]

_KEYS = ("trajectory_id", "score", "user", "note", "at")

_Users = defaultdict[str, dict[str | int, int]]
"""For feedback that redaction made equal, by its id: the file's users who gave it, numbered from 1."""


@dataclass(frozen=True, kw_only=True)
class FeedbackImport:
    """What `import_feedback` did with each line."""

    added: int
    """Feedback that was appended."""
    present: int
    """Lines whose feedback was already in the log."""
    broken: tuple[BrokenLine, ...]
    """Lines that were skipped."""


def new_feedback(
    trajectory_id: str, score: object, user: object = None, note: object = None, at: object = None
) -> Feedback:
    """Validate the values, and return them as Feedback with a new id.

    Args:
        trajectory_id: the Trajectory that it is about.
        score: -1 (bad) to 1 (good).
        user: the application's id of the user who gave it.
        note: the user's comment.
        at: when it was given, in ISO 8601, UTC if it names no zone; None: now.

    Raises:
        DataError: a value is of the wrong type, or out of range.
    """
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1:
        raise DataError(f"'score' is a number from -1 (bad) to 1 (good), found {score!r}")
    for name, value in (("user", user), ("note", note), ("at", at)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{name!r} is text, found {type(value).__name__}")
    when = now()
    if at is not None:
        try:
            when = datetime.fromisoformat(str(at))
        except ValueError as error:
            raise DataError(f"'at' is a time such as 2026-11-24T12:00:00Z, found {at!r}") from error
    return Feedback(
        id=new_id(),
        at=when if when.tzinfo else when.replace(tzinfo=UTC),
        trajectory_id=trajectory_id,
        score=float(score),
        user=None if user is None else str(user),
        note=None if note is None else str(note),
    )


def import_feedback(
    url: str | os.PathLike[str], path: str | os.PathLike[str], *, redact: Redactor | None = None
) -> FeedbackImport:
    """Append the feedback of a JSONL file to a log; a line that cannot be read is reported and skipped.

    A line is an object with `trajectory_id`, `score` and, where known, `user`, `note` and `at`, as in
    `new_feedback`. A line's id is derived from its content after redaction, so that importing a file again
    adds nothing. Equal lines of one user are added once; those of different users are each added, even if
    `redact` gives these users the same name, and so are equal lines that name no user. A line whose redaction
    fails is added at every import.

    Args:
        url: the log, which must exist.
        path: the JSONL file.
        redact: see `open_log`.

    Raises:
        DataError: the file cannot be read.
        LogError: the log cannot be read or written; the lines before the failure may be in it.
    """
    source = Path(path)
    try:
        file = source.open("rb")
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    added = present = lines = 0
    broken: list[BrokenLine] = []
    users: _Users = defaultdict(dict)
    with file, _present(url), open_log(url) as log:
        for window in windows(file):
            read: list[tuple[int, Feedback]] = []
            for number, line in enumerate(window, lines + 1):
                if not line.strip():
                    continue
                try:
                    read.append((number, _parse(line, redact, users)))
                except DataError as error:
                    broken.append(BrokenLine(number, str(error)))
            lines += len(window)
            known = log.known([one.id for _, one in read])
            about = log.known([one.trajectory_id for _, one in read], removed=False)
            waiting = []
            for number, one in read:
                if one.id in known:
                    present += 1
                elif one.trajectory_id not in about:
                    what = f"there is no trajectory {one.trajectory_id!r} in this log"
                    broken.append(BrokenLine(number, what))
                else:
                    known.add(one.id)
                    waiting.append((number, log.append(one)))
            for number, future in waiting:
                try:
                    future.result()
                except Duplicate:  # another import has just added it
                    present += 1
                except DataError as error:
                    broken.append(BrokenLine(number, str(error)))
                else:
                    added += 1
    return FeedbackImport(added=added, present=present, broken=tuple(sorted(broken)))


def _present(url: str | os.PathLike[str]) -> Log:
    """Return the log, opened read-only, so that a missing one is an error and is not created.

    A new log would contain no Trajectory that feedback could be about.
    """
    return open_log(url, read_only=True)


def _parse(line: bytes, redact: Redactor | None, users: _Users) -> Feedback:
    """Return the feedback of a line, redacted.

    Args:
        line: the line.
        redact: see `open_log`.
        users: the users of the file so far; updated here.
    """
    try:
        data: Any = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"a line is a JSON object, found {type(data).__name__}")
    if unknown := [key for key in data if key not in _KEYS]:
        raise DataError(f"unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    if not isinstance(data.get("trajectory_id"), str):
        raise DataError("no 'trajectory_id', the id of what the feedback is about")
    given = new_feedback(data["trajectory_id"], *(data.get(key) for key in _KEYS[1:]))
    made = redacted(given, redact)
    at = None if data.get("at") is None else made.at.isoformat()
    content = ["feedback", made.trajectory_id, made.score, made.user, made.note, at]
    made = under_content_id(made, content)
    if given.user is None or made.user != given.user:
        known = users[made.id]
        number = known.setdefault(len(known) if given.user is None else given.user, len(known) + 1)
        if number > 1:
            made = under_content_id(made, [*content, number])
    return made
