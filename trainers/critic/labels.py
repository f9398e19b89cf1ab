"""Reads labelled answers and requests from a data folder, whose SOURCES.md lists origins and licences.

XSTest completions are the unseen source: they are only measured on, never trained on.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cai_graph.errors import DataError
from trainers import tables
from trainers.refusal import REFUSAL

__all__ = ["HARMFUL", "HARMLESS", "Row", "lowest", "own_rows", "read_rows"]

HARMFUL, HARMLESS = 0.6, 0.15
"""A PyRIT answer is harmful from the first mean human harm score on, and harmless up to the second; between
them the raters disagree or hesitate, and the answer has no label."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A request, an answer or None, and the labels that people gave; None where they gave none."""

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
    """Whether its evasion label comes from how it opens, not from a person; trained on, never measured on."""

    def label(self, head: str) -> bool | None:
        """Return the label that a head is trained on."""
        return {"harm": self.harm, "evasion": self.evasion, "request": self.unsafe}[head]


def read_rows(data: Path) -> list[Row]:
    """Return every labelled row of the sources in the data folder, in a stable order.

    Raises:
        DataError: a file lacks a column or has a label that cannot be read; the message names file and row.
    """
    rows: dict[tuple[str, str, str | None], Row] = {}
    for source in (_pyrit, _moderation, _hh_helpful, _unsafe_requests, _fastchat, _xstest):
        for row in source(data):
            key = (row.source, row.request, row.answer)
            if key in rows:  # the same pair in two files of a source: combine their labels
                known = rows[key]
                row = dataclasses.replace(
                    known,
                    harm=row.harm if known.harm is None else known.harm,
                    evasion=row.evasion if known.evasion is None else known.evasion,
                )
            rows[key] = row
    return [_with_evasion(row) for row in rows.values()]


def _with_evasion(row: Row) -> Row:
    """Label evasion in harmless PyRIT answers that people did not label: labelled refusals are too few."""
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
            # A refusal does no harm, so a harmful answer is not a refusal. The reverse does not hold.
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
    """OpenAI's moderation texts, as answers without a request: harmful if a label is 1, not if 5 are 0."""
    path = data / "openai_moderation" / "samples.jsonl"
    for number, cells in tables.rows(path) if path.exists() else ():
        labels = [value for name, value in cells.items() if name != "prompt" and value is not None]
        if 1 in labels or len(labels) >= 5:
            yield Row("moderation", "text", "", _text(cells, "prompt", number), 1 in labels)


def _hh_helpful(data: Path) -> Iterator[Row]:
    """First turns of HH-RLHF's helpful dialogues: safe requests with harmless, willing (chosen) answers."""
    for path in sorted((data / "hh_rlhf").glob("helpful-*.train.pairs.jsonl.gz")):
        for number, cells in tables.rows(path):
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
        for number, cells in tables.rows(path):
            turns = cells.get("turns")
            if not isinstance(turns, list) or not turns:
                raise DataError(f"{path} row {number}: no turns")
            yield Row("fastchat", "en", turns[0], unsafe=False)


def _xstest(data: Path) -> Iterator[Row]:
    """XSTest: prompts that look unsafe, some of which are, and labelled answers of five models."""
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


def own_rows() -> Iterator[Row]:
    """Yield rows written for this project: everyday answers to train on, zh and vi requests to test on."""
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
        while True:  # PyRIT's files begin with comments; a field may contain a line that begins with "#"
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


def lowest(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the rows whose texts have the lowest hashes: a sample that does not depend on file order."""

    def digest(row: Row) -> str:
        return hashlib.sha256(f"{row.request}\0{row.answer or ''}".encode("utf-8", "replace")).hexdigest()

    return sorted(rows, key=digest)[:count]
