"""Files and folders are whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cai_graph.atomic import output
from cai_graph.errors import DataError
from trainers import atomic


def test_a_write_that_fails_leaves_the_older_file_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.json"
    atomic.write(path, "old")

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.write(path, "new")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_file_is_its_owners_alone_until_it_is_whole(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "out.bin"
    with atomic.file(path, mode=mode) as work:
        assert work.stat().st_mode & 0o777 == 0o600
        work.write_bytes(b"all")
        assert not path.exists()
    assert path.stat().st_mode & 0o777 == mode
    assert path.read_bytes() == b"all"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_stands_there_once_the_body_has_ended_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "out"

    def interrupted() -> None:
        with atomic.folder(path) as work:
            (work / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(path.parent.iterdir())

    with atomic.folder(path) as work:
        (work / "all").touch()
        assert not path.exists()
    assert [one.name for one in path.iterdir()] == ["all"]
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o755


def test_an_output_that_cannot_be_looked_at_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written: File name too long"), output("x" * 300):
        pass


WRITES = """
import sys, time
from pathlib import Path
from trainers import atomic
with atomic.folder(Path(sys.argv[1])) as work:
    (work / "half").write_text("half")
    print(work.name, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_goes_away_and_what_is_under_way_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"
    own = tmp_path / ".out.backup"
    own.mkdir()  # a name like ours, of somebody else
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, alive = processes
    try:
        names = [process.stdout.readline().strip() for process in processes]  # type: ignore[union-attr]
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert (tmp_path / names[0] / "half").exists()

        with atomic.folder(path), atomic.folder(path):
            left = {one.name for one in tmp_path.iterdir()}
            assert names[0] not in left
            assert {names[1], ".out.backup"} < left
            assert len(left) == 4
    finally:
        alive.kill()
        alive.communicate()
