"""Replay: logged answers are judged again, and what changes is counted by principle and outcome."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from cli_support import cai
from log_support import trajectory
from replies import IDS, RULES, answer_in, by_role, principle, verdicts
from wire import Reply, serving

from cai_graph import models
from cai_graph.constitution import Constitution, load
from cai_graph.critic import Critic, ModelCritic, critic_for
from cai_graph.errors import ConfigError, DataError
from cai_graph.log import Log, open_log
from cai_graph.trajectory import (
    ConstitutionRef,
    Critique,
    Draft,
    Label,
    Message,
    Outcome,
    Revision,
    Round,
    Trajectory,
    Verdict,
)
from trainers.replay import Judged, Replay, answers_of, standing


def said(text: str) -> Message:
    return Message(role="assistant", content=text)


def critique(*violated: str, ids: tuple[str, ...] = IDS, severity: int = 3) -> Critique:
    return Critique(
        verdicts=tuple(
            Verdict(
                label=Label.VIOLATES if id in violated else Label.COMPLIES,
                principle=id,
                severity=severity,
                reason=f"then: {id}" if id in violated else None,
            )
            for id in ids
        )
    )


def kept(text: str, *violated: str, **changes: Any) -> Trajectory:
    """A trajectory whose draft was judged, and nothing else."""
    outcome = Outcome.EXHAUSTED if violated else Outcome.KEPT
    fields: dict[str, Any] = {
        "draft": Draft(answer=said(text)),
        "rounds": (Round(critique=critique(*violated)),),
        "released": said(text),
        "released_from": "draft",
        "outcome": outcome,
    }
    return trajectory(**fields | changes)


def critic(**violates: tuple[str, ...]) -> Critic:
    """A critic that finds of an answer what stands under its first word; `odd` is unreadable."""

    def judge(messages: list[Any]) -> str:
        answer = answer_in(messages)
        if answer.startswith("odd"):
            return "hm"
        return verdicts(*violates.get(answer.split()[0], ()))

    return ModelCritic(by_role(critique=judge))


@pytest.fixture
def log(url: str) -> Iterator[Log]:
    with open_log(url) as opened:
        yield opened


def fill(log: Log, *made: Trajectory) -> None:
    for commit in [log.append(record) for record in made]:
        commit.result()


async def replay(log: Log, who: Critic, folder: Path, **options: Any) -> tuple[Replay, list[Judged]]:
    stopped = options.pop("stopped", lambda: False)
    rules = options.pop("rules", RULES)
    job = Replay(log, who, rules, kept=options.pop("kept", folder / "kept.jsonl"), **options)
    async with aclosing(job.results(2, stopped=stopped)) as results:
        return job, [result async for result in results]


def test_the_draft_and_the_revision_that_was_released_are_judged_and_the_refusal_is_not() -> None:
    found = list(answers_of(trajectory()))
    assert [(a.of, str(a.exchange.answer.content)) for a in found] == [
        ("draft", "draft 0"),
        ("released", "revised 0"),
    ]
    assert [standing(a.before, None) for a in found] == ["violates", "complies"]
    assert [a.of for a in answers_of(trajectory(released=said("no"), released_from="refusal"))] == ["draft"]
    edited = list(answers_of(trajectory(released=said("by hand"), released_from="human")))
    assert [standing(a.before, None) for a in edited] == ["violates", "unjudged"]
    assert list(answers_of(trajectory(draft=None))) == []
    assert list(answers_of(trajectory(metadata={"redaction": "failed"}))) == []


def test_unreadable_is_never_read_as_complies() -> None:
    unreadable = Critique(verdicts=(Verdict(label=Label.UNREADABLE, principle="be-kind"),))
    assert standing(unreadable, RULES) == "unreadable"
    assert standing(Critique(), RULES) == "unjudged"


async def test_a_verdict_on_the_whole_answer_is_compared_by_no_principle(log: Log, tmp_path: Path) -> None:
    whole = Round(critique=Critique(verdicts=(Verdict(label=Label.VIOLATES),)))
    fill(log, kept("better now", rounds=(whole,)))
    job, _ = await replay(log, critic(better=()), tmp_path)
    assert job.report.cleared == 1
    assert set(job.report.principles) == {principle.id for principle in RULES.principles}
    (example,) = job.report.shown["cleared"]
    assert example.principles == ()


async def test_what_changes_is_counted_by_principle_and_outcome_with_examples(
    log: Log, tmp_path: Path
) -> None:
    fill(
        log,
        kept("same good"),
        kept("same bad", "no-harm"),
        kept("worse now"),
        kept("better now", "no-harm"),
        kept("odd now"),
    )
    who = critic(same=(), worse=("be-kind",), better=())
    job, results = await replay(log, who, tmp_path)

    report = job.report
    assert (job.total, report.judged, len(results)) == (5, 5, 5)
    assert (report.newly, report.cleared, report.now_unreadable) == (1, 2, 1)
    assert (report.share("before").yes, report.share("after").yes, report.share("after").of) == (2, 1, 4)
    kind, harm = report.principles["be-kind"], report.principles["no-harm"]
    assert (kind.compared, kind.before, kind.after, kind.newly, kind.cleared) == (4, 0, 1, 1, 0)
    assert (harm.compared, harm.before, harm.after, harm.newly, harm.cleared) == (4, 2, 0, 0, 2)
    ended = report.outcomes["KEPT"]
    assert (ended.drafts, ended.drafts_before, ended.drafts_after, ended.drafts_unreadable) == (3, 0, 1, 1)
    (worse,) = report.shown["newly violates"]
    assert (worse.answer, worse.principles, worse.reason) == ("worse now", ("be-kind",), "breaks be-kind")
    assert {one.reason for one in report.shown["cleared"]} == {"then: no-harm"}
    assert json.loads(json.dumps(report.summary()))["newly_violates"] == 1


async def test_a_principle_that_only_one_constitution_has_is_counted_apart(log: Log, tmp_path: Path) -> None:
    fill(log, kept("fine"))
    rules = Constitution(name="new", principles=(RULES["no-harm"], principle("be-brief", "helpful")))
    who = ModelCritic(by_role(critique=verdicts("be-brief", ids=("no-harm", "be-brief"))))
    job, _ = await replay(log, who, tmp_path, rules=rules)

    found = job.report.principles
    assert (found["be-brief"].only_now, found["be-brief"].violates_only_now) == (1, 1)
    assert (found["be-kind"].only_then, found["be-kind"].compared) == (1, 0)
    assert job.report.newly == 1


async def test_thresholds_of_the_same_constitution_hold_for_the_log_too(log: Log, tmp_path: Path) -> None:
    rules = Constitution(name="mild", principles=(principle("no-harm", "harmless", min_severity=4),))
    reference = ConstitutionRef(name="mild", version="1", digest=rules.digest)
    rounds = (Round(critique=critique("no-harm", ids=("no-harm",))),)
    fill(log, kept("fine", rounds=rounds, constitution=reference))
    who = ModelCritic(by_role(critique=verdicts("no-harm", ids=("no-harm",), severity=3)))
    job, (judged,) = await replay(log, who, tmp_path, rules=rules)
    assert (judged.before, judged.after) == ("complies", "complies")
    assert job.report.newly == 0


async def test_thresholds_that_are_not_at_hand_clear_nothing_that_passed_by_them(
    log: Log, tmp_path: Path
) -> None:
    rules = Constitution(name="mild", principles=(principle("no-harm", "harmless", min_severity=4),))
    slight = critique("no-harm", ids=("no-harm",))
    revision = Revision(answer=said("mended"), critique=slight, accepted=True)
    grave = critique("no-harm", ids=("no-harm",), severity=5)
    fill(
        log,
        kept("fine", rounds=(Round(critique=slight),)),
        kept("noted", rounds=(Round(critique=slight),), mode="sampled"),
        trajectory(
            draft=Draft(answer=said("bad")),
            rounds=(Round(critique=grave, revisions=(revision,)),),
            released=said("mended"),
        ),
    )
    who = ModelCritic(by_role(critique=verdicts("no-harm", ids=("no-harm",), severity=3)))
    job, results = await replay(log, who, tmp_path, rules=rules)

    before = {str(judged.answer.exchange.answer.content): judged.before for judged in results}
    assert before == {"fine": "complies", "noted": "violates", "bad": "violates", "mended": "complies"}
    assert job.report.cleared == 2


async def test_an_interrupted_replay_goes_on_and_a_line_that_was_cut_off_is_judged_again(
    log: Log, tmp_path: Path
) -> None:
    fill(log, *(kept(f"answer {n}") for n in range(6)))
    _, first = await replay(log, critic(), tmp_path, stopped=lambda: job_has(tmp_path, 3))
    assert 3 <= len(first) < 6
    path = tmp_path / "kept.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(path.read_bytes()[:-20])
    again, rest = await replay(log, critic(), tmp_path)
    assert again.done == len(first) - 1
    assert again.done + len(rest) == again.report.judged == 6
    nothing, none = await replay(log, critic(), tmp_path)
    assert (none, nothing.report.judged) == ([], 6)


def job_has(folder: Path, judgements: int) -> bool:
    path = folder / "kept.jsonl"
    return path.exists() and len(path.read_bytes().splitlines()) > judgements


async def test_judgements_of_another_constitution_are_not_taken_for_these(log: Log, tmp_path: Path) -> None:
    fill(log, kept("fine"))
    await replay(log, critic(), tmp_path)
    other = Constitution(name="new", principles=(principle("be-brief", "helpful"),))
    with pytest.raises(ConfigError, match="another constitution; name another file"):
        Replay(log, critic(), other, kept=tmp_path / "kept.jsonl")
    for notes in ('{"a": 1}\n', '{"a": 1}', "buy milk"):
        (tmp_path / "notes.jsonl").write_text(notes)
        with pytest.raises(DataError, match="holds no judgements"):
            Replay(log, critic(), RULES, kept=tmp_path / "notes.jsonl")
        assert (tmp_path / "notes.jsonl").read_text() == notes


def test_other_weights_under_the_same_name_are_another_critic(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))

    def judged_by(content: bytes, kept: Path | None = None) -> Replay:
        (tmp_path / "policy").mkdir(exist_ok=True)
        (tmp_path / "policy" / "model.gguf").write_bytes(b"GGUF" + content)
        return Replay(log, critic_for(models.load(f"local:{tmp_path}/policy")), RULES, kept=kept)

    first = judged_by(b"first")
    assert judged_by(b"first").path == first.path
    assert judged_by(b"second").path != first.path
    judged_by(b"first", tmp_path / "kept.jsonl")
    with pytest.raises(ConfigError, match="another critic; name another file"):
        judged_by(b"second", tmp_path / "kept.jsonl")


def test_judgements_of_earlier_releases_are_found_again(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that has no file of its own."""
    monkeypatch.setenv("CAI_CACHE", str(tmp_path))
    found = Replay(log, critic_for(models.load("local:smollm2")), RULES)
    assert found.path.name == "6b694aa9e3991c81.jsonl"


async def test_two_replays_do_not_write_one_file(log: Log, tmp_path: Path) -> None:
    fill(log, *(kept(f"answer {n}") for n in range(3)))
    path = tmp_path / "kept.jsonl"
    one, other = (Replay(log, critic(), RULES, kept=path) for _ in range(2))
    async with aclosing(one.results(1)) as results:
        await anext(results)
        with pytest.raises(DataError, match="another replay is writing it"):
            await anext(other.results(1))
        with pytest.raises(DataError, match="another replay is writing it"):
            Replay(log, critic(), RULES, kept=path)
        assert len([judged async for judged in results]) == 2
    assert Replay(log, critic(), RULES, kept=path).done == 3


async def test_a_file_that_two_replays_began_at_once_is_read(log: Log, tmp_path: Path) -> None:
    fill(log, kept("fine"))
    await replay(log, critic(), tmp_path)
    path = tmp_path / "kept.jsonl"
    head, judgement = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + head + judgement)
    assert Replay(log, critic(), RULES, kept=path).done == 1
    path.write_bytes(head + head.replace(RULES.digest.encode(), b"another") + judgement)
    with pytest.raises(DataError, match="holds no judgements"):
        Replay(log, critic(), RULES, kept=path)


async def test_a_file_whose_first_line_was_cut_off_begins_anew(log: Log, tmp_path: Path) -> None:
    fill(log, kept("fine"))
    await replay(log, critic(), tmp_path)
    path = tmp_path / "kept.jsonl"
    path.write_bytes(path.read_bytes()[:30])
    again, judged = await replay(log, critic(), tmp_path)
    assert (again.done, len(judged)) == (0, 1)
    assert Replay(log, critic(), RULES, kept=path).done == 1


async def test_a_damaged_judgement_is_named_and_none_is_lost(log: Log, tmp_path: Path) -> None:
    fill(log, *(kept(f"answer {n}") for n in range(3)))
    await replay(log, critic(), tmp_path)
    path = tmp_path / "kept.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], lines[2][:20] + b"\n", *lines[3:]])
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"kept.jsonl line 3: no JSON: .*; name another file"):
        Replay(log, critic(), RULES, kept=path)
    assert path.read_bytes() == damaged


async def test_a_limit_draws_the_same_trajectories_each_time(log: Log, tmp_path: Path) -> None:
    fill(log, *(kept(f"answer {n}") for n in range(20)))
    drawn = []
    for seed in (0, 0, 1):
        job, results = await replay(
            log, critic(), tmp_path, kept=tmp_path / f"{len(drawn)}.jsonl", limit=5, seed=seed
        )
        assert job.total == 5
        drawn.append({judged.answer.trajectory_id for judged in results})
    assert drawn[0] == drawn[1] != drawn[2]


async def test_an_answer_that_cannot_be_judged_is_reported_and_tried_again(log: Log, tmp_path: Path) -> None:
    fill(log, kept("fine"), kept("bad luck"))

    def judge(messages: list[Any]) -> str | Exception:
        return ValueError("down") if answer_in(messages) == "bad luck" else verdicts()

    job, results = await replay(log, ModelCritic(by_role(critique=judge)), tmp_path)
    assert [r.failed for r in results if r.failed] == ["ValueError: down"]
    assert (job.report.failed, job.report.judged) == (1, 1)
    _, again = await replay(log, critic(), tmp_path)
    assert [judged.answer.exchange.answer.content for judged in again] == ["bad luck"]


# --- the command --------------------------------------------------------------------------------------


def answered(log: Log) -> None:
    """Fill a log with three answers that comply, with a principle, too, that is gone since."""
    ids = (*(p.id for p in load("balanced")), "since-gone")
    fill(log, *(kept(f"answer {n}", rounds=(Round(critique=critique(ids=ids)),)) for n in range(3)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with open_log(tmp_path / "cai.db") as log:
        answered(log)
    return tmp_path


def stricter(body: dict[str, Any]) -> Reply:
    ids = tuple(p.id for p in load("balanced"))
    found = ids[:1] if "answer 1\n" in body["messages"][-1]["content"] else ()
    return Reply(verdicts(*found, ids=ids))


def test_the_command_shows_what_changes_and_its_status_says_it(url: str, log: Log, tmp_path: Path) -> None:
    answered(log)
    with serving(stricter) as server:
        args = ("replay", "--log", url, "--critic", server.spec, "-o", "kept.jsonl")
        shown = cai(tmp_path, *args).stdout
        asked = len(server.requests)
        for rule, status in (
            ("more-violations", 1),
            ("any-change", 1),
            ("fewer-violations", 0),
            ("unreadable", 0),
        ):
            cai(tmp_path, *args, "--fail-on", rule, status=status)
        with_password = ("--critic", server.spec.replace("://", "://ann:s3cret@"), "--json")
        summary = json.loads(cai(tmp_path, *args, *with_password).stdout)
        assert len(server.requests) == asked == 3
    assert summary["critic"] == server.spec
    assert "3 answers judged again." in shown
    assert "1 newly violate, 0 are cleared, 0 are unreadable now." in shown
    assert "answer  answer 1" in shown
    assert "since-gone" not in shown
    assert summary["principles"]["since-gone"]["only_then"] == 3
    assert summary["newly_violates"] == 1
    assert log.stats().trajectories == 3


def test_what_is_unreadable_now_does_not_pass_as_no_more_violations(folder: Path) -> None:
    def mute(body: dict[str, Any]) -> Reply:
        return Reply("I would rather not judge this.")

    with serving(mute) as server:
        args = ("replay", "--critic", server.spec, "-o", "kept.jsonl", "--fail-on")
        ended = cai(folder, *args, "more-violations", status=3)
        assert (
            "more-violations: not known, since 3 answers that could be read cannot be read now"
            in ended.stderr
        )
        cai(folder, *args, "fewer-violations", status=0)  # none of them violated
        cai(folder, *args, "unreadable", status=1)


def test_an_outcome_that_does_not_exist_is_refused_before_anything_is_judged(folder: Path) -> None:
    with serving(stricter) as server:
        args = ("replay", "--critic", server.spec, "-o", "kept.jsonl", "--outcome")
        ended = cai(folder, *args, "KEEPT", status=2)
        assert "'KEEPT' is not one of" in ended.stderr
        assert not server.requests
        cai(folder, *args, "REVISED", status=1)
        cai(folder, *args, "KEPT")
        assert len(server.requests) == 3


def test_a_log_without_answers_fails(tmp_path: Path) -> None:
    with open_log(tmp_path / "cai.db") as log:
        fill(log, trajectory(draft=None, outcome=Outcome.FAILED))
    with serving(stricter) as server:
        ended = cai(tmp_path, "replay", "--critic", server.spec, "-o", "kept.jsonl", status=1)
    assert "has no answer to judge" in ended.stderr


def test_without_an_output_the_judgements_are_in_the_local_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(folder / "cache"))
    with serving(stricter) as server:
        cai(folder, "replay", "--critic", server.spec)
        again = cai(folder, "replay", "--critic", server.spec)
        assert len(server.requests) == 3
    assert "3 of 3 answers were judged before" in again.stderr
    (kept_file,) = (folder / "cache" / "replay").iterdir()
    assert os.access(kept_file, os.R_OK)
