"""Constitutions: the principles by which answers are judged and revised; `load` reads them.

A Constitution is read by name (`load("balanced")`), from a YAML or JSON file, from a mapping, or from a
foreign principle list. It is immutable, complete (its `extends` is applied) and identified by its `digest`.

    source      files → plain data, with the line number of each part
    foreign     principle lists of other projects → the fields of our own format
    loading     plain data → a Constitution, with `extends` applied; errors that name file, line and field
    principles  Principle, Example, Constitution
    checks      lint, diff, and the JSON Schema
"""

from cai_graph.constitution.checks import Difference, Finding, diff, json_schema, lint
from cai_graph.constitution.loading import builtin, load
from cai_graph.constitution.principles import Constitution, Example, Principle, Texts

__all__ = [
    "Constitution",
    "Difference",
    "Example",
    "Finding",
    "Principle",
    "Texts",
    "builtin",
    "diff",
    "json_schema",
    "lint",
    "load",
]
