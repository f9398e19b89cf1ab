"""What names the bytes behind a model, a critic, a reward, a file: steps are kept under it, not under a path.

What stands elsewhere, such as a model behind an API, is named by its spec: nobody can look at its bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from cai_graph import constitution, local
from cai_graph.addresses import without_password
from cai_graph.digests import sha256_of
from cai_graph.trained import PREFIX
from trainers.checkpoint import MANIFEST, Checkpoint
from trainers.rewards import Spec, spelled_out
from trainers.weights import path_of

__all__ = ["identity", "identity_of_reward"]

_SHAPING = {".json", ".jinja", ".model", ".txt", ".gguf"}
"""Ends of files beside weights: config, tokenizer and chat template, and the exported GGUF."""
_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps the further templates of a tokenizer."""


def identity(spec: str | Path | None) -> str:
    """Return what names a model, a critic or a file: a digest of what is here, else the spec; "" for None.

    Of a spec with a server's address nothing secret is in it.
    """
    if spec is None:
        return ""
    spec = str(spec)
    if (model := local.model_of(spec)) is not None:
        return model.sha256
    path = path_of(spec.removeprefix(PREFIX))
    if path is None or not path.exists():
        return without_password(spec)
    return _of_folder(path) if path.is_dir() else sha256_of(path)


def identity_of_reward(spec: Spec) -> Any:
    """Return what names a reward, as `trainers.rewards.parse` reads its spec; JSON.

    A judge is named with the content of its constitution, and a function with that of its module.
    """
    spec = spelled_out(spec)
    if isinstance(spec, dict):
        rules = constitution.load(spec["constitution"]).digest
        named = {kind: identity(one) for kind, one in spec.items() if kind != "constitution"}
        return {**named, "constitution": rules}
    if not isinstance(spec, str):
        return [identity_of_reward(member) for member in spec]
    module, colon, _ = spec.partition(":")
    if colon and not Path(spec).expanduser().exists():
        return [spec, _of_module(module)]
    return identity(spec)


def _of_module(name: str) -> str:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # whoever checks the config says so
        return ""
    origin = found and found.origin
    return sha256_of(Path(origin)) if origin and Path(origin).is_file() else ""


def _of_folder(path: Path) -> str:
    """Return a digest of a folder; of one with weights, of them and of what says how they are read."""
    files = [one for one in path.rglob("*") if one.is_file()]
    weights: list[str] = []
    if any(one.parent == path and _is_weights(one) for one in files):
        weights = [(Checkpoint.open(path) if (path / MANIFEST).exists() else Checkpoint(path)).digest]
        files = [one for one in files if _shapes(one.relative_to(path))]
    named = sorted((str(one.relative_to(path)), sha256_of(one)) for one in files)
    return hashlib.sha256(json.dumps([weights, named]).encode()).hexdigest()


def _is_weights(file: Path) -> bool:
    return file.suffix == ".safetensors" and not file.name.startswith("adapter_")


def _shapes(file: Path) -> bool:
    beside = str(file.parent) in (".", _TEMPLATES)
    hidden = file.name.startswith(".") or file.name == MANIFEST
    return beside and not hidden and file.suffix in _SHAPING
