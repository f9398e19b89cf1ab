"""Trains a sequence classifier with one output by LoRA: the torch part of `trainers.critic`."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph.errors import ModelError
from trainers.weights import resolve

if TYPE_CHECKING:
    from trainers.critic.critic import Config

__all__ = ["Texts", "batches", "fit"]

_BUCKET = 16


class Texts(NamedTuple):
    """The training data."""

    texts: Sequence[str]
    """Inputs."""
    y: Sequence[float]
    """Target P(VIOLATES) of each input."""
    weights: Sequence[float]
    """Weight of each input, 1 on average."""


def fit(
    data: Texts, config: Config, folder: Path, progress: Callable[[int, int], None] | None
) -> tuple[Any, Any]:
    """Train, write the model with merged adapters to `folder`, and return (model, tokenizer).

    The loss is the weighted binary cross-entropy of the single logit. The seed determines all random draws:
    the adapters, the head and the order of rows.

    Raises:
        ConfigError: the config names no model, see `trainers.weights.resolve`, or layers that it lacks.
        ModelError: the model cannot be loaded, or the loss is not finite; the message names the update.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = resolve(config.model)
    torch.manual_seed(config.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=1,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{config.model}: cannot be loaded as a classifier: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    config.lora.check(model)
    adapters = config.lora.adapter("SEQ_CLS")
    with warnings.catch_warnings():
        # peft enables gradient checkpointing under a deprecated name of transformers.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model.to("cuda" if torch.cuda.is_available() else "cpu"), adapters)
    encoded = [
        tokenizer(text, truncation=True, max_length=config.max_tokens)["input_ids"] for text in data.texts
    ]
    updates = config.epochs * math.ceil(len(encoded) / config.batch_size)
    optimizer = torch.optim.AdamW(
        [one for one in adapted.parameters() if one.requires_grad], lr=config.learning_rate, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / updates)
    order = random.Random(config.seed)
    adapted.train()
    if progress is not None:
        progress(0, updates)
    done = 0
    for _ in range(config.epochs):
        for rows in batches([len(ids) for ids in encoded], config.batch_size, order):
            batch = tokenizer.pad(
                {"input_ids": [encoded[row] for row in rows]}, padding_side="right", return_tensors="pt"
            ).to(adapted.device)
            logits = adapted(**batch).logits[:, 0]
            y, weights = (
                torch.tensor([column[row] for row in rows], dtype=torch.float32, device=logits.device)
                for column in (data.y, data.weights)
            )
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, weight=weights)
            if not torch.isfinite(loss):
                raise ModelError(
                    f"the loss is {loss.item()} at update {done + 1} of {updates}; lower learning_rate "
                    f"({config.learning_rate:g})"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if progress is not None:
                progress(done, updates)
    merged: Any = adapted.merge_and_unload()
    merged.eval()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return merged, tokenizer


def batches(lengths: Sequence[int], size: int, order: random.Random) -> Iterator[list[int]]:
    """Yield every row once, in batches of rows of similar length, to keep padding small."""
    rows = list(range(len(lengths)))
    order.shuffle(rows)
    found = []
    for start in range(0, len(rows), size * _BUCKET):
        bucket = sorted(rows[start : start + size * _BUCKET], key=lambda row: lengths[row])
        found += [bucket[at : at + size] for at in range(0, len(bucket), size)]
    order.shuffle(found)
    yield from found
