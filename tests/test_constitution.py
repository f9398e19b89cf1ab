from __future__ import annotations

import contextlib
import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cai_graph import constitution as module
from cai_graph.constitution import (
    Constitution,
    Difference,
    Example,
    Principle,
    Texts,
    builtin,
    diff,
    json_schema,
    lint,
    load,
    loading,
)
from cai_graph.constitution.loading import _builtin_folder
from cai_graph.constitution.principles import MAX_REQUEST_CHARS
from cai_graph.constitution.source import MAX_FILE_BYTES
from cai_graph.errors import ConstitutionError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "principles"  # not part of the repository; may be absent

# What each built-in constitution says to models. A new digest parts new logs from old ones, so a commit that
# changes one says why.
GOLDEN = {
    "balanced": "0113cc038ecd0d20702fd18cb04a41d9036a1c2f96d2882bcd54b58dd99aed83",
    "company-policy": "a09cf1a5d53dd55839e460b62b2f7b29566c4217300aa36fb3af8b1b083b78d6",
    "harmlessness": "2155e72da8243b32762f27e73f5097b11576e3a826867a431df1bb9d12109abd",
    "human-rights": "5ad619e962e07b76e42bfa6fe2b688de813c8b2682477f46f8d678cd76dde338",
    "technical-safety": "3a17b12ae553866010da765c6d4f96be2b16e5c40bc6ce7ccc840605a6b6a748",
}

ONE = """\
name: t
principles:
  - id: a
    aim: harmless
    critique_request: look
    revision_request: fix
"""


def principle(identifier: str = "a", **fields: Any) -> dict[str, Any]:
    return {
        "id": identifier,
        "aim": "harmless",
        "critique_request": f"look for {identifier}",
        "revision_request": f"take out {identifier}",
        "preference_question": f"which has less {identifier}?",
        **fields,
    }


def constitution(*principles: dict[str, Any], **fields: Any) -> Constitution:
    return load({"name": "t", "principles": list(principles or (principle(),)), **fields})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


# --- built in --------------------------------------------------------------------------------------------


def test_builtin_names_are_those_of_the_folder() -> None:
    assert builtin() == tuple(sorted(GOLDEN))


@pytest.mark.parametrize("name", GOLDEN)
def test_builtin_says_to_models_what_it_said_before(name: str) -> None:
    assert load(name).digest == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_builtin_is_clean_sourced_and_short(name: str) -> None:
    loaded = load(name)
    assert loaded.name == name
    assert lint(loaded) == []
    for p in loaded:
        assert p.source, p.id
        for text in (p.critique_request, p.revision_request, p.preference_question):
            assert len(text) <= MAX_REQUEST_CHARS
    assert {e.verdict for e in loaded.examples} == {"VIOLATES", "COMPLIES"}


@pytest.mark.parametrize("name", GOLDEN)
def test_builtin_file_begins_with_the_line_that_editors_read(name: str) -> None:
    first = (ROOT / "constitutions" / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    assert first == "# yaml-language-server: $schema=./schema.json"


def test_default_guards_against_harm_evasion_and_sermons() -> None:
    balanced = load("balanced")
    assert {p.aim for p in balanced} == {"harmless", "helpful", "honest"}
    assert "not-evasive" in balanced
    assert "not-preachy" in balanced
    assert len(load("harmlessness")) == 16


def test_no_sentence_is_copied_from_the_published_lists() -> None:
    if not SHARED.is_dir():
        pytest.skip("the published lists are not on this machine")
    published = [
        text
        for path in SHARED.rglob("*")
        if path.is_file()
        for p in load(path)
        for text in (p.critique_request, p.revision_request)
    ]
    runs = {run for text in published for run in _runs(text)}
    for name in builtin():
        for p in load(name):
            for text in (p.critique_request, p.revision_request):
                assert not runs & _runs(text), (name, p.id)


def _runs(text: str, words: int = 7) -> set[tuple[str, ...]]:
    split = text.lower().split()
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def test_schema_file_is_up_to_date() -> None:
    published = json.loads((ROOT / "constitutions" / "schema.json").read_text(encoding="utf-8"))
    assert published == json_schema(), "run: cai constitution schema > constitutions/schema.json"


def test_schema_knows_every_field_of_the_built_in_files() -> None:
    schema = json_schema()
    for name in GOLDEN:
        data = yaml.safe_load((ROOT / "constitutions" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert set(data) <= set(schema["properties"])
        for part, definition in (("principles", "Principle"), ("examples", "Example")):
            known = schema["$defs"][definition]
            for item in data.get(part, []):
                assert set(known["required"]) <= set(item) <= set(known["properties"])


def test_wheel_layout_finds_the_built_in_constitutions(tmp_path: Path) -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, tmp_path / package)
    for source, target in wheel["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / target)
    # A stranger's package of the same name as our data folder must not be taken for it.
    (tmp_path / "constitutions").mkdir()
    code = (
        "import cai_graph.constitution as c; print(c.__file__); print(*c.builtin());"
        "print(c.load('company-policy').digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    file, names, digest = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert tuple(names.split()) == builtin()
    assert digest == GOLDEN["company-policy"]


def test_missing_built_in_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConstitutionError, match="install cai-graph again"):
        _builtin_folder(tmp_path / "cai_graph")


# --- the records -----------------------------------------------------------------------------------------


def test_constitution_is_an_ordered_collection_of_principles() -> None:
    loaded = constitution(principle("b"), principle("a"))
    assert [p.id for p in loaded] == ["b", "a"]
    assert len(loaded) == 2
    assert loaded["a"].critique_request == "look for a"
    assert "b" in loaded
    assert "c" not in loaded


def test_records_are_immutable_and_hashable() -> None:
    loaded = constitution()
    with pytest.raises(ValidationError):
        loaded.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        loaded["a"].weight = 2  # type: ignore[misc]
    assert len({loaded, constitution(), constitution(principle("b"))}) == 2
    assert len({loaded["a"], constitution()["a"]}) == 1


def test_constitution_survives_pickle_copy_and_dump() -> None:
    loaded = load("company-policy")
    assert pickle.loads(pickle.dumps(loaded)) == loaded
    assert copy.deepcopy(loaded) == loaded
    again = load(json.loads(loaded.model_dump_json()))
    assert again.principles == loaded.principles
    assert again.digest == loaded.digest


def test_load_gives_a_constitution_back_as_it_is() -> None:
    loaded = constitution()
    assert load(loaded) is loaded


def test_unknown_principle_id_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ConstitutionError, match=r"'balanced' has no principle 'not-preechy'; did you mean 'not-preachy'"
    ):
        load("balanced")["not-preechy"]
    with pytest.raises(ConstitutionError, match="known are a, b"):
        constitution(principle("b"), principle("a")).select(["zzz"])
    with pytest.raises(ConstitutionError, match="no principle 'zzz'"):
        constitution().without(["zzz"])


def test_select_keeps_the_order_and_drops_the_examples_of_others() -> None:
    example = {"prompt": "p", "draft": "d", "verdict": "COMPLIES", "critique": "c"}
    full = constitution(
        principle("a"),
        principle("b"),
        principle("c"),
        examples=[{**example, "principle": "a"}, {**example, "principle": "b"}, example],
    )
    part = full.select(["c", "a", "a"])
    assert [p.id for p in part] == ["a", "c"]
    assert [e.principle for e in part.examples] == ["a", None]
    assert full.without(["b"]) == part
    assert part.digest != full.digest
    assert full.select(["a", "b", "c"]).digest == full.digest


def test_a_selection_of_nothing_is_an_error() -> None:
    with pytest.raises(ConstitutionError, match="name at least one"):
        constitution().select([])
    with pytest.raises(ConstitutionError, match="name at least one"):
        constitution().without(["a"])


def test_texts_fall_back_from_region_to_language_to_the_original() -> None:
    german = {"critique_request": "suche", "revision_request": "bessere", "preference_question": "welche?"}
    p = Principle.model_validate(principle(translations={"de": german}))
    assert p.texts("de") == p.texts("de-AT") == p.texts("DE") == p.texts("de_CH") == Texts(**german)
    assert p.texts("fr") == p.texts() == p.texts("deu")
    assert p.texts().critique_request == "look for a"


def test_refusal_is_given_in_the_language_asked_for() -> None:
    balanced = load("balanced")
    assert balanced.refusal_in("de").startswith("Dabei kann ich")
    assert balanced.refusal_in("sw") == balanced.refusal_in() == balanced.refusal


def test_preference_question_is_made_from_the_critique_request_where_absent() -> None:
    made = Principle(id="a", aim="harmless", critique_request="Look for lies.", revision_request="Fix.")
    assert made.preference_question == "Which answer stands up better to this check? Look for lies."
    assert [f.field for f in lint(load([made]))] == ["preference_question"]


def test_violating_example_needs_a_revision() -> None:
    Example(prompt="p", draft="d", verdict="COMPLIES", critique="c")
    with pytest.raises(ValidationError, match="there is no 'revision'"):
        Example(prompt="p", draft="d", verdict="VIOLATES", critique="c")


def test_extends_cannot_be_claimed_without_being_applied() -> None:
    with pytest.raises(ValidationError, match="applied by load"):
        Constitution.model_validate({"name": "t", "extends": ["balanced"], "principles": [principle()]})


# --- digest ----------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(str.strip)
SLUG = st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True)
TRANSLATIONS = st.dictionaries(
    st.sampled_from(["de", "no", "pt-BR"]),
    st.fixed_dictionaries({"critique_request": TEXT, "revision_request": TEXT, "preference_question": TEXT}),
    max_size=2,
)
PRINCIPLE = st.fixed_dictionaries(
    {
        "id": SLUG,
        "aim": st.sampled_from(["harmless", "helpful", "honest", "policy"]),
        "critique_request": TEXT,
        "revision_request": TEXT,
        "preference_question": TEXT,
        "weight": st.floats(0.01, 100),
        "source": TEXT,
        "translations": TRANSLATIONS,
    },
    optional={"min_severity": st.integers(1, 5), "tools": st.booleans()},
)
EXAMPLE = st.fixed_dictionaries(
    {
        "prompt": TEXT,
        "draft": TEXT,
        "verdict": st.sampled_from(["VIOLATES", "COMPLIES"]),
        "critique": TEXT,
        "revision": TEXT,
    }
)
CONSTITUTION = st.fixed_dictionaries(
    {
        "name": TEXT,
        "version": TEXT,
        "description": TEXT,
        "principles": st.lists(PRINCIPLE, min_size=1, max_size=4, unique_by=lambda p: p["id"]),
        "refusal": TEXT,
        "refusal_translations": st.dictionaries(st.sampled_from(["de", "no"]), TEXT, max_size=2),
        "examples": st.lists(EXAMPLE, max_size=2),
    }
)


def shuffled(value: Any, random: Any) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key], random) for key in keys}
    return [shuffled(item, random) for item in value] if isinstance(value, list) else value


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=CONSTITUTION,
    random=st.randoms(use_true_random=False),
    flow=st.booleans(),
    ascii_only=st.booleans(),
    width=st.integers(20, 200),
)
def test_digest_does_not_depend_on_key_order_or_formatting(
    data: dict[str, Any], random: Any, flow: bool, ascii_only: bool, width: int, tmp_path: Path
) -> None:
    expected = load(data)
    written = tmp_path / "c.yaml"
    text = yaml.safe_dump(
        shuffled(data, random),
        default_flow_style=flow,
        allow_unicode=not ascii_only,
        width=width,
        sort_keys=False,
    )
    written.write_bytes(text.encode())
    assert load(written) == expected
    assert load(written).digest == expected.digest
    written = tmp_path / "c.json"
    written.write_text(json.dumps(shuffled(data, random)))
    assert load(written).digest == expected.digest


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the path of every text in a constitution as it is written down."""
    if isinstance(value, dict):
        return [p for key, item in value.items() for p in places(item, (*path, key))]
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in places(item, (*path, i))]
    return [path] if isinstance(value, str) else []


@settings(max_examples=100, deadline=None)
@given(data=CONSTITUTION, choice=st.randoms(use_true_random=False))
def test_digest_changes_with_any_text_that_is_sent_and_with_no_other(
    data: dict[str, Any], choice: Any
) -> None:
    path = choice.choice(places(data))
    changed = copy.deepcopy(data)
    parent: Any = changed
    for part in path[:-1]:
        parent = parent[part]
    if path[-1] == "verdict":
        parent["verdict"] = "COMPLIES" if parent["verdict"] == "VIOLATES" else "VIOLATES"
    elif path[-1] == "aim":
        parent["aim"] = "other"
    else:
        parent[path[-1]] += "x" * 8  # longer than any generated id, so that no two become one
    silent = path[-1] in ("name", "version", "description", "source")
    assert (load(changed).digest == load(data).digest) is silent


def test_digest_changes_with_order_weight_and_threshold() -> None:
    base = constitution(principle("a"), principle("b"))
    others = [
        constitution(principle("b"), principle("a")),
        constitution(principle("a", weight=2), principle("b")),
        constitution(principle("a", min_severity=2), principle("b")),
    ]
    assert len({c.digest for c in (base, *others)}) == 4


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


@pytest.mark.parametrize("name", ["balancd", "nowhere.yaml", "", "\0", "~nobody-of-that-name/x.yaml"])
def test_unknown_name_lists_the_built_in_ones(folder: Path, name: str) -> None:
    with pytest.raises(ConstitutionError, match=r"is neither a built-in|is not a path"):
        load(name)


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


@settings(max_examples=300, deadline=None)
@given(data=ANYTHING.filter(lambda value: isinstance(value, dict | list)))
def test_whatever_is_loaded_gives_a_constitution_or_a_sentence(data: Any) -> None:
    with contextlib.suppress(ConstitutionError):
        assert len(load(data)) > 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# --- foreign formats -------------------------------------------------------------------------------------

LANGCHAIN = '''
"""Principles in LangChain's form; importing this file would fail, which shows that it is not run."""
import no_such_module
from langchain_classic.chains.constitutional_ai.models import ConstitutionalPrinciple

raise SystemExit(no_such_module)
PRINCIPLES: dict[str, ConstitutionalPrinciple] = {
    "illegal": ConstitutionalPrinciple(
        name="illegal",
        critique_request="Is any of this "
        "against the law?",
        revision_request="Make it lawful.",
    ),
    "Kind One": models.ConstitutionalPrinciple(
        name="Kind One", critique_request="Is it kind?", revision_request="Make it kind."
    ),
    "unnamed": ConstitutionalPrinciple(critique_request="Is it short?", revision_request="Shorten it."),
}
'''

PAIRS = {
    "constitutions": [
        {"critic": "Is it rude?", "revision": "Make it polite."},
        {"critic": "Is it true?", "revision": "Make it true."},
    ],
    "system_chat": [
        [
            {"role": "user", "content": "Say hello."},
            {"role": "assistant", "content": "Get lost."},
            {"role": "user", "content": "Is it rude?"},
            {"role": "assistant", "content": "Yes, very."},
            {"role": "user", "content": "Make it polite."},
            {"role": "assistant", "content": "Hello and welcome!"},
        ],
        [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "2 + 2 is 4, in every base above four."},
            {"role": "user", "content": "Anything wrong?"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Make it true."},
            {"role": "assistant", "content": "2 + 2 is 4, in every base above four."},
        ],
    ],
}


def test_langchain_source_is_parsed_and_never_run(folder: Path) -> None:
    for name in ("principles.py", "principles.py.txt"):
        (folder / name).write_text(LANGCHAIN)
        loaded = load(name)
        assert loaded.name == "principles"
        assert [p.id for p in loaded] == ["illegal", "kind-one", "principle-03"]
        assert loaded["illegal"].critique_request == "Is any of this against the law?"
        assert {p.aim for p in loaded} == {"general"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import os\n", "p.py: no ConstitutionalPrinciple(...) in this Python file"),
        ("def (\n", "p.py line 1: not valid Python: invalid syntax"),
        (
            "ConstitutionalPrinciple(\n  critique_request='a',\n  revision_request=text())",
            "p.py line 3: 'revision_request' is computed; the file is not run, so write the text itself",
        ),
        (
            "\nConstitutionalPrinciple(name='x', critique_request='a')",
            "p.py line 2: principle 'x' has no 'revision_request'; "
            "add the sentence that asks for the rewrite",
        ),
    ],
)
def test_bad_langchain_source_is_told_by_line(folder: Path, source: str, sentence: str) -> None:
    (folder / "p.py").write_text(source)
    with pytest.raises(ConstitutionError) as caught:
        load("p.py")
    assert str(caught.value) == sentence


def test_lists_of_langchain_fields_are_read_from_json_yaml_and_memory(folder: Path) -> None:
    items = [
        {"name": "illegal", "critique_request": "Lawful?", "revision_request": "Make it lawful."},
        {"name": "illegal", "critique_request": "Safe?", "revision_request": "Make it safe."},
    ]
    (folder / "l.json").write_text(json.dumps(items))
    (folder / "l.yaml").write_text(yaml.safe_dump(items))
    loaded = [load("l.json"), load("l.yaml"), load(items), load([SimpleNamespace(**item) for item in items])]
    assert {c.digest for c in loaded} == {loaded[0].digest}
    assert [p.id for p in loaded[0]] == ["illegal", "illegal-2"]


def test_list_of_own_principles_keeps_their_aims() -> None:
    balanced = load("balanced")
    assert load([balanced["not-evasive"], balanced["no-demeaning"]]).principles == (
        balanced["not-evasive"],
        balanced["no-demeaning"],
    )


def test_own_id_given_twice_in_a_list_is_an_error() -> None:
    with pytest.raises(ConstitutionError, match="two principles have the id 'a'; rename"):
        load([principle("a"), principle("a")])


def test_critic_revision_pairs_bring_their_worked_examples(folder: Path) -> None:
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    loaded = load("pairs.json")
    assert loaded.name == "pairs"
    assert [(p.id, p.critique_request, p.revision_request) for p in loaded] == [
        ("principle-01", "Is it rude?", "Make it polite."),
        ("principle-02", "Is it true?", "Make it true."),
    ]
    assert [(e.verdict, e.principle, e.draft) for e in loaded.examples] == [
        ("VIOLATES", "principle-01", "Get lost."),
        ("COMPLIES", None, "2 + 2 is 4, in every base above four."),
    ]
    assert load(PAIRS).digest == loaded.digest


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"constitutions": 3}, "'constitutions' holds 3; it should be a list of {critic, revision}"),
        ({"constitutions": [{"critic": "a"}]}, "principle 'principle-01' has no 'revision_request'"),
        ({"constitutions": ["a"]}, "principle 1 is 'a'; write its fields"),
        ({**PAIRS, "system_chat": [[{"role": "user", "content": "x"}]]}, "conversation 1 of 'system_chat'"),
        ({**PAIRS, "system_chat": 3}, "conversation 1 of 'system_chat'"),
    ],
)
def test_bad_pairs_are_told(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConstitutionError) as caught:
        load(data)
    assert sentence in str(caught.value)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published lists are not on this machine")
def test_published_lists_come_through_whole(tmp_path: Path) -> None:
    pairs = SHARED / "llm_swarm" / "constitution_anthropic.json"
    original = json.loads(pairs.read_text(encoding="utf-8"))
    loaded = load(pairs)
    assert [(p.critique_request, p.revision_request) for p in loaded] == [
        (item["critic"], item["revision"]) for item in original["constitutions"]
    ]
    assert [e.verdict for e in loaded.examples] == ["VIOLATES"] * 3 + ["COMPLIES"]
    assert all(e.principle for e in loaded.examples)

    python = SHARED / "langchain_classic" / "principles.py.txt"
    chain = load(python)
    assert len(chain) == python.read_text(encoding="utf-8").count("_request=") / 2
    assert [p.id for p in chain][:2] == ["harmful1", "harmful2"]

    for constitution_ in (loaded, chain):
        written = tmp_path / "again.yaml"
        written.write_text(yaml.safe_dump(constitution_.model_dump(mode="json"), allow_unicode=True))
        assert load(written) == constitution_


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


def test_every_public_name_is_there() -> None:
    assert sorted(module.__all__) == module.__all__
    assert all(hasattr(module, name) for name in module.__all__)


# --- documentation ---------------------------------------------------------------------------------------


def test_page_on_writing_constitutions_runs(folder: Path) -> None:
    page = (ROOT / "docs" / "constitutions.md").read_text(encoding="utf-8")
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
