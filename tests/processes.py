"""Commands under `accelerate launch`, as the docs have it, in two processes of this machine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import psutil
import yaml

__all__ = ["Way", "kill", "launch"]

ROOT = Path(__file__).parents[1]
Way = Literal["ddp", "fsdp2"]
"""Each process holds the whole model, or a part of each layer."""


def launch(folder: Path, way: Way, *command: str) -> subprocess.Popen[str]:
    """Start `-m MODULE` or a script with its arguments; accelerate's config is written into `folder`."""
    if way == "ddp":
        config = {"distributed_type": "MULTI_GPU", "num_machines": 1}
    else:
        page = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"^```yaml\n(# fsdp2\.yaml\n.*?)^```", page, re.DOTALL | re.MULTILINE)
        config = yaml.safe_load(block)
    config |= {"num_processes": 2, "mixed_precision": "no", "main_process_port": _free_port()}
    path = folder / f"{way}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *command],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
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
