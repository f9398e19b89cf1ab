"""Formats: a dataset's rows in the form that a trainer's own loader reads.

    jsonl, parquet    the rows as they are, which is TRL's conversational form, and a card by which
                      `datasets` reads the JSON lines
    openrlhf          JSON lines for `--data.apply_chat_template`
    verl              Parquet, for multi-turn SFT and for reinforcement learning
    llama-factory     JSON lines and `dataset_info.json`
    axolotl           JSON lines and `datasets.yaml`, to include in a config
    openai            JSON lines of the fine-tuning API: supervised, and preference (DPO)

What each module knows:

    shapes     what a row becomes in each foreign format, or that its loader would not take the row whole
    configs    the configs by which LLaMA-Factory and axolotl find the files
    features   what the columns of a dataset hold, in the words of `datasets`
    parquet    Arrow schemas of rows, by which `datasets` gives them back as they were
    files      a dataset's files written and read again, in any format

Formats that have no room for a row's provenance have it beside them in `provenance.jsonl`, a line a row, so
that every row can be explained.
"""

from __future__ import annotations

from trainers.export.files import (
    CARD,
    PROVENANCE,
    Sink,
    fits_in,
    loading,
    provenances,
    read_rows,
    sink_for,
)
from trainers.export.shapes import FORMATS, SHAPES, Format

__all__ = [
    "CARD",
    "FORMATS",
    "PROVENANCE",
    "SHAPES",
    "Format",
    "Sink",
    "fits_in",
    "loading",
    "provenances",
    "read_rows",
    "sink_for",
]
