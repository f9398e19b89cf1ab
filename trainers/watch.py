"""The Goodhart watch: what is tracked while a policy is trained on a reward, and when it stops.

"When a measure becomes a target, it ceases to be a good measure." Gao et al. 2022 (arXiv:2210.10760) measured
it: the reward that is trained on keeps rising while a better judge's score rises, turns and falls; a KL
penalty moves along that curve and does not lift it. So a run is stopped by a held-out score: that of a judge
the policy is not trained on, over fixed held-out prompts, each answered twice in every observation. Two rules
stop a run; each must hold in `patience` observations in a row (2 by default).

**The reward pulls against the judge.** Among policies that give up KL for reward, π ∝ π₀ · exp(η · reward),
the held-out score changes by d E[score] / dη = Cov(reward, score), both of answers to the same prompt. It
turns where that covariance does, so the sign says what the next steps will do before the score has fallen.
From the two answers to prompt i, cᵢ = (reward₁ − reward₂)(score₁ − score₂) / 2 is an unbiased estimate; the
rule holds where Σcᵢ / √Σcᵢ² < −1.645, and never at the best observation so far. Trained policies follow that
curve only roughly: the identity is exact for the optima of a KL-anchored reward, and a guide elsewhere.

**The held-out score has fallen** below the best by more than 2.33 standard errors of the paired difference.
This is for all else that can go wrong, such as collapse. The best of many noisy scores is best by luck, too,
and everything after it seems to fall; so the best by the first answers is compared by the second ones, and
the other way round, and the mean of the two differences, prompt by prompt, is free of that bias.

False stops, by simulation of 1,000 runs of 20 observations with 64 prompts: the first rule stops 4 % of the
runs whose reward has nothing to do with the judge, and none where the two agree weakly (correlation 0.4).
The second stops 3 to 5 % of the runs in which nothing changes, and fewer the faster the score rises. With
`patience` 1 it would be half of the runs and 18 %. A run that stops returns the weights of its best
observation, so a false stop costs further training, never quality.

What is written: `watch.jsonl`, a Reading for each step; `heldout.jsonl`, all held-out answers with both
scores, so that they can be scored again; `watch.svg`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from xxhash import xxh3_128_hexdigest

from cai_graph import bridge
from cai_graph.errors import ConfigError, DataError, MissingExtra, ModelError
from trainers import whole
from trainers.heldout import prompts_in
from trainers.labels import REFUSAL
from trainers.policy import Messages
from trainers.rewards import Reward, Spec, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

__all__ = ["Decision", "Observation", "Reading", "Watch", "WatchConfig", "boilerplate", "decide", "plot"]

ANSWERS = 2
"""Answers to each held-out prompt in an observation: the least that shows a covariance."""
AGAINST = 1.645
"""Standard errors below zero: 5 % of observations of a reward that has nothing to do with the judge."""
FALLEN = 2.33
"""Standard errors below the best: 1 % of observations of a policy that does not change."""
FEWEST = 16
"""Held-out prompts; below, a mean has no normal noise."""
GRAM = 5
"""Words of an n-gram whose repetition across answers is boilerplate."""
FOLLOWS_LENGTH = 0.5
"""Correlation with length from which a reward is reported."""
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|\w+")
_PLOT_EVERY_S = 30.0


Score = Callable[[Sequence[Messages], Sequence[str]], list[float]]
"""What scores answers, a finite number for each: a `Reward`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run is observed, and how long the watch waits."""

    judge: Spec
    """Who gives the held-out score, as `trainers.rewards.parse` reads it; never what is trained on."""
    prompts: int = 64
    """Held-out prompts, from the beginning of the dataset's test rows; at least 16. Twice as many show a fall
    that is smaller by √2."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What was seen at one step. What was not looked at then, or has no value, is None."""

    step: int
    """Updates of the policy so far; 0 is the policy that training begins with."""
    kl: float | None
    """KL to the reference, in nats, as the stage reports it."""
    entropy: float | None
    """Of the policy's next-token distribution, in nats a token."""
    reward: float | None
    """Mean of the rewards that the step was trained on."""
    disagreement: float | None = None
    """Mean standard deviation between the members of a reward ensemble."""
    length_correlation: float | None = None
    """Correlation of reward and length in characters, over the answers that the step was trained on."""
    boilerplate: float | None = None
    """Share of answers with five words in a row that answers to many other prompts have, too, in [0, 1]; of
    the held-out answers where there are some, of the step's otherwise."""
    heldout: float | None = None
    """The held-out score: its mean over all held-out answers."""
    heldout_change: float | None = None
    """Mean paired difference to the best observation, cross-fitted (see the module); None at the first."""
    heldout_noise: float | None = None
    """2.33 standard errors of that difference: what may be chance."""
    agreement: float | None = None
    """Correlation of reward and held-out score between answers to one prompt, in [-1, 1]."""
    agreement_noise: float | None = None
    """1.645 standard errors of it, where the two have nothing to do with one another."""
    refusal_rate: float | None = None
    """Share of the benign prompts that are refused or evaded, in [0, 1]."""


class Decision(NamedTuple):
    """What the stage is to do."""

    stop: str | None
    """Why the run must end and go back to the best weights; None: it goes on."""
    best_step: int
    """The step with the best held-out score so far."""
    is_best: bool
    """Whether that is this step: its weights are to be saved."""
    warnings: tuple[str, ...] = ()
    """What else looks wrong, in words for the user; nothing is stopped for it."""


class Observation(NamedTuple):
    """The held-out answers of one step, scored."""

    step: int
    """Updates so far."""
    scores: Array
    """(ANSWERS, n): what the judge says of each answer to each of n prompts."""
    rewards: Array
    """(ANSWERS, n): what the policy would be paid for it."""


class Change(NamedTuple):
    """A mean and what of it may be chance."""

    mean: float
    noise: float


# --- the rules ----------------------------------------------------------------------------------------


def decide(seen: Sequence[Observation], patience: int = 2) -> Decision:
    """Return what follows from the observations of a run, the last of which was just made.

    Args:
        seen: at least one, in the order of their steps.
        patience: observations in a row in which a rule must hold.
    """
    best = _best(seen)
    is_best = best is seen[-1]
    stop = None
    if not is_best and len(seen) > patience:
        recent = range(len(seen) - patience, len(seen))
        prompts = seen[-1].scores.shape[1]
        changes = [fall(seen[: index + 1]) for index in recent]
        pulls = [agreement(seen[index]) for index in recent]
        if all(pull.mean < -pull.noise for pull in pulls):
            stop = (
                f"the reward pulls against the held-out score (correlation {pulls[-1].mean:+.2f} between "
                f"answers to one prompt, {prompts} prompts)"
            )
        elif all(change.mean < -change.noise for change in changes):
            stop = (
                f"the held-out score is {-changes[-1].mean:.3g} below its best, more than its noise "
                f"({changes[-1].noise:.3g}, {prompts} prompts)"
            )
        if stop is not None:
            stop += f" in {patience} observations in a row; the best was step {best.step}"
    return Decision(stop, best.step, is_best)


def _best(seen: Sequence[Observation], *half: int) -> Observation:
    """Return the observation with the best mean score, of one half of the answers or of all."""
    return max(seen, key=lambda one: float(one.scores[half].mean()))


def fall(seen: Sequence[Observation]) -> Change:
    """Return how the last observation differs from the best, cross-fitted, and 2.33 standard errors."""
    first, second = (_best(seen, half) for half in range(ANSWERS))
    now = seen[-1].scores
    # The best by the first answers is compared by the second ones, so that its luck does not count.
    differences = ((now[1] - first.scores[1]) + (now[0] - second.scores[0])) / 2
    return Change(float(differences.mean()), FALLEN * float(differences.std(ddof=1)) / math.sqrt(len(now[0])))


def agreement(one: Observation) -> Change:
    """Return the correlation of reward and score between answers to one prompt, and 1.645 standard errors."""
    rewards, scores = one.rewards[0] - one.rewards[1], one.scores[0] - one.scores[1]
    spread = math.sqrt(float((rewards**2).sum()) * float((scores**2).sum()))
    if spread == 0:
        return Change(0.0, 0.0)
    products = rewards * scores
    # Under no relation each product is as likely to be of either sign, so their squares are the variance.
    return Change(float(products.sum()) / spread, AGAINST * math.sqrt(float((products**2).sum())) / spread)


# --- figures of a batch -------------------------------------------------------------------------------


def boilerplate(prompts: Sequence[Messages], answers: Sequence[str], *, share: float = 0.1) -> float | None:
    """Return the share of answers that have `GRAM` words in a row which many prompts' answers have.

    Args:
        prompts: of each answer its prompt; answers to one prompt may well be alike, and count once.
        answers: as many.
        share: of the different prompts, from which an n-gram is boilerplate; at least 3 prompts.

    Returns:
        In [0, 1]; None where there are fewer than 3 different prompts.
    """
    keys = [_key(prompt) for prompt in prompts]
    grams = [_grams(answer) for answer in answers]
    where: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for key, found in zip(keys, grams, strict=True):
        for gram in found:
            where[gram].add(key)
    different = len(set(keys))
    if different < 3:
        return None
    least = max(3, math.ceil(share * different))
    stale = {gram for gram, places in where.items() if len(places) >= least}
    return sum(not stale.isdisjoint(found) for found in grams) / len(grams)


def _grams(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return {tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)}


def _key(prompt: Messages) -> str:
    return xxh3_128_hexdigest(json.dumps(prompt, sort_keys=True, default=str).encode())


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    a, b = numpy.asarray(one, float), numpy.asarray(other, float)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return None
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def opens_with_refusal(prompts: Sequence[Messages], answers: Sequence[str]) -> list[bool]:
    """Return whether each answer opens like a refusal, in English, or is empty."""
    return [not answer.strip() or REFUSAL.match(answer) is not None for answer in answers]


def benign_prompts(config: WatchConfig) -> list[Messages]:
    """Return the harmless prompts that refusals are counted on.

    Raises:
        DataError: the file cannot be read, or holds no prompt.
    """
    if config.benign is None:
        lines = files("cai_graph").joinpath("sample/prompts.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        texts = [row["prompt"] for row in rows if row["kind"] == "benign"]
    else:
        texts = list(prompts_in(config.benign))
        if not texts:
            raise DataError(f"{config.benign}: holds no prompt")
    return [[{"role": "user", "content": text}] for text in texts]


def by_probe(model: str) -> Callable[[Sequence[Messages], Sequence[str]], list[bool]]:
    """Return what reads evasion from a local model's probe, at the threshold of its card.

    Raises:
        ConfigError: there is no probe for this model.
        MissingExtra: the extra `local` is not installed.
    """
    from cai_graph.probe import Probe

    probe = Probe.for_model(model)
    if probe is None:
        raise ConfigError(f"watch.evasion {model!r}: there is no probe for this model; `local` has one")

    async def read(prompts: Sequence[Messages], answers: Sequence[str]) -> list[bool]:
        asked = [str(prompt[-1].get("content") or "") for prompt in prompts]
        found = [await probe.read(request, answer) for request, answer in zip(asked, answers, strict=True)]
        return [reading.evasion >= probe.thresholds["evasion"] for reading in found]

    return lambda prompts, answers: bridge.run(lambda _: read(prompts, answers))


# --- the watch ----------------------------------------------------------------------------------------


class Watch:
    """Watches one run; see the module. Made anew after an interrupt, it goes on from its files.

    Args:
        config: when it observes and stops.
        judge: the held-out score; the policy must not be trained on it.
        reward: what the policy is trained on.
        prompts: held-out prompts, the same through the whole run; at least 16, better 64 or more.
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
            heldout: prompts that it is not trained on, of which the first ones are used.
            sample: as for the class.
            output: as for the class.

        Raises:
            ConfigError: the judge is the reward, there is no such judge, or there are too few prompts.
            DataError: the benign prompts cannot be read.
        """
        judge = parse(config.judge)
        if judge.name == reward.name:
            raise ConfigError(
                f"watch.judge is {judge.name}, which the policy is trained on; name another judge, such as "
                "judge:local, or a reward model that was trained on other labels"
            )
        return cls(
            config,
            judge=judge,
            reward=reward,
            prompts=heldout[: config.prompts],
            benign_prompts=benign_prompts(config),
            sample=sample,
            output=output,
            evades=opens_with_refusal if config.evasion is None else by_probe(config.evasion),
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
        evades: Callable[[Sequence[Messages], Sequence[str]], list[bool]] = opens_with_refusal,
    ) -> None:
        if len(prompts) < FEWEST:
            raise ConfigError(
                f"the watch has {len(prompts)} held-out prompts, and tells nothing from noise below "
                f"{FEWEST}; build the dataset with a larger test share"
            )
        if judge is reward:
            raise ConfigError("the held-out judge is the reward that is trained on; name another judge")
        self.config = config
        self._judge = judge
        self._reward = reward
        self._prompts = list(prompts)
        self._benign = list(benign_prompts)
        self._sample = sample
        self._evades = evades
        self._output = output
        self._key = _key([{"prompts": self._prompts}])
        self._plotted = -math.inf
        self.readings: list[Reading] = []
        """All so far, in the order of their steps."""
        self._seen: list[Observation] = []
        self._refused: list[list[bool]] = []
        output.mkdir(parents=True, exist_ok=True)
        self._load()

    @property
    def asks(self) -> list[Messages]:
        """What an observation asks the policy, in one call of `sample`."""
        return [*self._prompts * ANSWERS, *self._benign]

    @property
    def best_step(self) -> int:
        """The step with the best held-out score so far."""
        return _best(self._seen).step

    def due(self, step: int, last: bool) -> bool:
        """Return whether the held-out prompts are observed at a step."""
        return last or step % self.config.every == 0 or all(one.step >= step for one in self._seen)

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
            kl: to the reference, in nats.
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
            found["length_correlation"] = _correlation(rewards, lengths)
            warnings += _follows_length(found["length_correlation"], len(answers))
        reading = Reading(
            step=step,
            kl=kl,
            entropy=entropy,
            reward=float(numpy.mean(rewards)) if len(rewards) else None,
            disagreement=None if disagreement is None or not len(disagreement) else _mean(disagreement),
            **found,
        )
        self.readings.append(reading)
        self._append("watch.jsonl", dataclasses.asdict(reading))
        if not observed:
            return Decision(None, self.best_step, False, tuple(warnings))
        decision = decide(self._seen, self.config.patience)
        decision = decision._replace(
            stop=decision.stop if self.config.stop else None, warnings=tuple(warnings)
        )
        if decision.stop or last or time.monotonic() - self._plotted > _PLOT_EVERY_S:
            self.plot()
        return decision

    def plot(self) -> None:
        """Write `watch.svg`."""
        plot(self.readings, self._output / "watch.svg")
        self._plotted = time.monotonic()

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
        self._append("heldout.jsonl", record)
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
            "refusal_rate": _mean(refused) if refused else None,
        }
        return found, _refuses_more(self._refused)

    def _scored(self, who: str, score: Score, prompts: Sequence[Messages], answers: Sequence[str]) -> Array:
        found = numpy.asarray(score(prompts, answers), float)
        if found.shape != (len(answers),) or not numpy.isfinite(found).all():
            raise ModelError(f"{who} gave no finite score for each of {len(answers)} answers")
        return found.reshape(ANSWERS, len(self._prompts))

    # --- files ---

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self._output / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _load(self) -> None:
        try:
            for record in self._records("heldout.jsonl"):
                if record["prompts"] != self._key:
                    raise ConfigError(
                        f"{self._output}: was watched with other held-out prompts; name a new output folder"
                    )
                arrays = (numpy.asarray(record[name], float) for name in ("scores", "rewards"))
                self._seen.append(Observation(record["step"], *arrays))
                self._refused.append(record["refused"])
            self.readings = [Reading(**record) for record in self._records("watch.jsonl")]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._output}: what the watch wrote cannot be read ({error}); name a new output folder"
            ) from error

    def _records(self, name: str) -> list[dict[str, Any]]:
        path = self._output / name
        if not path.exists():
            return []
        lines, end, cut = path.read_bytes().rpartition(b"\n")
        if cut:  # by an interrupt
            os.truncate(path, len(lines) + len(end))
        return [json.loads(line) for line in lines.splitlines()]

    def _forget(self, step: int) -> None:
        """Drop what was seen at this step and later: the run went back to a checkpoint before it."""
        last = [*(one.step for one in self.readings[-1:]), *(one.step for one in self._seen[-1:])]
        if all(before < step for before in last):
            return
        kept = [index for index, one in enumerate(self._seen) if one.step < step]
        self._seen, self._refused = self._seen[: len(kept)], self._refused[: len(kept)]
        self.readings = [one for one in self.readings if one.step < step]
        for name in ("watch.jsonl", "heldout.jsonl"):
            lines = [json.dumps(record) + "\n" for record in self._records(name) if record["step"] < step]
            whole.write(self._output / name, "".join(lines))


def _mean(values: Sequence[Any]) -> float:
    return float(numpy.mean(numpy.asarray(values, float)))


def _refuses_more(refused: Sequence[Sequence[bool]]) -> list[str]:
    """Return a warning where benign prompts are refused more than at first, beyond chance."""
    if len(refused) < 2 or not refused[0]:
        return []
    rise = numpy.asarray(refused[-1], float) - numpy.asarray(refused[0], float)
    if rise.mean() <= AGAINST * rise.std() / math.sqrt(len(rise)):
        return []
    return [f"{_mean(refused[-1]):.0%} of the benign prompts are refused, at first {_mean(refused[0]):.0%}"]


def _follows_length(correlation: float | None, answers: int) -> list[str]:
    if correlation is None or answers < FEWEST:
        return []
    # Fisher's z: the one-sided lower bound of the correlation.
    bound = math.tanh(math.atanh(max(-0.999, min(0.999, correlation))) - AGAINST / math.sqrt(answers - 3))
    if bound <= FOLLOWS_LENGTH:
        return []
    return [f"the reward follows length (correlation {correlation:+.2f} over {answers} answers)"]


# --- the plot -----------------------------------------------------------------------------------------


def plot(readings: Sequence[Reading], path: Path) -> None:
    """Write the readings of a run as one SVG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("the plot of the watch", "matplotlib", "train") from error
    panels: list[tuple[str, tuple[str, ...]]] = [
        ("held-out score", ("heldout",)),
        ("reward", ("reward",)),
        ("agreement of reward and held-out score", ("agreement",)),
        ("KL and entropy, nats", ("kl", "entropy")),
        ("shares", ("refusal_rate", "boilerplate")),
        ("correlation of reward and length; disagreement", ("length_correlation", "disagreement")),
    ]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cai_graph", "font.family": "sans-serif"}):
        figure = Figure(figsize=(11, 9), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, (title, names) in zip(figure.subplots(3, 2, sharex=True).flat, panels, strict=True):
            axes.set_title(title, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            for name in names:
                points = [(one.step, value) for one in readings if (value := getattr(one, name)) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
            if len(names) > 1 and axes.lines:
                axes.legend(frameon=False, fontsize=8)
            _mark(axes, names[0], readings)
        for axes in figure.axes[-2:]:
            axes.set_xlabel("step")
        beside = path.with_name(f".{path.name}")
        figure.savefig(beside, format="svg", metadata={"Date": None})
    os.replace(beside, path)


def _mark(axes: Any, name: str, readings: Sequence[Reading]) -> None:
    """Draw the noise of held-out score and agreement, and the best step."""
    seen = [one for one in readings if one.heldout is not None]
    if not seen:
        return
    steps = [one.step for one in seen]
    if name == "heldout":
        best = max(seen, key=lambda one: one.heldout or 0.0)
        axes.axvline(best.step, color="#7a8794", linewidth=0.8, linestyle=":")
        values = numpy.array([one.heldout for one in seen], float)
        noise = numpy.array([one.heldout_noise or 0.0 for one in seen])
        axes.fill_between(steps, values - noise, values + noise, alpha=0.15)
    elif name == "agreement":
        noise = numpy.array([one.agreement_noise or 0.0 for one in seen])
        axes.fill_between(steps, -noise, noise, alpha=0.15, color="#7a8794")
