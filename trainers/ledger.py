"""The ledger: what became of every trajectory that was read, and of every row that was made.

Each Trajectory ends in exactly one account: it gave rows, or it was dropped for one Reason. Each row that was
made ends in exactly one account as well: it stands in a split, or it was dropped for one Reason. `reconcile`
holds both to the number read; a build that does not reconcile writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cai_graph.errors import DataError

__all__ = ["REASONS", "Ledger", "Reason"]


class Reason(StrEnum):
    """Why a trajectory or a row is left out. The list is closed; docs/datasets.md explains each."""

    UNREADABLE_RECORD = "unreadable_record"
    """The line is no record that this release reads: broken, cut off, or of a newer schema."""
    BROKEN_TEXT = "broken_text"
    """A text holds lone surrogates, which no file that a trainer reads can hold."""
    WITHHELD = "withheld"
    """The texts were withheld from the log because redaction failed."""
    NOT_TEXT = "not_text"
    """A message holds something other than text, such as an image."""
    UNKNOWN_ROLE = "unknown_role"
    """A message is of a role that chat templates do not know."""
    NO_PROMPT = "no_prompt"
    """No message of a user asks for the answer."""
    NO_ANSWER = "no_answer"
    """The request ended in an error before there was an answer."""
    EMPTY = "empty"
    """The answer, or one of the two, has no text."""
    TRUNCATED = "truncated"
    """The answer was cut off at the model's token limit."""
    UNJUDGED = "unjudged"
    """No verdict was given on the answer."""
    UNREADABLE_VERDICT = "unreadable_verdict"
    """The verdict that would vouch for the answer could not be read."""
    NOT_ACCEPTED = "not_accepted"
    """No answer was accepted: every one violates the constitution, or the request was refused."""
    REVIEWED_OUT = "reviewed_out"
    """A reviewer rejected the answer or flagged the trajectory."""
    DISLIKED = "disliked"
    """End users' feedback on the answer is negative."""
    NO_PAIR = "no_pair"
    """Fewer answers than the kind of data compares."""
    NO_CRITIQUE = "no_critique"
    """There is no critique in words that a revision followed."""
    UNKNOWN_PRINCIPLE = "unknown_principle"
    """The principle's wording is not known; name its constitution."""
    NO_PRINCIPLE = "no_principle"
    """The verdict is on the answer as a whole, and names neither a principle nor an aim."""
    IDENTICAL = "identical"
    """The answers to compare are the same text."""
    TIE = "tie"
    """Neither answer is better."""
    DISAGREEMENT = "disagreement"
    """The evidence contradicts itself: the two orders, two judges, two people, or people and critic."""
    HELD_OUT = "held_out"
    """The prompt stands in an evaluation set that was named."""
    PII = "pii"
    """A text holds what looks like personal data or a secret."""
    OVER_LENGTH = "over_length"
    """The row is longer than the limit, in tokens of the named tokenizer."""
    DUPLICATE = "duplicate"
    """Another row holds the same content."""
    USER_CAP = "user_cap"
    """The user's share of rows is used up."""
    TENANT_CAP = "tenant_cap"
    """The tenant's share of rows is used up."""
    NEAR_DUPLICATE = "near_duplicate"
    """The share of rows of one cluster of near-duplicate prompts is used up."""
    MIX = "mix"
    """More kept drafts than the mix asks for."""
    REMOVED = "removed"
    """The person or tenant is on the list of those to remove."""
    NOT_IN_FORMAT = "not_in_format"
    """The loader of the named format would drop, cut or misread the row, or the chat template refuses it."""


REASONS = tuple(Reason)
"""In the order in which they are looked for; where all rows of a trajectory are dropped, the first counts."""


@dataclass(kw_only=True)
class Ledger:
    """The accounts of one build."""

    read: int = 0
    """Trajectories read, broken lines included."""
    gave_rows: int = 0
    """Trajectories of which at least one row stands in the dataset."""
    dropped: dict[Reason, int] = field(default_factory=dict)
    """Trajectories of which none does, by reason."""
    made: int = 0
    """Rows made out of trajectories."""
    kept: dict[str, int] = field(default_factory=dict)
    """Rows in the dataset, by split."""
    dropped_rows: dict[Reason, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    orphans: int = 0
    """Trajectories that a comparison, review or feedback is about, and that were not read."""

    @property
    def rows(self) -> int:
        """Rows in the dataset."""
        return sum(self.kept.values())

    def drop(self, reason: Reason, count: int = 1) -> None:
        """Account for trajectories that were dropped."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def drop_row(self, reason: Reason, count: int = 1) -> None:
        """Account for rows that were dropped."""
        self.dropped_rows[reason] = self.dropped_rows.get(reason, 0) + count

    def keep(self, split: str, count: int = 1) -> None:
        """Account for rows that stand in a split."""
        self.kept[split] = self.kept.get(split, 0) + count

    def add(self, other: Ledger) -> None:
        """Add the counts of another part of the same build."""
        self.read += other.read
        self.gave_rows += other.gave_rows
        self.made += other.made
        self.orphans += other.orphans
        for reason, count in other.dropped.items():
            self.drop(reason, count)
        for reason, count in other.dropped_rows.items():
            self.drop_row(reason, count)
        for split, count in other.kept.items():
            self.keep(split, count)

    def reconcile(self) -> None:
        """Hold the accounts to what was read.

        Raises:
            DataError: they do not add up, so the build is wrong.
        """
        accounts = {
            "trajectories": (self.read, self.gave_rows + sum(self.dropped.values())),
            "rows": (self.made, self.rows + sum(self.dropped_rows.values())),
        }
        for name, (total, accounted) in accounts.items():
            if total != accounted:
                raise DataError(
                    f"the ledger does not reconcile: {total} {name}, {accounted} accounted for; "
                    "nothing was written. This is a fault of cai-graph, please report it"
                )

    def lines(self) -> Iterable[tuple[str, int]]:
        """Yield the accounts as label and count, in the order of the reasons."""
        yield "trajectories read", self.read
        yield "gave rows", self.gave_rows
        for reason in REASONS:
            if count := self.dropped.get(reason):
                yield f"dropped: {reason}", count
        yield "rows made", self.made
        for split, count in sorted(self.kept.items()):
            yield f"rows in {split}", count
        for reason in REASONS:
            if count := self.dropped_rows.get(reason):
                yield f"rows dropped: {reason}", count
        if self.orphans:
            yield "judged, but not in the log", self.orphans

    def to_json(self) -> dict[str, Any]:
        """Return the accounts as the manifest holds them."""
        return {
            "read": self.read,
            "gave_rows": self.gave_rows,
            "dropped": {str(reason): self.dropped[reason] for reason in REASONS if reason in self.dropped},
            "made": self.made,
            "kept": dict(sorted(self.kept.items())),
            "dropped_rows": {
                str(reason): self.dropped_rows[reason] for reason in REASONS if reason in self.dropped_rows
            },
            "orphans": self.orphans,
        }
