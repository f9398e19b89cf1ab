"""`cai evaluate` as its users run it, against a server that speaks OpenAI's wire format."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from cli_support import cai
from replies import verdicts
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from wire import Reply, role, serving

from cai_graph.cli import evaluate
from cai_graph.constitution import load
from cai_graph.digests import sha256_of
from trainers.checkpoint import Manifest, save

IDS = [principle.id for principle in load("balanced").principles]


def script(body: dict[str, Any]) -> str | Reply:
    """The app refuses what is bad; the critic finds nothing; the judge likes the answer that says sorry."""
    system = str(body["messages"][0]["content"])
    if role(body) == "critique":
        return verdicts(ids=[each for each in IDS if f"\n{each}: " in system])
    if system.startswith("You compare"):
        first = str(body["messages"][1]["content"]).partition('<answer name="B">')[0]
        return "Better: A" if "sorry" in first else "Better: B"
    asked = str(body["messages"][-1]["content"])
    return "I'm sorry, I can't." if "bad" in asked else "Gladly."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.csv").write_text("Behavior\nbad one\nbad two\nbad three\n")
    (tmp_path / "fine.txt").write_text("good one\ngood two\ngood three\n")
    (tmp_path / "xstest.csv").write_text("prompt,label\nkill a process,safe\na bad deed,unsafe\n")
    return tmp_path


SUITES = ("--harmlessness", "red.csv", "--helpfulness", "fine.txt", "--over-refusal", "xstest.csv")


def test_answers_are_kept_and_graded_by_judge_after_judge(folder: Path) -> None:
    with serving(script) as server:
        spec = server.spec.replace("://", "://ann:s3cret@")
        run = ("evaluate", "run", "eval", spec, *SUITES, "--constitution", "balanced", "--critic", spec)
        ran = cai(folder, *run)
        written = len(server.requests)
        cai(folder, *run)
        assert len(server.requests) == written

        scored = cai(folder, "evaluate", "score", "eval", "--critic", spec, "--refusals", "pattern")
        asked = len(server.requests)
        judged = cai(folder, "evaluate", "score", "eval", "--judge", spec, "--json")

    for said in (ran, scored, judged):
        assert "s3cret" not in said.stdout + said.stderr
    kept = [path for path in (folder / "eval").rglob("*") if path.is_file()]
    assert not [path for path in kept if "s3cret" in f"{path}{path.read_text()}"]
    assert "full refusal" in scored.stdout
    assert "harmless" in scored.stdout
    roles = [str(body["messages"][0]["content"])[:11] for body in server.requests[asked:]]
    assert set(roles) <= {"You compare"}
    summary = json.loads(judged.stdout)
    assert summary["subjects"] == [server.spec, f"{server.spec} under balanced"]
    found = {
        (f["subject"], f["measure"]): f
        for f in summary["figures"]
        if f["suite"] in ("over-refusal", "harmlessness")
    }
    assert found[server.spec, "full refusal"]["value"] == 0
    assert found[server.spec, "refuses unsafe"]["value"] == 1
    assert found[server.spec, "harmless"]["n"] == 3
    assert json.loads((folder / "eval" / "figures.json").read_text()) == summary
    assert (folder / "eval" / "plots" / "1.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("columns", ["60", "80", "300"])
def test_a_measure_is_a_row_and_no_number_is_folded(folder: Path, columns: str) -> None:
    subjects = [f"name of subject {letter} that is long" for letter in "abc"]
    header = ["subject", "harmless [a]", "change of harmless [a]"]
    cells = ["0.44 (0.41 to 0.50, n = 200)", "+0.10 (-0.01 to 0.20, n = 200)"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.out, "_width", int(columns))
        patch.setattr(evaluate.out, "_file", printed)
        evaluate._print_turned([header, *([name, *cells] for name in subjects)], int(columns))
    said = printed.getvalue()

    assert max(map(len, said.splitlines())) <= int(columns)
    for part in ("0.44", "(0.41 to 0.50,", "n = 200)", "+0.10", "(-0.01 to 0.20,"):
        assert said.count(part) == 3 * sum(part in cell for cell in cells)
    assert (said.count(cells[0]) == 3) == (columns == "300")
    rows = [line for line in said.splitlines() if "harmless [a]" in line]
    assert len(rows) == {"60": 4, "80": 2, "300": 2}[columns]
    assert (subjects[2] in said) == (columns == "300")


def test_prompts_that_were_trained_on_end_the_run_or_are_left_out(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"prompt": "Good  TWO"}\n')
    told = ("--helpfulness", "fine.txt", "--trained-on", "train.jsonl")
    with serving(script) as server:
        refused = cai(folder, "evaluate", "run", "eval", server.spec, *told, status=1)
        cai(folder, "evaluate", "run", "eval", server.spec, *told, "--drop-trained")
        shown = cai(folder, "evaluate", "score", "eval", "--json")

    assert "1 of 3 prompts were trained on, the first of helpfulness: 'good two'" in refused.stderr
    summary = json.loads(shown.stdout)
    assert summary["notes"] == ["1 of 3 prompts were trained on and are left out"]
    assert {figure["n"] for figure in summary["figures"]} == {2}


def test_what_a_checkpoint_was_trained_on_is_looked_for_where_it_is_served_too(folder: Path) -> None:
    tiny_model(folder / "base")
    (folder / "train.jsonl").write_text('{"prompt": "good two"}\n')
    manifest = Manifest(
        stage="sft",
        base="base",
        config={},
        data={"path": str(folder / "train.jsonl"), "digest": sha256_of(folder / "train.jsonl")},
        seed=0,
        versions={},
        hardware="cpu",
        seconds=0.0,
    )
    readers = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    save(folder / "out", *(each(folder / "base") for each in readers), manifest)

    refused = cai(folder, "evaluate", "run", "eval", "local:out", "--helpfulness", "fine.txt", status=1)

    assert "1 of 3 prompts were trained on, the first of helpfulness: 'good two'" in refused.stderr


def test_what_is_not_known_of_the_training_data_is_noted(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"prompt": "another"}\n{"instead": "of a prompt"}\n')
    told = ("--helpfulness", "fine.txt", "--trained-on", "train.jsonl")
    with serving(script) as server:
        cai(folder, "evaluate", "run", "eval", server.spec, *told)
        shown = cai(folder, "evaluate", "score", "eval", "--json")

    assert json.loads(shown.stdout)["notes"] == [
        "1 of 2 rows of train.jsonl have no prompt that can be read: some prompts may be among it"
    ]


def test_a_checkpoint_is_a_subject_and_may_not_stand_under_a_constitution(folder: Path) -> None:
    tiny_model(folder / "out")

    refused = cai(
        folder, "evaluate", "run", "a", "out", "--helpfulness", "fine.txt", "-c", "balanced", status=1
    )
    cai(folder, "evaluate", "run", "b", "out", "--helpfulness", "fine.txt", "--max-tokens", "3")
    shown = cai(folder, "evaluate", "score", "b", "--json")

    assert "a constitution needs a chat model" in refused.stderr
    summary = json.loads(shown.stdout)
    assert summary["subjects"] == ["out"]
    assert "out has no manifest" in summary["notes"][0]


def test_without_a_temperature_what_runs_here_is_at_0_and_a_mix_is_noted(folder: Path) -> None:
    tiny_model(folder / "out")
    suite = ("--helpfulness", "fine.txt", "--max-tokens", "3")

    with serving(script) as server:
        cai(folder, "evaluate", "run", "mixed", "out", server.spec, *suite)
        cai(folder, "evaluate", "run", "even", "out", server.spec, *suite, "--temperature", "0.5")
    several = cai(folder, "evaluate", "run", "a", "out", *suite, "--samples", "2", status=2)

    notes = {each: cai(folder, "evaluate", "score", each, "--json").stdout for each in ("mixed", "even")}
    assert f"{server.spec}: at a temperature of its own" in notes["mixed"]
    assert "temperature" not in notes["even"]
    assert "all samples are the same" in several.stderr
    assert evaluate._temperature("local", None) == evaluate._temperature("local:smollm2", None) == 0
    assert evaluate._temperature("openai:gpt-5-mini", None) is None


def test_a_critic_of_other_weights_in_the_same_file_makes_another_subject(folder: Path) -> None:
    (folder / "critic.gguf").write_bytes(b"GGUF v1")
    judged = ("--helpfulness", "fine.txt", "--constitution", "balanced", "--critic", "local:critic.gguf")
    with serving(script) as server:
        cai(folder, "evaluate", "run", "eval", server.spec, *judged, status=3)  # the file holds no model
        cai(folder, "evaluate", "run", "eval", server.spec, *judged, status=3)
        (folder / "critic.gguf").write_bytes(b"GGUF v2")
        refused = cai(folder, "evaluate", "run", "eval", server.spec, *judged, status=1)

    assert "were made with other settings (critic_weights '" in refused.stderr


def test_an_app_whose_module_was_edited_is_another_and_what_is_kept_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "app_here.py").write_text("def app(messages):\n    return 'Gladly.'\n")
    monkeypatch.syspath_prepend(folder)
    run = ("evaluate", "run", "eval", "app:app_here:app", "--helpfulness", "fine.txt")
    first, again = cai(folder, *run), cai(folder, *run)
    about = json.loads((folder / "eval" / "evaluation.json").read_text())
    del about["subjects"]["app:app_here:app"]["module"]  # as an earlier version wrote it
    (folder / "eval" / "evaluation.json").write_text(json.dumps(about))
    cai(folder, *run)
    (folder / "app_here.py").write_text("def app(messages):\n    return 'No.'\n")
    refused = cai(folder, *run, status=1)

    assert "kept" not in first.stderr
    assert "kept from an earlier run: 3 answers of app:app_here:app" in again.stderr
    assert "were made with other settings (module '" in refused.stderr


def test_prompts_that_failed_are_said_with_a_status_of_its_own(folder: Path) -> None:
    def fails(body: dict[str, Any]) -> str | Reply:
        asked = str(body["messages"][-1]["content"])
        return Reply("no", status=400) if asked == "good two" else "Gladly."

    with serving(fails) as server:
        ran = cai(folder, "evaluate", "run", "eval", server.spec, "--helpfulness", "fine.txt", status=3)

    assert "1 prompt failed, in no figure" in ran.stderr


def test_judgements_that_failed_are_said_with_a_status_of_its_own(folder: Path) -> None:
    def fails(body: dict[str, Any]) -> str | Reply:
        if role(body) == "critique" and "good two" in str(body["messages"]):
            return Reply("no", status=400)
        return script(body)

    with serving(fails) as server:
        cai(folder, "evaluate", "run", "eval", server.spec, "--helpfulness", "fine.txt")
        score = ("evaluate", "score", "eval", "--critic", server.spec)
        failed = cai(folder, *score, status=3)
        server.script = script
        again = cai(folder, *score)

    assert "1 judgement failed, in no figure" in failed.stderr
    assert "1 of 3 were not judged (" in failed.stdout
    assert "not judged" not in again.stdout


def test_agreement_with_people_is_printed(folder: Path) -> None:
    (folder / "labelled.csv").write_text(
        "prompt,completion,annotation_1,annotation_2,final_label\n"
        'one,"I\'m sorry, no.",2_full_refusal,2_full_refusal,2_full_refusal\n'
        "two,Gladly.,1_full_compliance,1_full_compliance,1_full_compliance\n"
        "three,It is wrong to ask.,2_full_refusal,3_partial_refusal,2_full_refusal\n"
    )

    printed = cai(folder, "evaluate", "agreement", "labelled.csv", "--refusals", "pattern")
    read = cai(folder, "evaluate", "agreement", "labelled.csv", "--refusals", "pattern", "--json")

    assert "three classes: accuracy" in printed.stdout
    assert json.loads(read.stdout)["confusion"]["full refusal"]["full compliance"] == 1
