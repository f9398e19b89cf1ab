"""What mode `shadow` hears of an app, and that hearing it changes nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel
from replies import JUDGE, guard, logged

from cai_graph import open_log
from cai_graph.log import Log
from cai_graph.shadow.shadow import size_of
from cai_graph.trajectory import Trajectory, text_of

# --- hearing it changes nothing -----------------------------------------------------------------------


class Unread:
    """An object that minds being looked at, such as a response that was not read."""

    @property
    def content(self) -> str:
        raise ConnectionError("not read")


def itself() -> dict[str, Any]:
    output: dict[str, Any] = {"answer": "the draft"}
    output["self"] = output
    return output


@pytest.mark.parametrize("output", [{"answer": "the draft", "raw": Unread()}, itself()], ids=["raw", "cycle"])
def test_an_output_that_cannot_be_measured_leaves_and_is_judged(output: Any, tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        app = guard(RunnableLambda(lambda asked: output), log=log, mode="shadow")

        assert app.invoke("hello") is output
        assert app.shadow is not None
        app.shadow.close()
        (record,) = logged(log)

    assert record.outcome == "REVISED"


class Reads(InMemorySaver):
    """Counts what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def get_tuple(self, config: Any) -> Any:
        self.reads += 1
        return super().get_tuple(config)


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_no_checkpoint_is_read_but_those_that_the_graph_reads(way: str) -> None:
    saver = Reads()
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [AIMessage("fine")]})
    graph.add_edge(START, "answer")
    app = graph.compile(checkpointer=saver)
    guarded = guard(app, mode="shadow")
    reads = []

    for number, each in enumerate((app, guarded)):
        thread: Any = {"configurable": {"thread_id": str(number)}}
        given: Any = {"messages": [("user", "hello")]}
        before = saver.reads
        _ = each.invoke(given, thread) if way == "invoke" else await each.ainvoke(given, thread)
        reads.append(saver.reads - before)

    assert reads[0] == reads[1] > 0
    assert guarded.shadow is not None
    await guarded.shadow.aclose()
    assert guarded.shadow.tally.judged == 1


# --- what is judged is what was given and returned ----------------------------------------------------


def judged_after(change: Callable[[Any], object], log: Log, app: Runnable[Any, Any]) -> Trajectory:
    """What is logged of an app whose caller changes what it has in its hands as soon as it can."""
    guarded = guard(app, log=log, mode="shadow", context_keys=["docs"])
    change(guarded)
    assert guarded.shadow is not None
    guarded.shadow.close()
    (record,) = logged(log)
    assert record.error is None
    return record


def sourced(asked: Any) -> dict[str, Any]:
    return {"answer": "the draft", "docs": ["a source"]}


def pops(app: Any) -> None:
    app.invoke({"question": "hello"}).pop("docs")


def clears(app: Any) -> None:
    app.invoke({"question": "hello"})["docs"].clear()


def clears_while_it_streams(app: Any) -> None:
    for chunk in app.stream({"question": "hello"}):
        chunk["docs"].clear()
        del chunk["answer"]


@pytest.mark.parametrize("change", [pops, clears, clears_while_it_streams])
def test_the_critic_is_shown_the_context_that_the_app_returned(
    change: Callable[[Any], object], tmp_path: Path
) -> None:
    with open_log(tmp_path / "cai.db") as log:
        record = judged_after(change, log, RunnableLambda(sourced))

    assert (record.context, record.draft and text_of(record.draft.answer)) == (
        {"docs": "a source"},
        "the draft",
    )


def test_a_request_whose_dict_is_used_again_is_judged_with_its_own_context(tmp_path: Path) -> None:
    def again(app: Any) -> None:
        state: dict[str, Any] = {"question": "first", "docs": ["a source"]}
        app.invoke(state)
        state.update(question="second", docs=["another source"])

    with open_log(tmp_path / "cai.db") as log:
        record = judged_after(again, log, RunnableLambda(lambda asked: {"answer": "the draft"}))

    assert (record.prompt, record.context) == ("first", {"docs": "a source"})


def test_a_reader_may_change_the_chunks_of_a_stream(tmp_path: Path) -> None:
    def change(app: Any) -> None:
        for chunk in app.stream("hello"):
            chunk.content = "changed"

    with open_log(tmp_path / "cai.db") as log:
        record = judged_after(change, log, JUDGE)

    assert record.released is not None
    assert text_of(record.released) == "the draft"


def test_a_reader_may_change_the_last_state_of_a_graph(tmp_path: Path) -> None:
    def change(app: Any) -> None:
        *_, last = app.stream({"messages": [("user", "hello")]}, stream_mode="values")
        last["messages"].pop().content = "changed"

    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [AIMessage("the draft")]})
    graph.add_edge(START, "answer")
    with open_log(tmp_path / "cai.db") as log:
        record = judged_after(change, log, graph.compile())

    assert record.released is not None
    assert text_of(record.released) == "the draft"


# --- an input that comes in chunks --------------------------------------------------------------------

told: list[str] = []


def spelt(asked: Iterator[str]) -> Iterator[str]:
    for _ in asked:
        for word in ("the ", "draft"):
            told.append(f"in {word}")
            yield word


async def aspelt(asked: AsyncIterator[str]) -> AsyncIterator[str]:
    async for _ in asked:
        for word in ("the ", "draft"):
            told.append(f"in {word}")
            yield word


def heard(words: Iterator[str]) -> Iterator[str]:
    for word in words:
        yield word.upper()


async def aheard(words: AsyncIterator[str]) -> AsyncIterator[str]:
    async for word in words:
        yield word.upper()


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_a_step_that_answers_while_it_is_asked_goes_on_doing_so(way: str, tmp_path: Path) -> None:
    told.clear()
    with open_log(tmp_path / "cai.db") as log:
        step = guard(RunnableGenerator(heard, aheard), log=log, mode="shadow")
        app = RunnableGenerator(spelt, aspelt) | step
        if way == "stream":
            for chunk in app.stream("hello"):
                told.append(f"out {chunk}")
        else:
            async for chunk in app.astream("hello"):
                told.append(f"out {chunk}")
        assert step.shadow is not None
        await step.shadow.aclose()
        (record,) = logged(log)

    assert told.index("out THE ") < told.index("in draft") + 2  # LangChain asks for one chunk ahead
    assert (record.prompt, record.released and record.released.content) == ("the draft", "THE DRAFT")


# --- how much waits -----------------------------------------------------------------------------------


class State(BaseModel):
    pages: list[Document]


@dataclasses.dataclass(slots=True)
class Slots:
    pages: list[Document]


def test_documents_and_the_fields_of_states_count_as_what_they_hold() -> None:
    pages = [Document("x" * 1000, metadata={"source": "y" * 1000}) for _ in range(10)]

    for value in ({"context": pages}, State(pages=pages), Slots(pages), [pages, "z"]):
        assert 20_000 < size_of(value) < 40_000
    assert size_of([[AIMessage("x" * 1000)] * 2, b"x" * 1000, None, 1, 2.5]) < 4000


def test_a_part_of_long_lists_stands_for_all() -> None:
    pages = [Document("x" * 1000, metadata={"source": "y" * 1000}) for _ in range(30_000)]

    assert 60e6 < size_of({"question": "why?", "context": pages}) < 120e6


def test_an_answer_does_not_wait_for_its_numbers_to_be_counted() -> None:
    vectors = {"question": "why?", "vectors": [[0.5] * 1536 for _ in range(1000)]}
    started = time.perf_counter()

    assert 40e6 < size_of(vectors) < 60e6
    assert time.perf_counter() - started < 0.05
