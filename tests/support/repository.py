"""Where the parts of the repository are, and the blocks of its pages."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["DATA", "DOCS", "EXAMPLES", "ROOT", "SUPPORT", "fenced", "read_page"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
SUPPORT = Path(__file__).parent
"""What processes that tests start have on their path, to import these modules."""
DATA = Path(os.environ.get("CAI_DATA", ROOT.parent / "shared" / "data"))
"""Public data sets; not part of the repository, and may be absent."""


def read_page(name: str) -> str:
    """Return the text of a page, such as `log.md` of docs/, or of README.md."""
    return (ROOT / name if name == "README.md" else DOCS / name).read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language that stand in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
