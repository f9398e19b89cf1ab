"""A checkpoint as a chat model in this process: requests made at about the same time are batched.

It samples a policy between two stages of its training, when no server runs it. An OpenAI-compatible server
(vLLM) is faster, and can be used instead by its URL.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import PrivateAttr

from cai_graph.errors import DataError
from cai_graph.messages import from_langchain
from cai_graph.trajectory import text_of
from trainers.checkpoint import Checkpoint
from trainers.policy import Policy, Sample, load_policy, sample_each

__all__ = ["Sampler"]

_GATHER_S = 0.02
"""How long the first request of a batch waits for others, in seconds."""


class Sampler(BaseChatModel):
    """Samples answers of a checkpoint in batches. The weights are loaded at the first request."""

    path: Path
    """Folder of the checkpoint."""
    max_tokens: int = 256
    """Maximum tokens of an answer."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most probable token."""
    seed: int = 0
    """Sampling seed. Batches depend on the timing of requests, so runs are not exactly reproducible."""
    batch_size: int = 16
    """Maximum number of answers generated at once."""

    _policy: Policy | None = PrivateAttr(default=None)
    _waiting: list[tuple[list[dict[str, Any]], asyncio.Future[Sample]]] = PrivateAttr(default_factory=list)
    _worker: asyncio.Task[None] | None = PrivateAttr(default=None)
    _batches: int = PrivateAttr(default=0)

    @property
    def _llm_type(self) -> str:
        return "checkpoint"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        name = Checkpoint.open(self.path).digest[:12]
        return LangSmithParams(ls_provider="checkpoint", ls_model_name=name, ls_model_type="chat")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        (found,) = self._draw([_plain(messages)])
        if isinstance(found, DataError):
            raise found
        return _result(found)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answer: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._waiting.append((_plain(messages), answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._answer_all())
        return _result(await answer)

    async def _answer_all(self) -> None:
        await asyncio.sleep(_GATHER_S)
        while self._waiting:
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            batch = [(prompt, answer) for prompt, answer in batch if not answer.done()]
            if not batch:
                continue
            try:
                found = await asyncio.to_thread(self._draw, [prompt for prompt, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), one in zip(batch, found, strict=True):
                if answer.done():  # cancelled during generation
                    continue
                if isinstance(one, DataError):
                    answer.set_exception(one)
                else:
                    answer.set_result(one)

    def _draw(self, prompts: list[list[dict[str, Any]]]) -> list[Sample | DataError]:
        if self._policy is None:
            self._policy = load_policy(self.path)
        self._batches += 1
        return sample_each(
            self._policy,
            prompts,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed + self._batches,
            batch_size=self.batch_size,
        )


def _plain(messages: list[BaseMessage]) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": text_of(m)} for m in map(from_langchain, messages)]


def _result(found: Sample) -> ChatResult:
    read, written = len(found.prompt_ids), len(found.ids)
    message = AIMessage(
        found.text,
        response_metadata={"finish_reason": "stop" if found.ended else "length"},
        usage_metadata=UsageMetadata(input_tokens=read, output_tokens=written, total_tokens=read + written),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])
