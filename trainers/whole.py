"""Text files that are whole or not there, whatever interrupts the writing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write"]


def write(path: Path, text: str) -> None:
    """Write a file beside its place, put it on the disk, and rename it; an older one stands until then.

    Raises:
        OSError: it cannot be written there. Nothing half-written stays behind.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
