"""What is said of one answer by itself: by a critic, by a reward, by a classifier of refusals.

    CriticGrader   1 − P(the answer breaks a principle of one aim), by any Critic
    RewardGrader   what a reward says: a reward model, an ensemble, a judge, a function of one's own

A grade that could not be read stays without value and label to the end; it is never one half. What could not
be had, since the grader was out or its provider rejected the answer, is no such grade: it has an error, and
is asked for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cai_graph.calls import Budget, Calls
from cai_graph.concurrency.together import together
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic, critic_for, failed_principles
from cai_graph.errors import ConfigError
from cai_graph.failures import describe, is_about_all_rows
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Label, text_of
from trainers.checkpoint import Checkpoint
from trainers.feedback import p_violates
from trainers.identity import identity_of_reward, told_apart
from trainers.rewards import (
    EnsembleReward,
    JudgeReward,
    Rated,
    Reward,
    Spec,
    folders,
    parse,
    ratings,
    spelled_out,
)

__all__ = ["CriticGrader", "Grade", "Grader", "RewardGrader"]


class Grade(NamedTuple):
    """What was said of an answer."""

    value: float | None = None
    """A number, larger is better; None where there is none."""
    label: str | None = None
    """A word of a closed set; None where there is none."""
    why: str = ""
    """Why neither could be read, or what the grader wrote."""
    error: str | None = None
    """Class and message of the error that it was not given for; None where the grader had its say."""


class Grader(Protocol):
    """What grades answers."""

    name: str
    """Stable name, which names the file of its grades; all that shapes a grade is in it."""
    batch: int
    """How many answers are worth giving at once."""

    async def grade(self, exchanges: Sequence[Exchange]) -> list[Grade]:
        """Return a grade for each answer; one that cannot be read is a Grade without value and label, and one
        that cannot be had, since this answer's request failed, has an error besides.

        Raises:
            Exception: what would fail every further answer, such as a refused key.
        """
        ...


class CriticGrader:
    """Grades by a critic's verdicts under the principles of one aim."""

    batch = 4

    def __init__(self, critic: str | Critic, constitution: Constitution, aim: str) -> None:
        """Set up; nothing is asked.

        Raises:
            ConfigError: the constitution has no principle of that aim, or the spec names no model.
        """
        of_aim = [principle.id for principle in constitution.principles if principle.aim == aim]
        if not of_aim:
            aims = ", ".join(dict.fromkeys(principle.aim for principle in constitution.principles))
            raise ConfigError(
                f"constitution {constitution.name!r} has no principle of the aim {aim!r}, only {aims}; "
                "name another with --constitution"
            )
        self._critic = critic_for(critic)
        self._constitution = constitution.select(of_aim)
        critic_name = told_apart(self._critic.name, getattr(self._critic, "model", None))
        self.name = f"{critic_name} as critic under {constitution.name} ({constitution.digest[:8]})"

    async def grade(self, exchanges: Sequence[Exchange]) -> list[Grade]:
        """Return 1 − P(violates) and the verdict of each answer."""
        return await together([self._grade(exchange) for exchange in exchanges])

    async def _grade(self, exchange: Exchange) -> Grade:
        try:
            said = await self._critic.critique(exchange, self._constitution, Calls(Budget()), explain=False)
        except Exception as error:
            if is_about_all_rows(error):
                raise
            return Grade(error=describe(error))
        violates = p_violates(said, self._constitution)
        if violates is None:
            reasons = [v.reason for v in said.verdicts if v.label is Label.UNREADABLE and v.reason]
            return Grade(why=reasons[0] if reasons else "the critic gave no verdict that could be read")
        label = Label.VIOLATES if failed_principles(said, self._constitution) else Label.COMPLIES
        return Grade(1 - violates, label.value)


class RewardGrader:
    """Grades by a reward; whether a value is good only another of the same reward tells."""

    def __init__(self, reward: Reward, *, name: str = "", batch: int = 8) -> None:
        """Take a reward; `name` tells it apart where its own does not, and `batch` answers go at once."""
        self._reward = reward
        self.batch = batch
        self.name = f"{name or reward.name} as reward"

    @classmethod
    def of(cls, spec: Spec, rules: Constitution | None = None) -> RewardGrader:
        """Read a reward's spec, as `trainers.rewards.parse`. A digest of weights, of a judge's constitution,
        or of a function's module is in the name, so that rewards that differ in it share no grades; a reward
        model's folder with the same weights and another config or tokenizer has the same name."""
        reward = parse(spec, rules=rules)
        return cls(reward, name=_name_of(spec, reward))

    async def grade(self, exchanges: Sequence[Exchange]) -> list[Grade]:
        """Return the reward of each answer; what a reward raises ends the grading, which resumes.

        Training gets a number even where a judge could not be read, or its provider rejected the answer; a
        grade has none then.
        """
        prompts = [
            [{"role": message.role, "content": text_of(message)} for message in exchange.messages]
            for exchange in exchanges
        ]
        answers = [text_of(exchange.answer) for exchange in exchanges]
        found = await asyncio.to_thread(ratings, self._reward, prompts, answers)
        return [_grade_of(rated) for rated in found]


def _grade_of(rated: Rated) -> Grade:
    if isinstance(rated, str):
        return Grade(error=rated)
    return Grade(rated, why="the judge gave no rating that could be read" if rated is None else "")


def _name_of(spec: Spec, reward: Reward) -> str:
    spec = spelled_out(spec)
    if isinstance(reward, EnsembleReward):
        return " and ".join(_name_of(one, member) for one, member in zip(spec, reward.members, strict=True))
    if isinstance(spec, dict) and isinstance(reward, JudgeReward):
        (model,) = (one for kind, one in spec.items() if kind != "constitution")
        return f"{told_apart(reward.name, model)} under {reward.rules.name} ({reward.rules.digest[:8]})"
    for folder in folders(spec):
        return f"{spec} ({Checkpoint.open(folder).digest[:8]})"
    _, module = identity_of_reward(spec)
    return f"{reward.name} ({module[:8]})" if module else reward.name
