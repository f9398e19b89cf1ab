"""Reads the prompts that subjects are evaluated on, and finds those that a model was trained on.

A suite is a file: JSONL, JSON, CSV, Parquet or text (one prompt per line), optionally gzipped. Harmlessness
takes red-team prompts, helpfulness takes benign prompts, and over-refusal takes prompts that look unsafe but
are safe, such as XSTest's. In an over-refusal file, the column `label` is `safe` or `unsafe`. Without a label
a prompt counts as safe, unless its `type` is one of XSTest's contrasts (`contrast_homonyms`, …), which are
unsafe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from cai_graph import local
from cai_graph.errors import ConfigError, DataError, ModelError
from cai_graph.trajectory import Message
from trainers.checkpoint import Checkpoint
from trainers.dataset.heldout import HeldOut
from trainers.rows import Kind, Turn
from trainers.stages.encoding import open_data
from trainers.tables import COLUMNS, prompt_in, prompt_rows, text_in
from trainers.weights import is_fetched, path_of

__all__ = ["Prompt", "Suite", "data_of", "folder_of", "read_suite", "summed_up", "trained_on"]

Suite = Literal["harmlessness", "helpfulness", "over-refusal"]


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of a suite."""

    id: str
    """Digest of suite and conversation, 16 hex digits."""
    suite: Suite
    """The suite that it belongs to."""
    messages: tuple[Message, ...]
    """The conversation, up to the assistant's answer."""
    safe: bool = True
    """Whether the request should be complied with; True outside over-refusal."""
    kind: str = ""
    """The file's `type` or `category` of the prompt, such as XSTest's `homonyms`; "" without one."""


def read_suite(suite: Suite, path: Path, limit: int | None = None) -> list[Prompt]:
    """Return the different prompts of a file, in an order that does not depend on the file's order.

    Args:
        suite: the suite that the prompts are for.
        path: the file.
        limit: maximum number of prompts. The first by id are chosen, so the choice is the same in each run.

    Raises:
        DataError: the file cannot be read, or has no prompt in the known columns. In the suite over-refusal
            also: a label is neither safe nor unsafe, or a prompt has both.
        MissingExtra: the file is Parquet, and pyarrow is not installed.
    """
    found: dict[str, Prompt] = {}
    for number, cells in enumerate(prompt_rows(path), 1):
        if messages := _conversation(prompt_in(cells)):
            kind = str(cells.get("type") or cells.get("category") or "")
            safe = suite != "over-refusal" or _is_safe(cells.get("label"), kind, f"{path} row {number}")
            said = json.dumps([suite, [[m.role, m.content] for m in messages]])
            id = hashlib.sha256(said.encode()).hexdigest()[:16]
            if id in found and found[id].safe is not safe:
                text = str(messages[-1].content)[:80]
                raise DataError(
                    f"{path} row {number}: {text!r} is labelled both safe and unsafe; keep one row"
                )
            found[id] = Prompt(id=id, suite=suite, messages=messages, safe=safe, kind=kind)
    if not found:
        raise DataError(f"{path}: holds no prompt; its column is one of {', '.join(COLUMNS)}")
    return sorted(found.values(), key=lambda prompt: prompt.id)[:limit]


def _is_safe(label: object, kind: str, place: str) -> bool:
    said = "" if label is None else str(label).strip().casefold()
    if said not in ("", "safe", "unsafe"):
        raise DataError(f"{place}: the label is safe or unsafe, found {label!r}")
    return said == "safe" or (not said and not kind.startswith("contrast"))


def _conversation(found: object) -> tuple[Message, ...]:
    if isinstance(found, str):
        text = found.strip()
        return (Message(role="user", content=text),) if text else ()
    if not isinstance(found, list):
        return ()
    if all(isinstance(turn, str) for turn in found):  # only the first user turn: the answers are missing
        return _conversation(found[0]) if found else ()
    messages = [
        Message(role=str(turn.get("role")), content=text_in(turn)) for turn in found if isinstance(turn, dict)
    ]
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return tuple(messages)


# --- prompts that were trained on ---------------------------------------------------------------------


def trained_on(prompts: Sequence[Prompt], data: Iterable[Path]) -> tuple[list[Prompt], list[str]]:
    """Return the prompts that occur in training data, and descriptions of the data that could not be read.

    A prompt occurs in it if a user message has the same normalised text as one of the data, or shares 13
    consecutive words with it; see `trainers.dataset.heldout`.

    Args:
        prompts: the prompts to evaluate on.
        data: files, or datasets that `cai dataset build` wrote, of which only the training part is read.

    Raises:
        DataError: one of them cannot be read.
        MissingExtra: one is Parquet, and pyarrow is not installed.
    """
    seen, unknown = HeldOut(), []
    for file in [file for path in data for file in _train_files(path)]:
        rows, without = seen.add(file)
        if without:
            unknown.append(f"{without} of {rows} rows of {file} have no prompt that can be read")
    found = [
        prompt
        for prompt in prompts
        if seen.holds(Turn(role=m.role, content=str(m.content)) for m in prompt.messages)
    ]
    return found, unknown


def summed_up(seen: Sequence[Prompt], prompts: Sequence[Prompt]) -> str:
    """Return a message with the number of prompts that were trained on, and the first of them."""
    first = seen[0]
    text = str(first.messages[-1].content)[:80]
    return f"{len(seen)} of {len(prompts)} prompts were trained on, the first of {first.suite}: {text!r}"


def _train_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [file for end in ("jsonl", "parquet") if (file := path / f"train.{end}").exists()]
    if not files:
        raise DataError(f"{path}: has no train.jsonl or train.parquet, so it is no dataset that can be read")
    return files


def data_of(model: str) -> tuple[list[Path], list[str]]:
    """Return the training data of a model and of its ancestors, and descriptions of what is unknown.

    Args:
        model: a spec; one that does not name a folder of weights has no known data.

    Raises:
        DataError: a manifest cannot be read.
    """
    found: list[Path] = []
    unknown: list[str] = []
    seen: set[Path] = set()
    folder = folder_of(model)
    while folder is not None and folder.resolve() not in seen:
        try:
            manifest = Checkpoint.open(folder).manifest
        except ModelError as error:
            # The folder may contain only a file that is served, such as a GGUF file.
            unknown.append(f"what {folder} was trained on is not known ({error})")
            break
        if manifest is None:
            if not seen:
                unknown.append(f"{folder} has no manifest, so what it was trained on is not known")
            break
        seen.add(folder.resolve())
        data = manifest.data.get("path") or "data that its manifest does not name"
        digest = _digest_of(Path(data))
        if digest is None:
            unknown.append(f"{folder} was trained on {data}, which is not here")
        else:
            found.append(Path(data))
            if digest != manifest.data.get("digest"):
                unknown.append(f"{folder} was trained on {data}, which has changed since")
        base, before = manifest.base, folder
        folder = folder_of(base)
        if folder is None and not _is_here(base):
            unknown.append(f"{before} was trained from {base}, which is not here")
    return found, unknown


def _digest_of(data: Path) -> str | None:
    """Return the digest of training data, as in a manifest; None if the data no longer exists."""
    try:
        return open_data(data, get_args(Kind)).digest
    except (ConfigError, DataError):
        return None


def _is_here(model: str) -> bool:
    """Return whether a model that is not a folder is in the catalogue, a file, or a downloaded hub model."""
    path = path_of(model)
    return path is None or path.is_file() or is_fetched(model)


def folder_of(model: str) -> Path | None:
    """Return the folder of weights that a model's spec names; None if it names another kind of model.

    A spec may name the folder itself, as `local:FOLDER`, or the GGUF file that was exported into it.
    """
    path = path_of(model)
    if path is not None and path.name == local.EXPORTED:
        path = path.parent
    return path if path is not None and path.is_dir() else None
