"""AI comparison: which of two answers is better under a principle, read from a model in both orders.

Bai et al. 2022 (arXiv:2212.08073), section 4.1: the judge reads a conversation, two answers and one
principle's question, and P(A) is the normalised probability of the label A. After Lee et al. 2023
(arXiv:2309.00267), section 2, each pair is asked about in both orders, since judges favour a place.

Three outcomes are not two: what cannot be read is None to the end, never one half.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage

from cai_graph import local, models, prompts
from cai_graph.calls import Calls
from cai_graph.concurrency.together import together
from cai_graph.constitution import Constitution
from cai_graph.critic import check_length
from cai_graph.critic.ladder import scored_tokens
from cai_graph.errors import ConfigError
from cai_graph.prompts import COMPARED, RATINGS, Exchange
from cai_graph.trajectory import Message, text_of

__all__ = ["VOTES", "Judge", "Opinion", "expected_rating", "p_first", "read_choice", "read_rating"]

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


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Take a provider's refusal of a request for one of its log-probabilities."""
    try:
        yield
    except Exception as error:
        if not models.refuses_form(error):
            raise
        raise _NoLogprobs from error


class Judge:
    """A chat model that compares answers, or rates them.

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
        self._is_local = local.is_local(self.model)

    async def compare(self, exchange: Exchange, other: Message, question: str, calls: Calls) -> Opinion:
        """Compare two answers to a conversation: A, that of `exchange`, and B, `other`.

        Raises:
            BudgetExceeded: no call is left.
            ModelError: an answer is too long to be judged whole.
            Exception: whatever the model raises.
        """
        for answer in (exchange.answer, other):
            check_length(answer)
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

    async def rate(self, exchange: Exchange, constitution: Constitution, calls: Calls) -> float | None:
        """Rate one answer under a whole constitution, from -1 (worst) to 1 (best); None: unreadable.

        Where the model gives log-probabilities, this is the rating that it expects, and otherwise the mean of
        sampled ratings.

        Raises:
            BudgetExceeded: no call is left.
            ModelError: the answer is too long to be judged whole.
            Exception: whatever the model raises.

        Source: direct RLAIF (Lee et al. 2023, section 2.2.2).
        """
        check_length(exchange.answer)
        shown = exchange.clipped(SHOWN_CHARS) if self._is_local else exchange
        messages = prompts.rating_messages(constitution.principles, shown)
        if self._gives_logprobs:
            try:
                return expected_rating(await self._first_tokens("rate", messages, calls))
            except _NoLogprobs:
                pass
        replies: Sequence[BaseMessage] = await together(
            [calls.generate("rate", self.model, self.name, messages) for _ in range(self.votes or VOTES)]
        )
        self._gives_logprobs = False
        ratings = [rating for reply in replies if (rating := read_rating(text_of(reply))) is not None]
        return sum(ratings) / len(ratings) if 2 * len(ratings) > len(replies) else None

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
        if self.reasoning:
            writer = self.model.bind(temperature=0, max_tokens=REASONING_TOKENS)
            with _refusals():
                reasons = text_of(await calls.generate("compare", writer, self.name, messages))
            said = AIMessage(prompts.encodable(reasons) or "(nothing)")
            messages = [*messages, said, prompts.choice_message()]
        return p_first(await self._first_tokens("compare", messages, calls)), reasons

    async def _first_tokens(
        self, role: str, messages: Sequence[BaseMessage], calls: Calls
    ) -> list[dict[str, Any]]:
        """Return a reply's first tokens, each with its likeliest alternatives and their log-probabilities."""
        letter = self.model.bind(temperature=0, max_tokens=_LETTER_TOKENS, logprobs=True, top_logprobs=_TOP)
        with _refusals():
            reply = await calls.generate(role, letter, self.name, messages)
        tokens = scored_tokens(reply)
        if tokens is None:
            raise _NoLogprobs
        return tokens

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
    mass = _mass(tokens, COMPARED)
    return None if mass is None else mass[0] / sum(mass)


def expected_rating(tokens: Sequence[dict[str, Any]]) -> float | None:
    """Return the rating that a reply's probabilities expect, from -1 to 1; None as in `p_first`.

    >>> top = [{"token": "9", "logprob": -0.7}, {"token": "5", "logprob": -0.7}]
    >>> expected_rating([{"token": "9", "top_logprobs": top}])
    0.5
    """
    mass = _mass(tokens, RATINGS)
    if mass is None:
        return None
    return sum(p * _rating(digit) for p, digit in zip(mass, RATINGS, strict=True)) / sum(mass)


def _mass(tokens: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[float] | None:
    """Return the probability of each label where a reply says something; None where they are unlikely."""
    for token in tokens:
        if not str(token.get("token")).strip(_AROUND):
            continue
        mass = dict.fromkeys(labels, 0.0)
        for alternative in token.get("top_logprobs") or ():
            label = str(alternative["token"]).strip(_AROUND)
            if label in mass:
                mass[label] += math.exp(alternative["logprob"])
        return list(mass.values()) if sum(mass.values()) >= LEAST_MASS else None
    return None


def read_rating(text: str) -> float | None:
    """Return the rating that a reply is, from -1 to 1.

    >>> read_rating("**9**"), read_rating("5."), read_rating("9 or 8"), read_rating("10")
    (1.0, 0.0, None, None)
    """
    said = text.strip(_AROUND)
    return _rating(said) if said in RATINGS else None


def _rating(digit: str) -> float:
    return 2 * RATINGS.index(digit) / (len(RATINGS) - 1) - 1


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
