"""The answers of a subject, one a line, kept so that they can be graded again without being written again.

Subject            who is evaluated
├─ AppSubject          a chat model, a wrapped app, any Runnable or function of messages
└─ CheckpointSubject   weights in a folder, sampled in batches
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableLambda

from cai_graph import local, models
from cai_graph.app.shape import Shape
from cai_graph.concurrency.together import side_by_side
from cai_graph.errors import ConfigError, DataError
from cai_graph.failures import describe, is_about_all_rows
from cai_graph.messages import cut_short, to_langchain
from cai_graph.trajectory import shown_of, text_of
from trainers.checkpoint import Checkpoint
from trainers.evaluation.suites import Prompt
from trainers.identity import weights_of
from trainers.lines import Row

__all__ = ["AppSubject", "Asked", "CheckpointSubject", "Subject", "app_of"]


class Asked(NamedTuple):
    """A prompt that is to be answered."""

    prompt: Prompt
    """The prompt."""
    sample: int
    """Which of its answers, from 0."""


class Subject(Protocol):
    """Who is evaluated."""

    name: str
    """What figures call it, and its file after it."""
    settings: Mapping[str, Any]
    """All that shapes its answers, as JSON."""

    def answers(self, asked: Sequence[Asked]) -> AsyncGenerator[Row, None]:
        """Yield a row for each that was asked, in any order.

        A row holds `prompt`, `sample`, `answer`, `cut` (why it is not whole, or None), `error` (why there is
        no answer, or None) and `seconds`.

        Raises:
            Exception: what would fail every further prompt, such as a refused key.
        """
        ...


# --- apps ---------------------------------------------------------------------------------------------


class AppSubject:
    """A chat model, or any Runnable or function that takes a list of messages and gives an answer."""

    def __init__(
        self,
        app: Runnable[Any, Any] | Callable[[list[BaseMessage]], Any],
        *,
        name: str = "",
        seed: int = 0,
        concurrency: int = 4,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up; nothing is asked.

        Args:
            app: who answers.
            name: by default the spec of a chat model.
            seed: of local models, which answer alike to a seed; each further sample has another.
            concurrency: prompts under way at once.
            settings: what shapes the answers and cannot be seen from here, such as a temperature.
        """
        self._app = app if isinstance(app, Runnable) else RunnableLambda(app)
        self.name = name or models.name_of(app)
        weights = weights_of(app)
        own = {} if weights is None else {"weights": weights}
        self.settings: Mapping[str, Any] = {"seed": seed, **own, **(settings or {})}
        self._seed, self._concurrency = seed, concurrency
        self._is_seeded = local.is_local(app)
        self._succeeded = False

    async def answers(self, asked: Sequence[Asked]) -> AsyncGenerator[Row, None]:
        """Yield a row for each that was asked, as each ends."""
        async with contextlib.aclosing(side_by_side(asked, self._answer, self._concurrency)) as rows:
            async for row in rows:
                yield row

    async def _answer(self, asked: Asked) -> Row:
        app = self._app
        if self._is_seeded and isinstance(app, BaseChatModel):
            app = app.bind(seed=self._seed + asked.sample)
        started = time.perf_counter()
        answer, cut, error = "", None, None
        try:
            output = await app.ainvoke(to_langchain(asked.prompt.messages))
            answer = shown_of(Shape().answer(output))
            cut = cut_short(output) if isinstance(output, BaseMessage) else None
        except Exception as raised:
            if is_about_all_rows(raised, succeeded=self._succeeded):
                raise
            error = describe(raised)
        self._succeeded = self._succeeded or error is None
        return _row(asked, answer, cut, error, time.perf_counter() - started)


def app_of(name: str) -> Any:
    """Return the object that `package.module:name` names.

    Raises:
        ConfigError: it cannot be imported, or is nothing that can be called.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the app {name!r} cannot be imported: {error}; write package.module:name"
        ) from error
    if not isinstance(found, Runnable) and not callable(found):
        raise ConfigError(f"{name!r} is a {type(found).__name__}, no Runnable and no function of messages")
    return found


def _row(asked: Asked, answer: str, cut: str | None, error: str | None, seconds: float) -> Row:
    return {
        "prompt": asked.prompt.id,
        "sample": asked.sample,
        "answer": answer,
        "cut": cut,
        "error": error,
        "seconds": round(seconds, 3),
    }


# --- checkpoints --------------------------------------------------------------------------------------


class CheckpointSubject:
    """Weights in a folder, sampled in batches on this machine's accelerator or its processors.

    Beside the weights, every file of the folder that may say how they are read is among its settings; so a
    JSON or text file that is put there or changed, such as figures of a training, makes it another model.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str = "",
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        """Look at the folder; nothing is loaded.

        Raises:
            ModelError: it holds no weights or no tokenizer.
        """
        self.checkpoint = Checkpoint.open(path)
        self.name = name or str(path)
        self.settings: Mapping[str, Any] = {
            "weights": self.checkpoint.digest,
            "config_and_tokenizer": self.checkpoint.shape,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "batch_size": batch_size,
        }
        self._max_tokens, self._temperature = max_tokens, temperature
        self._seed, self._batch_size = seed, batch_size

    async def answers(self, asked: Sequence[Asked]) -> AsyncGenerator[Row, None]:
        """Yield a row for each that was asked, batch by batch; with its error where it cannot be answered,
        such as a prompt that is longer than the model reads.

        The draw of a batch depends on which answers stand in it, so a resumed run need not write what an
        unbroken one would have; both are samples of the same policy, and no batch is another's copy.
        """
        from trainers.policy import load_policy, sample_each

        policy = await asyncio.to_thread(load_policy, self.checkpoint.path)
        # Prompts of like length share a batch, so that little of it is padding.
        ordered = sorted(asked, key=lambda one: sum(len(text_of(m)) for m in one.prompt.messages))
        for start in range(0, len(ordered), self._batch_size):
            batch = ordered[start : start + self._batch_size]
            prompts = [
                [{"role": m.role, "content": text_of(m)} for m in one.prompt.messages] for one in batch
            ]
            started = time.perf_counter()
            written = await asyncio.to_thread(
                sample_each,
                policy,
                prompts,
                max_tokens=self._max_tokens,
                temperature=self._temperature,
                seed=_seed_of(self._seed, batch),
                batch_size=self._batch_size,
            )
            seconds = (time.perf_counter() - started) / len(batch)
            for one, answer in zip(batch, written, strict=True):
                if isinstance(answer, DataError):
                    yield _row(one, "", None, describe(answer), 0.0)
                    continue
                cut = None if answer.ended else "it was cut at its token limit"
                yield _row(one, answer.text, cut, None, seconds)


def _seed_of(seed: int, batch: Sequence[Asked]) -> int:
    said = json.dumps([seed, [(one.prompt.id, one.sample) for one in batch]])
    return int(hashlib.sha256(said.encode()).hexdigest()[:12], 16)
