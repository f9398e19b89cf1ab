"""What is left out of a dataset, and on which side the rest stands; bad input; every reason of the ledger."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from log_support import feedback, review
from test_dataset import COMPLIES, VIOLATES, bytes_of, kept, revised, rows_of, says, unjudged, write

from cai_graph import open_log
from cai_graph.constitution import load
from cai_graph.errors import ConfigError, DataError
from cai_graph.trajectory import (
    ConstitutionRef,
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Record,
    Revision,
    Round,
    ToolCall,
    Verdict,
    encode,
)
from trainers.dataset import Recipe, build, spool
from trainers.dataset.near import PromptFile, clusters, fingerprints
from trainers.dataset.privacy import personal
from trainers.dataset.split import key_of, normalise
from trainers.ledger import Reason

LONG = "How do I get the red wine stain out of my grandmother's white table cloth before the guests arrive"


def asks(text: str) -> tuple[Message, ...]:
    return (says(text, "user"),)


def dropped(tmp_path: Path, records: list[Record], kind: Any = "preference", **recipe: Any) -> dict[Any, int]:
    """Return why the trajectories were dropped; one more of them always gives a row."""
    log = write(tmp_path / "log.jsonl", [*records, revised(99)])
    return build([log], tmp_path / "out", Recipe(kind=kind, **recipe)).ledger.dropped


# --- every reason -------------------------------------------------------------------------------------

UNREADABLE = Critique(verdicts=(Verdict(label=Label.UNREADABLE, principle="no-harm"),))
TWICE: list[Record] = [revised(), revised()]


def by_user(*ids: str) -> list[Record]:
    return [revised(number, metadata={"user": id}) for number, id in enumerate(ids)]


def after(verdict: Critique) -> tuple[Round, ...]:
    return (
        Round(critique=VIOLATES, revisions=(Revision(answer=says("r"), critique=verdict, accepted=True),)),
    )


def about(decision: str, **changes: Any) -> list[Record]:
    record = revised(**changes)
    return [record, review(record.id, decision=decision)]


def disliked() -> list[Record]:
    record = kept()
    return [record, feedback(record.id, score=-1.0)]


CASES: dict[Reason, tuple[str, Callable[[], list[Record]], dict[str, Any]]] = {
    Reason.BROKEN_TEXT: ("preference", lambda: [revised(messages=asks("\ud800"))], {}),
    Reason.WITHHELD: ("preference", lambda: [revised(metadata={"redaction": "failed"})], {}),
    Reason.NOT_TEXT: (
        "prompts",
        lambda: [revised(messages=(Message(role="user", content=[{"type": "image"}]),))],
        {},
    ),
    Reason.UNKNOWN_ROLE: ("prompts", lambda: [revised(messages=(*asks("a"), says("b", "critic")))], {}),
    Reason.NO_PROMPT: ("prompts", lambda: [revised(messages=(says("be kind", "system"),))], {}),
    Reason.NO_ANSWER: ("sft", lambda: [revised(draft=None, outcome=Outcome.FAILED)], {}),
    Reason.EMPTY: ("preference", lambda: [revised(draft=Draft(answer=says(" \n")))], {}),
    Reason.TRUNCATED: ("sft", lambda: [kept(draft=Draft(answer=says("cut o"), truncated=True))], {}),
    Reason.UNJUDGED: ("preference", lambda: [unjudged()], {}),
    Reason.UNREADABLE_VERDICT: ("sft", lambda: [revised(rounds=after(UNREADABLE))], {}),
    Reason.NOT_ACCEPTED: ("sft", lambda: [revised(outcome=Outcome.EXHAUSTED)], {}),
    Reason.REVIEWED_OUT: ("sft", lambda: about("reject"), {}),
    Reason.DISLIKED: ("sft", disliked, {}),
    Reason.NO_PAIR: ("preference", lambda: [kept()], {}),
    Reason.NO_CRITIQUE: ("privileged", lambda: [kept()], {}),
    Reason.UNKNOWN_PRINCIPLE: ("critique-sft", lambda: [revised()], {}),
    Reason.IDENTICAL: ("preference", lambda: [revised(draft=Draft(answer=says("revised  0")))], {}),
    Reason.TIE: ("preference", lambda: about("tie"), {}),
    Reason.DISAGREEMENT: ("preference", lambda: about("flip"), {}),
    Reason.HELD_OUT: ("preference", lambda: [revised(messages=asks("in THE  test"))], {"held_out": True}),
    Reason.PII: ("preference", lambda: [revised(messages=asks("mail jo@corp.de"))], {}),
    Reason.OVER_LENGTH: ("preference", lambda: [revised(messages=asks("word " * 99))], {"tokenizer": True}),
    Reason.NOT_IN_FORMAT: (
        "preference",
        lambda: [revised(messages=(*asks("a"), *asks("b")))],
        {"tokenizer": True},
    ),
    Reason.DUPLICATE: ("preference", lambda: TWICE[:], {}),
    Reason.USER_CAP: ("preference", lambda: by_user("ann", "ann", "bob"), {"per_user": 1}),
    Reason.TENANT_CAP: (
        "preference",
        lambda: [revised(n, metadata={"tenant": "t"}) for n in range(2)],
        {"per_tenant": 1},
    ),
    Reason.NEAR_DUPLICATE: (
        "preference",
        lambda: [revised(n, messages=asks(f"{LONG} {end}")) for n, end in enumerate(["?", "!"])],
        {"per_cluster": 1},
    ),
    Reason.MIX: ("sft", lambda: [kept(1), kept(2)], {"kept_per_revised": 1}),
    Reason.REMOVED: ("preference", lambda: by_user("ann"), {"without_users": ("ann",)}),
}
"""A log in which each reason occurs once, by reason; those of `unreadable_record` are below."""


def test_there_is_a_case_of_every_reason() -> None:
    assert {*CASES, Reason.UNREADABLE_RECORD} == set(Reason)


@pytest.mark.parametrize("reason", list(CASES))
def test_every_reason_is_found_and_counted_once(tmp_path: Path, reason: Reason, tokenizer: Path) -> None:
    kind, records, recipe = CASES[reason]
    if "held_out" in recipe:
        (tmp_path / "set.txt").write_text("In the test\n")
        recipe = {"held_out": (str(tmp_path / "set.txt"),)}
    if "tokenizer" in recipe:
        recipe = {"tokenizer": str(tokenizer), "max_tokens": 60}
    made = records()
    if reason is Reason.DISAGREEMENT:
        made.append(review(made[0].id, reviewer="bob"))
    other = demonstration() if kind in ("critique-sft", "privileged") else revised(99)
    log = write(tmp_path / "log.jsonl", [*made, other])

    ledger = build([log], tmp_path / "out", Recipe(kind=kind, **recipe)).ledger  # type: ignore[arg-type]

    assert ledger.dropped == {reason: 1}


def demonstration() -> Record:
    critique = Critique(verdicts=VIOLATES.verdicts, reasoning="It needs care.", critic="human")
    revision = Revision(answer=says("with care"), accepted=True)
    return revised(99, mode="imported", rounds=(Round(critique=critique, revisions=(revision,)),))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that splits at whitespace, with a chat template that wants the roles to alternate."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    fast.chat_template = (
        "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b'{"record":"trajectory","id":"a"}',
        encode(revised()).replace(b'"schema":1}', b'"schema":99}'),
        encode(revised())[:-40],
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
    ids=["no-json", "fields-missing", "newer-schema", "cut-off", "binary", "deeply-nested"],
)
def test_a_line_that_cannot_be_read_is_counted_and_the_rest_is_built(tmp_path: Path, line: bytes) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(encode(revised(1)) + b"\n\n" + line + b"\n" + encode(revised(2)) + b"\r\n" + line)

    ledger = build([str(log)], tmp_path / "out", Recipe(kind="preference")).ledger

    assert (ledger.read, ledger.dropped) == (4, {Reason.UNREADABLE_RECORD: 2})
    assert ledger.rows == 2


def test_ten_megabytes_of_text_and_lone_surrogates_elsewhere_make_a_row(tmp_path: Path) -> None:
    vast = "vast " * 2_000_000
    record = revised(draft=Draft(answer=says(vast)), metadata={"user": "\ud800"}, tags=("\udfff",))
    log = write(tmp_path / "log.jsonl", [record])

    build([log], tmp_path / "out", Recipe(kind="preference", per_user=1))

    (row,) = rows_of(tmp_path / "out", "preference")
    assert row.rejected[0].content == vast  # type: ignore[union-attr]


def test_an_absent_file_and_a_file_that_is_no_log_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: cannot be read: No such file"):
        build([str(tmp_path / "nothing.jsonl")], tmp_path / "out", Recipe(kind="sft"))
    with pytest.raises(ConfigError, match="no log is named so"):
        build([str(tmp_path / "log.csv")], tmp_path / "out", Recipe(kind="sft"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "chat"},
        {"test_share": 1.0},
        {"near_duplicates": 1.5},
        {"near_duplicates": None, "per_cluster": 3},
        {"per_user": 0},
        {"tokenizer": "x"},
        {"max_tokens": 8},
        {"kept_per_revised": 1.0},
        {"personal_data": "maybe"},
    ],
)
def test_a_recipe_that_cannot_work_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Recipe(**{"kind": "preference"} | fields)


def test_a_tokenizer_without_a_chat_template_is_named_before_anything_is_read(
    tmp_path: Path, tokenizer: Path
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in tokenizer.iterdir():
        if file.name != "chat_template.jinja":
            (plain / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match="has no chat template"):
        build(["absent.jsonl"], tmp_path / "out", Recipe(kind="sft", tokenizer=str(plain), max_tokens=9))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build(["absent.jsonl"], tmp_path / "out", Recipe(kind="sft", tokenizer=str(tmp_path), max_tokens=9))


# --- workers and stores -------------------------------------------------------------------------------


def test_workers_the_kind_of_log_and_memory_do_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Record] = [
        make(n % 50, metadata={"user": f"user {n % 7}"}, messages=asks(f"{LONG} {n % 40}"))
        for n in range(150)
        for make in (revised, kept)
    ]
    records.append(review(records[0].id, decision="flip"))
    file = write(tmp_path / "log.jsonl", records)
    with open_log(tmp_path / "cai.db") as log:
        for future in [log.append(record) for record in records]:
            future.result()
    recipe = Recipe(kind="sft", per_user=30, kept_per_revised=0.5, per_cluster=150, test_share=0.4)

    one = build([file], tmp_path / "one", recipe)
    three = build([file], tmp_path / "three", recipe, workers=3)
    stored = build([str(tmp_path / "cai.db")], tmp_path / "stored", recipe, workers=2)
    monkeypatch.setattr(spool, "_PORTION_BYTES", 500)  # so that most spools are read in several portions
    little = build([file], tmp_path / "little", recipe)

    assert one.ledger == three.ledger == stored.ledger == little.ledger
    assert bytes_of(one.path) == bytes_of(three.path) == bytes_of(stored.path) == bytes_of(little.path)
    caps = {Reason.DUPLICATE, Reason.USER_CAP, Reason.NEAR_DUPLICATE, Reason.MIX}
    assert one.ledger.dropped_rows.keys() == caps


def test_evidence_that_the_end_of_a_file_does_not_show_is_used(tmp_path: Path) -> None:
    record = revised(draft=Draft(answer=says("draft")))
    padding: list[Record] = [revised(n, messages=asks("x" * 50_000)) for n in range(1, 9)]
    log = write(tmp_path / "log.jsonl", [record, review(record.id, decision="flip"), *padding])

    build([log], tmp_path / "out", Recipe(kind="preference"))

    (row,) = [row for row in rows_of(tmp_path / "out", "preference") if row.source == "human"]
    assert row.chosen[0].content == "draft"  # type: ignore[union-attr]


def test_what_was_said_of_a_trajectory_that_is_gone_is_counted(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [revised(), review("gone"), feedback("gone"), feedback("gone too")])

    assert build([log], tmp_path / "out", Recipe(kind="preference")).ledger.orphans == 2


# --- near duplicates ----------------------------------------------------------------------------------


def test_near_duplicates_stand_on_one_side(tmp_path: Path) -> None:
    records: list[Record] = [revised(n, messages=asks(f"{LONG} {n}?")) for n in range(40)]
    records += [
        revised(n, messages=asks(f"{n}: {chr(97 + n % 26) * 9} something else {n * n}")) for n in range(40)
    ]
    log = write(tmp_path / "log.jsonl", records)

    build([log], tmp_path / "near", Recipe(kind="preference", test_share=0.5))
    build([log], tmp_path / "far", Recipe(kind="preference", test_share=0.5, near_duplicates=None))

    def sides(name: str, similar: bool) -> set[str]:
        rows = rows_of(tmp_path / name, "preference")
        return {row.split for row in rows if row.prompt[0].content.startswith(LONG) == similar}

    assert len(sides("near", True)) == 1
    assert sides("near", False) == sides("far", True) == {"train", "test"}


def test_near_duplicates_stand_on_one_side_in_every_kind_whatever_a_recipe_leaves_out(tmp_path: Path) -> None:
    subjects = [hashlib.sha512(bytes([n])).hexdigest() for n in range(40)]
    records: list[Record] = [
        make(n, messages=asks(f"{subject} {variant}"))
        for n, subject in enumerate(subjects)
        for variant, make in enumerate((revised, kept))
    ]
    log = write(tmp_path / "log.jsonl", records)
    held_out = tmp_path / "held.txt"
    held_out.write_text("\n".join(f"{subject} 0" for subject in subjects[:20]))

    recipes = {
        "pairs": Recipe(kind="preference", test_share=0.5),
        "answers": Recipe(kind="sft", test_share=0.5),
        "prompts": Recipe(kind="prompts", test_share=0.5),
        "some prompts": Recipe(kind="prompts", test_share=0.5, held_out=(str(held_out),)),
    }
    sides: dict[str, set[str]] = {}
    for name, recipe in recipes.items():
        build([log], tmp_path / name, recipe)
        for row in rows_of(tmp_path / name, recipe.kind):
            sides.setdefault(row.prompt[-1].content.split(" ")[0], set()).add(row.split)

    assert len(sides) == 40
    assert {len(found) for found in sides.values()} == {1}
    assert set.union(*sides.values()) == {"train", "test"}


def test_prompts_that_differ_by_white_space_alone_make_the_same_clusters_in_any_order(tmp_path: Path) -> None:
    text = (
        "今天天气很好我们想去公园散步然后再去图书馆看书晚上一起做饭请帮我写一份详细的计划并列出需要准备的东西"
    )
    records = [
        kept(n, messages=asks(one)) for n, one in enumerate((text, " ".join(text), text[:-2] + "物品"))
    ]

    for name, order in (("one", (0, 1, 2)), ("other", (1, 0, 2))):
        log = write(tmp_path / f"{name}.jsonl", [records[n] for n in order])
        build([log], tmp_path / name, Recipe(kind="prompts", per_cluster=1))

    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "other")
    assert len(rows_of(tmp_path / "one", "prompts")) == 1


def test_similarity_is_that_of_the_texts(tmp_path: Path) -> None:
    """The estimate is within four standard deviations of the Jaccard similarity of the 5-grams."""
    texts = [
        normalise(LONG),
        normalise(LONG.replace("red wine", "beetroot")),
        "ü" * 30,
        "",
        "日本語で書いてください",
    ]
    file = PromptFile(tmp_path / "prompts")
    for text in texts:
        file.add(key_of(text), text)
    file.close()

    keys, prints = fingerprints(file.path)

    assert keys == b"".join(map(key_of, texts))
    read = ["".join(text.split()) for text in texts]
    grams = [{(text + " " * 5)[i : i + 5] for i in range(len(text) + 1)} for text in read]
    for a in range(len(texts)):
        for b in range(len(texts)):
            exact = len(grams[a] & grams[b]) / len(grams[a] | grams[b])
            assert abs((prints[a] == prints[b]).mean() - exact) < 0.18, (a, b)
    assert clusters([(keys, prints)], 0.99) == {}
    assert len(clusters([(keys, prints)], 0.5)) == 1


# --- evaluation sets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["set.jsonl", "set.json", "set.csv", "set.txt", "set.jsonl.gz", "set.parquet"]
)
def test_no_prompt_of_an_evaluation_set_is_in_a_dataset(tmp_path: Path, name: str) -> None:
    rows = [{"question": "Is this in it?"}, {"question": LONG}]
    text = {
        "json": json.dumps(rows),
        "csv": f'question\nIs this in it?\n"{LONG}"\n',
        "txt": f"Is this in it?\n{LONG}\n",
    }.get(name.rpartition(".")[2], "\n".join(map(json.dumps, rows)))
    path = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    records: list[Record] = [
        revised(1, messages=asks("is THIS\nin it?")),
        revised(2, messages=asks(f"A question. {LONG}? Please answer.")),
        revised(3, messages=(*asks("hello"), says("hi"), *asks("Is this in it?"))),
        revised(4, messages=asks("Is this in it, too?")),
    ]

    assert dropped(tmp_path, records, held_out=(str(path),)) == {Reason.HELD_OUT: 3}


def test_an_evaluation_set_without_prompts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"answer": "42"}\n')

    with pytest.raises(DataError, match="holds no prompt; its column is one of prompt, question"):
        dropped(tmp_path, [], held_out=(str(tmp_path / "set.jsonl"),))
    with pytest.raises(DataError, match="cannot be read"):
        dropped(tmp_path, [], held_out=(str(tmp_path / "absent.jsonl"),))


# --- personal data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("write to jo.doe+x@mail.corp.co.uk now", "email address"),
        ("call +49 30 901820 please", "phone number"),
        ("call (415) 555-2671", "phone number"),
        ("4111 1111 1111 1111", "card number"),
        ("DE89 3704 0044 0532 0130 00", "bank account"),
        ("078-05-1120", "social security number"),
        ("key sk-proj-abcdefghijklmnopqrstuvwx", "secret"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret"),
        ("jo@example.com or jo@mail.example.org", None),
        ("between 1914-1918 and 1939-1945", None),
        ("4111 1111 1111 1112", None),
        ("pi is 3.14159265358979, e is 2.718281828", None),
        ("on 2024-11-05 at 12:30:45", None),
        ("ISBN 978-3-16-148410-0", None),
        ("@everyone, see §4", None),
    ],
)
def test_personal_data_is_known_by_its_form(text: str, form: str | None) -> None:
    assert personal(text.encode()) == form


@pytest.mark.parametrize("before", ["\n", "\t", "\r\n", '"', "\\", "\x1f"])
@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("jo.doe@corp.co.uk", "email address"),
        ("jo@example.com", None),
        ("555-123-4567", "phone number"),
        ("+49 30 901820", "phone number"),
        ("4111 1111 1111 1111", "card number"),
        ("DE89370400440532013000", "bank account"),
        ("078-05-1120", "social security number"),
        ("sk-abcdefghijklmnopqrstuvwx123", "secret"),
        ("AKIAIOSFODNN7EXAMPLE", "secret"),
        ("ghp_" + "a1" * 18, "secret"),
    ],
)
def test_personal_data_is_known_at_the_start_of_a_line_of_json(
    before: str, text: str, form: str | None
) -> None:
    assert personal(json.dumps({"content": f"mine{before}{text}{before}BERLIN"}).encode()) == form


def test_ids_and_digests_of_a_row_are_no_personal_data(tmp_path: Path) -> None:
    record = revised(id="4111-1111-1111-1111", messages=asks("mail jo@corp.de"))
    log = write(tmp_path / "log.jsonl", [record, revised(1, id="+49 30 901820")])

    assert build([log], tmp_path / "out", Recipe(kind="prompts")).ledger.rows == 1
    assert build([log], tmp_path / "all", Recipe(kind="prompts", personal_data="keep")).ledger.rows == 2


def test_an_answer_that_was_cut_off_is_never_a_desirable_one(tmp_path: Path) -> None:
    cut = Draft(answer=says("cut o"), truncated=True)
    log = write(tmp_path / "log.jsonl", [kept(1, draft=cut), kept(2), revised(3, draft=cut)])

    ledger = build([log], tmp_path / "out", Recipe(kind="unpaired", test_share=0.0)).ledger

    rows = rows_of(tmp_path / "out", "unpaired")
    assert {(row.completion[0].content, row.label) for row in rows} == {  # type: ignore[union-attr]
        ("draft 2", True),
        ("cut o", False),
        ("revised 3", True),
    }
    assert ledger.dropped == {Reason.TRUNCATED: 1}


# --- critiques ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [(), (Verdict(label=Label.VIOLATES, aim="harmless", probability=0.9),)])
def test_a_critique_is_asked_for_in_the_words_of_its_principle(
    tmp_path: Path, read: tuple[Verdict, ...]
) -> None:
    balanced = load("balanced")
    principle = balanced.principles[0]
    named = Verdict(label=Label.VIOLATES, principle=principle.id, reason="It does harm.")
    failed = Critique(verdicts=(*read, named), critic="c")
    revision = Revision(answer=says("mended"), critique=COMPLIES, accepted=True)
    record = revised(
        constitution=ConstitutionRef(name="balanced", version="1", digest=balanced.digest),
        rounds=(Round(critique=failed, revisions=(revision,)),),
    )

    build([write(tmp_path / "log.jsonl", [record])], tmp_path / "out", Recipe(kind="critique-sft"))

    found = {row.step: row for row in rows_of(tmp_path / "out", "critique-sft")}  # type: ignore[union-attr]
    first, second = found["critique"], found["revision"]
    assert [turn.content for turn in first.prompt[1:]] == ["ask 0", "draft 0", principle.critique_request]
    assert [turn.content for turn in second.prompt[4:]] == ["It does harm.", principle.revision_request]
    assert second.completion[0].content == "mended"  # type: ignore[union-attr]
    assert first.split == second.split


def test_tool_calls_and_all_turns_are_kept(tmp_path: Path) -> None:
    call = ToolCall(name="search", args={"q": "stain"}, id="c1")
    messages = (
        *asks("find it"),
        Message(role="assistant", content=[{"type": "text", "text": "I look."}], tool_calls=(call,), id="m1"),
        Message(role="tool", content="soda", tool_call_id="c1", name="search"),
    )

    build(
        [write(tmp_path / "log.jsonl", [revised(messages=messages)])],
        tmp_path / "out",
        Recipe(kind="preference"),
    )

    line = json.loads(next((tmp_path / "out").glob("t*.jsonl")).read_text())
    assert line["prompt"] == [
        {"role": "user", "content": "find it"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "search", "arguments": {"q": "stain"}}}
            ],
        },
        {"role": "tool", "content": "soda", "name": "search", "tool_call_id": "c1"},
    ]
