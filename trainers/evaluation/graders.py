"""Who grades the answers to a suite."""

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
    """Return who grades the answers to a suite.

    Args:
        suite: over-refusal is graded by who classifies refusals, the others by the critic and the rewards.
        constitution: the critic judges by its principles of the suite's aim, and by all of them a reward that
            is a judge or a critic whose spec names no constitution.
        critic: None: no critic grades.
        reward: a grader each.
        refusals: `pattern`, `probe` or a model spec; None: refusals are not classified.

    Raises:
        ConfigError: the constitution has no principle of the aim, or a spec is none.
        MissingExtra: a grader needs a package that is not installed.
    """
    if suite not in AIMS:
        return [] if refusals is None else [refusals_for(refusals)]
    by_critic = [] if critic is None else [CriticGrader(critic, constitution, AIMS[suite])]
    return [*by_critic, *(RewardGrader.of(spec, constitution) for spec in reward)]
