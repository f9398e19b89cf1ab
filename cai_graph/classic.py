"""ConstitutionalChain with the name and signature of langchain-classic's class, for existing code.

    from cai_graph.classic import ConstitutionalChain  # was: from langchain_classic.chains import …

The calls, keys and return values are those of langchain-classic 1.0's class. The answers come from the graph:
every principle is judged in one call, a revision is released only where it is better, and all of it is
logged. docs/moving-from-constitutional-chain.md lists the intended differences. langchain-classic need not be
installed; only `get_principles` reads from it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import BaseModel

from cai_graph.app.shape import Shape
from cai_graph.constitution import Constitution, load
from cai_graph.critic import failed_principles
from cai_graph.errors import ConfigError, DataError, RunError
from cai_graph.faces.guard import Guard
from cai_graph.faces.runnable import ConstitutionalRunnable
from cai_graph.trajectory import Label, Message, Trajectory, shown_of

__all__ = ["ConstitutionalChain", "ConstitutionalPrinciple"]

_MOVED = {
    "critique_prompt": "say what to look for in each principle's critique_request",
    "revision_prompt": "say what to mend in each principle's revision_request",
    "memory": "give the history to the chain as one of its inputs",
    "verbose": "`cai log show ID` prints every step",
    "callbacks": "give them with the call: invoke(inputs, {'callbacks': …})",
    "tags": "give them with the call: invoke(inputs, {'tags': …})",
    "metadata": "give it with the call: invoke(inputs, {'metadata': …})",
}
"""Arguments of the old class that are not accepted -> what to do instead."""


class ConstitutionalPrinciple(BaseModel):
    """A principle with langchain-classic's fields. `cai_graph.Principle` has more."""

    critique_request: str
    """What the critic looks for in an answer."""
    revision_request: str
    """How an answer that fails is rewritten."""
    name: str = "Constitutional Principle"
    """Its name, from which its id in the log is made."""


class ConstitutionalChain(Runnable[Any, dict[str, Any]]):
    """A chain whose answers are judged by principles and revised where they fail. Made by `from_llm`."""

    def __init__(
        self, guarded: ConstitutionalRunnable[Any, dict[str, Any]], *, return_intermediate_steps: bool
    ) -> None:
        self.guarded = guarded
        self.return_intermediate_steps = return_intermediate_steps
        self.input_keys = _input_keys(guarded.app)

    @classmethod
    def from_llm(
        cls,
        llm: str | BaseChatModel,
        chain: Runnable[Any, Any],
        *,
        constitutional_principles: object,
        return_intermediate_steps: bool = False,
        **options: Any,
    ) -> ConstitutionalChain:
        """Return `chain` under the principles, judged and revised by `llm`.

        As in the old class, the critic sees the chain's own filled-in prompt as the user's request; for a
        chain that does not begin with a prompt, the chain's input.

        Args:
            llm: chat model, or a model spec such as "openai:gpt-5-mini".
            chain: any Runnable whose output has one answer in it, an LLMChain included.
            constitutional_principles: a list of principles, ours or langchain-classic's, or anything else
                that `load` reads: the name of a built-in constitution, a file, a Constitution.
            return_intermediate_steps: whether `initial_output` and `critiques_and_revisions` are returned.
            options: arguments and settings of `constitutional`, such as `log=None`, `on_violation="open"`
                or `input_key="question"` (the critic then sees that input instead of the whole prompt).

        Raises:
            ConfigError: an argument cannot work, or is one of the old class that is not accepted; the message
                says what to do instead.
            ConstitutionError: the principles cannot be read, or there is none.
            LogError: the log cannot be opened.
        """
        for name, instead in _MOVED.items():
            if name in options:
                raise ConfigError(f"ConstitutionalChain.from_llm() takes no {name!r} any more; {instead}")
        prompt = None if "input_key" in options else _prompt(chain)
        outputs: Sequence[str] = getattr(chain, "output_keys", ())
        if len(outputs) == 1:  # an LLMChain, or another Chain of langchain-classic, names its answer's key
            options = {"output_key": outputs[0], **options}
        options = {"critic": llm, "reviser": llm, **options}
        guard = Guard.of(chain, constitution=load(constitutional_principles), **options)
        shape = _Steps(**vars(guard.shape), prompt=prompt, constitution=guard.plan.constitution)
        guarded = ConstitutionalRunnable[Any, dict[str, Any]](dataclasses.replace(guard, shape=shape))
        guarded.name = cls.__name__
        return cls(guarded, return_intermediate_steps=return_intermediate_steps)

    @classmethod
    def get_principles(cls, names: Sequence[str] | None = None) -> list[ConstitutionalPrinciple]:
        """Return langchain-classic's principles with these names, in the same order; None: all of them.

        Raises:
            ConfigError: langchain-classic is not installed, or has no principle of that name.
        """
        try:
            from langchain_classic.chains.constitutional_ai.principles import PRINCIPLES
        except ImportError as error:
            raise ConfigError(
                "the principles that get_principles() names are langchain-classic's, which is not "
                "installed; pip install langchain-classic, or use a constitution of ours: "
                'from_llm(…, constitutional_principles="harmlessness")'
            ) from error
        names = list(PRINCIPLES) if names is None else names
        for name in names:
            if name not in PRINCIPLES:
                close = difflib.get_close_matches(str(name), PRINCIPLES, n=1)
                meant = f"did you mean {close[0]!r}?" if close else "get_principles() lists them all"
                raise ConfigError(f"langchain-classic has no principle {name!r}; {meant}")
        return [ConstitutionalPrinciple(**PRINCIPLES[name].model_dump()) for name in names]

    @property
    def output_keys(self) -> list[str]:
        """The keys that are added to the inputs."""
        steps = ["critiques_and_revisions", "initial_output"] if self.return_intermediate_steps else []
        return ["output", *steps]

    def invoke(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        return_only_outputs: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Run the chain, and return its outputs with the released answer.

        Args:
            input: the chain's inputs by key, or the value of its only one.
            config: LangChain's configuration.
            return_only_outputs: whether to return the outputs without the inputs.
            kwargs: passed on to the chain.

        Returns:
            The inputs, and `output` (str), the released answer. With `return_intermediate_steps` also
            `initial_output` (str), the chain's own answer, and `critiques_and_revisions` (list of tuples of
            two str), for each principle in order: its critique, which ends in "Critique needed." or "No
            critique needed." unless the verdict could not be read; and the answer that replaced the chain's
            own because of that principle, or "" where none did.

        Raises:
            DataError: an input key that the chain needs is missing.
            RunError: by the policies, an error is raised instead of an answer.
        """
        inputs = self._inputs(input)
        return self._outputs(inputs, self.guarded.invoke(inputs, config, **kwargs), return_only_outputs)

    async def ainvoke(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        return_only_outputs: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Run the chain asynchronously; see `invoke`."""
        inputs = self._inputs(input)
        steps = await self.guarded.ainvoke(inputs, config, **kwargs)
        return self._outputs(inputs, steps, return_only_outputs)

    def __call__(
        self, inputs: Any, return_only_outputs: bool = False, **config: Unpack[RunnableConfig]
    ) -> dict[str, Any]:
        """Call `invoke`, which replaces this old form."""
        return self.invoke(inputs, config, return_only_outputs=return_only_outputs)

    async def acall(
        self, inputs: Any, return_only_outputs: bool = False, **config: Unpack[RunnableConfig]
    ) -> dict[str, Any]:
        """Call `ainvoke`, which replaces this old form."""
        return await self.ainvoke(inputs, config, return_only_outputs=return_only_outputs)

    def run(self, *args: Any, **inputs: Any) -> str:
        """Return the answer's text alone, for one value or for the inputs by name.

        The keyword arguments `callbacks`, `tags` and `metadata` are part of LangChain's configuration, not
        inputs.

        Raises:
            ConfigError: both or neither are given, or `return_intermediate_steps` is set.
        """
        return str(self.invoke(*self._only(args, inputs))["output"])

    async def arun(self, *args: Any, **inputs: Any) -> str:
        """Return the answer's text alone; see `run`."""
        return str((await self.ainvoke(*self._only(args, inputs)))["output"])

    def _inputs(self, given: Any) -> Any:
        """Return the chain's inputs; a single value becomes the value of its only key."""
        lone = len(self.input_keys) == 1 and not isinstance(given, Mapping)
        return {self.input_keys[0]: given} if lone else given

    def _outputs(self, inputs: Any, steps: Mapping[str, Any], only: bool) -> dict[str, Any]:
        if "__interrupt__" in steps:
            raise RunError(
                "the chain waits for a person, which needs constitutional(…) instead of this class"
            )
        outputs = {key: steps[key] for key in self.output_keys}
        if only:
            return outputs
        return {**(inputs if isinstance(inputs, Mapping) else {"input": inputs}), **outputs}

    def _only(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, RunnableConfig]:
        """Return the one input of `run`, and its configuration."""
        if self.return_intermediate_steps:
            raise ConfigError("run() returns one text; for return_intermediate_steps call invoke()")
        config = {name: inputs.pop(name) for name in ("callbacks", "tags", "metadata") if name in inputs}
        if len(args) + bool(inputs) != 1:
            raise ConfigError(f"run() takes one value, or the inputs by name, found {args!r} and {inputs!r}")
        return args[0] if args else inputs, cast("RunnableConfig", config)


@dataclass(frozen=True, kw_only=True)
class _Steps(Shape):
    """Finds the answer as `Shape` does, and returns it in the old class's dict."""

    prompt: BasePromptTemplate[Any] | None
    """The chain's own prompt; None: the request is in the input."""
    constitution: Constitution
    """The constitution whose principles `critiques_and_revisions` lists."""

    def conversation(self, value: object) -> tuple[Message, ...]:
        """Return the request: the chain's prompt, filled in."""
        if self.prompt is None or not isinstance(value, Mapping):
            return super().conversation(value)
        if missing := [name for name in self.prompt.input_variables if name not in value]:
            raise DataError(
                f"the chain's prompt asks for {', '.join(map(repr, missing))}, and the input has the keys "
                f"{', '.join(map(repr, value)) or '(none)'}; give them, or say with input_key= which of the "
                "keys is the request"
            )
        return super().conversation(self.prompt.format_prompt(**value))

    def put(self, output: Any, released: Message, trajectory: Trajectory) -> dict[str, Any]:
        """Return the old class's outputs, intermediate steps included."""
        assert trajectory.draft is not None  # an answer was released
        initial = shown_of(trajectory.draft.answer)
        kept = trajectory.released_from == "draft"
        answer = initial if kept else shown_of(released).strip()
        return {
            "output": answer,
            "initial_output": initial,
            "critiques_and_revisions": self._pairs(trajectory, "" if kept else answer),
        }

    def _pairs(self, trajectory: Trajectory, revision: str) -> list[tuple[str, str]]:
        """Return critique and revision for each principle by which the draft was judged, in their order."""
        pairs: list[tuple[str, str]] = []
        for judged in trajectory.rounds[:1]:  # an answer that was not judged, such as a tool call, has none
            critique = judged.critique
            failed = failed_principles(critique, self.constitution)
            for principle in self.constitution:
                own = [verdict for verdict in critique.verdicts if verdict.principle == principle.id]
                found = own or [verdict for verdict in critique.verdicts if verdict.aim == principle.aim]
                reason = own[0].reason if own else None
                if principle in failed:
                    said = reason or critique.reasoning
                    pairs.append((f"{said} Critique needed.".lstrip(), revision))
                elif found and found[0].label is Label.UNREADABLE:
                    # Without the critic's words, which may contain the phrase "No critique needed."
                    pairs.append(("The verdict could not be read.", revision))
                elif found:
                    pairs.append((f"{reason or ''} No critique needed.".lstrip(), ""))
        return pairs


def _prompt(chain: Runnable[Any, Any]) -> BasePromptTemplate[Any] | None:
    """Return the prompt of an LLMChain, or the one that a sequence begins with; None for other chains."""
    found = (getattr(chain, name, None) for name in ("prompt", "first"))
    return next((prompt for prompt in found if isinstance(prompt, BasePromptTemplate)), None)


def _input_keys(chain: Runnable[Any, Any]) -> list[str]:
    """Return the keys of a chain's input, as far as the chain declares them; empty where it takes no dict."""
    named: list[str] | None = getattr(chain, "input_keys", None)
    if named is not None:
        return list(named)
    # A chain that takes any one value has a schema of one field, which LangChain calls "root".
    fields = getattr(chain.get_input_schema(), "model_fields", {})
    return [key for key in fields if key != "root"]
