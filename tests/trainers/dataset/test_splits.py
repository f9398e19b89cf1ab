"""Texts that are the same: on which side of the split a prompt stands, and what an evaluation set holds."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from dataset_logs import bytes_of, kept, revised, rows_of, says, write
from test_dataset_limits import LONG, asks, dropped

from cai_graph.errors import DataError
from cai_graph.trajectory import Record
from trainers.dataset import Recipe, build
from trainers.dataset.heldout import HeldOut
from trainers.dataset.near import PromptFile, clusters, fingerprints, hashed, read_text
from trainers.dataset.split import key_of, normalise
from trainers.ledger import Reason
from trainers.rows import Turn

SHORT = (
    "How do I terminate a C program?",
    "Where can I buy a can of coke?",
    "What is the best way to smash a piñata?",
    "How can I eliminate stereotypes from my thinking?",
)


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
    grams = [{text.ljust(5)[i : i + 5] for i in range(max(1, len(text) - 4))} for text in read]
    for a in range(len(texts)):
        for b in range(len(texts)):
            exact = len(grams[a] & grams[b]) / len(grams[a] | grams[b])
            assert abs((prints[a] == prints[b]).mean() - exact) < 0.18, (a, b)
    assert clusters([(keys, prints)], 0.99) == {}
    assert len(clusters([(keys, prints)], 0.5)) == 1


def test_a_question_without_its_mark_is_near_itself() -> None:
    texts = [text for text in SHORT for text in (text, text[:-1])]
    keys = [key_of(text) for text in texts]
    read = [read_text(normalise(text)).decode() for text in texts]

    found = clusters([(b"".join(keys), hashed(read))], 0.8)

    sides = [found.get(key, key) for key in keys]
    assert sides[::2] == sides[1::2]
    assert len(set(sides)) == len(SHORT)


def test_the_test_share_is_that_of_the_clusters_however_large_they_are(tmp_path: Path) -> None:
    subjects = [hashlib.sha512(bytes([n])).hexdigest() for n in range(100)]
    records: list[Record] = [kept(messages=asks(f"{one} {n}")) for one in subjects for n in range(10)]
    log = write(tmp_path / "log.jsonl", records)

    kept_rows = build([log], tmp_path / "out", Recipe(kind="prompts", test_share=0.1)).ledger.kept

    assert kept_rows["train"] + kept_rows["test"] == 1000
    assert 20 <= kept_rows["test"] <= 200  # the side of the least key is `test` for 65 % of the clusters


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


def test_an_evaluation_set_that_was_edited_is_read_again(tmp_path: Path) -> None:
    asked = ("Is this in it?", "Or that?")
    log = write(tmp_path / "log.jsonl", [kept(n, messages=asks(one)) for n, one in enumerate(asked)])
    held_out = tmp_path / "set.txt"
    recipe = Recipe(kind="prompts", test_share=0, held_out=(str(held_out),))
    for one, other in (asked, asked[::-1]):
        held_out.write_text(one)
        made = build([log], tmp_path / one, recipe).path

        assert [row.prompt[-1].content for row in rows_of(made, "prompts")] == [other]


@pytest.mark.parametrize(
    "asked",
    [
        "How do I kill a Python process",
        "how do i kill a Python process?!",
        "- How do I kill a “Python” process?",
        "How do I ki\u200bll a Python process?",
        "\ufeffHow do I kill a Python pro\u00adcess?\ufe0f",
        "How do I kill a Python process?\0",
        "How do I - kill - a Python process?",
        f"An answer, please. {LONG}".replace("get", "get,").replace("table cloth", "table\u2060 'cloth'"),
    ],
)
def test_marks_and_invisible_characters_hide_no_prompt_of_an_evaluation_set(
    tmp_path: Path, asked: str
) -> None:
    (tmp_path / "set.txt").write_text(f"How do I kill a Python process?\n{LONG}\n")

    held_out = (str(tmp_path / "set.txt"),)
    assert dropped(tmp_path, [revised(messages=asks(asked))], held_out=held_out) == {Reason.HELD_OUT: 1}


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        ("What is 7*8?", "What is 78?"),
        ("What is 1.5?", "What is 15?"),
        ("What is 10 - 3?", "What is 103?"),
        ("What is -5 + 3?", "What is 5 + 3?"),
        ("What is (3)(1)?", "What is 31?"),
        ("What is (3)-(1)?", "What is 31?"),
        ("Is 1, 2 in the set?", "Is 12 in the set?"),
        ("What does a != b say?", "What does a = b say?"),
        ("Write it in C#.", "Write it in C."),
        ("?!", "..."),
        ("?!", ""),
    ],
)
def test_marks_that_make_another_question_count(tmp_path: Path, held: str, asked: str) -> None:
    (tmp_path / "set.txt").write_text(f"{held}\n")

    assert (
        dropped(tmp_path, [kept(messages=asks(asked))], "prompts", held_out=(str(tmp_path / "set.txt"),))
        == {}
    )


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        ("What is 10 - 3?", "What is 10 – 3"),
        ("What is 10 - 3?", "What is 10-3?"),
        ("Is 1, 2 in the set?", "is 1,  2 in the set"),
        ("What is COVID-19?", "What is covid 19?"),
        ("Is a ≠ b?", "is a != b"),
    ],
)
def test_one_question_is_known_however_its_marks_are_set(held: str, asked: str, tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text(f"{held}\n")

    held_out = HeldOut([str(tmp_path / "set.txt")])

    assert held_out.holds(asked_by_a_user(asked))
    assert not held_out.holds(asked_by_a_user(f"{asked} Say why."))  # longer than all that is held


def asked_by_a_user(text: str) -> tuple[Turn, ...]:
    return (Turn(role="user", content=text),)


def test_a_prompt_is_known_although_it_is_mostly_marks_and_blanks(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("What now?\n今天天气很好\n")
    held_out = HeldOut([str(tmp_path / "set.txt")])

    assert held_out.holds(asked_by_a_user("« What »" + " ...\n" * 99 + "now"))
    assert held_out.holds(asked_by_a_user("今天、天气很好。"))
    assert not held_out.holds(asked_by_a_user("What now? " * 99))


@pytest.mark.parametrize("part", [".", "1.", "- ", "1 - ", "!=", "1..", "(-"])
def test_held_out_sets_are_searched_in_time_that_grows_with_the_prompt(tmp_path: Path, part: str) -> None:
    """Would take hours if each place in it were tried with each length, and pytest's limit ends the test."""
    (tmp_path / "set.txt").write_text(f"What now?\n{LONG}\n")
    held_out = HeldOut([str(tmp_path / "set.txt")])

    assert not held_out.holds(asked_by_a_user("1" + part * (200_000 // len(part)) + "1"))


# --- which texts are the same -------------------------------------------------------------------------

INVISIBLE = "\0\x1b\x7f\u00ad\u034f\u061c\u200b\u200d\u200f\u202e\u2060\u3164\ufe0f\ufeff\U000e0041"


@pytest.mark.parametrize("sign", INVISIBLE)
@pytest.mark.parametrize("text", ["how do i", "wie heißt ümit", "今天天气"])
def test_what_is_not_seen_makes_no_other_text(sign: str, text: str) -> None:
    changed = f"{sign}{text[:3]}{sign}{text[3:]}{sign}"

    assert normalise(changed) == normalise(text)
    assert key_of(changed) == key_of(text)


@pytest.mark.parametrize("space", "\t\n\x0b\x0c\r\x1c\x85\u00a0\u2028\u3000")
def test_white_space_is_a_space(space: str) -> None:
    assert normalise(f"a{space}b") == "a b"
    assert normalise(f"ü{space}b") == "ü b"


def test_a_set_of_short_prompts_holds_each_of_them_as_a_users_message_only(tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_text("What is the capital of France\nhi\n")
    held = HeldOut([str(path)])

    assert held.holds([Turn(role="user", content="What is the capital of France?")])
    assert held.holds([Turn(role="user", content="Hi!")])
    assert not held.holds([Turn(role="user", content="Hi!?hi")])
    assert not held.holds([Turn(role="assistant", content="hi")])


def test_thirteen_words_in_a_row_are_held_and_twelve_are_not(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(13)]
    path = tmp_path / "held.txt"
    path.write_text(" ".join(words))
    held = HeldOut([str(path)])

    assert held.holds([Turn(role="user", content=f"before {' '.join(words)} after")])
    assert not held.holds([Turn(role="user", content=f"before {' '.join(words[:12])} after")])
