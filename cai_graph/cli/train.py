"""`cai train`: runs the training stages on labels and logs, and exports configs to other trainers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from cai_graph.cli.console import group, measured, note, resumable
from cai_graph.cli.options import ConfigFile, Sets, option
from cai_graph.cli.specs import fetch

commands = group("Train on labels and logs.")


class Stage(NamedTuple):
    """A command `cai train NAME`: module `trainers.NAME`, with its `Config` and `train(config)`."""

    name: str
    help: str
    example: str
    tells: bool = False
    """Whether `train` takes a callback for its progress; other stages show TRL's own progress bar."""


STAGES = (
    Stage("sft", "Imitate answers: supervised fine-tuning.", "--set data=answers --set output=sft"),
    Stage(
        "reward",
        "Rate answers, by soft labels: a reward model.",
        "--set data=preferences --set output=reward",
    ),
    Stage("dpo", "Prefer answers, by soft labels: DPO.", "--set data=preferences --set output=dpo"),
    Stage("kto", "Prefer answers that are labelled one by one: KTO.", "--set data=labelled --set output=kto"),
    Stage("online", "Learn by a reward, under a watch: RLOO and GRPO.", "--set output=better"),
    Stage(
        "ppo",
        "Learn from any reward, by PPO.",
        "--set data=prompts --set reward=reward --set output=ppo",
        tells=True,
    ),
)


@contextmanager
def _training() -> Iterator[None]:
    """Send TRL's output to standard error, as standard output is for the result; make Ctrl-C resumable."""
    with resumable(), redirect_stdout(sys.stderr):
        yield


def _register(stage: Stage) -> None:
    def command(
        config: ConfigFile = None,
        settings: Sets = None,
    ) -> None:
        from importlib import import_module

        from trainers.config import read

        module = import_module(f"trainers.{stage.name}")
        told = read(module.Config, config, settings or ())
        with _training():
            if stage.tells:
                with measured("updates") as tell:
                    made = module.train(told, tell)
            else:
                made = module.train(told)
        note(f"the checkpoint is in {made.path}; its README.md says how it came to be")
        typer.echo(made.path)

    again = (
        "After an interrupt, run the same command again to resume. "
        "docs/training-settings.md lists the settings."
    )
    example = f"Example: cai train {stage.name} --config {stage.name}.yaml {stage.example}"
    commands.command(stage.name, help=f"{stage.help}\n\n{again}", epilog=example)(command)


for stage in STAGES:
    _register(stage)


@commands.command("export", epilog="Example: cai train export ppo verl prompts-for-verl --config ppo.yaml")
def train_export(
    stage: Annotated[Literal["ppo", "online"], typer.Argument(help="The stage that the config is for.")],
    engine: Annotated[Literal["verl", "openrlhf"], typer.Argument(help="The engine that trains.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Dataset of prompts in that engine's format.")],
    config: ConfigFile = None,
    settings: Sets = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs per machine.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
) -> None:
    """Print the command with which verl or OpenRLHF runs a config of ppo or online.

    Differences from the stage here are printed to standard error.
    """
    import shlex
    from importlib import import_module

    from trainers.config import read
    from trainers.elsewhere import command

    told = read(import_module(f"trainers.{stage}").Config, config, settings or ())
    made = command(told, engine, data, gpus=gpus, nodes=nodes)
    typer.echo(shlex.join(made.arguments))
    for said in made.differs:
        note(said)


@commands.command("probe", epilog="Example: cai train probe labels --output heads --model local")
def train_probe(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Folder with the labelled sources; docs/critics.md has its layout."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the heads and their card.")],
    model: Annotated[
        str, option("--model -m", "The local model whose hidden state is read.", "SPEC")
    ] = "local",
) -> None:
    """Train the linear heads with which a local model judges, and measure their accuracy.

    After an interrupt, run the same command again to resume.
    """
    from trainers.critic import probe

    config = probe.Config(data=Path(data), output=Path(output), model=model)
    fetch(model)
    with _training(), measured("forward passes") as tell:
        folder = probe.train(config, tell)
    note(f"the heads are in {folder}; its CARD.md has the figures")
    typer.echo(folder)


@commands.command(
    "critic",
    epilog="Example: cai train critic --set model=local --set data=verdicts --set output=my-critic",
)
def train_critic(
    config: ConfigFile = None,
    settings: Sets = None,
) -> None:
    """Train your own critic from verdicts, calibrate it and measure its accuracy.

    The data are a folder of `cai dataset build --kind critic`. The critic is then `--critic trained:FOLDER`.
    docs/training-settings.md lists the settings.
    """
    from trainers import critic
    from trainers.config import read

    made = read(critic.Config, config, settings or ())
    fetch(made.model)
    what = "forward passes" if made.kind == "probe" else "updates"
    with _training(), measured(what) as tell:
        folder = critic.train(made, tell)
    note(f"the critic is in {folder}; its CARD.md has the figures. Use it: --critic trained:{folder}")
    typer.echo(folder)
