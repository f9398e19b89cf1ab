"""Logs that datasets are built from: requests whose draft violates, complies, or was revised twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from log_support import trajectory

from cai_graph.trajectory import (
    Critique,
    Label,
    Message,
    Outcome,
    Record,
    Revision,
    Round,
    Trajectory,
    Verdict,
    encode,
)
from trainers.rows import Kind, Row, read_row

COMPLIES = Critique(verdicts=(Verdict(label=Label.COMPLIES, principle="no-harm"),), critic="fake:critic")


VIOLATES = Critique(
    verdicts=(Verdict(label=Label.VIOLATES, principle="no-harm", reason="it harms"),), critic="fake:critic"
)


def says(text: str, role: str = "assistant") -> Message:
    return Message(role=role, content=text)


def revised(number: int = 0, **changes: Any) -> Trajectory:
    """A request whose draft violates and whose revision complies, both readable."""
    answer = says(f"revised {number}")
    fields: dict[str, Any] = {
        "rounds": (
            Round(critique=VIOLATES, revisions=(Revision(answer=answer, critique=COMPLIES, accepted=True),)),
        )
    }
    return trajectory(number, **fields | changes)


def kept(number: int = 0, **changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "outcome": Outcome.KEPT,
        "rounds": (Round(critique=COMPLIES),),
        "released": says(f"draft {number}"),
        "released_from": "draft",
    }
    return trajectory(number, **fields | changes)


def unjudged() -> Trajectory:
    revision = Revision(answer=says("revised"), accepted=True)
    return trajectory(rounds=(Round(critique=VIOLATES, revisions=(revision,)),))


def write(path: Path, records: list[Record]) -> str:
    path.write_bytes(b"".join(encode(record) + b"\n" for record in records))
    return str(path)


def rows_of(folder: Path, kind: Kind) -> list[Row]:
    return [
        read_row(kind, line)
        for split in ("train", "test")
        if (path := folder / f"{split}.jsonl").exists()
        for line in path.read_bytes().splitlines()
    ]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("t*.jsonl"))}
