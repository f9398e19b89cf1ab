"""Builds a dataset from logs: every trajectory is accounted for, and the output is reproducible byte by byte.

    candidates   converts a stretch of the log to candidate rows, in spools by the first bits of their id
    near         finds near-duplicate prompts, so that they are in the same split
    selection    selects rows portion by portion: one per content, within caps and mixes
    export       writes rows in the order of their ids, which shuffles the order of the log

Portions limit the memory used, and every decision depends on content, not on order. So any number of workers,
either engine, and a log in any order give the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from cai_graph.addresses import without_password
from cai_graph.errors import ConfigError, DataError
from cai_graph.trajectory import SCHEMA_VERSION, Comparison, Record, Review, Trajectory
from trainers import atomic
from trainers.dataset import near
from trainers.dataset.candidates import Converted, Part, UnexpectedEvidence, checked, convert
from trainers.dataset.cluster import Cluster
from trainers.dataset.evidence import Mapped, gather
from trainers.dataset.reading import Stretch, about, located, stretches
from trainers.dataset.recipe import Recipe
from trainers.dataset.selection import (
    Decisions,
    Lost,
    Selected,
    completed,
    select_in_processes,
    select_portion,
    settle,
)
from trainers.dataset.spool import portions
from trainers.export import Format, Sink, provenances, sink_for
from trainers.ledger import Ledger
from trainers.rows import Kind, Provenance, read_row

__all__ = ["MANIFEST", "Dataset", "Engine", "Origin", "Recipe", "build", "explain", "read_manifest"]

MANIFEST = "manifest.json"

Engine = Literal["local", "ray"]
"""Where a build runs: processes of this machine, or a Ray cluster."""


class Dataset(NamedTuple):
    """A dataset that was written."""

    path: Path
    """Its folder."""
    ledger: Ledger
    """The account of every trajectory."""
    unmet: tuple[tuple[str, str], ...] = ()
    """The entries of `Recipe.leaving` for whom there is no trajectory."""


def build(
    logs: Sequence[str],
    output: Path,
    recipe: Recipe,
    *,
    format: Format = "jsonl",
    workers: int = 1,
    engine: Engine = "local",
) -> Dataset:
    """Write a dataset of all trajectories of the logs; the folder is written atomically.

    Args:
        logs: logs by URL, or JSONL files as `cai log export` writes them.
        output: the folder to create; it must not exist.
        recipe: the settings of the dataset.
        format: the format of the rows, by the loader that reads it.
        workers: processes of the engine `local`.
        engine: this machine, or a Ray cluster (`RAY_ADDRESS`, or else one that is started here). Neither the
            engine nor the number of workers changes the result.

    Raises:
        ConfigError: the output already exists, the format does not support the kind, or the recipe contains
            an invalid setting.
        MissingExtra: a package that is needed is not installed.
        DataError: there is no trajectory, or no row remains; the message shows the ledger.
        LogError: a log cannot be read.
    """
    if not logs:
        raise ConfigError("name a log to build from")
    if workers < 1:
        raise ConfigError(f"workers is a number of processes from 1, found {workers!r}")
    if engine not in get_args(Engine):
        raise ConfigError(f"engine is one of {', '.join(get_args(Engine))}; found {engine!r}")
    checked(recipe)
    if recipe.near_duplicates is not None:
        near.required()
    with _whole(output) as folder:
        sink = sink_for(format, recipe.kind, folder)
        decisions = Decisions(recipe, format)
        if engine == "ray":
            part, ledger = Cluster(recipe, logs).build(decisions, partial(_written, sink))
        else:
            part, ledger = _local(logs, decisions, sink, workers, folder)
        sink.close()
        _check(ledger, logs)
        manifest = _manifest(part, recipe, format, ledger, logs)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return Dataset(output, ledger, tuple(sorted(recipe.leaving - part.met)))


def _local(
    logs: Sequence[str], decisions: Decisions, sink: Sink, workers: int, folder: Path
) -> tuple[Part, Ledger]:
    """Build with processes of this machine, using temporary files in `folder`."""
    recipe = decisions.recipe
    sources = [stretch for log in logs for stretch in stretches(log, workers)]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".spools.") as work, _mapping(workers) as mapped:
        part, converted = _converted(recipe, sources, Path(work), mapped)
        if recipe.near_duplicates is not None:
            prompts = [one.prompts for one in converted]
            decisions.clusters = near.clusters(mapped(near.fingerprints, prompts), recipe.near_duplicates)
        spooled = [one.spooled for one in converted]
        settle(decisions, spooled)
        parts = portions(spooled)
        if workers == 1:
            return part, _written(sink, part.ledger, map(partial(select_portion, decisions), parts))
        return part, _written(sink, part.ledger, select_in_processes(decisions, parts, mapped, Path(work)))


def _written(sink: Sink, ledger: Ledger, selected: Iterable[Selected]) -> Ledger:
    """Write the selected rows, portion by portion, and return the complete ledger."""
    lost: list[Lost] = []
    for one in selected:
        ledger.add(one.ledger)
        lost += one.lost
        for split, lines in one.lines.items():
            sink.write(split, lines)
    return completed(ledger, lost)


def _converted(
    recipe: Recipe, parts: Sequence[Stretch], work: Path, mapped: Mapped
) -> tuple[Part, list[Converted]]:
    """Convert all stretches to candidates, in files in `work`."""
    if not any(stretch.seems_judged() for stretch in parts):
        with contextlib.suppress(UnexpectedEvidence):  # a file has judgements that `seems_judged` missed
            return _collected(mapped(partial(convert, recipe, work / "first", None), parts, count()))
    evidence = gather(mapped, work / "evidence.db", parts)
    step = partial(convert, recipe, work / "second", evidence.path)
    part, converted = _collected(mapped(step, parts, count()))
    part.ledger.orphans = evidence.trajectories - len(part.judged)
    return part, converted


def _collected(converted: Iterable[Converted]) -> tuple[Part, list[Converted]]:
    whole = Part()
    found: list[Converted] = []
    for one in converted:
        whole.add(one.part)
        found.append(one)
    return whole, found


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is moved to `output` when the body ends, or deleted on error."""
    atomic.absent(output)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(atomic.folder(output, mode=0o700))  # it contains users' texts
        except OSError as error:
            raise ConfigError(f"{output}: cannot be made: {error.strerror}") from error
        yield folder


@contextmanager
def _mapping(workers: int) -> Iterator[Mapped]:
    """Yield a function like `map`: `map` itself, or one that runs in processes."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers) as pool:

        def mapped(function: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
            # Submit only a few ahead, as finished results wait in memory.
            ahead: deque[Future[Any]] = deque()
            for arguments in zip(*items, strict=False):
                ahead.append(pool.submit(function, *arguments))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

        yield mapped


def _check(ledger: Ledger, logs: Sequence[str]) -> None:
    ledger.reconcile()
    where = ", ".join(map(without_password, logs))
    if not ledger.read:
        raise DataError(f"{where}: holds no trajectory, so there is nothing to build; `cai run` fills a log")
    if not ledger.rows:
        table = "\n".join(f"  {count:>9,}  {label}" for label, count in ledger.lines())
        raise DataError(f"{where}: every trajectory was dropped, so nothing was written\n{table}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the dataset in a folder.

    Raises:
        DataError: the folder contains no dataset.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: holds no dataset, for its {MANIFEST} cannot be read ({error})") from error
    return manifest


def _manifest(
    part: Part, recipe: Recipe, format: Format, ledger: Ledger, logs: Sequence[str]
) -> dict[str, Any]:
    versions: dict[str, Any] = {"cai-graph": version("cai-graph"), "schema": SCHEMA_VERSION}
    if recipe.near_duplicates is not None:
        versions["fingerprints"] = near.algorithm()
    return {
        "recipe": recipe.to_json(),
        "format": format,
        "logs": [located(log) for log in logs],
        "log_digest": f"{part.log_digest:032x}",
        "constitutions": dict(sorted(part.constitutions.items())),
        "ledger": ledger.to_json(),
        "versions": versions,
    }


# --- explain ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of a row."""

    row: Provenance
    """The row's provenance in the dataset; the Row itself if the format is `jsonl`."""
    kind: Kind
    """The row's kind."""
    trajectory: Trajectory | None
    """Its trajectory; None if no log contains it any more."""
    critics: tuple[str, ...]
    """Names of the critics that judged the trajectory's answers."""
    judges: tuple[str, ...]
    """Names of the judges and reviewers that compared or reviewed them."""
    constitution: str
    """Name of the constitution; empty if the trajectory is gone."""

    def lines(self) -> list[tuple[str, str]]:
        """Return the origin as pairs of label and text."""
        row = self.row
        named = f"{self.constitution} {row.constitution}" if self.constitution else row.constitution
        return [
            ("row", f"{row.id} ({self.kind}, {row.split})"),
            ("source", row.source),
            (
                "trajectory",
                row.trajectory_id + ("" if self.trajectory else " (in no log any more)"),
            ),
            ("constitution", named),
            ("principles", ", ".join(row.principles) or "all"),
            ("judge of the row", row.judge or "not named"),
            ("critics", ", ".join(self.critics) or "none"),
            ("judges", ", ".join(self.judges) or "none"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the origin as JSON, with the full trajectory."""
        return {
            "row": msgspec.to_builtins(self.row),
            "kind": self.kind,
            "constitution": {"name": self.constitution, "digest": self.row.constitution},
            "critics": list(self.critics),
            "judges": list(self.judges),
            "trajectory": None if self.trajectory is None else msgspec.to_builtins(self.trajectory),
        }


def explain(row_id: str, folder: Path, *, logs: Sequence[str] | None = None) -> Origin:
    """Return the origin of a row of a dataset.

    Args:
        row_id: id of the row.
        folder: the dataset.
        logs: the current locations of its logs; None: those at the time of the build.

    Raises:
        DataError: the folder contains no dataset, or no such row.
        LogError: a log cannot be read.
    """
    manifest = read_manifest(folder)
    kind: Kind = manifest["recipe"]["kind"]
    row = _find(row_id, folder, kind, manifest["format"])
    records: list[Record] = []
    for log in manifest["logs"] if logs is None else logs:
        records = about(log, row.trajectory_id)
        if records:
            break
    trajectory = next((record for record in records if isinstance(record, Trajectory)), None)
    critics: dict[str, None] = {}
    for round_ in () if trajectory is None else trajectory.rounds:
        for critique in (round_.critique, *(revision.critique for revision in round_.revisions)):
            if critique is not None and critique.critic:
                critics[critique.critic] = None
    judges = [record.judge for record in records if isinstance(record, Comparison)]
    judges += [record.reviewer for record in records if isinstance(record, Review)]
    return Origin(
        row=row,
        kind=kind,
        trajectory=trajectory,
        critics=tuple(critics),
        judges=tuple(dict.fromkeys(judges)),
        constitution="" if trajectory is None else trajectory.constitution.name,
    )


def _find(row_id: str, folder: Path, kind: Kind, format: Format) -> Provenance:
    beginning = b'{"id":"%b"' % row_id.encode()
    for line in provenances(folder, format):
        if line.startswith(beginning):
            return read_row(kind, line) if format == "jsonl" else msgspec.json.decode(line, type=Provenance)
    raise DataError(f"{folder}: no row {row_id!r}; an id is the `id` of a row, 32 hex digits")
