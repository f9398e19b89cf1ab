"""What the whole suite stands on: a closed network, the tiny model, logs, and servers on the loopback."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from postgres_server import Server
from wire import Script, serving
from wire import Server as ModelServer

from cai_graph import local
from cai_graph.log import Log, open_log

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}

# How long an example takes says nothing on a machine that is shared.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def _network_closed() -> Iterator[None]:
    """Let this process connect to the loopback only.

    The one download the suite may make (the tiny model, below) is pip's, in a process of its own.
    """
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: object) -> None:
        if isinstance(host, bytes):
            host = host.decode()
        if host is not None and host not in _LOOPBACK:
            raise OSError(f"the test suite has no network: connection to {host!r} refused")

    def guarded(real: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return real(self, address)

        return call

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(connect))
        patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


@pytest.fixture(autouse=True, scope="session")
def _interrupts_are_heard() -> None:
    """Hear Ctrl-C as in a terminal, and so do the processes the tests start.

    A shell has what it puts in the background ignore it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, address or proxy of the developer reaches a test; nothing is traced to a server."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "ANTHROPIC_", "LANGSMITH_", "LANGCHAIN_")) or name.lower() in {
            "http_proxy",
            "https_proxy",
            "all_proxy",
        }:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_weights() -> Path:
    """The tiny model, fetched once into the user's cache the way a user fetches it (98 MB)."""
    return local.fetch(local.find("smollm2"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL of this session, started when a test first asks for it."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_log(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """A function that gives the URL of a log that does not exist yet, another one at each call."""
    numbers = itertools.count(1)
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/log{next(numbers)}.db"
    server: Server = request.getfixturevalue("postgres")
    return lambda: server.url(server.database(next(numbers)))


@pytest.fixture
def url(new_log: Callable[[], str]) -> str:
    """The URL of a log that does not exist yet."""
    return new_log()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A new log in SQLite."""
    with open_log(tmp_path / "cai.db") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def serve() -> Iterator[Callable[[Script], ModelServer]]:
    """A function that starts a server of models, another one at each call."""
    with contextlib.ExitStack() as servers:
        yield lambda script: servers.enter_context(serving(script))
