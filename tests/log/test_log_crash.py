"""Processes: killed, forked, many at once. Whatever was acknowledged is in the log, whole.

CAI_LOG_KILLS sets how many times a writing process is killed (15 by default). The long run:

    CAI_LOG_KILLS=1000 python -m pytest tests/log/test_log_crash.py --timeout 0
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from repository import SUPPORT

from cai_graph.log import open_log
from cai_graph.log.upkeep import verify
from cai_graph.trajectory import Trajectory

KILLS = int(os.environ.get("CAI_LOG_KILLS", "15"))

PRELUDE = f"""
import os, sys, threading
sys.path.insert(0, {str(SUPPORT)!r})
from log_support import trajectory
from cai_graph.log import open_log
"""

# Threads append without end, and each id goes to the pipe once its future has resolved.
WRITE_UNTIL_KILLED = """
log = open_log(sys.argv[1])
def produce(thread):
    for n in range(10**9):
        record = trajectory(n, source=f"{os.getpid()}:{thread}:{n}", metadata={"text": "x" * (n * 97 % 9000)})
        log.append(record).add_done_callback(
            lambda done, id=record.id: done.exception() or os.write(1, f"{id}\\n".encode())
        )
        if n % 20 == 19:
            log.flush()
for thread in range(4):
    threading.Thread(target=produce, args=(thread,)).start()
"""


def run(script: str, url: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + script, url, *args]
    return subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=240)


def start(script: str, url: str, *args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PRELUDE + script, url, *args], stdout=subprocess.PIPE)


def test_no_acknowledged_record_is_lost_when_the_process_is_killed(url: str) -> None:
    chance = random.Random(20261123)
    acknowledged: set[str] = set()
    for number in range(KILLS):
        with start(WRITE_UNTIL_KILLED, url) as child:
            assert child.stdout is not None
            # The moment varies by how many acknowledgements are waited for, from the first on.
            lines = [child.stdout.readline() for _ in range(chance.randrange(1, 120))]
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
        acknowledged |= {line.decode().strip() for line in lines if line.endswith(b"\n")}
        if number % 50 == 0 or number == KILLS - 1:
            found = verify(url)
            assert found.ok, found
            with open_log(url, read_only=True) as log:
                stored = {record.id for record in log.read()}
            assert acknowledged <= stored
    assert len(acknowledged) > KILLS


def test_sixteen_threads_in_four_processes_share_one_log(url: str) -> None:
    script = """
log = open_log(sys.argv[1])
def produce(thread):
    futures = [log.append(trajectory(n, source=f"{sys.argv[2]}:{thread}:{n}")) for n in range(100)]
    for future in futures:
        future.result()
threads = [threading.Thread(target=produce, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert log.lost == 0
log.close()
"""
    children = [start(script, url, str(number)) for number in range(4)]
    for child in children:
        child.communicate(timeout=240)
        assert child.returncode == 0
    found = verify(url)
    assert found.ok
    assert found.records == 1600
    with open_log(url, read_only=True) as log:
        sources = [record.source for record in log.read() if isinstance(record, Trajectory)]
    assert len(set(sources)) == 1600
    for process in range(4):
        for thread in range(4):
            mine = [source for source in sources if source and source.startswith(f"{process}:{thread}:")]
            assert mine == [f"{process}:{thread}:{n}" for n in range(100)]


def test_processes_that_create_the_same_log_at_once_all_succeed(new_log: Callable[[], str]) -> None:
    for _ in range(2):
        url = new_log()
        script = "log = open_log(sys.argv[1]); log.append(trajectory()).result(); log.close()"
        children = [start(script, url) for _ in range(4)]
        for child in children:
            child.communicate(timeout=240)
            assert child.returncode == 0
        assert verify(url).records == 4


def test_a_forked_child_writes_through_a_connection_of_its_own(url: str) -> None:
    script = """
log = open_log(sys.argv[1])
stop = threading.Event()
count = [0] * 3
def produce(thread):
    while not stop.is_set():
        log.append(trajectory(source=f"parent:{thread}:{count[thread]}"))
        count[thread] += 1
        if count[thread] % 50 == 0:
            log.flush()
threads = [threading.Thread(target=produce, args=(n,)) for n in range(3)]
for thread in threads:
    thread.start()
children = []
for number in range(8):
    reading = log.read()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for n in range(25):
                log.append(trajectory(source=f"child:{number}:{n}"))
            log.flush()
            assert sum(1 for _ in log.read(source=f"child:{number}:")) == 25
            next(reading, None)
            status = 0
        finally:
            os._exit(status)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
log.close()
print(sum(count))
"""
    done = run(script, url)
    assert done.returncode == 0
    found = verify(url)
    assert found.ok, found
    assert found.records == int(done.stdout) + 8 * 25


def test_children_of_multiprocessing_write_what_is_pending_when_they_end(url: str) -> None:
    script = """
import multiprocessing
log = open_log(sys.argv[1])
log.append(trajectory()).result()
def work(number):
    for n in range(50):
        log.append(trajectory(source=f"{number}:{n}"))
context = multiprocessing.get_context("fork")
children = [context.Process(target=work, args=(n,)) for n in range(4)]
for child in children:
    child.start()
for child in children:
    child.join()
    assert child.exitcode == 0
log.close()
"""
    assert run(script, url).returncode == 0
    found = verify(url)
    assert found.ok
    assert found.records == 201


def test_what_is_appended_after_the_log_has_drained_at_exit_is_written(url: str) -> None:
    earlier = "import atexit\natexit.register(lambda: log.append(trajectory(1)))\n"  # so it comes later
    script = "log = open_log(sys.argv[1])\nlog.append(trajectory(0))"
    subprocess.run([sys.executable, "-c", earlier + PRELUDE + script, url], check=True)
    assert not Path(f"{url.removeprefix('sqlite:///')}-wal").exists()  # nobody has the file open
    with open_log(url, read_only=True) as log:
        assert [record.prompt for record in log.read() if isinstance(record, Trajectory)] == [
            "ask 0",
            "ask 1",
        ]


def test_a_terminated_process_loses_nothing_acknowledged(url: str) -> None:
    with start(WRITE_UNTIL_KILLED, url) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(30)]
        child.terminate()
        lines += child.stdout.readlines()
    with open_log(url, read_only=True) as log:
        stored = {record.id for record in log.read()}
    assert {line.decode().strip() for line in lines if line.endswith(b"\n")} <= stored
    assert verify(url).ok
