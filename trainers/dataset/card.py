"""Describes a dataset: writes its card in the Hugging Face Hub's format, and a static page with plots.

summarise    counts in one pass over the rows, and over the Comparisons of the logs that still exist
card         README.md with the hub's metadata: licence, languages, digests, ledger
page         report.html: the same figures as plots; every text in it is escaped
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cai_graph.errors import CaiError, ConfigError, MissingExtra
from cai_graph.trajectory import Comparison, decode
from trainers import atomic, markdown, svg
from trainers.dataset.dataset import read_manifest
from trainers.dataset.reading import appended, stretches
from trainers.export import CARD, Format, loading, read_rows
from trainers.feedback.positions import Positions, Share
from trainers.page import document, figure, table
from trainers.refusal import REFUSAL
from trainers.rows import Kind, PreferenceRow, Row, Turn, UnpairedRow

__all__ = ["Report", "Summary", "report", "summarise"]

LANGUAGE_ROWS = 2000
"""How many rows the language is detected of; rows are in random order, so the first are a fair sample."""
LANGUAGE_CHARS = 20
"""Minimum length of a prompt whose language is detected."""

_WHAT = "`cai dataset report`"
_COLOUR = "#7aa6c2"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass
class Side:
    """The answers of one side of a dataset: all of them, the chosen, the rejected."""

    words: array[int] = field(default_factory=lambda: array("I"))
    """Length of each answer, in words."""
    refusals: int = 0
    """How many begin like a refusal, in English."""

    def add(self, turns: Sequence[Turn]) -> None:
        """Count one answer."""
        text = turns[-1].content
        self.words.append(len(text.split()))
        # An answer without text is a tool call, not a refusal: datasets contain no empty answers.
        self.refusals += REFUSAL.match(text) is not None

    @property
    def refused(self) -> Share:
        """The share of answers that begin like a refusal."""
        return Share(self.refusals, len(self.words))

    @property
    def median(self) -> int:
        """Median length in words; 0 without answers."""
        return sorted(self.words)[len(self.words) // 2] if self.words else 0


@dataclass
class Summary:
    """Counts over a dataset's rows."""

    manifest: dict[str, Any]
    """The dataset's manifest; see `trainers.dataset.dataset`."""
    loading: dict[str, Any]
    """Card metadata from which the library `datasets` knows how to read the files."""
    splits: Counter[str] = field(default_factory=Counter)
    """Rows by split."""
    sources: Counter[str] = field(default_factory=Counter)
    """Rows by the source of their evidence."""
    principles: Counter[str] = field(default_factory=Counter)
    """Rows by principle or aim; `(all)` for rows about no particular one."""
    judges: Counter[str] = field(default_factory=Counter)
    """Rows by judge."""
    languages: Counter[str] = field(default_factory=Counter)
    """Prompts of the sample by language (ISO 639-1); `und` if the prompt is too short to detect it."""
    sides: dict[str, Side] = field(default_factory=dict)
    """`chosen` and `rejected` for pairs, `desirable` and `undesirable` for labelled answers, else
    `answers`."""
    p_chosen: array[float] = field(default_factory=lambda: array("d"))
    """`p_chosen` of each pair."""
    longer_chosen: int = 0
    """Pairs whose chosen answer has more words than the rejected one."""
    positions: dict[str, Positions] = field(default_factory=dict)
    """Statistics of each judge's comparisons in the logs, by judge."""
    missing_logs: list[str] = field(default_factory=list)
    """Logs that are no longer where they were when the dataset was built."""

    @property
    def kind(self) -> Kind:
        """The kind of rows."""
        found: Kind = self.manifest["recipe"]["kind"]
        return found

    def add(self, row: Row) -> None:
        """Count one row."""
        self.splits[row.split] += 1
        self.sources[row.source] += 1
        self.judges[row.judge or "not named"] += 1
        self.principles.update(row.principles or ("(all)",))
        if isinstance(row, PreferenceRow):
            chosen, rejected = self._of("chosen"), self._of("rejected")
            chosen.add(row.chosen)
            rejected.add(row.rejected)
            self.p_chosen.append(row.p_chosen)
            self.longer_chosen += chosen.words[-1] > rejected.words[-1]
        elif isinstance(row, UnpairedRow):
            self._of("desirable" if row.label else "undesirable").add(row.completion)
        elif completion := getattr(row, "completion", None):
            self._of("answers").add(completion)

    def _of(self, name: str) -> Side:
        return self.sides.setdefault(name, Side())


class Report(NamedTuple):
    """The two files that were written, and the logs that could not be read."""

    card: Path
    """The card."""
    page: Path
    """The page."""
    missing_logs: tuple[str, ...]
    """Logs that are no longer where they were; the figures do not include their judges."""


def report(folder: Path, *, licence: str, title: str | None = None) -> Report:
    """Write a dataset's card and page into its folder; each file is written atomically.

    Args:
        folder: the dataset, in the format `jsonl` or `parquet`.
        licence: the licence of the texts, by the hub's name, such as `cc-by-4.0`; only you can know it.
        title: the card's heading; the folder's name by default.

    Raises:
        ConfigError: the dataset is in another format.
        DataError: the folder contains no dataset, or a row cannot be read.
        MissingExtra: matplotlib or py3langid is not installed.
    """
    summary = summarise(folder)
    name = title or folder.name
    made = Report(folder / CARD, folder / "report.html", tuple(summary.missing_logs))
    atomic.write(made.card, card(summary, licence, name))
    atomic.write(made.page, page(summary, name))
    return made


def summarise(folder: Path) -> Summary:
    """Count a dataset's rows and its logs' comparisons. Raises as `report`."""
    manifest = read_manifest(folder)
    kind: Kind = manifest["recipe"]["kind"]
    format: Format = manifest["format"]
    if format not in ("jsonl", "parquet"):
        raise ConfigError(
            f"{folder}: is in the format {format!r}; the report reads 'jsonl' and 'parquet', "
            "so build one of these"
        )
    try:
        from py3langid import classify
    except ImportError as error:
        raise MissingExtra("`cai dataset report`", "py3langid", "train") from error
    summary = Summary(manifest, loading(folder, kind, format))
    for number, row in enumerate(read_rows(folder, kind, format)):
        summary.add(row)
        if number < LANGUAGE_ROWS:
            text = next((turn.content for turn in reversed(row.prompt) if turn.role == "user"), "")
            summary.languages[classify(text)[0] if len(text) >= LANGUAGE_CHARS else "und"] += 1
    for log in manifest["logs"]:
        try:
            _count_comparisons(log, summary.positions)
        except CaiError:
            summary.missing_logs.append(log)
    return summary


def _count_comparisons(log: str, positions: dict[str, Positions]) -> None:
    for stretch in stretches(log, 1):
        for _, payload in appended(stretch):
            record = decode(payload)
            if isinstance(record, Comparison):
                positions.setdefault(record.judge, Positions(record.judge)).add(record)


# --- the figures in words -----------------------------------------------------------------------------


def _facts(summary: Summary) -> list[tuple[str, str]]:
    manifest = summary.manifest
    splits = ", ".join(f"{count:,} {split}" for split, count in sorted(summary.splits.items()))
    named = ", ".join(f"{name} ({digest[:12]})" for digest, name in manifest["constitutions"].items())
    facts = [
        ("kind", summary.kind),
        ("rows", splits),
        ("constitution", named or "none"),
        ("log digest", manifest["log_digest"]),
        ("made with", f"cai-graph {manifest['versions']['cai-graph']}"),
        ("evidence", _listed(summary.sources)),
        ("judges", _listed(summary.judges)),
        ("languages of the prompts", _listed(summary.languages)),
    ]
    for name, side in summary.sides.items():
        facts.append((f"{name}: median length", f"{side.median:,} words"))
        facts.append((f"{name}: open like a refusal", str(side.refused)))
    if summary.p_chosen:
        facts.append(("chosen is the longer one", str(Share(summary.longer_chosen, len(summary.p_chosen)))))
    for judge, found in summary.positions.items():
        facts.append((f"{judge}: chose a place, not an answer", str(found.bias)))
        if found.agreement.of:
            facts.append((f"{judge}: prefers the revision to the draft", str(found.agreement)))
    if summary.missing_logs:
        # Without their folders, as a card should not reveal the layout of the machine.
        names = ", ".join(log.rpartition("/")[2] for log in summary.missing_logs)
        facts.append(("logs not found, so no figures of judges", names))
    return facts


def _listed(counts: Counter[str]) -> str:
    most = 8
    listed = [f"{name} {count:,}" for name, count in counts.most_common(most)]
    if (others := len(counts) - most) > 0:
        listed.append(f"and {others} more")
    return ", ".join(listed) or "none"


def _accounts(summary: Summary) -> list[tuple[str, int]]:
    ledger = summary.manifest["ledger"]
    accounts = [("trajectories read", ledger["read"]), ("gave rows", ledger["gave_rows"])]
    accounts += [(f"dropped: {reason}", count) for reason, count in ledger["dropped"].items()]
    accounts.append(("rows made", ledger["made"]))
    accounts += [(f"rows dropped: {reason}", count) for reason, count in ledger["dropped_rows"].items()]
    accounts += [(f"rows in {split}", count) for split, count in ledger["kept"].items()]
    return accounts


# --- the card -----------------------------------------------------------------------------------------


def card(summary: Summary, licence: str, title: str) -> str:
    """Return the card: YAML metadata for the hub, then the figures in Markdown.

    Format: https://huggingface.co/docs/hub/datasets-cards
    """
    rows = sum(summary.splits.values())
    metadata = {
        "pretty_name": title,
        "license": licence,
        "language": sorted(code for code, count in summary.languages.items() if code != "und" and count > 1),
        "size_categories": [next((name for most, name in _SIZES if rows < most), "n>1M")],
        "tags": ["cai-graph", "constitutional-ai", summary.kind],
        **summary.loading,
    }
    accounts = [(label, f"{count:,}") for label, count in _accounts(summary)]
    principles = [(name, f"{count:,}") for name, count in summary.principles.most_common()]
    recipe = json.dumps(_of_nobody(summary.manifest["recipe"]), indent=2)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---

# {markdown.cell(title)}

Made by cai_graph from the log of an application: answers that were drafted, criticised and revised under a
written constitution ([Bai et al. 2022](https://arxiv.org/abs/2212.08073)). Texts were written by users and by
models; some are offensive or wrong, on the rejected side by design.

{markdown.table(("", ""), _facts(summary))}

Refusals are counted by how an answer opens, in English. Each row names its trajectory, constitution, judge
and evidence; `cai dataset explain ROW_ID` walks back to them.

## Ledger

{markdown.table(("", ""), accounts)}

## Rows by principle

{markdown.table(("principle or aim", "rows"), principles)}

## Recipe

```json
{recipe}
```
"""


def _of_nobody(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without the names of removed users and tenants, which older manifests contain."""
    return {
        name: len(value) if name.startswith("without_") and isinstance(value, list) else value
        for name, value in recipe.items()
    }


# --- the page -----------------------------------------------------------------------------------------


def page(summary: Summary, title: str) -> str:
    """Return the page: one HTML file without scripts or external resources."""
    accounts = [(label, f"{count:,}") for label, count in _accounts(summary)]
    figures = "".join(figure(svg, caption) for svg, caption in _figures(summary))
    return document(
        title,
        f"{table(_facts(summary))}<h2>Ledger: what became of every trajectory and every row</h2>\n"
        f"{table(accounts, numbers=(1,))}<h2>Figures</h2>\n{figures}",
    )


def _figures(summary: Summary) -> Iterable[tuple[str, str]]:
    """Yield the plots for which the rows have data, as SVG, with their captions."""
    if summary.sides:
        yield (
            _lengths(summary.sides),
            "Length of the answers. A reward model may learn length where chosen ones are longer.",
        )
        yield (
            _refusals(summary.sides),
            "Refusals. Where chosen ones refuse more, training on them teaches refusing.",
        )
    if summary.p_chosen:
        yield _sureness(summary.p_chosen), "How sure the evidence is of each pair."
    yield _counts(summary.principles), "Rows by principle or aim. What is rare here is hardly learnt."
    rows = sum(summary.languages.values())
    yield _counts(summary.languages), f"Language of the prompts, of {rows:,} rows."


def _lengths(sides: Mapping[str, Side]) -> str:
    longest = max(1, *(max(side.words, default=1) for side in sides.values()))
    edges = [longest * step / 30 for step in range(31)]
    with svg.canvas(_WHAT, (8, 3)) as (drawing, (axes,)):
        for name, side in sides.items():
            axes.hist(side.words, bins=edges, histtype="step", linewidth=2, label=name)
        axes.set(xlabel="words", ylabel="answers")
        axes.legend(frameon=False)
        return svg.text(drawing)


def _refusals(sides: Mapping[str, Side]) -> str:
    shares = [side.refused for side in sides.values()]
    whiskers = [
        [share.value - share.interval[0] for share in shares],
        [share.interval[1] - share.value for share in shares],
    ]
    with svg.canvas(_WHAT, (8, 0.6 + 0.5 * len(sides))) as (drawing, (axes,)):
        axes.barh(list(sides), [share.value for share in shares], xerr=whiskers, color=_COLOUR)
        axes.set(xlim=(0, 1), xlabel="share that opens like a refusal, with its 95 % interval")
        axes.invert_yaxis()
        return svg.text(drawing)


def _sureness(p_chosen: Sequence[float]) -> str:
    with svg.canvas(_WHAT, (8, 2.6)) as (drawing, (axes,)):
        axes.hist(p_chosen, bins=[0.5 + step / 40 for step in range(21)], color=_COLOUR)
        axes.set(xlabel="p(chosen is better)", ylabel="pairs")
        return svg.text(drawing)


def _counts(counts: Counter[str]) -> str:
    top = counts.most_common(25)
    with svg.canvas(_WHAT, (8, 0.7 + 0.28 * len(top))) as (drawing, (axes,)):
        axes.barh(range(len(top)), [count for _, count in top], color=_COLOUR)
        axes.set_yticks(range(len(top)), [svg.label(name[:60]) for name, _ in top])
        axes.set(xlabel="rows")
        axes.invert_yaxis()
        return svg.text(drawing)
