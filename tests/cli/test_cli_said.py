"""What `cai` says of input that cannot be meant, of Ctrl-C, and of what was lost; and the exit statuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli_support import BALANCED, cai, commands, start
from log_support import fill
from wire import Reply, serving, under

from cai_graph import open_log
from trainers import critic
from trainers.config import read

# --- files that cannot be meant -----------------------------------------------------------------------


@pytest.mark.parametrize("mark", [";", "\t"])
@pytest.mark.parametrize("named", [(), ("--column", "prompt")])
def test_columns_of_another_separator_are_not_asked_as_whole_lines(
    tmp_path: Path, mark: str, named: tuple[str, ...]
) -> None:
    (tmp_path / "p.csv").write_text(f"id{mark}prompt\n1{mark}How are you?\n")
    ended = cai(tmp_path, "run", "p.csv", "--model", "http://127.0.0.1:9/v1#m", *named, status=1)
    assert f"separated by {mark!r}, and those of CSV by ','; save the file with commas" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "cai.db").exists()


def test_a_column_that_holds_such_a_mark_is_asked_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("question; in a word\nHow are you?\n")
    with serving(under(BALANCED)) as server:
        cai(tmp_path, "run", "p.csv", "--model", server.spec, "--column", "question; in a word")
    with open_log(tmp_path / "cai.db", read_only=True) as log:
        assert [record.prompt for record in log.read(kind="trajectory")] == ["How are you?"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_an_answer_passes_no_gate(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    args = ("judge", "a.jsonl", "--critic", "http://127.0.0.1:9/v1#m", "--fail-on", "violates")
    assert cai(tmp_path, *args, status=1).stderr.startswith("a.jsonl holds no answer; give it a row")


@pytest.mark.parametrize("command", ["run", "judge"])
def test_standard_input_that_the_shell_has_closed_is_said(tmp_path: Path, command: str) -> None:
    option = "--model" if command == "run" else "--critic"
    words = [sys.executable, "-m", "cai_graph.cli", command, "-", option, "http://127.0.0.1:9/v1#m"]
    words += ["--format", "text"] if command == "run" else []
    line = f"{shlex.join(words)} <&-"
    ended = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "standard input is closed; name a file, or redirect one into it\n"


def test_a_question_whose_bytes_are_no_text_is_refused_and_not_logged(tmp_path: Path) -> None:
    c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "cai_graph.cli", "ask", "café", "--model", "http://127.0.0.1:9/v1#m"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | c)
    assert ended.returncode == 2
    assert "not UTF-8 in this locale; set LC_ALL=C.UTF-8" in ended.stderr
    assert not (tmp_path / "cai.db").exists()


def test_a_reply_that_is_none_is_said_in_a_line(tmp_path: Path) -> None:
    replies = [
        '{"error": {"message": "overloaded"}}',
        "<html>log in</html>",
        '{"choices": []}',
        '{"choices": null}',
    ]

    class Strange(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reply = replies[0].encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if reply.startswith(b"<") else "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Strange)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    spec = f"http://127.0.0.1:{server.server_port}/v1#m"
    try:
        while replies:
            said = cai(tmp_path, "ask", "hi", "--model", spec, status=1).stderr
            assert said.startswith(f"{spec}: the app failed: the provider sent a reply")
            assert len(said.splitlines()) == 1
            assert "overloaded" in said or len(replies) < 4
            replies.pop(0)
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_of_ones_own_that_wants_a_key_says_how_it_gets_one(tmp_path: Path) -> None:
    with serving(lambda body: Reply("no", status=401)) as server:
        ask = ("ask", "hi", "--model", server.spec)
        without = cai(tmp_path, *ask, status=1, env={"OPENAI_API_KEY": "sk"}).stderr
        paired = {"OPENAI_API_KEY": "sk", "OPENAI_BASE_URL": server.url}
        refused = cai(tmp_path, *ask, status=1, env=paired).stderr
    assert f"set OPENAI_API_KEY to it, and OPENAI_BASE_URL={server.url} (" in without
    assert "the provider refused the API key" in refused


def test_a_server_that_does_not_say_its_model_may_want_a_key(tmp_path: Path) -> None:
    said = cai(tmp_path, "ask", "hi", "--model", "http://127.0.0.1:9/v1", status=1).stderr
    assert "set OPENAI_API_KEY, and OPENAI_BASE_URL=http://127.0.0.1:9/v1\n" in said


# --- Ctrl-C -------------------------------------------------------------------------------------------


def test_an_interrupted_judge_does_not_say_that_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    asked, over = threading.Event(), threading.Event()

    def waits(body: Any) -> str:
        asked.set()
        over.wait(60)
        return "late"

    with serving(waits) as server:
        process = start(tmp_path, "judge", "a.jsonl", "--critic", server.spec)
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        over.set()
    assert (process.returncode, err) == (130, "interrupted\n")


def test_an_interrupted_download_says_that_it_goes_on(tmp_path: Path) -> None:
    asked, over = threading.Event(), threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            over.wait(60)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Slow) as hub:
        thread = threading.Thread(target=hub.handle_request, daemon=True)
        thread.start()
        env = {"CAI_CACHE": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        process = start(tmp_path, "model", "get", "qwen2.5-1.5b", env=env)
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        over.set()
        thread.join()
    assert process.returncode == 130
    assert err == "interrupted; to go on, type again: cai model get qwen2.5-1.5b\n"


# --- the log ------------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """A folder whose log has four trajectories."""
    with open_log(tmp_path / "cai.db") as log:
        fill(log, 4)
    return tmp_path


def test_a_recovery_that_lost_records_has_a_status_of_its_own(logged: Path) -> None:
    assert cai(logged, "log", "recover", "whole.db").stderr == ""
    with sqlite3.connect(logged / "cai.db") as db:
        db.execute("UPDATE records SET payload = CAST(payload || ' ' AS BLOB) WHERE position = 1")
    db.close()
    ended = cai(logged, "log", "recover", "new.db", "--json", status=3)
    assert json.loads(ended.stdout)["records"] == 3
    assert (
        ended.stderr == "1 damaged record could not be saved; by the writers' numbers 1 are missing in all\n"
    )


@pytest.mark.parametrize("content", ["no database at all\n" * 100, ""])
def test_a_recovery_that_found_nothing_fails_and_writes_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "cai.db").write_text(content)
    assert "no intact record of a log" in cai(tmp_path, "log", "recover", "new.db", status=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cai.db"]


def test_what_is_no_database_may_have_been_a_log(tmp_path: Path) -> None:
    (tmp_path / "cai.db").write_text("no database at all\n" * 100)
    assert "if it was a log, `cai log recover` saves" in cai(tmp_path, "log", "list", status=1).stderr


def test_gc_makes_no_log_where_there_is_none(tmp_path: Path) -> None:
    gc = ("log", "gc", "--days", "1", "--yes")
    assert "`cai ask` makes one, or name another" in cai(tmp_path, *gc, status=1).stderr
    (tmp_path / "cai.db").touch()
    assert "the file is empty" in cai(tmp_path, *gc, status=1).stderr
    assert (tmp_path / "cai.db").stat().st_size == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_standard_output_takes_no_parquet(logged: Path) -> None:
    ended = cai(logged, "log", "export", "-", "--format", "parquet", status=2)
    assert "standard output takes JSONL alone" in ended.stderr
    assert ended.stdout == ""
    assert len(cai(logged, "log", "export", "-", "--format", "jsonl").stdout.splitlines()) == 4


# --- the help -----------------------------------------------------------------------------------------


def test_the_example_of_a_critic_says_all_that_it_needs() -> None:
    (command,) = (one for path, one in commands() if path == ("train", "critic"))
    words = command.epilog.split()
    settings = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    assert read(critic.Config, None, settings).model == "local"


def test_each_set_has_its_short_form() -> None:
    for path, command in commands():
        for parameter in command.params:
            assert "--set" not in parameter.opts or "-s" in parameter.opts, path
