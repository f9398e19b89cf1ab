"""`cai model`: lists, downloads, locates and exports models that run on this machine."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cai_graph.cli.console import group, out, print_json
from cai_graph.cli.options import AsJson, option
from cai_graph.cli.specs import fetched
from cai_graph.errors import ModelError

PrecisionName = Literal["F32", "F16", "Q8_0"]

commands = group("Models that run on this machine.")

LocalName = Annotated[
    str,
    typer.Argument(
        help="A name that `cai model list` prints; that of `local` if left out.", metavar="[NAME]"
    ),
]


@commands.command("list", epilog="Example: cai model list")
def model_list(as_json: AsJson = False) -> None:
    """List the local models that can be downloaded, and those that are already in the cache."""
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
    """Download a local model, check its hash, and print its path."""
    typer.echo(fetched(_bare(name)))


@commands.command("path", epilog="Example: cai model path smollm2")
def model_path(name: LocalName = "", as_json: AsJson = False) -> None:
    """Print the path of a local model; exit with 1 if it is not in the cache."""
    from cai_graph import local

    model = local.find(_bare(name))
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
        source=None if source is None else local.weights(_bare(source)),
        precision=precision,
    )
    typer.echo(written)


def _bare(name: str) -> str:
    """Return a name without the prefix of "local:NAME", the form that `cai model list` prints."""
    from cai_graph import local

    found = local.name_in(name)
    return name if found is None else found
