"""Compares the SQLite log with batched inserts through the standard library's sqlite3, equally durable.

python -m benchmarks.log        prints the section that goes into RESULTS.md
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

import apsw

from cai_graph.log import open_log
from cai_graph.trajectory import (
    Call,
    ConstitutionRef,
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Revision,
    Round,
    Trajectory,
    Verdict,
    encode,
    new_id,
)

PRODUCERS = 16
OUTSTANDING = 256
RECORDS = 16_384
ROUNDS = 7
TRANSACTION = 100


class Measured(NamedTuple):
    records_per_s: float
    cpu_us: float
    append_p50_us: float | None = None
    append_p99_us: float | None = None


def trajectory() -> Trajectory:
    """Return the Trajectory of a revised request, of about 4 KB, like those under constitution `balanced`."""
    sentence = "The quick brown fox jumps over the lazy dog. "
    verdicts = tuple(
        Verdict(label=Label.COMPLIES, principle=f"principle-{n}", reason="nothing against it", read_by="json")
        for n in range(6)
    )
    critique = Critique(verdicts=verdicts, reasoning=sentence * 5, critic="fake:critic")
    answer = Message(role="assistant", content=sentence * 9)
    return Trajectory(
        id=new_id(),
        started_at=datetime.now(UTC),
        seconds=1.25,
        mode="enforce",
        constitution=ConstitutionRef(name="balanced", version="1", digest="ab" * 32),
        outcome=Outcome.REVISED,
        messages=(Message(role="user", content=sentence * 5),),
        draft=Draft(answer=answer),
        rounds=(
            Round(
                critique=critique,
                revisions=(Revision(answer=answer, critique=critique, accepted=True),),
            ),
        ),
        released=answer,
        released_from="revision",
        calls=tuple(
            Call(role=role, model="fake:model", prompt_digest="0f" * 8, input_tokens=400, output_tokens=90)
            for role in ("draft", "critique", "revise", "critique")
        ),
        settings={"strategy": "batched", "max_rounds": 1},
    )


def through_log(url: str, records: list[Trajectory]) -> Measured:
    """Append from many threads; in each up to `OUTSTANDING` records may await their commit."""
    waits: list[float] = []

    def produce(mine: list[Trajectory]) -> None:
        spent = []
        outstanding: deque[Future[None]] = deque()
        for number, record in enumerate(mine):
            if len(outstanding) == OUTSTANDING:
                outstanding.popleft().result()
            start = time.perf_counter()
            outstanding.append(log.append(record))
            if number % 8 == 0:
                spent.append(time.perf_counter() - start)
        for future in outstanding:
            future.result()
        waits.extend(spent)

    with open_log(url) as log:
        threads = [
            threading.Thread(target=produce, args=(records[start::PRODUCERS],)) for start in range(PRODUCERS)
        ]
        cpu, wall = time.process_time(), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    waits.sort()
    return Measured(
        len(records) / wall,
        cpu / len(records) * 1e6,
        waits[len(waits) // 2] * 1e6,
        waits[len(waits) * 99 // 100] * 1e6,
    )


def one_at_a_time(url: str, records: list[Trajectory]) -> Measured:
    """Append in one thread that waits for each commit, like enforced requests one after another."""
    some = records[: len(records) // 64]
    with open_log(url) as log:
        cpu, wall = time.process_time(), time.perf_counter()
        for record in some:
            log.append(record).result()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Measured(len(some) / wall, cpu / len(some) * 1e6)


def with_log(folder: Path, records: list[Trajectory], _: list[tuple[str, bytes]]) -> Measured:
    return through_log(str(folder / "cai.db"), records)


def with_waiting_caller(folder: Path, records: list[Trajectory], _: list[tuple[str, bytes]]) -> Measured:
    return one_at_a_time(str(folder / "cai.db"), records)


def _stdlib(folder: Path) -> sqlite3.Connection:
    db = sqlite3.connect(folder / "peer.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE records (id TEXT PRIMARY KEY, payload BLOB NOT NULL)")
    return db


def with_stdlib(folder: Path, records: list[Trajectory], _: list[tuple[str, bytes]]) -> Measured:
    """Insert in one thread, 100 records per transaction; encoding is included in the time, as for the log."""
    db = _stdlib(folder)
    cpu, wall = time.process_time(), time.perf_counter()
    for start in range(0, len(records), TRANSACTION):
        db.execute("BEGIN IMMEDIATE")
        db.executemany(
            "INSERT INTO records VALUES (?, ?)",
            [(record.id, encode(record)) for record in records[start : start + TRANSACTION]],
        )
        db.execute("COMMIT")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    db.close()
    return Measured(len(records) / wall, cpu / len(records) * 1e6)


def with_stdlib_encoded(folder: Path, _: list[Trajectory], rows: list[tuple[str, bytes]]) -> Measured:
    """Do the same as `with_stdlib`, but with payloads that were encoded before the time is taken."""
    db = _stdlib(folder)
    cpu, wall = time.process_time(), time.perf_counter()
    for start in range(0, len(rows), TRANSACTION):
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO records VALUES (?, ?)", rows[start : start + TRANSACTION])
        db.execute("COMMIT")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    db.close()
    return Measured(len(rows) / wall, cpu / len(rows) * 1e6)


CONTENDERS: dict[str, Callable[[Path, list[Trajectory], list[tuple[str, bytes]]], Measured]] = {
    f"cai_graph log, {PRODUCERS} producers, {OUTSTANDING} outstanding each": with_log,
    f"stdlib sqlite3, {TRANSACTION} a transaction, encoding": with_stdlib,
    f"stdlib sqlite3, {TRANSACTION} a transaction, encoded before": with_stdlib_encoded,
    "cai_graph log, one caller that waits for each commit": with_waiting_caller,
}


def run() -> str:
    """Return the section of RESULTS.md: medians of interleaved rounds, and the ratios."""
    records = [trajectory() for _ in range(RECORDS)]
    rows = [(record.id, encode(record)) for record in records]
    results: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    for number in range(ROUNDS):
        # The order rotates, so that no contender always runs during the same other one's disk writeback.
        names = list(CONTENDERS)[number % len(CONTENDERS) :] + list(CONTENDERS)[: number % len(CONTENDERS)]
        for name in names:
            folder = Path(tempfile.mkdtemp(prefix="cai-bench-"))
            try:
                results[name].append(CONTENDERS[name](folder, records, rows))
            finally:
                shutil.rmtree(folder)
    ours, encoding, encoded, _ = results.values()

    def ratio(theirs: list[Measured]) -> str:
        ratios = [a.records_per_s / b.records_per_s for a, b in zip(ours, theirs, strict=True)]
        return f"{median(ratios):.2f} (rounds: {min(ratios):.2f} to {max(ratios):.2f})"

    size = sum(len(payload) for _, payload in rows) / len(rows)
    lines = [
        "## Log",
        "",
        f"{RECORDS} records of {size / 1000:.1f} KB, WAL with synchronous=FULL on both sides,",
        f"{ROUNDS} rounds interleaved, medians.",
        f"SQLite {apsw.sqlite_lib_version()} (ours), {sqlite3.sqlite_version} (stdlib).",
        "CPU counts every thread of the process: producers, encoding, checksums, writing.",
        "",
        "| | records/s | CPU µs a record | append p50 µs | p99 µs |",
        "|---|---|---|---|---|",
    ]
    for name, measured in results.items():
        p50 = [m.append_p50_us for m in measured if m.append_p50_us is not None]
        p99 = [m.append_p99_us for m in measured if m.append_p99_us is not None]
        lines.append(
            f"| {name} | {median(m.records_per_s for m in measured):,.0f} "
            f"| {median(m.cpu_us for m in measured):.0f} "
            f"| {f'{median(p50):.1f}' if p50 else ''} | {f'{median(p99):.0f}' if p99 else ''} |"
        )
    lines += [
        "",
        f"Ratio of records/s to stdlib with encoding: {ratio(encoding)}; goal at least 1.0. "
        f"To stdlib without encoding: {ratio(encoded)}. "
        f"CPU a record: {median(m.cpu_us for m in ours):.0f} µs; goal at most 100.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(run())
