"""Files of rows, in the forms that others write, and the prompts in them."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from cai_graph.errors import ConfigError, DataError
from trainers.tables import each, parquet, prompts_in, rows, without_nulls

ROWS: list[dict[str, Any]] = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def lines_of(found: list[Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in found)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def as_parquet(path: Path, found: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path)
    return path


# --- rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("set.jsonl", lines_of(ROWS)),
        ("set.ndjson", "\ufeff" + lines_of(ROWS)),
        ("set.JSONL.gz", lines_of(ROWS)),
        ("set.json", json.dumps(ROWS, indent=2)),
        ("set.json", "\ufeff" + json.dumps(ROWS)),
        ("set.json.gz", json.dumps(ROWS)),
        ("set.json", lines_of(ROWS)),
        ("set.json.gz", lines_of(ROWS)),
        ("set.json", json.dumps({"version": 1, "data": ROWS})),
        ("set.json", json.dumps({"version": 1, "data": ROWS}, indent=2)),
        ("set.jsonl", json.dumps(ROWS)),
        ("set.jsonl", "\ufeff\n" + json.dumps(ROWS, indent=2)),
        ("set.jsonl.gz", json.dumps(ROWS, indent=2)),
    ],
)
def test_rows_are_the_same_in_each_form(tmp_path: Path, name: str, text: str) -> None:
    assert list(rows(written(tmp_path, name, text))) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_rows_number_is_its_line_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "set.jsonl", f"\n{json.dumps(ROWS[0])}\n \n{json.dumps(ROWS[1])}")

    assert list(rows(path)) == [(2, ROWS[0]), (4, ROWS[1])]


def test_a_mark_alone_on_the_first_line_is_no_row(tmp_path: Path) -> None:
    for name in ("set.jsonl", "set.json"):
        path = written(tmp_path, name, f"\ufeff\n{lines_of(ROWS)}")
        assert list(rows(path)) == [(2, ROWS[0]), (3, ROWS[1])]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "a"}], "tags": ["b"]},
        {"question": "a", "tags": ["b"]},
        {"chosen": [{"role": "user", "content": "a"}], "rejected": []},
    ],
)
def test_a_row_alone_is_no_table(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    assert list(rows(written(tmp_path, "set.json", json.dumps(row, indent=indent)))) == [(1, row)]
    assert list(rows(written(tmp_path, "set.jsonl", json.dumps(row)))) == [(1, row)]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("set.json", "set.jsonl", "set.json.gz"):
        assert list(rows(written(tmp_path, name, "\n"))) == []


def test_lines_are_read_as_they_are_needed(tmp_path: Path) -> None:
    path = written(tmp_path, "set.json", lines_of([{"text": "x" * 1000}] * 20_000))

    tracemalloc.start()
    found = each(path)
    next(found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < path.stat().st_size / 20
    found.close()


def test_parquet_is_read_in_batches_whole_or_by_columns(tmp_path: Path) -> None:
    many = [{"n": n, "text": str(n)} for n in range(2500)]
    path = as_parquet(tmp_path / "set.parquet", many)

    assert list(rows(path)) == list(enumerate(many, 1))
    assert list(parquet(path, ["n"])) == [{"n": n} for n in range(2500)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("set.jsonl", '{"a": 1}\n{no\n', r"set\.jsonl line 2: not JSON: Expecting"),
        ("set.jsonl", '"text"\n', r"set\.jsonl line 1: a row is an object, found str"),
        ("set.json", '[{"a": 1},\n7]', r"set\.json row 2: a row is an object, found int"),
        ("set.json", "[1,", r"set\.json: cannot be read: not JSON: Expecting value"),
        ("set.json", '{"a": 1}', r"set\.json: cannot be read: it holds a JSON object; give an array of rows"),
        ("set.json", '{"tags": ["a"]}', r"set\.json: cannot be read: it holds a JSON object"),
        ("set.jsonl.gz", "", r"set\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("set.parquet", "no", r"set\.parquet: cannot be read as Parquet: "),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text or "no")

    with pytest.raises(DataError, match=said):
        list(rows(tmp_path / name))


def test_an_absent_file_and_a_name_that_does_not_say_the_form_are_errors(tmp_path: Path) -> None:
    for name in ("absent.jsonl", "absent.json", "absent.parquet"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read.*No such file"):
            list(rows(tmp_path / name))
    for name in ("set.csv", "set", "set.gz"):
        with pytest.raises(ConfigError, match=rf"{name}: the name does not say how it is written; end it in"):
            list(rows(tmp_path / name))


def test_a_row_that_cannot_be_read_costs_no_other(tmp_path: Path) -> None:
    for name in ("set.jsonl", "set.json"):
        path = written(tmp_path, name, f"{json.dumps(ROWS[0])}\n[1]\n{{no\n{json.dumps(ROWS[1])}\n")

        (_, first), (_, listed), (_, broken), last = each(path)

        assert (first, last) == (ROWS[0], (4, ROWS[1]))
        assert str(listed) == "a row is an object, found list"
        assert str(broken).startswith("not JSON: Expecting")


@pytest.mark.parametrize(("name", "text"), [("set.json", "{no"), ("set.jsonl", "[no"), ("set.jsonl", "{no")])
def test_a_first_line_that_cannot_be_read_costs_no_other(tmp_path: Path, name: str, text: str) -> None:
    (number, broken), *others = each(written(tmp_path, name, f"{text}\n{lines_of(ROWS)}"))

    assert (number, others) == (1, [(2, ROWS[0]), (3, ROWS[1])])
    assert str(broken).startswith("not JSON: Expecting")


def test_nulls_are_left_out_and_arguments_are_objects() -> None:
    def call(arguments: Any) -> dict[str, Any]:
        return {"function": {"name": "f", "arguments": arguments}}

    row = {"label": None, "turns": [{"role": "user", "name": None}, call('{"x": null}'), call(""), call("{")]}

    assert without_nulls(row) == {"turns": [{"role": "user"}, call({"x": None}), call({}), call("{")]}


# --- sets of prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("set.jsonl", '{"Goal": "a"}\n{"goal": "b", "text": "no"}\n'),
        ("set.jsonl", '{"instruction": "a", "input": ""}\n{"text": "b", "input": null}\n'),
        ("set.jsonl", '"a"\n"b"\n'),
        ("set.jsonl", '[{"role": "user", "content": "a"}]\n["b"]\n'),
        (
            "set.jsonl",
            lines_of(
                [
                    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
                    {"messages": [{"role": "system", "content": "no"}, {"role": "user", "content": "b"}]},
                ]
            ),
        ),
        ("set.jsonl", '{"turns": ["a", "b"]}'),
        ("set.jsonl", '["a", "b"]'),
        ("set.jsonl", json.dumps([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])),
        ("set.jsonl", json.dumps(ROWS)),
        ("set.jsonl", json.dumps(["a", "b"], indent=2)),
        ("set.json", '{"turns": ["a", "b"]}'),
        ("set.json", json.dumps(["a", "b"])),
        ("set.json", json.dumps({"prompts": ["a", "b"]})),
        ("set.json", json.dumps({"goal": ["a", "b"]})),
        ("set.json", json.dumps({"version": "1.0", "data": ROWS})),
        ("set.csv", "\ufeffprompt,label\na,safe\nb,"),
        ("set.csv.gz", "id,question\n1,a\n2,b\n"),
        ("set.txt", "\ufeffa\n\nb"),
        ("set.txt.gz", "a\r\nb\r\n"),
        ("set", "a\nb\n"),
    ],
)
def test_prompts_are_found_in_the_forms_that_others_write(tmp_path: Path, name: str, text: str) -> None:
    assert list(prompts_in(written(tmp_path, name, text))) == ["a", "b"]


def test_what_an_instruction_is_about_is_a_part_of_the_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": "Sum up.", "input": text} for text in ("One.", "Two.")]

    assert list(prompts_in(written(tmp_path, "set.jsonl", lines_of(rows)))) == [
        "Sum up.\n\nOne.",
        "Sum up.\n\nTwo.",
    ]


def test_prompts_are_found_in_parquet(tmp_path: Path) -> None:
    assert list(prompts_in(as_parquet(tmp_path / "set.parquet", ROWS))) == ["a", "b"]


@pytest.mark.parametrize(
    "found",
    [
        {"a": ["x"], "b": ["y"]},
        {"goal": ["x"], "target": ["y"]},
        {"drugs": {"a": ["x"]}},
        {"tag": "x"},
        "a text",
        7,
    ],
)
def test_json_that_is_no_array_of_prompts_is_an_error_and_not_read_by_its_keys(
    tmp_path: Path, found: Any
) -> None:
    with pytest.raises(
        DataError, match=r"set\.json: cannot be read: it holds a JSON .* give an array of rows"
    ):
        list(prompts_in(written(tmp_path, "set.json", json.dumps(found))))


@pytest.mark.parametrize("name", ["set.jsonl.gz", "set.json.gz", "set.csv.gz", "set.txt.gz"])
def test_a_set_whose_compressed_file_is_cut_off_is_an_error(tmp_path: Path, name: str) -> None:
    many = [{"prompt": f"{n} {n * n}"} for n in range(2000)]
    text = json.dumps(many) if ".json." in name else lines_of(many)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode())[:-100])

    with pytest.raises(DataError, match=r"Compressed file ended before the end-of-stream marker"):
        list(prompts_in(path))
