"""What end users say of answers: new feedback, and files of it into the log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from log_support import START, store_of, trajectory

from cai_graph.errors import DataError, LogError
from cai_graph.log import Log, gc, open_log, redact_texts
from cai_graph.log.feedback import import_feedback, new_feedback
from cai_graph.trajectory import Feedback, Record, Trajectory


@pytest.fixture
def log(url: str) -> Iterator[Log]:
    with open_log(url) as opened:
        yield opened


def append(log: Log) -> Trajectory:
    """Append a trajectory that there can be feedback about."""
    log.append(made := trajectory()).result()
    return made


def test_feedback_of_a_file_is_appended_and_broken_lines_are_reported(
    log: Log, url: str, tmp_path: Path
) -> None:
    about = append(log)
    lines = [
        {"trajectory_id": about.id, "score": 1, "user": "u1", "note": "thanks", "at": "2026-11-24T10:00:00"},
        {"trajectory_id": about.id, "score": -0.5},
        {"trajectory_id": "absent", "score": 1},
        {"trajectory_id": about.id, "score": 7},
        {"trajectory_id": about.id, "score": True},
        {"trajectory_id": about.id, "score": 1, "thumb": "up"},
        {"score": 1},
        {"trajectory_id": about.id, "score": 1, "at": "yesterday"},
        [1],
    ]
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n{cut")
    done = import_feedback(url, path)

    assert (done.added, done.present) == (2, 0)
    assert [line.line for line in done.broken] == [3, 4, 5, 6, 7, 8, 9, 11]
    assert done.broken[0].what == "there is no trajectory 'absent' in this log"
    assert done.broken[1].what == "'score' is a number from -1 (bad) to 1 (good), found 7"
    again = import_feedback(url, path)
    assert (again.added, again.present) == (0, 2)
    first, second = log.read(kind="feedback")
    assert (first.score, first.user, first.note, first.at.isoformat()) == (
        1.0,
        "u1",
        "thanks",
        "2026-11-24T10:00:00+00:00",
    )
    assert second.score == -0.5


def test_equal_feedback_counts_once_a_line_where_no_user_is_named(log: Log, url: str, tmp_path: Path) -> None:
    about = append(log)
    nameless = {"trajectory_id": about.id, "score": 1}
    lines = [nameless, nameless | {"user": "u1"}, nameless, nameless | {"user": "u1"}, nameless]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, lines)))

    done = import_feedback(url, tmp_path / "f.jsonl")
    assert (done.added, done.present, done.broken) == (4, 1, ())
    done = import_feedback(url, tmp_path / "f.jsonl")
    assert (done.added, done.present, done.broken) == (0, 5, ())


def test_no_id_of_feedback_tells_what_was_redacted(log: Log, url: str, tmp_path: Path) -> None:
    about = append(log)
    hide = redact_texts(lambda text: re.sub(r"\d", "#", text))
    for pin in ("4821", "0007"):
        line = {"trajectory_id": about.id, "score": 1, "user": "u1", "note": f"my PIN is {pin}"}
        (tmp_path / "f.jsonl").write_text(json.dumps(line))
        import_feedback(url, tmp_path / "f.jsonl", redact=hide)

    assert [one.note for one in log.read(kind="feedback")] == ["my PIN is ####"]


def test_users_to_whom_redaction_leaves_one_name_count_each(log: Log, url: str, tmp_path: Path) -> None:
    about = append(log)
    users = ["anna", "bob", "anna", None, "cy"]
    lines = [json.dumps({"trajectory_id": about.id, "score": 1, "user": user}) for user in users]
    (tmp_path / "f.jsonl").write_text("\n".join(lines))

    def hide(record: Record) -> Record:
        named = isinstance(record, Feedback) and record.user is not None
        return msgspec.structs.replace(record, user="[user]") if named else record

    done = import_feedback(url, tmp_path / "f.jsonl", redact=hide)
    assert (done.added, done.present, done.broken) == (4, 1, ())
    done = import_feedback(url, tmp_path / "f.jsonl", redact=hide)
    assert (done.added, done.present, done.broken) == (0, 5, ())


def test_of_two_imports_at_once_the_later_finds_the_feedback_there(
    log: Log, url: str, tmp_path: Path
) -> None:
    about = append(log)
    (tmp_path / "f.jsonl").write_text(
        json.dumps({"trajectory_id": about.id, "score": 1, "note": "x" * 10_000})
    )
    with ThreadPoolExecutor(2) as threads:
        with store_of(log)._writing:  # type: ignore[attr-defined]  # so that neither sees the other's
            imports = [threads.submit(import_feedback, url, tmp_path / "f.jsonl") for _ in range(2)]
            while log._shared.writer.pending_bytes < 20_000:  # type: ignore[union-attr]
                time.sleep(0.001)
        done = [one.result() for one in imports]

    assert [one.broken for one in done] == [(), ()]
    assert sorted((one.added, one.present) for one in done) == [(0, 1), (1, 0)]


def test_feedback_about_what_was_removed_is_not_added(url: str, tmp_path: Path) -> None:
    with open_log(url) as log:
        log.append(about := trajectory()).result()
    gc(url, before=START + timedelta(days=1), why="the user asked for it")
    (tmp_path / "f.jsonl").write_text(json.dumps({"trajectory_id": about.id, "score": 1, "note": "thanks"}))

    done = import_feedback(url, tmp_path / "f.jsonl")

    assert (done.added, [line.line for line in done.broken]) == (0, [1])


def test_feedback_needs_a_log_and_a_file_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        import_feedback(tmp_path / "cai.db", tmp_path / "absent.jsonl")
    (tmp_path / "f.jsonl").write_text("")
    with pytest.raises(LogError):
        import_feedback(tmp_path / "cai.db", tmp_path / "f.jsonl")
    assert not (tmp_path / "cai.db").exists()


def test_new_feedback_is_a_new_record_each_time() -> None:
    assert new_feedback("t", 1).id != new_feedback("t", 1).id
    with pytest.raises(DataError, match="'note' is text"):
        new_feedback("t", 1, None, 3)
