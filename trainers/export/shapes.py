"""Converts a row to each foreign format: a dict, or None if that loader would drop, cut or misread the row.

The ledger counts the rows that become None.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal, get_args

import msgspec

from trainers.rows import (
    CritiqueRow,
    Kind,
    PreferenceRow,
    PromptRow,
    SFTRow,
    ToolUse,
    Turn,
    UnpairedRow,
)

__all__ = ["FORMATS", "SHAPES", "Format", "Shape"]

Format = Literal["jsonl", "parquet", "openrlhf", "verl", "llama-factory", "axolotl", "openai"]
FORMATS: tuple[Format, ...] = get_args(Format)

Shape = Callable[[Any], dict[str, Any] | None]
"""Converts a row to the format's dict; None if the format's loader would not accept all of it."""


def _plain(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = msgspec.to_builtins(turns)
    return found


def _alternates(turns: tuple[Turn, ...]) -> bool:
    """Return whether user (or tool) and assistant alternate, user first, after at most one system turn."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    voices: list[str] = []
    for turn in spoken:
        voice = "assistant" if turn.role == "assistant" else "other"
        if turn.role == "system" or (turn.role == "tool" and not voices):
            return False
        if not (
            turn.role == "tool" and voices and voices[-1] == "tool"
        ):  # results of parallel calls are merged
            voices.append("tool" if turn.role == "tool" else voice)
    return bool(voices) and all(
        (voice == "assistant") == bool(number % 2) for number, voice in enumerate(voices)
    )


def _openrlhf_answer(row: SFTRow | CritiqueRow) -> dict[str, Any]:
    return {"input": _plain(row.prompt), "output": _plain(row.completion)}


def _openrlhf_pair(row: PreferenceRow) -> dict[str, Any]:
    return {
        "prompt": _plain(row.prompt),
        "chosen": _plain(row.chosen),
        "rejected": _plain(row.rejected),
        "margin": row.margin,
    }


def _openrlhf_prompt(row: PromptRow) -> dict[str, Any]:
    return {"input": _plain(row.prompt), "label": ""}


def _verl_answer(row: SFTRow) -> dict[str, Any] | None:
    if any(turn.role == "assistant" for turn in row.prompt):
        return None  # its loss is on every assistant turn, and those in the prompt were not judged
    return {"messages": _plain(row.prompt + row.completion)}


def _verl_prompt(row: PromptRow) -> dict[str, Any]:
    return {
        "data_source": "cai_graph",
        "prompt": _plain(row.prompt),
        "ability": "alignment",
        "reward_model": {"style": "model", "ground_truth": ""},
        "extra_info": {"split": row.split, "id": row.id},
    }


def _llama_factory_answer(row: SFTRow | CritiqueRow) -> dict[str, Any] | None:
    if not _alternates(row.prompt + row.completion):
        return None
    return {"messages": _plain(row.prompt + row.completion)}


def _llama_factory_pair(row: PreferenceRow) -> dict[str, Any] | None:
    if not _alternates(row.prompt + row.chosen) or row.prompt[-1].role == "tool":
        return None  # in a pair's prompt, its loader reads a tool's result only if another turn follows
    return {
        "messages": _plain(row.prompt),
        "chosen": _plain(row.chosen)[0],
        "rejected": _plain(row.rejected)[0],
    }


def _llama_factory_unpaired(row: UnpairedRow) -> dict[str, Any] | None:
    if not _alternates(row.prompt + row.completion):
        return None
    return {"messages": _plain(row.prompt + row.completion), "label": row.label}


def _axolotl_answer(row: SFTRow | CritiqueRow) -> dict[str, Any]:
    turns = [turn | {"train": False} for turn in _plain(row.prompt)]
    return {"messages": [*turns, *(turn | {"train": True} for turn in _plain(row.completion))]}


def _axolotl_pair(row: PreferenceRow) -> dict[str, Any] | None:
    turns = (*row.prompt, *row.chosen, *row.rejected)
    if any(turn.tool_calls or turn.role == "tool" for turn in turns):
        return None  # its loader reads only role and content
    return {
        "messages": _plain(row.prompt),
        "chosen": _plain(row.chosen)[0],
        "rejected": _plain(row.rejected)[0],
    }


def _openai_turn(turn: Turn) -> dict[str, Any]:
    shaped: dict[str, Any] = msgspec.to_builtins(turn)
    if turn.tool_calls:
        shaped["tool_calls"] = [_openai_call(call) for call in turn.tool_calls]
    return shaped


def _openai_call(call: ToolUse) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    named = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return named if call.id is None else {"id": call.id, **named}


def _openai_answer(row: SFTRow | CritiqueRow) -> dict[str, Any]:
    # An assistant turn of weight 0 is context, and not trained on: only the last one was judged.
    before = [_openai_turn(turn) | ({"weight": 0} if turn.role == "assistant" else {}) for turn in row.prompt]
    return {"messages": [*before, *map(_openai_turn, row.completion)]}


def _openai_pair(row: PreferenceRow) -> dict[str, Any]:
    return {
        "input": {
            "messages": list(map(_openai_turn, row.prompt)),
            "tools": [],
            "parallel_tool_calls": True,
        },
        "preferred_output": list(map(_openai_turn, row.chosen)),
        "non_preferred_output": list(map(_openai_turn, row.rejected)),
    }


SHAPES: dict[Format, dict[Kind, Shape]] = {
    "openrlhf": {
        "sft": _openrlhf_answer,
        "critique-sft": _openrlhf_answer,
        "preference": _openrlhf_pair,
        "prompts": _openrlhf_prompt,
    },
    "verl": {"sft": _verl_answer, "prompts": _verl_prompt},
    "llama-factory": {
        "sft": _llama_factory_answer,
        "critique-sft": _llama_factory_answer,
        "preference": _llama_factory_pair,
        "unpaired": _llama_factory_unpaired,
    },
    "axolotl": {"sft": _axolotl_answer, "critique-sft": _axolotl_answer, "preference": _axolotl_pair},
    "openai": {"sft": _openai_answer, "critique-sft": _openai_answer, "preference": _openai_pair},
}
"""The converter for each format and kind. Our own formats, jsonl and parquet, support every kind."""
