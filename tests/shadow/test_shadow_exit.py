"""What waits for its verdict in shadow mode is judged when the process ends, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from repository import SUPPORT

from cai_graph import open_log
from cai_graph.log import verify
from cai_graph.trajectory import Trajectory

PROGRAM = """
import asyncio, os, signal, sys, threading, time
from replies import RULES, verdicts
from cai_graph import constitutional, open_log
from cai_graph.testing import ScriptedModel

class Slow(ScriptedModel):
    async def _agenerate(self, messages, *args, **kwargs):
        await asyncio.sleep(0.2)
        # Clients without a native async path, and look-ups of names, work in threads.
        return await asyncio.to_thread(self._generate, messages, *args, **kwargs)

def make(count):
    app = ScriptedModel(replies=lambda messages: "the draft")
    critic = Slow(replies=lambda messages: verdicts())
    return constitutional(app, constitution=RULES, critic=critic, reviser=app, mode="shadow",
                          log=sys.argv[1], shadow_concurrency=count)

def answer(guarded, count):
    for number in range(count):
        guarded.invoke(f"question {number} of {os.getpid()}")
    print("answered", flush=True)
"""


def run(tmp_path: Path, rest: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + rest, str(tmp_path / "log.db")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=SUPPORT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
    )


def terminate_once_answered(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "answered\n"
    process.send_signal(signal.SIGTERM)


def ended(process: subprocess.Popen[str], status: int) -> None:
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (status, "")


def judged(tmp_path: Path) -> list[str | None]:
    with open_log(tmp_path / "log.db", read_only=True) as log:
        return [record.unjudged for record in log.read() if isinstance(record, Trajectory)]


@pytest.mark.parametrize("rest", ["", "sys.exit(0)", "asyncio.run(guarded.ainvoke('last'))"])
def test_an_exit_judges_what_waits(rest: str, tmp_path: Path) -> None:
    ended(run(tmp_path, f"guarded = make(4)\nanswer(guarded, 10)\n{rest}"), 0)

    assert judged(tmp_path) == [None] * (11 if "last" in rest else 10)


def test_an_exit_by_an_exception_judges_what_waits(tmp_path: Path) -> None:
    process = run(tmp_path, "answer(make(4), 3)\nraise ValueError('the app is broken')")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.endswith("ValueError: the app is broken\n")

    assert judged(tmp_path) == [None] * 3


@pytest.mark.parametrize("waits", ["time.sleep(60)", "asyncio.run(asyncio.sleep(60))"])
def test_sigterm_judges_what_waits_and_then_ends_the_process(waits: str, tmp_path: Path) -> None:
    process = run(tmp_path, f"answer(make(4), 10)\n{waits}")
    terminate_once_answered(process)
    ended(process, -signal.SIGTERM)

    assert judged(tmp_path) == [None] * 10


def test_a_sigterm_handler_of_the_applications_own_stays_and_its_exit_drains(tmp_path: Path) -> None:
    process = run(
        tmp_path,
        "def mine(*args):\n    print('mine', flush=True)\n    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, mine)\nanswer(make(4), 10)\ntime.sleep(60)",
    )
    terminate_once_answered(process)
    assert process.stdout.readline() == "mine\n"
    ended(process, 3)

    assert judged(tmp_path) == [None] * 10


API = """
import os
from contextlib import asynccontextmanager
from fastapi import FastAPI
made = {}
@asynccontextmanager
async def lifespan(app):
    if not made:
        made["guarded"] = make(1)
    yield
api = FastAPI(lifespan=lifespan)
@api.get("/")
async def answer_one():
    return (await made["guarded"].ainvoke(f"question of {os.getpid()}")).text
"""


@pytest.mark.parametrize(("way", "place"), [("workers", "module"), ("served", "lifespan")])
def test_a_worker_of_uvicorn_judges_what_waits(way: str, place: str, tmp_path: Path) -> None:
    wraps = 'made["guarded"] = make(1)\n' if place == "module" else ""
    (tmp_path / "api.py").write_text(
        PROGRAM.replace("sys.argv[1]", repr(str(tmp_path / "log.db"))) + API + wraps
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = (
        "import asyncio, uvicorn\n"
        f"asyncio.run(uvicorn.Server(uvicorn.Config('api:api', port={port}, log_level='error')).serve())"
    )
    workers = ["-m", "uvicorn", "api:api", "--port", str(port), "--workers", "2", "--log-level", "error"]
    process = subprocess.Popen(
        [sys.executable, *(workers if way == "workers" else ["-c", served])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", str(SUPPORT), *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
    )
    for number in range(10):
        assert answer_of(f"http://127.0.0.1:{port}/") == '"the draft"', number
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)

    assert not errors
    assert judged(tmp_path) == [None] * 10


def answer_of(url: str) -> str:
    """What a server says, once it is up."""
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return str(reply.read().decode())
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def test_a_handler_that_was_set_later_can_hand_on_to_ours(tmp_path: Path) -> None:
    process = run(
        tmp_path,
        "guarded = make(4)\nbefore = signal.getsignal(signal.SIGTERM)\n"
        "def mine(*args):\n    print('mine', flush=True)\n    before(*args)\n"
        "signal.signal(signal.SIGTERM, mine)\nanswer(guarded, 10)\ntime.sleep(60)",
    )
    terminate_once_answered(process)
    ended(process, -signal.SIGTERM)

    assert judged(tmp_path) == [None] * 10


def test_an_app_wrapped_in_another_thread_warns_until_the_main_thread_can_see_to_sigterm(
    tmp_path: Path,
) -> None:
    process = run(
        tmp_path,
        "apps = []\nthread = threading.Thread(target=lambda: apps.extend([make(4), make(4)]))\n"
        "thread.start()\nthread.join()\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "answer(apps[0], 10)\ntime.sleep(60)",
    )
    terminate_once_answered(process)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == -signal.SIGTERM
    assert errors.count("outside the main thread") == errors.count("\n") == 1
    assert judged(tmp_path) == [None] * 10


def test_a_kill_loses_only_what_was_not_in_the_log_yet_and_the_log_is_whole(tmp_path: Path) -> None:
    process = run(
        tmp_path,
        "guarded = make(2)\nanswer(guarded, 20)\n"
        "while guarded.shadow.tally.judged < 4: time.sleep(0.01)\nprint('some', flush=True)\ntime.sleep(60)",
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["answered\n", "some\n"]
    process.kill()
    process.communicate(timeout=60)

    found = judged(tmp_path)
    assert 4 <= len(found) < 20
    assert set(found) == {None}
    assert verify(tmp_path / "log.db").ok


def test_workers_forked_from_a_preloaded_app_judge_each_their_own(tmp_path: Path) -> None:
    process = run(
        tmp_path,
        """
guarded = make(4)
guarded.invoke("in the parent, before the fork")
workers = []
open(sys.argv[1] + '.go', 'w').close()
for _ in range(2):
    worker = os.fork()
    if worker == 0:  # as gunicorn's: it handles SIGTERM itself, and leaves by sys.exit
        assert guarded.shadow.tally.answers == 0
        alive = [True]
        signal.signal(signal.SIGTERM, lambda *args: alive.clear())
        answer(guarded, 5)
        open(sys.argv[1] + '.go', 'a').write('x')
        while alive: time.sleep(0.01)
        sys.exit(0)
    workers.append(worker)
time.sleep(0.1)
while len(open(sys.argv[1] + '.go').read()) < 2: time.sleep(0.01)
for worker in workers: os.kill(worker, signal.SIGTERM)
for worker in workers: assert os.waitpid(worker, 0)[1] == 0
""",
    )
    ended(process, 0)

    assert judged(tmp_path) == [None] * 11


def test_a_forked_worker_that_dies_by_sigterm_once_it_has_shut_down_judges_its_own(tmp_path: Path) -> None:
    process = run(
        tmp_path,
        """
guarded = make(4)
class Server:
    def end(self, *args): ...
worker = os.fork()
if worker == 0:  # as uvicorn's under gunicorn
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    before = signal.signal(signal.SIGTERM, Server().end)
    answer(guarded, 5)
    signal.signal(signal.SIGTERM, before)
    signal.raise_signal(signal.SIGTERM)
assert os.waitpid(worker, 0)[1] == signal.SIGTERM
""",
    )
    ended(process, 0)

    assert judged(tmp_path) == [None] * 5


def test_a_child_of_multiprocessing_judges_what_waits(tmp_path: Path) -> None:
    process = run(
        tmp_path,
        "import multiprocessing\nguarded = make(4)\n"
        "child = multiprocessing.get_context('fork').Process(target=answer, args=(guarded, 5))\n"
        "child.start()\nchild.join()\nassert child.exitcode == 0",
    )
    ended(process, 0)

    assert judged(tmp_path) == [None] * 5
