"""Measures the latency that shadow mode adds to an answer, compared with the same app unwrapped.

The app waits 10 to 30 ms without using the CPU, as if for an API, and so does the critic's model. Requests go
to the unwrapped app and to the wrapped one in turn, while earlier answers are judged in the background of the
same process. The time counted excludes the app's own wait; CPU time is that of the caller's thread.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from langchain_core.messages import BaseMessage

from cai_graph import ScriptedModel, constitutional
from cai_graph.constitution import load

SECONDS = (0.01, 0.03)
REQUESTS = 400
"""Number of requests to each app in each way of calling."""
WARM = 20
AT_ONCE = 4


class _Api(ScriptedModel):
    """A model like one behind an API: it waits without using the CPU. The reply's metadata has the wait."""

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        time.sleep(random.uniform(*SECONDS))
        return self._answer(messages, time.perf_counter() - started)

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        await asyncio.sleep(random.uniform(*SECONDS))
        return self._answer(messages, time.perf_counter() - started)

    def _answer(self, messages: list[BaseMessage], waited: float) -> Any:
        result = super()._generate(messages)
        result.generations[0].message.response_metadata["waited"] = waited
        return result


class _Times(NamedTuple):
    wall_ms: list[float]
    cpu_ms: list[float]


def run() -> str:
    """Return the section of RESULTS.md."""
    constitution = load("balanced")
    entries = ", ".join(f'{{"principle": "{p.id}", "verdict": "COMPLIES"}}' for p in constitution.principles)
    critic = _Api(replies=lambda messages: f'{{"verdicts": [{entries}], "evades": false}}')
    bare = _Api(replies=lambda messages: "Take the train: it is faster and you can read. " * 6)
    lines = [
        "## Shadow mode: added latency",
        "",
        f"{REQUESTS} requests to the bare app and as many to the wrapped one in turn. The app and the "
        "critic's model wait 10 to 30 ms each; what is added is the time around the app's wait. Every answer "
        "is judged, and logged durably, in the same process. CPU is that of the caller's thread (for "
        "`ainvoke`: a request's share of it).",
        "",
        "| way | bare p50 ms | added p50 ms | added p99 ms | bare CPU ms | added CPU ms | judged | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ways: dict[str, Callable[[Any, Any], tuple[_Times, _Times]]] = {
        "invoke, one caller": _sync,
        f"ainvoke, {AT_ONCE} at once": _asynchronous,
    }
    for way, measure in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            log = f"sqlite:///{Path(folder) / 'log.db'}"
            guarded = constitutional(bare, critic=critic, reviser=bare, log=log, mode="shadow")
            alone, wrapped = measure(bare, guarded)
            assert guarded.shadow is not None
            assert guarded.plan.log is not None
            guarded.shadow.close()
            tally = guarded.shadow.tally
            guarded.plan.log.close()
        median, cpu = statistics.median(alone.wall_ms), statistics.median(alone.cpu_ms)
        lines.append(
            f"| {way} | {median:.2f} | **{statistics.median(wrapped.wall_ms) - median:.2f}** "
            f"| {_p99(wrapped.wall_ms) - _p99(alone.wall_ms):.2f} | {cpu:.2f} "
            f"| {statistics.median(wrapped.cpu_ms) - cpu:.2f} | {tally.judged} of {tally.answers} "
            "| ≤ 1 ms at the median |"
        )
    return "\n".join(lines)


def _sync(bare: Any, guarded: Any) -> tuple[_Times, _Times]:
    found = (_Times([], []), _Times([], []))
    for number in range(REQUESTS + WARM):
        for times, app in zip(found, (bare, guarded), strict=True):
            started, cpu = time.perf_counter(), time.thread_time()
            answer = app.invoke(f"How do I get to Berlin? ({number})")
            wall, cpu = time.perf_counter() - started, time.thread_time() - cpu
            times.wall_ms.append((wall - answer.response_metadata["waited"]) * 1000)
            times.cpu_ms.append(cpu * 1000)
    return _warm(found)


def _asynchronous(bare: Any, guarded: Any) -> tuple[_Times, _Times]:
    found = (_Times([], []), _Times([], []))

    async def timed(app: Any, number: int) -> tuple[Any, float]:
        started = time.perf_counter()
        answer = await app.ainvoke(f"How do I get to Berlin? ({number})")
        return answer, time.perf_counter() - started

    async def all_of_them() -> None:
        for number in range((REQUESTS + WARM) // AT_ONCE):
            for times, app in zip(found, (bare, guarded), strict=True):
                cpu = time.thread_time()
                ended = await asyncio.gather(*(timed(app, AT_ONCE * number + one) for one in range(AT_ONCE)))
                cpu = (time.thread_time() - cpu) / AT_ONCE
                for answer, wall in ended:
                    times.wall_ms.append((wall - answer.response_metadata["waited"]) * 1000)
                    times.cpu_ms.append(cpu * 1000)

    asyncio.run(all_of_them())
    return _warm(found)


def _warm(found: tuple[_Times, _Times]) -> tuple[_Times, _Times]:
    alone, wrapped = (_Times(times.wall_ms[WARM:], times.cpu_ms[WARM:]) for times in found)
    return alone, wrapped


def _p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * len(times))]
