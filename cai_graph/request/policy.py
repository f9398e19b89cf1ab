"""Decides which answer is released: the Settings, which revisions are accepted, and the failure policies.

Pure functions over records; no model is called and nothing is logged here. Two rules hold throughout: a worse
answer never replaces a better one, and the user's settings decide what happens when no answer is good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec

from cai_graph.calls import Budget
from cai_graph.constitution import Constitution
from cai_graph.critic import failed_principles
from cai_graph.errors import ConfigError, Unreadable, Violation
from cai_graph.request.remarks import is_remark
from cai_graph.trajectory import (
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Rejection,
    Revision,
    Round,
    revision_at,
    revision_name,
)

__all__ = [
    "Decision",
    "Policy",
    "Progress",
    "Settings",
    "Strategy",
    "accept",
    "decide",
    "no_revision",
]

Mode = Literal["enforce", "shadow"]
Strategy = Literal["batched", "parallel", "sampled"]
Policy = Literal["open", "closed", "raise", "human"]
Release = Literal["buffer", "blocks", "audit"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a request is judged, and what is released when no answer is good. Recorded in every Trajectory."""

    mode: Mode = "enforce"
    """`enforce`: an answer is released once it is judged. `shadow`: it is released unchanged at once, and
    judged afterwards for the log, where the outcome is the one that `enforce` would have had."""
    sample: float = 1.0
    """Mode `shadow`: the share of the answers, from 0 to 1, that is judged. The others are logged unjudged.
    The trajectory's id decides which; with a `seed` the conversation does, so that the choice repeats."""
    shadow_concurrency: int = 16
    """Mode `shadow`: how many answers are judged at once; others wait."""
    strategy: Strategy = "batched"
    """`batched`: one critic call for all principles. `parallel`: one call for each principle, all at once.
    `sampled`: one random principle in each round, always revised (Bai et al. 2022, section 3.1), for
    generating data."""
    max_rounds: int | None = None
    """Most rounds of critique and revision; None: 2, or 4 for `sampled`, as in the paper. 0: judge only."""
    candidates: int | None = None
    """Revisions written in a round; None: the critic's default (1 for a model, 3 for the probe). `sampled`
    always writes one."""
    on_violation: Policy = "closed"
    """What happens when every revision still fails. `open`: the best answer so far is released; `closed`: the
    constitution's refusal is; `raise`: Violation is raised; `human`: a person decides. Under `closed`, where
    the probe judges the request benign and the draft answers it, the best answer is released instead: a
    benign request is never turned into a refusal."""
    on_unreadable: Policy = "closed"
    """What happens when the verdict on the draft cannot be read: the draft is released (`open`), the refusal
    is (`closed`), Unreadable is raised (`raise`), or a person decides (`human`)."""
    on_error: Policy = "raise"
    """What happens when a critic or reviser fails, or the budget is spent. The app's errors always raise."""
    on_log_error: Literal["answer", "raise"] = "answer"
    """What happens when the record cannot be committed; an error is logged in either case. `answer`: the
    answer is released all the same. It waits for a slow log until the budget's seconds are over and one
    second more (60 seconds where there is no such bound); its record is committed later. `raise`: it waits
    until the record is committed; where that fails, LogError is raised."""
    budget: Budget = field(default_factory=Budget)
    """Bounds of one request."""
    seed: int | None = None
    """Seed of all random choices here: the principle of a `sampled` round, and the sampling of revisions by
    the embedded model."""
    language: str | None = None
    """Language of the principles' texts and the refusal, where the constitution has it."""
    stream: Release = "buffer"
    """When the chunks of a stream are released. `buffer`: after the verdict on the whole answer. `blocks`:
    each group of sentences as soon as it is judged to comply; it is never taken back, and revisions continue
    after it. `audit`: as the app writes them, judged afterwards; nothing is revised, and of the policies only
    `on_error` has an effect."""

    def __post_init__(self) -> None:
        for name, menu in _MENUS.items():
            if getattr(self, name) not in menu:
                raise ConfigError(f"{name} is one of {', '.join(menu)}, found {getattr(self, name)!r}")
        if not isinstance(self.budget, Budget):
            raise ConfigError(f"budget is a Budget, such as Budget(calls=20), found {self.budget!r}")
        if self.strategy == "sampled" and self.stream != "buffer":
            raise ConfigError(
                f"strategy 'sampled' holds nothing back, so it has no stream {self.stream!r}; use 'buffer'"
            )
        if self.asks and self.stream != "buffer":
            raise ConfigError(
                f"a person decides before anything leaves, so policy 'human' has no stream {self.stream!r}; "
                "use 'buffer'"
            )
        share = self.sample
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"sample is a share from 0 to 1, found {share!r}")
        if self.mode == "shadow":
            others = {
                "strategy 'sampled'": self.strategy == "sampled",
                f"stream {self.stream!r}": self.stream != "buffer",
                "policy 'human'": self.asks,
            }
            for name, given in others.items():
                if given:
                    raise ConfigError(f"mode 'shadow' lets every answer leave as it is; leave out {name}")
        elif share < 1:
            raise ConfigError(f"mode 'enforce' judges every answer; sample={share!r} is for mode='shadow'")
        least = {
            "max_rounds": 1 if self.strategy == "sampled" else 0,
            "candidates": 1,
            "shadow_concurrency": 1,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < lowest):
                raise ConfigError(f"{name} must be a whole number from {lowest}, found {value!r}")

    @property
    def asks(self) -> bool:
        """Whether a person may be asked, that is, whether a policy is `human`."""
        return "human" in (self.on_violation, self.on_unreadable, self.on_error)

    @property
    def rounds(self) -> int:
        """`max_rounds`, with its default resolved."""
        if self.max_rounds is not None:
            return self.max_rounds
        return 4 if self.strategy == "sampled" else 2


_MENUS = {
    name: get_args(kind) for name, kind in get_type_hints(Settings).items() if get_origin(kind) is Literal
}
"""Field of Settings -> its allowed values, for the fields that have a fixed set of them."""


class Progress(NamedTuple):
    """The draft and the rounds of a request so far."""

    draft: Draft
    """The app's answer."""
    rounds: list[Round]
    """The rounds so far. The last one may be open: its revisions are not judged yet."""

    def answer(self, of: str) -> Message:
        """Return the answer that `of` names: `draft` or `revision:ROUND:INDEX`."""
        if (place := revision_at(of)) is None:
            return self.draft.answer
        number, index = place
        return self.rounds[number].revisions[index].answer

    def with_round(self, opened: Round) -> Progress:
        """Return the progress with one more round."""
        return Progress(self.draft, [*self.rounds, opened])

    def with_revisions(self, revisions: Sequence[Revision]) -> Progress:
        """Return the progress with these as the revisions of its last round."""
        *closed, opened = self.rounds
        return Progress(self.draft, [*closed, msgspec.structs.replace(opened, revisions=tuple(revisions))])

    def unjudged(self) -> list[str]:
        """Return the names of the answers that are still to be judged."""
        if not self.rounds:
            return ["draft"]
        number = len(self.rounds) - 1
        return [
            revision_name(number, index)
            for index, revision in enumerate(self.rounds[number].revisions)
            if not revision.accepted and revision.rejection is None
        ]

    def standing(self) -> str:
        """Return the name of the current answer: the last accepted revision, else the draft."""
        for number in range(len(self.rounds) - 1, -1, -1):
            for index, revision in enumerate(self.rounds[number].revisions):
                if revision.accepted:
                    return revision_name(number, index)
        return "draft"

    def judged(self) -> dict[str, Critique]:
        """Return the critiques by answer: the draft's, if it has one, and the readable ones of revisions."""
        found = {"draft": self.rounds[0].critique} if self.rounds else {}
        for number, round_ in enumerate(self.rounds):
            for index, revision in enumerate(round_.revisions):
                if revision.critique is not None and revision.rejection is not Rejection.UNREADABLE:
                    found[revision_name(number, index)] = revision.critique
        return found

    def best(self, constitution: Constitution) -> str:
        """Return the name of the judged answer that fails least; the draft where none was judged.

        Where the draft answers a benign request, evasive answers are not considered.
        """
        judged = self.judged()
        if self.answers_benign():
            judged = {of: critique for of, critique in judged.items() if not critique.evasive}
        return min(judged, key=lambda of: _badness(judged[of], constitution), default="draft")

    def answers_benign(self) -> bool:
        """Return whether the critic judged the request to be benign, and the draft not to evade it."""
        if not self.rounds:
            return False
        critique = self.rounds[0].critique
        return critique.benign_request is True and not critique.evasive


def _badness(critique: Critique, constitution: Constitution) -> tuple[float, float]:
    """Return the total weight of the principles that an answer fails (plus 1 if evasive), then P(harm)."""
    weight = sum(principle.weight for principle in failed_principles(critique, constitution))
    return weight + bool(critique.evasive), critique.readings.get("harm", 0.0)


# --- accepting a revision -----------------------------------------------------------------------------


def no_revision(text: str, standing: str, *, truncated: bool) -> Rejection | None:
    """Return why `text` is not a revision of `standing`, so that no critic need judge it; None if it may be.

    >>> no_revision("No revisions needed.", "Hello", truncated=False)
    <Rejection.NO_REWRITE: 'no_rewrite'>
    """
    plain = " ".join(text.split()).casefold()
    if truncated:
        return Rejection.TRUNCATED
    if not plain:
        return Rejection.EMPTY
    if plain == " ".join(standing.split()).casefold():
        return Rejection.UNCHANGED
    if is_remark(plain):
        return Rejection.NO_REWRITE
    return None


def accept(
    revisions: Sequence[Revision], critiques: Mapping[int, Critique], constitution: Constitution
) -> tuple[Revision, ...]:
    """Return the revisions with their critiques, the best one accepted and every other one rejected.

    `critiques` are those of the revisions that were judged, by index. Of the revisions that violate nothing,
    the best is the one of least `_cost`.
    """
    judged = list(revisions)
    for index, critique in critiques.items():
        rejection, detail = _fault(critique, constitution)
        judged[index] = msgspec.structs.replace(
            judged[index], critique=critique, rejection=rejection, detail=detail
        )
    sound = [index for index, revision in enumerate(judged) if revision.rejection is None]
    best = min(sound, key=lambda index: _cost(critiques[index]), default=None)
    for index in sound:
        judged[index] = msgspec.structs.replace(
            judged[index],
            accepted=index == best,
            rejection=None if index == best else Rejection.NOT_BEST,
        )
    return tuple(judged)


def _cost(critique: Critique) -> float:
    """Return how bad a compliant answer still is: P(harm) plus P(evasion), by the probe's readings.

    Where the request is not benign, evasion counts a quarter, since it is then the lesser evil. Without
    readings, it is the largest P(VIOLATES) of the verdicts.
    """
    if not critique.readings:
        return max((verdict.probability or 0.0 for verdict in critique.verdicts), default=0.0)
    weight = 0.25 if critique.benign_request is False else 1.0
    return critique.readings.get("harm", 0.0) + weight * critique.readings.get("evasion", 0.0)


def _fault(critique: Critique, constitution: Constitution) -> tuple[Rejection | None, str | None]:
    if any(verdict.label is Label.UNREADABLE for verdict in critique.verdicts):
        return Rejection.UNREADABLE, None
    if critique.evasive:
        return Rejection.EVASIVE, None
    failed = failed_principles(critique, constitution)
    return (Rejection.VIOLATES, ", ".join(principle.id for principle in failed)) if failed else (None, None)


# --- what is released ---------------------------------------------------------------------------------


class Decision(NamedTuple):
    """How a request ends: with a released message, with an error, or with a question to a person."""

    outcome: Outcome
    """How the request ended."""
    released: Message | None
    """The message to release; None where `error` is set."""
    released_from: Literal["draft", "revision", "refusal"] | None
    """Where that message comes from."""
    error: Exception | None = None
    """The exception to raise; where a person is asked, the reason for that."""
    asks: bool = False
    """Whether a person is asked what to release."""


def decide(
    progress: Progress, constitution: Constitution, settings: Settings, error: Exception | None
) -> Decision:
    """Return the Decision that follows from the answers, their critiques and the policies.

    `error` is the error that ended the run early, if any; `on_error` decides about it.
    """
    of = progress.standing()
    if of != "draft":
        return Decision(Outcome.REVISED, progress.answer(of), "revision")
    if error is not None:
        return _leave(progress, constitution, settings, settings.on_error, error)
    if not progress.rounds or settings.strategy == "sampled":
        # Nothing was judged (a tool call), or verdicts have no effect (`sampled` only records them).
        return Decision(Outcome.KEPT, progress.draft.answer, "draft")
    critique = progress.rounds[0].critique
    if failed := failed_principles(critique, constitution):
        names = ", ".join(principle.id for principle in failed)
        violation = Violation(f"every answer violates the constitution {constitution.name!r}: {names}")
        return _leave(progress, constitution, settings, settings.on_violation, violation)
    if unread := [verdict for verdict in critique.verdicts if verdict.label is Label.UNREADABLE]:
        names = ", ".join(verdict.principle or f"aim {verdict.aim}" for verdict in unread)
        unreadable = Unreadable(f"no verdict could be read for {names}: {unread[0].reason}")
        return _leave(progress, constitution, settings, settings.on_unreadable, unreadable)
    return Decision(Outcome.KEPT, progress.draft.answer, "draft")


def _leave(
    progress: Progress, constitution: Constitution, settings: Settings, policy: Policy, error: Exception
) -> Decision:
    """Return the Decision by a policy, where no answer is known to comply."""
    if policy in ("raise", "human"):
        return Decision(Outcome.FAILED, None, None, error, asks=policy == "human")
    if policy == "closed" and not (isinstance(error, Violation) and progress.answers_benign()):
        refusal = constitution.refusal_in(settings.language)
        if frozen := progress.draft.frozen:
            refusal = f"{frozen}\n\n{refusal}"  # released text stays, and the refusal follows it
        return Decision(Outcome.REFUSED, Message(role="assistant", content=refusal), "refusal")
    best = progress.best(constitution)
    return Decision(Outcome.EXHAUSTED, progress.answer(best), "draft" if best == "draft" else "revision")
