"""`cai log`: what it lists, exports, verifies and removes; and what is made of a log."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cli_support import BALANCED, cai, trajectories
from log_support import trajectory
from postgres_server import Server as PostgreSQL
from wire import under

from cai_graph.cli import log as log_commands
from cai_graph.log import open_log
from cai_graph.trajectory import Message


@pytest.fixture
def logged(tmp_path: Path, serve: Any) -> Path:
    """A folder whose log has three trajectories, one of them revised."""
    server = serve(under(BALANCED, violates=lambda shown: "answer to 1" in shown))
    (tmp_path / "p.txt").write_text("0\n1\n2\n")
    cai(tmp_path, "run", "p.txt", "--model", server.spec)
    return tmp_path


def test_the_log_is_listed_counted_and_shown(logged: Path) -> None:
    listed = cai(logged, "log", "list", "--outcome", "REVISED").stdout
    (revised,) = [t for t in trajectories(logged) if t.outcome.value == "REVISED"]
    assert revised.id in listed
    assert len(listed.splitlines()) == 2
    stats = json.loads(cai(logged, "log", "stats", "--json").stdout)
    assert (stats["trajectories"], stats["outcomes"]) == (3, {"KEPT": 2, "REVISED": 1})
    assert "KEPT 2" in cai(logged, "log", "stats").stdout
    shown = json.loads(cai(logged, "log", "show", revised.id, "--json").stdout)
    assert shown["id"] == revised.id
    lines = cai(logged, "log", "list", "--json", "--limit", "2").stdout.splitlines()
    assert [json.loads(line)["record"] for line in lines] == ["trajectory", "trajectory"]


def test_an_export_by_a_filter_takes_feedback_along(logged: Path) -> None:
    kept, revised = (next(t.id for t in trajectories(logged) if t.outcome == o) for o in ("KEPT", "REVISED"))
    for id in (kept, revised):
        cai(logged, "feedback", "add", id, "--score", "1")
    cai(logged, "log", "export", "out.jsonl", "--outcome", "REVISED")
    out = cai(logged, "log", "export", "-", "--outcome", "REVISED").stdout
    assert out == (logged / "out.jsonl").read_text()
    assert [json.loads(line).get("trajectory_id", revised) for line in out.splitlines()] == [revised, revised]


def test_an_export_reads_back_equal(logged: Path) -> None:
    cai(logged, "log", "export", "out.jsonl")
    assert cai(logged, "log", "export", "-").stdout == (logged / "out.jsonl").read_text()
    cai(logged, "log", "import", "out.jsonl", "--log", "copy.db")
    cai(logged, "log", "export", "again.jsonl", "--log", "copy.db")
    assert (logged / "again.jsonl").read_bytes() == (logged / "out.jsonl").read_bytes()
    (logged / "out.jsonl").write_text("{broken\n")
    assert "line 1 skipped" in cai(logged, "log", "import", "out.jsonl", status=3).stderr


def test_the_log_is_verified_recovered_and_cleaned(logged: Path) -> None:
    assert json.loads(cai(logged, "log", "verify", "--json").stdout)["records"] == 3
    dry = json.loads(cai(logged, "log", "gc", "--days", "0", "--dry-run", "--json").stdout)
    assert dry["trajectories"] == 3
    with sqlite3.connect(logged / "cai.db") as db:
        db.execute("UPDATE records SET payload = CAST(payload || ' ' AS BLOB) WHERE position = 1")
    db.close()
    assert "cai log recover" in cai(logged, "log", "verify", status=1).stderr
    assert json.loads(cai(logged, "log", "recover", "new.db", "--json", status=3).stdout)["records"] == 2
    cai(logged, "log", "verify", "--log", "new.db")
    gc = ("log", "gc", "--days", "0", "--log", "new.db", "--yes", "--json")
    removed = json.loads(cai(logged, *gc).stdout)
    assert removed["trajectories"] == 2


def test_what_is_removed_is_named_and_asked_about_on_a_terminal(
    logged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc = ("log", "gc", "--days", "0")
    dry = cai(logged, *gc, "--dry-run").stdout
    assert re.search(r"would be removed: trajectories +3 *\nwould be removed: about them +0 *\n", dry)
    monkeypatch.setattr(log_commands, "is_attended", lambda: True)
    refused = cai(logged, *gc, input=b"n\n", status=1)
    assert "Remove 3 trajectories for good, and 0 records about them?" in refused.stderr
    assert len(trajectories(logged)) == 3
    removed = cai(logged, *gc, "--yes")
    assert "Remove" not in removed.stderr
    assert re.search(r"^removed: trajectories +3 *\nremoved: about them +0 *\nkept: reviewed", removed.stdout)
    assert "Remove" not in cai(logged, *gc).stderr  # nothing is left to ask about


def test_what_may_hold_removed_texts_beside_the_log_is_named(logged: Path) -> None:
    (logged / "cai.db-wal.left-20261130T000000.000000").touch()
    removed = cai(logged, "log", "gc", "--days", "0", "--yes")
    assert re.search(r"overwritten on the disk +not yet", removed.stdout)
    assert "cai.db-wal.left-20261130T000000.000000: saved of a WAL" in removed.stderr


def test_nothing_is_removed_unasked_where_there_is_no_terminal(logged: Path) -> None:
    refused = cai(logged, "log", "gc", "--days", "0", input=b"n\n" * 9, status=2)
    assert "there is no terminal to ask at" in refused.stderr
    assert len(trajectories(logged)) == 3
    cai(logged, "log", "gc", "--days", "0", "--yes")
    assert not trajectories(logged)


def test_ctrl_c_at_the_question_is_an_interrupt_and_removes_nothing(logged: Path) -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cai_graph.cli", "log", "gc", "--days", "0"],
        cwd=logged,
        stdin=its,
        stdout=subprocess.DEVNULL,
        stderr=its,
    )
    os.close(its)
    said = b""
    while b"[y/N]" not in said:
        said += os.read(ours, 1024)
    while process.poll() is None:  # again where it came between the question and the wait for its answer
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
    os.close(ours)
    assert process.returncode == 130
    assert len(trajectories(logged)) == 3


def test_a_dataset_without_a_test_part_says_so_and_errors_name_options(logged: Path) -> None:
    build = ("dataset", "build", "--kind", "sft", "--near-duplicates", "0")
    made = cai(logged, *build, "-o", "made", "--test-share", "1e-6")
    assert "no prompt fell to the test part; raise --test-share (now 1e-06)" in made.stderr
    assert not (logged / "made" / "test.jsonl").exists()
    whole = cai(logged, *build, "-o", "all", "--test-share", "0", "--without-user", "anne")
    assert "no prompt fell" not in whole.stderr
    assert "--without-user anne: no trajectory is of this user" in whole.stderr
    assert "--test-share is a share" in cai(logged, *build, "-o", "x", "--test-share", "2", status=1).stderr
    said = cai(logged, *build, "-o", "x", "--max-tokens", "9", status=1).stderr
    assert "--tokenizer and --max-tokens belong together" in said


@pytest.mark.parametrize("days", ["inf", "1e9", "nan", "800000"])
def test_a_number_of_days_that_no_calendar_has_is_a_usage_error(logged: Path, days: str) -> None:
    assert "Invalid value for" in cai(logged, "log", "gc", "--days", days, status=2).stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("args", [("log", "list"), ("log", "export", "-"), ("--help",)])
def test_a_full_disk_behind_standard_output_is_one_line(logged: Path, args: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "cai_graph.cli", *args],
            cwd=logged,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert ended.returncode == 1
    assert ended.stderr == "what was to be written is not whole: No space left on device\n"


@pytest.mark.parametrize("args", [("log", "export", "-"), ("log", "list", "--json")])
def test_lines_for_a_standard_output_that_is_closed_are_an_error(logged: Path, args: tuple[str, ...]) -> None:
    command = shlex.join([sys.executable, "-m", "cai_graph.cli", *args])
    ended = subprocess.run(f"{command} >&-", shell=True, cwd=logged, stderr=subprocess.PIPE, text=True)

    assert ended.returncode == 1
    assert ended.stderr == "standard output is closed; redirect it into a file or a pipe\n"


@pytest.mark.parametrize(
    "settings",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}],
)
def test_what_an_encoding_of_the_terminal_lacks_is_escaped(logged: Path, settings: dict[str, str]) -> None:
    with open_log(logged / "cai.db") as log:
        log.append(trajectory(messages=(Message(role="user", content="\N{SNOWMAN}" * 99),))).result()
    listing = [sys.executable, "-m", "cai_graph.cli", "log", "list", "--limit", "1"]
    env = {**os.environ, **settings}
    ended = subprocess.run(listing, cwd=logged, env=env, capture_output=True, text=True)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert r"\u2603\u2603" in ended.stdout


def test_a_log_that_cannot_be_written_says_so_once() -> None:
    script = """
import os, sys
import cai_graph.show
from cai_graph.cli import main
folder, about = sys.argv[1:]
sys.argv = ["cai", "feedback", "add", about, "--score", "1", "--log", f"{folder}/cai.db"]
try:
    main()  # which imports what another user may not read
except SystemExit as ended:
    assert not ended.code
os.chmod(f"{folder}/cai.db", 0o444)
if os.getuid() == 0:
    os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
main()
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        with open_log(f"{folder}/cai.db") as log:
            log.append(about := trajectory()).result()
        ended = subprocess.run(
            [sys.executable, "-c", script, folder, about.id], cwd="/", capture_output=True, text=True
        )

    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "check its permissions" in ended.stderr


@pytest.mark.parametrize("args", [("run", f"{'x' * 300}.txt"), ("log", "list", "--log", f"{'x' * 300}.db")])
def test_a_file_that_cannot_be_looked_at_is_one_line(tmp_path: Path, args: tuple[str, ...]) -> None:
    said = cai(tmp_path, *args, status=1).stderr.splitlines()
    assert len(said) == 1
    assert "File name too long" in said[0]


def test_a_log_of_a_newer_release_is_refused_and_unchanged(logged: Path) -> None:
    with sqlite3.connect(logged / "cai.db") as db:
        db.execute("PRAGMA user_version = 99")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    before = (logged / "cai.db").read_bytes()
    (logged / "q.txt").write_text("more\n")
    for args in (("log", "list"), ("log", "stats"), ("run", "q.txt", "--model", "http://127.0.0.1:9/v1#m")):
        assert "upgrade cai-graph" in cai(logged, *args, status=1).stderr
    assert (logged / "cai.db").read_bytes() == before


def test_a_log_in_postgresql_takes_the_same_commands_and_no_password_is_shown(
    tmp_path: Path, serve: Any, postgres: PostgreSQL
) -> None:
    url = postgres.url(postgres.database(1)).replace("postgres@", "postgres:s3cret@")
    option = ("--log", url)
    server = serve(under(BALANCED, violates=lambda shown: "answer to 1" in shown))
    (tmp_path / "p.txt").write_text("0\n1\n2\n")
    said = [cai(tmp_path, "run", "p.txt", "--model", server.spec, *option)]
    listed = cai(tmp_path, "log", "list", *option, "--outcome", "REVISED")
    (id, *_) = listed.stdout.splitlines()[1].split()
    stats = cai(tmp_path, "log", "stats", "--json", *option)
    assert json.loads(stats.stdout)["outcomes"] == {"KEPT": 2, "REVISED": 1}
    shown = cai(tmp_path, "log", "show", id, "--json", *option)
    assert json.loads(shown.stdout)["id"] == id
    verified = cai(tmp_path, "log", "verify", "--json", *option)
    assert json.loads(verified.stdout)["records"] == 3
    said += [listed, stats, shown, verified, cai(tmp_path, "log", "export", "out.jsonl", *option)]
    # From one database to the other, and nothing twice.
    said.append(cai(tmp_path, "log", "import", "out.jsonl", "--log", "copy.db"))
    cai(tmp_path, "log", "export", "copy.jsonl", "--log", "copy.db")
    assert (tmp_path / "copy.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    again = cai(tmp_path, "log", "import", "out.jsonl", *option)
    assert "3 were there already" in again.stderr
    recovered = cai(tmp_path, "log", "recover", "new.db", *option, status=1)
    assert "PostgreSQL recovers itself" in recovered.stderr
    removed = cai(tmp_path, "log", "gc", "--days", "0", "--yes", "--json", *option)
    assert json.loads(removed.stdout)["trajectories"] == 3
    said += [again, recovered, removed, cai(tmp_path, "log", "show", id, *option, status=1)]
    said.append(cai(tmp_path, "log", "list", "--log", url.replace("/test1", "/absent"), status=1))
    assert "s3cret" not in repr(said)
