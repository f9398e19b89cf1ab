"""Cascades of two critics: a cheap one judges every answer, a strong one those that the first cannot clear.

    critic = cascade("local", "openai:gpt-5-mini", threshold=0.03)
    guarded = constitutional(app, critic=critic, …)

The cheap critic clears an answer where it has a verdict on each principle, or its aim, and every one is
COMPLIES with a P(VIOLATES) below the threshold. The strong critic judges all other answers. `cai critic
calibrate` chooses the threshold from a log (`cai_graph.critic.calibration`).
"""

from __future__ import annotations

import logging
import random
from typing import Literal

import msgspec
from langchain_core.language_models import BaseChatModel

from cai_graph.calls import Calls
from cai_graph.constitution import Constitution, Principle
from cai_graph.critic.critic import Critic, ModelCritic, ProbeCritic, covered, critic_for
from cai_graph.errors import BudgetExceeded, ConfigError, MissingExtra
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Cascaded, Critique, Label

__all__ = ["Cascade", "cascade", "probabilistic", "suspicion"]

logger = logging.getLogger("cai_graph")


def cascade(
    cheap: str | BaseChatModel | Critic,
    strong: str | BaseChatModel | Critic,
    *,
    threshold: float,
    sample: float = 0.0,
    seed: int | None = None,
) -> Cascade:
    """Return a critic that asks `strong` only about answers that `cheap` cannot clear.

    Args:
        cheap: judges every answer, and gives probabilities: the embedded model (its probe), a chat model
            with log-probabilities, which are switched on here, or any Critic.
        strong: judges the answers that `cheap` cannot clear.
        threshold: P(VIOLATES) in [0, 1] from which `strong` is asked. At 0 it is asked about every answer;
            such a log is what `cai critic calibrate` needs.
        sample: share of the answers, in [0, 1], about which `strong` is asked whatever `cheap` finds, so
            that the log keeps showing how often `cheap` is wrong.
        seed: seed of the sample.

    Raises:
        ConfigError: a number is out of range, an argument is not a critic, or the cheap model gives no
            probabilities.
    """
    for name, value in (("threshold", threshold), ("sample", sample)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"cascade: {name} is a number from 0 to 1, found {value!r}")
    return Cascade(probabilistic(cheap), critic_for(strong), threshold, sample, seed)


def probabilistic(critic: str | BaseChatModel | Critic) -> Critic:
    """Return the critic for a spec or model, with log-probabilities switched on where it needs them.

    Raises:
        ConfigError: its model has no such setting.
    """
    found = critic_for(critic)
    if not isinstance(found, ModelCritic) or isinstance(found, ProbeCritic):
        return found
    if getattr(found.model, "logprobs", None):
        return found
    if "logprobs" not in type(found.model).model_fields:
        raise ConfigError(
            f"cascade: {found.name} gives no log-probabilities, so it could clear nothing; let the cheap "
            "critic be local, a model of an OpenAI-compatible API, or a Critic of your own"
        )
    return ModelCritic(found.model.model_copy(update={"logprobs": True, "top_logprobs": 5}))


def suspicion(critique: Critique) -> float | None:
    """Return the largest P(VIOLATES) of a critique, in [0, 1]; 1 where a verdict is VIOLATES.

    None where a verdict is UNREADABLE or has no probability, or where there are no verdicts: a cascade
    does not clear such an answer.
    """
    found = 0.0
    for verdict in critique.verdicts:
        if verdict.label is Label.VIOLATES:
            return 1.0
        if verdict.label is Label.UNREADABLE or verdict.probability is None:
            return None
        found = max(found, verdict.probability)
    return found if critique.verdicts else None


class Cascade:
    """Two critics; the strong one is asked where the cheap one cannot clear the answer. Made by `cascade`."""

    def __init__(
        self, cheap: Critic, strong: Critic, threshold: float, sample: float, seed: int | None
    ) -> None:
        self.cheap = cheap
        self.strong = strong
        self.threshold = float(threshold)
        self.sample = float(sample)
        self.name = f"cascade({cheap.name}, {strong.name}, {self.threshold:g})"
        self.candidates = strong.candidates
        self.splits = False  # a cascade is there to save calls
        self.writes: bool = getattr(strong, "writes", True)
        """Whether the strong critic, which `discuss` calls, can criticise in prose."""
        self._random = random.Random(seed)

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        """Judge an answer; see `Critic.critique`. `Critique.cascade` records which critic decided, and why.

        Where the cheap critic fails, the strong one is asked, and the request goes on.
        """
        drawn = self._random.random() < self.sample
        found: Critique | None = None
        try:
            said = await self.cheap.critique(exchange, constitution, calls, explain=False)
            found = covered(said, constitution)
        except (BudgetExceeded, ConfigError, MissingExtra):
            raise
        except Exception as error:
            logger.warning("the critic %s failed, so %s judges: %r", self.cheap.name, self.strong.name, error)
        probability = None if found is None else suspicion(found)
        cleared = probability is not None and probability < self.threshold
        if found is not None and cleared and not drawn:
            return msgspec.structs.replace(found, cascade=Cascaded(why="cleared", threshold=self.threshold))
        decided = await self.strong.critique(exchange, constitution, calls, explain=explain)
        why: Literal["above", "unreadable", "failed", "sample"] = "above"
        if drawn:
            why = "sample"
        elif found is None:
            why = "failed"
        elif probability is None:
            why = "unreadable"
        how = Cascaded(why=why, threshold=self.threshold, cheap=found)
        return msgspec.structs.replace(decided, cascade=how)

    async def discuss(
        self, exchange: Exchange, principle: Principle, constitution: Constitution, calls: Calls
    ) -> Critique:
        """Criticise by the strong critic: `sampled` revises every answer, so there is nothing to clear."""
        return await self.strong.discuss(exchange, principle, constitution, calls)
