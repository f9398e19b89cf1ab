"""The stage that trains a critic from verdicts: it gives P(VIOLATES) by aim or principle, and writes no text.

    verdicts        the rows of a dataset of the kind `critic`: labels by critics and by people, whose labels
                    take precedence
    train           a probe (linear heads on a local model's hidden state) or a classifier (LoRA on a small
                    torch model), calibrated, measured, in a folder that `cai_graph.critic.trained` loads

Rows used for measuring are never trained on: the dataset's test part, other folds by request, and the judges
that the config names as unseen. A judge is the origin of a label: a critic, a reviewer, a source of labels.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cai_graph import constitution as constitutions
from cai_graph.critic.probe import windows, windows_that_fit
from cai_graph.critic.trained import TrainedCritic, classifier_text, load_of, logits_of
from cai_graph.digests import sha256_of
from cai_graph.errors import ConfigError
from trainers import atomic, markdown
from trainers.config import above, at_least, plain, require
from trainers.critic import heads as fitting
from trainers.critic.figures import (
    Curve,
    Figure,
    calibration,
    figures_of,
    plot_reliability,
    table,
)
from trainers.critic.heads import FOLDS, Head, Platt
from trainers.critic.states import CHATML, Passes, StateCache, check_local, reader_of
from trainers.critic.verdicts import Labels
from trainers.stages import Lora

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Config", "train"]

OnProgress = Callable[[int, int], None]

_FIRST = {"probe": f"{FOLDS} folds by request", "classifier": "a fifth of the requests"}
"""The data that threshold and calibration are determined on, by kind."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a run; all of it is written into the card."""

    model: str
    """A local model ("local", "local:NAME", "local:FILE.gguf"); for a classifier also a folder with
    safetensors and tokenizer, or a name on the hub."""
    data: Path
    """A folder of `cai dataset build --kind critic`, in the format jsonl or parquet."""
    output: Path
    """The folder to create: weights, `card.json`, `CARD.md`, `reliability.svg`."""
    kind: Literal["probe", "classifier"] = "probe"
    """Linear heads on the hidden state, or a sequence classifier."""
    constitution: str | None = None
    """Classifier: a constitution, by name or file, whose critique requests replace ids of principles in its
    input; None: it reads the ids themselves. Aims are used as they are."""
    unseen: tuple[str, ...] = ()
    """Judges whose rows are only measured on, never trained on."""
    false_alarms: float = 0.05
    """Share of the complying answers that a threshold may flag, in (0, 1)."""
    seed: int = 0
    """Seed of folds, bootstrap, order of rows and adapters."""
    blocks: int | None = None
    """Probe: number of the model's blocks that a pass runs through; None: 9/14 of them."""
    turns: tuple[str, str] = CHATML
    """Probe: text before the request and between request and answer, in the model's chat template."""
    penalty: float = 500.0
    """Probe: L2 penalty on the weights of standardised dimensions (1/C of scikit-learn)."""
    lora: Lora = field(default_factory=Lora)
    """Classifier: its adapters; the head is trained in full."""
    learning_rate: float = 2e-4
    """Classifier: highest learning rate, of AdamW; it decreases linearly to zero."""
    epochs: int = 3
    """Classifier: passes over the data."""
    batch_size: int = 8
    """Classifier: rows per update."""
    max_tokens: int = 512
    """Classifier: maximum tokens of a text; a longer one is cut at its end."""

    def __post_init__(self) -> None:
        at_least(1, self, "epochs", "batch_size", "max_tokens")
        above(0, self, "learning_rate", "penalty")
        if not 0 < self.false_alarms < 1:
            raise ConfigError(f"false_alarms is a share between 0 and 1, found {self.false_alarms!r}")


# ---- the run


class _Fitted(NamedTuple):
    """The result of training one kind of critic."""

    heads: dict[str, dict[str, Any]]
    """The card's entry for each aim or principle."""
    model: dict[str, Any]
    """The card's entries about the model."""
    figures: list[Figure]
    """All measured figures."""
    panels: dict[str, tuple[float, list[Curve]]]
    """Panels of the reliability plot: threshold and curves, by aim or principle."""


def train(config: Config, progress: OnProgress | None = None) -> Path:
    """Train a critic, calibrate and measure it, and return its folder, which appears complete or not at all.

    An interrupted probe resumes, since states are cached; a classifier starts again.

    Args:
        config: see `Config`.
        progress: called with (passes or updates done, all of them), starting at zero.

    Raises:
        ConfigError: the output exists, the model is of the wrong kind, or `unseen` names an unknown judge.
        DataError: the data cannot be read, or no aim or principle has enough labels of both kinds.
        ModelError: the model cannot be used, or its loss is not finite.
        MissingExtra: the extra `train` is not installed.
    """
    atomic.absent(config.output)
    if config.kind == "probe":
        check_local(config.model)
    needed = ("torch", "transformers", "peft") if config.kind == "classifier" else ()
    require("`cai train critic`", "numpy", "safetensors", "sklearn", "matplotlib", *needed)
    data = Labels(config.data, config.unseen)
    with atomic.folder(config.output) as folder:
        fitted = (_probe if config.kind == "probe" else _classifier)(config, data, folder, progress)
        card = {
            "format": 1,
            "kind": config.kind,
            **fitted.model,
            "heads": fitted.heads,
            "settings": plain(
                dataclasses.replace(config, data=Path(config.data.name), output=Path(config.output.name))
            ),
            "data": _counts(data),
            "left_out": {"disagreement": data.disagreed, "too few": data.too_few},
            "figures": [figure.rounded() for figure in fitted.figures],
        }
        (folder / "card.json").write_text(
            json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (folder / "CARD.md").write_text(_card(card), encoding="utf-8")
        plot_reliability(folder / "reliability.svg", fitted.panels)
        TrainedCritic(folder)  # raises now if it cannot be loaded again
    return config.output


def _measured(
    about: str, setting: str, scores: Array, y: Array, groups: Array, platt: Platt, seed: int
) -> list[Figure]:
    """Return AUC, rates at the threshold and calibration error on some rows; none if they have one label."""
    found = [
        *figures_of(about, setting, scores, y, groups, seed=seed),
        *figures_of(about, setting, scores, y, groups, cut=platt.cut, seed=seed),
    ]
    if found:
        found.append(calibration(about, setting, platt.probabilities(scores), y))
    return found


# ---- a probe


def _probe(config: Config, data: Labels, folder: Path, progress: OnProgress | None) -> _Fitted:
    import numpy

    reader = reader_of(config.model, config.blocks, config.turns)
    cache = StateCache(reader)
    passes = [Passes(one.request, tuple(windows(one.answer)) or ("",)) for one in data.rows]
    asyncio.run(cache.extract(passes, progress))
    states = cache.load(passes)

    def of(rows: Array) -> list[Array]:
        return [states[row] for row in rows]

    def fitted(rows: Array) -> Head:
        return fitting.fit(fitting.inputs(of(rows)), data.y[rows], data.judges[rows], config.penalty)

    heads: dict[str, Head] = {}
    figures: list[Figure] = []
    panels: dict[str, tuple[float, list[Curve]]] = {}
    for about in data.abouts:
        rows = numpy.flatnonzero(data.trained & (data.about == about))
        y, groups = data.y[rows], data.groups[rows]
        scores = fitting.out_of_fold(
            partial(_fit_kept, fitted, rows), of(rows), y, groups, largest=True, seed=config.seed
        )
        everything = numpy.ones(len(rows), bool)
        head = fitting.calibrate(fitted(rows), about, scores, y, everything, config.false_alarms)
        heads[about] = head
        figures += _measured(about, _FIRST["probe"], scores, y, groups, head.platt, config.seed)
        curves = [Curve("out of fold", head.platt.probabilities(scores), y)]
        for setting, measured in data.settings(about):
            found = fitting.scores(head, of(measured), largest=True) if len(measured) else numpy.zeros(0)
            truth = data.y[measured]
            figures += _measured(about, setting, found, truth, data.groups[measured], head.platt, config.seed)
            if 0 < truth.sum() < len(truth):
                curves.append(Curve(setting, head.platt.probabilities(found), truth))
        panels[about] = head.platt.threshold, curves
        for judge in sorted(set(data.judges[rows])):
            here = data.judges[rows] == judge
            kept, left = rows[~here & ~numpy.isin(groups, groups[here])], rows[here]
            if len(set(data.y[kept])) == len(set(data.y[left])) == 2:
                scores = fitting.scores(fitted(kept), of(left), largest=True)
                setting = f"left out: {judge}"
                figures += figures_of(
                    about, setting, scores, data.y[left], data.groups[left], seed=config.seed
                )
    fitting.write_heads(folder / "heads.safetensors", heads)
    model = {
        "model": {
            "spec": config.model,
            "file": reader.weights.name,
            "sha256": reader.sha256,
            "size": reader.weights.stat().st_size,
        },
        "blocks": reader.blocks,
        "shortened_sha256": sha256_of(reader.shorten()),
        "turns": list(config.turns),
    }
    entries = {about: {"threshold": round(head.platt.threshold, 4)} for about, head in heads.items()}
    return _Fitted(entries, model, figures, panels)


def _fit_kept(fitted: Callable[[Array], Head], rows: Array, kept: Array) -> Head:
    return fitted(rows[kept])


# ---- a classifier


def _classifier(config: Config, data: Labels, folder: Path, progress: OnProgress | None) -> _Fitted:
    """Train on four fifths of the requests; calibrate and measure on the last fifth."""
    import numpy

    from trainers.critic.classifier import Texts, fit

    texts = _texts(config, data.abouts)
    rows = numpy.flatnonzero(data.trained)
    kept, left = fitting.folds(data.y[rows], data.groups[rows], config.seed)[0]
    kept, left = rows[kept], rows[left]

    def read(row: int, window: str) -> str:
        one = data.rows[row]
        return classifier_text(texts[one.about], one.request, window)

    # A row has the same weight within its aim or principle as in a probe; aims and principles weigh equally.
    weights = numpy.zeros(len(kept))
    for about in data.abouts:
        mine = data.about[kept] == about
        if mine.any():
            weights[mine] = fitting.weights(data.y[kept][mine], data.judges[kept][mine]) / mine.sum()
    weights *= len(kept) / weights.sum()
    first = [read(row, (windows(data.rows[row].answer) or [""])[0]) for row in kept]
    model, tokenizer = fit(
        Texts(first, data.y[kept].tolist(), weights.tolist()), config, folder / "model", progress
    )

    def fitted(row: int) -> tuple[str, ...]:
        one = data.rows[row]

        async def load(window: str) -> float:
            return load_of(tokenizer, texts[one.about], one.request, window, config.max_tokens)

        return asyncio.run(windows_that_fit(one.answer, load)).windows

    def scores(of: Array) -> Array:
        """Return the largest logit over the windows of each row, as at inference."""
        seen = [(row, window) for row in of.tolist() for window in fitted(row)]
        logits, _ = logits_of(model, tokenizer, [read(*each) for each in seen], config.max_tokens)
        largest = dict.fromkeys(of.tolist(), -numpy.inf)
        for (row, _), logit in zip(seen, logits, strict=True):
            largest[row] = max(largest[row], logit)
        return numpy.array([largest[row] for row in of.tolist()])

    held = scores(left)
    # One calibration for all, since the held-out fifth of a single principle is small.
    counted = numpy.ones(len(left), bool)
    pooled = fitting.platt("all", held, data.y[left], counted, config.false_alarms)
    heads: dict[str, dict[str, Any]] = {}
    figures: list[Figure] = []
    panels: dict[str, tuple[float, list[Curve]]] = {}
    for about in data.abouts:
        mine = data.about[left] == about
        y, groups = data.y[left][mine], data.groups[left][mine]
        platt = pooled
        if (y == 0).sum() >= 1 / config.false_alarms:
            logits = pooled.logits(held[mine])
            own = fitting.threshold_over(logits[y == 0], logits[y == 1], config.false_alarms)
            platt = pooled._replace(threshold=own)
        figures += _measured(about, _FIRST["classifier"], held[mine], y, groups, platt, config.seed)
        curves = [Curve(_FIRST["classifier"], platt.probabilities(held[mine]), y)] if mine.any() else []
        for setting, measured in data.settings(about):
            truth = data.y[measured]
            if not 0 < truth.sum() < len(truth):
                continue
            found = scores(measured)
            figures += _measured(about, setting, found, truth, data.groups[measured], platt, config.seed)
            curves.append(Curve(setting, platt.probabilities(found), truth))
        panels[about] = platt.threshold, curves
        heads[about] = {
            "threshold": round(platt.threshold, 4),
            "text": texts[about],
            "scale": platt.scale,
            "shift": platt.shift,
        }
    return _Fitted(heads, {"model": {"base": config.model, "max_tokens": config.max_tokens}}, figures, panels)


def _texts(config: Config, abouts: Sequence[str]) -> dict[str, str]:
    """Return a classifier's input text for each aim or principle."""
    if config.constitution is None:
        return {about: about for about in abouts}
    rules = constitutions.load(config.constitution)
    return {about: rules[about].critique_request if about in rules else about for about in abouts}


# ---- the card


def _counts(data: Labels) -> list[dict[str, Any]]:
    """Return the number of labels of both kinds by aim or principle, judge and use."""
    counts: Counter[tuple[str, str, bool, bool]] = Counter()
    for one, trains in zip(data.rows, data.trained, strict=True):
        counts[one.about, one.judge, bool(trains), one.violates] += 1
    return [
        {
            "head": about,
            "judge": judge,
            "trained": trained,
            "violates": counts[about, judge, trained, True],
            "complies": counts[about, judge, trained, False],
        }
        for about, judge, trained in sorted(
            {key[:3] for key in counts}, key=lambda key: (key[0], not key[2], key[1])
        )
    ]


def _card(card: Mapping[str, Any]) -> str:
    """Return the card as Markdown."""
    model = card["model"]
    made = (
        f"A probe: linear heads on the hidden state of `{model['spec']}` ({model['file']}, SHA-256 "
        f"`{model['sha256']}`), of which a pass goes through the first {card['blocks']} blocks."
        if card["kind"] == "probe"
        else f"A classifier: LoRA on `{model['base']}`, trained on four fifths of the requests."
    )
    used = {True: "trained on", False: "measured on"}
    labels = [
        (one["head"], one["judge"] or "unnamed", used[one["trained"]], one["violates"], one["complies"])
        for one in card["data"]
    ]
    lines = [
        "# Critic",
        "",
        made,
        "Written by `cai train critic`.",
        "",
        markdown.table(
            ("aim or principle", "VIOLATES from"),
            [(about, f"{head['threshold']:.3f}") for about, head in card["heads"].items()],
        ),
        "",
        "## Labels",
        "",
        markdown.table(("aim or principle", "judge", "used", "violates", "complies"), labels),
        "",
        f"{card['left_out']['disagreement']} labels were left out, since those who gave them disagree.",
    ]
    for about, said in card["left_out"]["too few"].items():
        lines.append(f"It judges nothing of {about}, which has too few labels: {said}.")
    lines += [
        "",
        "## Figures",
        "",
        "95 % intervals over whole requests. An AUC below 0.90 is in bold. Beside a calibration error stands "
        "between what ends it lies where every probability is true, on as many rows. Threshold and "
        "calibration are of the first setting, where the threshold flags at most "
        f"{card['settings']['false_alarms']:.0%} of the answers that comply{_but(card)}.",
        "",
        table(card["figures"]),
        "",
        "![Reliability](reliability.svg)",
        "",
    ]
    return "\n".join(lines)


def _but(card: Mapping[str, Any]) -> str:
    """Return the aims or principles whose threshold flags more than the configured share, and how much.

    This happens because a threshold is at most 0.99, and because with few complying answers a classifier
    uses the threshold of all aims and principles together.
    """
    return "".join(
        f"; of {one['head']} {one['value']:.0%}"
        for one in card["figures"]
        if (one["measure"], one["setting"]) == ("false alarms", _FIRST[card["kind"]])
        and one["value"] > card["settings"]["false_alarms"]
    )
