"""Critics of one's own: trained from verdicts, calibrated, measured, and judging in the graph."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from replies import principle
from repository import fenced, read_page
from safetensors.torch import load_file
from tiny import tiny_model
from typer.testing import CliRunner
from wire import serving

from cai_graph import constitutional
from cai_graph.calls import Budget, Calls
from cai_graph.cli import app
from cai_graph.constitution import Constitution
from cai_graph.critic import Critic, check_strategy, critic_for
from cai_graph.critic.cascades import cascade
from cai_graph.critic.probe import WHOLE_CHARACTERS
from cai_graph.critic.trained import TrainedCritic
from cai_graph.errors import ConfigError, DataError, ModelError
from cai_graph.prompts import Exchange
from cai_graph.request.policy import accept
from cai_graph.testing import ScriptedModel
from cai_graph.trajectory import Critique, Label, Message, Revision, ToolCall
from trainers.critic import Config, figures, train
from trainers.critic.critic import _card
from trainers.critic.verdicts import Labels, read_labelled
from trainers.distill import Config as Distillation
from trainers.distill import Drafts, Feedback, Rows, pipeline
from trainers.distill.sizes import estimate
from trainers.evaluation.grades import CriticGrader
from trainers.rewards import parse
from trainers.rows import CriticRow, Source, Split, Turn, encode_row, line_of
from trainers.stages import Lora

TOPICS = ["bread", "rain", "trains", "cats", "chess", "tea", "snow", "wool", "maps", "salt"]
NO_POISON, BE_KIND = principle("no-poison", "harmless"), principle("be-kind", "harmless")
RULES = Constitution(name="two", principles=(NO_POISON, BE_KIND))


def row(
    request: str,
    answer: str,
    violates: bool,
    *,
    about: str = "harmless",
    judge: str = "people",
    source: Source = "critique",
    split: Split = "train",
) -> bytes:
    made = CriticRow(
        trajectory_id="t",
        source=source,
        constitution="",
        judge=judge,
        principles=(about,),
        p_violates=float(violates),
        prompt=(Turn(role="user", content=request),),
        completion=(Turn(role="assistant", content=answer),),
        principle=about,
        violates=violates,
    )
    return line_of(*encode_row("critic", made), split)


def dataset(folder: Path, lines: list[bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in (b"train", b"test"):
        mine = [line for line in lines if b'"split":"' + split in line]
        (folder / f"{split.decode()}.jsonl").write_bytes(b"".join(mine))
    return folder


def poison(topics: list[str], **given: Any) -> list[bytes]:
    return [
        line
        for topic in topics
        for line in (
            row(f"How about {topic}?", f"Poison kills: put poison into {topic}.", True, **given),
            row(f"What is {topic}?", f"A nice day with {topic} and friends.", False, **given),
        )
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two judges, a test part, and an aim with too few labels."""
    lines = poison(TOPICS[:7]) + poison(["sand", "wind", "soup"], judge="others")
    lines += poison(TOPICS[7:], split="test") + poison(["ink"], about="honest")
    return dataset(tmp_path / "critic-rows", lines)


def asked(answer: str, request: str = "How about soup?", **given: Any) -> Exchange:
    return Exchange(
        messages=(Message(role="user", content=request),),
        answer=Message(role="assistant", content=answer, **given),
    )


def judge(critic: Critic, exchange: Exchange, rules: Constitution = RULES) -> Critique:
    return asyncio.run(critic.critique(exchange, rules, Calls(Budget()), explain=True))


# ---- labels


def test_people_outrank_critics_and_a_tie_is_left_out(tmp_path: Path) -> None:
    folder = dataset(
        tmp_path / "rows",
        [
            row("a", "x", True),
            row("a", "x", True, judge="again"),
            row("a", "x", False, judge="ann", source="human"),
            row("b", "x", True),
            row("b", "x", False, judge="another"),
            row("c", "x", True, split="test"),
        ],
    )

    found, split = read_labelled(folder)

    assert [(one.request, one.violates, one.judge, one.test) for one in found] == [
        ("a", False, "ann", False),
        ("c", True, "people", True),
    ]
    assert split == 1


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no train\.jsonl or train\.parquet"):
        read_labelled(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"id":"1","prompt":[]}\n')
    with pytest.raises(DataError, match=r"train\.jsonl: row 1 is no row of the kind critic"):
        read_labelled(tmp_path)


def test_too_few_labels_and_an_unknown_judge_are_named(data: Path, tmp_path: Path) -> None:
    few = dataset(tmp_path / "few", poison(TOPICS[:3]))
    with pytest.raises(DataError, match="harmless: 3 requests with VIOLATES, 3 with COMPLIES"):
        train(Config(model="local:smollm2", data=few, output=tmp_path / "out"))
    with pytest.raises(ConfigError, match="unseen names the judges nobody, and the data have others, people"):
        train(Config(model="local:smollm2", data=data, output=tmp_path / "out", unseen=("nobody",)))
    assert not list(tmp_path.glob("*out*"))


def test_what_is_measured_under_one_principle_leaves_too_few_labels_under_another(tmp_path: Path) -> None:
    lines = [
        line
        for about, judge in (("harmless", "people"), ("be-kind", "ann"))
        for line in poison(TOPICS, about=about, judge=judge)
    ]
    more = poison(["sand", "wind", "soup", "ink", "oak"], about="be-kind")

    found = Labels(dataset(tmp_path / "rows", lines + more), unseen=("ann",))

    assert found.abouts == ["be-kind"]
    assert found.too_few == {"harmless": "0 requests with VIOLATES, 0 with COMPLIES"}
    assert found.trained.sum() == len(more)
    with pytest.raises(DataError, match="be-kind: 0 requests with VIOLATES, 0 with COMPLIES; harmless: 0"):
        Labels(dataset(tmp_path / "none", lines), unseen=("ann",))


def test_a_model_of_the_wrong_kind_and_an_output_that_is_there_are_refused_first(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'openai:gpt-5-mini' is no local model"):
        train(Config(model="openai:gpt-5-mini", data=data, output=tmp_path / "out"))
    with pytest.raises(ConfigError, match="is there already"):
        train(Config(model="local:smollm2", data=data, output=data))


# ---- a probe


@pytest.mark.local
def test_a_probe_is_trained_measured_and_judges_in_the_graph(
    data: Path, tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(figures, "RESAMPLES", 20)
    told: list[tuple[int, int]] = []
    config = Config(
        model=f"local:{tiny_weights}", data=data, output=tmp_path / "mine", blocks=4, unseen=("others",)
    )

    folder = train(config, lambda *counts: told.append(counts))

    card = json.loads((folder / "card.json").read_text())
    assert told[-1][0] == told[-1][1] == 26
    assert card["left_out"]["too few"] == {"honest": "1 requests with VIOLATES, 1 with COMPLIES"}
    settings = {figure["setting"] for figure in card["figures"]}
    assert settings == {"5 folds by request", "the dataset's test part", "others, never trained on"}
    assert {figure["measure"] for figure in card["figures"]} >= {"auc", "recall", "calibration error"}
    assert [one["judge"] for one in card["data"] if one["trained"]] == ["people"]
    assert "It judges nothing of honest" in (folder / "CARD.md").read_text()

    critic = critic_for(f"trained:{folder}")
    assert critic.name.startswith("trained:mine#")
    bad = judge(critic, asked("Poison kills: put poison into soup."))
    good = judge(critic, asked("A nice day with soup and friends."))
    assert [(v.aim, v.label, v.read_by) for v in bad.verdicts] == [("harmless", Label.VIOLATES, "probe")]
    assert [v.label for v in good.verdicts] == [Label.COMPLIES]
    assert bad.verdicts[0].probability > 0.5 > good.verdicts[0].probability

    app = constitutional(
        ScriptedModel(replies=["Poison kills: put poison into soup.", "A nice day with soup and friends."]),
        constitution=RULES,
        critic=f"trained:{folder}",
        log=None,
        max_rounds=1,
        candidates=1,
    )
    assert app.invoke("How about soup?").content == "A nice day with soup and friends."

    strong = ScriptedModel(replies=[])  # it is not asked: the trained critic clears the answer
    mixed = cascade(critic, strong, threshold=0.5)
    assert judge(mixed, asked("A nice day with soup and friends.")).cascade.why == "cleared"


@pytest.mark.local
def test_a_probes_figures_and_threshold_are_of_all_windows_of_an_answer(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In use the largest window counts, and here second windows of what complies are as what violates."""
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(figures, "RESAMPLES", 20)
    bad = {topic: f"Poison kills: put poison into {topic}." for topic in TOPICS}
    good = {topic: f"A nice day with {topic} and friends." for topic in TOPICS}
    gap = " " * 1200  # few tokens
    good |= {topic: good[topic] + gap + bad[topic] for topic in TOPICS[:3]}
    bad |= {topic: bad[topic] + gap + bad[topic] for topic in TOPICS[:5]}
    lines = [row(f"How about {topic}?", text, True) for topic, text in bad.items()]
    lines += [row(f"How about {topic}?", text, False) for topic, text in good.items()]

    folder = train(
        Config(
            model=f"local:{tiny_weights}",
            data=dataset(tmp_path / "rows", lines),
            output=tmp_path / "mine",
            blocks=4,
        )
    )

    found = json.loads((folder / "card.json").read_text())["figures"]
    (auc,) = [one["value"] for one in found if one["measure"] == "auc"]
    critic = TrainedCritic(folder)
    said = [judge(critic, asked(answer, f"How about {t}?")).verdicts[0] for t, answer in good.items()]
    assert auc < 0.99
    assert [verdict.label for verdict in said] == [Label.COMPLIES] * len(TOPICS)


# ---- a classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier on a random model, trained on two principles that one word violates."""
    place = tmp_path_factory.mktemp("classifier")
    lines = [
        row(f"ask {topic}", f"{word * 12} {topic}", word == "x", about=about)
        for about in ("no-poison", "be-kind")
        for topic in [*TOPICS, "sand", "wind", "soup", "ink", "oak"]
        for word in ("x", "q")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "RESAMPLES", 20)
        return train(
            Config(
                model=str(tiny_model(place / "model", hidden=32)),
                data=dataset(place / "rows", lines),
                output=place / "mine",
                kind="classifier",
                lora=Lora(rank=8),
                learning_rate=1e-2,
                epochs=4,
            )
        )


def test_the_card_says_where_more_is_flagged_than_was_asked_for(classifier: Path) -> None:
    """A threshold is at most 0.99, whatever lies above it."""
    card = json.loads((classifier / "card.json").read_text())
    assert "at most 5% of the answers that comply." in _card(card)
    for figure in card["figures"]:
        if (figure["head"], figure["measure"]) == ("be-kind", "false alarms"):
            figure["value"] = 0.2

    assert "at most 5% of the answers that comply; of be-kind 20%." in _card(card)


def test_a_classifier_gives_a_calibrated_verdict_under_each_principle(classifier: Path) -> None:
    critic = TrainedCritic(classifier)

    bad = judge(critic, asked("xxxxxxxxxxxx fog", "ask fog")).verdicts
    good = judge(critic, asked("qqqqqqqqqqqq fog", "ask fog")).verdicts

    assert [(v.principle, v.label) for v in bad] == [
        ("no-poison", Label.VIOLATES),
        ("be-kind", Label.VIOLATES),
    ]
    assert [v.label for v in good] == [Label.COMPLIES, Label.COMPLIES]
    assert all(v.read_by == "classifier" for v in (*bad, *good))
    assert min(v.probability for v in bad) > 0.5 > max(v.probability for v in good)
    card = json.loads((classifier / "card.json").read_text())
    aucs = [figure for figure in card["figures"] if figure["measure"] == "auc"]
    assert [(one["head"], one["setting"], one["value"]) for one in aucs] == [
        ("be-kind", "a fifth of the requests", 1.0),
        ("no-poison", "a fifth of the requests", 1.0),
    ]


def test_a_classifiers_forward_passes_are_counted(classifier: Path) -> None:
    calls, spaced = Calls(Budget()), Calls(Budget())
    critic = TrainedCritic(classifier)

    asyncio.run(critic.critique(asked("x" * 300), RULES, calls, explain=False))
    asyncio.run(critic.critique(asked("x" * 3000), RULES, spaced, explain=False))

    assert calls.spent["forward"] == 2  # principles
    assert spaced.spent["forward"] == 2 * 3 * 4  # and windows, in parts that a pass takes
    assert calls.spent["generation"] == 0
    assert [(call.role, call.kind) for call in calls.made] == [("critique", "forward")]


def test_an_answer_is_read_under_all_that_was_asked(classifier: Path) -> None:
    critic, calls = TrainedCritic(classifier), Calls(Budget())
    earlier = asked("q" * 12, "x" * 12).messages
    later = asked("q" * 12, "ask fog")
    both = msgspec.structs.replace(later, messages=(*earlier, *later.messages))
    as_one = asked("q" * 12, "x" * 12 + "\n\nask fog")

    of_both = asyncio.run(critic.critique(both, RULES, calls, explain=False)).verdicts

    of_each = zip(judge(critic, later).verdicts, judge(critic, as_one).verdicts, strict=True)
    highest = [max(one.probability, other.probability) for one, other in of_each]
    assert [verdict.probability for verdict in of_both] == pytest.approx(highest, abs=1e-4)
    assert calls.spent["forward"] == 2 * 2  # principles, requests


def test_the_end_of_a_window_that_no_pass_takes_whole_is_read(classifier: Path) -> None:
    critic = TrainedCritic(classifier)

    good = judge(critic, asked("q" * 700, "ask fog")).verdicts
    bad = judge(critic, asked("q" * 700 + "x" * 300, "ask fog")).verdicts

    assert all(one.probability > other.probability for one, other in zip(bad, good, strict=True))


def test_a_forward_pass_that_fails_is_recorded(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "mine")
    (folder / "model" / "model.safetensors").unlink()
    calls = Calls(Budget())

    with pytest.raises(ModelError):
        asyncio.run(TrainedCritic(folder).critique(asked("x"), RULES, calls, explain=False))

    (call,) = calls.made
    assert (call.role, call.kind, call.input_tokens) == ("critique", "forward", None)
    assert (call.error or "").startswith("ModelError: ")


def test_what_it_cannot_read_is_never_said_to_comply(classifier: Path) -> None:
    critic = TrainedCritic(classifier)
    of_tools = principle("no-poison", "harmless", tools=True)
    tools = Constitution(name="tools", principles=(of_tools, BE_KIND))

    calling = asked("", tool_calls=(ToolCall(id="1", name="search", args={}),))
    labels = {v.principle: v.label for v in judge(critic, calling, tools).verdicts}
    assert labels["no-poison"] in (Label.UNREADABLE, Label.VIOLATES)

    long = judge(critic, asked("z" * (WHOLE_CHARACTERS + 1)))
    assert all(v.label is not Label.COMPLIES for v in long.verdicts)


def test_a_principle_it_was_not_trained_on_is_an_error_that_names_it(classifier: Path) -> None:
    rules = Constitution(name="three", principles=(*RULES.principles, principle("be-true", "harmless")))
    with pytest.raises(ConfigError, match=r"trained on .*, and not on be-true \(aim harmless\)"):
        judge(TrainedCritic(classifier), asked("x"), rules)


def test_it_grades_answers_and_rewards_them(classifier: Path, tmp_path: Path) -> None:
    rules = [each.model_dump(exclude_defaults=True) for each in RULES.principles]
    (tmp_path / "rules.yaml").write_text(json.dumps({"name": "rules", "principles": rules}))
    spec = f"trained:{classifier}"

    bad, good = asyncio.run(CriticGrader(spec, RULES, "harmless").grade([asked("x" * 12), asked("q" * 12)]))
    assert bad.value is not None
    assert good.value is not None
    assert bad.value < 0.5 < good.value

    reward = parse({"critic": spec, "constitution": str(tmp_path / "rules.yaml")})
    low, high = reward([[{"role": "user", "content": "ask fog"}]] * 2, ["x" * 12, "q" * 12])
    assert low < 0 < high


def test_it_judges_in_a_pipeline(classifier: Path, tmp_path: Path) -> None:
    rules = [each.model_dump(exclude_defaults=True) for each in RULES.principles]
    (tmp_path / "rules.yaml").write_text(json.dumps({"name": "rules", "principles": rules}))
    asked = [{"prompt": f"ask {thing}"} for thing in ("fog", "rain", "snow", "hail", "wind", "sun")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    spec = f"trained:{classifier}"
    small = {"max_steps": 1, "batch_size": 2, "max_tokens": 256, "allow": ["drop-unfit"]}

    def answer(body: dict[str, Any]) -> str:  # of two good drafts in three
        text = str(body["messages"][-1]["content"])
        return "q" * 12 if len(body["messages"]) > 1 or text != "ask fog" else "x" * 12

    with serving(answer) as server:
        config = Distillation(
            model=str(tiny_model(tmp_path / "tiny")),
            output=tmp_path / "out",
            prompts=tmp_path / "prompts.jsonl",
            constitution=str(tmp_path / "rules.yaml"),
            drafts=Drafts(model=server.spec, critic=spec, max_tokens=16),
            rows=Rows(near_duplicates=None),
            sft=small,
            feedback=Feedback(critic=spec, max_tokens=8, pairs=("revision",)),
            rl={"method": "dpo", **small, "batch_size": 1},
        )
        steps = pipeline(config)
        done = steps.run(lambda step, what, seconds: None)

    assert done["trajectories"].figures["outcomes"] == {"KEPT": 5, "REVISED": 1}
    assert done["feedback"].figures["failed"] == 0
    assert done["preferences"].figures["rows"] > 0
    assert estimate(steps).keys() == {step.name for step in steps.steps}


def test_it_ranks_the_candidates_of_a_revision(classifier: Path) -> None:
    critic = TrainedCritic(classifier)
    answers = [Message(role="assistant", content=text) for text in ("qqqqqxqqqqqq fog", "qqqqqqqqqqqq fog")]
    said = [judge(critic, asked(str(answer.content), "ask fog")) for answer in answers]
    complying = {
        number: msgspec.structs.replace(
            each,
            verdicts=tuple(msgspec.structs.replace(v, label=Label.COMPLIES) for v in each.verdicts),
        )
        for number, each in enumerate(said)
    }
    surest = min(complying, key=lambda number: max(v.probability or 0 for v in complying[number].verdicts))

    accepted = accept([Revision(answer=answer) for answer in answers], complying, RULES)

    assert [revision.accepted for revision in accepted] == [number == surest for number in complying]


def test_it_writes_no_prose(classifier: Path) -> None:
    critic = TrainedCritic(classifier)
    for each in (critic, cascade(critic, critic, threshold=0.5)):
        with pytest.raises(ConfigError, match="writes no prose"):
            check_strategy(each, "sampled")


def test_a_damaged_folder_is_named(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*cannot be read"):
        critic_for(f"trained:{tmp_path / 'nowhere'}")
    folder = shutil.copytree(classifier, tmp_path / "mine")
    (folder / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded as a classifier"):
        judge(TrainedCritic(folder), asked("x"))
    weights = load_file(classifier / "model" / "model.safetensors")
    torch.save(weights, folder / "model" / "pytorch_model.bin")  # a pickle, which is never loaded
    with pytest.raises(ModelError, match="cannot be loaded as a classifier"):
        judge(TrainedCritic(folder), asked("x"))
    card = json.loads((folder / "card.json").read_text())
    card["heads"]["be-kind"]["threshold"] = 2.0
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match=r"threshold of 'be-kind' is 2\.0"):
        TrainedCritic(folder)
    (folder / "card.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match=r"is no card of a critic"):
        TrainedCritic(folder)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_nothing(classifier: Path, tmp_path: Path) -> None:
    config = Config(
        model=str(classifier.parent / "model"),
        data=classifier.parent / "rows",
        output=tmp_path / "out",
        kind="classifier",
        learning_rate=1e30,
    )
    with pytest.raises(ModelError, match=r"the loss is \w+ at update \d+ of \d+; lower learning_rate"):
        train(config)
    assert not list(tmp_path.iterdir())


def test_a_child_forked_while_a_classifier_is_at_work_judges(classifier: Path) -> None:
    code = (
        "import asyncio, os, sys; from pathlib import Path; "
        "from cai_graph.critic.trained import TrainedCritic; "
        f"reads = TrainedCritic(Path({str(classifier)!r}))._reads; reads._one.acquire(); "
        "pid = os.fork(); "
        "pid or asyncio.run(reads.read('Hi', ['Hello'], list(reads._heads))); "
        "pid or os._exit(7); "
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 7)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=100).returncode == 0


def test_opening_a_classifier_loads_no_torch(classifier: Path) -> None:
    code = (
        "import sys; from cai_graph.critic import critic_for; "
        f"critic_for({f'trained:{classifier}'!r}); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the page


def test_the_blocks_of_the_page_run(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = read_page("critics.md")
    (python,) = fenced(page, "python")
    shutil.copytree(classifier, tmp_path / "my-critic")
    rules = [each.model_dump(exclude_defaults=True) for each in RULES.principles]
    (tmp_path / "rules.yaml").write_text(json.dumps({"name": "rules", "principles": rules}))
    monkeypatch.chdir(tmp_path)

    with serving(lambda body: "qqqqqqqqqqqq pan") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        exec(python, {})

    assert capsys.readouterr().out == "qqqqqqqqqqqq pan\n"


def test_the_commands_of_the_page_exist() -> None:
    page = read_page("critics.md")
    (block,) = fenced(page, "sh")
    for command in map(shlex.split, block.splitlines()):
        words = [word for word in command[1:3] if re.fullmatch(r"[a-z]+", word)]
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert all(word in shown.output for word in command if word.startswith("-")), command


def test_the_command_trains_and_names_what_is_missing(data: Path, tmp_path: Path) -> None:
    arguments = ["train", "critic", "--set", "model=local:smollm2", "--set", f"data={data}"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError)
    assert "'output'" in str(done.exception)
