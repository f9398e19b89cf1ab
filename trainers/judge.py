"""AI comparison: which of two answers is better under a principle, read from a model in both orders.

Bai et al. 2022 (arXiv:2212.08073), section 4.1: the judge reads a conversation, two answers and one
principle's question, and P(A) is the normalised probability of the label A. After Lee et al. 2023
(arXiv:2309.00267), section 2, each pair is asked about in both orders, since judges favour a place.

Three outcomes are not two: what cannot be read is None to the end, never one half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage

from cai_graph import local, models, prompts
from cai_graph.calls import Calls, together
from cai_graph.critic import MAX_ANSWER_CHARS
from cai_graph.errors import ConfigError, ModelError
from cai_graph.prompts import COMPARED, Exchange
from cai_graph.trajectory import Message, text_of

__all__ = ["VOTES", "Judge", "Opinion", "p_first", "read_choice"]

VOTES = 3
"""Replies sampled in each order where a model gives no log-probabilities. Odd, so that they do not tie."""

REASONING_TOKENS = 300
"""Longest reasoning before a choice that is read from log-probabilities."""

SHOWN_CHARS = 2400
"""How much of each text a local model is shown, so that a prompt fits its context of 4096 tokens."""

LEAST_MASS = 0.1
"""Probability that the two labels must have together; below it the model was about to say something else."""

_TOP = 8
"""Alternatives asked for at each token; some providers give no more."""
_LETTER_TOKENS = 4
"""A reply of one letter, and what some models put before it."""
_AROUND = " \t\r\n*_`\"'()[].:>#-"
"""What may stand around a label."""


class Opinion(NamedTuple):
    """What a judge says of a pair."""

    p_a: tuple[float | None, float | None]
    """P(A is better) with A shown first and with B shown first; None where unreadable."""
    method: Literal["logprob", "votes"]
    """How it was read."""
    votes: int | None
    """Replies sampled in each order, where the method is `votes`."""
    reasoning: tuple[str, str] | None
    """What the judge wrote before it chose, in each order."""
    clipped: bool
    """Whether the judge saw only beginning and end of a text."""


class _NoLogprobs(Exception):  # noqa: N818 - not an error: the other way is taken
    """The model gives no log-probabilities."""


class Judge:
    """A chat model that compares answers.

    Where it gives log-probabilities they are read; a model that gives none, or refuses to, is sampled.
    """

    def __init__(
        self, model: str | BaseChatModel, *, reasoning: bool = False, votes: int | None = None
    ) -> None:
        """Set up a judge; nothing is fetched or asked.

        Args:
            model: a chat model, or its spec.
            reasoning: whether it reasons before it chooses (chain of thought).
            votes: sample so many replies in each order and never read log-probabilities; None: read
                them where the model gives them, and otherwise sample `VOTES`.

        Raises:
            ConfigError: the spec names no model, or `votes` is below 1.
        """
        if votes is not None and votes < 1:
            raise ConfigError(f"votes is a number of replies from 1, found {votes!r}")
        self.model = models.load(model) if isinstance(model, str) else model
        self.name = models.name_of(self.model)
        """Stable name, recorded in each Comparison."""
        self.reasoning = reasoning
        self.votes = votes
        self._gives_logprobs = votes is None and hasattr(self.model, "top_logprobs")
        self._is_local = local.is_local(getattr(self.model, "openai_api_base", None))

    async def compare(self, exchange: Exchange, other: Message, question: str, calls: Calls) -> Opinion:
        """Compare two answers to a conversation: A, that of `exchange`, and B, `other`.

        Raises:
            BudgetExceeded: no call is left.
            ModelError: an answer is too long to be judged whole.
            Exception: whatever the model raises.
        """
        for answer in (exchange.answer, other):
            if (length := len(text_of(answer))) > MAX_ANSWER_CHARS:
                raise ModelError(
                    f"an answer has {length:,} characters, and a judge reads at most {MAX_ANSWER_CHARS:,}"
                )
        a, b = (msgspec.structs.replace(exchange, answer=answer) for answer in (exchange.answer, other))
        clipped = False
        if self._is_local:
            whole, (a, b) = (a, b), (a.clipped(SHOWN_CHARS), b.clipped(SHOWN_CHARS))
            clipped = whole != (a, b)
        if self._gives_logprobs:
            try:
                return await self._both_orders(a, b, question, calls, scored=True, clipped=clipped)
            except _NoLogprobs:
                pass
        opinion = await self._both_orders(a, b, question, calls, scored=False, clipped=clipped)
        self._gives_logprobs = False  # the words were fine, so it was the log-probabilities
        return opinion

    async def _both_orders(
        self, a: Exchange, b: Exchange, question: str, calls: Calls, *, scored: bool, clipped: bool
    ) -> Opinion:
        ask = self._scored if scored else self._voted
        # One after the other: on a local model the second reads the conversation from the prefix cache.
        first, why_first = await ask(a, b.answer, question, calls)
        second, why_second = await ask(b, a.answer, question, calls)
        return Opinion(
            p_a=(first, None if second is None else 1 - second),
            method="logprob" if scored else "votes",
            votes=None if scored else self.votes or VOTES,
            reasoning=(why_first, why_second) if self.reasoning else None,
            clipped=clipped,
        )

    async def _scored(
        self, exchange: Exchange, other: Message, question: str, calls: Calls
    ) -> tuple[float | None, str]:
        """Return P(the answer shown first is better), from the log-probabilities of the labels."""
        messages = prompts.comparison_messages(
            question, exchange, other, reply="reasons" if self.reasoning else "letter"
        )
        reasons = ""
        try:
            if self.reasoning:
                writer = self.model.bind(temperature=0, max_tokens=REASONING_TOKENS)
                reasons = text_of(await calls.generate("compare", writer, self.name, messages))
                messages = [*messages, AIMessage(reasons or "(nothing)"), prompts.choice_message()]
            letter = self.model.bind(
                temperature=0, max_tokens=_LETTER_TOKENS, logprobs=True, top_logprobs=_TOP
            )
            reply = await calls.generate("compare", letter, self.name, messages)
        except Exception as error:
            if getattr(error, "status_code", None) not in (400, 404, 415, 422):
                raise
            raise _NoLogprobs from error
        logprobs = reply.response_metadata.get("logprobs")
        if not isinstance(logprobs, dict) or not isinstance(logprobs.get("content"), list):
            raise _NoLogprobs
        return p_first(logprobs["content"]), reasons

    async def _voted(
        self, exchange: Exchange, other: Message, question: str, calls: Calls
    ) -> tuple[float | None, str]:
        """Return the share of sampled replies that choose the answer shown first, and one of them."""
        form: Literal["letter", "reasons and letter"] = "reasons and letter" if self.reasoning else "letter"
        messages = prompts.comparison_messages(question, exchange, other, reply=form)
        replies: Sequence[BaseMessage] = await together(
            [calls.generate("compare", self.model, self.name, messages) for _ in range(self.votes or VOTES)]
        )
        texts = [text_of(reply) for reply in replies]
        choices = [choice for text in texts if (choice := read_choice(text)) is not None]
        if 2 * len(choices) <= len(texts):
            return None, texts[0]
        return choices.count(COMPARED[0]) / len(choices), texts[0]


def p_first(tokens: Sequence[dict[str, Any]]) -> float | None:
    """Return P(A) / (P(A) + P(B)) at the first token that is more than space or emphasis.

    None where the labels are unlikely there (`LEAST_MASS`): the model was about to say something else.

    >>> top = [{"token": "A", "logprob": -0.1}, {"token": " B", "logprob": -2.3}]
    >>> round(p_first([{"token": "A", "top_logprobs": top}]), 2)
    0.9
    """
    for token in tokens:
        if not str(token.get("token")).strip(_AROUND):
            continue
        mass = dict.fromkeys(COMPARED, 0.0)
        for alternative in token.get("top_logprobs") or ():
            label = str(alternative["token"]).strip(_AROUND)
            if label in mass:
                mass[label] += math.exp(alternative["logprob"])
        total = sum(mass.values())
        return mass[COMPARED[0]] / total if total >= LEAST_MASS else None
    return None


def read_choice(text: str) -> str | None:
    """Return the label that a reply chooses: the last line `Better: A`, or a reply that is only the label.

    >>> read_choice("A is longer, yet B is kinder.\\n**Better: B**"), read_choice("(A)")
    ('B', 'A')
    >>> read_choice("Better: B, or perhaps A"), read_choice("A tie.")
    (None, None)
    """
    said = text
    for line in text.splitlines():
        name, separator, rest = line.partition(":")
        if separator and name.strip(_AROUND).casefold() == "better":
            said = rest
    label = said.strip(_AROUND)
    return label if label in COMPARED else None
