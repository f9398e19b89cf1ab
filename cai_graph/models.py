"""Model specs: turns the short string that names a chat model into the model, and a model into its name.

openai:MODEL, anthropic:MODEL    an API (or any other provider of LangChain's `init_chat_model`)
local, local:NAME                the embedded model (`cai_graph.local`): the default, one of the catalogue
local:PATH.gguf, local:FOLDER    the embedded model with the user's own weights: a file, or a checkpoint
http://HOST:PORT/v1              an OpenAI-compatible server; http://HOST:PORT/v1#MODEL when it has several

The names are those that the log records; they are stable between runs and machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable
from langchain_core.runnables.base import RunnableBindingBase

from cai_graph import local
from cai_graph.addresses import without_password
from cai_graph.concurrency import bridge
from cai_graph.errors import ConfigError, MissingExtra, ModelError

__all__ = ["cut_form", "load", "name_of", "patient", "refuses_form", "writing"]

_FORMS = (
    "openai:MODEL, anthropic:MODEL, local, local:NAME, local:PATH.gguf, local:FOLDER, "
    "http://HOST:PORT/v1 or http://HOST:PORT/v1#MODEL"
)
_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
"""Provider -> environment variable of its API key, for the providers with an extra of cai-graph."""
_RETRIES = 8
"""How often `patient` models retry a request to an API; the client waits as Retry-After asks."""

_LISTED_WITHIN_S = 10.0
"""Seconds within which a server must list its models."""


def load(spec: str, **settings: Any) -> BaseChatModel:
    """Return the chat model that a spec names. No tokens are used; a local model starts at its first request.

    Args:
        spec: one of the forms in the module's docstring.
        settings: passed to the model's class, such as `temperature`, `seed`, `max_tokens`, `timeout`.

    Raises:
        ConfigError: no such form, model or file, or the API key is missing; the message names its variable.
        MissingExtra: the package for this provider is not installed.
        ModelError: an OpenAI-compatible server did not answer when asked which model it has.
    """
    if (name := local.name_in(spec)) is not None:
        return local.chat_model(name, **settings)
    kind, colon, rest = spec.partition(":")
    if kind in {"http", "https"} and rest.startswith("//"):
        return _from_server(spec, settings)
    if colon and kind and rest:
        return _from_provider(spec, kind, rest, settings)
    raise _unknown(spec)


def patient(spec: str, *, seed: int | None = None, **settings: Any) -> BaseChatModel:
    """Return the chat model that a spec names, for unattended work: requests to an API are retried 8 times.

    Arguments and errors are those of `load`. `seed` is used for the embedded model only, since others may
    reject it. Settings that are None are not passed.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if local.name_in(spec) is None:
        given["max_retries"] = _RETRIES
    elif seed is not None:
        given["seed"] = seed
    return load(spec, **given)


def name_of(model: object) -> str:
    """Return the name under which calls of this model are recorded, stable between runs and machines.

    It is a spec where possible ("openai:gpt-5-mini", "local:qwen2.5-1.5b", "http://host:8000/v1#qwen"),
    without folders and credentials, else the name of the class. A binding has the name of its bound model.
    Never raises.
    """
    while isinstance(model, RunnableBindingBase):
        model = model.bound
    # `model` may be of any class, and no request should fail for the lack of a name.
    with contextlib.suppress(Exception):
        if isinstance(model, BaseChatModel):
            params = model._get_ls_params()
            provider, name = params.get("ls_provider"), params.get("ls_model_name")
            if name and local.is_local(model):
                return f"local:{name}"
            base_url = getattr(model, "openai_api_base", None)
            if name and provider == "openai" and base_url and urlsplit(base_url).hostname != "api.openai.com":
                return f"{without_password(base_url).rstrip('/')}#{name}"
            if name and provider:
                return f"{provider}:{name}"
    return type(model).__name__


def writing(model: BaseChatModel, schema: Mapping[str, Any]) -> Runnable[Any, AIMessage]:
    """Return a Runnable that makes the model write JSON of a schema by its provider's own means.

    These are structured output or else a forced tool call, by the model's LangChain profile. Where the
    profile lists neither, or the schema has no title, the model itself is returned.
    """
    profile = model.profile or {}
    if "title" not in schema:  # both means need a name
        return model
    if profile.get("structured_output"):
        return model.with_structured_output(dict(schema), method="json_schema", include_raw=True).pick("raw")
    if profile.get("tool_calling") and profile.get("tool_choice"):
        return model.bind_tools([dict(schema)], tool_choice=schema["title"])
    return model


def refuses_form(error: Exception) -> bool:
    """Return whether an error may mean that the provider does not support the requested reply format."""
    return getattr(error, "status_code", None) in (400, 404, 415, 422)


def cut_form(error: Exception) -> AIMessage | None:
    """Return the incomplete structured reply for which OpenAI's client raised `error`, or None."""
    reasons = {"LengthFinishReasonError": "length", "ContentFilterFinishReasonError": "content_filter"}
    reason = reasons.get(type(error).__name__)
    if reason is None:
        return None
    text = ""
    with contextlib.suppress(AttributeError, IndexError):
        text = error.completion.choices[0].message.content or ""  # type: ignore[attr-defined]
    return AIMessage(text, response_metadata={"finish_reason": reason})


def _unknown(spec: str) -> ConfigError:
    kind, _, rest = spec.partition(":")
    known = {model.name: f"local:{model.name}" for model in local.CATALOGUE}
    if kind == "trained":
        return ConfigError(
            f"{spec!r} is a critic and writes nothing; give it as the critic, not as the model"
        )
    known |= {"local": "local", **{provider: f"{provider}:{rest or 'MODEL'}" for provider in _KEYS}}
    near = [known[match] for match in difflib.get_close_matches(kind, known, n=2, cutoff=0.6)]
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ConfigError(f"{without_password(spec)!r} names no model. {hint}The forms are: {_FORMS}")


def _from_provider(spec: str, provider: str, name: str, settings: dict[str, Any]) -> BaseChatModel:
    extra = provider if provider in _KEYS else None
    try:
        from langchain.chat_models import init_chat_model
    except ImportError as error:
        raise MissingExtra(f"the model {spec!r}", "langchain", extra or "openai") from error
    try:
        model: BaseChatModel = init_chat_model(name, model_provider=provider, **settings)
    except ImportError as error:
        if extra:
            raise MissingExtra(f"the model {spec!r}", f"langchain-{provider}", extra) from error
        raise ConfigError(f"the model {spec!r} cannot be loaded: {error}") from error
    except ValueError as error:
        if "provider" in str(error) and "upported" in str(error):
            raise _unknown(spec) from error
        raise ConfigError(f"the model {spec!r} cannot be set up: {error}") from error
    except Exception as error:
        # The clients raise errors of their own at construction, most often for a missing key.
        if extra and not os.environ.get(_KEYS[extra]):
            raise _no_key(spec, extra) from error
        raise ConfigError(f"the model {spec!r} cannot be set up: {error}") from error
    # ChatAnthropic does not miss its key until the first request.
    key = getattr(model, "anthropic_api_key", None)
    if provider == "anthropic" and key is not None and not key.get_secret_value():
        raise _no_key(spec, provider)
    return model


def _no_key(spec: str, provider: str) -> ConfigError:
    return ConfigError(
        f"the model {spec!r} needs an API key; set the environment variable {_KEYS[provider]}, "
        "or use the model 'local', which needs none"
    )


def _from_server(spec: str, settings: dict[str, Any]) -> BaseChatModel:
    url, _, name = spec.partition("#")
    if not url.partition("//")[2].partition("/")[0].rpartition("@")[2].partition(":")[0]:
        raise ConfigError(
            f"{without_password(spec)!r} names no server; write http://HOST:PORT/v1 or "
            "http://HOST:PORT/v1#MODEL"
        )
    url = url.rstrip("/")
    try:
        from langchain_openai import ChatOpenAI
    except ImportError as error:
        raise MissingExtra(f"the model {without_password(spec)!r}", "langchain-openai", "openai") from error
    # OPENAI_API_KEY is sent to another host only if the user set OPENAI_BASE_URL to that host.
    paired = os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_BASE") or ""
    key = os.environ.get("OPENAI_API_KEY") if paired.rstrip("/") == url else None
    defaults = {"api_key": key or "none", "stream_usage": True, "use_responses_api": False}
    merged = {**defaults, **settings, "base_url": url}
    return ChatOpenAI(model=name or _only_model(url, str(merged["api_key"])), **merged)


def _only_model(url: str, key: str) -> str:
    """Ask an OpenAI-compatible server for its models, and return the name of the only one.

    Raises:
        ConfigError: it serves none, or several.
        ModelError: it does not answer in time, or not with a list of models.
    """
    shown = without_password(url)
    try:
        import httpx
    except ImportError as error:
        raise MissingExtra(f"the model {shown!r}", "httpx", "local") from error

    async def reply() -> Any:
        # A bound on the whole request: httpx bounds each read only, so a slow server could take for ever.
        async with asyncio.timeout(_LISTED_WITHIN_S), httpx.AsyncClient(timeout=None) as client:
            got = await client.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
        return got.raise_for_status().json()

    try:
        names = [str(entry["id"]) for entry in bridge.run(lambda _: reply())["data"]]
    except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        match error:
            case httpx.HTTPStatusError():
                said = f"status {error.response.status_code}"
            case TimeoutError():
                said = f"no whole reply within {_LISTED_WITHIN_S:g} s"
            case httpx.InvalidURL():
                said = "no valid address"  # its own words may quote a password
            case _:
                said = str(error) or type(error).__name__
        raise ModelError(
            f"cannot learn which model {shown} serves: {shown}/models: {said}; "
            f"is it running? Or name the model: {shown}#MODEL. If it wants an API key, set OPENAI_API_KEY, "
            f"and OPENAI_BASE_URL={shown}"
        ) from error
    if len(names) != 1:
        listed = ", ".join(sorted(names)[:10]) or "none"
        raise ConfigError(f"{shown} serves {len(names)} models ({listed}); choose one: {shown}#MODEL")
    return names[0]
