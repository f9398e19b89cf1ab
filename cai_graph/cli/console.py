"""Output of the commands: consoles, messages, progress, records, Ctrl-C; and the exit statuses."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console, ConsoleDimensions
from rich.text import Text

from cai_graph.addresses import without_password
from cai_graph.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from cai_graph.log.transfer import BrokenLine

FAILED, SKIPPED, INTERRUPTED = 1, 3, 130
"""Exit statuses: an error or a failed check, some rows skipped, Ctrl-C."""

UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)
"""Error codes of output that cannot be written: the disk is full, or the pipe's reader has gone."""

LINE_SECONDS = 30
"""Seconds between two lines of progress in a file or a pipe."""

DEFAULT_LOG = "sqlite:///cai.db"

T = TypeVar("T")

UNFOLDED = 10_000
"""Width in columns without a terminal: a row or a path stays on one line, for `grep` and `cut`."""


class _Streamed(Console):
    """A console that wraps lines at a terminal's width, or at COLUMNS, but not in a pipe or a file."""

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        return found if self._folds else ConsoleDimensions(UNFOLDED, found.height)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self._width, self._height = new

    @property
    def _folds(self) -> bool:
        return self.is_terminal or self._width is not None or os.environ.get("COLUMNS", "").isdigit()

    def print(self, *objects: Any, **settings: Any) -> None:
        if self._folds:
            super().print(*objects, **settings)
            return
        with self.capture() as caught:
            super().print(*objects, **settings)
        # Cells are padded to the width of their column, which may be as wide as the console.
        self.file.write("\n".join(line.rstrip(" ") for line in caught.get().split("\n")))
        self.file.flush()


out = _Streamed(highlight=False, markup=False, emoji=False)
err = _Streamed(highlight=False, markup=False, emoji=False, stderr=True)


def group(help: str = "", **settings: Any) -> typer.Typer:
    """Return a group of commands; one that is added without a name has its commands at the top level."""
    return typer.Typer(
        help=help, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, **settings
    )


def print_lines(lines: Iterable[bytes]) -> None:
    """Print records, each of which is a line of ASCII JSON with its line end.

    Raises:
        ConfigError: the shell has closed standard output.
    """
    if sys.stdout is None:
        raise ConfigError("standard output is closed; redirect it into a file or a pipe")
    for line in lines:
        sys.stdout.write(line.decode("ascii"))


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2))


def print_record(record: Any, as_json: bool) -> None:
    """Print a flat record of counts."""
    from dataclasses import asdict

    from cai_graph import show

    fields = asdict(record)
    if as_json:
        typer.echo(json.dumps(fields, indent=2, default=str))
        return
    out.print(show.table((name.replace("_", " "), _plain(value)) for name, value in fields.items()))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
    if isinstance(value, tuple | list):
        return "\n".join(map(str, value)) or "none"
    return str(value)


def note(sentence: str) -> None:
    """Print a message for the user, on standard error."""
    from cai_graph import show

    err.print(Text(show.clean(sentence)), soft_wrap=True)


def complain(sentence: str) -> None:
    """Print an error or a warning, in red, on standard error."""
    from cai_graph import show

    err.print(Text(show.clean(sentence), "red"), soft_wrap=True)


def imported(sentence: str, broken: Iterable[BrokenLine]) -> None:
    """Report the skipped lines of an imported file, then `sentence`; exit with 3 if any line was skipped."""
    skipped = [f"line {line} skipped: {what}" for line, what in broken]
    for each in skipped:
        complain(each)
    note(sentence)
    if skipped:
        raise typer.Exit(SKIPPED)


def is_attended() -> bool:
    """Return whether a user at a terminal can be prompted."""
    return err.is_terminal and sys.stdin is not None and sys.stdin.isatty()


def log_option(log: str) -> str:
    """Return the `--log` option for a suggested command; "" for the default log."""
    return "" if log == DEFAULT_LOG else f" --log {shlex.quote(without_password(log))}"


def again() -> str:
    """Return "again: COMMAND" with the command that was typed, as the end of a message to repeat it."""
    words = [without_password(word) if "://" in word else word for word in sys.argv[1:]]
    same = " with the same input" if "-" in words else ""  # standard input has been consumed
    return f"again{same}: {shlex.join(['cai', *words])}"


def interrupted() -> KeyboardInterrupt:
    """Return the exception for Ctrl-C; its message says that the same command resumes the work."""
    return KeyboardInterrupt(f"interrupted; to go on, type {again()}")


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Raise `interrupted` on Ctrl-C in the block: the same command resumes the work."""
    try:
        yield
    except KeyboardInterrupt:
        raise interrupted() from None


@contextlib.contextmanager
def bar(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """Show progress: a bar in a terminal, otherwise a line per row. Yields the callback for a row."""
    from rich import progress

    if not err.is_terminal:
        count = 0

        def line(said: str) -> None:
            nonlocal count
            count += 1
            err.print(Text(f"{count}/{total} {said}"), soft_wrap=True)

        yield line
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=err) as bar:
        task = bar.add_task(what, total=total)
        yield lambda said: bar.advance(task)


@contextlib.contextmanager
def measured(what: str, column: ProgressColumn | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a long task. Yields the callback (done, total); its first call shows the progress.

    A terminal shows a bar; otherwise a line is written every `LINE_SECONDS`, and at the end. `column` formats
    the two numbers; None: as a count.
    """
    from rich import progress

    columns = (column or progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
    bar = progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(), *columns, console=err
    )
    bar.add_task(what, total=None)
    task = bar.tasks[0]
    written = time.monotonic()

    def line() -> None:
        done, left = (str(column.render(task)).strip() for column in columns)
        err.print(Text(f"{what}: {done}, {left} left" if task.time_remaining else f"{what}: {done}"))

    def tell(done: int, total: int) -> None:
        nonlocal written
        bar.update(task.id, completed=done, total=total)
        if err.is_terminal:
            bar.start()
        elif (now := time.monotonic()) >= written + LINE_SECONDS and done < total:
            written = now
            line()

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()
        elif task.total is not None:
            line()


class Stop:
    """Ctrl-C handler: the first one lets the work in progress finish, the second one cancels it."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """Install the handler; the second Ctrl-C cancels the calling task."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def heard() -> None:
            if self.asked:
                task.cancel()
                return
            self.asked = True
            note("finishing what is under way; Ctrl-C again drops them")

        with contextlib.suppress(NotImplementedError):  # Windows has no signals in event loops
            loop.add_signal_handler(signal.SIGINT, heard)


def drive(
    results: Callable[[Callable[[], bool]], AsyncGenerator[T, None]],
    left: int,
    what: str,
    *,
    line: Callable[[T], str],
    report: Callable[[T], None],
) -> bool:
    """Consume all results of a job, with progress, until Ctrl-C; return whether it was stopped.

    Args:
        results: returns the job's results; its argument returns whether the job must begin no further ones.
        left: the expected number of results.
        what: the name of the results, in the plural.
        line: returns the text for a result beside the progress.
        report: is called with each result after that, to report a failure.
    """
    stop = Stop()

    async def work() -> None:
        stop.listen()
        async with contextlib.aclosing(results(lambda: stop.asked)) as ended:
            with bar(left, what) as advance:
                async for result in ended:
                    advance(line(result))
                    report(result)

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(work())
    return stop.asked
