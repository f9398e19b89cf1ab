"""Many things at once: what fails, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from typing import Any

import pytest

from cai_graph.concurrency.together import side_by_side


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
