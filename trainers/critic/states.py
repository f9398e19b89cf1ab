"""Computes hidden states with the engine that serves heads, and caches them, so that a run can resume."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph import local
from cai_graph.critic.probe import Reader, cut_request
from cai_graph.digests import sha256_of
from cai_graph.errors import ConfigError
from trainers import atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["CHATML", "Passes", "StateCache", "check_local", "reader_of"]

CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
_DEPTH = 9 / 14


class Passes(NamedTuple):
    """The passes over one request and its answer."""

    request: str
    """The user's request."""
    windows: tuple[str, ...]
    """The windows of the answer, one pass each; a single empty window if there is no answer."""


def check_local(model: str) -> None:
    """Raise ConfigError if a spec does not name a local model."""
    if local.name_in(model) is None:
        raise ConfigError(f'{model!r} is no local model; a probe reads a hidden state, so name "local"')


def reader_of(model: str, blocks: int | None, turns: tuple[str, str]) -> Reader:
    """Return a reader of a local model's hidden states; its weights are downloaded if they are missing.

    Args:
        model: "local", "local:NAME" or "local:FILE.gguf".
        blocks: number of blocks that a pass runs through; None: 9/14 of the model's.
        turns: the chat template; see `cai_graph.critic.probe.Reader`.

    Raises:
        ConfigError: the model is not local.
        ModelError: it cannot be fetched.
    """
    check_local(model)
    weights = local.weights(local.name_in(model) or "")
    return Reader(weights, sha256_of(weights), blocks or round(_DEPTH * local.block_count(weights)), turns)


class StateCache:
    """Hidden states on disk, one small file per pass, named by a digest of everything it depends on."""

    def __init__(self, reader: Reader, folder: Path | None = None) -> None:
        self.folder = folder or local.cache_dir() / "states"
        self.reader = reader
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, request: str, window: str) -> Path:
        """Return the file path of a pass; the file may not exist yet."""
        depends = [self.reader.sha256, self.reader.blocks, *self.reader.turns, cut_request(request), window]
        return self.folder / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()}.npy"

    async def extract(
        self, passes: Iterable[Passes], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Compute the states that are not on disk; `progress` gets (passes done, passes in all)."""
        wanted = list(dict.fromkeys((request, window) for request, seen in passes for window in seen))
        missing = [one for one in wanted if not self.path(*one).exists()]
        done = len(wanted) - len(missing)
        # The engine runs one pass at a time; a second one in the queue avoids idle time between them.
        slots = asyncio.Semaphore(2)

        async def fill(request: str, window: str) -> None:
            nonlocal done
            async with slots:
                await self._fill(request, window)
            done += 1
            if progress is not None:
                progress(done, len(wanted))

        if progress is not None:
            progress(done, len(wanted))
        async with asyncio.TaskGroup() as group:
            for one in missing:
                group.create_task(fill(*one))

    def load(self, passes: Sequence[Passes]) -> list[Array]:
        """Return the states of each request's windows, (windows, 2, dimensions) float64.

        The two vectors of a window are those of `cai_graph.critic.probe.States`.
        """
        import numpy

        def stacked(request: str, seen: Sequence[str]) -> Array:
            return numpy.stack(
                [numpy.load(self.path(request, window), allow_pickle=False) for window in seen]
            )

        return [stacked(*each).astype(numpy.float64) for each in passes]

    async def _fill(self, request: str, window: str) -> None:
        """Run a pass, and write its file atomically."""
        import numpy

        states = await self.reader.read(request, window)
        with atomic.file(self.path(request, window)) as work, work.open("wb") as file:
            numpy.save(file, states.vectors)
