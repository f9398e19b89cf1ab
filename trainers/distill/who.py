"""Creates the chat models and critics that a pipeline's config names, from their specs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cai_graph import local, models
from cai_graph.critic import Critic, critic_for
from cai_graph.critic.trained import PREFIX
from trainers.distill.sampler import Sampler
from trainers.rewards import Spec, spelled_out

__all__ = ["chat", "critic", "unasked", "unasked_reward"]


def chat(spec: str, **settings: Any) -> Any:
    """Return the chat model of a spec; a folder of weights is sampled in this process.

    Raises:
        CaiError: whatever `cai_graph.models.load` raises.
    """
    folder = Path(spec).expanduser()
    if local.name_in(spec) is None and folder.is_dir():
        return Sampler(path=folder, **settings)
    return models.patient(spec, **settings)


def critic(spec: str) -> Critic:
    """Return the critic of a spec, which judges answers one by one.

    Raises:
        CaiError: whatever `cai_graph.critic.critic_for` raises.
    """
    return critic_for(spec if spec.startswith(PREFIX) else chat(spec))


def unasked(spec: str) -> str:
    """Return a spec with which a server is not queried for its model's name, since it may not run yet."""
    is_server = spec.startswith(("http://", "https://"))
    return f"{spec}#MODEL" if is_server and "#" not in spec else spec


def unasked_reward(spec: Spec) -> Spec:
    """Return the same for a reward's spec, as `trainers.rewards.parse` reads it."""
    spec = spelled_out(spec)
    if isinstance(spec, dict):
        return {key: unasked(one) for key, one in spec.items()}
    return spec if isinstance(spec, str) else [unasked_reward(one) for one in spec]  # type: ignore[misc]
