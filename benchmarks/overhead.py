"""What the graph costs beside the model calls, against a graph written by hand and ConstitutionalChain.

The chat model is fake: it answers at once, or after a stated wait. Every principle is flagged on the
draft and cleared on the revision. Ours runs as users run it: through the compiled graph, with a callback
handler attached and a durable SQLite log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
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
from cai_graph.log import open_log

PRINCIPLES = (1, 4, 8, 16)
ROUNDS = 15
IN_FLIGHT = 16


@cache
def _verdicts(instructions: str, label: str) -> str:
    ids = re.findall(r"^(p\d+):", instructions, re.MULTILINE)
    verdicts = [{"principle": i, "critique": "It does.", "verdict": label, "severity": 3} for i in ids]
    return json.dumps({"verdicts": verdicts, "evades": False})


class FakeModel(BaseChatModel):
    """Answers a critique with verdicts on the principles that it names, anything else with a sentence."""

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
    """A handler that is there and does nothing, so that callbacks stay alive."""

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


def ours(model: FakeModel, k: int, log: str) -> Run:
    app = constitutional(model, constitution=constitution(k), log=open_log(log))
    config: Any = {"callbacks": [Quiet()]}
    return lambda: app.ainvoke("How do I do this?", config)


def by_hand(model: FakeModel, k: int) -> Run:
    """Three nodes as people write them: draft, K critiques at once, revise (K + 2 calls)."""

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


async def _cpu_us(run: Run) -> float:
    started = time.process_time()
    await asyncio.gather(*(run() for _ in range(IN_FLIGHT)))
    return (time.process_time() - started) / IN_FLIGHT * 1e6


async def _overhead(folder: Path) -> list[str]:
    lines = [
        "### CPU a request, zero-latency model, every principle flagged",
        "",
        f"Median of {ROUNDS} interleaved rounds of {IN_FLIGHT} requests at once; µs of CPU of the whole "
        "process, the log's writer thread included.",
        "",
        "| K | cai_graph, log on | LangGraph by hand | ConstitutionalChain | ratio to by hand | goal |",
        "|---|---|---|---|---|---|",
    ]
    goals = {1: "", 4: "≤ 1.2", 8: "≤ 1.0", 16: "≤ 0.6 (stretch 0.4)"}
    for k in PRINCIPLES:
        model = FakeModel()
        chain = constitutional_chain(model, k)

        async def classic(chain: Callable[[], object] = chain) -> object:
            return chain()

        runs = {
            "ours": ours(model, k, f"sqlite:///{folder}/bench-{k}.db"),
            "hand": by_hand(model, k),
            "classic": classic,
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            await _cpu_us(run)  # warm up
        for _ in range(ROUNDS):
            for name, run in runs.items():
                taken[name].append(await _cpu_us(run))
        median = {name: statistics.median(values) for name, values in taken.items()}
        ratio = median["ours"] / median["hand"]
        lines.append(
            f"| {k} | {median['ours']:.0f} | {median['hand']:.0f} | {median['classic']:.0f} | "
            f"**{ratio:.2f}** | {goals[k]} |"
        )
    return lines


async def _latency(folder: Path) -> list[str]:
    model = FakeModel(wait_s=0.2)
    run = ours(model, 16, f"sqlite:///{folder}/latency.db")
    chain = constitutional_chain(model, 16)
    started = time.perf_counter()
    await run()
    mine = time.perf_counter() - started
    started = time.perf_counter()
    await asyncio.to_thread(chain)
    theirs = time.perf_counter() - started
    return [
        "",
        "### Wall time, K = 16, 200 ms a call, one request",
        "",
        f"cai_graph {mine:.2f} s, ConstitutionalChain {theirs:.2f} s: **1/{theirs / mine:.1f}** (goal 1/10).",
    ]


async def _concurrency(folder: Path) -> list[str]:
    lines = [
        "",
        "### Requests in flight, K = 4, 200 ms a call, one event loop",
        "",
        "| requests | cai_graph, durable log: s | by hand: s | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    model = FakeModel(wait_s=0.2)
    for count in (500, 2000):
        runs = {"ours": ours(model, 4, f"sqlite:///{folder}/many-{count}.db"), "hand": by_hand(model, 4)}
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(3):
            for name, run in runs.items():
                started = time.perf_counter()
                await asyncio.gather(*(run() for _ in range(count)))
                taken[name].append(time.perf_counter() - started)
        mine, hand = (statistics.median(taken[name]) for name in ("ours", "hand"))
        lines.append(f"| {count} | {mine:.2f} | {hand:.2f} | **{mine / hand:.2f}** | ≤ 1.0 (stretch 0.5) |")
    return lines


def _imports() -> list[str]:
    script = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    taken: dict[str, list[float]] = {"langgraph.graph": [], "cai_graph": [], "cai_graph.chain": []}
    for _ in range(5):
        for name in taken:
            done = subprocess.run(
                [sys.executable, "-c", script.format(name)], capture_output=True, text=True, check=True
            )
            taken[name].append(float(done.stdout))
    base, lazy, whole = (statistics.median(values) for values in taken.values())
    return [
        "",
        "### Import",
        "",
        f"CPU of `import cai_graph` is **{lazy / base:.2f}** × `import langgraph.graph`, and with everything "
        f"that `constitutional` needs **{whole / base:.2f}** × (goal ≤ 1.1).",
    ]


async def _all() -> str:
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(DeprecationWarning):
        folder = Path(name)
        parts = [*await _overhead(folder), *await _latency(folder), *await _concurrency(folder)]
    return "\n".join(["## Overhead", "", *parts, *_imports()])


def run() -> str:
    """Return the section on overhead."""
    return asyncio.run(_all())
