"""The face for chains, graphs and agents: a Runnable that answers as the wrapped one does.

    guarded = constitutional(app)          # the one line
    guarded.invoke(...)                    # same input, same output, judged and logged

What is judged is found in the app's output by its shape (`Shape`), and what leaves is put back into the
same place, so that callers see the types that they always saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler, BaseCallbackManager
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import DEFAULT_RECURSION_LIMIT, patch_config
from langchain_core.runnables.utils import ConfigurableFieldSpec
from langchain_core.tracers._streaming import _StreamingCallbackHandler, _V2StreamingCallbackHandler

from cai_graph import bridge, graph, models
from cai_graph.calls import Calls, call_of, prompt_digest, truncated
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic
from cai_graph.errors import ConfigError, DataError, RunError
from cai_graph.log import Log
from cai_graph.plan import Plan, planning
from cai_graph.trajectory import Draft, Message, Trajectory, from_langchain, text_of

if TYPE_CHECKING:
    from langchain_core.outputs import LLMResult
    from langchain_core.runnables.graph import Graph

__all__ = ["Answered", "ConstitutionalRunnable", "constitutional"]

Input = TypeVar("Input")
Output = TypeVar("Output")


def constitutional(
    app: Runnable[Input, Output],
    *,
    constitution: str | Constitution = "balanced",
    critic: str | BaseChatModel | Critic | None = None,
    reviser: str | BaseChatModel | None = None,
    log: str | Log | None = "sqlite:///cai.db",
    input_key: str | None = None,
    output_key: str | None = None,
    context_keys: Sequence[str] = (),
    **settings: Any,
) -> ConstitutionalRunnable[Input, Output]:
    """Return `app` under a constitution: each answer is judged, revised where it fails, and logged.

    Args:
        app: a chat model, or any Runnable whose output has one answer in it.
        constitution: name of a built-in one, path of a file, or a Constitution.
        critic: who judges; the wrapped chat model by default.
        reviser: who rewrites; the wrapped chat model by default.
        log: where Trajectories go, by URL; None switches logging off.
        input_key: key of the request, where the input is a dict with several candidates.
        output_key: key of the answer, where the output is a dict with several candidates.
        context_keys: keys of the output (or input) that hold material for the critic, such as documents.
        settings: fields of `Settings`, such as `on_violation="open"` or `strategy="parallel"`.

    Raises:
        ConfigError: an argument that cannot work; says which and what to do.
        ConstitutionError: the constitution cannot be read.
        LogError: the log cannot be opened.
    """
    if not isinstance(app, Runnable):
        raise ConfigError(f"constitutional() wraps a LangChain Runnable, found {type(app).__name__}")
    inner = app if isinstance(app, BaseChatModel) else None
    for role, given in (("critic", critic), ("reviser", reviser)):
        if given is None and inner is None:
            raise ConfigError(
                f"{type(app).__name__} is no chat model, so who {role}s must be said: "
                f'constitutional(app, critic=…, reviser=…), for example {role}="openai:gpt-5-mini"'
            )
    if isinstance(context_keys, str):
        raise ConfigError(f"context_keys is a list of keys, found {context_keys!r}; write [{context_keys!r}]")
    plan = planning(
        "constitutional()",
        constitution=constitution,
        critic=critic,
        reviser=reviser,
        log=log,
        settings=settings,
    )(inner)
    return ConstitutionalRunnable(app, plan, Shape(input_key, output_key, tuple(context_keys)))


class Answered(NamedTuple):
    """An answer with its record."""

    output: Any
    """What `invoke` would have returned."""
    trajectory: Trajectory
    """How it came about."""


class ConstitutionalRunnable(Runnable[Input, Output]):
    """A Runnable that answers as the wrapped one does, under a constitution. Made by `constitutional`."""

    def __init__(self, app: Runnable[Input, Output], plan: Plan, shape: Shape) -> None:
        self.app = app
        self.plan = plan
        self.shape = shape
        self.name = f"Constitutional{app.get_name()}"
        self._app_name = models.name_of(app) if isinstance(app, BaseChatModel) else None

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Answer; the wrapped app runs in this thread, critics and revisers behind it."""

        def answer(value: Input, run_manager: Any, config: RunnableConfig) -> Output:
            return bridge.run(lambda caller: self._answer(value, run_manager, config, kwargs, caller=caller))

        return self._call_with_config(answer, input, config)

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Answer."""

        async def answer(value: Input, run_manager: Any, config: RunnableConfig) -> Output:
            return await self._answer(value, run_manager, config, kwargs)

        return await self._acall_with_config(answer, input, config)

    async def answered(
        self,
        input: Input,
        config: RunnableConfig | None = None,
        *,
        source: str | None = None,
        **kwargs: Any,
    ) -> Answered:
        """Answer, and return the Trajectory beside the output. `source` is recorded in it."""
        kept: list[Trajectory] = []

        async def answer(value: Input, run_manager: Any, config: RunnableConfig) -> Output:
            return await self._answer(value, run_manager, config, kwargs, source=source, kept=kept)

        output = await self._acall_with_config(answer, input, config)
        if not kept:
            raise RunError(
                "the app waits for a person, so there is no answer yet; use ainvoke, and resume it"
            )
        return Answered(output, kept[0])

    async def _answer(
        self,
        input: Input,
        run_manager: Any,
        config: RunnableConfig,
        options: Mapping[str, Any],
        *,
        caller: bridge.Caller | None = None,
        source: str | None = None,
        kept: list[Trajectory] | None = None,
    ) -> Output:
        outputs: list[Output] = []

        async def draft(calls: Calls, node: RunnableConfig) -> Draft:
            handler = _DraftCalls(calls, self._app_name)
            # The caller's configuration, traced under the node; the graph's own must not leak into the app.
            callbacks = cast("AsyncCallbackManager", node["callbacks"]).copy()
            callbacks.add_handler(handler, inherit=True)
            under: RunnableConfig = {**config, "callbacks": callbacks}
            configurable = config.get("configurable") or {}
            under["configurable"] = {key: configurable[key] for key in configurable if key != graph.STREAM}
            if config["recursion_limit"] == DEFAULT_RECURSION_LIMIT and graph.is_graph(self.app):
                under["recursion_limit"] = graph.STEP_LIMIT  # LangChain filled in its own, which is small
            if caller is not None:

                def invoke() -> Output:
                    with graph.apart():
                        return self.app.invoke(input, under, **options)

                output = await caller.call(invoke)
            else:
                async with calls.deadline():
                    with graph.apart():
                        output = await self.app.ainvoke(input, under, **options)
            outputs.append(output)
            if isinstance(output, Mapping) and "__interrupt__" in output:
                raise graph.Paused
            answer = self.shape.answer(output)
            return Draft(answer=answer, truncated=handler.truncated)

        request = graph.Request(
            messages=self.shape.conversation(input),
            draft=draft,
            context=lambda: self.shape.context(input, outputs[0] if outputs else None),
            mode="sampled" if self.plan.settings.strategy == "sampled" else "enforce",
            source=source,
            metadata=_plain(config.get("metadata") or {}),
            tags=config.get("tags") or (),
        )
        inner = patch_config(config, callbacks=_unstreamed(run_manager.get_child()))
        try:
            ending = await graph.run(self.plan, request, inner)
        except graph.Paused:
            return outputs[0]
        if kept is not None:
            kept.append(ending.trajectory)
        output: Output = self.shape.put(outputs[0], ending.released, ending.trajectory)
        return output

    # What callers ask of a Runnable besides an answer is the wrapped app's to say.

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

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """The wrapped app's configurable fields."""
        return self.app.config_specs

    def get_graph(self, config: RunnableConfig | None = None) -> Graph:
        """Return the wrapped app's graph."""
        return self.app.get_graph(config)


def _unstreamed(callbacks: BaseCallbackManager) -> BaseCallbackManager:
    """Return the callbacks without the handlers that feed streams, so that no draft shows in one.

    Tracers stay and see every inner call. What is released reaches streams as this Runnable's own output.
    https://github.com/langchain-ai/langchain/issues/35011
    """
    for handler in [*callbacks.handlers, *callbacks.inheritable_handlers]:
        if isinstance(handler, _StreamingCallbackHandler | _V2StreamingCallbackHandler):
            callbacks.remove_handler(handler)
    return callbacks


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's metadata as JSON; what JSON cannot say is told by its repr."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return value if value == value and abs(value) != float("inf") else repr(value)
        if isinstance(value, str):
            return str(value)
        return value if value is None or isinstance(value, bool | int) else repr(value)

    return {str(key): plain(value) for key, value in metadata.items()}


class _DraftCalls(BaseCallbackHandler):
    """Admits and records the model calls that the wrapped app makes, under `name` where it is one model."""

    run_inline = True  # else each event of an asynchronous app costs a thread hop
    raise_error = True  # a call over the budget is not started

    def __init__(self, calls: Calls, name: str | None) -> None:
        self.calls = calls
        self.name = name
        self.truncated = False
        """Whether the last reply stopped at its token limit."""
        self._begun: dict[UUID, tuple[float, str, str]] = {}

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Admit a call of a chat model, and note when it begins."""
        self.calls.admit("generation")
        self._begun[run_id] = (time.perf_counter(), self._model(kwargs), prompt_digest(messages[0]))

    def on_llm_start(
        self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Admit a call of a text model, and note when it begins."""
        self.calls.admit("generation")
        self._begun[run_id] = (time.perf_counter(), self._model(kwargs), "")

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Record the call."""
        generation = response.generations[0][0] if response.generations and response.generations[0] else None
        reply = getattr(generation, "message", None)
        self.truncated = reply is not None and truncated(reply)
        self._record(run_id, reply, None)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Record the call that failed."""
        self._record(run_id, None, error)

    def _model(self, kwargs: Mapping[str, Any]) -> str:
        metadata = kwargs.get("metadata") or {}
        provider, name = metadata.get("ls_provider"), metadata.get("ls_model_name")
        return self.name or (
            f"{provider}:{name}" if provider and name else str(name or provider or "unknown")
        )

    def _record(self, run_id: UUID, reply: BaseMessage | None, error: BaseException | None) -> None:
        started, model, digest = self._begun.pop(run_id, (time.perf_counter(), "unknown", ""))
        seconds = time.perf_counter() - started
        self.calls.record(
            call_of("draft", model, reply, seconds=seconds, error=error, prompt_digest=digest or None)
        )


# --- where the request and the answer are -------------------------------------------------------------

_INPUT_KEYS = ("input", "question", "query", "prompt")
_OUTPUT_KEYS = ("answer", "output", "text")


@dataclass(frozen=True)
class Shape:
    """Where in an app's input and output the conversation, the answer and the context are."""

    input_key: str | None = None
    """Key of the request in a dict; None: `messages`, else the only one present of the usual keys."""
    output_key: str | None = None
    """Key of the answer in a dict; None: `messages`, else the only one present of the usual keys."""
    context_keys: tuple[str, ...] = ()
    """Keys of the output, or else of the input, that the critic sees as context."""

    def conversation(self, value: object) -> tuple[Message, ...]:
        """Return the conversation that an input asks in."""
        if isinstance(value, Mapping):
            value = value[self._key(value, self.input_key, _INPUT_KEYS, "input")]
        if isinstance(value, PromptValue):
            value = value.to_messages()
        if isinstance(value, str):
            return (Message(role="user", content=str(value)),)
        if isinstance(value, BaseMessage):
            return (from_langchain(value),)
        if isinstance(value, Sequence):
            return tuple(map(from_langchain, convert_to_messages(value)))
        raise DataError(
            f"the input is a {type(value).__name__}, and a request is read from a string, messages, or a "
            "dict with one of them; say where with input_key="
        )

    def answer(self, output: object) -> Message:
        """Return the answer that stands in an output."""
        found = self._answer_in(output)
        if isinstance(found, BaseMessage):
            return from_langchain(found)
        return Message(role="assistant", content=str(found))  # parsers return subclasses of str

    def context(self, given: object, output: object) -> dict[str, str]:
        """Return the context that the critic sees, by key."""
        found: dict[str, str] = {}
        for key in self.context_keys:
            for place in (output, given):
                if isinstance(place, Mapping) and key in place:
                    found[key] = _as_text(place[key])
                    break
        return found

    def put(self, output: Any, released: Message, trajectory: Trajectory) -> Any:
        """Return the output with the released answer in the answer's place."""
        kept = trajectory.released_from == "draft"
        if isinstance(output, str):
            return output if kept else text_of(released)
        if isinstance(output, BaseMessage):
            about = {"trajectory_id": trajectory.id, "outcome": trajectory.outcome.value}
            update: dict[str, Any] = {"response_metadata": {**output.response_metadata, "cai": about}}
            if trajectory.released_from == "refusal":
                # Nothing of a refused answer leaves: no image, and no call that the app would carry out.
                update |= {"content": text_of(released), "additional_kwargs": {}}
                update |= {key: [] for key in ("tool_calls", "invalid_tool_calls") if hasattr(output, key)}
            elif not kept:
                update["content"] = _in_place(output.content, text_of(released))
            return output.model_copy(update=update)
        if isinstance(output, Mapping):
            key = self._key(output, self.output_key, _OUTPUT_KEYS, "output")
            return {**output, key: self.put(output[key], released, trajectory)}
        at = _last_answer(output)
        return [*output[:at], self.put(output[at], released, trajectory), *output[at + 1 :]]

    def _answer_in(self, output: object) -> str | BaseMessage:
        if isinstance(output, Mapping):
            return self._answer_in(output[self._key(output, self.output_key, _OUTPUT_KEYS, "output")])
        if isinstance(output, str | BaseMessage):
            return output
        if isinstance(output, list) and output and all(isinstance(item, BaseMessage) for item in output):
            found: BaseMessage = output[_last_answer(output)]
            return found
        raise DataError(
            f"the app returned a {type(output).__name__}, and an answer is read from a string, a message, "
            "messages, or a dict with one of them; say where with output_key="
        )

    def _key(self, value: Mapping[str, Any], chosen: str | None, usual: Sequence[str], side: str) -> str:
        keys = ", ".join(repr(key) for key in value)
        if chosen is not None:
            if chosen not in value:
                raise DataError(f"{side}_key is {chosen!r}, and the {side} has the keys {keys}")
            return chosen
        if "messages" in value:
            return "messages"
        present = [key for key in usual if key in value]
        if len(present) != 1:
            found = "none" if not present else " and ".join(repr(key) for key in present)
            raise DataError(
                f"the {side} has the keys {keys}; exactly one of 'messages', "
                f"{', '.join(map(repr, usual))} is expected, found {found}; say which with {side}_key="
            )
        return present[0]


def _last_answer(messages: Sequence[BaseMessage]) -> int:
    for index in range(len(messages) - 1, -1, -1):
        if isinstance(messages[index], AIMessage):
            return index
    raise DataError("the app returned messages without an AI message among them; there is no answer to judge")


def _in_place(content: str | list[Any], text: str) -> str | list[Any]:
    """Return message content with its text replaced and every other part kept."""
    if isinstance(content, str):
        return text
    others = [part for part in content if not isinstance(part, str) and part.get("type") != "text"]
    return [{"type": "text", "text": text}, *others] if others else text


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return "\n\n".join(map(_as_text, value))
    page: Callable[[], str] | str | None = getattr(value, "page_content", None)
    return page if isinstance(page, str) else str(value)
