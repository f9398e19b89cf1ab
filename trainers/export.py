"""Formats: a dataset's rows in the form that a trainer's own loader reads.

    jsonl, parquet    the rows as they are, which is TRL's conversational form
    openrlhf          JSON lines for `--data.apply_chat_template`
    verl              Parquet, for multi-turn SFT and for reinforcement learning
    llama-factory     JSON lines and `dataset_info.json`
    axolotl           JSON lines and `datasets.yaml`, to include in a config
    openai            JSON lines of the fine-tuning API: supervised, and preference (DPO)

`SHAPES` says for each format and kind what a row becomes: a dict, or None where that loader would drop, cut
or misread the row, which the ledger then counts. Formats that have no room for a row's provenance have it
beside them in `provenance.jsonl`, a line a row, so that every row can be explained.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from cai_graph.errors import ConfigError, DataError, MissingExtra
from trainers.rows import (
    KINDS,
    CritiqueRow,
    Kind,
    PreferenceRow,
    PromptRow,
    Provenance,
    Row,
    SFTRow,
    Split,
    ToolUse,
    Turn,
    UnpairedRow,
    provenance_of,
    read_row,
)

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "FORMATS",
    "PROVENANCE",
    "SHAPES",
    "Format",
    "Sink",
    "fits_in",
    "provenances",
    "read_rows",
    "sink_for",
]

Format = Literal["jsonl", "parquet", "openrlhf", "verl", "llama-factory", "axolotl", "openai"]
FORMATS: tuple[Format, ...] = get_args(Format)

PROVENANCE = "provenance.jsonl"
"""Where rows came from, in the order of the files' rows, all of `train` before `test`."""

Shape = Callable[[Any], dict[str, Any] | None]
"""A row -> what the format holds of it, or None where the format's loader would not take it whole."""


# --- shapes -------------------------------------------------------------------------------------------


def _plain(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = msgspec.to_builtins(turns)
    return found


def _alternates(turns: tuple[Turn, ...]) -> bool:
    """Return whether a user or a tool speaks first and then the assistant in turn, after one system turn."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    voices: list[str] = []
    for turn in spoken:
        voice = "assistant" if turn.role == "assistant" else "other"
        if turn.role == "system" or (turn.role == "tool" and not voices):
            return False
        if not (turn.role == "tool" and voices and voices[-1] == "tool"):  # answers of one call are merged
            voices.append("tool" if turn.role == "tool" else voice)
    return bool(voices) and all(
        (voice == "assistant") == bool(number % 2) for number, voice in enumerate(voices)
    )


def _openrlhf_answer(row: SFTRow | CritiqueRow) -> dict[str, Any]:
    return {"input": _plain(row.prompt), "output": _plain(row.completion)}


def _openrlhf_pair(row: PreferenceRow) -> dict[str, Any]:
    return {
        "prompt": _plain(row.prompt),
        "chosen": _plain(row.chosen),
        "rejected": _plain(row.rejected),
        "margin": row.margin,
    }


def _openrlhf_prompt(row: PromptRow) -> dict[str, Any]:
    return {"input": _plain(row.prompt), "label": ""}


def _verl_answer(row: SFTRow) -> dict[str, Any] | None:
    if any(turn.role == "assistant" for turn in row.prompt):
        return None  # its loss falls on every assistant turn, and those of the prompt were not vouched for
    return {"messages": _plain(row.prompt + row.completion)}


def _verl_prompt(row: PromptRow) -> dict[str, Any]:
    return {
        "data_source": "cai_graph",
        "prompt": _plain(row.prompt),
        "ability": "alignment",
        "reward_model": {"style": "model", "ground_truth": ""},
        "extra_info": {"split": row.split, "id": row.id},
    }


def _llama_factory_answer(row: SFTRow | CritiqueRow) -> dict[str, Any] | None:
    if not _alternates(row.prompt + row.completion):
        return None
    return {"messages": _plain(row.prompt + row.completion)}


def _llama_factory_pair(row: PreferenceRow) -> dict[str, Any] | None:
    if not _alternates(row.prompt + row.chosen) or row.prompt[-1].role == "tool":
        return None  # of a pair's prompt, it reads a tool's answer only when another turn follows
    return {
        "messages": _plain(row.prompt),
        "chosen": _plain(row.chosen)[0],
        "rejected": _plain(row.rejected)[0],
    }


def _llama_factory_unpaired(row: UnpairedRow) -> dict[str, Any] | None:
    if not _alternates(row.prompt + row.completion):
        return None
    return {"messages": _plain(row.prompt + row.completion), "label": row.label}


def _axolotl_answer(row: SFTRow | CritiqueRow) -> dict[str, Any]:
    turns = [turn | {"train": False} for turn in _plain(row.prompt)]
    return {"messages": [*turns, *(turn | {"train": True} for turn in _plain(row.completion))]}


def _axolotl_pair(row: PreferenceRow) -> dict[str, Any] | None:
    turns = (*row.prompt, *row.chosen, *row.rejected)
    if any(turn.tool_calls or turn.role == "tool" for turn in turns):
        return None  # it reads role and content alone
    return {
        "messages": _plain(row.prompt),
        "chosen": _plain(row.chosen)[0],
        "rejected": _plain(row.rejected)[0],
    }


def _openai_turn(turn: Turn) -> dict[str, Any]:
    shaped: dict[str, Any] = msgspec.to_builtins(turn)
    if turn.tool_calls:
        shaped["tool_calls"] = [_openai_call(call) for call in turn.tool_calls]
    return shaped


def _openai_call(call: ToolUse) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    named = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return named if call.id is None else {"id": call.id, **named}


def _openai_answer(row: SFTRow | CritiqueRow) -> dict[str, Any]:
    # An assistant turn of weight 0 is read, not learnt: only the last one was vouched for.
    before = [_openai_turn(turn) | ({"weight": 0} if turn.role == "assistant" else {}) for turn in row.prompt]
    return {"messages": [*before, *map(_openai_turn, row.completion)]}


def _openai_pair(row: PreferenceRow) -> dict[str, Any]:
    return {
        "input": {
            "messages": list(map(_openai_turn, row.prompt)),
            "tools": [],
            "parallel_tool_calls": True,
        },
        "preferred_output": list(map(_openai_turn, row.chosen)),
        "non_preferred_output": list(map(_openai_turn, row.rejected)),
    }


SHAPES: dict[Format, dict[Kind, Shape]] = {
    "openrlhf": {
        "sft": _openrlhf_answer,
        "critique-sft": _openrlhf_answer,
        "preference": _openrlhf_pair,
        "prompts": _openrlhf_prompt,
    },
    "verl": {"sft": _verl_answer, "prompts": _verl_prompt},
    "llama-factory": {
        "sft": _llama_factory_answer,
        "critique-sft": _llama_factory_answer,
        "preference": _llama_factory_pair,
        "unpaired": _llama_factory_unpaired,
    },
    "axolotl": {"sft": _axolotl_answer, "critique-sft": _axolotl_answer, "preference": _axolotl_pair},
    "openai": {"sft": _openai_answer, "critique-sft": _openai_answer, "preference": _openai_pair},
}
"""What a row becomes, by format and kind. The two formats of rows as they are take every kind."""


# --- files --------------------------------------------------------------------------------------------


class Sink(Protocol):
    """What writes a dataset's files in one format."""

    def write(self, split: Split, lines: bytes) -> None:
        """Write rows, each one line of JSON as `read_row` reads it, in the order of the dataset."""

    def close(self) -> None:
        """Finish the files."""


def sink_for(format: Format, kind: Kind, folder: Path) -> Sink:
    """Return what writes rows of a kind into a folder.

    Raises:
        ConfigError: there is no such format, or it has no place for this kind.
        MissingExtra: the format is Parquet, and pyarrow is not installed.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is one of {', '.join(FORMATS)}; found {format!r}")
    if format == "jsonl":
        return _JsonLines(folder)
    if format == "parquet":
        return _Parquet(folder, _rows_schema(KINDS[kind]))
    shapes = SHAPES[format]
    if kind not in shapes:
        raise ConfigError(f"{format} has no place for the kind {kind!r}; it takes {', '.join(shapes)}")
    files = _Parquet(folder, _verl_schema(kind)) if format == "verl" else _JsonLines(folder)
    return _Shaped(format, kind, shapes[kind], folder, files)


def fits_in(format: Format, kind: Kind) -> Callable[[bytes], bool] | None:
    """Return whether the format holds a row whole, as a function of its line; None: it holds every row."""
    shape = SHAPES.get(format, {}).get(kind)
    return None if shape is None else lambda line: shape(read_row(kind, line)) is not None


def provenances(folder: Path, format: Format) -> Iterator[bytes]:
    """Yield a line of JSON for each row of a dataset, with at least its Provenance, `id` first."""
    if format == "parquet":
        import pyarrow.parquet

        names = [field.name for field in msgspec.structs.fields(Provenance)]
        ordered = ["id", *(name for name in names if name != "id")]
        for path in sorted(folder.glob("*.parquet")):
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=ordered):
                for row in batch.select(ordered).to_pylist():
                    yield msgspec.json.encode(row)
        return
    for path in sorted(folder.glob("*.jsonl")) if format == "jsonl" else [folder / PROVENANCE]:
        with path.open("rb") as file:
            yield from file


def read_rows(folder: Path, kind: Kind, format: Literal["jsonl", "parquet"]) -> Iterator[Row]:
    """Yield the rows of a dataset whose format holds them as they are.

    Raises:
        DataError: a line is no row of this kind; says which.
    """
    for split in ("train", "test"):
        path = folder / f"{split}.{format}"
        if path.exists():
            for number, line in enumerate(_lines(path), 1):
                try:
                    yield read_row(kind, line)
                except msgspec.MsgspecError as error:
                    raise DataError(f"{path}: row {number} is no row of the kind {kind}: {error}") from error


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            yield from file
        return
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_Parquet.ROWS):
        for row in batch.to_pylist():
            yield msgspec.json.encode(_as_written(row))


def _as_written(value: Any) -> Any:
    """Return what Arrow gives back without its nulls, and with tool arguments as objects."""
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    if isinstance(value, dict):
        present = {key: _as_written(item) for key, item in value.items() if item is not None}
        if present.keys() == {"name", "arguments"}:
            present["arguments"] = json.loads(present["arguments"])
        return present
    return value


class _JsonLines:
    """`train.jsonl` and `test.jsonl`, made of lines as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}

    def write(self, split: str, lines: bytes) -> None:
        file = self._files.get(split)
        if file is None:
            file = self._files[split] = (self.folder / f"{split}.jsonl").open("wb")
        file.write(lines)

    def close(self) -> None:
        for file in self._files.values():
            with file:
                file.flush()
                os.fsync(file.fileno())


class _Parquet(_JsonLines):
    """`train.parquet` and `test.parquet`, made of JSON lines once it is known which fields occur.

    A field that no row has gets no column: chat templates take the absence of `tool_calls` for what it is,
    and stumble over a null. Arguments of tool calls differ from call to call, so they are JSON columns.
    """

    ROWS = 1024
    """Rows of a row group, and at most so many in memory."""

    def __init__(self, folder: Path, schema: _Schema) -> None:
        super().__init__(folder)
        self.schema = schema
        self._occur: set[str] = set()
        try:
            import pyarrow.parquet  # noqa: F401 - asked for before anything is converted
        except ImportError as error:
            raise MissingExtra("a dataset in Parquet", "pyarrow", "train") from error

    def write(self, split: str, lines: bytes) -> None:
        # Inside a JSON string the quotes would be escaped.
        self._occur |= {name for name in _OPTIONAL - self._occur if f'"{name}":'.encode() in lines}
        super().write(split, lines)

    def close(self) -> None:
        import pyarrow
        import pyarrow.parquet

        super().close()
        occur = frozenset(self._occur)
        plain, schema = self.schema(occur, False), self.schema(occur, True)
        for split in self._files:
            lines = self.folder / f"{split}.jsonl"
            target = self.folder / f"{split}.parquet"
            with lines.open("rb") as source, pyarrow.parquet.ParquetWriter(target, schema) as out:
                for rows in _stretches(source, self.ROWS):
                    # pyarrow makes no JSON column out of Python values, and casts one out of text.
                    out.write_table(pyarrow.Table.from_pylist(rows, plain).cast(schema))
            lines.unlink()


class _Shaped:
    """A foreign format: shaped rows in files of another sink, provenance and a config beside them."""

    def __init__(self, format: Format, kind: Kind, shape: Shape, folder: Path, files: _JsonLines) -> None:
        self.format = format
        self.kind = kind
        self.shape = shape
        self.folder = folder
        self.files = files
        self._provenance = (folder / PROVENANCE).open("wb")
        self._of_test = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed at the end

    def write(self, split: Split, lines: bytes) -> None:
        each = lines.splitlines(keepends=True)  # JSON escapes whatever else ends a line
        shaped = [self.shape(read_row(self.kind, line)) for line in each]
        self.files.write(split, b"".join(msgspec.json.encode(row) + b"\n" for row in shaped))
        file = self._provenance if split == "train" else self._of_test
        file.write(b"".join(map(provenance_of, each)))

    def close(self) -> None:
        self.files.close()
        with self._provenance as file, self._of_test as of_test:
            of_test.seek(0)
            shutil.copyfileobj(of_test, file)
            file.flush()
            os.fsync(file.fileno())
        splits = [split for split in ("train", "test") if any(self.folder.glob(f"{split}.*"))]
        if self.format == "llama-factory":
            info = {f"{self.kind}_{split}": _llama_factory_info(self.kind, split) for split in splits}
            (self.folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
        if self.format == "axolotl":
            (self.folder / "datasets.yaml").write_text(
                yaml.safe_dump(_axolotl_config(self.kind, splits), sort_keys=False)
            )


def _stretches(source: Any, count: int) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for line in source:
        rows.append(json.loads(line, object_hook=_arguments_as_text))
        if len(rows) == count:
            yield rows
            rows = []
    if rows:
        yield rows


def _arguments_as_text(value: dict[str, Any]) -> dict[str, Any]:
    if value.keys() == {"name", "arguments"}:
        return {"name": value["name"], "arguments": json.dumps(value["arguments"], ensure_ascii=False)}
    return value


# --- schemas of Parquet -------------------------------------------------------------------------------

_OPTIONAL = frozenset({"name", "tool_calls", "tool_call_id"})
"""Fields of a turn that most datasets do without."""

_Schema = Callable[[frozenset[str], bool], "pyarrow.Schema"]
"""From the optional fields that occur, and whether tool arguments are JSON columns or still plain text."""


def _rows_schema(row: type[Row]) -> _Schema:
    def schema(occur: frozenset[str], as_json: bool) -> pyarrow.Schema:
        import pyarrow

        hints, turn = get_type_hints(row), _turn(occur, as_json)
        named = {field.name: _arrow(hints[field.name], turn) for field in msgspec.structs.fields(row)}
        ordered = ["id", *(name for name in named if name not in ("id", "split")), "split"]
        return _with_features(pyarrow.schema([(name, named[name]) for name in ordered]))

    return schema


def _verl_schema(kind: Kind) -> _Schema:
    def schema(occur: frozenset[str], as_json: bool) -> pyarrow.Schema:
        import pyarrow

        text, turns = pyarrow.string(), pyarrow.list_(_turn(occur, as_json))
        if kind != "prompts":
            return _with_features(pyarrow.schema([("messages", turns)]))
        return _with_features(
            pyarrow.schema(
                [
                    ("data_source", text),
                    ("prompt", turns),
                    ("ability", text),
                    ("reward_model", pyarrow.struct([("style", text), ("ground_truth", text)])),
                    ("extra_info", pyarrow.struct([("split", text), ("id", text)])),
                ]
            )
        )

    return schema


def _arrow(hint: Any, turn: pyarrow.DataType) -> pyarrow.DataType:
    """Return the Arrow type of a row's field, given that of a turn."""
    import pyarrow

    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return pyarrow.list_(turn if inner[0] is Turn else _arrow(inner[0], turn))
    if origin in (Union, UnionType, Literal):
        return pyarrow.string()  # a closed set of words
    plain: dict[Any, pyarrow.DataType] = {
        str: pyarrow.string(),
        float: pyarrow.float64(),
        bool: pyarrow.bool_(),
    }
    return plain[hint]


def _turn(occur: frozenset[str], as_json: bool) -> pyarrow.DataType:
    import pyarrow

    text = pyarrow.string()
    function = pyarrow.struct([("name", text), ("arguments", pyarrow.json_() if as_json else text)])
    call = pyarrow.struct([("id", text), ("type", text), ("function", function)])
    optional = {"name": text, "tool_calls": pyarrow.list_(call), "tool_call_id": text}
    fields = [("role", text), ("content", text)]
    return pyarrow.struct(fields + [(name, kind) for name, kind in optional.items() if name in occur])


def _with_features(schema: pyarrow.Schema) -> pyarrow.Schema:
    """Return the schema with the note by which `datasets` gives JSON columns back as they were."""
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pyarrow.DataType) -> dict[str, Any]:
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return {"_type": "Json"}
    if pyarrow.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pyarrow.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


# --- configs ------------------------------------------------------------------------------------------


def _llama_factory_info(kind: Kind, split: str) -> dict[str, Any]:
    """Return the entry of `dataset_info.json` that reads a file of ours."""
    columns = {"messages": "messages"}
    if kind == "preference":
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    if kind == "unpaired":
        columns |= {"kto_tag": "label"}
    return {
        "file_name": f"{split}.jsonl",
        "formatting": "openai",
        **({"ranking": True} if kind == "preference" else {}),
        "columns": columns,
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": "tool",
            "function_tag": "function",
            "system_tag": "system",
        },
    }


def _axolotl_config(kind: Kind, splits: list[str]) -> dict[str, Any]:
    """Return the part of an Axolotl config that reads files of ours, from the folder they are in."""

    def entry(split: str) -> dict[str, Any]:
        read = {"path": f"{split}.jsonl", "ds_type": "json", "field_messages": "messages"}
        if kind == "preference":
            return read | {
                "type": "chat_template.default",
                "field_chosen": "chosen",
                "field_rejected": "rejected",
            }
        return read | {"type": "chat_template", "message_field_training": "train"}

    names = {"train": "datasets", "test": "test_datasets"}
    config: dict[str, Any] = {"rl": "dpo"} if kind == "preference" else {}
    return config | {names[split]: [entry(split)] for split in splits}
