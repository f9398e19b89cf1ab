"""Converts the records of one stretch of the log into candidate rows, in spools, and counts the rest.

A candidate is a row that enters the dataset, unless another row with the same content, a cap or a mix
excludes it later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_digest, xxh3_64_intdigest, xxh3_128_intdigest

from cai_graph.digests import sha256_of
from cai_graph.errors import DataError
from trainers.dataset.conversion import ROWLESS, Terms, Wording, rows_of
from trainers.dataset.evidence import NO_EVIDENCE, Evidence, EvidenceFile
from trainers.dataset.heldout import HeldOut
from trainers.dataset.lengths import Lengths, Refused
from trainers.dataset.near import PromptFile
from trainers.dataset.privacy import personal
from trainers.dataset.reading import Head, Logged, Mixed, Stretch, read_logged
from trainers.dataset.recipe import Recipe
from trainers.dataset.split import prompt_key, prompt_text
from trainers.dataset.spool import KEPT_DRAFT, NOBODY, REMOVED, Spooled, Spools, pack
from trainers.ledger import REASONS, Ledger, Reason
from trainers.rows import RANKS, Dropped, Row, content_of, encode_row

__all__ = ["Candidates", "Converted", "Part", "UnexpectedEvidence", "checked", "convert"]

_DIGESTS = 1 << 128
_STRETCH = 40
"""Bits of a trajectory's number within its stretch; the bits above them are the stretch's number."""


@dataclass
class Part:
    """The results of converting a stretch of the log, besides the candidates."""

    ledger: Ledger = field(default_factory=Ledger)
    """Trajectories without a candidate, by reason; for the others only their rows are counted."""
    log_digest: int = 0
    """Sum of the payloads' digests modulo 2¹²⁸, which does not depend on their order."""
    constitutions: dict[str, str] = field(default_factory=dict)
    """Name of each constitution that judged, by digest."""
    judged: set[str] = field(default_factory=set)
    """Ids of trajectories that a person or a judge has assessed."""
    met: set[tuple[str, str]] = field(default_factory=set)
    """Those users and tenants of `Recipe.leaving` who have a trajectory."""

    def add(self, other: Part) -> None:
        """Add the results of another stretch."""
        self.ledger.add(other.ledger)
        self.log_digest = (self.log_digest + other.log_digest) % _DIGESTS
        self.constitutions |= other.constitutions
        self.judged |= other.judged
        self.met |= other.met


class UnexpectedEvidence(Exception):  # noqa: N818 - not an error: the caller then collects the evidence first
    """A record about a Trajectory was found where none was expected."""


_Encoded = tuple[Row, bytes, bytes]
"""A row, its digest and its body."""
_NOBODY = (NOBODY, NOBODY, 0)


class Candidates:
    """Makes candidates from encoded records, and counts the rest in `part`."""

    def __init__(
        self,
        recipe: Recipe,
        number: int,
        *,
        evidence: Callable[[str], Evidence] | None = None,
        prompts: Callable[[bytes, str], None] | None = None,
    ) -> None:
        """Prepare for one stretch.

        Args:
            recipe: the dataset's recipe.
            number: the stretch's number in its build.
            evidence: returns the evidence about a Trajectory; None: no Trajectory has any.
            prompts: is called with the key and the normalised text of every prompt, also of trajectories
                without rows, so that the near duplicates among them are the same for every recipe.

        Raises:
            ConfigError, DataError, MissingExtra: the recipe names something that cannot be read.
        """
        self.recipe = recipe
        self.evidence = evidence
        self.prompts = prompts
        self.part = Part()
        self._number = number << _STRETCH
        self._terms = _terms(recipe)
        self._held_out = _held_out(recipe)
        self._lengths = None if recipe.tokenizer is None else Lengths(recipe.tokenizer)
        self._is_checked = recipe.personal_data == "drop" or self._lengths is not None
        self._leaving = recipe.leaving

    def of(self, payloads: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Yield the header and the body of each candidate.

        Raises:
            UnexpectedEvidence: there is evidence, although none was expected.
        """
        part, ledger, kind = self.part, self.part.ledger, self.recipe.kind
        prompts, is_checked = self.prompts, self._is_checked
        number, digests = self._number, 0
        # With evidence, any trajectory can have rows; and a head alone contains no prompt.
        head_enough = ROWLESS.get(kind) if self.evidence is None and prompts is None else None
        for payload in payloads:
            digests += xxh3_128_intdigest(payload)
            logged = read_logged(payload, head_enough)
            if logged is None:
                if self.evidence is None:
                    raise UnexpectedEvidence
                continue
            number += 1
            if prompts is not None and isinstance(logged, Logged):
                prompts(prompt_key(logged.messages), prompt_text(logged.messages))
            rows = logged if isinstance(logged, Dropped) else self._rows(logged)
            if isinstance(rows, Dropped):
                ledger.drop(rows.reason)
                continue
            assert not isinstance(logged, Dropped)
            try:
                encoded = [(row, *encode_row(kind, row)) for row in rows]
            except UnicodeEncodeError:
                ledger.drop(Reason.BROKEN_TEXT)
                continue
            ledger.made += len(rows)
            if is_checked and not (encoded := self._passing(encoded)):
                continue
            prompt = prompt_key(rows[0].prompt)
            user, tenant, gone = self._people(logged.metadata) if logged.metadata else _NOBODY
            id = logged.id.encode("utf-8", "surrogatepass")
            siblings = len(encoded)
            for index, (row, digest, body) in enumerate(encoded):
                source = row.source
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

    def _rows(self, logged: Logged | Head) -> Sequence[Row] | Dropped:
        constitution = logged.constitution
        if constitution.digest not in self.part.constitutions:
            self.part.constitutions[constitution.digest] = constitution.name
        evidence = NO_EVIDENCE
        if self.evidence is not None and (evidence := self.evidence(logged.id)) is not NO_EVIDENCE:
            self.part.judged.add(logged.id)
        if self._leaving:
            self.part.met |= self._leaving & _whose(logged.metadata)
        if isinstance(logged, Mixed):
            return Dropped(Reason.NOT_TEXT)
        rows = rows_of(self.recipe.kind, logged, evidence, self._terms)
        if (
            self._held_out is not None
            and not isinstance(rows, Dropped)
            and self._held_out.holds(rows[0].prompt)
        ):
            return Dropped(Reason.HELD_OUT)
        return rows

    def _passing(self, rows: list[_Encoded]) -> list[_Encoded]:
        """Return the rows that may be trained on; count the others, and their trajectory if none is left."""
        ledger = self.part.ledger
        passing: list[_Encoded] = []
        reasons: list[Reason] = []
        for encoded in rows:
            if (reason := self._refusal(*encoded)) is None:
                passing.append(encoded)
            else:
                ledger.drop_row(reason)
                reasons.append(reason)
        if not passing:
            ledger.drop(min(reasons, key=REASONS.index))
        return passing

    def _refusal(self, row: Row, digest: bytes, body: bytes) -> Reason | None:
        if self.recipe.personal_data == "drop" and personal(body, content_of(body)) is not None:
            return Reason.PII
        if self._lengths is not None and self.recipe.max_tokens is not None:
            try:
                if self._lengths.of(row) > self.recipe.max_tokens:
                    return Reason.OVER_LENGTH
            except Refused:
                return Reason.NOT_IN_FORMAT
        return None

    def _people(self, metadata: dict[str, Any]) -> tuple[bytes, bytes, int]:
        """Return the hashes of user and tenant, and the flag `REMOVED` if one of them is to be removed."""
        gone = bool(self._leaving) and not self._leaving.isdisjoint(_whose(metadata))
        return _group(metadata.get("user")), _group(metadata.get("tenant")), REMOVED if gone else 0


def _whose(metadata: dict[str, Any]) -> set[tuple[str, str]]:
    return {(what, str(id)) for what in ("user", "tenant") if (id := metadata.get(what)) is not None}


def _group(name: object) -> bytes:
    return NOBODY if name is None else xxh3_64_digest(str(name).encode("utf-8", "surrogatepass"))


def checked(recipe: Recipe) -> None:
    """Read everything that a recipe names, so that errors are raised before the work begins.

    Raises:
        ConfigError, ConstitutionError, DataError, MissingExtra: something cannot be read.
    """
    Candidates(recipe, 0)


def _held_out(recipe: Recipe) -> HeldOut | None:
    if not recipe.held_out:
        return None
    try:
        contents = tuple(sha256_of(Path(path)) for path in recipe.held_out)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return _sets(recipe.held_out, contents)


@lru_cache(maxsize=1)
def _sets(paths: tuple[str, ...], contents: tuple[str, ...]) -> HeldOut:
    """Read evaluation sets, once for all stretches of a process; `contents` are their digests."""
    return HeldOut(paths)


def _terms(recipe: Recipe) -> Terms:
    if recipe.kind != "critique-sft":
        return Terms()
    from cai_graph.constitution import builtin, load  # Only here: it is slow to import.

    wordings = {
        constitution.digest: {
            principle.id: Wording(principle.critique_request, principle.revision_request)
            for principle in constitution.principles
        }
        for constitution in map(load, (*builtin(), *recipe.constitutions))
    }
    return Terms(wordings=wordings)


# --- one stretch --------------------------------------------------------------------------------------


class Converted(NamedTuple):
    """A stretch that was converted into candidates."""

    part: Part
    """The other results."""
    spooled: Spooled
    """The candidates."""
    prompts: Path | None
    """File of all prompts of the stretch; None unless near duplicates are searched for."""


def convert(recipe: Recipe, folder: Path, evidence: Path | None, stretch: Stretch, number: int) -> Converted:
    """Convert a stretch into candidates, in separate files in `folder`."""
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        spools = stack.enter_context(contextlib.closing(Spools(folder / f"{number}.spools")))
        prompts = known = None
        if recipe.near_duplicates is not None:
            prompts = stack.enter_context(contextlib.closing(PromptFile(folder / f"{number}.prompts")))
        if evidence is not None:
            known = stack.enter_context(EvidenceFile(evidence))
        candidates = Candidates(
            recipe,
            number,
            evidence=None if known is None else known.of,
            prompts=None if prompts is None else prompts.add,
        )
        spools.add(candidates.of(stretch.payloads()))
        return Converted(candidates.part, spools.finish(), None if prompts is None else prompts.path)
