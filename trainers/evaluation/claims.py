"""A critic that judges a long answer claim by claim (oversight by decomposition).

One bad sentence is easily missed in a page that is otherwise fine. So each claim is judged separately, in its
conversation, and the answer violates whatever any of its claims violates. More judgements mean more chances
of a false alarm: whether this pays must be measured for each critic (docs/evaluation.md has figures).

Principles that only an answer as a whole can meet, such as to help or not to evade, are judged on the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from cai_graph.calls import Calls
from cai_graph.concurrency.together import together
from cai_graph.constitution import Constitution, Principle
from cai_graph.critic import Critic
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Critique, Label, Verdict, text_of
from trainers.identity import told_apart

__all__ = ["ByClaim", "claims"]

LEAST = 100
"""Minimum length of a claim in characters; a shorter one says little alone, and is joined with the next."""
MOST = 40
"""Maximum number of claims; the claims of a longer answer are longer."""
WHOLE_AIM = "helpful"
"""Aim that only a whole answer can meet."""

_ENDS = re.compile(r"(?<=[.!?。！？])[\"')\]]*\s+|\n+")


def claims(answer: str, *, least: int = LEAST) -> list[str]:
    """Return the claims of an answer: its sentences and list items, short ones joined with the next.

    >>> claims("Blot it. Then rinse with cold water.", least=10)
    ['Blot it. Then rinse with cold water.']
    >>> claims("Blot it well. Then rinse with cold water.", least=10)
    ['Blot it well.', 'Then rinse with cold water.']
    """
    answer = answer.strip()
    least = max(least, len(answer) // MOST)
    found: list[str] = []
    start = 0
    for end in [*(match.end() for match in _ENDS.finditer(answer)), len(answer)]:
        if end - start >= least:
            found.append(answer[start:end].strip())
            start = end
    if rest := answer[start:].strip():
        found.append(rest)
    return found


class ByClaim:
    """Wraps a critic: each claim is judged separately, and the aim `helpful` on the whole answer."""

    splits = False

    def __init__(self, critic: Critic, *, least: int = LEAST) -> None:
        """Wrap a critic; `least` is the minimum length of a claim, in characters."""
        self._critic = critic
        self._least = least
        self.name = f"{told_apart(critic.name, getattr(critic, 'model', None))} by claim"
        self.candidates = critic.candidates

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        """Judge an answer under all principles; see `Critic.critique`.

        The probability of a verdict is the highest among the claims, and its reason is that of the first
        claim that violates.
        """
        parts = claims(text_of(exchange.answer), least=self._least)
        by_claim = [p.id for p in constitution.principles if p.aim != WHOLE_AIM]
        if len(parts) < 2 or not by_claim or exchange.answer.tool_calls:
            return await self._critic.critique(exchange, constitution, calls, explain=explain)
        rules = constitution.select(by_claim)
        found = await together(
            [self._critic.critique(each, rules, calls, explain=explain) for each in _alone(exchange, parts)]
        )
        whole = [p.id for p in constitution.principles if p.aim == WHOLE_AIM]
        of_whole = (
            await self._critic.critique(exchange, constitution.select(whole), calls, explain=explain)
            if whole
            else None
        )
        first = found[0] if of_whole is None else of_whole
        verdicts = [_worst(same) for same in _by_subject(found)]
        return Critique(
            verdicts=(*verdicts, *(of_whole.verdicts if of_whole else ())),
            reasoning=next((each.reasoning for each in found if _violates(each) and each.reasoning), ""),
            readings={**first.readings, **_most_harm(found)},
            benign_request=first.benign_request,
            evasive=None if of_whole is None else of_whole.evasive,
            critic=self.name,
        )

    async def discuss(
        self, exchange: Exchange, principle: Principle, constitution: Constitution, calls: Calls
    ) -> Critique:
        """Criticise an answer in prose, as a whole; see `Critic.discuss`."""
        return await self._critic.discuss(exchange, principle, constitution, calls)


def _alone(exchange: Exchange, parts: Sequence[str]) -> list[Exchange]:
    return [
        msgspec.structs.replace(exchange, answer=msgspec.structs.replace(exchange.answer, content=part))
        for part in parts
    ]


def _violates(critique: Critique) -> bool:
    return any(verdict.label is Label.VIOLATES for verdict in critique.verdicts)


def _most_harm(found: Sequence[Critique]) -> dict[str, float]:
    harm = [critique.readings["harm"] for critique in found if "harm" in critique.readings]
    return {"harm": max(harm)} if harm else {}


def _by_subject(found: Iterable[Critique]) -> list[list[Verdict]]:
    """Return the verdicts of all claims, grouped by principle or aim."""
    together: dict[tuple[str | None, str | None], list[Verdict]] = {}
    for critique in found:
        for verdict in critique.verdicts:
            together.setdefault((verdict.principle, verdict.aim), []).append(verdict)
    return list(together.values())


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the worst verdict: a violation, else an unreadable one, else that of the highest probability."""
    surest = sorted(verdicts, key=lambda verdict: -(verdict.probability or 0.0))
    for label in (Label.VIOLATES, Label.UNREADABLE):
        for verdict in surest:
            if verdict.label is label:
                return verdict
    return surest[0]
