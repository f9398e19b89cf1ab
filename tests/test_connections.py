"""Critics and revisers over connections that stay open, from several event loops."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from langchain_openai import ChatOpenAI

from cai_graph.connections import on_any_loop

PROGRAM = """
import asyncio
import httpx2
from replies import RULES
from wire import serving, under
from cai_graph import constitutional, models

def guard(**settings):
    # The app's own model is asked where its caller is, so each way of calling has one of its own.
    app = models.load(server.spec, max_retries=0, **settings)
    return constitutional(app, constitution=RULES, log=None, critic=critic, reviser=critic)

async def several():
    guarded = guard(http_async_client=httpx2.AsyncClient())
    return await asyncio.gather(*(guarded.ainvoke(f"question {number}") for number in range(3)))

with serving(under(RULES, violates=lambda shown: "answer to" in shown), keep_alive=True) as server:
    critic = models.load(server.spec, max_retries=0)
    for _ in range(3):
        answers = [guard().invoke("hello")]  # the critic works on the bridge's loop, which lives on
        answers += asyncio.run(several())  # and on one that ends
        assert [answer.text for answer in answers] == ["a better answer"] * 4
print("fine")
"""


def test_one_model_judges_on_the_bridges_loop_and_on_each_of_the_callers() -> None:
    # In a process of its own: the client warns of sockets that outlive their loop.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
    )

    assert done.stdout == "fine\n", done.stderr


def test_models_of_the_same_settings_share_their_connections() -> None:
    def pool(**settings: object) -> object:
        model = ChatOpenAI(model="m", api_key="unused", base_url="http://127.0.0.1:9/v1", **settings)  # type: ignore[arg-type]
        return on_any_loop(model).root_async_client._client

    assert pool() is pool(temperature=0.5)
    assert pool() is not pool(timeout=3)


def test_an_http_client_of_the_users_own_stays() -> None:
    import httpx2

    own = httpx2.AsyncClient()
    model = ChatOpenAI(model="m", api_key="unused", http_async_client=own)  # type: ignore[arg-type]

    assert on_any_loop(model) is model
    asyncio.run(own.aclose())
