"""The page of a run of `cai distill`, by its parts."""

from __future__ import annotations

from pathlib import Path

from tiny import manifest, tiny_model

from trainers.checkpoint import seal
from trainers.distill import report
from trainers.distill.pipeline import Done


def test_the_report_counts_what_is_left_out() -> None:
    figure = {"value": 0.5, "low": 0.2, "high": 0.8, "n": 9, "left_out": 1}
    shown = report._estimate(figure).replace("\N{NO-BREAK SPACE}", " ")
    assert shown == "0.5 (0.2 to 0.8), n 9, 1 left out"
    assert report._estimate({"value": None, "n": 0, "left_out": 10}) == "none, 10 left out"


def test_the_report_says_where_the_watch_stopped_a_run(tmp_path: Path) -> None:
    watched = {"stopped_at": 30, "reason": "it fell", "weights_of_step": 10}
    (tmp_path / "ppo").mkdir()
    made = tiny_model(tmp_path / "made")
    seal(tmp_path / "ppo" / "checkpoint", made, manifest(data={"watch": watched}))
    shown = report._training({"ppo": Done(tmp_path / "ppo", {"metrics": {"kl": 0.5}}, 1.0, False)})
    assert (
        "<p>ppo: stopped by the watch at step 30, because it fell; the weights are those of step 10" in shown
    )
