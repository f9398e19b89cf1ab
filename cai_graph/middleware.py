"""The face for LangChain agents: every answer of the agent's model is judged before the agent sees it.

    create_agent(model, tools, middleware=[ConstitutionalMiddleware()])

It wraps the model call itself, so a draft never enters the agent's messages, checkpoints or streams; the
released answer has the draft's id. A turn that only calls tools is not judged, unless a principle has
`tools: true`. Text beside tool calls is judged like any answer, and the calls are kept.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import msgspec
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolCall, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableWithFallbacks
from langchain_core.runnables.config import get_async_callback_manager_for_config
from langgraph.config import get_config

from cai_graph.app.handlers import AnswerEvents
from cai_graph.app.shape import Shape
from cai_graph.app.streams import in_one_piece
from cai_graph.app.wrapped import is_pause, layers
from cai_graph.concurrency import bridge
from cai_graph.concurrency.context import within
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic
from cai_graph.errors import ConfigError, MissingExtra, Refused
from cai_graph.faces.guard import Guard
from cai_graph.log import Log
from cai_graph.messages import from_langchain, spelt_out
from cai_graph.request.form import Form
from cai_graph.request.plan import Plan, planning
from cai_graph.request.policy import Settings
from cai_graph.shadow.shadow import Shadow
from cai_graph.trajectory import Message, Trajectory, shown_of, text_of

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
    from langchain.agents.structured_output import (
        AutoStrategy,
        OutputToolBinding,
        ProviderStrategy,
        ToolStrategy,
    )
except ImportError as error:
    raise MissingExtra("ConstitutionalMiddleware", "langchain", "agents") from error

__all__ = ["ConstitutionalMiddleware"]

_PLANS = 16
"""Maximum number of models of an agent for which plans are cached."""


class ConstitutionalMiddleware(AgentMiddleware[Any, Any, Any]):
    """Puts an agent's answers under a constitution.

    Args:
        constitution: name of a built-in one, path of a file, or a Constitution.
        critic: the judge, a model spec, chat model or Critic; the agent's own model by default.
        reviser: the chat model (or its spec) that rewrites; the agent's own model by default.
        log: URL of the log of Trajectories, or a Log; None switches logging off.
        settings: fields of `Settings`, such as `on_violation="open"`. Policy `human` pauses the agent, which
            then needs a checkpointer.

    Raises:
        ConfigError: an argument is invalid.
        ConstitutionError: the constitution cannot be read.
        LogError: the log cannot be opened.
    """

    def __init__(
        self,
        *,
        constitution: str | Constitution = "balanced",
        critic: str | BaseChatModel | Critic | None = None,
        reviser: str | BaseChatModel | None = None,
        log: str | Log | None = "sqlite:///cai.db",
        **settings: Any,
    ) -> None:
        super().__init__()
        if settings.get("stream", "buffer") != "buffer":
            raise ConfigError(
                "middleware gets a model's answer whole, so this one has no setting 'stream'; for blocks "
                "wrap the model instead: create_agent(constitutional(model, stream='blocks'))"
            )
        self._planned = planning(
            "ConstitutionalMiddleware()",
            constitution=constitution,
            critic=critic,
            reviser=reviser,
            log=log,
            settings=settings,
        )
        self._judged_by_others = critic is not None and reviser is not None
        self._plans: dict[int, tuple[BaseChatModel, Plan]] = {}
        chosen = Settings(**settings)
        self.shadow = Shadow(chosen) if chosen.mode == "shadow" else None
        """The background queue that judges the answers in mode `shadow`; None in other modes."""

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model in this thread, and return its response with the released answer."""
        call = _ModelCall(answer=handler)
        guard, config = self._guard(request, call), call.traced()
        response: ModelResponse[Any]
        if self.shadow is not None:
            response = guard.overheard(request, config).invoke({})
            return response
        response = bridge.run(lambda caller: self._answer(guard, request, config, caller))
        return response

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """Call the model, and return its response with the released answer."""
        call = _ModelCall(aanswer=handler)
        guard, config = self._guard(request, call), call.traced()
        response: ModelResponse[Any]
        if self.shadow is not None:
            response = await guard.overheard(request, config).ainvoke({})
        else:
            response = await self._answer(guard, request, config)
        return response

    async def _answer(
        self,
        guard: Guard,
        request: ModelRequest[Any],
        config: RunnableConfig,
        caller: bridge.Caller | None = None,
    ) -> Any:
        """Return the response with the released answer, and emit that to handlers that show an answer."""
        shown = AnswerEvents(config, [*request.messages], self.name, caller)
        try:
            response, trajectory = await guard.answer(
                request, config, {}, caller=caller, hearing=[shown.drafting]
            )
        except BaseException as error:
            if not is_pause(error):
                await shown.error(error)
            raise
        message = _turn(response)
        if message.id is None:  # the agent would assign one later, and a stream would show it twice
            message.id = str(uuid4())
        await shown.piece(in_one_piece(message, Shape(), trajectory))
        await shown.end()
        return response

    def _guard(self, request: ModelRequest[Any], call: _ModelCall) -> Guard:
        return Guard(call, self._plan(request.model), _Turn(request=request), shadow=self.shadow)

    def _plan(self, model: BaseChatModel) -> Plan:
        """Return the plan for the agent's model, which other middleware may replace from call to call.

        Raises:
            ConfigError: the model cannot judge and revise, and critic and reviser are not both given.
        """
        kept = self._plans.get(id(model))
        if kept is None or kept[0] is not model:
            judge = _chat_model_in(model)
            if judge is None and not self._judged_by_others:
                raise ConfigError(
                    f"the agent's model is a {type(model).__name__} and cannot judge and revise itself; name "
                    'critic= and reviser=, for example critic="openai:gpt-5-mini"'
                )
            if len(self._plans) >= _PLANS:
                self._plans = {}
            kept = self._plans[id(model)] = (model, self._planned(judge))
        return kept[1]


def _chat_model_in(model: Runnable[Any, Any]) -> BaseChatModel | None:
    """Return the chat model inside the bindings and fallbacks of an agent's model; None if there is none."""
    inner = layers(model)[-1]
    if isinstance(inner, RunnableWithFallbacks):
        return _chat_model_in(inner.runnable)
    return inner if isinstance(inner, BaseChatModel) else None


class _ModelCall(Runnable[ModelRequest[Any], ModelResponse[Any]]):
    """The agent's model call, including inner middleware, as the app that drafts."""

    def __init__(
        self,
        *,
        answer: Callable[[ModelRequest[Any]], ModelResponse[Any]] | None = None,
        aanswer: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]] | None = None,
    ) -> None:
        self._answer, self._aanswer = answer, aanswer
        self._node = get_config()

    def traced(self) -> RunnableConfig:
        """Return the node's configuration for the request, without LangChain's own tags and metadata."""
        metadata = self._node.get("metadata") or {}
        own = ("langgraph_", "checkpoint_ns", "ls_", "lc_")
        return RunnableConfig(
            callbacks=get_async_callback_manager_for_config(self._node),
            tags=[tag for tag in self._node.get("tags") or [] if not tag.startswith(("graph:", "seq:"))],
            metadata={key: value for key, value in metadata.items() if not key.startswith(own)},
            configurable=self._node.get("configurable") or {},
        )

    def invoke(
        self, input: ModelRequest[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> ModelResponse[Any]:
        """Call the model."""
        assert self._answer is not None
        with self._under(config):
            return self._answer(input)

    async def ainvoke(
        self, input: ModelRequest[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> ModelResponse[Any]:
        """Call the model."""
        assert self._aanswer is not None
        with self._under(config):
            return await self._aanswer(input)

    def _under(self, config: RunnableConfig | None) -> within:
        """Restore the configuration of the agent's node for the call, so that it finds runtime and store."""
        given = config or RunnableConfig()
        here: RunnableConfig = {
            **self._node,
            "callbacks": given.get("callbacks"),
            "configurable": given.get("configurable") or {},
        }
        return within(here)


@dataclass(frozen=True, kw_only=True)
class _Turn(Shape):
    """Where the conversation and the answer are in a call of the agent's model."""

    request: ModelRequest[Any]
    """The agent's request to the model."""

    def conversation(self, value: object) -> tuple[Message, ...]:
        """Return the agent's messages, with the system prompt first."""
        system = [self.request.system_message] if self.request.system_message else []
        return tuple(map(from_langchain, [*system, *self.request.messages]))

    def answer(self, output: Any) -> Message:
        """Return the answer; a structured one that was given as a tool call is returned as JSON.

        Messages that other middleware added would be released, too, so their text and calls are part of it.
        """
        found, *more = (from_langchain(m) for m in output.result if isinstance(m, AIMessage))
        if more:
            said = "\n\n".join(filter(None, map(text_of, (found, *more))))
            calls = tuple(call for message in (found, *more) for call in message.tool_calls)
            found = msgspec.structs.replace(found, content=said, tool_calls=calls)
        return found if _structured_call(output) is None else spelt_out(found)

    def form(self, output: Any) -> Form | None:
        """Return the form that a structured answer must have; None if the answer is not structured."""
        if output.structured_response is None:
            return None
        wanted, call = self.request.response_format, _structured_call(output)
        if isinstance(wanted, ProviderStrategy):
            specs = [wanted.schema_spec]
        elif isinstance(wanted, ToolStrategy):
            specs = wanted.schema_specs
        else:
            schema: Any = wanted.schema if isinstance(wanted, AutoStrategy) else wanted
            specs = ToolStrategy(schema).schema_specs
        spec = next((spec for spec in specs if call is not None and spec.name == call["name"]), specs[0])
        return Form(spec.json_schema, OutputToolBinding.from_schema_spec(spec).parse)

    def put(self, output: Any, released: Message, trajectory: Trajectory) -> Any:
        """Return the response with the released answer in the answer's place.

        Raises:
            Refused: a refusal would be released, which does not have the form of the structured answer.
        """
        message, call, form = _turn(output), _structured_call(output), self.form(output)
        if trajectory.released_from != "draft":  # it replaces all messages of the answer
            result = [m for m in output.result if m is message or not isinstance(m, AIMessage)]
            output = replace(output, result=result)
        if form is None or trajectory.released_from == "draft":
            left = super().put(message, from_langchain(message) if call else released, trajectory)
            return replace(output, result=[left if m is message else m for m in output.result])
        said = text_of(released)
        if trajectory.released_from == "refusal":
            raise Refused(f"the structured answer was refused: {said}", trajectory_id=trajectory.id)
        said = form.read(said)
        data = json.loads(said)
        structured = form.parse(data)
        released = msgspec.structs.replace(released, content=said)
        # The message contains the draft elsewhere, too: parsed, and as a call in the provider's own format.
        update: dict[str, Any] = {"additional_kwargs": {}}
        if call is not None:
            update |= {"content": "", "tool_calls": [{**call, "args": data}]}
        left = super().put(message, released, trajectory).model_copy(update=update)
        told = {"content": f"Returning structured response: {structured}"}  # LangChain's wording
        result = [m.model_copy(update=told) if isinstance(m, ToolMessage) else m for m in output.result]
        result[output.result.index(message)] = left
        return ModelResponse(result=result, structured_response=structured)

    def pack(self, output: Any) -> Any:
        """Return the response's messages, which contain its structured answer, too."""
        return {"result": output.result, "structured": output.structured_response is not None}

    def unpack(self, packed: Any) -> Any:
        """Return the response that `pack` packed."""
        response: ModelResponse[Any] = ModelResponse(result=packed["result"], structured_response=None)
        if packed["structured"]:
            response = replace(response, structured_response=packed)  # a placeholder: `form` requires one
            form = self.form(response)
            assert form is not None
            call = _structured_call(response)
            data = call["args"] if call else json.loads(form.read(shown_of(_turn(response))))
            response = replace(response, structured_response=form.parse(data))
        return response


def _turn(response: ModelResponse[Any]) -> AIMessage:
    return next(m for m in response.result if isinstance(m, AIMessage))


def _structured_call(response: ModelResponse[Any]) -> ToolCall | None:
    """Return the tool call with the structured answer; None if it was not given as a call."""
    if response.structured_response is None:
        return None
    answered = {m.tool_call_id for m in response.result if isinstance(m, ToolMessage)}
    return next((call for call in _turn(response).tool_calls if call["id"] in answered), None)
