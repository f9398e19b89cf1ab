"""Constitutions: the principles that answers are judged and revised under, and where they come from.

A Constitution is read by name (`load("balanced")`), from a YAML or JSON file, from a mapping, or from a
foreign principle list; it is immutable, complete (its `extends` is applied) and known by a `digest`.

    source      files → plain data, and on which line each part of it stands
    foreign     the principle lists of others → the fields of our own format
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
