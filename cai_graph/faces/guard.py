"""The core of every face: a Guard runs an app, sends its answer through the graph, and returns the output.

A face has the interface of the wrapped app; its Guard handles the requests. The Guard runs the app to get the
draft, has `run` judge, revise and log it, keeps drafts and critiques out of the caller's streams, and puts
the released answer into the app's output.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler, BaseCallbackManager
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable, RunnableConfig

from cai_graph import models
from cai_graph.app.handlers import AsksForStreams, collected, is_stream, progress, unstreamed
from cai_graph.app.held import Held
from cai_graph.app.shape import Shape
from cai_graph.app.streams import AHEAD, Batch, Piece, Send, Writing, batches, in_one_piece, relay
from cai_graph.app.wrapped import (
    STREAM,
    HandedOver,
    ParentCommand,
    Paused,
    handed_over,
    handoff,
    is_graph,
    is_pause,
    layers,
    names_given,
    outer_writer,
    resumes,
    untyped,
    waits,
)
from cai_graph.calls import Calls
from cai_graph.concurrency import bridge
from cai_graph.concurrency.context import apart
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic
from cai_graph.errors import AwaitsReview, ConfigError, DataError, Refused, RunError
from cai_graph.log import Log
from cai_graph.memory.kept import Kept
from cai_graph.memory.turns import Turn
from cai_graph.plain import plain
from cai_graph.request.drafts import DraftCalls
from cai_graph.request.plan import Plan, planning
from cai_graph.request.request import Request
from cai_graph.review import Checkpointer, Desk, Settled, check_checkpointer
from cai_graph.run import Ending, run
from cai_graph.shadow.overheard import Overheard
from cai_graph.shadow.shadow import Shadow
from cai_graph.trajectory import Draft, Trajectory

__all__ = ["Guard"]


@dataclass(frozen=True)
class Guard:
    """An app under a constitution."""

    app: Runnable[Any, Any]
    """The wrapped app, which writes the drafts."""
    plan: Plan
    """How answers are judged, revised and logged."""
    shape: Shape
    """Where the request and the answer are in the app's input and output."""
    checkpointer: Checkpointer | None = None
    """Stores requests that wait for a person. Inside an outer graph, that graph's checkpointer is used."""
    shadow: Shadow | None = None
    """The background queue that judges the answers in mode `shadow`; None in other modes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        return replace(self, app=deepcopy(self.app, memo))  # the copy shares the plan, the log and the queue

    @classmethod
    def of(
        cls,
        app: Runnable[Any, Any],
        *,
        constitution: str | Constitution = "balanced",
        critic: str | BaseChatModel | Critic | None = None,
        reviser: str | BaseChatModel | None = None,
        log: str | Log | None = "sqlite:///cai.db",
        input_key: str | None = None,
        output_key: str | None = None,
        context_keys: Sequence[str] = (),
        checkpointer: Checkpointer | None = None,
        **settings: Any,
    ) -> Guard:
        """Return a guard for the arguments of `constitutional`; raises the same errors."""
        if not isinstance(app, Runnable):
            raise ConfigError(f"constitutional() wraps a LangChain Runnable, found {type(app).__name__}")
        inner = app if isinstance(app, BaseChatModel) else None
        for role, deed, given in (("critic", "judge", critic), ("reviser", "revise", reviser)):
            if given is None and inner is None:
                raise ConfigError(
                    f"{type(app).__name__} is not a chat model and cannot {deed} itself; name a {role}: "
                    f'constitutional(app, critic=…, reviser=…), for example {role}="openai:gpt-5-mini"'
                )
        if isinstance(context_keys, str):
            raise ConfigError(
                f"context_keys is a list of keys, found {context_keys!r}; write [{context_keys!r}]"
            )
        plan = planning(
            "constitutional()",
            constitution=constitution,
            critic=critic,
            reviser=reviser,
            log=log,
            settings=settings,
        )(inner)
        check_checkpointer("constitutional(app, …)", checkpointer, asks=plan.settings.asks)
        shadow = Shadow(plan.settings) if plan.settings.mode == "shadow" else None
        return cls(app, plan, Shape(input_key, output_key, tuple(context_keys)), checkpointer, shadow)

    async def answer(
        self,
        input: Any,
        config: RunnableConfig,
        options: Mapping[str, Any],
        *,
        caller: bridge.Caller | None = None,
        source: str | None = None,
        held: Held | None = None,
        hearing: Sequence[BaseCallbackHandler] = (),
    ) -> tuple[Any, Trajectory | None]:
        """Return the app's output with the released answer in the answer's place, and the Trajectory.

        Args:
            input: the app's input.
            config: the caller's configuration, with the callbacks under which this request is traced.
            options: passed on to the app.
            caller: the waiting thread, in which the app runs; None: the app runs on this event loop.
            source: recorded in the Trajectory.
            held: records the stream of an app that is a graph; None: the app is invoked.
            hearing: more callback handlers for the app's own run.

        Returns:
            The Trajectory is None if a person must act first: there is no answer yet, and the output is that
            of a paused LangGraph graph.

        Raises:
            AwaitsReview: a person must decide first (policy `human`), and the output has no place for the
                question; or an earlier request of this thread waits for its decision.
            GraphInterrupt: a person must act first, inside an outer graph.
            HandedOver: the app hands over to an outer graph; the update has the released answer.
            ParentCommand: the app hands over to an outer graph, and there is nothing to judge.
            Exception: anything else that `run` raises, except Paused.
        """
        kept = Kept.of(self.app, config, caller)
        try:
            return await self._answer(input, config, options, kept, caller, source, held, hearing)
        finally:
            kept.turn.end()

    async def _answer(
        self,
        input: Any,
        config: RunnableConfig,
        options: Mapping[str, Any],
        kept: Kept,
        caller: bridge.Caller | None,
        source: str | None,
        held: Held | None,
        hearing: Sequence[BaseCallbackHandler],
    ) -> tuple[Any, Trajectory | None]:
        outputs: list[Any] = []
        resumed = resumes(input, self.app)
        messages = () if resumed else self.shape.conversation(input)
        desk: Desk | None = None
        if self.plan.settings.asks:
            names = names_given(self.app)
            desk = await Desk.of(self.plan, self.shape, config, messages, names, self.checkpointer, caller)
            if (left := await self._decided(desk, input, kept, resumed)) is not None:
                return left

        begun = False

        async def draft(calls: Calls, node: RunnableConfig) -> Draft:
            nonlocal begun
            under, handler = self._under(config, calls, node, [*filter(None, [kept.listener]), *hearing])
            waited = await kept.begin(calls)
            await kept.meet(calls, self.shape, self._refusal, options, resumed=resumed)
            if waited and desk is not None and (waiting := await desk.lying()) is not None:
                raise AwaitsReview(waiting["question"])
            begun = True
            try:
                output = untyped(await self._output(input, under, options, calls, kept, caller, held))
            except ParentCommand as command:
                if (output := handed_over(command)) is None:
                    raise
            outputs.append(output)
            if waits(output) or await kept.stopped():
                raise Paused
            answer = self.shape.answer(output)
            return Draft(answer=answer, truncated=handler.cut(answer))

        try:
            ending = await self._run(
                config,
                messages=messages,
                asked=lambda: self.shape.asked(messages, outputs[0]),
                draft=draft,
                context=lambda: self.shape.context(input, outputs[0] if outputs else None),
                form=lambda: self.shape.form(outputs[0]),
                mode="sampled" if self.plan.settings.strategy == "sampled" else "enforce",
                source=source,
            )
        except Paused:
            return outputs[0], None
        except BaseException as error:
            # A coroutine that is being closed cannot await anything any more.
            if begun and not (is_pause(error) or isinstance(error, GeneratorExit)):
                await self._forget(outputs, kept, resumed)
            raise
        if desk is None or ending.released is not None:
            return await self._leave(Settled(outputs[0], ending.trajectory, ending.released), kept)
        try:
            waiting = await desk.lay_down(ending, outputs[0])
        except (RunError, asyncio.CancelledError) as error:
            # After a cancellation the request keeps waiting for a person, unless it could not be stored.
            if isinstance(error, RunError) or await desk.lying() is None:
                await self._forget(outputs, kept, resumed)
            raise
        if (paused := desk.paused(waiting, outputs[0])) is not None:
            return paused, None
        return await self._leave(await desk.settle(waiting), kept)

    async def _decided(
        self, desk: Desk, input: Any, kept: Kept, resumed: bool
    ) -> tuple[Any, Trajectory] | None:
        """Settle a request that waits for a person and return its output; None if a draft must be made."""
        if (waiting := await desk.lying()) is None:
            if resumed and not is_graph(self.app):
                raise RunError(f"nothing waits for a decision in thread {desk.thread!r}")
            return None
        await kept.begin(Calls(self.plan.settings.budget))
        left = await self._leave(await desk.settle(waiting, input), kept)
        # Otherwise it had been decided before but not logged, and this call is another request.
        return left if resumed or desk.node is not None else None

    async def _output(
        self,
        input: Any,
        under: RunnableConfig,
        options: Mapping[str, Any],
        calls: Calls,
        kept: Kept,
        caller: bridge.Caller | None,
        held: Held | None,
    ) -> Any:
        """Run the app: streamed into `held` or else invoked, in the caller's thread or on this event loop."""
        if held is not None:
            streamed = _written(self.app, input, under, held.options, caller, kept.turn)
            async with calls.deadline(), aclosing(streamed) as written:
                async for batch in written:
                    for chunk in batch.items:
                        held.take(chunk)
            return held.output
        if caller is not None:

            def invoke() -> Any:
                with apart(), kept.turn.inside():
                    return self.app.invoke(input, under, **options)

            return await caller.call(invoke)
        async with calls.deadline():
            with apart(), kept.turn.inside():
                return await self.app.ainvoke(input, under, **options)

    async def _leave(self, settled: Settled, kept: Kept) -> tuple[Any, Trajectory]:
        """Return the output with the released answer, after putting that answer into a graph's memory."""
        output, trajectory, released = settled
        assert released is not None  # otherwise the policy raised an error or a person is asked
        try:
            left = self.shape.put(output, released, trajectory)
        except Refused:  # the memory takes a refusal as text
            await kept.replace(lambda: self.shape.refusing(output, self._refusal()))
            raise
        command = handoff(left, trajectory)
        # In the memory, a run that hands over looks like one that failed. So the released message is put
        # there even if it is the draft: its `cai` metadata distinguishes it from an unjudged one.
        if trajectory.released_from != "draft" or (command is not None and kept.memory is not None):
            await kept.replace(lambda: self.shape.swap(output, left))
        if command is not None:
            raise command
        return left, trajectory

    async def _forget(self, outputs: Sequence[Any], kept: Kept, resumed: bool) -> None:
        """Put a refusal into a graph's memory in place of an answer of which nothing was released."""
        swap = None
        if outputs:
            try:
                swap = self.shape.refusing(outputs[0], self._refusal())
            except DataError:  # there is no answer in it
                return
        await kept.forget(self.shape, self._refusal, swap, resumed=resumed)

    async def stream(
        self,
        input: Any,
        config: RunnableConfig,
        options: Mapping[str, Any],
        *,
        caller: bridge.Caller | None = None,
        invoked: bool = False,
        hearing: Sequence[BaseCallbackHandler] = (),
    ) -> AsyncGenerator[Piece, None]:
        """Yield the app's output in pieces as they are released; arguments and errors as for `answer`.

        The last piece has the Trajectory, unless the app waits for a person. A graph streams the states of
        its channels and more, not pieces of an answer, so its chunks are released only when the whole answer
        is judged. A structured answer is released in one piece, too.

        When a chain's or a model's answer is released in one piece, the app is invoked, with its models in
        streaming mode unless `invoked` is set, which means that the caller did not ask for a stream.
        """
        mode = self.plan.settings.stream
        if mode == "buffer" or self.shape.whole or is_graph(self.app):
            held = Held(self.app, options) if is_graph(self.app) else None
            if held is None and not invoked:
                hearing = [*hearing, AsksForStreams()]
            try:
                output, trajectory = await self.answer(
                    input, config, options, caller=caller, held=held, hearing=hearing
                )
            except HandedOver as handed:
                yield in_one_piece(handed.output, self.shape, handed.trajectory, already_left=True)
                raise
            for chunk in () if held is None else held.replay(self.shape, output, trajectory):
                yield Piece(chunk, "")
            yield in_one_piece(output, self.shape, trajectory, already_left=held is not None)
            return

        async def work(send: Send[Piece]) -> None:
            async def chunks(calls: Calls, node: RunnableConfig) -> AsyncGenerator[Batch[Any], None]:
                under, handler = self._under(config, calls, node, hearing)
                writing.cut = handler.cut
                async with aclosing(_written(self.app, input, under, options, caller, Turn())) as written:
                    async for batch in written:
                        for chunk in batch.items:
                            if waits(chunk):
                                await send(in_one_piece(chunk, self.shape, None))
                                raise Paused
                        yield batch

            writing = Writing(chunks, self.shape, send, at_once=mode == "audit")
            try:
                ending = await self._run(
                    config,
                    messages=self.shape.conversation(input),
                    draft=writing.whole,
                    blocks=writing if mode == "blocks" else None,
                    written=writing.so_far if mode == "audit" else lambda: None,
                    context=lambda: self.shape.context(input, writing.output),
                    form=lambda: self.shape.form(writing.output),
                    mode="audit" if mode == "audit" else "enforce",
                )
            except Paused:
                return
            finally:
                await writing.close()
            settled = Settled(writing.output, ending.trajectory, ending.released)
            output, trajectory = await self._leave(settled, Kept.of(self.app, config, caller))
            await writing.rest(output, trajectory)

        async with aclosing(relay(work)) as pieces:
            async for piece in pieces:
                yield piece

    def overheard(self, input: Any, config: RunnableConfig, *, source: str | None = None) -> Overheard:
        """Return a run of the app whose output is returned unchanged and then judged (mode `shadow`)."""
        assert self.shadow is not None
        return Overheard(
            self.app, self.plan, self.shape, self.shadow, self._model_name, input, config, source
        )

    async def _run(self, config: RunnableConfig, **request: Any) -> Ending:
        """Send a request through the graph, with callbacks that show no text of a draft to a reader."""
        callbacks = cast("BaseCallbackManager", config["callbacks"])
        made = Request(
            metadata=plain(config.get("metadata") or {}),
            tags=config.get("tags") or (),
            tell=progress(callbacks, outer_writer()),
            **request,
        )
        # The callbacks include the tags and metadata.
        return await run(self.plan, made, RunnableConfig(callbacks=collected(unstreamed(callbacks))))

    def _under(
        self,
        config: RunnableConfig,
        calls: Calls,
        node: RunnableConfig,
        hearing: Sequence[BaseCallbackHandler],
    ) -> tuple[RunnableConfig, DraftCalls]:
        """Return the configuration for the app's run, and the handler that records its model calls.

        `hearing` are more handlers for that run. If a stream encloses it, the app's models are called in
        streaming mode, as without a constitution, but that stream receives none of their tokens.
        """
        handler = DraftCalls(calls, self._model_name)
        # The caller's configuration, traced under the node of our graph. The node's own configuration must
        # not leak into the app.
        callbacks = cast("AsyncCallbackManager", node["callbacks"]).copy()
        around = cast("BaseCallbackManager", config["callbacks"])
        callbacks.tags, callbacks.inheritable_tags = [*around.tags], [*around.inheritable_tags]
        callbacks.metadata = {**around.metadata}
        callbacks.inheritable_metadata = {**around.inheritable_metadata}
        streaming = [AsksForStreams()] if any(map(is_stream, around.handlers)) else []
        for each in (handler, *hearing, *streaming):
            callbacks.add_handler(each, inherit=True)  # a graph inside a retry is a child run
        under: RunnableConfig = {**config, "callbacks": callbacks}
        configurable = config.get("configurable") or {}
        under["configurable"] = {key: configurable[key] for key in configurable if key != STREAM}
        return under, handler

    def _refusal(self) -> str:
        return self.plan.constitution.refusal_in(self.plan.settings.language)

    @cached_property
    def _model_name(self) -> str | None:
        """The app's name in the records if it is a single chat model; None otherwise."""
        app = layers(self.app)[-1]
        return models.name_of(app) if isinstance(app, BaseChatModel) else None


async def _written(
    app: Runnable[Any, Any],
    input: Any,
    config: RunnableConfig,
    options: Mapping[str, Any],
    caller: bridge.Caller | None,
    turn: Turn,
) -> AsyncGenerator[Batch[Any], None]:
    """Yield the app's chunks, in batches of all that are available.

    The app runs in a task of its own, or in the caller's thread if one waits.
    """

    async def work(send: Send[Any]) -> None:
        if caller is None:
            with apart(), turn.inside():
                async with aclosing(app.astream(input, config, **options)) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        await send(chunk)
            return
        iterator, end = app.stream(input, config, **options), object()

        def pull() -> Any:
            with apart(), turn.inside():
                return next(iterator, end)

        def close() -> None:
            with apart(), turn.inside():
                getattr(iterator, "close", lambda: None)()

        try:
            while (chunk := await caller.call(pull)) is not end:
                await send(chunk)
        finally:
            await caller.call(close)

    async with aclosing(batches(work, AHEAD)) as written:
        async for batch in written:
            yield batch
