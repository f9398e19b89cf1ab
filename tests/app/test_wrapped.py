"""A guarded app in a LangGraph graph and around one, and the graphs that remember."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

import pytest
from langchain_core.messages import AIMessage, HumanMessage, convert_to_messages
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.channels import Topic
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError, ParentCommand
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, GraphOutput, Send, interrupt
from replies import RULES, by_role, flags, guard, logged, verdicts

from cai_graph.errors import DataError, RunError, Violation
from cai_graph.log import open_log
from cai_graph.trajectory import Outcome, text_of

# --- in and around LangGraph --------------------------------------------------------------------------


def outer_graph(node: Any, saver: InMemorySaver | None = None) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("answer", node)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile(checkpointer=saver)


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_as_a_node_it_writes_nothing_of_its_own_into_the_outer_checkpoints(way: str) -> None:
    guarded = guard(by_role(critique=flags("no-harm")))
    saver, plain_saver = InMemorySaver(), InMemorySaver()

    def node(state: MessagesState, config: RunnableConfig) -> Any:
        return {"messages": [guarded.invoke(state["messages"], config)]}

    async def anode(state: MessagesState, config: RunnableConfig) -> Any:
        return {"messages": [await guarded.ainvoke(state["messages"], config)]}

    def plain(state: MessagesState) -> Any:
        return {"messages": [AIMessage("better")]}

    config: Any = {"configurable": {"thread_id": "1"}}
    asked: Any = {"messages": [HumanMessage("hello")]}
    if way == "invoke":
        output = outer_graph(node, saver).invoke(asked, config)
    else:
        output = await outer_graph(anode, saver).ainvoke(asked, config)
    outer_graph(plain, plain_saver).invoke(asked, config)

    assert output["messages"][-1].content == "better"
    spaces = {tuple.config["configurable"]["checkpoint_ns"] for tuple in saver.list(config)}
    assert spaces == {""}
    assert len(list(saver.list(config))) == len(list(plain_saver.list(config)))
    assert set(saver.storage["1"]) == {""}


class Count(TypedDict):
    question: str
    turns: int
    answer: str


def counting_app(saver: InMemorySaver) -> Any:
    def step(state: Count) -> Any:
        return {"turns": state.get("turns", 0) + 1, "answer": "the draft"}

    graph = StateGraph(Count)
    graph.add_node("step", step)
    graph.add_edge(START, "step")
    graph.add_edge("step", END)
    return graph.compile(checkpointer=saver)


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_a_wrapped_graph_keeps_its_state_under_its_thread(way: str) -> None:
    saver = InMemorySaver()
    app = counting_app(saver)
    guarded = guard(app)
    config: Any = {"configurable": {"thread_id": "1"}}

    for turns in (1, 2):
        asked: Any = {"question": "hello"}
        output = guarded.invoke(asked, config) if way == "invoke" else await guarded.ainvoke(asked, config)
        assert output == {"question": "hello", "turns": turns, "answer": "better"}

    assert app.get_state(config).values["turns"] == 2
    assert set(saver.storage["1"]) == {""}


def test_a_wrapped_graph_may_take_as_many_steps_as_unwrapped() -> None:
    class State(TypedDict, total=False):
        input: str
        steps: int
        answer: str

    def step(state: State) -> Any:
        return {"steps": state.get("steps", 0) + 1, "answer": "fine"}

    graph = StateGraph(State)
    graph.add_node("step", step)
    graph.add_edge(START, "step")
    graph.add_conditional_edges("step", lambda state: END if state["steps"] == 60 else "step")
    app = graph.compile()

    assert app.invoke({"input": "hello"})["steps"] == 60
    assert guard(app).invoke({"input": "hello"})["steps"] == 60


@pytest.mark.parametrize("limit", [24, 25, 26])
@pytest.mark.parametrize("mode", ["enforce", "shadow"])
async def test_a_limit_of_steps_that_a_caller_gives_holds(mode: Any, limit: int) -> None:
    graph = StateGraph(MessagesState)
    graph.add_node("step", lambda state: {"messages": [AIMessage("fine")]})
    graph.add_edge(START, "step")
    graph.add_edge("step", "step")
    guarded = guard(graph.compile(), mode=mode)
    config: Any = {"recursion_limit": limit}
    calls: dict[str, Callable[[], Any]] = {
        "invoke": lambda: guarded.invoke(HELLO, config),
        "batch": lambda: guarded.batch([HELLO], config),
        "stream": lambda: [*guarded.stream(HELLO, config)],
        "transform": lambda: [*guarded.transform(iter([HELLO]), config)],
        "in a chain": lambda: (RunnableLambda(lambda given: given) | guarded).invoke(HELLO, config),
        "around": lambda: RunnableLambda(lambda given: guarded.invoke(given)).invoke(HELLO, config),
    }

    for call in calls.values():
        with pytest.raises(GraphRecursionError, match=f"limit of {limit} reached"):
            call()
    for way in (guarded.ainvoke(HELLO, config), guarded.answered(HELLO, config)):
        with pytest.raises(GraphRecursionError, match=f"limit of {limit} reached"):
            await way
    with pytest.raises(GraphRecursionError, match=f"limit of {limit} reached"):
        [chunk async for chunk in guarded.astream(HELLO, config)]


class Asked(TypedDict, total=False):
    question: str
    answer: str


def asking_app() -> StateGraph[Asked]:
    def step(state: Asked) -> Any:
        return {"answer": "the draft" if interrupt("may I?") else "no"}

    graph = StateGraph(Asked)
    graph.add_node("step", step)
    graph.add_edge(START, "step")
    graph.add_edge("step", END)
    return graph


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_an_app_that_waits_for_a_person_is_neither_judged_nor_logged(way: str, tmp_path: Path) -> None:
    app = asking_app().compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    asked: Any = {"question": "hello"}

    with open_log(tmp_path / "cai.db") as log:
        guarded = guard(app, log=log)
        paused = guarded.invoke(asked, config) if way == "invoke" else await guarded.ainvoke(asked, config)
        with pytest.raises(RunError, match="waits for a person"):
            await guarded.answered(asked, {"configurable": {"thread_id": "2"}})
        log.flush()

        assert paused["__interrupt__"][0].value == "may I?"
        assert list(log.read(kind="trajectory")) == []


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_an_app_that_waited_for_a_person_is_judged_when_it_is_resumed(way: str, tmp_path: Path) -> None:
    config: Any = {"configurable": {"thread_id": "1"}}
    with open_log(tmp_path / "cai.db") as log:
        guarded = guard(asking_app().compile(checkpointer=InMemorySaver()), log=log)
        for given in ({"question": "hello"}, Command(resume=True)):
            output = (
                guarded.invoke(given, config) if way == "invoke" else await guarded.ainvoke(given, config)
            )
        log.flush()
        (trajectory,) = log.read(kind="trajectory")

    assert output["answer"] == "better"
    assert trajectory.prompt == "hello"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_an_answer_of_an_app_that_remembers_is_judged_in_what_came_before(way: str) -> None:
    app = StateGraph(MessagesState)
    app.add_node("answer", lambda state: {"messages": [AIMessage(f"answer {len(state['messages'])}")]})
    app.add_edge(START, "answer")
    judge = by_role(critique=verdicts())
    guarded = guard(app.compile(checkpointer=InMemorySaver()), critic=judge, reviser=judge)
    config: Any = {"configurable": {"thread_id": "1"}}

    for asked in ("first", "second"):
        given: Any = {"messages": [HumanMessage(asked)]}
        _ = guarded.invoke(given, config) if way == "invoke" else await guarded.ainvoke(given, config)

    _, conversation = [call[-1].text.partition("<answer>") for call in judge.calls]
    assert [word in conversation[0] for word in ("first", "answer 1", "second")] == [True] * 3
    assert "answer 3" in conversation[2]


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_as_a_node_an_app_that_waits_for_a_person_pauses_the_outer_graph(
    way: str, tmp_path: Path
) -> None:
    with open_log(tmp_path / "cai.db") as log:
        guarded = guard(asking_app().compile(), log=log)

        def node(state: Asked, config: RunnableConfig) -> Any:
            return guarded.invoke(state, config)

        async def anode(state: Asked, config: RunnableConfig) -> Any:
            return await guarded.ainvoke(state, config)

        graph = StateGraph(Asked)
        graph.add_node("app", node if way == "invoke" else anode)
        graph.add_edge(START, "app")
        outer = graph.compile(checkpointer=InMemorySaver())
        config: Any = {"configurable": {"thread_id": "1"}}

        async def call(given: Any) -> Any:
            return outer.invoke(given, config) if way == "invoke" else await outer.ainvoke(given, config)

        paused = await call({"question": "hello"})
        log.flush()
        assert paused["__interrupt__"][0].value == "may I?"
        assert list(log.read(kind="trajectory")) == []

        assert (await call(Command(resume=True)))["answer"] == "better"
        log.flush()
        assert len(list(log.read(kind="trajectory"))) == 1


# --- graphs that remember ------------------------------------------------------------------------------


def joined(before: list[Any], new: list[Any]) -> list[Any]:
    return [*before, *convert_to_messages(new)]


class Joined(TypedDict):
    messages: Annotated[list[Any], joined]


def remembering(state: Any = MessagesState, **options: Any) -> Any:
    """An app whose every answer is `the draft`, and that keeps its conversation."""
    graph = StateGraph(state)
    graph.add_node("prepare", lambda state: {})
    graph.add_node("answer", lambda state: {"messages": [AIMessage("the draft")]})
    graph.add_edge(START, "prepare")
    graph.add_edge("prepare", "answer")
    return graph.compile(checkpointer=InMemorySaver(), **options)


THREAD: Any = {"configurable": {"thread_id": "1"}}
HELLO: Any = {"messages": [("user", "hello")]}
WAYS = ["invoke", "ainvoke", "stream", "astream"]


async def call(app: Any, way: str, given: Any, config: Any = THREAD) -> Any:
    match way:
        case "invoke":
            return app.invoke(given, config)
        case "ainvoke":
            return await app.ainvoke(given, config)
        case "stream":
            return list(app.stream(given, config))
        case _:
            return [chunk async for chunk in app.astream(given, config)]


def stored(app: Any, config: Any = THREAD) -> list[str]:
    state = app.get_state(config)
    assert state.next == ()
    return [message.text for message in state.values["messages"]]


@pytest.mark.parametrize("state", [MessagesState, Joined])
@pytest.mark.parametrize("way", WAYS)
async def test_a_graph_remembers_what_left_and_not_its_draft(way: str, state: Any) -> None:
    app = remembering(state)
    guarded = guard(app)

    for turn in (1, 2):
        await call(guarded, way, HELLO)
        assert stored(app) == ["hello", "better"] * turn


@pytest.mark.parametrize("way", WAYS)
async def test_a_graph_remembers_a_refusal_where_nothing_left(way: str) -> None:
    app = remembering()

    with pytest.raises(Violation):
        await call(
            guard(app, reviser=by_role(critique="", revise="the draft"), on_violation="raise"), way, HELLO
        )

    assert stored(app) == ["hello", RULES.refusal]


def test_a_graph_that_began_at_an_earlier_checkpoint_remembers_what_left_from_there() -> None:
    app = remembering()
    guarded = guard(app)
    guarded.invoke(HELLO, THREAD)
    first = app.get_state(THREAD).config
    guarded.invoke(HELLO, THREAD)

    guarded.invoke({"messages": [("user", "another way")]}, first)

    assert stored(app) == ["hello", "better", "another way", "better"]


async def test_a_text_in_the_state_is_remembered_as_it_left() -> None:
    app = counting_app(InMemorySaver())

    guard(app).invoke({"question": "hello"}, THREAD)

    assert app.get_state(THREAD).values["answer"] == "better"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("own", [True, False])
async def test_in_a_node_a_graph_with_a_memory_of_its_own_remembers_what_left(way: str, own: bool) -> None:
    app = remembering()
    if own:
        app.checkpointer = True  # a memory in the outer graph's checkpointer, from turn to turn
    guarded, seen = guard(app), []

    def node(state: MessagesState, config: RunnableConfig) -> Any:
        output = guarded.invoke({"messages": state["messages"][-1:]}, config)
        seen.append([message.text for message in output["messages"]])
        return {"messages": output["messages"][-1:]}

    async def anode(state: MessagesState, config: RunnableConfig) -> Any:
        output = await guarded.ainvoke({"messages": state["messages"][-1:]}, config)
        seen.append([message.text for message in output["messages"]])
        return {"messages": output["messages"][-1:]}

    outer = outer_graph(node if way == "invoke" else anode, InMemorySaver())
    for _ in (1, 2):
        await call(outer, way, HELLO)

    assert stored(outer) == ["hello", "better"] * 2
    assert seen == [["hello", "better"], ["hello", "better"] * 2] if own else [["hello", "better"]] * 2


OWN: Any = {"configurable": {"thread_id": "own"}}
ON_ITS_OWN: dict[str, tuple[Callable[..., Any], Any]] = {
    "bound tags": (lambda app, **settings: guard(app.with_config(tags=["x"]), **settings), OWN),
    "tags bound behind": (lambda app, **settings: guard(app, **settings).with_config(tags=["x"]), OWN),
    "bound thread": (lambda app, **settings: guard(app.with_config(OWN), **settings), None),
    "bound thread, more given": (
        lambda app, **settings: guard(app.with_config(OWN), **settings),
        {"configurable": {"user": "ann"}},
    ),
}


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("binding", ON_ITS_OWN)
async def test_in_a_node_a_graph_on_a_thread_of_its_own_remembers_that(
    binding: str, way: str, mode: Any
) -> None:
    build, config = ON_ITS_OWN[binding]
    app = remembering()
    guarded = build(app, mode=mode)

    def node(state: MessagesState) -> Any:
        return {"messages": guarded.invoke(HELLO, config)["messages"][-1:]}

    async def anode(state: MessagesState) -> Any:
        return {"messages": (await guarded.ainvoke(HELLO, config))["messages"][-1:]}

    outer = outer_graph(node if way == "invoke" else anode, InMemorySaver())
    for _ in (1, 2):
        await call(outer, way, HELLO)

    left = "better" if mode == "enforce" else "the draft"
    assert stored(app, OWN) == ["hello", left] * 2


@pytest.mark.parametrize("bound", [{}, {"tags": ["x"]}])
def test_in_a_node_what_a_call_does_not_say_is_the_graphs_around(bound: Any) -> None:
    guarded = guard(asking_app().compile().with_config(**bound))

    def node(state: Asked) -> Any:
        return guarded.invoke(state, {"configurable": {"user": "ann"}})

    outer = StateGraph(Asked).add_node("app", node).add_edge(START, "app").compile(InMemorySaver())
    outer.invoke({"question": "hello"}, THREAD)

    assert outer.invoke(Command(resume=True), THREAD)["answer"] == "better"


class Notes(MessagesState):
    notes: Annotated[list[str], Topic(str, accumulate=True)]


def test_a_memory_that_cannot_be_changed_is_warned_of() -> None:
    graph = StateGraph(Notes)
    graph.add_node("answer", lambda state: {"messages": [AIMessage("the draft")], "notes": ["the draft"]})
    graph.add_edge(START, "answer")
    app = graph.compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    with pytest.warns(RuntimeWarning, match="in 'notes' nothing can be replaced.*ConstitutionalMiddleware"):
        assert guarded.invoke(HELLO, THREAD)["messages"][-1].text == "better"
    assert stored(app) == ["hello", "better"]


def test_a_graph_whose_last_nodes_are_several_remembers_what_left() -> None:
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [AIMessage("the draft")]})
    graph.add_node("log", lambda state: {})
    graph.add_edge(START, "answer")
    graph.add_edge(START, "log")
    app = graph.compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    for turn in (1, 2):
        guarded.invoke(HELLO, THREAD)
        assert stored(app) == ["hello", "better"] * turn


@pytest.mark.parametrize("way", WAYS)
async def test_at_a_breakpoint_nothing_is_judged_and_none_goes_on(way: str, tmp_path: Path) -> None:
    app = remembering(interrupt_before=["answer"])
    with open_log(tmp_path / "cai.db") as log:
        guarded = guard(app, log=log)
        for turn in (1, 2):
            stopped = await call(guarded, way, HELLO)
            log.flush()
            assert len(list(log.read(kind="trajectory"))) == turn - 1
            assert "better" not in str(stopped[-1] if isinstance(stopped, list) else stopped["messages"][-1:])
            await call(guarded, way, None)
            assert stored(app) == ["hello", "better"] * turn
        log.flush()
        told = [[text_of(m) for m in t.messages] for t in log.read(kind="trajectory")]

    assert told == [["hello"], ["hello", "better", "hello"]]


@pytest.mark.parametrize("way", WAYS)
async def test_where_a_graph_inside_stops_at_a_breakpoint_the_answer_is_judged(way: str) -> None:
    inner, stopped = remembering(interrupt_before=["answer"]), []

    def node(state: MessagesState) -> Any:
        stopped.append(inner.invoke(HELLO, {"configurable": {"thread_id": "inner"}}))
        return {"messages": [AIMessage("the draft")]}

    app = outer_graph(node, InMemorySaver())
    await call(guard(app), way, HELLO)

    assert [message.text for message in stopped[0]["messages"]] == ["hello"]
    assert stored(app) == ["hello", "better"]


def test_none_is_no_request_to_an_app_that_is_no_graph() -> None:
    with pytest.raises(DataError, match="NoneType"):
        guard(RunnableLambda(lambda _: "fine")).invoke(None)


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_an_output_of_version_2_stays_one(way: str) -> None:
    app = asking_app().compile(checkpointer=InMemorySaver())
    guarded = guard(app)

    async def typed(given: Any) -> GraphOutput[Any]:
        if way == "invoke":
            return cast("GraphOutput[Any]", guarded.invoke(given, THREAD, version="v2"))
        return cast("GraphOutput[Any]", await guarded.ainvoke(given, THREAD, version="v2"))

    paused = await typed({"question": "hello"})
    answered = await typed(Command(resume=True))

    assert isinstance(paused, GraphOutput)
    assert [each.value for each in paused.interrupts] == ["may I?"]
    assert answered == GraphOutput(value={"question": "hello", "answer": "better"})


@pytest.mark.parametrize(
    "one", [{"role": "user", "content": "hello"}, ("user", "hello"), HumanMessage("hello")]
)
def test_one_message_stands_for_a_list_of_it_as_in_langgraph(one: Any) -> None:
    app = remembering()

    output: Any = guard(app).invoke({"messages": one}, THREAD)

    assert [message.text for message in output["messages"]] == ["hello", "better"]


# --- handing over -------------------------------------------------------------------------------------


def team_of(
    said: str, bob: Any, saver: InMemorySaver | None = None, *, told: bool = True, **settings: Any
) -> Any:
    """An outer graph with a guarded `alice`, who says something and hands over to `bob`.

    Without `told` she hands over no word of hers.
    """
    call: Any = {"name": "to_bob", "args": {}, "id": "c1"}

    def alice(state: MessagesState) -> Any:
        message = AIMessage(said, id="a", tool_calls=[call])
        result = {"role": "tool", "content": "handed over", "tool_call_id": "c1"}
        messages = [message, *convert_to_messages([result])]
        update: Any = {"messages": [message, result]}
        goto = Send("bob", {"messages": messages if told else []})
        raise ParentCommand(Command(graph=Command.PARENT, goto=goto, update=update if told else {}))

    inner = StateGraph(MessagesState).add_node("alice", alice).add_edge(START, "alice").compile()
    outer = StateGraph(MessagesState).add_node("alice", guard(inner, **settings), destinations=("bob",))
    return outer.add_node("bob", bob).add_edge(START, "alice").compile(checkpointer=saver)


class Bob:
    """A node that keeps the texts that it is given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, state: MessagesState) -> Any:
        self.given = [message.text for message in state["messages"]]
        return {"messages": [AIMessage("Here is Bob.")]}


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize(
    ("said", "rounds", "left"),
    [("fine", 1, "fine"), ("the draft", 1, "better"), ("the draft", 0, RULES.refusal)],
)
async def test_what_is_said_beside_a_handoff_is_judged_and_logged(
    said: str, rounds: int, left: str, way: str, tmp_path: Path
) -> None:
    bob = Bob()
    with open_log(tmp_path / "cai.db") as log:
        output = await call(team_of(said, bob, log=log, max_rounds=rounds), way, HELLO, None)
        (record,) = logged(log)

    assert [message.text for message in output["messages"]] == ["hello", left, "handed over", "Here is Bob."]
    assert [each["id"] for each in output["messages"][1].tool_calls] == ["c1"]
    assert bob.given == [left, "handed over"]
    assert record.draft is not None
    assert (record.draft.answer.content, record.released and record.released.content) == (said, left)


def test_a_violation_beside_a_handoff_is_raised_where_the_policy_says_so() -> None:
    with pytest.raises(Violation):
        team_of("the draft", Bob(), on_violation="raise", max_rounds=0).invoke(HELLO)


def test_a_handoff_without_words_is_passed_on_and_not_logged(tmp_path: Path) -> None:
    bob = Bob()
    with open_log(tmp_path / "cai.db") as log:
        output = team_of("the draft", bob, told=False, log=log).invoke(HELLO)
        assert logged(log) == []

    assert [message.text for message in output["messages"]] == ["hello", "Here is Bob."]


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_a_handoff_whose_agent_says_nothing_is_passed_on_and_not_logged(mode: str, tmp_path: Path) -> None:
    judge = by_role(critique="hard to say")
    with open_log(tmp_path / "cai.db") as log:
        graph = team_of("", Bob(), log=log, mode=mode, critic=judge, reviser=judge)
        output = graph.invoke(HELLO)
        if (shadow := graph.nodes["alice"].bound.shadow) is not None:
            shadow.close()
        assert logged(log) == []

    assert [message.text for message in output["messages"]] == ["hello", "", "handed over", "Here is Bob."]
    assert judge.calls == []


async def test_in_shadow_mode_what_is_said_beside_a_handoff_is_logged(tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        graph = team_of("the draft", Bob(), log=log, mode="shadow")
        output = graph.invoke(HELLO)
        graph.nodes["alice"].bound.shadow.close()
        (record,) = logged(log)

    assert output["messages"][1].text == "the draft"
    assert (record.mode, record.outcome, record.error) == ("shadow", Outcome.REVISED, None)


def test_a_handoff_goes_on_when_a_person_has_decided_about_its_words() -> None:
    bob, saver = Bob(), InMemorySaver()
    graph = team_of("the draft", bob, saver, checkpointer=saver, on_violation="human", max_rounds=0)

    waiting = graph.invoke(HELLO, THREAD)
    assert bob.given == []
    output = graph.invoke(Command(resume={"decision": "edit", "answer": "By hand."}), THREAD)

    assert waiting["__interrupt__"][0].value["draft"] == "the draft"
    assert output["messages"][-1].text == "Here is Bob."
    assert bob.given == ["By hand.", "handed over"]
