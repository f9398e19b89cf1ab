"""The HTTP transports to the engine: on the loopback, without proxies, certificates or idle connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cai_graph.errors import MissingExtra

if TYPE_CHECKING:
    import httpx

__all__ = ["async_transport", "httpx_module", "timeout", "transport"]


def httpx_module() -> Any:
    """Return the module httpx; raise MissingExtra where it is not installed."""
    try:
        import httpx
    except ImportError as error:
        raise MissingExtra("a local model", "httpx", "local") from error
    return httpx


def timeout() -> Any:
    """Return a long timeout, since a request may have to wait for others; callers set their own deadlines."""
    return httpx_module().Timeout(1800, connect=10)


def limits() -> Any:
    """Return connection limits that allow no idle connections.

    An idle connection would occupy a thread of the server for seconds, and one of an async client would be
    bound to the event loop that opened it.
    """
    return httpx_module().Limits(max_connections=None, max_keepalive_connections=0)


def transport() -> httpx.HTTPTransport:
    """Return a new synchronous transport."""
    # verify=False: there is no TLS on the loopback, and loading certificates costs milliseconds.
    made: httpx.HTTPTransport = httpx_module().HTTPTransport(verify=False, trust_env=False, limits=limits())
    return made


def async_transport() -> httpx.AsyncHTTPTransport:
    """Return a new asynchronous transport."""
    made: httpx.AsyncHTTPTransport = httpx_module().AsyncHTTPTransport(
        verify=False, trust_env=False, limits=limits()
    )
    return made
