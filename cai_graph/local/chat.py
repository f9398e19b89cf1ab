"""The chat model of the embedded engine: a ChatOpenAI whose requests are sent to the local server."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_graph.concurrency.connections import for_any_loop
from cai_graph.concurrency.threads import in_thread
from cai_graph.errors import ConfigError, MissingExtra
from cai_graph.local.cache import model_name, own_file, weights
from cai_graph.local.catalogue import find
from cai_graph.local.loopback import async_transport, httpx_module, timeout, transport
from cai_graph.local.pool import Loan
from cai_graph.local.server import Engine, engine, require

if TYPE_CHECKING:
    import httpx
    from langchain_openai import ChatOpenAI

__all__ = ["chat_model", "is_local", "own_weights"]

MAX_REPLY_TOKENS = 1024
"""Default of `max_tokens`; without a limit a small model may repeat itself for ever."""
# A placeholder for ChatOpenAI; .invalid never resolves (RFC 2606), so nothing can be sent to another host.
_BASE_URL = "http://local-model.invalid/v1"


def chat_model(name: str = "", **settings: Any) -> ChatOpenAI:
    """Return a ChatOpenAI that calls the embedded model.

    Nothing is downloaded or started before its first request. It needs no API key, and ignores OPENAI_* and
    proxy variables of the environment. Log-probabilities, seeds, JSON schemas and token usage (in streams,
    too) work as with OpenAI. One instance may be used from several threads and event loops. A request waits
    until the engine has room for its prompt and its longest possible reply (`max_tokens`; with None that is
    as much as the engine can write, so that the request may have to run alone). A prompt that is too long
    raises ModelError.

    Args:
        name: a name as `weights` takes it.
        settings: any ChatOpenAI setting, such as `temperature`, `seed`, `max_tokens` (1024 if not set).

    Raises:
        ConfigError: the name is unknown or the file cannot be read.
        MissingExtra: langchain-openai, httpx or xllamacpp is not installed.
    """
    # Check the user's own file now, not at the first request.
    own = None if own_file(name) is None else weights(name)
    if own is None:
        name = find(name).name
    require()
    try:
        from langchain_openai import ChatOpenAI
    except ImportError as error:
        raise MissingExtra("a local model", "langchain-openai", "local") from error
    httpx = httpx_module()

    def start() -> Engine:
        return engine(own or weights(name), "chat")

    synchronous, asynchronous = _transports(start)
    defaults: dict[str, Any] = {
        "model": name if own is None else model_name(str(own)),
        "stream_usage": True,
        # No retries: a local request that failed would fail again, and would double the load.
        "max_retries": 0,
        "timeout": timeout(),
        "stream_chunk_timeout": None,  # a stream may have to wait for eight others
    }
    fixed: dict[str, Any] = {
        "base_url": _BASE_URL,
        "api_key": "local",
        "organization": "",
        "openai_proxy": "",
        "http_socket_options": (),
        "use_responses_api": False,
        "http_client": httpx.Client(transport=synchronous, trust_env=False),
        "http_async_client": for_any_loop(httpx.AsyncClient(transport=asynchronous, trust_env=False)),
    }
    if "max_completion_tokens" not in settings:  # ChatOpenAI's other name for it
        defaults["max_tokens"] = MAX_REPLY_TOKENS
    if clash := sorted(settings.keys() & (fixed.keys() | {"openai_api_base", "openai_api_key"})):
        raise ConfigError(f"a local model sets {', '.join(clash)} itself; leave it out")
    if own is not None:
        _own_weights[fixed["http_client"]] = own
    return ChatOpenAI(**{**defaults, **settings, **fixed})


def is_local(model: object) -> bool:
    """Return whether a model came from `chat_model`."""
    return getattr(model, "openai_api_base", None) == _BASE_URL


def own_weights(model: object) -> Path | None:
    """Return the user's own file behind a model by `chat_model`; None for a model of any other kind."""
    return _own_weights.get(getattr(model, "http_client", None)) if is_local(model) else None


# Keyed by the HTTP client, which all copies of a model share, since a model's name does not have the folder.
_own_weights: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


def _transports(start: Callable[[], Engine]) -> tuple[httpx.BaseTransport, httpx.AsyncBaseTransport]:
    """Return transports that start the engine at the first request and send each request to it.

    Each request has a connection pool of its own: idle connections are of no use here (see `limits`), and so
    no state is shared between event loops.
    """
    import httpx

    def aim(request: httpx.Request) -> Loan:
        running = start()
        target = httpx.URL(running.url)
        request.url = request.url.copy_with(scheme=target.scheme, host=target.host, port=target.port)
        request.headers["Host"] = target.netloc.decode()
        request.headers["Authorization"] = f"Bearer {running.key}"
        return running.pool.ask(running.needs(request.content))

    class Reply(httpx.SyncByteStream, httpx.AsyncByteStream):
        """A reply together with its request's loan of the pool, which ends when the reply is closed."""

        def __init__(self, stream: Any, loan: Loan) -> None:
            self._stream = stream
            self._loan = loan

        def __iter__(self) -> Iterator[bytes]:
            yield from self._stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for part in self._stream:
                yield part

        def close(self) -> None:
            try:
                self._stream.close()
            finally:
                self._loan.end()

        async def aclose(self) -> None:
            try:
                await self._stream.aclose()
            finally:
                self._loan.end()

    class Synchronous(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            loan = aim(request)
            try:
                loan.result()
                response = transport().handle_request(request)
            except BaseException:
                loan.end()
                raise
            response.stream = Reply(response.stream, loan)
            return response

    class Asynchronous(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            loan = await in_thread(aim, request)
            try:
                await asyncio.wrap_future(loan)
                response = await async_transport().handle_async_request(request)
            except BaseException:
                loan.end()
                raise
            response.stream = Reply(response.stream, loan)
            return response

    return Synchronous(), Asynchronous()
