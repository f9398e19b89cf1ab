"""Selects the rows of a dataset from the candidates: one per content, within the caps, in their split."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from trainers.dataset.evidence import Mapped
from trainers.dataset.near import Clusters
from trainers.dataset.recipe import Recipe
from trainers.dataset.split import test_keys
from trainers.dataset.spool import Candidate, Limit, Mix, Portion, Spooled, Spooling, decided, load, portions
from trainers.export import Format, fits_in
from trainers.ledger import REASONS, Ledger, Reason
from trainers.rows import Split, line_of

__all__ = [
    "SPLITS",
    "Decisions",
    "Lost",
    "Selected",
    "completed",
    "limits_of",
    "select",
    "select_in_processes",
    "select_portion",
    "settle",
]

SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass
class Decisions:
    """Decisions that depend on all candidates, made before any row is written."""

    recipe: Recipe
    """The settings of the dataset."""
    format: Format
    """The format of the rows, by the loader that reads it."""
    clusters: Clusters = field(default_factory=dict)
    """Clusters of near-duplicate prompts."""
    limits: list[Limit] = field(default_factory=list)
    """Settled caps and mixes, in the order in which they apply."""


class Lost(NamedTuple):
    """A dropped row of a trajectory that made several rows."""

    trajectory: int
    """The trajectory's number."""
    siblings: int
    """Number of candidates that the trajectory made."""
    reason: Reason
    """Why this row was dropped."""


class Selected(NamedTuple):
    """The result of a selection from some candidates."""

    ledger: Ledger
    """The account of the rows, and of trajectories that made only one candidate."""
    lost: list[Lost]
    """Dropped rows of trajectories that made several."""
    lines: dict[Split, bytes]
    """The rows of each non-empty split as lines of JSON, in one block, which is fast to pass between
    processes."""


def limits_of(recipe: Recipe, clusters: Clusters) -> Iterator[Limit]:
    """Yield a recipe's limits in order; each applies to the rows that the previous ones do not drop."""
    if recipe.per_user is not None:
        yield Limit(Reason.USER_CAP, attrgetter("user"), recipe.per_user)
    if recipe.per_tenant is not None:
        yield Limit(Reason.TENANT_CAP, attrgetter("tenant"), recipe.per_tenant)
    if recipe.per_cluster is not None:
        yield Limit(Reason.NEAR_DUPLICATE, partial(_cluster, clusters), recipe.per_cluster)
    if recipe.kept_per_revised is not None:
        yield Mix(recipe.kept_per_revised)


def _cluster(clusters: Clusters, candidate: Candidate) -> bytes:
    return clusters.get(candidate.prompt, candidate.prompt)


def settle(decisions: Decisions, spooled: Sequence[Spooled]) -> None:
    """Add the recipe's limits to `decisions`, each settled over all candidates."""
    for limit in limits_of(decisions.recipe, decisions.clusters):
        for portion in portions(spooled):
            for candidate, _, reason in decided(load(portion, bodies=False), decisions.limits):
                if reason in (None, Reason.REMOVED):
                    limit.see(candidate)
        limit.settle()
        decisions.limits.append(limit)


def select(decisions: Decisions, spooling: Iterable[Spooling]) -> Selected:
    """Select the rows to write from all candidates of a range of ids, and account for the others."""
    recipe, clusters = decisions.recipe, decisions.clusters
    ledger = Ledger()
    lost: list[Lost] = []
    lines: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    fits = fits_in(decisions.format, recipe.kind)
    below = test_keys(recipe.test_share)
    for candidate, body, reason in decided(spooling, decisions.limits):
        if reason is None:
            key = candidate.prompt
            if clusters:
                key = clusters.get(key, key)
            split: Split = "test" if key < below else "train"
            line = line_of(candidate.digest, body, split)
            if fits is None or fits(line):
                lines[split].append(line)
                continue
            reason = Reason.NOT_IN_FORMAT
        ledger.drop_row(reason)
        if candidate.siblings == 1:
            ledger.drop(reason)
        else:
            lost.append(Lost(candidate.trajectory, candidate.siblings, reason))
    blocks: dict[Split, bytes] = {}
    for split, rows in lines.items():
        if rows:
            ledger.keep(split, len(rows))
            blocks[split] = b"".join(rows)
    return Selected(ledger, lost, blocks)


def select_portion(decisions: Decisions, portion: Portion) -> Selected:
    """Return the result of `select` for one portion."""
    return select(decisions, load(portion))


def select_in_processes(
    decisions: Decisions, parts: Iterable[Portion], mapped: Mapped, work: Path
) -> Iterator[Selected]:
    """Yield the result of `select` for each portion, computed in processes of this machine.

    Each process reads the decisions once. Rows are returned in files in `work`, since on the one pipe that
    all processes share they would take longer than the selection.
    """
    shared = work / "decisions"
    shared.write_bytes(pickle.dumps(decisions))
    for selected, paths in mapped(partial(_select_into, work, shared), parts, count()):
        yield selected._replace(lines={split: _taken(path) for split, path in paths.items()})


def _select_into(
    work: Path, shared: Path, portion: Portion, number: int
) -> tuple[Selected, dict[Split, Path]]:
    """Return the result of `select` without the lines, and for each split the file with its lines."""
    selected = select_portion(_decisions(shared), portion)
    paths: dict[Split, Path] = {split: work / f"{number}.{split}" for split in selected.lines}
    for split, path in paths.items():
        path.write_bytes(selected.lines[split])
    return selected._replace(lines={}), paths


def _taken(path: Path) -> bytes:
    lines = path.read_bytes()
    path.unlink()
    return lines


@cache
def _decisions(path: Path) -> Decisions:
    found: Decisions = pickle.loads(path.read_bytes())
    return found


def completed(ledger: Ledger, lost: Iterable[Lost]) -> Ledger:
    """Add trajectories that made several rows to the ledger; one is dropped if all its rows are."""
    families: dict[int, list[Lost]] = {}
    for row in lost:
        families.setdefault(row.trajectory, []).append(row)
    for rows in families.values():
        if len(rows) == rows[0].siblings:
            ledger.drop(min((row.reason for row in rows), key=REASONS.index))
    ledger.gave_rows = ledger.read - sum(ledger.dropped.values())
    return ledger
