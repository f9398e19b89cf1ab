"""The user's own critics: loads what `cai train critic` wrote, and judges answers with it.

    critic = TrainedCritic(Path("my-critic"))        # or the spec "trained:my-critic"
    guarded = constitutional(app, critic=critic, …)

A critic gives P(VIOLATES) for each aim or principle that it was trained on. It runs forward passes and
generates no text. The folder's `card.json` contains its kind:

    probe        linear heads on a local model's hidden state; one pass per window of the answer (probe.py)
    classifier   a sequence classifier over request, window and the text of an aim or principle; one pass for
                 each window and aim or principle. It loads torch when it first judges (extra `train`)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cai_graph import local
from cai_graph.calls import Calls
from cai_graph.concurrency.threads import in_thread
from cai_graph.constitution import Constitution, Principle
from cai_graph.critic.probe import (
    Heads,
    Seen,
    by_probability,
    cut_request,
    read_thresholds,
    sigmoid,
    windows,
    windows_that_fit,
)
from cai_graph.errors import ConfigError, DataError, MissingExtra, ModelError
from cai_graph.prompts import Exchange, fence
from cai_graph.trajectory import Critique, text_of

__all__ = ["PREFIX", "Classifier", "TrainedCritic", "classifier_text", "load_of", "logits_of"]

PREFIX = "trained:"
"""Prefix of such a critic's spec; the folder follows."""
_FORMAT = 1
_BATCH = 8


class _Reads(Protocol):
    """The model of a trained critic, which gives the probabilities."""

    def passes(self, seen: int, abouts: int) -> int:
        """Return how many forward passes `seen` windows and `abouts` aims or principles take per request."""
        ...

    async def seen(self, requests: Sequence[str], answer: str, abouts: Sequence[str]) -> Seen:
        """Return the parts of an answer that are read."""
        ...

    async def read(
        self, request: str, seen: Sequence[str], abouts: Sequence[str]
    ) -> tuple[dict[str, float], int]:
        """Return P(VIOLATES) by aim or principle, the largest of the windows' values, and the tokens read."""
        ...


class TrainedCritic:
    """Judges answers with a critic that `cai train critic` made. Answers may be judged concurrently.

    A principle is judged under its id where the critic was trained on that, else under its aim. The critic
    must have been trained on one of the two: no principle is skipped. Where there are several user messages,
    the answer is read after the last one and after all of them joined, and the larger probability counts.
    COMPLIES becomes UNREADABLE where parts of the answer are not read (see `Seen.gap`), and where a principle
    is about tools and the answer calls some, since this critic does not read tool calls.

    Args:
        folder: the folder that `cai train critic` wrote.

    Raises:
        DataError: the folder's content is damaged, or of a format that this release does not read.
        MissingExtra: it is a probe, and the extra `local` is not installed.
    """

    candidates = 3
    splits = False
    writes = False
    """Whether it can criticise in prose, which strategy `sampled` needs."""

    def __init__(self, folder: Path) -> None:
        card, content = _read_card(folder)
        self.kind: str = card["kind"]
        self.name = f"{PREFIX}{folder.resolve().name}#{hashlib.sha256(content).hexdigest()[:8]}"
        self.thresholds: Mapping[str, float] = read_thresholds(card, card["heads"], folder / "card.json")
        """P(VIOLATES) from which an answer violates, by aim or principle."""
        self._reads: _Reads = _Probe(folder, card) if self.kind == "probe" else Classifier(folder, card)

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        """Judge an answer under all principles; see `cai_graph.critic.critic.Critic.critique`.

        Raises:
            ConfigError: the critic was trained neither on a principle nor on its aim; the message names them.
            ModelError: the model cannot be loaded or used.
            MissingExtra: it is a classifier, and the extra `train` is not installed.
        """
        judged = self._judged(constitution)
        text, requests, abouts = text_of(exchange.answer), exchange.requests, list(judged)

        def passes(seen: int) -> int:
            return len(requests) * self._reads.passes(seen, len(abouts))

        least = passes(max(1, len(windows(text))))
        async with calls.forward("critique", self.name, least) as forward:
            seen = await self._reads.seen(requests, text, abouts)
            calls.admit("forward", passes(len(seen.windows)) - least)
            read = [await self._reads.read(request, seen.windows, abouts) for request in requests]
            forward.tokens = sum(tokens for _, tokens in read)
        verdicts = []
        for about, principles in judged.items():
            gap = seen.gap
            if exchange.answer.tool_calls and any(principle.tools for principle in principles):
                gap = "the answer calls tools, of which this critic reads nothing"
            field = "principle" if about in constitution else "aim"
            verdicts.append(
                by_probability(
                    max(found[about] for found, _ in read),
                    self.thresholds[about],
                    self.kind,
                    gap,
                    **{field: about},
                )
            )
        return Critique(verdicts=tuple(verdicts), critic=self.name)

    async def discuss(
        self, exchange: Exchange, principle: Principle, constitution: Constitution, calls: Calls
    ) -> Critique:
        """Raise ConfigError, since this critic cannot write prose."""
        raise ConfigError(f"the critic {self.name} writes no prose; use another strategy than 'sampled'")

    def _judged(self, constitution: Constitution) -> dict[str, list[Principle]]:
        """Return the ids and aims to judge, each with the principles that its verdict covers."""
        judged: dict[str, list[Principle]] = {}
        missing = []
        for principle in constitution.principles:
            about = next((one for one in (principle.id, principle.aim) if one in self.thresholds), None)
            if about is None:
                missing.append(f"{principle.id} (aim {principle.aim})")
            else:
                judged.setdefault(about, []).append(principle)
        if missing:
            raise ConfigError(
                f"the critic {self.name} was trained on {', '.join(self.thresholds)}, and not on "
                f"{', '.join(missing)}; train it on verdicts about these, or take a constitution without them"
            )
        return judged


class _Probe:
    """Linear heads on a local model's hidden state."""

    def __init__(self, folder: Path, card: Mapping[str, Any]) -> None:
        spec = card["model"].get("spec")
        name = local.name_in(spec) if isinstance(spec, str) else None
        if name is None:
            raise DataError(f"{folder / 'card.json'}: model.spec is {spec!r}, no local model; train it again")
        self._heads = Heads(folder, name)

    def passes(self, seen: int, abouts: int) -> int:
        return seen

    async def seen(self, requests: Sequence[str], answer: str, abouts: Sequence[str]) -> Seen:
        return await self._heads.seen(answer)

    async def read(
        self, request: str, seen: Sequence[str], abouts: Sequence[str]
    ) -> tuple[dict[str, float], int]:
        states = await self._heads.passes(request, seen)
        found = {about: max(self._heads.probability(about, each) for each in states) for about in abouts}
        return found, sum(each.tokens for each in states)


class Classifier:
    """A sequence classifier in `folder/model`, with a calibration and a text for each aim or principle.

    Args:
        folder: the critic's folder.
        card: its card, with `scale`, `shift` and `text` by aim or principle in `heads`, and the `max_tokens`
            of a text in `model`.
    """

    def __init__(self, folder: Path, card: Mapping[str, Any]) -> None:
        heads = card["heads"]
        longest = card["model"].get("max_tokens") if isinstance(card.get("model"), dict) else None
        if not isinstance(longest, int):
            raise DataError(f"{folder / 'card.json'}: has no model.max_tokens; train the critic again")
        for about, head in heads.items():
            numbers = [head.get("scale"), head.get("shift")]
            if not all(isinstance(one, float) and math.isfinite(one) for one in numbers) or not isinstance(
                head.get("text"), str
            ):
                raise DataError(
                    f"{folder / 'card.json'}: {about!r} has no scale, shift and text; train the critic again"
                )
        self.folder = folder / "model"
        self._max_tokens = longest
        self._heads = heads
        self._one = threading.Lock()
        _live.add(self)
        self._loaded: tuple[Any, Any] | None = None

    def passes(self, seen: int, abouts: int) -> int:
        """Return the number of pairs of a window and an aim or principle: one pass each."""
        return seen * abouts

    async def seen(self, requests: Sequence[str], answer: str, abouts: Sequence[str]) -> Seen:
        """Return windows of an answer that each fit into a text with every request, aim and principle."""
        beside = [(self._heads[about]["text"], request) for request in requests for about in abouts]

        async def load(window: str) -> float:
            return await in_thread(self._load_of, window, beside)

        return await windows_that_fit(answer, load)

    async def read(
        self, request: str, seen: Sequence[str], abouts: Sequence[str]
    ) -> tuple[dict[str, float], int]:
        """Return P(VIOLATES) by aim or principle, the largest of the windows' values, and the tokens read."""
        texts = [
            classifier_text(self._heads[about]["text"], request, window)
            for about in abouts
            for window in seen
        ]
        logits, tokens = await in_thread(self._logits, texts)
        found = {}
        for place, about in enumerate(abouts):
            head = self._heads[about]
            logit = max(logits[place * len(seen) : (place + 1) * len(seen)])
            found[about] = sigmoid(head["scale"] * logit + head["shift"])
        return found, tokens

    def _logits(self, texts: Sequence[str]) -> tuple[list[float], int]:
        with self._one:
            return logits_of(*self._open(), texts, self._max_tokens)

    def _load_of(self, window: str, beside: Sequence[tuple[str, str]]) -> float:
        with self._one:
            _, tokenizer = self._open()
            return max(load_of(tokenizer, *each, window, self._max_tokens) for each in beside)

    def _open(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = load_classifier(self.folder)
        return self._loaded


_live: weakref.WeakSet[Classifier] = weakref.WeakSet()


def _after_fork() -> None:
    for classifier in _live:
        classifier._one = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def classifier_text(about: str, request: str, window: str) -> str:
    """Return a classifier's input: the aim's or principle's text, the request, and a window of the answer."""
    return "\n".join(
        (fence("rules", about), fence("question", cut_request(request)), fence("answer", window))
    )


def load_classifier(folder: Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a sequence classifier with one label.

    Raises:
        MissingExtra: torch or transformers is not installed.
        ModelError: the folder contains no such model.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtra("a classifier as a critic", "torch and transformers", "train") from error
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded as a classifier: {error}") from error
    if model.config.num_labels != 1:
        raise ModelError(f"{folder}: has {model.config.num_labels} labels, and a critic has one")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_of(tokenizer: Any, about: str, request: str, window: str, max_tokens: int) -> float:
    """Return how many texts of `max_tokens` a window needs, each with the request and the aim or principle.

    Up to 1, `logits_of` reads the whole window; infinity, the rest leaves no room for one.
    """
    without, whole = (
        len(tokenizer(classifier_text(about, request, shown), verbose=False)["input_ids"])
        for shown in ("", window)
    )
    room = max_tokens - without
    return (whole - without) / room if room > 0 else math.inf


def logits_of(model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[list[float], int]:
    """Return a logit for each text, and the number of tokens read; a longer text is cut at its end."""
    import torch

    encoded = [tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] for text in texts]
    order = sorted(range(len(texts)), key=lambda place: len(encoded[place]))
    found = [0.0] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            batch = tokenizer.pad(
                {"input_ids": [encoded[place] for place in places]}, padding_side="right", return_tensors="pt"
            ).to(model.device)
            for place, logit in zip(places, model(**batch).logits[:, 0].tolist(), strict=True):
                found[place] = logit
    if not all(math.isfinite(logit) for logit in found):
        raise ModelError("the classifier gives a logit that is not finite; train it again")
    return found, sum(map(len, encoded))


def _read_card(folder: Path) -> tuple[dict[str, Any], bytes]:
    path = folder / "card.json"
    try:
        content = path.read_bytes()
        card = json.loads(content)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; name a folder that `cai train critic` wrote"
        ) from error
    if (
        not isinstance(card, dict)
        or card.get("format") != _FORMAT
        or card.get("kind") not in ("probe", "classifier")
    ):
        kind = card.get("kind") if isinstance(card, dict) else type(card).__name__
        raise DataError(f"{path}: is no card of a critic (kind {kind!r}); `cai train critic` writes one")
    heads = card.get("heads")
    if not isinstance(heads, dict) or not heads:
        raise DataError(f"{path}: names no aim or principle; train the critic again")
    return card, content
