"""Linear heads that read from a local model's hidden state whether an answer is harmful or evasive.

One forward pass over a request and a window of its answer, as a conversation in the model's own template,
gives the hidden state of a middle layer at every token. The heads read two vectors: the mean over the
answer's tokens, and the state at the token before the answer, where the model has seen only the request.

    harm      P(the answer is harmful)                         reads both
    evasion   P(the answer refuses or evades the request)      reads the mean over the answer
    request   P(the request itself is unsafe)                  reads the token before the answer

The model is asked no question and generates no token. In experiments the mean over a middle layer generalised
to unseen sources better than the state after a question did, and an answer's text has no question to subvert.

A folder of heads contains `heads.safetensors` (for each head `NAME.weight` and `NAME.bias`, with the
standardisation and the calibration folded in) and `card.json` (the model file, how many of its blocks are
used, thresholds, data, figures). Heads work only with the model file whose SHA-256 is in the card.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph import local
from cai_graph.concurrency.threads import in_thread
from cai_graph.digests import sha256_of
from cai_graph.errors import DataError, MissingExtra, ModelError
from cai_graph.trajectory import Label, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]

__all__ = [
    "HEADS",
    "MAX_WINDOWS",
    "WHOLE_CHARACTERS",
    "Heads",
    "Probe",
    "Reader",
    "Scores",
    "Seen",
    "States",
    "by_probability",
    "cut_request",
    "read_thresholds",
    "sigmoid",
    "unread",
    "windows",
    "windows_that_fit",
]

HEADS = ("harm", "evasion", "request")

REQUEST_CHARACTERS = 500
"""Most characters of a request that are read; of a longer one, half from its beginning, half from its end."""
WINDOW_CHARACTERS = 1200
OVERLAP_CHARACTERS = 200
"""How many characters neighbouring windows share, so that each sentence is whole in one of them."""
MAX_WINDOWS = 16
"""Most windows of an answer. Of a longer one, the beginning, the end and evenly spaced windows are read."""
WHOLE_CHARACTERS = MAX_WINDOWS * (WINDOW_CHARACTERS - OVERLAP_CHARACTERS) + OVERLAP_CHARACTERS
"""The longest answer that is read completely, if each window fits into one pass; see `windows_that_fit`."""
_SMALLEST_WINDOW = 100
"""A number of characters that fits into one pass even in the scripts with most tokens per character."""
# Bounds of one pass. Only text with many tokens per character (rare scripts, noise) exceeds them.
_REQUEST_TOKENS = 500
_WINDOW_TOKENS = 1200

_FORMAT = 1
_SHIPPED = Path(__file__).with_name("heads")


class Scores(NamedTuple):
    """The heads' probabilities, in [0, 1], for one request and answer."""

    harm: float
    """P(the answer is harmful), the largest of its windows; 0 for an empty answer."""
    evasion: float
    """P(the answer refuses or evades), from its first window, where refusals are; 1 for an empty answer."""
    request: float
    """P(the request itself is unsafe)."""
    tokens: int
    """Tokens of all passes."""


class Seen(NamedTuple):
    """The parts of an answer that are read."""

    windows: tuple[str, ...]
    """The windows, one pass each, at most `MAX_WINDOWS`; a single empty one for an empty answer."""
    gap: str | None
    """Why parts of the answer are not read; None where the windows cover all of it."""


class States(NamedTuple):
    """The vectors of one forward pass that the heads read."""

    vectors: Vector
    """(2, dimensions): the mean over the answer's tokens (zeros without an answer), and the state at the
    token before the answer."""
    tokens: int
    """Tokens of the pass."""


def cut_request(request: str) -> str:
    """Return a request stripped and, if it is long, cut to its first and last part around an ellipsis.

    >>> len(cut_request("x" * 10_000))
    503
    """
    request = request.strip()
    if len(request) <= REQUEST_CHARACTERS:
        return request
    half = REQUEST_CHARACTERS // 2
    return f"{request[:half]} … {request[-half:]}"


def windows(answer: str) -> list[str]:
    """Return the windows of an answer: none for an empty one, at most `MAX_WINDOWS` for a long one.

    The first is the answer's beginning and the last its end. Up to `WHOLE_CHARACTERS`, nothing is left out.

    >>> [len(window) for window in windows("x" * 2000)]
    [1200, 1200]
    """
    answer = answer.strip()
    if len(answer) <= WINDOW_CHARACTERS:
        return [answer] if answer else []
    step = WINDOW_CHARACTERS - OVERLAP_CHARACTERS
    count = min(MAX_WINDOWS, math.ceil((len(answer) - OVERLAP_CHARACTERS) / step))
    return _spread(answer, WINDOW_CHARACTERS, count)


def unread(answer: str) -> str | None:
    """Return why parts of an answer are in none of its `windows`, or None where they cover all of it."""
    if len(answer) <= WHOLE_CHARACTERS:
        return None
    return f"the answer has {len(answer):,} characters, of which at most {WHOLE_CHARACTERS:,} are read"


async def windows_that_fit(answer: str, load: Callable[[str], Awaitable[float]]) -> Seen:
    """Return the windows of an answer, where those that do not fit into one pass are split into smaller ones.

    Args:
        answer: the answer to judge.
        load: returns how many passes a window needs: up to 1, it fits into one; infinity, it cannot be read.
    """
    gap = unread(answer)
    found: list[str] = []
    waiting = windows(answer)[::-1]
    while waiting:
        window = waiting.pop()
        filled, smallest = await load(window), len(window) <= _SMALLEST_WINDOW
        if filled <= 1 or smallest or math.isinf(filled):
            found.append(window)
            if filled > 1:
                gap = gap or f"no pass takes {len(window)} characters of the answer"
        else:
            # The overlap of the parts makes them longer by this factor.
            longer = 1 + OVERLAP_CHARACTERS / WINDOW_CHARACTERS
            count = min(math.ceil(filled * longer), math.ceil(len(window) / _SMALLEST_WINDOW))
            shared = min(OVERLAP_CHARACTERS // count, len(window) // 4)
            length = math.ceil((len(window) + (count - 1) * shared) / count)
            waiting += _spread(window, length, count)[::-1]
    if len(found) > MAX_WINDOWS:
        gap = gap or f"the answer fills {len(found)} passes, of which at most {MAX_WINDOWS} are made"
        found = [found[place] for place in _spaced(len(found) - 1, MAX_WINDOWS)]
    return Seen(tuple(found) or ("",), gap)


def _spread(text: str, length: int, count: int) -> list[str]:
    """Return `count` evenly spaced windows of a text, the first at its beginning, the last at its end."""
    return [text[start : start + length] for start in _spaced(len(text) - length, count)]


def _spaced(last: int, count: int) -> list[int]:
    """Return `count` numbers, at least two, from 0 to `last`."""
    return [round(index * last / (count - 1)) for index in range(count)]


def sigmoid(logit: float) -> float:
    """Return the probability of a logit, clamped to -700 … 700 so that its exponential does not overflow."""
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))


def by_probability(
    probability: float,
    threshold: float,
    read_by: str,
    gap: str | None,
    *,
    aim: str | None = None,
    principle: str | None = None,
) -> Verdict:
    """Return the verdict for P(VIOLATES): VIOLATES from the threshold on, else COMPLIES.

    `gap` is the reason why parts of the answer were not read, such as `Seen.gap`. With a reason, the verdict
    is UNREADABLE where it would be COMPLIES.
    """
    label = Label.VIOLATES if probability >= threshold else Label.COMPLIES
    if label is Label.COMPLIES and gap is not None:
        return Verdict(label=Label.UNREADABLE, aim=aim, principle=principle, reason=gap)
    return Verdict(label=label, aim=aim, principle=principle, probability=probability, read_by=read_by)


class Reader:
    """Runs forward passes through the first blocks of a local model, for the training and the use of heads.

    Args:
        weights: the model's GGUF file.
        sha256: its SHA-256.
        blocks: how many blocks a pass runs. A shortened file with these is stored in the local cache.
        turns: the text before the request and between request and answer, in the model's chat template.
        shortened_sha256: the SHA-256 of the shortened file; None if that is not known yet.
    """

    def __init__(
        self,
        weights: Path,
        sha256: str,
        blocks: int,
        turns: tuple[str, str],
        shortened_sha256: str | None = None,
    ) -> None:
        self.weights = weights
        self.sha256 = sha256
        self.blocks = blocks
        self.turns = turns
        self.shortened_sha256 = shortened_sha256
        self._starting = threading.Lock()
        _live.add(self)
        self._shortened: Path | None = None
        self._turn_tokens: tuple[list[int], list[int]] | None = None

    async def read(self, request: str, window: str) -> States:
        """Return the states of one pass over a request and a window of its answer ("" for none).

        Both texts are tokenised as plain text, so that a control token spelled out in them has no effect. A
        request with too many tokens is cut to its first and last tokens, a window to its first; see `load`.

        Raises:
            ModelError: the engine cannot start or does not answer.
            MissingExtra: the extra `local` is not installed.
        """
        numpy = _numpy()
        engine = await in_thread(self._engine)
        if self._turn_tokens is None:
            before, between = [await engine.tokens(turn, markers=True) for turn in self.turns]
            self._turn_tokens = before, between
        before, between = self._turn_tokens
        asked = await engine.tokens(_valid(cut_request(request)), markers=False)
        if len(asked) > _REQUEST_TOKENS:
            asked = asked[: _REQUEST_TOKENS // 2] + asked[-_REQUEST_TOKENS // 2 :]
        answered = (await engine.tokens(_valid(window), markers=False))[:_WINDOW_TOKENS] if window else []
        head = [*before, *asked, *between]
        tokens = [*head, *answered]
        rows = numpy.asarray(await engine.hidden_states(tokens), dtype=numpy.float32)
        start = rows[len(head) - 1]
        mean = rows[len(head) :].mean(axis=0) if answered else numpy.zeros_like(start)
        return States(numpy.stack([mean, start]), len(tokens))

    async def load(self, window: str) -> float:
        """Return how many passes a window of an answer needs; up to 1, this is only an upper bound.

        Raises:
            ModelError: the engine cannot start or does not answer.
            MissingExtra: the extra `local` is not installed.
        """
        if window.isascii() and len(window) <= _WINDOW_TOKENS:
            return len(window) / _WINDOW_TOKENS  # each token has at least one character: no need to count
        engine = await in_thread(self._engine)
        return len(await engine.tokens(_valid(window), markers=False)) / _WINDOW_TOKENS

    def _engine(self) -> local.Engine:
        with self._starting:
            if self._shortened is None:
                self._shortened = self.shorten()
            return local.engine(self._shortened, "embedding")

    def shorten(self) -> Path:
        """Return the file of the first blocks. It is written first if it is missing or has a wrong SHA-256.

        Raises:
            ModelError: it cannot be written, or the weights are not those of `sha256`.
        """
        path = local.cache_dir() / f"{self.sha256[:16]}-first-{self.blocks}-blocks.gguf"
        if path.exists() and self.shortened_sha256 in (None, sha256_of(path)):
            return path
        try:
            written = local.first_blocks(self.weights, self.blocks, path)
        except (OSError, DataError) as error:
            raise ModelError(f"cannot write the first {self.blocks} blocks to {path}: {error}") from error
        if self.shortened_sha256 not in (None, written):
            path.unlink()
            raise ModelError(f"{self.weights}: is not the file of sha256 {self.sha256}; fetch it again")
        return path


_live: weakref.WeakSet[Reader] = weakref.WeakSet()


def _after_fork() -> None:
    for reader in _live:
        reader._starting = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


class Heads:
    """Linear heads for one model file, and the forward passes that they read. Reads may run concurrently.

    Args:
        folder: a folder of heads; see the module.
        weights: the model's GGUF file, or its name in the catalogue, which is downloaded at the first read.
        names: the heads that the folder must contain; None for those that the card names.

    Raises:
        DataError: the folder's content is damaged, or of a format that this release does not read.
        MissingExtra: the extra `local` is not installed.
    """

    def __init__(self, folder: Path, weights: Path | str, names: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.card = read_card(folder)
        self._weights = weights
        found = tuple(self.card["heads"]) if names is None else names
        self._heads = _read_heads(folder, found)
        self.thresholds: Mapping[str, float] = read_thresholds(self.card, found, folder / "card.json")
        """For each head, the probability from which it says yes, chosen by cross-validation; see the card."""
        self._opened: Reader | None = None

    async def seen(self, answer: str) -> Seen:
        """Return the parts of an answer that are read.

        Raises:
            ModelError: the model cannot be fetched, started or used.
        """
        return await windows_that_fit(answer, (await self._reader()).load)

    async def passes(self, request: str, seen: Sequence[str]) -> list[States]:
        """Run one pass for each window of an answer, after its request, and return the states.

        Raises:
            ModelError: the model cannot be fetched, started or used.
        """
        reader = await self._reader()
        return await asyncio.gather(*(reader.read(request, window) for window in seen))

    def probability(self, head: str, states: States) -> float:
        """Return the calibrated probability in [0, 1] that a head gives for one pass."""
        weight, bias = self._heads[head]
        if weight.shape != states.vectors.shape:
            raise ModelError(f"{self.folder}: {head} has shape {weight.shape}, not {states.vectors.shape}")
        return sigmoid(float((states.vectors * weight).sum()) + bias)

    async def _reader(self) -> Reader:
        if self._opened is None:
            self._opened = await in_thread(self.reader)
        return self._opened

    def reader(self) -> Reader:
        """Return a Reader of the states for these heads; the model is downloaded if it is not there."""
        weights = local.weights(self._weights) if isinstance(self._weights, str) else self._weights
        before, between = self.card["turns"]
        return Reader(
            weights,
            self.card["model"]["sha256"],
            self.card["blocks"],
            (before, between),
            self.card["shortened_sha256"],
        )


class Probe(Heads):
    """The built-in heads of one model file; see `Heads`."""

    def __init__(self, folder: Path, weights: Path | str) -> None:
        super().__init__(folder, weights, HEADS)

    @classmethod
    def for_model(cls, spec: str | Path) -> Probe | None:
        """Return the shipped heads of a local model, or None if there are none for it.

        Args:
            spec: "local", "local:NAME", "local:FILE.gguf", "local:FOLDER" or a file; None is returned for any
                other model. A file is matched by its SHA-256, not by its name. Nothing is downloaded.

        Raises:
            DataError: the heads on disk are damaged.
            MissingExtra: there are heads, but the extra `local` is not installed.
        """
        found = _resolve(spec)
        if found is None:
            return None
        weights, size, sha256 = found
        for path in sorted(_SHIPPED.glob("*/card.json")):
            model = read_card(path.parent)["model"]
            # The size is compared first, since hashing a gigabyte takes time.
            if model["size"] != size:
                continue
            if sha256 is None and isinstance(weights, Path):
                sha256 = sha256_of(weights)
            if model["sha256"] == sha256:
                return cls(path.parent, weights)
        return None

    async def read(self, request: str, answer: str) -> Scores:
        """Return the heads' scores of an answer to a request. Both may be untrusted text of any length.

        Raises:
            ModelError: the model cannot be fetched, started or used.
        """
        return await self.scores(request, (await self.seen(answer)).windows)

    async def scores(self, request: str, seen: Sequence[str]) -> Scores:
        """Return the heads' scores of an answer to a request.

        Args:
            request: the user's request.
            seen: the windows of the answer; see `Seen`.

        Raises:
            ModelError: the model cannot be fetched, started or used.
        """
        passes = await self.passes(request, seen)
        empty = not seen[0]
        return Scores(
            harm=0.0 if empty else max(self.probability("harm", states) for states in passes),
            evasion=1.0 if empty else self.probability("evasion", passes[0]),
            request=self.probability("request", passes[0]),
            tokens=sum(states.tokens for states in passes),
        )


def read_card(folder: Path) -> dict[str, Any]:
    """Return the card of a folder of heads.

    Raises:
        DataError: it is missing, damaged, or of a format that this release does not read.
    """
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; train the heads again") from error
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        found = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise DataError(f"{path}: format {found!r}, this release reads {_FORMAT}; train the heads again")
    model, turns = card.get("model"), card.get("turns")
    sound = (
        isinstance(model, dict)
        and isinstance(model.get("sha256"), str)
        and isinstance(model.get("size"), int)
        and isinstance(card.get("shortened_sha256"), str)
        and isinstance(card.get("blocks"), int)
        and isinstance(turns, list)
        and [type(turn) for turn in turns] == [str, str]
        and isinstance(card.get("heads"), dict)
    )
    if not sound:
        raise DataError(
            f"{path}: model, blocks, turns, shortened_sha256 or heads are missing; train the heads again"
        )
    return card


def read_thresholds(card: Mapping[str, Any], names: Iterable[str], path: Path) -> dict[str, float]:
    """Return the threshold of each of the heads `names`, from the card at `path`.

    Raises:
        DataError: one is missing, or not between 0 and 1.
    """
    found = {}
    for name in names:
        head = card["heads"].get(name)
        value = head.get("threshold") if isinstance(head, dict) else None
        if not isinstance(value, float) or not 0 < value < 1:
            raise DataError(f"{path}: threshold of {name!r} is {value!r}, not between 0 and 1")
        found[name] = value
    return found


def _read_heads(folder: Path, names: Sequence[str]) -> dict[str, tuple[Vector, float]]:
    numpy = _numpy()
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise MissingExtra("the probe", "safetensors", "local") from error
    path = folder / "heads.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read: {error}; train the heads again") from error
    heads = {}
    for name in names:
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        if weight is None or bias is None:
            raise DataError(f"{path}: has no head {name!r}; train the heads again")
        if weight.ndim != 2 or len(weight) != 2 or bias.size != 1:
            raise DataError(
                f"{path}: head {name!r} has shapes {weight.shape} and {bias.shape}, not (2, n) and (1,)"
            )
        if not (numpy.isfinite(weight).all() and numpy.isfinite(bias).all()):
            raise DataError(f"{path}: head {name!r} holds a number that is not finite; train the heads again")
        heads[name] = (weight.astype(numpy.float32), float(bias.reshape(())))
    return heads


def _resolve(spec: str | Path) -> tuple[Path | str, int, str | None] | None:
    """Return (file or catalogue name, size, SHA-256 if known) of a local model; None for any other."""
    if isinstance(spec, str):
        if (model := local.model_of(spec)) is not None:
            return model.name, model.size, model.sha256
        name = local.name_in(spec)
        if name is None:
            return None
        path = Path(name).expanduser()
        spec = path if name.lower().endswith(".gguf") else path / local.EXPORTED
    try:
        return spec, spec.stat().st_size, None
    except OSError:
        return None


def _valid(text: str) -> str:
    """Return the text with a question mark for each lone surrogate, which tokenizers reject."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise MissingExtra("the probe", "numpy", "local") from error
    return numpy
