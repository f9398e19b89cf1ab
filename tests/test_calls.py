from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda

from cai_graph.calls import Budget, Calls, prompt_digest
from cai_graph.errors import BudgetExceeded, ConfigError
from cai_graph.failures import describe
from cai_graph.messages import cut_short
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Call

ASK = [HumanMessage("hello")]


@pytest.mark.parametrize("name", ["calls", "forward_passes", "tokens", "seconds"])
@pytest.mark.parametrize("value", [0, -1, "ten", float("nan"), True])
def test_a_bound_that_cannot_work_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"budget: {name} .*{value!r}"):
        Budget(**{name: value})


async def test_a_call_is_recorded_with_its_tokens_and_the_digest_of_its_prompt() -> None:
    reply = AIMessage(
        "hi",
        usage_metadata={
            "input_tokens": 5,
            "output_tokens": 2,
            "total_tokens": 7,
            "input_token_details": {"cache_read": 3},
        },
    )
    calls = Calls(Budget())

    await calls.generate("critique", ScriptedModel(replies=[reply]), "scripted", ASK)

    (call,) = calls.made
    assert (call.role, call.model, call.kind) == ("critique", "scripted", "generation")
    assert (call.input_tokens, call.cached_input_tokens, call.output_tokens) == (5, 3, 2)
    assert call.prompt_digest == prompt_digest(ASK)
    assert call.error is None


async def test_a_call_that_fails_is_recorded_and_its_error_raised() -> None:
    error = ValueError("no")
    calls = Calls(Budget())

    with pytest.raises(ValueError, match="no") as raised:
        await calls.generate("revise", ScriptedModel(replies=[error]), "scripted", ASK)

    assert raised.value is error
    assert calls.made[0].error == "ValueError: no"


async def test_calls_over_the_budget_are_not_started() -> None:
    model = ScriptedModel(replies=["a", "b", "c"])
    calls = Calls(Budget(calls=2))

    for _ in range(2):
        await calls.generate("critique", model, "m", ASK)
    with pytest.raises(BudgetExceeded, match=r"budget of 2 calls is spent; raise Budget\.calls"):
        await calls.generate("critique", model, "m", ASK)

    assert len(model.calls) == 2


async def test_concurrent_calls_cannot_overdraw_the_budget() -> None:
    model = ScriptedModel(replies=["a"] * 10)
    calls = Calls(Budget(calls=3))

    results = await asyncio.gather(
        *(calls.generate("critique", model, "m", ASK) for _ in range(10)), return_exceptions=True
    )

    assert sum(isinstance(result, BudgetExceeded) for result in results) == 7
    assert len(model.calls) == 3


async def test_tokens_over_the_budget_stop_the_next_call() -> None:
    usage: Any = {"input_tokens": 90, "output_tokens": 10, "total_tokens": 100}
    model = ScriptedModel(replies=[AIMessage("a", usage_metadata=usage)] * 2)
    calls = Calls(Budget(tokens=100))

    await calls.generate("critique", model, "m", ASK)
    with pytest.raises(BudgetExceeded, match="100 tokens"):
        await calls.generate("critique", model, "m", ASK)


async def test_forward_passes_have_a_bound_of_their_own() -> None:
    calls = Calls(Budget(calls=1, forward_passes=5))

    calls.admit("forward", 5)
    calls.admit("generation")
    with pytest.raises(BudgetExceeded, match="forward passes"):
        calls.admit("forward")


async def test_a_call_that_hangs_is_cancelled_at_the_deadline() -> None:
    cancelled = asyncio.Event()

    async def hang(_: Any) -> AIMessage:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    calls = Calls(Budget(seconds=0.05))

    with pytest.raises(BudgetExceeded, match=r"deadline of 0\.05 s is over"):
        await calls.generate("critique", RunnableLambda(hang), "m", ASK)

    assert cancelled.is_set()
    assert calls.made[0].error is not None
    with pytest.raises(BudgetExceeded, match="deadline"):
        calls.admit("generation")


async def test_a_models_own_timeout_is_not_taken_for_the_deadline() -> None:
    calls = Calls(Budget(seconds=60))

    with pytest.raises(TimeoutError, match="read timed out") as raised:
        await calls.generate("critique", ScriptedModel(replies=[TimeoutError("read timed out")]), "m", ASK)

    assert not isinstance(raised.value, BudgetExceeded)


async def test_the_same_account_serves_under_another_configuration() -> None:
    calls = Calls(Budget(calls=1))

    await calls.under({"tags": ["x"]}).generate("critique", ScriptedModel(replies=["a"]), "m", ASK)

    assert len(calls.made) == 1
    with pytest.raises(BudgetExceeded):
        calls.admit("generation")


async def test_forward_passes_are_one_record_with_the_tokens_of_all() -> None:
    calls = Calls(Budget(forward_passes=3))

    async with calls.forward("probe", "m", 3) as forward:
        forward.tokens = 12

    (call,) = calls.made
    assert (call.role, call.model, call.kind) == ("probe", "m", "forward")
    assert (call.input_tokens, call.error) == (12, None)
    assert calls.spent == {"generation": 0, "forward": 3, "tokens": 12}


async def test_forward_passes_over_the_budget_are_neither_made_nor_recorded() -> None:
    calls = Calls(Budget(forward_passes=2))

    with pytest.raises(BudgetExceeded, match="2 forward passes"):
        async with calls.forward("probe", "m", 3):
            raise AssertionError

    assert calls.made == []


async def test_forward_passes_that_hang_are_cancelled_at_the_deadline_and_recorded() -> None:
    calls = Calls(Budget(seconds=0.05))

    with pytest.raises(BudgetExceeded, match=r"deadline of 0\.05 s is over"):
        async with calls.forward("critique", "m", 1):
            await asyncio.Event().wait()

    (call,) = calls.made
    assert call.input_tokens is None
    assert (call.error or "").startswith("BudgetExceeded: ")


def test_what_is_recorded_counts_against_the_tokens() -> None:
    calls = Calls(Budget())
    calls.record(Call(role="probe", model="m", kind="forward", input_tokens=12))

    assert calls.spent["tokens"] == 12


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"finish_reason": "length"}, True),
        ({"finish_reason": "MAX_TOKENS"}, True),
        ({"stop_reason": "max_tokens"}, True),
        ({"done_reason": "length"}, True),
        ({"finish_reason": "stop"}, False),
        ({"stop_reason": "end_turn"}, False),
        ({"finish_reason": 2}, False),
        ({}, False),
    ],
)
def test_truncation_is_told_in_the_words_of_any_provider(metadata: dict[str, Any], expected: bool) -> None:
    assert (cut_short(AIMessage("x", response_metadata=metadata)) is not None) is expected


def test_the_digest_of_a_prompt_tells_roles_apart_and_takes_any_text() -> None:
    assert prompt_digest([HumanMessage("a")]) != prompt_digest([AIMessage("a")])
    assert len(prompt_digest([HumanMessage("\ud800")])) == 16


def test_an_error_is_described_in_bounded_length() -> None:
    assert describe(ValueError("x" * 10_000)) == "ValueError: " + "x" * 1988
