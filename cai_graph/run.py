"""The run of one request: the one way in.

`run` drives the graph, asks `policy.decide` what leaves, and writes the Trajectory in a `finally`, so that
errors and cancellations are logged too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import msgspec
from langchain_core.runnables import RunnableConfig

from cai_graph import graph
from cai_graph.calls import Calls, describe
from cai_graph.errors import BudgetExceeded, LogError, RunError
from cai_graph.log.store import Duplicate
from cai_graph.plain import plain
from cai_graph.plan import Plan
from cai_graph.policy import Decision, Progress, Settings, decide
from cai_graph.request import Request, Run
from cai_graph.trajectory import Message, Outcome, Review, Trajectory

__all__ = ["Ending", "commit", "run"]

logger = logging.getLogger("cai_graph")


class Ending(NamedTuple):
    """What `run` returns."""

    trajectory: Trajectory
    """The record, as it was logged; where a person is asked, as far as it has come, and not logged yet."""
    released: Message | None
    """The message that leaves; None where a person is asked."""
    asks: str | None = None
    """Why a person is asked what leaves (policy `human`)."""


async def run(plan: Plan, request: Request, config: RunnableConfig | None = None) -> Ending:
    """Answer one request under the constitution, log its Trajectory, and return what leaves.

    Raises:
        Violation, Unreadable, BudgetExceeded: as the policies say.
        LogError: the Trajectory could not be committed and `on_log_error` is `raise`.
        Paused, GraphInterrupt: the app waits for a person.
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
        trajectory = _trajectory(under_way, decision, error)
        if under_way.paused is None and not decision.asks:
            request.recorded(trajectory)
            await commit(
                plan,
                trajectory,
                # Nobody waits behind an answer that has left, and whether its record is lost is counted.
                failed=error is not None and request.mode != "shadow",
                since=under_way.calls.started,
                lost=request.lost,
            )
    asks = (str(decision.error) or describe(decision.error)) if decision.error and decision.asks else None
    return Ending(trajectory, trajectory.released, asks)


async def _decision(run: Run, config: RunnableConfig) -> Decision:
    """Drive the graph and return what leaves; raise what no policy holds."""
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
        recursion_limit=graph.STEP_LIMIT,
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
    if request.mode == "audit":  # the answer has left
        settings = dataclasses.replace(settings, on_violation="open", on_unreadable="open", on_error="open")
    elif run.reached.draft.unfinished and settings.on_error == "open":
        with suppress(BudgetExceeded):  # an error held it up, and it leaves all the same
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
        # Whatever is found of it, the draft is what left.
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
    """Return what of a stream had left when an error ended it."""
    if run.request.mode in ("audit", "shadow"):
        draft = run.request.written()
        return None if draft is None else draft.answer
    frozen = "" if run.reached is None else run.reached.draft.frozen
    return Message(role="assistant", content=frozen) if frozen else None


_FULL_SECONDS = 0.01
"""How long a task waits before it looks again whether the log has room."""

GRACE_SECONDS = 1.0
"""How much longer than its budget of seconds an answer waits for the log, under `on_log_error="answer"`."""
PATIENCE_SECONDS = 60.0
"""How long it waits where the budget has no bound of seconds."""

log_failures = 0
"""How many records of this process could not be committed while their answers left all the same."""

_late = ThreadPoolExecutor(1, "cai late")
"""Appends the records that found no room in the log while their answers waited."""


def _after_fork() -> None:
    global _late
    _late = ThreadPoolExecutor(1, "cai late")  # the parent's thread is not here


os.register_at_fork(after_in_child=_after_fork)


async def commit(
    plan: Plan,
    record: Trajectory | Review,
    *,
    failed: bool = False,
    since: float | None = None,
    lost: Callable[[BaseException], None] = lambda error: None,
) -> None:
    """Commit a record; with `failed`, an error that is under way is never hidden behind the log's.

    Under `on_log_error="answer"` this waits as long as the budget of seconds lasts and GRACE_SECONDS. What is
    not committed by then is committed when the log takes it, and the alarm comes where it never does.

    Args:
        plan: has the log.
        record: what is committed.
        failed: whether an error is under way; then nothing is waited for.
        since: when the request began, by `time.perf_counter`; None: now.
        lost: hears why the record could not be committed, where this raises nothing.

    Raises:
        LogError: it could not be committed and `on_log_error` is `raise`.
        Duplicate: the log has another record of its id, so that nothing is lost.
    """
    if plan.log is None:
        return
    log, settings = plan.log, plan.settings
    kind = type(record).__name__.lower()

    def alarm(error: BaseException) -> None:
        global log_failures
        log_failures += 1
        lost(error)
        logger.error(
            "LOST FROM THE LOG: %s %s could not be committed (%d lost in this process): %s",
            kind,
            record.id,
            log_failures,
            error,
        )

    def alarm_if_failed(committed: Future[None]) -> None:
        if (error := committed.exception()) is not None:
            alarm(error)

    def append() -> None:
        try:
            log.append(record).add_done_callback(alarm_if_failed)
        except Exception as error:
            alarm(error)

    def append_late() -> None:
        try:
            _late.submit(append)
        except RuntimeError as error:  # the process ends
            alarm(error)

    raises = settings.on_log_error == "raise" and settings.mode != "shadow" and not failed
    committed: Future[None] | None = None
    try:
        async with asyncio.timeout(None if raises else _patience(settings, since)) as timeout:
            # A disk that is slow holds up no other task of the loop, and no request that is being cancelled.
            while log.is_full and not failed:
                await asyncio.sleep(_FULL_SECONDS)
            if failed and log.is_full:
                append_late()
            elif failed:  # the log drains at exit
                log.append(record).add_done_callback(alarm_if_failed)
            else:
                committed = log.append(record)
                await committed
    except asyncio.CancelledError:
        if committed is None:
            append_late()
        raise
    except Duplicate:
        raise
    except Exception as error:
        if timeout.expired():
            logger.warning(
                "the log is slow: the answer of %s %s leaves before it is committed", kind, record.id
            )
            if committed is None:
                append_late()
            else:
                committed.add_done_callback(alarm_if_failed)
            return
        if raises:
            raise LogError(f"{kind} {record.id} could not be logged: {error}") from error
        alarm(error)


def _patience(settings: Settings, since: float | None) -> float | None:
    """Return how many seconds an answer may wait for the log; None where no answer waits."""
    if settings.mode == "shadow":
        return None
    if settings.budget.seconds is None:
        return PATIENCE_SECONDS
    elapsed = 0.0 if since is None else time.perf_counter() - since
    return max(0.0, settings.budget.seconds - elapsed) + GRACE_SECONDS
