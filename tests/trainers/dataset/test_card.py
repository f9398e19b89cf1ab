"""The card and the page of a dataset: figures that are those of the rows, and texts that stay texts."""

from __future__ import annotations

import json
import re
from array import array
from base64 import b64decode
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_support import cai
from dataset_logs import write
from export_logs import calls, records, revised, says
from log_support import comparison

from cai_graph.errors import ConfigError, DataError
from cai_graph.trajectory import Draft
from trainers.dataset import Recipe, build
from trainers.dataset.card import Side, page, report, summarise
from trainers.export import Format
from trainers.rows import Kind

HOSTILE = "<script>alert(1)</script> | $x$"


def made(tmp_path: Path, kind: Kind = "preference", format: Format = "jsonl", extra: Any = ()) -> Path:
    log = write(tmp_path / "log.jsonl", [*records(), *extra])
    return build([log], tmp_path / "set", Recipe(kind=kind, test_share=0.3), format=format).path


def test_the_figures_are_counted_over_the_rows(tmp_path: Path) -> None:
    folder = made(tmp_path)

    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (folder / f"{split}.jsonl").read_bytes().splitlines()
    ]
    summary = summarise(folder)
    assert summary.splits.total() == len(rows)
    assert summary.sides["chosen"].refused.of == len(rows)
    assert sorted(summary.p_chosen) == sorted(row["p_chosen"] for row in rows)
    assert sorted(summary.sides["rejected"].words) == sorted(
        len(row["rejected"][0]["content"].split()) for row in rows
    )
    assert summary.principles["no-demeaning"] == len(rows)


def test_json_lines_and_parquet_have_the_same_figures(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lines, parquet = summarise(made(tmp_path / "a")), summarise(made(tmp_path / "b", format="parquet"))

    assert sorted(lines.sides["chosen"].words) == sorted(parquet.sides["chosen"].words)
    assert (lines.splits, lines.principles, lines.languages) == (
        parquet.splits,
        parquet.principles,
        parquet.languages,
    )


def test_refusals_are_counted_on_the_side_where_they_are(tmp_path: Path) -> None:
    refusals = [
        revised(number, draft=Draft(answer=says(f"I'm sorry, I won't {number}."))) for number in range(50, 55)
    ]
    summary = summarise(made(tmp_path, extra=refusals))

    assert summary.sides["chosen"].refused.yes == 0
    assert summary.sides["rejected"].refused.yes == 5


def test_a_side_of_refusals_alone_is_drawn(tmp_path: Path) -> None:
    summary = summarise(made(tmp_path))
    summary.sides["rejected"] = Side(array("I", [9] * 4), refusals=4)

    assert "100% (51% to 100%, n = 4)" in page(summary, "set")


def test_an_answer_that_only_calls_a_tool_is_no_refusal(tmp_path: Path) -> None:
    called = Draft(answer=calls(50, {"words": ["a"]})[2])
    rejected = summarise(made(tmp_path, extra=[revised(50, draft=called)])).sides["rejected"]

    assert 0 in rejected.words
    assert rejected.refused.yes == 0


def test_names_that_are_long_and_alike_are_drawn_apart_and_as_they_stand(tmp_path: Path) -> None:
    summary = summarise(made(tmp_path))
    alike = [f"{'cost $x_{$ '.ljust(60, 'a')}{end}" for end in "bc"]
    summary.principles = Counter(dict.fromkeys(alike, 3))

    drawn = [b64decode(one).decode() for one in re.findall('base64,([^"]+)', page(summary, "set"))]
    (principles,) = [one for one in drawn if "cost $x_{$ " in one]
    assert principles.count(f">{alike[0][:60]}<") == 2


def test_the_card_has_the_hubs_metadata_and_loads_with_the_dataset(tmp_path: Path) -> None:
    import datasets

    folder = made(tmp_path, format="parquet")
    text = report(folder, licence="cc-by-4.0", title="Pairs").card.read_text()

    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["configs"][0]["data_files"][0] == {"split": "train", "path": "train.parquet"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["log_digest"] in body
    assert all(digest[:12] in body for digest in manifest["constitutions"])
    assert datasets.load_dataset(str(folder), split="test", cache_dir=str(tmp_path / "cache")).num_rows


def test_the_card_says_of_json_lines_what_the_build_said(tmp_path: Path) -> None:
    folder = made(tmp_path)
    _, built, _ = (folder / "README.md").read_text().split("---\n", 2)

    _, front, _ = report(folder, licence="mit").card.read_text().split("---\n", 2)

    metadata = yaml.safe_load(front)
    assert {key: metadata[key] for key in ("dataset_info", "configs")} == yaml.safe_load(built)


def test_what_a_log_says_is_text_on_the_page(tmp_path: Path) -> None:
    hostile = revised(90, metadata={})
    judged = [comparison(hostile.id, method="logprob", judge=HOSTILE, p_a=(0.9, 0.9))]
    folder = made(tmp_path, extra=[hostile, *judged])

    page = report(folder, licence="unknown", title=HOSTILE).page.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<img ") == 5


def test_what_a_log_says_is_text_on_the_card(tmp_path: Path) -> None:
    image = "![x](http://t/x.png) **b**"
    judged = [comparison(revised(90).id, method="logprob", judge=image, p_a=(0.9, 0.9))]
    folder = made(tmp_path, extra=judged)

    _, _, body = report(folder, licence="unknown", title=image).card.read_text().split("---\n", 2)

    assert r"# !\[x\](http://t/x.png) \*\*b\*\*" in body
    assert r"| !\[x\](http://t/x.png) \*\*b\*\*: chose a place" in body


def test_the_card_names_neither_who_was_removed_nor_the_folders_of_the_machine(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [*records(), revised(90, metadata={"user": "ann@corp"})])
    recipe = Recipe(kind="preference", test_share=0.3, without_users=("ann@corp",))
    folder = build([log], tmp_path / "set", recipe).path
    Path(log).unlink()

    card = report(folder, licence="unknown").card.read_text()

    assert "ann@corp" not in card
    assert '"without_users": 1' in card
    assert str(tmp_path) not in card
    assert "| logs not found, so no figures of judges | log.jsonl |" in card


def test_the_card_of_a_folder_that_was_built_before_names_nobody_either(tmp_path: Path) -> None:
    folder = made(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"] |= {"without_users": ["ann@corp", "bob"], "without_tenants": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))

    card = report(folder, licence="unknown").card.read_text()

    assert "ann@corp" not in card
    assert '"without_users": 2' in card
    assert '"without_tenants": 0' in card


def test_judges_are_measured_where_the_log_has_their_comparisons(tmp_path: Path) -> None:
    first = records()[0]
    judged = [
        comparison(first.id, method="logprob", judge="a:judge", p_a=pair)
        for pair in ((0.9, 0.2), (0.9, 0.8), (0.8, 0.9))
    ]
    folder = made(tmp_path, extra=judged)

    bias = summarise(folder).positions["a:judge"].bias
    assert (bias.yes, bias.of) == (1, 3)


def test_a_log_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (tmp_path / "log.jsonl").unlink()

    assert report(folder, licence="unknown").missing_logs == (str(tmp_path / "log.jsonl"),)
    assert f"{tmp_path / 'log.jsonl'}: cannot be read, so" in cai(tmp_path, "dataset", "report", "set").stderr


def test_a_foreign_format_and_a_folder_without_a_dataset_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is in the format 'openai'"):
        report(made(tmp_path, format="openai"), licence="unknown")
    with pytest.raises(DataError, match="holds no dataset"):
        report(tmp_path, licence="unknown")
