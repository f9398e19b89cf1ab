"""Who drafts, judges and compares: chat models and critics out of the specs of a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai_graph import models
from cai_graph.critic import Critic, critic_for
from cai_graph.trained import PREFIX
from trainers.distill.sampler import Sampler
from trainers.rewards import Spec

__all__ = ["chat", "critic", "unasked", "unasked_reward"]

_API_RETRIES = 8


def chat(spec: str, **settings: Any) -> Any:
    """Return the chat model of a spec; a folder of weights is sampled here.

    Raises:
        CaiError: what `cai_graph.models.load` raises.
    """
    folder = Path(spec.removeprefix("local:")).expanduser()
    if folder.is_dir() and not spec.startswith("local:"):
        return Sampler(path=folder, **settings)
    if spec.partition(":")[0] != "local":
        settings.pop("seed", None)
        settings["max_retries"] = _API_RETRIES
    return models.load(spec, **settings)


def critic(spec: str) -> Critic:
    """Return who judges answers one by one.

    Raises:
        CaiError: what `cai_graph.critic.critic_for` raises.
    """
    return critic_for(spec if spec.startswith(PREFIX) else chat(spec))


def unasked(spec: str) -> str:
    """Return a spec with which a server is not asked what it serves, for it may not run yet."""
    is_server = spec.startswith(("http://", "https://"))
    return f"{spec}#MODEL" if is_server and "#" not in spec else spec


def unasked_reward(spec: Spec) -> Spec:
    """Return the same of a reward's spec, as `trainers.rewards.parse` reads it."""
    if isinstance(spec, Mapping):
        return {key: unasked(one) for key, one in spec.items()}
    if not isinstance(spec, str):
        return [unasked_reward(one) for one in spec]  # type: ignore[misc]
    kind, colon, rest = spec.partition(":")
    return f"{kind}:{unasked(rest)}" if colon and kind in ("judge", "critic") else spec
