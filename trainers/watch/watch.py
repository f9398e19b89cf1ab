"""The watch on one run: it observes the held-out prompts, keeps what it saw, and says what follows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cai_graph.errors import ConfigError, DataError, ModelError
from trainers import lines
from trainers.identity import identity, identity_of_reward
from trainers.policy import Messages
from trainers.refusal import Evades, benign_prompts, by_opening, by_probe
from trainers.rewards import Reward, Spec, parse, sources
from trainers.watch.figures import (
    Reading,
    boilerplate,
    correlation,
    digest_of,
    follows_length,
    refuses_more,
)
from trainers.watch.plot import plot
from trainers.watch.rules import ANSWERS, FEWEST, Decision, Observation, agreement, best, decide, fall

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

__all__ = ["Watch", "WatchConfig"]

_READINGS, _HELD_OUT = "watch.jsonl", "heldout.jsonl"
_ADVICE = "name a new output folder"
_PLOT_EVERY_S = 30.0

Score = Callable[[Sequence[Messages], Sequence[str]], list[float]]
"""What scores answers, a finite number for each: a `Reward`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run is observed, and how long the watch waits."""

    judge: Spec
    """Who gives the held-out score, as `trainers.rewards.parse` reads it; never what is trained on."""
    prompts: int = 64
    """Held-out prompts, each once, from the beginning of the dataset's test rows; at least 16. Twice as many
    show a fall that is smaller by √2."""
    benign: Path | None = None
    """Harmless prompts, to count refusals of: JSONL, JSON, CSV, Parquet, or text with one a line. None: the
    few that the package brings, in English."""
    evasion: str | None = None
    """The local model whose probe reads evasion, such as `local`; None: by how answers open, in English."""
    every: int = 10
    """Steps between two observations of the held-out prompts."""
    patience: int = 2
    """Observations in a row that must speak for a stop; with 1 a run stops earlier, and often in vain."""
    stop: bool = True
    """Whether the run is stopped; otherwise the watch only writes what it sees."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("patience", 1), ("prompts", FEWEST)):
            if getattr(self, name) < least:
                raise ConfigError(f"watch.{name} is a number from {least}, found {getattr(self, name)!r}")

    @property
    def contents(self) -> dict[str, Any]:
        """What names the content behind its settings, by setting; JSON."""
        named = {"benign": identity(self.benign), "evasion": identity(self.evasion)}
        return {"judge": identity_of_reward(self.judge), **named}

    def asks(self, heldout: Sequence[Messages]) -> list[Messages]:
        """Return what an observation asks the policy, in one call of `sample`.

        Args:
            heldout: prompts that the policy is not trained on, of which the first different ones are used.

        Raises:
            DataError: the benign prompts cannot be read.
        """
        return _asked(self.held_out(heldout), benign_prompts(self.benign))

    def held_out(self, prompts: Sequence[Messages]) -> list[Messages]:
        """Return the first `prompts` that differ: answers to one prompt are not evidence of two."""
        return list({digest_of(prompt): prompt for prompt in prompts}.values())[: self.prompts]


def _asked(heldout: Sequence[Messages], benign: Sequence[Messages]) -> list[Messages]:
    return [*list(heldout) * ANSWERS, *benign]


class Watch:
    """Watches one run. Made anew after an interrupt, it goes on from its files.

    Args:
        config: when it observes and stops.
        judge: the held-out score; the policy must not be trained on it.
        reward: what the policy is trained on.
        prompts: held-out prompts, the same through the whole run, of which the first different ones are used;
            at least 16, better 64 or more.
        benign_prompts: harmless prompts that no good model refuses; may be empty.
        sample: draws one answer to each prompt from the policy as it is, at the temperature of training; it
            draws anew for each of two equal prompts.
        output: the folder that its files are written into.
        evades: whether each answer to a benign prompt refuses or evades it; by its opening words by default.

    Raises:
        ConfigError: there are too few held-out prompts, or the folder is of a run with others.
        DataError: its files from before the interrupt are damaged.
    """

    @classmethod
    def of(
        cls,
        config: WatchConfig,
        *,
        reward: Reward,
        heldout: Sequence[Messages],
        sample: Callable[[Sequence[Messages]], list[str]],
        output: Path,
    ) -> Watch:
        """Return the watch that a stage's config asks for; opens its judge, benign prompts and probe.

        Args:
            config: as the user wrote it.
            reward: what the policy is trained on.
            heldout: prompts that it is not trained on, as `prompts` of the class.
            sample: as for the class.
            output: as for the class.

        Raises:
            ConfigError: the judge is the reward or a part of it, there is no such judge, or there are too few
                prompts.
            DataError: the benign prompts cannot be read.
        """
        judge = parse(config.judge)
        if sources(judge) & sources(reward):
            raise ConfigError(
                f"watch.judge is {judge.name}, which the policy is trained on; name another judge, such as "
                "judge:local, or a reward model that was trained on other labels"
            )
        return cls(
            config,
            judge=judge,
            reward=reward,
            prompts=heldout,
            benign_prompts=benign_prompts(config.benign),
            sample=sample,
            output=output,
            evades=by_opening if config.evasion is None else by_probe(config.evasion),
        )

    def __init__(
        self,
        config: WatchConfig,
        *,
        judge: Score,
        reward: Score,
        prompts: Sequence[Messages],
        benign_prompts: Sequence[Messages],
        sample: Callable[[Sequence[Messages]], list[str]],
        output: Path,
        evades: Evades = by_opening,
    ) -> None:
        prompts = config.held_out(prompts)
        if len(prompts) < FEWEST:
            raise ConfigError(
                f"the watch has {len(prompts)} different held-out prompts, and tells nothing from noise "
                f"below {FEWEST}; build the dataset with a larger test share"
            )
        if judge is reward:
            raise ConfigError("the held-out judge is the reward that is trained on; name another judge")
        self.config = config
        self._judge = judge
        self._reward = reward
        self._prompts = prompts
        self._benign = list(benign_prompts)
        self._sample = sample
        self._evades = evades
        self._output = output
        self._key = digest_of([{"prompts": self._prompts}])
        self._plotted = -math.inf
        self.readings: list[Reading] = []
        """All so far, in the order of their steps."""
        self._seen: list[Observation] = []
        self._refused: list[list[bool]] = []
        output.mkdir(parents=True, exist_ok=True)
        self._load()

    @property
    def asks(self) -> list[Messages]:
        """What an observation asks the policy, in one call of `sample`; as `WatchConfig.asks`."""
        return _asked(self._prompts, self._benign)

    @property
    def best_step(self) -> int:
        """The step with the best held-out score so far."""
        return best(self._seen).step

    def due(self, step: int, last: bool) -> bool:
        """Return whether the held-out prompts are observed at a step."""
        return last or step % self.config.every == 0 or all(one.step >= step for one in self._seen)

    def decided(self, step: int, *, last: bool = False) -> Decision | None:
        """Return what followed from a step that was observed before an interrupt; None: it has yet to be.

        To be asked of the step that a run is taken up at: the judge may have been out then, and what was
        decided may not have been done.
        """
        seen = [one for one in self._seen if one.step <= step]
        is_seen = bool(seen) and seen[-1].step == step
        if not any(one.step == step for one in self.readings) or (self.due(step, last) and not is_seen):
            return None
        return self._follows(seen) if is_seen else Decision(None, best(seen).step, False)

    def observe(
        self,
        *,
        step: int,
        kl: float | None,
        entropy: float | None,
        prompts: Sequence[Messages] = (),
        answers: Sequence[str] = (),
        rewards: Sequence[float] = (),
        disagreement: Sequence[float] | None = None,
        last: bool = False,
    ) -> Decision:
        """Write what is seen at a step, and return what follows. To be called after every update.

        The first call is for step 0, before the first update: without it, nothing is there to fall back to.

        Args:
            step: updates so far. Readings of this step and of later ones, from before an interrupt, go.
            kl: to the reference, in nats an answer.
            entropy: in nats a token.
            prompts: what the step was trained on: its prompts, …
            answers: … the policy's answers, and …
            rewards: … the rewards; all empty where the step made no new answers.
            disagreement: the standard deviation of an ensemble for each answer.
            last: whether the run ends here, so that it is observed in any case.

        Raises:
            ModelError: judge or reward gave no finite score for each answer.
            Exception: whatever judge, reward and policy raise; nothing of the step is written then.
        """
        self._forget(step)
        observed = self.due(step, last)
        found: dict[str, Any] = {}
        warnings: list[str] = []
        if observed:
            found, warnings = self._look(step)
        elif len(answers):
            found["boilerplate"] = boilerplate(prompts, answers)
        if len(answers):
            lengths = [float(len(answer)) for answer in answers]
            found["length_correlation"] = correlation(rewards, lengths)
            warnings += follows_length(found["length_correlation"], len(answers))
        reading = Reading(
            step=step,
            kl=kl,
            entropy=entropy,
            reward=_mean(rewards),
            disagreement=None if disagreement is None else _mean(disagreement),
            **found,
        )
        self.readings.append(reading)
        lines.append(self._output / _READINGS, dataclasses.asdict(reading))
        if not observed:
            return Decision(None, self.best_step, False, tuple(warnings))
        decision = self._follows(self._seen)._replace(warnings=tuple(warnings))
        if decision.stop or last or time.monotonic() - self._plotted > _PLOT_EVERY_S:
            self.plot()
        return decision

    def plot(self) -> None:
        """Write `watch.svg`."""
        plot(self.readings, self._output / "watch.svg")
        self._plotted = time.monotonic()

    def _follows(self, seen: Sequence[Observation]) -> Decision:
        decision = decide(seen, self.config.patience)
        return decision if self.config.stop else decision._replace(stop=None)

    def _look(self, step: int) -> tuple[dict[str, Any], list[str]]:
        asks = self.asks
        texts = self._sample(asks)
        if len(texts) != len(asks):
            raise ModelError(f"the policy gave {len(texts)} answers to {len(asks)} prompts")
        count = len(self._prompts) * ANSWERS
        heldout, held, benign = asks[:count], texts[:count], texts[count:]
        scores = self._scored("the held-out judge", self._judge, heldout, held)
        rewards = self._scored("the reward", self._reward, heldout, held)
        refused = self._evades(self._benign, benign) if benign else []
        one = Observation(step, scores, rewards)
        record = {
            "step": step,
            "prompts": self._key,
            "scores": scores.tolist(),
            "rewards": rewards.tolist(),
            "refused": refused,
            "answers": [held[: len(self._prompts)], held[len(self._prompts) :]],
            "benign_answers": benign,
        }
        lines.append(self._output / _HELD_OUT, record)
        self._seen.append(one)
        self._refused.append(refused)
        change = fall(self._seen) if len(self._seen) > 1 else None
        pull = agreement(one)
        found = {
            "heldout": float(scores.mean()),
            "heldout_change": change and change.mean,
            "heldout_noise": change and change.noise,
            "agreement": pull.mean,
            "agreement_noise": pull.noise,
            "boilerplate": boilerplate(heldout, held),
            "refusal_rate": _mean(refused),
        }
        return found, refuses_more(self._refused)

    def _scored(self, who: str, score: Score, prompts: Sequence[Messages], answers: Sequence[str]) -> Array:
        import numpy

        found = numpy.asarray(score(prompts, answers), float)
        if found.shape != (len(answers),) or not numpy.isfinite(found).all():
            raise ModelError(f"{who} gave no finite score for each of {len(answers)} answers")
        return found.reshape(ANSWERS, len(self._prompts))

    # --- files ---

    def _load(self) -> None:
        import numpy

        try:
            for record in lines.resume(self._output / _HELD_OUT, _ADVICE):
                if record["prompts"] != self._key:
                    raise ConfigError(f"{self._output}: was watched with other held-out prompts; {_ADVICE}")
                arrays = (numpy.asarray(record[name], float) for name in ("scores", "rewards"))
                self._seen.append(Observation(record["step"], *arrays))
                self._refused.append(record["refused"])
            readings = lines.resume(self._output / _READINGS, _ADVICE)
            self.readings = [Reading(**record) for record in readings]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._output}: what the watch wrote cannot be read ({error}); {_ADVICE}"
            ) from error

    def _forget(self, step: int) -> None:
        """Drop what was seen at this step and later: the run went back to a checkpoint before it."""
        last = [*(one.step for one in self.readings[-1:]), *(one.step for one in self._seen[-1:])]
        if all(before < step for before in last):
            return
        kept = [index for index, one in enumerate(self._seen) if one.step < step]
        self._seen, self._refused = self._seen[: len(kept)], self._refused[: len(kept)]
        self.readings = [one for one in self.readings if one.step < step]
        for name in (_READINGS, _HELD_OUT):
            lines.keep(self._output / name, lambda record: record["step"] < step, _ADVICE)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if len(values) else None
