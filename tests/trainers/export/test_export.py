"""Formats: each row in the shape that its consumer reads, whole or counted, and traceable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dataset_logs import kept, says, write
from export_logs import calls, records, revised

from cai_graph.errors import ConfigError
from cai_graph.trajectory import (
    Draft,
    Message,
)
from trainers.dataset import Recipe, build, explain
from trainers.export import FORMATS, SHAPES, Format, provenances
from trainers.export.features import OPTIONAL, for_card, rows_features
from trainers.ledger import Reason
from trainers.rows import KINDS, Kind

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("log") / "log.jsonl", records())


@pytest.fixture
def made(log: str, tmp_path: Path) -> Callable[[Kind, Format], Path]:
    def make(kind: Kind, format: Format, test_share: float = 0.5) -> Path:
        recipe = Recipe(kind=kind, test_share=test_share)
        return build([log], tmp_path / f"{kind}-{format}", recipe, format=format).path

    return make


def lines_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_bytes().splitlines()]


def loaded(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows as `datasets` reads them."""
    import datasets

    return list(datasets.load_dataset(str(folder), split=split, cache_dir=str(folder / ".cache")))


# --- TRL ----------------------------------------------------------------------------------------------

COLUMNS: dict[Kind, set[str]] = {
    "sft": {"prompt", "completion"},
    "critique-sft": {"prompt", "completion"},
    "preference": {"prompt", "chosen", "rejected", "margin", "p_chosen"},
    "unpaired": {"prompt", "completion", "label"},
    "prompts": {"prompt"},
    "critic": {"prompt", "completion", "violates"},
    "privileged": {"prompt", "privileged_context"},
    "ranked": {"prompt", "chosen", "rejected", "reference"},
}


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_datasets_loads_every_kind_with_the_columns_that_trl_reads(
    made: Callable[..., Path], kind: Kind, format: Format
) -> None:
    folder = made(kind, format)

    rows = loaded(folder)
    assert rows
    assert set(rows[0]) >= COLUMNS[kind]
    assert {row["split"] for row in rows} == {"train"}
    assert {row["split"] for row in loaded(folder, "test")} == {"test"}
    turn = rows[0]["prompt"][-1]
    assert turn["role"] in ("user", "tool")
    assert isinstance(turn["content"], str)


def test_parquet_holds_the_rows_of_json_lines_and_gives_tool_arguments_back_as_they_were(
    made: Callable[..., Path],
) -> None:
    as_lines = {row["id"]: row for row in lines_of(made("sft", "jsonl", 0.0))}

    as_parquet = {row["id"]: row for row in loaded(made("sft", "parquet", 0.0))}
    assert as_parquet.keys() == as_lines.keys()
    found = []
    for identifier, row in as_lines.items():
        for turn, read in zip(row["prompt"], as_parquet[identifier]["prompt"], strict=True):
            assert {key: value for key, value in read.items() if value is not None} == turn
            found += [call["function"]["arguments"] for call in turn.get("tool_calls", ())]
    assert sorted(map(json.dumps, found)) == ['{"page": {"number": 2}}', '{"words": ["a"], "limit": 3}']


def test_a_field_that_no_turn_has_gets_no_column(log: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", [revised(1), revised(2)])
    folder = build([plain], tmp_path / "out", Recipe(kind="sft", test_share=0), format="parquet").path

    assert set(loaded(folder)[0]["prompt"][0]) == {"role", "content"}


@pytest.mark.parametrize("where", ["late in train", "in test alone"])
def test_datasets_reads_a_field_wherever_it_first_occurs(tmp_path: Path, where: str) -> None:
    asked = Message(role="user", content="question", name="ann")
    some = [kept(1), revised(2), kept(3, messages=(asked,)), revised(4, messages=calls(4, {"limit": 3}))]
    some += [kept(number) for number in range(5, 20)]  # so that there are rows on both sides
    recipe = Recipe(kind="sft", test_share=0.5, near_duplicates=None)
    folder = build([write(tmp_path / "log.jsonl", some)], tmp_path / "out", recipe).path
    rows = b"".join((folder / f"{split}.jsonl").read_bytes() for split in ("train", "test"))
    plain = kept(20, draft=Draft(answer=says("word " * 200_000)))
    build([write(tmp_path / "plain.jsonl", [plain])], tmp_path / "plain", Recipe(kind="sft", test_share=0))
    many = 11 * (tmp_path / "plain" / "train.jsonl").read_bytes()  # datasets guesses by ten megabytes

    (folder / "train.jsonl").write_bytes(many + rows if where == "late in train" else many)
    (folder / "test.jsonl").write_bytes(rows)

    found = loaded(folder, "train" if where == "late in train" else "test")[-len(some) :]
    assert sorted(row["principles"] for row in found)[-2:] == [["no-demeaning"], ["no-demeaning"]]
    assert {turn["name"] for row in found for turn in row["prompt"]} == {"ann", None}
    made = [call for row in found for turn in row["prompt"] for call in turn["tool_calls"] or ()]
    assert [call["function"] for call in made] == [{"name": "search", "arguments": {"limit": 3}}]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_card_names_columns_as_datasets_does(kind: Kind) -> None:
    from datasets import Features

    columns = rows_features(KINDS[kind], frozenset(OPTIONAL))
    assert for_card(columns) == Features.from_dict(columns)._to_yaml_list()


def test_arguments_that_look_like_a_call_come_back_as_they_were(tmp_path: Path) -> None:
    nested = {"call": {"name": "inner", "arguments": {"a": [1, "x"]}}}
    log = write(tmp_path / "log.jsonl", [revised(1, messages=calls(1, nested))])
    for format in ("jsonl", "parquet"):
        folder = build([log], tmp_path / format, Recipe(kind="sft", test_share=0), format=format).path

        (call,) = loaded(folder)[0]["prompt"][2]["tool_calls"]
        assert call["function"]["arguments"] == nested
        assert "name" not in loaded(folder)[0]["prompt"][2]


def test_numbers_of_arguments_come_back_as_the_docs_say(tmp_path: Path) -> None:
    numbers = {"pi": 3.141592653589793, "tiny": 1e-12, "least": -(2**63), "most": 2**64 - 1}
    log = write(tmp_path / "log.jsonl", [revised(1, messages=calls(1, numbers))])
    found = {}
    for format in ("jsonl", "parquet"):
        folder = build([log], tmp_path / format, Recipe(kind="sft", test_share=0), format=format).path
        (call,) = loaded(folder)[0]["prompt"][2]["tool_calls"]
        found[format] = call["function"]["arguments"]

    assert found["parquet"] == numbers
    assert found["jsonl"] == numbers | {"pi": 3.1415926536, "tiny": 0}


STOCK: list[tuple[str, Kind, Format, list[str]]] = [
    ("sft", "sft", "parquet", []),
    ("sft", "critique-sft", "jsonl", []),
    ("dpo", "preference", "parquet", []),
    ("reward", "preference", "jsonl", []),
    ("kto", "unpaired", "parquet", ["--per_device_train_batch_size", "2"]),
]


@pytest.mark.parametrize(("command", "kind", "format", "options"), STOCK)
def test_the_stock_trl_command_trains_on_it(
    made: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    command: str,
    kind: Kind,
    format: Format,
    options: list[str],
) -> None:
    folder = made(kind, format, 0.0)

    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("trl")),
            command,
            *("--model_name_or_path", str(tiny), "--dataset_name", str(folder)),
            *("--output_dir", str(tmp_path / "trained"), "--max_steps", "2", "--use_cpu", "--bf16", "False"),
            *("--report_to", "none", "--save_strategy", "no", "--logging_steps", "1"),
            *options,
        ],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "trained" / "model.safetensors").exists()


# --- other trainers -----------------------------------------------------------------------------------

KEYS: dict[tuple[Format, Kind], set[str]] = {
    ("openrlhf", "sft"): {"input", "output"},
    ("openrlhf", "critique-sft"): {"input", "output"},
    ("openrlhf", "preference"): {"prompt", "chosen", "rejected", "margin"},
    ("openrlhf", "prompts"): {"input", "label"},
    ("verl", "sft"): {"messages"},
    ("verl", "prompts"): {"data_source", "prompt", "ability", "reward_model", "extra_info"},
    ("llama-factory", "sft"): {"messages"},
    ("llama-factory", "critique-sft"): {"messages"},
    ("llama-factory", "preference"): {"messages", "chosen", "rejected"},
    ("llama-factory", "unpaired"): {"messages", "label"},
    ("axolotl", "sft"): {"messages"},
    ("axolotl", "critique-sft"): {"messages"},
    ("axolotl", "preference"): {"messages", "chosen", "rejected"},
    ("openai", "sft"): {"messages"},
    ("openai", "critique-sft"): {"messages"},
    ("openai", "preference"): {"input", "preferred_output", "non_preferred_output"},
}


def test_the_table_of_keys_names_every_format_and_kind() -> None:
    assert {(format, kind) for format, kinds in SHAPES.items() for kind in kinds} == set(KEYS)
    assert {"jsonl", "parquet", *(format for format, _ in KEYS)} == set(FORMATS)


@pytest.mark.parametrize(("format", "kind"), list(KEYS))
def test_a_foreign_format_has_its_consumers_keys_and_a_provenance_for_each_row(
    made: Callable[..., Path], format: Format, kind: Kind
) -> None:
    folder = made(kind, format)

    if format == "verl":
        import pyarrow.parquet

        rows = {
            split: pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist()
            for split in ("train", "test")
        }
    else:
        rows = {split: lines_of(folder, split) for split in ("train", "test")}
    assert {frozenset(row) for split in rows.values() for row in split} == {frozenset(KEYS[format, kind])}
    origins = [json.loads(line) for line in provenances(folder, format)]
    for split, found in rows.items():
        assert len(found) == sum(origin["split"] == split for origin in origins)
    assert explain(origins[0]["id"], folder).trajectory is not None


def test_what_a_loader_would_drop_is_counted_and_not_written(tmp_path: Path) -> None:
    twice = (says("one question", "user"), says("and another", "user"))
    log = write(tmp_path / "log.jsonl", [revised(1), revised(2, messages=twice)])

    built = build([log], tmp_path / "out", Recipe(kind="sft", test_share=0), format="llama-factory")
    assert built.ledger.dropped == {Reason.NOT_IN_FORMAT: 1}
    assert len(lines_of(built.path)) == 1


def test_openai_holds_arguments_as_text_and_learns_the_last_turn_only(made: Callable[..., Path]) -> None:
    rows = lines_of(made("sft", "openai", 0.0))

    called = [row["messages"] for row in rows if any("tool_calls" in turn for turn in row["messages"])]
    assert len(called) == 2
    for turns in called:
        asked = next(turn for turn in turns if "tool_calls" in turn)
        assert isinstance(json.loads(asked["tool_calls"][0]["function"]["arguments"]), dict)
        assert [turn.get("weight") for turn in turns if turn["role"] == "assistant"] == [0, None]


def test_axolotl_gets_a_config_that_names_its_files(made: Callable[..., Path]) -> None:
    answers = yaml.safe_load((made("sft", "axolotl") / "datasets.yaml").read_text())
    pairs = yaml.safe_load((made("preference", "axolotl") / "datasets.yaml").read_text())

    assert answers["datasets"][0]["message_field_training"] == "train"
    assert answers["test_datasets"][0]["path"] == "test.jsonl"
    assert (pairs["rl"], pairs["datasets"][0]["type"]) == ("dpo", "chat_template.default")


def test_a_format_without_a_place_for_the_kind_says_which_kinds_it_takes(log: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"verl has no place for the kind 'preference'; it takes sft, prompts"
    ):
        build([log], tmp_path / "out", Recipe(kind="preference"), format="verl")
    with pytest.raises(ConfigError, match="format is one of jsonl"):
        build([log], tmp_path / "out", Recipe(kind="sft"), format="csv")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
