"""The watch on one training run: samples and scores held-out answers, records them, and decides on a stop."""

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
"""A function that returns a finite score for each answer, such as a `Reward`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run is observed, with what judge and prompts, and when it is stopped."""

    judge: Spec
    """Judge of the held-out score, as `trainers.rewards.parse` reads it; not the reward of the training."""
    prompts: int = 64
    """Number of different held-out prompts, from the beginning of the dataset's test rows; at least 16. Twice
    as many detect a fall that is smaller by √2."""
    benign: Path | None = None
    """Harmless prompts whose refusals are counted: JSONL, JSON, CSV, Parquet, or text with one per line.
    None: the few English ones of the package."""
    evasion: str | None = None
    """Local model whose probe detects evasion, such as `local`; None: detect it by English opening words."""
    every: int = 10
    """Steps between two observations of the held-out prompts."""
    patience: int = 2
    """Consecutive observations that must meet a stop rule; with 1 a run stops earlier, often falsely."""
    stop: bool = True
    """Whether the watch may stop the run; otherwise it only records its readings."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("patience", 1), ("prompts", FEWEST)):
            if getattr(self, name) < least:
                raise ConfigError(f"watch.{name} is a number from {least}, found {getattr(self, name)!r}")

    @property
    def contents(self) -> dict[str, Any]:
        """Identities of the contents behind its settings, by setting; JSON."""
        named = {"benign": identity(self.benign), "evasion": identity(self.evasion)}
        return {"judge": identity_of_reward(self.judge), **named}

    def asks(self, heldout: Sequence[Messages]) -> list[Messages]:
        """Return the prompts of one observation, all for one call of `sample`.

        Args:
            heldout: prompts that the policy is not trained on; the first different ones are used.

        Raises:
            DataError: the benign prompts cannot be read.
        """
        return _asked(self.held_out(heldout), benign_prompts(self.benign))

    def held_out(self, prompts: Sequence[Messages]) -> list[Messages]:
        """Return the first `prompts` different prompts: a repeated prompt would count its answers twice."""
        return list({digest_of(prompt): prompt for prompt in prompts}.values())[: self.prompts]


def _asked(heldout: Sequence[Messages], benign: Sequence[Messages]) -> list[Messages]:
    return [*list(heldout) * ANSWERS, *benign]


class Watch:
    """Watches one run. When a run is resumed, a new Watch reads the files of the earlier one.

    Args:
        config: when it observes and stops.
        judge: gives the held-out score; the policy must not be trained on it.
        reward: the reward that the policy is trained on.
        prompts: held-out prompts, the same during the whole run; the first different ones are used; at least
            16, better 64 or more.
        benign_prompts: harmless prompts that no good model refuses; may be empty.
        sample: samples one answer to each prompt from the current policy, at the temperature of training;
            equal prompts get independent samples.
        output: the folder that its files are written into.
        evades: returns whether each answer to a benign prompt refuses or evades it; by default judged by the
            opening words.

    Raises:
        ConfigError: there are too few held-out prompts, or the folder's run had other held-out prompts.
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
        """Return the watch of a stage's config; opens its judge, benign prompts and probe.

        Args:
            config: the user's settings.
            reward: the reward that the policy is trained on.
            heldout: prompts that the policy is not trained on, as `prompts` of the class.
            sample: as for the class.
            output: as for the class.

        Raises:
            ConfigError: the judge and the reward share a source, the judge does not exist, or there are too
                few prompts.
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
        """All readings so far, in the order of their steps."""
        self._seen: list[Observation] = []
        self._refused: list[list[bool]] = []
        output.mkdir(parents=True, exist_ok=True)
        self._load()

    @property
    def asks(self) -> list[Messages]:
        """The prompts of one observation, all for one call of `sample`; the same as `WatchConfig.asks`."""
        return _asked(self._prompts, self._benign)

    @property
    def best_step(self) -> int:
        """The step with the best held-out score so far."""
        return best(self._seen).step

    def due(self, step: int, last: bool) -> bool:
        """Return whether a step is observed on the held-out prompts."""
        return last or step % self.config.every == 0 or all(one.step >= step for one in self._seen)

    def decided(self, step: int, *, last: bool = False) -> Decision | None:
        """Return the Decision on a step that was observed before an interrupt; None: not observed yet.

        Call it for the step that a run resumes from: the judge may have failed at that step, or the run may
        have ended before it acted on the Decision.
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
        """Record the reading of a step, and return the Decision. Call it after every update.

        The first call is for step 0, before the first update: otherwise a run that gets worse at once would
        have no good weights to return to.

        Args:
            step: updates so far. Records of this and later steps, from before an interrupt, are deleted.
            kl: KL to the reference, in nats per answer.
            entropy: in nats per token.
            prompts: the prompts that the step was trained on.
            answers: the policy's answers to them.
            rewards: the rewards of the answers; all three are empty where the step sampled no new answers.
            disagreement: the standard deviation over an ensemble, for each answer.
            last: whether the run ends here; the step is then observed in any case.

        Raises:
            ModelError: the policy did not answer each prompt, or a score or reward is missing or not finite.
            Exception: any error of the judge, the reward or the policy; the step is not recorded then.
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
        """Delete the records of this step and of later ones: the run resumed from an earlier saved state."""
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
