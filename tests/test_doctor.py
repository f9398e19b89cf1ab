"""What `cai doctor` knows about this machine, read from the real one."""

from __future__ import annotations

import re
from pathlib import Path

import apsw
import pytest
from repository import ROOT

from cai_graph import doctor, local


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path))
    return tmp_path


def found() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks()}


def test_every_part_is_looked_at_once(cache: Path) -> None:
    names = [check.name for check in doctor.checks()]
    assert len(names) == len(set(names))
    extras = {f"extra [{extra}]" for extra in ("local", "openai", "anthropic", "postgres", "train")}
    assert extras | {"python", "base packages", "sqlite of the log", "cores"} <= set(names)


def test_versions_of_langchain_and_langgraph_are_told(cache: Path) -> None:
    base = found()["base packages"]
    assert base.status == "ok"
    assert "langchain-core 1." in base.found
    assert "langgraph 1." in base.found


def test_what_is_not_ok_says_what_to_do(cache: Path) -> None:
    assert all(check.remedy for check in doctor.checks() if check.status != "ok")


def test_keys_are_told_as_set_and_never_shown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found()["OPENAI_API_KEY"].status == "missing"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert found()["OPENAI_API_KEY"].status == "ok"
    assert "sk-secret" not in repr(doctor.checks())


def test_models_are_missing_half_there_or_wrong(cache: Path) -> None:
    tiny = local.find("smollm2")
    assert found()["model local:smollm2"].remedy == "cai model get smollm2"
    (cache / f"{tiny.file}.partial").write_bytes(bytes(5_000_000))
    assert "5 MB of it are there" in found()["model local:smollm2"].found
    (cache / tiny.file).write_bytes(b"something else")
    assert found()["model local:smollm2"].status == "warn"


@pytest.mark.local
def test_fetched_model_is_verified(tiny_weights: Path) -> None:
    check = found()["model local:smollm2"]
    assert check.status == "ok"
    assert str(tiny_weights) in check.found


def test_sqlite_of_the_log_is_free_of_the_wal_bug(cache: Path) -> None:
    assert found()["sqlite of the log"].status == "ok"


def test_a_sqlite_that_no_log_opens_with_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.3")
    check = found()["sqlite of the log"]
    assert check.status == "missing"
    assert check.remedy == 'pip install --upgrade "apsw>=3.53"'


def test_cache_folder_that_does_not_exist_yet_is_fine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAI_CACHE", str(cache / "a" / "b"))
    assert "GB free" in found()["disk of the model cache"].found


def test_nothing_is_installed_from_an_index_that_does_not_have_it() -> None:
    """README says how: from a clone."""
    texts = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    texts += [
        path for folder in ("cai_graph", "trainers", "examples") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    found = [
        path for path in texts if re.search(r"pip install \"?cai-graph", path.read_text(encoding="utf-8"))
    ]
    assert found == []
