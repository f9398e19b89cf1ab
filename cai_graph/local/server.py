"""llama.cpp's server on a loopback port, in a child of this process: started on first use, gone with us.

The engine is xllamacpp's server in a child of this process, not in a thread of it. Measured on xllamacpp
2026.10: its constructor keeps the GIL while the weights load (0.3 to 12 s in which no event loop and no
thread of the process runs), its destructor waits for ever while a request is in flight or after a fork, and
a failed assertion in llama.cpp aborts the whole process. A child has none of this: its stdin is a pipe from
us, and end of file there ends it, however we end. It also keeps llama.cpp's log off the user's terminal.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from cai_graph.errors import ConfigError, MissingExtra, ModelError
from cai_graph.local.cache import model_name
from cai_graph.local.loopback import async_transport, httpx_module, timeout, transport
from cai_graph.local.pool import Pool

__all__ = [
    "CONTEXT_TOKENS",
    "CONVERSATIONS",
    "Engine",
    "Mode",
    "engine",
    "require",
    "serve",
    "usable_cores",
]

logger = logging.getLogger("cai_graph.local")

Mode = Literal["chat", "embedding"]
"""What an engine does: generate text, or return the hidden state of a prompt."""

CONTEXT_TOKENS = 4096
"""A conversation's share of the memory, prompt and reply together; one that needs more borrows of others."""
CONVERSATIONS = 8
"""Conversations that a chat engine advances in one batch; more wait their turn."""


class Engine:
    """llama.cpp serving one file of weights on a loopback port; get one from `engine`.

    Attributes:
        path: the weights.
        mode: "chat" or "embedding".
        url: "http://127.0.0.1:PORT", without a trailing slash or "/v1".
        key: the bearer token that every request must carry, so that neither other users of the machine nor
            web pages in a browser can use the engine.
        pool: the memory of a chat engine, of which each request borrows what it `needs`.
    """

    def __init__(self, path: Path, mode: Mode) -> None:
        self.path = path
        self.mode: Mode = mode
        self.key = secrets.token_hex(16)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the engine
        self._process = subprocess.Popen(
            # -P: a json.py in the working directory is no part of us.
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Threads that wait for each other sleep, rather than hold the core that the last one needs.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pool = Pool(CONTEXT_TOKENS * (CONVERSATIONS if mode == "chat" else 1))
        settings = {"path": str(path), "mode": mode, **_threads(), "key": self.key}
        settings["context_tokens"] = self.pool.tokens
        try:
            # Over the pipe, since a command line can be read by other users.
            self._process.stdin.write(json.dumps({"sys_path": sys.path, **settings}).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except OSError:
            reply = b""
        except BaseException:  # an interrupt while the weights load
            self.close()
            raise
        if not reply:
            self._process.wait()
            reason = self._last_words()
            self.close()
            raise ModelError(_why_not_started(path, reason))
        self.url: str = json.loads(reply)["url"]
        self._longest: int | None = None

    def alive(self) -> bool:
        """Return whether the server still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """Stop the server at once; requests in flight fail. Closing twice is fine."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def abandon(self) -> None:
        """Let go of a server that belongs to the parent of this forked process, without ending it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pool.after_fork()
        # Our copy of the pipe would keep the server alive after the parent has gone.
        os.close(self._process.stdin.fileno())
        self._process.stdin = self._process.stdout = None
        self._process.returncode = 0  # else Popen warns about a child that is not ours

    async def hidden_states(self, tokens: Sequence[int]) -> list[list[float]]:
        """Return the model's last hidden state at every token, not normalised; no token is generated.

        Args:
            tokens: 1 to 4096 token ids; see `tokens`.

        Returns:
            One row a token, one number per dimension of the model (1536 for qwen2.5-1.5b).

        Raises:
            ModelError: there are too many tokens for the engine, or the engine is gone.
        """
        if self.mode != "embedding":
            raise ConfigError(f"hidden_states needs an engine in mode 'embedding', this one is {self.mode!r}")
        reply = await self._post("/embedding", {"content": list(tokens)})
        rows: list[list[float]] = reply[0]["embedding"]
        return rows

    async def tokens(self, text: str, *, markers: bool) -> list[int]:
        """Return the token ids of a text, without a begin-of-text token.

        Args:
            text: any text without lone surrogates.
            markers: whether markers such as <|im_end|> in it are the model's own control tokens. False for
                text that comes from outside: they are then the characters they are written with.
        """
        body = {"content": text, "add_special": False, "parse_special": markers}
        reply = await self._post("/tokenize", body)
        ids: list[int] = reply["tokens"]
        return ids

    def needs(self, request: bytes) -> int:
        """Return how many tokens of the pool a chat request fills at most; it blocks.

        That is its prompt and the longest reply that it allows, which without a limit is all that the engine
        can write. A request that cannot be counted needs none: the engine refuses it, and says why.

        Raises:
            ModelError: the prompt leaves no room for a reply, or the engine is gone.
        """
        if self._longest is None:  # no longer than what the model was trained on
            self._longest = self._ask("GET", "/props").json()["default_generation_settings"]["n_ctx"]
        reply = self._ask("POST", "/v1/chat/completions/input_tokens", request)
        if reply.status_code != 200:
            return 0
        prompt: int = reply.json()["input_tokens"]
        if prompt >= self._longest:
            raise ModelError(
                f"the prompt has {prompt:,} tokens, and {self.path.name} takes {self._longest - 1:,}; "
                "shorten it, or use a model with a longer context"
            )
        asked = json.loads(request)
        limits = [
            asked[name] for name in ("n_predict", "max_completion_tokens", "max_tokens") if asked.get(name)
        ]
        written = max(limits) if limits and min(limits) > 0 else self._longest
        return min(min(prompt + written, self._longest) * (asked.get("n") or 1), self.pool.tokens)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        httpx = httpx_module()
        with httpx.Client(timeout=timeout(), transport=transport(), headers=self._headers()) as client:
            try:
                return client.request(method, self.url + path, content=body)
            except httpx.HTTPError as error:
                raise self._gone(error) from error

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}

    def _gone(self, error: Exception) -> ModelError:
        return ModelError(f"the engine of {self.path.name} does not answer: {error!r}")

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        httpx = httpx_module()
        # trust_env=False: a proxy of the environment has no business on the loopback.
        async with httpx.AsyncClient(timeout=timeout(), transport=async_transport()) as client:
            try:
                reply = await client.post(
                    self.url + path,
                    content=json.dumps(body).encode(),
                    headers=self._headers(),
                )
            except httpx.HTTPError as error:
                raise self._gone(error) from error
        if reply.status_code != 200:
            try:
                message = reply.json()["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = reply.text[:200]
            raise ModelError(f"the engine of {self.path.name} refused {path}: {message}")
        return msgspec.json.decode(reply.content)  # hidden states are megabytes: several times faster

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-4:])


def engine(path: Path, mode: Mode) -> Engine:
    """Return this process's engine for these weights, started if it does not run yet.

    Everyone in the process who names the same file and mode shares one engine. Starting takes from half a
    second to several and blocks the caller, so call it from a thread where an event loop runs. A process
    made by fork starts its own. Threads: CAI_LOCAL_THREADS, else see `_threads`.

    Raises:
        MissingExtra: xllamacpp or httpx is not installed.
        ModelError: llama.cpp cannot load the file; says what it said.
        ConfigError: CAI_LOCAL_THREADS is no positive number.
    """
    key = (path.absolute(), mode)
    with _registry:
        lock = _starting.setdefault(key, threading.Lock())
    with lock:
        running = _engines.get(key)
        if running is not None and not running.alive():
            logger.warning("the engine of %s ended by itself; starting another", path.name)
            running.close()
            running = None
        if running is None:
            require()
            running = _engines[key] = Engine(*key)
        return running


_registry = threading.Lock()
_starting: dict[tuple[Path, Mode], threading.Lock] = {}
_engines: dict[tuple[Path, Mode], Engine] = {}


@atexit.register
def _close_all() -> None:
    while _engines:
        _engines.popitem()[1].close()


def _after_fork() -> None:
    global _registry
    _registry = threading.Lock()  # another thread of the parent may have held it
    _starting.clear()
    while _engines:
        _engines.popitem()[1].abandon()


os.register_at_fork(after_in_child=_after_fork)


def require() -> None:
    """Raise MissingExtra where what an engine needs is not installed."""
    from importlib.util import find_spec

    for package in ("xllamacpp", "httpx"):
        if find_spec(package) is None:
            raise MissingExtra("a local model", package, "local")


def _threads() -> dict[str, int]:
    """Return how many threads generate for one conversation, and how many work on more tokens at once.

    One token at a time leaves a core free; a prompt, or a token each for several conversations, takes all.
    Measured on 2 idle cores against one thread, with threads that sleep while they wait: prompts 1.8 times as
    fast, eight conversations 1.3 (135M) to 2.4 times (1.5B), one conversation 0.5 (135M) to 1.1 times. While
    other processes keep both cores busy all of it is equal but for noise; threads that spin while they wait,
    OpenMP's default, are then up to 14 times slower.
    """
    if wish := os.environ.get("CAI_LOCAL_THREADS"):
        if not wish.isdigit() or int(wish) < 1:
            raise ConfigError(f"CAI_LOCAL_THREADS is {wish!r}; give a number of threads, 1 or more")
        return {"threads": int(wish), "batch_threads": int(wish)}
    cores = usable_cores()
    return {"threads": max(1, cores - 1), "batch_threads": cores}


def usable_cores() -> int:
    """Return the cores this process may use: its affinity, and on Linux the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))  # "max" is no number: no quota
    return cores


def _why_not_started(path: Path, reason: str) -> str:
    size = path.stat().st_size / 1e9 if path.exists() else 0.0
    return (
        f"llama.cpp cannot load {path} ({size:.1f} GB): {reason or 'it gave no reason'}. "
        "If the file is whole, it may need more memory than is free, or a newer xllamacpp"
    )


_CHILD = (
    "import json, sys\n"
    "settings = json.loads(sys.stdin.readline())\n"
    "sys.path[:] = settings.pop('sys_path')\n"
    "from cai_graph.local.server import serve\n"
    "serve(**settings)\n"
)


def serve(path: str, mode: Mode, threads: int, batch_threads: int, key: str, context_tokens: int) -> None:
    """Be the engine: load the weights, tell the address on stdout, serve until stdin ends."""
    import signal

    import xllamacpp

    # Ctrl-C in a terminal reaches the whole group; the parent decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {model_name(path)}
    params.port = 0
    params.api_keys = [key]
    params.cors_origins = ""
    params.ui = False
    params.endpoint_slots = False
    params.verbosity = 1  # errors, which the parent reads when the start fails
    params.fit_params = False
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = batch_threads
    if mode == "chat":
        # One memory for all conversations, so that a long one may borrow; see `Engine.needs`.
        params.kv_unified = True
        params.n_parallel = CONVERSATIONS
        params.n_ctx = context_tokens
        # Prompts that left the pool and may come back; llama.cpp's default of 8 GB is a server's.
        params.cache_ram_mib = 512
    else:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.embd_normalize = -1
        # An embedded prompt must fit into one batch. One at a time: prompt reading fills the cores anyway.
        params.n_parallel = 1
        params.n_ctx = params.n_batch = params.n_ubatch = context_tokens
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:  # says only that it failed; llama.cpp has written why to stderr
        os._exit(1)
    sys.stdout.write(json.dumps({"url": server.listening_address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # an orderly end would wait for requests in flight
