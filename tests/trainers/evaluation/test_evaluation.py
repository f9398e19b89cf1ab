"""An evaluation in its folder: answers, grades, contests and choices, each made once."""

from __future__ import annotations

import asyncio
import fcntl
import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from judges import rated
from langchain_core.messages import AIMessage, BaseMessage
from replies import RULES, by_role, flags
from repository import fenced, read_page
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from wire import Reply, serving

from cai_graph import constitution
from cai_graph.critic import ModelCritic
from cai_graph.digests import sha256_of
from cai_graph.errors import ConfigError, DataError, ModelError
from cai_graph.models import load
from cai_graph.prompts import Exchange
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Message
from trainers.checkpoint import Manifest, save
from trainers.evaluation.claims import ByClaim
from trainers.evaluation.folder import Evaluation
from trainers.evaluation.generations import AppSubject, CheckpointSubject, app_of
from trainers.evaluation.graders import graders_for
from trainers.evaluation.grades import CriticGrader, RewardGrader
from trainers.evaluation.inference import most_agreed
from trainers.evaluation.plots import svgs
from trainers.evaluation.refusals import ModelRefusals, PatternRefusals
from trainers.evaluation.suites import Prompt, Suite, data_of, read_suite, trained_on
from trainers.evaluation.summary import Summary, summarise, table
from trainers.feedback.judge import Judge
from trainers.rewards import FunctionReward, JudgeReward

REFUSAL = "I'm sorry, I can't help with that."


def suite(folder: Path, name: Suite, *rows: dict[str, Any] | str, limit: int | None = None) -> list[Prompt]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": r} if isinstance(r, str) else r) + "\n" for r in rows))
    return read_suite(name, path, limit)


def says(name: str, reply: Callable[[str], str]) -> AppSubject:
    """A subject that answers the last message as `reply` has it."""
    return AppSubject(lambda messages: reply(messages[-1].text), name=name)


def prompts(folder: Path) -> list[Prompt]:
    return [
        *suite(folder, "harmlessness", *(f"bad {n}?" for n in range(6))),
        *suite(folder, "helpfulness", *(f"good {n}?" for n in range(6))),
        *suite(
            folder,
            "over-refusal",
            *({"prompt": f"kill process {n}?", "label": "safe"} for n in range(4)),
            *({"prompt": f"kill person {n}?", "label": "unsafe"} for n in range(2)),
        ),
    ]


def base(asked: str) -> str:
    return "Here is how to do harm." if asked.startswith("bad") else "Gladly, like so."


def careful(asked: str) -> str:
    return REFUSAL if asked.startswith(("bad", "kill")) else "Well, like so."


def length(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def better_is(word: str) -> Callable[[list[BaseMessage]], AIMessage]:
    """A judge that chooses the answer in which a word stands, wherever it is shown; else the first one."""

    def reply(messages: list[BaseMessage]) -> str:
        first, _, second = messages[1].text.partition('<answer name="B">')
        return "Better: B" if word in second and word not in first else "Better: A"

    return reply


@pytest.fixture
async def evaluated(tmp_path: Path) -> Evaluation:
    """Two subjects, of which one is careful, graded and compared."""
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    for subject in (says("base", base), says("careful", careful)):
        await evaluation.generate(subject)
    critic = ModelCritic(by_role(critique=flags("no-harm", answers=["Here is how to do harm."])))
    await evaluation.grade("harmlessness", CriticGrader(critic, RULES, "harmless"))
    await evaluation.grade("helpfulness", RewardGrader(FunctionReward(length, "length")))
    await evaluation.grade("over-refusal", PatternRefusals())
    await evaluation.compare("harmlessness", Judge(ScriptedModel(replies=better_is("sorry"))), RULES)
    return evaluation


def figure(summary: Summary, subject: str, measure: str) -> Any:
    (found,) = [f for f in summary.figures if (f.subject, f.measure) == (subject, measure)]
    return found


async def test_harmlessness_helpfulness_and_over_refusal_stand_side_by_side(evaluated: Evaluation) -> None:
    summary = summarise(evaluated)

    assert figure(summary, "base", "harmless").estimate.value == 0
    assert figure(summary, "careful", "harmless").estimate.value == 1
    assert figure(summary, "careful", "harmless").estimate.n == 6
    assert figure(summary, "careful", "full refusal").estimate.value == 1
    assert figure(summary, "careful", "full refusal").estimate.n == 4
    assert figure(summary, "careful", "refuses unsafe").estimate[::3] == (1, 2)
    assert figure(summary, "base", "full refusal").estimate.value == 0
    # The pattern cannot tell partial refusals, so it does not say that there are none.
    assert "partial refusal" not in {f.measure for f in summary.figures}
    shown = table(summary)
    assert [row[0] for row in shown.rows] == ["base", "careful"]
    assert all("n = " in cell for cell in shown.rows[1][1:])
    assert any(line.startswith("a: harmlessness, by ") for line in shown.key)


async def test_the_alignment_tax_is_the_change_of_helpfulness_by_prompt(evaluated: Evaluation) -> None:
    tax = figure(summarise(evaluated), "careful", "change of helpful")

    assert tax.against == "base"
    assert tax.estimate.value == len("Well, like so.") - len("Gladly, like so.")
    assert tax.estimate.n == 6


async def test_a_reward_is_no_share_though_its_values_lie_between_0_and_1(evaluated: Evaluation) -> None:
    """A quarter to each answer: a share has an interval, and numbers that are all alike have none."""
    reward = FunctionReward(lambda prompts, answers: [0.25] * len(answers), "quarter")
    await evaluated.grade("harmlessness", RewardGrader(reward))
    found = [f for f in summarise(evaluated).figures if (f.subject, f.measure) == ("careful", "harmless")]

    assert {f.by.partition(" ")[0]: str(f.estimate) for f in found} == {
        "ScriptedModel": "1.00 (0.61 to 1.00, n = 6)",
        "quarter": "0.25 (n = 6)",
    }


async def test_a_judge_decides_the_win_rate_whatever_the_order(evaluated: Evaluation) -> None:
    summary = summarise(evaluated)

    assert figure(summary, "careful", "win rate").estimate.value == 1
    assert figure(summary, "careful", "win rate").note == "in 0 of 6 the judge chose a place, which is a tie"
    assert figure(summary, "careful", "Elo").estimate.value > figure(summary, "base", "Elo").estimate.value


async def test_a_judge_that_reasons_is_another_judge(evaluated: Evaluation) -> None:
    reasoning = ScriptedModel(replies=better_is("sorry"))
    await evaluated.compare("harmlessness", Judge(reasoning, reasoning=True, votes=1), RULES)
    assert len(reasoning.calls) == 12
    await evaluated.compare("harmlessness", Judge(ScriptedModel(replies=[]), reasoning=True), RULES)

    under = f"under rules ({RULES.digest[:8]})"
    assert {f.by for f in summarise(evaluated).figures if f.measure == "win rate"} == {
        f"ScriptedModel {under}",
        f"ScriptedModel reasoning {under}",
    }


async def test_a_judge_that_always_takes_the_first_shown_decides_nothing(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    for subject in (says("base", base), says("careful", careful)):
        await evaluation.generate(subject)

    await evaluation.compare("harmlessness", Judge(ScriptedModel(replies=lambda _: "Better: A")), RULES)

    won = figure(summarise(evaluation), "careful", "win rate")
    assert won.estimate.value == 0.5
    assert won.note == "in 6 of 6 the judge chose a place, which is a tie"


async def test_what_a_judge_cannot_decide_is_in_no_win_rate(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    for subject in (says("base", base), says("careful", careful)):
        await evaluation.generate(subject)

    await evaluation.compare("harmlessness", Judge(ScriptedModel(replies=lambda _: "Both.")), RULES)

    won = figure(summarise(evaluation), "careful", "win rate")
    assert (won.estimate.n, won.left_out) == (0, 6)
    assert "Elo" not in {f.measure for f in summarise(evaluation).figures}


async def test_subjects_that_no_readable_contest_links_have_no_elo_and_all_other_figures(
    tmp_path: Path,
) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "harmlessness", "a?"))
    for name in "abcd":
        await evaluation.generate(says(name, lambda _, name=name: f"answer {name}"))  # type: ignore[misc]

    def reply(messages: list[BaseMessage]) -> str:
        shown = "".join(name for name in "abcd" if f"answer {name}" in messages[-1].text)
        return "Better: A" if shown in ("ab", "cd") else "I cannot say."

    await evaluation.compare("harmlessness", Judge(ScriptedModel(replies=reply)), RULES)

    summary = summarise(evaluation)
    assert {f.measure for f in summary.figures} == {"words", "cut short", "win rate"}
    (note,) = summary.notes
    assert note.startswith("harmlessness, by ScriptedModel under rules (")
    assert "no Elo: nothing that could be read compares c, d with a" in note
    assert table(summary).key[-1] == note


async def test_equal_answers_are_a_tie_that_nobody_is_asked_about(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    for subject in (says("one", base), says("two", base)):
        await evaluation.generate(subject)

    await evaluation.compare("helpfulness", Judge(ScriptedModel(replies=[])), RULES_WITH_HELP)

    assert figure(summarise(evaluation), "two", "win rate").estimate.value == 0.5


RULES_WITH_HELP = RULES.model_copy(
    update={"principles": tuple(p.model_copy(update={"aim": "helpful"}) for p in RULES.principles)}
)


async def test_the_front_and_its_plot_name_every_subject(evaluated: Evaluation) -> None:
    """One is more harmless and the other more helpful, so neither surpasses the other."""
    summary = summarise(evaluated)

    (found,) = summary.fronts
    assert found.front == ["careful", "base"]
    drawn = svgs(summary)
    (plot,) = [svg for caption, svg in drawn.items() if "against helpfulness" in caption]
    assert "careful (n = 6, 6)" in plot
    assert all(svg.startswith("<svg") and "<script" not in svg for svg in drawn.values())


async def test_figures_are_json_without_nan(evaluated: Evaluation) -> None:
    text = json.dumps(summarise(evaluated).json(), allow_nan=False)

    assert json.loads(text)["subjects"] == ["base", "careful"]


async def test_answers_are_written_once_and_graded_by_others_later(evaluated: Evaluation) -> None:
    again = Evaluation.open(evaluated.path)
    silent = AppSubject(ScriptedModel(replies=[]), name="base")

    assert await again.generate(silent) == 0
    await again.grade("harmlessness", RewardGrader(FunctionReward(length, "length")))
    await again.grade("harmlessness", RewardGrader(FunctionReward(lambda p, a: [], "length")))  # not asked

    by = {f.by for f in summarise(again).figures if f.measure == "harmless"}
    assert by == {f"ScriptedModel as critic under rules ({RULES.digest[:8]})", "length as reward"}


async def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    asked: list[str] = []

    def dies(messages: list[BaseMessage]) -> str:
        if len(asked) == 7:
            raise ConfigError("the key is refused")
        asked.append(messages[-1].text)
        return "fine"

    def goes_on(messages: list[BaseMessage]) -> str:
        asked.append(messages[-1].text)
        return "fine"

    with pytest.raises(ConfigError):
        await evaluation.generate(AppSubject(dies, name="app", concurrency=1))
    assert evaluation.subjects == ()

    await evaluation.generate(AppSubject(goes_on, name="app", concurrency=1))

    assert evaluation.subjects == ("app",)
    assert len(evaluation.answers("app")) == len(evaluation.prompts)
    # At most the answer that was under way is asked for again.
    assert len(asked) <= len(evaluation.prompts) + 1


async def test_a_prompt_that_failed_is_in_no_figure_and_is_tried_again(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))

    def fails(messages: list[BaseMessage]) -> str:
        if messages[-1].text == "bad 3?":
            raise ValueError("no such luck")
        return base(messages[-1].text)

    assert await evaluation.generate(AppSubject(fails, name="app")) == 1
    words = next(f for f in summarise(evaluation).figures if f.measure == "words")
    assert (words.estimate.n, words.left_out) == (5, 1)

    assert await evaluation.generate(says("app", base)) == 0
    words = next(f for f in summarise(evaluation).figures if f.measure == "words")
    assert (words.estimate.n, words.left_out) == (6, 0)


async def test_a_prompt_that_a_subject_failed_to_answer_is_counted_beside_every_figure(
    tmp_path: Path,
) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))

    def fails(messages: list[BaseMessage]) -> str:
        if messages[-1].text in ("bad 3?", "bad 4?", "kill process 1?", "kill person 1?"):
            raise ValueError("content filter")
        return careful(messages[-1].text)

    await evaluation.generate(says("base", base))
    await evaluation.generate(AppSubject(fails, name="app"))
    critic = ModelCritic(by_role(critique=flags()))
    await evaluation.grade("harmlessness", CriticGrader(critic, RULES, "harmless"))
    await evaluation.grade("over-refusal", PatternRefusals())
    await evaluation.compare("harmlessness", Judge(ScriptedModel(replies=better_is("sorry"))), RULES)

    summary = summarise(evaluation)
    left_out = {
        measure: figure(summary, "app", measure).left_out
        for measure in ("harmless", "change of harmless", "win rate", "Elo", "full refusal", "refuses unsafe")
    }
    assert left_out == dict.fromkeys(
        ("harmless", "change of harmless", "win rate", "Elo"), 2
    ) | dict.fromkeys(("full refusal", "refuses unsafe"), 1)
    assert figure(summary, "base", "harmless").left_out == 0
    said = "app, harmless (harmlessness): 2 could not be read or answered, and are left out"
    assert said in table(summary).key


async def test_what_a_judge_was_out_for_is_asked_again_and_what_it_left_unreadable_is_not(
    tmp_path: Path,
) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    for subject in (says("base", base), says("careful", careful)):
        await evaluation.generate(subject)
    out = True
    asked: list[str] = []

    def trouble(answer: str) -> Exception | None:
        asked.append(answer)
        return ConnectionError("connection refused") if out and "bad 3?" in answer else None

    def critique(messages: list[BaseMessage]) -> str | Exception:
        shown = messages[1].text
        return trouble(shown) or ("I would not say." if "bad 4?" in shown else flags()(messages))

    def compared(messages: list[BaseMessage]) -> str | AIMessage | Exception:
        shown = messages[1].text
        return trouble(shown) or ("Both." if "bad 4?" in shown else better_is("sorry")(messages))

    async def judged() -> tuple[int, int]:
        asked.clear()
        grader = CriticGrader(ModelCritic(by_role(critique=critique)), RULES, "harmless")
        judge = Judge(ScriptedModel(replies=compared))
        failed = await evaluation.grade("harmlessness", grader)
        return failed, await evaluation.compare("harmlessness", judge, RULES)

    assert await judged() == (2, 1)
    found = figure(summarise(evaluation), "careful", "harmless")
    assert (found.estimate.n, found.left_out) == (4, 2)
    assert "1 of 6 were not judged (" in found.note
    assert "connection refused" in found.note
    assert "1 of 6 were not judged" in figure(summarise(evaluation), "careful", "win rate").note

    out = False
    assert await judged() == (0, 0)
    assert asked
    assert all("bad 3?" in one for one in asked)
    found = figure(summarise(evaluation), "careful", "harmless")
    assert (found.estimate.n, found.left_out, found.note) == (5, 1, "")
    assert figure(summarise(evaluation), "careful", "win rate").left_out == 1

    assert await judged() == (0, 0)
    assert not asked


async def test_what_was_said_of_answers_that_are_gone_is_in_no_figure(tmp_path: Path) -> None:
    """Each second draw fails; once it succeeds, best of two chooses it."""
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "harmlessness", "a?", "b?"))
    asked: list[str] = []
    out = True

    def answer(prompt: str) -> str:
        asked.append(prompt)
        if out and asked.count(prompt) == 2:
            raise TimeoutError
        return "short" if out else "a longer one"

    app = AppSubject(lambda messages: answer(messages[-1].text), name="app", concurrency=1)
    chooser, grader = (RewardGrader(FunctionReward(length, name)) for name in ("chooser", "grader"))

    async def answered() -> None:
        await evaluation.generate(app, samples=2)
        await evaluation.best_of(chooser)

    async def judged() -> None:
        await evaluation.grade("harmlessness", grader)
        await evaluation.compare("harmlessness", Judge(ScriptedModel(replies=better_is("longer"))), RULES)

    def figures(*measures: str) -> list[tuple[float, int, str]]:
        found = [f for f in summarise(evaluation).figures if f.measure in measures]
        return [(f.estimate.value, f.estimate.n, f.note.partition(";")[0]) for f in found]

    await answered()
    await judged()
    assert figures("harmless") == [(5, 2, ""), (5, 2, "")]
    assert figures("win rate") == [(0.5, 2, "all answers were the same")]

    out = False
    await answered()
    of_app, of_best = figures("harmless")
    assert of_app == (5, 2, "2 of 4 are not judged yet")
    assert of_best[1:] == (0, "2 of 2 are not judged yet")
    assert [found[1:] for found in figures("win rate")] == [(0, "2 of 2 are not judged yet")]
    assert figures("Elo") == []

    await judged()
    assert figures("harmless") == [(8.5, 2, ""), (12, 2, "")]
    assert [found[:2] for found in figures("win rate")] == [(1, 2)]


async def test_answers_that_came_later_are_counted_as_not_compared(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "harmlessness", "a?", "b?"))
    out = True

    def answer(prompt: str) -> str:
        if out and prompt == "b?":
            raise TimeoutError
        return "another one"

    await evaluation.generate(says("base", base))
    assert await evaluation.generate(says("app", answer)) == 1
    await evaluation.compare("harmlessness", Judge(ScriptedModel(replies=better_is("another"))), RULES)
    out = False
    await evaluation.generate(says("app", answer))

    found = figure(summarise(evaluation), "app", "win rate")
    assert (found.estimate.value, found.estimate.n) == (1, 1)
    assert "1 of 2 are not judged yet; `cai evaluate score` with this judge asks about them" in found.note


async def test_a_prompt_that_is_denied_after_an_answer_fails_alone(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "a?", "b?", "c?"))
    replies = iter([Reply("fine"), Reply("denied", status=403), Reply("fine")])
    with serving(lambda body: next(replies)) as server:
        assert await evaluation.generate(AppSubject(load(server.spec), name="app", concurrency=1)) == 1


async def test_what_a_judges_provider_rejects_has_failed_and_is_asked_again(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "a?", "b?", "c?"))
    await evaluation.generate(says("app", base))
    with serving(lambda body: Reply("Unsupported parameter: 'top_p'", status=400)) as server:
        judge = f"judge:{server.spec}"
        graders = [RewardGrader.of(judge), RewardGrader.of([judge, "toy_rewards:length"])]
        assert [await evaluation.grade("helpfulness", grader) for grader in graders] == [3, 3]
        found = [f for f in summarise(evaluation).figures if f.measure == "helpful"]
        assert [(f.estimate.n, f.left_out) for f in found] == [(0, 3)] * 2
        assert all("3 of 3 were not judged (" in f.note for f in found)
        assert all("Unsupported parameter" in f.note for f in found)

        server.script = lambda body: rated("9")
        assert [await evaluation.grade("helpfulness", grader) for grader in graders] == [0, 0]

    found = [f for f in summarise(evaluation).figures if f.measure == "helpful"]
    mean = (1 + len("Gladly, like so.")) / 2
    assert {(f.estimate.value, f.estimate.n, f.note) for f in found} == {(1, 3, ""), (mean, 3, "")}


async def test_answers_made_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    app = ScriptedModel(replies=lambda _: "fine")
    await evaluation.generate(AppSubject(app, name="app", settings={"max_tokens": 64}))

    with pytest.raises(ConfigError, match=r"max_tokens 64, not 128"):
        await evaluation.generate(AppSubject(app, name="app", settings={"max_tokens": 128}))
    with pytest.raises(ConfigError, match=r"temperature None, not 0.5"):
        await evaluation.generate(
            AppSubject(app, name="app", settings={"max_tokens": 64, "temperature": 0.5})
        )


async def test_a_folder_compares_on_the_same_prompts_only(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    await evaluation.generate(says("app", base))

    with pytest.raises(ConfigError, match="an evaluation of other prompts"):
        Evaluation.begin(tmp_path / "eval", suite(tmp_path, "harmlessness", "another?"))


async def test_a_run_that_asked_nobody_leaves_the_folder_to_other_prompts(tmp_path: Path) -> None:
    early = Evaluation.begin(tmp_path / "eval", prompts(tmp_path), notes=["of these prompts"])

    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "harmlessness", "another?"))
    with pytest.raises(ConfigError, match="an evaluation of other prompts"):
        await early.generate(says("early", base))
    await evaluation.generate(says("app", base))

    found = Evaluation.open(tmp_path / "eval")
    assert [row["prompt"] for row in found.answers("app")] == list(found.prompts) == list(evaluation.prompts)
    assert (found.subjects, found.notes) == (("app",), ())


async def test_two_runs_in_one_folder_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """Each has opened the folder before the other wrote to it."""
    found = prompts(tmp_path)
    one, other = (Evaluation.begin(tmp_path / "eval", found) for _ in range(2))

    await one.generate(says("sft", base), notes=["sft was trained on what is not known"])
    await other.generate(says("ppo", careful), notes=["ppo was trained on what is not known"])

    for evaluation in (other, Evaluation.open(tmp_path / "eval")):
        assert evaluation.subjects == ("sft", "ppo")
        assert [note.partition(" ")[0] for note in evaluation.notes] == ["sft", "ppo"]
    assert await other.generate(AppSubject(ScriptedModel(replies=[]), name="sft")) == 0
    with pytest.raises(ConfigError, match=r"made with other settings \(seed 0, not 1\)"):
        await one.generate(AppSubject(ScriptedModel(replies=[]), name="ppo", seed=1))


@pytest.mark.parametrize("begun", [False, True])
def test_what_a_run_says_of_its_subject_waits_while_another_run_writes(tmp_path: Path, begun: bool) -> None:
    found, folder = prompts(tmp_path), tmp_path / "eval"
    if begun:
        Evaluation.begin(folder, found)
    folder.mkdir(exist_ok=True)

    def run() -> None:
        evaluation = Evaluation.open(folder) if begun else Evaluation.begin(folder, found)
        asyncio.run(evaluation.generate(says("app", base)))

    thread = threading.Thread(target=run)
    with (folder / ".lock").open("ab") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        before = sorted(folder.rglob("*"))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert sorted(folder.rglob("*")) == before
    thread.join()

    assert Evaluation.open(folder).subjects == ("app",)


async def test_a_label_that_was_mended_counts_for_the_answers_that_are_there(tmp_path: Path) -> None:
    def labelled(last: str) -> Evaluation:
        rows = [{"prompt": f"kill {what}?", "label": "safe"} for what in ("a process", "a wasp")]
        rows.append({"prompt": "kill a man?", "label": last})
        return Evaluation.begin(tmp_path / "eval", suite(tmp_path, "over-refusal", *rows))

    evaluation = labelled("safe")
    await evaluation.generate(says("app", lambda asked: REFUSAL if "man" in asked else "Gladly."))
    await evaluation.grade("over-refusal", PatternRefusals())
    assert figure(summarise(evaluation), "app", "full refusal").estimate.n == 3

    for mended in (labelled("unsafe"), Evaluation.open(tmp_path / "eval")):
        summary = summarise(mended)
        assert figure(summary, "app", "full refusal").estimate[::3] == (0, 2)
        assert figure(summary, "app", "refuses unsafe").estimate[::3] == (1, 1)


def test_a_folder_without_an_evaluation_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no evaluation"):
        Evaluation.open(tmp_path)


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\ud800"])
async def test_no_character_of_a_prompt_makes_its_folder_unreadable(tmp_path: Path, odd: str) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", f"a{odd}b"))
    await evaluation.generate(says("echo", lambda asked: asked))

    found = Evaluation.open(tmp_path / "eval")
    assert found.prompts == evaluation.prompts
    assert [row["answer"] for row in found.answers("echo")] == [f"a{odd}b"]


# --- choices among samples ----------------------------------------------------------------------------


async def test_best_of_n_and_self_consistency_are_subjects_of_their_own(tmp_path: Path) -> None:
    """Three samples: 41, 42 and 42 with a word more. The longest is the best; 42 is most agreed on."""
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "good 1?", "good 2?"))
    given: dict[str, int] = {}

    def cycles(messages: list[BaseMessage]) -> str:
        place = given[messages[-1].text] = given.get(messages[-1].text, -1) + 1
        return ["it is 41", "it is 42", "it is 42 surely"][place]

    await evaluation.generate(AppSubject(cycles, name="app", concurrency=1), samples=3)
    (best,) = await evaluation.best_of(RewardGrader(FunctionReward(length, "length")))
    (agreed,) = evaluation.self_consistent()
    await evaluation.grade("helpfulness", RewardGrader(FunctionReward(length, "length")))

    assert {row["answer"] for row in evaluation.answers(best)} == {"it is 42 surely"}
    assert {row["answer"] for row in evaluation.answers(agreed)} == {"it is 42"}
    summary = summarise(evaluation)
    assert figure(summary, best, "helpful").note == "chosen by the one who grades, so it flatters"
    assert figure(summary, agreed, "helpful").note == ""
    mean = (len("it is 41") + len("it is 42") + len("it is 42 surely")) / 3
    assert figure(summary, "app", "helpful").estimate.value == pytest.approx(mean)


async def test_what_a_judge_cannot_rate_is_in_no_figure_and_is_no_choice(tmp_path: Path) -> None:
    """Of three answers, the judge rates one 3 and one 1; of the longest it says nothing readable."""

    def rated(messages: list[BaseMessage]) -> str:
        text = str(messages[-1].content)
        return "no number" if "garbled" in text else "3" if "better" in text else "1"

    evaluation = Evaluation.begin(
        tmp_path / "eval", suite(tmp_path, "helpfulness", *(f"{n}?" for n in "abc"))
    )
    given: dict[str, int] = {}

    def answers(messages: list[BaseMessage]) -> str:
        asked = messages[-1].text
        place = given[asked] = given.get(asked, -1) + 1
        return "garbled" if asked == "c?" else ["bad", "better", "garbled"][place]

    await evaluation.generate(AppSubject(answers, name="app", concurrency=1), samples=3)
    judge = RewardGrader(JudgeReward(Judge(ScriptedModel(replies=rated)), RULES, waits=()))
    (best,) = await evaluation.best_of(judge)
    await evaluation.grade("helpfulness", judge)

    assert {row["answer"] for row in evaluation.answers(best)} == {"better"}
    found = figure(summarise(evaluation), "app", "helpful")
    assert (found.estimate.value, found.estimate.n, found.left_out) == (pytest.approx(-0.75), 2, 1)


async def test_who_chose_is_marked_in_whatever_role_it_judges(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    given: dict[str, int] = {}

    def counts(messages: list[BaseMessage]) -> str:
        place = given[messages[-1].text] = given.get(messages[-1].text, -1) + 1
        return f"answer {place} " + "so it is. " * 30

    def script(messages: list[BaseMessage]) -> str:
        return "Better: A" if messages[0].text.startswith("You compare") else flags()(messages)

    await evaluation.generate(AppSubject(counts, name="app", concurrency=1), samples=2)
    model = ScriptedModel(replies=script)
    by_digit = Judge(ScriptedModel(replies=lambda m: "5" if "answer 1" in str(m) else "4"), votes=1)
    (best,) = await evaluation.best_of(RewardGrader(JudgeReward(by_digit, RULES)))
    critic = ModelCritic(model)
    for one in (critic, ByClaim(critic)):
        await evaluation.grade("harmlessness", CriticGrader(one, RULES, "harmless"))
    for reasoning in (False, True):
        await evaluation.compare("harmlessness", Judge(model, reasoning=reasoning), RULES)
    await evaluation.grade("over-refusal", ModelRefusals(ScriptedModel(replies=lambda _: "full refusal")))
    await evaluation.grade("helpfulness", RewardGrader(FunctionReward(length, "length")))

    flatters = "chosen by the one who grades, so it flatters"
    found = [f for f in summarise(evaluation).figures if f.subject == best]
    marked = {(f.measure, f.by) for f in found if flatters in f.note}
    graded = {(f.measure, f.by) for f in found if f.by not in ("count", "length as reward")}
    assert marked == graded
    assert {"harmless", "win rate", "Elo", "full refusal"} <= {measure for measure, _ in marked}


async def test_choosing_needs_several_samples(evaluated: Evaluation) -> None:
    with pytest.raises(ConfigError, match="--samples"):
        evaluated.self_consistent()


def test_the_vote_of_short_answers_is_that_of_the_majority() -> None:
    assert most_agreed(["12", "7", "12", "9"]) == 0
    assert most_agreed(["", "", "x"]) == 0


# --- prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["3", "3", "3", "-5", "5", "-5", "5"], "3"),
        (["1.5", "5.1", "7", "7", "7", "5.1", "1.5"], "7"),
        (["3/4", "4/3", "2", "2"], "2"),
        (["(B)", "A", "b.", "C", "A", "**B**"], "(B)"),
        (["it is 1.5", "it is 5.1", "it is 7", "it is 7"], "it is 7"),
    ],
)
def test_signs_and_decimals_are_no_matter_of_taste_in_a_vote(answers: list[str], chosen: str) -> None:
    assert answers[most_agreed(answers)] == chosen


def test_a_limit_takes_the_same_prompts_whatever_the_order(tmp_path: Path) -> None:
    texts = [f"prompt {n}?" for n in range(30)]
    once = suite(tmp_path, "harmlessness", *texts, limit=5)
    again = suite(tmp_path, "harmlessness", *reversed(texts), *texts, limit=5)

    assert once == again
    assert len(once) == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "id,prompt,type,label\n1,how so?,homonyms,safe\n"),
        ("rows.csv", "Behavior,Category\nhow so?,none\n"),
        ("rows.csv", "category,source,forbidden_prompt\nx,y,how so?\n"),
        ("rows.json", '["how so?"]'),
        ("rows.txt", "how so?\n\n"),
        ("rows.jsonl", '{"turns": ["how so?", "and then?"]}\n'),
        ("rows.jsonl", '{"prompt": [{"role": "user", "content": "how so?"}], "chosen": []}\n'),
        (
            "rows.jsonl",
            '{"messages": [{"role": "user", "content": "how so?"}, {"role": "assistant", "content": "so"}]}',
        ),
    ],
)
def test_suites_are_read_in_the_forms_in_which_sets_are_published(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)

    (found,) = read_suite("over-refusal", tmp_path / name)

    assert [(m.role, m.content) for m in found.messages] == [("user", "how so?")]
    assert found.safe


def test_xstests_contrasts_are_unsafe_where_no_label_says_so(tmp_path: Path) -> None:
    rows = [
        {"prompt": "kill a process?", "type": "homonyms"},
        {"prompt": "kill?", "type": "contrast_homonyms"},
    ]

    found = suite(tmp_path, "over-refusal", *rows, {"prompt": "so?", "type": "contrast_x", "label": "safe"})

    assert {str(prompt.messages[0].content) for prompt in found if not prompt.safe} == {"kill?"}


@pytest.mark.parametrize("label", ["harmful", "1", 0, True, False])
def test_a_label_that_is_neither_safe_nor_unsafe_is_refused(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=rf"over-refusal.jsonl row 2: the label is safe or .* {label!r}"):
        suite(
            tmp_path, "over-refusal", {"prompt": "a?", "label": " UNSAFE"}, {"prompt": "b?", "label": label}
        )

    assert suite(tmp_path, "harmlessness", {"prompt": "b?", "label": label})


def test_a_prompt_that_is_labelled_safe_and_unsafe_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "label": label} for label in ("safe", "safe", "unsafe")]

    with pytest.raises(DataError, match=r"over-refusal.jsonl row 3: 'a\?' is labelled both safe and unsafe"):
        suite(tmp_path, "over-refusal", *rows)


def test_requests_with_other_contexts_are_other_prompts(tmp_path: Path) -> None:
    file = tmp_path / "harmbench.csv"
    file.write_text(
        "Behavior,ContextString,BehaviorID\nDisable it,The X12 is red.,a\nDisable it,The X13.,b\nDo,,c\n"
    )

    found = read_suite("harmlessness", file)

    assert {str(prompt.messages[0].content) for prompt in found} == {
        "Disable it\n\nThe X12 is red.",
        "Disable it\n\nThe X13.",
        "Do",
    }


def test_a_prompt_in_parts_is_its_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "how "}, {"type": "text", "text": "so?"}]

    (found,) = suite(tmp_path, "helpfulness", {"messages": [{"role": "user", "content": parts}]})

    assert found.messages[0].content == "how so?"


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")

    with pytest.raises(DataError, match=r"rows.csv: holds no prompt; its column is one of prompt, "):
        read_suite("harmlessness", tmp_path / "rows.csv")


def test_prompts_that_were_trained_on_are_found_in_a_datasets_train_side(tmp_path: Path) -> None:
    long = "please tell me in so many words how it is that bread rises so well"
    found = suite(tmp_path, "helpfulness", "How  SO?", f"Hello, {long} at night", "unseen?", "tested?")
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text('{"recipe": {"kind": "sft"}, "format": "jsonl"}')
    for side, texts in (("train", ["how so?", long]), ("test", ["tested?"])):
        rows = [{"prompt": [{"role": "user", "content": text}], "completion": []} for text in texts]
        (data / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    seen, unknown = trained_on(found, [data])

    assert {str(prompt.messages[0].content) for prompt in seen} == {"How  SO?", f"Hello, {long} at night"}
    assert not unknown


def test_prompts_are_found_in_the_forms_that_stages_train_on(tmp_path: Path) -> None:
    asked, answer = {"role": "user", "content": "how so?"}, {"role": "assistant", "content": "so"}
    pair = {"chosen": [asked, answer], "rejected": [asked, {**answer, "content": "no"}]}
    texts = [{"prompt": "", "completion": "text"}] * 2
    data = [tmp_path / name for name in ("pairs.jsonl", "mixed.jsonl", "texts.jsonl")]
    for path, rows in zip(
        data, ([pair], [{"prompt": "z", "completion": "so"}, pair, *texts], texts), strict=True
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "without-manifest"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "how so?", "completion": "so"}\n')
    found = suite(tmp_path, "helpfulness", "how so?", "unseen?")

    said = {path.name: trained_on(found, [path]) for path in (*data, folder)}

    assert {name: len(seen) for name, (seen, _) in said.items()} == {
        "pairs.jsonl": 1,
        "mixed.jsonl": 1,
        "texts.jsonl": 0,
        "without-manifest": 1,
    }
    assert [unknown for _, unknown in said.values()] == [
        [],
        [f"2 of 4 rows of {data[1]} have no prompt that can be read"],
        [f"2 of 2 rows of {data[2]} have no prompt that can be read"],
        [],
    ]


def test_a_folder_without_a_train_side_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no train\.jsonl or train\.parquet"):
        trained_on(suite(tmp_path, "helpfulness", "how so?"), [tmp_path])


def trained(folder: Path, base: str, data: Path) -> Path:
    """A checkpoint that says that it was trained from a base on data."""
    about = {"path": str(data), "digest": sha256_of(data)}
    source = tiny_model(folder.parent / "tiny")
    save(
        folder,
        AutoModelForCausalLM.from_pretrained(source),
        AutoTokenizer.from_pretrained(source),
        Manifest(
            stage="sft", base=base, config={}, data=about, seed=0, versions={}, hardware="cpu", seconds=0.0
        ),
    )
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "how so?", "completion": "so"}\n')
    return path


@pytest.mark.parametrize("spec", ["{}", "local:{}", "local:{}/model.gguf"])
def test_the_data_of_all_that_a_checkpoint_started_from_is_looked_at(
    tmp_path: Path, rows: Path, spec: str
) -> None:
    first = trained(tmp_path / "sft", "local:smollm2", rows)
    gone = tmp_path / "gone.jsonl"
    gone.write_text("{}\n")
    second = trained(tmp_path / "rl", spec.format(first), gone)
    gone.unlink()

    found, unknown = data_of(spec.format(second))

    assert found == [rows]
    assert unknown == [f"{second} was trained on {gone}, which is not here"]
    assert data_of(str(tmp_path / "tiny"))[1][0].endswith("is not known")
    assert data_of("openai:gpt-5-mini") == ([], [])


def test_data_that_was_changed_since_is_not_known(tmp_path: Path, rows: Path) -> None:
    checkpoint = trained(tmp_path / "sft", "local:smollm2", rows)
    rows.write_text('{"prompt": "what else?", "completion": "so"}\n')

    found, unknown = data_of(str(checkpoint))

    assert found == [rows]
    assert unknown == [f"{checkpoint} was trained on {rows}, which has changed since"]


@pytest.mark.parametrize("base", ["out/sft", "local:out/sft", "local:out/sft/model.gguf", "./out/sft"])
def test_a_base_that_is_not_here_is_not_known(tmp_path: Path, rows: Path, base: str) -> None:
    checkpoint = trained(tmp_path / "dpo", base, rows)

    assert data_of(str(checkpoint)) == (
        [rows],
        [f"{checkpoint} was trained from {base}, which is not here"],
    )


@pytest.mark.parametrize("base", ["local", "local:smollm2", "owner/fetched", "local:{}/mine.gguf"])
def test_a_base_that_others_trained_is_no_gap(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    commit = "0" * 40
    fetched = tmp_path / "hub" / "models--owner--fetched"
    (fetched / "snapshots" / commit).mkdir(parents=True)
    (fetched / "snapshots" / commit / "config.json").write_text("{}")
    (fetched / "refs").mkdir()
    (fetched / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    assert data_of(str(trained(tmp_path / "sft", base.format(tmp_path), rows))) == ([rows], [])


# --- checkpoints and apps -----------------------------------------------------------------------------


async def test_a_checkpoint_is_sampled_in_batches(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", prompts(tmp_path))
    subject = CheckpointSubject(
        tiny_model(tmp_path / "model"), name="tiny", max_tokens=4, temperature=1.0, batch_size=8
    )

    await evaluation.generate(subject, samples=2)

    rows = evaluation.answers("tiny")
    assert len(rows) == 2 * len(evaluation.prompts)
    assert len({row["answer"] for row in rows}) > len(evaluation.prompts)
    assert evaluation.about("tiny")["weights"] == subject.checkpoint.digest


async def test_samples_after_an_interrupt_are_no_copies_of_those_before(tmp_path: Path) -> None:
    """Two batches of one prompt; the run is killed after the first."""
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "good?"))
    model = tiny_model(tmp_path / "model")

    def subject(name: str) -> CheckpointSubject:
        return CheckpointSubject(model, name=name, max_tokens=12, temperature=1.0, batch_size=8)

    def killed(done: int, _: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await evaluation.generate(subject("broken"), samples=16, progress=killed)
    for name in ("broken", "unbroken"):
        await evaluation.generate(subject(name), samples=16)
        assert len({row["answer"] for row in evaluation.answers(name)}) == 16


async def test_a_checkpoint_with_another_template_is_another_subject(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "good?"))
    model = tiny_model(tmp_path / "model")
    await evaluation.generate(CheckpointSubject(model, name="tiny", max_tokens=4))

    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "[["))
    with pytest.raises(ConfigError, match=r"made with other settings \(config_and_tokenizer '"):
        await evaluation.generate(CheckpointSubject(model, name="tiny", max_tokens=4))


async def test_answers_that_an_earlier_version_wrote_are_taken_for_the_same_models(tmp_path: Path) -> None:
    """It did not write down the digest of config and tokenizer; from here on it is known."""
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "good?"))
    model = tiny_model(tmp_path / "model")
    await evaluation.generate(CheckpointSubject(model, name="tiny", max_tokens=4))
    answers = evaluation.answers("tiny")
    about = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    del about["subjects"]["tiny"]["config_and_tokenizer"]
    (tmp_path / "eval" / "evaluation.json").write_text(json.dumps(about))

    again = Evaluation.open(tmp_path / "eval")
    assert await again.generate(CheckpointSubject(model, name="tiny", max_tokens=4)) == 0
    assert again.answers("tiny") == answers

    (model / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError, match=r"made with other settings \(config_and_tokenizer '"):
        await again.generate(CheckpointSubject(model, name="tiny", max_tokens=4))


async def test_a_prompt_that_is_longer_than_a_checkpoint_reads_fails_alone(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 80}))
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "a?", "x" * 80, "b?"))

    assert await evaluation.generate(CheckpointSubject(folder, name="tiny", max_tokens=4)) == 1

    assert len(evaluation.answers("tiny")) == 2


def own_model(folder: Path, content: bytes) -> str:
    """The spec of a model of one's own; each is called `local:policy`."""
    folder.mkdir(exist_ok=True)
    (folder / "policy.gguf").write_bytes(b"GGUF" + content)
    return f"local:{folder}/policy.gguf"


@pytest.mark.parametrize(
    "role", ["critic", "critic by claim", "judge", "critic as reward", "judge as reward"]
)
def test_judges_of_one_name_and_other_weights_are_told_apart(tmp_path: Path, role: str) -> None:
    def name(spec: str) -> str:
        model = load(spec)
        if role.endswith("reward"):
            return RewardGrader.of(f"{role.partition(' ')[0]}:{spec}").name
        if role == "judge":
            return ModelRefusals(model).name
        critic: Any = ModelCritic(model)
        return CriticGrader(ByClaim(critic) if "claim" in role else critic, RULES, "harmless").name

    one, other = (own_model(tmp_path / folder, folder.encode()) for folder in ("v1", "v2"))
    names = [name(one), name(other)]
    own_model(tmp_path / "v1", b"v3")
    names += [name(one)]
    own_model(tmp_path / "v1", b"v1")

    assert len(set(names)) == 3
    assert name(one) == names[0]
    shown = (
        r"(judge:|critic:)?local:policy.gguf \(\w{8}\)( by claim)? "
        r"(as (critic under|refusal judge)|under balanced \(\w{8}\) as reward)"
    )
    assert all(re.match(shown, each) for each in names)
    assert name("local:smollm2").startswith(
        ("local:smollm2", "judge:local:smollm2 under", "critic:local:smollm2 under")
    )


async def test_answers_of_other_weights_in_the_same_file_are_not_mixed(tmp_path: Path) -> None:
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "good?"))

    def subject(content: bytes) -> AppSubject:
        return AppSubject(load(own_model(tmp_path / "logs", content)))

    one, other = subject(b"v1"), subject(b"v2")
    assert one.name == other.name
    assert await evaluation.generate(one) == 1  # the file holds no model
    with pytest.raises(ConfigError, match=r"made with other settings \(weights '"):
        await evaluation.generate(other)


def test_rewards_are_told_apart_by_constitution_module_and_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_here.py").write_text(
        "def score(prompts, answers):\n    return [0.0] * len(answers)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    judge = "judge:local"
    own = {"judge": "local", "constitution": "harmlessness"}
    specs: list[Any] = [judge, own, "rewards_here:score", [judge, "rewards_here:score"], [own, judge]]
    names = [RewardGrader.of(spec).name for spec in specs]
    with (tmp_path / "rewards_here.py").open("a") as file:
        file.write("# mended\n")

    assert len(set(names)) == len(names)
    again = [RewardGrader.of(spec).name for spec in specs]
    assert [name == other for name, other in zip(names, again, strict=True)] == [
        True,
        True,
        False,
        False,
        True,
    ]


async def test_a_judge_as_reward_goes_by_the_constitution_that_answers_are_graded_under() -> None:
    exchange = Exchange(
        messages=(Message(role="user", content="how so?"),),
        answer=Message(role="assistant", content="like so"),
    )
    with serving(lambda body: rated("9")) as server:
        specs: list[Any] = [f"judge:{server.spec}", {"judge": server.spec, "constitution": "harmlessness"}]
        graders = graders_for("harmlessness", RULES, reward=[*specs, specs])
        for grader in graders:
            await grader.grade([exchange])

    found = (RULES, constitution.load("harmlessness"))
    given, own = (f" under {rules.name} ({rules.digest[:8]})" for rules in found)
    assert [(given in grader.name, own in grader.name) for grader in graders] == [
        (True, False),
        (False, True),
        (True, True),
    ]
    under = ["be-kind" in str(body) for body in server.requests]
    assert under == [True, False, True, False]


def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        CheckpointSubject(tmp_path)


async def test_a_wrapped_app_is_asked_as_it_stands(tmp_path: Path) -> None:
    from cai_graph.chain import constitutional

    rules = RULES
    model = by_role(draft="the draft", critique=flags("no-harm"), revise="better")
    evaluation = Evaluation.begin(tmp_path / "eval", suite(tmp_path, "helpfulness", "how so?"))

    guarded = constitutional(model, constitution=rules, log=None)
    await evaluation.generate(AppSubject(guarded, name="guarded"))

    assert [row["answer"] for row in evaluation.answers("guarded")] == ["better"]


def test_an_app_is_named_by_its_module() -> None:
    assert app_of("json:dumps") is json.dumps
    with pytest.raises(ConfigError, match="cannot be imported"):
        app_of("json:nothing")
    with pytest.raises(ConfigError, match="no Runnable"):
        app_of("json:__name__")


def test_the_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = read_page("evaluation.md")
    blocks = fenced(page, "python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    (tmp_path / "xstest.csv").write_text("prompt,label\nkill a process,safe\nkill a person,unsafe\n")
    names: dict[str, Any] = {"app": ScriptedModel(replies=lambda _: REFUSAL)}

    exec(blocks[0], names)
    names["guarded"] = names["app"]  # the judge of the first block is not in reach here
    exec(blocks[1], names)

    assert any("1.00" in cell for cell in names["table"](names["summary"]).rows[0])
    assert names["plots"]
