"""What is left out of a dataset, and why: every reason of the ledger; bad input; personal data; workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dataset_logs import COMPLIES, VIOLATES, bytes_of, kept, revised, rows_of, says, unjudged, write
from log_support import feedback, review

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
WHOLE = Critique(verdicts=(Verdict(label=Label.VIOLATES),), critic="human")
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
    Reason.NO_PRINCIPLE: ("critic", lambda: [kept(rounds=(Round(critique=WHOLE),))], {}),
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
    plain = with_template(tokenizer, tmp_path / "plain", None)

    with pytest.raises(ConfigError, match="has no chat template"):
        build(["absent.jsonl"], tmp_path / "out", Recipe(kind="sft", tokenizer=str(plain), max_tokens=9))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build(["absent.jsonl"], tmp_path / "out", Recipe(kind="sft", tokenizer=str(tmp_path), max_tokens=9))


def with_template(tokenizer: Path, folder: Path, template: Any) -> Path:
    """Copy a tokenizer, with another chat template."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
        ([{"name": "rag", "template": "x"}, {"name": "tools", "template": "y"}], "no default"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_said_before_anything_is_read(
    tmp_path: Path, tokenizer: Path, template: Any, said: str
) -> None:
    folder = with_template(tokenizer, tmp_path / "other", template)

    with pytest.raises(ConfigError, match=f"its chat template cannot be used: .*{said}"):
        build(["absent.jsonl"], tmp_path / "out", Recipe(kind="sft", tokenizer=str(folder), max_tokens=9))


def test_a_conversation_on_which_the_chat_template_fails_is_not_in_its_format(
    tmp_path: Path, tokenizer: Path
) -> None:
    template = "{{ 1 // (messages[0].content | length - 3) }}"
    folder = with_template(tokenizer, tmp_path / "other", template)

    recipe = {"tokenizer": str(folder), "max_tokens": 60}
    assert dropped(tmp_path, [revised(messages=asks("why"))], **recipe) == {Reason.NOT_IN_FORMAT: 1}


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


def test_a_mix_is_the_share_as_it_is_written(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [r for n in range(100) for r in (revised(n), kept(200 + n))])

    built = build([log], tmp_path / "out", Recipe(kind="sft", kept_per_revised=0.29, near_duplicates=None))

    assert built.ledger.rows == 100 + 29


def test_what_was_said_of_a_trajectory_that_is_gone_is_counted(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [revised(), review("gone"), feedback("gone"), feedback("gone too")])

    assert build([log], tmp_path / "out", Recipe(kind="preference")).ledger.orphans == 2


def test_what_was_said_of_a_trajectory_with_an_image_is_about_one_that_is_there(tmp_path: Path) -> None:
    shown = revised(1, messages=(Message(role="user", content=[{"type": "image"}]),))
    log = write(tmp_path / "log.jsonl", [revised(), shown, review(shown.id)])

    ledger = build([log], tmp_path / "out", Recipe(kind="preference")).ledger

    assert (ledger.dropped, ledger.orphans) == ({Reason.NOT_TEXT: 1}, 0)


# --- personal data ------------------------------------------------------------------------------------


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


def test_a_constitution_that_was_edited_is_read_again(tmp_path: Path) -> None:
    rules = tmp_path / "own.yaml"
    for question in ("Does it harm?", "Whom does it harm?"):
        principle = {"id": "no-harm", "aim": "harmless", "critique_request": question}
        principles = [{**principle, "revision_request": "Mend it."}]
        rules.write_text(json.dumps({"name": "own", "version": "1", "principles": principles}))
        judged_by = ConstitutionRef(name="own", version="1", digest=load(rules).digest)
        log = write(tmp_path / "log.jsonl", [revised(constitution=judged_by)])
        made = build([log], tmp_path / question, Recipe(kind="critique-sft", constitutions=(str(rules),)))

        assert question in [turn.content for row in rows_of(made.path, "critique-sft") for turn in row.prompt]


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


# --- caps ---------------------------------------------------------------------------------------------


def candidate(order: int) -> spool.Candidate:
    return spool.Candidate(b"row", 0, order, b"prompt", b"user", spool.NOBODY, 0, 1, 0, 0)


@pytest.mark.parametrize("cap", [0, 1, 3])
def test_a_cap_lets_so_many_stay_however_many_there_are(cap: int) -> None:
    for count in range(220):
        limit = spool.Limit(Reason.USER_CAP, lambda one: one.user, cap)
        seen = [candidate(n * 7919 % 1009 + 1) for n in range(count)]
        for one in seen:
            limit.see(one)
        limit.settle()
        stay = [one.order for one in seen if not limit.forbids(one)]
        assert sorted(stay) == sorted(one.order for one in seen)[:cap]
