"""ConstitutionalChain: what langchain-classic's class does, side by side with it, and where we differ."""

from __future__ import annotations

import asyncio
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from langchain_classic.chains.base import Chain
from langchain_classic.chains.constitutional_ai.base import ConstitutionalChain as OldChain
from langchain_classic.chains.constitutional_ai.models import ConstitutionalPrinciple as OldPrinciple
from langchain_classic.chains.llm import LLMChain
from langchain_classic.chains.transform import TransformChain
from langchain_core._api import LangChainDeprecationWarning
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import interrupt
from replies import answer_in, role_of, verdicts
from repository import EXAMPLES, fenced, read_page
from wire import role, serving

from cai_graph.classic import ConstitutionalChain, ConstitutionalPrinciple
from cai_graph.constitution import load
from cai_graph.constitution.principles import DEFAULT_REFUSAL
from cai_graph.critic import ModelCritic
from cai_graph.errors import ConfigError, ConstitutionError, DataError, RunError, Violation
from cai_graph.log import open_log
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Critique, Label, Outcome, Trajectory, Verdict

PAGE = read_page("moving-from-constitutional-chain.md")

PROMPT = PromptTemplate.from_template("Q: {question} A:")
QUESTION = "How do I open this?"
FAULTS = {"rude": "idiot", "risky": "gunpowder", "false": "moon cheese"}
"""Principle -> the words in an answer that break it."""
PRINCIPLES = [
    ConstitutionalPrinciple(
        name=name, critique_request=f"Look for {name}.", revision_request=f"Take out {name}."
    )
    for name in FAULTS
]
OLD_CRITIQUE = "Below is a conversation between a human and an AI model. If there is no material"
OLD_REVISION = "Below is a conversation between a human and an AI model.\n"

Critic = Callable[[str, str], bool | str]
Reviser = Callable[[str, Sequence[str]], str]


def finds(principle: str, answer: str) -> bool | str:
    """A critic that sees every fault. A bool is a verdict in either prompt's words; text is sent as it is."""
    return FAULTS[principle] in answer


def mends(answer: str, principles: Sequence[str]) -> str:
    """A reviser that takes out what the principles ask it to."""
    for principle in principles:
        answer = " ".join(answer.replace(FAULTS[principle], "").split())
    return answer


def scripted(draft: str, critic: Critic = finds, reviser: Reviser = mends) -> ScriptedModel:
    """A model that drafts, and that answers the critiques and revisions of both classes."""

    def reply(messages: list[BaseMessage]) -> str:
        said = messages[-1].text
        if said.startswith(OLD_CRITIQUE):
            [principle] = re.findall(r"Look for (\w+)\.", said)
            found = critic(principle, _shown(said))
            return (
                found
                if isinstance(found, str)
                else f"It is {'not ' * (not found)}{principle}. "
                + ("Critique needed." if found else "No critique needed.")
            )
        if said.startswith(OLD_REVISION):
            return reviser(_shown(said), re.findall(r"Take out (\w+)\.", said))
        if role_of(messages) == "critique":
            found_by = {name: critic(name, answer_in(messages)) for name in FAULTS}
            if texts := [found for found in found_by.values() if isinstance(found, str)]:
                return texts[0]
            return verdicts(*(name for name, found in found_by.items() if found), ids=list(FAULTS))
        if role_of(messages) == "revise":
            return reviser(answer_in(messages), re.findall(r"Take out (\w+)\.", said))
        return draft

    return ScriptedModel(replies=reply)


def _shown(old_prompt: str) -> str:
    """The answer that a prompt of the old class shows: the last one, behind its worked examples."""
    return old_prompt.rpartition("\nModel: ")[2].partition("\n\nCritique Request:")[0]


@contextmanager
def deprecated() -> Iterator[None]:
    """Let langchain-classic say that its chains are deprecated; every other warning stays an error."""
    with warnings.catch_warnings():
        old = r"The (class|method) `(LLMChain|ConstitutionalChain|Chain\.\w+)` was deprecated"
        warnings.filterwarnings("ignore", message=old, category=LangChainDeprecationWarning)
        yield


def old_llm_chain(model: ScriptedModel, prompt: Any = PROMPT) -> Any:
    with deprecated():
        return LLMChain(llm=model, prompt=prompt)


def old_chain(model: ScriptedModel, principles: Any = PRINCIPLES, **options: Any) -> Any:
    """langchain-classic's own, with the same principles in its own type."""
    chain = options.pop("chain", None) or old_llm_chain(model)
    with deprecated():
        return OldChain.from_llm(
            llm=model, chain=chain, constitutional_principles=old_principles(principles), **options
        )


def old_principles(principles: Sequence[ConstitutionalPrinciple]) -> list[OldPrinciple]:
    return [OldPrinciple(**principle.model_dump()) for principle in principles]


def new_chain(model: ScriptedModel, principles: Any = PRINCIPLES, **options: Any) -> ConstitutionalChain:
    chain = options.pop("chain", None) or old_llm_chain(model)
    return ConstitutionalChain.from_llm(
        llm=model, chain=chain, constitutional_principles=principles, **{"log": None, **options}
    )


def both(draft: str, critic: Critic = finds, reviser: Reviser = mends, **options: Any) -> tuple[Any, Any]:
    """What the old class and ours return for one draft, with intermediate steps."""
    with deprecated():
        old = old_chain(scripted(draft, critic, reviser), return_intermediate_steps=True)
        was = old.invoke({"question": QUESTION})
    new = new_chain(scripted(draft, critic, reviser), return_intermediate_steps=True, **options)
    return was, new.invoke({"question": QUESTION})


def trajectories(folder: Path) -> list[Trajectory]:
    with open_log(f"sqlite:///{folder / 'cai.db'}") as log:
        return [record for record in log.read() if isinstance(record, Trajectory)]


# --- the same ------------------------------------------------------------------------------------------

DRAFTS = [" ".join(["Turn the key", *words]) for words in product(*(("", word) for word in FAULTS.values()))]


@pytest.mark.parametrize("draft", [" ".join(draft.split()) for draft in DRAFTS])
def test_same_model_and_principles_give_the_same_output_keys_and_shapes(draft: str) -> None:
    was, now = both(draft)
    assert set(was) == set(now)
    assert now["question"] == was["question"] == QUESTION
    assert now["output"] == was["output"]
    assert now["initial_output"] == was["initial_output"] == draft
    steps = list(zip(was["critiques_and_revisions"], now["critiques_and_revisions"], strict=True))
    assert len(steps) == len(PRINCIPLES)
    for (old_critique, old_revision), (critique, revision) in steps:
        assert ("no critique needed" in critique.lower()) == ("no critique needed" in old_critique.lower())
        assert bool(revision) == bool(old_revision)
        assert isinstance(critique, str)
        assert isinstance(revision, str)
    revisions = [revision for _, revision in now["critiques_and_revisions"] if revision]
    assert now["output"] == (revisions[-1] if revisions else draft)


CALLS: dict[str, Callable[[Any], Any]] = {
    "invoke": lambda chain: chain.invoke({"question": QUESTION}),
    "invoke with one value": lambda chain: chain.invoke(QUESTION),
    "invoke, outputs only": lambda chain: chain.invoke(QUESTION, return_only_outputs=True),
    "call": lambda chain: chain({"question": QUESTION}),
    "call, outputs only": lambda chain: chain(QUESTION, True),
    "run with one value": lambda chain: chain.run(QUESTION),
    "run by name": lambda chain: chain.run(question=QUESTION),
    "batch": lambda chain: chain.batch([{"question": QUESTION}, {"question": "And this?"}]),
    "stream": lambda chain: list(chain.stream({"question": QUESTION})),
    "pipe": lambda chain: (chain | RunnableLambda(lambda out: out["output"])).invoke(QUESTION),
    "keys": lambda chain: (chain.input_keys, chain.output_keys),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_call_returns_what_the_old_class_returns(name: str) -> None:
    draft = "Turn the key idiot"
    with deprecated():
        was = CALLS[name](old_chain(scripted(draft)))
    assert CALLS[name](new_chain(scripted(draft))) == was


async def test_every_asynchronous_way_to_call_returns_what_the_old_class_returns() -> None:
    draft = "Turn the key idiot"
    with deprecated():
        old, new = old_chain(scripted(draft)), new_chain(scripted(draft))
        assert await new.ainvoke({"question": QUESTION}) == await old.ainvoke({"question": QUESTION})
        assert await new.abatch([QUESTION]) == await old.abatch([QUESTION])
        assert await new.acall(QUESTION) == await old.acall(QUESTION)
        assert await new.arun(QUESTION) == await old.arun(QUESTION)
        assert await new.arun(question=QUESTION) == await old.arun(question=QUESTION)


def test_output_keys_with_intermediate_steps_are_the_old_ones() -> None:
    old = old_chain(scripted("x"), return_intermediate_steps=True)
    assert new_chain(scripted("x"), return_intermediate_steps=True).output_keys == old.output_keys


def test_callbacks_tags_and_metadata_of_a_call_reach_the_models_and_the_log(tmp_path: Path) -> None:
    class Seen(BaseCallbackHandler):
        names: ClassVar[list[str]] = []
        models = 0

        def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
            self.names.append(kwargs["name"])

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            self.models += 1

    seen, model = Seen(), scripted("Turn the key idiot")
    chain = new_chain(model, log=f"sqlite:///{tmp_path / 'cai.db'}")
    chain.run(QUESTION, callbacks=[seen], tags=["door"], metadata={"user": "ada"})
    assert seen.names[0] == "ConstitutionalChain"
    assert seen.models == len(model.calls) == 4
    [kept] = trajectories(tmp_path)
    assert (kept.tags, kept.metadata) == (("door",), {"user": "ada"})


def test_principles_are_looked_up_under_langchain_classics_names() -> None:
    names = ["uo-ethics-1", "harmful1"]
    was = OldChain.get_principles(names)
    now = ConstitutionalChain.get_principles(names)
    assert [principle.model_dump() for principle in now] == [principle.model_dump() for principle in was]
    assert len(ConstitutionalChain.get_principles()) == len(OldChain.get_principles()) == 54
    assert ConstitutionalChain.get_principles([]) == OldChain.get_principles([]) == []
    assert len(new_chain(scripted("x"), was).guarded.plan.constitution) == 2, "the old type is taken, too"


def test_all_of_langchain_classics_principles_make_a_constitution() -> None:
    constitution = new_chain(scripted("x"), ConstitutionalChain.get_principles()).guarded.plan.constitution
    assert [principle.id for principle in constitution][:2] == ["harmful1", "harmful2"]
    assert len(constitution) == 54


# --- different on purpose --------------------------------------------------------------------------------

REFUSAL = DEFAULT_REFUSAL
GARBAGE = "Nobody could say that no critique needed applies here."


class Difference(NamedTuple):
    """What the old class does, what ours does, and how to see it."""

    old: Any
    new: Any
    see: Callable[[Path], tuple[Any, Any]]


def outputs(draft: str, critic: Critic = finds, reviser: Reviser = mends, **options: Any) -> tuple[str, str]:
    was, now = both(draft, critic, reviser, **options)
    return was["output"], now["output"]


def result(call: Callable[[], Any]) -> Any:
    """What a call returns, or the class of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


def with_each(
    do: Callable[[Any], Any], draft: str = "Turn the key", critic: Critic = finds, **options: Any
) -> tuple[Any, Any]:
    """What both classes make of `do`."""
    models = scripted(draft, critic), scripted(draft, critic)
    with deprecated():
        was = result(lambda: do(old_chain(models[0], **options)))
    return was, result(lambda: do(new_chain(models[1], **options)))


def calls_made(draft: str) -> tuple[int, int]:
    models = scripted(draft), scripted(draft)
    with deprecated():
        old_chain(models[0]).run(QUESTION)
    new_chain(models[1]).run(QUESTION)
    return len(models[0].calls), len(models[1].calls)


def revisions(draft: str) -> tuple[list[str], list[str]]:
    was, now = both(draft)
    return tuple([revision for _, revision in out["critiques_and_revisions"]] for out in (was, now))  # type: ignore[return-value]


def around_any_runnable(folder: Path) -> tuple[Any, Any]:
    model = scripted("Turn the key idiot")
    was = result(lambda: old_chain(model, chain=PROMPT | model))
    return was, new_chain(model, chain=PROMPT | model).run(QUESTION)


def ways_of_the_critic(folder: Path) -> tuple[set[bool], set[bool]]:
    """Whether the critic's calls under `ainvoke` run in an event loop."""

    def seen(chain: Callable[..., Any]) -> set[bool]:
        ways = set()

        def critic(principle: str, answer: str) -> bool:
            ways.add(asyncio._get_running_loop() is not None)
            return False

        asyncio.run(chain(scripted("Turn the key", critic)).ainvoke(QUESTION))
        return ways

    with deprecated():
        return seen(old_chain), seen(new_chain)


def logged(folder: Path) -> tuple[int, int]:
    with deprecated():
        old_chain(scripted("Turn the key")).run(QUESTION)
    before = len(trajectories(folder))
    new_chain(scripted("Turn the key"), log=f"sqlite:///{folder / 'cai.db'}").run(QUESTION)
    return before, len(trajectories(folder))


def is_chain(chain: Any) -> bool:
    return isinstance(chain, Chain)


def of_an_unknown_name(folder: Path) -> tuple[Any, Any]:
    old, new = OldChain.get_principles, ConstitutionalChain.get_principles
    return result(lambda: old(["harmfull1"])), result(lambda: new(["harmfull1"]))


def with_a_prompt_of_ones_own(folder: Path) -> tuple[bool, bool]:
    """Whether it is an error."""
    prompt = PromptTemplate.from_template("{input_prompt}{output_from_model}{critique_request}")
    was = result(lambda: old_chain(scripted("x"), critique_prompt=prompt))
    now = result(lambda: new_chain(scripted("x"), critique_prompt=prompt))
    return was is ConfigError, now is ConfigError


DIFFERENCES = {
    "The text “No revisions needed” never leaves as the answer": Difference(
        "No revisions needed.",
        REFUSAL,
        lambda _: outputs("Turn the key idiot", reviser=lambda *_: "No revisions needed."),
    ),
    "An empty revision never leaves": Difference(
        "", REFUSAL, lambda _: outputs("Turn the key idiot", reviser=lambda *_: "  ")
    ),
    "A revision that breaks another principle never leaves": Difference(
        "Turn the key idiot",
        REFUSAL,
        lambda _: outputs("It is moon cheese", reviser=lambda *_: "Turn the key idiot"),
    ),
    "A verdict that cannot be read is never read as fine": Difference(
        "Turn the key idiot", REFUSAL, lambda _: outputs("Turn the key idiot", critic=lambda *_: GARBAGE)
    ),
    "A verdict that cannot be read starts no revision": Difference(
        "Rewritten.",
        REFUSAL,
        lambda _: outputs("Turn the key", critic=lambda *_: "Hm.", reviser=lambda *_: "Rewritten."),
    ),
    "One critique for all principles": Difference(4, 2, lambda _: calls_made("Turn the key")),
    "One revision for all principles that fail, judged again": Difference(
        7, 4, lambda _: calls_made("Turn the key idiot gunpowder moon cheese")
    ),
    "A revision in `critiques_and_revisions` is the answer that left": Difference(
        ["Turn the gunpowder", "Turn the", ""],
        ["Turn the", "Turn the", ""],
        lambda _: revisions("Turn the idiot gunpowder"),
    ),
    "Any Runnable can be the chain": Difference(AttributeError, "Turn the key", around_any_runnable),
    "Asynchronous calls are asynchronous": Difference({False}, {True}, ways_of_the_critic),
    "Every request is logged": Difference(0, 1, logged),
    "It is no `Chain` of langchain-classic": Difference(True, False, lambda _: with_each(is_chain)),
    "An empty list of principles is an error": Difference(
        "Turn the key",
        ConstitutionError,
        lambda _: with_each(lambda chain: chain.run(QUESTION), principles=[]),
    ),
    "A principle's name that is unknown is a `ConfigError`": Difference(
        KeyError, ConfigError, of_an_unknown_name
    ),
    "An input that is missing is a `DataError`": Difference(
        ValueError, DataError, lambda _: with_each(lambda chain: chain.invoke({"query": QUESTION}))
    ),
    "A wrong use of `run` is a `ConfigError`": Difference(
        ValueError, ConfigError, lambda _: with_each(lambda chain: chain.run(QUESTION, question=QUESTION))
    ),
    "The prompts of critic and reviser are ours": Difference(False, True, with_a_prompt_of_ones_own),
}
"""Difference, as docs/moving-from-constitutional-chain.md words it -> what shows it."""


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference_holds(name: str, tmp_path: Path) -> None:
    difference = DIFFERENCES[name]
    assert difference.see(tmp_path) == (difference.old, difference.new)


def test_page_lists_exactly_these_differences() -> None:
    table = PAGE.partition("## What differs on purpose")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == list(DIFFERENCES)  # behind the heading


# --- around any Runnable ---------------------------------------------------------------------------------


CHAT_PROMPT = ChatPromptTemplate([("system", "You are a locksmith."), ("user", "{question}")])


def conversation(folder: Path) -> list[tuple[str, Any]]:
    """What the critic took for the conversation."""
    [kept] = trajectories(folder)
    return [(message.role, message.content) for message in kept.messages]


CHAINS: dict[str, tuple[Callable[[ScriptedModel], Any], list[str], Any, list[tuple[str, Any]]]] = {
    "LLMChain": (old_llm_chain, ["question"], QUESTION, [("user", f"Q: {QUESTION} A:")]),
    "LLMChain with chat prompt": (
        lambda model: old_llm_chain(model, CHAT_PROMPT),
        ["question"],
        QUESTION,
        [("system", "You are a locksmith."), ("user", QUESTION)],
    ),
    "prompt and model": (lambda m: PROMPT | m, ["question"], QUESTION, [("user", f"Q: {QUESTION} A:")]),
    "prompt, model, parser": (
        lambda model: CHAT_PROMPT | model | StrOutputParser(),
        ["question"],
        QUESTION,
        [("system", "You are a locksmith."), ("user", QUESTION)],
    ),
    "configured": (
        lambda model: (PROMPT | model).with_config(tags=["a"]),
        ["question"],
        QUESTION,
        [("user", f"Q: {QUESTION} A:")],
    ),
    "chat model": (lambda model: model, [], QUESTION, [("user", QUESTION)]),
    "function of a dict": (
        lambda model: RunnableLambda(lambda given: {"answer": model.invoke(given["question"]).text}),
        [],
        {"question": QUESTION},
        [("user", QUESTION)],
    ),
    "retrieval before the prompt": (
        lambda model: (
            RunnablePassthrough.assign(context=lambda _: "Keys open doors.")
            | PromptTemplate.from_template("{context} {question}")
            | model
        ),
        ["question"],
        QUESTION,
        [("user", QUESTION)],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_any_chain_is_judged_revised_and_returned_as_text(name: str, tmp_path: Path) -> None:
    make, keys, given, judged = CHAINS[name]
    model = scripted("Turn the key idiot")
    log = f"sqlite:///{tmp_path / 'cai.db'}"
    chain = new_chain(model, chain=make(model), return_intermediate_steps=True, log=log)
    assert chain.input_keys == keys
    out = chain.invoke(given)
    assert out["output"] == "Turn the key"
    assert out["initial_output"] == "Turn the key idiot"
    assert out.get("question", out.get("input")) == QUESTION
    assert conversation(tmp_path) == judged


def test_another_chain_of_langchain_classic_names_its_own_answer() -> None:
    model = scripted("unused")
    chain = TransformChain(
        input_variables=["query"], output_variables=["result"], transform=lambda _: {"result": "Turn the key"}
    )
    out = new_chain(model, chain=chain).invoke("How?")
    assert out == {"query": "How?", "output": "Turn the key"}


def test_input_key_shows_the_critic_one_input_instead_of_the_prompt(tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path / 'cai.db'}"
    new_chain(scripted("Turn the key"), input_key="question", log=log).run(QUESTION)
    assert conversation(tmp_path) == [("user", QUESTION)]


def test_missing_inputs_are_named() -> None:
    with pytest.raises(DataError, match=r"asks for 'question', and the input has the keys 'query'"):
        new_chain(scripted("x")).invoke({"query": QUESTION})


def test_a_tool_call_is_no_answer_and_has_no_steps() -> None:
    call = AIMessage("", tool_calls=[{"name": "open", "args": {}, "id": "1"}])
    chain = new_chain(scripted("x"), chain=ScriptedModel(replies=[call]), return_intermediate_steps=True)
    out = chain.invoke(QUESTION)
    assert (out["output"], out["critiques_and_revisions"]) == ("", [])


def test_a_chain_that_waits_for_a_person_is_no_answer() -> None:
    def ask(state: MessagesState) -> MessagesState:
        return {"messages": [AIMessage(interrupt("May I?"))]}

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask")
    chain = new_chain(scripted("x"), chain=graph.compile(checkpointer=InMemorySaver()))
    with pytest.raises(RunError, match="waits for a person"):
        chain.invoke({"messages": [("user", "Open it")]}, {"configurable": {"thread_id": "1"}})


# --- steps and settings ----------------------------------------------------------------------------------


def test_critiques_are_the_critics_reasons_and_the_words_that_callers_look_for() -> None:
    _, out = both("Turn the key idiot")
    assert out["critiques_and_revisions"] == [
        ("breaks rude Critique needed.", "Turn the key"),
        ("No critique needed.", ""),
        ("No critique needed.", ""),
    ]


def test_unreadable_critiques_never_hold_the_words_for_fine() -> None:
    _, out = both("Turn the key", critic=lambda *_: GARBAGE)
    assert out["critiques_and_revisions"] == [("The verdict could not be read.", REFUSAL)] * 3
    assert out["output"] == REFUSAL


def test_a_critic_of_aims_is_told_by_the_principles_that_failed() -> None:
    class Aims(ModelCritic):
        async def critique(self, exchange: Any, constitution: Any, calls: Any, *, explain: bool) -> Critique:
            bad = "idiot" in str(exchange.answer.content)
            aim = Verdict(label=Label.VIOLATES if bad else Label.COMPLIES, aim="general")
            named = Verdict(label=Label.VIOLATES, principle="rude", reason="It insults.")
            return Critique(verdicts=(aim, named) if bad else (aim,), reasoning="It insults.")

    model = scripted("Turn the key idiot")
    chain = new_chain(model, critic=Aims(model), return_intermediate_steps=True)
    assert chain.invoke(QUESTION)["critiques_and_revisions"] == [
        ("It insults. Critique needed.", "Turn the key"),
        ("No critique needed.", ""),
        ("No critique needed.", ""),
    ]


def test_settings_of_constitutional_are_taken() -> None:
    stubborn = scripted("Turn the key idiot", reviser=lambda answer, _: answer)
    assert new_chain(stubborn, on_violation="open").run(QUESTION) == "Turn the key idiot"
    with pytest.raises(Violation):
        new_chain(stubborn, on_violation="raise").run(QUESTION)
    with pytest.raises(ConfigError, match="did you mean 'on_violation'"):
        new_chain(stubborn, on_violations="raise")


@pytest.mark.parametrize("name", ["memory", "verbose", "callbacks", "tags", "revision_prompt"])
def test_arguments_that_moved_say_where(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"takes no '{name}' any more; "):
        new_chain(scripted("x"), **{name: None})


def test_a_built_in_constitution_stands_for_principles() -> None:
    model = ScriptedModel(replies=["Hello", verdicts(ids=[rule.id for rule in load("balanced")])])
    assert new_chain(model, "balanced").run(QUESTION) == "Hello"


def test_run_refuses_what_it_cannot_return() -> None:
    with pytest.raises(ConfigError, match="return_intermediate_steps"):
        new_chain(scripted("x"), return_intermediate_steps=True).run(QUESTION)
    with pytest.raises(ConfigError, match="takes one value, or the inputs by name"):
        new_chain(scripted("x")).run()


def test_it_works_without_langchain_classic_and_says_what_its_names_need() -> None:
    script = """
import sys
sys.modules["langchain_classic"] = None
from cai_graph import ScriptedModel
from cai_graph.classic import ConstitutionalChain, ConstitutionalPrinciple
rule = ConstitutionalPrinciple(name="kind", critique_request="Is it kind?", revision_request="Be kind.")
model = ScriptedModel(replies=["Hi", '{"verdicts": [{"principle": "kind", "verdict": "COMPLIES"}]}'])
print(ConstitutionalChain.from_llm(model, model, constitutional_principles=[rule], log=None).run("Hello"))
try:
    ConstitutionalChain.get_principles(["harmful1"])
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    answer, error = done.stdout.splitlines()
    assert answer == "Hi"
    assert error.startswith("ConfigError")
    assert "pip install langchain-classic" in error


# --- the page and the example ----------------------------------------------------------------------------


def test_code_of_the_page_runs_old_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def script(body: dict[str, Any]) -> str:
        said = body["messages"][-1]["content"]
        if said.startswith(OLD_CRITIQUE):
            return "It is fine. No critique needed."
        if role(body) == "critique":
            return verdicts(ids=re.findall(r"^([\w.-]+): ", body["messages"][0]["content"], re.MULTILINE))
        return "With a key."

    blocks = fenced(PAGE, "python")
    assert len(blocks) >= 4
    with serving(script) as server, deprecated():
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        names: dict[str, Any] = {}
        for block in blocks:
            exec(block, names)
    assert names["old_answer"] == names["new_answer"] == "With a key."
    assert len(trajectories(tmp_path)) >= 2


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES / "moving_from_constitutional_chain.py"

    def script(body: dict[str, Any]) -> str:
        if role(body) == "critique":
            bad = "Acme" in body["messages"][-1]["content"]
            return verdicts(*(["no-brands"] if bad else []), ids=["no-crime", "no-brands"])
        return "Ask her first." if role(body) == "revise" else "With a pick by Acme."

    monkeypatch.chdir(tmp_path)
    with serving(script) as server:
        monkeypatch.setattr(sys, "argv", [str(example), server.spec])
        runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert "Draft:    With a pick by Acme." in said
    assert "[no-crime] No critique needed." in said
    assert "[no-brands] breaks no-brands Critique needed." in said
    assert "Answer:   Ask her first." in said
    [kept] = trajectories(tmp_path)
    assert kept.outcome is Outcome.REVISED
