"""The README's way from a log to a better model: its five commands, run as printed on a smaller scale.

Smaller: two blocks of the tiny model, one update a stage, no evaluation. A server on the loopback is the app
of production, and judges in place of the 1.5B model.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_support import cai
from judges import letter
from langchain_core.runnables import RunnableLambda
from repository import ROOT, read_page
from wire import Reply, serving, under

from cai_graph import constitutional, local, models, open_log
from cai_graph.constitution import load
from cai_graph.local.gguf import first_blocks
from cai_graph.trajectory import Label
from trainers.checkpoint import Checkpoint

SECTION = read_page("README.md").partition("## From a production log to a better local model")[2]


def commands() -> list[list[str]]:
    block = re.search(r"^```sh\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
    assert block
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]


def smaller(text: str, weights: Path, judge: str) -> str:
    """The same words with smaller models and counts."""
    for pattern, found in (
        (r"local:smollm2", f"local:{weights}"),
        (r"(critic:|--critic) local\b", rf"\1 {judge}"),
        (r"max_steps: \d+", "max_steps: 1"),
        (r"rollout_size: \d+", "rollout_size: 4"),
        (r"max_answer: \d+", "max_answer: 8"),
        (r"max_tokens: 64", "max_tokens: 8"),
        (r"(?ms)^evaluation:.*", ""),
    ):
        text = re.sub(pattern, found, text)
    return text


@pytest.mark.local
def test_the_five_commands_lead_from_a_log_to_a_model_that_answers(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "short.gguf"
    first_blocks(tiny_weights, 2, weights)
    shutil.copytree(ROOT / "examples" / "distill", tmp_path / "examples" / "distill")
    prompts = tmp_path / "examples" / "distill" / "prompts.jsonl"
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:8]))
    rules = under(
        load("balanced"), violates=lambda shown: "answer to" in shown, revise="I would rather not, and why."
    )

    def judge(body: dict[str, Any]) -> str | Reply:
        return letter(0.9) if body.get("logprobs") else rules(body)

    with serving(judge) as server:
        config = (ROOT / "examples" / "distill-log.yaml").read_text()
        small = smaller(config, weights, server.spec)
        (tmp_path / "examples" / "distill-log.yaml").write_text(small)
        run, plan, distil, ask, export = commands()
        assert [words[0] for words in (run, plan, distil, ask, export)] == [
            "run", "distill", "distill", "ask", "model"
        ]  # fmt: skip
        said = {}
        for words in (run, plan, distil, ask, export):
            scaled = list(words)
            for option in ("--model", "--critic")[words is ask :]:  # what answers in the end is our own
                if option in scaled:
                    scaled[scaled.index(option) + 1] = server.spec
            said[" ".join(words[:2])] = cai(tmp_path, *scaled)
    made = Checkpoint.open(tmp_path / "runs" / "log")
    assert made.manifest is not None
    assert made.manifest.stage == "ppo"
    assert "runs/log/report.html" in said["distill examples/distill-log.yaml"].stdout
    assert "I would rather not" not in said["ask How do I boil an egg?"].stdout  # the server's own words
    assert local.weights(str(made.path)) == made.path / "model.gguf"
    assert critic_of_an_app(f"local:{made.path}", tmp_path) == "local:log"


def critic_of_an_app(spec: str, folder: Path) -> str:
    """Wrap an app with a critic, which in eight tokens can say no verdict; return who judged its answer."""
    critic = models.load(spec, max_tokens=8)
    app = RunnableLambda(lambda question: f"You asked: {question}")
    url = f"sqlite:///{folder}/judged.db"
    guarded = constitutional(app, critic=critic, reviser=critic, log=url, on_unreadable="open")
    assert guarded.invoke("What is a tree?") == "You asked: What is a tree?"
    with open_log(url, read_only=True) as log:
        (trajectory,) = log.read(kind="trajectory")
    critique = trajectory.rounds[0].critique
    assert {verdict.label for verdict in critique.verdicts} == {Label.UNREADABLE}
    return str(critique.critic)
