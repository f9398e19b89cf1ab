"""Human review: keeps a request in a checkpointer until a person has decided which answer is released.

    `run` asks ──> Desk.lay_down   stores the request in a graph of one node, which interrupts
    resume     ──> Desk.settle     resumes the node with the decision, logs it, and releases an answer

A waiting request is not logged, and resuming it repeats no model call: the checkpointer contains the app's
output and, as JSON, the Trajectory so far. They are in a thread of their own, whose checkpoints have the
caller's thread as metadata (`cai_thread`), and which is deleted once the decision is in the log.

Inside a node of another LangGraph graph, such as an agent, that graph's interrupt and checkpointer are used.
When it is resumed, it runs the node again, which finds the stored request. It may run the node yet another
time, if a later step failed or paused; so the request stays stored with its decision until the thread asks a
person at a later step.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple, TypedDict, TypeVar, cast
from uuid import UUID, uuid5

import msgspec
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.errors import GraphInterrupt
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, Interrupt, interrupt

from cai_graph.app.shape import Shape
from cai_graph.app.wrapped import CHECKPOINTER, STEPS, TASK
from cai_graph.concurrency import bridge
from cai_graph.concurrency.context import within
from cai_graph.concurrency.together import to_the_end
from cai_graph.constitution import Constitution
from cai_graph.critic import failed_principles
from cai_graph.errors import AwaitsReview, ConfigError, DataError, RunError
from cai_graph.failures import describe
from cai_graph.log.store import Duplicate
from cai_graph.memory.memory import as_owner
from cai_graph.request.committing import commit
from cai_graph.request.form import Form
from cai_graph.request.plan import Plan
from cai_graph.request.policy import Progress
from cai_graph.request.revision import kept_calls
from cai_graph.run import Ending
from cai_graph.trajectory import (
    Label,
    Message,
    Outcome,
    Review,
    Trajectory,
    Verdict,
    decode,
    encode,
    new_id,
    now,
    text_of,
)

__all__ = ["Checkpointer", "Desk", "Settled", "awaits", "check_checkpointer"]

logger = logging.getLogger("cai_graph")

T = TypeVar("T")

Checkpointer = BaseCheckpointSaver[Any]


DECISIONS = ("approve", "edit", "draft", "reject")
"""A person's options: release the proposed answer, an edited one, the draft, or the refusal."""

_LABELS = (Label.VIOLATES.value, Label.COMPLIES.value)

TYPE = "constitutional_review"
"""Distinguishes our question from other interrupts of an agent."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # checkpointers cannot store them

_THREADS = UUID("a1d5a6f2-0c1e-5b0a-9a6e-6f6f4b1f5d10")
"""The UUID namespace of our threads' names, which are UUIDs because some servers accept no others."""


class Waiting(TypedDict, total=False):
    """A waiting request, as it is stored in a checkpointer."""

    trajectory: str
    """The Trajectory so far: JSON as in a log, so that later releases can read it."""
    output: Any
    """The app's output, packed by `Shape.pack`."""
    question: dict[str, Any]
    """The question that the person is shown; see `_question`."""
    proposed: str
    """Name of the answer that `approve` releases; see `Progress.answer`."""
    review: str
    """Id of the future Review, fixed so that logging it twice stores it once."""
    decision: dict[str, Any]
    """The person's decision."""
    earlier: int
    """How many decisions the outer graph's node was resumed with before, which were about other drafts."""
    settled: str
    """The step of the outer graph at which the decision was logged."""


class Settled(NamedTuple):
    """A request about which a person has decided."""

    output: Any
    """The app's output."""
    trajectory: Trajectory
    """The Trajectory, as it was logged."""
    released: Message | None
    """The released message."""


_lock = threading.Lock()
_busy: set[str] = set()
"""Keys of the requests that are being stored or settled."""


def review(state: Waiting) -> Waiting:
    """Wait for a person."""
    return Waiting(decision=interrupt(state["question"]))


@cache
def _compiled() -> CompiledStateGraph[Waiting, None, Waiting, Waiting]:
    builder = StateGraph(Waiting)
    builder.add_node("review", review)
    builder.add_edge(START, "review")
    builder.add_edge("review", END)
    return builder.compile(name="cai_graph_review")


def awaits(output: Any) -> RunError:
    """Return the error for callers that need an answer, given the output of a paused app."""
    for each in output.get("__interrupt__", ()):
        if isinstance(each.value, Mapping) and each.value.get("type") == TYPE:
            return AwaitsReview(each.value)
    return RunError("the app waits for a person, so there is no answer yet; use ainvoke, and resume it")


def check_checkpointer(face: str, checkpointer: object, *, asks: bool) -> None:
    """Raise ConfigError if a checkpointer is missing, of a wrong type, or cannot delete settled requests."""
    if checkpointer is None and asks:
        raise ConfigError(
            f"policy 'human' waits in a checkpointer: {face[:-1]}, checkpointer=…), for example LangGraph's "
            "SqliteSaver or PostgresSaver; InMemorySaver forgets what waits when the process ends"
        )
    if checkpointer is not None and not isinstance(checkpointer, BaseCheckpointSaver):
        raise ConfigError(f"checkpointer is a LangGraph checkpointer, found {type(checkpointer).__name__}")
    if checkpointer is not None and asks:
        _check_deletes(checkpointer)


def _check_deletes(checkpointer: Checkpointer) -> None:
    kind, base = type(checkpointer), BaseCheckpointSaver
    if kind.delete_thread is base.delete_thread and kind.adelete_thread is base.adelete_thread:
        raise ConfigError(
            f"policy 'human' deletes from its checkpointer what was decided, and {kind.__name__} has no "
            "delete_thread() and no adelete_thread(); add one of them"
        )


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Stores the request of a thread, or of a node's task in an outer graph, until a person has decided."""

    plan: Plan
    """How requests are judged, refused and logged."""
    shape: Shape
    """Where the answer is in the app's output."""
    checkpointer: Checkpointer
    """Stores the waiting requests."""
    thread: str
    """Name of the caller's thread."""
    key: str
    """Name of the checkpointer's thread in which the request is stored."""
    node: RunnableConfig | None
    """Configuration of the outer graph's node; None outside any graph."""
    caller: bridge.Caller | None
    """The OS thread that waits for the answer; None under an asynchronous call."""

    @classmethod
    async def of(
        cls,
        plan: Plan,
        shape: Shape,
        config: RunnableConfig,
        messages: Sequence[Message],
        names: Sequence[str],
        checkpointer: Checkpointer | None,
        caller: bridge.Caller | None,
    ) -> Desk:
        """Return the desk of a request; `names` are the names that the app was given.

        Raises:
            ConfigError: no thread is configured, or the outer graph has no checkpointer, or one that cannot
                delete threads.
        """
        around = var_child_runnable_config.get() or RunnableConfig()
        node = next((c for c in (config, around) if TASK in (c.get("configurable") or {})), None)
        given = (node or config).get("configurable") or {}
        if node is not None:
            checkpointer = given.get(CHECKPOINTER)
            if not isinstance(checkpointer, BaseCheckpointSaver):
                raise ConfigError(
                    "policy 'human' pauses the graph that stands around the request, so that graph needs a "
                    "checkpointer: compile(checkpointer=…), or create_agent(…, checkpointer=…)"
                )
            _check_deletes(checkpointer)
        thread = given.get("thread_id")
        if checkpointer is None or thread is None:
            raise ConfigError(
                "policy 'human' needs to know which thread waits for a decision: give a config such as "
                '{"configurable": {"thread_id": "1"}}'
            )
        if node is not None:
            # A node that runs again has the same task and messages; other nodes have different ones.
            asked = [[m.role, text_of(m)] for m in messages]
            key = _key(thread, given.get("checkpoint_ns"), plan.constitution.digest, asked)
        else:  # by name: apps may share a thread, and an amendment changes the digest
            key = _key(thread, names, plan.constitution.name)
        desk = cls(
            plan=plan,
            shape=shape,
            checkpointer=checkpointer,
            thread=str(thread),
            key=key,
            node=node,
            caller=caller,
        )
        if node is None:  # an earlier release used one key for all apps of a thread
            before = replace(desk, key=_key(thread))
            lies = await before.lying()
            if lies is not None and lies["question"]["constitution"] == plan.constitution.name:
                return before
        return desk

    async def lying(self) -> Waiting | None:
        """Return the waiting request, or None."""
        machine, config = self._machine, self._config
        snapshot = await as_owner(
            self.caller, lambda: machine.get_state(config), lambda: machine.aget_state(config)
        )
        return cast("Waiting", snapshot.values) if snapshot.values.get("question") else None

    async def lay_down(self, ending: Ending, output: Any) -> Waiting:
        """Store a request until a person has decided; a cancellation takes effect only after it is stored.

        Raises:
            GraphInterrupt: the request is stored, and the outer graph must pause.
            RunError: the checkpointer cannot store it; its Trajectory is logged as failed.
        """
        waiting, pause = await to_the_end(self._kept(ending, output))
        if pause is not None:
            raise pause
        return waiting

    async def _kept(self, ending: Ending, output: Any) -> tuple[Waiting, GraphInterrupt | None]:
        """Store a request; return it with the interrupt of the outer graph, if any. Raises as `lay_down`."""
        trajectory = ending.trajectory
        assert trajectory.draft is not None
        pause: GraphInterrupt | None = None
        try:
            progress = Progress(trajectory.draft, list(trajectory.rounds))
            proposed = progress.best(self.plan.constitution)
            question = _question(trajectory, text_of(progress.answer(proposed)), ending.asks or "")
            waiting = Waiting(
                trajectory=encode(trajectory).decode(),
                output=self.shape.pack(output),
                question={**question, "thread_id": self.thread},
                proposed=proposed,
                review=new_id(),
            )
            if self.node is not None:
                waiting["earlier"], pause = await self._unasked(waiting["question"])
                await self._clear()
            with self._alone(self._late()):
                if await self.lying() is not None:
                    raise self._late()
                await self._run(waiting)
        except BaseException as error:
            ended = msgspec.structs.replace(trajectory, error=describe(error))
            await commit(self.plan, ended, failed=True)
            if not isinstance(error, Exception):  # such as a cancellation of the whole loop
                raise
            raise RunError(
                f"the request could not be kept for a person: {error}", trajectory_id=trajectory.id
            ) from error
        return waiting, pause

    @contextmanager
    def _alone(self, otherwise: RunError) -> Iterator[None]:
        """Lock the request for the body; raise `otherwise` if this process already stores or settles it."""
        with _lock:
            if self.key in _busy:
                raise otherwise
            _busy.add(self.key)
        try:
            yield
        finally:
            with _lock:
                _busy.discard(self.key)

    def _late(self) -> RunError:
        return RunError(f"another request of thread {self.thread!r} came to wait meanwhile")

    def paused(self, waiting: Waiting, output: Any) -> dict[str, Any] | None:
        """Return the output of a paused LangGraph graph if the app returns a dict as graphs do, or None."""
        if not isinstance(output, Mapping):
            return None
        question = waiting["question"]
        return {"__interrupt__": [Interrupt(value=question, id=question["trajectory_id"])]}

    async def settle(self, waiting: Waiting, input: object = None) -> Settled:
        """Log a person's decision about a request, and return the released answer.

        `input` is the caller's input: a Command with the decision, if it resumes the request. Inside an outer
        graph, a request that was decided before is settled again in the same way.

        Raises:
            AwaitsReview: there is no decision yet.
            GraphInterrupt: there is no decision yet, inside an outer graph.
            DataError: the decision is invalid; the request keeps waiting.
            LogError: it could not be logged and `on_log_error` is `raise`; the request keeps waiting.
            RunError: another call, of this process or another, has already decided about it; or a class of
                the app's output is not loaded in this process, and the request keeps waiting.
        """
        output = self.shape.unpack(waiting["output"])
        required, decision = self.shape.form(output), waiting.get("decision")
        earlier = decision is not None
        if decision is None:
            decision = await self._decision(waiting, required, input)
        elif self.node is not None:
            # The decision stays stored. Consume it from the graph as well: otherwise the node's own next
            # interrupt would receive it.
            with suppress(GraphInterrupt):
                await self._asked(waiting, required)
        decided = RunError(
            f"another call has decided what leaves in thread {self.thread!r}",
            trajectory_id=waiting["question"]["trajectory_id"],
        )
        with self._alone(decided):
            lies = await self.lying()
            if lies is None or (not earlier and "decision" in lies):
                raise decided
            if not earlier:
                await self._run(Command(resume=decision))
            trajectory, record = _settled(waiting, decision, self.plan)
            try:
                if "settled" not in lies:
                    await commit(self.plan, trajectory)
                    await commit(self.plan, record)
                    await self._close()
            except Duplicate as error:
                await self._delete(self.key)
                raise decided from error
        assert trajectory.released is not None
        return Settled(output, trajectory, trajectory.released)

    async def _close(self) -> None:
        """Delete a settled request; inside an outer graph mark it settled, as its node may run again."""
        if self.node is None:
            await self._delete(self.key)
            return
        machine, config, settled = self._machine, self._config, Waiting(settled=self._step)
        await as_owner(
            self.caller,
            lambda: machine.update_state(config, settled, "review"),
            lambda: machine.aupdate_state(config, settled, "review"),
        )

    async def _clear(self) -> None:
        """Delete the requests of this thread that were settled at other steps of the outer graph."""
        keeper, ours = self.checkpointer, {"cai_thread": self.thread}

        async def awaited() -> list[CheckpointTuple]:
            return [each async for each in keeper.alist(None, filter=ours)]

        try:
            found = await as_owner(self.caller, lambda: [*keeper.list(None, filter=ours)], awaited)
            for each in found:
                settled = each.checkpoint["channel_values"].get("settled", self._step)
                if settled != self._step:
                    await self._delete(each.config["configurable"]["thread_id"])
        except Exception as error:  # it does not keep the request from waiting
            why = describe(error)
            logger.warning("what was decided in thread %r stays in the checkpointer: %s", self.thread, why)

    async def _delete(self, key: str) -> None:
        keeper, kind, base = self.checkpointer, type(self.checkpointer), BaseCheckpointSaver
        if kind.delete_thread is base.delete_thread:
            await keeper.adelete_thread(key)
        elif kind.adelete_thread is base.adelete_thread and self.caller is None:
            await asyncio.to_thread(keeper.delete_thread, key)
        else:
            await as_owner(self.caller, lambda: keeper.delete_thread(key), lambda: keeper.adelete_thread(key))

    @property
    def _step(self) -> str:
        """The current step of the outermost graph."""
        steps = ((self.node or {}).get("configurable") or {}).get(STEPS) or {}
        return str(steps.get(""))

    async def _decision(self, waiting: Waiting, required: Form | None, input: object) -> dict[str, Any]:
        """Return the person's decision from the input or the outer graph; raises as `settle`."""
        said: Mapping[str, Any]
        if self.node is not None:
            said = await self._asked(waiting, required)
        elif not isinstance(input, Command):
            raise AwaitsReview(waiting["question"])
        elif (problem := _problem(input.resume, required, self.plan.constitution)) is not None:
            raise DataError(problem)
        else:
            said = cast("Mapping[str, Any]", input.resume)
        return {**said, "at": now().isoformat()}

    async def _asked(self, waiting: Waiting, required: Form | None) -> dict[str, Any]:
        """Return the decision with which the outer graph was resumed, or interrupt it."""
        question, rules = waiting["question"], self.plan.constitution

        def ask() -> dict[str, Any]:
            for _ in range(waiting.get("earlier", 0)):
                interrupt(question)
            said = interrupt(question)
            while (problem := _problem(said, required, rules)) is not None:
                said = interrupt({**question, "problem": problem})
            return dict(said)

        return await self._in_the_node(ask)

    async def _unasked(self, question: Mapping[str, Any]) -> tuple[int, GraphInterrupt]:
        """Return how many earlier resume values, about other questions, the node has, and the interrupt."""

        def ask() -> tuple[int, GraphInterrupt]:
            earlier = 0
            try:
                while True:
                    interrupt(question)
                    earlier += 1
            except GraphInterrupt as pause:
                return earlier, pause

        return await self._in_the_node(ask)

    async def _in_the_node(self, ask: Callable[[], T]) -> T:
        """Call `ask` as the outer graph's node would: under its configuration, in the caller's thread."""

        def asked() -> T:
            with within(self.node):
                return ask()

        return asked() if self.caller is None else await self.caller.call(asked)

    @property
    def _machine(self) -> CompiledStateGraph[Waiting, None, Waiting, Waiting]:
        return _compiled().copy({"checkpointer": self.checkpointer})

    @property
    def _config(self) -> RunnableConfig:
        return RunnableConfig(configurable={"thread_id": self.key}, metadata={"cai_thread": self.thread})

    async def _run(self, given: Waiting | Command[Any]) -> None:
        machine, config = self._machine, self._config
        await as_owner(
            self.caller,
            lambda: machine.invoke(given, config, durability="sync"),
            lambda: machine.ainvoke(given, config, durability="sync"),
        )


def _key(*place: Any) -> str:
    return str(uuid5(_THREADS, json.dumps(place, default=str)))


def _question(trajectory: Trajectory, proposed: str, reason: str) -> dict[str, Any]:
    """Return the question that the person is shown, as JSON."""
    assert trajectory.draft is not None
    answer = trajectory.draft.answer
    verdicts = trajectory.rounds[0].critique.verdicts if trajectory.rounds else ()
    question = {
        "type": TYPE,
        "trajectory_id": trajectory.id,
        "constitution": trajectory.constitution.name,
        "reason": reason,
        "request": trajectory.prompt,
        "draft": text_of(answer),
        "tool_calls": msgspec.to_builtins(answer.tool_calls),
        "proposed": proposed,
        "findings": [
            msgspec.to_builtins(verdict) for verdict in verdicts if verdict.label is not Label.COMPLIES
        ],
        "decisions": list(DECISIONS),
    }
    shown: dict[str, Any] = json.loads(_LONE_SURROGATE.sub("?", json.dumps(question, ensure_ascii=False)))
    return shown


_FORM = (
    '{"decision": "approve" | "edit" | "draft" | "reject", "answer": …, '
    '"verdicts": {PRINCIPLE: "VIOLATES" | "COMPLIES"}, "reviewer": …, "note": …}'
)
_KEYS = ("decision", "answer", "verdicts", "reviewer", "note")


def _problem(said: Any, required: Form | None, constitution: Constitution) -> str | None:
    """Return the fault of an invalid decision; None if it is valid."""
    if not isinstance(said, Mapping):
        return f"a decision is a dict, {_FORM}; found {type(said).__name__}"
    if said.get("decision") not in DECISIONS:
        return f"decision is one of {', '.join(DECISIONS)}, found {said.get('decision')!r}"
    if unknown := [key for key in said if key not in _KEYS]:
        return f"a decision has the form {_FORM}; found also {', '.join(map(repr, unknown))}"
    verdicts = said.get("verdicts")
    if verdicts is not None:
        if not isinstance(verdicts, Mapping):
            return f"verdicts is a dict of labels by principle or aim, found {verdicts!r}"
        known = dict.fromkeys(name for p in constitution.principles for name in (p.id, p.aim))
        if strange := [name for name in verdicts if name not in known]:
            return f"verdicts: {constitution.name!r} has {', '.join(known)}, not {strange[0]!r}"
        if wrong := [label for label in verdicts.values() if label not in _LABELS]:
            return f"verdicts: a label is {' or '.join(_LABELS)}, found {wrong[0]!r}"
    for key in ("answer", "reviewer", "note"):
        if said.get(key) is not None and not (isinstance(said[key], str) and said[key].strip()):
            return f"{key} is text, found {said[key]!r}"
    if (said["decision"] == "edit") != (said.get("answer") is not None):
        return "the decision 'edit', and no other, comes with the answer that is to leave: 'answer'"
    if said["decision"] == "edit" and required is not None:
        try:
            required.read(said["answer"])
        except ValueError as error:
            return f"the answer is a structured one, and this is not: {error}"
    return None


def _settled(waiting: Waiting, decision: Mapping[str, Any], plan: Plan) -> tuple[Trajectory, Review]:
    """Return the Trajectory of a request that a person decided about, and the Review."""
    trajectory = decode(waiting["trajectory"])
    assert isinstance(trajectory, Trajectory)
    assert trajectory.draft is not None
    progress = Progress(trajectory.draft, list(trajectory.rounds))
    own: Message | None = None
    if decision["decision"] == "edit":
        draft = trajectory.draft.answer
        failed = (
            failed_principles(trajectory.rounds[0].critique, plan.constitution) if trajectory.rounds else []
        )
        own = Message(
            role="assistant",
            content=decision["answer"],
            id=draft.id,
            tool_calls=kept_calls(draft, failed),
        )
        changes: dict[str, Any] = {"outcome": Outcome.REVISED, "released": own, "released_from": "human"}
    elif decision["decision"] == "reject":
        refusal = plan.constitution.refusal_in(plan.settings.language)
        message = Message(role="assistant", content=refusal)
        changes = {"outcome": Outcome.REFUSED, "released": message, "released_from": "refusal"}
    else:
        of = "draft" if decision["decision"] == "draft" else waiting["proposed"]
        changes = {
            "outcome": Outcome.EXHAUSTED,
            "released": progress.answer(of),
            "released_from": "draft" if of == "draft" else "revision",
        }
    record = Review(
        id=waiting["review"],
        at=datetime.fromisoformat(decision["at"]),
        trajectory_id=trajectory.id,
        reviewer=decision.get("reviewer") or "unnamed",
        decision=decision["decision"],
        answer=own,
        verdicts=tuple(
            _verdict(about, label, plan.constitution)
            for about, label in (decision.get("verdicts") or {}).items()
        ),
        note=decision.get("note"),
    )
    return msgspec.structs.replace(trajectory, **changes), record


def _verdict(about: str, label: str, constitution: Constitution) -> Verdict:
    """Return a person's Verdict on the draft, under a principle or else an aim."""
    if about in constitution:
        return Verdict(label=Label(label), principle=about, read_by="human")
    return Verdict(label=Label(label), aim=about, read_by="human")
