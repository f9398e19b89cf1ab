"""`cai model`: models that run on this machine; and how every command comes to its models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cai_graph.cli.console import UNWRITTEN, group, measured, out, print_json, resumable
from cai_graph.cli.options import AsJson, option
from cai_graph.errors import CaiError, ModelError

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from cai_graph.critic import Critic

API_RETRIES = 8
"""How often a request to an API is tried again, after the wait that its Retry-After asks for."""

PrecisionName = Literal["F32", "F16", "Q8_0"]

commands = group("Models that run on this machine.")

LocalName = Annotated[str, typer.Argument(help="A name that `cai model list` prints.", metavar="[NAME]")]


@commands.command("list", epilog="Example: cai model list")
def model_list(as_json: AsJson = False) -> None:
    """List the local models that can be fetched, and those that are here."""
    from cai_graph import local, show

    found = [(model, local.cached(model)) for model in local.CATALOGUE]
    if as_json:
        print_json(
            [
                {"name": m.name, "size": m.size, "licence": m.licence, "sha256": m.sha256}
                | {"path": None if path is None else str(path)}
                for m, path in found
            ]
        )
        return
    rows = [
        (f"local:{m.name}", f"{m.size / 1e6:,.0f} MB", m.licence, str(path or "not fetched"))
        for m, path in found
    ]
    out.print(show.table(rows))


@commands.command("get", epilog="Example: cai model get smollm2")
def model_get(name: LocalName = "") -> None:
    """Fetch a local model, check its hash, and print its path."""
    typer.echo(fetched(name))


@commands.command("path", epilog="Example: cai model path smollm2")
def model_path(name: LocalName = "", as_json: AsJson = False) -> None:
    """Print where a local model is; exit with 1 if it is not here."""
    from cai_graph import local

    model = local.find(name or local.DEFAULT_MODEL)
    path = local.cached(model)
    if path is None:
        raise ModelError(f"local:{model.name} is not here; `cai model get {model.name}` fetches it")
    if as_json:
        print_json({"name": model.name, "path": str(path)})
    else:
        typer.echo(path)


@commands.command("export", epilog="Example: cai model export runs/sft")
def model_export(
    folder: Annotated[str, typer.Argument(help="A checkpoint: weights in safetensors.", metavar="FOLDER")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The file; model.gguf in the folder by default.")
    ] = None,
    source: Annotated[
        str | None,
        option("--source", "The GGUF file it was trained from; found by its manifest by default.", "SPEC"),
    ] = None,
    precision: Annotated[PrecisionName, typer.Option(help="How matrices are stored.")] = "F16",
) -> None:
    """Write a checkpoint's weights as a GGUF file, which the embedded engine serves as local:FOLDER."""
    from pathlib import Path

    from cai_graph import local
    from trainers.weights import export

    written = export(
        Path(folder),
        target=None if output is None else Path(output),
        source=None if source is None else local.weights(source.removeprefix("local:")),
        precision=precision,
    )
    typer.echo(written)


# --- from a spec to a model ---------------------------------------------------------------------------


def loaded(
    spec: str, *, seed: int | None = None, max_tokens: int | None = None, temperature: float | None = None
) -> BaseChatModel:
    """Return the model of a spec; weights are not fetched."""
    from cai_graph import models

    given = {"max_tokens": max_tokens, "temperature": temperature}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not is_local(spec):
        settings["max_retries"] = API_RETRIES
    elif seed is not None:
        settings["seed"] = seed
    return models.load(spec, **settings)


def critic_of(critic: str, strong: str | None, threshold: float | None) -> Critic:
    """Return the critic that the options name, a cascade where there is a strong one."""
    from cai_graph.cascades import cascade
    from cai_graph.critic import critic_for

    if strong is None and threshold is None:
        return critic_for(judging(critic))
    if strong is None or threshold is None:
        raise typer.BadParameter("--strong and --threshold go together; `cai critic calibrate` finds one")
    return cascade(judging(critic), judging(strong), threshold=threshold)


def judging(spec: str) -> BaseChatModel | str:
    """Return the model of a critic's spec; one of `cai train critic` stays a spec."""
    return spec if is_trained(spec) else loaded(spec)


def is_trained(spec: str) -> bool:
    """Return whether a spec names a critic of one's own."""
    return spec.partition(":")[0] == "trained"


def is_local(spec: str) -> bool:
    """Return whether a spec names a model on this machine."""
    return spec.partition(":")[0] == "local"


def width(model: str) -> int:
    """Return how many rows are under way at once, unless the user says."""
    return 4 if is_local(model) or is_trained(model) else 16


def fetch(*specs: str | None) -> None:
    """Fetch the weights that the local ones of these specs need."""
    for spec in dict.fromkeys(specs):
        if spec is not None and is_local(spec):
            fetched(spec.partition(":")[2])


def fetched(name: str) -> str:
    """Return the path of local weights; show how they arrive."""
    from rich.progress import DownloadColumn

    from cai_graph import local

    with resumable(), measured(f"fetching {name or local.DEFAULT_MODEL}", DownloadColumn()) as tell:
        return str(local.weights(name, tell))


@contextlib.contextmanager
def foreign(model: str) -> Iterator[None]:
    """Translate what a provider's client raises; a builtin exception is a bug and keeps its traceback.

    An error of our own writing is none of the provider's, whose client wraps what its connection does.
    """
    from cai_graph.failures import meaning, note_of

    try:
        yield
    except (CaiError, asyncio.CancelledError):
        raise
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise
        if isinstance(error, OSError) and error.errno in UNWRITTEN:
            raise
        said = note_of(error) or meaning(error)
        plain = f"{type(error).__name__}: {error}"
        raise ModelError(f"{model}: {said} ({plain})" if said else f"{model}: {plain}") from error
