"""Runs an app in shadow mode: its output is returned unchanged, and its answer is queued to be judged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from copy import copy
from functools import reduce
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler, BaseCallbackManager
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import BaseModel

from cai_graph.app.handlers import unstreamed
from cai_graph.app.shape import Shape, added
from cai_graph.app.wrapped import gives_chunks, handed_over, is_graph, is_pause, resumes, untyped, waits
from cai_graph.calls import Budget, Calls
from cai_graph.errors import RunError
from cai_graph.memory.kept import Kept
from cai_graph.plain import plain
from cai_graph.request.drafts import DraftCalls
from cai_graph.request.plan import Plan
from cai_graph.request.request import Request
from cai_graph.shadow.shadow import Shadow, size_of
from cai_graph.trajectory import Call, Draft, Message, Trajectory, now

__all__ = ["UNHEARD", "Overheard"]

UNHEARD: Any = object()
"""Placeholder for an input that arrives later, in chunks."""

_UNBOUNDED = Budget(calls=None, forward_passes=None, tokens=None, seconds=None)


class Overheard:
    """One run of an app in shadow mode. Errors in reading its input or output are recorded, never raised.

    Args:
        app: the app.
        plan: how the answer is judged, revised and logged.
        shape: where the request and the answer are in the app's input and output.
        shadow: the queue for judgements.
        model: the name to record for the app if it is a single chat model.
        input: the app's input; UNHEARD if it arrives in chunks.
        config: the caller's configuration, with the callbacks that trace the run.
        source: the source key to record in the Trajectory.
    """

    def __init__(
        self,
        app: Runnable[Any, Any],
        plan: Plan,
        shape: Shape,
        shadow: Shadow,
        model: str | None,
        input: Any,
        config: RunnableConfig,
        source: str | None = None,
    ) -> None:
        self._app, self._plan, self._shape, self._shadow = app, plan, shape, shadow
        self._input, self._source = input, source
        self._started_at, self._started = now(), time.perf_counter()
        self._calls = DraftCalls(Calls(_UNBOUNDED), model)
        self._calls.raise_error = False
        callbacks = config.get("callbacks")
        if not isinstance(callbacks, BaseCallbackManager):
            callbacks = AsyncCallbackManager.configure(callbacks)
        hearing = callbacks.copy()
        hearing.add_handler(self._calls, inherit=True)
        self._end = _End(callbacks.parent_run_id)
        if is_graph(app):
            hearing.add_handler(self._end, inherit=False)
        self._kept = Kept.of(app, config)
        if self._kept.listener is not None:
            hearing.add_handler(self._kept.listener, inherit=True)
        self._under: RunnableConfig = {**config, "callbacks": hearing}
        self._behind = RunnableConfig(
            callbacks=unstreamed(callbacks),
            metadata=config.get("metadata") or {},
            tags=config.get("tags") or [],
        )
        self._output: Any = None
        self._chunks: list[Any] = []
        self._messages: tuple[Message, ...] = ()
        self._context: Mapping[str, str] = {}
        self._draft: Draft | None = None
        self._metadata: dict[str, Any] = {}
        self._error: BaseException | None = None
        try:
            self._metadata = plain(config.get("metadata") or {})  # now, since the caller may change it later
        except Exception as error:
            self._error = error
        self._inputs: list[Any] = []
        if input is not UNHEARD:
            self._read()
        self._stopped = False
        """Whether the app stopped at a breakpoint, and so has not answered yet."""
        self._recorded: Future[Trajectory] | None = None

    def invoke(self, options: Mapping[str, Any]) -> Any:
        """Run the app in this thread, and return its output."""
        with self:
            output = self._app.invoke(self._input, self._under, **options)
            self._take(output, options)
            self._look()
        return output

    async def ainvoke(self, options: Mapping[str, Any]) -> Any:
        """Run the app, and return its output."""
        with self:
            output = await self._app.ainvoke(self._input, self._under, **options)
            self._take(output, options)
            await self._alook()
        return output

    def stream(self, options: Mapping[str, Any]) -> Iterator[Any]:
        """Run the app in this thread, and yield its chunks."""
        return self._streamed(lambda: self._app.stream(self._input, self._under, **options))

    def transform(self, inputs: Iterator[Any], options: Mapping[str, Any]) -> Iterator[Any]:
        """Yield the app's chunks for an input that arrives in chunks; it may answer before it has all."""

        def heard() -> Iterator[Any]:
            for part in inputs:
                self._inputs.append(_as_it_is(part))
                yield part

        return self._streamed(lambda: self._app.transform(heard(), self._under, **options))

    def _streamed(self, begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        with self:
            chunks = begin()
            try:
                for chunk in chunks:
                    self._chunks.append(_as_it_is(chunk))
                    yield chunk
            finally:
                getattr(chunks, "close", lambda: None)()
            self._look()

    def astream(self, options: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """Yield the app's chunks."""
        return self._astreamed(lambda: self._app.astream(self._input, self._under, **options))

    def atransform(self, inputs: AsyncIterator[Any], options: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """Yield the app's chunks for an input that arrives in chunks; it may answer before it has all."""

        async def heard() -> AsyncIterator[Any]:
            async for part in inputs:
                self._inputs.append(_as_it_is(part))
                yield part

        return self._astreamed(lambda: self._app.atransform(heard(), self._under, **options))

    async def _astreamed(self, begin: Callable[[], AsyncIterator[Any]]) -> AsyncGenerator[Any, None]:
        with self:
            chunks = begin()
            try:
                async for chunk in chunks:
                    self._chunks.append(_as_it_is(chunk))
                    yield chunk
            finally:
                if (close := getattr(chunks, "aclose", None)) is not None:
                    await close()
            await self._alook()

    def _read(self) -> None:
        """Read the request from the input, before the caller can change it."""
        try:
            self._context = self._shape.context(self._input, None)
            self._messages = () if resumes(self._input, self._app) else self._shape.conversation(self._input)
        except Exception as error:  # the app may accept inputs that are not requests
            self._error = error

    def _take(self, output: Any, options: Mapping[str, Any]) -> None:
        if gives_chunks(self._app, options):
            self._chunks = [*output]
        else:
            self._output = untyped(output)

    def _look(self) -> None:
        """Check whether the app stopped at a breakpoint."""
        with suppress(Exception):
            self._stopped = self._kept.stopped_here()

    async def _alook(self) -> None:
        with suppress(Exception):
            self._stopped = await self._kept.stopped()

    async def record(self) -> Trajectory | None:
        """Wait until the answer is judged, and return its Trajectory; None if the app paused instead."""
        if self._recorded is None:
            return None
        record: Trajectory = await asyncio.wrap_future(self._recorded)
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (update := handed_over(error)) is not None:
            self._output, self._chunks, error = update, [], None
        last = self._chunks[-1] if self._chunks else self._output
        if self._stopped or is_pause(error) or waits(last):
            return
        if self._input is UNHEARD:
            with suppress(Exception):  # chunks that cannot be added cannot be read as a request
                self._input = reduce(added, self._inputs)
            self._read()
        if isinstance(error, GeneratorExit):
            error = RunError("the reader closed the stream")
        self._error = error or self._error
        calls = tuple(self._calls.calls.made)
        size = size_of(self._input) + size_of(self._chunks or self._output)
        # Chunks were copied as they passed, so they can be added up later; that takes long.
        later = bool(self._chunks) and not is_graph(self._app)
        if not later:
            self._hear()

        def request() -> Request:
            if later:
                self._hear()
            return self._request(calls)

        self._recorded = self._shadow.take(self._plan, request, self._behind, size)

    def _hear(self) -> None:
        """Read the answer from the output or from the copied chunks.

        An output must be read before it is returned, since the caller may change it.
        """
        try:
            output = self._output = _as_it_is(self._whole())
            answer = self._shape.answer(output)
            self._draft = Draft(answer=answer, truncated=self._calls.cut(answer))
            with suppress(Exception):
                self._messages = self._shape.asked(self._messages, output)
            self._context = self._shape.context(self._context, output)
        except Exception as unlike:
            self._error = self._error or unlike

    def _request(self, calls: tuple[Call, ...]) -> Request:
        async def draft(own: Calls, node: RunnableConfig) -> Draft:
            assert self._draft is not None  # otherwise `failed` is set
            return self._draft

        return Request(
            messages=self._messages,
            draft=draft,
            written=lambda: self._draft,
            context=lambda: self._context,
            form=lambda: self._shape.form(self._output),
            mode="shadow",
            made=calls,
            failed=self._error,
            source=self._source,
            metadata=self._metadata,
            tags=self._behind.get("tags") or (),
            started_at=self._started_at,
            started=self._started,
        )

    def _whole(self) -> Any:
        """Return the output, or the sum of the chunks of a stream."""
        if not self._chunks:
            return self._output
        if is_graph(self._app):  # its chunks are its steps, whose sum is not its output
            return self._end.output
        return reduce(added, self._chunks)


def _as_it_is(value: Any) -> Any:
    """Return a copy of an output or chunk, and of the lists and messages in it; the reader may change it."""
    with suppress(Exception):  # if it cannot be copied, the original may still be readable
        if isinstance(value, BaseModel):
            return copy(value)
        if isinstance(value, dict):
            parts = {key: copy(part) for key, part in value.items() if isinstance(part, BaseModel | list)}
            copied = copy(value)
            copied.update(parts)
            return copied
    return value


class _End(BaseCallbackHandler):
    """Callback handler that records the output of the app's run, streamed or not."""

    run_inline = True  # otherwise an asynchronous app would pay for a thread switch

    def __init__(self, parent: UUID | None) -> None:
        self.parent = parent
        self.output: Any = None

    def on_chain_end(self, outputs: Any, *, parent_run_id: UUID | None = None, **kwargs: Any) -> None:
        """Record the output if the run is a direct child of `parent`."""
        if parent_run_id == self.parent:
            self.output = outputs
