"""Makes the HTTP clients of OpenAI and Anthropic models usable from any event loop.

These clients keep one connection pool for all models of a process, and a connection belongs to the event loop
that opened it: used from another loop it fails ("bound to a different event loop"). A critic is called from
several loops: the app's own, the bridge's under a synchronous `invoke` and in shadow mode, and a new one for
each `asyncio.run`. So each loop gets a client of its own, which is closed with the loop.

HTTP clients that the user passed to a model, for a company's certificate or proxy, must still be used, and
there is at most one synchronous and one asynchronous one. The asynchronous one belongs to the loop on which
the app is called. On any other loop, which is always one of the bridge's, a critic uses the synchronous one,
in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import cache
from types import new_class
from typing import Any, TypeVar
from weakref import WeakSet

from langchain_core.language_models import BaseChatModel

from cai_graph.concurrency import bridge

__all__ = ["for_any_loop", "on_any_loop"]

C = TypeVar("C")
M = TypeVar("M", bound=BaseChatModel)

logger = logging.getLogger("cai_graph")

_for_any_loop: WeakSet[Any] = WeakSet()
_pools: dict[str, Any] = {}
_lock = threading.Lock()


def on_any_loop(model: M) -> M:
    """Return the model with separate connections for each event loop that it is called from.

    If it was given HTTP clients or a proxy, the returned model uses its asynchronous client if it has one and
    is called on its caller's loop, and otherwise the synchronous one, in a thread; a cancelled call continues
    there until the client ends it. Models of other providers are returned unchanged.
    """
    own_async = getattr(model, "http_async_client", None)
    if (
        own_async is not None
        or getattr(model, "http_client", None)
        or getattr(model, "anthropic_proxy", None)
    ):
        sends_anywhere = own_async in _for_any_loop or type(model)._agenerate is BaseChatModel._agenerate
        if sends_anywhere or isinstance(model, _Given):
            return model
        own = model.model_copy()
        object.__setattr__(own, "__class__", _given(type(model)))
        return own
    if hasattr(model, "root_async_client"):
        root = model.root_async_client
        if root is None:
            return model
        root = root.copy(http_client=_pool(root._client))
        return model.model_copy(update={"root_async_client": root, "async_client": root.chat.completions})
    if hasattr(type(model), "_async_client"):
        own = model.model_copy()
        client = model._async_client  # type: ignore[attr-defined]
        own.__dict__["_async_client"] = client.copy(http_client=_pool(client._client))  # a cached property
        return own
    return model


def for_any_loop(client: C) -> C:
    """Mark an asynchronous HTTP client as not bound to an event loop, and return it."""
    _for_any_loop.add(client)
    return client


class _Given:
    """Mixin for the class of a model whose HTTP clients were passed in by the user; see `_given`."""

    async def _agenerate(self: Any, *args: Any, **kwargs: Any) -> Any:
        native: Any = super()
        if _goes_by_thread(self):
            return await BaseChatModel._agenerate(self, *args, **kwargs)
        return await native._agenerate(*args, **kwargs)

    async def _astream(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        native: Any = super()
        by_thread: Any = _goes_by_thread(self) and BaseChatModel._astream(self, *args, **kwargs)
        async with aclosing(by_thread or native._astream(*args, **kwargs)) as chunks:
            async for chunk in chunks:
                yield chunk


@cache
def _given(kind: type[BaseChatModel]) -> type[BaseChatModel]:
    # Same name: LangChain identifies the model to tracers and caches by its class.
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return new_class(kind.__name__, (_Given, kind), exec_body=lambda body: body.update(about))


def _goes_by_thread(model: Any) -> bool:
    has_one = getattr(model, "http_client", None) is not None
    has_asynchronous = getattr(model, "http_async_client", None) is not None
    if bridge.is_here():
        if has_asynchronous and not has_one:
            _warn_once()
        return True
    return has_one and not has_asynchronous


@cache
def _warn_once() -> None:
    logger.warning(
        "a critic or reviser with an http_async_client alone is asked by another client in mode 'shadow' and "
        "under synchronous calls, without its proxy or certificate; give it an http_client, too"
    )


def _pool(client: Any) -> Any:
    """Return an HTTP client like `client` that works on any loop; one client for all with equal settings."""
    key = f"{type(client)} {client.base_url} {client.timeout!r}"
    with _lock:
        if key not in _pools:
            _pools[key] = _per_loop(type(client), base_url=client.base_url, timeout=client.timeout)
        return _pools[key]


def _per_loop(kind: Any, **settings: Any) -> Any:
    pool = kind(**settings)
    lent: dict[asyncio.AbstractEventLoop, AsyncGenerator[Any, None]] = {}

    async def lend(loop: asyncio.AbstractEventLoop) -> AsyncGenerator[Any, None]:
        """Yield a client for this loop, closed when `asyncio.run` closes the loop's async generators."""
        client = kind(**settings)
        try:
            while True:
                yield client
        finally:
            lent.pop(loop, None)
            await client.aclose()

    async def send(request: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        # A loop runs in one thread, so no other thread adds this loop's client meanwhile.
        left = [] if loop in lent else [lent.pop(other, None) for other in list(lent) if other.is_closed()]
        client = await anext(lent.setdefault(loop, lend(loop)))
        for clients in filter(None, left):  # of loops that were closed without closing their generators
            with suppress(Exception):  # a connection of a closed loop cannot be closed cleanly
                await clients.aclose()
        return await client.send(request, **options)

    pool.send = send
    return pool
