from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from cai_graph.concurrency import threads
from cai_graph.concurrency.threads import Threads


def test_what_a_call_returns_or_raises_is_the_futures() -> None:
    runs = Threads()

    assert runs.submit(divmod, 7, 2).result(5) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        runs.submit(divmod, 7, 0).result(5)
    with pytest.raises(KeyboardInterrupt):
        runs.submit(_interrupt).result(5)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_calls_one_after_the_other_share_a_thread_and_calls_at_once_do_not() -> None:
    runs, both = Threads(), threading.Barrier(2)

    def met() -> threading.Thread:
        both.wait(5)
        return threading.current_thread()

    first = runs.submit(threading.current_thread).result(5)
    _until(lambda: bool(runs._idle))
    assert runs.submit(threading.current_thread).result(5) is first
    assert first.daemon
    at_once = [runs.submit(met), runs.submit(met)]
    assert len({future.result(5) for future in at_once}) == 2


def test_an_idle_thread_ends_and_no_call_is_lost_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.001)
    runs, used = Threads(), set()

    for _ in range(200):
        used.add(runs.submit(threading.current_thread).result(5))
        time.sleep(0.001)  # about when the thread gives up waiting

    assert len(used) > 1
    _until(lambda: not any(thread.is_alive() for thread in used))
    assert runs._idle == []


def test_a_closed_pool_goes_on_since_other_loops_share_it() -> None:
    runs = Threads()
    runs.shutdown(wait=False)

    assert runs.submit(divmod, 7, 2).result(5) == (3, 1)


def test_a_waiting_thread_holds_nothing_of_the_call_before() -> None:
    class Thing:
        def fail(self) -> None:
            raise ValueError("mine")

    runs, thing = Threads(), Thing()
    gone = weakref.ref(thing)
    gc.disable()  # a cycle would be held until a collection
    try:
        with pytest.raises(ValueError, match="mine"):
            runs.submit(thing.fail).result(5)
        del thing
        _until(lambda: gone() is None)
    finally:
        gc.enable()


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)
