"""Critics and revisers over connections that stay open, from several event loops."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any
from weakref import WeakSet

import httpx2
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from replies import IDS, RULES, verdicts
from repository import SUPPORT
from wire import Server, serving, under

from cai_graph import Budget, constitutional, local
from cai_graph.concurrency import bridge, connections
from cai_graph.concurrency.connections import on_any_loop
from cai_graph.errors import BudgetExceeded

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
        cwd=SUPPORT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
    )

    assert done.stdout == "fine\n", done.stderr


def test_models_of_the_same_settings_share_their_connections() -> None:
    def pool(**settings: object) -> object:
        model = ChatOpenAI(model="m", api_key="unused", base_url="http://127.0.0.1:9/v1", **settings)  # type: ignore[arg-type]
        return on_any_loop(model).root_async_client._client

    assert pool() is pool(temperature=0.5)
    assert pool() is not pool(timeout=3)


def openai(server: Server) -> BaseChatModel:
    return ChatOpenAI(model="m", api_key="unused", base_url=server.url)  # type: ignore[arg-type]


def anthropic(server: Server) -> BaseChatModel:
    return ChatAnthropic(model="m", api_key="unused", base_url=server.url.removesuffix("/v1"))  # type: ignore[call-arg, arg-type]


def by_the_bridge(asked: Coroutine[Any, Any, None]) -> None:
    """As a synchronous call from inside the core: on a loop of its own, closed as it stands."""

    async def inner(caller: bridge.Caller) -> None:
        await asked

    async def core(caller: bridge.Caller) -> None:
        bridge.run(inner)

    bridge.run(core)


@pytest.mark.parametrize("provider", [openai, anthropic])
def test_a_loop_that_ended_is_let_go_of_with_its_connections(provider: Callable[[Server], Any]) -> None:
    loops: WeakSet[asyncio.AbstractEventLoop] = WeakSet()

    async def ask() -> None:
        loops.add(asyncio.get_running_loop())
        assert (await model.ainvoke("hello")).text == "fine"

    with serving(lambda body: "fine", keep_alive=True) as server:
        model = on_any_loop(provider(server))
        for _ in range(3):
            asyncio.run(ask())
        gc.collect()

    assert not loops


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of a connection that outlives its loop
def test_a_loop_that_was_closed_as_it_stood_is_let_go_of_at_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loops: WeakSet[asyncio.AbstractEventLoop] = WeakSet()

    async def ask() -> None:
        loops.add(asyncio.get_running_loop())
        assert (await model.ainvoke("hello")).text == "fine"

    with serving(lambda body: "fine", keep_alive=True) as server, caplog.at_level(logging.WARNING):
        model = on_any_loop(openai(server))
        for _ in range(4):
            by_the_bridge(ask())
        asyncio.run(ask())
        gc.collect()

    assert not loops
    assert not caplog.text


def by_own_clients(
    answer: Callable[[dict[str, Any]], str],
    *,
    loops: set[asyncio.AbstractEventLoop] | None = None,
    **settings: Any,
) -> ChatOpenAI:
    """A model whose own clients are the only way to its provider.

    Of the asynchronous one, which it has where there are `loops`, these hear where it sends.
    """

    def send(request: httpx2.Request) -> httpx2.Response:
        message = {"role": "assistant", "content": answer(json.loads(request.content))}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        return httpx2.Response(200, json=reply | {"usage": usage})

    async def asend(request: httpx2.Request) -> httpx2.Response:
        assert loops is not None
        loops.add(asyncio.get_running_loop())
        return send(request)

    if loops is not None:
        settings["http_async_client"] = httpx2.AsyncClient(transport=httpx2.MockTransport(asend))
    return ChatOpenAI(
        model="m",
        api_key="unused",
        base_url="http://gateway.invalid/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.MockTransport(send)),
        **settings,
    )


def by_role(request: dict[str, Any]) -> str:
    shown = json.dumps(request["messages"])
    if "You are a careful reviewer" in shown:
        return verdicts("be-kind") if "rude" in shown.rpartition("<answer>")[2] else verdicts()
    return "kind" if "You improve answers" in shown else "rude"


class Ended(BaseCallbackHandler):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.texts.append(response.generations[0][0].text)


def test_a_model_with_a_sync_client_alone_also_judges_and_revises_by_it() -> None:
    guarded = constitutional(by_own_clients(by_role), constitution=RULES, log=None)
    ended = Ended()

    assert guarded.invoke("hello", {"callbacks": [ended]}).text == "kind"
    assert ended.texts[:1] == ["rude"]
    assert "kind" in ended.texts
    assert len(ended.texts) == 5  # each call is traced, and the answer


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
async def test_an_async_client_of_the_apps_sends_on_its_callers_loop_alone(mode: str) -> None:
    loops: set[asyncio.AbstractEventLoop] = set()
    guarded = constitutional(by_own_clients(by_role, loops=loops), constitution=RULES, log=None, mode=mode)
    answers = await asyncio.gather(
        *(guarded.ainvoke("hello") for _ in range(3)),
        *(asyncio.to_thread(guarded.invoke, "hello") for _ in range(3)),
    )
    if guarded.shadow is not None:
        await guarded.shadow.aclose()
        assert guarded.shadow.tally.judged == 6

    assert {answer.text for answer in answers} == {"kind" if mode == "enforce" else "rude"}
    assert loops == {asyncio.get_running_loop()}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_critic_without_a_sync_client_of_its_own_says_that_it_goes_by_another(
    streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    connections._warn_once.cache_clear()
    with serving(under(RULES)) as server:
        model = ChatOpenAI(
            model="m",
            api_key="unused",  # type: ignore[arg-type]
            base_url=server.url,
            http_async_client=httpx2.AsyncClient(),
            streaming=streaming,
        )
        guarded = constitutional(model, constitution=RULES, log=None)
        for _ in range(2):
            assert (
                guarded.invoke("hello").text
                == asyncio.run(guarded.ainvoke("hello")).text
                == "answer to hello"
            )

    assert caplog.text.count("give it an http_client, too") == 1


def test_a_proxy_of_anthropics_is_the_way_from_every_loop() -> None:
    async def ask(caller: bridge.Caller | None = None) -> None:
        assert (await model.ainvoke("hello")).text == "fine"

    async def app() -> None:
        assert (await bare.ainvoke("hello")).text == "fine"
        await asyncio.to_thread(bridge.run, ask)
        await asyncio.gather(*(bare.ainvoke("hello") for _ in range(3)))

    with serving(lambda body: "fine", keep_alive=True) as server:
        proxy = server.url.removesuffix("/v1")
        bare = ChatAnthropic(
            model="m",  # type: ignore[call-arg]
            api_key="unused",  # type: ignore[arg-type]
            base_url="http://gateway.invalid",
            anthropic_proxy=proxy,
            max_retries=0,
        )
        model = on_any_loop(bare)
        asyncio.run(app())
        assert len(server.requests) == 5


def test_a_local_model_sends_by_its_async_client_from_every_loop() -> None:
    model = local.chat_model()

    assert on_any_loop(model) is model


def test_such_a_model_stays_what_it_is_for_tracers_and_callers() -> None:
    model = by_own_clients(by_role, temperature=0.5)
    own = on_any_loop(model)

    assert isinstance(own, ChatOpenAI)
    assert own.lc_id() == model.lc_id()
    assert own.get_name() == model.get_name()
    assert own._get_ls_params() == model._get_ls_params()
    assert type(model) is ChatOpenAI
    assert on_any_loop(own) is own


def test_a_deadline_does_not_wait_for_a_thread_that_sends() -> None:
    def slowly(request: dict[str, Any]) -> str:
        if any("You are a careful reviewer" in str(message) for message in request["messages"]):
            time.sleep(1.5)
        return verdicts(ids=IDS)

    guarded = constitutional(by_own_clients(slowly), constitution=RULES, log=None, budget=Budget(seconds=0.5))
    began = time.monotonic()

    with pytest.raises(BudgetExceeded, match="deadline"):
        guarded.invoke("hello")
    assert time.monotonic() - began < 1.3
