"""Checkpoints: folders with trained weights and a manifest of their origin; a folder is written atomically.

OUT/*.safetensors, config.json     weights as transformers loads them; an adapter is merged into them
OUT/tokenizer.json, …              the tokenizer with its chat template
OUT/adapter/                       the adapter alone, if one was trained
OUT/manifest.json                  stage, config, data, parents, versions, hardware, figures
OUT/README.md                      the model card, in the hub's format
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import yaml

from cai_graph.digests import sha256_of
from cai_graph.errors import DataError, ModelError
from trainers import atomic
from trainers.markdown import table

__all__ = ["MANIFEST", "Checkpoint", "Manifest", "hardware", "merge", "save", "seal", "shaping", "versions"]

MANIFEST = "manifest.json"
ADAPTER = "adapter"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SHAPING = {".json", ".jinja", ".model", ".txt"}
"""Suffixes of files next to weights that determine how they are used: config, tokenizer, chat template."""
_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers stores the additional chat templates of a tokenizer."""
_PACKAGES = ("accelerate", "bitsandbytes", "cai-graph", "datasets", "peft", "torch", "transformers", "trl")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The origin of a checkpoint, in enough detail to train it again."""

    stage: str
    """The stage that trained it: `sft`, `dpo`, `reward`, …"""
    base: str
    """The model that training started from, as the config names it."""
    parents: tuple[str, ...] = ()
    """Digests of the Checkpoints that it was trained from: policy, reward models, critics."""
    config: Mapping[str, Any]
    """The stage's complete config, as `trainers.config.plain` writes it."""
    data: Mapping[str, Any]
    """`path`, `digest` (SHA-256 of the training files) and `rows` of the data; some stages add more."""
    constitution_digests: tuple[str, ...] = ()
    """Digests of the constitutions that the data was judged by, and of those that a reward's judges use."""
    seed: int
    """Seed of all random draws."""
    versions: Mapping[str, str]
    """Versions of the packages used in training."""
    hardware: str
    """Devices and processes."""
    seconds: float
    """Seconds of training, over all resumptions."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of each training figure, up to the update that the weights are from."""

    @property
    def stopped(self) -> str | None:
        """Why and where the watch stopped the run, and the step of the weights; None: it was not stopped."""
        watched = self.data.get("watch") or {}
        if watched.get("stopped_at") is None:
            return None
        return (
            f"at step {watched['stopped_at']}, because {watched['reason']}; the weights are those of step "
            f"{watched['weights_of_step']}, and the figures are of no later one"
        )


@dataclass(frozen=True)
class Checkpoint:
    """Weights in a folder, with their manifest if the folder has one."""

    path: Path
    """The folder."""
    manifest: Manifest | None = None
    """The origin of the weights; None for a model that was trained elsewhere."""

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Return the checkpoint in a folder, without loading the weights.

        Raises:
            ModelError: it is not a folder, weights, config or tokenizer are missing in it, or a weights file
                has another size than the manifest records.
            DataError: the manifest cannot be read.
        """
        path = Path(path)
        if not path.is_dir():
            raise ModelError(f"{path}: is no folder; a checkpoint is one with safetensors and a tokenizer")
        if not _weights(path):
            found = "pickled weights (*.bin)" if any(path.glob("*.bin")) else "no weights"
            if (path / "adapter_model.safetensors").exists():
                found = "an adapter alone"
            raise ModelError(f"{path}: holds {found}; a checkpoint has whole weights in *.safetensors")
        if not (path / "config.json").exists():
            raise ModelError(f"{path}: has weights and no config.json; copy that of the model it came from")
        if not any((path / name).exists() for name in _TOKENIZERS):
            raise ModelError(
                f"{path}: has weights and no tokenizer; copy tokenizer.json and tokenizer_config.json of the "
                "model that it was trained from into it"
            )
        if not (path / MANIFEST).exists():
            return cls(path)
        written, sizes = _read(path)
        for name, wanted in sizes.items():
            size = (path / name).stat().st_size if (path / name).exists() else None
            if size != wanted:
                found = "is not there" if size is None else f"has {size:,} bytes"
                raise ModelError(
                    f"{path / name}: {found}, and the manifest says {wanted:,}; copy the folder again"
                )
        try:
            return cls(path, msgspec.convert(written, Manifest))
        except msgspec.ValidationError as error:
            raise DataError(f"{path / MANIFEST}: is no manifest of this release: {error}") from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and digests of the weight files in the folder, in hexadecimal."""
        lines = (f"{path.name} {_sha256(path)}\n" for path in _weights(self.path))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def shape(self) -> str:
        """SHA-256 over the names and digests of the files that determine how the weights are used: config,
        tokenizer, chat template."""
        lines = (f"{path.relative_to(self.path)} {sha256_of(path)}\n" for path in shaping(self.path))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def shaping(folder: Path) -> list[Path]:
    """Return the files of a folder that determine how its weights are used; see `Checkpoint.shape`."""
    found = (*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*"))
    return sorted(path for path in found if path.is_file() and _is_shaping(path))


def _is_shaping(path: Path) -> bool:
    return path.suffix in _SHAPING and path.name != MANIFEST and not path.name.startswith(".")


def save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    manifest: Manifest,
    *,
    weights: Mapping[str, Any] | None = None,
    beside: Path | None = None,
) -> Checkpoint:
    """Write a checkpoint; the folder appears complete or not at all.

    Args:
        folder: the folder to create; it must not exist.
        model: of transformers, or of peft; an adapter is merged into a fresh copy of its base model, and also
            written to `adapter/`.
        tokenizer: written next to the weights.
        manifest: the origin of the weights.
        weights: the complete weights, if the model holds only a part of each; None: those in the model.
        beside: a folder whose content is copied into the checkpoint, such as logs and plots.

    Raises:
        ConfigError: the folder exists already.
        ModelError: it cannot be written, for instance on a full disk; nothing of it is left behind.
    """
    with _whole(folder) as work:
        if beside is not None:
            shutil.copytree(beside, work, dirs_exist_ok=True)
        model.save_pretrained(work, state_dict=weights)
        if hasattr(model, "peft_config"):
            merge(work, model)
        tokenizer.save_pretrained(work)
        _describe(work, folder.name, manifest)
    return Checkpoint(folder, manifest)


def seal(folder: Path, written: Path, manifest: Manifest) -> Checkpoint:
    """Turn a folder with weights and tokenizer into a checkpoint: add manifest and card, and rename it.

    This is for weights that several processes wrote together; only one of them calls it.

    Raises:
        ConfigError: the folder exists already.
        ModelError: it cannot be written, or there are no weights.
    """
    atomic.absent(folder)
    if not _weights(written):
        raise ModelError(f"{written}: no weights were written there, so no checkpoint can be made of it")
    try:
        _describe(written, folder.name, manifest)
        atomic.readable(written, written / MANIFEST)
        atomic.sync(written)
        os.replace(written, folder)
        atomic.sync_folder(folder.parent)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return Checkpoint(folder, manifest)


def merge(written: Path, model: Any) -> None:
    """Turn a folder with a saved adapter into one of complete weights; the adapter is moved to `adapter/`.

    The base model is loaded anew: merging into the model itself would end its training, and a quantized model
    lacks the precision that merging needs. The merge is computed and written in float32, the precision in
    which complete weights are trained: most of what an adapter adds to a weight is below bf16's resolution.

    Args:
        written: the folder.
        model: the peft model of the adapter.
    """
    import torch
    from peft import PeftModel

    adapter = written / ADAPTER
    adapter.mkdir()
    for path in written.glob("adapter_*"):
        path.rename(adapter / path.name)
    (written / "README.md").unlink(missing_ok=True)
    base = model.get_base_model()
    fresh = type(base).from_pretrained(
        base.config.name_or_path,
        config=_unquantized(base.config),
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    PeftModel.from_pretrained(fresh, str(adapter)).merge_and_unload().save_pretrained(written)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the training packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Return the devices that torch finds here, and the number of processes that train together."""
    import torch

    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count())})
        what = f"{torch.cuda.device_count()} x {', '.join(names)}"
    else:
        what = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return what if processes == 1 else f"{what}, {processes} processes"


# --- writing ------------------------------------------------------------------------------------------


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yield a work folder that is renamed to `folder` when the body ends, or removed if it fails."""
    from safetensors import SafetensorError

    atomic.absent(folder)
    try:
        with atomic.folder(folder) as work:
            yield work
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise ModelError(f"{folder}: cannot be written: {said}; nothing of it was left behind") from error


def _unquantized(config: Any) -> Any:
    config = type(config).from_dict(config.to_dict())
    config.__dict__.pop("quantization_config", None)
    return config


def _describe(work: Path, name: str, manifest: Manifest) -> None:
    weights = _digests(work)
    body = {"manifest": msgspec.to_builtins(manifest, enc_hook=str), "weights": weights}
    (work / MANIFEST).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    (work / "README.md").write_text(_card(name, manifest), encoding="utf-8")


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in _weights(folder)}


_hashed: dict[tuple[int, ...], str] = {}
"""Digests of files by device, inode, modification time and size: weights are large, and hashed often."""


def _sha256(path: Path) -> str:
    found = path.stat()
    file = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
    if file not in _hashed:
        _hashed[file] = sha256_of(path)
    return _hashed[file]


def _read(folder: Path) -> tuple[Any, dict[str, int]]:
    """Return the manifest as JSON, and the size in bytes of each weights file."""
    path = folder / MANIFEST
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return written["manifest"], {name: int(one["bytes"]) for name, one in written["weights"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a manifest ({error}); remove it to go without") from error


# --- the card -----------------------------------------------------------------------------------------


def _card(name: str, manifest: Manifest) -> str:
    head: dict[str, Any] = {
        "base_model": manifest.base,
        "library_name": "transformers",
        "tags": ["constitutional-ai", manifest.stage],
    }
    data = manifest.data
    facts = {
        "stage": manifest.stage,
        "base": manifest.base,
        "parents": ", ".join(one[:12] for one in manifest.parents) or "none",
        "data": f"{data.get('rows', 0):,} rows of {data.get('path', '')}, digest {data.get('digest', '')}",
        "constitutions": ", ".join(one[:12] for one in manifest.constitution_digests) or "not named",
        "seed": manifest.seed,
        "hardware": manifest.hardware,
        "time": f"{manifest.seconds:,.1f} s",
        "versions": ", ".join(f"{key} {one}" for key, one in manifest.versions.items()),
    }
    if manifest.stopped is not None:
        facts["stopped by the watch"] = manifest.stopped
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"Trained by the stage `{manifest.stage}` of cai_graph from `{manifest.base}`. The figures below are "
        "of training alone; they say nothing of quality, which `cai evaluate` measures.",
        table(("", ""), facts.items()),
        "## Config",
        table(("key", "value"), manifest.config.items()),
    ]
    if manifest.metrics:
        figures = [(key, f"{value:.6g}") for key, value in sorted(manifest.metrics.items())]
        parts += ["## Figures of training", table(("figure", "last value"), figures)]
    return "\n\n".join(parts) + "\n"
