"""`cai run`: many prompts, one trajectory a row, through broken rows, kills and Ctrl-C."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_support import BALANCED, cai, start, trajectories
from wire import under


def test_run_sums_up_and_says_what_to_type_next(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED, violates=lambda shown: "answer to 3" in shown))
    (tmp_path / "p.csv").write_text("kind,ask\n" + "".join(f"k,{n}\n" for n in range(5)))
    ended = cai(tmp_path, "run", "p.csv", "--column", "ask", "--model", server.spec)
    assert "5 of 5 prompts are answered." in ended.stdout
    assert "4 KEPT, 1 REVISED; 20% revised" in ended.stdout
    assert "cai log list" in ended.stdout
    assert len(re.findall(r"^\d/5 (KEPT|REVISED)", ended.stderr, re.MULTILINE)) == 5
    again = cai(tmp_path, "run", "p.csv", "--column", "ask", "--model", server.spec)
    assert "5 of 5 rows were answered before" in again.stderr
    assert len(trajectories(tmp_path)) == 5


def test_a_broken_row_is_reported_by_its_line_and_the_rest_runs(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{broken\n{"prompt": "c"}\n')
    ended = cai(tmp_path, "run", "p.jsonl", "--model", server.spec, status=3)
    assert "line 2 skipped: not JSON" in ended.stderr
    assert "1 row skipped; to try again: cai run p.jsonl" in ended.stderr
    assert "2 of 3 prompts are answered." in ended.stdout
    assert sorted(t.prompt for t in trajectories(tmp_path)) == ["a", "c"]


def test_a_lone_surrogate_that_no_api_takes_fails_its_row_and_is_logged_as_it_stands(
    tmp_path: Path, serve: Any
) -> None:
    server = serve(under(BALANCED))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "c \\ud800"}\n')
    ended = cai(tmp_path, "run", "p.jsonl", "--model", server.spec, status=3)
    assert "line 2 skipped: UnicodeEncodeError" in ended.stderr
    outcomes = {t.prompt: t.outcome.value for t in trajectories(tmp_path)}
    assert outcomes == {"a": "KEPT", "c \ud800": "FAILED"}


@pytest.mark.parametrize(
    ("content", "args", "said"),
    [
        ("", (), "p.jsonl holds no row"),
        (
            '{"ask": "a", "id": 1}\n' * 30,
            ("--column", "asked"),
            "no key 'asked': .* keys 'ask', 'id'; say which",
        ),
        ('{"ask": "a"}\n', (), "no key 'messages' or 'prompt': .* keys 'ask'; say which with --column"),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_error_and_no_log(
    tmp_path: Path, content: str, args: tuple[str, ...], said: str
) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    ended = cai(tmp_path, "run", "p.jsonl", "--model", "http://127.0.0.1:9/v1#m", *args, status=1)
    assert re.search(said, ended.stderr)
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "cai.db").exists()


def test_standard_input_is_resumable_too(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    args = ("run", "-", "--format", "text", "--model", server.spec)
    cai(tmp_path, *args, input=b"eins\nzwei\n")
    calls = len(server.requests)
    cai(tmp_path, *args, input=b"eins\nzwei\n")
    assert (len(server.requests), len(trajectories(tmp_path))) == (calls, 2)


def test_what_to_type_again_says_that_standard_input_is_needed_again(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    args = ("run", "-", "--format", "jsonl", "--model", server.spec)
    said = cai(tmp_path, *args, input=b'{"prompt": "eins"}\n{"prompt": 2}\n', status=3).stderr
    assert "1 row skipped; to try again with the same input: cai run - --format jsonl" in said


class Gate:
    """Answers so many drafts at once, and the others when it is opened."""

    def __init__(self, free: int) -> None:
        self.reached = threading.Event()
        self._free = free
        self._open = threading.Event()
        self._lock = threading.Lock()

    def open(self) -> None:
        self._open.set()

    def draft(self, prompt: str) -> str:
        with self._lock:
            self._free -= 1
            waits = self._free < 0
        if waits:
            self.reached.set()
            self._open.wait(60)
        return f"answer to {prompt}"


def test_killed_in_the_middle_it_resumes_to_exactly_one_trajectory_a_row(tmp_path: Path, serve: Any) -> None:
    gate = Gate(free=17)
    server = serve(under(BALANCED, draft=gate.draft))
    (tmp_path / "p.txt").write_text("".join(f"prompt {n % 7}\n" for n in range(40)))
    args = ("run", "p.txt", "--model", server.spec, "--concurrency", "4")
    process = start(tmp_path, *args)
    assert gate.reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    gate.open()
    before = len(trajectories(tmp_path))
    assert 0 < before < 40
    ended = cai(tmp_path, *args)
    assert f"{before} of 40 rows were answered before" in ended.stderr
    rows = [int(str(t.source).rpartition("/")[2]) for t in trajectories(tmp_path)]
    assert sorted(rows) == list(range(40))


def interrupt(process: subprocess.Popen[str], gate: Gate) -> None:
    """Press Ctrl-C at the gate, and wait until it is heard."""
    assert gate.reached.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("finishing" in line for line in process.stderr)


def test_ctrl_c_finishes_what_is_under_way_and_says_how_to_go_on(tmp_path: Path, serve: Any) -> None:
    gate = Gate(free=3)
    server = serve(under(BALANCED, draft=gate.draft))
    (tmp_path / "p.txt").write_text("".join(f"{n}\n" for n in range(20)))
    args = ("run", "p.txt", "--model", server.spec, "--concurrency", "2")
    process = start(tmp_path, *args)
    interrupt(process, gate)
    gate.open()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"type again: cai {shlex.join(args)}" in err
    found = trajectories(tmp_path)
    assert 3 <= len(found) <= 5
    assert {t.outcome.value for t in found} == {"KEPT"}
    assert f"{len(found)} of 20 prompts are answered." in out
    cai(tmp_path, *args)
    assert len(trajectories(tmp_path)) == 20


def test_a_second_ctrl_c_drops_what_is_under_way(tmp_path: Path, serve: Any) -> None:
    gate = Gate(free=3)
    server = serve(under(BALANCED, draft=gate.draft))
    (tmp_path / "p.txt").write_text("".join(f"{n}\n" for n in range(20)))
    args = ("run", "p.txt", "--model", server.spec, "--concurrency", "2")
    process = start(tmp_path, *args)
    interrupt(process, gate)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    gate.open()
    assert process.returncode == 130, err
    cai(tmp_path, *args)
    answered = [t.source for t in trajectories(tmp_path) if t.outcome.value == "KEPT"]
    assert len(answered) == len(set(answered)) == 20
