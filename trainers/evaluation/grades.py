"""Grades of single answers, by a critic or by a reward; the interface of graders.

    CriticGrader   1 − P(the answer violates a principle of one aim), by any Critic
    RewardGrader   the reward of the answer: by a reward model, an ensemble, a judge, or a Python function

A grade that could not be read has neither value nor label, and is not requested again; it is never counted as
one half. A request that failed, since the grader was down or its provider rejected the answer, gives a grade
with an error, and is retried.
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
    """A grader's judgement of one answer."""

    value: float | None = None
    """A number, the larger the better; None where there is none."""
    label: str | None = None
    """A word of a closed set; None where there is none."""
    why: str = ""
    """Why neither could be read, or the grader's comment."""
    error: str | None = None
    """Class and message of the error of the request; None if the grader responded."""


class Grader(Protocol):
    """The interface of graders."""

    name: str
    """Stable name, from which the file name of its grades is made; it identifies all that affects a grade."""
    batch: int
    """Number of answers to grade per call."""

    async def grade(self, exchanges: Sequence[Exchange]) -> list[Grade]:
        """Return a Grade for each answer, in order.

        A Grade that cannot be read has neither value nor label; if the request failed for this answer, it has
        an error, too.

        Raises:
            Exception: an error that would fail every further answer, such as a rejected key.
        """
        ...


class CriticGrader:
    """Grades answers by a critic's verdicts under the principles of one aim."""

    batch = 4

    def __init__(self, critic: str | Critic, constitution: Constitution, aim: str) -> None:
        """Create the grader, without a request to the critic.

        Raises:
            ConfigError: the constitution has no principle of that aim, or the spec does not name a model.
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
    """Grades answers by a reward; values are comparable only within the same reward."""

    def __init__(self, reward: Reward, *, name: str = "", batch: int = 8) -> None:
        """Create a grader; `name` replaces the reward's own name, and `batch` is the answers per call."""
        self._reward = reward
        self.batch = batch
        self.name = f"{name or reward.name} as reward"

    @classmethod
    def of(cls, spec: Spec, rules: Constitution | None = None) -> RewardGrader:
        """Return the grader of a reward's spec, which is read as by `trainers.rewards.parse`.

        The name contains a digest of the weights, of a judge's constitution, or of a function's module, so
        that rewards that differ in it share no grades. Reward models with the same weights but another config
        or tokenizer have the same name.
        """
        reward = parse(spec, rules=rules)
        return cls(reward, name=_name_of(spec, reward))

    async def grade(self, exchanges: Sequence[Exchange]) -> list[Grade]:
        """Return the reward of each answer; an error of the reward ends the grading, which can be resumed.

        If a judge could not be read, or its provider rejected the answer, a grade has no value, although the
        same reward returns a substitute number in training.
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
