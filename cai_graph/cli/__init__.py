"""The command line `cai`: parses options, calls the library, and prints; it has no logic of its own.

Heavy modules are imported inside the command that needs them, so that `cai --help` is fast. Results go to
standard output, progress and errors to standard error. Exit status: 0 success, 1 an error or a failed check,
2 wrong usage, 3 finished but something was skipped, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import cai_graph
from cai_graph.cli import (
    ask,
    constitution,
    critic,
    dataset,
    distill,
    doctor,
    evaluate,
    feedback,
    judge,
    log,
    model,
    replay,
    run,
    train,
)
from cai_graph.cli.console import FAILED, INTERRUPTED, UNWRITTEN, complain, group, note
from cai_graph.errors import CaiError

__all__ = ["main"]


class _Root(TyperGroup):
    """The root of all commands; it reports Ctrl-C, on which Typer exits without a message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            note(str(error) or "interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = group(
    "Prompts under a constitution: drafted, critiqued, revised, and every trajectory logged.",
    epilog='Start with: cai demo, then cai ask "…". Exit status: 0 fine, 1 error, 2 usage, '
    "3 rows were skipped, 130 interrupted.",
    cls=_Root,
)
for command in (ask, run, judge, replay, distill, doctor):
    app.add_typer(command.commands)
app.add_typer(log.commands, name="log")
app.add_typer(feedback.commands, name="feedback")
app.add_typer(constitution.commands, name="constitution")
app.add_typer(critic.commands, name="critic")
app.add_typer(model.commands, name="model")
app.add_typer(dataset.commands, name="dataset")
app.add_typer(train.commands, name="train")
app.add_typer(evaluate.commands, name="evaluate")


class _Alarm(logging.Handler):
    """Prints what a log reports from its background work.

    The messages are remembered, since the log may later raise an error with the same message.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        complain(self.format(record))
        self.said.add(record.getMessage())


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    # A character that the encoding lacks must not be an error; under locale C, Python uses surrogateescape.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    alarm, logger = _Alarm(), logging.getLogger("cai_graph.log")
    logger.addHandler(alarm)
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # it is None if the shell closed it
                sys.stdout.flush()
    except CaiError as error:
        if str(error) not in alarm.said:
            complain(str(error))
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ImportError, AttributeError) as error:
        other = _other_trainers()
        if other is None:
            raise
        complain(
            f"{error}: {other} hides the package of that name which came with cai_graph; run `cai` in place "
            "of `python -m cai_graph.cli`, or in another folder"
        )
        sys.exit(FAILED)
    except OSError as error:
        if error.errno not in UNWRITTEN:
            if error.filename is None:
                raise
            complain(f"{error.filename}: {error.strerror}")
            sys.exit(FAILED)
        # At exit, Python would try again to write the rest of the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # a reader that stopped reading is not an error to report
            complain(f"what was to be written is not whole: {error.strerror}")
        sys.exit(FAILED)
    finally:
        logger.removeHandler(alarm)
    raise AssertionError("the app exits by itself")


def _other_trainers() -> str | None:
    """Return where `trainers` is imported from, if it is not the package beside this one."""
    from importlib.util import find_spec

    found = find_spec("trainers")
    ours = Path(cai_graph.__file__).parents[1] / "trainers" / "__init__.py"
    return None if found is None or found.origin == str(ours) else found.origin


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"cai-graph {version('cai-graph')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    pass
