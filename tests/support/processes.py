"""Commands under `accelerate launch`, as the docs have it, in two processes of this machine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import pytest
import yaml
from repository import ROOT, read_page

__all__ = ["WAYS", "Way", "by_deepspeed", "kill", "killed_too", "launch"]

DEEPSPEED = ROOT / ".consumers" / "deepspeed"
"""Where `make consumers` puts DeepSpeed, which the project does not need."""
killed_too = pytest.mark.skipif(
    not os.environ.get("CAI_SHARDED_KILLS"), reason="`make soak` kills sharded runs, too"
)
Way = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
"""Each process holds the whole model, or a part of each layer, or of what the optimizer keeps."""
by_deepspeed = pytest.mark.skipif(not DEEPSPEED.exists(), reason="`make consumers` installs DeepSpeed")
WAYS = [pytest.param(way, marks=by_deepspeed) if way.startswith("zero") else way for way in get_args(Way)]


def launch(folder: Path, way: Way, *command: str) -> subprocess.Popen[str]:
    """Start `-m MODULE` or a script with its arguments; accelerate's config is written into `folder`."""
    config: dict[str, Any] = {"distributed_type": "MULTI_GPU", "num_machines": 1}
    if way != "ddp":
        page = read_page("distill.md")
        name = "fsdp2" if way == "fsdp2" else "zero3"
        (block,) = re.findall(rf"^```yaml\n(# {name}\.yaml\n.*?)^```", page, re.DOTALL | re.MULTILINE)
        config = yaml.safe_load(block)
    if way.startswith("zero"):
        config["deepspeed_config"]["zero_stage"] = int(way[-1])
    config |= {"num_processes": 2, "mixed_precision": "no", "main_process_port": _free_port()}
    path = folder / f"{way}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    tests = [entry for entry in sys.path if Path(entry).is_relative_to(ROOT / "tests")]  # with their rewards
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *command],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *tests, DEEPSPEED))),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(running: subprocess.Popen[str]) -> None:
    """End a command and the processes that it started, at once."""
    parent = psutil.Process(running.pid)
    for one in (*parent.children(recursive=True), parent):
        one.kill()
    running.communicate()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
