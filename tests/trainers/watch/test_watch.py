"""The Goodhart watch: on a policy that learns by REINFORCE here, and on simulated scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from tiny import reward_model

from cai_graph.errors import ConfigError, DataError, ModelError
from trainers.rewards import parse
from trainers.watch import Decision, Watch, WatchConfig
from trainers.watch.figures import boilerplate, correlation, follows_length, refuses_more
from trainers.watch.rules import ANSWERS, Observation, agreement, decide, fall

Messages = list[dict[str, Any]]
WORDS = ("kind", "clear", "rude", "vague")
GOOD = {"kind", "clear"}
LONGEST = 12


def asked(number: int) -> Messages:
    return [{"role": "user", "content": f"question {number}"}]


def wanted(prompt: Messages) -> int:
    """How many words answer a prompt best: 4 to 6."""
    return 4 + int(prompt[-1]["content"].split()[-1]) % 3


def gold(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
    """What is really wanted: good words, and as many as the question needs."""
    return [
        sum(word in GOOD for word in answer.split()) / max(1, len(answer.split()))
        - abs(len(answer.split()) - wanted(prompt)) / 4
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def flawed(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
    """A reward model with a flaw: good words, and length counts as good."""
    return [
        sum(word in GOOD for word in answer.split()) / max(1, len(answer.split())) + len(answer.split()) / 4
        for answer in answers
    ]


class Honest:
    """A reward model without that flaw: the wanted score, and an error of its own for each answer."""

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        errors = [
            numpy.random.default_rng(list(f"{prompt}{answer}".encode())).normal(0, 0.3)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return [score + error for score, error in zip(gold(prompts, answers), errors, strict=True)]


class Policy:
    """A softmax over words at each place of an answer, its end among them; trained by REINFORCE with a
    baseline (Williams 1992) and a KL to where it began (the anchor of RLHF), by gradients in closed form."""

    def __init__(self, seed: int) -> None:
        self.random = numpy.random.default_rng(seed)
        self.logits = numpy.zeros((LONGEST, len(WORDS) + 1))
        self.logits[:, -1] = 0.4  # the end is likely at first, so answers are short
        self.start = self.logits.copy()

    @property
    def chances(self) -> Any:
        weights = numpy.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def draw(self, count: int) -> tuple[Any, Any]:
        """Return chosen words (count, LONGEST) and whether each place is before or at the end."""
        sums = self.chances.cumsum(axis=1)
        chosen = (self.random.random((count, LONGEST, 1)) > sums[None]).sum(axis=2).clip(max=len(WORDS))
        over = (chosen == len(WORDS)).cumsum(axis=1)
        return chosen, (over == 0) | ((over == 1) & (chosen == len(WORDS)))

    def text(self, chosen: Any) -> str:
        words = []
        for word in chosen:
            if word == len(WORDS):
                break
            words.append(WORDS[word])
        return " ".join(words)

    def sample(self, prompts: Sequence[Messages]) -> list[str]:
        return [self.text(row) for row in self.draw(len(prompts))[0]]

    def divergence(self) -> tuple[float, float]:
        """Return KL to the start and entropy, each the mean over places, in nats."""
        begun = numpy.exp(self.start) / numpy.exp(self.start).sum(axis=1, keepdims=True)
        p = self.chances
        return float((p * numpy.log(p / begun)).sum(axis=1).mean()), float(
            -(p * numpy.log(p)).sum(axis=1).mean()
        )

    def update(
        self, prompts: Sequence[Messages], reward: Any, rate: float = 0.15
    ) -> tuple[list[str], list[float]]:
        chosen, alive = self.draw(len(prompts))
        answers = [self.text(row) for row in chosen]
        rewards = reward(prompts, answers)
        advantages = (numpy.array(rewards) - numpy.mean(rewards)) / (numpy.std(rewards) + 1e-6)
        taken = numpy.eye(len(WORDS) + 1)[chosen]
        slope = ((taken - self.chances) * alive[:, :, None] * advantages[:, None, None]).mean(axis=0)
        self.logits += rate * (slope - 0.01 * (self.logits - self.start))
        return answers, rewards


def trained(
    folder: Path, reward: Any, seed: int, *, steps: int = 400, stop: bool = True
) -> tuple[Watch, Decision, Policy, Any]:
    """Train a policy under the watch; returns it as it is at the end, and the logits that were best."""
    policy = Policy(seed)
    heldout = [asked(number) for number in range(1000, 1064)]
    watch = Watch(
        WatchConfig(judge="", every=10, stop=stop),
        judge=gold,
        reward=reward,
        prompts=heldout,
        benign_prompts=heldout[:4],
        sample=policy.sample,
        output=folder,
    )
    decision = watch.observe(step=0, kl=0.0, entropy=policy.divergence()[1])
    best = policy.logits.copy()
    for step in range(1, steps + 1):
        prompts = [asked(int(number)) for number in policy.random.integers(0, 900, 24)]
        answers, rewards = policy.update(prompts, reward)
        kl, entropy = policy.divergence()
        decision = watch.observe(
            step=step, kl=kl, entropy=entropy, prompts=prompts, answers=answers, rewards=rewards
        )
        if decision.is_best:
            best = policy.logits.copy()
        if decision.stop:
            break
    return watch, decision, policy, best


def fresh(logits: Any) -> float:
    """The true held-out score of a policy: of 1920 fresh answers to the held-out prompts."""
    policy = Policy(7)
    policy.logits = logits
    prompts = [asked(number) for number in range(1000, 1064)] * 30
    return float(numpy.mean(gold(prompts, policy.sample(prompts))))


def observed(watch: Watch) -> list[Any]:
    return [reading for reading in watch.readings if reading.heldout is not None]


@pytest.mark.parametrize("seed", range(2))
def test_a_run_on_a_reward_with_a_flaw_stops_before_the_held_out_score_has_fallen_beyond_its_noise(
    tmp_path: Path, seed: int
) -> None:
    watch, decision, policy, best = trained(tmp_path, flawed, seed)

    assert decision.stop is not None
    stopped = observed(watch)[-1]
    assert stopped.step < 400
    assert fresh(best) - fresh(policy.logits) < stopped.heldout_noise
    assert fresh(best) > fresh(policy.start) + stopped.heldout_noise
    assert decision.best_step == max(observed(watch), key=lambda reading: reading.heldout).step


def test_without_the_stop_that_run_goes_on_to_ruin_while_its_reward_rises(tmp_path: Path) -> None:
    watch, _, policy, best = trained(tmp_path, flawed, 0, stop=False)

    assert watch.readings[-1].step == 400
    assert fresh(best) - fresh(policy.logits) > 2 * observed(watch)[-1].heldout_noise
    assert watch.readings[-1].reward > watch.readings[50].reward + 0.5


@pytest.mark.parametrize("seed", range(2))
def test_a_run_on_a_reward_without_the_flaw_is_not_stopped(tmp_path: Path, seed: int) -> None:
    watch, decision, policy, _ = trained(tmp_path, Honest(), seed, steps=200)

    assert decision.stop is None
    assert watch.readings[-1].step == 200
    assert fresh(policy.logits) > fresh(policy.start) + 0.5


def test_the_watch_writes_every_step_keeps_the_held_out_answers_and_plots(tmp_path: Path) -> None:
    watch, decision, _, _ = trained(tmp_path, flawed, 0)

    lines = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(watch.readings[-1].step + 1))
    assert [line["step"] for line in lines if line["heldout"] is not None] == list(
        range(0, len(lines), watch.config.every)
    )
    assert lines[-1]["length_correlation"] > 0.5
    record = json.loads((tmp_path / "heldout.jsonl").read_text().splitlines()[-1])
    heldout = [asked(number) for number in range(1000, 1064)]
    for answers, scores, rewards in zip(record["answers"], record["scores"], record["rewards"], strict=True):
        assert gold(heldout, answers) == scores
        assert flawed(heldout, answers) == rewards
    assert any("follows length" in warning for warning in decision.warnings)
    assert (tmp_path / "watch.svg").read_text().count("held-out score") >= 1


# --- the rules ----------------------------------------------------------------------------------------


def seen(step: int, scores: Any, rewards: Any = None) -> Observation:
    scores = numpy.array(scores, float)
    return Observation(
        step, scores, numpy.zeros_like(scores) if rewards is None else numpy.array(rewards, float)
    )


def test_the_fall_is_measured_by_the_answers_that_did_not_choose_the_best() -> None:
    # First answers have their best at step 1 (5, 5), second answers at step 0 (3, 3).
    run = [seen(0, [[2, 2], [3, 3]]), seen(1, [[5, 5], [1, 1]]), seen(2, [[1, 2], [0, 1]])]

    # Second answers against step 1: -1, 0. First answers against step 0: -1, 0. Mean by prompt: -1, 0.
    change = fall(run)
    assert change.mean == pytest.approx(-0.5)
    assert change.noise == pytest.approx(2.33 * numpy.std([-1, 0], ddof=1) / numpy.sqrt(2))


def test_agreement_is_the_correlation_between_answers_to_one_prompt() -> None:
    # Differences of the rewards 1, -1, 2; of the scores 2, 0, -1. Products 2, 0, -2; squares sum to 6 and 5.
    pull = agreement(seen(0, [[3, 5, 0], [1, 5, 1]], [[1, 0, 2], [0, 1, 0]]))

    assert pull.mean == pytest.approx(0)
    assert pull.noise == pytest.approx(1.645 * numpy.sqrt(8) / numpy.sqrt(30))
    assert agreement(seen(0, [[1, 2], [1, 2]], [[1, 0], [0, 1]])) == (0, 0)


def simulated(
    rise: float, reward: Callable[[Any, Any], Any], random: numpy.random.Generator, prompts: int = 64
) -> str | None:
    """Return why a run of 20 observations is stopped, if it is; `rise` is in standard errors."""
    means = random.normal(size=prompts)
    run: list[Observation] = []
    for step in range(20):
        noise = random.normal(size=(ANSWERS, prompts))
        scores = means + rise * step / numpy.sqrt(prompts) + noise
        run.append(Observation(step, scores, reward(scores, random)))
        if stop := decide(run).stop:
            return stop
    return None


def test_runs_in_which_nothing_is_wrong_are_rarely_stopped() -> None:
    random = numpy.random.default_rng(0)

    def unrelated(scores: Any, random: numpy.random.Generator) -> Any:
        return random.normal(size=scores.shape)

    def weakly_agreeing(scores: Any, random: numpy.random.Generator) -> Any:
        return 0.45 * scores + random.normal(size=scores.shape)

    unchanged = [simulated(0, unrelated, random) for _ in range(200)]
    rising = [simulated(0.4, weakly_agreeing, random) for _ in range(200)]
    # 4 % and 3 to 5 % are the rates of the two rules; 26 of 200 would be four deviations above.
    assert sum(stop is not None for stop in unchanged) <= 26
    assert sum(stop is not None for stop in rising) <= 6
    assert not any("pulls" in stop for stop in rising if stop)


def test_a_collapse_that_the_reward_has_no_part_in_is_stopped_and_named() -> None:
    random = numpy.random.default_rng(1)

    reasons = [simulated(-1.5, lambda scores, random: scores * 0, random) for _ in range(20)]
    assert all(reason is not None and "below its best, more than its noise" in reason for reason in reasons)


def test_the_best_observation_is_never_a_stop() -> None:
    against = [[1.0] * 16, [0.0] * 16], [[0.0] * 16, [1.0] * 16]
    better = [[scores + step for scores in row] for step in (0,) for row in against[0]]

    run = [seen(0, *against), seen(1, *against), seen(2, *against)]
    assert decide(run).stop is not None
    run[-1] = seen(2, numpy.array(better) + 1, against[1])
    assert decide(run) == Decision(None, 2, True)


# --- figures ------------------------------------------------------------------------------------------


def test_boilerplate_is_what_answers_to_many_prompts_share() -> None:
    prompts = [asked(number) for number in range(6)]
    stale = "you are valid, valued, and cared for"
    answers = [f"{stale}: {number}" for number in range(4)] + ["a kettle boils", "the moon is far away today"]

    assert boilerplate(prompts, answers) == pytest.approx(4 / 6)
    # Many answers to one prompt may be alike.
    assert boilerplate([asked(0)] * 4 + [asked(1), asked(2)], answers) == 0
    assert boilerplate(prompts[:2], answers[:2]) is None
    assert boilerplate(prompts[:3], ["你是有价值的人吗"] * 3) == 1


def watch_of(folder: Path, sample: Callable[[Sequence[Messages]], list[str]], **changes: Any) -> Watch:
    settings: dict[str, Any] = {
        "judge": gold,
        "reward": flawed,
        "prompts": [asked(number) for number in range(16)],
        "benign_prompts": [asked(number) for number in range(100, 120)],
        "sample": sample,
        "output": folder,
    }
    return Watch(WatchConfig(judge="", every=2), **settings | changes)


def test_refusals_of_benign_prompts_are_counted_and_their_rise_is_told(tmp_path: Path) -> None:
    answers = ["kind"]
    watch = watch_of(tmp_path, lambda prompts: answers * len(prompts))

    assert watch.observe(step=0, kl=0.0, entropy=1.0).warnings == ()
    answers[0] = "I'm sorry, but I can't help with that."
    decision = watch.observe(step=2, kl=0.0, entropy=1.0)
    assert decision.warnings == ("100% of the benign prompts are refused, at first 0%",)
    assert [reading.refusal_rate for reading in watch.readings] == [0, 1]


def test_more_refusals_are_told_beyond_chance_only() -> None:
    def of_20(refused: int) -> list[bool]:
        return [number < refused for number in range(20)]

    assert refuses_more([of_20(0), of_20(1)]) == []  # 0.05 ± 0.08
    assert refuses_more([of_20(0), of_20(4)]) == ["20% of the benign prompts are refused, at first 0%"]
    assert refuses_more([of_20(20), of_20(0)]) == []
    assert refuses_more([[], []]) == refuses_more([of_20(5)]) == []


def test_a_reward_that_follows_length_is_told_beyond_chance_only() -> None:
    assert follows_length(0.6, 16) == []  # Fisher's z 0.69 ± 0.46: from 0.23
    assert follows_length(0.6, 400) == ["the reward follows length (correlation +0.60 over 400 answers)"]
    assert follows_length(1.0, 16) != []
    assert follows_length(1.0, 15) == follows_length(-1.0, 400) == follows_length(None, 400) == []


def test_a_correlation_needs_three_values_on_sides_that_vary() -> None:
    assert correlation([1, 2, 4], [3, 5, 9]) == pytest.approx(1)
    assert correlation([1, 2, 3], [9, 5, 4]) == pytest.approx(-5 / math.sqrt(28))
    assert correlation([1, 1, 1], [1, 2, 3]) is correlation([1, 2, 3], [1, 1, 1]) is None
    assert correlation([1, 2], [1, 2]) is None


# --- what can go wrong --------------------------------------------------------------------------------


def test_a_judge_that_is_out_leaves_nothing_half_written_and_the_step_can_be_repeated(tmp_path: Path) -> None:
    def out(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        raise TimeoutError("the judge is out")

    policy = Policy(0)
    watch_of(tmp_path, policy.sample).observe(step=0, kl=0.0, entropy=1.0)
    before = (tmp_path / "heldout.jsonl").read_bytes()
    with pytest.raises(TimeoutError):
        watch_of(tmp_path, policy.sample, judge=out).observe(step=2, kl=0.0, entropy=1.0)
    assert (tmp_path / "heldout.jsonl").read_bytes() == before

    watch = watch_of(tmp_path, policy.sample)
    watch.observe(step=2, kl=0.0, entropy=1.0)
    assert [reading.step for reading in watch.readings] == [0, 2]


@pytest.mark.parametrize("wrong", [[1.0], [float("nan")] * 32])
def test_a_score_that_is_no_number_for_each_answer_is_refused(tmp_path: Path, wrong: list[float]) -> None:
    watch = watch_of(tmp_path, Policy(0).sample, judge=lambda prompts, answers: wrong)

    with pytest.raises(ModelError, match="held-out judge gave no finite score for each of 32"):
        watch.observe(step=0, kl=0.0, entropy=1.0)
    assert not (tmp_path / "watch.jsonl").exists()


def test_a_watch_goes_on_after_an_interrupt_and_forgets_what_the_run_repeats(tmp_path: Path) -> None:
    policy = Policy(0)
    first = watch_of(tmp_path, policy.sample)
    for step in range(6):
        first.observe(step=step, kl=0.0, entropy=1.0)
    with (tmp_path / "watch.jsonl").open("a") as file:
        file.write('{"step": 6, "kl"')  # cut in the middle of a line

    second = watch_of(tmp_path, policy.sample)
    assert [reading.step for reading in second.readings] == [0, 1, 2, 3, 4, 5]
    assert second.best_step == first.best_step
    second.observe(step=3, kl=0.0, entropy=1.0)
    second.observe(step=4, kl=0.0, entropy=1.0)
    for name, steps in (("watch.jsonl", [0, 1, 2, 3, 4]), ("heldout.jsonl", [0, 2, 4])):
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps


@pytest.mark.parametrize("name", ["watch.jsonl", "heldout.jsonl"])
def test_a_damaged_line_of_the_watch_is_named_and_stays(tmp_path: Path, name: str) -> None:
    watch_of(tmp_path, Policy(0).sample).observe(step=0, kl=0.0, entropy=1.0)
    damaged = '{"step": 0, "kl"\n' + (tmp_path / name).read_text()
    (tmp_path / name).write_text(damaged)

    with pytest.raises(DataError, match=rf"{name} line 1: no JSON: .*; name a new output folder"):
        watch_of(tmp_path, Policy(0).sample)
    assert (tmp_path / name).read_text() == damaged


def test_a_watch_that_could_not_tell_anything_is_refused(tmp_path: Path) -> None:
    sample = Policy(0).sample
    with pytest.raises(
        ConfigError, match="has 3 different held-out prompts, and tells nothing from noise below 16"
    ):
        watch_of(tmp_path, sample, prompts=[asked(0), asked(1), asked(2)])
    with pytest.raises(ConfigError, match="the held-out judge is the reward that is trained on"):
        watch_of(tmp_path, sample, judge=flawed)
    with pytest.raises(ConfigError, match=r"watch\.patience is a number from 1, found 0"):
        WatchConfig(judge="", patience=0)
    watch_of(tmp_path, sample).observe(step=0, kl=0.0, entropy=1.0)
    with pytest.raises(ConfigError, match="was watched with other held-out prompts"):
        watch_of(tmp_path, sample, prompts=[asked(number) for number in range(30)])


def test_rows_of_one_prompt_are_one_held_out_prompt(tmp_path: Path) -> None:
    """As in a dataset of preferences, which has several rows of a prompt."""
    sample = Policy(0).sample
    with pytest.raises(ConfigError, match="has 15 different held-out prompts"):
        watch_of(tmp_path, sample, prompts=[asked(number % 15) for number in range(64)])
    config = WatchConfig(judge="", prompts=16)
    doubled = [asked(number // 2) for number in range(64)]
    watch = watch_of(tmp_path, sample, prompts=doubled, benign_prompts=[])
    assert watch.asks == [asked(number) for number in range(32)] * 2
    assert config.asks(doubled)[:32] == [asked(number) for number in range(16)] * 2


def test_a_judge_is_told_from_the_reward_by_its_weights_and_not_by_its_folder(tmp_path: Path) -> None:
    one, other = (
        str(reward_model(tmp_path / name / "checkpoint", seed=seed))
        for seed, name in enumerate(("one", "other"))
    )
    (tmp_path / "alias").symlink_to(one)
    heldout = [asked(number) for number in range(16)]

    def watch(judge: str, reward: str | list[str]) -> Watch:
        config = WatchConfig(judge=judge, prompts=16)
        return Watch.of(
            config, reward=parse(reward), heldout=heldout, sample=lambda asks: [], output=tmp_path / "out"
        )

    watch(other, one)
    for judge, reward in ((one, [one, other]), (str(tmp_path / "alias"), one)):
        with pytest.raises(ConfigError, match="which the policy is trained on"):
            watch(judge, reward)
