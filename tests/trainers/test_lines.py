"""JSON lines that grow: what a kill tears is lost and no more, and damage is never passed over."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cai_graph.errors import DataError
from trainers import lines
from trainers.lines import Lines, Row


def ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Have no file grow past so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- files that are resumed ---------------------------------------------------------------------------


def test_a_file_that_is_not_there_has_no_rows_and_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert lines.read(path) == lines.resume(path) == []
    lines.keep(path, lambda row: True)
    assert not path.exists()


def test_a_torn_line_is_cut_off_before_the_next_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines.append(path, {"id": 1})
    with path.open("ab") as file:
        file.write('{"id": 2, "text": "€'.encode()[:-1])

    assert lines.resume(path) == [{"id": 1}]
    lines.append(path, {"id": 3})
    assert ids(path) == [1, 3]


def test_a_file_with_nothing_but_a_torn_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}')
    assert lines.resume(path) == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("read", [lines.read, lines.resume])
@pytest.mark.parametrize("damaged", [b"not json", b"", b"\xff", b"\0\0\0\0"])
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_lost(
    tmp_path: Path, read: Callable[[Path, str], list[Row]], damaged: bytes
) -> None:
    path = tmp_path / "rows.jsonl"
    content = b'{"id": 1}\n' + damaged + b'\n{"id": 3}\n'
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"rows.jsonl line 2: no JSON: .*; name another file$"):
        read(path, "name another file")
    with pytest.raises(DataError, match=r"rows.jsonl line 2: no JSON: .*; delete the file and run again$"):
        lines.keep(path, lambda row: True)
    assert path.read_bytes() == content


def test_a_file_that_is_said_to_be_whole_may_not_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": ')
    with pytest.raises(DataError, match=r"rows.jsonl line 2: no JSON"):
        lines.read(path)


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\rb\nc", "a\ud800b"])
def test_no_text_breaks_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    lines.append(path, {"text": text})
    lines.append(path, {"text": text})
    assert lines.read(path) == lines.resume(path) == [{"text": text}] * 2
    lines.keep(path, lambda row: True)
    assert lines.read(path) == [{"text": text}] * 2


def test_what_is_not_wanted_goes_and_a_kill_meanwhile_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    for number in range(4):
        lines.append(path, {"id": number})

    def killed(from_: object, to: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            lines.keep(path, lambda row: row["id"] < 2)
    assert ids(path) == [0, 1, 2, 3]

    lines.keep(path, lambda row: row["id"] < 2)
    lines.append(path, {"id": 2})
    assert ids(path) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_is_there_when_the_process_is_killed_right_after(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import os, pathlib, sys\nfrom trainers import lines\n"
        "for n in range(3): lines.append(pathlib.Path(sys.argv[1]), {'id': n})\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert ids(path) == [0, 1, 2]


def test_a_row_that_a_full_disk_cut_off_is_an_error_and_goes_when_the_file_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines.append(path, {"id": 1})
    with full_disk(20), pytest.raises(OSError, match="too large"):
        lines.append(path, {"id": 2, "text": "x" * 100})
    assert path.stat().st_size == 20
    assert lines.resume(path) == [{"id": 1}]


# --- files that take their name when they are whole ---------------------------------------------------


def test_a_torn_line_is_lost_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Lines(path, ["id"]) as kept:
        kept.add({"id": 1})
    with (tmp_path / "rows.jsonl.part").open("ab") as file:
        file.write(b'{"id": 2, "text": "to')
    assert not path.exists()

    with Lines(path, ["id"]) as kept:
        assert list(kept.rows) == [(1,)]
        kept.add({"id": 2})
        kept.finish()

    assert ids(path) == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_kill_between_the_whole_file_and_the_end_of_the_part_loses_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    path.with_name("rows.jsonl.part").write_text('{"id": 2, "new": true}\n')

    with Lines(path, ["id"]) as kept:
        kept.add({"id": 3})
        kept.finish()

    assert lines.read(path) == [{"id": 1}, {"id": 2, "new": True}, {"id": 3}]
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Lines(path, ["id"]) as kept:
        kept.add({"id": 1})
        with pytest.raises(DataError, match="another run is writing it"), Lines(path, ["id"]):
            pass
        kept.finish()
    assert path.exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.part"])
def test_a_damaged_file_names_its_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"id": 1}\nnot json\n')

    with pytest.raises(DataError, match=rf"{name} line 2: no JSON"), Lines(tmp_path / "rows.jsonl", ["id"]):
        pass


def test_a_full_disk_is_said_in_our_own_words(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def write() -> None:
        with Lines(path, ["id"]) as kept:
            kept.add({"id": 1})
            kept.add({"id": 2, "text": "x" * 100})

    said = r"rows.jsonl.part: cannot be written: .*; make room, run again"
    with full_disk(60), pytest.raises(DataError, match=said):
        write()

    with Lines(path, ["id"]) as kept:
        assert list(kept.rows) == [(1,)]
