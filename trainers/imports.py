"""Imports existing preference sets into a log, as records, to be mixed with what was logged here.

    HH-RLHF      {"chosen", "rejected"}, each a whole dialogue as text, "\\n\\nHuman: …\\n\\nAssistant: …"
    explicit     {"prompt", "chosen", "rejected"}, as text or as lists of messages
    implicit     {"chosen", "rejected"}, as lists of messages or texts with a common beginning
    unpaired     {"prompt", "completion", "label": true or false}

The last three are the shapes that TRL reads; a file is one that `trainers.tables` reads. A pair becomes a
Trajectory of the mode `imported`, whose draft is the rejected answer and whose accepted revision is the
chosen one; a row with `p_chosen` becomes a Comparison as well. An answer with a label becomes a draft with a
verdict.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cai_graph.errors import DataError
from cai_graph.log import Redactor, open_log
from cai_graph.log.store import Duplicate
from cai_graph.log.transfer import IMPORTED, BrokenLine, content_id, redacted, under_content_id
from cai_graph.messages import from_langchain
from cai_graph.trajectory import (
    Comparison,
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Revision,
    Round,
    Trajectory,
    Verdict,
    new_id,
    now,
    revision_name,
    text_of,
)
from trainers import tables

__all__ = ["Imported", "dialogue", "import_preferences", "read_preferences"]

_WINDOW = 500
_FIELDS = ("prompt", "chosen", "rejected", "completion", "label", "p_chosen", "messages")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The result of `import_preferences`, as counts of rows."""

    pairs: int
    """Pairs that were added, or to which a soft label was added."""
    answers: int
    """Answers with a label that were added."""
    present: int
    """Rows that were in the log already, or are repeated in the file."""
    broken: tuple[BrokenLine, ...]
    """Rows that were skipped."""


class Imports(NamedTuple):
    """One row, as the records it becomes."""

    line: int
    """Its line number, or its row number in a Parquet file or a JSON array, from 1."""
    trajectory: Trajectory
    """The pair, or the answer."""
    comparison: Comparison | None
    """The soft label of a pair; None if the row has none."""

    @property
    def records(self) -> tuple[Trajectory | Comparison, ...]:
        """All records, in the order in which they are appended."""
        return (self.trajectory,) if self.comparison is None else (self.trajectory, self.comparison)


def import_preferences(
    url: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    redact: Redactor | None = None,
) -> Imported:
    """Add a preference set to a log; a row that cannot be read is reported and skipped.

    A record's id is derived from its content after redaction. So importing a file again, or a row that is
    repeated in it, adds nothing, except for what an interrupted import did not reach, or a soft label that
    the pair did not have. What `gc` removed is not added again. A row whose redaction fails is added each
    time.

    Args:
        url: the log; created if it does not exist.
        path: the file.
        name: name of the set: the tag of its Trajectories, and the judge of its rows. By default the file's
            name without its suffixes.
        redact: see `open_log`.

    Raises:
        ConfigError: the file's name does not indicate its format.
        DataError: the file cannot be read.
        MissingExtra: it is Parquet, and pyarrow is not installed.
        LogError: the log cannot be written; the rows before are in it, and importing again continues.
    """
    pairs = answers = present = 0
    broken: list[BrokenLine] = []
    rows = read_preferences(path, name, redact)
    first = list(islice(rows, _WINDOW))  # an unreadable file raises here, before a log is created
    with open_log(url) as log:
        window = first
        while window:
            waiting = []
            ids = [record.id for row in window if isinstance(row, Imports) for record in row.records]
            known = log.known(ids)
            removed = known - log.known(ids, removed=False)
            for row in window:
                if isinstance(row, BrokenLine):
                    broken.append(row)
                    continue
                missing = [record for record in row.records if record.id not in known]
                if row.trajectory.id in removed or not missing:
                    present += 1
                else:
                    known.update(record.id for record in missing)
                    waiting.append((row, [log.append(record) for record in missing]))
            for row, commits in waiting:
                try:
                    for commit in commits:
                        commit.result()
                except Duplicate:  # another import added it first
                    present += 1
                    continue
                except DataError as error:
                    broken.append(BrokenLine(row.line, str(error)))
                    continue
                pairs += bool(row.trajectory.rounds[0].revisions)
                answers += not row.trajectory.rounds[0].revisions
            window = list(islice(rows, _WINDOW))
    return Imported(pairs=pairs, answers=answers, present=present, broken=tuple(sorted(broken)))


def read_preferences(
    path: str | os.PathLike[str], name: str | None = None, redact: Redactor | None = None
) -> Iterator[Imports | BrokenLine]:
    """Yield each row of a preference set, in order. See `import_preferences` for the errors raised."""
    source = Path(path)
    called = name or source.name.partition(".")[0]
    for line, row in tables.each(source):
        if isinstance(row, DataError):
            yield BrokenLine(line, str(row))
            continue
        try:
            yield _imports(line, row, called, redact)
        except DataError as error:
            yield BrokenLine(line, str(error))


# --- rows ---------------------------------------------------------------------------------------------


class _Compared(NamedTuple):
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message


def _imports(line: int, row: Mapping[str, Any], name: str, redact: Redactor | None) -> Imports:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _paired(line, row, name, redact)
    if row.get("completion") is not None and isinstance(row.get("label"), bool):
        return Imports(line, _stored(["unpaired", row["label"]], _labelled(line, row, name), redact), None)
    found = ", ".join(map(repr, row)) or "none"
    raise DataError(
        f"neither a pair (chosen and rejected) nor an answer with a label (completion, label); keys: {found}"
    )


def _paired(line: int, row: Mapping[str, Any], name: str, redact: Redactor | None) -> Imports:
    found = _compared(row)
    if _said(found.chosen) == _said(found.rejected):
        raise DataError("chosen and rejected are the same")
    revision = Revision(answer=found.chosen, accepted=True)
    pair = Trajectory(
        id=new_id(),
        outcome=Outcome.REVISED,
        messages=found.prompt,
        draft=Draft(answer=found.rejected),
        rounds=(Round(critique=Critique(critic=name), revisions=(revision,)),),
        released=found.chosen,
        released_from="revision",
        **_common(line, row, name),
    )
    trajectory = _stored(["preference"], pair, redact)
    p = row.get("p_chosen")
    if p is None:
        return Imports(line, trajectory, None)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise DataError(f"'p_chosen' is a probability from 0 to 1, found {p!r}")
    chosen, rejected = _answers(trajectory)
    comparison = Comparison(
        id=content_id(["p_chosen", trajectory.id, float(p)]),
        at=now(),
        trajectory_id=trajectory.id,
        answers=(chosen, rejected),
        origins=(revision_name(0, 0), "draft"),
        judge=name,
        p_a=(float(p), float(p)),
    )
    return Imports(line, trajectory, comparison)


def _labelled(line: int, row: Mapping[str, Any], name: str) -> Trajectory:
    prompt = _messages(row.get("prompt"), "prompt", "user")
    answer = _one(_messages(row["completion"], "completion", "assistant"), "completion")
    good = row["label"]
    verdict = Verdict(label=Label.COMPLIES if good else Label.VIOLATES, read_by="imported")
    return Trajectory(
        id=new_id(),
        outcome=Outcome.KEPT if good else Outcome.EXHAUSTED,
        messages=prompt,
        draft=Draft(answer=answer),
        rounds=(Round(critique=Critique(verdicts=(verdict,), critic=name)),),
        released=answer,
        released_from="draft",
        **_common(line, row, name),
    )


def _stored(what: Sequence[object], trajectory: Trajectory, redact: Redactor | None) -> Trajectory:
    """Return a Trajectory as the log stores it, with an id derived from its content after redaction."""
    made = redacted(trajectory, redact)
    return under_content_id(made, [*what, *_content(*made.messages, *_answers(made))])


def _answers(trajectory: Trajectory) -> tuple[Message, ...]:
    """Return the answers of an imported row; the first of a pair is the chosen one."""
    assert trajectory.draft is not None
    chosen = (revision.answer for revision in trajectory.rounds[0].revisions)
    return (*chosen, trajectory.draft.answer)


def _common(line: int, row: Mapping[str, Any], name: str) -> dict[str, Any]:
    own = {k: v for k, v in row.items() if k not in _FIELDS and isinstance(v, str | int | float)}
    return {
        "started_at": now(),
        "seconds": 0.0,
        "mode": "imported",
        "constitution": IMPORTED,
        "metadata": {**own, "dataset": name, "line": line},
        "tags": (name,),
    }


def _content(*messages: Message) -> list[Any]:
    return [[m.role, m.content, msgspec.to_builtins(m.tool_calls), m.tool_call_id] for m in messages]


def _said(message: Message) -> tuple[str, object]:
    return " ".join(text_of(message).split()), message.tool_calls


def _compared(row: Mapping[str, Any]) -> _Compared:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("one of 'chosen' and 'rejected' is text and the other is not")
    if isinstance(chosen, str) and prompt is None:
        if not chosen.startswith(_SPEAKERS):
            return _texts(chosen, rejected)
        chosen, rejected = dialogue(chosen, "chosen"), dialogue(rejected, "rejected")
        before: list[Message] = []
    else:
        before = list(_messages(prompt, "prompt", "user")) if prompt is not None else []
        chosen = _messages(chosen, "chosen", "assistant")
        rejected = _messages(rejected, "rejected", "assistant")
    # The messages that both begin with belong to the prompt; they may repeat the messages of `prompt`.
    shared = _shared(chosen, rejected)
    asked = shared if shared[: len(before)] == before else [*before, *shared]
    if not asked:
        raise DataError("'chosen' and 'rejected' begin with different messages, and there is no 'prompt'")
    return _Compared(
        tuple(asked), _one(chosen[len(shared) :], "chosen"), _one(rejected[len(shared) :], "rejected")
    )


def _shared(a: Sequence[Message], b: Sequence[Message]) -> list[Message]:
    """Return the messages that both begin with. The last message of each is its answer, and never shared."""
    count = 0
    for one, other in zip(a[:-1], b[:-1], strict=False):
        if one != other:
            break
        count += 1
    return list(a[:count])


def _texts(chosen: str, rejected: str) -> _Compared:
    """Split two texts where they begin to differ, or at the space just before that, as TRL does."""
    alike = (one == other for one, other in zip(chosen, rejected, strict=False))
    length = sum(takewhile(bool, alike))
    if length and length < max(len(chosen), len(rejected)) and chosen[length - 1] == " ":
        length -= 1
    prompt = chosen[:length]
    if not prompt.strip():
        raise DataError("'chosen' and 'rejected' begin differently, and there is no 'prompt'")
    answers = (Message(role="assistant", content=text[length:]) for text in (chosen, rejected))
    return _Compared((Message(role="user", content=prompt),), *answers)


def _one(answer: Sequence[Message], key: str) -> Message:
    if len(answer) != 1:
        raise DataError(
            f"after the prompt {key!r} has {len(answer)} messages; an answer is one"
            if answer
            else f"{key!r} has no answer after the prompt"
        )
    if answer[0].role != "assistant":
        raise DataError(
            f"{key!r} ends in a message of the role {answer[0].role!r}; the answer is an assistant's"
        )
    if not text_of(answer[0]).strip() and not answer[0].tool_calls:
        raise DataError(f"the answer in {key!r} is empty")
    return answer[0]


def _messages(value: object, key: str, role: str) -> tuple[Message, ...]:
    """Return text as one message of `role`, or a list of messages as they are."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{key!r} is empty")
        return (Message(role=role, content=value),)
    if not isinstance(value, list) or not value:
        found = "nothing" if value is None else repr(value)[:60]
        raise DataError(f"{key!r} is text or a list of messages, found {found}")
    plain = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise DataError(f"{key!r} is no list of messages: {repr(turn)[:60]} has no role")
        # Arrow adds the keys that other messages have, with None.
        turn = {name: item for name, item in turn.items() if item is not None}
        plain.append(turn)
    if all(isinstance(t.get("content"), str) and set(t) <= {"role", "content", "name"} for t in plain):
        return tuple(Message(role=t["role"], content=t["content"], name=t.get("name")) for t in plain)
    return _with_tools(plain, key)


def _with_tools(turns: list[dict[str, Any]], key: str) -> tuple[Message, ...]:
    from langchain_core.messages import convert_to_messages

    for turn in turns:
        for call in turn.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
                function["arguments"] = json.dumps(function.get("arguments") or {})
                call.setdefault("id", None)
    try:
        return tuple(map(from_langchain, convert_to_messages([{"content": "", **turn} for turn in turns])))
    except Exception as error:  # LangChain's errors are of many classes, all about the messages
        raise DataError(f"{key!r} is no list of messages: {str(error).splitlines()[0][:200]}") from error


# --- HH-RLHF ------------------------------------------------------------------------------------------

_SPEAKERS = ("\n\nHuman:", "\n\nAssistant:")
_TURN = re.compile(r"\n\n(Human|Assistant):")


def dialogue(text: str, key: str = "text") -> list[Message]:
    """Return the turns of a dialogue in HH-RLHF's format, without whitespace around them.

    >>> [(m.role, m.content) for m in dialogue("\\n\\nHuman: Hi.\\n\\nAssistant: Hello!")]
    [('user', 'Hi.'), ('assistant', 'Hello!')]

    Raises:
        DataError: two turns of one role in a row, or an empty turn, as when a text itself contains a marker.
    """
    _, *parts = _TURN.split(text)
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            raise DataError(f"{key!r} has two turns of {speaker} in a row")
        if not said.strip():
            raise DataError(f"{key!r} has an empty turn of {speaker}")
        turns.append(Message(role=role, content=said.strip()))
    return turns
