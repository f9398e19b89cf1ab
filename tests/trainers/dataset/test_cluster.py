"""A dataset on a real Ray cluster, started here: the same bytes as on one machine."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from dataset_logs import bytes_of, kept, revised, says, write
from log_support import comparison, review

from cai_graph.trajectory import Outcome, Record
from trainers.dataset import Recipe, build

RECIPE = 'Recipe(kind="sft", per_user=30, test_share=0.4)'


@pytest.mark.ray
def test_a_cluster_gives_the_same_bytes_and_ledger(tmp_path: Path) -> None:
    """In a process of its own, which is how it ends for sure; Ray's own warnings are not ours."""
    records: list[Record] = [
        make(
            n % 50,
            metadata={"user": f"user {n % 7}"},
            messages=(says(f"the same long request, {n % 40}", "user"),),
        )
        for n in range(150)
        for make in (revised, kept)
    ]
    # They give no row, and are near duplicates of those that do.
    records += [
        revised(n, outcome=Outcome.EXHAUSTED, messages=(says(f"the same long request, {n}", "user"),))
        for n in range(40, 80)
    ]
    records += [review(records[0].id, decision="flip"), review("gone"), comparison(records[2].id)]
    log = write(tmp_path / "log.jsonl", records)
    recipe: Recipe = eval(RECIPE)
    local = build([log], tmp_path / "local", recipe)

    code = f"""
        import ray
        from pathlib import Path
        from trainers.dataset import Recipe, build
        ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
        built = build([{log!r}], Path({str(tmp_path / "ray")!r}), {RECIPE}, engine="ray")
        print(repr(built.ledger))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == repr(local.ledger)
    assert bytes_of(tmp_path / "ray") == bytes_of(local.path)
