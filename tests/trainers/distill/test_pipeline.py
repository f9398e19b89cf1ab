"""Steps are kept under what they depend on; nothing is made twice, and what was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cai_graph.errors import ConfigError, DataError
from trainers.distill.pipeline import Done, Folders, Pipeline, Step, StepFailed


class Workshop:
    """Two steps, of which the second copies what the first wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[str] = []
        self.said: list[str] = []
        self.trouble: Exception | None = None

    def pipeline(self, word: str = "a", copies: int = 1) -> Pipeline:
        first = Step(name="first", settings={"word": word}, work=self._first(word))
        second = Step(name="second", settings={"copies": copies}, inputs=(first,), work=self._second(copies))
        return Pipeline(self.folder, [first, second])

    def run(self, *args: Any) -> dict[str, Any]:
        self.made, self.said = [], []
        return self.pipeline(*args).run(lambda step, said, seconds: self.said.append(f"{step.name} {said}"))

    def _first(self, word: str) -> Callable[[Folders], dict[str, Any]]:
        def work(folders: Folders) -> dict[str, Any]:
            self.made.append("first")
            (folders.own / "word").write_text(word)
            return {"letters": len(word)}

        return work

    def _second(self, copies: int) -> Callable[[Folders], dict[str, Any]]:
        def work(folders: Folders) -> dict[str, Any]:
            self.made.append("second")
            part = folders.own / "part"
            if not part.exists():
                part.write_text((folders["first"] / "word").read_text() * copies)
                if self.trouble is not None:
                    raise self.trouble
            return {"text": part.read_text()}

        return work


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "out")


def test_what_has_not_changed_is_skipped_and_said_so(shop: Workshop) -> None:
    assert shop.run()["second"].figures == {"text": "a"}
    assert shop.said == ["first begins", "first done", "second begins", "second done"]
    assert shop.run()["second"].figures == {"text": "a"}
    assert shop.said == ["first skipped", "second skipped"]
    assert not shop.made


def test_a_change_remakes_what_stands_behind_it_alone_and_the_way_back_is_free(shop: Workshop) -> None:
    shop.run("a", 1)
    assert shop.run("a", 3)["second"].figures["text"] == "aaa"
    assert shop.made == ["second"]
    assert shop.run("b", 3)["second"].figures["text"] == "bbb"
    assert shop.made == ["first", "second"]
    assert shop.run("a", 1)["second"].figures["text"] == "a"
    assert not shop.made


@pytest.mark.parametrize("trouble", [DataError("row 3 is no row"), OSError(28, "No space left on device")])
def test_an_error_names_its_step_and_the_next_run_goes_on(shop: Workshop, trouble: Exception) -> None:
    shop.trouble = trouble
    with pytest.raises(StepFailed, match=r"^second: .*(row 3 is no row|No space left)") as caught:
        shop.run("a", 2)
    assert caught.value.step == "second"
    assert [shop.pipeline("a", 2).state(step) for step in shop.pipeline("a", 2).steps] == ["done", "begun"]
    assert shop.run("a", 2)["second"].figures["text"] == "aa"
    assert shop.said == ["first skipped", "second goes on", "second done"]


def test_an_interrupt_leaves_a_step_that_goes_on(shop: Workshop) -> None:
    shop.trouble = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        shop.run()
    shop.run()
    assert shop.said == ["first skipped", "second goes on", "second done"]


def test_two_runs_in_one_folder_do_not_meet(shop: Workshop) -> None:
    inner: list[Exception] = []

    def work(folders: Folders) -> dict[str, Any]:
        with pytest.raises(ConfigError, match="another run works here") as caught:
            shop.run()
        inner.append(caught.value)
        return {}

    Pipeline(shop.folder, [Step(name="outer", settings={}, work=work)]).run(lambda *_: None)
    assert inner


def test_what_is_done_at_the_end_is_done_before_another_run_begins(shop: Workshop) -> None:
    shown: list[str] = []

    def finish(done: Mapping[str, Done]) -> None:
        with pytest.raises(ConfigError, match="another run works here"):
            shop.run()
        shown.append(done["second"].figures["text"])

    shop.pipeline().run(lambda *_: None, finish)
    assert shown == ["a"]


def test_a_step_whose_record_is_damaged_is_named(shop: Workshop) -> None:
    done = shop.run()
    (done["first"].path / "stage.json").write_text("{")
    with pytest.raises(DataError, match=r"stage.json: cannot be read"):
        shop.run()


def test_the_record_says_what_a_step_came_from(shop: Workshop) -> None:
    done = shop.run("a", 2)
    note = json.loads((done["second"].path / "stage.json").read_text())
    first, second = shop.pipeline("a", 2).steps
    assert note["inputs"] == {"first": first.digest}
    assert note["digest"] == second.digest
    assert note["settings"] == {"copies": 2}


def test_steps_stand_behind_their_inputs(tmp_path: Path) -> None:
    first = Step(name="first", settings={}, work=lambda _: {})
    second = Step(name="second", settings={}, inputs=(first,), work=lambda _: {})
    with pytest.raises(ConfigError, match="before one of its inputs"):
        Pipeline(tmp_path, [second, first])
    with pytest.raises(ConfigError, match="two steps are called 'first'"):
        Pipeline(tmp_path, [first, first])
