"""Turns the Comparisons of one Trajectory into pairs with soft labels, or into reasons for dropping them.

P is averaged over both orders, then over a judge's principles, then over judges. A comparison gives no pair
if the judge chose by position, if it is unreadable or a tie, or if two judges disagree. If several sampled
answers were each compared with all others, the best and the worst form a pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Literal, NamedTuple

from cai_graph.trajectory import Comparison, Message, text_of
from trainers.ledger import Reason

__all__ = ["Judged", "judged_pairs", "same_answer"]

_TIE = 1e-9


class Judged(NamedTuple):
    """Two compared answers, and which one is better."""

    chosen: Message
    """The better answer."""
    rejected: Message
    """The other answer."""
    p_chosen: float
    """P(chosen is better), above 0.5 and at most 1."""
    source: Literal["comparison", "best-of-n"]
    """`comparison` if only these two were compared; `best-of-n` if they are the best and worst of several."""
    judges: tuple[str, ...]
    """Names of the judges, sorted."""
    principles: tuple[str, ...]
    """Ids of the principles of the comparisons, sorted."""


_Answer = tuple[str, str]
"""An answer's words and tool calls, for comparing answers."""
_Groups = dict[frozenset[_Answer], list[Comparison]]


def judged_pairs(comparisons: Iterable[Comparison]) -> list[Judged | Reason]:
    """Return, for each pair of answers that was compared, the better one, or why it cannot be decided."""
    # Sorted by id, so that no floating-point sum depends on the order of the log.
    comparisons = sorted(comparisons, key=lambda comparison: comparison.id)
    pairs: _Groups = {}
    tournaments: dict[str, _Groups] = {}
    for comparison in comparisons:
        sampled = all(origin.startswith("sample:") for origin in comparison.origins)
        labelling = (comparison.source or "").partition("/")[0]
        into = tournaments.setdefault(labelling, {}) if sampled else pairs
        into.setdefault(frozenset(map(_said, comparison.answers)), []).append(comparison)
    found = [_label(group) for group in pairs.values()]
    for groups in tournaments.values():
        found += [_label(*groups.values())] if len(groups) == 1 else [_best_of(groups)]
    return found


def _said(answer: Message) -> _Answer:
    return " ".join(text_of(answer).split()), repr(answer.tool_calls)


def same_answer(a: Message, b: Message) -> bool:
    """Return whether two answers are equal in words, apart from white space, and in tool calls."""
    return _said(a) == _said(b)


def _label(group: list[Comparison]) -> Judged | Reason:
    one = group[0]
    if same_answer(*one.answers):
        return Reason.IDENTICAL
    if any(comparison.settings.get("truncated") for comparison in group):
        return Reason.TRUNCATED
    readable = [(c, p) for c in group if (p := c.preference) is not None]
    clear = [(c, p) for c, p in readable if not c.orders_disagree]
    if not clear:
        return Reason.DISAGREEMENT if readable else Reason.UNREADABLE_VERDICT
    by_judge: dict[str, list[float]] = {}
    for c, p in clear:
        p_a = p if same_answer(c.answers[0], one.answers[0]) else 1 - p
        by_judge.setdefault(c.judge, []).append(p_a)
    means = [fmean(found) for found in by_judge.values()]
    if min(means) < 0.5 - _TIE and max(means) > 0.5 + _TIE:
        return Reason.DISAGREEMENT
    p_a = fmean(means)
    if abs(p_a - 0.5) < _TIE:
        return Reason.TIE
    chosen, rejected = one.answers if p_a > 0.5 else one.answers[::-1]
    return Judged(
        chosen,
        rejected,
        max(p_a, 1 - p_a),
        "comparison",
        tuple(sorted({c.judge for c, _ in clear})),
        tuple(sorted({c.principle for c, _ in clear if c.principle})),
    )


def _best_of(groups: _Groups) -> Judged | Reason:
    """Return the pair of the best and the worst of several answers, by the mean of P over all their pairs.

    The direct comparison of the two gives the label; if it prefers the worst, the result is a disagreement.
    """
    labels = {answers: _label(group) for answers, group in groups.items()}
    scores: dict[_Answer, list[float]] = {}
    for label in labels.values():
        if isinstance(label, Judged):
            scores.setdefault(_said(label.chosen), []).append(label.p_chosen)
            scores.setdefault(_said(label.rejected), []).append(1 - label.p_chosen)
    if not scores:
        return min((r for r in labels.values() if isinstance(r, Reason)), key=list(Reason).index)
    mean = {answer: sum(given) / len(given) for answer, given in scores.items()}
    best, worst = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
    direct = labels.get(frozenset((best, worst)), Reason.TIE)
    if not isinstance(direct, Judged):
        return direct
    return direct._replace(source="best-of-n") if _said(direct.chosen) == best else Reason.DISAGREEMENT
