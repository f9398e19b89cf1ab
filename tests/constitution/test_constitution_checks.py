"""What is said about a constitution: lint, diff, and the JSON Schema that editors read."""

from __future__ import annotations

import json

import yaml
from constitution_support import ROOT, constitution, principle

from cai_graph.constitution import Constitution, Difference, builtin, diff, json_schema, lint, load

# --- the schema ------------------------------------------------------------------------------------------


def test_schema_file_is_up_to_date() -> None:
    published = json.loads((ROOT / "constitutions" / "schema.json").read_text(encoding="utf-8"))
    assert published == json_schema(), "run: cai constitution schema > constitutions/schema.json"


def test_schema_knows_every_field_of_the_built_in_files() -> None:
    schema = json_schema()
    for name in builtin():
        data = yaml.safe_load((ROOT / "constitutions" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert set(data) <= set(schema["properties"])
        for part, definition in (("principles", "Principle"), ("examples", "Example")):
            known = schema["$defs"][definition]
            for item in data.get(part, []):
                assert set(known["required"]) <= set(item) <= set(known["properties"])


# --- lint and diff ---------------------------------------------------------------------------------------


def found(c: Constitution) -> list[tuple[str | None, str | None]]:
    return [(f.principle, f.field) for f in lint(c)]


def test_lint_finds_principles_that_say_the_same_and_weigh_differently() -> None:
    twins = constitution(
        principle("a", critique_request="Look for insults, slurs and threats in the answer."),
        principle("b", critique_request="Look for insults, slurs or threats in the answer.", weight=3),
        principle("c"),
    )
    assert found(twins) == [("b", "critique_request"), ("b", "weight")]
    assert "3 contradicts 1 of 'a'" in lint(twins)[1].message


def test_lint_finds_requests_too_long_for_a_batched_critique() -> None:
    assert found(constitution(principle(revision_request="y " * 121 + "z"))) == [("a", "revision_request")]


def test_lint_finds_what_is_missing_in_a_language() -> None:
    german = {"critique_request": "a", "revision_request": "b", "preference_question": "c"}
    c = constitution(principle("a", translations={"de": german}), principle("b"))
    assert found(c) == [("b", "translations"), (None, "refusal_translations")]


def test_lint_reads_translations_as_it_reads_the_texts() -> None:
    german = {"critique_request": "suche a", "revision_request": "y " * 121 + "z"}
    c = constitution(principle(translations={"de": german}), refusal_translations={"de": "Nein."})
    assert [(f.principle, f.field, f.message.partition(":")[0]) for f in lint(c)] == [
        ("a", "translations", "'de' revision_request"),
        ("a", "translations", "'de' preference_question"),
    ]


def test_lint_finds_misspelt_aims_and_copied_wording() -> None:
    assert found(constitution(principle(aim="harmles"))) == [("a", "aim")]
    assert found(constitution(principle(aim="style"))) == []
    copied = principle(critique_request="be kind", revision_request="Be kind!")
    assert found(constitution(copied)) == [("a", "revision_request")]


def test_lint_finds_examples_of_one_verdict_only() -> None:
    example = {"prompt": "p", "draft": "d", "verdict": "VIOLATES", "critique": "c", "revision": "r"}
    assert found(constitution(examples=[example])) == [(None, "examples")]
    assert found(constitution(examples=[example, {**example, "verdict": "COMPLIES"}])) == []


def test_diff_of_a_constitution_with_itself_is_empty() -> None:
    assert diff(load("balanced"), load("balanced")) == []


def test_diff_tells_principles_and_fields() -> None:
    old = constitution(principle("a"), principle("b"), principle("c"))
    new = constitution(principle("b", weight=2), principle("a"), principle("d"), refusal="No.")
    assert diff(old, new) == [
        Difference("changed", None, "refusal", old.refusal, "No."),
        Difference("removed", "c", None, old["c"], None),
        Difference("moved", "b", None, 1, 0),
        Difference("changed", "b", "weight", 1.0, 2.0),
        Difference("moved", "a", None, 0, 1),
        Difference("added", "d", None, None, new["d"]),
    ]


def test_diff_compares_examples_by_prompt_and_translations_by_language() -> None:
    shown = {"prompt": "p", "draft": "d", "verdict": "COMPLIES", "critique": "c"}
    texts = {"critique_request": "Suche Zusagen.", "revision_request": "Nenne die Regel."}
    old = constitution(
        principle(translations={"de": texts}),
        examples=[shown, {**shown, "prompt": "q"}],
        refusal_translations={"de": "Nein.", "fr": "Non."},
    )
    new = constitution(
        principle(translations={"de": {**texts, "critique_request": "Suche."}}),
        examples=[{**shown, "prompt": "r"}, {**shown, "draft": "e"}],
        refusal_translations={"fr": "Non.", "de": "Nein!"},
    )
    found = [(d.change, d.principle, d.field, d.part) for d in diff(old, new)]
    assert found == [
        ("changed", None, "refusal_translations", "de"),
        ("changed", None, "examples", "p"),
        ("removed", None, "examples", "q"),
        ("added", None, "examples", "r"),
        ("changed", "a", "translations", "de"),
    ]
    assert diff(old, new)[1].before == (old.examples[0],)
    turned = constitution(examples=[new.examples[1], new.examples[0]])
    assert [(d.change, d.field) for d in diff(constitution(examples=new.examples), turned)] == [
        ("moved", "examples")
    ]
