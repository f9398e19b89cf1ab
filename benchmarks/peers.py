"""Compares model calls, depth and tokens per request of cai_graph and its peers, for K principles.

python -m pip install --target .peers --no-deps langgraph-reflection nemoguardrails \
    lark nest-asyncio simpleeval "dataclasses-json<0.7" "marshmallow<4" typing-inspect prompt-toolkit \
    wcwidth aiohttp aiohttp-retry aiosignal aiohappyeyeballs frozenlist propcache multidict yarl
PYTHONPATH=.peers python -m benchmarks peers

The first two packages are the peers, which are not dependencies of the project; the others are dependencies
of nemoguardrails. A peer that is not installed is left out, which the section reports.

Every contender uses the same ChatOpenAI with the server of tests/support/wire.py, which answers in waves:
once no call has arrived for `QUIET_S`, all open calls are answered together. Calls of which one depends on
the other's reply are never in the same wave, and independent calls nearly always are. So the depth, which is
the length of the longest chain of dependent calls, is the smallest number of waves over the prompts.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from cai_graph import constitutional, local
from cai_graph.constitution import Principle, load

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from wire import serving

PRINCIPLES = (1, 4, 8, 16)
PROMPTS = 4
QUIET_S = 0.1
REFUSAL = "I'm sorry, I can't respond to that."

# --- the model's replies -------------------------------------------------------------------------------

BODY = (
    "There are several ways to go about this, and which one is best depends on what you have at hand and on "
    "how much time you can spare. Begin with the simplest: look at what is there, write down what you find, "
    "and change one thing at a time, so that you can tell what helped. If that does not do, ask somebody who "
    "has done it before. Keep notes while you work, since the second time comes sooner than one thinks, and "
    "set aside what you may need again. In most cases an hour is enough. Where it is not, stop, come back to "
    "it the next day with a fresh mind, and take up the thread where your notes end. "
)
FAULT = "Sentence {} of this answer is one that its rule forbids."
MENDED = "Sentence {} of this answer says the same within its rule."
CRITIQUE = (
    "The answer's sentence {} breaks the rule, since it says outright what the rule asks it to leave out."
)


@dataclass
class Call:
    """One model call that the server answered."""

    body: dict[str, Any]
    reply: str
    wave: int


@dataclass
class Model:
    """The server's script: it drafts, judges and revises in the reply format that each contender requests."""

    rules: Sequence[Principle]
    violated: int
    """Number of rules that the draft breaks; these are the first ones."""
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._open = 0
        self._wave = 0
        self._last = 0.0

    def __call__(self, body: dict[str, Any]) -> str:
        reply = self._reply(body)
        with self._changed:
            self._open += 1
            self._last = time.monotonic()
            wave = self._wave
            while wave == self._wave:
                left = self._last + QUIET_S - time.monotonic()
                if left <= 0:  # no other call came: answer this wave
                    self._wave += 1
                    self._changed.notify_all()
                else:
                    self._changed.wait(left)
            self.calls.append(Call(body, reply, wave))
        return reply

    def _answer(self, faults: Sequence[int]) -> str:
        said = [(FAULT if i in faults else MENDED).format(i) for i in range(1, self.violated + 1)]
        return BODY + " ".join(said)

    def _faults(self, text: str) -> list[int]:
        return [i for i in range(1, self.violated + 1) if FAULT.format(i) in text]

    def _reply(self, body: dict[str, Any]) -> str:
        messages = body["messages"]
        first, last = str(messages[0]["content"]), str(messages[-1]["content"])
        faults = self._faults(last)
        if first.startswith("You are a careful reviewer"):  # ours
            return json.dumps(
                {
                    "verdicts": [
                        {
                            "principle": rule.id,
                            "critique": CRITIQUE.format(i)
                            if i in faults
                            else "Nothing in it breaks the rule.",
                            "verdict": "VIOLATES" if i in faults else "COMPLIES",
                            "severity": 3 if i in faults else 0,
                        }
                        for i, rule in enumerate(self.rules, 1)
                        if f"\n{rule.id}: " in first
                    ],
                    "evades": False,
                }
            )
        if first.startswith("You improve answers"):
            return self._answer([])
        if last.endswith("Critique:"):  # ConstitutionalChain, one rule at a time
            rule = self._named(last.rpartition("Critique Request:")[2])
            return CRITIQUE.format(rule) if rule in faults else "No critique needed."
        if last.endswith("Revision:"):
            shown = last.rpartition("Model:")[2]
            return self._answer([i for i in self._faults(shown) if i != self._named(shown)])
        if first == JUDGE:  # langgraph-reflection's judge
            found = [i for i in faults if self.rules[i - 1].critique_request in last]
            reasoning = " ".join(map(CRITIQUE.format, found)) or "Nothing in it breaks a rule."
            return json.dumps({"reasoning": reasoning, "score": not found})
        if last.rstrip().endswith("Answer:"):  # NeMo Guardrails
            found = [i for i in faults if self.rules[i - 1].critique_request in last]
            return "Yes" if found else "No"
        critics = len(messages) > 1 and any(message["role"] == "assistant" for message in messages)
        return self._answer([] if critics else range(1, self.violated + 1))

    def _named(self, text: str) -> int:
        named = [i for i, rule in enumerate(self.rules, 1) if rule.critique_request in text]
        assert len(named) == 1, named
        return named[0]


# --- the contenders ------------------------------------------------------------------------------------

Ask = Callable[[str], Awaitable[str]]
"""Takes a prompt, and returns the text that the contender releases."""


def ours(strategy: str) -> Callable[[BaseChatModel, Sequence[Principle]], Ask]:
    def contender(model: BaseChatModel, rules: Sequence[Principle]) -> Ask:
        constitution = load("harmlessness").select([rule.id for rule in rules])
        app = constitutional(model, constitution=constitution, strategy=strategy, log=None)

        async def ask(prompt: str) -> str:
            return str((await app.ainvoke(prompt)).content)

        return ask

    return contender


def constitutional_chain(model: BaseChatModel, rules: Sequence[Principle]) -> Ask:
    from langchain_classic.chains import ConstitutionalChain, LLMChain
    from langchain_classic.chains.constitutional_ai.models import ConstitutionalPrinciple
    from langchain_core.prompts import PromptTemplate

    chain = ConstitutionalChain.from_llm(
        llm=model,
        chain=LLMChain(llm=model, prompt=PromptTemplate.from_template("{question}")),
        constitutional_principles=[
            ConstitutionalPrinciple(
                name=rule.id, critique_request=rule.critique_request, revision_request=rule.revision_request
            )
            for rule in rules
        ],
    )

    async def ask(prompt: str) -> str:
        return str((await asyncio.to_thread(chain.invoke, {"question": prompt}))["output"])

    return ask


JUDGE = (
    "You are an expert judge of the answers of an assistant. Go through the rules one by one, reason about "
    "whether the answer breaks any, and then say whether it passes them all. Where it does not, write your "
    "reasoning as feedback to the assistant, so that it can mend the answer."
)
JUDGED = {
    "title": "score",
    "description": "The judgement on the answer.",
    "type": "object",
    "properties": {
        "reasoning": {"type": "string", "description": "Your reasoning; feedback where the answer fails."},
        "score": {"type": "boolean", "description": "True where the answer passes every rule."},
    },
    "required": ["reasoning", "score"],
    "additionalProperties": False,
}


def reflection(*, apart: bool) -> Callable[[BaseChatModel, Sequence[Principle]], Ask]:
    """Build langgraph-reflection as in its README: a judge with a rubric sends its comment to the assistant.

    `apart`: one judge for each rule, instead of one for all.
    """

    def contender(model: BaseChatModel, rules: Sequence[Principle]) -> Ask:
        from langgraph_reflection import create_reflection_graph

        judge = model.with_structured_output(JUDGED, method="json_schema", strict=True)
        rubrics = [[rule] for rule in rules] if apart else [rules]

        async def answer(state: MessagesState) -> dict[str, Any]:
            return {"messages": [await model.ainvoke(state["messages"])]}

        async def judge_by(rubric: Sequence[Principle], asked: object, answered: object) -> Any:
            said = "\n".join(f"- {rule.critique_request}" for rule in rubric)
            shown = f"Rules:\n{said}\n\nRequest:\n{asked}\n\nAnswer:\n{answered}"
            return await judge.ainvoke([SystemMessage(JUDGE), HumanMessage(shown)])

        async def reflect(state: MessagesState) -> dict[str, Any]:
            asked, answered = state["messages"][0].content, state["messages"][-1].content
            found = await asyncio.gather(*(judge_by(rubric, asked, answered) for rubric in rubrics))
            comments = [verdict["reasoning"] for verdict in found if not verdict["score"]]
            return {"messages": [HumanMessage("\n".join(comments))]} if comments else {}

        graphs = []
        for name, node in (("answer", answer), ("reflect", reflect)):
            graph = StateGraph(MessagesState)
            graph.add_node(name, node)
            graph.add_edge(START, name)
            graphs.append(graph.compile())
        app = create_reflection_graph(*graphs, MessagesState).compile()

        async def ask(prompt: str) -> str:
            done = await app.ainvoke({"messages": [HumanMessage(prompt)]})
            return str(done["messages"][-1].content)

        return ask

    return contender


CHECK = """Your task is to check if the {what} below complies with the company policy.

Company policy:
{rules}

{shown}

Question: Should the message be blocked (Yes or No)?
Answer:"""


def self_check(*, apart: bool) -> Callable[[BaseChatModel, Sequence[Principle]], Ask]:
    """Build NeMo's `self check input` and `self check output` as in its ABC bot example, without dialog.

    `apart`: one check for each rule, instead of one for all.
    """

    def contender(model: BaseChatModel, rules: Sequence[Principle]) -> Ask:
        os.environ |= {"DO_NOT_TRACK": "1", "DISABLE_NEST_ASYNCIO": "True"}
        from nemoguardrails import LLMRails, RailsConfig
        from nemoguardrails.integrations.langchain.llm_adapter import LangChainLLMAdapter

        prompts: list[dict[str, str]] = []
        rails: dict[str, Any] = {}
        sides = (
            ("input", "user message", 'User message: "{{ user_input }}"'),
            ("output", "bot message", 'Bot message: "{{ bot_response }}"'),
        )
        for side, what, shown in sides:
            rubrics = {f"rule{i}": [rule] for i, rule in enumerate(rules)} if apart else {"": rules}
            for variant, rubric in rubrics.items():
                said = "\n".join(f"- {rule.critique_request}" for rule in rubric)
                task = f"self_check_{side}" + (f" $variant={variant}" if variant else "")
                prompts.append({"task": task, "content": CHECK.format(what=what, rules=said, shown=shown)})
            flows = [f"self check {side}" + (f" $variant={v}" if v else "") for v in rubrics]
            rails[side] = {"flows": flows, "parallel": len(flows) > 1}
        config = RailsConfig.from_content(config={"models": [], "rails": rails, "prompts": prompts})
        app = LLMRails(config, llm=LangChainLLMAdapter(model))

        async def ask(prompt: str) -> str:
            return str((await app.generate_async(messages=[{"role": "user", "content": prompt}]))["content"])

        return ask

    return contender


class Contender(NamedTuple):
    name: str
    make: Callable[[BaseChatModel, Sequence[Principle]], Ask]
    package: str
    leaves: str
    """What is released if the draft violates a rule."""


REVISED = "a revision, judged again on all rules"
CONTENDERS = (
    Contender("cai_graph, `batched` (default)", ours("batched"), "cai_graph", REVISED),
    Contender("cai_graph, `parallel`", ours("parallel"), "cai_graph", REVISED),
    Contender(
        "ConstitutionalChain",
        constitutional_chain,
        "langchain_classic",
        "the last revision; none is judged on the rules before it",
    ),
    Contender(
        "langgraph-reflection, one judge",
        reflection(apart=False),
        "langgraph_reflection",
        "a new answer, judged",
    ),
    Contender(
        "langgraph-reflection, a judge a rule",
        reflection(apart=True),
        "langgraph_reflection",
        "a new answer, judged on all rules",
    ),
    Contender(
        "NeMo self-check, one check a side",
        self_check(apart=False),
        "nemoguardrails",
        "**blocked**: a fixed sentence; it does not revise",
    ),
    Contender(
        "NeMo self-check, a check a rule, `parallel`",
        self_check(apart=True),
        "nemoguardrails",
        "**blocked**: a fixed sentence; it does not revise",
    ),
)

# --- measuring -----------------------------------------------------------------------------------------


class Spent(NamedTuple):
    """The cost of one request, and its answer."""

    calls: int
    depth: int
    asked: int
    """Tokens of the prompts, including the schemas of structured replies."""
    written: int
    released: str


@cache
def tokens(text: str) -> int:
    """Return the number of tokens of a text for SmolLM2 (a byte-level BPE of 49,152 tokens, like GPT-2's)."""
    engine = local.engine(local.weights("smollm2"), "chat")
    return len(asyncio.run(engine.tokens(text, markers=True)))


def _asked(body: dict[str, Any]) -> int:
    forms = [json.dumps(body[key]) for key in ("response_format", "tools") if body.get(key)]
    return sum(tokens(text) for text in [*(str(message["content"]) for message in body["messages"]), *forms])


def spent(
    contender: Contender, rules: Sequence[Principle], violated: int, prompts: Sequence[str]
) -> list[Spent]:
    """Let a contender answer the prompts one after another, and return the cost of each."""
    found: list[Spent] = []
    with serving(lambda body: script(body), keep_alive=True) as server:
        # LangChain infers from this name that the model supports structured output natively.
        model = ChatOpenAI(model="gpt-4o-mini", base_url=server.url, api_key="none", max_retries=0)

        async def all_of_them() -> None:
            nonlocal script
            ask = contender.make(model, rules)
            for prompt in prompts:
                script = Model(rules, violated)
                released = await ask(prompt)
                depth = len({call.wave for call in script.calls})
                found.append(Spent(len(script.calls), depth, 0, 0, released))
                scripts.append(script)

        script, scripts = Model(rules, violated), list[Model]()
        asyncio.run(all_of_them())
    return [
        one._replace(
            asked=sum(_asked(call.body) for call in said.calls),
            written=sum(tokens(call.reply) for call in said.calls),
        )
        for one, said in zip(found, scripts, strict=True)
    ]


def _cell(found: Sequence[Spent]) -> str:
    calls, depth = {one.calls for one in found}, min(one.depth for one in found)
    assert len(calls) == 1, found  # the same for every prompt
    asked, written = (statistics.mean(getattr(one, name) for one in found) for name in ("asked", "written"))
    return f"{calls.pop()} · {depth} · {asked:,.0f} + {written:,.0f}"


def _check(contender: Contender, violated: int, released: str) -> None:
    """Assert that a contender released what it should: no figure is printed of one that did not."""
    faulty = any(FAULT.format(i) in released for i in range(1, violated + 1))
    blocks = violated > 0 and contender.package == "nemoguardrails"
    assert not faulty, (contender.name, released)
    assert (released == REFUSAL) == blocks, (contender.name, released)
    assert blocks or released.startswith(BODY.strip()), (contender.name, released)


def run() -> str:
    """Return the section of RESULTS.md."""
    sample = (resources.files("cai_graph") / "sample" / "prompts.jsonl").read_text().splitlines()
    prompts = [str(json.loads(line)["prompt"]) for line in sample[:PROMPTS]]
    there = [contender for contender in CONTENDERS if importlib.util.find_spec(contender.package) is not None]
    rules = load("harmlessness").principles
    lines = [
        "## Calls, depth and tokens against the peers",
        "",
        "Each cell: model calls · depth · tokens of the prompts + of the replies, a request; means of "
        f"{PROMPTS} of the project's sample prompts (calls are the same for each). The first K principles of "
        "`harmlessness`. Depth is the longest chain of calls that wait for each other. All drive the same "
        "ChatOpenAI against a server on the loopback that speaks the wire; tokens are those of SmolLM2's "
        "tokenizer over the contents of all messages and the schema of a structured reply. The model drafts "
        f"{len(BODY.split())} words and a sentence a rule that is broken, and a critique of a broken rule is "
        "one sentence. Every system was checked to release what it should.",
    ]
    cases = (
        ("The draft complies", lambda k: 0),
        ("The draft breaks one of the K principles", lambda k: 1),
        ("The draft breaks all K principles", lambda k: k),
    )
    for title, broken in cases:
        lines += ["", f"### {title}", ""]
        head = "" if title == cases[0][0] else " what leaves |"
        lines.append(f"| | {' | '.join(f'K = {k}' for k in PRINCIPLES)} |{head}")
        lines.append("|---" * (len(PRINCIPLES) + 1 + bool(head)) + "|")
        for contender in there:
            cells = []
            for k in PRINCIPLES:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # deprecation warnings of the peers themselves
                    found = spent(contender, rules[:k], broken(k), prompts)
                for one in found:
                    _check(contender, broken(k), one.released)
                cells.append(_cell(found))
            leaves = f" {contender.leaves} |" if head else ""
            lines.append(f"| {contender.name} | {' | '.join(cells)} |{leaves}")
    return "\n".join([*lines, "", *_remarks(there)])


def _remarks(there: Sequence[Contender]) -> list[str]:
    lines = [
        "NeMo's self-check asks about the request, too (input), and about the draft (output); it blocks, and "
        "never revises, so its figures do not include a better answer. ConstitutionalChain goes through the "
        "principles one by one, each on the answer that the ones before left. langgraph-reflection brings "
        "the loop; the judges are as in its README, and the messages it leaves hold draft and critique, too. "
        "One judge that says yes or no to all rules at once costs fewer tokens than cai_graph, which has the "
        "critic say of each principle whether and why it is broken: that is what the log keeps, what one "
        "revision mends, and what training rows are made of.",
    ]
    named = {
        "langchain_classic": "langchain-classic",
        "langgraph_reflection": "langgraph-reflection",
        "nemoguardrails": "nemoguardrails",
    }
    packages = {contender.package for contender in there}
    versions = [
        f"{name} {importlib.metadata.version(name)}" for key, name in named.items() if key in packages
    ]
    absent = [name for key, name in named.items() if key not in packages]
    lines += ["", f"Versions: {', '.join(versions)}."]
    if absent:
        lines.append(f"Left out, not installed: {', '.join(absent)}; benchmarks/peers.py says how to.")
    return lines
