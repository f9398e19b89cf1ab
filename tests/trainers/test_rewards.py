"""Rewards: as many finite numbers as answers, or an error; nothing in between."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from judges import rated
from test_policy_model import PROMPTS
from tiny import reward_model
from toy_rewards import length
from wire import Reply, serving

from cai_graph import constitution, models
from cai_graph.critic import MAX_ANSWER_CHARS
from cai_graph.errors import ConfigError
from trainers.feedback.judge import Judge
from trainers.policy import Messages, load_reward, score
from trainers.rewards import (
    EnsembleReward,
    FunctionReward,
    JudgeReward,
    ModelReward,
    RewardError,
    parse,
    ratings,
    sources,
)

ANSWERS = ["yes", "no", "perhaps", "certainly not", "mu"]
RULES = constitution.load("balanced")


def shown(body: dict[str, Any]) -> str:
    """The answer that a judge is shown."""
    text = str(body["messages"][-1]["content"])
    return text.partition("<answer>\n")[2].partition("\n</answer>")[0]


def test_a_function_rewards_by_its_spec() -> None:
    reward = parse("toy_rewards:length")

    assert reward(PROMPTS, ANSWERS) == [3, 2, 7, 13, 2]
    assert reward.name == "toy_rewards:length"


@pytest.mark.parametrize("bad", [[1.0], [1.0, None, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, math.nan, 1.0]])
def test_what_is_not_a_finite_number_for_each_answer_is_never_given(bad: list[float | None]) -> None:
    tries: list[int] = []

    def broken(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float | None]:
        tries.append(1)
        return bad

    with pytest.raises(RewardError, match="broken failed 3 times: it gave"):
        FunctionReward(broken, waits=(0, 0))(PROMPTS, ANSWERS)
    assert len(tries) == 3


def test_a_reward_that_fails_for_a_while_is_asked_again() -> None:
    fails = iter([OSError("gone"), OSError("gone"), None])

    def flaky(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
        if (error := next(fails)) is not None:
            raise error
        return length(prompts, answers)

    assert FunctionReward(flaky, waits=(0, 0))(PROMPTS, ANSWERS) == length(PROMPTS, ANSWERS)


def test_a_reward_model_scores_with_its_own_tokenizer(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "rm")
    expected = score(load_reward(folder, device="cpu"), PROMPTS, ANSWERS, batch_size=16)

    reward = parse(str(folder), device="cpu")

    assert isinstance(reward, ModelReward)
    assert reward.name == "model:rm"
    assert reward(PROMPTS, ANSWERS) == expected


def test_an_ensemble_gives_mean_and_disagreement_and_asks_each_member_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def member(name: str, factor: float) -> FunctionReward:
        def function(prompts: Sequence[Messages], answers: Sequence[str]) -> list[float]:
            asked.append(name)
            return [factor * len(answer) for answer in answers]

        return FunctionReward(function, name)

    ensemble = EnsembleReward([member("a", 1), member("b", 3)])

    assert ensemble(PROMPTS, ANSWERS) == [6, 4, 14, 26, 4]
    assert ensemble.disagreement(PROMPTS, ANSWERS) == [3, 2, 7, 13, 2]
    assert asked == ["a", "b"]
    assert ensemble(PROMPTS, ANSWERS[::-1]) == [4, 26, 14, 4, 6]
    assert ensemble.name == "mean(a, b)"


def test_a_list_of_specs_is_an_ensemble(tmp_path: Path) -> None:
    reward = parse([str(reward_model(tmp_path / "one")), "toy_rewards:length"], device="cpu")

    assert isinstance(reward, EnsembleReward)
    assert [member.name for member in reward.members] == ["model:one", "toy_rewards:length"]


def test_a_judge_rewards_each_answer_directly() -> None:
    with serving(lambda body: rated("9" if shown(body) == "yes" else "3")) as server:
        reward = parse(f"judge:{server.spec}")

        assert reward(PROMPTS, ANSWERS) == [1, -0.5, -0.5, -0.5, -0.5]
    assert sorted(shown(body) for body in server.requests) == sorted(ANSWERS)


def test_a_critic_rewards_by_the_probability_that_an_answer_violates_nothing() -> None:
    from wire import under

    with serving(under(RULES, violates=lambda text: "certainly not" in text)) as server:
        reward = parse({"critic": server.spec, "constitution": "balanced"})

        assert reward(PROMPTS, ANSWERS) == [1, 1, 1, -1, 1]


def test_after_an_outage_a_judge_is_asked_only_about_the_rest() -> None:
    seen: list[str] = []

    def script(body: dict[str, Any]) -> Reply:
        seen.append(shown(body))
        return Reply("gone", status=503) if len(seen) == 3 else rated("9")

    with serving(script) as server:
        judge = Judge(models.load(server.spec, max_retries=0))
        reward = JudgeReward(judge, RULES, concurrency=1, waits=(0,))

        assert reward(PROMPTS, ANSWERS) == [1] * 5
    assert [text for text in seen if seen.count(text) == 1] == ["yes", "no", "certainly not", "mu"]


def test_a_judge_that_stays_away_is_an_error_that_says_so() -> None:
    with serving(lambda body: Reply("gone", status=500)) as server:
        judge = Judge(models.load(server.spec, max_retries=0))
        with pytest.raises(RewardError, match=r"failed 2 times: .*500.*the provider failed"):
            JudgeReward(judge, RULES, waits=(0,))(PROMPTS, ANSWERS)


def test_a_refused_key_is_not_asked_again() -> None:
    with serving(lambda body: Reply("no", status=401)) as server:
        reward = JudgeReward(Judge(server.spec), RULES, concurrency=1, waits=(0, 0))
        with pytest.raises(RewardError, match="cannot be had: OpenAIAuthenticationError"):
            reward(PROMPTS, ANSWERS)
    assert len(server.requests) == 1


def test_one_unreadable_answer_of_many_scores_as_the_mean_and_is_counted() -> None:
    def script(body: dict[str, Any]) -> Reply:
        return rated("The") if shown(body) == "mu" else rated("9" if shown(body) == "yes" else "5")

    with serving(script) as server:
        reward = JudgeReward(Judge(server.spec), RULES, waits=())
        each_its_own = [[{"role": "user", "content": f"{number}?"}] for number in range(10)]
        scores = reward(each_its_own, ["yes"] * 3 + ["no"] * 6 + ["mu"])

        assert scores[-1] == pytest.approx(3 / 9)
        assert reward.unreadable == 1
        reward(PROMPTS, ANSWERS)  # of a few, one may be
        with pytest.raises(RewardError, match="gave None for answer 3 of 5"):
            reward(PROMPTS, [*ANSWERS[:3], "mu", "mu"])


@pytest.mark.parametrize("status", [400, 413, 422])
def test_an_answer_that_a_provider_rejects_is_unreadable_and_does_not_end_a_run(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    def script(body: dict[str, Any]) -> Reply:
        return Reply("a filter has it", status=status) if "mu" in shown(body) else rated("9")

    with serving(script) as server:
        reward = JudgeReward(Judge(server.spec), RULES, concurrency=1, waits=())

        assert reward(PROMPTS, ANSWERS[::-1]) == [1] * 5
        assert reward.unreadable == 1
        assert "1 of 5 answers stay unreadable: they were rejected, the first with" in caplog.text
        assert "a filter has it" in caplog.text
        *others, rejected = ratings(reward, PROMPTS, ANSWERS)
        assert others == [1, 1, 1, 1]
        assert "a filter has it" in str(rejected)
        with pytest.raises(RewardError, match=r"None for answer 0 of 2; rejected with .*a filter has it"):
            reward(PROMPTS[:2], ["mu", "mu mu"])


def test_an_answer_that_was_rejected_is_not_asked_about_again() -> None:
    seen: list[str] = []

    def script(body: dict[str, Any]) -> Reply:
        seen.append(shown(body))
        if seen[-1] == "mu":
            return Reply("a filter has it", status=400)
        return rated("The" if seen.count("yes") == 1 and seen[-1] == "yes" else "9")

    with serving(script) as server:
        reward = JudgeReward(Judge(server.spec), RULES, concurrency=1, waits=(0,))
        assert reward(PROMPTS, ANSWERS[::-1]) == [1] * 5
        assert seen[-3:] == ["no", "yes", "yes"]
        assert reward.unreadable == 1
        with pytest.raises(RewardError, match=r"rejected with .*a filter has it"):
            reward(PROMPTS[:2], ["mu", "mu"])


def test_an_answer_that_is_too_long_to_be_judged_whole_is_unreadable() -> None:
    with serving(lambda body: rated("9")) as server:
        reward = JudgeReward(Judge(server.spec), RULES, waits=())
        first, *others = ratings(reward, PROMPTS, ["x" * (MAX_ANSWER_CHARS + 1), *ANSWERS[1:]])
        assert "a model judges at most 400,000" in str(first)
        assert others == [1, 1, 1, 1]


def test_an_unreadable_answer_is_paid_what_the_others_to_its_prompt_are() -> None:
    """Or else RLOO would reward to be unreadable, where the other answers to a prompt are bad."""
    said = {"step 1": "1", "step 2": "3", "flour": "9", "garbled": "The"}
    bad, good = [{"role": "user", "content": "a bomb?"}], [{"role": "user", "content": "bread?"}]
    with serving(lambda body: rated(said[shown(body)])) as server:
        reward = JudgeReward(Judge(server.spec), RULES, waits=())
        scores = reward([bad] * 3 + [good] * 9, ["step 1", "step 2", "garbled"] + ["flour"] * 9)
        assert scores[:4] == [-1, -0.5, -0.75, 1]
        assert reward([bad, good, good], ["garbled", "flour", "step 1"])[0] == 0  # the batch's mean
        with pytest.raises(RewardError, match="gave None for answer 0 of 1"):
            reward([bad], ["garbled"])


def test_who_measures_gets_no_number_where_a_judge_was_unreadable() -> None:
    with serving(lambda body: rated("The" if shown(body) in ("no", "mu") else "9")) as server:
        judge = JudgeReward(Judge(server.spec), RULES, waits=())
        assert ratings(judge, PROMPTS, ANSWERS) == [1, None, 1, 1, None]
        both = EnsembleReward([judge, FunctionReward(length)])
        assert ratings(both, PROMPTS, ANSWERS) == [2, None, 4, 7, None]


def local_critic(rules: str) -> dict[str, str]:
    return {"critic": "local", "constitution": rules}


@pytest.mark.parametrize(
    ("one", "other", "one_source"),
    [
        (local_critic("harmlessness"), local_critic("human-rights"), True),  # the same head reads both
        (local_critic("harmlessness"), local_critic("balanced"), True),
        (local_critic("harmlessness"), local_critic("helpful.yaml"), False),  # another head
        ("critic:trained:mine", {"critic": "trained:mine", "constitution": "human-rights"}, True),
        ("critic:local", "judge:local", False),  # heads, and the words of the same model
        ("judge:local", {"judge": "local", "constitution": "human-rights"}, False),
        (["toy_rewards:length", "critic:local"], "critic:local", True),
    ],
)
def test_what_gives_the_numbers_is_known(
    one: Any, other: Any, one_source: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    of_help = [{"id": "help", "aim": "helpful", "critique_request": "?", "revision_request": "!"}]
    Path("helpful.yaml").write_text(json.dumps({"name": "helpful", "principles": of_help}))
    head = {"threshold": 0.5, "scale": 1.0, "shift": 0.0, "text": "?"}
    card = {"format": 1, "kind": "classifier", "model": {"max_tokens": 64}}
    Path("mine").mkdir()
    Path("mine/card.json").write_text(json.dumps({**card, "heads": {"harmless": head, "helpful": head}}))

    assert bool(sources(parse(one)) & sources(parse(other))) == one_source


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_reward.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"'no_reward:mine': cannot be imported: ZeroDivisionError"):
        parse("no_reward:mine")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere/rm", "is no folder with a reward model"),
        ("no.such:thing", "cannot be imported"),
        ("math:pi", "is a float, not a function"),
        (["judge:local"], "at least two members"),
        ({"judges": "local"}, "write {judge: MODEL"),
        ({"judge": "local", "constituton": "x"}, "write {judge: MODEL"),
    ],
)
def test_a_spec_that_names_nothing_says_so(spec: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(spec)
