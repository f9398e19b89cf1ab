"""A plain ChatOpenAI in front of the embedded engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cai_graph.errors import ConfigError, MissingExtra
from cai_graph.local.cache import model_name, own_file, weights
from cai_graph.local.catalogue import find
from cai_graph.local.loopback import async_transport, httpx_module, limits, timeout
from cai_graph.local.server import Engine, engine, require

if TYPE_CHECKING:
    import httpx
    from langchain_openai import ChatOpenAI

__all__ = ["chat_model", "is_local"]

MAX_REPLY_TOKENS = 1024
"""Where a reply ends if the caller sets no `max_tokens`; a small model may else repeat itself for ever."""
# Stands where ChatOpenAI wants an address; .invalid never resolves (RFC 2606), so nothing can leak to a host.
_BASE_URL = "http://local-model.invalid/v1"


def chat_model(name: str = "", **settings: Any) -> ChatOpenAI:
    """Return a ChatOpenAI that speaks to the embedded model.

    Nothing is fetched or started before its first request. It needs no API key, and no OPENAI_* or proxy
    variable of the environment reaches it. Log-probabilities, seeds, JSON schemas and token usage (streams
    included) work as with OpenAI. One instance may be used from several threads and event loops.

    Args:
        name: what `weights` takes.
        settings: any ChatOpenAI setting, such as `temperature`, `seed`, `max_tokens` (1024 if not set).

    Raises:
        ConfigError: the name is unknown or the file cannot be read.
        MissingExtra: langchain-openai, httpx or xllamacpp is not installed.
    """
    own = own_file(name)
    if own is not None:
        weights(name)  # a missing file is found now, not at the first request
    else:
        name = find(name).name
    require()
    try:
        from langchain_openai import ChatOpenAI
    except ImportError as error:
        raise MissingExtra("a local model", "langchain-openai", "local") from error
    httpx = httpx_module()

    def start() -> Engine:
        return engine(weights(name), "chat")

    synchronous, asynchronous = _transports(start)
    defaults: dict[str, Any] = {
        "model": name if own is None else model_name(str(own)),
        "stream_usage": True,
        # The engine is ours and local: what fails once fails again, and a second try doubles the load.
        "max_retries": 0,
        "timeout": timeout(),
        "stream_chunk_timeout": None,  # a stream may wait its turn behind eight others
    }
    fixed: dict[str, Any] = {
        "base_url": _BASE_URL,
        "api_key": "local",
        "organization": "",
        "openai_proxy": "",
        "http_socket_options": (),
        "use_responses_api": False,
        "http_client": httpx.Client(transport=synchronous, trust_env=False),
        "http_async_client": httpx.AsyncClient(transport=asynchronous, trust_env=False),
    }
    if "max_completion_tokens" not in settings:  # ChatOpenAI's other name for it
        defaults["max_tokens"] = MAX_REPLY_TOKENS
    if clash := sorted(settings.keys() & (fixed.keys() | {"openai_api_base", "openai_api_key"})):
        raise ConfigError(f"a local model sets {', '.join(clash)} itself; leave it out")
    return ChatOpenAI(**{**defaults, **settings, **fixed})


def is_local(model: object) -> bool:
    """Return whether a model came from `chat_model`."""
    return getattr(model, "openai_api_base", None) == _BASE_URL


def _transports(start: Callable[[], Engine]) -> tuple[httpx.BaseTransport, httpx.AsyncBaseTransport]:
    """Return transports that start the engine at the first request and send each request to it.

    A connection pool lives for one request: an idle one is of no use here (see `limits`), and so no state
    is shared between event loops.
    """
    import httpx

    def aim(request: httpx.Request, running: Engine) -> None:
        target = httpx.URL(running.url)
        request.url = request.url.copy_with(scheme=target.scheme, host=target.host, port=target.port)
        request.headers["Host"] = target.netloc.decode()
        request.headers["Authorization"] = f"Bearer {running.key}"

    class Synchronous(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            aim(request, start())
            transport = httpx.HTTPTransport(verify=False, trust_env=False, limits=limits())
            return transport.handle_request(request)

    class Asynchronous(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            aim(request, await asyncio.to_thread(start))
            return await async_transport().handle_async_request(request)

    return Synchronous(), Asynchronous()
