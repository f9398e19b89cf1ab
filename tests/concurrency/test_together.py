"""Many things at once: what fails, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from typing import Any

import pytest

from cai_graph.concurrency.together import side_by_side, to_the_end


async def test_failures_beside_the_one_that_is_raised_leave_no_complaint() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))

    async def refused(number: int) -> int:
        raise OSError(f"key refused: {number}")

    async def all_of_them() -> None:
        async with aclosing(side_by_side(range(4), refused, 4)) as ended:
            async for _ in ended:
                pass

    with pytest.raises(OSError, match="key refused"):
        await all_of_them()
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_what_goes_on_to_its_end_holds_who_is_cancelled_and_its_failure_leaves_no_complaint() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    begins, may = asyncio.Event(), asyncio.Event()

    async def fails() -> None:
        begins.set()
        await may.wait()
        raise OSError("down")

    async def cancelled() -> None:
        held = asyncio.create_task(to_the_end(fails()))
        await begins.wait()
        held.cancel()
        await asyncio.sleep(0)
        assert not held.done()
        may.set()
        await held

    with pytest.raises(asyncio.CancelledError):
        await cancelled()
    await asyncio.sleep(0)  # lets go of what was raised
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []
