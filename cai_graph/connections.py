"""Connections of a model's client that may be used from any event loop.

The clients of OpenAI and Anthropic keep one pool of connections for all models of a process, and a
connection belongs to the event loop that opened it: used from another loop it fails ("bound to a different
event loop"). A critic is asked from several: the app's own, the bridge's under a synchronous `invoke` and in
shadow mode, and a new one for each `asyncio.run`.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from langchain_core.language_models import BaseChatModel

__all__ = ["on_any_loop"]

M = TypeVar("M", bound=BaseChatModel)

_pools: dict[str, Any] = {}
_lock = threading.Lock()


def on_any_loop(model: M) -> M:
    """Return the model with connections of its own for each event loop that it is asked from.

    A model of another class, and one that was given an HTTP client or a proxy, is returned as it is.
    """
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


def _pool(client: Any) -> Any:
    """Return an HTTP client like `client` that sends from any loop; the same one for the same settings."""
    key = f"{type(client)} {client.base_url} {client.timeout!r}"
    with _lock:
        if key not in _pools:
            _pools[key] = _per_loop(type(client), base_url=client.base_url, timeout=client.timeout)
        return _pools[key]


def _per_loop(kind: Any, **settings: Any) -> Any:
    lock = threading.Lock()
    pool = kind(**settings)
    send_alone = pool.send
    # The first loop is the only one of most programs; it gets the pool itself.
    senders: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()
    first = True

    async def send(request: Any, **options: Any) -> Any:
        nonlocal first
        loop = asyncio.get_running_loop()
        with lock:
            if loop not in senders:
                senders[loop] = send_alone if first else kind(**settings).send
                first = False
            sender = senders[loop]
        return await sender(request, **options)

    pool.send = send
    return pool
