"""What the tests of constitutions share: constitutions written out, and the published principle lists."""

from __future__ import annotations

from typing import Any

from repository import ROOT

from cai_graph.constitution import Constitution, load

SHARED = ROOT.parent / "shared" / "data" / "principles"  # not part of the repository; may be absent


def principle(identifier: str = "a", **fields: Any) -> dict[str, Any]:
    """The fields of a principle, as a file holds them."""
    return {
        "id": identifier,
        "aim": "harmless",
        "critique_request": f"look for {identifier}",
        "revision_request": f"take out {identifier}",
        "preference_question": f"which has less {identifier}?",
        **fields,
    }


def constitution(*principles: dict[str, Any], **fields: Any) -> Constitution:
    """A constitution of those principles, or of one."""
    return load({"name": "t", "principles": list(principles or (principle(),)), **fields})
