"""The run of one request: `run` drives the graph, chooses the released answer, and logs the Trajectory.

The faces and shadow mode call it. `policy.decide` chooses what is released. The Trajectory is written in a
`finally`, so that errors and cancellations are logged too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import suppress
from typing import NamedTuple

import msgspec
from langchain_core.runnables import RunnableConfig

from cai_graph import graph
from cai_graph.app.wrapped import STEP_LIMIT
from cai_graph.calls import Calls
from cai_graph.errors import BudgetExceeded, RunError
from cai_graph.failures import describe, message_of
from cai_graph.plain import plain
from cai_graph.request.committing import alarm, commit
from cai_graph.request.plan import Plan
from cai_graph.request.policy import Decision, Progress, decide
from cai_graph.request.request import Request, Run
from cai_graph.trajectory import Message, Outcome, Trajectory

__all__ = ["Ending", "run"]


class Ending(NamedTuple):
    """What `run` returns."""

    trajectory: Trajectory
    """The record as it was logged. Where a person is asked, the record so far, which is not logged yet."""
    released: Message | None
    """The released message; None where a person is asked."""
    asks: str | None = None
    """Why a person is asked what to release (policy `human`); None where nobody is asked."""


async def run(plan: Plan, request: Request, config: RunnableConfig | None = None) -> Ending:
    """Answer one request under the constitution, log its Trajectory, and return it with the released message.

    Raises:
        Violation, Unreadable, BudgetExceeded: where the policy for that case is `raise`.
        LogError: the Trajectory could not be committed and `on_log_error` is `raise`.
        Paused, GraphInterrupt: the app was interrupted and waits for a person.
        Exception: the app's own error; a critic's or reviser's where `on_error` is `raise`.
    """
    under_way = Run(plan=plan, request=request, calls=Calls(plan.settings.budget), messages=request.messages)
    for call in request.made:
        under_way.calls.record(call)
        under_way.calls.spent[call.kind] += 1
    decision = Decision(Outcome.FAILED, None, None)
    error: BaseException | None = None
    try:
        decision = await _decision(under_way, config or {})
        if decision.error is not None and not decision.asks:
            raise decision.error
    except BaseException as raised:
        error = raised
        if isinstance(raised, RunError):
            raised.trajectory_id = request.id
        raise
    finally:
        try:
            trajectory = _trajectory(under_way, decision, error)
        except Exception as untold:  # what the app returned cannot be recorded, such as its context
            if error is None:
                raise
            if plan.log is not None:
                alarm(f"trajectory {request.id}", untold)
        else:
            if under_way.paused is None and not decision.asks:
                request.recorded(trajectory)
                await commit(
                    plan,
                    trajectory,
                    # In shadow mode no caller waits: stay until committed, so that a loss is counted.
                    failed=error is not None and request.mode != "shadow",
                    since=under_way.calls.started,
                    lost=request.lost,
                )
    held_by = decision.error if decision.asks else None
    asks = None if held_by is None else message_of(held_by) or describe(held_by)
    return Ending(trajectory, trajectory.released, asks)


async def _decision(run: Run, config: RunnableConfig) -> Decision:
    """Drive the graph and return the Decision; raise the errors that no policy turns into an answer."""
    request, settings = run.request, run.plan.settings
    if request.failed is not None:
        raise RunError("the app failed before")
    if request.unjudged is not None:
        answered = await request.draft(run.calls, config)
        run.reached = Progress(answered, [])
        return Decision(Outcome.UNJUDGED, answered.answer, "draft")
    own = RunnableConfig(
        callbacks=config.get("callbacks"),
        tags=config.get("tags") or [],
        metadata=config.get("metadata") or {},
        # Rounds and calls are bounded by the settings; the caller's limit is for the caller's graphs.
        recursion_limit=STEP_LIMIT,
    )
    held: Exception | None = None
    try:
        await graph.drive(run, own)
    except Exception as raised:
        spent = isinstance(raised, BudgetExceeded)
        if run.reached is None or settings.on_error == "raise" or (run.failed and not spent):
            raise
        held = run.held = raised
    assert run.reached is not None  # the draft node returned, or raised above
    if request.mode == "audit":  # the answer was released as it was written
        settings = dataclasses.replace(settings, on_violation="open", on_unreadable="open", on_error="open")
    elif run.reached.draft.unfinished and settings.on_error == "open":
        with suppress(BudgetExceeded):  # under `open` an error does not stop the answer: read the rest of it
            heard = await run.request.draft(run.calls, own)
            blocks = run.reached.draft.blocks
            run.reached = Progress(msgspec.structs.replace(heard, blocks=blocks), run.reached.rounds)
    return decide(run.reached, run.plan.constitution, settings, held)


# --- the record ---------------------------------------------------------------------------------------


def _trajectory(run: Run, decision: Decision, error: BaseException | None) -> Trajectory:
    plan, request, progress = run.plan, run.request, run.reached
    outcome, released, released_from = decision.outcome, decision.released, decision.released_from
    unjudged, ended_by = request.unjudged, request.failed or error or run.held
    if request.mode == "shadow" and progress is not None:
        if isinstance(error, asyncio.CancelledError) and not progress.rounds:
            outcome, unjudged, ended_by = Outcome.UNJUDGED, "shutdown", None
        # Whatever the verdicts are, the draft was released.
        released, released_from = progress.draft.answer, "draft"
    elif released is None and (released := _left(run)) is not None:
        released_from = "draft"
    return Trajectory(
        id=request.id,
        started_at=request.started_at,
        seconds=time.perf_counter() - request.started,
        mode=request.mode,
        constitution=plan.constitution_ref,
        outcome=outcome,
        messages=run.messages,
        context=plain(request.context()),
        draft=request.written() if progress is None else progress.draft,
        rounds=() if progress is None else tuple(progress.rounds),
        released=released,
        released_from=released_from,
        unjudged=unjudged,
        error=describe(ended_by) if ended_by is not None else None,
        calls=tuple(run.calls.made),
        settings=plan.recorded_settings,
        source=request.source,
        metadata=dict(request.metadata),
        tags=tuple(map(str, plain(request.tags))),
    )


def _left(run: Run) -> Message | None:
    """Return what a stream had released when an error ended it; None where that is nothing."""
    if run.request.mode in ("audit", "shadow"):
        draft = run.request.written()
        return None if draft is None else draft.answer
    frozen = "" if run.reached is None else run.reached.draft.frozen
    return Message(role="assistant", content=frozen) if frozen else None
