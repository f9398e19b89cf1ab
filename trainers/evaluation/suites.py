"""The prompts that subjects are evaluated on, and whether any of them was trained on.

A suite is a file: JSONL, JSON, CSV, Parquet or text (a prompt a line), perhaps gzipped. Harmlessness takes
red-team prompts, helpfulness benign ones, over-refusal prompts that look unsafe and are not, as XSTest has
them: there a column `label` says `safe` or `unsafe`. Without one a prompt counts as safe, unless its `type`
is one of XSTest's contrasts (`contrast_homonyms`, …), which are the unsafe ones.
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
    """Which one it belongs to."""
    messages: tuple[Message, ...]
    """The conversation, up to where the assistant speaks."""
    safe: bool = True
    """Whether the request should be complied with; only over-refusal knows."""
    kind: str = ""
    """What the file says of its kind, such as XSTest's `homonyms`."""


def read_suite(suite: Suite, path: Path, limit: int | None = None) -> list[Prompt]:
    """Return the prompts of a file, each once, in an order that does not depend on the file's.

    Args:
        suite: what they are for.
        path: the file.
        limit: most prompts; the same ones in each run, and in each file that has them.

    Raises:
        DataError: the file cannot be read, or holds no prompt; names the columns looked for. In the suite
            over-refusal also: a label is neither safe nor unsafe, or a prompt has both.
        MissingExtra: it is Parquet, and pyarrow is not installed.
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
    if all(isinstance(turn, str) for turn in found):  # of a user's turns the first: no answer stands between
        return _conversation(found[0]) if found else ()
    messages = [
        Message(role=str(turn.get("role")), content=text_in(turn)) for turn in found if isinstance(turn, dict)
    ]
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return tuple(messages)


# --- what was trained on ------------------------------------------------------------------------------


def trained_on(prompts: Sequence[Prompt], data: Iterable[Path]) -> tuple[list[Prompt], list[str]]:
    """Return the prompts that stand in training data, and what of the data could not be read.

    A prompt stands there where a user message is the same text, normalised, or shares 13 words in a row with
    one; see `trainers.dataset.heldout`.

    Args:
        prompts: what is to be evaluated on.
        data: datasets as `cai dataset build` writes them, of which the train side counts, or files.

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
    """Return in words how many of the prompts were trained on, and the first one."""
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
    """Return the data that a model and those it started from were trained on, and what is not known of it.

    Args:
        model: a spec; of one that is no folder of weights nothing is asked.

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
            # What is served of it, such as a GGUF file, may be all that is left in the folder.
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
    """Return the digest of training data as a manifest has it; None where there is no such data any more."""
    try:
        return open_data(data, get_args(Kind)).digest
    except (ConfigError, DataError):
        return None


def _is_here(model: str) -> bool:
    """Return whether a model that is no folder is one of the catalogue or of the hub, or a file."""
    path = path_of(model)
    return path is None or path.is_file() or is_fetched(model)


def folder_of(model: str) -> Path | None:
    """Return the folder of weights that a model's spec names: itself, as `local:FOLDER`, or by the GGUF file
    that was exported into it; None where it names another model."""
    path = path_of(model)
    if path is not None and path.name == local.EXPORTED:
        path = path.parent
    return path if path is not None and path.is_dir() else None
