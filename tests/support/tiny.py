"""A random model of a few thousand parameters, and rows to train it on in seconds."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trainers.checkpoint import Manifest

Kind = Literal["sft", "preference", "unpaired", "prompts"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(
    folder: Path, *, seed: int = 0, hidden: int = 16, layers: int = 2, template: str | None = CHATML
) -> Path:
    """Save a random Qwen2 with a tokenizer of bytes and a ChatML template; return the folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = {token: number for number, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=words["<|im_end|>"],
        pad_token_id=words["<|endoftext|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward_model(folder: Path, *, seed: int = 1) -> Path:
    """Save a random reward model with the tiny model's tokenizer; return the folder."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Qwen2Config.from_pretrained(folder, num_labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def manifest(**changes: Any) -> Manifest:
    """Return the manifest of a small run of `sft`."""
    from trainers.checkpoint import Manifest, hardware, versions

    fields: dict[str, Any] = {
        "stage": "sft",
        "base": "base",
        "parents": ("ab" * 32,),
        "config": {"learning_rate": 1e-5, "note": "a|b <script>"},
        "data": {"path": "rows", "digest": "cd" * 32, "rows": 12},
        "constitution_digests": ("ef" * 32,),
        "seed": 3,
        "versions": versions(),
        "hardware": hardware(),
        "seconds": 1.5,
        "metrics": {"loss": 0.25},
    }
    return Manifest(**fields | changes)


def turn(role: str, content: str) -> dict[str, str]:
    """Return one message as chat templates read it."""
    return {"role": role, "content": content}


def rows(kind: Kind, n: int) -> list[dict[str, Any]]:
    """Return n rows in TRL's conversational form; each one differs from the others.

    A `preference` prefers the polite answer, with `p_chosen` 0.9, 0.8, 0.7 and 0.6 in turn; an `unpaired` row
    is desirable and undesirable in turn.
    """
    found: list[dict[str, Any]] = []
    for number in range(n):
        prompt = [turn("user", f"question {number}?")]
        good, bad = [turn("assistant", f"yes, {number}.")], [turn("assistant", f"no {number}!")]
        if kind == "sft":
            found.append({"prompt": prompt, "completion": good})
        elif kind == "preference":
            p_chosen = 0.9 - number % 4 / 10
            found.append({"prompt": prompt, "chosen": good, "rejected": bad, "p_chosen": round(p_chosen, 1)})
        elif kind == "unpaired":
            found.append({"prompt": prompt, "completion": (good, bad)[number % 2], "label": number % 2 == 0})
        else:
            found.append({"prompt": prompt})
    return found


def write_rows(path: Path, found: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def tracked(folder: Path) -> set[str]:
    """Return the names of the scalars in the files that a tracker wrote for TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    names: set[str] = set()
    for path in folder.rglob("*tfevents*"):
        with path.open("rb") as file:
            while head := file.read(12):  # length and its checksum; the record's own checksum comes after it
                event = Event.FromString(file.read(*struct.unpack("<Q", head[:8])))
                file.read(4)
                names |= {value.tag for value in event.summary.value}
    return names
