"""From a log to a dataset: every trajectory accounted for, every row traceable, the same bytes each time.

    convert    a stretch of the log → candidate rows, in spools by the first bits of their id
    select     spool by spool: of rows of the same content one stays, caps and mixes hold
    write      rows in the order of their ids, which is no order of the log's: a shuffled set

Spools bound the memory, and every decision is by content and not by order. So any number of workers, either
engine, and a log in any order give the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from xxhash import xxh3_64_digest, xxh3_64_intdigest, xxh3_128_intdigest

from cai_graph.errors import ConfigError, DataError
from cai_graph.log import without_password
from cai_graph.trajectory import SCHEMA_VERSION, Comparison, Record, Review, Trajectory
from trainers.conversion import Terms, rows_of
from trainers.evidence import NO_EVIDENCE, Evidence, EvidenceFile, Mapped, gather
from trainers.export import Format, fits_in, provenances, sink_for
from trainers.ledger import REASONS, Ledger, Reason
from trainers.reading import (
    Logged,
    Stretch,
    about,
    read_logged,
    stretches,
)
from trainers.rows import KINDS, RANKS, Dropped, Kind, Provenance, Row, Split, encode_row, line_of, read_row
from trainers.split import prompt_key, test_keys
from trainers.spool import (
    KEPT_DRAFT,
    NOBODY,
    REMOVED,
    SPOOLS,
    Limit,
    Mix,
    Spooled,
    Spooling,
    Spools,
    decided,
    load,
    pack,
)

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


def build(
    logs: Sequence[str],
    output: Path,
    recipe: Recipe,
    *,
    format: Format = "jsonl",
    workers: int = 1,
) -> Dataset:
    """Write a dataset of all trajectories of the logs; the folder appears whole or not at all.

    Args:
        logs: logs by URL, or JSONL files as `cai log export` writes them.
        output: the folder to make; it must not be there.
        recipe: what to make.
        format: whose loader is to read it.
        workers: processes; the outcome does not depend on their number.

    Raises:
        ConfigError: the output is there already, or the format has no place for the kind.
        MissingExtra: the format needs a package that is not installed.
        DataError: there is no trajectory, or no row is left; the message shows the ledger.
        LogError: a log cannot be read.
    """
    if not logs:
        raise ConfigError("name a log to build from")
    if workers < 1:
        raise ConfigError(f"workers is a number of processes from 1, found {workers!r}")
    with _whole(output) as folder, tempfile.TemporaryDirectory(dir=output.parent, prefix=".spools.") as work:
        writer = sink_for(format, recipe.kind, folder)
        parts = [stretch for log in logs for stretch in stretches(log, workers)]
        with _mapping(workers) as mapped:
            part, spooled = _converted(recipe, parts, Path(work), mapped)
            limits = settled(recipe, spooled)
            lost: list[Lost] = []
            for selected in mapped(partial(_select_spool, recipe, format, spooled, limits), range(SPOOLS)):
                part.ledger.add(selected.ledger)
                lost += selected.lost
                for split, lines in selected.lines.items():
                    if lines:
                        writer.write(split, lines)
            writer.close()
        ledger = whole(part.ledger, lost)
        _check(ledger, logs)
        manifest = _manifest(part, recipe, format, ledger, logs)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return Dataset(output, ledger)


def _converted(
    recipe: Recipe, parts: Sequence[Stretch], work: Path, mapped: Mapped
) -> tuple[Part, list[Spooled]]:
    """Turn all stretches into candidates, spooled in `work`."""
    if not any(stretch.seems_judged() for stretch in parts):
        with contextlib.suppress(Judged):  # It does not show in every file that somebody judged.
            return _collected(mapped(partial(convert, recipe, work / "first", None), parts, count()))
    evidence = gather(mapped, work / "evidence.db", parts)
    step = partial(convert, recipe, work / "second", evidence.path)
    part, spooled = _collected(mapped(step, parts, count()))
    part.ledger.orphans = evidence.trajectories - len(part.judged)
    return part, spooled


def _collected(converted: Iterable[tuple[Part, Spooled]]) -> tuple[Part, list[Spooled]]:
    whole = Part()
    spooled: list[Spooled] = []
    for part, spools in converted:
        whole.add(part)
        spooled.append(spools)
    return whole, spooled


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """Give a folder that becomes `output` when the body ends, or goes away."""
    if output.exists():
        raise ConfigError(f"{output}: is there already; name a new folder, or remove it first")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ConfigError(f"{output}: cannot be made: {error.strerror}") from error
    try:
        yield folder
        os.replace(folder, output)
    except BaseException:
        shutil.rmtree(folder)
        raise


@contextmanager
def _mapping(workers: int) -> Iterator[Mapped]:
    """Give what applies a function to each item: `map`, or the same in processes."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers) as pool:

        def mapped(function: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
            # A few ahead, not all of them: what waits to be taken is in memory.
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


# --- convert ------------------------------------------------------------------------------------------

_DIGESTS = 1 << 128
_STRETCH = 40
"""Bits of a trajectory's number within its stretch; the stretch's number stands above."""


@dataclasses.dataclass
class Part:
    """What converting a stretch of the log came to, besides the spools."""

    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    """Trajectories that made no row are accounted for; of the others only the rows are counted."""
    log_digest: int = 0
    """Sum of the payloads' digests modulo 2¹²⁸, so that it does not depend on their order."""
    constitutions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of each constitution that judged, by digest."""
    judged: set[str] = dataclasses.field(default_factory=set)
    """Trajectories that a person or a judge spoke about."""

    def add(self, other: Part) -> None:
        """Add what another stretch came to."""
        self.ledger.add(other.ledger)
        self.log_digest = (self.log_digest + other.log_digest) % _DIGESTS
        self.constitutions |= other.constitutions
        self.judged |= other.judged


class Judged(Exception):  # noqa: N818 - no error: the evidence is gathered first
    """A record about a Trajectory was met where none were expected."""


class Convert:
    """Turns encoded records into candidates, and keeps the account in `part`."""

    def __init__(self, recipe: Recipe, evidence: Callable[[str], Evidence] | None, number: int) -> None:
        self.recipe = recipe
        self.evidence = evidence
        self.part = Part()
        self._number = number << _STRETCH
        self._terms = Terms()
        self._users, self._tenants = frozenset(recipe.without_users), frozenset(recipe.without_tenants)

    def __call__(self, payloads: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Yield the header and the body of each candidate.

        Raises:
            Judged: there is evidence, and none was expected.
        """
        kind, part, ledger = self.recipe.kind, self.part, self.part.ledger
        number, digests = self._number, 0
        for payload in payloads:
            digests += xxh3_128_intdigest(payload)
            logged = read_logged(payload)
            if logged is None:
                if self.evidence is None:
                    raise Judged
                continue
            number += 1
            rows = logged if isinstance(logged, Dropped) else self._rows(logged)
            if isinstance(rows, Dropped):
                ledger.drop(rows.reason)
                continue
            assert not isinstance(logged, Dropped)
            try:
                encoded = [encode_row(kind, row) for row in rows]
            except UnicodeEncodeError:
                ledger.drop(Reason.BROKEN_TEXT)
                continue
            siblings = len(rows)
            ledger.made += siblings
            prompt = prompt_key(rows[0].prompt)
            user, tenant, gone = self._people(logged.metadata) if logged.metadata else _NOBODY
            id = logged.id.encode("utf-8", "surrogatepass")
            for index, (digest, body) in enumerate(encoded):
                source = rows[index].source
                yield (
                    pack(
                        digest,
                        RANKS[source],
                        xxh3_64_intdigest(id, index),
                        prompt,
                        user,
                        tenant,
                        number,
                        siblings,
                        gone | KEPT_DRAFT if source == "draft" else gone,
                        len(body),
                    ),
                    body,
                )
        ledger.read += number - self._number
        part.log_digest = digests % _DIGESTS

    def _rows(self, logged: Logged) -> Sequence[Row] | Dropped:
        constitution = logged.constitution
        if constitution.digest not in self.part.constitutions:
            self.part.constitutions[constitution.digest] = constitution.name
        evidence = NO_EVIDENCE
        if self.evidence is not None and (evidence := self.evidence(logged.id)) is not NO_EVIDENCE:
            self.part.judged.add(logged.id)
        return rows_of(self.recipe.kind, logged, evidence, self._terms)

    def _people(self, metadata: dict[str, Any]) -> tuple[bytes, bytes, int]:
        """Return what stands for user and tenant, and the flag if one of them is to be removed."""
        user, tenant = metadata.get("user"), metadata.get("tenant")
        gone = str(user) in self._users or str(tenant) in self._tenants
        return _group(user), _group(tenant), REMOVED if gone else 0


_NOBODY = (NOBODY, NOBODY, 0)


def _group(name: object) -> bytes:
    return NOBODY if name is None else xxh3_64_digest(str(name).encode("utf-8", "surrogatepass"))


def convert(
    recipe: Recipe, folder: Path, evidence: Path | None, stretch: Stretch, number: int
) -> tuple[Part, Spooled]:
    """Turn a stretch into candidates, spooled in a file of its own."""
    folder.mkdir(exist_ok=True)
    spools = Spools(folder / f"{number}.spools")
    with contextlib.nullcontext() if evidence is None else EvidenceFile(evidence) as known:
        conversion = Convert(recipe, None if known is None else known.of, number)
        spools.add(conversion(stretch.payloads()))
    return conversion.part, spools.close()


# --- select -------------------------------------------------------------------------------------------


class Lost(NamedTuple):
    """A row that was dropped, one of several of its trajectory."""

    trajectory: int
    """The trajectory's number."""
    siblings: int
    """Rows that it made."""
    reason: Reason
    """Why this one goes."""


class Selected(NamedTuple):
    """What selecting from one spool came to."""

    ledger: Ledger
    """The rows' accounts, and those of trajectories that made one row only."""
    lost: list[Lost]
    """Rows of trajectories that made several."""
    lines: dict[Split, list[bytes]]
    """The rows, as lines of JSON, of each split."""


def settled(recipe: Recipe, spooled: Sequence[Spooled]) -> list[Limit]:
    """Return the recipe's limits, each decided over what the ones before it let pass."""
    limits: list[Limit] = []
    for limit in _limits(recipe):
        for number in range(SPOOLS):
            for candidate, _, reason in decided(load(spooled, number, bodies=False), limits):
                if reason in (None, Reason.REMOVED):
                    limit.see(candidate)
        limit.settle()
        limits.append(limit)
    return limits


def _limits(recipe: Recipe) -> Iterator[Limit]:
    if recipe.per_user is not None:
        yield Limit(Reason.USER_CAP, attrgetter("user"), recipe.per_user)
    if recipe.per_tenant is not None:
        yield Limit(Reason.TENANT_CAP, attrgetter("tenant"), recipe.per_tenant)
    if recipe.kept_per_revised is not None:
        yield Mix(recipe.kept_per_revised)


def select(recipe: Recipe, format: Format, spooling: Iterable[Spooling], limits: Sequence[Limit]) -> Selected:
    """Return the rows of one spool that stay, and the account of those that go."""
    ledger = Ledger()
    lost: list[Lost] = []
    lines: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    fits = fits_in(format, recipe.kind)
    below = test_keys(recipe.test_share)
    for candidate, body, reason in decided(spooling, limits):
        if reason is None:
            split: Split = "test" if candidate.prompt < below else "train"
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
    for split, rows in lines.items():
        if rows:
            ledger.keep(split, len(rows))
    return Selected(ledger, lost, lines)


def _select_spool(
    recipe: Recipe, format: Format, spooled: Sequence[Spooled], limits: Sequence[Limit], number: int
) -> Selected:
    return select(recipe, format, load(spooled, number), limits)


def whole(ledger: Ledger, lost: Iterable[Lost]) -> Ledger:
    """Return the ledger with the trajectories that made several rows: dropped where each row is."""
    families: dict[int, list[Lost]] = {}
    for row in lost:
        families.setdefault(row.trajectory, []).append(row)
    for rows in families.values():
        if len(rows) == rows[0].siblings:
            ledger.drop(min((row.reason for row in rows), key=REASONS.index))
    ledger.gave_rows = ledger.read - sum(ledger.dropped.values())
    return ledger


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
