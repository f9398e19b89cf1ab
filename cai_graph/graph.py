"""The graph: draft, critique, revise. The only file that knows LangGraph.

    START ─> draft ─> critique ─> revise ─┐ again, while rounds are left
              ^│  <──────┘^          │ ^──┘     back to `draft`: stream `blocks`, the next group of sentences
              │└─> judge ─┘ <────────┘          `judge`: strategy `parallel`, one Send for each principle

    KEPT nothing violated · REVISED a revision was accepted · EXHAUSTED the best answer, policy `open`
    REFUSED the refusal, policy `closed` · FAILED an error left

`run` is the one way in. It drives the compiled graph, asks `policy.decide` what leaves, and writes the
Trajectory in a `finally`, so that errors and cancellations are logged too. The graph's state is plain
JSON; what a request brings along (the plan, the app, its account of calls) travels as the run's context.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import operator
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypedDict

import msgspec
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.config import get_config, get_stream_writer
from langgraph.constants import TAG_NOSTREAM
from langgraph.errors import GraphBubbleUp
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.runtime import Runtime
from langgraph.types import Command, Send

from cai_graph import models, prompts
from cai_graph.calls import Calls, apart, describe, together, truncated
from cai_graph.critic import failed_principles
from cai_graph.errors import BudgetExceeded, LogError, RunError
from cai_graph.failures import annotate
from cai_graph.form import Form
from cai_graph.plan import Plan
from cai_graph.policy import Decision, Progress, accept, decide, no_revision
from cai_graph.prompts import Exchange
from cai_graph.trajectory import (
    Block,
    Call,
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Rejection,
    Review,
    Revision,
    Round,
    Trajectory,
    from_langchain,
    new_id,
    now,
    text_of,
)

__all__ = ["Blocks", "Ending", "Paused", "Request", "commit", "run"]

logger = logging.getLogger("cai_graph")


class Blocks(Protocol):
    """An app's answer that leaves in blocks."""

    async def next(self, calls: Calls, config: RunnableConfig) -> Draft:
        """Return the draft up to the end of its next block; unfinished where the app still writes."""
        ...

    async def release(self, draft: Draft) -> None:
        """Send the text of a draft, which complies, as far as it has not left yet."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request."""

    messages: tuple[Message, ...]
    """The conversation."""
    asked: Callable[[], tuple[Message, ...]] | None = None
    """Tells the conversation anew once the app has answered, since the app may have known more of it."""
    draft: Callable[[Calls, RunnableConfig], Awaitable[Draft]]
    """Runs the wrapped app under the node's configuration, records its calls, and returns its answer."""
    blocks: Blocks | None = None
    """Hands the app's answer over in blocks; then `draft` is asked only to hear the rest of it out."""
    written: Callable[[], Draft | None] = lambda: None
    """What has left of the app's answer so far, where it leaves as it is written (mode `audit`)."""
    tell: Callable[[str], Awaitable[None]] | None = None
    """Hears which step is under way: `drafting`, `critiquing`, `revising 1/2`."""
    context: Callable[[], Mapping[str, str]] = dict
    """Other material for the critic; asked for after the draft, since the app may have produced it."""
    form: Callable[[], Form | None] = lambda: None
    """What a structured answer must be, where the draft is one; asked for after the draft."""
    mode: str = "enforce"
    """See `Trajectory.mode`."""
    source: str | None = None
    """See `Trajectory.source`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """See `Trajectory.metadata`."""
    tags: Sequence[str] = ()
    """See `Trajectory.tags`."""
    id: str = field(default_factory=new_id)
    """The id that its Trajectory will have."""
    started_at: datetime = field(default_factory=now)
    """When it came in, UTC."""
    started: float = field(default_factory=time.perf_counter)
    """The same by the clock that durations are read from."""
    made: Sequence[Call] = ()
    """Model calls that were made before the run."""
    failed: BaseException | None = None
    """What the app raised, where it ran before; then there is nothing to judge."""
    unjudged: Literal["sample", "overload", "shutdown"] | None = None
    """Why no critic is to judge the answer: then it is only logged (mode `shadow`)."""
    recorded: Callable[[Trajectory], None] = lambda trajectory: None
    """Hears the Trajectory before it goes to the log."""


class Paused(GraphBubbleUp):
    """The wrapped app waits for a person: nothing is judged or logged until it is resumed."""


def is_pause(error: BaseException | None) -> bool:
    """Return whether an error says that an app waits for a person."""
    return isinstance(error, GraphBubbleUp)


class Ending(NamedTuple):
    """What `run` returns."""

    trajectory: Trajectory
    """The record, as it was logged; where a person is asked, as far as it has come, and not logged yet."""
    released: Message | None
    """The message that leaves; None where a person is asked."""
    asks: str | None = None
    """Why a person is asked what leaves (policy `human`)."""


class State(TypedDict, total=False):
    """The graph's state: JSON of a Progress."""

    draft: dict[str, Any]
    """Draft."""
    rounds: list[dict[str, Any]]
    """Rounds so far; the last one may be open, its revisions not yet judged."""
    judged: Annotated[list[dict[str, Any]], operator.add]
    """Of `parallel`: {"of": name of the answer, "critique": Critique}, in the order of the principles."""


class _Task(TypedDict):
    """What `parallel` sends to `judge`."""

    of: str
    answer: dict[str, Any]
    unfinished: bool
    principle: str


@dataclass(kw_only=True)
class _Run:
    """The context of one run: what its nodes need beside the state."""

    plan: Plan
    request: Request
    calls: Calls
    reached: Progress | None = None
    """What the last node reached: what is logged when the next one fails."""
    paused: GraphBubbleUp | None = None
    """What the app raised to wait for a person."""
    failed: Exception | None = None
    """What the app raised."""
    held: Exception | None = None
    """The error that ended the graph early and that a policy keeps from leaving."""

    @cached_property
    def random(self) -> random.Random:
        """What draws for this request: the same again from the same seed, and another for each prompt."""
        seed = self.plan.settings.seed
        asked = [text_of(message) for message in self.request.messages]
        return random.Random(None if seed is None else ascii((seed, asked)))

    def go_on(self, progress: Progress, goto: str | list[Send]) -> Command[str]:
        """Return the step to `goto` (END included), with the state that was reached."""
        self.reached = progress
        update = State(draft=msgspec.to_builtins(progress.draft), rounds=msgspec.to_builtins(progress.rounds))
        return Command(update=update, goto=goto)

    def exchange(self, answer: Message, *, unfinished: bool = False) -> Exchange:
        context = self.request.context()
        return Exchange(messages=self.request.messages, answer=answer, context=context, unfinished=unfinished)

    async def tell(self, step: str) -> None:
        if self.request.tell is not None:
            await self.request.tell(step)


def _progress(state: State) -> Progress:
    return Progress(
        msgspec.convert(state["draft"], Draft), msgspec.convert(state.get("rounds", []), list[Round])
    )


# --- nodes: each does its step and says where the run goes on ------------------------------------------


async def draft(state: State, runtime: Runtime[_Run]) -> Command[str]:
    """Have the wrapped app answer: whole, or its next block, or all the rest once a block has failed."""
    run, before = runtime.context, _progress(state) if "draft" in state else None
    request, rounds = run.request, [] if before is None else before.rounds
    await run.tell("drafting")
    write = request.draft if request.blocks is None or rounds else request.blocks.next
    try:
        answered = await write(run.calls, get_config())
    except GraphBubbleUp as pause:
        run.paused = pause  # LangGraph swallows an interrupt here where no graph stands around this one
        raise
    except Exception as error:
        annotate(error, "the app")
        run.failed = error
        raise
    if request.asked is not None:
        run.request = dataclasses.replace(request, messages=request.asked())
    if before is not None:
        answered = msgspec.structs.replace(answered, blocks=before.draft.blocks)
    progress = Progress(answered, rounds)
    if rounds:
        return run.go_on(progress, _after_draft(run.plan, progress))
    if not answered.unfinished:
        only_calls = answered.answer.tool_calls and not text_of(answered.answer)
        if only_calls and (run.plan.of_tools is None or run.plan.settings.strategy == "sampled"):
            return run.go_on(progress, END)  # the app asks for a tool, and no principle speaks of tools
        if before is not None and not _differs(answered.answer, before.draft.answer):
            judged = answered.blocks[-1].critique  # the last block was the end of the answer
            return run.go_on(progress.with_round(Round(critique=judged)), END)
    return run.go_on(progress, _to_critique(run.plan, progress))


def _differs(answer: Message, judged: Message) -> bool:
    return bool(answer.tool_calls) or text_of(answer).rstrip() != text_of(judged)


def _after_draft(plan: Plan, progress: Progress) -> str:
    """Return where a run goes on from the critique of its whole draft."""
    if progress.draft.unfinished:
        return "draft"  # it is heard out first: what becomes of it is decided on the whole
    failed = failed_principles(progress.rounds[0].critique, plan.constitution)
    return "revise" if failed and plan.settings.rounds > 0 else END


async def critique(state: State, runtime: Runtime[_Run]) -> Command[str]:
    """Judge the draft; in `sampled`, criticise what stands; in `parallel`, join what `judge` found."""
    run = runtime.context
    plan, progress = run.plan, _progress(state)
    await run.tell("critiquing")
    if plan.settings.strategy == "sampled":
        of = progress.standing()
        principle = run.random.choice(plan.spoken.principles)
        exchange = run.exchange(progress.answer(of))
        found = await plan.critic.discuss(exchange, principle, plan.spoken, _inner(run))
        return run.go_on(progress.with_round(Round(of=of, critique=found)), "revise")
    waiting = progress.unjudged()
    if plan.settings.strategy == "parallel":
        critiques = [_joined(state["judged"], of, plan, progress) for of in waiting]
    else:
        critiques = await _critiques(run, progress, waiting)
    if progress.rounds:
        return _close(run, progress, waiting, critiques)
    if run.request.blocks is not None:
        progress = await _block(run, progress, critiques[0])
        if progress.draft.unfinished and progress.draft.blocks[-1].released:
            return run.go_on(progress, "draft")
    progress = progress.with_round(Round(critique=critiques[0]))
    return run.go_on(progress, END if run.request.mode == "audit" else _after_draft(plan, progress))


async def _block(run: _Run, progress: Progress, critique: Critique) -> Progress:
    """Record the judgement of the draft's last block, and release the block if nothing stands against it."""
    draft, settings = progress.draft, run.plan.settings
    failed = failed_principles(critique, run.plan.constitution)
    unread = any(verdict.label is Label.UNREADABLE for verdict in critique.verdicts)
    released = draft.unfinished and not failed and (settings.on_unreadable == "open" or not unread)
    block = Block(end=len(text_of(draft.answer)), critique=critique, released=released)
    draft = msgspec.structs.replace(draft, blocks=(*draft.blocks, block))
    if released and run.request.blocks is not None:
        run.reached = Progress(draft, [])  # it counts as gone before it goes: the caller may leave with it
        await run.request.blocks.release(draft)
    return Progress(draft, [])


async def judge(state: _Task, runtime: Runtime[_Run]) -> dict[str, Any]:
    """Judge one answer under one principle: what `parallel` sends out at once, and `critique` joins."""
    run = runtime.context
    found = await run.plan.critic.critique(
        run.exchange(msgspec.convert(state["answer"], Message), unfinished=state["unfinished"]),
        run.plan.spoken.select([state["principle"]]),
        _inner(run),
        explain=True,
    )
    return {"judged": [{"of": state["of"], "critique": msgspec.to_builtins(found)}]}


async def revise(state: State, runtime: Runtime[_Run]) -> Command[str]:
    """Write the candidate revisions of a round, reject those that are none, and judge the others."""
    run = runtime.context
    plan, progress = run.plan, _progress(state)
    sampled = plan.settings.strategy == "sampled"
    if progress.rounds[-1].revisions:  # nothing was accepted: the next round starts from the best answer
        of = progress.best(plan.constitution)
        critique = progress.judged()[of]
        reasoning = critique.reasoning or progress.rounds[0].critique.reasoning
        progress = progress.with_round(
            Round(of=of, critique=msgspec.structs.replace(critique, reasoning=reasoning))
        )
    turn, opened = len(progress.rounds) - 1, progress.rounds[-1]
    if sampled:
        principles = [plan.spoken[opened.critique.verdicts[0].principle or ""]]
    else:
        principles = failed_principles(opened.critique, plan.spoken)
    standing = progress.answer(opened.of)
    exchange, calls = run.exchange(standing), _inner(run)
    frozen = progress.draft.frozen
    # The calls beside a rewritten text leave with it, and are judged with it, unless they are what is wrong.
    kept = () if any(principle.tools for principle in principles) else standing.tool_calls
    await run.tell(f"revising {turn + 1}/{plan.settings.rounds}")
    said, form = opened.critique.reasoning or _reasons(opened.critique), run.request.form()

    async def write(index: int) -> Revision:
        show_draft = index == 0  # the other writers answer afresh: small models copy what they see
        last = index > 0 and index == plan.candidates - 1
        decline = last and opened.critique.benign_request is False
        messages = prompts.rewrite_messages(
            principles,
            said,
            exchange,
            show_draft=show_draft,
            decline=decline,
            said=frozen,
            schema=None if form is None else form.schema,
        )
        reply = await _written(plan, calls, turn * plan.candidates + index, messages, form)
        answer = msgspec.structs.replace(from_langchain(reply), tool_calls=kept)
        rejection = no_revision(text_of(answer), text_of(standing), truncated=truncated(reply))
        if frozen:
            answer = msgspec.structs.replace(answer, content=_continued(frozen, text_of(answer)))
            if rejection is None and text_of(answer) == text_of(standing):
                rejection = Rejection.UNCHANGED
        misfit: str | None = None
        if form is not None and rejection is None:
            try:
                answer = msgspec.structs.replace(answer, content=form.read(text_of(answer)))
            except ValueError as error:
                rejection, misfit = Rejection.BAD_SCHEMA, str(error)
        accepted = sampled and rejection is None
        return Revision(
            answer=answer, from_draft=show_draft, rejection=rejection, detail=misfit, accepted=accepted
        )

    progress = progress.with_revisions(await together([write(index) for index in range(plan.candidates)]))
    waiting = progress.unjudged()
    if sampled:
        return run.go_on(progress, "critique" if len(progress.rounds) < plan.settings.rounds else END)
    if waiting and plan.settings.strategy == "parallel":
        return run.go_on(progress, _to_critique(plan, progress))
    run.reached = progress
    return _close(run, progress, waiting, await _critiques(run, progress, waiting))


def _close(
    run: _Run, progress: Progress, judged: Sequence[str], critiques: Sequence[Critique]
) -> Command[str]:
    """Close the open round by the critiques of its revisions, and go on by the stopping rule."""
    plan = run.plan
    by_index = {int(of.rpartition(":")[2]): found for of, found in zip(judged, critiques, strict=True)}
    revisions = accept(progress.rounds[-1].revisions, by_index, plan.constitution)
    progress = progress.with_revisions(revisions)
    done = progress.standing() != "draft" or len(progress.rounds) >= plan.settings.rounds
    return run.go_on(progress, END if done else "revise")


async def _critiques(run: _Run, progress: Progress, waiting: Sequence[str]) -> list[Critique]:
    plan, calls = run.plan, _inner(run)
    return await together(
        [
            plan.critic.critique(
                run.exchange(progress.answer(of), unfinished=of == "draft" and progress.draft.unfinished),
                plan.rules(progress.answer(of)),
                calls,
                explain=of == "draft",
            )
            for of in waiting
        ]
    )


def _continued(frozen: str, text: str) -> str:
    """Return what has left with what a writer made to follow it, which often repeats its beginning."""
    text = text.strip()
    repeated = r"\s+".join(re.escape(word) for word in frozen.split())
    if (found := re.match(repeated, text)) is not None:
        text = text[found.end() :].strip()
    return f"{frozen} {text}" if text else frozen


def _to_critique(plan: Plan, progress: Progress) -> str | list[Send]:
    """Go on to the critique: at once, or through one `judge` for each answer and principle."""
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


def _inner(run: _Run) -> Calls:
    # Inner calls are traced under the node that makes them, and hidden from the app's own streams.
    return run.calls.under(RunnableConfig(callbacks=get_config().get("callbacks"), tags=[TAG_NOSTREAM]))


def _joined(judged: Sequence[Mapping[str, Any]], of: str, plan: Plan, progress: Progress) -> Critique:
    """Return the critiques of one answer under single principles as one."""
    found = [msgspec.convert(item["critique"], Critique) for item in judged if item["of"] == of]
    parts = found[-len(plan.rules(progress.answer(of))) :]  # a draft in blocks was judged before
    said = [part.evasive for part in parts if part.evasive is not None]
    return Critique(
        verdicts=tuple(verdict for part in parts for verdict in part.verdicts),
        evasive=any(said) if said else None,
        critic=plan.critic.name,
    )


def _reasons(critique: Critique) -> str:
    violated = (verdict for verdict in critique.verdicts if verdict.label is Label.VIOLATES)
    return "\n".join(verdict.reason for verdict in violated if verdict.reason)


async def _written(
    plan: Plan, calls: Calls, number: int, messages: Sequence[BaseMessage], form: Form | None
) -> AIMessage:
    """Have the reviser write; in a form by its provider's own means, or else in words."""
    plain = _sampling(plan, number)
    native = plain if form is None else models.writing(plan.reviser, form.schema)
    if form is None or native is plan.reviser:
        return await calls.generate("revise", plain, plan.reviser_name, messages)
    try:
        reply = await calls.generate("revise", native, plan.reviser_name, messages)
    except Exception as error:
        if (cut := models.cut_form(error)) is not None:
            return cut  # a revision that is rejected
        if not models.refuses_form(error):
            raise
        return await calls.generate("revise", plain, plan.reviser_name, messages)
    for call in reply.tool_calls[:1]:
        return AIMessage(json.dumps(call["args"]), response_metadata=reply.response_metadata)
    return reply


def _sampling(plan: Plan, number: int) -> Runnable[Any, Any]:
    # Only the embedded model is known to take a seed; each candidate needs its own, or all are alike.
    if plan.settings.seed is None or not plan.reviser_name.startswith("local:"):
        return plan.reviser
    return plan.reviser.bind(seed=plan.settings.seed + 1 + number)


@cache
def compiled() -> CompiledStateGraph[State, _Run, State, State]:
    """Return the graph, the same for every plan. It never writes into a caller's checkpoints."""
    graph = StateGraph(State, context_schema=_Run)
    graph.add_node("draft", draft, destinations=("critique", "judge", "revise", END))
    graph.add_node("judge", judge)
    graph.add_node("critique", critique, destinations=("draft", "revise", END))
    graph.add_node("revise", revise, destinations=("revise", "judge", "critique", END))
    graph.add_edge(START, "draft")
    graph.add_edge("judge", "critique")
    return graph.compile(checkpointer=False, name="cai_graph")


# --- the run ------------------------------------------------------------------------------------------


async def run(plan: Plan, request: Request, config: RunnableConfig | None = None) -> Ending:
    """Answer one request under the constitution, log its Trajectory, and return what leaves.

    Raises:
        Violation, Unreadable, BudgetExceeded: as the policies say.
        LogError: the Trajectory could not be committed and `on_log_error` is `raise`.
        Paused, GraphInterrupt: the app waits for a person.
        Exception: the app's own error; a critic's or reviser's where `on_error` is `raise`.
    """
    context = _Run(
        plan=plan,
        request=request,
        calls=Calls(plan.settings.budget),
    )
    decision = Decision(Outcome.FAILED, None, None)
    error: BaseException | None = None
    unjudged = request.unjudged
    for call in request.made:
        context.calls.record(call)
        context.calls.spent[call.kind] += 1
    try:
        if request.failed is not None:
            raise RunError("the app failed before")
        if unjudged is not None:
            answered = await request.draft(context.calls, config or {})
            context.reached = Progress(answered, [])
            decision = Decision(Outcome.UNJUDGED, answered.answer, "draft")
        else:
            decision = await _decision(context, config)
        if decision.error is not None and not decision.asks:
            raise decision.error
    except BaseException as raised:
        error = raised
        if isinstance(raised, RunError):
            raised.trajectory_id = request.id
        raise
    finally:
        progress = context.reached
        ended_by = request.failed or error or context.held
        if request.mode == "shadow" and progress is not None:
            if isinstance(error, asyncio.CancelledError) and not progress.rounds:
                unjudged, ended_by = "shutdown", None
                decision = Decision(Outcome.UNJUDGED, None, None)
            # Whatever is found of it, the draft is what left.
            decision = decision._replace(released=progress.draft.answer, released_from="draft")
        released = decision.released or _left(context)
        trajectory = Trajectory(
            id=request.id,
            started_at=request.started_at,
            seconds=time.perf_counter() - request.started,
            mode=request.mode,
            constitution=plan.constitution_ref,
            outcome=decision.outcome,
            messages=context.request.messages,
            context=dict(request.context()),
            draft=request.written() if progress is None else progress.draft,
            rounds=() if progress is None else tuple(progress.rounds),
            released=released,
            released_from=decision.released_from or (None if released is None else "draft"),
            unjudged=unjudged,
            error=describe(ended_by) if ended_by is not None else None,
            calls=tuple(context.calls.made),
            settings=plan.recorded_settings,
            source=request.source,
            metadata=dict(request.metadata),
            tags=tuple(request.tags),
        )
        if context.paused is None and not decision.asks:
            request.recorded(trajectory)
            await commit(plan, trajectory, failed=error is not None)
    asks = (str(decision.error) or describe(decision.error)) if decision.error and decision.asks else None
    return Ending(trajectory, decision.released, asks)


def _left(run: _Run) -> Message | None:
    """Return what of a stream had left when an error ended it."""
    if run.request.mode in ("audit", "shadow"):
        draft = run.request.written()
        return None if draft is None else draft.answer
    frozen = "" if run.reached is None else run.reached.draft.frozen
    return Message(role="assistant", content=frozen) if frozen else None


async def _decision(run: _Run, config: RunnableConfig | None) -> Decision:
    """Drive the graph and return what leaves; raise what no policy holds."""
    error: Exception | None = None
    try:
        given = config or {}
        own = RunnableConfig(
            callbacks=given.get("callbacks"),
            tags=given.get("tags") or [],
            metadata=given.get("metadata") or {},
            # Rounds and calls are bounded by the settings; the caller's limit is for the caller's graphs.
            recursion_limit=STEP_LIMIT,
        )
        with apart():
            # Without a stream mode nothing is made for readers: what the run reached is in its context.
            async for _ in compiled().astream({}, own, context=run, stream_mode=[]):
                pass
        if run.paused is not None:
            raise run.paused
    except Exception as raised:
        spent = isinstance(raised, BudgetExceeded)
        if run.reached is None or run.plan.settings.on_error == "raise" or (run.failed and not spent):
            raise
        error = run.held = raised
    assert run.reached is not None  # the draft node returned, or raised above
    settings = run.plan.settings
    if run.request.mode == "audit":  # the answer has left
        settings = dataclasses.replace(settings, on_violation="open", on_unreadable="open", on_error="open")
    elif run.reached.draft.unfinished and settings.on_error == "open":
        with suppress(BudgetExceeded):  # an error held it up, and it leaves all the same
            heard = await run.request.draft(run.calls, own)
            blocks = run.reached.draft.blocks
            run.reached = Progress(msgspec.structs.replace(heard, blocks=blocks), run.reached.rounds)
    return decide(run.reached, run.plan.constitution, settings, error)


def outer_writer() -> Callable[[Any], None] | None:
    """Return what writes to the `custom` stream of the graph in whose node this is called; None outside."""
    try:
        return get_stream_writer()
    except (KeyError, RuntimeError):
        return None


STREAM = "__pregel_stream"
"""Key of a configuration under which LangGraph hands an outer graph's stream to the graphs inside."""
STEP_LIMIT = 10_000
"""How many steps a wrapped graph may take, unless its caller says: what LangGraph itself allows."""


def is_graph(app: Runnable[Any, Any]) -> bool:
    """Return whether a wrapped app is a compiled LangGraph graph."""
    return isinstance(app, Pregel)


log_failures = 0
"""How many records of this process could not be committed while their answers left all the same."""


async def commit(plan: Plan, record: Trajectory | Review, *, failed: bool = False) -> None:
    """Commit a record; with `failed`, an error that is under way is never hidden behind the log's.

    Raises:
        LogError: it could not be committed and `on_log_error` is `raise`.
    """
    if plan.log is None:
        return

    def alarm(error: BaseException) -> None:
        global log_failures
        log_failures += 1
        logger.error(
            "LOST FROM THE LOG: %s %s could not be committed (%d lost in this process): %s",
            type(record).__name__.lower(),
            record.id,
            log_failures,
            error,
        )

    def alarm_if_failed(committed: Future[None]) -> None:
        if (error := committed.exception()) is not None:
            alarm(error)

    try:
        committed = plan.log.append(record)
        if failed:  # a request that is being cancelled must not wait; the log drains at exit
            committed.add_done_callback(alarm_if_failed)
        else:
            await committed
    except Exception as error:
        if plan.settings.on_log_error == "raise" and plan.settings.mode != "shadow" and not failed:
            kind = type(record).__name__.lower()
            raise LogError(f"{kind} {record.id} could not be logged: {error}") from error
        alarm(error)
