"""Checks this installation for `cai doctor`: packages, SQLite, models, API keys, disks and cores."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cai_graph import installed, local

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["Check", "checks"]

Status = Literal["ok", "warn", "missing"]

SQLITE_FIXED = (3, 51, 3)
"""First SQLite release without the bug through which two writers could corrupt a database in WAL mode."""
SQLITE_AFFECTED = (3, 7, 0)
"""First release with that bug, which introduced WAL. https://sqlite.org/wal.html#walresetbug"""

_LOW_DISK = 2_000_000_000
_SLOW_FSYNC_S = 0.05


@dataclass(frozen=True)
class Check:
    """One line of `cai doctor`."""

    name: str
    """What was checked."""
    status: Status
    """"ok"; "warn": works, with the restriction that `found` describes; "missing": cannot be used."""
    found: str
    """What was found: a version, a path, a number. Never a secret."""
    remedy: str = ""
    """What to do about it; empty where there is nothing to do."""


def checks() -> list[Check]:
    """Run every check of this installation, and return the results in the order of `cai doctor`.

    It reads versions, the cache and the environment, and writes one small temporary file to time the disk. It
    opens no connection and starts no model.
    """
    return [
        _python(),
        *_packages(),
        *_sqlite(),
        *_models(),
        *_keys(),
        *_disks(),
        _cores(),
        _fsync(),
    ]


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Check]:
    """Check the packages of the base and of each extra, as listed in the metadata of cai-graph."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata("cai-graph")
    except importlib.metadata.PackageNotFoundError:
        yield Check("cai-graph", "warn", "not installed", installed.command())
        return
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    yield _versions("base packages", [r for r in required if r.marker is None], installed.command())
    for extra in metadata.get_all("Provides-Extra") or []:
        if extra == "dev":
            continue
        chosen = [r for r in required if r.marker is not None and r.marker.evaluate({"extra": extra})]
        own = [r for r in chosen if r.name != "cai-graph"]  # an extra within an extra has its own line
        yield _versions(f"extra [{extra}]", own, installed.command(extra))


def _versions(name: str, required: list[Requirement], remedy: str) -> Check:
    found: list[str] = []
    status: Status = "ok"
    for requirement in sorted(required, key=lambda r: r.name):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{requirement.name} missing")
            status = "missing"
            continue
        if requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
        else:
            found.append(f"{requirement.name} {version} (needs {requirement.specifier})")
            status = "warn" if status == "ok" else status
    return Check(name, status, ", ".join(found), "" if status == "ok" else remedy)


def _sqlite() -> Iterator[Check]:
    import sqlite3

    try:
        import apsw

        from cai_graph.log.sqlite import SQLITE_NEEDED
    except ImportError:
        yield Check("sqlite of the log", "missing", "apsw is not installed", installed.command())
    else:
        version = apsw.sqlite_lib_version()
        if _release(version) < SQLITE_NEEDED:
            needed = ".".join(map(str, SQLITE_NEEDED))
            yield Check(
                "sqlite of the log",
                "missing",
                f"{version} (apsw), and a log needs {needed}",
                f'pip install --upgrade "apsw>={needed}"',
            )
        else:
            yield Check("sqlite of the log", "ok", f"{version} (apsw)")
    own = sqlite3.sqlite_version
    if SQLITE_AFFECTED <= _release(own) < SQLITE_FIXED:
        yield Check(
            "sqlite of python",
            "ok",
            f"{own}, which has the WAL bug; cai_graph does not use it",
            "do not let programs that use Python's sqlite3 write to a log",
        )
    else:
        yield Check("sqlite of python", "ok", own)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


def _models() -> Iterator[Check]:
    for model in local.CATALOGUE:
        name = f"model local:{model.name}"
        path = local.cache_dir() / model.file
        get = f"cai model get {model.name}"
        if local.cached(model) is not None:
            yield Check(name, "ok", f"{path}, {model.size / 1e6:,.0f} MB, hash verified")
        elif path.exists():
            yield Check(name, "warn", f"{path} is not the file of the catalogue", get)
        else:
            found = f"not fetched ({model.size / 1e6:,.0f} MB)"
            partial = path.with_name(path.name + ".partial")
            if partial.exists():
                found += f"; {partial.stat().st_size / 1e6:,.0f} MB of it are there"
            yield Check(name, "missing", found, get)


def _keys() -> Iterator[Check]:
    for variable in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        if os.environ.get(variable):
            yield Check(variable, "ok", "set")
        else:
            provider = variable.partition("_")[0].lower()
            yield Check(variable, "missing", "not set", f"set it to use {provider}:… models")


def _disks() -> Iterator[Check]:
    for name, folder in (("disk of the model cache", local.cache_dir()), ("disk of this folder", Path.cwd())):
        there = folder
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        found = f"{free / 1e9:,.1f} GB free at {folder}"
        if free < _LOW_DISK:
            yield Check(
                name, "warn", found, f"free {_LOW_DISK / 1e9:.0f} GB, or set CAI_CACHE to another disk"
            )
        else:
            yield Check(name, "ok", found)


def _cores() -> Check:
    cores = local.usable_cores()
    threads = os.environ.get("CAI_LOCAL_THREADS")
    found = f"{cores} usable" + (f", CAI_LOCAL_THREADS={threads}" if threads else "")
    if cores == 1:
        return Check("cores", "warn", found, "the local model will be slow; give the process more cores")
    return Check("cores", "ok", found)


def _fsync() -> Check:
    """Time an fsync in this folder: what each acknowledged append to a log costs at least."""
    name = "fsync of this folder"
    times = []
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()) as file:
            for _ in range(5):
                file.write(b"\0" * 4096)
                start = time.perf_counter()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - start)
    except OSError as error:
        return Check(name, "warn", f"cannot write here: {error.strerror}", "name a log in a writable folder")
    median = sorted(times)[len(times) // 2]
    found = f"{median * 1e3:.1f} ms"
    if median > _SLOW_FSYNC_S:
        return Check(name, "warn", found, "each acknowledged append waits so long; a local disk is faster")
    return Check(name, "ok", found)
