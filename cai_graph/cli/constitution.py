"""`cai constitution`: shows, checks and compares constitutions."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from cai_graph.cli.console import FAILED, group, out, print_json
from cai_graph.cli.options import AsJson

commands = group("Read and check constitutions.")

Named = Annotated[str, typer.Argument(help="A built-in constitution, or a file.", metavar="NAME|FILE")]


@commands.command("list", epilog="Example: cai constitution list")
def constitution_list(as_json: AsJson = False) -> None:
    """List the built-in constitutions."""
    from cai_graph import constitution, show

    found = [constitution.load(name) for name in constitution.builtin()]
    if as_json:
        print_json(
            [
                {"name": c.name, "version": c.version, "principles": len(c), "digest": c.digest}
                | {"description": c.description}
                for c in found
            ]
        )
        return
    rows = [(c.name, c.version, f"{len(c)} principles", c.description or "") for c in found]
    out.print(show.table(rows))


@commands.command("show", epilog="Example: cai constitution show balanced")
def constitution_show(name: Named, as_json: AsJson = False) -> None:
    """Show a constitution, with what it `extends` resolved."""
    from cai_graph import constitution, show

    rules = constitution.load(name)
    if as_json:
        print_json(rules.model_dump(mode="json") | {"digest": rules.digest})
        return
    out.print(Text(show.clean(f"{rules.name}, version {rules.version}, digest {rules.digest[:12]}"), "bold"))
    if rules.description:
        out.print(Text(show.clean(rules.description)))
    out.print()
    out.print(show.table(((p.id, p.aim, p.critique_request) for p in rules), ("principle", "aim", "asks")))


@commands.command("lint", epilog="Example: cai constitution lint helpful.yaml")
def constitution_lint(name: Named, as_json: AsJson = False) -> None:
    """Report what is valid in a constitution but probably not intended; exit with 1 if there is anything."""
    from dataclasses import asdict

    from cai_graph import constitution, show

    findings = constitution.lint(constitution.load(name))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    elif findings:
        out.print(show.table((f.principle or "(all)", f.field or "", f.message) for f in findings))
    else:
        out.print(Text("nothing found"))
    if findings:
        raise typer.Exit(FAILED)


@commands.command("diff", epilog="Example: cai constitution diff balanced mine.yaml")
def constitution_diff(a: Named, b: Named, as_json: AsJson = False) -> None:
    """Show how the second constitution differs from the first."""
    from dataclasses import asdict

    from pydantic_core import to_jsonable_python

    from cai_graph import constitution, show

    found = constitution.diff(constitution.load(a), constitution.load(b))
    if as_json:
        print_json([to_jsonable_python(asdict(difference)) for difference in found])
        return
    for difference in found:
        about = " ".join(filter(None, (difference.principle, difference.field)))
        part = "" if difference.part is None else f": {show.one_line(difference.part, 80)}"
        out.print(Text(show.clean(f"{difference.change} {about}{part}"), "bold"))
        if difference.change == "changed":
            out.print(show.word_diff(_said(difference.before), _said(difference.after)))
    if not found:
        out.print(Text("no difference"))


def _said(value: object) -> str:
    """Return a field's value in readable form."""
    from pydantic import BaseModel

    if isinstance(value, tuple):
        return "\n".join(map(_said, value))
    if isinstance(value, BaseModel):  # an example, or the texts of a principle
        return "\n".join(f"{name}: {text}" for name, text in value if text is not None)
    return "none" if value is None else str(value)


@commands.command("schema", epilog="Example: cai constitution schema > constitution.schema.json")
def constitution_schema() -> None:
    """Print the JSON Schema with which an editor validates and completes a constitution file."""
    from cai_graph import constitution

    print_json(constitution.json_schema())
