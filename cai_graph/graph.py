"""The LangGraph state machine of one request: draft, critique, revise.

    START ─> draft ─> critique ─> revise ─┐ again, while rounds are left
              ^│  <──────┘^          │ ^──┘     back to `draft`: stream `blocks`, the next group of sentences
              │└─> judge ─┘ <────────┘          `judge`: strategy `parallel`, one Send for each principle

    KEPT nothing violated · REVISED a revision was accepted · EXHAUSTED the best answer, policy `open`
    REFUSED the refusal, policy `closed` · FAILED an error was raised

The state is plain JSON: the draft and the rounds. The plan, the request with its app, and the record of its
model calls are the run's context (`Run`). `run.py` calls `drive`, decides which answer is released, and logs.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypedDict

import msgspec
from langchain_core.runnables import RunnableConfig
from langgraph.config import get_config
from langgraph.constants import TAG_NOSTREAM
from langgraph.errors import GraphBubbleUp, NodeCancelledError
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, Send

from cai_graph.calls import Calls
from cai_graph.concurrency.context import apart
from cai_graph.concurrency.together import together
from cai_graph.constitution import Constitution
from cai_graph.critic import covered, failed_principles
from cai_graph.failures import annotate, forget_task
from cai_graph.prompts import Exchange
from cai_graph.request.plan import Plan
from cai_graph.request.policy import Progress, accept
from cai_graph.request.request import Run
from cai_graph.request.revision import candidate
from cai_graph.trajectory import Block, Critique, Draft, Label, Message, Round, revision_at, text_of

__all__ = ["drive"]


class State(TypedDict, total=False):
    """The graph's state: a Progress as JSON."""

    draft: dict[str, Any]
    """The Draft, as JSON."""
    rounds: list[dict[str, Any]]
    """The Rounds so far, as JSON. The last one may be open: its revisions are not judged yet."""


class _ParallelState(State, total=False):
    """The state under strategy `parallel`, which also collects what the `judge` nodes return."""

    judged: Annotated[list[dict[str, Any]], operator.add]
    """{"of": name of the answer, "critique": Critique}, in the order of the principles."""


class _Task(TypedDict):
    """The input of one `judge` node: one answer and one principle."""

    of: str
    answer: dict[str, Any]
    unfinished: bool
    principle: str


def _progress(state: State) -> Progress:
    return Progress(
        msgspec.convert(state["draft"], Draft), msgspec.convert(state.get("rounds", []), list[Round])
    )


def _go_on(run: Run, progress: Progress, goto: str | list[Send]) -> Command[str]:
    """Record `progress` in the run and the state, and go on to the node `goto`, which may be END."""
    run.reached = progress
    update = State(draft=msgspec.to_builtins(progress.draft), rounds=msgspec.to_builtins(progress.rounds))
    return Command(update=update, goto=goto)


# --- nodes: each does its step and returns the next node ------------------------------------------------


async def draft(state: State, runtime: Runtime[Run]) -> Command[str]:
    """Run the wrapped app for its whole answer, its next block or, once a block has failed, all the rest."""
    run, before = runtime.context, _progress(state) if "draft" in state else None
    request, rounds = run.request, [] if before is None else before.rounds
    await run.tell("drafting")
    write = request.draft if request.blocks is None or rounds else request.blocks.next
    try:
        answered = await write(run.calls, get_config())
    except GraphBubbleUp as pause:
        run.paused = pause  # LangGraph swallows the interrupt of a graph that runs inside no other graph
        raise
    except Exception as error:
        annotate(error, "the app")
        run.failed = error
        raise
    if request.asked is not None:
        run.messages = request.asked()
    if before is not None:
        answered = msgspec.structs.replace(answered, blocks=before.draft.blocks)
    progress = Progress(answered, rounds)
    if rounds:
        return _go_on(run, progress, _after_draft(run.plan, progress))
    if not answered.unfinished:
        only_calls = answered.answer.tool_calls and not text_of(answered.answer)
        if only_calls and (run.plan.of_tools is None or run.plan.settings.strategy == "sampled"):
            return _go_on(run, progress, END)  # the app calls a tool, and no principle is about tools
        if before is not None and not _differs(answered.answer, before.draft.answer):
            judged = answered.blocks[-1].critique  # the last block ended the answer, so it is judged already
            return _go_on(run, progress.with_round(Round(critique=judged)), END)
    return _go_on(run, progress, _to_critique(run.plan, progress))


def _differs(answer: Message, judged: Message) -> bool:
    return bool(answer.tool_calls) or text_of(answer).rstrip() != text_of(judged)


def _after_draft(plan: Plan, progress: Progress) -> str:
    """Return the node that follows the critique of a draft, or of its failed block."""
    if progress.draft.unfinished:
        return "draft"  # read the rest first: whether to revise is decided on the whole draft
    failed = failed_principles(progress.rounds[0].critique, plan.constitution)
    return "revise" if failed and plan.settings.rounds > 0 else END


async def critique(state: _ParallelState, runtime: Runtime[Run]) -> Command[str]:
    """Judge the draft; in `parallel`, join the critiques of the `judge` nodes.

    In `sampled`, criticise the last accepted revision, else the draft, under one random principle.
    """
    run = runtime.context
    plan, progress = run.plan, _progress(state)
    await run.tell("critiquing")
    if plan.settings.strategy == "sampled":
        of = progress.standing()
        principle = run.random.choice(plan.spoken.principles)
        exchange = run.exchange(progress.answer(of))
        found = await plan.critic.discuss(exchange, principle, plan.spoken, _inner(run))
        return _go_on(run, progress.with_round(Round(of=of, critique=found)), "revise")
    waiting = progress.unjudged()
    if plan.settings.strategy == "parallel":
        critiques = [_join(state["judged"], of, plan, progress) for of in waiting]
    else:
        critiques = await _critiques(run, progress, waiting)
    if progress.rounds:
        return _close(run, progress, waiting, critiques)
    if run.request.blocks is not None:
        progress = await _block(run, progress, critiques[0])
        if progress.draft.unfinished and progress.draft.blocks[-1].released:
            return _go_on(run, progress, "draft")
    progress = progress.with_round(Round(critique=critiques[0]))
    return _go_on(run, progress, END if run.request.mode == "audit" else _after_draft(plan, progress))


async def _block(run: Run, progress: Progress, critique: Critique) -> Progress:
    """Record the critique of the newest block of the draft, and release the block if it may be released.

    It may if no principle fails and, unless `on_unreadable` is `open`, every verdict is readable. The block
    that ends the draft is not released here; the end of the run decides about it.
    """
    draft, settings = progress.draft, run.plan.settings
    failed = failed_principles(critique, run.plan.constitution)
    unread = any(verdict.label is Label.UNREADABLE for verdict in critique.verdicts)
    released = draft.unfinished and not failed and (settings.on_unreadable == "open" or not unread)
    block = Block(end=len(text_of(draft.answer)), critique=critique, released=released)
    draft = msgspec.structs.replace(draft, blocks=(*draft.blocks, block))
    if released and run.request.blocks is not None:
        run.reached = Progress(draft, [])  # recorded before it is sent: the caller may stop once it has it
        await run.request.blocks.release(draft)
    return Progress(draft, [])


async def judge(state: _Task, runtime: Runtime[Run]) -> dict[str, Any]:
    """Judge one answer under one principle. In `parallel` these run at once, and `critique` joins them."""
    run = runtime.context
    exchange = run.exchange(msgspec.convert(state["answer"], Message), unfinished=state["unfinished"])
    rules = run.plan.spoken.select([state["principle"]])
    found = await _found(run.plan, exchange, rules, _inner(run), explain=True)
    return {"judged": [{"of": state["of"], "critique": msgspec.to_builtins(found)}]}


async def revise(state: State, runtime: Runtime[Run]) -> Command[str]:
    """Write the candidate revisions of a round, reject those that are not revisions, and judge the others."""
    run = runtime.context
    plan, progress = run.plan, _progress(state)
    if progress.rounds[-1].revisions:  # nothing was accepted: the next round starts from the best answer
        of = progress.best(plan.constitution)
        critique = progress.judged()[of]
        reasoning = critique.reasoning or progress.rounds[0].critique.reasoning
        progress = progress.with_round(
            Round(of=of, critique=msgspec.structs.replace(critique, reasoning=reasoning))
        )
    await run.tell(f"revising {len(progress.rounds)}/{plan.settings.rounds}")
    calls = _inner(run)
    written = await together([candidate(run, calls, progress, index) for index in range(plan.candidates)])
    progress = progress.with_revisions(written)
    if plan.settings.strategy == "sampled":
        return _go_on(run, progress, "critique" if len(progress.rounds) < plan.settings.rounds else END)
    waiting = progress.unjudged()
    if waiting and plan.settings.strategy == "parallel":
        return _go_on(run, progress, _to_critique(plan, progress))
    run.reached = progress
    return _close(run, progress, waiting, await _critiques(run, progress, waiting))


def _close(
    run: Run, progress: Progress, judged: Sequence[str], critiques: Sequence[Critique]
) -> Command[str]:
    """Close the open round with the critiques of its revisions, and start another round or end.

    The stopping rule: end once a revision is accepted or no rounds are left.
    """
    plan = run.plan
    places = map(revision_at, judged)
    by_index = {place[1]: found for place, found in zip(places, critiques, strict=True) if place is not None}
    revisions = accept(progress.rounds[-1].revisions, by_index, plan.constitution)
    progress = progress.with_revisions(revisions)
    done = progress.standing() != "draft" or len(progress.rounds) >= plan.settings.rounds
    return _go_on(run, progress, END if done else "revise")


async def _critiques(run: Run, progress: Progress, waiting: Sequence[str]) -> list[Critique]:
    plan, calls = run.plan, _inner(run)
    return await together(
        [
            _found(
                plan,
                run.exchange(progress.answer(of), unfinished=of == "draft" and progress.draft.unfinished),
                plan.rules(progress.answer(of)),
                calls,
                explain=of == "draft",
            )
            for of in waiting
        ]
    )


async def _found(
    plan: Plan, exchange: Exchange, rules: Constitution, calls: Calls, *, explain: bool
) -> Critique:
    # A user's own critic may leave out principles; a principle without a verdict counts as UNREADABLE.
    return covered(await plan.critic.critique(exchange, rules, calls, explain=explain), rules)


def _to_critique(plan: Plan, progress: Progress) -> str | list[Send]:
    """Return `critique`, or under `parallel` one Send to `judge` for each unjudged answer and principle."""
    if plan.settings.strategy != "parallel":
        return "critique"
    return [
        Send(
            "judge",
            _Task(
                of=of,
                answer=msgspec.to_builtins(progress.answer(of)),
                unfinished=of == "draft" and progress.draft.unfinished,
                principle=principle.id,
            ),
        )
        for of in progress.unjudged()
        for principle in plan.rules(progress.answer(of))
    ]


def _inner(run: Run) -> Calls:
    # Inner calls are traced under the node that makes them, and hidden from the app's own streams.
    return run.calls.under(RunnableConfig(callbacks=get_config().get("callbacks"), tags=[TAG_NOSTREAM]))


def _join(judged: Sequence[Mapping[str, Any]], of: str, plan: Plan, progress: Progress) -> Critique:
    """Return one Critique of the answer named `of`, joined from its critiques under single principles."""
    found = [msgspec.convert(item["critique"], Critique) for item in judged if item["of"] == of]
    parts = found[-len(plan.rules(progress.answer(of))) :]  # skip the critiques of earlier blocks
    said = [part.evasive for part in parts if part.evasive is not None]
    return Critique(
        verdicts=tuple(verdict for part in parts for verdict in part.verdicts),
        evasive=any(said) if said else None,
        critic=plan.critic.name,
    )


@cache
def compiled(*, parallel: bool) -> CompiledStateGraph[Any, Run, Any, Any]:
    """Return the compiled graph, which all plans share. It never writes into a caller's checkpoints.

    Only under `parallel` does it contain `judge`: LangGraph visits every node and channel at every step.
    """
    graph: StateGraph[Any, Run, Any, Any] = StateGraph(
        _ParallelState if parallel else State, context_schema=Run
    )
    fan_out = ("judge",) if parallel else ()
    graph.add_node("draft", draft, destinations=("critique", *fan_out, "revise", END))
    graph.add_node("critique", critique, destinations=("draft", "revise", END))
    graph.add_node("revise", revise, destinations=("revise", *fan_out, "critique", END))
    graph.add_edge(START, "draft")
    if parallel:
        graph.add_node("judge", judge)
        graph.add_edge("judge", "critique")
    return graph.compile(checkpointer=False, name="cai_graph")


async def drive(run: Run, config: RunnableConfig) -> None:
    """Run a request through the graph. `run.reached` then has the result, or how far it came before an error.

    Raises:
        GraphBubbleUp: the app was interrupted and waits for a person.
        CancelledError: this task was cancelled, or a node raised it.
        Exception: what a node raised.
    """
    with apart():
        # No stream mode: nobody reads the steps, since the run's context has the result.
        steps = compiled(parallel=run.plan.settings.strategy == "parallel")
        try:
            async for _ in steps.astream({}, config, context=run, stream_mode=[]):
                pass
        except NodeCancelledError as cancelled:  # LangGraph's own class for a cancellation
            raise asyncio.CancelledError from cancelled
        except Exception as error:
            forget_task(error)
            raise
    if run.paused is not None:
        raise run.paused
