"""Formats, read by their consumers' own loaders: no row is dropped, and the loss falls on the answer alone.

`make consumers` installs OpenRLHF, verl, LLaMA-Factory and axolotl beside the project, since their pins and
ours do not go together; without that, these tests are skipped. `make soak` does both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dataset_logs import write
from export_logs import records
from tiny import tiny_model

from trainers.dataset import Recipe, build
from trainers.export import Format
from trainers.rows import Kind

CONSUMERS = Path(os.environ.get("CAI_CONSUMERS", ".consumers")).absolute()

pytestmark = [
    pytest.mark.skipif(not (CONSUMERS / "venv").is_dir(), reason="make consumers installs the trainers"),
    pytest.mark.timeout(600),
]

# Each script reads FOLDER (a dataset), KIND and TOKENIZER, and prints a list of
# {"rows": how many its loader kept, "answer": the text that the first row's loss falls on}.
HEAD = """
import json, os, sys
from types import SimpleNamespace as Args
folder, kind, tokenizer_folder = sys.argv[1:]
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

def tell(*found):
    print("FOUND" + json.dumps([{"rows": rows, "answer": answer} for rows, answer in found]))

def learnt(labels):
    return tokenizer.decode([token for token in labels if token != -100])
"""

OPENRLHF = """
import datasets
from openrlhf.datasets import PromptDataset, RewardDataset, SFTDataset

rows = datasets.load_dataset("json", data_files=folder + "/train.jsonl", split="train")

def strategy(**keys):
    return Args(args=Args(data=Args(apply_chat_template=True, **keys)), is_rank_0=lambda: False)

if kind == "preference":
    keys = strategy(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected")
    read = lambda dpo: RewardDataset(rows, tokenizer, 4096, keys, is_dpo=dpo, num_processors=1)
    pairs = [read(False), read(True)]
    tell(*((len(found), found.chosens[0]) for found in pairs))
elif kind == "prompts":
    found = PromptDataset(rows, tokenizer, strategy(input_key="input", label_key="label"))
    tell((len(found), found[0][1]))
else:
    keys = strategy(input_key="input", output_key="output")
    found = SFTDataset(rows, tokenizer, 4096, keys, num_processors=1)
    tell((len(found), found.responses[0]))
"""

VERL = """
from omegaconf import OmegaConf
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset

config = OmegaConf.create(
    {"max_length": 4096, "max_prompt_length": 4096, "truncation": "error", "cache_dir": folder + "/.verl"}
)
file = folder + "/train.parquet"
if kind == "prompts":
    found = RLHFDataset(file, tokenizer, config)
    tell((len(found), found[0]["raw_prompt"][-1]["content"]))
else:
    found = MultiTurnSFTDataset(file, tokenizer, config)
    tell((len(found), tokenizer.decode(found[0]["input_ids"][found[0]["loss_mask"].bool()])))
"""

LLAMA_FACTORY = """
import importlib.machinery, types
audio = types.ModuleType("torchaudio")  # imported for speech; there is none here
audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = audio
os.environ["DISABLE_VERSION_CHECK"] = "1"
from llamafactory.data.loader import get_dataset
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments, ModelArguments
from transformers import Seq2SeqTrainingArguments

data = DataArguments(
    template="chatml", dataset=kind.replace("-", "_") + "_train", dataset_dir=folder, cutoff_len=4096,
    preprocessing_num_workers=1, overwrite_cache=True,
)
data.dataset = [name for name in json.load(open(folder + "/dataset_info.json")) if name.endswith("train")]
model = ModelArguments(model_name_or_path=tokenizer_folder)
model.cache_dir = folder + "/.cache"
stage = {"preference": "rm", "unpaired": "kto"}.get(kind, "sft")
run = Seq2SeqTrainingArguments(output_dir=folder + "/.out", use_cpu=True)
template = get_template_and_fix_tokenizer(tokenizer, data)
found = get_dataset(template, model, data, run, stage, tokenizer=tokenizer)["train_dataset"]
tell((len(found), learnt(found[0].get("chosen_labels", found[0].get("labels")))))
"""

AXOLOTL = """
import yaml
from axolotl.utils.data import prepare_datasets, prepare_preference_datasets
from axolotl.utils.dict import DictDefault

if __name__ == "__main__":
    os.chdir(folder)
    config = yaml.safe_load(open("datasets.yaml"))
    config.update(
        base_model=tokenizer_folder, tokenizer_config=tokenizer_folder, chat_template="tokenizer_default",
        sequence_len=4096, dataset_processes=1, seed=1, val_set_size=0.0,
        dataset_prepared_path=folder + "/.ready", num_epochs=1, micro_batch_size=1,
        gradient_accumulation_steps=1, batch_size=1, world_size=1,
    )
    prepare = prepare_preference_datasets if kind == "preference" else prepare_datasets
    found = prepare(DictDefault(config), tokenizer)[0]
    row = found[0]
    tell((len(found), learnt(row["labels"]) if "labels" in row else row["chosen"]))
"""

SCRIPTS: dict[str, str] = {
    "openrlhf": OPENRLHF,
    "verl": VERL,
    "llama-factory": LLAMA_FACTORY,
    "axolotl": AXOLOTL,
}
CASES: list[tuple[Format, Kind]] = [
    ("openrlhf", "sft"),
    ("openrlhf", "critique-sft"),
    ("openrlhf", "preference"),
    ("openrlhf", "prompts"),
    ("verl", "sft"),
    ("verl", "prompts"),
    ("llama-factory", "sft"),
    ("llama-factory", "critique-sft"),
    ("llama-factory", "preference"),
    ("llama-factory", "unpaired"),
    ("axolotl", "sft"),
    ("axolotl", "critique-sft"),
    ("axolotl", "preference"),
]


def python_of(format: Format) -> tuple[str, dict[str, str]]:
    """Return the interpreter that has the consumer, and its environment."""
    quiet = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if format == "axolotl":  # runs on our own trl and transformers
        return sys.executable, quiet | {"PYTHONPATH": str(CONSUMERS / "axolotl")}
    return str(CONSUMERS / "venv" / "bin" / "python"), quiet | {"PYTHONPATH": ""}


def read_by_older_transformers(tokenizer: Path) -> None:
    """Write the tokenizer's settings as transformers 4 writes them."""
    path = tokenizer / "tokenizer_config.json"
    settings = json.loads(path.read_bytes())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for newer in ("backend", "extra_special_tokens"):
        settings.pop(newer, None)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(("format", "kind"), CASES)
def test_the_consumers_own_loader_keeps_every_row_and_learns_the_answer(
    tmp_path: Path, format: Format, kind: Kind
) -> None:
    log = write(tmp_path / "log.jsonl", records())
    built = build([log], tmp_path / "data", Recipe(kind=kind, test_share=0.5), format=format)
    tokenizer = tiny_model(tmp_path / "tiny")
    read_by_older_transformers(tokenizer)
    script = tmp_path / "read.py"
    script.write_text(HEAD + SCRIPTS[format])
    python, environment = python_of(format)

    done = subprocess.run(
        [python, script, built.path, kind, tokenizer], env=environment, capture_output=True, text=True
    )

    said = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert said, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(said[-1].removeprefix("FOUND"))
    written = rows_of(built.path)
    for loader in found:
        assert loader["rows"] == len(written)
        if kind != "prompts":
            assert any(text in loader["answer"] for text in answers(written))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the train split, as written."""
    if (folder / "train.parquet").exists():
        import pyarrow.parquet

        found: list[dict[str, Any]] = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
        return found
    return [json.loads(line) for line in (folder / "train.jsonl").read_bytes().splitlines()]


def answers(written: list[dict[str, Any]]) -> set[str]:
    """Return the last assistant texts of the rows, chosen ones where there are two."""
    texts = set()
    for row in written:
        last = next(row[key] for key in ("chosen", "output", "completion", "messages") if key in row)
        texts.add(last["content"] if isinstance(last, dict) else last[-1]["content"])
    return texts
