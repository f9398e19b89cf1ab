"""Builds the graders of a suite's answers."""

from __future__ import annotations

from collections.abc import Iterable

from cai_graph.constitution import Constitution
from cai_graph.critic import Critic
from trainers.evaluation.folder import AIMS
from trainers.evaluation.grades import CriticGrader, Grader, RewardGrader
from trainers.evaluation.refusals import refusals_for
from trainers.evaluation.suites import Suite
from trainers.rewards import Spec

__all__ = ["graders_for"]


def graders_for(
    suite: Suite,
    constitution: Constitution,
    *,
    critic: Critic | None = None,
    reward: Iterable[Spec] = (),
    refusals: str | None = None,
) -> list[Grader]:
    """Return the graders of the answers to a suite.

    Args:
        suite: over-refusal is graded by a refusal classifier, the other suites by the critic and the rewards.
        constitution: the critic judges by its principles of the suite's aim; a reward that is a judge or a
            critic, and whose spec names no constitution, by all of its principles.
        critic: None: no critic grades.
        reward: specs of rewards, each of which becomes a grader.
        refusals: `pattern`, `probe` or a model spec; None: refusals are not classified.

    Raises:
        ConfigError: the constitution has no principle of the aim, or a spec is invalid.
        MissingExtra: a grader needs a package that is not installed.
    """
    if suite not in AIMS:
        return [] if refusals is None else [refusals_for(refusals)]
    by_critic = [] if critic is None else [CriticGrader(critic, constitution, AIMS[suite])]
    return [*by_critic, *(RewardGrader.of(spec, constitution) for spec in reward)]
