"""From the specs that a command is given to its models: loaded, fetched, and heard where they fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from cai_graph.addresses import without_password
from cai_graph.cli.console import UNWRITTEN, measured, resumable
from cai_graph.errors import CaiError, ModelError

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from cai_graph.critic import Critic


def loaded(spec: str, **settings: Any) -> BaseChatModel:
    """Return the model of a spec, as `cai_graph.models.patient`; weights are not fetched."""
    from cai_graph import models

    return models.patient(spec, **settings)


def critic_of(critic: str, strong: str | None, threshold: float | None) -> Critic:
    """Return the critic that the options name, a cascade where there is a strong one."""
    from cai_graph.critic import critic_for
    from cai_graph.critic.cascades import cascade

    if strong is None and threshold is None:
        return critic_for(judging(critic))
    if strong is None or threshold is None:
        raise typer.BadParameter("--strong and --threshold go together; `cai critic calibrate` finds one")
    return cascade(judging(critic), judging(strong), threshold=threshold)


def judging(spec: str) -> BaseChatModel | str:
    """Return the model of a critic's spec; one of `cai train critic` stays a spec."""
    return spec if _is_trained(spec) else loaded(spec)


def width(model: str) -> int:
    """Return how many rows are under way at once, unless the user says."""
    from cai_graph import local

    return 16 if local.name_in(model) is None and not _is_trained(model) else 4


def _is_trained(spec: str) -> bool:
    """Return whether a spec names a critic of one's own."""
    from cai_graph.critic.trained import PREFIX

    return spec.startswith(PREFIX)


def fetch(*specs: str | None) -> None:
    """Fetch the weights that the local ones of these specs need."""
    from cai_graph import local

    for spec in dict.fromkeys(specs):
        if spec is not None and (name := local.name_in(spec)) is not None:
            fetched(name)


def fetched(name: str) -> str:
    """Return the path of local weights; show how they arrive."""
    from rich.progress import DownloadColumn

    from cai_graph import local

    with resumable(), measured(f"fetching {name or local.DEFAULT_MODEL}", DownloadColumn()) as tell:
        return str(local.weights(name, tell))


@contextlib.contextmanager
def foreign(model: str) -> Iterator[None]:
    """Translate what a provider's client raises; another builtin exception is a bug and keeps its traceback.

    An error of our own writing is none of the provider's, whose client wraps what its connection does.
    """
    from cai_graph.failures import meaning, note_of

    try:
        yield
    except (CaiError, asyncio.CancelledError):
        raise
    except Exception as error:
        said = note_of(error) or meaning(error)
        if type(error).__module__ == "builtins" and not isinstance(error, OSError) and said is None:
            raise
        if isinstance(error, OSError) and error.errno in UNWRITTEN:
            raise
        model = without_password(model)
        plain = f"{type(error).__name__}: {error}"
        raise ModelError(f"{model}: {said} ({plain})" if said else f"{model}: {plain}") from error
