"""`cai dataset`: builds training data from logs, explains and documents it, and imports existing sets."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cai_graph.cli.console import DEFAULT_LOG, group, imported, note, out, print_json
from cai_graph.cli.options import AsJson, LogUrl, option
from cai_graph.errors import ConfigError

if TYPE_CHECKING:
    from trainers.ledger import Ledger

commands = group("From logs to training data.")

# These sets are defined in trainers/rows.py and trainers/export, which are too heavy to import for --help.
KindName = Literal[
    "sft", "critique-sft", "preference", "unpaired", "prompts", "critic", "privileged", "ranked"
]
FormatName = Literal["jsonl", "parquet", "openrlhf", "verl", "llama-factory", "axolotl", "openai"]
PersonalData = Literal["drop", "keep"]
Engine = Literal["local", "ray"]


@commands.command(
    "build", epilog="Example: cai dataset build --log sqlite:///cai.db --kind preference -o preferences"
)
def dataset_build(
    kind: Annotated[KindName, option("--kind -k", "Which kind of rows.")],
    output: Annotated[Path, option("--output -o", "Folder to make.", "DIR")],
    log: Annotated[
        list[str],
        option("--log", "A log by URL, or a JSONL file of records; may be repeated.", "URL"),
    ] = [DEFAULT_LOG],  # noqa: B006 - a default that --help shows
    test_share: Annotated[float, option("--test-share", "Share of the prompts that go to test.")] = 0.05,
    per_user: Annotated[int | None, option("--per-user", "Most rows of one user.")] = None,
    per_tenant: Annotated[int | None, option("--per-tenant", "Most rows of one tenant.")] = None,
    kept_per_revised: Annotated[
        float | None, option("--kept-per-revised", "Kept drafts for each other row, at most (sft).")
    ] = None,
    without_user: Annotated[
        list[str] | None, option("--without-user", "Remove this user's rows; may be repeated.", "ID")
    ] = None,
    without_tenant: Annotated[
        list[str] | None, option("--without-tenant", "Remove this tenant's rows; may be repeated.", "ID")
    ] = None,
    format: Annotated[
        FormatName,
        option("--format -f", "Whose loader is to read it; TRL reads jsonl and parquet."),
    ] = "jsonl",
    near_duplicates: Annotated[
        float,
        option(
            "--near-duplicates", "Similarity from which prompts stay on one side; 0: none are looked for."
        ),
    ] = 0.8,
    per_cluster: Annotated[
        int | None, option("--per-cluster", "Most rows of one cluster of near-duplicate prompts.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        option("--held-out", "An evaluation set, none of whose prompts may be in; may be repeated.", "FILE"),
    ] = None,
    personal_data: Annotated[
        PersonalData, option("--personal-data", "Rows that seem to hold personal data or a secret.")
    ] = "drop",
    tokenizer: Annotated[
        str | None, option("--tokenizer", "Folder of the tokenizer that --max-tokens counts with.", "DIR")
    ] = None,
    max_tokens: Annotated[int | None, option("--max-tokens", "Longest row, in tokens.")] = None,
    constitution: Annotated[
        list[str] | None,
        option("--constitution -c", "A file whose wording critique-sft needs; may be repeated.", "FILE"),
    ] = None,
    workers: Annotated[int, option("--workers", "Processes; the outcome does not depend on them.")] = 1,
    engine: Annotated[Engine, option("--engine", "This machine, or a Ray cluster.")] = "local",
    as_json: AsJson = False,
) -> None:
    """Convert logs to rows for training, with a ledger that accounts for every trajectory."""
    from cai_graph import show
    from trainers import dataset

    with _named_as_options():
        recipe = dataset.Recipe(
            kind=kind,
            test_share=test_share,
            per_user=per_user,
            per_tenant=per_tenant,
            kept_per_revised=kept_per_revised,
            without_users=tuple(without_user or ()),
            without_tenants=tuple(without_tenant or ()),
            near_duplicates=near_duplicates or None,
            per_cluster=per_cluster,
            held_out=tuple(held_out or ()),
            personal_data=personal_data,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            constitutions=tuple(constitution or ()),
        )
    built = dataset.build(log, output, recipe, format=format, workers=workers, engine=engine)
    if as_json:
        print_json(built.ledger.to_json())
    else:
        _print(built.ledger)
    rows = built.ledger.rows
    note(f"{show.count(rows, 'row')} {'is' if rows == 1 else 'are'} in {output}")
    for what, id in built.unmet:
        note(f"--without-{what} {id}: no trajectory is of this {what}, so nothing was removed for it")
    if test_share and not built.ledger.kept.get("test"):
        note(f"no prompt fell to the test part; raise --test-share (now {test_share:g})")


@contextlib.contextmanager
def _named_as_options() -> Iterator[None]:
    """Replace the names of recipe fields in errors by the names of the options."""
    try:
        yield
    except ConfigError as error:
        fields = (
            "test_share|per_user|per_tenant|per_cluster|kept_per_revised|near_duplicates|max_tokens|tokenizer"
        )
        said = re.sub(rf"\b({fields})\b", lambda found: f"--{found[0].replace('_', '-')}", str(error))
        raise ConfigError(said) from error


def _print(ledger: Ledger) -> None:
    from cai_graph import show

    out.print(show.table((label, f"{count:,}") for label, count in ledger.lines()))


@commands.command("explain", epilog="Example: cai dataset explain 5f0c… --data preferences")
def dataset_explain(
    row_id: Annotated[str, typer.Argument(metavar="ROW_ID", help="Id of a row.")],
    data: Annotated[Path, option("--data", "Folder of the dataset.", "DIR")],
    log: Annotated[
        list[str] | None, option("--log", "Where the log is now; where it was by default.", "URL")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Trace a row back to its trajectory, constitution, critic and judge."""
    from cai_graph import show
    from trainers import dataset

    origin = dataset.explain(row_id, data, logs=log)
    if as_json:
        print_json(origin.to_json())
        return
    out.print(show.table(origin.lines()))
    if origin.trajectory is not None:
        out.print(show.trajectory(origin.trajectory))


@commands.command("report", epilog="Example: cai dataset report preferences --licence cc-by-4.0")
def dataset_report(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the dataset.")],
    licence: Annotated[
        str, option("--licence", "Licence of the texts, in the hub's words; nobody but you knows it.")
    ] = "unknown",
    title: Annotated[str | None, typer.Option(help="Title of the card; default: the folder's name.")] = None,
) -> None:
    """Write a dataset's card (README.md, in the hub's format) and a page with plots (report.html)."""
    from trainers.dataset import card

    written = card.report(data, licence=licence, title=title)
    for log in written.missing_logs:
        note(f"{log}: cannot be read, so there are no figures of the judges that it names")
    note(f"the card is {written.card}, and the page is {written.page}")


@commands.command("import", epilog="Example: cai dataset import harmless-base.jsonl.gz --log sqlite:///hh.db")
def dataset_import(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSONL, JSON or Parquet; may end in .gz.")],
    log: LogUrl = DEFAULT_LOG,
    name: Annotated[str | None, typer.Option(help="Name of the set; default: the file's name.")] = None,
) -> None:
    """Add an existing preference set to a log, to build from it together with others.

    A row has chosen and rejected (and prompt), in HH-RLHF's or TRL's form, or prompt, completion and label.
    """
    from cai_graph import show
    from trainers import imports

    done = imports.import_preferences(log, file, name=name)
    imported(
        f"{show.count(done.pairs, 'pair')} and {show.count(done.answers, 'labelled answer')} added; "
        f"{done.present:,} were there already; {show.count(len(done.broken), 'line')} skipped",
        done.broken,
    )
