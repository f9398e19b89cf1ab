"""The face for chat models: a BaseChatModel with the wrapped model's interface, whose answers are judged.

In traces and streams a request is a chat model's run; the model calls that it makes are child runs. Callback
handlers count the usage of each child run, so the request's own run reports usage only to handlers of
streams. The released message has the draft's usage as `usage_metadata`; `response_metadata["cai"]` has the
sum of all calls, and each call.
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
    """A chat model with the wrapped model's interface, whose answers are judged. Created by `constitutional`.

    Settings, profile and token counts are those of the wrapped model. Its cache and its rate limiter apply to
    each call that it makes, not to the judged answer.
    """

    _guard: Guard = PrivateAttr()
    _model: BaseChatModel = PrivateAttr()
    """The wrapped model itself, before tools were bound."""

    def __init__(self, guard: Guard) -> None:
        model = cast("BaseChatModel", guard.app)
        super().__init__(
            name=model.name or f"Constitutional{model.get_name()}",
            cache=False,  # each answer is judged and logged anew; the inner calls use their own caches
            tags=model.tags,
            metadata=model.metadata,
            profile=model.profile,
            output_version=model.output_version,
        )
        self._guard = guard
        self._model = model

    @property
    def app(self) -> Runnable[LanguageModelInput, AIMessage]:
        """The Runnable that drafts: the wrapped model, or what it returned when tools were bound to it."""
        return self._guard.app

    @property
    def plan(self) -> Plan:
        """How answers are judged, revised and logged."""
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
        """Return the answer; handlers of the run that show an answer receive it while it is released."""
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
        """Answer; to resume with a person's decision (policy `human`), `input` is a `Command(resume=…)`."""
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

    # LangChain's own `stream`, and an `invoke` that streams, call `_stream` without a run manager, but the
    # inner calls are traced under its run. So `stream` is overridden, and `invoke` never streams.

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
        """Answer in chunks, released as `Settings.stream` specifies; the model is called in this thread.

        To resume with a person's decision, `input` is a `Command(resume=…)`, as for `invoke`.
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
        """Return a configuration with this model's own tags, metadata and callbacks merged into it."""
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
        # This description of a structured output is for tracers; the wrapped model has it in other options.
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
        """Answer each conversation, with the usage of all calls in `llm_output`; `invoke` calls this, too."""
        return counted(super().generate(*args, **kwargs))

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer each conversation; see `generate`."""
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
        """The background queue that judges the answers in mode `shadow`; None in other modes."""
        return self._guard.shadow

    def _judging(self, options: Mapping[str, Any]) -> Guard:
        """Return the guard for a call; its model runs under the configuration of the place of the call.

        Raises:
            ConfigError: the arguments request several candidates.
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
        """Return the guard for a call; if the call requests JSON, the guard judges that JSON."""
        guard = self._guard
        if not guard.shape.whole and (form := form_asked(guard.app, options)) is not None:
            guard = dataclasses.replace(guard, shape=Typed(wanted=form))
        return guard

    def _below(
        self, run_manager: ModelRun | None, configurable: dict[str, Any] | None = None
    ) -> RunnableConfig:
        """Return the configuration for the child runs of a run of this model."""
        configurable = configurable or {}
        if run_manager is None:
            return RunnableConfig(callbacks=AsyncCallbackManager(handlers=[]), configurable=configurable)
        # LangChain's metadata about this model's parameters does not apply to the critic.
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
        """Return this model with tools for drafting; critic and reviser get no tools."""
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self._around(self._model.bind_tools(tools, **kwargs))

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the wrapped model's structured output, whose JSON is judged and revised before it is parsed.

        A refusal does not have the schema's type: where policy `closed` would release one, calls raise
        Refused.

        Args:
            schema: a pydantic class, a TypedDict, a JSON Schema, or anything else that the wrapped model
                accepts.
            include_raw: whether to return also the message and any parsing error, as in LangChain.
            kwargs: passed on to the wrapped model, such as `method` and `strict`.

        Raises:
            ConfigError: the Runnable that the wrapped model returns contains no chat model.
        """
        made = self._model.with_structured_output(schema, include_raw=include_raw, **kwargs)  # type: ignore[arg-type]
        shape = Typed(wanted=form_of(schema))
        return with_model(made, lambda model: self._around(model, shape))

    def _around(
        self, drafting: Runnable[LanguageModelInput, AIMessage], shape: Shape | None = None
    ) -> _Configured:
        """Return this model around `drafting`; what is bound to `drafting` is bound to the result instead."""
        options: Mapping[str, Any] = {}
        config = RunnableConfig()
        while isinstance(drafting, RunnableBinding):  # other wrappers, such as retries, stay
            options, config = {**drafting.kwargs, **options}, {**drafting.config, **config}
            drafting = drafting.bound
        model = self.model_copy()
        model._guard = dataclasses.replace(self._guard, app=drafting, shape=shape or self._guard.shape)
        return _Configured(bound=model, kwargs=options, config=config)

    def bind(self, **kwargs: Any) -> _Configured:  # type: ignore[override]  # LangChain's is private
        """Return this model with arguments for each call, which are passed to the wrapped model."""
        return _Configured(bound=self, kwargs=kwargs, config={})

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> _Configured:
        """Return this model with a configuration for each call, which a later `bind_tools` preserves."""
        merged = cast("RunnableConfig", {**(config or {}), **kwargs})
        return _Configured(bound=self, kwargs={}, config=merged)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy; updates of the wrapped model's settings, such as `temperature`, go to a copy of it.

        Raises:
            ConfigError: the wrapped model itself no longer drafts, so such a setting cannot be changed.
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
        """Return a Runnable like this model in which fields of the wrapped model are configurable."""
        drafting = cast("Any", self._guard.app).configurable_fields(**kwargs)
        return ConstitutionalRunnable(dataclasses.replace(self._guard, app=drafting))

    def configurable_alternatives(self, which: ConfigurableField, **kwargs: Any) -> Any:
        """Return a Runnable like this model with alternatives for drafting, all of which are judged."""
        drafting = cast("Any", self._guard.app).configurable_alternatives(which, **kwargs)
        return ConstitutionalRunnable(dataclasses.replace(self._guard, app=drafting))

    # --- attributes of the wrapped model ---

    if not TYPE_CHECKING:  # else every misspelt attribute would pass the type checker

        def __getattr__(self, name: str) -> Any:
            """Return a setting of the wrapped model, such as `model_name` or `temperature`."""
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_"):
                    raise
                value = getattr(self._model, name)
                if callable(value):  # a method could answer without a judgement
                    raise
                return value

    def __repr_args__(self) -> Any:
        """Yield what `repr` shows: the wrapped model and the constitution's name."""
        yield "app", self._guard.app
        yield "constitution", self._guard.plan.constitution.name

    @property
    def _llm_type(self) -> str:
        return self._model._llm_type

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # For cache keys: in a shared cache, the wrapped model's answers must not count as this model's.
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
"""The `configurable` values of the current call, which LangChain does not pass to `_generate`."""


@contextmanager
def _configured_by(config: RunnableConfig | None) -> Iterator[None]:
    token = _configurable.set((config or {}).get("configurable") or {})
    try:
        yield
    finally:
        _configurable.reset(token)


class _Asking(ConstitutionalRunnable[Any, AIMessage]):
    """Answers under policy `human`, as a plain Runnable: LangChain passes no thread to a chat model's run."""

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
    """A ConstitutionalChatModel with bound configuration or arguments, which `bind_tools` preserves.

    With LangChain's own binding, `bind_tools` drops both, and so also tags that hide a call from streams.
    """

    def bind_tools(self, tools: Tools, **kwargs: Any) -> _Configured:
        """Return the same binding with tools."""
        model = cast("ConstitutionalChatModel", self.bound)
        return self.model_copy(update={"bound": model.bind_tools(tools, **kwargs)})

    def configurable_alternatives(self, which: ConfigurableField, **kwargs: Any) -> Any:
        """Return a Runnable like this one with alternatives for drafting, all of which are judged."""
        guard = cast("ConstitutionalChatModel", self.bound)._guard
        drafting = RunnableBinding(bound=guard.app, kwargs=self.kwargs, config=self.config)
        made = drafting.configurable_alternatives(which, **kwargs)
        return ConstitutionalRunnable(dataclasses.replace(guard, app=made))

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the structured output of the same binding."""
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
    """Return the arguments for a call of the wrapped model."""
    # A `stop` of None would override one that is bound to the wrapped model.
    return kwargs if stop is None else {**kwargs, "stop": stop}
