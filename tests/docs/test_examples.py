"""Each example runs as its first lines say, over the real client and a server on the loopback."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from repository import EXAMPLES, ROOT
from wire import Reply, role, serving, under

from cai_graph import open_log
from cai_graph.constitution import load
from cai_graph.trajectory import Outcome, Trajectory

BALANCED = load("balanced")
CANARY = "CANARY-draft"
RELEASED = "a better answer"


def bad_drafts(draft: str | Reply = CANARY) -> Callable[[dict[str, Any]], str | Reply]:
    """A model whose drafts carry the canary, which its own verdicts object to."""
    return under(
        BALANCED, draft=lambda _: draft, violates=lambda shown: CANARY in shown.rpartition("<answer>")[2]
    )


def run(name: str, *args: str) -> None:
    """Run an example as `python examples/NAME ARGS` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *args])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def trajectories(folder: Path) -> list[Trajectory]:
    with open_log(folder / "cai.db", read_only=True) as log:
        return list(log.read(kind="trajectory"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(command: list[str], port: int, ready: str, folder: Path, **env: str) -> Iterator[str]:
    """Run a server of an example in a process of its own, and give its address once it answers."""
    with (folder / "server.log").open("wb") as told:
        process = subprocess.Popen(
            command, cwd=folder, stdout=told, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
                try:
                    if httpx.get(address + ready, timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            else:
                pytest.fail((folder / "server.log").read_text()[-3000:])
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_the_retrieval_chain_is_judged_beside_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(bad_drafts()) as server:
        run("rag_chain.py", "How long do repairs take?", server.spec)

    said = capsys.readouterr().out
    assert said.startswith(RELEASED)
    assert "2 pages were read" in said
    [critique, *_] = [body for body in server.requests if role(body) == "critique"]
    assert "a new sole costs 45" in critique["messages"][-1]["content"]
    [kept] = trajectories(tmp_path)
    assert "a new sole costs 45" in kept.context["pages"]


def test_the_agent_calls_its_tool_and_keeps_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Reply(tool_calls=[{"name": "opening_hours", "args": {"city": "Oslo"}, "id": "c1"}])

    def script(body: dict[str, Any]) -> str | Reply:
        asked = body["messages"][-1]
        if role(body) == "draft" and asked["role"] == "user" and "Oslo" in asked["content"]:
            return call
        return bad_drafts()(body)

    monkeypatch.chdir(tmp_path)
    with serving(script) as server:
        run("agent.py", server.spec)

    said = capsys.readouterr().out
    assert "['opening_hours']" in said
    assert "Oslo: Monday to Friday, 9 to 17" in said
    assert said.count(RELEASED) == 2
    assert CANARY not in said
    second = [body for body in server.requests if role(body) == "draft"][-1]
    assert CANARY not in str(second["messages"])


def test_the_chat_api_streams_the_models_own_words_and_judges_them_behind(tmp_path: Path) -> None:
    port = free_port()
    with serving(bad_drafts()) as server:
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "shadow_api:api"]
        environment = {"CAI_MODEL": server.spec, "CAI_SAMPLE": "1"}
        with serve([*command, "--port", str(port)], port, "/tally", tmp_path, **environment) as address:
            said = httpx.post(f"{address}/chat", json={"message": "hello", "user": "ada"}, timeout=30)
            tally = httpx.get(f"{address}/tally", timeout=30).json()

    assert said.text == CANARY
    assert tally["answers"] == 1
    [judged] = trajectories(tmp_path)  # the server's end waited for it
    assert (judged.mode, judged.outcome) == ("shadow", Outcome.REVISED)
    assert judged.metadata["user"] == "ada"


def test_langgraphs_dev_server_serves_the_app_and_a_client_streams_only_what_was_released(
    tmp_path: Path,
) -> None:
    from langgraph_sdk import get_sync_client

    folder = shutil.copytree(EXAMPLES / "langgraph_app", tmp_path / "app")
    port = free_port()
    langgraph = str(Path(sys.executable).with_name("langgraph"))
    command = [langgraph, "dev", "--no-browser", "--no-reload", "--port", str(port)]
    with serving(bad_drafts(), keep_alive=True) as server:
        environment = {"CAI_MODEL": server.spec, "LANGGRAPH_CLI_NO_ANALYTICS": "1"}
        with (
            serve(command, port, "/ok", folder, **environment) as address,
            get_sync_client(url=address) as client,
        ):
            parts = list(
                client.runs.stream(
                    None,
                    "chat",
                    input={"messages": [{"role": "user", "content": "hello"}]},
                    stream_mode=["messages-tuple", "updates", "values", "custom"],
                    stream_subgraphs=True,
                )
            )

    shown = str(parts)
    assert CANARY not in shown
    modes = {part.event.partition("|")[0] for part in parts if RELEASED in str(part.data)}
    assert modes >= {"messages", "updates", "values"}
    assert any("revising 1/2" in str(part.data) for part in parts if part.event.startswith("custom"))
    [kept] = trajectories(folder)
    assert kept.outcome is Outcome.REVISED


def test_every_example_is_run_by_a_test() -> None:
    told = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))

    for path in EXAMPLES.iterdir():
        if not path.name.startswith("__"):
            file, module = re.escape(path.name), re.escape(path.stem)
            run = rf'run\("{file}"|/ "{file}"|examples/{file}"|"{module}:api"'
            assert re.search(run, told), f"no test runs {path.name}"


def test_an_example_says_what_it_needs_that_no_extra_brings() -> None:
    for path in EXAMPLES.rglob("*.py"):
        _, docstring, code = path.read_text(encoding="utf-8").split('"""', 2)
        if "langgraph.checkpoint.sqlite" in code:
            assert "langgraph-checkpoint-sqlite" in docstring, path.name
