"""The ledger of a dataset build: counts what became of every trajectory read and of every row made.

Each Trajectory ends in exactly one account: it gave rows, or it was dropped for one Reason. Each row that was
made also ends in exactly one account: it is in a split, or it was dropped for one Reason. `reconcile` checks
that both sums equal the number read or made; a build that does not reconcile writes nothing.
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
    """The line is not a record that this release can read: malformed, truncated, or of a newer schema."""
    BROKEN_TEXT = "broken_text"
    """A text contains lone surrogates, which the files that trainers read cannot contain."""
    WITHHELD = "withheld"
    """The texts were withheld from the log because redaction failed."""
    NOT_TEXT = "not_text"
    """A message contains something other than text, such as an image."""
    UNKNOWN_ROLE = "unknown_role"
    """A message has a role that chat templates do not know."""
    NO_PROMPT = "no_prompt"
    """No user message precedes the answer."""
    NO_ANSWER = "no_answer"
    """The request ended in an error before there was an answer."""
    EMPTY = "empty"
    """The answer, or one of the two, has no text."""
    TRUNCATED = "truncated"
    """The answer was cut off at the model's token limit."""
    UNJUDGED = "unjudged"
    """No verdict was given on the answer."""
    UNREADABLE_VERDICT = "unreadable_verdict"
    """The verdict that would qualify the answer could not be read."""
    NOT_ACCEPTED = "not_accepted"
    """No answer was accepted: each one violates the constitution, or the request was refused."""
    REVIEWED_OUT = "reviewed_out"
    """A reviewer rejected the answer or flagged the trajectory."""
    DISLIKED = "disliked"
    """End users' feedback on the answer is negative."""
    NO_PAIR = "no_pair"
    """There are fewer answers than this kind of data compares."""
    NO_CRITIQUE = "no_critique"
    """No revision follows from a critique that has reasoning."""
    UNKNOWN_PRINCIPLE = "unknown_principle"
    """The principle's wording is not known; name its constitution."""
    NO_PRINCIPLE = "no_principle"
    """The verdict is on the answer as a whole, and names neither a principle nor an aim."""
    IDENTICAL = "identical"
    """The answers to compare have the same text."""
    TIE = "tie"
    """Neither answer is better."""
    DISAGREEMENT = "disagreement"
    """The evidence contradicts itself: the two orders, two judges, two people, or people and critic."""
    HELD_OUT = "held_out"
    """The prompt is in one of the named evaluation sets."""
    PII = "pii"
    """A text contains what looks like personal data or a secret."""
    OVER_LENGTH = "over_length"
    """The row is longer than the limit, in tokens of the named tokenizer."""
    DUPLICATE = "duplicate"
    """Another row has the same content."""
    USER_CAP = "user_cap"
    """The user's share of rows is used up."""
    TENANT_CAP = "tenant_cap"
    """The tenant's share of rows is used up."""
    NEAR_DUPLICATE = "near_duplicate"
    """The share of rows of one cluster of near-duplicate prompts is used up."""
    MIX = "mix"
    """There are more kept drafts than the mix allows."""
    REMOVED = "removed"
    """The person or tenant is on the removal list."""
    NOT_IN_FORMAT = "not_in_format"
    """The loader of the named format would drop, cut or misread the row, or the chat template rejects it."""


REASONS = tuple(Reason)
"""All reasons, in the order in which they are checked; if all rows of a trajectory are dropped, its reason is
the first of theirs in this order."""


@dataclass(kw_only=True)
class Ledger:
    """The accounts of one build."""

    read: int = 0
    """Trajectories read, including broken lines."""
    gave_rows: int = 0
    """Trajectories with at least one row in the dataset."""
    dropped: dict[Reason, int] = field(default_factory=dict)
    """Trajectories without a row in the dataset, by reason."""
    made: int = 0
    """Rows made from trajectories."""
    kept: dict[str, int] = field(default_factory=dict)
    """Rows in the dataset, by split."""
    dropped_rows: dict[Reason, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    orphans: int = 0
    """Trajectories that a comparison, review or feedback refers to but that were not read."""

    @property
    def rows(self) -> int:
        """Number of rows in the dataset."""
        return sum(self.kept.values())

    def drop(self, reason: Reason, count: int = 1) -> None:
        """Count trajectories that were dropped."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def drop_row(self, reason: Reason, count: int = 1) -> None:
        """Count rows that were dropped."""
        self.dropped_rows[reason] = self.dropped_rows.get(reason, 0) + count

    def keep(self, split: str, count: int = 1) -> None:
        """Count rows that are in a split."""
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
        """Check that the accounts add up to what was read and made.

        Raises:
            DataError: they do not, so the build has a bug.
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
        """Return the accounts as the manifest stores them."""
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
