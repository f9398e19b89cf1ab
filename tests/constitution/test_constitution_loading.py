"""What `load` makes of files and data: `extends`, and a sentence for whatever is wrong with them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from constitution_support import constitution, principle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repository import read_page

from cai_graph.constitution import Example, Principle, lint, load, loading
from cai_graph.constitution.principles import DEFAULT_REFUSAL
from cai_graph.constitution.source import MAX_FILE_BYTES
from cai_graph.errors import ConstitutionError

ONE = """\
name: t
principles:
  - id: a
    aim: harmless
    critique_request: look
    revision_request: fix
"""


def write(folder: Path, **files: str) -> None:
    """Write each text to the YAML file of its name."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


# --- extends ---------------------------------------------------------------------------------------------


def test_child_replaces_in_place_removes_and_appends(folder: Path) -> None:
    write(
        folder,
        parent=yaml.safe_dump({"name": "p", "principles": [principle(i) for i in ("a", "b", "c")]}),
        child=yaml.safe_dump(
            {
                "name": "c",
                "extends": "parent.yaml",
                "remove": ["c"],
                "principles": [principle("d"), principle("a", critique_request="look anew")],
            }
        ),
    )
    child = load("child.yaml")
    assert [p.id for p in child] == ["a", "b", "d"]
    assert child["a"].critique_request == "look anew"
    assert child.extends == ("parent.yaml",)
    flat = constitution(principle("a", critique_request="look anew"), principle("b"), principle("d"))
    assert child.digest == flat.digest


def test_parents_are_found_from_the_folder_of_the_file(folder: Path) -> None:
    (folder / "sub").mkdir()
    write(folder / "sub", base=ONE)
    write(folder, child="name: c\nextends: [sub/middle.yaml, human-rights]\n")
    write(folder / "sub", middle="name: m\nextends: base.yaml\n")
    assert [p.id for p in load("child.yaml")][:2] == ["a", "equal-dignity"]


def test_examples_and_refusal_are_inherited_unless_the_child_has_its_own(folder: Path) -> None:
    balanced = load("balanced")
    inherits = load({"name": "c", "extends": "balanced", "remove": ["no-demeaning"]})
    assert inherits.refusal == balanced.refusal
    assert inherits.refusal_in("de") == balanced.refusal_in("de")
    assert [e for e in balanced.examples if e.principle != "no-demeaning"] == list(inherits.examples)
    own = load({"name": "c", "extends": "balanced", "refusal": "No."})
    # The parent's translations are translations of another sentence.
    assert own.refusal_in("de") == "No."
    added = load({"name": "c", "extends": "balanced", "refusal_translations": {"it": "Non posso."}})
    assert added.refusal_in("it") == "Non posso."
    assert added.refusal_in("de") == balanced.refusal_in("de")
    write(folder, plain=ONE)
    both = load({"name": "c", "extends": ["balanced", "plain.yaml"]})
    assert both.refusal == balanced.refusal, (
        "a parent without a refusal of its own does not bring the default"
    )


def test_translations_of_the_default_refusal_are_inherited(folder: Path) -> None:
    write(folder, parent=ONE + "refusal_translations:\n  de: Nein.\n")
    for name in ("parent.yaml", folder / "parent.yaml", [folder / "parent.yaml"]):
        child = load({"name": "c", "extends": name, "refusal_translations": {"fr": "Non."}})
        assert child.refusal == DEFAULT_REFUSAL
        assert child.refusal_translations == {"de": "Nein.", "fr": "Non."}


def test_parent_shared_by_two_parents_counts_once(folder: Path) -> None:
    write(folder, base=ONE, left="name: l\nextends: base.yaml\n", right="name: r\nextends: base.yaml\n")
    assert len(load({"name": "c", "extends": ["left.yaml", "right.yaml"]})) == 1


def test_parent_reached_by_many_ways_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, x0=ONE, y0="name: y0\nextends: x0.yaml\n")
    for level in range(1, 6):
        parents = f"extends: [x{level - 1}.yaml, y{level - 1}.yaml]"
        write(folder, **{f"{each}{level}": f"name: {each}{level}\n{parents}\n" for each in "xy"})
    was_read: list[str] = []
    real = loading.read
    monkeypatch.setattr(loading, "read", lambda path: was_read.append(path.name) or real(path))
    assert len(load("x5.yaml")) == 1
    assert sorted(was_read) == sorted({*was_read})


def test_cycle_is_drawn(folder: Path) -> None:
    write(
        folder,
        a="name: a\nextends: b.yaml\n",
        b="name: b\nextends: [balanced, c.yaml]\n",
        c="name: c\nextends: a.yaml\n",
        me="name: me\nextends: me.yaml\n",
    )
    with pytest.raises(ConstitutionError) as caught:
        load("a.yaml")
    assert str(caught.value) == (
        "c.yaml line 2: 'extends' goes in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml; "
        "take one of them out"
    )
    with pytest.raises(ConstitutionError, match=r"me\.yaml -> me\.yaml"):
        load("me.yaml")


# --- bad input -------------------------------------------------------------------------------------------

BAD = {
    "no revision request": (
        ONE.replace("    revision_request: fix\n", ""),
        "bad.yaml line 3: principle 'a' has no 'revision_request'; "
        "add the sentence that asks for the rewrite",
    ),
    "revision request left blank": (
        ONE.replace("fix", ""),
        "bad.yaml line 6: principle 'a' has no 'revision_request'; "
        "add the sentence that asks for the rewrite",
    ),
    "empty text": (
        ONE.replace("look", "' '"),
        "bad.yaml line 5: principle 'a' has an empty 'critique_request'; "
        "add the sentence that says what to look for",
    ),
    "key given twice": (
        ONE + "    aim: honest\n",
        "bad.yaml line 7: 'aim' is given twice, first on line 4; keep one",
    ),
    "empty file": ("# nothing\n", "bad.yaml: the file is empty; write 'name:' and 'principles:'"),
    "no principle": (
        "name: t\nprinciples: []\n",
        "bad.yaml line 2: there is no principle to judge by; add at least one",
    ),
    "principles left blank": (
        "name: t\nprinciples:\n",
        "bad.yaml line 2: the constitution: 'principles' is nothing; write a list, each item after '- '",
    ),
    "all principles removed": (
        "name: t\nextends: base.yaml\nremove: [a]\n",
        "bad.yaml line 1: there is no principle to judge by; add at least one",
    ),
    "unknown field of a principle": (
        ONE + "    critique_reqest: x\n",
        "bad.yaml line 7: principle 'a' has the unknown field 'critique_reqest'; "
        "did you mean 'critique_request'?",
    ),
    "unknown field of the constitution": (
        ONE + "refusall: x\n",
        "bad.yaml line 7: the constitution has the unknown field 'refusall'; did you mean 'refusal'?",
    ),
    "principle id twice": (
        ONE + ONE.partition("principles:\n")[2],
        "bad.yaml line 7: two principles have the id 'a'; rename one of them",
    ),
    "principle ids that differ by a hyphen alone": (
        ONE.replace("id: a", "id: a-b") + ONE.partition("principles:\n")[2].replace("id: a", "id: a_b"),
        "bad.yaml line 7: the ids 'a-b' and 'a_b' differ by - and _ alone; rename one of them",
    ),
    "id with capitals": (
        ONE.replace("id: a", "id: No Harm!"),
        "bad.yaml line 3: principle 'No Harm!': 'id' is 'No Harm!'; "
        "use small letters, digits and hyphens, at most 64 of them",
    ),
    "aim of two words": (
        ONE.replace("harmless", "be nice"),
        "bad.yaml line 4: principle 'a': 'aim' is 'be nice'; write one word, such as harmless",
    ),
    "weight of zero": (
        ONE + "    weight: 0\n",
        "bad.yaml line 7: principle 'a': 'weight' is '0'; input should be greater than 0",
    ),
    "weight in words": (
        ONE + "    weight: heavy\n",
        "bad.yaml line 7: principle 'a': 'weight' is 'heavy'; write a number",
    ),
    "infinite weight": (
        ONE + "    weight: inf\n",
        "bad.yaml line 7: principle 'a': 'weight' is 'inf'; write a finite number",
    ),
    "severity out of range": (
        ONE + "    min_severity: 9\n",
        "bad.yaml line 7: principle 'a': 'min_severity' is '9'; input should be less than or equal to 5",
    ),
    "language that is none": (
        ONE + "    translations:\n      german!: {critique_request: a, revision_request: b}\n",
        "bad.yaml line 8: principle 'a' has the language 'german!'; write a code such as de or pt-BR",
    ),
    "translation in part": (
        ONE + "    translations:\n      de: {critique_request: a}\n",
        "bad.yaml line 8: principle 'a' in 'de' has no 'revision_request'; "
        "add the sentence that asks for the rewrite",
    ),
    "verdict off the menu": (
        ONE + "examples:\n  - {prompt: a, draft: b, verdict: MAYBE, critique: d}\n",
        "bad.yaml line 8: example 1: 'verdict' is 'MAYBE'; input should be 'VIOLATES' or 'COMPLIES'",
    ),
    "violation that is not mended": (
        ONE + "examples:\n  - {prompt: a, draft: b, verdict: VIOLATES, critique: d}\n",
        "bad.yaml line 8: example 1: the draft VIOLATES but there is no 'revision'; add the answer rewritten",
    ),
    "example of an unknown principle": (
        ONE + "examples:\n  - {prompt: a, draft: b, verdict: COMPLIES, critique: d, principle: b}\n",
        "bad.yaml line 8: example 1 names the unknown principle 'b'; known are a",
    ),
    "principles as a mapping": (
        "name: t\nprinciples:\n  a: {aim: b}\n",
        "bad.yaml line 2: the constitution: 'principles' is a mapping; write a list, each item after '- '",
    ),
    "text where a constitution should be": (
        "hello\n",
        "bad.yaml: found 'hello' where a constitution should be; write 'name:' and 'principles:'",
    ),
    "unknown parent": (
        ONE + "extends: balancd\n",
        "bad.yaml line 7: extends 'balancd' is neither a built-in constitution nor a file; did you mean "
        "'balanced'? built in are balanced, company-policy, harmlessness, human-rights, technical-safety",
    ),
    "unknown parent in a list": (
        ONE + "extends:\n  - balanced\n  - nope.yaml\n",
        "bad.yaml line 9: extends 'nope.yaml' is neither a built-in constitution nor a file; "
        "built in are balanced, company-policy, harmlessness, human-rights, technical-safety",
    ),
    "removal of what no parent has": (
        ONE + "extends: balanced\nremove: [not-preechy]\n",
        "bad.yaml line 8: 'remove' names 'not-preechy', which no parent has; did you mean 'not-preachy'?",
    ),
    "alias": (
        "a: &a [x, x]\nb: &b [*a, *a]\n",
        "bad.yaml line 2: the YAML alias '*a' is refused; write out what it stands for",
    ),
    "tag that would run code": (
        "name: !!python/object/apply:os.system ['true']\n",
        "bad.yaml line 1: the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system' is refused; "
        "remove it",
    ),
    "two documents": (
        ONE + "---\n" + ONE,
        "bad.yaml line 7: not valid YAML: but found another document; "
        "check indentation, quotes and colons there",
    ),
    "broken indentation": (
        "name: t\nprinciples:\n  - id: a\n   aim: b\n",
        "bad.yaml line 4: not valid YAML: expected <block end>, but found '<block mapping start>'; "
        "check indentation, quotes and colons there",
    ),
    "control character": (
        "name: t\nx: \x00\n",
        "bad.yaml line 2: not valid YAML: special characters are not allowed; "
        "check indentation, quotes and colons there",
    ),
    "brackets without end": ("[" * 20_000, "bad.yaml: nested too deeply to be a constitution"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_file_is_told_by_file_line_and_field(folder: Path, text: str, sentence: str) -> None:
    write(folder, bad=text, base=ONE)
    with pytest.raises(ConstitutionError) as caught:
        load("bad.yaml")
    assert str(caught.value) == sentence


def test_all_errors_of_a_file_are_told_at_once_up_to_ten(folder: Path) -> None:
    write(folder, bad="name: t\nprinciples:\n" + "  - id: x\n" * 20)
    with pytest.raises(ConstitutionError) as caught:
        load("bad.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "bad.yaml: and 50 more"


def test_file_that_cannot_be_a_constitution_is_not_read(folder: Path) -> None:
    (folder / "big.yaml").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConstitutionError, match="larger than 1 MiB"):
        load("big.yaml")
    (folder / "latin.yaml").write_bytes("name: t\nx: café\n".encode("latin-1"))
    with pytest.raises(ConstitutionError, match=r"latin\.yaml line 2: not UTF-8"):
        load("latin.yaml")
    (folder / "sub").mkdir()
    with pytest.raises(ConstitutionError, match="'sub' is a folder; name a file in it"):
        load("sub")


@pytest.mark.parametrize("name", ["balancd", "nowhere.yaml", "", "\0"])
def test_unknown_name_lists_the_built_in_ones(folder: Path, name: str) -> None:
    built_in = "balanced, company-policy, harmlessness, human-rights, technical-safety"
    with pytest.raises(ConstitutionError, match=f"is neither a built-in .* built in are {built_in}"):
        load(name)


def test_home_of_nobody_is_a_sentence(folder: Path) -> None:
    with pytest.raises(ConstitutionError, match="is not a path"):
        load("~nobody-of-that-name/x.yaml")


def test_name_too_long_for_a_file_is_a_sentence(folder: Path) -> None:
    with pytest.raises(ConstitutionError, match="is not a path") as caught:
        load("x" * 5000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [3, None, 1.5, object()])
def test_what_is_no_constitution_is_refused(value: object) -> None:
    with pytest.raises(ConstitutionError, match="give a built-in name, a path"):
        load(value)


FILE_FIELDS = [
    "name",
    "extends",
    "remove",
    "principles",
    "examples",
    "refusal",
    "constitutions",
    "system_chat",
]
NAMES = st.sampled_from([*FILE_FIELDS, "critic", *Principle.model_fields, *Example.model_fields, "de", "x"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("balanced"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.integers(), inner, max_size=4)  # type: ignore[arg-type]
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(data=ANYTHING.filter(lambda value: isinstance(value, dict | list)))
def test_whatever_is_loaded_gives_a_constitution_or_a_sentence(data: Any) -> None:
    with contextlib.suppress(ConstitutionError):
        assert len(load(data)) > 0


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.binary(max_size=60) | st.text(alphabet="-:[]{}&*!|>'\"# \n\tabc", max_size=60).map(str.encode),
    suffix=st.sampled_from([".yaml", ".json", ".py", ".txt"]),
)
def test_whatever_a_file_holds_gives_a_sentence(raw: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes(raw)
    with pytest.raises(ConstitutionError, match="any"):
        load(path)


def test_broken_unicode_is_refused() -> None:
    with pytest.raises(ConstitutionError, match="take out the broken character"):
        load({"name": "t", "principles": [principle(critique_request="\ud800")]})


def test_scalars_are_text_whatever_yaml_would_make_of_them(folder: Path) -> None:
    write(
        folder,
        t=ONE.replace("name: t", "name: no\nversion: 1.10")
        + "    translations:\n      no: {critique_request: on, revision_request: 2026-11-23}\n",
    )
    loaded = load("t.yaml")
    assert (loaded.name, loaded.version) == ("no", "1.10")
    assert loaded["a"].texts("no").revision_request == "2026-11-23"


def test_byte_order_mark_is_no_error(folder: Path) -> None:
    (folder / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + ONE.encode())
    assert len(load("bom.yaml")) == 1


def test_json_errors_have_lines_too(folder: Path) -> None:
    (folder / "c.json").write_text(
        '{"name": "t",\n "principles": [\n  {"id": "a", "aim": "b",\n   "critique_request": "c"}]}'
    )
    with pytest.raises(ConstitutionError, match=r"c\.json line 3: principle 'a' has no 'revision_request'"):
        load("c.json")
    (folder / "c.json").write_text('{"name": "t",\n "principles": [,]}')
    with pytest.raises(ConstitutionError, match=r"c\.json line 2: not valid JSON"):
        load("c.json")
    (folder / "c.json").write_text('{"name": "t", "name": "u"}')
    with pytest.raises(ConstitutionError, match="'name' is given twice"):
        load("c.json")


# --- documentation ---------------------------------------------------------------------------------------


def test_page_on_writing_constitutions_runs(folder: Path) -> None:
    page = read_page("constitutions.md")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["yaml", "python", "yaml", "python"]
    write(folder, shop=blocks[0][1], desk=blocks[2][1])
    names: dict[str, Any] = {}
    for _, block in blocks[1::2]:
        exec(compile(block, "docs/constitutions.md", "exec"), names)
    shop, desk = names["shop"], names["desk"]
    assert lint(shop) == lint(desk) == []
    assert desk["no-promises"].texts("de").critique_request.startswith("Suche Zusagen")
    assert "says-how-sure" not in shop
