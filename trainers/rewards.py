"""Rewards: score a policy's answers, for training with PPO, RLOO and GRPO, and for evaluation.

    Reward           conversations and answers -> one number each; the higher, the better
    ├─ FunctionReward    a Python function
    ├─ ModelReward       a reward model, with its own tokenizer
    ├─ EnsembleReward    the mean of several rewards; also measures their disagreement
    └─ JudgeReward       an AI judge or critic that rates each answer under a constitution (direct RLAIF)

Calling a reward returns one finite number per answer, or raises. A failed call of a function or a judge is
retried with increasing waits before `RewardError` is raised; a trainer then stops and keeps its state. If a
judge's rating of a few answers is unreadable, or its provider rejects them, they get a substitute number that
moves the policy neither way. For measuring, use `ratings`, which returns no number for such answers.
"""

from __future__ import annotations

import importlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cai_graph import constitution, local
from cai_graph.addresses import without_password
from cai_graph.calls import Budget, Calls
from cai_graph.concurrency import bridge
from cai_graph.constitution import Constitution
from cai_graph.critic import MAX_ANSWER_CHARS, Critic, ProbeCritic, critic_for
from cai_graph.critic.trained import TrainedCritic
from cai_graph.errors import CaiError, ConfigError, ModelError
from cai_graph.failures import describe, is_about_all_rows
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Message
from trainers.checkpoint import Checkpoint
from trainers.feedback import p_violates
from trainers.feedback.judge import Judge
from trainers.policy import Messages, RewardModel, load_reward, score

__all__ = [
    "EnsembleReward",
    "FunctionReward",
    "JudgeReward",
    "ModelReward",
    "Rated",
    "Reward",
    "RewardError",
    "Spec",
    "constitutions",
    "folders",
    "parse",
    "ratings",
    "sources",
    "spelled_out",
]

_log = logging.getLogger(__name__)

Spec = str | list[str] | dict[str, str]
"""A reward in a config; see `parse`."""

WAITS = (1.0, 5.0, 25.0)
"""Seconds before each further attempt at a reward that failed."""

MAX_UNREADABLE_SHARE = 0.1
"""Maximum share of a batch whose ratings may be unreadable; one answer is always allowed."""


class RewardError(CaiError):
    """A reward failed in all attempts, or cannot work; the message names the reward and the cause."""


@runtime_checkable
class Reward(Protocol):
    """The interface of rewards: a score for each answer."""

    name: str
    """Stable name, recorded in the Checkpoint."""

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return one finite number for each answer to its conversation.

        Raises:
            RewardError: the reward failed in all attempts.
        """
        ...


Rated = float | str | None
"""The result for an answer: a number; the error, as text, if a judge's provider rejected the answer or it is
too long; None if a judge's rating could not be read."""

Numbers = Sequence[float | None]
Function = Callable[[Sequence[Messages], Sequence[str]], Numbers]


def _insist(
    name: str, ask: Callable[[], Numbers], wrong: Callable[[Numbers], str | None], waits: Sequence[float]
) -> list[float | None]:
    """Return the result of `ask`; retry if it raises, or if `wrong` returns what is wrong with the result."""
    for wait in (*waits, None):
        why: Exception | None = None
        try:
            found = list(ask())
            said = wrong(found)
            if said is None:
                return found
        except Exception as error:
            if is_about_all_rows(error):  # such as a rejected key: a retry would fail, too
                raise RewardError(f"the reward {name} cannot be had: {describe(error)}") from error
            said, why = describe(error), error
        if wait is None:
            raise RewardError(f"the reward {name} failed {len(waits) + 1} times: {said}") from why
        time.sleep(wait)
    raise AssertionError("unreachable")


def _what_is_wrong(found: Numbers, count: int) -> str | None:
    if len(found) != count:
        return f"it gave {len(found)} numbers for {count} answers"
    for number, value in enumerate(found):
        if value is None or not math.isfinite(value):
            return f"it gave {value!r} for answer {number} of {count}"
    return None


class FunctionReward:
    """A Python function of conversations and answers.

    It is called as `function(prompts, answers)` with lists of the same length.
    """

    def __init__(self, function: Function, name: str = "", *, waits: Sequence[float] = WAITS) -> None:
        """Wrap a function; `waits` are the seconds before each further attempt after a failure."""
        self.name = name or getattr(function, "__qualname__", type(function).__name__)
        self._function, self._waits = function, waits

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return the function's numbers."""
        found = _insist(
            self.name,
            lambda: self._function(prompts, answers),
            lambda found: _what_is_wrong(found, len(answers)),
            self._waits,
        )
        return [float(value) for value in found if value is not None]


class ModelReward:
    """A reward model, loaded at the first call, with its own tokenizer."""

    def __init__(
        self, model: str | Path | RewardModel, *, batch_size: int = 16, device: str | None = None
    ) -> None:
        """Create it from a reward model's folder or a loaded one; `batch_size` answers are scored at once."""
        self.name = "reward model" if isinstance(model, RewardModel) else f"model:{Path(model).name}"
        self._model, self._batch_size, self._device = model, batch_size, device

    @property
    def sources(self) -> frozenset[str]:
        """The digest of its weights, which does not depend on the folder's name."""
        model = self._model
        return frozenset(
            {self.name if isinstance(model, RewardModel) else Checkpoint.open(Path(model)).digest}
        )

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return the model's scores."""
        if not isinstance(self._model, RewardModel):
            self._model = load_reward(self._model, device=self._device)
        found = score(self._model, prompts, answers, batch_size=self._batch_size)
        if (said := _what_is_wrong(found, len(answers))) is not None:  # a retry would give the same
            raise RewardError(f"the reward {self.name} is broken: {said}")
        return found


class EnsembleReward:
    """The mean of several rewards; also measures their disagreement."""

    def __init__(self, members: Sequence[Reward]) -> None:
        """Create an ensemble of members, which must all be on the same scale.

        Raises:
            ConfigError: there are fewer than two.
        """
        if len(members) < 2:
            raise ConfigError(f"an ensemble has at least two members, found {len(members)}")
        self.name = "mean(" + ", ".join(member.name for member in members) + ")"
        self.members = tuple(members)
        self._last: tuple[Any, list[tuple[float, ...]]] | None = None

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return the mean over the members, answer by answer."""
        return [statistics.fmean(scores) for scores in self._scores(prompts, answers)]

    def disagreement(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return the standard deviation over the members, answer by answer."""
        return [statistics.pstdev(scores) for scores in self._scores(prompts, answers)]

    def _scores(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[tuple[float, ...]]:
        asked = (list(prompts), list(answers))
        if self._last is None or self._last[0] != asked:  # mean and disagreement need the same batch
            columns = [member(prompts, answers) for member in self.members]
            self._last = asked, list(zip(*columns, strict=True))
        return self._last[1]


class JudgeReward:
    """An AI judge's rating of each answer under a constitution: direct RLAIF, without a reward model.

    A `Judge` rates from -1 to 1; a critic's rating is 1 - 2 P(the answer violates a principle). If a rating
    stays unreadable, or the provider rejects the answer, for instance by a content filter, the answer gets
    the mean of the readable ratings for its prompt in the batch, or of the whole batch if there are none. So
    it moves the policy neither way. Such answers are counted; if they are more than `MAX_UNREADABLE_SHARE` of
    a batch, the attempt has failed.

    Source: Lee et al. 2023 (arXiv:2309.00267), section 2.2.2.
    """

    def __init__(
        self,
        judge: Judge | Critic,
        rules: Constitution,
        *,
        concurrency: int = 4,
        waits: Sequence[float] = WAITS,
    ) -> None:
        """Create it from a judge and its constitution; `concurrency` answers are judged at once."""
        self.name = f"{'judge' if isinstance(judge, Judge) else 'critic'}:{judge.name}"
        self.rules = rules
        """The constitution."""
        self.unreadable = 0
        """Number of answers so far whose rating stayed unreadable."""
        self._judge, self._concurrency, self._waits = judge, concurrency, waits

    @property
    def sources(self) -> frozenset[str]:
        """The judge's name with the digest of its constitution, on which its ratings depend.

        A probe or a trained critic depends only on the aims, so its name is combined with each aim.
        """
        if isinstance(self._judge, ProbeCritic | TrainedCritic):
            return frozenset(f"{self.name} {principle.aim}" for principle in self.rules.principles)
        return frozenset({f"{self.name} {self.rules.digest}"})

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return the judge's ratings, with a substitute number for the few that stayed unreadable."""
        rated = self._ratings(
            prompts, answers, lambda found: _what_is_wrong(_filled(found, prompts), len(answers))
        )
        found = [None if isinstance(one, str) else one for one in rated]
        self.unreadable += found.count(None)
        return [value for value in _filled(found, prompts) if value is not None]

    def ratings(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Rated]:
        """Return the judge's ratings, as `Rated`, without substitutes, however many stayed unreadable.

        Raises:
            RewardError: the judge failed in all attempts.
        """
        return self._ratings(prompts, answers, lambda found: None)

    def _ratings(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        wrong: Callable[[Numbers], str | None],
    ) -> list[Rated]:
        known: dict[int, float] = {}
        rejected: dict[int, str] = {}

        def ask() -> list[float | None]:
            """Request only the ratings that are still missing, so that a retry repeats no paid request."""
            wanted = [n for n in range(len(answers)) if n not in known and n not in rejected]
            given, failed = bridge.run(lambda _: self._rate([(prompts[n], answers[n]) for n in wanted]))
            for number, rated in zip(wanted, given, strict=True):
                if isinstance(rated, str):
                    rejected[number] = rated
                elif rated is not None:
                    known[number] = rated
            if failed is not None:
                raise failed
            return [known.get(number) for number in range(len(answers))]

        def wrong_since(found: Numbers) -> str | None:
            said = wrong(found)
            return said and "; rejected with ".join([said, *list(rejected.values())[:1]])

        found = _insist(self.name, ask, wrong_since, self._waits)
        if rejected:
            _log.warning(
                "the reward %s: %d of %d answers stay unreadable: they were rejected, the first with %s",
                *(self.name, len(rejected), len(answers), next(iter(rejected.values()))),
            )
        return [rejected.get(number, value) for number, value in enumerate(found)]

    async def _rate(self, asked: Sequence[tuple[Messages, str]]) -> tuple[list[Rated], Exception | None]:
        """Return the rating of each answer, and the first error of the judge; None if there was none.

        After an error, answers whose request has not begun get None.
        """
        import asyncio

        room = asyncio.Semaphore(self._concurrency)
        failures: list[Exception] = []

        async def one(prompt: Messages, answer: str) -> Rated:
            async with room:
                if failures:  # the judge has failed: the remaining answers wait for the next attempt
                    return None
                try:
                    return await self._rating(prompt, answer)
                except Exception as error:
                    if _is_about(answer, error):
                        return describe(error)
                    failures.append(error)
                    return None

        found = await asyncio.gather(*(one(prompt, answer) for prompt, answer in asked))
        return list(found), next(iter(failures), None)

    async def _rating(self, prompt: Messages, answer: str) -> float | None:
        exchange = Exchange(
            messages=tuple(
                Message(role=str(turn["role"]), content=turn.get("content") or "") for turn in prompt
            ),
            answer=Message(role="assistant", content=answer),
        )
        calls = Calls(Budget(calls=None, forward_passes=None))
        if isinstance(self._judge, Judge):
            return await self._judge.rate(exchange, self.rules, calls)
        critique = await self._judge.critique(exchange, self.rules, calls, explain=False)
        violates = p_violates(critique, self.rules)
        return None if violates is None else 1 - 2 * violates


def _is_about(answer: str, error: Exception) -> bool:
    """Return whether an error concerns this answer alone, such as a content filter's."""
    rejected = getattr(error, "status_code", None) in (400, 413, 422)
    return rejected or (isinstance(error, ModelError) and len(answer) > MAX_ANSWER_CHARS)


def _filled(found: Numbers, prompts: Sequence[Messages]) -> Numbers:
    """Return ratings in which each None is replaced by the mean of the prompt's ratings, or else of all.

    RLOO's and GRPO's baseline is the mean over a prompt's answers. So the mean of all would reward an
    unreadable answer to a prompt whose other answers are bad. If too many are None, nothing is replaced.

    >>> bad, good = [{"role": "user", "content": "bad"}], [{"role": "user", "content": "good"}]
    >>> _filled([-1.0, None, 1.0, 1.0], [bad, bad, good, good])
    [-1.0, -1.0, 1.0, 1.0]
    """
    given = [(prompt, value) for prompt, value in zip(prompts, found, strict=True) if value is not None]
    if not given or len(found) - len(given) > max(1, MAX_UNREADABLE_SHARE * len(found)):
        return found

    def typical(prompt: Messages) -> float:
        alike = [value for other, value in given if other == prompt]
        return statistics.fmean(alike or [value for _, value in given])

    return [typical(prompt) if value is None else value for prompt, value in zip(prompts, found, strict=True)]


# --- from a config ------------------------------------------------------------------------------------

_KINDS = ("judge", "critic")
"""Kinds of rewards that send a request for each answer."""


def parse(
    spec: Spec | Mapping[str, str], *, rules: Constitution | None = None, device: str | None = None
) -> Reward:
    """Return the reward that a config names.

    | spec | reward |
    |---|---|
    | `path/to/checkpoint` | the reward model in that folder |
    | `[one, two, three]` | an ensemble of such specs |
    | `judge:MODEL`, `critic:MODEL` | an AI judge, or a critic, under the constitution `balanced` |
    | `{judge: MODEL, constitution: NAME}` | the same under another; also `critic` |
    | `package.module:function` | a function of conversations and answers |

    Args:
        spec: as above.
        rules: the constitution of a judge or critic whose spec names none, instead of `balanced`.
        device: the device of reward models.

    Raises:
        ConfigError: the spec is malformed, or names something that does not exist; the message quotes it.
    """
    if isinstance(spec, Mapping) and "constitution" in spec:
        rules = None
    spec = spelled_out(spec)
    if isinstance(spec, str):
        if Path(spec).expanduser().is_dir():
            return ModelReward(Path(spec).expanduser(), device=device)
        module, _, name = spec.partition(":")
        if all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
            return FunctionReward(_function(spec), spec)
        raise ConfigError(
            f"reward {without_password(spec)!r}: is no folder with a reward model, no judge:MODEL or "
            "critic:MODEL, and no package.module:function"
        )
    if isinstance(spec, dict):
        kinds = [kind for kind in _KINDS if kind in spec]
        if len(kinds) != 1 or len(spec) != 2:
            found = without_password(repr(dict(spec)))
            raise ConfigError(
                f"reward {found}: write {{judge: MODEL, constitution: NAME}}, or critic for judge"
            )
        model = spec[kinds[0]]
        who: Judge | Critic = Judge(model) if kinds[0] == "judge" else critic_for(model)
        at_once = 16 if local.name_in(model) is None else local.CONVERSATIONS // 2
        return JudgeReward(who, rules or constitution.load(spec["constitution"]), concurrency=at_once)
    return EnsembleReward([parse(member, rules=rules, device=device) for member in spec])


def spelled_out(spec: Spec | Mapping[str, str]) -> Spec:
    """Return a judge's or critic's spec as a mapping that names its constitution; other specs unchanged.

    >>> spelled_out("judge:local")
    {'constitution': 'balanced', 'judge': 'local'}
    """
    if isinstance(spec, str):
        kind, colon, model = spec.partition(":")
        if not colon or kind not in _KINDS:
            return spec
        spec = {kind: model}
    return {"constitution": "balanced", **spec} if isinstance(spec, Mapping) else spec


def sources(reward: Reward) -> frozenset[str]:
    """Return the sources of a reward's numbers; rewards that share a source are not independent judges."""
    if isinstance(reward, EnsembleReward):
        return frozenset().union(*map(sources, reward.members))
    found: frozenset[str] = getattr(reward, "sources", frozenset({reward.name}))
    return found


def constitutions(reward: Reward) -> frozenset[str]:
    """Return the digests of the constitutions of a reward's judges."""
    if isinstance(reward, EnsembleReward):
        return frozenset().union(*map(constitutions, reward.members))
    return frozenset({reward.rules.digest}) if isinstance(reward, JudgeReward) else frozenset()


def ratings(reward: Reward, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Rated]:
    """Return a reward's result for each answer, as `Rated`, without substitutes for missing numbers.

    This is for measuring; training calls the reward itself.

    Raises:
        RewardError: the reward failed in all attempts.
    """
    if isinstance(reward, JudgeReward):
        return reward.ratings(prompts, answers)
    if isinstance(reward, EnsembleReward):
        columns = [ratings(member, prompts, answers) for member in reward.members]
        return [_mean_of_all(row) for row in zip(*columns, strict=True)]
    return list(reward(prompts, answers))


def _mean_of_all(values: Sequence[Rated]) -> Rated:
    if rejected := [value for value in values if isinstance(value, str)]:
        return rejected[0]
    known = [value for value in values if value is not None and not isinstance(value, str)]
    return statistics.fmean(known) if len(known) == len(values) else None


def folders(spec: Spec) -> list[Path]:
    """Return the folders of the reward models that a spec names."""
    if isinstance(spec, Mapping):
        return []
    if not isinstance(spec, str):
        return [folder for member in spec for folder in folders(member)]
    folder = Path(spec).expanduser()
    return [folder] if folder.is_dir() else []


def _function(spec: str) -> Function:
    module, _, name = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the module, which can raise anything
        raise ConfigError(f"reward {spec!r}: cannot be imported: {describe(error)}") from error
    if not callable(found):
        raise ConfigError(f"reward {spec!r}: is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]
