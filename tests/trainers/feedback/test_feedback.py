"""AI feedback over a log, through a real server and a real log; and what end users say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judges import first_shown, letter, prefers_revisions
from langchain_core.messages import AIMessage
from log_support import START, comparison, review, trajectory
from replies import IDS, RULES, principle, verdicts
from wire import Reply, Server, serving

from cai_graph import models
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic, ModelCritic, critic_for
from cai_graph.errors import ConfigError
from cai_graph.log import Log, open_log
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import (
    Comparison,
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Rejection,
    Revision,
    Round,
    Trajectory,
    Verdict,
)
from trainers.feedback import Config, Labelled, Labelling, draw, p_a_of, p_violates, pairs_of
from trainers.feedback.judge import Judge
from trainers.feedback.positions import Positions, Share, positions


def said(text: str) -> Message:
    return Message(role="assistant", content=text)


@pytest.fixture
def log(url: str) -> Iterator[Log]:
    with open_log(url) as opened:
        yield opened


def fill(log: Log, *made: Trajectory) -> None:
    for future in [log.append(record) for record in made]:
        future.result()


def compared(log: Log) -> list[Comparison]:
    return list(log.read(kind="comparison"))


async def run(job: Labelling, concurrency: int = 4, **options: Any) -> list[Labelled]:
    async with aclosing(job.results(concurrency, **options)) as results:
        return [result async for result in results]


def labelling(log: Log, server: Server, **config: Any) -> Labelling:
    return Labelling(log, Judge(server.spec), RULES, Config(**config))


# --- pairs --------------------------------------------------------------------------------------------


def rounds(*revisions: Revision) -> tuple[Round, ...]:
    return (Round(critique=Critique(), revisions=revisions),)


def test_a_revision_is_compared_with_the_draft_and_a_rejected_one_with_what_stood_instead() -> None:
    candidates = rounds(
        Revision(answer=said("still bad"), rejection=Rejection.VIOLATES),
        Revision(answer=said("good"), accepted=True),
        Revision(answer=said("good, too"), rejection=Rejection.NOT_BEST),
    )
    found = pairs_of(trajectory(rounds=candidates), ["revision", "rejected"])
    assert [pair.origins for pair in found] == [
        ("draft", "revision:0:1"),
        ("revision:0:0", "revision:0:1"),
        ("revision:0:2", "revision:0:1"),
    ]
    assert [answer.content for answer in found[1].answers] == ["still bad", "good"]
    without = rounds(Revision(answer=said("still bad"), rejection=Rejection.VIOLATES))
    assert [p.origins for p in pairs_of(trajectory(rounds=without), ["revision", "rejected"])] == [
        ("revision:0:0", "draft")
    ]


def test_what_is_no_answer_and_what_is_the_same_text_is_not_compared() -> None:
    for rejection in (Rejection.EMPTY, Rejection.TRUNCATED, Rejection.NO_REWRITE, Rejection.BAD_SCHEMA):
        broken = rounds(Revision(answer=said("half"), rejection=rejection))
        assert pairs_of(trajectory(rounds=broken), ["rejected"]) == []
    same = rounds(Revision(answer=said("  draft\n0 "), accepted=True))
    assert pairs_of(trajectory(rounds=same), ["revision"]) == []
    for changes in (
        {"draft": None},
        {"draft": Draft(answer=said("cut"), truncated=True)},
        {"draft": Draft(answer=said("half"), unfinished=True)},
        {"outcome": Outcome.FAILED},
        {"metadata": {"redaction": "failed"}},
    ):
        assert pairs_of(trajectory(**changes), ["revision", "rejected"]) == []


# --- labelling ----------------------------------------------------------------------------------------


async def test_a_log_is_labelled_and_each_comparison_says_how_it_came_about(log: Log) -> None:
    made = [trajectory(n) for n in range(3)]
    fill(log, *made, trajectory(9, rounds=(), outcome=Outcome.KEPT))
    with serving(prefers_revisions) as server:
        job = labelling(log, server)
        results = await run(job)

    assert (job.total, job.done, len(results)) == (3, 0, 3)
    assert {result.failed for result in results} == {None}
    found = compared(log)
    assert {c.trajectory_id for c in found} == {t.id for t in made}
    one = found[0]
    assert one.preference == pytest.approx(0.2)
    assert not one.orders_disagree
    assert (one.method, one.origins, one.judge) == ("logprob", ("draft", "revision:0:0"), server.spec)
    assert one.constitution is not None
    assert one.constitution.digest == RULES.digest
    assert one.principle in IDS
    assert [call.role for call in one.calls] == ["compare", "compare"]
    assert (one.source or "").startswith(job.prefix)
    assert job.positions.clear == 3
    assert (job.positions.agreement.yes, job.positions.agreement.of) == (3, 3)


async def test_a_second_run_asks_nothing_and_more_principles_add_to_the_first(log: Log) -> None:
    fill(log, trajectory(1), trajectory(2))
    with serving(prefers_revisions) as server:
        await run(labelling(log, server))
        before = len(server.requests)
        again = labelling(log, server)
        assert (again.done, again.positions.comparisons) == (2, 2)
        assert await run(again) == []
        assert len(server.requests) == before
        await run(labelling(log, server, principles=3))

    found = compared(log)
    assert len(found) == 6
    assert len({(c.trajectory_id, c.principle) for c in found}) == 6


async def test_other_settings_are_another_labelling(log: Log) -> None:
    fill(log, trajectory())
    with serving(prefers_revisions) as server:
        await run(labelling(log, server))
        assert labelling(log, server, seed=1).done == 0
        votes = Labelling(log, Judge(server.spec, votes=1), RULES, Config())
        assert votes.done == 0


async def test_another_band_is_another_labelling_of_a_judge_that_reasons(log: Log) -> None:
    fill(log, trajectory())

    def script(body: dict[str, Any]) -> str | Reply:
        return prefers_revisions(body) if body.get("logprobs") else "why"

    with serving(script) as server:

        def reasoned(band: tuple[float, float] | None) -> Labelling:
            return Labelling(log, Judge(server.spec, reasoning=True), RULES, Config(band=band))

        await run(reasoned((0.4, 0.6)))
        await run(reasoned((0.3, 0.7)))
        assert [one.band for one in compared(log)] == [(0.4, 0.6), (0.3, 0.7)]
        assert [reasoned(band).done for band in ((0.4, 0.6), (0.3, 0.7), None)] == [1, 1, 0]
        await run(labelling(log, server))
        assert labelling(log, server, band=(0.3, 0.7)).done == 1, "without reasons nothing is clamped"


def own_model(folder: Path, content: bytes) -> str:
    """The spec of weights of one's own, which are not started."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.gguf").write_bytes(b"GGUF" + content)
    return f"local:{folder}"


async def test_other_weights_under_the_same_name_are_another_labelling(log: Log, tmp_path: Path) -> None:
    fill(log, trajectory())
    spec = own_model(tmp_path / "policy", b"first")
    said_twice = ScriptedModel(replies=["same", "same"])  # a tie that no judge is asked about

    def job(who: Judge | Critic) -> Labelling:
        return Labelling(log, who, RULES, Config(pairs=("samples",)), sampler=said_twice)

    def judges() -> tuple[Judge, Critic]:
        return Judge(models.load(spec)), critic_for(models.load(spec))

    for who in judges():
        await run(job(who))
        said_twice = ScriptedModel(replies=["same", "same"])
    assert [job(who).done for who in judges()] == [1, 1]
    own_model(tmp_path / "policy", b"second")
    assert [job(who).done for who in judges()] == [0, 0]
    assert len({one.judge for one in compared(log)}) == 1, "whoever reads them sees the same name"


def test_samples_of_other_weights_under_the_same_name_are_drawn_anew(log: Log, tmp_path: Path) -> None:
    def prefix(folder: str, content: bytes) -> str:
        sampler = models.load(own_model(tmp_path / folder / "policy", content))
        judge = Judge(ScriptedModel(replies=[]))
        return Labelling(log, judge, RULES, Config(pairs=("samples",)), sampler=sampler).prefix

    first = prefix("v1", b"first")
    assert first == prefix("v2", b"first")
    assert first != prefix("v1", b"second")


def test_labels_of_earlier_releases_are_found_again(log: Log) -> None:
    """Of a model that has no file of its own; who pays an API does not pay it twice."""
    small, scripted = models.load("local:smollm2"), ScriptedModel(replies=[])
    sampled = Config(pairs=("samples",))
    for job, prefix in (
        (
            Labelling(log, Judge(small), RULES, sampled, sampler=small, sampling="1/64"),
            "label:e421cc57ce27129c/",
        ),
        (Labelling(log, Judge(scripted, reasoning=True), RULES, Config()), "label:a7e0524eeeebb611/"),
        (Labelling(log, critic_for(small), RULES, Config()), "label:585ff219a4ec2cf1/"),
    ):
        assert job.prefix == prefix


async def test_what_two_labellings_at_once_made_twice_counts_once(log: Log) -> None:
    fill(log, *(trajectory(n) for n in range(3)))
    with serving(prefers_revisions) as server:
        one, other = labelling(log, server), labelling(log, server)  # both find nothing done
        await run(one)
        await run(other)
        again = labelling(log, server)

    assert len(compared(log)) == 6
    assert again.positions.comparisons == again.total == 3
    (found,) = positions(log).values()
    assert found.summary() == again.positions.summary()


async def test_what_was_under_way_is_finished_when_asked_to_stop_and_the_rest_is_left(log: Log) -> None:
    fill(log, *(trajectory(n) for n in range(5)))
    with serving(prefers_revisions) as server:
        first = labelling(log, server)
        ended = await run(first, 1, stopped=lambda: first.positions.comparisons >= 2)
        rest = labelling(log, server)
        assert (len(ended), rest.done) == (2, 2)
        await run(rest)

    assert len(compared(log)) == 5


async def test_a_failing_comparison_is_reported_and_tried_again(log: Log) -> None:
    fill(log, *(trajectory(n) for n in range(3)))
    fails = True

    def script(body: dict[str, Any]) -> Reply:
        bad = fails and "draft 1" in body["messages"][-1]["content"]
        return Reply("broken", status=500) if bad else prefers_revisions(body)

    with serving(script) as server:

        def judge() -> Judge:
            return Judge(models.load(server.spec, max_retries=0))

        results = await run(Labelling(log, judge(), RULES, Config()))
        assert len([r for r in results if r.failed is not None and "broken" in r.failed]) == 1
        fails = False
        again = Labelling(log, judge(), RULES, Config())
        assert [result.failed for result in await run(again)] == [None]

    assert len(compared(log)) == 3


async def test_a_busy_server_is_asked_again_after_the_wait_that_it_names(log: Log) -> None:
    fill(log, trajectory())
    busy = iter([True, True])

    def script(body: dict[str, Any]) -> Reply:
        if next(busy, False):
            return Reply("busy", status=429, headers={"Retry-After": "0.01"})
        return prefers_revisions(body)

    with serving(script) as server:
        judge = Judge(models.load(server.spec, max_retries=8))
        (result,) = await run(Labelling(log, judge, RULES, Config()))
        assert (result.failed, len(server.requests)) == (None, 4)


async def test_a_refused_key_ends_the_labelling_at_once(log: Log) -> None:
    fill(log, *(trajectory(n) for n in range(3)))
    with serving(lambda body: Reply("no such key", status=401)) as server:
        with pytest.raises(Exception, match="no such key"):
            await run(labelling(log, server), 1)
        assert len(server.requests) == 1


async def test_what_is_denied_after_a_comparison_fails_its_trajectory_alone(log: Log) -> None:
    fill(log, *(trajectory(n) for n in range(3)))

    def script(body: dict[str, Any]) -> Reply:
        denied = "draft 1" in body["messages"][-1]["content"]
        return Reply("denied", status=403) if denied else prefers_revisions(body)

    with serving(script) as server:
        results = await run(labelling(log, server), 1)
    assert [result.failed is not None for result in results] == [False, True, False]


async def test_unreadable_ties_and_disagreements_are_recorded_and_counted_apart(log: Log) -> None:
    fill(log, *(trajectory(n) for n in range(4)))

    def script(body: dict[str, Any]) -> Reply:
        shown = body["messages"][-1]["content"]
        if "draft 0" in shown:
            return letter(0.9)  # whatever stands first
        if "draft 1" in shown:
            return letter(0.5)
        if "draft 2" in shown:
            return Reply("Hm", logprobs=[{"token": "Hm", "logprob": 0, "bytes": None, "top_logprobs": []}])
        return prefers_revisions(body)

    with serving(script) as server:
        job = labelling(log, server)
        await run(job)

    found = job.positions
    assert (found.comparisons, found.unreadable, found.first, found.second, found.ties) == (4, 1, 1, 0, 1)
    assert (found.clear, found.bias.yes, found.bias.of) == (1, 1, 3)
    assert found.mean_shift == pytest.approx(0.4 / 3)
    assert sorted(str(c.p_a[0] is None) for c in compared(log)) == ["False", "False", "False", "True"]


async def test_reasoned_comparisons_carry_their_band(log: Log) -> None:
    fill(log, trajectory())

    def script(body: dict[str, Any]) -> str | Reply:
        return (
            letter(1 - 1e-9 if first_shown(body).startswith("rev") else 1e-9)
            if body.get("logprobs")
            else "why"
        )

    with serving(script) as server:
        await run(Labelling(log, Judge(server.spec, reasoning=True), RULES, Config()))

    (one,) = compared(log)
    assert (one.band, one.reasoning) == ((0.4, 0.6), ("why", "why"))
    assert one.preference == pytest.approx(0.4)
    assert one.p_a[0] == pytest.approx(0, abs=1e-6)


# --- samples ------------------------------------------------------------------------------------------


async def test_samples_are_drawn_for_each_prompt_and_compared_all_against_all(log: Log) -> None:
    fill(log, trajectory())
    sampler = ScriptedModel(replies=["worst", "revised", "middle"])
    with serving(prefers_revisions) as server:
        job = Labelling(
            log, Judge(server.spec), RULES, Config(pairs=("samples",), samples=3), sampler=sampler
        )
        await run(job)

    found = compared(log)
    name = models.name_of(sampler)
    assert [c.origins for c in found] == [
        (f"sample:{a}:{name}", f"sample:{b}:{name}") for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert [m.text for m in sampler.calls[0]] == ["be kind", "ask 0"]
    assert [call.role for call in found[0].calls] == ["draft"] * 3 + ["compare"] * 2
    assert [call.role for call in found[1].calls] == ["compare"] * 2


async def test_a_request_that_failed_is_not_sampled_beside_its_later_answer(log: Log) -> None:
    answered = trajectory()
    fill(log, *(trajectory(draft=None, rounds=(), outcome=Outcome.FAILED) for _ in range(3)), answered)
    sampler = ScriptedModel(replies=["worst", "revised"])
    with serving(prefers_revisions) as server:
        job = Labelling(log, Judge(server.spec), RULES, Config(pairs=("samples",)), sampler=sampler)
        await run(job)

    assert job.total == 1
    assert [one.trajectory_id for one in compared(log)] == [answered.id]


async def test_a_labelling_cut_between_samples_goes_on_with_the_answers_that_it_has(log: Log) -> None:
    fill(log, trajectory())
    calls = 0

    def script(body: dict[str, Any]) -> Reply:
        nonlocal calls
        calls += 1
        return Reply("gone", status=500) if calls == 4 else prefers_revisions(body)

    def job(server: Server, sampler: ScriptedModel) -> Labelling:
        judge = Judge(models.load(server.spec, max_retries=0))
        return Labelling(log, judge, RULES, Config(pairs=("samples",), samples=3), sampler=sampler)

    cut = AIMessage("one", response_metadata={"finish_reason": "length"})
    with serving(script) as server:
        await run(job(server, ScriptedModel(replies=[cut, "two", "three"])))
        assert len(compared(log)) == 1
        await run(job(server, ScriptedModel(replies=["other three"])))

    texts = [[str(answer.content) for answer in c.answers] for c in compared(log)]
    assert texts == [["one", "two"], ["one", "other three"], ["two", "other three"]]
    first = [compared(log)[0].origins[0]]
    assert [c.settings.get("truncated") for c in compared(log)] == [first, first, None]


async def test_samples_of_the_same_text_are_a_tie_that_nobody_is_asked_about(log: Log) -> None:
    fill(log, trajectory())
    sampler = ScriptedModel(replies=["same", " same"])
    job = Labelling(log, Judge(ScriptedModel(replies=[])), RULES, Config(pairs=("samples",)), sampler=sampler)
    await run(job)

    (one,) = compared(log)
    assert (one.preference, one.method, job.positions.identical) == (0.5, None, 1)
    assert job.positions.comparisons == 0


async def test_a_sampler_that_answers_nothing_fails_the_trajectory(log: Log) -> None:
    fill(log, trajectory())
    sampler = ScriptedModel(replies=["", "two"])
    job = Labelling(log, Judge(ScriptedModel(replies=[])), RULES, Config(pairs=("samples",)), sampler=sampler)
    (result,) = await run(job)
    assert result.failed == "ModelError: ScriptedModel answered nothing"


async def test_a_critic_scores_each_sample_once(log: Log) -> None:
    fill(log, trajectory())
    critic = ModelCritic(
        ScriptedModel(replies=lambda messages: verdicts(*(["be-kind"] if "bad" in messages[-1].text else [])))
    )
    sampler = ScriptedModel(replies=["bad", "fine", "also fine"])
    job = Labelling(log, critic, RULES, Config(pairs=("samples",), samples=3), sampler=sampler)
    await run(job)

    assert [c.preference for c in compared(log)] == [0.0, 0.0, 0.5]
    assert {c.method for c in compared(log)} == {"critic"}
    assert isinstance(critic.model, ScriptedModel)
    assert len(critic.model.calls) == 3
    assert job.positions.bias.of == 0
    assert (
        await run(Labelling(log, critic, RULES, Config(pairs=("samples",), samples=3), sampler=sampler)) == []
    )


def judged(label: Label, probability: float | None = None) -> Critique:
    return Critique(verdicts=(Verdict(label=label, principle="be-kind", probability=probability),))


def test_a_critics_probabilities_become_the_odds_that_the_other_answer_is_the_one_that_violates() -> None:
    bad, good = judged(Label.VIOLATES, 0.8), judged(Label.COMPLIES, 0.2)
    assert p_a_of(good, bad, RULES) == pytest.approx(0.64 / 0.68)
    assert p_a_of(bad, good, RULES) == pytest.approx(0.04 / 0.68)
    assert p_a_of(judged(Label.COMPLIES), judged(Label.VIOLATES), RULES) == 1.0
    assert p_a_of(judged(Label.VIOLATES), judged(Label.VIOLATES), RULES) == 0.5
    assert p_a_of(judged(Label.UNREADABLE), good, RULES) is None
    assert p_a_of(Critique(), good, RULES) is None


def test_a_violation_without_a_probability_is_certain_beside_verdicts_that_have_one() -> None:
    sure = Verdict(label=Label.COMPLIES, principle="be-true", probability=0.02)
    flat = Critique(verdicts=(Verdict(label=Label.VIOLATES, principle="be-kind"), sure))
    assert p_violates(flat, RULES) == 1.0
    assert (
        p_violates(Critique(verdicts=(Verdict(label=Label.COMPLIES, principle="be-kind"), sure)), RULES)
        == 0.02
    )
    assert p_violates(Critique(verdicts=(Verdict(label=Label.VIOLATES, aim="harmless"), sure)), RULES) == 1.0
    assert p_a_of(flat, Critique(verdicts=(sure,)), RULES) == 0.0


def test_a_violation_below_its_principles_least_severity_is_none() -> None:
    lenient = Constitution(name="lenient", principles=(principle("be-kind", "harmless", min_severity=4),))
    slight = Verdict(label=Label.VIOLATES, principle="be-kind", severity=2)
    sure = Verdict(label=Label.COMPLIES, principle="be-true", probability=0.02)
    assert p_violates(Critique(verdicts=(slight, sure)), lenient) == 0.02


# --- the draw of principles ---------------------------------------------------------------------------


@given(st.text(), st.integers(), st.integers(1, 2))
def test_a_draw_repeats_itself_and_a_greater_one_goes_on_from_a_smaller(
    pair: str, seed: int, count: int
) -> None:
    drawn = draw(RULES, count, seed, pair)
    assert draw(RULES, count, seed, pair) == drawn
    assert draw(RULES, 3, seed, pair)[:count] == drawn
    assert len({p.id for p in draw(RULES, 3, seed, pair)}) == 3


def test_principles_are_drawn_by_weight() -> None:
    firsts = [draw(RULES, 1, 0, str(n))[0].id for n in range(4000)]
    assert firsts.count("no-harm") / 4000 == pytest.approx(0.5, abs=0.03)  # weight 2 of 4
    assert firsts.count("be-kind") / 4000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pairs": ()}, "pairs: name at least one"),
        ({"samples": 1}, "samples is a number from 2"),
        ({"principles": 0}, "principles is a number from 1"),
        ({"band": (0.6, 0.4)}, "band is two probabilities around 0.5"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(**config)


def test_a_labelling_that_cannot_work_is_refused_before_the_first_call(log: Log) -> None:
    judge = Judge(ScriptedModel(replies=[]))
    with pytest.raises(ConfigError, match="go together"):
        Labelling(log, judge, RULES, Config(pairs=("samples",)))
    with pytest.raises(ConfigError, match="4 principles a pair, and 'rules' has 3"):
        Labelling(log, judge, RULES, Config(principles=4))


# --- positions ----------------------------------------------------------------------------------------


def test_a_share_has_wilsons_interval() -> None:
    low, high = Share(8, 10).interval
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # Wilson 1927, as statsmodels gives it
    assert Share(0, 10).interval[0] == 0.0
    assert str(Share(0, 0)) == "none"
    assert Share(0, 0).interval == (0.0, 1.0)


def test_an_interval_holds_its_share_however_it_is_rounded() -> None:
    for of in range(1, 1000):
        assert Share(0, of).interval[0] == 0.0
        assert Share(of, of).interval[1] == 1.0


def test_a_summary_is_json_whatever_was_counted() -> None:
    found = Positions("j")
    assert json.loads(json.dumps(found.summary()))["comparisons"] == 0
    found.add(comparison("t", method="logprob", p_a=(0.9, 0.4)))
    assert found.summary()["position_bias"]["share"] == 1.0


def test_comparisons_about_one_trajectory_are_not_taken_for_independent() -> None:
    """A judge whose liking for a place depends on the prompt: 18 comparisons say of it what one says."""
    once, often = Positions("j"), Positions("j")
    for number in range(30):
        p_a = (0.9, 0.4) if number < 15 else (0.9, 0.8)
        once.add(comparison(f"t{number}", method="logprob", p_a=p_a))
        for _ in range(18):
            often.add(comparison(f"t{number}", method="logprob", p_a=p_a))

    one, other = once.summary()["position_bias"], often.summary()["position_bias"]
    assert one["interval"] == pytest.approx(Share(15, 30).interval)
    assert other["interval"] == pytest.approx(one["interval"])
    assert (one["n"], other["n"], other["comparisons"]) == (30, 30, 540)
    assert str(often.bias) == "50% (33% to 67%, 540 comparisons on 30 trajectories)"


def test_a_comparison_without_an_order_that_could_not_be_read_is_in_no_share() -> None:
    found = Positions("j")
    found.add(comparison("t", method="logprob", p_a=(0.9, 0.4)))
    for p in (None, None, 0.7):
        found.add(comparison("t", method="critic", p_a=(p, p)))

    assert (found.bias.yes, found.bias.of) == (1, 1)
    assert (found.readable, found.unreadable, found.unordered) == (2, 2, 1)


async def test_a_judge_is_compared_with_the_people_who_reviewed_the_same_answers(log: Log) -> None:
    made = [trajectory(n) for n in range(5)]
    fill(log, *made)
    for commit in [
        log.append(review(made[0].id)),
        log.append(review(made[1].id, decision="flip")),
        log.append(review(made[2].id, decision="flip")),
        log.append(review(made[2].id, decision="undo", at=START + timedelta(seconds=1))),
        log.append(review(made[3].id)),
        log.append(review(made[3].id, decision="flip", reviewer="bob")),
        log.append(review(made[4].id, decision="reject")),
    ]:
        commit.result()
    with serving(prefers_revisions) as server:
        job = labelling(log, server)
        await run(job)
        again = labelling(log, server)

    assert job.positions.agreement_with_people.json() == {
        "share": 0.5,
        "interval": pytest.approx(Share(1, 2).interval),
        "comparisons": 2,
        "n": 2,
    }
    assert again.positions.summary() == job.positions.summary()
