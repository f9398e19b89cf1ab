"""Critics: from an answer to a Critique.

A reply is read down the ladder of ladder.py, at whose end stand a further question and UNREADABLE.

Two critics stand here; a third is in trained.py. `ModelCritic` asks a chat model, for all principles
in one call. `ProbeCritic` reads probabilities of aims from the embedded model's hidden state, and has the
model name principles only when an aim is violated.
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
"""The longest answer that a chat model is asked to judge. A longer one could not be judged whole."""


@runtime_checkable
class Critic(Protocol):
    """What judges answers."""

    name: str
    """Stable name, recorded in each Critique."""
    candidates: int
    """How many revisions are worth sampling, given what one judgement costs."""
    splits: bool
    """Whether it may be asked principle by principle (strategy `parallel`)."""

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        """Judge an answer under all principles of `constitution`.

        Each principle needs a verdict, under its id or its aim; one without counts as UNREADABLE.
        `explain` asks for what a revision needs (named principles, reasons); without it the verdicts
        are enough. A reply that cannot be read gives UNREADABLE verdicts, never an exception.

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

        A critic that cannot has an attribute `writes` that is False, and is refused for that strategy.
        """
        ...


def critic_for(critic: str | BaseChatModel | Critic) -> Critic:
    """Return the critic behind a model spec or chat model; a Critic stays what it is.

    The embedded model for which the package carries heads becomes a ProbeCritic, "trained:FOLDER" what
    `cai train critic` wrote there.

    Raises:
        ConfigError: it is none of these.
        DataError: the folder holds no critic.
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
    """Return a critique with UNREADABLE for each principle that has no verdict under its id or its aim."""
    ids = {verdict.principle for verdict in critique.verdicts}
    aims = {verdict.aim for verdict in critique.verdicts if verdict.principle is None}
    left_out = tuple(
        Verdict(label=Label.UNREADABLE, principle=principle.id, reason="the critic gave no verdict")
        for principle in constitution.principles
        if principle.id not in ids and principle.aim not in aims
    )
    return msgspec.structs.replace(critique, verdicts=critique.verdicts + left_out)


def failed_principles(critique: Critique, constitution: Constitution) -> list[Principle]:
    """Return the principles that a revision must mend, in the constitution's order.

    A verdict below its principle's `min_severity` does not count. An aim that is violated without a
    named principle stands for all principles of that aim.
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

    Where the model's LangChain profile says that it has native structured output, or tool calls with a
    forced choice, the reply is asked for in that form; else as JSON in the text. A provider that rejects
    the form is asked in plain text from then on.
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
                self._plain_only = True  # the words were fine, so it was the form that the provider refused
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
    """Refuse an answer that is too long to be judged whole.

    Raises:
        ModelError: it has more than `MAX_ANSWER_CHARS`.
    """
    length = len(text_of(answer))
    if length > MAX_ANSWER_CHARS:
        raise ModelError(
            f"the answer has {length:,} characters, and a model judges at most {MAX_ANSWER_CHARS:,}; "
            "bound the app's output, or split it"
        )


class ProbeCritic(ModelCritic):
    """Judges by a probe on the embedded model's hidden state: one forward pass a window of the answer.

    The aims `harmless` and `helpful` are read by the probe's heads. Where the user spoke more than once, the
    answer is read twice: under the last message and under all of them, since "Go on." says nothing of what it
    asks for. The larger P(harm) and the larger P(unsafe request) count; whether it evades is read under the
    last message.

    Principles of any other aim are asked about with one question an aim, read from the probabilities of the
    menu's two words in both orders, piece by piece where the answer is long. Verdicts stand under the aim. Of
    an answer beyond `WHOLE_CHARACTERS` parts go unread, so nothing is said to comply. Only a violated aim has
    the model write a critique that names a principle.
    """

    candidates = 3
    splits = False

    LABEL_THRESHOLD = 0.9
    """P(VIOLATES) from which an aim without a head counts as violated. Small models cry wolf."""

    SHOWN_CHARS = 4000
    """How much of each text the model is shown at once: in most languages a prompt of under 4096 tokens."""

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
        """Return what the probe's heads say, as a Critique of aims."""
        answer, requests = text_of(exchange.answer), exchange.requests
        passes = len(requests) * max(1, len(windows(answer)))
        async with calls.forward("probe", self.name, passes) as forward:
            seen = await self.probe.seen(answer)
            calls.admit("forward", len(requests) * len(seen.windows) - passes)
            found = [await self.probe.scores(request, seen.windows) for request in requests]
            forward.tokens = sum(each.tokens for each in found)
        harm, request = max(each.harm for each in found), max(each.request for each in found)
        evasion = found[0].evasion  # of what was asked last
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
        """Return the verdict on an aim that has no head, from the menu's probabilities in both orders."""
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
        # As `response_format` the client would parse the reply itself, and raise where it is cut.
        writer = self.model.bind(extra_body={"response_format": form}, max_tokens=200, temperature=0)
        messages = prompts.explanation_messages(suspects.principles, exchange.clipped(self.SHOWN_CHARS))
        reply = await calls.generate("critique", writer, self.name, messages)
        try:
            told = json.loads(text_of(reply))
            reason, named = str(told["critique"]), str(told["principle"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return [], text_of(reply)  # cut at its limit: the aim's verdict stands all the same
        if named not in suspects:
            return [], reason
        return [Verdict(label=Label.VIOLATES, principle=named, reason=reason, read_by="structured")], reason


_AIMS_OF_HEADS = ("harmless", "helpful")
"""The aims that the probe's heads read."""


def check_strategy(critic: Critic, strategy: str) -> None:
    """Raise ConfigError where a critic cannot serve a strategy."""
    if strategy == "parallel" and not critic.splits:
        raise ConfigError(
            f"the critic {critic.name!r} judges everything at once, so 'parallel' would repeat it; "
            "use strategy 'batched'"
        )
    if strategy == "sampled" and not getattr(critic, "writes", True):
        raise ConfigError(
            f"the critic {critic.name!r} writes no prose, which 'sampled' revises by; use strategy 'batched'"
        )
