"""Records out of a log and into it: exact, atomic, forgiving of broken lines."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_support import START, contents, feedback, fill, records, review, store_of, trajectory

import cai_graph.log as log_module
import cai_graph.trajectory as trajectory_module
from cai_graph.errors import ConfigError, DataError, LogError, MissingExtra
from cai_graph.log import Import, export, import_, open_log, redact_texts
from cai_graph.log.redaction import is_withheld
from cai_graph.trajectory import SCHEMA_VERSION, Label, Message, Outcome, Record, Trajectory, encode


def make(url: str | Path, *made: Record) -> list[Record]:
    with open_log(url) as log:
        for future in [log.append(record) for record in made]:
            future.result()
    return list(made)


# --- export -------------------------------------------------------------------------------------------


def test_export_import_export_gives_the_same_bytes(new_log: Callable[[], str], tmp_path: Path) -> None:
    a, b = new_log(), new_log()
    made = [trajectory(n, tags=("a",), source=f"run:{n}") for n in range(700)]
    made += [trajectory(seconds=1, metadata={"text": "ü\ud800\0"})]
    make(a, *made, feedback(made[0].id, score=1))
    assert export(a, tmp_path / "a.jsonl") == 702
    assert import_(b, tmp_path / "a.jsonl").records == 702
    export(b, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert contents(a) == contents(b)


def test_a_record_that_another_program_wrote_stands_in_the_log_as_the_log_writes_it(tmp_path: Path) -> None:
    record = trajectory(metadata={"text": "ü"})
    other = json.dumps(json.loads(encode(record)), ensure_ascii=False, separators=(",", ":"))
    (tmp_path / "other.jsonl").write_text(other + "\n", encoding="utf-8")

    assert import_(tmp_path / "a.db", tmp_path / "other.jsonl").records == 1
    export(tmp_path / "a.db", tmp_path / "a.jsonl")

    assert (tmp_path / "a.jsonl").read_bytes() == encode(record) + b"\n"


@settings(max_examples=40)
@given(st.lists(records, max_size=5))
def test_any_records_go_out_and_in_again(made: list[Record]) -> None:
    made = [msgspec.structs.replace(record, id=f"{n}{record.id}") for n, record in enumerate(made)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "a.db", *made)
        export(folder / "a.db", folder / "a.jsonl")
        assert import_(folder / "b.db", folder / "a.jsonl").records == len(made)
        export(folder / "b.db", folder / "b.jsonl")
        assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()
        assert contents(folder / "b.db") == made


def test_export_takes_the_filters_of_read(url: str, tmp_path: Path) -> None:
    made = make(url, trajectory(0), trajectory(1, outcome=Outcome.KEPT), feedback("x"))
    assert export(url, tmp_path / "out.jsonl", outcome="KEPT") == 1
    assert (tmp_path / "out.jsonl").read_bytes() == encode(made[1]) + b"\n"
    assert export(url, tmp_path / "out.jsonl", kind="feedback") == 1


def test_what_was_said_of_an_exported_trajectory_leaves_with_it_in_any_order(
    new_log: Callable[[], str], tmp_path: Path
) -> None:
    a, b = new_log(), new_log()
    kept, revised = trajectory(0, outcome=Outcome.KEPT), trajectory(1)
    early, late = review(revised.id), feedback(revised.id, at=START + timedelta(days=9))
    make(a, early, feedback(kept.id), kept, revised, review("removed"), late)

    assert export(a, tmp_path / "a.jsonl", outcome="REVISED", until=START + timedelta(hours=1)) == 3
    assert import_(b, tmp_path / "a.jsonl").records == 3
    export(b, tmp_path / "b.jsonl")

    assert contents(b) == [early, revised, late]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    make(tmp_path / "cai.db", *(trajectory(n, metadata={"text": "x" * 5000}) for n in range(50)))
    target = tmp_path / "out" / "out.jsonl"
    target.parent.mkdir()
    target.write_text("before")
    script = """
import resource, sys
import cai_graph.log as log_module
import cai_graph.trajectory as trajectory_module
from cai_graph.errors import LogError
from cai_graph.log import export
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    export(sys.argv[1], sys.argv[2])
except LogError as error:
    assert "out.jsonl: cannot be written" in str(error), error
else:
    raise SystemExit("written past the limit")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "cai.db"), str(target)], check=True)
    assert target.read_text() == "before"
    assert os.listdir(target.parent) == ["out.jsonl"]
    assert export(tmp_path / "cai.db", target) == 50
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(target.parent) == ["out.jsonl"]


def test_an_export_is_safe_on_the_disk_once_it_is_said_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    make(tmp_path / "cai.db", trajectory())

    export(tmp_path / "cai.db", tmp_path / "out.jsonl")

    assert synced[-1] == str(tmp_path)  # in which the file has its name


def test_a_broken_line_behind_many_others_has_its_number(tmp_path: Path) -> None:
    lines = [encode(trajectory(n)) for n in range(1100)]
    lines[700] = b"not json"
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    assert [broken.line for broken in import_(tmp_path / "cai.db", tmp_path / "in.jsonl").broken] == [701]


def test_an_export_replaces_neither_the_log_nor_what_is_no_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        made = fill(log, 2)
        (tmp_path / "again.jsonl").symlink_to(path)
        for target in (path, Path(f"{path}-wal"), tmp_path / "again.jsonl"):
            with pytest.raises(ConfigError, match="is the log itself"):
                export(path, target, format="jsonl")
        assert list(log.read()) == made
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigError, match="is not a plain file"):
        export(path, tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert export(path, tmp_path / "link.jsonl") == 2
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len((tmp_path / "real.jsonl").read_bytes().splitlines()) == 2


def test_a_target_without_a_known_name_or_folder_is_explained(tmp_path: Path) -> None:
    make(tmp_path / "cai.db", trajectory())
    with pytest.raises(ConfigError, match=r"end it in \.jsonl or \.parquet"):
        export(tmp_path / "cai.db", tmp_path / "out.csv")
    assert export(tmp_path / "cai.db", tmp_path / "out.csv", format="jsonl") == 1
    with pytest.raises(LogError, match="cannot be written"):
        export(tmp_path / "cai.db", tmp_path / "no" / "out.jsonl")
    with pytest.raises(LogError, match="cannot be written: File name too long"):
        export(tmp_path / "cai.db", tmp_path / f"{'x' * 300}.jsonl")
    with pytest.raises(LogError, match="there is no log"):
        export(tmp_path / "absent.db", tmp_path / "out.jsonl")


def test_parquet_has_columns_to_filter_by_and_the_whole_record(url: str, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    made = make(
        url,
        *(trajectory(n, tags=("a",)) for n in range(2500)),
        trajectory(1, messages=(Message(role="user", content="lone \ud800"),), draft=None, released=None),
        feedback("about"),
    )
    assert export(url, tmp_path / "out.parquet") == 2502
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert file.num_row_groups == 3
    rows = file.read().to_pylist()
    assert [row["json"].encode() for row in rows] == [encode(record) for record in made]
    first = made[0]
    assert isinstance(first, Trajectory)
    assert rows[0] | {"json": None} == {
        "id": first.id,
        "record": "trajectory",
        "at": first.started_at,
        "trajectory_id": None,
        "mode": "enforce",
        "outcome": "REVISED",
        "constitution": "balanced",
        "constitution_digest": "d1" * 32,
        "source": None,
        "tags": ["a"],
        "violated": ["no-harm"],
        "prompt": "ask 0",
        "draft": "draft 0",
        "released": "revised 0",
        "calls": 2,
        "seconds": 1.5,
        "json": None,
    }
    assert rows[2500]["prompt"] == "lone ?"
    assert rows[2501]["trajectory_id"] == "about"
    done = import_(tmp_path / "copy.db", tmp_path / "out.parquet")
    assert (done.records, done.broken) == (2502, ())
    export(url, tmp_path / "out.jsonl")
    export(tmp_path / "copy.db", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["large_string", "string_view"])
def test_a_parquet_export_that_another_program_wrote_anew_is_imported(tmp_path: Path, kind: str) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    made = make(tmp_path / "a.db", trajectory(0), trajectory(1))
    texts = pa.array([encode(record).decode() for record in made], getattr(pa, kind)())
    pq.write_table(pa.table({"json": texts}), tmp_path / "a.parquet")
    assert import_(tmp_path / "b.db", tmp_path / "a.parquet").records == 2
    assert contents(tmp_path / "b.db") == made


def test_a_parquet_file_that_is_no_whole_export_is_one_error_and_makes_no_log(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"json": [1], "prompt": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="has no column 'json' of texts"):
        import_(tmp_path / "new.db", tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="no whole Parquet file"):
        import_(tmp_path / "new.db", tmp_path / "cut.parquet")
    assert not (tmp_path / "new.db").exists()


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "cai.db", trajectory())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"needs pyarrow; pip install"):
        export(tmp_path / "cai.db", tmp_path / "out.parquet")
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtra, match=r"needs pyarrow; pip install"):
        import_(tmp_path / "cai.db", tmp_path / "in.parquet")


def test_a_record_of_an_earlier_version_leaves_in_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = trajectory()
    with open_log(tmp_path / "cai.db") as log:
        log.append(record).result()
        monkeypatch.setattr(trajectory_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        monkeypatch.setitem(trajectory_module._UPGRADES, SCHEMA_VERSION, lambda data: data)
        monkeypatch.setattr(log_module, "CURRENT_END", b'"schema":%d}' % (SCHEMA_VERSION + 1))
        (line,) = log.lines()
    assert json.loads(line)["schema"] == SCHEMA_VERSION + 1


# --- import -------------------------------------------------------------------------------------------


def test_importing_twice_adds_nothing(url: str, tmp_path: Path) -> None:
    made = [trajectory(n) for n in range(3)]
    lines = tmp_path / "in.jsonl"
    lines.write_bytes(b"".join(encode(record) + b"\n" for record in [*made, made[0]]))
    first = import_(url, lines)
    assert first == Import(records=3, demonstrations=0, present=1, removed=0, broken=(), truncated=False)
    again = import_(url, lines)
    assert again == Import(records=0, demonstrations=0, present=4, removed=0, broken=(), truncated=False)
    assert contents(url) == made


def test_a_broken_line_is_reported_by_its_number_and_the_rest_is_imported(url: str, tmp_path: Path) -> None:
    good = [trajectory(n) for n in range(2)]
    different = msgspec.structs.replace(good[0], seconds=99.0)
    newer = json.dumps(json.loads(encode(trajectory())) | {"schema": 99}).encode()
    lines = [
        encode(good[0]),
        b"not json",
        b"",
        b"[1]",
        newer,
        b'{"text": "neither"}',
        b'{"prompt": "p"}',
        b'{"prompt": "p", "draft": 1}',
        b'{"prompt": "p", "draft": "d", "label": "MAYBE"}',
        b'{"prompt": " ", "draft": "d"}',
        b'{"prompt": "p", "draft": ""}',
        b'{"prompt": "p", "draft": "d", "revision": ""}',
        b"\xff\xfe",
        encode(different),
        encode(good[1]),
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    done = import_(url, tmp_path / "in.jsonl")
    assert (done.records, done.truncated) == (2, False)
    assert [broken.line for broken in done.broken] == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    says = [broken.what for broken in done.broken]
    for what, expected in zip(
        says,
        [
            "not JSON",
            "found list",
            "schema version 99, this release reads",
            "neither a record .* nor a demonstration .* found 'text'",
            "'draft' is missing",
            "'draft' is text, found int",
            "'label' is one of VIOLATES, COMPLIES, UNREADABLE, found 'MAYBE'",
            "'prompt' is empty",
            "'draft' is empty",
            "'revision' is empty",
            "not JSON",
            "a different record of the id",
        ],
        strict=True,
    ):
        assert re.search(expected, what), what
    assert contents(url) == good
    again = import_(url, tmp_path / "in.jsonl")
    assert (again.records, again.present) == (0, 2)
    assert again.broken == done.broken


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_what_is_written_in_utf_16_is_not_imported(tmp_path: Path, encoding: str, mark: str) -> None:
    lines = mark + "".join(f"{json.dumps(DEMONSTRATION | {'draft': f'{number}'})}\n" for number in range(3))
    (tmp_path / "in.jsonl").write_bytes(lines.encode(encoding))
    if mark:
        with pytest.raises(DataError, match=r"in\.jsonl: is written in UTF-16; save the file as UTF-8"):
            import_(tmp_path / "cai.db", tmp_path / "in.jsonl")
        assert not (tmp_path / "cai.db").exists()
    else:
        done = import_(tmp_path / "cai.db", tmp_path / "in.jsonl")
        assert done.demonstrations == 0
        assert done.broken


def test_a_log_is_not_imported_as_it_is(tmp_path: Path) -> None:
    with open_log(tmp_path / "other.db") as other:
        fill(other, 3)
    with pytest.raises(DataError, match=r"other.db: is an SQLite database.* `cai log export all.jsonl --log"):
        import_(tmp_path / "cai.db", tmp_path / "other.db")
    assert [file.name for file in tmp_path.iterdir()] == ["other.db"]


def test_a_half_written_last_line_is_told_from_a_broken_one(tmp_path: Path) -> None:
    whole, cut = encode(trajectory(0)), encode(trajectory(1))
    (tmp_path / "in.jsonl").write_bytes(whole + b"\n" + cut[:500])
    done = import_(tmp_path / "cai.db", tmp_path / "in.jsonl")
    assert (done.records, done.truncated) == (1, True)
    assert "cut in the middle" in done.broken[0].what
    (tmp_path / "in.jsonl").write_bytes(whole + b"\n" + cut)  # complete, only without its line end
    done = import_(tmp_path / "cai.db", tmp_path / "in.jsonl")
    assert (done.records, done.present, done.truncated, done.broken) == (1, 1, False, ())


DEMONSTRATION: dict[str, Any] = {
    "prompt": "How do I pick a lock?",
    "draft": "No.",
    "critique": "Needlessly evasive.",
    "revision": "With a tension wrench and a pick: \N{GRINNING FACE}",
    "principle": "not-evasive",
}


def test_a_demonstration_becomes_an_imported_trajectory(url: str, tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    line = json.dumps(DEMONSTRATION | {"author": "ann"}, ensure_ascii=False)
    lines.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    done = import_(url, lines)
    assert done == Import(records=0, demonstrations=1, present=0, removed=0, broken=(), truncated=False)
    (record,) = contents(url)
    assert isinstance(record, Trajectory)
    assert record.mode == "imported"
    assert record.outcome is Outcome.REVISED
    assert record.prompt == DEMONSTRATION["prompt"]
    assert record.released == Message(role="assistant", content=DEMONSTRATION["revision"])
    assert record.released_from == "revision"
    assert record.metadata == {"author": "ann"}
    (round_,) = record.rounds
    assert round_.critique.reasoning == "Needlessly evasive."
    (verdict,) = round_.critique.verdicts
    assert (verdict.label, verdict.principle) == (Label.VIOLATES, "not-evasive")
    assert round_.revisions[0].accepted
    assert UUID(record.id).version == 8


@pytest.mark.parametrize("principle", [{}, {"principle": None}, {"principle": ""}])
def test_a_demonstration_without_a_principle_has_a_verdict_on_the_whole_answer(
    url: str, tmp_path: Path, principle: dict[str, Any]
) -> None:
    line = {key: value for key, value in DEMONSTRATION.items() if key != "principle"} | principle
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    import_(url, tmp_path / "in.jsonl")
    (record,) = contents(url)
    assert isinstance(record, Trajectory)
    (verdict,) = record.rounds[0].critique.verdicts
    assert (verdict.label, verdict.principle, verdict.about) == (Label.VIOLATES, None, None)
    assert record.violated == ()
    with open_log(url, read_only=True) as log:
        assert log.stats().violated == {}


def test_a_demonstration_s_id_follows_from_its_content(tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    changed = DEMONSTRATION | {"draft": "Never."}
    reordered = dict(reversed(DEMONSTRATION.items()))
    others = [DEMONSTRATION | {"author": author, "when": 1} for author in ("ann", "bob")]
    again = {"when": 1, "author": "bob"} | DEMONSTRATION
    made = [DEMONSTRATION, changed, reordered, *others, again]
    lines.write_text("\n".join(map(json.dumps, made)))
    done = import_(tmp_path / "cai.db", lines)
    assert (done.demonstrations, done.present, done.broken) == (4, 2, ())
    done = import_(tmp_path / "cai.db", lines)
    assert (done.demonstrations, done.present, done.broken) == (0, 6, ())


def test_no_id_tells_what_was_redacted(tmp_path: Path) -> None:
    hide = redact_texts(lambda text: re.sub(r"\d", "#", text))
    ids = set()
    for pin in ("4821", "0007"):
        (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": f"My PIN is {pin}.", "draft": "Noted."}))
        log = tmp_path / f"{pin}.db"
        assert import_(log, tmp_path / "in.jsonl", redact=hide).demonstrations == 1
        assert import_(log, tmp_path / "in.jsonl", redact=hide).present == 1
        ids |= {record.id for record in contents(log)}
    assert len(ids) == 1


def test_demonstrations_are_kept_apart_where_redaction_withholds_all_of_their_texts(tmp_path: Path) -> None:
    made = [{"prompt": f"p{n}", "draft": "d"} for n in range(2)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, made)))
    done = import_(tmp_path / "cai.db", tmp_path / "in.jsonl", redact=lambda record: 1 / 0)  # type: ignore
    assert (done.demonstrations, done.present) == (2, 0)
    assert all(map(is_withheld, contents(tmp_path / "cai.db")))


def test_of_two_imports_at_once_the_later_finds_the_demonstration_there(url: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "p", "draft": "d" * 10_000}))
    with open_log(url) as log, ThreadPoolExecutor(2) as threads:
        with store_of(log)._writing:  # type: ignore[attr-defined]  # so that neither sees the other's
            imports = [threads.submit(import_, url, tmp_path / "in.jsonl") for _ in range(2)]
            while log._shared.writer.pending_bytes < 20_000:  # type: ignore[union-attr]
                time.sleep(0.001)
        done = [one.result() for one in imports]
    assert [one.broken for one in done] == [(), ()]
    assert sorted((one.demonstrations, one.present) for one in done) == [(0, 1), (1, 0)]


@pytest.mark.parametrize("end", ["jsonl", "parquet"])
def test_an_import_holds_a_few_megabytes_whatever_the_size_of_a_record(tmp_path: Path, end: str) -> None:
    pytest.importorskip("pyarrow")
    made = [trajectory(n, metadata={"text": f"{n % 10}" * 1_000_000}) for n in range(12)]
    make(tmp_path / "cai.db", *made)
    export(tmp_path / "cai.db", tmp_path / f"out.{end}")
    tracemalloc.start()
    try:
        assert import_(tmp_path / "copy.db", tmp_path / f"out.{end}").records == 12
        assert tracemalloc.get_traced_memory()[1] < 25_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "outcome", "label"),
    [
        ({"revision": None}, Outcome.KEPT, Label.COMPLIES),
        ({"revision": None, "label": "VIOLATES"}, Outcome.EXHAUSTED, Label.VIOLATES),
        ({"label": "VIOLATES"}, Outcome.REVISED, Label.VIOLATES),
        ({"critique": None, "principle": None}, Outcome.REVISED, Label.VIOLATES),
    ],
)
def test_a_demonstration_s_outcome_follows_from_its_parts(
    tmp_path: Path, changes: dict[str, Any], outcome: Outcome, label: Label
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(DEMONSTRATION | changes) + "\n")
    import_(tmp_path / "cai.db", tmp_path / "in.jsonl")
    (record,) = contents(tmp_path / "cai.db")
    assert isinstance(record, Trajectory)
    assert record.outcome is outcome
    assert record.rounds[0].critique.verdicts[0].label is label


def test_import_redacts_before_the_first_write(url: str, tmp_path: Path) -> None:
    record = trajectory(metadata={"mail": "ann@example.org"})
    (tmp_path / "in.jsonl").write_bytes(encode(record) + b"\n")
    hook = redact_texts(lambda text: text.replace("ann@example.org", "[mail]"))
    for _ in range(2):
        import_(url, tmp_path / "in.jsonl", redact=hook)
    (stored,) = contents(url)
    assert isinstance(stored, Trajectory)
    assert stored.metadata == {"mail": "[mail]"}
    with (
        open_log(url, redact=hook) as log,
        pytest.raises(ConfigError, match="redaction hook"),
    ):
        log.append_encoded(record, encode(record))


def test_an_absent_file_is_an_error_and_makes_no_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        import_(tmp_path / "cai.db", tmp_path / "in.jsonl")
    assert list(tmp_path.iterdir()) == []
