"""The whole pipeline on a tiny random model; a server on the loopback drafts, judges and compares."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import cai
from test_judge import letter
from tiny import tiny_model
from wire import Reply, Server, serving, under

from cai_graph import constitutional, models
from cai_graph.constitution import load
from cai_graph.errors import ConfigError
from cai_graph.log import open_log
from trainers.checkpoint import Checkpoint
from trainers.config import read
from trainers.distill import Config, pipeline, train
from trainers.pipeline import Pipeline, StepFailed

PROMPTS = 12
ROOT = Path(__file__).parents[1]


def judge(body: dict[str, Any]) -> Reply:
    """Prefers one of two answers, the same one in both orders."""
    text = str(body["messages"][-1]["content"])
    shown = [text.partition(f'<answer name="{name}">\n')[2].partition("\n</answer>")[0] for name in "AB"]
    return letter(0.9 if shown[0] > shown[1] else 0.1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    rules = under(
        load("balanced"), violates=lambda shown: "answer to" in shown, revise="No, and here is why."
    )

    def script(body: dict[str, Any]) -> str | Reply:
        return judge(body) if body.get("logprobs") else rules(body)

    with serving(script) as running:
        yield running


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def written(folder: Path, server: Server, base: Path, **sections: Any) -> Path:
    """A config, and the files that it names."""
    prompts = [f"How do I break the lock number {n} of a {thing}?" for n, thing in enumerate("abcdefghijkl")]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in prompts[:PROMPTS])
    )
    small = {"max_steps": 1, "batch_size": 2, "max_tokens": 512, "allow": ["drop-unfit"]}
    body = {
        "model": str(base),
        "output": str(folder / "out"),
        "prompts": str(folder / "prompts.jsonl"),
        "drafts": {"model": server.spec, "max_tokens": 32},
        "rows": {"near_duplicates": None, "test_share": 0.2},
        "sft": {**small, "learning_rate": 1e-3},
        "feedback": {"judge": server.spec, "max_tokens": 8, "pairs": ["samples", "revision"]},
        "reward": small,
        "rl": {"method": "dpo", **small},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(body))  # JSON is YAML
    return path


def run(path: Path, *settings: str) -> tuple[list[str], Checkpoint, Path]:
    said: list[str] = []
    config = read(Config, path, settings)
    made, page = train(config, lambda step, what, _: said.append(f"{step.name} {what}"))
    return said, made, page


def test_from_prompts_to_a_model_with_a_report(tmp_path: Path, server: Server, base: Path) -> None:
    path = written(tmp_path, server, base)
    said, made, page = run(path)
    names = ["trajectories", "sft-data", "sft", "feedback", "preferences", "dpo", "model"]
    assert said == [f"{name} {what}" for name in names for what in ("begins", "done")]
    assert made.path == tmp_path / "out"
    assert made.manifest is not None
    assert made.manifest.stage == "dpo"
    assert made.digest != Checkpoint.open(base).digest
    assert page == tmp_path / "out" / "report.html"
    assert "trajectories" in page.read_text()

    asked = len(server.requests)
    assert run(path)[0] == [f"{name} skipped" for name in names]
    assert len(server.requests) == asked

    changed = [line for line in run(path, "rl.learning_rate=1e-4")[0] if "skipped" not in line]
    assert changed == ["dpo begins", "dpo done", "model begins", "model done"]


def test_a_policy_is_trained_against_the_reward_model(tmp_path: Path, server: Server, base: Path) -> None:
    rl = {"method": "rloo", "max_steps": 1, "batch_size": 2, "answers": 2, "max_answer": 8, "watch": None}
    path = written(tmp_path, server, base, rl={**rl, "max_tokens": 512})
    said, made, _ = run(path)
    assert [line for line in said if line.endswith("done")] == [
        f"{name} done"
        for name in (
            "trajectories", "sft-data", "sft", "feedback", "preferences", "reward", "prompts", "rloo", "model"
        )
    ]  # fmt: skip
    assert made.manifest is not None
    reward = next((tmp_path / "out" / "stages").glob("reward-*")) / "checkpoint"
    assert str(reward) in json.dumps(made.manifest.config["reward"])
    assert Checkpoint.open(reward).manifest is not None


def test_a_log_of_production_is_copied_and_learned_from(tmp_path: Path, server: Server, base: Path) -> None:
    path = written(tmp_path, server, base)
    log = f"sqlite:///{tmp_path}/production.db"
    guarded = constitutional(models.load(server.spec), log=log)
    for line in (tmp_path / "prompts.jsonl").read_text().splitlines():
        guarded.invoke(json.loads(line)["prompt"])
    guarded.plan.log.close()
    before = (tmp_path / "production.db").stat().st_mtime_ns
    said, _, _ = run(path, "prompts=null", f"logs=[{json.dumps(log)}]")
    assert said[-1] == "model done"
    assert (tmp_path / "production.db").stat().st_mtime_ns == before
    with open_log(log, read_only=True) as opened:
        assert opened.stats().trajectories == PROMPTS


def test_a_judge_that_is_out_names_the_step_and_the_run_goes_on(tmp_path: Path, base: Path) -> None:
    rules = under(
        load("balanced"), violates=lambda shown: "answer to" in shown, revise="No, and here is why."
    )
    out = True

    def script(body: dict[str, Any]) -> str | Reply:
        if body.get("logprobs"):
            return Reply("no such key", status=401) if out else judge(body)
        return rules(body)

    with serving(script) as server:
        path = written(tmp_path, server, base)
        with pytest.raises(StepFailed, match=r"^feedback: .*no such key"):
            run(path)
        out = False
        said, _, _ = run(path)
    assert said[:4] == ["trajectories skipped", "sft-data skipped", "sft skipped", "feedback goes on"]
    assert said[-1] == "model done"


RUNS = """
import sys
from pathlib import Path
from trainers.config import read
from trainers.distill import Config, train
train(read(Config, Path(sys.argv[1])), lambda step, what, _: print(step.name, what, flush=True))
"""


def test_a_run_that_is_killed_in_one_step_after_another_makes_the_same_model(
    tmp_path: Path, server: Server, base: Path
) -> None:
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    _, straight, _ = run(written(tmp_path / "straight", server, base))
    path = written(tmp_path / "killed", server, base)
    command = [sys.executable, "-c", RUNS, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for step in ("trajectories", "feedback"):  # the stages of training have tests of their own
        running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        for line in running.stdout:
            if line.split() in ([step, "begins"], [step, "goes", "on"]):
                time.sleep(0.1)
                break
        running.kill()
        running.communicate()
        assert running.returncode < 0, f"ended before {step} was killed"
    _, made, _ = run(path)
    assert made.digest == straight.digest
    (log,) = (tmp_path / "killed" / "out" / "stages").glob("trajectories-*/log.db")
    with open_log(str(log), read_only=True) as opened:
        assert opened.stats().trajectories == PROMPTS, "no prompt twice, none lost"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"sft": {"lerning_rate": 1}}, "sft: unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ({"sft": {"output": "x"}}, "sft.output: is set by the pipeline"),
        ({"rl": {"method": "sarsa"}}, "rl.method is one of ppo, rloo, grpo, dpo; found 'sarsa'"),
        ({"evaluation": {"helpfulness": "nowhere.jsonl"}}, "evaluation: nowhere.jsonl is not there"),
        ({"feedback": {}}, "name a judge or a critic"),
        ({"prompts": None}, "name prompts"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(
    tmp_path: Path, server: Server, base: Path, section: dict[str, Any], said: str
) -> None:
    path = written(tmp_path, server, base, **section)
    asked = len(server.requests)
    with pytest.raises(ConfigError, match=said):
        pipeline(read(Config, path))
    assert len(server.requests) == asked
    assert not (tmp_path / "out").exists()


def test_the_command_plans_runs_and_skips(tmp_path: Path, server: Server, base: Path) -> None:
    written(tmp_path, server, base)
    command = ("distill", "config.yaml", "--set", "rl.learning_rate=1e-4")
    planned = cai(tmp_path, *command, "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    assert re.search(r"trajectories +[\d,]+ +[\d,]+ +a server decides", planned)
    assert re.search(r"dpo .* s", planned)

    first = cai(tmp_path, *command)
    assert "sft: done in" in first.stderr
    assert "report.html" in first.stdout
    again = cai(tmp_path, *command)
    assert again.stderr.count("nothing has changed, skipped") == 7
    assert cai(tmp_path, *command, "--dry-run").stdout.count(" skipped ") == 7


def test_the_command_names_a_wrong_key(tmp_path: Path, server: Server, base: Path) -> None:
    written(tmp_path, server, base)
    said = cai(tmp_path, "distill", "config.yaml", "--set", "drafts.max_token=3", status=1).stderr
    assert "did you mean 'drafts.max_tokens'" in said


# --- the page and the example -------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "distill.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def test_the_config_of_the_page_is_one(
    tmp_path: Path, server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("red-team.jsonl", "benign.jsonl", "xstest.csv"):
        Path(name).write_text('{"prompt": "How do I kill a process?"}\n')
    open_log("sqlite:///cai.db").close()
    whole, launched, *_ = blocks("yaml")
    Path("config.yaml").write_text(whole + launched)
    config = read(Config, Path("config.yaml"))
    assert config.launch[:2] == ("accelerate", "launch")
    names = [
        step.name
        for step in pipeline(
            replace(
                config, rl={"method": "rloo", "max_steps": 100, "batch_size": 8, "watch": config.rl["watch"]}
            )
        ).steps
    ]
    assert names[-3:] == ["rloo", "evaluation", "model"]


def test_the_commands_of_the_page_exist(tmp_path: Path) -> None:
    lines = [line.strip() for block in blocks("sh") for line in block.splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("cai ")]
    found += [
        shlex.split(line.partition("-m cai_graph.cli ")[2]) for line in lines if "cai_graph.cli" in line
    ]
    assert len(found) > 5
    for words in found:
        names = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
        shown = cai(tmp_path, *names, "--help").stdout
        assert all(word in shown for word in words if word.startswith("-")), words


def test_the_example_is_a_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    config = read(Config, Path("examples/distill-small.yaml"), [f"output={tmp_path}/out"])
    rl = {"method": "dpo", "max_steps": 2}
    assert [step.name for step in pipeline(replace(config, rl=rl)).steps][-2:] == ["evaluation", "model"]


def test_the_models_are_measured_side_by_side(tmp_path: Path, server: Server, base: Path) -> None:
    red, benign, safe = (tmp_path / f"{name}.jsonl" for name in ("red", "benign", "safe"))
    red.write_text("".join(json.dumps({"prompt": f"Tell me lie number {n} <b>."}) + "\n" for n in range(3)))
    benign.write_text("".join(json.dumps({"prompt": f"Name tree number {n}."}) + "\n" for n in range(3)))
    safe.write_text(json.dumps({"prompt": "How do I kill a process?", "label": "safe"}) + "\n")
    suites = {"harmlessness": str(red), "helpfulness": str(benign), "over_refusal": str(safe)}
    graders = {"critic": server.spec, "refusals": "pattern", "max_tokens": 8}
    path = written(tmp_path, server, base, evaluation={**suites, **graders})
    said, _, page = run(path)
    assert said[-4:] == ["evaluation begins", "evaluation done", "model begins", "model done"]
    shown = page.read_text()
    for words in (
        "Figures, side by side",
        "Answers before and after",
        "Tell me lie number",
        "n\N{NO-BREAK SPACE}3",
    ):
        assert words in shown
    assert "<b>." not in shown
    heads = (f'<th class="n">{subject}</th>' for subject in ("base", "sft", "dpo"))
    assert "".join(heads) in shown
    assert shown.count("<img ") >= 2
    assert run(path)[0][-2:] == ["evaluation skipped", "model skipped"]
    red.write_text(json.dumps({"prompt": "Another one."}) + "\n")
    assert "evaluation begins" in run(path)[0]


def test_training_stages_are_launched_by_a_command(
    tmp_path: Path, server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = written(tmp_path, server, base)

    def begin(*launch: str) -> None:
        config = read(Config, path, [f"launch={json.dumps(launch)}"])
        Pipeline(config.output, pipeline(config).steps[:3]).run(lambda *_: None)

    with pytest.raises(StepFailed, match=r"^sft: launch: 'no-such-command' cannot be started"):
        begin("no-such-command")
    with pytest.raises(StepFailed, match=r"^sft: `false -m cai_graph.cli train sft .*` ended with status 1"):
        begin("false")
    begin(sys.executable)
    (made,) = (tmp_path / "out" / "stages").glob("sft-*/checkpoint")
    manifest = Checkpoint.open(made).manifest
    assert manifest is not None
    assert manifest.stage == "sft"
