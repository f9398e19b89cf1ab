"""Failing disks and power cuts, played by a VFS between SQLite and the real files.

A fault: the nth write or sync of the process fails, for every n until a run sees none. A power cut: what
was written and not synced reaches the disk only in part, in any order.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
from log_support import START, trajectory

from cai_graph.errors import LogError
from cai_graph.log import open_log
from cai_graph.log.sqlite import SQLiteStore
from cai_graph.log.upkeep import gc, verify
from cai_graph.trajectory import Record


class Disk(apsw.VFS):
    """The disk that SQLite sees. The shared memory of the WAL goes to the system past it."""

    def __init__(self) -> None:
        self.calls = 0
        self.fail_at: int | None = None
        self.fail_with: Callable[[str], Exception] = apsw.IOError
        self.lock = threading.Lock()
        self.synced: dict[str, bytearray] = {}
        self.unsynced: dict[str, list[tuple[int, bytes | None]]] = {}
        self.syncs: set[int] = set()
        super().__init__("test-disk", "unix", makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        if name is None:  # a scratch file, which is gone after a fault or a power cut in any case
            return apsw.VFSFile("unix", name, flags)
        return DiskFile(self, name, flags)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802
        with self.lock:
            self.synced.pop(name, None)
            self.unsynced.pop(name, None)
        super().xDelete(name, sync)

    def step(self, what: str) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.fail_with(f"{what} number {self.calls} failed")

    def cut(self, chance: random.Random, into: Path) -> None:
        """Write what a power cut at this moment could leave on the disk."""
        with self.lock:
            for name, synced in self.synced.items():
                image = bytearray(synced)
                for offset, data in self.unsynced[name]:
                    fate = chance.random()
                    if fate < 0.4:
                        continue  # never reached the disk
                    if data is not None and fate < 0.5:
                        data = data[: chance.randrange(len(data))]  # torn
                    apply(image, offset, data)
                (into / Path(name).name).write_bytes(image)


class DiskFile(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        self.disk = disk
        self.name: str = name if isinstance(name, str) else name.filename()
        with disk.lock:
            disk.synced.setdefault(self.name, bytearray())
            disk.unsynced.setdefault(self.name, [])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        with self.disk.lock:
            self.disk.step("write")
            self.disk.unsynced[self.name].append((offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        with self.disk.lock:
            self.disk.step("truncate")
            self.disk.unsynced[self.name].append((size, None))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        with self.disk.lock:
            self.disk.step("sync")
            self.disk.syncs.add(flags & apsw.SQLITE_SYNC_FULL)
            for offset, data in self.disk.unsynced[self.name]:
                apply(self.disk.synced[self.name], offset, data)
            self.disk.unsynced[self.name] = []
        super().xSync(flags)


def apply(image: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del image[offset:]
    else:
        if len(image) < offset:
            image.extend(bytes(offset - len(image)))
        image[offset : offset + len(data)] = data


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    try:
        yield disk
    finally:
        disk.unregister()


def attempt(path: Path, made: list[Record]) -> list[Record]:
    """Append each record and wait; return those that were acknowledged."""
    acknowledged = []
    with open_log(path) as log:
        for record in made:
            try:
                log.append(record).result()
                acknowledged.append(record)
            except LogError:
                continue
        # The fault was one; nothing needs to be started again.
        last = trajectory(99)
        log.append(last).result()
        acknowledged.append(last)
        stored = list(log.read())
        assert [record for record in stored if record in acknowledged] == acknowledged
        assert all(record in made or record is last or record == last for record in stored)
    return acknowledged


# A fault in a checkpoint or a close is no error to SQLite, which finds the data in the WAL; apsw reports it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError])
def test_a_fault_at_any_write_or_sync_is_reported_and_loses_nothing_acknowledged(
    tmp_path: Path, disk: Disk, error: Callable[[str], Exception]
) -> None:
    disk.fail_with = error
    refused = 0
    for number in range(1, 400):
        path = tmp_path / f"{number}.db"
        made: list[Record] = [trajectory(n, metadata={"text": "x" * 17_000}) for n in range(3)]
        disk.calls, disk.fail_at = 0, number
        try:
            acknowledged = attempt(path, made)
        except LogError:
            # While it was being made: the next attempt makes it.
            refused += 1
            disk.fail_at = None
            acknowledged = attempt(path, made)
        clean = disk.calls < number
        refused += len(acknowledged) < 4
        disk.fail_at = None
        found = verify(path)
        assert found.ok, (number, found)
        if clean:
            break
    else:
        pytest.fail("no run without a fault")
    assert refused > 5


def test_every_sync_asks_a_disk_to_empty_its_cache_too(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "cai.db"
    with open_log(path) as log:
        log.append(trajectory()).result()
        with open_log(path, read_only=True) as reader:
            assert len(list(reader.read())) == 1
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{path}{suffix}", tmp_path / f"crashed.db{suffix}")
    with open_log(tmp_path / "crashed.db", read_only=True) as reader:  # which moves the WAL into the file
        assert len(list(reader.read())) == 1
    assert gc(path, before=START + timedelta(days=1), why="age").compacted
    assert disk.syncs == {apsw.SQLITE_SYNC_FULL}


def test_a_power_cut_loses_nothing_acknowledged(tmp_path: Path, disk: Disk) -> None:
    chance = random.Random(3)
    with open_log(tmp_path / "cai.db") as log:
        store = log._shared.store
        assert isinstance(store, SQLiteStore)
        # Checkpoints often, so that cuts fall into them, too.
        store.change(lambda db: db.wal_autocheckpoint(20))
        acknowledged: set[str] = set()
        for number in range(60):
            futures = {}
            for n in range(chance.randrange(1, 12)):
                record = trajectory(n, metadata={"text": "y" * chance.randrange(30_000)})
                futures[record.id] = log.append(record)
            for id, future in futures.items():
                if chance.random() < 0.5:
                    future.result()
                    acknowledged.add(id)
            acknowledged |= {id for id, future in futures.items() if future.done()}
            after = tmp_path / f"cut{number}"
            after.mkdir()
            disk.cut(chance, after)
            with open_log(after / "cai.db") as survived:
                stored = {record.id for record in survived.read()}
            assert acknowledged <= stored, number
            assert verify(after / "cai.db").ok
            with disk.lock:
                for name in [name for name in disk.synced if str(after) in name]:
                    del disk.synced[name], disk.unsynced[name]
