"""One pure function for each kind of data: a Trajectory and what was said of it → rows, or why none.

`CONVERSIONS` names them by kind. They hold no state, see one trajectory at a time, and decide by its content
alone, so that a stream, a pool of processes and a cluster make the same rows.

Human review outranks every other evidence. Contradictory evidence is never averaged away: it drops the
trajectory as a tie or a disagreement, which the ledger counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cai_graph.trajectory import Label, Message, Review, ToolCall
from trainers.compared import Judged, judged_pairs
from trainers.ledger import Reason
from trainers.reading import (
    Evidence,
    Logged,
    LoggedCritique,
    LoggedMessage,
    LoggedRevision,
    LoggedVerdict,
)
from trainers.reviews import SIDES, standing
from trainers.rows import (
    CriticRow,
    CritiqueRow,
    Dropped,
    FunctionCall,
    Kind,
    PreferenceRow,
    PrivilegedRow,
    PromptRow,
    RankedRow,
    Row,
    SFTRow,
    Source,
    ToolUse,
    Turn,
    UnpairedRow,
    margin_of,
)

__all__ = ["CONVERSIONS", "Conversion", "Terms", "Wording"]

VIOLATES, COMPLIES, UNREADABLE = (label.value for label in (Label.VIOLATES, Label.COMPLIES, Label.UNREADABLE))
_ROLES = frozenset({"system", "user", "assistant", "tool"})
_CERTAIN = 0.999
"""A probability beyond this, or below one minus it, counts as this: no reading is surer."""


class Wording(NamedTuple):
    """What a principle asks of a critic and of a reviser."""

    critique_request: str
    revision_request: str


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the conversions are given besides the trajectory."""

    wordings: Mapping[str, Mapping[str, Wording]] = field(default_factory=dict)
    """Principles' wordings by id, by the digest of their constitution; read by `critique-sft`."""


Conversion = Callable[[Logged, Evidence, Terms], list[Row] | Dropped]


class _Drop(Exception):  # noqa: N818 - says that there is no row, which is no error
    def __init__(self, reason: Reason) -> None:
        self.reason = reason


# --- turns --------------------------------------------------------------------------------------------


def _turn(message: LoggedMessage | Message) -> Turn:
    content = message.content
    if type(content) is not str:
        content = _text(content)
    if message.tool_calls or message.name or message.tool_call_id:
        return Turn(
            role=message.role,
            content=content,
            name=message.name,
            tool_calls=tuple(map(_tool_use, message.tool_calls)),
            tool_call_id=message.tool_call_id,
        )
    return Turn(role=message.role, content=content)


def _text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            part = part["text"]
        # A tool call stands in `tool_calls` as well, and reasoning is not part of the answer.
        elif isinstance(part, dict) and part.get("type") in (
            "tool_use",
            "tool_call",
            "thinking",
            "reasoning",
        ):
            continue
        if not isinstance(part, str):
            raise _Drop(Reason.NOT_TEXT)
        texts.append(part)
    return "".join(texts)


def _tool_use(call: ToolCall) -> ToolUse:
    return ToolUse(id=call.id, function=FunctionCall(name=call.name, arguments=call.args))


def _prompt(logged: Logged) -> tuple[Turn, ...]:
    asked = False
    turns = []
    for message in logged.messages:
        if message.role == "user":
            asked = True
        elif message.role not in _ROLES:
            raise _Drop(Reason.NOT_TEXT)
        turns.append(_turn(message))
    if not asked:
        raise _Drop(Reason.NO_PROMPT)
    return tuple(turns)


def _answer(message: LoggedMessage | Message) -> Turn:
    """Return an answer as an assistant turn; whitespace around it is not its content."""
    turn = _turn(message)
    if not turn.tool_calls and not turn.content.strip():
        raise _Drop(Reason.EMPTY)
    return turn if turn.role == "assistant" else Turn(role="assistant", content=turn.content)


def _same(a: Turn, b: Turn) -> bool:
    return a.tool_calls == b.tool_calls and (a.content == b.content or a.content.split() == b.content.split())


# --- what a trajectory shows --------------------------------------------------------------------------


class _Case:
    """One trajectory, and the answers to the questions that several kinds ask of it."""

    def __init__(self, logged: Logged, evidence: Evidence, terms: Terms) -> None:
        self.logged = logged
        self.evidence = evidence
        self.terms = terms
        self.prompt = _prompt(logged)

    def draft(self) -> LoggedMessage:
        """Return the draft's answer. Drops the trajectory where there is none."""
        if self.logged.draft is None:
            raise _Drop(Reason.NO_ANSWER)
        return self.logged.draft.answer

    def accepted(self) -> list[LoggedRevision]:
        """Return the revisions that replaced the answer before them, in order."""
        return [
            revision for round_ in self.logged.rounds for revision in round_.revisions if revision.accepted
        ]

    def review(self) -> Review | None:
        """Return the decision that the reviewers came to. Drops the trajectory where they disagree."""
        last = standing(self.evidence.reviews)
        if not last:
            return None
        if any(review.decision in ("reject", "flag") for review in last):
            raise _Drop(Reason.REVIEWED_OUT)
        sides = {SIDES[review.decision] for review in last}
        if len(sides) > 1:
            raise _Drop(Reason.DISAGREEMENT)
        return max(last, key=lambda review: (review.at, review.id))

    def liking(self) -> float:
        """Return the mean of the end users' scores of the released answer; 0 where there are none."""
        scores = [feedback.score for feedback in self.evidence.feedback]
        return sum(scores) / len(scores) if scores else 0.0

    def provenance(self, source: Source, judge: str | None, principles: Iterable[str] = ()) -> dict[str, Any]:
        """Return the fields that every row has."""
        return {
            "trajectory_id": self.logged.id,
            "source": source,
            "constitution": self.logged.constitution.digest,
            "judge": judge or "",
            "principles": tuple(principles),
        }


def _name(verdict: LoggedVerdict) -> str:
    return verdict.principle or verdict.aim or ""


def _labels(critique: LoggedCritique) -> dict[str, LoggedVerdict]:
    return {_name(verdict): verdict for verdict in critique.verdicts}


def _violated(critique: LoggedCritique) -> list[str]:
    return [_name(verdict) for verdict in critique.verdicts if verdict.label == VIOLATES]


def _vouched(critique: LoggedCritique | None) -> LoggedCritique:
    """Return the critique that finds nothing against an answer. Drops what is unjudged or unreadable."""
    if critique is None or not critique.verdicts:
        raise _Drop(Reason.UNJUDGED)
    labels = {verdict.label for verdict in critique.verdicts}
    if UNREADABLE in labels:
        raise _Drop(Reason.UNREADABLE_VERDICT)
    if VIOLATES in labels:
        raise _Drop(Reason.NOT_ACCEPTED)
    return critique


def _log_odds(probability: float) -> float:
    bounded = min(max(probability, 1 - _CERTAIN), _CERTAIN)
    return math.log(bounded / (1 - bounded))


class _Mended(NamedTuple):
    """How a revision is better than a draft."""

    principles: tuple[str, ...]
    """What the draft violates and the revision does not."""
    p_better: float
    """P(the revision is the better one)."""
    critic: str | None
    """Who judged the revision."""


def _mended(draft: LoggedCritique, revision: LoggedCritique | None) -> _Mended:
    """Return the evidence of a critic that a revision is better. Drops what it does not vouch for.

    Where the critic gives probabilities of a violation, d of the draft and r of the revision, exactly one
    of the two violates with the odds d(1 − r) : r(1 − d) that it is the draft; over several principles the
    mean of the probabilities stands. Without probabilities the label is certain.
    """
    after = _labels(_vouched(revision))
    failed = {_name(verdict): verdict for verdict in draft.verdicts if verdict.label == VIOLATES}
    mended = [name for name in failed if name in after]
    if not mended:
        readable = any(verdict.label != UNREADABLE for verdict in draft.verdicts)
        raise _Drop(Reason.NOT_ACCEPTED if readable else Reason.UNREADABLE_VERDICT)
    sure = []
    for name in mended:
        before, now = failed[name].probability, after[name].probability
        if before is not None and now is not None:
            sure.append(1 / (1 + math.exp(_log_odds(now) - _log_odds(before))))
    p_better = sum(sure) / len(sure) if sure else 1.0
    if p_better <= 0.5:
        raise _Drop(Reason.TIE if p_better == 0.5 else Reason.DISAGREEMENT)
    assert revision is not None
    return _Mended(tuple(mended), p_better, revision.critic)


# --- sft ----------------------------------------------------------------------------------------------


def sft(case: _Case) -> list[Row]:
    """The answer to imitate: a reviewer's own, the accepted revision, or the draft that was kept.

    Of the paper's data generation (mode `sampled`) every revision is one, as in Bai et al. 2022, section 3.1;
    they are unjudged by design.
    """
    logged = case.logged
    review = case.review()

    def row(answer: LoggedMessage | Message, source: Source, judge: str | None, mended: Iterable[str]) -> Row:
        return SFTRow(
            prompt=case.prompt, completion=(_answer(answer),), **case.provenance(source, judge, mended)
        )

    if review is not None and review.decision == "edit" and review.answer is not None:
        return [row(review.answer, "human", review.reviewer, ())]
    draft = case.draft()
    if review is not None and review.decision in ("flip", "draft"):
        return [row(draft, "human", review.reviewer, ())]
    accepted = case.accepted()
    if logged.mode == "sampled" and accepted:
        return [
            row(revision.answer, "revision", round_.critique.critic, map(_name, round_.critique.verdicts))
            for round_ in logged.rounds
            for revision in round_.revisions
            if revision.accepted
        ]
    if review is not None and review.decision == "approve" and logged.released is not None:
        return [row(logged.released, "human", review.reviewer, ())]
    if case.liking() < 0:
        raise _Drop(Reason.DISLIKED)
    if logged.outcome == "REVISED" and accepted:
        final = accepted[-1]
        violated = _violated(logged.rounds[0].critique)
        if logged.mode == "imported":
            return [row(final.answer, "imported", _author(logged), violated)]
        return [row(final.answer, "revision", _vouched(final.critique).critic, violated)]
    if logged.outcome == "KEPT":
        if logged.draft is not None and logged.draft.truncated:
            raise _Drop(Reason.TRUNCATED)
        critique = _vouched(logged.rounds[0].critique if logged.rounds else None)
        return [row(draft, "draft", critique.critic, ())]
    raise _Drop(Reason.NOT_ACCEPTED)


# --- critique-sft and privileged ----------------------------------------------------------------------

_GENERAL = Wording(
    "Point out every way in which your last answer could be less harmful, more honest or more helpful.",
    "Rewrite your last answer so that it mends what the critique points out.",
)
"""For a demonstration that names no principle."""


def _words(critique: LoggedCritique) -> str:
    """Return what a critic wrote: its reasoning, or else the reasons of what it found violated."""
    reasons = [
        verdict.reason for verdict in critique.verdicts if verdict.label == VIOLATES and verdict.reason
    ]
    return critique.reasoning.strip() or "\n".join(reasons).strip()


def _wordings(case: _Case, principles: Sequence[str]) -> list[Wording]:
    known = case.terms.wordings.get(case.logged.constitution.digest)
    if known is None and case.logged.mode == "imported":
        known = {id: wording for some in case.terms.wordings.values() for id, wording in some.items()}
        return [known[principle] for principle in principles if principle in known] or [_GENERAL]
    found = [known[principle] for principle in principles if known and principle in known]
    if len(found) < len(principles) or not found:
        raise _Drop(Reason.UNKNOWN_PRINCIPLE)
    return found


def critique_sft(case: _Case) -> list[Row]:
    """The skill of the paper's supervised phase, as two steps: critique the draft, then revise it."""
    rows: list[Row] = []
    before: LoggedMessage | Message = case.draft()
    for round_ in case.logged.rounds:
        revision = next((revision for revision in round_.revisions if revision.accepted), None)
        words = _words(round_.critique)
        if revision is None or not words:
            continue
        sampled = case.logged.mode == "sampled"
        principles = [name for name in map(_name, round_.critique.verdicts) if name]
        if not sampled:
            principles = [name for name in _violated(round_.critique) if name]
        wordings = _wordings(case, principles)
        asked = Turn(role="user", content="\n".join(wording.critique_request for wording in wordings))
        again = Turn(role="user", content="\n".join(wording.revision_request for wording in wordings))
        critique = Turn(role="assistant", content=words)
        shown = (*case.prompt, _answer(before), asked)
        origin = case.provenance("critique", round_.critique.critic, principles)
        rows.append(CritiqueRow(prompt=shown, completion=(critique,), step="critique", **origin))
        rows.append(
            CritiqueRow(
                prompt=(*shown, critique, again),
                completion=(_answer(revision.answer),),
                step="revision",
                **origin,
            )
        )
        before = revision.answer
    if not rows:
        raise _Drop(Reason.NO_CRITIQUE)
    return rows


def privileged(case: _Case) -> list[Row]:
    """The critique of the draft, as context that a teacher has and the student has not."""
    case.draft()
    for round_ in case.logged.rounds[:1]:
        words = _words(round_.critique)
        if words and (_violated(round_.critique) or case.logged.mode == "sampled"):
            return [
                PrivilegedRow(
                    prompt=case.prompt,
                    privileged_context=words,
                    **case.provenance("critique", round_.critique.critic, _violated(round_.critique)),
                )
            ]
    raise _Drop(Reason.NO_CRITIQUE)


# --- preference ---------------------------------------------------------------------------------------


def preference(case: _Case) -> list[Row]:
    """Pairs with evidence: a person's, an AI comparison's, or the critic's verdicts on draft and revision."""
    review = case.review()
    if review is not None:
        return [_reviewed(case, review)]
    if case.evidence.comparisons:
        return _compared(case)
    return _revised(case)


def _pair(
    case: _Case,
    chosen: LoggedMessage | Message,
    rejected: LoggedMessage | Message,
    p_chosen: float,
    **provenance: Any,
) -> PreferenceRow:
    better, worse = _answer(chosen), _answer(rejected)
    if _same(better, worse):
        raise _Drop(Reason.IDENTICAL)
    return PreferenceRow(
        prompt=case.prompt,
        chosen=(better,),
        rejected=(worse,),
        p_chosen=p_chosen,
        margin=margin_of(p_chosen),
        **provenance,
    )


def _reviewed(case: _Case, review: Review) -> Row:
    draft = case.draft()
    accepted = case.accepted()
    revision = accepted[-1].answer if accepted else None
    origin = case.provenance("human", review.reviewer, _failed_by_draft(case))
    if review.decision == "tie":
        raise _Drop(Reason.TIE)
    if review.decision == "edit" and review.answer is not None:
        return _pair(case, review.answer, revision or draft, 1.0, **origin)
    if revision is None:
        raise _Drop(Reason.NO_PAIR)
    if review.decision == "approve":
        return _pair(case, revision, draft, 1.0, **origin)
    return _pair(case, draft, revision, 1.0, **origin)


def _author(logged: Logged) -> str:
    """Return who made what was imported: the name of a preference set, or a person."""
    return (logged.rounds[0].critique.critic if logged.rounds else None) or "human"


def _failed_by_draft(case: _Case) -> list[str]:
    return _violated(case.logged.rounds[0].critique) if case.logged.rounds else []


def _compared(case: _Case) -> list[Row]:
    """Pairs that were compared, unless end users said the opposite of the answer that they saw."""
    rows: list[Row] = []
    reasons: list[Reason] = []
    for judged in judged_pairs(case.evidence.comparisons):
        try:
            if isinstance(judged, Reason):
                raise _Drop(judged)
            _check_liking(case, judged)
            origin = case.provenance(judged.source, ", ".join(judged.judges), judged.principles)
            rows.append(_pair(case, judged.chosen, judged.rejected, judged.p_chosen, **origin))
        except _Drop as drop:
            reasons.append(drop.reason)
    if not rows:
        raise _Drop(min(reasons, key=list(Reason).index))
    return rows


def _check_liking(case: _Case, judged: Judged) -> None:
    liking, released = case.liking(), case.logged.released
    if liking and released is not None:
        contradicted = judged.chosen if liking < 0 else judged.rejected
        if _same(_answer(contradicted), _answer(released)):
            raise _Drop(Reason.DISAGREEMENT)


def _revised(case: _Case) -> list[Row]:
    """The accepted revision over the draft, and over the candidates that the critic found worse."""
    logged = case.logged
    draft = case.draft()
    if logged.outcome == "KEPT":
        raise _Drop(Reason.NO_PAIR)
    accepted = case.accepted()
    if logged.outcome != "REVISED" or not accepted:
        raise _Drop(Reason.NOT_ACCEPTED)
    final = accepted[-1]
    source: Source = "revision"
    if logged.mode == "imported":
        mended = _Mended(tuple(_failed_by_draft(case)), 1.0, _author(logged))
        source = "imported"
    else:
        mended = _mended(logged.rounds[0].critique, final.critique)
    liking = case.liking()
    if liking:
        # The user saw one of the two, and spoke for the one or the other.
        if (logged.released_from == "draft") == (liking > 0):
            raise _Drop(Reason.DISAGREEMENT)
        source = "feedback"
    origin = case.provenance(source, mended.critic, mended.principles)
    return [_pair(case, final.answer, draft, mended.p_better, **origin), *_best_of_n(case, final)]


def _best_of_n(case: _Case, final: LoggedRevision) -> list[Row]:
    rows: list[Row] = []
    for round_ in case.logged.rounds:
        if not any(revision is final for revision in round_.revisions):
            continue
        for other in round_.revisions:
            if other is final or other.rejection not in ("violates", "evasive") or other.critique is None:
                continue
            try:
                mended = _mended(other.critique, final.critique)
                origin = case.provenance("best-of-n", mended.critic, mended.principles)
                rows.append(_pair(case, final.answer, other.answer, mended.p_better, **origin))
            except _Drop:
                continue  # The pair with the draft stands all the same.
    return rows


# --- unpaired -----------------------------------------------------------------------------------------


def unpaired(case: _Case) -> list[Row]:
    """Answers with a label each: by a person, by end users, or by the critic."""
    logged = case.logged
    draft = case.draft()
    review = case.review()
    labelled: list[tuple[LoggedMessage | Message, bool, Source, str | None, Sequence[str]]] = []
    reason = Reason.NOT_ACCEPTED
    if review is not None and review.decision == "tie":
        raise _Drop(Reason.TIE)
    if review is not None and review.decision == "edit" and review.answer is not None:
        labelled.append((review.answer, True, "human", review.reviewer, ()))
        if logged.released is not None:
            labelled.append((logged.released, False, "human", review.reviewer, ()))
    elif review is not None:
        good = review.decision in ("flip", "draft")
        labelled.append(
            (draft, good or not case.accepted(), "human", review.reviewer, _failed_by_draft(case))
        )
        labelled += [(r.answer, not good, "human", review.reviewer, ()) for r in case.accepted()[-1:]]
    elif (liking := case.liking()) and logged.released is not None and logged.released_from != "refusal":
        labelled.append((logged.released, liking > 0, "feedback", "", ()))
    else:
        answers: list[tuple[LoggedMessage, LoggedCritique | None, Source]]
        answers = [(draft, logged.rounds[0].critique if logged.rounds else None, "draft")]
        answers += [
            (revision.answer, revision.critique, "revision")
            for round_ in logged.rounds
            for revision in round_.revisions
            if revision.rejection in (None, "violates", "evasive", "not_best")
        ]
        for answer, critique, source in answers:
            if critique is None or not critique.verdicts:
                reason = Reason.UNJUDGED
            elif violated := _violated(critique):
                labelled.append((answer, False, source, critique.critic, violated))
            elif any(verdict.label == UNREADABLE for verdict in critique.verdicts):
                reason = Reason.UNREADABLE_VERDICT
            else:
                labelled.append((answer, True, source, critique.critic, ()))
    rows: list[Row] = []
    for text, label, origin, judge, principles in labelled:
        try:
            completion = _answer(text)
        except _Drop as drop:
            reason = drop.reason
            continue
        rows.append(
            UnpairedRow(
                prompt=case.prompt,
                completion=(completion,),
                label=label,
                **case.provenance(origin, judge, principles),
            )
        )
    if not rows:
        raise _Drop(reason)
    return rows


# --- prompts, critic, ranked --------------------------------------------------------------------------


def prompts(case: _Case) -> list[Row]:
    """The conversation that asks; it needs no answer."""
    return [PromptRow(prompt=case.prompt, **case.provenance("draft", None))]


def critic(case: _Case) -> list[Row]:
    """Every readable verdict on every answer."""
    judged = [(case.draft(), round_.critique) for round_ in case.logged.rounds[:1]]
    judged += [
        (revision.answer, revision.critique)
        for round_ in case.logged.rounds
        for revision in round_.revisions
        if revision.critique is not None
    ]
    rows: list[Row] = []
    unreadable = False
    for answer, critique in judged:
        for verdict in critique.verdicts:
            if verdict.label == UNREADABLE:
                unreadable = True
                continue
            violates = verdict.label == VIOLATES
            try:
                completion = _answer(answer)
            except _Drop:
                break
            rows.append(
                CriticRow(
                    prompt=case.prompt,
                    completion=(completion,),
                    principle=_name(verdict),
                    violates=violates,
                    p_violates=float(violates) if verdict.probability is None else verdict.probability,
                    **case.provenance("critique", critique.critic, (_name(verdict),)),
                )
            )
    if not rows:
        raise _Drop(Reason.UNREADABLE_VERDICT if unreadable else Reason.UNJUDGED)
    return rows


def ranked(case: _Case) -> list[Row]:
    """Draft, middle and final revision, where the critic vouches for the final one."""
    draft = case.draft()
    if case.logged.outcome != "REVISED":
        raise _Drop(Reason.NO_PAIR if case.logged.outcome == "KEPT" else Reason.NOT_ACCEPTED)
    accepted = case.accepted()
    if len(accepted) < 2:
        raise _Drop(Reason.NO_PAIR)
    first, middle, last = _answer(draft), _answer(accepted[-2].answer), _answer(accepted[-1].answer)
    if _same(first, middle) or _same(middle, last) or _same(first, last):
        raise _Drop(Reason.IDENTICAL)
    mended = _mended(case.logged.rounds[0].critique, accepted[-1].critique)
    return [
        RankedRow(
            prompt=case.prompt,
            reference=(last,),
            chosen=(middle,),
            rejected=(first,),
            **case.provenance("revision", mended.critic, mended.principles),
        )
    ]


def _conversion(rows_of: Callable[[_Case], list[Row]]) -> Conversion:
    def convert(logged: Logged, evidence: Evidence, terms: Terms) -> list[Row] | Dropped:
        if logged.metadata.get("redaction") == "failed":
            return Dropped(Reason.WITHHELD)
        try:
            return rows_of(_Case(logged, evidence, terms))
        except _Drop as drop:
            return Dropped(drop.reason)

    convert.__name__, convert.__doc__ = rows_of.__name__, rows_of.__doc__
    return convert


CONVERSIONS: dict[Kind, Conversion] = {
    "sft": _conversion(sft),
    "critique-sft": _conversion(critique_sft),
    "preference": _conversion(preference),
    "unpaired": _conversion(unpaired),
    "prompts": _conversion(prompts),
    "critic": _conversion(critic),
    "privileged": _conversion(privileged),
    "ranked": _conversion(ranked),
}
"""What turns a Trajectory into rows, by kind of data."""
