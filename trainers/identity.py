"""Names a model, critic, reward or file by a digest of its bytes, independent of its path.

What is not on this machine, such as a model behind an API, is named by its spec, since its bytes are unknown.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_graph import constitution, local
from cai_graph.addresses import without_password
from cai_graph.critic.trained import PREFIX
from cai_graph.digests import sha256_of
from trainers.checkpoint import MANIFEST, Checkpoint, shaping
from trainers.weights import path_of

if TYPE_CHECKING:
    from trainers.rewards import Spec

__all__ = ["identity", "identity_of_module", "identity_of_reward", "told_apart", "weights_of"]


def identity(spec: str | Path | None) -> str:
    """Return the identity of a model, critic or file: a digest if it is local, else the spec; "" for None.

    Passwords are removed from a spec with a server's address.
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


def weights_of(model: object) -> str | None:
    """Return the SHA-256 of the user's own GGUF file behind a chat model or its spec.

    None for any other model, which its name identifies.
    """
    if isinstance(model, str):
        name = None if local.model_of(model) is not None else local.name_in(model)
        path = None if name is None else local.weights(name)
    else:
        path = local.own_weights(model)
    return None if path is None else sha256_of(path)


def told_apart(name: str, model: object) -> str:
    """Return a name with a digest added if the model is a file of the user's own.

    Another file can have the same name.
    """
    digest = weights_of(model)
    return name if digest is None else f"{name} ({digest[:8]})"


def identity_of_reward(spec: Spec) -> Any:
    """Return the identity of a reward, whose spec is one that `trainers.rewards.parse` reads; JSON.

    A judge's includes the content of its constitution, and a function's the content of its module.
    """
    from trainers.rewards import spelled_out  # here only: `rewards` uses judges, whose names use `identity`

    spec = spelled_out(spec)
    if isinstance(spec, dict):
        rules = constitution.load(spec["constitution"]).digest
        named = {kind: identity(one) for kind, one in spec.items() if kind != "constitution"}
        return {**named, "constitution": rules}
    if not isinstance(spec, str):
        return [identity_of_reward(member) for member in spec]
    module, colon, _ = spec.partition(":")
    if colon and not Path(spec).expanduser().exists():
        return [spec, identity_of_module(module)]
    return identity(spec)


def identity_of_module(name: str) -> str:
    """Return a digest of a module's file, not including its imports; "" if there is no such file."""
    try:
        found = importlib.util.find_spec(name)
    except Exception:  # raised by the package it is in; reported when the config is checked
        return ""
    origin = found and found.origin
    return sha256_of(Path(origin)) if origin and Path(origin).is_file() else ""


def _of_folder(path: Path) -> str:
    """Return a digest of a folder; if it has weights, of the weights, of the files that determine how they
    are used, and of an exported GGUF file."""
    files = [one for one in path.rglob("*") if one.is_file()]
    weights: list[str] = []
    if any(one.parent == path and _is_weights(one) for one in files):
        weights = [(Checkpoint.open(path) if (path / MANIFEST).exists() else Checkpoint(path)).digest]
        exported = [one for one in path.glob("*.gguf") if not one.name.startswith(".")]
        files = [*shaping(path), *exported]
    named = sorted((str(one.relative_to(path)), sha256_of(one)) for one in files)
    return hashlib.sha256(json.dumps([weights, named]).encode()).hexdigest()


def _is_weights(file: Path) -> bool:
    return file.suffix == ".safetensors" and not file.name.startswith("adapter_")
