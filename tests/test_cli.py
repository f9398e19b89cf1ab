"""`cai` as its users run it, over the real client, a server on the loopback and a real log."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import typer.main
from postgres_server import Server as PostgreSQL
from replies import verdicts
from wire import Reply, Script, Server, role, serving, under

from cai_graph import cli, open_log, policy
from cai_graph.cli import console, options
from cai_graph.cli import log as log_commands
from cai_graph.cli.specs import foreign
from cai_graph.constitution import load
from cai_graph.errors import ModelError
from cai_graph.trajectory import Trajectory

BALANCED = load("balanced")
PRINCIPLE = BALANCED.principles[0].model_dump(mode="json", exclude_defaults=True)
DOCS = Path(__file__).parent.parent / "docs" / "cli.md"


class Ended(NamedTuple):
    """What a finished `cai` said."""

    stdout: str
    stderr: str


def cai(
    folder: Path, *args: str, input: bytes = b"", status: int = 0, env: Mapping[str, str] | None = None
) -> Ended:
    """Run `cai` to its end in this process, and check its exit status. A traceback fails the test."""
    streams = (io.StringIO(), io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["cai", *args])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input)))
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        for name in ("out", "err"):
            patch.setattr(getattr(console, name), "_width", 200)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = Ended(streams[0].getvalue(), streams[1].getvalue())
    assert ended.value.code == status, said.stderr
    return said


def start(folder: Path, *args: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `cai` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cai_graph.cli", *args],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture
def serve() -> Iterator[Any]:
    contexts: list[Any] = []

    def make(script: Script) -> Server:
        contexts.append(serving(script))
        server: Server = contexts[-1].__enter__()
        return server

    yield make
    for context in contexts:
        context.__exit__(None, None, None)


def trajectories(folder: Path) -> list[Trajectory]:
    with open_log(folder / "cai.db", read_only=True) as log:
        return [record for record in log.read(kind="trajectory") if isinstance(record, Trajectory)]


# --- the commands themselves --------------------------------------------------------------------------


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    def walk(path: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk((*path, name), inner)
        else:
            yield path, command

    return walk((), typer.main.get_command(cli.app))


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=lambda value: str(value)[:40])
def test_every_command_has_a_sentence_an_example_and_its_place_in_the_docs(
    path: tuple[str, ...], command: Any
) -> None:
    name = " ".join(("cai", *path))
    assert command.help.splitlines()[0].rstrip().endswith(".")
    assert command.epilog.startswith(f"Example: {name}")
    section = re.search(rf"^#+ `{name}\b.*?(?=^#+ |\Z)", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert section, f"{name} is not in docs/cli.md"
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            menu = get_origin(parameter.type_descriptor.annotation) is Literal
            assert menu or str(parameter.metavar).isupper(), (
                f"{name} {parameter.name} has no name in capitals"
            )
            continue
        for option in parameter.opts:
            if option.startswith("--") and option not in ("--help", "--json", "--log"):
                assert f"`{option}" in section[0], f"{name} {option} is not in docs/cli.md"


def test_the_menus_are_those_of_the_policies() -> None:
    assert get_args(options.Strategy) == get_args(policy.Strategy)
    # A command has no checkpointer, so nothing can wait for a person there.
    assert (*get_args(options.Policy), "human") == get_args(policy.Policy)


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = ["langchain_core", "langgraph", "openai", "msgspec", "numpy", "torch", "apsw", "httpx"]
    code = (
        "import sys\nfrom cai_graph import cli\nsys.argv = ['cai', 'run', '--help']\n"
        f"try:\n    cli.main()\nexcept SystemExit:\n    print([m for m in {heavy} if m in sys.modules])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "[]"


def test_version_and_usage_errors(tmp_path: Path) -> None:
    assert re.fullmatch(r"cai-graph \d+\.\d+\.\d+\n", cai(tmp_path, "--version").stdout)
    assert "No such option" in cai(tmp_path, "ask", "hello", "--speed", "9", status=2).stderr
    assert "batched" in cai(tmp_path, "ask", "hello", "--strategy", "best", status=2).stderr


# --- ask ----------------------------------------------------------------------------------------------


def test_ask_shows_one_trajectory_and_logs_it(tmp_path: Path, serve: Any) -> None:
    server = serve(
        under(
            BALANCED,
            draft=lambda prompt: "Use lye and water.",
            violates=lambda shown: "lye" in shown,
            revise="Use soap and water.",
        )
    )
    shown = cai(tmp_path, "ask", "How do I clean it?", "--model", server.spec).stdout
    for part in ("Use lye and water.", "VIOLATES", BALANCED.principles[0].id, "[-lye-] {+soap+}", "REVISED"):
        assert part in shown
    (trajectory,) = trajectories(tmp_path)
    assert trajectory.id in shown
    again = cai(tmp_path, "log", "show", trajectory.id).stdout
    assert again == shown
    as_json = cai(tmp_path, "ask", "Again?", "--model", server.spec, "--json").stdout
    assert json.loads(as_json)["outcome"] == "REVISED"


def test_the_longest_draft_bounds_drafts_and_leaves_critics_room(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED, violates=lambda shown: "answer to" in shown))
    cai(tmp_path, "ask", "hello", "--model", server.spec, "--max-tokens", "50")
    bounds = [body.get("max_completion_tokens", body.get("max_tokens")) for body in server.requests]
    assert bounds == [50, None, 100, None]


def test_hostile_text_of_a_model_never_acts_on_the_terminal(tmp_path: Path, serve: Any) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 [bold]markup[/bold] \u202eturned \x9bC1"
    server = serve(under(BALANCED, draft=lambda prompt: hostile))
    ended = cai(tmp_path, "ask", "hello", "--model", server.spec)
    listed = cai(tmp_path, "log", "list").stdout
    for text in (ended.stdout, ended.stderr, listed):
        assert not set("\x1b\x07\u202e\x9b") & set(text)
    assert "[bold]markup[/bold]" in ended.stdout


def test_what_cannot_work_is_one_line_and_status_1(tmp_path: Path, serve: Any) -> None:
    server = serve(lambda body: Reply("quota is used up", status=400))
    for args, part in (
        (("ask", "hello", "--model", "opnai:gpt"), "openai"),
        (("ask", "hello", "--model", "openai:gpt-5-mini"), "OPENAI_API_KEY"),
        (("ask", "hello", "--model", server.spec, "--constitution", "balancd"), "balanced"),
        (("ask", "hello", "--model", server.spec, "--log", "mysql://x"), "sqlite:///"),
        (("ask", "hello", "--model", server.spec), "quota is used up"),
        (("run", "absent.csv", "--model", server.spec), "absent.csv"),
        (("log", "list", "--log", "other.db"), "other.db"),
        (("log", "show", "nonsense"), "nonsense"),
        (("constitution", "show", "nothing"), "nothing"),
        (("model", "get", "qwen"), "qwen2.5-1.5b"),
    ):
        ended = cai(tmp_path, *args, status=1)
        assert part in ended.stderr
        assert ended.stdout == ""
        assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_a_missing_extra_is_one_sentence_with_the_pip_command(tmp_path: Path) -> None:
    (tmp_path / "langchain_openai.py").write_text("raise ImportError('not installed')")
    process = start(
        tmp_path, "ask", "hello", "--model", "http://127.0.0.1:9/v1#m", env={"PYTHONPATH": str(tmp_path)}
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.splitlines()[0].endswith('pip install -e ".[openai]" in the folder of cai-graph')
    assert len(err.splitlines()) == 1


def piped(folder: Path, *args: str, **env: str) -> str:
    process = start(folder, *args, env=env)
    said, _ = process.communicate(timeout=60)
    return said


def test_what_is_piped_is_not_folded_unless_columns_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = piped(tmp_path, "doctor").splitlines()
    folded = piped(tmp_path, "doctor", COLUMNS="40").splitlines()
    assert max(map(len, folded)) <= 40 < max(map(len, whole))
    assert len(whole) < len(folded)
    assert not [line for line in whole if line != line.rstrip()]


# --- run ----------------------------------------------------------------------------------------------


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


def test_ctrl_c_finishes_what_is_under_way_and_says_how_to_go_on(tmp_path: Path, serve: Any) -> None:
    gate = Gate(free=3)
    server = serve(under(BALANCED, draft=gate.draft))
    (tmp_path / "p.txt").write_text("".join(f"{n}\n" for n in range(20)))
    args = ("run", "p.txt", "--model", server.spec, "--concurrency", "2")
    process = start(tmp_path, *args)
    assert gate.reached.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if "finishing" in line:
            break
    gate.open()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"type again: cai {' '.join(args)[:10]}" in err
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
    assert gate.reached.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if "finishing" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    gate.open()
    assert process.returncode == 130, err
    cai(tmp_path, *args)
    answered = [t.source for t in trajectories(tmp_path) if t.outcome.value == "KEPT"]
    assert len(answered) == len(set(answered)) == 20


# --- demo ---------------------------------------------------------------------------------------------


def test_the_demo_shows_each_outcome_and_says_what_to_type_next(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED, violates=lambda shown: "answer to Write a rude poem" in shown))
    shown = cai(tmp_path, "demo", "--model", server.spec).stdout
    assert "REVISED   harmful  Write a rude poem" in shown
    assert "5 prompts are benign, and none of them was refused." in shown
    (revised,) = [t for t in trajectories(tmp_path) if t.outcome.value == "REVISED"]
    assert f"cai log show {revised.id}" in shown
    cai(tmp_path, "demo", "--model", server.spec)
    assert len(trajectories(tmp_path)) == 28


def test_the_demo_fails_where_nothing_is_revised_or_a_benign_prompt_is_refused(
    tmp_path: Path, serve: Any
) -> None:
    kept = serve(under(BALANCED))
    assert "no prompt was revised" in cai(tmp_path, "demo", "--model", kept.spec, status=1).stderr
    wax = "candle wax"
    refusing = serve(under(BALANCED, violates=lambda shown: wax in shown or "rude poem" in shown))
    ended = cai(tmp_path, "demo", "--model", refusing.spec, status=1)
    assert "a benign prompt was refused" in ended.stderr


# --- judge --------------------------------------------------------------------------------------------


def answers(folder: Path, *responses: str) -> None:
    rows = [{"id": f"r{n}", "prompt": "p", "response": text} for n, text in enumerate(responses)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def judge(folder: Path, server: Server, *args: str, status: int = 0) -> tuple[list[Any], Ended]:
    ended = cai(folder, "judge", "a.jsonl", "--critic", server.spec, *args, status=status)
    return [json.loads(line) for line in ended.stdout.splitlines()], ended


def test_judge_writes_one_line_a_row_in_order_and_drafts_nothing(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED, violates=lambda shown: "awful" in shown))
    answers(tmp_path, "fine", "awful", "good")
    lines, ended = judge(tmp_path, server)
    assert [line["id"] for line in lines] == ["r0", "r1", "r2"]
    assert all(set(line) == {"id", "verdicts", "aims"} for line in lines)
    labels = [[verdict["label"] for verdict in line["verdicts"]] for line in lines]
    assert [found.count("VIOLATES") for found in labels] == [0, 1, 0]
    assert "3 answers: 1 violate, 0 unreadable, 0 could not be judged" in ended.stderr
    assert len(server.requests) == 3
    assert not (tmp_path / "cai.db").exists()


def test_judge_exit_status_says_whether_such_a_verdict_stands(tmp_path: Path, serve: Any) -> None:
    critic = under(BALANCED, violates=lambda shown: "awful" in shown)
    server = serve(lambda body: "garbage" if "odd" in str(body["messages"]) else critic(body))
    answers(tmp_path, "fine", "awful")
    judge(tmp_path, server, "--fail-on", "violates", status=1)
    judge(tmp_path, server, "--fail-on", "unreadable")
    answers(tmp_path, "fine", "odd")
    judge(tmp_path, server, "--fail-on", "violates")
    judge(tmp_path, server, "--fail-on", "violates", "--fail-on", "unreadable", status=1)


def test_a_row_that_cannot_be_judged_keeps_its_place_with_an_error(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "r"}\n{"prompt": "p"}\n[]\n')
    lines, ended = judge(tmp_path, server, status=3)
    assert [set(line) for line in lines] == [{"id", "verdicts", "aims"}, {"id", "error"}, {"id", "error"}]
    assert [line["id"] for line in lines] == [0, 1, 2]
    assert "line 2" in lines[1]["error"]
    assert "line 2" in ended.stderr


def test_judge_output_file_appears_whole_or_not_at_all(tmp_path: Path, serve: Any) -> None:
    critic = under(BALANCED)
    server = serve(critic)
    answers(tmp_path, "a", "b")
    lines, _ = judge(tmp_path, server, "-o", "v.jsonl")
    assert lines == []
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 2
    refusing = serve(lambda body: Reply("bad key", status=401))
    judge(tmp_path, refusing, "-o", "w.jsonl", status=1)
    assert not [path for path in tmp_path.iterdir() if "w.jsonl" in path.name]


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC])
def test_what_our_own_writing_meets_is_not_said_of_the_critic(code: int) -> None:
    with pytest.raises(OSError) as found, foreign("openai:x"):
        raise OSError(code, "not written")
    assert found.value.errno == code
    with pytest.raises(ModelError, match="openai:x"), foreign("openai:x"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_what_a_provider_met_is_said_without_its_password() -> None:
    with pytest.raises(ModelError, match=r"^http://host/v1#m: "), foreign("http://ann:s3cret@host/v1#m"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_a_reader_who_has_seen_enough_ends_judge_without_a_word_of_it(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    answers(tmp_path, *map(str, range(20)))
    process = start(tmp_path, "judge", "a.jsonl", "--critic", server.spec, env={"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1
    process.stderr.close()
    assert "Broken pipe" not in said


# --- log ----------------------------------------------------------------------------------------------


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
    assert "2 KEPT" in cai(logged, "log", "stats").stdout or "KEPT 2" in cai(logged, "log", "stats").stdout
    shown = json.loads(cai(logged, "log", "show", revised.id, "--json").stdout)
    assert shown["id"] == revised.id
    lines = cai(logged, "log", "list", "--json", "--limit", "2").stdout.splitlines()
    assert [json.loads(line)["record"] for line in lines] == ["trajectory", "trajectory"]


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
    assert "no prompt fell" not in cai(logged, *build, "-o", "all", "--test-share", "0").stderr
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


# --- constitution, model, doctor ----------------------------------------------------------------------


def test_constitutions_are_listed_shown_linted_compared_and_described(tmp_path: Path) -> None:
    listed = json.loads(cai(tmp_path, "constitution", "list", "--json").stdout)
    assert "balanced" in [entry["name"] for entry in listed]
    assert "balanced" in cai(tmp_path, "constitution", "list").stdout
    shown = json.loads(cai(tmp_path, "constitution", "show", "balanced", "--json").stdout)
    assert shown["digest"] == BALANCED.digest
    assert BALANCED.principles[0].id in cai(tmp_path, "constitution", "show", "balanced").stdout
    assert "nothing found" in cai(tmp_path, "constitution", "lint", "balanced").stdout
    (tmp_path / "mine.yaml").write_text("name: mine\nextends: balanced\nrefusal: No, thank you.\n")
    assert "changed refusal" in cai(tmp_path, "constitution", "diff", "balanced", "mine.yaml").stdout
    found = json.loads(cai(tmp_path, "constitution", "diff", "balanced", "mine.yaml", "--json").stdout)
    assert "refusal" in [difference["field"] for difference in found]
    apart = cai(tmp_path, "constitution", "diff", "balanced", "harmlessness").stdout
    assert "removed refusal_translations: de\n" in apart
    assert "added examples: " in apart
    assert "Example(" not in apart
    changed = f"extends: balanced\nprinciples: [{json.dumps({**PRINCIPLE, 'min_severity': 4})}]\n"
    (tmp_path / "mine.yaml").write_text(f"name: balanced\n{changed}")
    assert "[-none-] {+4+}" in cai(tmp_path, "constitution", "diff", "balanced", "mine.yaml").stdout
    schema = json.loads(cai(tmp_path, "constitution", "schema").stdout)
    assert schema["title"] == "Constitution"


def test_local_models_are_listed_and_a_missing_one_is_said_to_be(tmp_path: Path) -> None:
    empty = {"CAI_CACHE": str(tmp_path / "none")}
    listed = json.loads(cai(tmp_path, "model", "list", "--json", env=empty).stdout)
    assert {entry["name"]: entry["path"] for entry in listed}["smollm2"] is None
    assert "not fetched" in cai(tmp_path, "model", "list", env=empty).stdout
    for typed in ("smollm2", "local:smollm2"):  # the list prints the second
        assert "cai model get smollm2" in cai(tmp_path, "model", "path", typed, status=1, env=empty).stderr


def test_the_doctor_reports_as_text_and_json(tmp_path: Path) -> None:
    assert "python" in cai(tmp_path, "doctor").stdout
    names = [check["name"] for check in json.loads(cai(tmp_path, "doctor", "--json").stdout)]
    assert "sqlite of the log" in names


def test_training_needs_its_data(tmp_path: Path) -> None:
    args = ("train", "probe", "absent", "-o", "heads", "--model", "local:a.gguf")
    assert "a.gguf" in cai(tmp_path, *args, status=1).stderr
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    ended = cai(tmp_path, *args, status=1)
    said = "absent: no such folder; name the one with the labelled sources (docs/critics.md)\n"
    assert ended.stderr == said


# --- a cascade ----------------------------------------------------------------------------------------


def _probable(ids: list[str], *, probability: float) -> Reply:
    """COMPLIES for every principle, and P(VIOLATES), as an OpenAI-compatible server says it."""
    text = verdicts(ids=ids)
    content = []
    for token in re.split(r'(?<=")(COMPLIES)(?=")', text):
        top = [("COMPLIES", 1 - probability), ("VIOLATES", probability)] if token == "COMPLIES" else []
        alternatives = [{"token": name, "logprob": math.log(share)} for name, share in top]
        content.append({"token": token, "logprob": -0.1, "top_logprobs": alternatives})
    return Reply(text, logprobs=content)


def test_a_cascade_is_calibrated_from_a_log_and_then_asks_the_strong_critic_less(
    tmp_path: Path, serve: Any
) -> None:
    def critic(body: Mapping[str, Any]) -> Reply:
        bad = "question 1" in str(body["messages"][-1]["content"])
        return _probable(ids, probability=0.4 if bad else 0.1)

    ids = [principle.id for principle in BALANCED]
    strong = serve(under(BALANCED, violates=lambda shown: "question 1" in shown))
    cheap = serve(critic)
    (tmp_path / "prompts.txt").write_text("\n".join(f"question {n % 2} of {n}" for n in range(40)))
    judge_only = ("--max-rounds", "0", "--on-violation", "open")
    cai(tmp_path, "run", "prompts.txt", "--model", strong.spec, *judge_only)
    calibrate = ("critic", "calibrate", "--cheap", cheap.spec)

    few = cai(tmp_path, *calibrate, status=1)
    found = cai(tmp_path, *calibrate, "--miss-rate", "0.15")
    written = json.loads(cai(tmp_path, *calibrate, "--miss-rate", "0.15", "--json").stdout)

    assert "takes 299 answers that the strong critic finds violating; 20 of the 40" in few.stderr
    assert "threshold   0.4\n" in found.stdout
    assert "saved       50.0% of the strong critic's calls (95 % interval 35.2% to 64.8%" in found.stdout
    assert "missed      0 of 20 violating answers" in found.stdout
    assert (written["threshold"], written["saved"], written["cheap"]) == (0.4, 0.5, cheap.spec)

    before = sum(role(body) == "critique" for body in strong.requests)
    cascade = ("--critic", cheap.spec, "--strong", strong.spec, "--threshold", "0.4")
    cai(tmp_path, "run", "prompts.txt", "--model", strong.spec, *cascade, *judge_only)
    assert sum(role(body) == "critique" for body in strong.requests) - before == 20


def test_a_strong_critic_without_a_threshold_is_wrong_usage(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    ended = cai(tmp_path, "ask", "hi", "--model", server.spec, "--strong", server.spec, status=2)

    assert "--strong and --threshold go together" in " ".join(ended.stderr.split())


# --- the embedded model -------------------------------------------------------------------------------


@pytest.mark.local
def test_the_embedded_model_drafts_and_another_judges(tmp_path: Path, tiny_weights: Path, serve: Any) -> None:
    judge = serve(under(BALANCED)).spec
    (tmp_path / "p.txt").write_text("Say hello.\nName a colour.\n")
    args = ("run", "p.txt", "--model", "local:smollm2", "--critic", judge, "--reviser", judge)
    cai(tmp_path, *args, "--max-tokens", "16", "--seed", "1")
    found = trajectories(tmp_path)
    assert len(found) == 2
    assert all(t.draft is not None and t.draft.answer.content for t in found)
    assert {t.calls[0].model for t in found} == {"local:smollm2"}
    assert cai(tmp_path, "model", "path", "smollm2").stdout.strip() == str(tiny_weights)
