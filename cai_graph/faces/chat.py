"""The face for chat models: a BaseChatModel that answers as the wrapped one does.

Its run is a chat model's run in every trace and stream; the calls that a request costs stand below it.
Callbacks count each call where it is made, so this run reports no usage of its own to them: the message
that leaves carries the draft's as `usage_metadata`, and the sum of all calls and each of them under
`response_metadata["cai"]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self, cast

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import _format_ls_structured_output
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs, var_child_runnable_config
from langchain_core.runnables.utils import ConfigurableField
from langchain_core.tools import BaseTool
from pydantic import PrivateAttr

from cai_graph.app.handlers import (
    ModelRun,
    RunEvents,
    filtered_run,
    hide_usage,
    manager_for,
    shows_answers,
    under_a_model,
)
from cai_graph.app.placed import Placed
from cai_graph.app.shape import Shape
from cai_graph.app.streams import Piece
from cai_graph.app.wrapped import call_options
from cai_graph.concurrency import bridge
from cai_graph.errors import ConfigError
from cai_graph.faces.guard import Guard
from cai_graph.faces.runnable import Answered, ConstitutionalRunnable
from cai_graph.faces.typed import Typed, form_asked, form_of, with_model
from cai_graph.faces.usage import chunk_of, counted, result_of, summed
from cai_graph.request.plan import Plan
from cai_graph.shadow.shadow import Shadow

if TYPE_CHECKING:
    from langchain_core.runnables.graph import Graph

__all__ = ["ConstitutionalChatModel", "options_of"]

_PARAMETERS = LangSmithParams.__required_keys__ | LangSmithParams.__optional_keys__

Tools = Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool]


class ConstitutionalChatModel(BaseChatModel):
    """A chat model that answers as the wrapped one does, under a constitution. Made by `constitutional`.

    What the wrapped model says of itself (settings, profile, counts of tokens) is said here too. Its cache
    and its rate limiter stay where they are: at each call that it makes.
    """

    _guard: Guard = PrivateAttr()
    _model: BaseChatModel = PrivateAttr()
    """The wrapped model itself, before tools were bound."""

    def __init__(self, guard: Guard) -> None:
        model = cast("BaseChatModel", guard.app)
        super().__init__(
            name=model.name or f"Constitutional{model.get_name()}",
            cache=False,  # an answer is judged and logged each time; the calls below have caches of their own
            tags=model.tags,
            metadata=model.metadata,
            profile=model.profile,
            output_version=model.output_version,
        )
        self._guard = guard
        self._model = model

    @property
    def app(self) -> Runnable[LanguageModelInput, AIMessage]:
        """What drafts: the wrapped model, or what it made of itself when tools were bound."""
        return self._guard.app

    @property
    def plan(self) -> Plan:
        """What judges and revises its answers, and where they are logged."""
        return self._guard.plan

    # --- answering ---

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options, configurable = options_of(stop, kwargs), _configurable.get()
        return bridge.run(lambda caller: self._result(messages, options, run_manager, configurable, caller))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await self._result(messages, options_of(stop, kwargs), run_manager, _configurable.get())

    async def _result(
        self,
        messages: list[BaseMessage],
        options: Mapping[str, Any],
        run_manager: ModelRun | None,
        configurable: dict[str, Any],
        caller: bridge.Caller | None = None,
    ) -> ChatResult:
        """Return the answer; the streams that stand around the run are shown it on its way."""
        guard, config = self._judging(options), self._below(run_manager, configurable)
        hide_usage(run_manager)
        if run_manager is None or not any(map(shows_answers, run_manager.handlers)):
            message, trajectory = await guard.answer(messages, config, options, caller=caller)
            return result_of(message, trajectory)
        # LangChain emits the start and the end of this run itself.
        events = RunEvents(filtered_run(run_manager, shows_answers), caller)
        async with aclosing(guard.stream(messages, config, options, caller=caller, invoked=True)) as pieces:
            async for piece in pieces:
                await events.piece(chunk_of(piece))
        return result_of(piece.whole, piece.trajectory)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = options_of(stop, kwargs)
        hide_usage(run_manager)
        return bridge.stream(lambda caller: self._generations(messages, options, run_manager, caller))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        hide_usage(run_manager)
        async with aclosing(self._generations(messages, options_of(stop, kwargs), run_manager)) as made:
            async for chunk in made:
                yield chunk

    async def _generations(
        self,
        messages: list[BaseMessage],
        options: Mapping[str, Any],
        run_manager: ModelRun | None,
        caller: bridge.Caller | None = None,
        configurable: dict[str, Any] | None = None,
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        below = self._below(run_manager, configurable)
        async with aclosing(self._judging(options).stream(messages, below, options, caller=caller)) as pieces:
            async for piece in pieces:
                yield ChatGenerationChunk(message=chunk_of(piece))

    def invoke(
        self,
        input: LanguageModelInput | Any,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer; where a person decided what leaves (policy `human`), `input` is a `Command(resume=…)`."""
        if self.plan.settings.asks:
            options = options_of(stop, kwargs)
            return _Asking(self._judging(options)).invoke(input, self._own(config), **options)
        with _configured_by(config):
            return super().invoke(input, config, stop=stop, **kwargs)

    async def ainvoke(
        self,
        input: LanguageModelInput | Any,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer; see `invoke`."""
        if self.plan.settings.asks:
            options = options_of(stop, kwargs)
            return await _Asking(self._judging(options)).ainvoke(input, self._own(config), **options)
        with _configured_by(config):
            return await super().ainvoke(input, config, stop=stop, **kwargs)

    # LangChain's own `stream`, and its `invoke` where it streams, tell `_stream` nothing of the run, under
    # which the calls below are traced.

    def _should_stream(self, **kwargs: Any) -> bool:
        return False

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Answer in chunks, which leave as `Settings.stream` says; the model is called in this thread.

        Where a person decided what leaves, `input` is a `Command(resume=…)`, as for `invoke`.
        """
        if self.plan.settings.asks:
            options = options_of(stop, kwargs)
            asking = _Asking(self._judging(options))
            return cast("Iterator[AIMessageChunk]", asking.stream(input, self._own(config), **options))
        return bridge.stream(lambda caller: self._chunks(input, config, stop, kwargs, caller))

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Answer in chunks; see `stream`."""
        made: Any
        if self.plan.settings.asks:
            options = options_of(stop, kwargs)
            made = _Asking(self._judging(options)).astream(input, self._own(config), **options)
        else:
            made = self._chunks(input, config, stop, kwargs)
        async with aclosing(made) as chunks:
            async for chunk in chunks:
                yield chunk

    def _own(self, config: RunnableConfig | None) -> RunnableConfig:
        """Return a configuration with what the model itself has of tags, metadata and callbacks."""
        own = RunnableConfig(tags=self.tags or [], metadata=self.metadata or {}, callbacks=self.callbacks)
        return merge_configs(own, config)

    async def _chunks(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None,
        stop: list[str] | None,
        options: dict[str, Any],
        caller: bridge.Caller | None = None,
    ) -> AsyncGenerator[AIMessageChunk, None]:
        config, messages = ensure_config(config), self._convert_input(input).to_messages()
        # Of the form of a structured output only tracers are told; the wrapped model has it in other words.
        form = _format_ls_structured_output(options.pop("ls_structured_output_format", None))
        callbacks = manager_for(caller).configure(
            config.get("callbacks"),
            self.callbacks,
            self.verbose,
            config.get("tags"),
            self.tags,
            {**config.get("metadata", {}), **self._get_ls_params_with_defaults(stop=stop, **options)},
            self.metadata,
        )
        events = await RunEvents.begin(
            callbacks,
            messages,
            caller,
            serialized=self._serialized,
            invocation_params=self._get_invocation_params(stop=stop, **options),
            options={"stop": stop, **form},
            name=config.get("run_name"),
            run_id=config.get("run_id"),
            batch_size=1,
        )
        under, thread = options_of(stop, options), config.get("configurable")
        try:
            async with aclosing(self._generations(messages, under, events.run, caller, thread)) as made:
                async for chunk in made:
                    part = cast("AIMessageChunk", chunk.message)
                    await events.piece(part)
                    yield part
        except BaseException as error:
            await events.error(error)
            raise
        await events.end()

    def generate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer each conversation; LangChain's own entry to a chat model."""
        return counted(super().generate(*args, **kwargs))

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer each conversation; LangChain's own entry to a chat model."""
        return counted(await super().agenerate(*args, **kwargs))

    async def answered(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        source: str | None = None,
        **kwargs: Any,
    ) -> Answered:
        """Answer, and return the Trajectory beside the message. `source` is recorded in it."""
        runnable = ConstitutionalRunnable[LanguageModelInput, AIMessage](self._judging(kwargs))
        output, trajectory = await runnable.answered(input, config, source=source, **kwargs)
        return Answered(summed(output, output, trajectory), trajectory)

    @property
    def shadow(self) -> Shadow | None:
        """In mode `shadow`, what judges behind the answers: counts them, and waits for them."""
        return self._guard.shadow

    def _judging(self, options: Mapping[str, Any]) -> Guard:
        """Return the guard for a call's arguments, its model at the place where the call is made.

        Raises:
            ConfigError: they ask for several candidates.
        """
        guard = self._formed(options)
        asked = call_options(guard.app, options).get("n") or getattr(self._model, "n", None) or 1
        if asked != 1:
            raise ConfigError(
                f"n={asked} asks for {asked} candidates, and of a request one answer is judged and leaves; "
                f"leave n out, and for {asked} answers ask as often: model.batch([input] * {asked})"
            )
        if (place := var_child_runnable_config.get()) is not None:
            guard = dataclasses.replace(guard, app=Placed.at(place, guard.app))
        return guard

    def _formed(self, options: Mapping[str, Any]) -> Guard:
        """Return the guard for a call's arguments: where they ask for JSON, it judges that."""
        guard = self._guard
        if not guard.shape.whole and (form := form_asked(guard.app, options)) is not None:
            guard = dataclasses.replace(guard, shape=Typed(wanted=form))
        return guard

    def _below(
        self, run_manager: ModelRun | None, configurable: dict[str, Any] | None = None
    ) -> RunnableConfig:
        """Return the configuration of what runs below a run of this model."""
        configurable = configurable or {}
        if run_manager is None:
            return RunnableConfig(callbacks=AsyncCallbackManager(handlers=[]), configurable=configurable)
        # What LangChain noted of this model's parameters is not the critic's.
        noted = run_manager.inheritable_metadata
        metadata = {key: value for key, value in noted.items() if key not in _PARAMETERS}
        tags = run_manager.inheritable_tags
        handlers = under_a_model(run_manager.inheritable_handlers, run_manager.run_id)
        callbacks = AsyncCallbackManager(
            handlers=[*handlers],
            inheritable_handlers=[*handlers],
            parent_run_id=run_manager.run_id,
            tags=[*tags],
            inheritable_tags=[*tags],
            metadata={**metadata},
            inheritable_metadata={**metadata},
        )
        return RunnableConfig(callbacks=callbacks, tags=tags, metadata=metadata, configurable=configurable)

    # --- tools and configuration ---

    def bind_tools(self, tools: Tools, *, tool_choice: str | None = None, **kwargs: Any) -> _Configured:
        """Return this model with tools to draft with. Critic and reviser have none."""
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self._around(self._model.bind_tools(tools, **kwargs))

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the wrapped model's own structured output, its JSON judged and revised before it is parsed.

        A refusal cannot be typed: where policy `closed` would release one, Refused is raised.

        Args:
            schema: a pydantic class, a TypedDict, a JSON Schema, or what else the wrapped model takes.
            include_raw: whether the message and a parsing error come along, as in LangChain.
            kwargs: passed on to the wrapped model, such as `method` and `strict`.

        Raises:
            ConfigError: what the wrapped model returns has no model in it.
        """
        made = self._model.with_structured_output(schema, include_raw=include_raw, **kwargs)  # type: ignore[arg-type]
        shape = Typed(wanted=form_of(schema))
        return with_model(made, lambda model: self._around(model, shape))

    def _around(
        self, drafting: Runnable[LanguageModelInput, AIMessage], shape: Shape | None = None
    ) -> _Configured:
        """Return this model around what the wrapped one made of itself, with the arguments that it bound."""
        options: Mapping[str, Any] = {}
        config = RunnableConfig()
        while isinstance(drafting, RunnableBinding):  # what is more than a binding, such as retries, stays
            options, config = {**drafting.kwargs, **options}, {**drafting.config, **config}
            drafting = drafting.bound
        model = self.model_copy()
        model._guard = dataclasses.replace(self._guard, app=drafting, shape=shape or self._guard.shape)
        return _Configured(bound=model, kwargs=options, config=config)

    def bind(self, **kwargs: Any) -> _Configured:  # type: ignore[override]  # LangChain's is private
        """Return this model with arguments for each call; they reach the wrapped model."""
        return _Configured(bound=self, kwargs=kwargs, config={})

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> _Configured:
        """Return this model with a configuration for each call, which `bind_tools` keeps."""
        merged = cast("RunnableConfig", {**(config or {}), **kwargs})
        return _Configured(bound=self, kwargs={}, config=merged)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy; settings of the wrapped model, such as `temperature`, change in a copy of that.

        Raises:
            ConfigError: they cannot be changed, since the model has made something else of itself.
        """
        changes = dict(update or {})
        theirs = {name: changes.pop(name) for name in [*changes] if name not in type(self).model_fields}
        copy = super().model_copy(update=changes, deep=deep)
        if theirs:
            if self._guard.app is not self._model:
                raise ConfigError(
                    f"{', '.join(theirs)} cannot be changed after tools were bound or structured output was "
                    "asked for; change the wrapped model before"
                )
            copy._model = self._model.model_copy(update=theirs)
            copy._guard = dataclasses.replace(self._guard, app=copy._model)
        return copy

    def configurable_fields(self, **kwargs: Any) -> Any:
        """Return a Runnable that answers as this model does, with fields of the wrapped one configurable."""
        drafting = cast("Any", self._guard.app).configurable_fields(**kwargs)
        return ConstitutionalRunnable(dataclasses.replace(self._guard, app=drafting))

    def configurable_alternatives(self, which: ConfigurableField, **kwargs: Any) -> Any:
        """Return a Runnable that answers as this model does, with what drafts configurable; all is judged."""
        drafting = cast("Any", self._guard.app).configurable_alternatives(which, **kwargs)
        return ConstitutionalRunnable(dataclasses.replace(self._guard, app=drafting))

    # --- what the wrapped model says of itself ---

    if not TYPE_CHECKING:  # else every misspelt attribute would pass the type checker

        def __getattr__(self, name: str) -> Any:
            """Return a setting of the wrapped model, such as `model_name` or `temperature`."""
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_"):
                    raise
                value = getattr(self._model, name)
                if callable(value):  # what answers must go through the constitution
                    raise
                return value

    def __repr_args__(self) -> Any:
        """Return what `repr` shows: the wrapped model and the constitution's name."""
        yield "app", self._guard.app
        yield "constitution", self._guard.plan.constitution.name

    @property
    def _llm_type(self) -> str:
        return self._model._llm_type

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # Where a cache is shared with the wrapped model, their answers are not the same.
        return {
            **self._model._identifying_params,
            "constitution": self._guard.plan.constitution.digest,
        }

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        return self._model._get_invocation_params(stop=stop, **kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._model._get_ls_params(stop=stop, **kwargs)

    def get_input_schema(self, config: RunnableConfig | None = None) -> Any:
        """Return the wrapped model's input schema."""
        return self._model.get_input_schema(config)

    def get_output_schema(self, config: RunnableConfig | None = None) -> Any:
        """Return the wrapped model's output schema."""
        return self._model.get_output_schema(config)

    def get_graph(self, config: RunnableConfig | None = None) -> Graph:
        """Return the wrapped model's graph."""
        return self._model.get_graph(config)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the wrapped model's tokens of a text."""
        return self._model.get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """Return how many tokens the wrapped model counts in a text."""
        return self._model.get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> int:
        """Return how many tokens the wrapped model counts in messages."""
        return self._model.get_num_tokens_from_messages(messages, *args, **kwargs)


_configurable: ContextVar[dict[str, Any]] = ContextVar("_configurable", default={})  # noqa: B039 - never changed
"""What the call under way is configured with, of which LangChain tells `_generate` nothing."""


@contextmanager
def _configured_by(config: RunnableConfig | None) -> Iterator[None]:
    token = _configurable.set((config or {}).get("configurable") or {})
    try:
        yield
    finally:
        _configurable.reset(token)


class _Asking(ConstitutionalRunnable[Any, AIMessage]):
    """Answers where a person may be asked: a chat model's own runs are not told which thread is to wait."""

    async def _whole(
        self,
        input: Any,
        config: RunnableConfig,
        options: Mapping[str, Any],
        caller: bridge.Caller | None = None,
    ) -> AIMessage:
        message, trajectory = await self.guard.answer(input, config, options, caller=caller)
        return summed(cast("AIMessage", message), message, trajectory)

    async def _pieces(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Piece, None]:
        async with aclosing(super()._pieces(*args, **kwargs)) as pieces:
            async for piece in pieces:
                yield piece._replace(output=chunk_of(piece))


class _Configured(RunnableBinding[LanguageModelInput, AIMessage]):
    """A wrapped model with a configuration or arguments, which binding tools keeps.

    LangChain's own binding drops both, and with them the tags that hide a call from streams.
    """

    def bind_tools(self, tools: Tools, **kwargs: Any) -> _Configured:
        """Return the same with tools."""
        model = cast("ConstitutionalChatModel", self.bound)
        return self.model_copy(update={"bound": model.bind_tools(tools, **kwargs)})

    def configurable_alternatives(self, which: ConfigurableField, **kwargs: Any) -> Any:
        """Return a Runnable that answers as this does, with what drafts configurable; all is judged."""
        guard = cast("ConstitutionalChatModel", self.bound)._guard
        drafting = RunnableBinding(bound=guard.app, kwargs=self.kwargs, config=self.config)
        made = drafting.configurable_alternatives(which, **kwargs)
        return ConstitutionalRunnable(dataclasses.replace(guard, app=made))

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the same with structured output."""
        model = cast("ConstitutionalChatModel", self.bound)
        made = model.with_structured_output(schema, **kwargs)
        return with_model(made, lambda bound: self.model_copy(update={"bound": bound}))

    async def answered(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        source: str | None = None,
        **kwargs: Any,
    ) -> Answered:
        """Answer, and return the Trajectory beside the message; see `ConstitutionalChatModel.answered`."""
        model = cast("ConstitutionalChatModel", self.bound)
        under = {**self.kwargs, **kwargs}
        return await model.answered(input, self._merge_configs(config), source=source, **under)


def options_of(stop: list[str] | None, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the wrapped model is called with."""
    # None would override what is bound to the wrapped model.
    return kwargs if stop is None else {**kwargs, "stop": stop}
