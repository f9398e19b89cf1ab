"""`cai feedback` as its users run it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
from cli_support import cai, start
from judges import prefers_revisions
from log_support import comparison, contents, fill
from repository import fenced, read_page
from wire import Reply, serving, under

from cai_graph.cli.feedback import Pairs
from cai_graph.constitution import load
from cai_graph.log import open_log
from cai_graph.trajectory import Comparison, Feedback, Record, Trajectory
from trainers.feedback import PairKind


def revised(url: str | Path) -> None:
    """Fill a log with four revised trajectories."""
    with open_log(url) as log:
        fill(log, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose log holds four revised trajectories."""
    revised(tmp_path / "cai.db")
    return tmp_path


def records(folder: Path, kind: Any) -> list[Record]:
    with open_log(folder / "cai.db", read_only=True) as log:
        return list(log.read(kind=kind))


def test_the_menu_of_pairs_is_that_of_the_labelling() -> None:
    assert tuple(Pairs) == get_args(PairKind)


def test_a_log_is_labelled_and_summed_up_once(url: str, tmp_path: Path) -> None:
    revised(url)
    with serving(prefers_revisions) as server:
        label = ("feedback", "label", "--log", url, "--judge", server.spec)
        first = cai(tmp_path, *label)
        asked = len(server.requests)
        again = cai(tmp_path, *label, "--json")

        assert len(server.requests) == asked == 8
    assert "revision preferred over draft  100%" in first.stdout
    assert "4/4" in first.stderr
    assert "4 of 4 trajectories were labelled before" in again.stderr
    summary = json.loads(again.stdout)
    assert (summary["comparisons"], summary["clear"], summary["position_bias"]["share"]) == (4, 4, 0)
    assert [type(record) for record in contents(url)].count(Comparison) == 4


def test_each_judge_of_a_log_is_summed_up(folder: Path) -> None:
    assert "holds no comparison" in cai(folder, "feedback", "stats").stdout
    with serving(prefers_revisions) as server:
        cai(folder, "feedback", "label", "--judge", server.spec)
    with open_log(folder / "cai.db") as log:
        log.append(comparison(records(folder, "trajectory")[0].id, p_a=(0.9, 0.2), method="votes")).result()
    one, other = json.loads(cai(folder, "feedback", "stats", "--json").stdout)
    assert (one["judge"], one["comparisons"], one["first"]) == (server.spec, 4, 0)
    assert (other["judge"], other["comparisons"], other["first"]) == ("fake:judge", 1, 1)
    assert "position bias 100%" in cai(folder, "feedback", "stats").stdout


def test_samples_are_drawn_and_compared(folder: Path) -> None:
    drawn = iter(range(100))

    def script(body: dict[str, Any]) -> str | Reply:
        return prefers_revisions(body) if body.get("logprobs") else f"answer {next(drawn)}"

    with serving(script) as server:
        cai(
            folder, "feedback", "label", "--judge", server.spec, "--model", server.spec, "--limit", "1",
            "--samples", "3", "--max-tokens", "20",
        )  # fmt: skip
    found = records(folder, "comparison")
    assert len(found) == 3
    assert all(isinstance(c, Comparison) and c.origins[0].startswith("sample:") for c in found)


def test_a_trajectory_that_fails_is_reported_and_the_status_says_so(folder: Path) -> None:
    def script(body: dict[str, Any]) -> Reply:
        bad = "draft 2" in body["messages"][-1]["content"]
        return Reply("cannot", status=400) if bad else prefers_revisions(body)

    with serving(script) as server:
        ended = cai(folder, "feedback", "label", "--judge", server.spec, status=3)
    assert "cannot" in ended.stderr
    assert "1 trajectory failed; to try again: cai feedback label" in ended.stderr
    assert len(records(folder, "comparison")) == 3


def test_what_was_finished_before_an_interrupt_stays_and_is_not_asked_again(folder: Path) -> None:
    waiting, go = threading.Event(), threading.Event()

    def script(body: dict[str, Any]) -> Reply:
        if "draft 1" in body["messages"][-1]["content"] and not go.is_set():
            waiting.set()
            go.wait(60)
        return prefers_revisions(body)

    with serving(script) as server:
        args = ("feedback", "label", "--judge", server.spec, "--concurrency", "1")
        running = start(folder, *args)
        assert waiting.wait(60)
        os.kill(running.pid, signal.SIGINT)
        line = ""
        assert running.stderr is not None
        while "finishing what is under way" not in line:
            line = running.stderr.readline()
            assert line
        go.set()
        said = running.communicate(timeout=60)[1]
        assert running.returncode == 130
        assert "to go on, type again: cai feedback label" in said
        assert len(records(folder, "comparison")) == 2
        cai(folder, *args)
        assert len(records(folder, "comparison")) == 4
        assert len(server.requests) == 8


@pytest.mark.parametrize("named", [(), ("--judge", "local", "--critic", "local")])
def test_who_compares_must_be_named_one_way(folder: Path, named: tuple[str, ...]) -> None:
    said = cai(folder, "feedback", "label", *named, status=2).stderr
    assert "--judge" in said
    assert "--critic" in said
    assert ("docs/feedback.md" in said) == (not named)


def test_labelling_a_log_that_is_not_there_makes_none(tmp_path: Path) -> None:
    with serving(prefers_revisions) as server:
        cai(tmp_path, "feedback", "label", "--judge", server.spec, status=1)
    assert not (tmp_path / "cai.db").exists()


def test_feedback_is_added_to_a_trajectory_and_to_nothing_else(folder: Path) -> None:
    about = records(folder, "trajectory")[0].id
    added = cai(folder, "feedback", "add", about, "--score", "-0.5", "--user", "u1", "--note", "meh")
    (found,) = records(folder, "feedback")
    assert isinstance(found, Feedback)
    assert (found.id, found.trajectory_id, found.score, found.user, found.note) == (
        added.stdout.strip(),
        about,
        -0.5,
        "u1",
        "meh",
    )
    cai(folder, "feedback", "add", "absent", "--score", "1", status=1)
    cai(folder, "feedback", "add", about, "--score", "2", status=2)
    assert "is no trajectory" in cai(folder, "feedback", "add", found.id, "--score", "1", status=1).stderr
    assert len(records(folder, "feedback")) == 1


def test_feedback_of_a_file_is_imported_and_broken_lines_are_reported(folder: Path) -> None:
    about = records(folder, "trajectory")[0].id
    (folder / "f.jsonl").write_text(json.dumps({"trajectory_id": about, "score": 1}) + "\nno\n")
    ended = cai(folder, "feedback", "import", "f.jsonl", status=3)
    assert "line 2 skipped: not JSON" in ended.stderr
    assert "1 added; 0 were there already" in ended.stderr


@pytest.mark.local
def test_the_local_model_labels_a_log(folder: Path, tiny_weights: Path) -> None:
    ended = cai(folder, "feedback", "label", "--judge", "local:smollm2", "--limit", "1", "--json")
    assert json.loads(ended.stdout)["comparisons"] == 1
    (found,) = records(folder, "comparison")
    assert isinstance(found, Comparison)
    assert (found.judge, found.method) == ("local:smollm2", "logprob")


def test_the_page_about_feedback_holds_what_it_says(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = read_page("feedback.md")
    block, thumb = fenced(page, "python")
    exec(block, {})
    assert capsys.readouterr().out == "(1.0, 1.0) votes\n"
    (application := tmp_path / "application").mkdir()
    with serving(under(load("balanced"), draft=lambda _: "Say that you are sorry.")) as server:
        monkeypatch.chdir(application)
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        exec(thumb, {})
    (answered,), (said,) = records(application, "trajectory"), records(application, "feedback")
    assert isinstance(answered, Trajectory)
    assert isinstance(said, Feedback)
    assert answered.metadata.items() >= {"user": "u-17", "tenant": "shop-3"}.items()
    assert (said.trajectory_id, said.score, said.user) == (answered.id, 1.0, "u-17")
    (line,) = fenced(page, "json")
    about = records(folder, "trajectory")[0].id
    (folder / "f.jsonl").write_text(json.dumps(json.loads(line) | {"trajectory_id": about}))
    assert "1 added" in cai(folder, "feedback", "import", "f.jsonl").stderr
    for command in re.findall(r"^    cai (.*)$", page, re.MULTILINE):
        words = command.split()
        name = " ".join(words[: 1 if words[0] == "replay" else 2])
        said = cai(folder, *name.split(), "--help").stdout
        assert all(word in said for word in words if word.startswith("-")), command
