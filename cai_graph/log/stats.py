"""Counts over a log: `Stats` is the result, `Tally` counts the payloads record by record."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from cai_graph.trajectory import Label, decode

__all__ = ["Stats", "Tally"]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts over a log's records."""

    trajectories: int = 0
    """Number of Trajectories."""
    comparisons: int = 0
    """Number of Comparisons."""
    reviews: int = 0
    """Number of Reviews."""
    feedback: int = 0
    """Number of Feedback records."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Trajectories by outcome."""
    constitutions: dict[str, int] = field(default_factory=dict)
    """Trajectories by constitution, as `NAME VERSION (first 12 digits of the digest)`."""
    violated: dict[str, int] = field(default_factory=dict)
    """Trajectories whose draft has the verdict VIOLATES, by principle id or aim."""
    unreadable: int = 0
    """Verdicts UNREADABLE."""
    calls: int = 0
    """Model calls in Trajectories and Comparisons."""
    input_tokens: int = 0
    """Tokens in the prompts of these calls, where the provider reported them."""
    output_tokens: int = 0
    """Tokens in the replies of these calls, where the provider reported them."""
    withheld: int = 0
    """Records stored without their texts, because the redaction hook failed."""
    removed: int = 0
    """Records that `gc` removed; the tombstone of each records why."""
    first: datetime | None = None
    """Time of the earliest record, UTC."""
    last: datetime | None = None
    """Time of the latest record, UTC."""
    bytes: int = 0
    """Size of the log on disk."""


class _CallCount(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None


class _VerdictCount(msgspec.Struct):
    label: str
    principle: str | None = None
    aim: str | None = None


class _CritiqueCount(msgspec.Struct):
    verdicts: tuple[_VerdictCount, ...] = ()


class _RoundCount(msgspec.Struct):
    critique: _CritiqueCount


class _ConstitutionCount(msgspec.Struct):
    name: str
    version: str
    digest: str


class _RecordCount(msgspec.Struct):
    """The fields of a Trajectory or a Comparison that are counted; other fields are not parsed."""

    constitution: _ConstitutionCount | None = None
    rounds: tuple[_RoundCount, ...] = ()
    calls: tuple[_CallCount, ...] = ()


class Tally:
    """Running counts over payloads; a store adds each payload once."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_RecordCount)
        self.constitutions: dict[str, int] = {}
        self.violated: dict[str, int] = {}
        self.unreadable = 0
        self.calls = 0
        self.input_tokens = 0
        self.output_tokens = 0

    def add(self, payload: bytes) -> None:
        """Count one Trajectory or Comparison."""
        try:
            record = self._decoder.decode(payload)
        except msgspec.MsgspecError:  # Lone surrogates, or an earlier version.
            record = msgspec.convert(msgspec.to_builtins(decode(payload)), _RecordCount)
        if record.constitution is not None:
            ref = record.constitution
            name = f"{ref.name} {ref.version} ({ref.digest[:12]})"
            self.constitutions[name] = self.constitutions.get(name, 0) + 1
        for number, round_ in enumerate(record.rounds):
            for verdict in round_.critique.verdicts:
                about = verdict.principle or verdict.aim
                if verdict.label == Label.UNREADABLE:
                    self.unreadable += 1
                elif verdict.label == Label.VIOLATES and number == 0 and about:
                    self.violated[about] = self.violated.get(about, 0) + 1
        for call in record.calls:
            self.calls += 1
            self.input_tokens += call.input_tokens or 0
            self.output_tokens += call.output_tokens or 0
