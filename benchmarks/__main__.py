"""Runs the benchmarks and writes their results to benchmarks/RESULTS.md; `make bench` runs all of them.

    python -m benchmarks                 all benchmarks
    python -m benchmarks overhead log    some benchmarks; the other sections of RESULTS.md are not changed

Each benchmark is a module with `run() -> str`, which returns its section in Markdown. Every figure comes
from one interleaved run of all its contenders on one machine; so compare ratios, not absolute times.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
ALL = (
    "overhead",
    "log",
    "log_postgres",
    "probe",
    "turns",
    "critic",
    "engines",
    "dataset",
    "streaming",
    "feedback",
    "shadow",
    "cascade",
    "training",
    "reward",
    "pipeline",
    "refusals",
    "claims",
    "peers",
    "ppo",
)
HEAD = """# Benchmark results

Written by `make bench` (`python -m benchmarks NAME` for one section). The machines are noisy: read the
ratios, which come from one interleaved run, and not the absolute times.
"""


def _is_size(key: str, value: str) -> bool:
    """Return whether a variable sets the size of a benchmark; these are reported with the figures."""
    return key.startswith("CAI_BENCH_") and value.isdigit()


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in ALL]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    for name in names or ALL:
        print(f"== {name}", flush=True)
        text = importlib.import_module(f"benchmarks.{name}").run().strip()
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        sizes = [f"{key}={value} " for key, value in sorted(os.environ.items()) if _is_size(key, value)]
        command = f"{''.join(sizes)}python -m benchmarks {name}"
        stamp = f"_{datetime.now(UTC):%Y-%m-%d}, {machine}, `{command}`_"
        # Read after the run: another may have written its section meanwhile.
        sections = _sections(RESULTS.read_text()) if RESULTS.exists() else {}
        sections[name] = f"{text}\n\n{stamp}\n"
        print(sections[name], flush=True)
        body = "\n".join(f"<!-- {name} -->\n{sections[name]}" for name in ALL if name in sections)
        RESULTS.write_text(f"{HEAD}\n{body}")
    return 0


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"<!-- (\w+) -->\n", text)[1:]
    return {name: body.strip() + "\n" for name, body in zip(parts[::2], parts[1::2], strict=True)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
