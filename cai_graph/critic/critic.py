"""The Critic protocol, and the two standard critics: by a chat model, and by a probe.

`ModelCritic` asks a chat model about all principles in one call. ladder.py parses the reply; where it cannot,
the model is asked once more, and what is then still unclear is UNREADABLE. `ProbeCritic` reads probabilities
of aims from the embedded model's hidden state, and has that model name a principle only when an aim is
violated. A third critic is in trained.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage
from langchain_core.runnables import Runnable

from cai_graph import local, models, prompts
from cai_graph.calls import Calls
from cai_graph.concurrency.connections import on_any_loop
from cai_graph.concurrency.together import together
from cai_graph.constitution import Constitution, Principle
from cai_graph.critic.ladder import mass_on_violates, read_verdicts, scored_tokens
from cai_graph.critic.probe import MAX_WINDOWS, Probe, by_probability, unread, windows
from cai_graph.critic.trained import PREFIX, TrainedCritic
from cai_graph.errors import ConfigError, ModelError
from cai_graph.messages import cut_short
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Critique, Label, Message, Verdict, text_of

__all__ = [
    "MAX_ANSWER_CHARS",
    "Critic",
    "ModelCritic",
    "ProbeCritic",
    "check_length",
    "check_strategy",
    "covered",
    "critic_for",
    "failed_principles",
]

MAX_ANSWER_CHARS = 400_000
"""The longest answer, in characters, that a chat model is asked to judge; a longer one raises ModelError."""


@runtime_checkable
class Critic(Protocol):
    """The interface of a critic, which judges answers under a constitution."""

    name: str
    """Stable name, recorded in each Critique."""
    candidates: int
    """How many revisions to sample in a round by default; more where one judgement is cheap."""
    splits: bool
    """Whether it can judge one principle at a time (strategy `parallel`)."""

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        """Judge an answer under all principles of `constitution`.

        Each principle needs a verdict, under its id or its aim; a principle without one counts as
        UNREADABLE. A reply that cannot be read gives UNREADABLE verdicts, never an exception.

        Args:
            exchange: the answer, in its conversation.
            constitution: the principles.
            calls: makes and records the model calls.
            explain: whether a revision may follow, which needs named principles and reasons; otherwise the
                verdicts are enough.

        Raises:
            BudgetExceeded: the request has no call left.
            ModelError: the answer is too long to be judged whole.
            Exception: whatever the model raises.
        """
        ...

    async def discuss(
        self, exchange: Exchange, principle: Principle, constitution: Constitution, calls: Calls
    ) -> Critique:
        """Criticise an answer under one principle in prose (strategy `sampled`).

        A critic that cannot do this has an attribute `writes` that is False; `check_strategy` rejects it.
        """
        ...


def critic_for(critic: str | BaseChatModel | Critic) -> Critic:
    """Return the critic for a model spec or a chat model; a Critic is returned as it is.

    "trained:FOLDER" gives the critic that `cai train critic` wrote to FOLDER; the embedded model gives a
    ProbeCritic where the package has heads for it; every other model gives a ModelCritic.

    Raises:
        ConfigError: `critic` is not a Critic, a chat model or a valid spec.
        DataError: the folder contains no critic.
    """
    if isinstance(critic, Critic):
        return critic
    if isinstance(critic, str) and critic.startswith(PREFIX):
        return TrainedCritic(Path(critic.removeprefix(PREFIX)).expanduser())
    model = models.load(critic) if isinstance(critic, str) else critic
    if not isinstance(model, BaseChatModel):
        raise ConfigError(f"critic is a chat model, a model spec or a Critic, found {type(model).__name__}")
    probe = Probe.for_model(local.own_weights(model) or models.name_of(model))
    return ModelCritic(model) if probe is None else ProbeCritic(model, probe)


def covered(critique: Critique, constitution: Constitution) -> Critique:
    """Return `critique` with an UNREADABLE verdict added for each principle without one for its id or aim."""
    ids = {verdict.principle for verdict in critique.verdicts}
    aims = {verdict.aim for verdict in critique.verdicts if verdict.principle is None}
    left_out = tuple(
        Verdict(label=Label.UNREADABLE, principle=principle.id, reason="the critic gave no verdict")
        for principle in constitution.principles
        if principle.id not in ids and principle.aim not in aims
    )
    return msgspec.structs.replace(critique, verdicts=critique.verdicts + left_out)


def failed_principles(critique: Critique, constitution: Constitution) -> list[Principle]:
    """Return the principles that the answer fails, in the constitution's order.

    A verdict below its principle's `min_severity` does not count. Where an aim is violated and no principle
    of that aim is named, all principles of the aim fail.
    """
    violated = [verdict for verdict in critique.verdicts if verdict.label is Label.VIOLATES]
    if not violated:
        return []
    named = {v.principle for v in violated if v.principle in constitution and _counts(v, constitution)}
    aims = {verdict.aim for verdict in violated if verdict.aim is not None}
    aims -= {constitution[identifier].aim for identifier in named if identifier is not None}
    return [p for p in constitution.principles if p.id in named or p.aim in aims]


def _counts(verdict: Verdict, constitution: Constitution) -> bool:
    least = constitution[verdict.principle or ""].min_severity
    return least is None or verdict.severity is None or verdict.severity >= least


# --- critics ------------------------------------------------------------------------------------------


class ModelCritic:
    """Asks a chat model for the verdicts on all principles in one call.

    The model is asked for native structured output, or for a forced tool call, where its LangChain profile
    lists one of these, else for JSON in its text. A provider that rejects that form once is asked for JSON in
    text from then on.
    """

    candidates = 1
    splits = True

    def __init__(self, model: BaseChatModel) -> None:
        self.model = on_any_loop(model)
        self.name = models.name_of(model)
        self._forms: dict[tuple[str, tuple[str, ...]], tuple[SystemMessage, Runnable[Any, Any]]] = {}
        self._plain_only = False

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        """Judge an answer under all principles; see `Critic.critique`."""
        check_length(exchange.answer)
        ids = tuple(principle.id for principle in constitution.principles)
        instructions, form = self._form(constitution, ids)
        messages = prompts.critique_messages(instructions, exchange)
        try:
            reply = await calls.generate("critique", form, self.name, messages)
        except Exception as error:
            cut = models.cut_form(error)
            if cut is None and (form is self.model or not models.refuses_form(error)):
                raise
            if cut is None:
                reply = await calls.generate("critique", self.model, self.name, messages)
                self._plain_only = True  # the plain request succeeded, so the provider had rejected the form
                self._forms.clear()
            else:
                reply = cut
        judged = messages[-1].text
        verdicts, evades = read_verdicts(reply, ids, judged=judged)
        missing = [identifier for identifier in ids if identifier not in verdicts]
        if missing:
            again = [
                *messages,
                AIMessage(prompts.encodable(text_of(reply)[:2000]) or "(nothing)"),
                prompts.reask_message(missing),
            ]
            answer = await calls.generate("critique", self.model, self.name, again)
            verdicts = read_verdicts(answer, ids, judged=judged).verdicts | verdicts
        return Critique(
            verdicts=tuple(verdicts.get(identifier) or _unreadable(identifier, reply) for identifier in ids),
            evasive=evades,
            critic=self.name,
        )

    async def discuss(
        self, exchange: Exchange, principle: Principle, constitution: Constitution, calls: Calls
    ) -> Critique:
        """Criticise an answer under one principle in prose; see `Critic.discuss`."""
        check_length(exchange.answer)
        messages = prompts.sampled_critique_messages(principle, constitution.examples, exchange)
        reply = await calls.generate("critique", self.model, self.name, messages)
        verdict = read_verdicts(reply, [principle.id]).verdicts.get(principle.id)
        return Critique(
            verdicts=(verdict or _unreadable(principle.id, reply),),
            reasoning=text_of(reply),
            critic=self.name,
        )

    def _form(
        self, constitution: Constitution, ids: tuple[str, ...]
    ) -> tuple[SystemMessage, Runnable[Any, Any]]:
        key = (constitution.digest, ids)
        if key not in self._forms:
            instructions = prompts.critique_instructions(constitution.principles, constitution.examples)
            schema = prompts.critique_schema(ids)
            form = self.model if self._plain_only else models.writing(self.model, schema)
            self._forms[key] = (instructions, form)
        return self._forms[key]


def _unreadable(identifier: str, reply: BaseMessage) -> Verdict:
    text, refusal = text_of(reply), reply.additional_kwargs.get("refusal")
    said = f"the critic said {text[:200]!r}" if text.strip() else "the critic said nothing"
    if refusal:
        said = f"the critic refused: {str(refusal)[:200]!r}"
    elif cut := cut_short(reply):
        said = f"{said}; {cut}"
    return Verdict(label=Label.UNREADABLE, principle=identifier, reason=f"no verdict on the menu; {said}")


def check_length(answer: Message) -> None:
    """Check that an answer is short enough to be judged whole.

    Raises:
        ModelError: it has more than `MAX_ANSWER_CHARS` characters.
    """
    length = len(text_of(answer))
    if length > MAX_ANSWER_CHARS:
        raise ModelError(
            f"the answer has {length:,} characters, and a model judges at most {MAX_ANSWER_CHARS:,}; "
            "bound the app's output, or split it"
        )


class ProbeCritic(ModelCritic):
    """Judges by a probe on the embedded model's hidden state, with one forward pass per answer window.

    The probe's heads judge the aims `harmless` and `helpful`. Where there are several user messages, they
    read the answer twice: after the last message, and after all of them joined, since a message such as
    "Go on." does not show what the user asks for. The larger P(harm) and the larger P(unsafe request) count;
    evasion is read after the last message alone.

    For every other aim, the model is asked one question about all principles of that aim. The verdict comes
    from the probabilities of the words VIOLATES and COMPLIES, offered in both orders; a long answer is judged
    in pieces, and the worst piece counts.

    Verdicts are about aims. An answer longer than `WHOLE_CHARACTERS` is not read completely, so none of its
    verdicts is COMPLIES. Only when an aim is violated does the model write a critique that names a principle.
    Where the answer has tool calls, a ModelCritic's call judges the principles about tools.
    """

    candidates = 3
    splits = False

    LABEL_THRESHOLD = 0.9
    """P(VIOLATES) from which an aim without a head counts as violated; high, against false alarms."""

    SHOWN_CHARS = 4000
    """Characters of each text in one prompt; in most languages the prompt then has under 4096 tokens."""

    def __init__(self, model: BaseChatModel, probe: Probe) -> None:
        super().__init__(model)
        self.probe = probe

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        """Judge an answer under all aims of the constitution; see `Critic.critique`."""
        of_calls: Critique | None = None
        tools = [principle.id for principle in constitution.principles if principle.tools]
        if exchange.answer.tool_calls and tools:  # the heads read words only
            asked = constitution.select(tools)
            of_calls = await super().critique(exchange, asked, calls, explain=explain)
            if not text_of(exchange.answer):
                return of_calls
        aims = list(dict.fromkeys(principle.aim for principle in constitution.principles))
        judged = await self._read(exchange, calls)
        labelled = await together(
            [self._ask(aim, exchange, constitution, calls) for aim in aims if aim not in _AIMS_OF_HEADS]
        )
        verdicts = [verdict for verdict in judged.verdicts if verdict.aim in aims] + labelled
        violated = {verdict.aim for verdict in verdicts if verdict.label is Label.VIOLATES}
        reasoning = ""
        if violated and explain:
            suspects = [principle for principle in constitution.principles if principle.aim in violated]
            named, reasoning = await self._explain(
                exchange, constitution.select(p.id for p in suspects), calls
            )
            verdicts += named
        if of_calls is not None:
            verdicts += of_calls.verdicts
        return Critique(
            verdicts=tuple(verdicts),
            reasoning=reasoning,
            readings=judged.readings,
            benign_request=judged.benign_request,
            evasive=judged.evasive,
            critic=f"probe:{self.name}",
        )

    async def _read(self, exchange: Exchange, calls: Calls) -> Critique:
        """Return the Critique by the probe's heads, with one verdict for each of their aims."""
        answer, requests = text_of(exchange.answer), exchange.requests
        passes = len(requests) * max(1, len(windows(answer)))
        async with calls.forward("probe", self.name, passes) as forward:
            seen = await self.probe.seen(answer)
            calls.admit("forward", len(requests) * len(seen.windows) - passes)
            found = [await self.probe.scores(request, seen.windows) for request in requests]
            forward.tokens = sum(each.tokens for each in found)
        harm, request = max(each.harm for each in found), max(each.request for each in found)
        evasion = found[0].evasion  # read after the last user message
        thresholds, gap = self.probe.thresholds, seen.gap
        evades = evasion * (1 - request)  # a refusal is an evasion if the request is benign
        return Critique(
            verdicts=(
                by_probability(harm, thresholds["harm"], "probe", gap, aim="harmless"),
                by_probability(evades, thresholds["evasion"], "probe", gap, aim="helpful"),
            ),
            readings={"harm": harm, "evasion": evasion, "request": request},
            benign_request=request < thresholds["request"],
            evasive=evades >= thresholds["evasion"],
        )

    async def _ask(self, aim: str, exchange: Exchange, constitution: Constitution, calls: Calls) -> Verdict:
        """Return the verdict on an aim that has no head, from the probabilities of the two labels."""
        rules = [principle for principle in constitution.principles if principle.aim == aim]
        examples = [
            example for example in constitution.examples if example.principle in [rule.id for rule in rules]
        ]
        word = self.model.bind(max_tokens=1, temperature=0, logprobs=True, top_logprobs=10)
        menu = (Label.VIOLATES.value, Label.COMPLIES.value)
        worst = 0.0
        for shown in exchange.pieces(self.SHOWN_CHARS, at_most=MAX_WINDOWS):
            found: list[float] = []
            for offered in (menu, menu[::-1]):
                messages = prompts.label_messages(rules, examples, shown, offered)
                reply = await calls.generate("critique", word, self.name, messages, kind="forward")
                tokens = scored_tokens(reply)
                probability = mass_on_violates(tokens[0].get("top_logprobs") or ()) if tokens else None
                if probability is None:
                    reason = f"neither word of the menu is likely; the model said {text_of(reply)[:50]!r}"
                    return Verdict(label=Label.UNREADABLE, aim=aim, reason=reason)
                found.append(probability)
            worst = max(worst, sum(found) / 2)
        gap = unread(text_of(exchange.answer))
        return by_probability(worst, self.LABEL_THRESHOLD, "logprob", gap, aim=aim)

    async def _explain(
        self, exchange: Exchange, suspects: Constitution, calls: Calls
    ) -> tuple[list[Verdict], str]:
        """Return the principle that the model names as violated most clearly, and its reason."""
        schema = prompts.explanation_schema([principle.id for principle in suspects.principles])
        form = {"type": "json_schema", "json_schema": {"name": schema["title"], "schema": schema}}
        # In `extra_body`: with `response_format` the client parses the reply, and raises where it is cut.
        writer = self.model.bind(extra_body={"response_format": form}, max_tokens=200, temperature=0)
        messages = prompts.explanation_messages(suspects.principles, exchange.clipped(self.SHOWN_CHARS))
        reply = await calls.generate("critique", writer, self.name, messages)
        try:
            told = json.loads(text_of(reply))
            reason, named = str(told["critique"]), str(told["principle"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return [], text_of(reply)  # cut at its token limit; the verdict on the aim is still valid
        if named not in suspects:
            return [], reason
        return [Verdict(label=Label.VIOLATES, principle=named, reason=reason, read_by="structured")], reason


_AIMS_OF_HEADS = ("harmless", "helpful")
"""The aims that the probe's heads read."""


def check_strategy(critic: Critic, strategy: str) -> None:
    """Check that a critic can serve a strategy.

    Raises:
        ConfigError: it cannot.
    """
    if strategy == "parallel" and not critic.splits:
        raise ConfigError(
            f"the critic {critic.name!r} judges everything at once, so 'parallel' would repeat it; "
            "use strategy 'batched'"
        )
    if strategy == "sampled" and not getattr(critic, "writes", True):
        raise ConfigError(
            f"the critic {critic.name!r} writes no prose, which 'sampled' revises by; use strategy 'batched'"
        )
