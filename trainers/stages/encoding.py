"""Encodes training rows as token ids; a row that is not encoded is counted, with the reason.

TRL silently drops or cuts rows that are too long, trains on pairs of equal answers, and ignores columns that
it does not know. So the stages encode rows themselves, in one pass before training starts, raise an error for
hazards that the user did not allow, and pass TRL token ids that need no further processing.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cai_graph.digests import sha256_of
from cai_graph.errors import ConfigError, DataError
from trainers import tables
from trainers.dataset import MANIFEST, read_manifest
from trainers.rows import Kind

__all__ = [
    "SIGNALS",
    "Counts",
    "Encoder",
    "Hazard",
    "NothingLeft",
    "Row",
    "Shape",
    "Source",
    "encode",
    "fitting",
    "open_data",
]

Hazard = Literal[
    "drop-long", "cut-long", "drop-unfit", "shifted-prompt", "endless-answers", "ignored-columns"
]
"""Properties of rows that are an error unless the config allows them:

drop-long          rows of more than max_tokens are dropped
cut-long           their answers are cut; a row whose prompt alone fills max_tokens is dropped
drop-unfit         empty answers, identical pairs, texts with control tokens, tool calls whose arguments are
                   not a JSON object, conversations that the chat template rejects and, where a policy is to
                   answer them, prompts that offer tools or set variables of the template are dropped
shifted-prompt     the chat template formats a prompt differently before an answer than before a generation
endless-answers    the chat template ends an answer without an end token, so the model would never stop
ignored-columns    a column that weighs or labels rows is ignored, since the stage does not read it
"""

Row = Mapping[str, Any]
"""A row of the file, without the fields that are null."""

SIGNALS = frozenset({"p_chosen", "margin", "weight", "score", "score_chosen", "score_rejected", "label"})
"""Columns that weigh or label rows: if one is ignored, training does not follow the data."""
MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<|assistant|>")
"""Beginnings of plain texts that a chat template has formatted already."""
_BATCH = 1000


class _Unfit(Exception):  # noqa: N818 - the row is at fault
    """A row cannot be trained on as it is."""

    def __init__(self, allowed_by: tuple[Hazard, ...], what: str, *, detail: str = "") -> None:
        super().__init__(what)
        self.allowed_by = allowed_by
        self.what = what
        self.detail = detail


# --- the files ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source:
    """Training data on disk."""

    path: Path
    """The folder or file that the config names."""
    train: Path
    """The file to train on."""
    test: Path | None
    """The file to evaluate on; None where there is none."""
    digest: str
    """SHA-256 of the training file."""
    test_digest: str
    """SHA-256 of the file to evaluate on; "" where there is none."""
    constitutions: tuple[str, ...]
    """Digests of the constitutions that the dataset's manifest names; empty without a manifest."""
    log_digest: str
    """Digest of the logs that the data was built from, as the manifest names it; "" without a manifest."""


def open_data(path: Path, kinds: Sequence[Kind]) -> Source:
    """Return the Source of a folder that `cai dataset build` made, or of a file in TRL's format.

    Args:
        path: folder or file.
        kinds: the kinds of dataset that the stage reads.

    Raises:
        ConfigError: there is no such data, or the dataset is of another kind or format.
        DataError: the dataset's manifest cannot be read.
    """
    if path.is_dir():
        manifest = read_manifest(path) if (path / MANIFEST).exists() else {}
        kind, format = manifest.get("recipe", {}).get("kind"), manifest.get("format")
        if format not in (None, "jsonl", "parquet"):
            raise ConfigError(f"{path}: is written for {format}; build it with --format jsonl or parquet")
        if kind is not None and kind not in kinds:
            raise ConfigError(
                f"{path}: holds rows of the kind {kind!r}, and this stage reads {', '.join(kinds)}; build "
                f"with --kind {kinds[0]}"
            )
        train, test = _split(path, "train"), _split(path, "test")
        if train is None:
            raise ConfigError(f"{path}: holds neither train.jsonl nor train.parquet")
    elif path.suffix in (".jsonl", ".json", ".parquet") and path.is_file():
        manifest, train, test = {}, path, None
    else:
        raise ConfigError(
            f"{path}: is no dataset; name a folder of `cai dataset build`, or a .jsonl, .json or "
            ".parquet file"
        )
    return Source(
        path=path,
        train=train,
        test=test,
        digest=sha256_of(train),
        test_digest="" if test is None else sha256_of(test),
        constitutions=tuple(manifest.get("constitutions", ())),
        log_digest=manifest.get("log_digest", ""),
    )


def _split(folder: Path, name: str) -> Path | None:
    return next((path for end in ("jsonl", "parquet") if (path := folder / f"{name}.{end}").exists()), None)


# --- encoding -----------------------------------------------------------------------------------------


class NothingLeft(DataError):  # noqa: N818 - the name describes the outcome
    """All rows of a file were dropped."""


class Pair(NamedTuple):
    """A prompt and two answers, in token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Encoder:
    """Encodes conversations with the model's chat template, and plain texts unchanged, as token ids."""

    def __init__(
        self, tokenizer: Any, max_tokens: int, allow: Sequence[Hazard], ends: frozenset[int]
    ) -> None:
        """Create an Encoder.

        Args:
            tokenizer: the model's tokenizer.
            max_tokens: maximum tokens of a row.
            allow: hazards that the user accepts.
            ends: ids of the model's end tokens.
        """
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._allow = frozenset(allow)
        self._ends = ends
        # A tokenizer from a GGUF file names only its end and padding tokens, but marks the others as special.
        added = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
        special = sorted(added.union(tokenizer.all_special_tokens), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.cut = 0
        """Answers that were cut."""
        self.longest = 0
        """Tokens of the longest row so far, before cutting."""

    def answer(
        self, row: Row, prompt: str = "prompt", answer: str = "completion"
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a row's prompt and answer, the end token included in the answer."""
        asked, said = self._of(row, prompt), self._of(row, answer)
        ids, start = self._joined(row, asked, said)
        return self._fitted(ids[:start], ids[start:])

    def pair(self, row: Row) -> Pair:
        """Return the ids of a row's prompt and of both its answers."""
        if "prompt" not in row:
            row = _explicit(row)
        asked, better, worse = (self._of(row, name) for name in ("prompt", "chosen", "rejected"))
        if better == worse:
            raise _Unfit(("drop-unfit",), "hold the same answer twice")
        chosen, start = self._joined(row, asked, better)
        rejected, other = self._joined(row, asked, worse)
        start = min(start, other)
        prompt, fitted = self._fitted(chosen[:start], chosen[start:])
        found = Pair(prompt, fitted, self._fitted(prompt, rejected[start:])[1])
        if found.chosen == found.rejected:
            raise _Unfit(("drop-unfit",), "hold answers that are the same once they are cut")
        return found

    def prompt(self, row: Row, room: int) -> list[dict[str, Any]]:
        """Return a row's conversation, if an answer of `room` tokens fits after it.

        A prompt that is a text, not a list of messages, is taken as one user message.
        """
        for name in ("tools", "chat_template_kwargs"):
            if (given := row.get(name)) and given != "[]":
                raise _Unfit(("drop-unfit",), f"have {name!r}, without which the policy would be asked")
        if isinstance(said := row.get("prompt"), str):
            row = {**row, "prompt": [{"role": "user", "content": said}]}
        asked: list[dict[str, Any]] = self._of(row, "prompt")
        length = len(self._templated(row, asked, add_generation_prompt=True)) + room
        self.longest = max(self.longest, length)
        if length > self._max_tokens:
            raise _Unfit(("drop-long",), "leave no room for an answer within max_tokens")
        return asked

    def _of(self, row: Row, name: str) -> Any:
        if name not in row:
            raise DataError(f"has no {name!r}; it has {', '.join(row)}")
        value = row[name]
        if isinstance(value, str):
            if name != "prompt" and not value.strip():
                raise _Unfit(("drop-unfit",), "have an empty answer")
            return value
        if not isinstance(value, list) or not all(
            isinstance(turn, dict) and "role" in turn for turn in value
        ):
            raise DataError(f"{name!r} is neither a text nor a list of turns with role and content")
        for turn in value:
            content = turn.get("content", "")
            if not isinstance(content, str):
                raise DataError(f"{name!r} has a turn whose content is no text; only text is trained on")
            if held := self._control.search(content):
                raise _Unfit(("drop-unfit",), "have a control token of the model in a text", detail=held[0])
            _check_calls(turn)
        spoken = [turn for turn in value if turn.get("content", "").strip() or turn.get("tool_calls")]
        if not spoken:
            if name == "prompt":
                raise _Unfit(("drop-unfit",), "have an empty prompt")
            raise _Unfit(("drop-unfit",), "have an empty answer")
        return value

    def _joined(self, row: Row, prompt: Any, answer: Any) -> tuple[list[int], int]:
        """Return the ids of prompt and answer together, and the index at which the answer begins."""
        if isinstance(prompt, str) != isinstance(answer, str):
            raise DataError(
                "one of prompt and answer is a text and the other one a list of turns; use one form"
            )
        if isinstance(prompt, str):
            for mark in MARKS:
                if prompt.lstrip().startswith(mark) and mark not in self._tokenizer.get_vocab():
                    raise DataError(
                        f"the prompt begins with {mark!r}, a mark of another model's chat template; give the "
                        "rows as turns with role and content, and the model's own template writes them"
                    )
            eos = self._tokenizer.eos_token or ""
            before = self._ids(prompt)
            whole = self._ids(prompt + (answer if answer.endswith(eos) else answer + eos))
        else:
            before = self._templated(row, prompt, add_generation_prompt=True)
            whole = self._templated(row, [*prompt, *answer])
        start = next((at for at, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), None)
        start = min(len(before), len(whole)) if start is None else start
        if start < len(before) and not isinstance(prompt, str) and "shifted-prompt" not in self._allow:
            detail = repr(self._tokenizer.decode(before[start:]))
            raise _Unfit(
                ("shifted-prompt",), "have a prompt that the chat template writes in two ways", detail=detail
            )
        if not isinstance(prompt, str) and "endless-answers" not in self._allow and not self._ended(whole):
            detail = repr(self._tokenizer.decode(whole[-3:]))
            raise _Unfit(("endless-answers",), "end with no end token of the model", detail=detail)
        return whole, start

    def _ended(self, ids: list[int]) -> bool:
        return not self._ends or not self._ends.isdisjoint(ids[-3:])  # a template may add a newline

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text)["input_ids"]
        return found

    def _templated(self, row: Row, turns: Sequence[Any], **more: Any) -> list[int]:
        import jinja2

        tools = row.get("tools")
        try:
            tools = json.loads(tools) if isinstance(tools, str) else tools
            found: list[int] = self._tokenizer.apply_chat_template(
                list(turns),
                tokenize=True,
                return_dict=True,
                tools=tools,
                **{**row.get("chat_template_kwargs", {}), **more},
            )["input_ids"]
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            what = "are conversations that the chat template refuses"
            raise _Unfit(("drop-unfit",), what, detail=str(error)) from error
        return found

    def _fitted(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        length = len(prompt) + len(answer)
        self.longest = max(self.longest, length)
        if length <= self._max_tokens:
            return prompt, answer
        if len(prompt) >= self._max_tokens:
            raise _Unfit(("drop-long", "cut-long"), "have a prompt that fills max_tokens alone")
        if "cut-long" not in self._allow:
            raise _Unfit(("drop-long", "cut-long"), "are longer than max_tokens")
        self.cut += 1
        return prompt, answer[: self._max_tokens - len(prompt)]


def _check_calls(turn: Mapping[str, Any]) -> None:
    calls = turn.get("tool_calls", [])
    for call in calls if isinstance(calls, list) else [calls]:
        called = call.get("function", call) if isinstance(call, dict) else None
        arguments = called.get("arguments", {}) if isinstance(called, dict) else None
        if not isinstance(arguments, dict):
            what = "have a tool call whose arguments are no JSON object"
            raise _Unfit(("drop-unfit",), what, detail=repr(arguments))


def _explicit(row: Row) -> Row:
    """Return a pair of whole conversations as a row whose prompt is their common beginning."""
    for name in ("chosen", "rejected"):
        if name not in row:
            raise DataError(f"has no {name!r}; it has {', '.join(row)}")
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError("has no 'prompt', and where it ends in a text is not said; give the prompt apart")
    common = next(
        (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    common = min(common, len(chosen) - 1, len(rejected) - 1)  # leave an answer, also if they are identical
    if common < 1:
        raise DataError("has no 'prompt', and chosen and rejected do not begin with the same turn")
    return {**row, "prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


# --- all rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a stage encodes rows."""

    stage: str
    """The stage's name."""
    kinds: tuple[Kind, ...]
    """The kinds of dataset that the stage reads."""
    reads: frozenset[str] = frozenset()
    """Those of the SIGNALS columns that the stage reads."""
    encode: Callable[[Encoder, Row], list[dict[str, Any]]]
    """Encodes one row as the rows that the stage's trainer reads."""


@dataclass
class Counts:
    """Counts of the rows of a file: read, used and dropped."""

    read: int = 0
    rows: int = 0
    """Encoded rows; a stage may make several from one."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that were dropped, by reason."""
    cut: int = 0
    """Answers that were cut."""
    constitutions: set[str] = field(default_factory=set)
    """Digests of constitutions that rows name."""

    def to_json(self) -> dict[str, Any]:
        """Return the counts for a manifest."""
        return {
            "read": self.read,
            "rows": self.rows,
            "dropped": dict(self.dropped),
            "cut": self.cut,
            "constitutions": sorted(self.constitutions),
        }


def fitting(
    file: Path, shape: Shape, encoder: Encoder, allow: Sequence[Hazard], counts: Counts
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the encoded rows of a file, each with the number of its source row, from 1.

    Args:
        file: a file that `trainers.tables.rows` can read.
        shape: how the stage encodes a row.
        encoder: the Encoder of the model that is trained.
        allow: hazards that the user accepts.
        counts: is updated; complete once all rows are yielded.

    Raises:
        DataError: a row is malformed; or, after the last row, rows have hazards that are not allowed: the
            message lists how many, which rows, and what to allow.
        NothingLeft: all rows were dropped.
    """
    problems = _Problems(frozenset(allow))
    encoder.cut = encoder.longest = 0
    for number, given in tables.rows(file):
        row = tables.without_nulls(given)
        counts.read += 1
        if isinstance(named := row.get("constitution"), str) and named:
            counts.constitutions.add(named)
        try:
            found = shape.encode(encoder, row)
        except _Unfit as unfit:
            problems.add(number, unfit)
            counts.dropped[unfit.what] += 1
            continue
        except DataError as error:
            raise DataError(f"{file} row {number}: {error}") from error
        for name in (SIGNALS & row.keys()) - shape.reads:
            what = f"have a column {name!r}, which the stage {shape.stage} does not read"
            problems.add(number, _Unfit(("ignored-columns",), what))
        counts.rows += len(found)
        for one in found:
            yield number, one
    counts.cut = encoder.cut
    problems.check(file, counts.read, encoder.longest)
    if not counts.rows:
        why = "".join(f"; {number:,} {what}" for what, number in counts.dropped.items())
        raise NothingLeft(f"{file}: no row is left to train on; {counts.read:,} were read{why}")


def encode(file: Path, shape: Shape, encoder: Encoder, allow: Sequence[Hazard], target: Path) -> Counts:
    """Write the rows that `fitting` yields to `target`, in Arrow's stream format. Raises like `fitting`."""
    import pyarrow

    counts = Counts()
    schema: Any = None  # the schema of the first batch, which all batches are written with
    rows = fitting(file, shape, encoder, allow, counts)
    with target.open("wb") as out:
        while batch := [row for _, row in islice(rows, _BATCH)]:
            table = pyarrow.Table.from_pylist(batch, schema)
            if schema is None:
                schema = table.schema
                writer = pyarrow.ipc.new_stream(out, schema)
            writer.write_table(table)
        writer.close()
    return counts


class _Problems:
    """Collects the rows with hazards that are not allowed, so that one error message lists all of them."""

    def __init__(self, allow: frozenset[Hazard]) -> None:
        self._allow = allow
        self._rows: dict[str, list[int]] = defaultdict(list)
        self._counts: Counter[str] = Counter()
        self._seen: dict[str, _Unfit] = {}

    def add(self, number: int, unfit: _Unfit) -> None:
        if self._allow.isdisjoint(unfit.allowed_by):
            self._counts[unfit.what] += 1
            self._seen.setdefault(unfit.what, unfit)
            if len(self._rows[unfit.what]) < 3:
                self._rows[unfit.what].append(number)

    def check(self, file: Path, read: int, longest: int) -> None:
        if not self._counts:
            return
        lines = [f"{file}: of {read:,} rows"]
        for what, count in self._counts.most_common():
            unfit, rows = self._seen[what], ", ".join(map(str, self._rows[what]))
            detail = f" ({unfit.detail[:80]})" if unfit.detail else ""
            if "max_tokens" in what:
                detail = f" (the longest has {longest:,}); raise it"
            allow = " or ".join(unfit.allowed_by)
            lines.append(f"  {count:,} {what}{detail}: row {rows}; or allow: {allow}")
        raise DataError("\n".join(lines))
