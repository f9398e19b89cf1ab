"""Work on many things at once, none of which goes on once it is not needed any more; and work to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

__all__ = ["side_by_side", "to_the_end", "together", "until"]

T = TypeVar("T")
R = TypeVar("R")


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of coroutines that run at once; when one fails, the others are cancelled first."""
    if len(coroutines) == 1:  # the usual case needs no task of its own
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:  # what is not needed any more must not go on spending
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def side_by_side(
    items: Iterable[T], work: Callable[[T], Awaitable[R]], concurrency: int
) -> AsyncGenerator[R, None]:
    """Yield what `work` returns for each item, as each ends; at most `concurrency` are under way.

    Items are drawn one by one, when there is room. When the caller leaves early, or `work` raises, what
    is under way is cancelled and waited for.
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
        await asyncio.gather(*pending, *ended, return_exceptions=True)  # whose errors nobody else looks at


def until(items: Iterable[T], stopped: Callable[[], bool]) -> Iterator[T]:
    """Yield the items until `stopped` returns True."""
    for item in items:
        if stopped():
            return
        yield item


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Do some work to its end; who is cancelled meanwhile is held until then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:  # anyio, and so Starlette, cancels again and again
            cancelled = error
    if cancelled is not None:
        await asyncio.gather(task, return_exceptions=True)  # nobody else looks at its error
        raise cancelled
    return task.result()
