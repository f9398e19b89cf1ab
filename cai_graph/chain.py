"""The main entry point: `constitutional` wraps an app in an object with the same interface.

guarded = constitutional(app)          # the one line
guarded.invoke(...)                    # same input, same output, judged and logged
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable

from cai_graph.constitution import Constitution
from cai_graph.critic import Critic
from cai_graph.faces.chat import ConstitutionalChatModel
from cai_graph.faces.guard import Guard
from cai_graph.faces.runnable import Answered, ConstitutionalRunnable
from cai_graph.faces.shadowed import ShadowedChatModel
from cai_graph.faces.typed import Typed, form_asked
from cai_graph.log import Log
from cai_graph.review import Checkpointer

__all__ = ["Answered", "ConstitutionalChatModel", "ConstitutionalRunnable", "constitutional"]

Input = TypeVar("Input")
Output = TypeVar("Output")


@overload
def constitutional(
    app: BaseChatModel,
    *,
    constitution: str | Constitution = ...,
    critic: str | BaseChatModel | Critic | None = ...,
    reviser: str | BaseChatModel | None = ...,
    log: str | Log | None = ...,
    checkpointer: Checkpointer | None = ...,
    **settings: Any,
) -> ConstitutionalChatModel: ...


@overload
def constitutional(
    app: Runnable[Input, Output],
    *,
    constitution: str | Constitution = ...,
    critic: str | BaseChatModel | Critic | None = ...,
    reviser: str | BaseChatModel | None = ...,
    log: str | Log | None = ...,
    input_key: str | None = ...,
    output_key: str | None = ...,
    context_keys: Sequence[str] = ...,
    checkpointer: Checkpointer | None = ...,
    **settings: Any,
) -> ConstitutionalRunnable[Input, Output]: ...


def constitutional(
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
) -> ConstitutionalChatModel | ConstitutionalRunnable[Any, Any]:
    """Return `app` under a constitution: each answer is judged, revised where it fails, and logged.

    Args:
        app: a chat model, or any Runnable whose output has one answer in it.
        constitution: name of a built-in one, path of a file, or a Constitution.
        critic: the judge, a model spec, chat model or Critic; the wrapped chat model by default.
        reviser: the chat model (or its spec) that rewrites; the wrapped chat model by default.
        log: URL of the log of Trajectories, or a Log; None switches logging off.
        input_key: key of the request, where the input is a dict with several candidates.
        output_key: key of the answer, where the output is a dict with several candidates.
        context_keys: keys of the output (or input) that hold material for the critic, such as documents.
        checkpointer: a LangGraph checkpointer; policy `human` stores requests that wait for a person in it.
        settings: fields of `Settings`, such as `on_violation="open"` or `strategy="parallel"`.

    Returns:
        A chat model where `app` is one, else a Runnable.

    Raises:
        ConfigError: an argument cannot work; the message names it and says what to do.
        ConstitutionError: the constitution cannot be read.
        LogError: the log cannot be opened.
    """
    guard = Guard.of(
        app,
        constitution=constitution,
        critic=critic,
        reviser=reviser,
        log=log,
        input_key=input_key,
        output_key=output_key,
        context_keys=context_keys,
        checkpointer=checkpointer,
        **settings,
    )
    if isinstance(app, BaseChatModel):
        face: type[ConstitutionalChatModel]
        face = ConstitutionalChatModel if guard.shadow is None else ShadowedChatModel
        return face(guard)
    if (form := form_asked(app, {})) is not None:
        guard = replace(guard, shape=Typed(input_key, output_key, tuple(context_keys), wanted=form))
    return ConstitutionalRunnable(guard)
