"""What waits for a person survives the process that asked: real checkpointers, real databases, real ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from postgres_server import Server
from repository import SUPPORT

from cai_graph.log import open_log
from cai_graph.trajectory import Review, Trajectory

SAVERS = {
    "sqlite": """
        from langgraph.checkpoint.sqlite import SqliteSaver
        def saver(): return SqliteSaver.from_conn_string(PLACE)
    """,
    "sqlite, asynchronous": """
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
        def saver(): return AsyncSqliteSaver.from_conn_string(PLACE)
    """,
    "postgresql": """
        from langgraph.checkpoint.postgres import PostgresSaver
        def saver(): return PostgresSaver.from_conn_string(PLACE)
    """,
    "postgresql, asynchronous": """
        from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
        def saver(): return AsyncPostgresSaver.from_conn_string(PLACE)
    """,
}

PROGRAM = """
    import asyncio, os, signal, sys
    sys.path[:0] = TESTS
    from langchain_core.messages import HumanMessage
    from langgraph.types import Command
    from replies import RULES
    from test_middleware import ASKED, agents_model, guarded
    from test_review import guard, model
    from cai_graph.errors import AwaitsReview
    from cai_graph.log import open_log

    THREAD = {"configurable": {"thread_id": "1"}}
    log = open_log(LOG)
    twice = AssertionError("paid twice")
    chat = model() if ASKS else model(draft=twice, critique=twice)
    agents = agents_model() if ASKS else agents_model(lambda messages: twice)

    def app(checkpointer):
        if FACE == "agent":
            settings = {"on_violation": "human", "max_rounds": 0, "log": log}
            return guarded(agents, checkpointer=checkpointer, settings=settings)
        return guard(chat, checkpointer, log)

    def given():
        if not ASKS:
            answer = "decided after the restart"
            return Command(resume={"decision": "edit", "answer": answer, "reviewer": "ada"})
        return ASKED if FACE == "agent" else [HumanMessage("hello", id="h")]

    def said(output):
        if FACE == "agent" and "__interrupt__" in output:
            return "waits"
        return output["messages"][-1].text if FACE == "agent" else output.text

    def synchronous():
        with saver() as checkpointer:
            checkpointer.setup()
            try:
                print(said(app(checkpointer).invoke(given(), THREAD)), flush=True)
            except AwaitsReview as waits:
                print("waits", flush=True)
            if ASKS:
                os.kill(os.getpid(), signal.SIGKILL)  # the process ends here, without a word

    async def asynchronous():
        async with saver() as checkpointer:
            await checkpointer.setup()
            try:
                print(said(await app(checkpointer).ainvoke(given(), THREAD)), flush=True)
            except AwaitsReview as waits:
                print("waits", flush=True)
            if ASKS:
                os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(asynchronous()) if ASYNCHRONOUS else synchronous()
    log.close()
"""


DATABASES = {"postgresql": 1, "postgresql, asynchronous": 2}
"""Each has one of its own: both use the same thread."""


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("sqlite", "chat model"),
        ("sqlite, asynchronous", "agent"),
        ("postgresql", "agent"),
        ("postgresql, asynchronous", "chat model"),
    ],
)
def test_a_request_goes_on_in_another_process_after_the_first_was_killed(
    name: str, face: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = str(tmp_path / "checkpoints.db")
    if name in DATABASES:
        server: Server = request.getfixturevalue("postgres")
        place = f"host={server.folder} user=postgres dbname={server.database(DATABASES[name])}"
    names: dict[str, Any] = {
        "TESTS": [str(SUPPORT), str(Path(__file__).parent)],
        "LOG": str(tmp_path / "cai.db"),
        "ASYNCHRONOUS": name.endswith("asynchronous"),
        "PLACE": place,
        "FACE": face,
    }

    def process(asks: bool) -> subprocess.CompletedProcess[str]:
        head = "\n".join(f"{key} = {value!r}" for key, value in {**names, "ASKS": asks}.items())
        code = "\n".join([head, textwrap.dedent(SAVERS[name]), textwrap.dedent(PROGRAM)])
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )

    first = process(asks=True)
    assert (first.stdout, first.returncode) == ("waits\n", -9), first.stderr
    with open_log(names["LOG"]) as log:
        before = [record for record in log.read() if isinstance(record, Trajectory)]
    second = process(asks=False)
    assert (second.stdout, second.returncode) == ("decided after the restart\n", 0), second.stderr
    with open_log(names["LOG"]) as log:
        records = list(log.read())

    assert [t.released_from for t in before] == (["draft"] if face == "agent" else [])
    trajectory = next(r for r in records if isinstance(r, Trajectory) and r.released_from == "human")
    (review,) = [r for r in records if isinstance(r, Review)]
    assert (review.trajectory_id, review.reviewer, review.decision) == (trajectory.id, "ada", "edit")
