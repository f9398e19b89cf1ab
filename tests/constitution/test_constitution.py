"""What a constitution is: the built-in ones, the records, and the digest."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from constitution_support import ROOT, SHARED, constitution, principle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cai_graph import constitution as module
from cai_graph.constitution import Constitution, Example, Principle, Texts, builtin, lint, load
from cai_graph.constitution.loading import _builtin_folder
from cai_graph.constitution.principles import MAX_REQUEST_CHARS
from cai_graph.errors import ConstitutionError

# What each built-in constitution says to models. A new digest parts new logs from old ones, so a commit that
# changes one says why.
GOLDEN = {
    "balanced": "0113cc038ecd0d20702fd18cb04a41d9036a1c2f96d2882bcd54b58dd99aed83",
    "company-policy": "a09cf1a5d53dd55839e460b62b2f7b29566c4217300aa36fb3af8b1b083b78d6",
    "harmlessness": "2155e72da8243b32762f27e73f5097b11576e3a826867a431df1bb9d12109abd",
    "human-rights": "5ad619e962e07b76e42bfa6fe2b688de813c8b2682477f46f8d678cd76dde338",
    "technical-safety": "3a17b12ae553866010da765c6d4f96be2b16e5c40bc6ce7ccc840605a6b6a748",
}

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


def test_a_copy_with_other_fields_has_its_own_digest_and_principles() -> None:
    first = constitution(principle("a"), principle("b"))
    digest = first.digest

    fewer = first.model_copy(update={"principles": (first["b"],)})
    firmer = first.model_copy(update={"refusal": "No."})

    assert ([p.id for p in fewer], "a" in fewer) == (["b"], False)
    assert fewer == first.select(["b"])
    assert fewer.digest == first.select(["b"]).digest
    assert len({digest, fewer.digest, firmer.digest}) == 3
    assert load("balanced").model_copy() == load("balanced")
    assert first.model_copy() == first.model_copy(deep=True) == first


@pytest.mark.parametrize(
    ("record", "update"),
    [
        (constitution(), {"principles": ()}),
        (constitution(), {"refusall": "No."}),
        (constitution()["a"], {"id": "Not An Id"}),
    ],
)
def test_a_copy_is_checked_as_the_first_was(record: Constitution | Principle, update: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        record.model_copy(update=update)


def test_translations_stay_what_the_digest_was_taken_of() -> None:
    german = {"critique_request": "a", "revision_request": "b", "preference_question": "c"}
    made = constitution(principle(translations={"de": german}), refusal_translations={"de": "Nein."})
    plain = constitution()

    for texts in (made.refusal_translations, plain.refusal_translations, plain["a"].translations):
        for change in (
            lambda: texts.__setitem__("de", "x"),  # noqa: B023
            lambda: texts.update(de="x"),  # noqa: B023
            lambda: texts.setdefault("fr", "x"),  # noqa: B023
        ):
            with pytest.raises(TypeError, match="immutable"):
                change()
    with pytest.raises(TypeError, match="immutable"):
        made["a"].translations.pop("de")
    for same in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), copy.copy(made)):
        assert same == made
        assert same.digest == made.digest
        assert same.refusal_translations == {"de": "Nein."}
    assert json.loads(made.model_dump_json())["refusal_translations"] == {"de": "Nein."}
    assert load(made.model_dump()) == made


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


def test_every_public_name_is_there() -> None:
    assert sorted(module.__all__) == module.__all__
    assert all(hasattr(module, name) for name in module.__all__)


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


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=100)
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
