"""Connections of a model's client that may be used from any event loop.

The clients of OpenAI and Anthropic keep one pool of connections for all models of a process, and a
connection belongs to the event loop that opened it: used from another loop it fails ("bound to a different
event loop"). A critic is asked from several: the app's own, the bridge's under a synchronous `invoke` and in
shadow mode, and a new one for each `asyncio.run`. So each has a client of its own, closed with the loop.

A client that was given for synchronous calls only, with a company's certificate or proxy, is the way to the
provider all the same. A model with such a one is asked in a thread, by its synchronous client.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import cache
from types import new_class
from typing import Any, TypeVar

from langchain_core.language_models import BaseChatModel

__all__ = ["on_any_loop"]

M = TypeVar("M", bound=BaseChatModel)

_pools: dict[str, Any] = {}
_lock = threading.Lock()


def on_any_loop(model: M) -> M:
    """Return the model with connections of its own for each event loop that it is asked from.

    One that was given a synchronous HTTP client alone comes back as a model that sends by that client, from a
    thread; a call that is given up goes on there until the client ends it. A model of another class, and one
    that was given an asynchronous HTTP client or a proxy, is returned as it is.
    """
    if getattr(model, "http_client", None) is not None and getattr(model, "http_async_client", None) is None:
        if type(model)._agenerate is BaseChatModel._agenerate:  # it sends from a thread as it is
            return model
        own = model.model_copy()
        object.__setattr__(own, "__class__", _in_a_thread(type(model)))
        return own
    if getattr(model, "http_async_client", None) is None and hasattr(model, "root_async_client"):
        root = model.root_async_client
        if root is None:
            return model
        root = root.copy(http_client=_pool(root._client))
        return model.model_copy(update={"root_async_client": root, "async_client": root.chat.completions})
    if hasattr(type(model), "_async_client") and not getattr(model, "anthropic_proxy", None):
        own = model.model_copy()
        client = model._async_client  # type: ignore[attr-defined]
        own.__dict__["_async_client"] = client.copy(http_client=_pool(client._client))  # a cached property
        return own
    return model


@cache
def _in_a_thread(kind: type[BaseChatModel]) -> type[BaseChatModel]:
    """Return the class without native asynchronous calls, so that LangChain sends them by the synchronous."""
    native = {"_agenerate": BaseChatModel._agenerate, "_astream": BaseChatModel._astream}
    # Of the same name: by its class LangChain tells tracers and caches which model it is.
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return new_class(kind.__name__, (kind,), exec_body=lambda body: body.update({**about, **native}))


def _pool(client: Any) -> Any:
    """Return an HTTP client like `client` that sends from any loop; the same one for the same settings."""
    key = f"{type(client)} {client.base_url} {client.timeout!r}"
    with _lock:
        if key not in _pools:
            _pools[key] = _per_loop(type(client), base_url=client.base_url, timeout=client.timeout)
        return _pools[key]


def _per_loop(kind: Any, **settings: Any) -> Any:
    pool = kind(**settings)
    lent: dict[asyncio.AbstractEventLoop, AsyncGenerator[Any, None]] = {}

    async def lend(loop: asyncio.AbstractEventLoop) -> AsyncGenerator[Any, None]:
        """Yield a client of the loop's own, which is closed with it: `asyncio.run` closes its generators."""
        client = kind(**settings)
        try:
            while True:
                yield client
        finally:
            lent.pop(loop, None)
            await client.aclose()

    async def send(request: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        # A loop runs in one thread, so no other adds it meanwhile.
        left = [] if loop in lent else [lent.pop(other, None) for other in list(lent) if other.is_closed()]
        client = await anext(lent.setdefault(loop, lend(loop)))
        for clients in filter(None, left):  # of loops that were closed without their generators
            with suppress(Exception):  # a connection cannot say goodbye in a closed loop
                await clients.aclose()
        return await client.send(request, **options)

    pool.send = send
    return pool
