"""Rewards: what PPO, RLOO and GRPO make a policy better at.

    Reward           conversations and answers -> one number each; the higher, the better
    ├─ FunctionReward    a Python function
    ├─ ModelReward       a reward model, read through its own tokenizer
    ├─ EnsembleReward    the mean of several, which says how far they disagree
    └─ JudgeReward       an AI judge or critic under a constitution, asked about each answer (direct RLAIF)

A reward gives as many numbers as answers, all finite, or raises. What fails is asked again, with longer and
longer waits, before `RewardError` says that it is out; a trainer then stops with its state kept. Only for the
few answers of which a judge says nothing readable, or that its provider rejects, does training get a number
that was not given, one that moves the policy neither way; who measures asks `ratings`, which leave such
answers without one, and say which were rejected.
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
"""What a config says of a reward; see `parse`."""

WAITS = (1.0, 5.0, 25.0)
"""Seconds before each further attempt at a reward that failed."""

MAX_UNREADABLE_SHARE = 0.1
"""Share of a batch that a judge may leave unreadable; one answer in any case."""


class RewardError(CaiError):
    """A reward could not be had, after all attempts; says whose, and why."""


@runtime_checkable
class Reward(Protocol):
    """What answers are worth."""

    name: str
    """Stable name, recorded in the Checkpoint."""

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return one finite number for each answer to its conversation.

        Raises:
            RewardError: it cannot be had.
        """
        ...


Rated = float | str | None
"""What is said of an answer: a number; why it was rejected, by a judge's provider or as too long; None where
a judge's word could not be read."""

Numbers = Sequence[float | None]
Function = Callable[[Sequence[Messages], Sequence[str]], Numbers]


def _insist(
    name: str, ask: Callable[[], Numbers], wrong: Callable[[Numbers], str | None], waits: Sequence[float]
) -> list[float | None]:
    """Return what `ask` gives; ask again where it fails, or `wrong` says what is wrong with what it gave."""
    for wait in (*waits, None):
        why: Exception | None = None
        try:
            found = list(ask())
            said = wrong(found)
            if said is None:
                return found
        except Exception as error:
            if is_about_all_rows(error):  # such as a refused key: it helps nothing to ask again
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
        """Take a function; `waits` are the seconds before each further attempt when it fails."""
        self.name = name or getattr(function, "__qualname__", type(function).__name__)
        self._function, self._waits = function, waits

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return what the function gives."""
        found = _insist(
            self.name,
            lambda: self._function(prompts, answers),
            lambda found: _what_is_wrong(found, len(answers)),
            self._waits,
        )
        return [float(value) for value in found if value is not None]


class ModelReward:
    """A reward model, loaded when it is first asked, read through its own tokenizer."""

    def __init__(
        self, model: str | Path | RewardModel, *, batch_size: int = 16, device: str | None = None
    ) -> None:
        """Name a reward model's folder, or take a loaded one; `batch_size` answers are scored at once."""
        self.name = "reward model" if isinstance(model, RewardModel) else f"model:{Path(model).name}"
        self._model, self._batch_size, self._device = model, batch_size, device

    @property
    def sources(self) -> frozenset[str]:
        """The digest of its weights, whatever its folder is called."""
        model = self._model
        return frozenset(
            {self.name if isinstance(model, RewardModel) else Checkpoint.open(Path(model)).digest}
        )

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return the model's scores."""
        if not isinstance(self._model, RewardModel):
            self._model = load_reward(self._model, device=self._device)
        found = score(self._model, prompts, answers, batch_size=self._batch_size)
        if (said := _what_is_wrong(found, len(answers))) is not None:  # it would give the same again
            raise RewardError(f"the reward {self.name} is broken: {said}")
        return found


class EnsembleReward:
    """The mean of several rewards, which says how far they disagree."""

    def __init__(self, members: Sequence[Reward]) -> None:
        """Take the members, each on the same scale.

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
        if self._last is None or self._last[0] != asked:  # mean and disagreement are asked of one batch
            columns = [member(prompts, answers) for member in self.members]
            self._last = asked, list(zip(*columns, strict=True))
        return self._last[1]


class JudgeReward:
    """An AI judge's own rating of each answer under a constitution: direct RLAIF, without a reward model.

    A `Judge` rates from -1 to 1; a critic gives 1 - 2 P(the answer violates something). An answer that stays
    unreadable, or that the provider rejects, as a content filter does, scores as the mean of the readable
    answers to its prompt in the batch, or of the whole batch where there is none. So it moves the policy
    neither way, and it is counted; where more than `MAX_UNREADABLE_SHARE` of a batch are such, the judge has
    failed.

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
        """Take a judge and its constitution; `concurrency` answers are judged at once."""
        self.name = f"{'judge' if isinstance(judge, Judge) else 'critic'}:{judge.name}"
        self.rules = rules
        """The constitution."""
        self.unreadable = 0
        """Answers so far that stayed unreadable."""
        self._judge, self._concurrency, self._waits = judge, concurrency, waits

    @property
    def sources(self) -> frozenset[str]:
        """Who judges, and by what: the constitution, or heads, which know nothing of it but its aims."""
        if isinstance(self._judge, ProbeCritic | TrainedCritic):
            return frozenset(f"{self.name} {principle.aim}" for principle in self.rules.principles)
        return frozenset({f"{self.name} {self.rules.digest}"})

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        """Return the judge's ratings, with a number in the place of the few that stayed unreadable."""
        rated = self._ratings(
            prompts, answers, lambda found: _what_is_wrong(_filled(found, prompts), len(answers))
        )
        found = [None if isinstance(one, str) else one for one in rated]
        self.unreadable += found.count(None)
        return [value for value in _filled(found, prompts) if value is not None]

    def ratings(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Rated]:
        """Return the judge's ratings; of those that stayed unreadable, however many they are, None, or why
        they were rejected.

        Raises:
            RewardError: the judge is out.
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
            """Ask about what is not known yet, so that an outage loses nothing that was paid for."""
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
        """Return what is said of each answer, None also of those not asked about, and the first error of
        the judge."""
        import asyncio

        room = asyncio.Semaphore(self._concurrency)
        failures: list[Exception] = []

        async def one(prompt: Messages, answer: str) -> Rated:
            async with room:
                if failures:  # the judge is out: what is not begun waits for the next attempt
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
    """Return whether an error is a word on this answer alone, such as a content filter's."""
    rejected = getattr(error, "status_code", None) in (400, 413, 422)
    return rejected or (isinstance(error, ModelError) and len(answer) > MAX_ANSWER_CHARS)


def _filled(found: Numbers, prompts: Sequence[Messages]) -> Numbers:
    """Return ratings with the mean of those of the same prompt, or of all, in the place of each None.

    RLOO's and GRPO's baseline is the mean of a prompt's answers, so that the mean of all would reward an
    unreadable answer to a prompt whose other answers are bad. Where too many are None, they are left.

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
"""Who is asked about each answer."""


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
        device: where reward models run.

    Raises:
        ConfigError: it names nothing that there is; says what was found.
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
    """Return a spec with a judge or critic as a mapping that names its constitution; any other as it is.

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
    """Return what gives a reward its numbers; two rewards with one in common are no independent judges."""
    if isinstance(reward, EnsembleReward):
        return frozenset().union(*map(sources, reward.members))
    found: frozenset[str] = getattr(reward, "sources", frozenset({reward.name}))
    return found


def constitutions(reward: Reward) -> frozenset[str]:
    """Return the digests of the constitutions that a reward's judges go by."""
    if isinstance(reward, EnsembleReward):
        return frozenset().union(*map(constitutions, reward.members))
    return frozenset({reward.rules.digest}) if isinstance(reward, JudgeReward) else frozenset()


def ratings(reward: Reward, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Rated]:
    """Return what a reward says of each answer; of one that a judge gave no number, why not, as in `Rated`.

    This is for measuring; a policy is trained on what the reward gives when it is called.

    Raises:
        RewardError: it cannot be had.
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
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(f"reward {spec!r}: cannot be imported: {describe(error)}") from error
    if not callable(found):
        raise ConfigError(f"reward {spec!r}: is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]
