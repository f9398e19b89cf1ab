"""Publishes the files of the last model in the output folder, and removes those of an older model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from cai_graph.errors import DataError
from trainers import atomic
from trainers.distill.pipeline import DONE

__all__ = ["link", "publish"]

_PUBLISHED = ".published.json"
"""File in the output folder with the names of the files published for the last model."""


def link(source: Path, target: Path) -> None:
    """Hard-link a file to a second path, or copy it if links are not possible; the target appears whole."""
    work = _work(target)
    work.unlink(missing_ok=True)
    try:
        os.link(source, work)
    except OSError:
        shutil.copyfile(source, work)
    os.replace(work, target)
    work.unlink(missing_ok=True)  # `replace` does nothing if both are links to the same file


def publish(made: Path, output: Path) -> None:
    """Publish the finished model in the output folder itself, and remove the files of an older one.

    The published names are recorded, so that a user's file is never mistaken for one of an older model.
    """
    note = output / _PUBLISHED
    files = {path.name: path for path in sorted(made.iterdir()) if path.is_file() and _is_shown(path.name)}
    before = _published(note)
    atomic.write(note, json.dumps(sorted(before | files.keys())) + "\n")  # stays correct if interrupted below
    for name in before - files.keys():
        for path in (output / name, _work(output / name)):
            path.unlink(missing_ok=True)
    for name, path in files.items():
        link(path, output / name)
    atomic.write(note, json.dumps(sorted(files)) + "\n")


def _work(target: Path) -> Path:
    """Return the temporary name under which a file is written; an interrupt may leave it behind."""
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
