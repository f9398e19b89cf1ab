"""The threshold of a cascade: the guarantee, and where the pairs come from."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.runnables import RunnableLambda
from log_support import trajectory
from replies import RULES, by_role, principle, verdicts
from test_cascades import Cheap

from cai_graph import cascade, constitutional, open_log
from cai_graph.calls import UNATTENDED_SECONDS, Calls
from cai_graph.constitution import Constitution
from cai_graph.critic.calibration import Pair, calibrate, logged, needed, rejudged
from cai_graph.errors import BudgetExceeded, ConfigError, DataError, MissingExtra
from cai_graph.intervals import wilson
from cai_graph.log import Log
from cai_graph.prompts import Exchange
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import (
    Cascaded,
    ConstitutionRef,
    Critique,
    Draft,
    Label,
    Message,
    Round,
    Trajectory,
    Verdict,
    new_id,
    text_of,
)

# --- the threshold ------------------------------------------------------------------------------------


def test_the_threshold_is_the_order_statistic_that_the_binomial_tail_allows() -> None:
    # 473 violating answers allow one miss at 1 %: P(Bin(473, 0.01) <= 1) = 0.0498; 472 allow none (0.0502).
    scores = [0.001 * rank for rank in range(1, 474)]
    one_missed = calibrate([Pair(s, True) for s in scores] + [Pair(0.0015, False)] * 527, 0.01)
    none_missed = calibrate([Pair(s, True) for s in scores[:472]], 0.01)

    assert (one_missed.threshold, one_missed.missed) == (0.002, 1)
    assert one_missed.miss_rate_at_most == pytest.approx(0.01, abs=1e-4)
    assert one_missed.saved == pytest.approx(528 / 1000)
    assert (none_missed.threshold, none_missed.missed) == (0.001, 0)


def test_299_violating_answers_support_a_miss_rate_of_1_percent_and_298_do_not() -> None:
    assert needed(0.01) == 299
    assert calibrate([Pair(0.5, True)] * 299, 0.01).missed == 0
    with pytest.raises(DataError, match=r"takes 299 answers .* 298 of the 298 .* --miss-rate 0\.011, the"):
        calibrate([Pair(0.5, True)] * 298, 0.01)


def test_the_advice_of_a_refusal_is_not_refused() -> None:
    pairs = [Pair(0.5, True)] * 70 + [Pair(0.1, False)] * 450
    with pytest.raises(DataError, match=r"70 of the 520 .* --miss-rate 0\.042"):
        calibrate(pairs, 0.01)

    assert calibrate(pairs, 0.042).saved == pytest.approx(450 / 520)


def test_without_violating_answers_there_is_nothing_to_choose_from() -> None:
    with pytest.raises(DataError, match="there are none among 1000"):
        calibrate([Pair(0.1, False)] * 1000, 0.01)


def test_an_answer_that_is_always_asked_about_is_neither_missed_nor_saved() -> None:
    found = calibrate([Pair(None, True)] * 60 + [Pair(None, False)] * 40 + [Pair(0.999, False)] * 100, 0.05)

    assert (found.threshold, found.missed, found.saved) == (1.0, 0, 0.5)


def test_the_printed_threshold_is_never_above_the_one_found() -> None:
    found = calibrate([Pair(0.123456, True)] * 299, 0.01)

    assert found.threshold == 0.1234


def test_twenty_thousand_violating_answers_take_no_time() -> None:
    # scipy: P(Bin(20000, 0.05) <= 949) = 0.0495, and 0.0525 with one more.
    pairs = [Pair(rank / 20_000, True) for rank in range(20_000)]
    started = time.process_time()

    assert calibrate(pairs, 0.05).missed == 949
    assert time.process_time() - started < 5


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0])
def test_a_miss_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="share between 0 and 1"):
        calibrate([Pair(0.5, True)], rate)


def test_no_log_supports_a_miss_rate_that_is_next_to_none() -> None:
    with pytest.raises(DataError, match=r"miss rate of 1e-17 takes \d+ answers"):
        calibrate([Pair(0.5, True)], 1e-17)


@given(
    st.lists(st.tuples(st.floats(0, 1) | st.none(), st.booleans()), min_size=1, max_size=300),
    st.sampled_from([0.02, 0.05, 0.2]),
)
def test_on_any_data_the_bound_holds_or_the_data_are_refused(
    found: list[tuple[float | None, bool]], rate: float
) -> None:
    pairs = [Pair(*each) for each in found]
    try:
        chosen = calibrate(pairs, rate)
    except DataError:
        assert sum(pair.violates for pair in pairs) < needed(rate)
        return
    assert chosen.miss_rate_at_most <= rate
    assert chosen.saved_from <= chosen.saved <= chosen.saved_to
    missed = sum(p.violates and p.suspicion is not None and p.suspicion < chosen.threshold for p in pairs)
    assert missed == chosen.missed


def test_the_true_miss_rate_is_above_the_one_asked_for_in_at_most_5_percent_of_samples() -> None:
    draw = random.Random(0)
    rate, samples, broken = 0.05, 1000, 0
    for _ in range(samples):
        # Uniform probabilities: the threshold itself is the true miss rate.
        broken += calibrate([Pair(draw.random(), True) for _ in range(100)], rate).threshold > rate

    # P(Bin(100, 0.05) <= 1) = 0.037; five standard errors of 1000 draws are 0.030.
    assert broken / samples < 0.037 + 0.030


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


# --- from a log ---------------------------------------------------------------------------------------


def harmful(probability: float) -> bool:
    return probability >= 0.5


def run(log: Log, probabilities: list[float], *, threshold: float = 0.0, sample: float = 0.0) -> None:
    """Answer one question for each probability of the cheap critic; the strong one condemns from 0.5 on."""
    for number, probability in enumerate(probabilities):
        model = by_role(
            draft=f"answer {number} at {probability}",
            critique=verdicts(*(["no-harm"] if harmful(probability) else [])),
        )
        critic = cascade(Cheap(probability), model, threshold=threshold, sample=sample, seed=number)
        constitutional(
            model, constitution=RULES, critic=critic, log=log, max_rounds=0, on_violation="open"
        ).invoke(f"question {number}")
    log.flush()


def test_a_log_of_a_cascade_that_asked_both_calibrates_it(tmp_path: Path) -> None:
    with open_log(tmp_path / "log.db") as log:
        run(log, [0.9] * 59 + [0.1] * 41)
        found = logged(log, {})

    assert (found.cheap, found.strong, found.left_out) == ("cheap", "ScriptedModel", {})
    assert sorted(found.pairs) == [Pair(0.1, False)] * 41 + [Pair(0.9, True)] * 59
    assert calibrate(found.pairs, 0.05).threshold == 0.9


def test_what_the_strong_critic_saw_only_since_it_was_suspect_is_left_out(tmp_path: Path) -> None:
    with open_log(tmp_path / "log.db") as log:
        run(log, [0.1, 0.6] * 50, threshold=0.5, sample=0.2)
        found = logged(log, {})

    assert 5 <= len(found.pairs) <= 35
    assert {pair.suspicion for pair in found.pairs} == {0.1, 0.6}
    assert found.left_out == {
        "the strong critic was not asked, or only for what the cheap one said": 100 - len(found.pairs)
    }


def test_an_answer_that_came_twice_counts_once_and_an_unreadable_verdict_not_at_all(tmp_path: Path) -> None:
    with open_log(tmp_path / "log.db") as log:
        run(log, [0.9])
        run(log, [0.9])
        mute = by_role(critique="I would rather not say")
        constitutional(
            mute, constitution=RULES, critic=cascade(Cheap(0.2), mute, threshold=0), log=log, max_rounds=0
        ).invoke("question")
        log.flush()
        found = logged(log, {})

    assert found.pairs == (Pair(0.9, True),)
    assert found.left_out == {
        "the same answer again": 1,
        "the strong critic's verdict is unreadable": 1,
    }


def test_the_same_words_from_other_documents_are_another_answer(tmp_path: Path) -> None:
    with open_log(tmp_path / "log.db") as log:
        for said, docs in ((verdicts(), "it is"), (verdicts("no-harm"), "it is not")):
            model = by_role(critique=said)
            critic = cascade(Cheap(0.1), model, threshold=0)
            app = RunnableLambda(lambda asked: {"answer": "Yes.", **asked})
            constitutional(
                app, constitution=RULES, critic=critic, reviser=model, log=log, context_keys=["docs"]
            ).invoke({"question": "Is it covered?", "docs": docs})
        log.flush()

        assert sorted(logged(log, {}).pairs) == [Pair(0.1, False), Pair(0.1, True)]


def test_a_trifle_that_a_principle_lets_pass_is_no_violation(tmp_path: Path) -> None:
    rules = Constitution(name="lenient", principles=(principle("no-harm", "harmless", min_severity=3),))
    with open_log(tmp_path / "log.db") as log:
        for severity in (2, 3):
            said = verdicts("no-harm", ids=["no-harm"], severity=severity)
            model = by_role(draft=f"answer {severity}", critique=said)
            constitutional(
                model,
                constitution=rules,
                critic=cascade(Cheap(0.1), model, threshold=0),
                log=log,
                max_rounds=0,
            ).invoke("hello")
        log.flush()

        assert sorted(logged(log, {}).pairs) == [Pair(0.1, False), Pair(0.1, True)]


def test_a_log_without_a_cascade_says_what_to_do(tmp_path: Path) -> None:
    with open_log(tmp_path / "log.db") as log:
        constitutional(by_role(critique=verdicts()), constitution=RULES, log=log).invoke("hello")
        log.flush()
        with pytest.raises(DataError, match=r"1: no cascade judged them.*or say --cheap SPEC"):
            logged(log, {})


def test_verdicts_of_two_strong_critics_are_not_mixed(tmp_path: Path) -> None:
    class Other(ScriptedModel):
        pass

    with open_log(tmp_path / "log.db") as log:
        run(log, [0.9])
        other = Other(replies=lambda messages: verdicts())
        constitutional(
            other, constitution=RULES, critic=cascade(Cheap(0.2), other, threshold=0), log=log
        ).invoke("another")
        log.flush()
        with pytest.raises(DataError, match=r"verdicts of 2 pairs of critics .*choose with"):
            logged(log, {})


class Reader:
    """A cheap critic that reads its probability in the answer, of all principles or of one."""

    name = "reader"
    candidates = 1
    splits = False

    def __init__(self, reads: str | None = None) -> None:
        self.reads = reads

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        probability = float(text_of(exchange.answer).rpartition(" ")[2])
        verdicts = tuple(
            Verdict(label=Label.COMPLIES, principle=rule.id, probability=probability)
            for rule in constitution
            if self.reads in (None, rule.id)
        )
        return Critique(verdicts=verdicts, critic=self.name)

    async def discuss(self, *args: object) -> Critique:
        raise AssertionError


async def test_a_plain_log_is_enough_where_the_cheap_critic_judges_it_now(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_log(tmp_path / "log.db") as log:
        for number, probability in enumerate([0.9, 0.2, 0.7]):
            model = by_role(
                draft=f"answer {probability}",
                critique=verdicts(*(["no-harm"] if harmful(probability) else [])),
            )
            await constitutional(
                model, constitution=RULES, log=log, max_rounds=0, on_violation="open"
            ).ainvoke(f"question {number}")
        other = RULES.select(["no-harm"])
        one = by_role(draft="answer 0.4", critique=verdicts(ids=["no-harm"]))
        await constitutional(one, constitution=other, log=log).ainvoke("hello")
        found = await rejudged(
            log,
            Reader(),
            RULES,
            concurrency=2,
            filters={},
            progress=lambda done, total: seen.append((done, total)),
        )

    assert (found.cheap, found.strong) == ("reader", "ScriptedModel")
    assert sorted(found.pairs) == [Pair(0.2, False), Pair(0.7, True), Pair(0.9, True)]
    assert found.left_out == {"judged under another constitution": 1}
    assert seen == [(1, 3), (2, 3), (3, 3)]


class Failing(Reader):
    """One that fails on some answers, and tells how long each may take."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.seconds: set[float | None] = set()

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        self.seconds.add(calls.budget.seconds)
        if text_of(exchange.answer) == "answer 0.2":
            raise self.error
        return await super().critique(exchange, constitution, calls, explain=explain)


async def test_an_answer_on_which_the_cheap_critic_fails_is_left_out(tmp_path: Path) -> None:
    cheap, seen = Failing(BudgetExceeded("too late")), []
    with open_log(tmp_path / "log.db") as log:
        for number, probability in enumerate([0.9, 0.2, 0.7]):
            model = by_role(draft=f"answer {probability}", critique=verdicts())
            await constitutional(model, constitution=RULES, log=log).ainvoke(f"question {number}")
        found = await rejudged(
            log, cheap, RULES, concurrency=1, filters={}, progress=lambda *told: seen.append(told)
        )
        with pytest.raises(MissingExtra):
            await rejudged(
                log, Failing(MissingExtra("it", "torch", "train")), RULES, concurrency=1, filters={}
            )

    assert sorted(pair.suspicion for pair in found.pairs if pair.suspicion is not None) == [0.7, 0.9]
    assert found.left_out == {"the cheap critic failed with BudgetExceeded": 1}
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert cheap.seconds == {UNATTENDED_SECONDS}


async def test_a_cheap_critic_that_leaves_out_principles_clears_nothing_now(tmp_path: Path) -> None:
    with open_log(tmp_path / "log.db") as log:
        model = by_role(draft="answer 0.1", critique=verdicts())
        await constitutional(model, constitution=RULES, log=log).ainvoke("question")
        found = await rejudged(log, Reader("no-harm"), RULES, concurrency=1, filters={})

    assert found.pairs == (Pair(None, False),)


def test_a_violation_counts_although_another_verdict_is_unreadable(tmp_path: Path) -> None:
    model = by_role(critique=verdicts("no-harm", unreadable=["be-kind"]))
    critic = cascade(Cheap(0.2), model, threshold=0)
    with open_log(tmp_path / "log.db") as log:
        constitutional(
            model, constitution=RULES, critic=critic, log=log, max_rounds=0, on_violation="open"
        ).invoke("hello")
        log.flush()

        assert logged(log, {}).pairs == (Pair(0.2, True),)


async def test_what_no_critic_judged_under_all_principles_and_the_cheap_ones_own_is_left_out(
    tmp_path: Path,
) -> None:
    ours = ConstitutionRef(name="rules", version="1", digest=RULES.digest)
    both = msgspec.structs.replace(trajectory(), constitution=ours)
    judged = both.rounds[0].critique
    said = Draft(answer=Message(role="assistant", content="answer 0.2"))

    def logged_as(
        critic: str,
        verdicts: tuple[Verdict, ...] = judged.verdicts,
        how: Cascaded | None = None,
        **changes: Any,
    ) -> Trajectory:
        rounds = (Round(critique=Critique(verdicts=verdicts, critic=critic, cascade=how)),)
        return msgspec.structs.replace(both, id=new_id(), draft=said, rounds=rounds, **changes)

    records = [
        logged_as("strong"),
        logged_as("strong", ()),
        logged_as("strong", how=Cascaded(why="above", threshold=0.5)),
        logged_as("strong", mode="sampled"),
        logged_as("human", mode="imported"),
        logged_as("reader"),
        logged_as("probe:reader"),
    ]
    with open_log(tmp_path / "log.db") as log:
        for record in records:
            log.append(record).result()
        found = await rejudged(log, Reader(), RULES, concurrency=1, filters={})

    assert (found.strong, len(found.pairs)) == ("strong", 1)
    assert found.left_out == {
        "no critic judged them under all principles": 2,
        "the cheap critic itself judged them": 2,
        "the strong critic was not asked, or only for what the cheap one said": 1,
        "the strong critic's verdict is unreadable": 1,
    }


async def test_the_cheap_critic_is_shown_the_documents_that_the_answer_was_made_from(tmp_path: Path) -> None:
    shown: list[dict[str, str]] = []

    class Looking(Reader):
        async def critique(self, exchange: Exchange, *args: Any, **options: Any) -> Critique:
            shown.append(exchange.context)
            return await super().critique(exchange, *args, **options)

    model = by_role(critique=verdicts())
    app = RunnableLambda(lambda asked: {"answer": "answer 0.1", **asked})
    with open_log(tmp_path / "log.db") as log:
        await constitutional(
            app, constitution=RULES, critic=model, reviser=model, log=log, context_keys=["docs"]
        ).ainvoke({"question": "Is it covered?", "docs": "it is"})
        await rejudged(log, Looking(), RULES, concurrency=1, filters={})

    assert shown == [{"docs": "it is"}]
