"""Subjects of an evaluation: how models, apps and Checkpoints answer its prompts.

They yield rows, which `trainers.evaluation.folder` stores, so that answers can be graded again later.

Subject            the interface of what is evaluated
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
    """A request for one answer to a prompt."""

    prompt: Prompt
    """The prompt."""
    sample: int
    """Index of the answer among those to the prompt, from 0."""


class Subject(Protocol):
    """The interface of what is evaluated."""

    name: str
    """Name in the figures; its file is named after it."""
    settings: Mapping[str, Any]
    """Everything that affects its answers, as JSON."""

    def answers(self, asked: Sequence[Asked]) -> AsyncGenerator[Row, None]:
        """Yield a row for each item of `asked`, in any order.

        A row has `prompt`, `sample`, `answer`, `cut` (why it is incomplete, or None), `error` (why there is
        no answer, or None) and `seconds`.

        Raises:
            Exception: an error that would fail every further prompt, such as a rejected key.
        """
        ...


# --- apps ---------------------------------------------------------------------------------------------


class AppSubject:
    """A chat model, or any Runnable or function that takes a list of messages and returns an answer."""

    def __init__(
        self,
        app: Runnable[Any, Any] | Callable[[list[BaseMessage]], Any],
        *,
        name: str = "",
        seed: int = 0,
        concurrency: int = 4,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Create a subject, without calling the app.

        Args:
            app: the app that answers.
            name: by default the spec of a chat model.
            seed: seed of local models, whose answers depend on it; sample number k uses seed + k.
            concurrency: maximum number of prompts in progress at once.
            settings: further settings that affect the answers, such as a temperature.
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
        """Yield a row for each item of `asked`, as soon as it is answered."""
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
        ConfigError: it cannot be imported, or is not callable.
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
    """Weights in a folder, sampled in batches on this machine's accelerator or CPU.

    Its settings include a digest of the weights and one of every other file that may affect how they are
    read. So a JSON or text file that is added or changed, such as training metrics, makes it another model.
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
        """Open the folder, without loading the weights.

        Raises:
            ModelError: the folder has no weights or no tokenizer.
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
        """Yield a row for each item of `asked`, batch by batch; one that cannot be answered has an error.

        A prompt that is longer than the model's context cannot be answered. The seed of a batch depends on
        the prompts in it: a resumed run may sample other answers than an uninterrupted one would have. Both
        sample the same policy, and no batch repeats the random numbers of another.
        """
        from trainers.policy import load_policy, sample_each

        policy = await asyncio.to_thread(load_policy, self.checkpoint.path)
        # Prompts of similar length share a batch, so that little of it is padding.
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
