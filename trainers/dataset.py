"""From a log to a dataset: every trajectory accounted for, every row traceable, the same bytes each time.

    convert    a stretch of the log → candidate rows, in spools by the first bits of their digest
    select     spool by spool: of rows of the same content one stays, caps and mixes hold
    write      rows in the order of their digest, which is no order of the log's: a shuffled set

Spools bound the memory, and every decision is by content and not by order. So any number of workers, either
engine, and a log in any order give the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import msgspec
import xxhash

from cai_graph.errors import ConfigError, DataError
from cai_graph.log import without_password
from cai_graph.trajectory import SCHEMA_VERSION, Comparison, Record, Review, Trajectory
from trainers.conversion import CONVERSIONS, Terms
from trainers.export import Format, Sink, provenances, sink_for
from trainers.ledger import REASONS, Ledger, Reason
from trainers.reading import NO_EVIDENCE, Evidence, about, evidence, payloads, read_logged
from trainers.rows import KINDS, Dropped, Encoded, Kind, Provenance, Source, Split, encode_row, read_row
from trainers.split import prompt_key, prompt_text, side

__all__ = ["Dataset", "Origin", "Recipe", "build", "explain", "read_manifest"]

MANIFEST = "manifest.json"
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a dataset depends on besides the log; it stands whole in the manifest."""

    kind: Kind
    """The kind of data."""
    test_share: float = 0.05
    """Share of the prompts that go to `test`, in [0, 1)."""
    per_user: int | None = None
    """Most rows of one user (`metadata["user"]`); None: no cap."""
    per_tenant: int | None = None
    """Most rows of one tenant (`metadata["tenant"]`); None: no cap."""
    kept_per_revised: float | None = None
    """Kept drafts for each other row, at most; None: all. Only for `sft`."""
    without_users: tuple[str, ...] = ()
    """Users whose rows are removed, after every other decision."""
    without_tenants: tuple[str, ...] = ()
    """Tenants whose rows are removed, after every other decision."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind is one of {', '.join(KINDS)}; found {self.kind!r}")
        if not 0 <= self.test_share < 1:
            raise ConfigError(f"test_share is a share from 0 to below 1, found {self.test_share!r}")
        for name in ("per_user", "per_tenant"):
            if (cap := getattr(self, name)) is not None and cap < 1:
                raise ConfigError(f"{name} is a number of rows from 1, found {cap!r}")
        if self.kept_per_revised is not None:
            if self.kind != "sft":
                raise ConfigError("kept_per_revised mixes rows of the kind sft; leave it out for others")
            if self.kept_per_revised < 0:
                raise ConfigError(f"kept_per_revised is a ratio from 0, found {self.kept_per_revised!r}")


class Dataset(NamedTuple):
    """A dataset that was written."""

    path: Path
    """Its folder."""
    ledger: Ledger
    """What became of every trajectory."""


def build(logs: Sequence[str], output: Path, recipe: Recipe, *, format: Format = "jsonl") -> Dataset:
    """Write a dataset of all trajectories of the logs; the folder appears whole or not at all.

    Args:
        logs: logs by URL, or JSONL files as `cai log export` writes them.
        output: the folder to make; it must not be there.
        recipe: what to make.
        format: whose loader is to read it.

    Raises:
        ConfigError: the output is there already, or the format has no place for the kind.
        MissingExtra: the format needs a package that is not installed.
        DataError: there is no trajectory, or no row is left; the message shows the ledger.
        LogError: a log cannot be read.
    """
    if not logs:
        raise ConfigError("name a log to build from")
    if output.exists():
        raise ConfigError(f"{output}: is there already; name a new folder, or remove it first")
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        spools = work / "spools"
        spools.mkdir()
        whole = work / "dataset"
        whole.mkdir()
        writer = sink_for(format, recipe.kind, whole)
        part = convert(logs, recipe, spools)
        ledger = _select(part, recipe, spools, writer)
        writer.close()
        _check(ledger, logs)
        (whole / MANIFEST).write_text(
            json.dumps(_manifest(part, recipe, format, ledger, logs), indent=2) + "\n"
        )
        os.replace(whole, output)
    finally:
        shutil.rmtree(work)
    return Dataset(output, ledger)


def _check(ledger: Ledger, logs: Sequence[str]) -> None:
    ledger.reconcile()
    where = ", ".join(map(without_password, logs))
    if not ledger.read:
        raise DataError(f"{where}: holds no trajectory, so there is nothing to build; `cai run` fills a log")
    if not ledger.rows:
        table = "\n".join(f"  {count:>9,}  {label}" for label, count in ledger.lines())
        raise DataError(f"{where}: every trajectory was dropped, so nothing was written\n{table}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return how the dataset in a folder was made.

    Raises:
        DataError: the folder holds no dataset.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: holds no dataset, for its {MANIFEST} cannot be read ({error})") from error
    return manifest


def _manifest(
    part: Part, recipe: Recipe, format: Format, ledger: Ledger, logs: Sequence[str]
) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(recipe),
        "format": format,
        "logs": [without_password(log) for log in logs],
        "log_digest": f"{part.log_digest:032x}",
        "constitutions": dict(sorted(part.constitutions.items())),
        "ledger": ledger.to_json(),
        "versions": {"cai-graph": version("cai-graph"), "schema": SCHEMA_VERSION},
    }


# --- explain ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a row came from."""

    row: Provenance
    """What the dataset says of the row; the Row itself where it holds rows as they are."""
    kind: Kind
    """Its kind."""
    trajectory: Trajectory | None
    """Its trajectory; None where no log holds it any more."""
    critics: tuple[str, ...]
    """Who judged the trajectory's answers."""
    judges: tuple[str, ...]
    """Who compared or reviewed them."""
    constitution: str
    """Name of the constitution; empty where the trajectory is gone."""

    def lines(self) -> list[tuple[str, str]]:
        """Return what is said of the row, as label and text."""
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
        """Return the same as JSON, the trajectory in full."""
        return {
            "row": msgspec.to_builtins(self.row),
            "kind": self.kind,
            "constitution": {"name": self.constitution, "digest": self.row.constitution},
            "critics": list(self.critics),
            "judges": list(self.judges),
            "trajectory": None if self.trajectory is None else msgspec.to_builtins(self.trajectory),
        }


def explain(row_id: str, folder: Path, *, logs: Sequence[str] | None = None) -> Origin:
    """Return where a row of a dataset came from.

    Args:
        row_id: id of the row.
        folder: the dataset.
        logs: where its logs are now; None: where they were when it was built.

    Raises:
        DataError: the folder holds no dataset, or no such row.
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


# --- convert ------------------------------------------------------------------------------------------

_SPOOLS = 64
_SPOOL_BUFFER = 64 << 10
_DIGESTS = 1 << 128
_HEADER = Struct("<16s16s16s8s8sQHBBI")
_ALONE = b"\0" * 8
"""Stands for no user and no tenant."""
_KEPT, _REMOVED = 1, 2
_RANKS: dict[Source, int] = {source: rank for rank, source in enumerate(Source.__args__)}  # type: ignore[attr-defined]


class Candidate(NamedTuple):
    """What is known of a row when it is decided whether it stays; its JSON follows it in the spool."""

    digest: bytes
    """The row's id."""
    order: bytes
    """Of rows of the same content and rank the one of the least order stays."""
    prompt: bytes
    """Key of its prompt."""
    user: bytes
    """Stands for the user."""
    tenant: bytes
    """Stands for the tenant."""
    trajectory: int
    """Number of its trajectory among those read."""
    siblings: int
    """Rows that its trajectory made."""
    rank: int
    """Rank of its source; the least stays."""
    flags: int
    """_KEPT: a kept draft. _REMOVED: of a person or tenant to remove."""
    length: int
    """Bytes of its JSON."""


@dataclasses.dataclass
class Part:
    """What converting a stretch of the log came to, besides the spools."""

    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    """Trajectories that made no row are accounted for; of the others only the rows are counted."""
    log_digest: int = 0
    """Sum of the payloads' digests modulo 2¹²⁸, so that it does not depend on their order."""
    constitutions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of each constitution that judged, by digest."""


class _Spools:
    """Candidates with their rows on disk, apart by the first bits of their digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._buffers: list[list[bytes]] = [[] for _ in range(_SPOOLS)]
        self._sizes = [0] * _SPOOLS

    def add(self, header: bytes, body: bytes) -> None:
        number = header[0] >> 2
        buffer = self._buffers[number]
        buffer.append(header)
        buffer.append(body)
        self._sizes[number] += len(body)
        if self._sizes[number] > _SPOOL_BUFFER:
            self._flush(number)

    def _flush(self, number: int) -> None:
        with (self.folder / f"{number:03}").open("ab") as file:
            file.write(b"".join(self._buffers[number]))
        self._buffers[number].clear()
        self._sizes[number] = 0

    def close(self) -> None:
        for number, size in enumerate(self._sizes):
            if size:
                self._flush(number)


def convert(logs: Sequence[str], recipe: Recipe, folder: Path) -> Part:
    """Turn the logs into candidate rows, spooled in `folder`."""
    part = Part()
    spools = _Spools(folder)
    known = evidence(logs)
    number = 0
    for log in logs:
        for payload in payloads(log):
            number += 1
            _convert_one(payload, number, recipe, known, part, spools)
    spools.close()
    return part


def _convert_one(
    payload: bytes,
    number: int,
    recipe: Recipe,
    known: dict[str, Evidence],
    part: Part,
    spools: _Spools,
) -> None:
    part.log_digest = (part.log_digest + xxhash.xxh3_128_intdigest(payload)) % _DIGESTS
    ledger = part.ledger
    try:
        logged = read_logged(payload)
    except DataError:
        ledger.read += 1
        ledger.drop(Reason.UNREADABLE_RECORD)
        return
    if logged is None:
        return
    ledger.read += 1
    part.constitutions.setdefault(logged.constitution.digest, logged.constitution.name)
    rows = CONVERSIONS[recipe.kind](logged, known.get(logged.id, NO_EVIDENCE), Terms())
    if isinstance(rows, Dropped):
        ledger.drop(rows.reason)
        return
    try:
        encoded = [(row, encode_row(recipe.kind, row)) for row in rows]
    except UnicodeEncodeError:
        ledger.drop(Reason.BROKEN_TEXT)
        return
    ledger.made += len(rows)
    user, tenant = logged.metadata.get("user"), logged.metadata.get("tenant")
    removed = user in recipe.without_users or tenant in recipe.without_tenants
    prompt = prompt_key(prompt_text(rows[0].prompt))
    for index, (row, (digest, body)) in enumerate(encoded):
        header = _HEADER.pack(
            digest,
            xxhash.xxh3_128_digest(f"{logged.id}/{index}".encode()),
            prompt,
            _group(user),
            _group(tenant),
            number,
            len(rows),
            _RANKS[row.source],
            (_KEPT if row.source == "draft" else 0) | (_REMOVED if removed else 0),
            len(body),
        )
        spools.add(header, body)


def _group(name: object) -> bytes:
    return _ALONE if name is None else xxhash.xxh3_64_digest(str(name).encode("utf-8", "surrogatepass"))


# --- select -------------------------------------------------------------------------------------------


def _read_spool(folder: Path, number: int) -> Iterator[tuple[Candidate, bytes]]:
    path = folder / f"{number:03}"
    if not path.exists():
        return
    data = path.read_bytes()
    at, size = 0, _HEADER.size
    while at < len(data):
        candidate = Candidate._make(_HEADER.unpack_from(data, at))
        at += size
        yield candidate, data[at : at + candidate.length]
        at += candidate.length


def _select(part: Part, recipe: Recipe, folder: Path, sink: Sink) -> Ledger:
    """Decide which candidates stay, write them, and return the whole ledger."""
    selection = _Selection(recipe)
    for limit in _limits(recipe):
        for number in range(_SPOOLS):
            for candidate, _, reason in selection.decided(_read_spool(folder, number)):
                if reason is None:
                    limit.see(candidate)
        limit.settle()
        selection.limits.append(limit)
    ledger = dataclasses.replace(part.ledger)
    families: dict[int, _Family] = {}
    for number in range(_SPOOLS):
        lines: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
        for candidate, body, reason in selection.decided(_read_spool(folder, number)):
            if reason is None and candidate.flags & _REMOVED:
                reason = Reason.REMOVED
            if reason is None:
                split = side(candidate.prompt, recipe.test_share)
                line = Encoded(candidate.digest, body).line(split)
                if sink.fits(line):
                    lines[split].append(line)
                    continue
                reason = Reason.NOT_IN_FORMAT
            ledger.drop_row(reason)
            if candidate.siblings == 1:
                ledger.drop(reason)
            else:
                families.setdefault(candidate.trajectory, _Family(candidate.siblings)).lose(reason)
        for split, rows in lines.items():
            if rows:
                ledger.keep(split, len(rows))
                sink.write(split, rows)
    for family in families.values():
        if family.left == 0:
            ledger.drop(family.reason)
    ledger.gave_rows = ledger.read - sum(ledger.dropped.values())
    return ledger


class _Family:
    """The rows of one trajectory that made several."""

    def __init__(self, siblings: int) -> None:
        self.left = siblings
        self.reason = REASONS[-1]

    def lose(self, reason: Reason) -> None:
        self.left -= 1
        self.reason = min(self.reason, reason, key=REASONS.index)


class _Limit:
    """At most so many rows of a group: those of the least order."""

    def __init__(self, reason: Reason, group: Callable[[Candidate], bytes | None], cap: int) -> None:
        self.reason = reason
        self.group = group
        self.cap = cap
        self._orders: dict[bytes, array[int]] = {}
        self._last: dict[bytes, int] = {}

    def see(self, candidate: Candidate) -> None:
        group = self.group(candidate)
        if group is None:
            return
        orders = self._orders.setdefault(group, array("Q"))
        orders.append(_place(candidate))
        if len(orders) > 2 * self.cap + 64:
            self._orders[group] = array("Q", sorted(orders)[: self.cap + 1])

    def settle(self) -> None:
        for group, orders in self._orders.items():
            if len(orders) > self.cap:
                self._last[group] = sorted(orders)[self.cap - 1] if self.cap else -1
        self._orders.clear()

    def forbids(self, candidate: Candidate) -> bool:
        group = self.group(candidate)
        return group is not None and group in self._last and _place(candidate) > self._last[group]


class _Mix(_Limit):
    """At most so many kept drafts for each other row."""

    def __init__(self, ratio: float) -> None:
        super().__init__(Reason.MIX, lambda candidate: b"" if candidate.flags & _KEPT else None, sys.maxsize)
        self.ratio = ratio
        self.others = 0

    def see(self, candidate: Candidate) -> None:
        self.others += not candidate.flags & _KEPT
        super().see(candidate)

    def settle(self) -> None:
        self.cap = int(self.ratio * self.others)
        super().settle()


def _place(candidate: Candidate) -> int:
    return int.from_bytes(candidate.order[:8])


def _limits(recipe: Recipe) -> Iterator[_Limit]:
    """Yield the limits in the order in which they hold, each over what the ones before let pass."""
    if recipe.per_user is not None:
        yield _Limit(Reason.USER_CAP, lambda candidate: _some(candidate.user), recipe.per_user)
    if recipe.per_tenant is not None:
        yield _Limit(Reason.TENANT_CAP, lambda candidate: _some(candidate.tenant), recipe.per_tenant)
    if recipe.kept_per_revised is not None:
        yield _Mix(recipe.kept_per_revised)


def _some(group: bytes) -> bytes | None:
    return None if group == _ALONE else group


class _Selection:
    """The decisions about candidates."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.limits: list[_Limit] = []

    def decided(
        self, candidates: Iterable[tuple[Candidate, bytes]]
    ) -> Iterator[tuple[Candidate, bytes, Reason | None]]:
        """Yield the candidates of one spool by digest, each with why it goes, if it does."""
        before = b""
        for candidate, body in sorted(candidates, key=_precedence):
            reason = None
            if candidate.digest == before:
                reason = Reason.DUPLICATE
            else:
                before = candidate.digest
                for limit in self.limits:
                    if limit.forbids(candidate):
                        reason = limit.reason
                        break
            yield candidate, body, reason


def _precedence(spooled: tuple[Candidate, bytes]) -> tuple[bytes, int, bytes, bytes]:
    candidate, body = spooled
    return candidate.digest, candidate.rank, candidate.order, body
