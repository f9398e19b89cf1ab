"""Our configs as commands of verl and OpenRLHF, read by their own config loaders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import OPTIONAL, start, without
from dataset_logs import kept, write

from cai_graph.errors import ConfigError
from trainers import online, ppo
from trainers.dataset import Recipe, build
from trainers.elsewhere import Command, Engine, command
from trainers.stages import Lora
from trainers.watch import WatchConfig

CONFIGS = Path(os.environ.get("CAI_CONSUMERS", ".consumers")).absolute() / "configs"
"""Filled by `make consumers`."""

needs_consumers = pytest.mark.skipif(
    not CONFIGS.is_dir(), reason="verl and OpenRLHF are not beside the project"
)

VERL = """
import json, sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
import os
with initialize_config_dir(os.path.join(sys.argv[1], "verl", "trainer", "config"), version_base=None):
    found = compose("ppo_trainer", overrides=sys.argv[2:])
print("FOUND" + json.dumps(OmegaConf.to_container(found, resolve=True)))
"""

# The parser and the checks stand in the script's main block, and its imports need GPUs' packages.
OPENRLHF = """
import argparse, ast, json, os, sys, types
from datetime import datetime
folder = os.path.join(sys.argv[1], "openrlhf")
sys.argv[1:] = sys.argv[2:]
for name in ("openrlhf", "openrlhf.utils"):
    package = types.ModuleType(name)
    package.__path__ = [os.path.join(folder, *name.split(".")[1:])]
    sys.modules[name] = package
tree = ast.parse(open(os.path.join(folder, "cli", "train_ppo_ray.py")).read())
main = next(node for node in tree.body if isinstance(node, ast.If))
def train(args):
    print("FOUND" + json.dumps(args, default=vars))
exec(compile(ast.Module(main.body, []), "main", "exec"), {**globals(), "train": train})
"""


def read_by(script: str, arguments: tuple[str, ...]) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, str(CONFIGS), *arguments[3:]],
        env={**os.environ, "PYTHONPATH": str(CONFIGS)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.rpartition("FOUND")[2])


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[Engine], Path]:
    log = write(tmp_path / "log.jsonl", [kept(number) for number in range(160)])

    def made(engine: Engine) -> Path:
        return build([log], tmp_path / engine, Recipe(kind="prompts"), format=engine).path

    return made


def of(stage: str, folder: Path, **changes: Any) -> online.Config | ppo.Config:
    reward = folder / "rm"
    reward.mkdir(exist_ok=True)
    shared: dict[str, Any] = {
        "model": "policy",
        "data": folder / "own",
        "output": folder / "out",
        "reward": str(reward),
        "watch": WatchConfig(judge="judge:local"),
        "learning_rate": 2e-6,
        "batch_size": 4,
        "accumulate": 2,
        "max_tokens": 1024,
        "max_answer": 256,
        "seed": 7,
        "max_steps": 50,
        "schedule": "constant",
    } | changes
    return ppo.Config(**shared) if stage == "ppo" else online.Config(**shared, algorithm=stage)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["ppo", "online"])
def test_a_command_is_printed_without_an_extra(
    stage: str, prompts: Callable[[Engine], Path], tmp_path: Path
) -> None:
    (tmp_path / "rm").mkdir()
    told = [f"--set={one}" for one in ("model=m", "data=d", "output=o", "reward=rm", "watch=null")]

    args = ("train", "export", stage, "openrlhf", str(prompts("openrlhf")), *told)
    process = start(tmp_path, *args, env=without(tmp_path, *OPTIONAL))
    printed, said = process.communicate(timeout=120)

    assert process.returncode == 0, said
    assert "openrlhf.cli.train_ppo_ray" in printed


@needs_consumers
@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_verls_own_loader_reads_what_was_meant(
    stage: str, prompts: Callable[[Engine], Path], tmp_path: Path
) -> None:
    data = prompts("verl")
    config = of(stage, tmp_path, lora=Lora(rank=8), **({"rollout_size": 128} if stage == "ppo" else {}))
    made = command(config, "verl", data, gpus=8)

    found = read_by(VERL, made.arguments)
    assert found["algorithm"]["adv_estimator"] == ("gae" if stage == "ppo" else stage)
    assert (found["data"]["max_prompt_length"], found["data"]["max_response_length"]) == (768, 256)
    rollout, actor = (found["actor_rollout_ref"][name] for name in ("rollout", "actor"))
    # 64 answers in a step of the optimizer: 4 x 2 x 8 GPUs.
    assert actor["ppo_mini_batch_size"] * rollout["n"] == 64
    assert found["data"]["train_batch_size"] * rollout["n"] == (128 if stage == "ppo" else 64)
    assert actor["optim"]["lr"] == 2e-6
    price = actor["kl_loss_coef"] if actor["use_kl_loss"] else found["algorithm"]["kl_ctrl"]["kl_coef"]
    assert price == 0.05
    assert actor["use_kl_loss"] == (stage == "grpo") != found["algorithm"]["use_kl_in_reward"]
    assert found["actor_rollout_ref"]["model"]["lora_rank"] == 8
    assert found["reward"]["reward_model"]["model_path"] == str(tmp_path / "rm")
    for name in ("train_files", "val_files"):
        assert Path(found["data"][name]).exists()
    assert made.differs[0] == "watch: verl has none; nothing stops a run that is hacked"


@needs_consumers
@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_openrlhfs_own_parser_and_checks_take_it(
    stage: str, prompts: Callable[[Engine], Path], tmp_path: Path
) -> None:
    config = of(stage, tmp_path, **({"rollout_size": 128, "kl_target": 6.0} if stage == "ppo" else {}))
    made = command(config, "openrlhf", prompts("openrlhf"), gpus=4, nodes=2)

    found = read_by(OPENRLHF, made.arguments)
    assert (
        found["algo"]["advantage"]["estimator"] == {"ppo": "gae", "rloo": "rloo", "grpo": "group_norm"}[stage]
    )
    assert found["algo"]["kl"]["init_coef"] == 0.05
    assert found["algo"]["kl"]["use_loss"] == (stage == "grpo")
    assert found["train"]["batch_size"] == 64
    assert found["rollout"]["batch_size"] * found["rollout"]["n_samples_per_prompt"] == (
        128 if stage == "ppo" else 64
    )
    assert (found["actor"]["num_nodes"], found["actor"]["num_gpus_per_node"]) == (2, 4)
    assert found["actor"]["adam"]["lr"] == 2e-6
    assert (found["rollout"]["max_new_tokens"], found["data"]["max_len"]) == (256, 1024)
    assert Path(found["data"]["prompt_dataset"]).exists()


@needs_consumers
def test_a_word_that_verl_does_not_know_is_refused_by_its_loader(
    prompts: Callable[[Engine], Path], tmp_path: Path
) -> None:
    made = command(of("rloo", tmp_path), "verl", prompts("verl"))

    with pytest.raises(AssertionError, match=r"Key 'trainig' is not in struct|Could not override"):
        read_by(VERL, (*made.arguments, "trainig.seed=1"))


def test_what_cannot_be_carried_over_is_refused_or_said(
    prompts: Callable[[Engine], Path], tmp_path: Path
) -> None:
    data = prompts("verl")
    with pytest.raises(ConfigError, match=r"holds prompts for verl; build it with .* --format openrlhf"):
        command(of("rloo", tmp_path), "openrlhf", data)
    with pytest.raises(ConfigError, match="verl takes the folder of one reward model"):
        command(of("rloo", tmp_path, reward="judge:local"), "verl", data)
    with pytest.raises(ConfigError, match="rollout_size 104 is no multiple of the 24 answers"):
        command(of("ppo", tmp_path, rollout_size=104), "verl", data, gpus=3)
    with pytest.raises(ConfigError, match="engine is one of verl, openrlhf; found 'trl'"):
        command(of("rloo", tmp_path), "trl", data)  # type: ignore[arg-type]

    made = command(of("ppo", tmp_path, schedule="linear", watch=None), "verl", data, gpus=1)
    assert made.differs == (
        "missing_eos_penalty: not carried over to verl",
        "schedule: verl has no linear one; its cosine falls to the same end",
    )


def test_an_engine_makes_as_many_passes_as_the_updates_need(
    prompts: Callable[[Engine], Path], tmp_path: Path
) -> None:
    """151 prompts, of which an update draws 16: 9 whole updates a pass, and a smaller one of OpenRLHF's."""
    config = of("rloo", tmp_path, max_steps=48, watch=None)
    verl = command(config, "verl", prompts("verl"))
    assert {"trainer.total_epochs=6", "trainer.total_training_steps=48"} <= set(verl.arguments)
    assert verl.differs == ()

    data = prompts("openrlhf")
    many = command(config, "openrlhf", data)
    assert option(many, "--train.num_episodes") == "5"
    assert "--data.max_samples" not in many.arguments
    assert many.differs == ("max_steps: openrlhf makes whole passes, here 50 updates",)
    few = command(of("rloo", tmp_path, max_steps=3, watch=None), "openrlhf", data)
    assert (option(few, "--train.num_episodes"), option(few, "--data.max_samples")) == ("1", "48")
    assert few.differs == ()

    half = command(of("rloo", tmp_path, max_steps=None, epochs=1.5, watch=None), "openrlhf", data)
    assert half.differs == ("epochs: openrlhf makes whole passes over the prompts, here 2",)
    with pytest.raises(ConfigError, match="holds 151 prompts, and an update draws 160"):
        command(of("rloo", tmp_path, batch_size=40), "openrlhf", data)


def option(made: Command, name: str) -> str:
    return made.arguments[made.arguments.index(name) + 1]
