"""Logs under `balanced`, whose rows come in every shape that is exported: tools called, revised twice."""

from __future__ import annotations

from typing import Any

from dataset_logs import kept, says
from log_support import trajectory

from cai_graph.constitution import load
from cai_graph.trajectory import (
    ConstitutionRef,
    Critique,
    Label,
    Message,
    Outcome,
    Record,
    Revision,
    Round,
    ToolCall,
    Verdict,
)

BALANCED = load("balanced")


HARMS = Critique(
    verdicts=(Verdict(label=Label.VIOLATES, principle="no-demeaning", reason="it demeans"),),
    critic="fake:critic",
)


COMPLIES = Critique(verdicts=(Verdict(label=Label.COMPLIES, principle="no-demeaning"),), critic="fake:critic")


UNDER = ConstitutionRef(name=BALANCED.name, version=BALANCED.version, digest=BALANCED.digest)


def calls(number: int, args: dict[str, Any]) -> tuple[Message, ...]:
    """A conversation with a tool's call and its answer."""
    call = ToolCall(name="search", args=args, id=f"c{number}")
    return (
        says("You look things up.", "system"),
        says(f"question {number}", "user"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="found", tool_call_id=f"c{number}"),
    )


def revised(number: int, **changes: Any) -> Record:
    """A request whose draft violates and whose revision complies."""
    revision = Revision(answer=says(f"revised {number}"), critique=COMPLIES, accepted=True)
    rounds = (Round(critique=HARMS, revisions=(revision,)),)
    return trajectory(number, constitution=UNDER, rounds=rounds, **changes)


def two_revisions(number: int) -> Record:
    """A request that was revised twice, as `ranked` needs."""
    first = Revision(answer=says(f"better {number}"), critique=COMPLIES, accepted=True)
    second = Revision(answer=says(f"best {number}"), critique=COMPLIES, accepted=True)
    return trajectory(
        number,
        constitution=UNDER,
        outcome=Outcome.REVISED,
        rounds=(
            Round(critique=HARMS, revisions=(first,)),
            Round(critique=HARMS, of="revision:0:0", revisions=(second,)),
        ),
    )


def records() -> list[Record]:
    """Revised, kept, twice revised, and tool-calling requests; their arguments differ in their keys."""
    found: list[Record] = [revised(number) for number in range(8)]
    found += [kept(number) for number in range(8, 12)]
    found += [two_revisions(number) for number in range(18, 30)]
    found += [
        revised(16, messages=calls(16, {"words": ["a"], "limit": 3})),
        revised(17, messages=calls(17, {"page": {"number": 2}})),
    ]
    return found
