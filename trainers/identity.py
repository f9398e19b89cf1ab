"""What names the bytes behind a model, a critic, a reward or a file, whatever path they stand at.

What stands elsewhere, such as a model behind an API, is named by its spec: nobody can look at its bytes.
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


def weights_of(model: object) -> str | None:
    """Return the SHA-256 of the user's own GGUF file behind a chat model or its spec.

    None of any other model: its name says which one it is.
    """
    if isinstance(model, str):
        name = None if local.model_of(model) is not None else local.name_in(model)
        path = None if name is None else local.weights(name)
    else:
        path = local.own_weights(model)
    return None if path is None else sha256_of(path)


def told_apart(name: str, model: object) -> str:
    """Return the name of who speaks through a model, with a digest where that is a file of the user's own.

    Another file can have its name, too.
    """
    digest = weights_of(model)
    return name if digest is None else f"{name} ({digest[:8]})"


def identity_of_reward(spec: Spec) -> Any:
    """Return what names a reward, as `trainers.rewards.parse` reads its spec; JSON.

    A judge is named with the content of its constitution, and a function with that of its module.
    """
    from trainers.rewards import spelled_out  # Only here: rewards ask judges, which are named by `identity`.

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
    """Return a digest of a module's file, which says nothing of what the module imports; "" of none."""
    try:
        found = importlib.util.find_spec(name)
    except Exception:  # of the package that it stands in; whoever checks the config says so
        return ""
    origin = found and found.origin
    return sha256_of(Path(origin)) if origin and Path(origin).is_file() else ""


def _of_folder(path: Path) -> str:
    """Return a digest of a folder; of one with weights, of them, of what says how they are read, and of an
    exported GGUF file."""
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
