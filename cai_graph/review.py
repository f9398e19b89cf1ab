"""People in the loop: where a request waits until a person has decided what leaves.

    `run` asks ──> Desk.lay_down   the request goes into a graph of one node, which interrupts
    resume     ──> Desk.settle     the node goes on with the decision; it is logged, and an answer leaves

Nothing of a waiting request is logged, and nothing is paid for again when it goes on: what lies in the
checkpointer is the app's output and, as JSON, the Trajectory as far as it has come. It lies in a thread of
its own, whose checkpoints have the caller's thread as metadata (`cai_thread`), and which is deleted once the
decision is in the log.

Inside a node of another LangGraph graph, an agent say, the interrupt is that graph's, and so is the
checkpointer. That graph runs the node again when it is resumed, and the request is found lying there. It may
run the node once more, since what came behind failed or paused; so the request goes on lying there with its
decision, until the thread comes to ask a person at a later step.
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
from cai_graph.calls import describe
from cai_graph.concurrency import bridge
from cai_graph.concurrency.context import within
from cai_graph.concurrency.together import to_the_end
from cai_graph.constitution import Constitution
from cai_graph.critic import failed_principles
from cai_graph.errors import AwaitsReview, ConfigError, DataError, RunError
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
"""What a person may decide: release what is proposed, an answer of his own, the draft, or the refusal."""

_LABELS = (Label.VIOLATES.value, Label.COMPLIES.value)

TYPE = "constitutional_review"
"""Tells the question apart from what else an agent may ask a person."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # no checkpointer takes one

_THREADS = UUID("a1d5a6f2-0c1e-5b0a-9a6e-6f6f4b1f5d10")
"""The namespace of the names of our threads. They are UUIDs, since some servers take no other."""


class Waiting(TypedDict, total=False):
    """A request that waits, as it lies in a checkpointer."""

    trajectory: str
    """As far as it has come: JSON as in a log, so that a later release reads it."""
    output: Any
    """What the app returned."""
    question: dict[str, Any]
    """What the person is shown."""
    proposed: str
    """Name of the answer that `approve` releases; see `Progress.answer`."""
    review: str
    """Id that the Review will have, so that logging it twice is logging it once."""
    decision: dict[str, Any]
    """What the person decided."""
    earlier: int
    """How many decisions the outer graph's node was resumed with before: they were about other drafts."""
    settled: str
    """At which step of the outer graph the decision came into the log."""


class Settled(NamedTuple):
    """A request that a person has decided about."""

    output: Any
    """What the app returned."""
    trajectory: Trajectory
    """The record, as it was logged."""
    released: Message | None
    """The message that leaves."""


_lock = threading.Lock()
_busy: set[str] = set()
"""Keys of the requests that are being laid down or settled."""


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
    """Return the error that says what an output of a paused app waits for."""
    for each in output.get("__interrupt__", ()):
        if isinstance(each.value, Mapping) and each.value.get("type") == TYPE:
            return AwaitsReview(each.value)
    return RunError("the app waits for a person, so there is no answer yet; use ainvoke, and resume it")


def check_checkpointer(face: str, checkpointer: object, *, asks: bool) -> None:
    """Raise ConfigError where a checkpointer is missing, is none, or cannot delete what waited."""
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
    """Where an app's requests of one thread, or of one node's task in an outer graph, wait for a person."""

    plan: Plan
    """Judges, refuses, logs."""
    shape: Shape
    """Where the answer is in the app's output."""
    checkpointer: Checkpointer
    """Keeps what waits."""
    thread: str
    """Name of the caller's thread."""
    key: str
    """Thread in which the request lies."""
    node: RunnableConfig | None
    """Configuration of the outer graph's node; None where no graph stands around the request."""
    caller: bridge.Caller | None
    """The thread that waits for the answer, where it is a synchronous one."""

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
        """Return the desk of a request; `names` are those that the app was given.

        Raises:
            ConfigError: the thread, or the checkpointer of the outer graph, is missing, or that checkpointer
                cannot delete.
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
            # A node that runs again asks the same, and has the same task; its neighbours ask something else.
            asked = [[m.role, text_of(m)] for m in messages]
            key = _key(thread, given.get("checkpoint_ns"), plan.constitution.digest, asked)
        else:  # a thread may have several apps; what waits outlives amendments of their constitutions
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
        if node is None:  # an earlier release had one place for all apps of a thread
            before = replace(desk, key=_key(thread))
            lies = await before.lying()
            if lies is not None and lies["question"]["constitution"] == plan.constitution.name:
                return before
        return desk

    async def lying(self) -> Waiting | None:
        """Return the request that waits here, or None."""
        machine, config = self._machine, self._config
        snapshot = await as_owner(
            self.caller, lambda: machine.get_state(config), lambda: machine.aget_state(config)
        )
        return cast("Waiting", snapshot.values) if snapshot.values.get("question") else None

    async def lay_down(self, ending: Ending, output: Any) -> Waiting:
        """Keep a request until a person has decided; who is cancelled meanwhile is held until it is kept.

        Raises:
            GraphInterrupt: it is kept, and pauses the outer graph.
            RunError: the checkpointer cannot keep it; its Trajectory is logged.
        """
        waiting, pause = await to_the_end(self._kept(ending, output))
        if pause is not None:
            raise pause
        return waiting

    async def _kept(self, ending: Ending, output: Any) -> tuple[Waiting, GraphInterrupt | None]:
        """Keep a request, and return it with the pause of the outer graph; raises as `lay_down`."""
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
            if not isinstance(error, Exception):  # all that runs on the loop is cancelled
                raise
            raise RunError(
                f"the request could not be kept for a person: {error}", trajectory_id=trajectory.id
            ) from error
        return waiting, pause

    @contextmanager
    def _alone(self, otherwise: RunError) -> Iterator[None]:
        """Keep this process from laying down or settling a thread's request twice at once."""
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
        """Return what a LangGraph graph returns that waits, where the app returns a dict as a graph does."""
        if not isinstance(output, Mapping):
            return None
        question = waiting["question"]
        return {"__interrupt__": [Interrupt(value=question, id=question["trajectory_id"])]}

    async def settle(self, waiting: Waiting, input: object = None) -> Settled:
        """Log what a person decided about a request, and return what leaves.

        `input` is the caller's: the decision, where it resumes. Inside an outer graph a request that was
        decided before is settled again, as it was.

        Raises:
            AwaitsReview: there is no decision yet.
            GraphInterrupt: the same, inside an outer graph.
            DataError: the decision cannot be read; the request goes on waiting.
            LogError: it could not be logged and `on_log_error` is `raise`; the request goes on waiting.
            RunError: another call, of this process or another, has decided about it already; or a class of
                the app's output is not loaded here, and the request goes on waiting.
        """
        output = self.shape.unpack(waiting["output"])
        required, decision = self.shape.form(output), waiting.get("decision")
        earlier = decision is not None
        if decision is None:
            decision = await self._decision(waiting, required, input)
        elif self.node is not None:
            # It stays, and is taken from the graph, whose node would else get it for its own next question.
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
        """Delete a request that is settled; inside an outer graph it stays for a node that runs again."""
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
        """Delete what was settled in this thread at other steps of the outer graph: no node asks for it."""
        keeper, ours = self.checkpointer, {"cai_thread": self.thread}

        async def awaited() -> list[CheckpointTuple]:
            return [each async for each in keeper.alist(None, filter=ours)]

        try:
            found = await as_owner(self.caller, lambda: [*keeper.list(None, filter=ours)], awaited)
            for each in found:
                settled = each.checkpoint["channel_values"].get("settled", self._step)
                if settled != self._step:
                    await self._delete(each.config["configurable"]["thread_id"])
        except Exception as error:  # the request waits all the same
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
        """Names the step at which the outermost graph is."""
        steps = ((self.node or {}).get("configurable") or {}).get(STEPS) or {}
        return str(steps.get(""))

    async def _decision(self, waiting: Waiting, required: Form | None, input: object) -> dict[str, Any]:
        """Return what a person says now; raises as `settle`."""
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
        """Return what the outer graph was resumed with, or pause it."""
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
        """Return how many decisions the outer graph has that are not about this question, and its pause."""

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
        """Ask something of the outer graph, as its node does."""

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
    """Return what the person is shown, as JSON."""
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
    """Return what is wrong with a decision, or None."""
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
    """Return the record of a request that a person decided about, and his Review."""
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
    """Return what a person says of the draft under a principle, or else an aim."""
    if about in constitution:
        return Verdict(label=Label(label), principle=about, read_by="human")
    return Verdict(label=Label(label), aim=about, read_by="human")
