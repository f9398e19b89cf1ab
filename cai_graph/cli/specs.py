"""Turns the model specs of a command into models: loads them, downloads weights, translates their errors."""

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
    """Return the model of a spec, as `cai_graph.models.patient` does; weights are not downloaded."""
    from cai_graph import models

    return models.patient(spec, **settings)


def critic_of(critic: str, strong: str | None, threshold: float | None) -> Critic:
    """Return the critic that the options name; a cascade if a strong critic is named."""
    from cai_graph.critic import critic_for
    from cai_graph.critic.cascades import cascade

    if strong is None and threshold is None:
        return critic_for(judging(critic))
    if strong is None or threshold is None:
        raise typer.BadParameter("--strong and --threshold go together; `cai critic calibrate` finds one")
    return cascade(judging(critic), judging(strong), threshold=threshold)


def judging(spec: str) -> BaseChatModel | str:
    """Return the model of a critic's spec; the spec of a trained critic is returned unchanged."""
    return spec if _is_trained(spec) else loaded(spec)


def width(model: str) -> int:
    """Return the default number of rows in progress at once."""
    from cai_graph import local

    return 16 if local.name_in(model) is None and not _is_trained(model) else 4


def _is_trained(spec: str) -> bool:
    """Return whether a spec names a critic from `cai train critic`."""
    from cai_graph.critic.trained import PREFIX

    return spec.startswith(PREFIX)


def fetch(*specs: str | None) -> None:
    """Download the weights of the local models among these specs."""
    from cai_graph import local

    for spec in dict.fromkeys(specs):
        if spec is not None and (name := local.name_in(spec)) is not None:
            fetched(name)


def fetched(name: str) -> str:
    """Return the path of local weights; download them first if they are missing, with progress."""
    from rich.progress import DownloadColumn

    from cai_graph import local

    with resumable(), measured(f"fetching {name or local.DEFAULT_MODEL}", DownloadColumn()) as tell:
        return str(local.weights(name, tell))


@contextlib.contextmanager
def foreign(model: str) -> Iterator[None]:
    """Translate errors of a provider's client into ModelError.

    Other builtin exceptions are bugs, and are raised unchanged. So are the errors of writing our own output:
    a client wraps the errors of its connection.
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
