"""The Plan of a wrapped app: the constitution, critic, reviser, settings and log that its requests share."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from langchain_core.language_models import BaseChatModel

from cai_graph import models
from cai_graph.concurrency.connections import on_any_loop
from cai_graph.constitution import Constitution, load
from cai_graph.critic import Critic, check_strategy, critic_for
from cai_graph.errors import ConfigError
from cai_graph.log import Log, open_log
from cai_graph.request.policy import Settings
from cai_graph.trajectory import ConstitutionRef, Message, text_of

__all__ = ["Plan", "planning"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The parts that all requests of a wrapped app share."""

    constitution: Constitution
    """The principles, in all their languages."""
    critic: Critic
    """Judges answers."""
    reviser: BaseChatModel
    """Writes revisions."""
    reviser_name: str
    """The reviser's name in the records."""
    settings: Settings
    """The settings of the requests."""
    log: Log | None
    """The log of the Trajectories; None: nothing is logged."""

    @property
    def candidates(self) -> int:
        """How many revisions are written in a round."""
        if self.settings.strategy == "sampled":
            return 1
        return self.settings.candidates or self.critic.candidates

    @cached_property
    def recorded_settings(self) -> dict[str, Any]:
        """The settings as a Trajectory records them: defaults resolved, critic and reviser named."""
        return dataclasses.asdict(self.settings) | {
            "max_rounds": self.settings.rounds,
            "candidates": self.candidates,
            "critic": self.critic.name,
            "reviser": self.reviser_name,
        }

    @cached_property
    def spoken(self) -> Constitution:
        """The constitution with the principles' texts in the settings' language, as models are sent it."""
        language, own = self.settings.language, self.constitution
        if language is None:
            return own
        principles = [rule.model_copy(update=dict(rule.texts(language))) for rule in own.principles]
        return Constitution(
            name=own.name, version=own.version, principles=tuple(principles), examples=own.examples
        )

    @cached_property
    def of_tools(self) -> Constitution | None:
        """The principles about tools, as models are sent them; None where there is none."""
        rules = [rule.id for rule in self.constitution if rule.tools]
        return self.spoken.select(rules) if rules else None

    def rules(self, answer: Message) -> Constitution:
        """Return the principles to judge an answer by: where it only calls tools, those about tools."""
        calls_only = answer.tool_calls and not text_of(answer)
        return (self.of_tools or self.spoken) if calls_only else self.spoken

    @cached_property
    def constitution_ref(self) -> ConstitutionRef:
        """The constitution as a Trajectory records it."""
        constitution = self.constitution
        return ConstitutionRef(
            name=constitution.name, version=constitution.version, digest=constitution.digest
        )


def planning(
    face: str,
    *,
    constitution: str | Constitution,
    critic: str | BaseChatModel | Critic | None,
    reviser: str | BaseChatModel | None,
    log: str | Log | None,
    settings: Mapping[str, Any],
) -> Callable[[BaseChatModel | None], Plan]:
    """Check a face's arguments, and return a function from the drafting model to the Plan.

    That model is also the critic and the reviser where none is given. `face` is the caller's name in error
    messages.

    Raises:
        ConfigError: an argument cannot work; the message names it and says what to do.
        ConstitutionError: the constitution cannot be read.
        LogError: the log cannot be opened.
    """
    known = [item.name for item in fields(Settings)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; the settings are {', '.join(known)}"
            raise ConfigError(f"{face} has no setting {name!r}{meant}")
    chosen = Settings(**settings)
    judge = None if critic is None else critic_for(critic)
    if judge is not None:
        check_strategy(judge, chosen.strategy)
    writer = models.load(reviser) if isinstance(reviser, str) else reviser
    if not (writer is None or isinstance(writer, BaseChatModel)):
        raise ConfigError(f"reviser is a chat model or a model spec, found {type(writer).__name__}")
    if not (log is None or isinstance(log, str) or hasattr(log, "append")):
        raise ConfigError(f"log is a URL, a Log or None, found {type(log).__name__}")
    rules = load(constitution)
    opened = open_log(log) if isinstance(log, str) else log

    def plan(model: BaseChatModel | None) -> Plan:
        assert model is not None or (judge is not None and writer is not None)  # the face checks this
        own = judge if judge is not None else critic_for(model)  # type: ignore[arg-type]
        check_strategy(own, chosen.strategy)
        reviser = writer or model
        assert reviser is not None
        return Plan(
            constitution=rules,
            critic=own,
            reviser=on_any_loop(reviser),
            reviser_name=models.name_of(reviser),
            settings=chosen,
            log=opened,
        )

    return plan
