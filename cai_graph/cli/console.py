"""What the commands print with: consoles, progress, records; and the exit statuses."""

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
"""What the system says where output cannot be written: the disk is full, or nobody reads on."""

LINE_SECONDS = 30
"""Between two lines of progress in a file or a pipe."""

DEFAULT_LOG = "sqlite:///cai.db"

T = TypeVar("T")

UNFOLDED = 10_000
"""Width in columns where no terminal has one: a row or a path stays in one line for `grep` and `cut`."""


class _Streamed(Console):
    """A console that folds at a terminal's width, or at COLUMNS, and into a pipe or a file not at all."""

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
        # Cells are filled up to the width of their column, and that is the longest line there is.
        self.file.write("\n".join(line.rstrip(" ") for line in caught.get().split("\n")))
        self.file.flush()


out = _Streamed(highlight=False, markup=False, emoji=False)
err = _Streamed(highlight=False, markup=False, emoji=False, stderr=True)


def group(help: str = "", **settings: Any) -> typer.Typer:
    """Return a group of commands; a group without a name of its own stands at the top."""
    return typer.Typer(
        help=help, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, **settings
    )


def print_lines(lines: Iterable[bytes]) -> None:
    """Print records, each a line of ASCII JSON with its line end.

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
    """Tell the user something, on standard error."""
    from cai_graph import show

    err.print(Text(show.clean(sentence)), soft_wrap=True)


def complain(sentence: str) -> None:
    """Tell the user what is wrong, on standard error."""
    from cai_graph import show

    err.print(Text(show.clean(sentence), "red"), soft_wrap=True)


def imported(sentence: str, broken: Iterable[BrokenLine]) -> None:
    """Tell which lines of a file were skipped and what became of the others; exit with 3 where any was."""
    skipped = [f"line {line} skipped: {what}" for line, what in broken]
    for each in skipped:
        complain(each)
    note(sentence)
    if skipped:
        raise typer.Exit(SKIPPED)


def is_attended() -> bool:
    """Return whether somebody sits at a terminal, who can be asked."""
    return err.is_terminal and sys.stdin is not None and sys.stdin.isatty()


def log_option(log: str) -> str:
    """Return the option that names a log in a command to type next; nothing for the default one."""
    return "" if log == DEFAULT_LOG else f" --log {shlex.quote(without_password(log))}"


def again() -> str:
    """Return the word and the command that was typed, to end a sentence that asks to type it once more."""
    words = [without_password(word) if "://" in word else word for word in sys.argv[1:]]
    same = " with the same input" if "-" in words else ""  # standard input is over
    return f"again{same}: {shlex.join(['cai', *words])}"


def interrupted() -> KeyboardInterrupt:
    """Return what ends a command that Ctrl-C stopped, and says that the same one goes on where it stopped."""
    return KeyboardInterrupt(f"interrupted; to go on, type {again()}")


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Have Ctrl-C in the block say that the same command goes on where it stopped."""
    try:
        yield
    except KeyboardInterrupt:
        raise interrupted() from None


@contextlib.contextmanager
def bar(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """Show progress: a bar in a terminal, a line a row elsewhere. Gives what is called after each row."""
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
    """Show how far a long piece of work is: gives what is told (done, in all); silent until it is.

    A terminal shows a bar; elsewhere a line is written at the end, and every `LINE_SECONDS` before it.
    The column shows both numbers; None: as a count.
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
    """Ctrl-C: the first time it asks to end after what is under way, the second time it ends that too."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """Hear Ctrl-C from now on, in the task that calls."""
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
    """Take every result of a job that Ctrl-C stops, with progress; return whether it was stopped.

    Args:
        results: gives the job's results, from a function that says whether no further one shall be begun.
        left: how many results there are to be.
        what: what they are, in the plural.
        line: says of a result what stands beside the progress.
        report: hears of each result after that, to complain of one that failed.
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
