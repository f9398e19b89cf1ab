from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import cast

import pytest

from cai_graph.concurrency import bridge

asked: ContextVar[str] = ContextVar("asked", default="nobody")


def test_the_result_of_the_core_is_returned() -> None:
    async def core(caller: bridge.Caller) -> int:
        await asyncio.sleep(0)
        return 7

    assert bridge.run(core) == 7


def test_the_error_of_the_core_is_raised_as_it_is() -> None:
    error = ValueError("mine")

    async def core(caller: bridge.Caller) -> None:
        raise error

    with pytest.raises(ValueError, match="mine") as raised:
        bridge.run(core)

    assert raised.value is error


def test_a_core_that_cannot_be_started_raises_and_does_not_hang() -> None:
    def core() -> None: ...

    with pytest.raises(TypeError):
        bridge.run(core)  # type: ignore[arg-type]


def test_a_second_interrupt_leaves_nothing_that_waits_for_its_thread() -> None:
    ended: list[str] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    async def core(caller: bridge.Caller) -> None:
        try:
            await caller.call(interrupted)
        finally:
            with pytest.raises(RuntimeError, match="interrupted in the caller's thread"):
                await caller.call(interrupted)
            ended.append("first")
            with pytest.raises(RuntimeError, match="caller is gone"):
                await caller.call(threading.current_thread)
            ended.append("all")

    with pytest.raises(KeyboardInterrupt):
        bridge.run(core)

    until = time.monotonic() + 20
    while "all" not in ended and time.monotonic() < until:
        time.sleep(0.01)
    assert ended == ["first", "all"]


def test_an_interrupt_reaches_work_that_is_shielded_from_it() -> None:
    ended: list[BaseException] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    async def core(caller: bridge.Caller) -> None:
        shielded = asyncio.ensure_future(caller.call(interrupted))
        try:
            await asyncio.shield(shielded)
        finally:
            await asyncio.wait([shielded])
            ended.append(cast("BaseException", shielded.exception()))

    with pytest.raises(KeyboardInterrupt):
        bridge.run(core)
    assert isinstance(ended.pop(), RuntimeError)


def test_an_exit_in_the_core_is_raised_and_the_next_request_is_answered() -> None:
    async def leave(caller: bridge.Caller) -> None:
        sys.exit(3)

    async def core(caller: bridge.Caller) -> int:
        return 7

    with pytest.raises(SystemExit):
        bridge.run(leave)
    assert bridge.run(core) == 7


def test_work_handed_back_runs_in_the_callers_thread() -> None:
    async def core(caller: bridge.Caller) -> tuple[threading.Thread, threading.Thread]:
        return threading.current_thread(), await caller.call(threading.current_thread)

    in_core, in_caller = bridge.run(core)

    assert in_caller is threading.current_thread()
    assert in_core is not threading.current_thread()
    assert in_core.daemon


class Interrupted(queue.SimpleQueue[Callable[[], None]]):
    """A queue whose reader is interrupted once, when it has taken what lay there."""

    is_read = False

    def get(self, block: bool = True, timeout: float | None = None) -> Callable[[], None]:
        first, self.is_read = not self.is_read, True
        item = super().get(block, timeout)
        if first:
            raise KeyboardInterrupt
        return item


def test_an_interrupt_at_the_very_end_is_raised_and_does_not_hang() -> None:
    async def core() -> None:
        while not work.is_read:
            await asyncio.sleep(0)

    caller = bridge.Caller()
    caller._work = work = Interrupted()

    with pytest.raises(KeyboardInterrupt):
        caller._wait(core())


@pytest.mark.parametrize("error", [ValueError("mine"), TimeoutError("mine"), asyncio.CancelledError("mine")])
def test_the_error_of_handed_back_work_is_raised_in_the_core(error: BaseException) -> None:
    def fail() -> None:
        raise error

    async def core(caller: bridge.Caller) -> None:
        await caller.call(fail)

    with pytest.raises(type(error)) as raised:
        bridge.run(core)

    assert raised.value is error


def test_a_stop_iteration_of_handed_back_work_is_told() -> None:
    async def core(caller: bridge.Caller) -> None:
        await caller.call(lambda: next(iter(())))

    with pytest.raises(RuntimeError, match="StopIteration"):
        bridge.run(core)


def test_the_core_sees_the_callers_context_and_changes_a_copy() -> None:
    async def core(caller: bridge.Caller) -> str:
        seen = asked.get()
        asked.set("core")
        return seen

    token = asked.set("caller")
    try:
        assert bridge.run(core) == "caller"
        assert asked.get() == "caller"
    finally:
        asked.reset(token)


def test_an_interrupt_cancels_the_core_waits_for_its_cleanup_and_is_raised() -> None:
    cleaned: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def core(caller: bridge.Caller) -> None:
        try:
            await caller.call(interrupt)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            cleaned.append("cleaned")
            raise

    with pytest.raises(KeyboardInterrupt):
        bridge.run(core)

    assert cleaned == ["cleaned"]


async def test_a_running_event_loop_is_no_obstacle() -> None:
    async def core(caller: bridge.Caller) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert bridge.run(core) is not asyncio.get_running_loop()


def test_a_synchronous_call_inside_the_core_does_not_wait_for_itself() -> None:
    async def inner(caller: bridge.Caller) -> str:
        return await caller.call(lambda: "inner")

    async def outer(caller: bridge.Caller) -> list[str]:
        return [bridge.run(inner) for _ in range(3)]

    assert bridge.run(outer) == ["inner"] * 3
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("cai_graph") == 1  # the loops of the inner calls are gone


def test_many_threads_share_one_loop() -> None:
    loops: list[object] = []

    async def core(caller: bridge.Caller) -> None:
        loops.append(asyncio.get_running_loop())
        assert await caller.call(threading.get_ident) == await caller.call(threading.get_ident)

    threads = [threading.Thread(target=lambda: bridge.run(core)) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(loops) == 32
    assert len(set(loops)) == 1


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_gets_a_loop_of_its_own() -> None:
    done = run_python(
        """
        import os
        from cai_graph.concurrency import bridge

        async def core(caller):
            return await caller.call(os.getpid)

        assert bridge.run(core) == os.getpid()
        child = os.fork()
        if child == 0:
            os._exit(0 if bridge.run(core) == bridge.run(core) == os.getpid() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert bridge.run(core) == os.getpid()
        """
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own_for_what_blocks() -> None:
    done = run_python(
        """
        import asyncio, os
        from cai_graph.concurrency import bridge

        async def core(caller):
            return await asyncio.to_thread(os.getpid)

        assert bridge.run(core) == os.getpid()  # its thread is idle when the child comes into being
        child = os.fork()
        if child == 0:
            os._exit(0 if bridge.run(core) == os.getpid() else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_calls_that_hang_keep_nothing_else_from_its_turn() -> None:
    hangs = threading.Event()

    async def core(caller: bridge.Caller) -> int:
        hanging = [asyncio.ensure_future(asyncio.to_thread(hangs.wait, 30)) for _ in range(40)]
        await asyncio.sleep(0)  # each of them begins
        try:
            async with asyncio.timeout(5):
                return await asyncio.to_thread(lambda: 7)
        finally:
            hangs.set()
            await asyncio.gather(*hanging)

    assert bridge.run(core) == 7


def test_threads_that_outlive_the_main_one_go_on_as_before() -> None:
    done = run_python(
        """
        import asyncio, concurrent.futures.thread, threading, time
        from cai_graph.concurrency import bridge

        async def core(caller):
            return await asyncio.to_thread(lambda: 7)

        def work():
            while not concurrent.futures.thread._shutdown:  # Python has ended its own pools
                time.sleep(0.01)
            print(bridge.run(core))

        threading.Thread(target=work).start()
        """
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


def test_a_process_does_not_wait_at_its_end_for_a_call_that_hangs() -> None:
    done = run_python(
        """
        import asyncio, threading
        from cai_graph.concurrency import bridge

        begun = threading.Event()

        def hang():
            begun.set()
            threading.Event().wait()

        bridge.start(lambda: asyncio.to_thread(hang))
        begun.wait()
        """
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_used_the_bridge_ends_in_silence() -> None:
    done = run_python(
        """
        from cai_graph.concurrency import bridge

        async def inner(caller):
            return 1

        async def core(caller):
            return bridge.run(inner)

        assert bridge.run(core) == 1
        """
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_a_stream_yields_what_its_core_yields_and_work_runs_in_the_callers_thread() -> None:
    async def core(caller: bridge.Caller) -> AsyncGenerator[object, None]:
        yield await caller.call(threading.current_thread)
        yield threading.current_thread()

    in_caller, in_core = bridge.stream(core)

    assert in_caller is threading.current_thread()
    assert in_core is not threading.current_thread()


def test_the_error_of_a_stream_comes_after_what_it_yielded() -> None:
    async def core(caller: bridge.Caller) -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("mine")

    items = bridge.stream(core)

    assert next(items) == 1
    with pytest.raises(ValueError, match="mine"):
        next(items)


def test_a_stream_that_is_closed_early_cleans_up_in_both_threads_before_close_returns() -> None:
    cleaned: list[object] = []

    async def core(caller: bridge.Caller) -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
        finally:
            cleaned.append(await caller.call(threading.current_thread))

    for _ in bridge.stream(core):
        break

    assert cleaned == [threading.current_thread()]


def test_a_stream_inside_the_core_of_another_does_not_wait_on_its_own_loop() -> None:
    async def inner(caller: bridge.Caller) -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    async def core(caller: bridge.Caller) -> AsyncGenerator[int, None]:
        for item in bridge.stream(inner):
            yield item

    assert list(bridge.stream(core)) == [1, 2]


def test_a_process_that_ends_in_the_middle_of_a_stream_ends_in_silence() -> None:
    done = run_python(
        """
        from cai_graph.concurrency import bridge

        async def core(caller):
            while True:
                yield 1

        items = bridge.stream(core)
        next(items)
        """
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_each_item_of_a_stream_may_be_asked_for_in_another_thread() -> None:
    async def core(caller: bridge.Caller) -> AsyncGenerator[threading.Thread, None]:
        for _ in range(3):
            yield await caller.call(threading.current_thread)

    items, asked, served = bridge.stream(core), [], []
    for _ in range(3):  # as a web server's pool of threads does
        thread = threading.Thread(target=lambda: served.append(next(items)))
        thread.start()
        thread.join(30)
        asked.append(thread)

    assert served == asked
    assert list(items) == []


def test_a_stream_that_is_collected_in_the_loops_own_thread_is_closed_and_nothing_hangs() -> None:
    done = run_python(
        """
        import gc, threading, time
        from cai_graph.concurrency import bridge

        ended = []

        async def core(caller):
            try:
                while True:
                    yield 1
            finally:
                try:
                    await caller.call(lambda: None)
                except RuntimeError as error:
                    ended.append(str(error))

        class Session:  # a generator that its own object holds: a reference cycle
            def __init__(self):
                self.items = self.read()

            def read(self):
                yield from bridge.stream(core)

        async def collect(caller):
            gc.collect()

        async def inner(caller):
            return bridge.run(collect)  # in the thread of another loop, for which this one waits

        gc.disable()
        for collecting in (collect, inner):
            next(Session().items)
            reading = threading.Thread(target=bridge.run, args=[collecting], daemon=True)
            reading.start()
            reading.join(20)
            assert not reading.is_alive(), "it hangs"
            until = time.monotonic() + 20
            while not ended and time.monotonic() < until:
                time.sleep(0.01)
            assert "caller is gone" in ended.pop()
        """
    )

    assert (done.returncode, done.stderr) == (0, "")
