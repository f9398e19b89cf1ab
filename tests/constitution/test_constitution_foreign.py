"""The principle lists of others: LangChain's in Python, JSON and YAML, and pairs with worked examples."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from constitution_support import SHARED, principle

from cai_graph.constitution import load
from cai_graph.errors import ConstitutionError

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
