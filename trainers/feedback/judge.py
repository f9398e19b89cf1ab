"""Asks a model which of two answers is better under a principle, in both orders; also rates single answers.

Bai et al. 2022 (arXiv:2212.08073), section 4.1: the judge reads a conversation, two answers and one
principle's question, and P(A) is the normalised probability of the label A. After Lee et al. 2023
(arXiv:2309.00267), section 2, each pair is asked about in both orders, since judges have a position bias.

There are three outcomes, not two: an unreadable one stays None throughout, and never becomes one half.
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
"""Replies sampled in each order if a model gives no log-probabilities. Odd, so that they cannot tie."""

REASONING_TOKENS = 300
"""Maximum tokens of reasoning before a choice that is read from log-probabilities."""

SHOWN_CHARS = 2400
"""Characters of each text shown to a local model, so that a prompt fits its context of 4096 tokens."""

LEAST_MASS = 0.1
"""Minimum total probability of the two labels; below it the model was about to write something else."""

_TOP = 8
"""Number of alternatives requested for each token; some providers give no more."""
_LETTER_TOKENS = 4
"""Enough for one letter, and what some models put before it."""
_AROUND = " \t\r\n*_`\"'()[].:>#-"
"""Characters that may surround a label."""


class Opinion(NamedTuple):
    """A judge's result on a pair."""

    p_a: tuple[float | None, float | None]
    """P(A is better) with A shown first and with B shown first; None if unreadable."""
    method: Literal["logprob", "votes"]
    """How the probabilities were obtained."""
    votes: int | None
    """Replies sampled in each order, if the method is `votes`."""
    reasoning: tuple[str, str] | None
    """The judge's reasoning before its choice, in each order."""
    clipped: bool
    """Whether the judge was shown only the beginning and end of a text."""


class _NoLogprobs(Exception):  # noqa: N818 - not an error: the caller falls back to votes
    """The model gives no log-probabilities."""


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Treat a provider's rejection of a request as one of its log-probabilities parameters."""
    try:
        yield
    except Exception as error:
        if not models.refuses_form(error):
            raise
        raise _NoLogprobs from error


class Judge:
    """A chat model that compares answers, or rates them.

    Log-probabilities are used if the model gives them; otherwise, or if it rejects the request, replies are
    sampled.
    """

    def __init__(
        self, model: str | BaseChatModel, *, reasoning: bool = False, votes: int | None = None
    ) -> None:
        """Set up a judge; no request is made yet.

        Args:
            model: a chat model, or its spec.
            reasoning: whether it reasons before it chooses (chain of thought).
            votes: sample this many replies in each order and never use log-probabilities; None: use
                log-probabilities if the model gives them, and otherwise sample `VOTES`.

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
            ModelError: an answer is too long to be judged as a whole.
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
        self._gives_logprobs = False  # the same request worked without them, so they caused the rejection
        return opinion

    async def rate(self, exchange: Exchange, constitution: Constitution, calls: Calls) -> float | None:
        """Rate one answer under a whole constitution, from -1 (worst) to 1 (best); None: unreadable.

        With log-probabilities this is the expected rating, and otherwise the mean of sampled ratings.

        Raises:
            BudgetExceeded: no call is left.
            ModelError: the answer is too long to be judged as a whole.
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
        # In sequence: on a local model the second call reuses the conversation from the prefix cache.
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
        """Return a reply's first tokens, each with its most probable alternatives and their logprobs."""
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
        """Return the share of sampled replies that choose the answer shown first, and the first reply."""
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

    None if the labels are improbable there (`LEAST_MASS`): the model was about to write something else.

    >>> top = [{"token": "A", "logprob": -0.1}, {"token": " B", "logprob": -2.3}]
    >>> round(p_first([{"token": "A", "top_logprobs": top}]), 2)
    0.9
    """
    mass = _mass(tokens, COMPARED)
    return None if mass is None else mass[0] / sum(mass)


def expected_rating(tokens: Sequence[dict[str, Any]]) -> float | None:
    """Return the expected rating under a reply's probabilities, from -1 to 1; None as in `p_first`.

    >>> top = [{"token": "9", "logprob": -0.7}, {"token": "5", "logprob": -0.7}]
    >>> expected_rating([{"token": "9", "top_logprobs": top}])
    0.5
    """
    mass = _mass(tokens, RATINGS)
    if mass is None:
        return None
    return sum(p * _rating(digit) for p, digit in zip(mass, RATINGS, strict=True)) / sum(mass)


def _mass(tokens: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[float] | None:
    """Return the probability of each label at a reply's first real token; None if they are improbable."""
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
    """Return the rating, from -1 to 1, if the reply is a rating and nothing else.

    >>> read_rating("**9**"), read_rating("5."), read_rating("9 or 8"), read_rating("10")
    (1.0, 0.0, None, None)
    """
    said = text.strip(_AROUND)
    return _rating(said) if said in RATINGS else None


def _rating(digit: str) -> float:
    return 2 * RATINGS.index(digit) / (len(RATINGS) - 1) - 1


def read_choice(text: str) -> str | None:
    """Return the label that a reply chooses: in its last line `Better: A`, or as the whole reply.

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
