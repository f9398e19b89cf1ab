"""`cai judge`: verdicts on the rows of a file, in their order."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from cli_support import BALANCED, Ended, cai, start
from wire import Reply, Server, under


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


def test_verdicts_so_far_are_kept_where_the_critic_cannot_go_on(tmp_path: Path, serve: Any) -> None:
    critic = under(BALANCED)
    server = serve(lambda body: Reply("revoked", status=401) if "zebra" in str(body) else critic(body))
    answers(tmp_path, "ant", "bee", "zebra", "cat")
    _, ended = judge(tmp_path, server, "-o", "v.jsonl", "--concurrency", "1", status=1)
    lines = (tmp_path / "v.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["r0", "r1"]
    assert "2 of 4 answers judged and written; the others are missing" in ended.stderr
    assert "401 - revoked" in ended.stderr


def test_verdicts_never_replace_the_answers(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    answers(tmp_path, "fine")
    before = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "a.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(tmp_path / "a.jsonl")
    for name in ("a.jsonl", "./a.jsonl", "hard.jsonl", "soft.jsonl"):
        _, ended = judge(tmp_path, server, "-o", name, status=1)
        assert f"{name}: holds the answers; name another file" in ended.stderr
    assert (tmp_path / "a.jsonl").read_text() == before
    assert server.requests == []


def test_a_row_that_cannot_be_judged_keeps_its_id(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    rows = ['{"id": 1, "prompt": "p", "response": "r"}', '{"id": "x", "prompt": "p"}', '{"id": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    lines, _ = judge(tmp_path, server, status=3)
    assert [line["id"] for line in lines] == [1, "x", 2]


def test_output_that_the_shell_has_closed_is_said_before_anything_is_judged(
    tmp_path: Path, serve: Any
) -> None:
    server = serve(under(BALANCED))
    answers(tmp_path, "fine")
    command = shlex.join([sys.executable, "-m", "cai_graph.cli", "judge", "a.jsonl", "--critic", server.spec])
    ended = subprocess.run(f"{command} >&-", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, server.requests) == (1, [])
    assert ended.stderr == "standard output is closed; name a file with -o\n"


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
