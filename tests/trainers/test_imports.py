"""Existing preference sets become records, whatever their shape; real HH-RLHF rows among them."""

from __future__ import annotations

import gzip
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_support import cai
from hypothesis import given
from hypothesis import strategies as st
from repository import DATA

from cai_graph.errors import ConfigError, DataError
from cai_graph.log import gc, open_log, redact_texts
from cai_graph.log.transfer import BrokenLine
from cai_graph.trajectory import Message, Outcome, Trajectory, text_of
from trainers.dataset import Recipe, build
from trainers.imports import Imports, dialogue, import_preferences, read_preferences
from trainers.rows import PreferenceRow, SFTRow, UnpairedRow, read_row

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Help?"), ("assistant", "Gladly."), ("assistant", "No."))
)
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
HH = DATA / "hh_rlhf"


def file(folder: Path, *rows: Any, name: str = "set.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(folder: Path, *rows: Any) -> list[Imports | BrokenLine]:
    return list(read_preferences(file(folder, *rows)))


def shown(found: Imports | BrokenLine) -> tuple[list[tuple[str, str]], str, str]:
    """Prompt, chosen and rejected."""
    assert isinstance(found, Imports), found
    trajectory = found.trajectory
    assert trajectory.draft is not None
    chosen = trajectory.rounds[0].revisions[0].answer
    prompt = [(message.role, text_of(message)) for message in trajectory.messages]
    return prompt, text_of(chosen), text_of(trajectory.draft.answer)


SHAPES: dict[str, dict[str, Any]] = {
    "explicit texts": {"prompt": "Help?", "chosen": "Gladly.", "rejected": "No."},
    "explicit messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit messages": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a prompt that is repeated": {"prompt": "Help?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "HH-RLHF": {
        "chosen": "\n\nHuman: Help?\n\nAssistant: Gladly.",
        "rejected": "\n\nHuman: Help?\n\nAssistant: No.",
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_pair_is_read(tmp_path: Path, shape: str) -> None:
    (found,) = read(tmp_path, SHAPES[shape])
    assert shown(found) == ([("user", "Help?")], "Gladly.", "No.")


def test_all_shapes_of_one_pair_are_the_same_record(tmp_path: Path) -> None:
    done = import_preferences(tmp_path / "cai.db", file(tmp_path, *SHAPES.values()))
    assert (done.pairs, done.present, done.broken) == (1, len(SHAPES) - 1, ())


def test_implicit_texts_are_split_where_they_begin_to_differ_as_trl_does(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert shown(found) == ([("user", "The sky is")], " blue.", " green.")


def test_earlier_turns_belong_to_the_prompt(tmp_path: Path) -> None:
    turns = [*EARLIER, USER]
    found = read(tmp_path, {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]})
    found += read(tmp_path, {"prompt": EARLIER, "chosen": [*turns, GOOD], "rejected": [*turns, BAD]})
    found += read(tmp_path, {"prompt": turns, "chosen": [GOOD], "rejected": [BAD]})
    assert [shown(one)[0] for one in found] == [
        [("user", "Hi"), ("assistant", "Hello"), ("user", "Help?")]
    ] * 3


def test_tool_calls_are_kept(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"q": "x"}}}
    asks = {"role": "assistant", "content": "", "tool_calls": [call]}
    (found,) = read(tmp_path, {"prompt": [USER], "chosen": [asks], "rejected": [BAD]})
    assert isinstance(found, Imports)
    (kept,) = found.trajectory.rounds[0].revisions[0].answer.tool_calls
    assert (kept.name, kept.args, kept.id) == ("look", {"q": "x"}, "1")


def test_an_answer_with_a_label_is_a_draft_with_a_verdict(tmp_path: Path) -> None:
    rows = [{"prompt": "Help?", "completion": "Gladly.", "label": True}]
    rows += [{"prompt": [USER], "completion": [BAD], "label": False}]
    good, bad = read(tmp_path, *rows)
    assert isinstance(good, Imports)
    assert isinstance(bad, Imports)
    assert (good.trajectory.outcome, bad.trajectory.outcome) == (Outcome.KEPT, Outcome.EXHAUSTED)
    assert bad.trajectory.rounds[0].critique.verdicts[0].label == "VIOLATES"


def test_a_soft_label_becomes_a_comparison(tmp_path: Path) -> None:
    path = file(tmp_path, {**SHAPES["explicit texts"], "p_chosen": 0.7})
    import_preferences(tmp_path / "cai.db", path)
    with open_log(tmp_path / "cai.db", read_only=True) as log:
        (found,) = log.read(kind="comparison")
    assert (found.preference, found.judge) == (0.7, "set")
    (row,) = rows(tmp_path, "preference")
    assert isinstance(row, PreferenceRow)
    assert (row.p_chosen, row.judge) == (0.7, "set")


def test_a_soft_label_that_a_stopped_import_left_out_is_added(tmp_path: Path) -> None:
    path = file(tmp_path, {**SHAPES["explicit texts"], "p_chosen": 0.2})
    (whole,) = read_preferences(path)
    assert isinstance(whole, Imports)
    with open_log(tmp_path / "cai.db") as log:
        log.append(whole.trajectory).result()

    added, again = (import_preferences(tmp_path / "cai.db", path) for _ in range(2))

    assert (added.pairs, added.present, again.pairs, again.present) == (1, 0, 0, 1)
    (row,) = rows(tmp_path, "preference")
    assert isinstance(row, PreferenceRow)
    assert (row.p_chosen, row.rejected[0].content) == (0.8, "Gladly.")


def test_a_soft_label_of_a_pair_that_was_removed_is_not_added(tmp_path: Path) -> None:
    import_preferences(tmp_path / "cai.db", file(tmp_path, SHAPES["explicit texts"]))
    gc(tmp_path / "cai.db", before=datetime.now(UTC) + timedelta(days=1), why="the user asked for it")

    soft = file(tmp_path, {**SHAPES["explicit texts"], "p_chosen": 0.2})

    assert import_preferences(tmp_path / "cai.db", soft).present == 1
    with open_log(tmp_path / "cai.db", read_only=True) as log:
        assert not list(log.read())


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "x", "chosen": "y"}, "neither a pair"),
        ({"prompt": "x", "completion": "y", "label": "good"}, "neither a pair"),
        ({"prompt": "x", "chosen": "same", "rejected": "same "}, "chosen and rejected are the same"),
        ({"prompt": "x", "chosen": "y", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": " ", "chosen": "y", "rejected": "z"}, "'prompt' is empty"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "there is no 'prompt'"),
        ({"chosen": "abc", "rejected": "xyz"}, "there is no 'prompt'"),
        ({"chosen": [USER, GOOD], "rejected": "No."}, "one of 'chosen' and 'rejected' is text"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "'chosen' has 2 messages"),
        ({"prompt": "x", "chosen": [USER], "rejected": [BAD]}, "a message of the role 'user'"),
        ({"prompt": 7, "chosen": "y", "rejected": "z"}, "'prompt' is text or a list of messages, found 7"),
        ({"prompt": "x", "chosen": [{"text": "y"}], "rejected": [BAD]}, "has no role"),
        ({"prompt": "x", "chosen": "y", "rejected": "z", "p_chosen": 7}, "a probability from 0 to 1"),
        ([1], "a row is an object, found list"),
        (
            {
                "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
                "rejected": "\n\nHuman: a\n\nAssistant: d",
            },
            "'chosen' has two turns of Human in a row",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_reported_by_its_line(tmp_path: Path, row: Any, why: str) -> None:
    good = SHAPES["explicit texts"]
    first, broken, last = read(tmp_path, good, row, {**good, "chosen": "Sure."})
    assert isinstance(first, Imports)
    assert isinstance(last, Imports)
    assert isinstance(broken, BrokenLine)
    assert broken.line == 2
    assert why in broken.what


def test_lines_that_are_no_json_and_files_that_are_cut_off_lose_nothing_else(tmp_path: Path) -> None:
    path = file(tmp_path, SHAPES["explicit texts"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n{no\n")
    found = list(read_preferences(path))
    assert isinstance(found[0], Imports)
    assert isinstance(found[1], BrokenLine)
    assert (len(found), found[1].line) == (2, 3)
    many = "".join(
        json.dumps({**SHAPES["explicit texts"], "chosen": f"{n} {n * n}"}) + "\n" for n in range(3000)
    )
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(many.encode())[:-400])
    *rows_, last = read_preferences(cut)
    assert len(rows_) > 100
    assert isinstance(last, BrokenLine)
    assert "cut off or damaged" in last.what


def test_json_arrays_compressed_lines_and_parquet_are_read_alike(tmp_path: Path) -> None:
    # Of two columns of messages Arrow makes one type: keys that one message lacks come back as None.
    pairs = [
        SHAPES["implicit messages"],
        {"chosen": [{**USER, "name": "Ann"}, GOOD], "rejected": [USER, BAD]},
    ]
    (tmp_path / "set.json").write_text(json.dumps(pairs[:1]))
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress(json.dumps(pairs[0]).encode()))
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "set.parquet")
    for name in ("set.json", "set.jsonl.gz", "set.parquet"):
        found = list(read_preferences(tmp_path / name))
        assert shown(found[0]) == ([("user", "Help?")], "Gladly.", "No."), name


def test_files_that_cannot_be_read_are_errors_and_no_log_is_made(tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_text("no")
    (tmp_path / "no.json").write_text("[1,")
    for name, error in (
        ("set.txt", ConfigError),
        ("absent.jsonl", DataError),
        ("no.parquet", DataError),
        ("no.json", DataError),
    ):
        with pytest.raises(error):
            import_preferences(tmp_path / "cai.db", tmp_path / name)
    assert not (tmp_path / "cai.db").exists()


def rows(folder: Path, kind: Any) -> list[Any]:
    built = build([str(folder / "cai.db")], folder / kind, Recipe(kind=kind, test_share=0))
    assert built.ledger.rows
    lines = (folder / kind / "train.jsonl").read_bytes().splitlines()
    return [read_row(kind, line) for line in lines]


def test_imported_rows_name_their_set_in_every_kind_that_they_give(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        SHAPES["HH-RLHF"] | {"subset": "harmless"},
        {"prompt": "Else?", "completion": "Yes.", "label": True},
    )
    done = import_preferences(tmp_path / "cai.db", path, name="hh")
    assert (done.pairs, done.answers) == (1, 1)
    (pair,) = rows(tmp_path, "preference")
    assert isinstance(pair, PreferenceRow)
    assert (pair.source, pair.judge, pair.p_chosen, pair.chosen[0].content) == (
        "imported",
        "hh",
        1.0,
        "Gladly.",
    )
    (answer,) = rows(tmp_path, "unpaired")
    assert isinstance(answer, UnpairedRow)
    assert (answer.label, answer.judge) == (True, "hh")
    assert {(row.source, row.judge) for row in rows(tmp_path, "sft") if isinstance(row, SFTRow)} == {
        ("imported", "hh"),
        ("draft", "hh"),
    }
    with open_log(tmp_path / "cai.db", read_only=True) as log:
        first = next(log.read(kind="trajectory", tag="hh"))
    assert isinstance(first, Trajectory)
    assert first.metadata == {"dataset": "hh", "line": 1, "subset": "harmless"}


words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).map(str.strip).filter(bool)


@given(
    st.lists(words, min_size=2, max_size=6).filter(
        lambda turns: not any("\n\nHuman:" in t or "\n\nAssistant:" in t for t in turns)
    )
)
def test_a_dialogue_reads_back(turns: list[str]) -> None:
    speakers = ("Human", "Assistant")
    text = "".join(f"\n\n{speakers[n % 2]}: {turn}" for n, turn in enumerate(turns))
    roles = ("user", "assistant")
    assert dialogue(text) == [Message(role=roles[n % 2], content=turn) for n, turn in enumerate(turns)]


@pytest.mark.skipif(not HH.is_dir(), reason="the HH-RLHF files are not here")
@pytest.mark.parametrize(
    "subset", ["harmless-base.test", "helpful-base.test", "helpful-rejection-sampled.test"]
)
def test_real_hh_rlhf_lines_give_the_pairs_that_are_known(subset: str) -> None:
    raw = list(read_preferences(HH / f"{subset}.raw.jsonl.gz"))
    with gzip.open(HH / f"{subset}.pairs.jsonl.gz", "rt") as lines:
        known = [json.loads(line) for line in lines]
    found = [shown(one) for one in raw if isinstance(one, Imports)]
    assert found == [
        (
            [(turn["role"], turn["content"].strip()) for turn in row["prompt"]],
            row["chosen"][0]["content"].strip(),
            row["rejected"][0]["content"].strip(),
        )
        for row in known
    ]


def test_no_id_tells_what_was_redacted(tmp_path: Path) -> None:
    hide = redact_texts(lambda text: re.sub(r"\d", "#", text))
    done = [
        import_preferences(tmp_path / "cai.db", file(tmp_path, row), redact=hide)
        for pin in ("4821", "0007")
        for row in (
            {
                "prompt": f"My PIN is {pin}.",
                "chosen": "Keep it secret.",
                "rejected": "Nice.",
                "p_chosen": 0.8,
            },
            {"prompt": f"My PIN is {pin}.", "completion": "Keep it secret.", "label": True},
        )
    ]

    assert [(one.pairs + one.answers, one.present) for one in done] == [(1, 0), (1, 0), (0, 1), (0, 1)]
    with open_log(tmp_path / "cai.db") as log:
        assert {record.messages[0].content for record in log.read(kind="trajectory")} == {"My PIN is ####."}


def test_of_two_imports_at_once_the_later_finds_the_rows_there(tmp_path: Path) -> None:
    path = file(tmp_path, {"prompt": "Help?", "chosen": "y" * 10_000, "rejected": "No."})
    with open_log(tmp_path / "cai.db") as log, ThreadPoolExecutor(2) as threads:
        with log._shared.store._writing:  # type: ignore[attr-defined]  # so that neither sees the other's
            imports = [threads.submit(import_preferences, tmp_path / "cai.db", path) for _ in range(2)]
            while log._shared.writer.pending_bytes < 20_000:  # type: ignore[union-attr]
                time.sleep(0.001)
        done = [one.result() for one in imports]

    assert [one.broken for one in done] == [(), ()]
    assert sorted((one.pairs, one.present) for one in done) == [(0, 1), (1, 0)]


def test_the_command_reports_broken_lines_and_adds_nothing_twice(tmp_path: Path) -> None:
    path = file(tmp_path, SHAPES["HH-RLHF"], {"prompt": "x"})
    first = cai(tmp_path, "dataset", "import", str(path), "--log", "hh.db", "--name", "hh", status=3)
    assert "line 2 skipped: neither a pair" in first.stderr
    assert "1 pair and 0 labelled answers added; 0 were there already; 1 line skipped" in first.stderr
    again = cai(tmp_path, "dataset", "import", str(path), "--log", "hh.db", "--name", "hh", status=3)
    assert "0 pairs and 0 labelled answers added; 1 were there already" in again.stderr
