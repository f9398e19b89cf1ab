"""Builds a dataset on a Ray cluster, with the same functions as on one machine, and to the same bytes.

    stretches ─ map ─> candidates, prompts and accounts, as Arrow tables in Ray's object store
    prompts   ─ map ─> fingerprints ─> clusters, in the driver
    candidates ─ group by spool, map ─> selected rows ─ sort by spool ─> the driver writes them

The workers read the logs, so every machine of the cluster must be able to read them under the same name. The
driver keeps in memory the clusters, the counts for the caps, and the evidence of people and judges; all other
data is limited only by the disks.
"""

from __future__ import annotations

import atexit
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_graph.errors import MissingExtra
from trainers.dataset import near
from trainers.dataset.candidates import Candidates, Part
from trainers.dataset.evidence import EvidenceFile
from trainers.dataset.reading import Stretch, appended, stretches
from trainers.dataset.recipe import Recipe
from trainers.dataset.selection import Decisions, Selected, limits_of, select
from trainers.dataset.spool import Spooling, candidate_of, decided
from trainers.ledger import Ledger, Reason

if TYPE_CHECKING:
    import pyarrow
    import ray.data

__all__ = ["Cluster"]

_TABLE_BYTES = 8 << 20
"""About the size of the tables that a worker returns."""
_STRETCH_BYTES = 64 << 20
"""About the size of the part of the log that is one task."""
_SPOOL_BYTES = 256 << 20
"""About the size of the part of the log that goes into one spool; there are at most 2¹² spools."""
_CANDIDATE, _PROMPT, _PART = 0, 1, 2

Row = tuple[int, int, bytes, bytes]
"""The type of row, its spool, its head (for a prompt: the key) and its body (for a prompt: the text)."""


class Cluster:
    """One build on Ray."""

    def __init__(self, recipe: Recipe, logs: Sequence[str]) -> None:
        """Connect to the cluster of RAY_ADDRESS, or start one on this machine.

        Raises:
            MissingExtra: Ray is not installed.
            DataError, LogError: a log cannot be read.
        """
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("`cai dataset build --engine ray`", "ray", "ray") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        self.recipe = recipe
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cores = max(1, int(resources.get("CPU", 1)))
        sizes = {log: sum(stretch.size() for stretch in stretches(log, 1)) for log in logs}
        size = sum(sizes.values())
        self.stretches = [
            stretch
            for log, bytes in sizes.items()
            for stretch in stretches(log, max(2 * cores, bytes // _STRETCH_BYTES))
        ]
        self.bits = min(12, max(2, (size // _SPOOL_BYTES).bit_length()))
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.DataContext.get_current().default_hash_shuffle_parallelism = min(2 * cores, 1 << self.bits)

    def build(
        self, decisions: Decisions, write: Callable[[Ledger, Iterable[Selected]], Ledger]
    ) -> tuple[Part, Ledger]:
        """Make all rows, and pass them to `write` in the order of the dataset.

        Args:
            decisions: recipe and format; clusters and limits are added here.
            write: takes the ledger so far and the selected rows, and returns the complete ledger.
        """
        import ray

        evidence, judged = self._evidence()
        shared = ray.put(evidence) if judged else None
        made = self._table(_converted, recipe=self.recipe, shared=shared, bits=self.bits).materialize()
        part = Part()
        for row in made.filter(expr=f"what == {_PART}").iter_rows():
            part.add(pickle.loads(row["body"]))
        part.ledger.orphans = judged - len(part.judged)
        if self.recipe.near_duplicates is not None:
            prints = made.filter(expr=f"what == {_PROMPT}").map_batches(_fingerprints, batch_format="pyarrow")
            found = [(row["keys"], _matrix(row["prints"])) for row in prints.iter_rows()]
            decisions.clusters = near.clusters(found, self.recipe.near_duplicates)
        candidates = made.filter(expr=f"what == {_CANDIDATE}")
        for limit in limits_of(self.recipe, decisions.clusters):
            heads = candidates.select_columns(["spool", "head"]).groupby("spool")
            for row in heads.map_groups(
                _staying, fn_kwargs={"decisions": decisions}, batch_format="pyarrow"
            ).iter_rows():
                limit.see(candidate_of(row["head"]))
            limit.settle()
            decisions.limits.append(limit)
        selected = candidates.groupby("spool").map_groups(
            _selected, fn_kwargs={"decisions": decisions}, batch_format="pyarrow"
        )
        rows = (pickle.loads(row["selected"]) for row in selected.sort("spool").iter_rows())
        return part, write(part.ledger, rows)

    def _table(self, function: Any, **arguments: Any) -> ray.data.Dataset:
        import ray

        items = [{"number": n, **stretch._asdict()} for n, stretch in enumerate(self.stretches)]
        dataset = ray.data.from_items(items, override_num_blocks=max(1, len(items)))
        return dataset.map_batches(function, fn_kwargs=arguments, batch_size=1, batch_format="pyarrow")

    def _evidence(self) -> tuple[bytes, int]:
        """Return the evidence of all logs as the bytes of an EvidenceFile, and its number of Trajectories."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "evidence.db"
            with EvidenceFile(path) as file:
                for row in self._table(_appended).iter_rows():
                    file.add([(row["about"], row["place"], row["payload"])])
                judged = file.trajectories()
            return path.read_bytes(), judged


@cache
def _known(shared: ray.ObjectRef[bytes]) -> EvidenceFile:
    """Return the evidence; each process writes it to its disk once, and removes it on exit."""
    import ray

    handle, name = tempfile.mkstemp(prefix="cai-evidence-", suffix=".db")
    atexit.register(os.unlink, name)
    with os.fdopen(handle, "wb") as file:
        file.write(ray.get(shared))
    return EvidenceFile(Path(name))


def _stretch_of(batch: pyarrow.Table) -> tuple[int, Stretch]:
    (row,) = batch.to_pylist()
    return row.pop("number"), Stretch(**row)


def _appended(batch: pyarrow.Table) -> Iterator[pyarrow.Table]:
    import pyarrow

    number, stretch = _stretch_of(batch)
    rows = [
        {"about": about, "place": place, "payload": payload}
        for place, (about, payload) in enumerate(appended(stretch), number << 40)
    ]
    names = {"about": pyarrow.string(), "place": pyarrow.int64(), "payload": pyarrow.large_binary()}
    yield pyarrow.Table.from_pylist(rows, pyarrow.schema(names.items()))


def _converted(
    batch: pyarrow.Table, *, recipe: Recipe, shared: ray.ObjectRef[bytes] | None, bits: int
) -> Iterator[pyarrow.Table]:
    """Convert a stretch to its candidates, all its prompts, and the Part with the ledger of the rest."""
    number, stretch = _stretch_of(batch)
    prompts: dict[bytes, bytes] = {}

    def told(key: bytes, text: str) -> None:
        if key not in prompts:
            prompts[key] = near.read_text(text)

    known = None if shared is None else _known(shared)
    candidates = Candidates(
        recipe,
        number,
        evidence=None if known is None else known.of,
        prompts=None if recipe.near_duplicates is None else told,
    )
    rows: list[Row] = []
    size = 0
    for head, body in candidates.of(stretch.payloads()):
        rows.append((_CANDIDATE, int.from_bytes(head[:2]) >> (16 - bits), head, body))
        size += len(body)
        if size > _TABLE_BYTES:
            yield _rows(rows)
            rows, size = [], 0
    rows += [(_PROMPT, -1, key, text) for key, text in prompts.items()]
    rows.append((_PART, -1, b"", pickle.dumps(candidates.part)))
    yield _rows(rows)


def _rows(rows: list[Row]) -> pyarrow.Table:
    import pyarrow

    schema = pyarrow.schema(
        [
            ("what", pyarrow.int8()),
            ("spool", pyarrow.int32()),
            ("head", pyarrow.binary()),
            ("body", pyarrow.large_binary()),
        ]
    )
    columns = zip(*rows, strict=True)
    return pyarrow.table([pyarrow.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)


def _fingerprints(batch: pyarrow.Table) -> pyarrow.Table:
    import pyarrow

    keys = batch["head"].to_pylist()
    prints = near.hashed([text.decode() for text in batch["body"].to_pylist()])
    columns = [[b"".join(keys)], [prints.tobytes()]]
    return pyarrow.table([pyarrow.array(c, pyarrow.large_binary()) for c in columns], ["keys", "prints"])


def _matrix(prints: bytes) -> Any:
    import numpy

    return numpy.frombuffer(prints, numpy.uint32).reshape(-1, near.HASHES)


def _staying(group: pyarrow.Table, *, decisions: Decisions) -> pyarrow.Table:
    """Return those heads of one spool that the limits so far do not drop."""
    import pyarrow

    spooling: list[Spooling] = [(candidate_of(head), head) for head in group["head"].to_pylist()]
    staying = [
        head for _, head, reason in decided(spooling, decisions.limits) if reason in (None, Reason.REMOVED)
    ]
    return pyarrow.table({"head": pyarrow.array(staying, pyarrow.binary())})


def _selected(group: pyarrow.Table, *, decisions: Decisions) -> pyarrow.Table:
    """Select from the candidates of one spool; see `select`."""
    import pyarrow

    heads, bodies = group["head"].to_pylist(), group["body"].to_pylist()
    spooling = [(candidate_of(head), body) for head, body in zip(heads, bodies, strict=True)]
    selected = pickle.dumps(select(decisions, spooling))
    return pyarrow.table(
        {
            "spool": pyarrow.array([group["spool"][0].as_py()], pyarrow.int32()),
            "selected": pyarrow.array([selected], pyarrow.large_binary()),
        }
    )
