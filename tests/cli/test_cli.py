"""`cai` as its users run it, over the real client, a server on the loopback and a real log."""

from __future__ import annotations

import errno
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest
from cli_support import BALANCED, OPTIONAL, cai, commands, start, trajectories, without
from replies import verdicts
from repository import read_page
from wire import Reply, role, under

from cai_graph import installed
from cai_graph.cli import console, options
from cai_graph.cli.specs import foreign
from cai_graph.errors import ModelError
from cai_graph.request import policy

PRINCIPLE = BALANCED.principles[0].model_dump(mode="json", exclude_defaults=True)
PAGE = read_page("cli.md")


# --- the commands themselves --------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=lambda value: str(value)[:40])
def test_every_command_has_a_sentence_an_example_and_its_place_in_the_docs(
    path: tuple[str, ...], command: Any
) -> None:
    name = " ".join(("cai", *path))
    assert command.help.splitlines()[0].rstrip().endswith(".")
    assert command.epilog.startswith(f"Example: {name}")
    section = re.search(rf"^#+ `{name}\b.*?(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"{name} is not in docs/cli.md"
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            menu = get_origin(parameter.type_descriptor.annotation) is Literal
            assert menu or str(parameter.metavar).isupper(), (
                f"{name} {parameter.name} has no name in capitals"
            )
            continue
        for option in parameter.opts:
            if option.startswith("--") and option not in ("--help", "--json", "--log"):
                assert f"`{option}" in section[0], f"{name} {option} is not in docs/cli.md"


def test_the_menus_are_those_of_the_policies() -> None:
    assert get_args(options.Strategy) == get_args(policy.Strategy)
    # A command has no checkpointer, so nothing can wait for a person there.
    assert (*get_args(options.Policy), "human") == get_args(policy.Policy)


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = ["langchain_core", "langgraph", "openai", "msgspec", "numpy", "torch", "apsw", "httpx"]
    code = (
        "import sys\nfrom cai_graph import cli\nsys.argv = ['cai', 'run', '--help']\n"
        f"try:\n    cli.main()\nexcept SystemExit:\n    print([m for m in {heavy} if m in sys.modules])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "[]"


def test_version_and_usage_errors(tmp_path: Path) -> None:
    assert re.fullmatch(r"cai-graph \d+\.\d+\.\d+\n", cai(tmp_path, "--version").stdout)
    assert "No such option" in cai(tmp_path, "ask", "hello", "--speed", "9", status=2).stderr
    assert "batched" in cai(tmp_path, "ask", "hello", "--strategy", "best", status=2).stderr


# --- ask ----------------------------------------------------------------------------------------------


def test_ask_shows_one_trajectory_and_logs_it(tmp_path: Path, serve: Any) -> None:
    server = serve(
        under(
            BALANCED,
            draft=lambda prompt: "Use lye and water.",
            violates=lambda shown: "lye" in shown,
            revise="Use soap and water.",
        )
    )
    shown = cai(tmp_path, "ask", "How do I clean it?", "--model", server.spec).stdout
    for part in ("Use lye and water.", "VIOLATES", BALANCED.principles[0].id, "[-lye-] {+soap+}", "REVISED"):
        assert part in shown
    (trajectory,) = trajectories(tmp_path)
    assert trajectory.id in shown
    again = cai(tmp_path, "log", "show", trajectory.id).stdout
    assert again == shown
    as_json = cai(tmp_path, "ask", "Again?", "--model", server.spec, "--json").stdout
    assert json.loads(as_json)["outcome"] == "REVISED"


def test_the_longest_draft_bounds_drafts_and_leaves_critics_room(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED, violates=lambda shown: "answer to" in shown))
    cai(tmp_path, "ask", "hello", "--model", server.spec, "--max-tokens", "50")
    bounds = [body.get("max_completion_tokens", body.get("max_tokens")) for body in server.requests]
    assert bounds == [50, None, 100, None]


def test_hostile_text_of_a_model_never_acts_on_the_terminal(tmp_path: Path, serve: Any) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 [bold]markup[/bold] \u202eturned \x9bC1"
    server = serve(under(BALANCED, draft=lambda prompt: hostile))
    ended = cai(tmp_path, "ask", "hello", "--model", server.spec)
    listed = cai(tmp_path, "log", "list").stdout
    for text in (ended.stdout, ended.stderr, listed):
        assert not set("\x1b\x07\u202e\x9b") & set(text)
    assert "[bold]markup[/bold]" in ended.stdout


def test_what_cannot_work_is_one_line_and_status_1(tmp_path: Path, serve: Any) -> None:
    server = serve(lambda body: Reply("quota is used up", status=400))
    for args, part in (
        (("ask", "hello", "--model", "opnai:gpt"), "openai"),
        (("ask", "hello", "--model", "openai:gpt-5-mini"), "OPENAI_API_KEY"),
        (("ask", "hello", "--model", server.spec, "--constitution", "balancd"), "balanced"),
        (("ask", "hello", "--model", server.spec, "--log", "mysql://x"), "sqlite:///"),
        (("ask", "hello", "--model", server.spec), "quota is used up"),
        (("run", "absent.csv", "--model", server.spec), "absent.csv"),
        (("log", "list", "--log", "other.db"), "other.db"),
        (("log", "show", "nonsense"), "nonsense"),
        (("constitution", "show", "nothing"), "nothing"),
        (("model", "get", "qwen"), "qwen2.5-1.5b"),
    ):
        ended = cai(tmp_path, *args, status=1)
        assert part in ended.stderr
        assert ended.stdout == ""
        assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_a_missing_extra_is_one_sentence_with_the_pip_command(tmp_path: Path) -> None:
    (tmp_path / "langchain_openai.py").write_text("raise ImportError('not installed')")
    process = start(
        tmp_path, "ask", "hello", "--model", "http://127.0.0.1:9/v1#m", env={"PYTHONPATH": str(tmp_path)}
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.splitlines()[0].endswith(installed.command("openai"))
    assert len(err.splitlines()) == 1


POLICY = [
    f"--set={setting}" for setting in ("model=m", "data=d", "output=o", "reward=builtins:len", "watch=null")
]


@pytest.mark.parametrize(
    ("args", "needs", "extra"),
    [
        (("distill", "d.yaml"), "the probe needs numpy", "local"),
        (("distill", "d.yaml", "--dry-run"), "the probe needs numpy", "local"),
        (("train", "ppo", *POLICY), "`cai train ppo` needs torch", "train"),
        (("train", "online", *POLICY), "`cai train online` needs torch", "train"),
        (("evaluate", "score", "eval"), "`cai evaluate score` needs numpy", "train"),
        (("evaluate", "agreement", "a.csv"), "`cai evaluate agreement` needs numpy", "train"),
    ],
)
def test_a_command_whose_extra_is_missing_names_it_before_any_work(
    tmp_path: Path, args: tuple[str, ...], needs: str, extra: str
) -> None:
    (tmp_path / "d.yaml").write_text("model: local:smollm2\noutput: o\nprompts: p.jsonl\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    env = {**without(tmp_path, *OPTIONAL), "CAI_CACHE": str(tmp_path / "cache")}

    process = start(tmp_path, *args, env=env)
    _, err = process.communicate(timeout=120)

    assert err == f"{needs}; {installed.command(extra)}\n"
    assert process.returncode == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("modules", [(), ("dataset",)])
def test_a_trainers_package_that_hides_ours_is_named(tmp_path: Path, modules: tuple[str, ...]) -> None:
    (tmp_path / "trainers").mkdir()
    for name in ("__init__", *modules):
        (tmp_path / "trainers" / f"{name}.py").touch()

    process = start(tmp_path, "dataset", "build", "--kind", "preference", "--output", "pairs")
    _, err = process.communicate(timeout=60)

    (said,) = err.splitlines()
    assert f"{tmp_path}/trainers/__init__.py hides the package" in said
    assert "run `cai`" in said
    assert process.returncode == 1


def piped(folder: Path, *args: str, **env: str) -> str:
    process = start(folder, *args, env=env)
    said, _ = process.communicate(timeout=60)
    return said


def test_what_is_piped_is_not_folded_unless_columns_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = piped(tmp_path, "doctor").splitlines()
    folded = piped(tmp_path, "doctor", COLUMNS="40").splitlines()
    assert max(map(len, folded)) <= 40 < max(map(len, whole))
    assert len(whole) < len(folded)
    assert not [line for line in whole if line != line.rstrip()]


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC])
def test_what_our_own_writing_meets_is_not_said_of_the_critic(code: int) -> None:
    with pytest.raises(OSError) as found, foreign("openai:x"):
        raise OSError(code, "not written")
    assert found.value.errno == code
    with pytest.raises(ModelError, match="openai:x"), foreign("openai:x"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_what_a_provider_met_is_said_without_its_password() -> None:
    with pytest.raises(ModelError, match=r"^http://host/v1#m: "), foreign("http://ann:s3cret@host/v1#m"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


# --- demo ---------------------------------------------------------------------------------------------


def test_the_demo_shows_each_outcome_and_says_what_to_type_next(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED, violates=lambda shown: "answer to Write a rude poem" in shown))
    shown = cai(tmp_path, "demo", "--model", server.spec).stdout
    assert "REVISED   harmful  Write a rude poem" in shown
    assert "5 prompts are benign, and none of them was refused." in shown
    (revised,) = [t for t in trajectories(tmp_path) if t.outcome.value == "REVISED"]
    assert f"cai log show {revised.id}" in shown
    cai(tmp_path, "demo", "--model", server.spec)
    assert len(trajectories(tmp_path)) == 28


def test_the_demo_fails_where_nothing_is_revised_or_a_benign_prompt_is_refused(
    tmp_path: Path, serve: Any
) -> None:
    kept = serve(under(BALANCED))
    assert "no prompt was revised" in cai(tmp_path, "demo", "--model", kept.spec, status=1).stderr
    wax = "candle wax"
    refusing = serve(under(BALANCED, violates=lambda shown: wax in shown or "rude poem" in shown))
    ended = cai(tmp_path, "demo", "--model", refusing.spec, status=1)
    assert "a benign prompt was refused" in ended.stderr


# --- constitution, model, doctor ----------------------------------------------------------------------


def test_constitutions_are_listed_shown_linted_compared_and_described(tmp_path: Path) -> None:
    listed = json.loads(cai(tmp_path, "constitution", "list", "--json").stdout)
    assert "balanced" in [entry["name"] for entry in listed]
    assert "balanced" in cai(tmp_path, "constitution", "list").stdout
    shown = json.loads(cai(tmp_path, "constitution", "show", "balanced", "--json").stdout)
    assert shown["digest"] == BALANCED.digest
    assert BALANCED.principles[0].id in cai(tmp_path, "constitution", "show", "balanced").stdout
    assert "nothing found" in cai(tmp_path, "constitution", "lint", "balanced").stdout
    (tmp_path / "mine.yaml").write_text("name: mine\nextends: balanced\nrefusal: No, thank you.\n")
    assert "changed refusal" in cai(tmp_path, "constitution", "diff", "balanced", "mine.yaml").stdout
    found = json.loads(cai(tmp_path, "constitution", "diff", "balanced", "mine.yaml", "--json").stdout)
    assert "refusal" in [difference["field"] for difference in found]
    apart = cai(tmp_path, "constitution", "diff", "balanced", "harmlessness").stdout
    assert "removed refusal_translations: de\n" in apart
    assert "added examples: " in apart
    assert "Example(" not in apart
    changed = f"extends: balanced\nprinciples: [{json.dumps({**PRINCIPLE, 'min_severity': 4})}]\n"
    (tmp_path / "mine.yaml").write_text(f"name: balanced\n{changed}")
    assert "[-none-] {+4+}" in cai(tmp_path, "constitution", "diff", "balanced", "mine.yaml").stdout
    schema = json.loads(cai(tmp_path, "constitution", "schema").stdout)
    assert schema["title"] == "Constitution"


def test_local_models_are_listed_and_a_missing_one_is_said_to_be(tmp_path: Path) -> None:
    empty = {"CAI_CACHE": str(tmp_path / "none")}
    listed = json.loads(cai(tmp_path, "model", "list", "--json", env=empty).stdout)
    assert {entry["name"]: entry["path"] for entry in listed}["smollm2"] is None
    assert "not fetched" in cai(tmp_path, "model", "list", env=empty).stdout
    for typed in ("smollm2", "local:smollm2"):  # the list prints the second
        assert "cai model get smollm2" in cai(tmp_path, "model", "path", typed, status=1, env=empty).stderr


def test_the_doctor_reports_as_text_and_json(tmp_path: Path) -> None:
    assert "python" in cai(tmp_path, "doctor").stdout
    names = [check["name"] for check in json.loads(cai(tmp_path, "doctor", "--json").stdout)]
    assert "sqlite of the log" in names


def test_training_needs_its_data(tmp_path: Path) -> None:
    args = ("train", "probe", "absent", "-o", "heads", "--model", "local:a.gguf")
    assert "a.gguf" in cai(tmp_path, *args, status=1).stderr
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    ended = cai(tmp_path, *args, status=1)
    said = "absent: no such folder; name the one with the labelled sources (docs/critics.md)\n"
    assert ended.stderr == said


# --- a cascade ----------------------------------------------------------------------------------------


def _probable(ids: list[str], *, probability: float) -> Reply:
    """COMPLIES for every principle, and P(VIOLATES), as an OpenAI-compatible server says it."""
    text = verdicts(ids=ids)
    content = []
    for token in re.split(r'(?<=")(COMPLIES)(?=")', text):
        top = [("COMPLIES", 1 - probability), ("VIOLATES", probability)] if token == "COMPLIES" else []
        alternatives = [{"token": name, "logprob": math.log(share)} for name, share in top]
        content.append({"token": token, "logprob": -0.1, "top_logprobs": alternatives})
    return Reply(text, logprobs=content)


def test_a_cascade_is_calibrated_from_a_log_and_then_asks_the_strong_critic_less(
    tmp_path: Path, serve: Any
) -> None:
    def critic(body: Mapping[str, Any]) -> Reply:
        bad = "question 1" in str(body["messages"][-1]["content"])
        return _probable(ids, probability=0.4 if bad else 0.1)

    ids = [principle.id for principle in BALANCED]
    strong = serve(under(BALANCED, violates=lambda shown: "question 1" in shown))
    cheap = serve(critic)
    (tmp_path / "prompts.txt").write_text("\n".join(f"question {n % 2} of {n}" for n in range(40)))
    judge_only = ("--max-rounds", "0", "--on-violation", "open")
    cai(tmp_path, "run", "prompts.txt", "--model", strong.spec, *judge_only)
    calibrate = ("critic", "calibrate", "--cheap", cheap.spec)

    few = cai(tmp_path, *calibrate, status=1)
    found = cai(tmp_path, *calibrate, "--miss-rate", "0.15")
    written = json.loads(cai(tmp_path, *calibrate, "--miss-rate", "0.15", "--json").stdout)

    assert "takes 299 answers that the strong critic finds violating; 20 of the 40" in few.stderr
    assert "threshold   0.4\n" in found.stdout
    assert "saved       50.0% of the strong critic's calls (95 % interval 35.2% to 64.8%" in found.stdout
    assert "missed      0 of 20 violating answers" in found.stdout
    assert (written["threshold"], written["saved"], written["cheap"]) == (0.4, 0.5, cheap.spec)

    before = sum(role(body) == "critique" for body in strong.requests)
    cascade = ("--critic", cheap.spec, "--strong", strong.spec, "--threshold", "0.4")
    cai(tmp_path, "run", "prompts.txt", "--model", strong.spec, *cascade, *judge_only)
    assert sum(role(body) == "critique" for body in strong.requests) - before == 20


def test_a_strong_critic_without_a_threshold_is_wrong_usage(tmp_path: Path, serve: Any) -> None:
    server = serve(under(BALANCED))
    ended = cai(tmp_path, "ask", "hi", "--model", server.spec, "--strong", server.spec, status=2)

    assert "--strong and --threshold go together" in " ".join(ended.stderr.split())


# --- the embedded model -------------------------------------------------------------------------------


@pytest.mark.local
def test_the_embedded_model_drafts_and_another_judges(tmp_path: Path, tiny_weights: Path, serve: Any) -> None:
    judge = serve(under(BALANCED)).spec
    (tmp_path / "p.txt").write_text("Say hello.\nName a colour.\n")
    args = ("run", "p.txt", "--model", "local:smollm2", "--critic", judge, "--reviser", judge)
    cai(tmp_path, *args, "--max-tokens", "16", "--seed", "1")
    found = trajectories(tmp_path)
    assert len(found) == 2
    assert all(t.draft is not None and t.draft.answer.content for t in found)
    assert {t.calls[0].model for t in found} == {"local:smollm2"}
    assert cai(tmp_path, "model", "path", "smollm2").stdout.strip() == str(tiny_weights)


def test_long_work_tells_a_file_how_far_it_is(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 20))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(seconds)))

    with console.measured("forward passes") as tell:
        for done in range(5):
            tell(done, 5)
        tell(5, 5)

    said = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "forward passes: 1/5",
        "forward passes: 3/5",
        "forward passes: 5/5",
    ]


def test_work_that_never_began_tells_nothing(capsys: Any) -> None:
    with console.measured("forward passes"):
        pass

    assert capsys.readouterr().err == ""
