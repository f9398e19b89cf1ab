"""The output folder shows the files of the last model, and nothing of an older one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from cai_graph.errors import DataError
from trainers import whole
from trainers.distill.pipeline import DONE

__all__ = ["link", "publish"]

_PUBLISHED = ".published.json"
"""In the output folder: names of the files that the last model was shown in."""


def link(source: Path, target: Path) -> None:
    """Put a file in a second place, at no cost where the file system can; it appears whole."""
    work = _work(target)
    work.unlink(missing_ok=True)
    try:
        os.link(source, work)
    except OSError:
        shutil.copyfile(source, work)
    os.replace(work, target)
    work.unlink(missing_ok=True)  # which `replace` leaves where both are links to one file


def publish(made: Path, output: Path) -> None:
    """Show the finished model in the output folder itself, and nothing of an older one.

    What was put there is noted, so that a file of the user is never taken for one of an older model.
    """
    note = output / _PUBLISHED
    files = {path.name: path for path in sorted(made.iterdir()) if path.is_file() and _is_shown(path.name)}
    before = _published(note)
    whole.write(note, json.dumps(sorted(before | files.keys())) + "\n")  # whatever interrupts what follows
    for name in before - files.keys():
        for path in (output / name, _work(output / name)):
            path.unlink(missing_ok=True)
    for name, path in files.items():
        link(path, output / name)
    whole.write(note, json.dumps(sorted(files)) + "\n")


def _work(target: Path) -> Path:
    """Return the name under which a file is made; an interrupt may leave it there."""
    return target.with_name(f".{target.name}.new")


def _is_shown(name: str) -> bool:
    return name != DONE and not name.startswith(".")


def _published(note: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(note.read_text(encoding="utf-8")) if Path(name).name == name}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{note}: cannot be read ({error}); it names the files of the last model in {note.parent}; "
            "remove it, and those of them that the new model has not"
        ) from error
