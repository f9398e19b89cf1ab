"""Runs coroutines concurrently and cancels those no longer needed; or shields one from cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

__all__ = ["side_by_side", "to_the_end", "together", "until"]

T = TypeVar("T")
R = TypeVar("R")


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently and return their results; if one fails, cancel the others, then raise."""
    if len(coroutines) == 1:  # the common case needs no task
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:  # the other tasks are not needed any more and must not spend calls
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def side_by_side(
    items: Iterable[T], work: Callable[[T], Awaitable[R]], concurrency: int
) -> AsyncGenerator[R, None]:
    """Yield the result of `work` for each item, in order of completion; at most `concurrency` run at once.

    Items are taken from the iterable only when there is room. If the generator is closed early, or `work`
    raises, the running tasks are cancelled and awaited.
    """
    iterator = iter(items)
    pending: set[asyncio.Future[R]] = set()
    ended: set[asyncio.Future[R]] = set()
    try:
        while True:
            room = islice(iterator, concurrency - len(pending))
            pending |= {asyncio.ensure_future(work(item)) for item in room}
            if not pending:
                return
            ended, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                yield task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, *ended, return_exceptions=True)  # retrieves their errors


def until(items: Iterable[T], stopped: Callable[[], bool]) -> Iterator[T]:
    """Yield the items until `stopped` returns True."""
    for item in items:
        if stopped():
            return
        yield item


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; a cancellation of the caller takes effect only after that."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:  # anyio, and so Starlette, cancels again and again
            cancelled = error
    if cancelled is not None:
        await asyncio.gather(task, return_exceptions=True)  # retrieves its error
        raise cancelled
    return task.result()
