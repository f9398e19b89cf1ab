"""Trains the heads that cai_graph.critic.probe uses, and measures them on data they were not trained on.

    labels       labelled answers and requests from a data folder
    states       one forward pass per row in the engine that serves the heads
    heads        standardise, logistic regression, Platt calibration, threshold
    figures      AUC and rates with 95 % intervals: within a source, leaving one out, on unseen answers

XSTest completions are the unseen source: they are only measured on, never trained on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph.critic.probe import HEADS, Probe, windows
from cai_graph.digests import sha256_of
from cai_graph.errors import DataError
from trainers import markdown
from trainers.config import require
from trainers.critic import heads as fitting
from trainers.critic.figures import Curve, Figure, figures_of, plot_reliability, table
from trainers.critic.heads import FOLDS, Head
from trainers.critic.labels import HARMFUL, HARMLESS, Row, lowest, own_rows, read_rows
from trainers.critic.states import CHATML, Passes, StateCache, check_local, reader_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Config", "chosen_rows", "notes_of", "passes_of", "train"]

UNSEEN = "XSTest answers, never trained on"
"""Name of the setting whose figures are on answers of another origin."""
_READS = {"harm": (1, 1), "evasion": (1, 0), "request": (0, 1)}
"""Which vectors of a pass a head uses: the mean over the answer, the state before it. The choice was made by
cross-validation on PyRIT."""
_FALSE_ALARMS = {"harm": 0.08, "evasion": 0.02, "request": 0.05}
"""Share of out-of-fold negatives that a threshold may flag, not counting texts without a request. A false
alarm of `harm` or `evasion` costs a needless revision; one of `request` accepts the refusal of a benign
request."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of a run; it is written into the card, except for paths."""

    data: Path
    """Folder with the labelled sources, in the layout of docs/critics.md. Absent sources are skipped."""
    output: Path
    """Folder for `heads.safetensors`, `card.json`, `CARD.md` and `reliability.svg`."""
    model: str
    """A local model: "local", "local:NAME" or "local:FILE.gguf"."""
    blocks: int | None = None
    """Number of blocks that a pass runs through; None: 9/14 of the model's, where heads generalised best."""
    turns: tuple[str, str] = CHATML
    """Text before the request and between request and answer, in the model's chat template."""
    penalty: float = 500.0
    """L2 penalty on the weights of standardised dimensions (1/C of scikit-learn)."""
    answers_per_label: int = 30
    """Answers used from each source other than PyRIT for each label; those with the lowest hash are taken."""
    requests_per_label: int = 100
    """Requests used from each source (for CatQA: each language) for each label, chosen likewise."""
    measured_answers: int = 520
    """XSTest completions to measure on; they include all that comply with an unsafe prompt."""
    seed: int = 0
    """Seed of folds and bootstrap."""
    cache: Path | None = None
    """Folder for hidden states; None for one in the local cache."""


# ---- rows


def chosen_rows(rows: Sequence[Row], config: Config) -> list[Row]:
    """Return the rows whose states are needed: those trained on, and those only measured on."""
    chosen: list[Row] = []
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.source == "pyrit" and (row.harm is not None or row.evasion is not None):
            chosen.append(row)
        elif row.source in ("moderation", "hh") and row.answer is not None:
            cells.setdefault((row.source, row.harm, config.answers_per_label), []).append(row)
        elif row.answer is None and row.source != "catqa":
            limit = len(rows) if row.source == "xstest" else config.requests_per_label
            cells.setdefault((row.source, row.unsafe, limit), []).append(row)
    for (*_, limit), cell in cells.items():
        chosen += lowest(cell, limit)
    # The languages of CatQA are parallel: take the same questions from each.
    languages = {
        tag: [r for r in rows if r.source == "catqa" and r.group == tag] for tag in ("en", "zh", "vi")
    }
    places = {row.request: place for place, row in enumerate(languages["en"])}
    for picked in lowest(languages["en"], config.requests_per_label):
        chosen += [questions[places[picked.request]] for questions in languages.values() if questions]
    answers = [row for row in rows if row.source == "xstest_answers"]
    harmful = [row for row in answers if row.harm]
    others = lowest([row for row in answers if not row.harm], max(0, config.measured_answers - len(harmful)))
    return [*chosen, *harmful, *others, *own_rows()]


def passes_of(row: Row) -> Passes:
    """Return the passes over a row, for all windows of its answer: heads are fitted on the first one."""
    return Passes(row.request, tuple(windows(row.answer or "")) or ("",))


# ---- figures


class _Found(NamedTuple):
    """The rows that a head is trained on, by index, with their out-of-fold scores and labels."""

    rows: Array
    scores: Array
    y: Array


class _Ruler:
    """Fits heads on some of the examples, and collects their figures on others."""

    def __init__(self, rows: list[Row], states: list[Array], config: Config) -> None:
        import numpy

        self.rows = rows
        self.states = states
        self.config = config
        self.sources = numpy.array([row.source for row in rows])
        self.groups = fitting.groups_of([row.request for row in rows], [row.answer for row in rows])
        self.figures: list[Figure] = []

    def labels(self, head: str, rows: Array) -> Array:
        import numpy

        return numpy.array([int(bool(self.rows[row].label(head))) for row in rows])

    def fitted(self, head: str, rows: Array) -> Head:
        x = fitting.inputs([self.states[row] for row in rows], _READS[head])
        return fitting.fit(x, self.labels(head, rows), self.sources[rows], self.config.penalty)

    def scores(self, head: str, fitted: Head, rows: Array) -> Array:
        """Return the scores of the rows as at inference: `harm` is the largest over the windows."""
        return fitting.scores(fitted, [self.states[row] for row in rows], largest=head == "harm")

    def out_of_fold(self, head: str) -> _Found:
        rows = _rows_of(head, self.rows)
        y = self.labels(head, rows)
        scores = fitting.out_of_fold(
            lambda kept: self.fitted(head, rows[kept]),
            [self.states[row] for row in rows],
            y,
            self.groups[rows],
            largest=head == "harm",
            seed=self.config.seed,
        )
        return _Found(rows, scores, y)

    def add(
        self, head: str, setting: str, rows: Array, scores: Array, y: Array, cut: float | None = None
    ) -> None:
        """Add the AUC, or with a cut on the scores recall, precision and the false-alarm rate."""
        self.figures += figures_of(
            head, setting, scores, y, self.groups[rows], cut=cut, seed=self.config.seed
        )

    def unseen(self, head: str, setting: str, trained: Array, measured: Array) -> None:
        """Train on some rows and add the AUC on others; rows of a measured request are not trained on."""
        import numpy

        trained = trained[~numpy.isin(self.groups[trained], self.groups[measured])]
        truth = self.labels(head, measured)
        if len(set(self.labels(head, trained))) < 2 or len(set(truth)) < 2:
            return
        scores = self.scores(head, self.fitted(head, trained), measured)
        self.add(head, setting, measured, scores, truth)


def _rows_of(head: str, rows: Sequence[Row]) -> Array:
    """Return the indices of the rows that a head is trained on."""
    import numpy

    def trains(row: Row) -> bool:
        if row.source in ("xstest_answers", "own") or (row.source == "catqa" and row.group != "en"):
            return False
        if head == "request":
            return row.answer is None and row.unsafe is not None
        return row.answer is not None and row.label(head) is not None

    return numpy.flatnonzero([trains(row) for row in rows])


def _measure(ruler: _Ruler, heads: dict[str, Head], found: dict[str, _Found]) -> None:
    """Add all figures: within sources, leaving one source out, and on data that is never trained on."""
    import numpy

    sources = ruler.sources
    groups = numpy.array([row.group for row in ruler.rows])
    for head, fitted in heads.items():
        rows, scores, y = _by_people(ruler, head, found[head])
        cut = fitted.platt.cut
        ruler.add(head, "all sources, 5 folds by request", rows, scores, y)
        ruler.add(head, "all sources, 5 folds by request", rows, scores, y, cut)
        for source in sorted(set(sources[rows])):
            here = sources[rows] == source
            ruler.add(head, f"within {source}, 5 folds by request", rows[here], scores[here], y[here])
        if head == "request":
            _measure_requests(ruler, rows, groups)
            continue
        for category in sorted(set(groups[rows][sources[rows] == "pyrit"])):
            here = (sources[rows] == "pyrit") & (groups[rows] == category)
            if min(y[here].sum(), (1 - y[here]).sum()) >= 5:
                ruler.unseen(head, f"left out: PyRIT {category}", rows[~here], rows[here])
        for source in sorted(set(sources[rows])):
            here = sources[rows] == source
            ruler.unseen(head, f"left out: {source}", rows[~here], rows[here])
        ruler.figures += unseen_answers(head, fitted, ruler.rows, ruler.states, ruler.config.seed)


def unseen_answers(
    head: str, fitted: Head, rows: Sequence[Row], states: Sequence[Array], seed: int
) -> list[Figure]:
    """Return the figures of a head on the XSTest answers among the rows."""
    import numpy

    unseen = [index for index, row in enumerate(rows) if row.source == "xstest_answers"]
    if not unseen:
        return []
    scores = fitting.scores(fitted, [states[row] for row in unseen], largest=head == "harm")
    truth = numpy.array([int(bool(rows[row].label(head))) for row in unseen])
    groups = fitting.groups_of([rows[row].request for row in unseen], [rows[row].answer for row in unseen])
    return [
        *figures_of(head, UNSEEN, scores, truth, groups, seed=seed),
        *figures_of(head, UNSEEN, scores, truth, groups, cut=fitted.platt.cut, seed=seed),
    ]


def _measure_requests(ruler: _Ruler, rows: Array, groups: Array) -> None:
    """Add the figures of the head `request` with a source left out.

    Most sources of requests contain only unsafe ones. For these, the negatives are half of the safe requests,
    which are then left out of training as well.
    """
    import numpy

    sources = ruler.sources
    safe = rows[numpy.isin(sources[rows], ("fastchat", "hh"))]
    held = safe[ruler.groups[safe] % 2 == 0]
    for source in sorted(set(sources[rows]) - {"fastchat", "hh"}):
        here = rows[sources[rows] == source]
        others = rows[sources[rows] != source]
        if 0 < ruler.labels("request", here).sum() < len(here):
            ruler.unseen("request", f"left out: {source}", others, here)
            continue
        others = others[~numpy.isin(others, held)]
        setting = f"left out: {source}, against safe requests left out"
        ruler.unseen("request", setting, others, numpy.r_[here, held])
        if source != "catqa":
            continue
        for tag in ("zh", "vi"):
            language = numpy.flatnonzero((sources == "catqa") & (groups == tag))
            benign = numpy.flatnonzero((sources == "own") & (groups == tag))
            for against, negatives in (
                ("English safe requests", held),
                (f"our safe {tag} requests", benign),
            ):
                setting = f"left out: catqa, in {tag} against {against}"
                ruler.unseen("request", setting, others, numpy.r_[language, negatives])


def _by_people(ruler: _Ruler, head: str, found: _Found) -> _Found:
    """Leave out the rows that were not labelled by a person."""
    import numpy

    kept = numpy.array([head != "evasion" or not ruler.rows[row].by_pattern for row in found.rows])
    return _Found(found.rows[kept], found.scores[kept], found.y[kept])


# ---- the run


def train(config: Config, progress: Callable[[int, int], None] | None = None) -> Path:
    """Train the heads of a local model, measure them, and return the folder they are written to.

    `cai_graph.critic.probe.Probe` loads this folder. An interrupted run resumes, since states are cached.

    Args:
        config: see `Config`.
        progress: called with (passes done, passes in all), starting at zero.

    Raises:
        ConfigError: the model is not local, or its tokenizer lacks the template's markers.
        DataError: the data folder is missing, damaged, or has too few rows of a label.
        ModelError: the model cannot be fetched, started or used.
        MissingExtra: the extra `train` is not installed.
    """
    require("`cai train probe`", "numpy", "safetensors", "sklearn", "matplotlib")
    if not config.data.is_dir():
        raise DataError(
            f"{config.data}: no such folder; name the one with the labelled sources (docs/critics.md)"
        )
    check_local(config.model)
    read = read_rows(config.data)
    rows = chosen_rows(read, config)
    _check(rows, config)
    reader = reader_of(config.model, config.blocks, config.turns)
    cache = StateCache(reader, config.cache)
    passes = [passes_of(row) for row in rows]
    asyncio.run(cache.extract(passes, progress))

    ruler = _Ruler(rows, cache.load(passes), config)
    heads: dict[str, Head] = {}
    found: dict[str, _Found] = {}
    for head in HEADS:
        found[head] = indices, scores, y = ruler.out_of_fold(head)
        requested = ruler.sources[indices] != "moderation"  # the threshold uses only rows with a request
        heads[head] = fitting.calibrate(
            ruler.fitted(head, indices), head, scores, y, requested, _FALSE_ALARMS[head]
        )
    _measure(ruler, heads, found)

    config.output.mkdir(parents=True, exist_ok=True)
    fitting.write_heads(config.output / "heads.safetensors", heads)
    card = {
        "format": 1,
        "model": {
            "file": reader.weights.name,
            "sha256": reader.sha256,
            "size": reader.weights.stat().st_size,
        },
        "blocks": reader.blocks,
        "shortened_sha256": sha256_of(reader.shorten()),
        "turns": list(config.turns),
        "heads": {head: {"threshold": round(fitted.platt.threshold, 4)} for head, fitted in heads.items()},
        "settings": {
            "penalty": config.penalty,
            "answers_per_label": config.answers_per_label,
            "requests_per_label": config.requests_per_label,
            "measured_answers": config.measured_answers,
            "seed": config.seed,
        },
        "data": _data(ruler, found),
        "figures": [figure.rounded() for figure in ruler.figures],
        "notes": notes_of(read, rows, ruler.figures),
    }
    (config.output / "card.json").write_text(
        json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (config.output / "CARD.md").write_text(card_text(card), encoding="utf-8")
    plot_reliability(config.output / "reliability.svg", _panels(ruler, heads, found))
    Probe(config.output, reader.weights)  # raises now if it cannot be loaded again
    return config.output


def notes_of(read: Sequence[Row], chosen: Sequence[Row], figures: Sequence[Figure]) -> list[str]:
    """Return notes that a reader of the figures must know, as sentences.

    Harmful answers are rare among XSTest's, so all of them are measured on; the precision depends on how many
    others are included.
    """

    def counts(rows: Sequence[Row]) -> tuple[int, int]:
        answers = [bool(row.harm) for row in rows if row.source == "xstest_answers"]
        return sum(answers), len(answers) - sum(answers)

    (harmful, others), (_, measured) = counts(read), counts(chosen)
    rates = {f.measure: f.value for f in figures if f.head == "harm" and f.setting == UNSEEN}
    if measured == others or not {"recall", "false alarms"} <= rates.keys():
        return []
    flagged, wrongly = rates["recall"] * harmful, rates["false alarms"] * others
    return [
        f"All {harmful} of XSTest's answers that comply with an unsafe request were measured on, and "
        f"{measured} of the {others} others. Over all of them the precision of `harm` would be about "
        f"{flagged / (flagged + wrongly):.2f}."
    ]


def _check(rows: Sequence[Row], config: Config) -> None:
    for head in HEADS:
        for label in (True, False):
            requests = {
                row.request or row.answer
                for row in rows
                if row.label(head) is label
                and row.source not in ("xstest_answers", "own")
                and (row.answer is None) == (head == "request")
            }
            if len(requests) < FOLDS:
                raise DataError(
                    f"{config.data}: {len(requests)} requests with {head} = {label}; "
                    f"{FOLDS} folds need one each. docs/critics.md says what the folder holds"
                )


_LICENCES = {
    "pyrit": ("PyRIT scorer evaluations: real answers with human scores", "MIT"),
    "moderation": ("OpenAI moderation evaluation set", "MIT"),
    "hh": ("Anthropic HH-RLHF, first turns of helpful dialogues", "MIT"),
    "harmbench": ("HarmBench text behaviours", "MIT"),
    "advbench": ("AdvBench behaviours", "MIT"),
    "strongreject": ("StrongREJECT forbidden prompts", "MIT"),
    "catqa": ("CatQA, English", "Apache-2.0"),
    "dangerousqa": ("DangerousQA", "Apache-2.0"),
    "fastchat": ("MT-bench and Vicuna-bench questions", "Apache-2.0"),
    "xstest": ("XSTest prompts", "CC-BY-4.0"),
    "everyday": ("Everyday answers, written for this project", "Apache-2.0"),
}


def _data(ruler: _Ruler, found: dict[str, _Found]) -> list[dict[str, Any]]:
    """Return the sources that each head was trained on, with counts of both labels."""
    entries = []
    for head, (rows, _, y) in found.items():
        for source in sorted(set(ruler.sources[rows])):
            here = y[ruler.sources[rows] == source]
            name, licence = _LICENCES[source]
            entries.append(
                {
                    "head": head,
                    "source": str(source),
                    "name": name,
                    "licence": licence,
                    "positives": int(here.sum()),
                    "negatives": int(len(here) - here.sum()),
                }
            )
    return entries


def card_text(card: dict[str, Any]) -> str:
    """Return the card of the built-in heads as Markdown."""
    meanings = {
        "harm": "the answer is harmful",
        "evasion": "the answer refuses or evades",
        "request": "the request is unsafe",
    }
    columns = ("head", "name", "licence", "positives", "negatives")
    sources = [[one[column] for column in columns] for one in card["data"]]
    lines = [
        f"# Heads for {card['model']['file']}",
        "",
        f"SHA-256 of the model: `{card['model']['sha256']}`. "
        f"A pass goes through its first {card['blocks']} blocks.",
        "Written by `cai train probe`; made of the data below, under Apache-2.0.",
        "",
        markdown.table(
            ("head", "probability that", "says yes from"),
            [(head, meanings[head], f"{entry['threshold']:.3f}") for head, entry in card["heads"].items()],
        ),
        "",
        "## Trained on",
        "",
        markdown.table(("head", "source", "licence", "positive", "negative"), sources),
        "",
        f"A PyRIT answer is harmful from a mean human score of {HARMFUL}, harmless up to {HARMLESS}, left "
        "out between; an answer that meets an unsafe objective counts as harmful, a refusal as harmless. "
        "Harmless PyRIT answers that open like a refusal were trained on as evasions, and not measured on. "
        "HH-RLHF answers are the chosen ones and count as harmless and willing. XSTest answers, and requests "
        "in other languages than English, were never trained on; XSTest's prompts train the head `request`. "
        "Heads learn from the first window of an answer; scores of `harm` are the largest over its windows. "
        "Layer, windows, penalty and the rates of false alarms behind the thresholds were chosen by "
        "cross-validation within the training data with XSTest's figures in view: its answers are unseen by "
        "the fit, not by every choice.",
        "",
        "## Figures",
        "",
        "95 % intervals over whole requests. An AUC below 0.90 is in bold.",
        "",
        table(card["figures"]),
    ]
    for note in card.get("notes", ()):
        lines += ["", note]
    return "\n".join([*lines, "", "![Reliability](reliability.svg)", ""])


def _panels(
    ruler: _Ruler, heads: dict[str, Head], found: dict[str, _Found]
) -> dict[str, tuple[float, list[Curve]]]:
    """Return the panels of the reliability plot: each head out of fold, and on XSTest answers."""
    import numpy

    unseen = numpy.flatnonzero(ruler.sources == "xstest_answers")
    panels = {}
    for head, fitted in heads.items():
        _, scores, y = found[head]
        curves = [Curve("out of fold", fitted.platt.probabilities(scores), y)]
        if len(unseen) and head != "request":
            scores = ruler.scores(head, fitted, unseen)
            curves.append(Curve("XSTest", fitted.platt.probabilities(scores), ruler.labels(head, unseen)))
        panels[head] = fitted.platt.threshold, curves
    return panels
