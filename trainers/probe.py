"""Trains the heads that cai_graph.probe reads, and measures them where they were not trained.

    rows         labelled answers and requests out of a data folder (its SOURCES.md names origin and licence)
    states       one forward pass a row through the engine that serves the heads; kept on disk, so that an
                 interrupted run resumes
    fit          standardise, logistic regression with a strong L2 penalty, Platt calibration on out-of-fold
                 scores; all three are affine, so a head is one weight vector and one bias
    figures      AUC and rates with 95 % intervals: within a source, leaving one out, on unseen answers

XSTest completions are the unseen source: they are measured on and never trained on.
No torch: the engine is llama.cpp, the regression is scikit-learn.
"""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph import local
from cai_graph.blocks import block_count, sha256_of
from cai_graph.errors import ConfigError, DataError, MissingExtra
from cai_graph.probe import HEADS, Probe, Reader, cut_request, windows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["REFUSAL", "Config", "Figure", "Row", "read_rows", "train"]

HARMFUL, HARMLESS = 0.6, 0.15
"""Mean human harm score from which a PyRIT answer is harmful, and up to which it is not; between them the
raters disagree or hesitate, and the answer has no label."""
CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
_READS = {"harm": ((1,), (1,)), "evasion": ((1,), (0,)), "request": ((0,), (1,))}
"""What a head reads of a pass: the mean over the answer, the state before it. Chosen out of fold on PyRIT."""
_DEPTH = 9 / 14
_FOLDS = 5
_RESAMPLES = 1000
_FALSE_ALARMS = {"harm": 0.08, "evasion": 0.02, "request": 0.05}
"""Share of out-of-fold negatives that a threshold may flag, texts without a request left aside. A false
alarm of `harm` or `evasion` costs a needless revision, one of `request` lets the refusal of a benign request
pass."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on; it is written into the card, paths left out."""

    data: Path
    """Folder with the labelled sources, laid out as in its SOURCES.md. Absent sources are left out."""
    output: Path
    """Folder for `heads.safetensors`, `card.json`, `CARD.md` and `reliability.svg`."""
    model: str
    """A local model: "local", "local:NAME" or "local:FILE.gguf"."""
    blocks: int | None = None
    """Blocks that a pass goes through; None for 9/14 of the model's, where heads carried over best."""
    turns: tuple[str, str] = CHATML
    """Text before the request and between request and answer, in the model's chat template."""
    penalty: float = 500.0
    """L2 penalty on the weights of standardised dimensions (1/C of scikit-learn)."""
    answers_per_label: int = 30
    """Answers that a source other than PyRIT may give to each label; those of lowest hash are taken."""
    requests_per_label: int = 100
    """Requests that a source (of CatQA: each language) may give to each label, likewise."""
    measured_answers: int = 520
    """XSTest completions to measure on; all that comply with an unsafe prompt are among them."""
    seed: int = 0
    """Of folds and bootstrap."""
    cache: Path | None = None
    """Folder for hidden states; None for one in the local cache."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A request, an answer or None, and what people said of it; None where they said nothing."""

    source: str
    group: str
    """Category, language or model within the source."""
    request: str
    answer: str | None = None
    harm: bool | None = None
    """The answer is harmful."""
    evasion: bool | None = None
    """The answer refuses or evades."""
    unsafe: bool | None = None
    """The request is unsafe."""
    by_pattern: bool = False
    """Its evasion was read from how it opens, not by a person; trained on, never measured on."""

    def label(self, head: str) -> bool | None:
        """Return the label that a head learns."""
        return {"harm": self.harm, "evasion": self.evasion, "request": self.unsafe}[head]


class Figure(NamedTuple):
    """One measured value with its 95 % interval."""

    head: str
    measure: str
    """`auc`, `recall`, `precision` or `false alarms` (the share of negatives flagged)."""
    setting: str
    """What was left out of training, and what was measured on."""
    n: int
    positives: int
    value: float
    low: float
    high: float


# ---- rows


def read_rows(data: Path) -> list[Row]:
    """Return every labelled row of the sources that the data folder holds, in a stable order.

    Raises:
        DataError: a file lacks a column or holds a label that cannot be read; names file and row.
    """
    rows: dict[tuple[str, str, str | None], Row] = {}
    for source in (_pyrit, _moderation, _hh_helpful, _unsafe_requests, _fastchat, _xstest):
        for row in source(data):
            key = (row.source, row.request, row.answer)
            if key in rows:  # the same pair in two files of a source: a label fills what the other left open
                known = rows[key]
                row = dataclasses.replace(
                    known,
                    harm=row.harm if known.harm is None else known.harm,
                    evasion=row.evasion if known.evasion is None else known.evasion,
                )
            rows[key] = row
    return [_with_evasion(row) for row in rows.values()]


REFUSAL = re.compile(
    r"\W*(i['’]?m (really |very |truly )?sorry|i am sorry|sorry|i apologi[sz]e|my apologies|i can(['’]t|not)|"
    r"i['’]?m (not able|unable)|i am (not able|unable)|i won['’]t|as an ai|unfortunately, i|i do not|"
    r"i don['’]t (feel|think i))",
    re.IGNORECASE,
)
"""How a refusal opens. It labels harmless PyRIT answers that people did not, since the labelled refusals are
few and on few subjects; where both exist it is right in 29 of 32."""


def _with_evasion(row: Row) -> Row:
    open_ = row.source == "pyrit" and row.harm is False and row.evasion is None
    if open_ and row.answer is not None and REFUSAL.match(row.answer):
        return dataclasses.replace(row, evasion=True, by_pattern=True)
    return row


def _pyrit(data: Path) -> Iterator[Row]:
    """PyRIT's scorer evaluations: real answers with human scores (harm 0..1; refusal and objective 0/1)."""
    folder = data / "pyrit_scorer_evals"
    for path in sorted(folder.glob("harm/*.csv")):
        category = path.stem.removeprefix("mini_").removesuffix("_multi_score")
        for number, cells in _csv(path, "objective", "assistant_response"):
            scores = [
                _number(value, path, number)
                for name, value in cells.items()
                if name.startswith("human_score") and value
            ]
            if not scores:
                raise DataError(f"{path} row {number}: no human_score")
            score = sum(scores) / len(scores)
            harm = True if score >= HARMFUL else False if score <= HARMLESS else None
            # Who refuses does no harm, so a harmful answer is no refusal. The reverse says nothing.
            yield Row(
                "pyrit",
                category,
                cells["objective"],
                cells["assistant_response"],
                harm,
                False if harm else None,
            )
    for path in sorted(folder.glob("objective/*.csv")):
        for number, cells in _csv(path, "objective", "assistant_response", "human_score"):
            met = _number(cells["human_score"], path, number) >= 0.5
            yield Row(
                "pyrit",
                path.stem,
                cells["objective"],
                cells["assistant_response"],
                met,
                False if met else None,
            )
    for path in sorted(folder.glob("refusal_scorer/*.csv")):
        for number, cells in _csv(path, "objective", "assistant_response", "human_score"):
            refused = _number(cells["human_score"], path, number) >= 0.5
            yield Row(
                "pyrit",
                "refusal",
                cells["objective"],
                cells["assistant_response"],
                False if refused else None,
                refused,
            )


def _moderation(data: Path) -> Iterator[Row]:
    """OpenAI's moderation texts, as answers to no request: harmful if a label is 1, not if most are 0."""
    for number, cells in _json_lines(data / "openai_moderation" / "samples.jsonl"):
        labels = [value for name, value in cells.items() if name != "prompt" and value is not None]
        if 1 in labels or len(labels) >= 5:
            yield Row("moderation", "text", "", _text(cells, "prompt", number), 1 in labels)


def _hh_helpful(data: Path) -> Iterator[Row]:
    """First turns of HH-RLHF's helpful dialogues: safe requests with harmless, willing (chosen) answers."""
    for path in sorted((data / "hh_rlhf").glob("helpful-*.train.pairs.jsonl.gz")):
        for number, cells in _json_lines(path):
            prompt, chosen = cells.get("prompt"), cells.get("chosen")
            if not isinstance(prompt, list) or not isinstance(chosen, list):
                raise DataError(f"{path} row {number}: prompt and chosen are not lists of messages")
            if len(prompt) == 1:
                request, answer = prompt[0]["content"], chosen[-1]["content"]
                yield Row("hh", path.name.partition(".")[0], request, answer, False, False)
                yield Row("hh", "request", request, unsafe=False)


def _unsafe_requests(data: Path) -> Iterator[Row]:
    """HarmBench, AdvBench, StrongREJECT, CatQA in three languages and DangerousQA: requests, all unsafe."""
    for name, file, column in (
        ("harmbench", "harmbench_behaviors_text_all.csv", "Behavior"),
        ("advbench", "advbench_behaviors.csv", "Behavior"),
        ("strongreject", "strongreject_dataset.csv", "forbidden_prompt"),
    ):
        for _, cells in _csv(data / name / file, column):
            context = cells.get("ContextString", "")
            yield Row(name, "en", f"{cells[column]}\n\n{context}" if context else cells[column], unsafe=True)
    for language, tag in (("english", "en"), ("chinese", "zh"), ("vietnamese", "vi")):
        path = data / "catqa" / f"catqa_{language}.json"
        for questions in _json(path, {}).values():
            for question in (question for group in questions.values() for question in group):
                yield Row("catqa", tag, question, unsafe=True)
    for question in _json(data / "catqa" / "dangerousqa.json", []):
        yield Row("dangerousqa", "en", question, unsafe=True)


def _fastchat(data: Path) -> Iterator[Row]:
    """First turns of MT-bench and Vicuna-bench: safe requests."""
    for path in sorted((data / "fastchat").glob("*.jsonl")):
        for number, cells in _json_lines(path):
            turns = cells.get("turns")
            if not isinstance(turns, list) or not turns:
                raise DataError(f"{path} row {number}: no turns")
            yield Row("fastchat", "en", turns[0], unsafe=False)


def _xstest(data: Path) -> Iterator[Row]:
    """XSTest: prompts that look unsafe and are or are not, and the answers of five models with two labels."""
    for _, cells in _csv(data / "xstest" / "xstest_prompts.csv", "prompt", "label"):
        yield Row("xstest", "prompts", cells["prompt"], unsafe=cells["label"] == "unsafe")
    for path in sorted((data / "xstest" / "model_completions").glob("*.csv")):
        for _, cells in _csv(path, "prompt", "completion", "type", "final_label"):
            unsafe, complied = cells["type"].startswith("contrast"), cells["final_label"].startswith("1")
            yield Row(
                "xstest_answers",
                path.stem.rpartition("_")[2],
                cells["prompt"],
                cells["completion"],
                unsafe and complied,
                not complied,
                unsafe,
            )


def _own() -> Iterator[Row]:
    """What this project wrote: everyday answers to train on, benign zh and vi requests to measure on."""
    folder = Path(__file__).parent
    answers = json.loads((folder / "everyday_answers.json").read_text(encoding="utf-8"))
    for kind in ("willing", "evasive"):
        for request, answer in answers[kind]:
            yield Row("everyday", kind, request, answer, harm=False, evasion=kind == "evasive")
    requests = json.loads((folder / "benign_requests.json").read_text(encoding="utf-8"))
    for tag in ("zh", "vi"):
        for request in requests[tag]:
            yield Row("own", tag, request, unsafe=False)


def _csv(path: Path, *columns: str) -> Iterator[tuple[int, dict[str, str]]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="") as file:
        while True:  # PyRIT opens its files with comments; a field may hold a line that begins with "#"
            start = file.tell()
            if not file.readline().startswith("#"):
                break
        file.seek(start)
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(
                f"{path}: has no column {missing[0]!r}, only {', '.join(reader.fieldnames or ())}"
            )
        for number, cells in enumerate(reader, 1):
            if any(cells[name] is None for name in columns):
                raise DataError(f"{path} row {number}: ends before its last column")
            yield number, {name: value or "" for name, value in cells.items() if name}


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.exists():
        return
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for number, line in enumerate(content.decode().split("\n"), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} row {number}: no JSON: {error}") from error
        if not isinstance(cells, dict):
            raise DataError(f"{path} row {number}: {type(cells).__name__}, not an object")
        yield number, cells


def _json(path: Path, absent: Any) -> Any:
    if not path.exists():
        return absent
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: no JSON: {error}") from error
    if type(content) is not type(absent):
        raise DataError(f"{path}: {type(content).__name__}, not {type(absent).__name__}")
    return content


def _text(cells: dict[str, Any], name: str, number: int) -> str:
    value = cells.get(name)
    if not isinstance(value, str):
        raise DataError(f"row {number}: {name} is {value!r}, not text")
    return value


def _number(value: str, path: Path, number: int) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise DataError(f"{path} row {number}: {value!r} is no score") from error


def _lowest(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the rows whose texts have the lowest hashes: a sample that does not depend on file order."""

    def digest(row: Row) -> str:
        return hashlib.sha256(f"{row.request}\0{row.answer or ''}".encode("utf-8", "replace")).hexdigest()

    return sorted(rows, key=digest)[:count]


def _chosen(rows: Sequence[Row], config: Config) -> list[Row]:
    """Return the rows whose states are needed: the ones trained on, and the ones only measured on."""
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
        chosen += _lowest(cell, limit)
    # The languages of CatQA are parallel: the same questions of each.
    languages = {
        tag: [r for r in rows if r.source == "catqa" and r.group == tag] for tag in ("en", "zh", "vi")
    }
    places = {row.request: place for place, row in enumerate(languages["en"])}
    for picked in _lowest(languages["en"], config.requests_per_label):
        chosen += [questions[places[picked.request]] for questions in languages.values() if questions]
    answers = [row for row in rows if row.source == "xstest_answers"]
    harmful = [row for row in answers if row.harm]
    others = _lowest([row for row in answers if not row.harm], max(0, config.measured_answers - len(harmful)))
    return [*chosen, *harmful, *others, *_own()]


# ---- states


class _Examples(NamedTuple):
    """Rows with the states of all their windows."""

    rows: list[Row]
    states: list[Array]
    """A row each: (windows, 2, dimensions); see `cai_graph.probe.States`."""


class _Cache:
    """Hidden states on disk, one small file a pass, named by the digest of all it depends on."""

    def __init__(self, folder: Path, reader: Reader) -> None:
        self.folder = folder
        self.reader = reader
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, request: str, window: str) -> Path:
        depends = [self.reader.sha256, self.reader.blocks, *self.reader.turns, cut_request(request), window]
        return self.folder / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()}.npy"

    def get(self, request: str, window: str) -> Any:
        """Return the vectors of a pass that was done, (2, dimensions) float32."""
        import numpy

        return numpy.load(self.path(request, window), allow_pickle=False)

    async def fill(self, request: str, window: str) -> None:
        """Do the pass; the file appears whole or not at all."""
        import numpy

        states = await self.reader.read(request, window)
        path = self.path(request, window)
        partial = path.with_suffix(f".{os.getpid()}.part")
        with partial.open("wb") as file:
            numpy.save(file, states.vectors)
        os.replace(partial, path)


async def _extract(rows: Sequence[Row], cache: _Cache, progress: Callable[[int, int], None] | None) -> None:
    """See that the states of all rows are on disk; `progress` is told (passes done, passes in all)."""
    passes = list(dict.fromkeys((row.request, window) for row in rows for window in _seen(row)))
    missing = [one for one in passes if not cache.path(*one).exists()]
    done = len(passes) - len(missing)
    # The engine takes one pass at a time; a second in line hides the time between them.
    slots = asyncio.Semaphore(2)

    async def fill(request: str, window: str) -> None:
        nonlocal done
        async with slots:
            await cache.fill(request, window)
        done += 1
        if progress is not None:
            progress(done, len(passes))

    if progress is not None:
        progress(done, len(passes))
    async with asyncio.TaskGroup() as group:
        for one in missing:
            group.create_task(fill(*one))


def _seen(row: Row) -> list[str]:
    """Return the windows that are read of a row: for training the first, for measuring all, as in use."""
    if row.answer is None:
        return [""]
    found = windows(row.answer) or [""]
    return found if row.source == "xstest_answers" else found[:1]


def _load(rows: Sequence[Row], cache: _Cache) -> _Examples:
    import numpy

    states = [numpy.stack([cache.get(row.request, window) for window in _seen(row)]) for row in rows]
    return _Examples(list(rows), [state.astype(numpy.float64) for state in states])


# ---- fit


class _Head(NamedTuple):
    """A linear head; with `scale` and `shift` its score becomes the logit of a calibrated probability."""

    weight: Array
    bias: float
    scale: float = 1.0
    shift: float = 0.0
    threshold: float = 0.5


def _inputs(head: str, examples: _Examples) -> Array:
    """Return (rows, 2 * dimensions): the first windows, zeros for a vector that the head does not read."""
    import numpy

    return numpy.stack([(state[0] * _READS[head]).ravel() for state in examples.states])


def _scores(head: str, fitted: _Head, examples: _Examples, rows: Array) -> Array:
    """Return the scores of the rows (by index) as in use: `harm` is the largest over the windows."""
    import numpy

    if head != "harm":
        return _inputs(head, examples)[rows] @ fitted.weight + fitted.bias
    found = [examples.states[row].reshape(-1, fitted.weight.size) @ fitted.weight for row in rows]
    return numpy.array([scores.max() for scores in found]) + fitted.bias


def _fit(x: Array, y: Array, sources: Array, penalty: float) -> _Head:
    """Fit one head. Both labels weigh the same, and within a label a source by the root of its size."""
    import numpy
    from sklearn.linear_model import LogisticRegression

    weights = numpy.zeros(len(y))
    for label in (0, 1):
        for source in set(sources[y == label]):
            cell = (y == label) & (sources == source)
            weights[cell] = cell.sum() ** -0.5
        weights[y == label] *= len(y) / 2 / weights[y == label].sum()
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread == 0] = 1
    model = LogisticRegression(C=1 / penalty, max_iter=1000)
    model.fit((x - mean) / spread, y, sample_weight=weights)
    weight = model.coef_[0] / spread
    return _Head(weight, float(model.intercept_[0] - mean @ weight))


def _out_of_fold(head: str, examples: _Examples, rows: Array, y: Array, config: Config) -> Array:
    """Return a score for each row from a head that saw neither the row nor another answer to its request."""
    import numpy
    from sklearn.model_selection import StratifiedGroupKFold

    x, sources, groups = _inputs(head, examples), _sources(examples), _groups(examples)
    scores = numpy.empty(len(rows))
    folds = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=config.seed)
    for kept, left in folds.split(rows, y, groups[rows]):
        fitted = _fit(x[rows[kept]], y[kept], sources[rows[kept]], config.penalty)
        scores[left] = _scores(head, fitted, examples, rows[left])
    return scores


def _calibrate(fitted: _Head, head: str, scores: Array, y: Array, requested: Array) -> _Head:
    """Add Platt's sigmoid and the threshold, both from out-of-fold scores.

    The threshold looks only at rows that have a request, as all have in use.
    """
    import numpy
    from sklearn.linear_model import LogisticRegression

    platt = LogisticRegression(C=1e6).fit(scores[:, None], y)
    scale, shift = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    if scale <= 0:
        raise DataError(
            f"head {head!r}: out of fold it ranks no better than chance; more or other rows are needed"
        )
    logits = scale * scores + shift
    cut = float(numpy.quantile(logits[(y == 0) & requested], 1 - _FALSE_ALARMS[head]))
    return fitted._replace(scale=scale, shift=shift, threshold=min(0.99, max(0.01, _sigmoid(cut))))


def _sigmoid(logit: float) -> float:
    import math

    return 1 / (1 + math.exp(-logit))


def _sources(examples: _Examples) -> Array:
    import numpy

    return numpy.array([row.source for row in examples.rows])


def _groups(examples: _Examples) -> Array:
    """Return a number for each row, the same for all rows of a request; moderation texts have none."""
    import numpy

    keys = [" ".join(row.request.casefold().split()) or row.answer for row in examples.rows]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return numpy.array([numbers[key] for key in keys])


# ---- figures


def _auc(scores: Array, y: Array) -> float:
    """Return P(a positive scores above a negative), ties counted half."""
    import numpy

    _, place, counts = numpy.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place]
    positives = int(y.sum())
    negatives = len(y) - positives
    return float((ranks[y == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _interval(
    measure: Callable[[Array, Array], float], scores: Array, y: Array, groups: Array, seed: int
) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile over resamples of whole requests."""
    import numpy

    chance = numpy.random.default_rng(seed)
    _, numbers = numpy.unique(groups, return_inverse=True)
    members = [numpy.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
    values = []
    for _ in range(_RESAMPLES):
        rows = numpy.concatenate(
            [members[number] for number in chance.integers(len(members), size=len(members))]
        )
        if 0 < y[rows].sum() < len(rows):
            value = measure(scores[rows], y[rows])
            if value == value:  # a resample without any flagged row has no precision
                values.append(value)
    low, high = numpy.percentile(values, [2.5, 97.5]) if values else (float("nan"), float("nan"))
    return float(low), float(high)


class _Ruler:
    """Measures heads on the examples, and collects the figures."""

    def __init__(self, examples: _Examples, config: Config) -> None:
        self.examples = examples
        self.config = config
        self.sources = _sources(examples)
        self.groups = _groups(examples)
        self.figures: list[Figure] = []

    def add(
        self, head: str, setting: str, rows: Array, scores: Array, y: Array, threshold: float | None = None
    ) -> None:
        """Add the AUC, or with a threshold (on the scores) recall, precision and the rate of false alarms."""
        measures: dict[str, Callable[[Array, Array], float]] = {"auc": _auc}
        if threshold is not None:
            cut = threshold
            measures = {
                "recall": lambda s, t: float((s[t == 1] >= cut).mean()),
                "precision": lambda s, t: float(t[s >= cut].mean()) if (s >= cut).any() else float("nan"),
                "false alarms": lambda s, t: float((s[t == 0] >= cut).mean()),
            }
        if not 0 < y.sum() < len(y):
            return
        for name, measure in measures.items():
            low, high = _interval(measure, scores, y, self.groups[rows], self.config.seed)
            value = measure(scores, y)
            self.figures.append(Figure(head, name, setting, len(y), int(y.sum()), value, low, high))

    def unseen(self, head: str, setting: str, trained: Array, measured: Array) -> None:
        """Train on some rows and add the AUC on others; rows of a measured request are not trained on."""
        import numpy

        trained = trained[~numpy.isin(self.groups[trained], self.groups[measured])]
        y, truth = self.labels(head, trained), self.labels(head, measured)
        if len(set(y)) < 2 or len(set(truth)) < 2:
            return
        fitted = _fit(_inputs(head, self.examples)[trained], y, self.sources[trained], self.config.penalty)
        self.add(head, setting, measured, _scores(head, fitted, self.examples, measured), truth)

    def labels(self, head: str, rows: Array) -> Array:
        import numpy

        return numpy.array([int(bool(self.examples.rows[row].label(head))) for row in rows])


def _rows_of(head: str, examples: _Examples) -> Array:
    """Return the indices of the rows that a head is trained on."""
    import numpy

    def trains(row: Row) -> bool:
        if row.source in ("xstest_answers", "own") or (row.source == "catqa" and row.group != "en"):
            return False
        if head == "request":
            return row.answer is None and row.unsafe is not None
        return row.answer is not None and row.label(head) is not None

    return numpy.flatnonzero([trains(row) for row in examples.rows])


def _measure(
    ruler: _Ruler, heads: dict[str, _Head], out_of_fold: dict[str, tuple[Array, Array, Array]]
) -> None:
    """Add all figures: within sources, leaving one out, and on what is never trained on."""
    import numpy

    examples, sources = ruler.examples, ruler.sources
    groups = numpy.array([row.group for row in examples.rows])
    unseen = numpy.flatnonzero(sources == "xstest_answers")
    for head, fitted in heads.items():
        rows, scores, y = _measured(examples, head, out_of_fold[head])
        cut = (_logit(fitted.threshold) - fitted.shift) / fitted.scale
        ruler.add(head, "all sources, 5 folds by request", rows, scores, y)
        ruler.add(head, "all sources, 5 folds by request", rows, scores, y, cut)
        for source in sorted(set(sources[rows])):
            here = sources[rows] == source
            ruler.add(head, f"within {source}, 5 folds by request", rows[here], scores[here], y[here])
        if head != "request":
            for category in sorted(set(groups[rows][sources[rows] == "pyrit"])):
                here = (sources[rows] == "pyrit") & (groups[rows] == category)
                if min(y[here].sum(), (1 - y[here]).sum()) >= 5:
                    ruler.unseen(head, f"left out: PyRIT {category}", rows[~here], rows[here])
            for source in sorted(set(sources[rows])):
                here = sources[rows] == source
                ruler.unseen(head, f"left out: {source}", rows[~here], rows[here])
            if len(unseen):
                truth = ruler.labels(head, unseen)
                scores = _scores(head, fitted, examples, unseen)
                ruler.add(head, "XSTest answers, never trained on", unseen, scores, truth)
                ruler.add(head, "XSTest answers, never trained on", unseen, scores, truth, cut)
            continue
        # Most sources of requests hold unsafe ones only. Their safe side is half of the safe requests, which
        # is then left out of training as well.
        safe = rows[numpy.isin(sources[rows], ("fastchat", "hh"))]
        held = safe[ruler.groups[safe] % 2 == 0]
        own = {tag: numpy.flatnonzero((sources == "own") & (groups == tag)) for tag in ("zh", "vi")}
        for source in sorted(set(sources[rows]) - {"fastchat", "hh"}):
            here = rows[sources[rows] == source]
            others = rows[sources[rows] != source]
            if 0 < ruler.labels(head, here).sum() < len(here):
                ruler.unseen(head, f"left out: {source}", others, here)
                continue
            others = others[~numpy.isin(others, held)]
            ruler.unseen(
                head, f"left out: {source}, against safe requests left out", others, numpy.r_[here, held]
            )
            if source != "catqa":
                continue
            for tag, benign in own.items():
                language = numpy.flatnonzero((sources == "catqa") & (groups == tag))
                ruler.unseen(
                    head,
                    f"left out: catqa, in {tag} against English safe requests",
                    others,
                    numpy.r_[language, held],
                )
                ruler.unseen(
                    head,
                    f"left out: catqa, in {tag} against our safe {tag} requests",
                    others,
                    numpy.r_[language, benign],
                )


def _measured(
    examples: _Examples, head: str, found: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Leave out the rows whose label no person gave."""
    import numpy

    rows, scores, y = found
    kept = numpy.array([head != "evasion" or not examples.rows[row].by_pattern for row in rows])
    return rows[kept], scores[kept], y[kept]


def _logit(probability: float) -> float:
    import math

    return math.log(probability / (1 - probability))


# ---- the run


def train(config: Config, progress: Callable[[int, int], None] | None = None) -> Path:
    """Train the heads of a local model, measure them, and return the folder they were written to.

    The folder is what `cai_graph.probe.Probe` loads. An interrupted run resumes: states stay in the cache.

    Args:
        config: see there.
        progress: told (passes done, passes in all), from zero on.

    Raises:
        ConfigError: the model is not local, or does not know the template's markers.
        DataError: the data folder is missing, damaged, or has too few rows of a label.
        ModelError: the model cannot be fetched, started or used.
        MissingExtra: the extra `train` is not installed.
    """
    for package in ("numpy", "safetensors", "sklearn", "matplotlib"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra("`cai train probe`", package, "train") from error
    if not config.data.is_dir():
        raise DataError(f"{config.data}: no such folder; name the folder with the labelled sources")
    kind, _, name = config.model.partition(":")
    if kind != "local":
        raise ConfigError(
            f'{config.model!r} is no local model; a probe reads a hidden state, so name "local"'
        )
    rows = _chosen(read_rows(config.data), config)
    _check(rows, config)
    weights = local.weights(name)
    sha256 = sha256_of(weights)
    blocks = config.blocks or round(_DEPTH * block_count(weights))
    reader = Reader(weights, sha256, blocks, config.turns)
    cache = _Cache(config.cache or local.cache_dir() / "states", reader)
    asyncio.run(_extract(rows, cache, progress))

    examples = _load(rows, cache)
    ruler = _Ruler(examples, config)
    heads: dict[str, _Head] = {}
    out_of_fold: dict[str, tuple[Array, Array, Array]] = {}
    for head in HEADS:
        indices = _rows_of(head, examples)
        y = ruler.labels(head, indices)
        scores = _out_of_fold(head, examples, indices, y, config)
        fitted = _fit(_inputs(head, examples)[indices], y, ruler.sources[indices], config.penalty)
        heads[head] = _calibrate(fitted, head, scores, y, ruler.sources[indices] != "moderation")
        out_of_fold[head] = indices, scores, y
    _measure(ruler, heads, out_of_fold)

    config.output.mkdir(parents=True, exist_ok=True)
    _write_heads(config.output, heads)
    card = {
        "format": 1,
        "model": {"file": weights.name, "sha256": sha256, "size": weights.stat().st_size},
        "blocks": blocks,
        "shortened_sha256": sha256_of(reader.shorten()),
        "turns": list(config.turns),
        "heads": {head: {"threshold": round(fitted.threshold, 4)} for head, fitted in heads.items()},
        "settings": {
            "penalty": config.penalty,
            "answers_per_label": config.answers_per_label,
            "requests_per_label": config.requests_per_label,
            "measured_answers": config.measured_answers,
            "seed": config.seed,
        },
        "data": _data(ruler, out_of_fold),
        "figures": [
            {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in figure._asdict().items()
            }
            for figure in ruler.figures
        ],
    }
    (config.output / "card.json").write_text(
        json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (config.output / "CARD.md").write_text(_card(card), encoding="utf-8")
    _plot(config.output / "reliability.svg", ruler, heads, out_of_fold)
    Probe(config.output, weights)  # what cannot be loaded again is found now
    return config.output


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
            if len(requests) < _FOLDS:
                raise DataError(
                    f"{config.data}: {len(requests)} requests with {head} = {label}; "
                    f"{_FOLDS} folds need one each. SOURCES.md says what the folder should hold"
                )


def _write_heads(folder: Path, heads: dict[str, _Head]) -> None:
    import numpy
    from safetensors.numpy import save

    tensors = {}
    for name, head in heads.items():
        tensors[f"{name}.weight"] = (head.scale * head.weight).reshape(2, -1).astype(numpy.float32)
        tensors[f"{name}.bias"] = numpy.array([head.scale * head.bias + head.shift], dtype=numpy.float32)
    (folder / "heads.safetensors").write_bytes(save(tensors))


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


def _data(ruler: _Ruler, out_of_fold: dict[str, tuple[Array, Array, Array]]) -> list[dict[str, Any]]:
    """Return which sources each head was trained on, with counts of both labels."""
    entries = []
    for head, (rows, _, y) in out_of_fold.items():
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


def _card(card: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    lines = [
        f"# Heads for {card['model']['file']}",
        "",
        f"SHA-256 of the model: `{card['model']['sha256']}`. "
        f"A pass goes through its first {card['blocks']} blocks.",
        "Written by `cai train probe`; made of the data below, under Apache-2.0.",
        "",
        "| head | probability that | says yes from |",
        "|---|---|---|",
    ]
    meanings = {
        "harm": "the answer is harmful",
        "evasion": "the answer refuses or evades",
        "request": "the request is unsafe",
    }
    for head, entry in card["heads"].items():
        lines.append(f"| {head} | {meanings[head]} | {entry['threshold']:.3f} |")
    lines += [
        "",
        "## Trained on",
        "",
        "| head | source | licence | positive | negative |",
        "|---|---|---|---|---|",
    ]
    for entry in card["data"]:
        lines.append(
            f"| {entry['head']} | {entry['name']} | {entry['licence']} "
            f"| {entry['positives']} | {entry['negatives']} |"
        )
    lines += [
        "",
        f"A PyRIT answer is harmful from a mean human score of {HARMFUL}, harmless up to {HARMLESS}, left "
        "out between; an answer that meets an unsafe objective counts as harmful, a refusal as harmless. "
        "Harmless PyRIT answers that open like a refusal were trained on as evasions, and not measured on. "
        "HH-RLHF answers are the chosen ones and count as harmless and willing. XSTest answers, and requests "
        "in other languages than English, were never trained on; XSTest's prompts train the head `request`. "
        "Layer, windows, penalty and the rates of false alarms behind the thresholds were chosen by "
        "cross-validation within the training data with XSTest's figures in view: its answers are unseen by "
        "the fit, not by every choice.",
        "",
        "## Figures",
        "",
        "95 % intervals from 1000 resamples of whole requests. An AUC below 0.90 is in bold.",
        "",
        "| head | measured on | n | positive | measure | value | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in card["figures"]:
        value = f"{figure['value']:.3f}"
        if figure["measure"] == "auc" and figure["value"] < 0.9:
            value = f"**{value}**"
        lines.append(
            f"| {figure['head']} | {figure['setting']} | {figure['n']} | {figure['positives']} "
            f"| {figure['measure']} | {value} | {figure['low']:.3f} to {figure['high']:.3f} |"
        )
    for note in card.get("notes", ()):
        lines += ["", note]
    return "\n".join([*lines, "", "![Reliability](reliability.svg)", ""])


def _plot(
    path: Path, ruler: _Ruler, heads: dict[str, _Head], out_of_fold: dict[str, tuple[Array, Array, Array]]
) -> None:
    """Draw how often each probability came true: out of fold, and on XSTest answers."""
    import matplotlib
    import numpy
    from matplotlib.figure import Figure as Canvas

    unseen = numpy.flatnonzero(ruler.sources == "xstest_answers")
    canvas = Canvas(figsize=(9, 3.2), layout="constrained")
    for axes, (head, fitted) in zip(canvas.subplots(1, len(heads)), heads.items(), strict=True):
        _, scores, y = out_of_fold[head]
        curves = [("out of fold", scores, y)]
        if len(unseen) and head != "request":
            curves.append(
                ("XSTest", _scores(head, fitted, ruler.examples, unseen), ruler.labels(head, unseen))
            )
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for label, found, truth in curves:
            probability = 1 / (1 + numpy.exp(-(fitted.scale * found + fitted.shift)))
            bins = numpy.array_split(numpy.argsort(probability, kind="stable"), 10)
            points = [(probability[part].mean(), truth[part].mean()) for part in bins if len(part)]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=label)
        axes.axvline(fitted.threshold, color="0.6", linewidth=1, linestyle=":")
        axes.set(title=head, xlabel="probability read", xlim=(0, 1), ylim=(0, 1))
        axes.legend(frameon=False, fontsize=7)
    canvas.axes[0].set_ylabel("share that came true")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cai"}):
        canvas.savefig(path, format="svg", metadata={"Date": None})
