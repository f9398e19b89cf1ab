"""What leaves when a call fails, hangs, is spent or is cancelled; and every run is logged, once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatResult
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from replies import RULES, answer_in, ask, by_role, guard, logged, role_of, verdicts

from cai_graph.calls import Budget
from cai_graph.errors import AwaitsReview, BudgetExceeded, CaiError, Unreadable, Violation
from cai_graph.log import Log
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Outcome, decode, encode

# --- failures: what leaves, cell by cell --------------------------------------------------------------


class Faulty(BaseChatModel):
    """A model that has a fault in one role, and says what it should in the others."""

    role: str
    fault: Any
    cancelled: list[str] = []  # noqa: RUF012 - pydantic copies defaults

    @property
    def _llm_type(self) -> str:
        return "faulty"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        raise NotImplementedError

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        role = role_of(messages)
        if role == self.role:
            if self.fault == "hang":
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled.append(role)
                    raise
            reply = self.fault
        elif role == "critique":
            reply = verdicts("no-harm") if answer_in(messages) == "the draft" else verdicts()
        else:
            reply = {"draft": "the draft", "revise": "better"}[role]
        return ScriptedModel(replies=[reply])._generate(messages)


MB = 1 << 20
THREAD: Any = {"configurable": {"thread_id": "1"}}
ERROR = ConnectionError("the provider is down")

OPEN, CLOSED = "EXHAUSTED draft", "REFUSED refusal"
MATRIX = [
    # role, the fault and its name; what leaves under the policies open, closed and raise
    ("draft", ERROR, "exception", "ConnectionError", "ConnectionError", "ConnectionError"),
    ("draft", "hang", "hang", "BudgetExceeded", "BudgetExceeded", "BudgetExceeded"),
    ("draft", "x" * MB, "huge", OPEN, CLOSED, "ModelError"),
    ("critique", ERROR, "exception", OPEN, CLOSED, "ConnectionError"),
    ("critique", "hang", "hang", OPEN, CLOSED, "BudgetExceeded"),
    ("critique", "", "empty", OPEN, CLOSED, "Unreadable"),
    ("critique", "%&/{[", "garbage", OPEN, CLOSED, "Unreadable"),
    ("critique", "{" * 10 * MB, "huge", OPEN, CLOSED, "Unreadable"),
    ("revise", ERROR, "exception", OPEN, CLOSED, "ConnectionError"),
    ("revise", "hang", "hang", OPEN, CLOSED, "BudgetExceeded"),
    ("revise", "", "empty", OPEN, CLOSED, "Violation"),
    ("revise", "x" * MB, "huge", OPEN, CLOSED, "ModelError"),
]
CELLS = [
    pytest.param(role, fault, policy, expected, id=f"{role}-{name}-{policy}")
    for role, fault, name, *leaves in MATRIX
    for policy, expected in zip(("open", "closed", "raise"), leaves, strict=True)
]


@pytest.mark.parametrize(("role", "fault", "policy", "expected"), CELLS)
async def test_what_leaves_at_a_fault_is_the_stated_policy(
    role: str, fault: Any, policy: str, expected: str, log: Log
) -> None:
    model = Faulty(role=role, fault=fault, cancelled=[])
    guarded = guard(
        model,
        log=log,
        budget=Budget(seconds=0.1 if fault == "hang" else 60),
        **dict.fromkeys(["on_violation", "on_unreadable", "on_error"], policy),
    )

    if " " in expected:
        output, returned = await guarded.answered("hello")
        outcome, released_from = expected.split()
        (trajectory,) = logged(log)
        assert trajectory == returned
        assert (trajectory.outcome.value, trajectory.released_from) == (outcome, released_from)
        released = RULES.refusal if released_from == "refusal" else "the draft"
        assert output.content == (fault if role == "draft" and released_from == "draft" else released)
    else:
        with pytest.raises((ConnectionError, CaiError)) as raised:
            await guarded.answered("hello")
        assert type(raised.value).__name__ == expected
        if expected == "ConnectionError":
            assert raised.value is fault
        (trajectory,) = logged(log)
        assert (trajectory.outcome, trajectory.released) == (Outcome.FAILED, None)
        assert trajectory.error is not None
        assert trajectory.error.startswith(expected)
        if hasattr(raised.value, "trajectory_id"):
            assert raised.value.trajectory_id == trajectory.id
    assert model.cancelled == ([role] if fault == "hang" else [])
    assert role == "draft" or trajectory.calls[-1].role == role
    assert decode(encode(trajectory)) == trajectory


@pytest.mark.parametrize(
    ("policy", "left"), [("open", "the draft"), ("closed", RULES.refusal), ("raise", None)]
)
def test_an_app_that_its_callers_thread_runs_past_the_deadline_is_the_policy_of_errors(
    policy: str, left: str | None
) -> None:
    app = RunnableLambda(lambda _: time.sleep(0.1) or "the draft")
    guarded = guard(app, budget=Budget(seconds=0.05), on_error=policy)

    if left is not None:
        assert guarded.invoke("hello") == left
        return
    with pytest.raises(BudgetExceeded):
        guarded.invoke("hello")


async def test_an_error_that_a_policy_held_stands_in_the_trajectory() -> None:
    _, failed = await ask(Faulty(role="critique", fault=ERROR), on_error="closed")
    _, spent = await ask(Faulty(role="none", fault=""), on_error="open", budget=Budget(calls=1))

    assert failed.error == "ConnectionError: the provider is down"
    assert spent.error is not None
    assert "1 calls" in spent.error


async def test_the_policies_are_independent_of_each_other() -> None:
    everything = {"on_violation": "raise", "on_unreadable": "raise", "on_error": "raise"}

    _, kept = await ask(ScriptedModel(replies=["d", "?", "?"]), **{**everything, "on_unreadable": "open"})
    _, failed = await ask(ScriptedModel(replies=["d", ERROR]), **{**everything, "on_error": "open"})
    _, bad = await ask(
        ScriptedModel(replies=["d", verdicts("no-harm")]),
        **{**everything, "on_violation": "open", "max_rounds": 0},
    )

    assert kept.outcome is failed.outcome is bad.outcome is Outcome.EXHAUSTED


async def test_an_unreadable_verdict_is_never_taken_for_a_good_one() -> None:
    partly = verdicts(unreadable=["be-true"])

    with pytest.raises(Unreadable, match="be-true"):
        await ask(ScriptedModel(replies=["d", partly, "?"]), on_unreadable="raise")


async def test_a_violation_beside_an_unreadable_verdict_is_revised() -> None:
    partly = verdicts("no-harm", unreadable=["be-true"])
    model = ScriptedModel(replies=["d", partly, "?", "better", verdicts()])

    _, trajectory = await ask(model)

    assert trajectory.outcome is Outcome.REVISED


async def test_raised_violation_names_the_trajectory(log: Log) -> None:
    model = ScriptedModel(replies=["d", verdicts("no-harm")])

    with pytest.raises(Violation, match="no-harm") as raised:
        await ask(model, log=log, max_rounds=0, on_violation="raise")

    assert raised.value.trajectory_id == logged(log)[0].id


async def test_one_failed_candidate_ends_the_others_of_its_round() -> None:
    cancelled: list[str] = []

    class Half(Faulty):
        async def _agenerate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
            if role_of(messages) == "draft" and messages[0].type == "system":  # the writer afresh
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append("afresh")
                    raise
            return await super()._agenerate(messages, *args, **kwargs)

    with pytest.raises(ConnectionError):
        await ask(Half(role="revise", fault=ERROR), candidates=2)

    assert cancelled == ["afresh"]


# --- budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [1, 2, 3])
async def test_calls_over_the_budget_are_the_policy_of_errors(spare: int) -> None:
    def model() -> ScriptedModel:
        return ScriptedModel(replies=["the draft", verdicts("no-harm"), "better", verdicts()])

    with pytest.raises(BudgetExceeded, match=f"{spare} calls"):
        await ask(model(), budget=Budget(calls=spare))
    _, trajectory = await ask(model(), budget=Budget(calls=spare), on_error="closed")

    assert trajectory.outcome is Outcome.REFUSED
    assert len(trajectory.calls) == spare


async def test_a_budget_that_just_suffices_suffices() -> None:
    model = ScriptedModel(replies=["the draft", verdicts("no-harm"), "better", verdicts()])

    _, trajectory = await ask(model, budget=Budget(calls=4))

    assert trajectory.outcome is Outcome.REVISED


async def test_every_call_of_the_app_counts_against_the_budget() -> None:
    model = by_role(critique=verdicts())
    app = model | (lambda message: message.text) | model | (lambda message: message.text) | model

    with pytest.raises(BudgetExceeded, match="3 calls"):
        await ask(app, critic=model, reviser=model, budget=Budget(calls=3))
    _, trajectory = await ask(app, critic=model, reviser=model, budget=Budget(calls=4))

    assert [call.role for call in trajectory.calls] == ["draft"] * 3 + ["critique"]


async def test_tokens_of_the_app_count_against_the_budget() -> None:
    usage: Any = {"input_tokens": 900, "output_tokens": 100, "total_tokens": 1000}
    model = ScriptedModel(replies=[AIMessage("the draft", usage_metadata=usage), verdicts()])

    with pytest.raises(BudgetExceeded, match="1000 tokens"):
        await ask(model, budget=Budget(tokens=1000))


# --- every run is logged, once ------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["draft", "critique", "revise"])
async def test_a_cancelled_run_is_logged_once(role: str, log: Log) -> None:
    began = asyncio.Event()

    class Told(Faulty):
        async def _agenerate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
            if role_of(messages) == role:
                began.set()
            return await super()._agenerate(messages, *args, **kwargs)

    model = Told(role=role, fault="hang", cancelled=[])
    task = asyncio.ensure_future(guard(model, log=log, on_error="open").ainvoke("hello"))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    (trajectory,) = logged(log)
    assert trajectory.outcome is Outcome.FAILED
    assert trajectory.error is not None
    assert trajectory.error.startswith("CancelledError")
    assert (trajectory.draft is None) is (role == "draft")
    assert len(trajectory.rounds) == (role == "revise")
    assert model.cancelled == [role]


def test_an_interrupt_in_the_app_is_raised_and_logged_once(log: Log) -> None:
    def app(_: str) -> str:
        raise KeyboardInterrupt

    critic = by_role(critique=verdicts())

    with pytest.raises(KeyboardInterrupt):
        guard(RunnableLambda(app), critic=critic, reviser=critic, log=log).invoke("hello")

    (trajectory,) = logged(log)
    assert trajectory.outcome is Outcome.FAILED


@pytest.mark.parametrize("error", [ValueError("mine"), TimeoutError("mine")])
@pytest.mark.parametrize("policy", ["open", "closed", "raise"])
async def test_the_apps_own_error_is_raised_as_it_is(error: Exception, policy: str, log: Log) -> None:
    async def app(_: str) -> str:
        raise error

    critic = by_role(critique=verdicts())
    guarded = guard(
        RunnableLambda(app), critic=critic, reviser=critic, log=log, on_error=policy, on_unreadable=policy
    )

    with pytest.raises(type(error)) as raised:
        await guarded.ainvoke("hello")

    assert raised.value is error
    assert len(logged(log)) == 1


class UntellableError(Exception):
    def __str__(self) -> str:
        return f"code {self.code}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("role", ["draft", "critique"])
@pytest.mark.parametrize("policy", ["raise", "human"])
async def test_an_error_that_cannot_tell_its_message_is_raised_and_logged_by_its_class(
    role: str, policy: str, log: Log
) -> None:
    model, asks = Faulty(role=role, fault=UntellableError()), policy == "human"
    guarded = guard(model, log=log, on_error=policy, checkpointer=InMemorySaver() if asks else None)

    with pytest.raises(AwaitsReview if asks and role == "critique" else UntellableError) as raised:
        await guarded.ainvoke("hello", THREAD)

    if isinstance(raised.value, AwaitsReview):
        assert raised.value.question["reason"] == "UntellableError"
    else:
        assert [found.error for found in logged(log)] == ["UntellableError"]


async def test_a_record_that_cannot_be_made_hides_no_error(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(_: dict[str, Any]) -> str:
        raise ValueError("mine")

    guarded = guard(RunnableLambda(app), log=log, context_keys=["pages"])

    with pytest.raises(ValueError, match="mine"):
        await guarded.ainvoke({"question": "hello", "pages": UntellableError()})

    assert "LOST FROM THE LOG" in caplog.text


async def test_an_error_that_is_raised_again_and_again_collects_no_notes() -> None:
    error = ValueError("mine")
    error.add_note("my own")

    async def app(_: str) -> str:
        raise error

    for _ in range(3):
        with pytest.raises(ValueError, match="mine"):
            await guard(RunnableLambda(app)).ainvoke("hello")

    assert error.__notes__ == ["my own"]


async def test_a_cancellation_that_the_app_raises_itself_stays_one(log: Log) -> None:
    async def app(_: str) -> str:
        raise asyncio.CancelledError

    critic = by_role(critique=verdicts())

    with pytest.raises(asyncio.CancelledError):
        await guard(RunnableLambda(app), critic=critic, reviser=critic, log=log).ainvoke("hello")

    assert [(found.outcome, found.error) for found in logged(log)] == [(Outcome.FAILED, "CancelledError: ")]
