"""Runs llama.cpp's server on a loopback port, in a child process that ends with this one.

The engine is xllamacpp's server in a child process, not in a thread of this one. Measured on xllamacpp
2026.10: its constructor keeps the GIL while the weights load (0.3 to 12 s in which no event loop and no
thread of the process runs), its destructor waits for ever while a request is in flight or after a fork, and
a failed assertion in llama.cpp aborts the whole process. A child process avoids this. Its stdin is a pipe
from this process, and it exits at the end of file there, however this process ends. It also keeps llama.cpp's
log off the user's terminal.
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
"""The use of an engine: to generate text, or to return the hidden state of a prompt."""

CONTEXT_TOKENS = 4096
"""A request's share of the context memory, for prompt and reply; one that needs more uses others' shares."""
CONVERSATIONS = 8
"""Requests that a chat engine processes in one batch; others wait."""


class Engine:
    """llama.cpp serving one file of weights on a loopback port; get one from `engine`.

    Attributes:
        path: the weights.
        mode: "chat" or "embedding".
        url: "http://127.0.0.1:PORT", without a trailing slash or "/v1".
        key: the bearer token that every request must contain, so that neither other users of the machine nor
            web pages in a browser can use the engine.
        pool: the context memory of a chat engine, of which each request borrows as much as it `needs`.
    """

    def __init__(self, path: Path, mode: Mode) -> None:
        self.path = path
        self.mode: Mode = mode
        self.key = secrets.token_hex(16)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the engine
        self._process = subprocess.Popen(
            # -P: do not import from the working directory, where there may be a json.py.
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Threads that wait for each other sleep, instead of occupying the core that the last one needs.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pool = Pool(CONTEXT_TOKENS * (CONVERSATIONS if mode == "chat" else 1))
        settings = {"path": str(path), "mode": mode, **_threads(), "key": self.key}
        settings["context_tokens"] = self.pool.tokens
        try:
            # Over the pipe, since other users can read a command line.
            self._process.stdin.write(json.dumps({"sys_path": sys.path, **settings}).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except OSError:
            reply = b""
        except BaseException:  # such as Ctrl-C while the weights load
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
        """Return whether the server is still running."""
        return self._process.poll() is None

    def close(self) -> None:
        """Stop the server at once; requests in flight fail. May be called twice."""
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
        """Release a server that belongs to the parent of this forked process, without stopping it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pool.after_fork()
        # This process's copy of the pipe would keep the server running after the parent has ended.
        os.close(self._process.stdin.fileno())
        self._process.stdin = self._process.stdout = None
        self._process.returncode = 0  # otherwise Popen warns about a child that is not ours

    async def hidden_states(self, tokens: Sequence[int]) -> list[list[float]]:
        """Return the model's last hidden state at every token, not normalised; no token is generated.

        Args:
            tokens: 1 to 4096 token ids; see `tokens`.

        Returns:
            One row a token, one number per dimension of the model (1536 for qwen2.5-1.5b).

        Raises:
            ModelError: there are too many tokens for the engine, or the engine does not answer.
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
            markers: whether markers such as <|im_end|> in it become the model's control tokens. False for
                untrusted text, in which they are tokenised as plain characters.
        """
        body = {"content": text, "add_special": False, "parse_special": markers}
        reply = await self._post("/tokenize", body)
        ids: list[int] = reply["tokens"]
        return ids

    def needs(self, request: bytes) -> int:
        """Return how many tokens of the pool a chat request needs at most. Blocks.

        They are its prompt and its longest possible reply, which without a limit is as much as the engine can
        write. It is 0 for a request that the engine cannot count: the engine will reject it with a reason.

        Raises:
            ModelError: the prompt leaves no room for a reply, or the engine does not answer.
        """
        if self._longest is None:  # the engine's limit, at most the context the model was trained on
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
        # The transport ignores proxies of the environment (trust_env=False), which do not apply here.
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
        return msgspec.json.decode(reply.content)  # hidden states are megabytes, and msgspec is faster

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-4:])


def engine(path: Path, mode: Mode) -> Engine:
    """Return this process's engine for these weights; start it if it is not running yet.

    All callers in the process share one engine for each file and mode. Starting takes half a second to
    several seconds and blocks the caller, so under an event loop call it in a thread. A forked process starts
    engines of its own. CAI_LOCAL_THREADS sets the number of threads; see `_threads` for the default.

    Raises:
        MissingExtra: xllamacpp or httpx is not installed.
        ModelError: llama.cpp cannot load the file; the message has its reason.
        ConfigError: CAI_LOCAL_THREADS is not a positive number.
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
    """Raise MissingExtra where a package that an engine needs is not installed."""
    from importlib.util import find_spec

    for package in ("xllamacpp", "httpx"):
        if find_spec(package) is None:
            raise MissingExtra("a local model", package, "local")


def _threads() -> dict[str, int]:
    """Return the number of threads for generating one token at a time, and for batches of more tokens.

    The first leaves one core free; the second, for prompts and for several requests at once, uses all cores.
    Measured on 2 idle cores, relative to one thread, with threads that sleep while they wait: prompts 1.8
    times as fast, eight requests 1.3 (135M) to 2.4 times (1.5B), one request 0.5 (135M) to 1.1 times. While
    other processes keep both cores busy, there is no difference beyond noise; but threads that spin while
    they wait, OpenMP's default, are then up to 14 times slower.
    """
    if wish := os.environ.get("CAI_LOCAL_THREADS"):
        if not wish.isdigit() or int(wish) < 1:
            raise ConfigError(f"CAI_LOCAL_THREADS is {wish!r}; give a number of threads, 1 or more")
        return {"threads": int(wish), "batch_threads": int(wish)}
    cores = usable_cores()
    return {"threads": max(1, cores - 1), "batch_threads": cores}


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity and, on Linux, its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))  # "max", no quota, raises ValueError
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
    """Run the server in the child: load the weights, write the address to stdout, serve until stdin ends."""
    import signal

    import xllamacpp

    # Ctrl-C in a terminal goes to the whole process group; the parent decides when this process ends.
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
        # One context memory for all requests, so that a long one can use more of it; see `Engine.needs`.
        params.kv_unified = True
        params.n_parallel = CONVERSATIONS
        params.n_ctx = context_tokens
        # The cache of earlier prompts in MiB; llama.cpp's default of 8 GB suits dedicated servers.
        params.cache_ram_mib = 512
    else:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.embd_normalize = -1
        # A prompt to embed must fit into one batch. One request at a time, since it uses all cores anyway.
        params.n_parallel = 1
        params.n_ctx = params.n_batch = params.n_ubatch = context_tokens
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:  # has no reason; llama.cpp has written it to stderr
        os._exit(1)
    sys.stdout.write(json.dumps({"url": server.listening_address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # an orderly exit would wait for requests in flight
