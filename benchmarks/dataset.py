"""Compares converting a log to preference rows by cai_graph, an orjson loop and `datasets`.

python -m benchmarks dataset        writes the section into RESULTS.md

The log is synthetic: half of the trajectories are revised and give a row, half are kept and give none; 3 %
are in the log twice. Every contender filters, removes exact duplicates, splits by a hash of the prompt and
writes JSON lines. Each runs in a process of its own; CPU time includes all threads and child processes.

    CAI_BENCH_TRAJECTORIES    number of trajectories (200000)
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.log import trajectory
from cai_graph.digests import sha256_of
from cai_graph.log import open_log
from cai_graph.trajectory import Draft, Label, Message, Outcome, Revision, Round, decode, encode, new_id

TRAJECTORIES = int(os.environ.get("CAI_BENCH_TRAJECTORIES", "200000"))
ROUNDS = 3


def write(path: Path, count: int) -> int:
    """Write a log of `count` distinct trajectories, and return its number of lines."""
    rng = random.Random(1)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(5000)]
    text = lambda count: " ".join(rng.choices(words, k=count))  # noqa: E731
    replace = msgspec.structs.replace
    base = trajectory()
    fine = base.rounds[0].critique
    failed = replace(fine, verdicts=(replace(fine.verdicts[0], label=Label.VIOLATES), *fine.verdicts[1:]))
    lines = 0
    with path.open("wb") as file:
        for _ in range(count):
            draft, answer = (Message(role="assistant", content=text(65)) for _ in range(2))
            common = {"id": new_id(), "messages": (Message(role="user", content=text(38)),)}
            if rng.random() < 0.5:
                revision = Revision(answer=answer, critique=fine, accepted=True)
                rounds = (Round(critique=failed, revisions=(revision,)),)
                record = replace(base, draft=Draft(answer=draft), rounds=rounds, released=answer, **common)
            else:
                rounds = (Round(critique=fine, revisions=(Revision(answer=answer, critique=fine),)),)
                changes = {"outcome": Outcome.KEPT, "released": draft, "released_from": "draft"}
                record = replace(base, draft=Draft(answer=draft), rounds=rounds, **changes, **common)
            times = 1 + (rng.random() < 0.03)
            file.write((encode(record) + b"\n") * times)
            lines += times
    return lines


def store(lines: Path, path: Path) -> None:
    with open_log(path) as log, lines.open("rb") as file:
        seen: set[str] = set()
        for line in file:
            record = decode(line)
            if record.id not in seen:
                seen.add(record.id)
                log.append_encoded(record, line[:-1])


# --- contenders ---------------------------------------------------------------------------------------


def ours(source: str, out: str, workers: int = 1, **recipe: Any) -> None:
    from trainers.dataset import Recipe, build

    plain = {"near_duplicates": None, "personal_data": "keep"} | recipe
    build([source], Path(out), Recipe(kind="preference", **plain), workers=workers)


def ours_two(source: str, out: str) -> None:
    ours(source, out, workers=2)


def ours_personal(source: str, out: str) -> None:
    ours(source, out, personal_data="drop")


def ours_near(source: str, out: str) -> None:
    ours(source, out, near_duplicates=0.8, personal_data="drop")


def _row(record: dict[str, Any]) -> dict[str, Any] | None:
    if record["outcome"] != "REVISED":
        return None
    return {
        "trajectory_id": record["id"],
        "prompt": record["messages"],
        "chosen": [record["released"]],
        "rejected": [record["draft"]["answer"]],
    }


def _seen_and_side(row: dict[str, Any], seen: set[bytes]) -> str | None:
    import hashlib

    prompt = " ".join(row["prompt"][0]["content"].casefold().split()).encode()
    pair = (row["chosen"][0]["content"] + "\0" + row["rejected"][0]["content"]).encode()
    digest = hashlib.blake2b(prompt + b"\0" + pair, digest_size=16).digest()
    if digest in seen:
        return None
    seen.add(digest)
    return "test" if hashlib.blake2b(prompt, digest_size=8).digest()[0] < 13 else "train"


def orjson_loop(source: str, out: str) -> None:
    import orjson

    seen: set[bytes] = set()
    Path(out).mkdir()
    files = {side: open(f"{out}/{side}.jsonl", "wb") for side in ("train", "test")}  # noqa: SIM115
    with open(source, "rb") as lines:
        for line in lines:
            row = _row(orjson.loads(line))
            if row is not None and (side := _seen_and_side(row, seen)) is not None:
                files[side].write(orjson.dumps(row) + b"\n")
    for file in files.values():
        file.close()


def datasets_streaming(source: str, out: str) -> None:
    from datasets import load_dataset

    seen: set[bytes] = set()
    Path(out).mkdir()
    files = {side: open(f"{out}/{side}.jsonl", "w") for side in ("train", "test")}  # noqa: SIM115
    for record in load_dataset("json", data_files=source, split="train", streaming=True):
        row = _row(record)
        if row is not None and (side := _seen_and_side(row, seen)) is not None:
            files[side].write(json.dumps(row) + "\n")
    for file in files.values():
        file.close()


def datasets_map(source: str, out: str) -> None:
    from datasets import load_dataset

    seen: set[bytes] = set()
    loaded = load_dataset("json", data_files=source, split="train", cache_dir=f"{out}-cache")
    rows = loaded.filter(lambda record: record["outcome"] == "REVISED")
    rows = rows.map(_row, remove_columns=rows.column_names)
    rows = rows.map(lambda row: {"side": _seen_and_side(row, seen)})
    for side in ("train", "test"):
        rows.filter(lambda row, side=side: row["side"] == side).to_json(f"{out}/{side}.jsonl")
    shutil.rmtree(f"{out}-cache")


CONTENDERS: dict[str, tuple[str, Callable[..., None], str, int]] = {
    "jsonl": ("cai_graph, from JSONL", ours, "log.jsonl", ROUNDS),
    "sqlite": ("cai_graph, from SQLite, checksums verified", ours, "cai.db", ROUNDS),
    "two": ("cai_graph, from JSONL, two processes", ours_two, "log.jsonl", ROUNDS),
    "orjson": ("orjson loop (no ledger, no provenance)", orjson_loop, "log.jsonl", ROUNDS),
    "personal": ("cai_graph, from JSONL, personal data dropped", ours_personal, "log.jsonl", 1),
    "near": ("cai_graph, from JSONL, all defaults (near duplicates, too)", ours_near, "log.jsonl", 1),
    "streaming": ("`datasets`, streaming", datasets_streaming, "log.jsonl", 1),
    "map": ("`datasets`, map and filter", datasets_map, "log.jsonl", 1),
}


def _one(name: str, folder: str) -> None:
    """Run one contender in this process; print CPU seconds, wall seconds and peak memory in MiB as JSON."""
    _, function, source, _ = CONTENDERS[name]
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    wall = time.perf_counter()
    function(f"{folder}/{source}", f"{folder}/out-{name}")
    wall = time.perf_counter() - wall
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))
    # Not ru_maxrss, which starts at the size of the parent process.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps([cpu, wall, int(peak[1]) / 1024 if peak else 0.0]))


def run() -> str:
    """Return the section of RESULTS.md."""
    best: dict[str, list[float]] = {}
    same: set[tuple[str, ...]] = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = write(folder / "log.jsonl", TRAJECTORIES)
        size = (folder / "log.jsonl").stat().st_size
        store(folder / "log.jsonl", folder / "cai.db")
        for number in range(ROUNDS):
            for contender, (_, _, _, rounds) in CONTENDERS.items():
                if number >= rounds:
                    continue
                command = [sys.executable, "-m", "benchmarks.dataset", contender, name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                took = json.loads(done.stdout.splitlines()[-1])
                known = best.setdefault(contender, took)
                best[contender] = [*map(min, known[:2], took[:2]), max(known[2], took[2])]
                out = folder / f"out-{contender}"
                if contender in ("jsonl", "two", "sqlite"):
                    same.add(tuple(sha256_of(out / f"{split}.jsonl") for split in ("train", "test")))
                shutil.rmtree(out)
    counts = {contender: TRAJECTORIES if contender == "sqlite" else lines for contender in best}
    rows = [
        f"| {CONTENDERS[contender][0]} | {cpu:.1f} | {counts[contender] / cpu / 1000:.0f} "
        f"| {wall:.1f} | {memory:.0f} |"
        for contender, (cpu, wall, memory) in best.items()
    ]
    rate = {contender: counts[contender] / took[0] for contender, took in best.items()}
    return "\n".join(
        [
            "## Datasets",
            "",
            f"{lines:,} trajectories of {size / lines / 1000:.1f} KB, half of them revised, 3 % twice, into",
            "preference rows. The least of 3 rounds (1 for the slow ones), each in a process of its own.",
            "",
            "| | CPU s | 1000 a CPU second | wall s | peak MB |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Rate in CPU time to `datasets` streaming: {rate['jsonl'] / rate['streaming']:.1f}, to its map: "
            f"{rate['jsonl'] / rate['map']:.1f} (goal 10); to the orjson loop: "
            f"{rate['jsonl'] / rate['orjson']:.2f}. Two processes in wall time: "
            f"{best['jsonl'][1] / best['two'][1]:.2f} times one (goal 1.6), "
            f"{'with the same bytes' if len(same) == 1 else 'with OTHER bytes'}, as from SQLite.",
        ]
    )


if __name__ == "__main__":
    _one(*sys.argv[1:])
