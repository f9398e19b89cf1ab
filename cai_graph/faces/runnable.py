"""The face for chains and graphs: a Runnable with the wrapped app's interface, whose answers are judged."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.config import patch_config
from langchain_core.runnables.utils import ConfigurableField, ConfigurableFieldSpec

from cai_graph.app.handlers import AnswerEvents, shows_answers
from cai_graph.app.shape import added
from cai_graph.app.streams import Piece
from cai_graph.app.wrapped import (
    as_asked,
    config_of,
    gives_chunks,
    is_graph,
    is_pause,
    layers,
    resumes,
    step_limit,
)
from cai_graph.concurrency import bridge
from cai_graph.concurrency.context import apart
from cai_graph.faces.guard import Guard
from cai_graph.messages import to_langchain
from cai_graph.request.plan import Plan
from cai_graph.review import awaits
from cai_graph.shadow.overheard import UNHEARD
from cai_graph.shadow.shadow import Shadow
from cai_graph.trajectory import Trajectory

if TYPE_CHECKING:
    from langchain_core.callbacks import BaseCallbackManager
    from langchain_core.runnables.graph import Graph

__all__ = ["Answered", "ConstitutionalRunnable"]

Input = TypeVar("Input")
Output = TypeVar("Output")


class Answered(NamedTuple):
    """An answer with its Trajectory."""

    output: Any
    """What `invoke` would have returned."""
    trajectory: Trajectory
    """The record of the request."""


class ConstitutionalRunnable(Runnable[Input, Output]):
    """A Runnable with the wrapped app's interface, whose answers are judged. Created by `constitutional`."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        # An outer graph, traces and readers of events identify an app by its name.
        own = (getattr(layer, "name", None) for layer in layers(guard.app))
        self.name = next(filter(None, own), f"Constitutional{guard.app.get_name()}")

    @property
    def app(self) -> Runnable[Input, Output]:
        """The wrapped app."""
        return self.guard.app

    @property
    def plan(self) -> Plan:
        """How answers are judged, revised and logged."""
        return self.guard.plan

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Answer; the wrapped app runs in this thread, critic and reviser on the bridge's event loop."""
        limit = step_limit(self.app, config)

        def answer(value: Input, run_manager: Any, config: RunnableConfig) -> Output:
            under = patch_config(config, callbacks=run_manager.get_child(), recursion_limit=limit)
            if self.guard.shadow is not None:
                return cast("Output", self.guard.overheard(value, under).invoke(kwargs))
            return bridge.run(lambda caller: self._whole(value, under, kwargs, caller))

        return self._call_with_config(answer, input, config_of(self.app, config))

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Answer."""
        limit = step_limit(self.app, config)

        async def answer(value: Input, run_manager: Any, config: RunnableConfig) -> Output:
            under = patch_config(config, callbacks=run_manager.get_child(), recursion_limit=limit)
            if self.guard.shadow is not None:
                return cast("Output", await self.guard.overheard(value, under).ainvoke(kwargs))
            return await self._whole(value, under, kwargs)

        return await self._acall_with_config(answer, input, config_of(self.app, config))

    def stream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Output]:
        """Answer in chunks, released as `Settings.stream` specifies; the wrapped app runs in this thread."""
        return self._streamed(iter([input]), config, kwargs, at_once=True)

    def transform(
        self, input: Iterator[Input], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Output]:
        """Answer as `stream` does, for an input that arrives in chunks."""
        return self._streamed(input, config, kwargs)

    def _streamed(
        self,
        input: Iterator[Input],
        config: RunnableConfig | None,
        options: dict[str, Any],
        *,
        at_once: bool = False,
    ) -> Iterator[Output]:
        """Answer in chunks; the input arrives in chunks, or whole if `at_once`."""
        limit = step_limit(self.app, config)

        def chunks(inputs: Iterator[Input], run_manager: Any, config: RunnableConfig) -> Iterator[Output]:
            under = patch_config(config, callbacks=run_manager.get_child(), recursion_limit=limit)
            if self.guard.shadow is not None and not at_once:
                yield from self.guard.overheard(UNHEARD, under).transform(inputs, options)
                return
            value = reduce(added, inputs)
            if self.guard.shadow is not None:
                yield from self.guard.overheard(value, under).stream(options)
                return
            yield from bridge.stream(lambda caller: self._chunks(value, under, options, caller))

        made = self._transform_stream_with_config(input, chunks, config_of(self.app, config))
        with closing(made) as answered:  # type: ignore[type-var]
            yield from answered

    async def astream(
        self, input: Input, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Output]:
        """Answer in chunks, released as `Settings.stream` specifies."""

        async def inputs() -> AsyncIterator[Input]:
            yield input

        async with aclosing(self._astreamed(inputs(), config, kwargs, at_once=True)) as answered:
            async for chunk in answered:
                yield chunk

    async def atransform(
        self, input: AsyncIterator[Input], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Output]:
        """Answer as `astream` does, for an input that arrives in chunks."""
        async with aclosing(self._astreamed(input, config, kwargs)) as answered:
            async for chunk in answered:
                yield chunk

    async def _astreamed(
        self,
        input: AsyncIterator[Input],
        config: RunnableConfig | None,
        options: dict[str, Any],
        *,
        at_once: bool = False,
    ) -> AsyncGenerator[Output, None]:
        """Answer in chunks; the input arrives in chunks, or whole if `at_once`."""
        limit = step_limit(self.app, config)

        async def chunks(
            inputs: AsyncIterator[Input], run_manager: Any, config: RunnableConfig
        ) -> AsyncIterator[Output]:
            under = patch_config(config, callbacks=run_manager.get_child(), recursion_limit=limit)
            if self.guard.shadow is not None and not at_once:
                leaving = self.guard.overheard(UNHEARD, under).atransform(inputs, options)
            else:
                value = reduce(added, [part async for part in inputs])
                if self.guard.shadow is not None:
                    leaving = self.guard.overheard(value, under).astream(options)
                else:
                    leaving = self._chunks(value, under, options)
            async with aclosing(leaving) as answered:
                async for chunk in answered:
                    yield chunk

        made = self._atransform_stream_with_config(input, chunks, config_of(self.app, config))
        async with aclosing(made) as answered:  # type: ignore[type-var]
            async for chunk in answered:
                yield chunk

    async def _whole(
        self,
        input: Input,
        config: RunnableConfig,
        options: Mapping[str, Any],
        caller: bridge.Caller | None = None,
    ) -> Output:
        """Return the output; handlers that show an answer receive the released one as a model's run."""
        if gives_chunks(self.app, options):
            async with aclosing(self._chunks(input, config, options, caller)) as chunks:
                return cast("Output", [chunk async for chunk in chunks])
        output: Any = None
        if not any(map(shows_answers, cast("BaseCallbackManager", config["callbacks"]).handlers)):
            output, _ = await self.guard.answer(input, config, options, caller=caller)
            return cast("Output", as_asked(output, self.app, options))
        async with aclosing(self._pieces(input, config, options, caller, invoked=True)) as pieces:
            async for piece in pieces:
                output = piece.whole
        return cast("Output", as_asked(output, self.app, options))

    async def _chunks(
        self,
        input: Input,
        config: RunnableConfig,
        options: Mapping[str, Any],
        caller: bridge.Caller | None = None,
    ) -> AsyncGenerator[Output, None]:
        async with aclosing(self._pieces(input, config, options, caller)) as pieces:
            async for piece in pieces:
                if piece.output is not None:
                    yield piece.output

    async def _pieces(
        self,
        input: Input,
        config: RunnableConfig,
        options: Mapping[str, Any],
        caller: bridge.Caller | None,
        *,
        invoked: bool = False,
    ) -> AsyncGenerator[Piece, None]:
        """Yield the released pieces, and emit them to handlers that show an answer."""
        asked = [] if resumes(input, self.app) else self.guard.shape.conversation(input)
        shown = AnswerEvents(config, to_langchain(asked), self.get_name(), caller)
        made = self.guard.stream(
            input, config, options, caller=caller, invoked=invoked, hearing=[shown.drafting]
        )
        try:
            async with aclosing(made) as pieces:
                async for piece in pieces:
                    await shown.piece(piece)
                    yield piece
        except BaseException as error:
            await (shown.end() if is_pause(error) else shown.error(error))
            raise
        await shown.end()

    async def answered(
        self,
        input: Input,
        config: RunnableConfig | None = None,
        *,
        source: str | None = None,
        **kwargs: Any,
    ) -> Answered:
        """Answer, and return the Trajectory beside the output. `source` is recorded in it."""
        kept: list[Trajectory | None] = []
        limit = step_limit(self.app, config)

        async def answer(value: Input, run_manager: Any, config: RunnableConfig) -> Output:
            under = patch_config(config, callbacks=run_manager.get_child(), recursion_limit=limit)
            output: Output
            if self.guard.shadow is not None:
                run = self.guard.overheard(value, under, source=source)
                output = await run.ainvoke(kwargs)
                kept.append(await run.record())
                return output
            output, trajectory = await self.guard.answer(value, under, kwargs, source=source)
            kept.append(trajectory)
            return cast("Output", as_asked(output, self.app, kwargs) if trajectory else output)

        output = await self._acall_with_config(answer, input, config_of(self.app, config))
        if kept[0] is None:
            raise awaits(output)
        return Answered(output, kept[0])

    @property
    def shadow(self) -> Shadow | None:
        """The background queue that judges the answers in mode `shadow`; None in other modes."""
        return self.guard.shadow

    # Everything else that a Runnable has, such as schemas, is the wrapped app's.

    if not TYPE_CHECKING:  # else every misspelt attribute would pass the type checker

        def __getattr__(self, name: str) -> Any:
            """Return an attribute of the wrapped app, such as a graph's `checkpointer` or `get_state`."""
            if not name.startswith("_") and name != "guard":
                value = getattr(layers(self.app)[-1], name)
                if name in _OF_A_GRAPH or not (callable(value) or isinstance(value, Runnable)):
                    return value  # other methods could answer without a judgement
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute; one that only the wrapped app has is set there."""
            own = name.startswith("_") or name in ("guard", "name") or hasattr(type(self), name)
            if own or not hasattr(app := layers(self.app)[-1], name):
                super().__setattr__(name, value)
            else:
                setattr(app, name, value)

    @property
    def InputType(self) -> Any:  # noqa: N802 - LangChain's name
        """The wrapped app's input type."""
        return self.app.InputType

    @property
    def OutputType(self) -> Any:  # noqa: N802 - LangChain's name
        """The wrapped app's output type."""
        return self.app.OutputType

    def get_input_schema(self, config: RunnableConfig | None = None) -> Any:
        """Return the wrapped app's input schema."""
        return self.app.get_input_schema(config)

    def get_output_schema(self, config: RunnableConfig | None = None) -> Any:
        """Return the wrapped app's output schema."""
        return self.app.get_output_schema(config)

    def get_input_jsonschema(self, config: RunnableConfig | None = None) -> dict[str, Any]:
        """Return the wrapped app's input schema, as JSON."""
        return self.app.get_input_jsonschema(config)

    def get_output_jsonschema(self, config: RunnableConfig | None = None) -> dict[str, Any]:
        """Return the wrapped app's output schema, as JSON."""
        return self.app.get_output_jsonschema(config)

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """The wrapped app's configurable fields."""
        return self.app.config_specs

    def configurable_fields(self, **kwargs: Any) -> ConstitutionalRunnable[Input, Output]:
        """Return a ConstitutionalRunnable in which fields of the app are configurable at each call."""
        return self._around(cast("Any", self.app).configurable_fields(**kwargs))

    def configurable_alternatives(
        self, which: ConfigurableField, **kwargs: Any
    ) -> ConstitutionalRunnable[Input, Output]:
        """Return a ConstitutionalRunnable with alternatives to the app, all of which are judged."""
        return self._around(cast("Any", self.app).configurable_alternatives(which, **kwargs))

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> Runnable[Input, Output]:
        """Return this Runnable with a configuration bound to it."""
        if not is_graph(self.app):
            return super().with_config(config, **kwargs)
        bound = cast("RunnableConfig", {**(config or {}), **kwargs})
        return _Configured(bound=self, config=bound, kwargs={})

    def _around(self, app: Runnable[Input, Output]) -> ConstitutionalRunnable[Input, Output]:
        return ConstitutionalRunnable(replace(self.guard, app=app))

    def get_graph(self, config: RunnableConfig | None = None, **kwargs: Any) -> Graph:
        """Return the wrapped app's graph; for a LangGraph graph, `xray` also shows the graphs inside."""
        return cast("Graph", cast("Any", self.app).get_graph(config, **kwargs))


class _Configured(RunnableBinding[Input, Output]):
    """A wrapped graph with a bound configuration, which is merged into that of a call as LangGraph does."""

    def _merge_configs(self, *configs: RunnableConfig | None) -> RunnableConfig:
        with apart():
            merged = super()._merge_configs(*configs)
        return cast("RunnableConfig", {name: value for name, value in merged.items() if value})


_OF_A_GRAPH = {
    "aget_graph",
    "get_context_jsonschema",
    *(
        f"{how}{method}"
        for how in ("", "a")
        for method in ("get_state", "get_state_history", "update_state", "bulk_update_state", "get_subgraphs")
    ),
}
"""Methods of a graph that produce no answer: they describe the graph, or read and write its state."""
