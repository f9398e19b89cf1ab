"""`cai doctor`: reports what is installed, what is missing, and how to install it."""

from __future__ import annotations

from cai_graph.cli.console import group, out, print_json
from cai_graph.cli.options import AsJson

commands = group()


@commands.command(epilog="Example: cai doctor")
def doctor(as_json: AsJson = False) -> None:
    """Report what is installed, what is missing, and how to install it."""
    from dataclasses import asdict

    from cai_graph import show
    from cai_graph.doctor import checks

    found = checks()
    if as_json:
        print_json([asdict(check) for check in found])
        return
    out.print(show.table((check.name, check.status, check.found, check.remedy) for check in found))
