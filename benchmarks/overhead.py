"""Compares the cost beside the model calls with that of a hand-written graph and of ConstitutionalChain.

The chat model is fake: it answers at once, or after a fixed wait. The draft violates every principle, and the
revision complies with all. cai_graph runs as for users: through the compiled graph, with a callback handler
and a durable SQLite log.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import operator
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.graph import END, START, StateGraph

from cai_graph import constitutional
from cai_graph.constitution import Constitution, Principle

PRINCIPLES = (1, 4, 8, 16)
ROUNDS = 15
IN_FLIGHT = 16
PAIRS = 201


@cache
def _verdicts(instructions: str, label: str) -> str:
    ids = re.findall(r"^(p\d+):", instructions, re.MULTILINE)
    verdicts = [{"principle": i, "critique": "It does.", "verdict": label, "severity": 3} for i in ids]
    return json.dumps({"verdicts": verdicts, "evades": False})


class FakeModel(BaseChatModel):
    """Answers a request for a critique with verdicts on its principles, and any other with a sentence."""

    wait_s: float = 0.0

    @property
    def _llm_type(self) -> str:
        return "fake"

    def _reply(self, messages: list[BaseMessage]) -> ChatResult:
        text = str(messages[0].content)
        if "JSON object" in text:
            judged = str(messages[-1].content)
            said = _verdicts(text, "VIOLATES" if "first answer" in judged else "COMPLIES")
        elif "You improve answers" in text or "ewrite" in text:
            said = "A better answer."
        else:
            said = "The first answer."
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        if self.wait_s:
            time.sleep(self.wait_s)
        return self._reply(messages)

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        if self.wait_s:
            await asyncio.sleep(self.wait_s)
        return self._reply(messages)


class Quiet(BaseCallbackHandler):
    """A callback handler that does nothing, so that the cost of callbacks is included."""

    run_inline = True


def constitution(k: int) -> Constitution:
    return Constitution(
        name=f"bench-{k}",
        version="1",
        principles=tuple(
            Principle(
                id=f"p{i}",
                aim="harmless",
                critique_request=f"Say where the answer breaks rule {i}, with the words concerned.",
                revision_request=f"Rewrite the answer so that it keeps rule {i}.",
                preference_question=f"Which answer keeps rule {i} better?",
                source="benchmark",
            )
            for i in range(k)
        ),
    )


Run = Callable[[], Awaitable[object]]


def ours(model: FakeModel, k: int, log: str | None) -> Run:
    app = constitutional(model, constitution=constitution(k), log=log)
    config: Any = {"callbacks": [Quiet()]}
    return lambda: app.ainvoke("How do I do this?", config)


def by_hand(model: FakeModel, k: int) -> Run:
    """Return a run of a typical hand-written graph: draft, K concurrent critiques, revise (K + 2 calls)."""

    class State(TypedDict, total=False):
        question: str
        draft: str
        critiques: Annotated[list[str], operator.add]
        final: str

    async def draft(state: State) -> State:
        return {"draft": str((await model.ainvoke(state["question"])).content)}

    async def critique(state: State) -> State:
        asked = [f"Question: {state['question']}\nAnswer: {state['draft']}\nRule {i}?" for i in range(k)]
        replies = await asyncio.gather(*(model.ainvoke(question) for question in asked))
        return {"critiques": [str(reply.content) for reply in replies]}

    async def revise(state: State) -> State:
        said = "\n".join(state["critiques"])
        reply = await model.ainvoke(f"Rewrite.\nAnswer: {state['draft']}\nCritiques: {said}")
        return {"final": str(reply.content)}

    graph = StateGraph(State)
    graph.add_node("draft", draft)
    graph.add_node("critique", critique)
    graph.add_node("revise", revise)
    graph.add_edge(START, "draft")
    graph.add_edge("draft", "critique")
    graph.add_edge("critique", "revise")
    graph.add_edge("revise", END)
    compiled = graph.compile()
    config: Any = {"callbacks": [Quiet()]}
    return lambda: compiled.ainvoke({"question": "How do I do this?"}, config)


def constitutional_chain(model: FakeModel, k: int) -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_classic.chains import ConstitutionalChain, LLMChain
        from langchain_classic.chains.constitutional_ai.models import ConstitutionalPrinciple
        from langchain_core.prompts import PromptTemplate

        class Flagged(FakeModel):
            def _reply(self, messages: list[BaseMessage]) -> ChatResult:
                text = str(messages[0].content)
                said = "The critique." if text.rstrip().endswith("Critique:") else "A better answer."
                return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])

        flagged = Flagged(wait_s=model.wait_s)
        chain = ConstitutionalChain.from_llm(
            llm=flagged,
            chain=LLMChain(llm=flagged, prompt=PromptTemplate.from_template("{question}")),
            constitutional_principles=[
                ConstitutionalPrinciple(
                    name=f"p{i}", critique_request=f"Rule {i}?", revision_request=f"Keep rule {i}."
                )
                for i in range(k)
            ],
        )
    return lambda: chain.invoke({"question": "How do I do this?"}, {"callbacks": [Quiet()]})


async def _spent(run: Run, count: int) -> tuple[float, float]:
    """Return the wall and the CPU seconds of `count` concurrent requests."""
    gc.collect()  # so that garbage of another contender is not in this time
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(run() for _ in range(count)))
    return time.perf_counter() - wall, time.process_time() - cpu


def _ratio(mine: list[float], theirs: list[float]) -> str:
    """Return the median and quartiles of the ratios by round, since rounds vary on a shared machine."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, theirs, strict=True)], n=4)
    return f"**{middle:.2f}** ({low:.2f}–{high:.2f})"


async def _overhead(folder: Path) -> list[str]:
    lines = [
        "### CPU a request, zero-latency model, every principle flagged",
        "",
        f"Medians of {ROUNDS} interleaved rounds of {IN_FLIGHT} requests at once; µs of CPU of the whole "
        "process, the log's writer thread included. Ratios: median (quartiles) over rounds.",
        "",
        "| K | cai_graph, log on | log off | by hand | ConstitutionalChain | ratio to by hand | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    goals = {1: "", 4: "≤ 1.2", 8: "≤ 1.0", 16: "≤ 0.6 (stretch 0.4)"}
    for k in PRINCIPLES:
        model = FakeModel()
        chain = constitutional_chain(model, k)

        async def classic(chain: Callable[[], object] = chain) -> object:
            return chain()

        runs = {
            "ours": ours(model, k, f"sqlite:///{folder}/bench-{k}.db"),
            "unlogged": ours(model, k, None),
            "hand": by_hand(model, k),
            "classic": classic,
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            await _spent(run, IN_FLIGHT)  # warm up
        for _ in range(ROUNDS):
            for name, run in runs.items():
                taken[name].append((await _spent(run, IN_FLIGHT))[1] / IN_FLIGHT * 1e6)
        medians = " | ".join(f"{statistics.median(values):.0f}" for values in taken.values())
        lines.append(f"| {k} | {medians} | {_ratio(taken['ours'], taken['hand'])} | {goals[k]} |")
    return lines


async def _logging(folder: Path) -> list[str]:
    model = FakeModel()
    on, off = ours(model, 4, f"sqlite:///{folder}/added.db"), ours(model, 4, None)
    added: list[float] = []
    for number in range(PAIRS):
        taken: dict[Run, float] = {}
        for run in (on, off) if number % 2 else (off, on):
            taken[run] = (await _spent(run, IN_FLIGHT))[1] / IN_FLIGHT * 1e6
        added.append(taken[on] - taken[off])
    added.sort()
    apart = round(0.98 * math.sqrt(PAIRS))  # ranks from the median to the ends of its 95 % interval
    low, middle, high = (added[PAIRS // 2 + step] for step in (-apart, 0, apart))
    return [
        "",
        "### What the durable log adds, K = 4",
        "",
        f"{middle:.0f} µs of CPU a request (95 % interval of the median: {low:.0f} to {high:.0f}; {PAIRS} "
        f"pairs of {IN_FLIGHT} requests at once, with and without, in turn; goal at most 100).",
    ]


async def _latency(folder: Path) -> list[str]:
    model = FakeModel(wait_s=0.2)
    run = ours(model, 16, f"sqlite:///{folder}/latency.db")
    chain = constitutional_chain(model, 16)
    walls: list[tuple[float, float]] = []
    for _ in range(3):
        mine, _ = await _spent(run, 1)
        theirs, _ = await _spent(lambda: asyncio.to_thread(chain), 1)
        walls.append((mine, theirs))
    mine, theirs = map(statistics.median, zip(*walls, strict=True))
    return [
        "",
        "### Wall time, K = 16, 200 ms a call, one request",
        "",
        f"cai_graph {mine:.2f} s, ConstitutionalChain {theirs:.2f} s: **1/{theirs / mine:.1f}** (goal 1/10). "
        "Draft, critique, revision and its judgement wait for each other: 4 calls against 1 + 2 K = 33, so "
        "1/8.25 is what can be had as long as no revision leaves unjudged.",
    ]


async def _concurrency(folder: Path) -> list[str]:
    lines = [
        "",
        "### Requests in flight, K = 4, 200 ms a call, one event loop",
        "",
        "Medians of 3 interleaved rounds; calls alone take 0.8 s (cai_graph) and 0.6 s (by hand). Ratios: "
        "median (quartiles) over rounds. Python's collector walks all that is in flight again and again; "
        "`gc.freeze()` after the start and `gc.set_threshold(20_000, 20, 20)` have it look less often.",
        "",
        "| requests | cai_graph, durable log: s | by hand: s | ratio of wall | goal | ratio of CPU |",
        "|---|---|---|---|---|---|",
    ]
    for count, goal in ((500, "≤ 1.0 (stretch 0.5)"), (2000, "≤ 1.0 (stretch 0.5)")):
        lines.append(f"| {count} | {await _in_flight(folder, count, goal)}")
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    for count in (500, 2000):
        lines.append(f"| {count}, collector as above | {await _in_flight(folder, count, '')}")
    gc.set_threshold(*before)
    gc.unfreeze()
    return lines


async def _in_flight(folder: Path, count: int, goal: str) -> str:
    model = FakeModel(wait_s=0.2)
    runs = {"ours": ours(model, 4, f"sqlite:///{folder}/many.db"), "hand": by_hand(model, 4)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            taken[name].append(await _spent(run, count))
    (wall, cpu), (hand_wall, hand_cpu) = (
        [list(column) for column in zip(*taken[name], strict=True)] for name in ("ours", "hand")
    )
    return (
        f"{statistics.median(wall):.2f} | {statistics.median(hand_wall):.2f} | {_ratio(wall, hand_wall)} | "
        f"{goal} | {_ratio(cpu, hand_cpu)} |"
    )


def _imports() -> list[str]:
    script = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    graph, models = "langgraph.graph", "langgraph.graph, langchain_core.language_models.chat_models"
    taken: dict[str, list[float]] = {graph: [], models: [], "cai_graph": [], "cai_graph.chain": []}
    for _ in range(5):
        for name in taken:
            done = subprocess.run(
                [sys.executable, "-c", script.format(name)], capture_output=True, text=True, check=True
            )
            taken[name].append(float(done.stdout))
    return [
        "",
        "### Import",
        "",
        f"CPU of `import cai_graph` is {_ratio(taken['cai_graph'], taken[graph])} × "
        "`import langgraph.graph` (goal ≤ 1.1), and with everything that `constitutional` needs "
        f"{_ratio(taken['cai_graph.chain'], taken[graph])} ×; to a program that has LangChain's chat models "
        f"loaded, too, {_ratio(taken['cai_graph.chain'], taken[models])} ×.",
    ]


async def _all() -> str:
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(DeprecationWarning):
        folder = Path(name)
        parts = [*await _overhead(folder), *await _logging(folder), *await _latency(folder)]
        parts += await _concurrency(folder)
    return "\n".join(["## Overhead", "", *parts, *_imports()])


def run() -> str:
    """Return the section of RESULTS.md."""
    return asyncio.run(_all())
