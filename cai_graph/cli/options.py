"""Command line options that several commands share."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# These sets are defined in cai_graph/request/policy.py, which is too heavy to import for --help.
Strategy = Literal["batched", "parallel", "sampled"]
Policy = Literal["open", "closed", "raise"]
RowFormat = Literal["jsonl", "csv", "text"]
ExportFormat = Literal["jsonl", "parquet"]
OutcomeName = Literal["KEPT", "REVISED", "EXHAUSTED", "REFUSED", "FAILED", "UNJUDGED"]


def option(names: str, help: str, metavar: str | None = None) -> Any:
    """Return an option from its names, separated by spaces."""
    return typer.Option(*names.split(), help=help, metavar=metavar)


Model = Annotated[
    str,
    option(
        "--model -m",
        "Who drafts: local, local:NAME, local:FILE.gguf, local:FOLDER, openai:…, anthropic:…, http://…/v1#…",
        "SPEC",
    ),
]
Critic = Annotated[
    str | None, option("--critic", "Who judges: a model, or trained:FOLDER; the model by default.", "SPEC")
]
Strong = Annotated[
    str | None, option("--strong", "Judges only what the critic cannot clear; needs --threshold.", "SPEC")
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Cascade: the strong critic is asked if the cheap critic's P(VIOLATES) is at least this.",
    ),
]
Reviser = Annotated[str | None, option("--reviser", "Who rewrites; the model by default.", "SPEC")]
ConstitutionName = Annotated[
    str, option("--constitution -c", "A built-in constitution, or a file.", "NAME|FILE")
]
LogUrl = Annotated[str, option("--log", "Where the log is.", "URL")]
OutcomeFilter = Annotated[
    OutcomeName | None, typer.Option("--outcome", help="Only trajectories with this outcome.")
]
Tag = Annotated[str | None, typer.Option(help="Only trajectories with this tag.")]
Source = Annotated[str | None, typer.Option(help="Only trajectories whose source key starts with this.")]
Since = Annotated[datetime | None, typer.Option(help="Only trajectories from this time on, UTC.")]
StrategyName = Annotated[Strategy, option("--strategy", "How principles are judged.")]
MaxRounds = Annotated[
    int | None, typer.Option(min=0, help="Maximum rounds of critique and revision; 0: only judge.")
]
Candidates = Annotated[int | None, typer.Option(min=1, help="Number of candidate revisions in a round.")]
OnViolation = Annotated[Policy, option("--on-violation", "What leaves when every revision still fails.")]
OnUnreadable = Annotated[Policy, option("--on-unreadable", "What leaves when the verdict is unreadable.")]
OnError = Annotated[Policy, option("--on-error", "What leaves when a critic or reviser fails.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of random choices: principles, and the local model's sampling.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Maximum tokens of a draft; a revision may have twice as many.")
]
Concurrency = Annotated[
    int | None,
    typer.Option(min=1, help="Rows processed at the same time; 4 on the local model and 16 on others."),
]
ConfigFile = Annotated[Path | None, option("--config -c", "YAML with the stage's settings.", "FILE")]
Sets = Annotated[
    list[str] | None,
    option("--set -s", "A setting, over that of the file; may be repeated.", "KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
