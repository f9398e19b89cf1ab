"""Builds the configs with which LLaMA-Factory and axolotl find a dataset's files and their columns."""

from __future__ import annotations

from typing import Any

from trainers.rows import Kind

__all__ = ["axolotl_config", "llama_factory_info"]


def llama_factory_info(kind: Kind, split: str) -> dict[str, Any]:
    """Return the entry of `dataset_info.json` for one of our files."""
    columns = {"messages": "messages"}
    if kind == "preference":
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    if kind == "unpaired":
        columns |= {"kto_tag": "label"}
    return {
        "file_name": f"{split}.jsonl",
        "formatting": "openai",
        **({"ranking": True} if kind == "preference" else {}),
        "columns": columns,
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": "tool",
            "function_tag": "function",
            "system_tag": "system",
        },
    }


def axolotl_config(kind: Kind, splits: list[str]) -> dict[str, Any]:
    """Return the part of an axolotl config for our files, with paths relative to their folder."""

    def entry(split: str) -> dict[str, Any]:
        read = {"path": f"{split}.jsonl", "ds_type": "json", "field_messages": "messages"}
        if kind == "preference":
            return read | {
                "type": "chat_template.default",
                "field_chosen": "chosen",
                "field_rejected": "rejected",
            }
        return read | {"type": "chat_template", "message_field_training": "train"}

    names = {"train": "datasets", "test": "test_datasets"}
    config: dict[str, Any] = {"rl": "dpo"} if kind == "preference" else {}
    return config | {names[split]: [entry(split)] for split in splits}
