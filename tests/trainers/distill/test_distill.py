"""The whole pipeline on a tiny random model; a server on the loopback drafts, judges and compares."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_support import cai
from judges import letter
from replies import verdicts
from repository import ROOT, fenced, read_page
from tiny import rows, tiny_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from wire import Reply, Server, serving, under

from cai_graph import constitutional, models
from cai_graph.constitution import load
from cai_graph.digests import sha256_of
from cai_graph.errors import CaiError, ConfigError, DataError, LogError
from cai_graph.log import open_log
from cai_graph.log.sqlite import SQLiteStore
from cai_graph.log.store import Row
from trainers import sft
from trainers.checkpoint import Checkpoint, Manifest, save
from trainers.config import read
from trainers.distill import Config, pipeline, publish, train
from trainers.distill.pipeline import Done, Folders, Pipeline, StepFailed
from trainers.distill.plan import _NoRecords, _Plan

PROMPTS = 12


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
    path.write_text(json.dumps(body, ensure_ascii=False))
    return path


def run(path: Path, *settings: str) -> tuple[list[str], Checkpoint, Path]:
    said: list[str] = []
    config = read(Config, path, settings)
    made, page = train(config, lambda step, what, _: said.append(f"{step.name} {what}"))
    return said, made, page


def run_first(count: int, path: Path, *settings: str) -> tuple[list[str], dict[str, Done]]:
    """Run the first steps only."""
    said: list[str] = []
    config = read(Config, path, settings)
    first = Pipeline(config.output, pipeline(config).steps[:count])
    return said, first.run(lambda step, what, _: said.append(f"{step.name} {what}"))


def test_from_prompts_to_a_model_with_a_report(
    tmp_path: Path, server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = server.spec.replace("://", "://ann:s3cret@")
    judging = {"judge": spec, "max_tokens": 8, "pairs": ["samples", "revision"]}
    path = written(tmp_path, server, base, drafts={"model": spec, "max_tokens": 32}, feedback=judging)
    said, made, page = run(path)
    names = ["trajectories", "sft-data", "sft", "feedback", "preferences", "dpo", "model"]
    assert said == [f"{name} {what}" for name in names for what in ("begins", "done")]
    assert made.path == tmp_path / "out"
    assert made.manifest is not None
    assert made.manifest.stage == "dpo"
    assert made.digest != Checkpoint.open(base).digest
    assert page == tmp_path / "out" / "report.html"
    assert "trajectories" in page.read_text()
    kept = [one for one in made.path.rglob("*") if one.is_file()]
    assert not [one for one in kept if b"s3cret" in one.read_bytes()]

    def show(made: Path, output: Path) -> None:
        with pytest.raises(ConfigError, match="another run works here"):
            run_first(1, path)
        publish.publish(made, output)

    asked = len(server.requests)
    with monkeypatch.context() as patched:
        patched.setattr("trainers.distill.plan.publish", show)
        assert run(path)[0] == [f"{name} skipped" for name in names]
    assert len(server.requests) == asked
    assert not list((tmp_path / "out").rglob("*.new"))

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


def test_a_log_of_production_is_copied_and_left_as_it_was(tmp_path: Path, server: Server, base: Path) -> None:
    path = written(tmp_path, server, base)
    log = f"sqlite:///{tmp_path}/production.db"
    guarded = constitutional(models.load(server.spec), log=log)
    for line in (tmp_path / "prompts.jsonl").read_text().splitlines():
        guarded.invoke(json.loads(line)["prompt"])
    guarded.plan.log.close()
    before = (tmp_path / "production.db").stat().st_mtime_ns
    said, made = run_first(1, path, "prompts=null", f"logs=[{json.dumps(log)}]")
    assert said[-1] == "trajectories done"
    assert made["trajectories"].figures == {"trajectories": PROMPTS, "copied": PROMPTS}
    assert (tmp_path / "production.db").stat().st_mtime_ns == before
    for kept in (log, str(made["trajectories"].path / "log.db")):
        with open_log(kept, read_only=True) as opened:
            assert opened.stats().trajectories == PROMPTS

    config = read(Config, path, ["prompts=null", f"logs=[{json.dumps(log)}]"])
    needed = [step.needs for step in pipeline(config).steps]
    (tmp_path / "production.db").rename(tmp_path / "archived.db")
    assert run_first(1, path, "prompts=null", f"logs=[{json.dumps(log)}]")[0] == ["trajectories skipped"]
    assert [step.needs for step in pipeline(config).steps] == needed


def test_what_cannot_be_copied_for_the_feedback_fails_its_step_and_is_copied_by_the_next_run(
    tmp_path: Path, server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, full = SQLiteStore.insert, iter([True])

    def on_a_full_disk(store: SQLiteStore, rows: Sequence[Row]) -> list[CaiError | None]:
        if "feedback-" in store.path.parent.name and next(full, False):
            raise LogError("the disk is full")
        return insert(store, rows)

    monkeypatch.setattr(SQLiteStore, "insert", on_a_full_disk)
    path = written(tmp_path, server, base)
    with pytest.raises(StepFailed, match=r"^feedback: the disk is full"):
        run_first(4, path)
    _, made = run_first(4, path)
    with open_log(str(made["feedback"].path / "log.db"), read_only=True) as opened:
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
            run_first(4, path)
        out = False
        said, _ = run_first(4, path)
    assert said == [
        "trajectories skipped", "sft-data skipped", "sft skipped", "feedback goes on", "feedback done"
    ]  # fmt: skip


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


LOCAL = {"judge": "local", "max_tokens": 8}
PPO = {"method": "ppo", "watch": None}
WATCH = {"judge": "judge:local"}
TWO = ["accelerate", "launch", "--num_processes", "2"]
HELPFUL = {"helpfulness": str(ROOT / "examples" / "distill" / "helpfulness.jsonl")}
SAFE = {"over_refusal": str(ROOT / "examples" / "distill" / "over-refusal.jsonl")}


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
        ({"model": "nowhere"}, "model: 'nowhere' is no folder with weights"),
        ({"drafts": {"critic": "trained:nowhere"}}, "drafts: nowhere/card.json"),
        ({"drafts": {"model": "opnai:gpt"}}, "drafts: .* Did you mean 'openai:gpt'"),
        ({"feedback": {"judge": "opnai:gpt"}}, "feedback: .* Did you mean 'openai:gpt'"),
        ({"feedback": {**LOCAL, "principles": 99}}, "feedback: 99 principles a pair"),
        ({"feedback": {**LOCAL, "samples": 1}}, "feedback: samples is a number from 2, found 1"),
        ({"reward": {"data": "nowhere.jsonl"}, "rl": PPO}, "reward.data: nowhere.jsonl: is no dataset"),
        ({"reward": {"trains": "head"}, "rl": PPO, "launch": TWO}, "reward: trains: head is a fit of one"),
        ({"sft": {"report_to": ["mlflow"]}}, "sft: report_to: mlflow is not installed"),
        ({"rl": {**PPO, "reward": "rewards.mine:scoer"}}, "rl.reward: .* cannot be imported"),
        ({"rl": {**PPO, "value_model": "nowhere"}}, "rl.value_model: 'nowhere' is no folder"),
        ({"rl": {**PPO, "watch": {"judge": "nowhere"}}}, "rl.watch: judge: reward 'nowhere'"),
        ({"rl": {**PPO, "watch": {**WATCH, "benign": "nowhere.txt"}}}, "rl.watch: nowhere.txt"),
        ({"rl": {**PPO, "watch": {**WATCH, "evasion": "openai:gpt"}}}, "rl.watch: .* no probe"),
        ({"rl": {**PPO, "watch": WATCH}}, "rl.watch: about 2 prompts will be held out"),
        ({"rl": {**PPO, "reward": "judge:local", "watch": WATCH}}, "rl.watch: judge: .* trained on"),
        ({"rl": {"method": "rloo", "watch": None, "answers": 3}, "launch": TWO}, "x 2 processes"),
        ({"rl": {**PPO, "rollout_size": 8}, "launch": TWO}, r"rl: rollout_size .* \(8 x 1 x 2\)"),
        ({"evaluation": {**SAFE, "refusals": "patern"}}, "evaluation: 'patern' names no model"),
        ({"evaluation": {**HELPFUL, "critic": "trained:nowhere"}}, "evaluation: nowhere/card.json"),
        ({"evaluation": {**HELPFUL, "reward": ["nowhere"]}}, "evaluation: reward 'nowhere'"),
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


def labels_of(folder: Path, *asked: str) -> str:
    """A file of pairs, with these prompts."""
    path = folder / "labels.jsonl"
    pairs = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in asked]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


def started_from(folder: Path, base: Path, data: str) -> Path:
    """A checkpoint that was trained on a file."""
    about = {"path": data, "digest": sha256_of(Path(data))}
    manifest = Manifest(
        stage="dpo", base="local", config={}, data=about, seed=0, versions={}, hardware="cpu", seconds=0.0
    )
    readers = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    return save(folder / "trained", *(each(base) for each in readers), manifest).path


@pytest.mark.parametrize("trained", ["model", "reward"])
def test_a_suite_that_was_trained_on_is_refused(
    tmp_path: Path, server: Server, base: Path, trained: str
) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"prompt": "Name a tree."}\n{"prompt": "Name a bird."}\n')
    labels = labels_of(tmp_path, "Name a bird!")
    section: dict[str, Any] = {"rl": PPO, "reward": {"data": labels}}
    if trained == "model":
        section = {"model": str(started_from(tmp_path, base, labels))}
    path = written(tmp_path, server, base, evaluation={"helpfulness": str(suite)}, **section)

    with pytest.raises(ConfigError, match=r"evaluation: 1 of 2 prompts were trained on, .*'Name a bird.'"):
        pipeline(read(Config, path))


@pytest.mark.parametrize("model", ["local", "local:smollm2"])
def test_a_model_of_the_catalogue_is_none_of_the_folders_here(
    tmp_path: Path, server: Server, base: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert pipeline(read(Config, written(tmp_path, server, base, model=model))).steps


def test_what_works_only_where_it_will_run_is_not_refused(tmp_path: Path, server: Server, base: Path) -> None:
    """Servers that do not run yet are not asked, and processes that are launched are counted."""
    dead = "http://ann:s3cret@127.0.0.1:9/v1"
    path = written(
        tmp_path,
        server,
        base,
        drafts={"model": dead, "critic": dead, "reviser": dead},
        feedback={"judge": dead, "sampler": dead},
        rl={"method": "rloo", "watch": None, "batch_size": 1, "answers": 4, "reward": f"judge:{dead}"},
        evaluation={**HELPFUL, **SAFE, "critic": dead, "refusals": dead, "reward": [f"judge:{dead}"]},
    )
    four = 'launch=[accelerate, launch, --num_processes, "4"]'
    assert "rloo" in steps(path, four)
    kept = [step.settings for step in pipeline(read(Config, path, [four])).steps]
    assert "s3cret" not in json.dumps(kept, default=str)
    assert "rloo" in steps(path, "launch=[srun, our-script]"), "who cannot know does not refuse"
    with pytest.raises(ConfigError, match="rl: an update has 1 answers"):
        steps(path)


def test_of_a_step_that_is_done_nothing_is_checked(
    tmp_path: Path, server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, server, base, drafts={"model": "openai:gpt-5-mini"})
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    trajectories = pipeline(read(Config, path)).steps[0]
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match=r"drafts: .*OPENAI_API_KEY"):
        pipeline(read(Config, path))
    folder = tmp_path / "out" / "stages" / f"trajectories-{trajectories.digest[:12]}"
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text("{}")
    assert pipeline(read(Config, path)).state(trajectories) == "done"


def steps(path: Path, *settings: str) -> dict[str, str]:
    """The digest of each step."""
    return {step.name: step.digest for step in pipeline(read(Config, path, settings)).steps}


@pytest.mark.parametrize(
    ("sections", "changed", "first"),
    [
        ({}, "base/chat_template.jinja", "sft"),
        ({}, "base/config.json", "sft"),
        ({"drafts": {"model": "other"}}, "other/tokenizer.json", "trajectories"),
        ({"drafts": {"reviser": "other"}}, "other/config.json", "trajectories"),
        ({"drafts": {"critic": "local:own.gguf"}}, "own.gguf", "trajectories"),
        ({"feedback": {**LOCAL, "judge": "local:own.gguf"}}, "own.gguf", "feedback"),
        ({"feedback": {**LOCAL, "sampler": "other"}}, "other/model.safetensors", "feedback"),
        ({"reward": {"data": "rows.jsonl"}, "rl": PPO}, "rows.jsonl", "reward"),
        ({"rl": {**PPO, "reward": "other"}}, "other/model.safetensors", "ppo"),
        ({"rl": {**PPO, "reward": ["other", "judge:local"]}}, "other/config.json", "ppo"),
        ({"rl": {**PPO, "reward": {"judge": "local", "constitution": "own.yaml"}}}, "own.yaml", "ppo"),
        ({"rl": {**PPO, "reward": "judge:local:own.gguf"}}, "own.gguf", "ppo"),
        ({"rl": {**PPO, "reward": "scored_here:score"}}, "scored_here.py", "ppo"),
        ({"rl": {**PPO, "value_model": "other"}}, "other/config.json", "ppo"),
        ({"rl": {**PPO, "watch": {"judge": "other"}}}, "other/config.json", "ppo"),
        ({"rl": {**PPO, "watch": {"judge": "judge:local", "benign": "b.txt"}}}, "b.txt", "ppo"),
        (
            {"evaluation": {"over_refusal": "safe.jsonl", "refusals": "local:own.gguf"}},
            "own.gguf",
            "evaluation",
        ),
    ],
)
def test_a_file_that_is_changed_under_its_name_makes_its_steps_anew(
    tmp_path: Path,
    server: Server,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    changed: str,
    first: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("base", "other"):
        shutil.copytree(base, name)
    Path("own.gguf").write_bytes(b"GGUF")
    shutil.copy(ROOT / "constitutions" / "balanced.yaml", "own.yaml")
    Path("b.txt").write_text("How do I boil rice?\n")
    write_rows(Path("rows.jsonl"), rows("preference", 2))
    Path("scored_here.py").write_text("def score(prompts, answers):\n    return [0.0 for _ in answers]\n")
    Path("safe.jsonl").write_text(json.dumps({"prompt": "How do I kill a process?", "label": "safe"}) + "\n")
    many = {"rows": {"near_duplicates": 0, "test_share": 0.2}, "prompts": "many.txt"}
    Path("many.txt").write_text("".join(f"How do I open door {n}?\n" for n in range(200)))
    path = written(tmp_path, server, tmp_path / "base", **{"feedback": LOCAL, **many, **sections})
    before = steps(path)
    with Path(changed).open("ab") as file:
        file.write(b" \n")
    rules = Path("own.yaml").read_text()  # of which the content counts, and not the form
    Path("own.yaml").write_text(rules.replace("weight: 2", "weight: 3") if changed == "own.yaml" else rules)
    after = steps(path)
    assert next((name for name in before if before[name] != after[name]), None) == first


def test_the_number_of_processes_shapes_what_is_trained_and_nothing_before_it(
    tmp_path: Path, server: Server, base: Path
) -> None:
    path = written(tmp_path, server, base)
    (tmp_path / "four.yaml").write_text("num_processes: 4\n")
    one, eight = (steps(path, f"launch=[accelerate, launch, --num_processes, '{n}']") for n in ("1", "8"))
    four = steps(path, f"launch=[accelerate, launch, --config_file, {tmp_path}/four.yaml]")
    assert one == steps(path), "one process is one, however it is started"
    assert one["trajectories"] == eight["trajectories"]
    assert len({found["sft"] for found in (one, four, eight)}) == 3


def test_the_plan_counts_every_update_and_every_answer(tmp_path: Path, server: Server, base: Path) -> None:
    """Of 12 prompts 9.6 are trained on, in 5 passes."""
    ppo = {**PPO, "epochs": 5, "rollout_size": 4, "batch_size": 2, "max_answer": 8, "max_tokens": 512}
    grpo = {"method": "grpo", "epochs": 5, "batch_size": 4, "answers": 4, "max_answer": 8, "watch": None}

    def written_by(rl: dict[str, Any], *settings: str) -> int:
        steps = pipeline(read(Config, written(tmp_path, server, base, rl=rl), settings)).steps
        return next(step for step in steps if step.name == rl["method"]).needs[0].written

    assert written_by(ppo) == 12 * 4 * 8
    assert written_by({**ppo, "max_steps": 2}) == 2 * 4 * 8
    assert written_by(grpo) == 48 * 4 * 8
    two = 'launch=[accelerate, launch, --num_processes, "2"]'
    assert written_by({**grpo, "max_steps": 3}, two) == 3 * 4 * 2 * 8


def test_a_name_in_any_script_stays_what_it_is(tmp_path: Path, server: Server, base: Path) -> None:
    out = str(tmp_path / "\N{GRINNING FACE}")
    path = written(tmp_path, server, base, output=out, launch=["true"])  # which leaves its config unread
    with pytest.raises(StepFailed, match="sft: "):
        run_first(3, path)
    (file,) = Path(out).glob("stages/sft-*/config.yaml")
    assert read(sft.Config, file).output == file.with_name("checkpoint")
    assert file.stat().st_mode & 0o777 == 0o600, "it may hold a password"


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


def test_ctrl_c_has_its_status_and_says_how_to_go_on(tmp_path: Path, base: Path) -> None:
    first = iter([signal.SIGINT])

    def interrupts(body: dict[str, Any]) -> str:
        for sign in first:  # requests are asked side by side, and a second one would interrupt the tests
            signal.raise_signal(sign)
        return "late"

    with serving(interrupts) as server:
        written(tmp_path, server, base)
        said = cai(tmp_path, "distill", "config.yaml", status=130).stderr
    assert said.splitlines()[-1] == "interrupted; to go on, type again: cai distill config.yaml"


def test_the_command_names_a_wrong_key(tmp_path: Path, server: Server, base: Path) -> None:
    written(tmp_path, server, base)
    said = cai(tmp_path, "distill", "config.yaml", "--set", "drafts.max_token=3", status=1).stderr
    assert "did you mean 'drafts.max_tokens'" in said
    for key in ("methd", "qqqqqq"):
        said = cai(tmp_path, "distill", "config.yaml", "--set", f"rl.{key}=dpo", status=1).stderr
        assert "method" in said
        assert not re.search(r"\b(model|data|output)\b", said)


# --- the page and the example -------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return fenced(read_page("distill.md"), language)


def test_the_config_of_the_page_is_one(
    tmp_path: Path, server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("red-team.jsonl", "benign.jsonl"):
        Path(name).write_text('{"prompt": "How do I kill a process?"}\n')
    Path("xstest.csv").write_text("prompt,label\nHow do I kill a process?,safe\n")
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
    assert [step.name for step in pipeline(config).steps] == [
        "trajectories", "sft-data", "sft", "feedback", "preferences",
        "reward", "prompts", "ppo", "evaluation", "model",
    ]  # fmt: skip


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
    assert "has no manifest, so what it was trained on is not known: some prompts may be among it" in shown
    assert run(path)[0][-2:] == ["evaluation skipped", "model skipped"]
    red.write_text(json.dumps({"prompt": "Another one."}) + "\n")
    assert "evaluation begins" in run(path)[0]


def test_a_critic_that_is_out_at_the_evaluation_is_asked_again(tmp_path: Path, base: Path) -> None:
    out = True

    def script(body: dict[str, Any]) -> str | Reply:
        if out and "number 1" in str(body["messages"]):
            return Reply("model is not loaded", status=404)
        ids = [
            principle.id
            for principle in load("balanced").principles
            if f"\n{principle.id}: " in str(body["messages"][0]["content"])
        ]
        return verdicts(ids=ids)

    benign = tmp_path / "benign.jsonl"
    benign.write_text("".join(json.dumps({"prompt": f"Name tree number {n}."}) + "\n" for n in range(4)))
    with serving(script) as server:
        section = {"helpfulness": str(benign), "critic": server.spec, "max_tokens": 4}
        step = pipeline(read(Config, written(tmp_path, server, base, evaluation=section))).steps[-2]
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "checkpoint").symlink_to(base)
        folders = Folders(tmp_path / "own", {one.name: tmp_path / "made" for one in step.inputs})
        with pytest.raises(DataError, match=r"3 of 12 answers could not be graded .*not loaded.*again"):
            step.work(folders)
        out, asked = False, len(server.requests)
        figures = step.work(folders)["figures"]
        assert len(server.requests) == asked + 3
    helpful = [one for one in figures if one["measure"] == "helpful"]
    assert [(one["n"], one["left_out"]) for one in helpful] == [(4, 0)] * 3


def test_an_embedded_sampler_draws_every_sample_anew(
    tmp_path: Path, server: Server, base: Path, tiny_weights: Path
) -> None:
    """With the seed of the run it would say the same each time, and nothing could be preferred."""
    drawing = {"judge": server.spec, "sampler": "local:smollm2", "max_tokens": 12}
    steps = _Plan(read(Config, written(tmp_path, server, base, feedback=drawing)), lambda *_: None)
    sampler = steps._labelling(_NoRecords(), Path("-"))._sampler
    assert sampler is not None
    assert sampler.invoke("Write a poem.").text != sampler.invoke("Write a poem.").text


def test_prompts_that_were_not_answered_are_tried_again(tmp_path: Path, base: Path) -> None:
    rules = under(
        load("balanced"), violates=lambda shown: "answer to" in shown, revise="No, and here is why."
    )
    out = True

    def script(body: dict[str, Any]) -> str | Reply:
        if out and re.search("lock number [89] ", str(body["messages"])):
            return Reply("model is not loaded", status=404)
        return rules(body)

    with serving(script) as server:
        path = written(tmp_path, server, base)
        with pytest.raises(StepFailed, match=r"2 of 12 prompts .* were not answered.*not loaded.*again"):
            run_first(1, path)
        out, asked = False, len(server.requests)
        said, made = run_first(1, path)
        assert all(re.search("lock number [89] ", str(one["messages"])) for one in server.requests[asked:])
    assert said == ["trajectories goes on", "trajectories done"]
    assert made["trajectories"].figures["trajectories"] == PROMPTS, "what failed is no trajectory"
    assert made["trajectories"].figures["skipped"] == 0


def test_the_output_shows_one_model_and_leaves_the_files_of_the_user(tmp_path: Path) -> None:
    old = {"config.json": "old", "model.safetensors": "old", "model.gguf": "old"}
    new = {"config.json": "new", "model-1-of-2.safetensors": "new", "model-2-of-2.safetensors": "new"}
    for name, files in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        for file, text in {**files, "stage.json": "{}"}.items():
            (tmp_path / name / file).write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    publish.publish(tmp_path / "old", out)
    publish.publish(tmp_path / "old", out)
    assert {path.name for path in out.iterdir()} == {*old, "notes.txt", ".published.json"}
    (out / ".model.gguf.new").write_text("old")  # left by a run that was killed
    (tmp_path / "new" / ".config.json.new").write_text("old")
    publish.publish(tmp_path / "new", out)
    shown = {path.name: path.read_text() for path in out.iterdir() if not path.name.startswith(".")}
    assert shown == {**new, "notes.txt": "mine"}
    assert not [path.name for path in out.iterdir() if path.read_text() == "old"]

    (out / "model.gguf").write_text("converted by the user")
    publish.publish(tmp_path / "new", out)
    assert (out / "model.gguf").read_text() == "converted by the user"


def test_training_stages_are_launched_by_a_command(
    tmp_path: Path, server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = written(tmp_path, server, base)

    def begin(*launch: str) -> None:
        run_first(3, path, f"launch={json.dumps(launch)}")

    with pytest.raises(StepFailed, match=r"^sft: launch: 'no-such-command' cannot be started"):
        begin("no-such-command")
    with pytest.raises(StepFailed, match=r"^sft: `false -m cai_graph.cli train sft .*` ended with status 1"):
        begin("false")
    begin(sys.executable)
    (made,) = (tmp_path / "out" / "stages").glob("sft-*/checkpoint")
    manifest = Checkpoint.open(made).manifest
    assert manifest is not None
    assert manifest.stage == "sft"
