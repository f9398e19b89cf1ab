"""`cai train`: train on labels and logs."""

from __future__ import annotations

from typing import Annotated

import typer

from cai_graph.cli.console import group, measured, note
from cai_graph.cli.model import fetch
from cai_graph.cli.options import option

commands = group("Train on labels and logs.")


@commands.command("probe", epilog="Example: cai train probe labels --output heads --model local")
def train_probe(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder with the labelled sources.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the heads and their card.")],
    model: Annotated[
        str, option("--model -m", "The local model whose hidden state is read.", "SPEC")
    ] = "local",
) -> None:
    """Train the linear heads by which a local model judges, and measure them.

    Type the same command again after an interrupt, and it goes on where it stopped.
    """
    from pathlib import Path

    from rich.progress import MofNCompleteColumn

    from trainers import probe

    config = probe.Config(data=Path(data), output=Path(output), model=model)
    fetch(model)
    with measured("forward passes", MofNCompleteColumn()) as tell:
        folder = probe.train(config, tell)
    note(f"the heads are in {folder}; its CARD.md has the figures")
