"""Writes and reads a dataset's rows in the formats that the loaders of other trainers accept.

    jsonl, parquet    our own rows unchanged, which is TRL's conversational form; with JSON lines, a card from
                      which `datasets` learns the columns
    openrlhf          JSON lines for `--data.apply_chat_template`
    verl              Parquet, for multi-turn SFT and for reinforcement learning
    llama-factory     JSON lines and `dataset_info.json`
    axolotl           JSON lines and `datasets.yaml`, to include in a config
    openai            JSON lines of the fine-tuning API: supervised, and preference (DPO)

Modules:

    shapes     converts a row to each foreign format, or reports that its loader would not accept all of it
    configs    the config files with which LLaMA-Factory and axolotl find the files
    features   column types of a dataset, in the notation of `datasets`
    parquet    Arrow schemas of rows, which let `datasets` restore them exactly
    files      writes and reads a dataset's files, in any format

Formats without a place for a row's provenance have it in a separate `provenance.jsonl`, one line per row, so
that the origin of every row can be traced.
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
