"""Logs to datasets: accounts that reconcile, splits without leaks, the same bytes each time."""

from __future__ import annotations

import contextlib
import json
import random
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from dataset_logs import COMPLIES, VIOLATES, bytes_of, kept, revised, rows_of, says, unjudged, write
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage
from log_support import START, comparison, feedback, review, trajectories
from repository import read_page

from cai_graph import open_log
from cai_graph.errors import CaiError, ConfigError, DataError
from cai_graph.messages import from_langchain
from cai_graph.trajectory import (
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Record,
    Rejection,
    Review,
    Revision,
    Round,
    ToolCall,
    Trajectory,
    Verdict,
)
from trainers.dataset import Recipe, build, explain
from trainers.dataset.reading import turn
from trainers.dataset.split import normalise
from trainers.ledger import Reason
from trainers.rows import KINDS, CriticRow, Kind, PreferenceRow

# --- the ledger ---------------------------------------------------------------------------------------


def test_every_reason_is_documented_and_every_documented_reason_exists() -> None:
    section = read_page("datasets.md").partition("\n## Reasons\n")[2]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)

    assert documented == [str(reason) for reason in Reason]


@given(st.lists(trajectories, min_size=1, max_size=8), st.sampled_from(list(KINDS)))
@settings(max_examples=60)
def test_any_log_reconciles_for_every_kind(tmp_path_factory: Any, records: list[Any], kind: Kind) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = write(folder / "log.jsonl", [*records, revised()])

    ledger = build([log], folder / "out", Recipe(kind="prompts")).ledger
    assert ledger.read == len(records) + 1
    assert ledger.read == ledger.gave_rows + sum(ledger.dropped.values())
    assert ledger.made == ledger.rows + sum(ledger.dropped_rows.values())
    assert ledger.rows == len(rows_of(folder / "out", "prompts"))
    with contextlib.suppress(DataError):  # No row of this kind.
        ledger = build([log], folder / kind, Recipe(kind=kind)).ledger
        assert ledger.rows == len(rows_of(folder / kind, kind))


def test_a_log_without_a_row_is_an_error_that_shows_the_ledger(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [kept(1), kept(2)])

    with pytest.raises(DataError, match=r"every trajectory was dropped(?s:.*)2  dropped: no_pair"):
        build([log], tmp_path / "out", Recipe(kind="preference"))
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_an_empty_log_is_an_error(tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db"):
        pass

    with pytest.raises(DataError, match="holds no trajectory"):
        build([str(tmp_path / "cai.db")], tmp_path / "out", Recipe(kind="sft"))


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(ConfigError, match="is there already"):
        build([write(tmp_path / "log.jsonl", [revised()])], tmp_path / "out", Recipe(kind="sft"))


# --- preferences --------------------------------------------------------------------------------------


def test_an_accepted_revision_is_preferred_to_the_draft_that_violates(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [record := revised()])

    build([log], tmp_path / "out", Recipe(kind="preference"))

    (row,) = rows_of(tmp_path / "out", "preference")
    assert isinstance(row, PreferenceRow)
    assert [turn.role for turn in row.prompt] == ["system", "user"]
    assert (row.chosen[0].content, row.rejected[0].content) == ("revised 0", "draft 0")
    assert (row.p_chosen, row.margin, row.source, row.judge) == (1.0, 1.0, "revision", "fake:critic")
    assert (row.trajectory_id, row.principles) == (record.id, ("no-harm",))


def test_a_call_that_cannot_be_made_leaves_the_text_beside_it() -> None:
    broken = {"name": "look", "args": "{", "id": "1", "error": None}
    said = from_langchain(AIMessage("Some words.", invalid_tool_calls=[broken]))

    assert turn(said).content == "Some words."


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([kept()], Reason.NO_PAIR),
        ([unjudged()], Reason.UNJUDGED),
        ([revised(outcome=Outcome.EXHAUSTED)], Reason.NOT_ACCEPTED),
        ([revised(draft=Draft(answer=says("revised  0 ")))], Reason.IDENTICAL),
        ([revised(draft=Draft(answer=says(" ")))], Reason.EMPTY),
        ([revised(draft=None)], Reason.NO_ANSWER),
        ([revised(messages=())], Reason.NO_PROMPT),
        ([revised(messages=(says("\ud800", "user"),))], Reason.BROKEN_TEXT),
        ([revised(metadata={"redaction": "failed"})], Reason.WITHHELD),
        ([revised(messages=(Message(role="user", content=[{"type": "image_url"}]),))], Reason.NOT_TEXT),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_dropped_for_a_reason(
    tmp_path: Path, records: list[Record], reason: Reason
) -> None:
    log = write(tmp_path / "log.jsonl", [*records, revised(99)])

    assert build([log], tmp_path / "out", Recipe(kind="preference")).ledger.dropped == {reason: 1}


def test_an_argument_of_a_tool_call_is_not_taken_for_the_outcome(tmp_path: Path) -> None:
    call = ToolCall(name="close", args={"id": 1, "outcome": "KEPT", "by": "x"}, id="1")
    asked = (
        says("hi", "user"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="closed", tool_call_id="1"),
    )
    log = write(tmp_path / "log.jsonl", [revised(messages=asked), kept(1)])

    ledger = build([log], tmp_path / "out", Recipe(kind="preference")).ledger

    assert (ledger.rows, ledger.dropped) == (1, {Reason.NO_PAIR: 1})


def test_a_review_outranks_the_critic_and_the_judge(tmp_path: Path) -> None:
    record = revised()
    records = [record, comparison(record.id), review(record.id, decision="flip")]
    log = write(tmp_path / "log.jsonl", records)

    build([log], tmp_path / "out", Recipe(kind="preference"))

    (row,) = rows_of(tmp_path / "out", "preference")
    assert isinstance(row, PreferenceRow)
    assert (row.chosen[0].content, row.source, row.judge) == ("draft 0", "human", "ann")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([{"decision": "tie"}], Reason.TIE),
        ([{"decision": "approve"}, {"decision": "flip", "reviewer": "bob"}], Reason.DISAGREEMENT),
        ([{"decision": "reject"}], Reason.REVIEWED_OUT),
        ([{"decision": "approve"}, {"decision": "flag"}], Reason.REVIEWED_OUT),
        ([{"decision": "flag"}, {"decision": "undo"}], None),
        ([{"decision": "skip"}], None),
    ],
)
def test_reviews_are_weighed(tmp_path: Path, said: list[Any], reason: Reason | None) -> None:
    record = revised()
    reviews = [review(record.id, at=START + timedelta(minutes=n), **fields) for n, fields in enumerate(said)]
    log = write(tmp_path / "log.jsonl", [record, *reviews, revised(99)])

    ledger = build([log], tmp_path / "out", Recipe(kind="preference")).ledger
    assert ledger.dropped == ({} if reason is None else {reason: 1})


@pytest.mark.parametrize(
    ("p_a", "reason"),
    [
        ((0.9, 0.1), Reason.DISAGREEMENT),
        ((0.5, 0.5), Reason.TIE),
        ((None, 0.2), Reason.UNREADABLE_VERDICT),
        ((0.25, 0.375), None),
    ],
)
def test_comparisons_count_in_both_orders(tmp_path: Path, p_a: Any, reason: Reason | None) -> None:
    record = revised()
    log = write(tmp_path / "log.jsonl", [record, comparison(record.id, p_a=p_a), revised(99)])

    ledger = build([log], tmp_path / "out", Recipe(kind="preference")).ledger

    assert ledger.dropped == ({} if reason is None else {reason: 1})
    if reason is None:
        (row,) = [row for row in rows_of(tmp_path / "out", "preference") if row.source == "comparison"]
        assert isinstance(row, PreferenceRow)
        assert (row.chosen[0].content, row.p_chosen, row.judge) == ("b", 0.6875, "fake:judge")


def test_users_who_dislike_what_the_critic_prefers_disagree(tmp_path: Path) -> None:
    record = revised()
    log = write(tmp_path / "log.jsonl", [record, feedback(record.id, score=-1.0), revised(99)])

    ledger = build([log], tmp_path / "out", Recipe(kind="preference")).ledger
    assert ledger.dropped == {Reason.DISAGREEMENT: 1}


# --- the same bytes each time -------------------------------------------------------------------------


@given(st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_the_order_of_the_log_does_not_matter(tmp_path_factory: Any, rng: random.Random) -> None:
    folder = tmp_path_factory.mktemp("log")
    records: list[Record] = [
        trajectory_of(n % 7, metadata={"user": f"user {n % 3}", "tenant": "t"})
        for n in range(30)
        for trajectory_of in (revised, kept)
    ]
    shuffled = rng.sample(records, len(records))
    recipe = Recipe(kind="sft", per_user=4, kept_per_revised=0.5, test_share=0.3)

    first = build([write(folder / "a.jsonl", records)], folder / "a", recipe)
    second = build([write(folder / "b.jsonl", shuffled)], folder / "b", recipe)

    assert bytes_of(first.path) == bytes_of(second.path)
    assert first.ledger == second.ledger
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (first.path, second.path)]
    assert manifests[0]["log_digest"] == manifests[1]["log_digest"]


def test_a_person_is_removed_and_the_rest_is_the_same(tmp_path: Path) -> None:
    records: list[Record] = [revised(n, metadata={"user": f"user {n % 3}"}) for n in range(20)]
    log = write(tmp_path / "log.jsonl", records)

    build([log], tmp_path / "all", Recipe(kind="preference"))
    without = build([log], tmp_path / "rest", Recipe(kind="preference", without_users=("user 1",)))

    gone = {
        record.id
        for record in records
        if isinstance(record, Trajectory) and record.metadata["user"] == "user 1"
    }
    every = rows_of(tmp_path / "all", "preference")
    assert rows_of(tmp_path / "rest", "preference") == [row for row in every if row.trajectory_id not in gone]
    assert without.ledger.dropped == {Reason.REMOVED: len(gone)}


def test_who_is_removed_is_not_named_in_the_dataset_and_who_is_not_there_is_told(tmp_path: Path) -> None:
    image = Message(role="user", content=[{"type": "image"}])
    records: list[Record] = [
        revised(1, metadata={"user": "ann@corp", "tenant": "t"}),
        revised(2, metadata={"user": "bob", "tenant": 7}),
        revised(3, metadata={"user": "eve"}, messages=(image,)),
    ]
    log = write(tmp_path / "log.jsonl", records)
    users, tenants = ("ann@corp", "anne@corp", "eve"), ("7", "bob")

    recipe = Recipe(kind="sft", test_share=0, without_users=users[1:], without_tenants=tenants[1:])
    assert build([log], tmp_path / "two", recipe).ledger.rows == 2
    recipe = Recipe(kind="sft", test_share=0, without_users=users, without_tenants=("bob",))
    built = build([log], tmp_path / "one", recipe)

    assert built.unmet == (("tenant", "bob"), ("user", "anne@corp"))
    (row,) = rows_of(built.path, "sft")
    assert row.trajectory_id == records[1].id
    manifest = (built.path / "manifest.json").read_text()
    assert "@corp" not in manifest
    assert json.loads(manifest)["recipe"]["without_users"] == 3


def test_a_person_of_no_name_is_not_the_one_who_is_called_none(tmp_path: Path) -> None:
    records: list[Record] = [
        revised(1, metadata={"user": None, "tenant": "a"}),
        revised(2, metadata={"user": "None", "tenant": None}),
    ]
    log = write(tmp_path / "log.jsonl", records)

    build(
        [log], tmp_path / "out", Recipe(kind="preference", without_users=("None",), without_tenants=("None",))
    )

    assert [row.trajectory_id for row in rows_of(tmp_path / "out", "preference")] == [records[0].id]


# --- critic -------------------------------------------------------------------------------------------


def labels_of(tmp_path: Path, *reviews: Review) -> dict[tuple[str, str], tuple[bool, str, str]]:
    record = revised()
    about_it = [msgspec.structs.replace(each, trajectory_id=record.id) for each in reviews]
    log = write(tmp_path / "log.jsonl", [record, *about_it])
    build([log], tmp_path / "out", Recipe(kind="critic"))
    found = {}
    for row in rows_of(tmp_path / "out", "critic"):
        assert isinstance(row, CriticRow)
        found[row.completion[0].content, row.principle] = (row.violates, row.source, row.judge)
    return found


def test_a_critic_learns_every_verdict_and_a_persons_label_in_its_place(tmp_path: Path) -> None:
    labels = (
        Verdict(label=Label.COMPLIES, principle="no-harm", read_by="human"),
        Verdict(label=Label.VIOLATES, aim="honest", read_by="human"),
    )

    found = labels_of(tmp_path, review("", reviewer="ann", verdicts=labels))

    assert found == {
        ("draft 0", "no-harm"): (False, "human", "ann"),
        ("draft 0", "honest"): (True, "human", "ann"),
        ("revised 0", "no-harm"): (False, "critique", "fake:critic"),
    }


def test_a_critic_does_not_learn_what_people_contradict(tmp_path: Path) -> None:
    verdict = Verdict(label=Label.COMPLIES, principle="no-harm", read_by="human")
    other = msgspec.structs.replace(verdict, label=Label.VIOLATES)

    differ = labels_of(
        tmp_path,
        review("", id="1", reviewer="ann", verdicts=(verdict,)),
        review("", id="2", reviewer="bob", verdicts=(other,)),
    )

    assert list(differ) == [("revised 0", "no-harm")]


def test_a_draft_that_people_prefer_is_no_violation_to_learn_from(tmp_path: Path) -> None:
    assert list(labels_of(tmp_path, review("", decision="flip"))) == [("revised 0", "no-harm")]


# --- splits -------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.sampled_from(["Ask", "ask ", "ＡＳＫ", "other", "  OTHER\n", "third"]), min_size=4, max_size=30
    )
)
@settings(max_examples=40)
def test_no_prompt_stands_on_both_sides(tmp_path_factory: Any, asked: list[str]) -> None:
    folder = tmp_path_factory.mktemp("log")
    records: list[Record] = [revised(n, messages=(says(text, "user"),)) for n, text in enumerate(asked)]

    build([write(folder / "log.jsonl", records)], folder / "out", Recipe(kind="preference", test_share=0.5))

    sides: dict[str, set[str]] = {}
    for row in rows_of(folder / "out", "preference"):
        sides.setdefault(normalise(row.prompt[-1].content), set()).add(row.split)
    assert all(len(found) == 1 for found in sides.values())


SLIGHT = Critique(
    verdicts=(Verdict(label=Label.VIOLATES, principle="no-harm", severity=1),), critic="fake:critic"
)
GRAVE = Critique(
    verdicts=(Verdict(label=Label.VIOLATES, principle="no-harm", severity=5),), critic="fake:critic"
)


def test_what_the_run_let_pass_is_good_whatever_trifles_its_verdicts_name(tmp_path: Path) -> None:
    revision = Revision(answer=says("mild"), critique=SLIGHT, accepted=True)
    records: list[Record] = [
        kept(1, rounds=(Round(critique=SLIGHT),)),
        revised(2, rounds=(Round(critique=GRAVE, revisions=(revision,)),)),
        kept(3, mode="sampled", rounds=(Round(critique=SLIGHT),)),  # nothing is gated there
        revised(4, rounds=(Round(critique=GRAVE, revisions=(_with(revision, critique=VIOLATES),)),)),
    ]
    log = write(tmp_path / "log.jsonl", records)

    labels = labels_in(tmp_path, log)
    build([log], tmp_path / "sft", Recipe(kind="sft"))
    build([log], tmp_path / "pairs", Recipe(kind="preference"))

    assert labels == {("draft 1", True), ("draft 2", False), ("mild", True), ("draft 3", False)} | {
        ("draft 4", False),
        ("mild", False),  # a violation without a severity is below no threshold
    }
    assert {row.completion[0].content for row in rows_of(tmp_path / "sft", "sft")} == {"draft 1", "mild"}  # type: ignore[union-attr]
    (pair,) = rows_of(tmp_path / "pairs", "preference")
    assert isinstance(pair, PreferenceRow)
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("mild", "draft 2")
    assert pair.principles == ("no-harm",)


def test_a_trifle_that_stays_as_it_was_is_not_mended(tmp_path: Path) -> None:
    other = Verdict(label=Label.VIOLATES, principle="plain", severity=1)
    before = _with(GRAVE, verdicts=(*GRAVE.verdicts, other))
    after = _with(COMPLIES, verdicts=(*COMPLIES.verdicts, other))
    revision = Revision(answer=says("mild"), critique=after, accepted=True)
    log = write(tmp_path / "log.jsonl", [revised(rounds=(Round(critique=before, revisions=(revision,)),))])

    build([log], tmp_path / "pairs", Recipe(kind="preference"))

    assert rows_of(tmp_path / "pairs", "preference")[0].principles == ("no-harm",)


def test_a_revision_that_evades_is_no_answer_to_learn(tmp_path: Path) -> None:
    evasive = Revision(answer=says("I can't."), critique=COMPLIES, rejection=Rejection.EVASIVE)
    second = Revision(answer=says("fine"), critique=COMPLIES, rejection=Rejection.NOT_BEST)
    best = Revision(answer=says("better"), critique=COMPLIES, accepted=True)
    log = write(
        tmp_path / "log.jsonl",
        [revised(1, rounds=(Round(critique=VIOLATES, revisions=(evasive, second, best)),))],
    )

    assert labels_in(tmp_path, log) == {
        ("draft 1", False),
        ("I can't.", False),
        ("fine", True),
        ("better", True),
    }


def labels_in(tmp_path: Path, log: str) -> set[tuple[str, bool]]:
    build([log], tmp_path / "unpaired", Recipe(kind="unpaired"))
    rows = rows_of(tmp_path / "unpaired", "unpaired")
    return {(row.completion[0].content, row.label) for row in rows}  # type: ignore[union-attr]


def _with(record: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(record, **changes)


def test_a_duplicate_is_counted_and_one_of_it_stays(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [revised(), revised(), revised(1)])

    ledger = build([log], tmp_path / "out", Recipe(kind="preference")).ledger

    assert ledger.dropped == {Reason.DUPLICATE: 1}
    assert len(rows_of(tmp_path / "out", "preference")) == 2


# --- explain ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.jsonl", "cai.db"])
def test_a_row_leads_back_to_its_trajectory_and_who_judged_it(tmp_path: Path, name: str) -> None:
    record = revised()
    about = review(record.id)
    if name.endswith(".db"):
        with open_log(tmp_path / name) as log:
            log.append(record).result()
            log.append(about).result()
    else:
        write(tmp_path / name, [record, about])
    build([str(tmp_path / name)], tmp_path / "out", Recipe(kind="preference"))
    (row,) = rows_of(tmp_path / "out", "preference")

    origin = explain(row.id, tmp_path / "out")

    assert origin.trajectory == record
    assert (origin.critics, origin.judges) == (("fake:critic",), ("ann",))
    with pytest.raises(DataError, match="no row 'nothing'"):
        explain("nothing", tmp_path / "out")


@pytest.mark.parametrize("name", ["cai.db", "sqlite:///cai.db", "cai.jsonl"])
def test_a_datasets_log_is_the_one_that_it_was_built_from_in_whatever_folder_one_asks(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = revised()
    (tmp_path / "elsewhere").mkdir()
    for folder, logged in (
        (tmp_path, record),
        (tmp_path / "elsewhere", revised(id=record.id, metadata={"b": 1})),
    ):
        write(folder / "cai.jsonl", [logged])
        with open_log(folder / "cai.db") as log:
            log.append(logged).result()
    monkeypatch.chdir(tmp_path)
    build([name], Path("out"), Recipe(kind="preference"))
    (row,) = rows_of(Path("out"), "preference")

    monkeypatch.chdir("elsewhere")

    assert explain(row.id, Path("../out")).trajectory == record
    (tmp_path / "cai.db").unlink()
    (tmp_path / "cai.jsonl").unlink()
    with pytest.raises(CaiError, match=f"{tmp_path}/cai"):
        explain(row.id, Path("../out"))
