"""Lengths of rows in tokens of the model that will be trained, as its chat template writes them."""

from __future__ import annotations

from typing import Any

import msgspec

from cai_graph.errors import ConfigError, MissingExtra
from trainers.rows import Row, Turn

__all__ = ["Lengths", "Refused"]


class Refused(Exception):  # noqa: N818 - the row is at fault
    """The chat template refuses the conversation, for instance two user turns in a row."""


class Lengths:
    """Counts tokens with one tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        """Load a tokenizer from a folder; nothing is fetched and no code of its own is run.

        Raises:
            ConfigError: there is no tokenizer in the folder, or it has no chat template.
            MissingExtra: transformers is not installed.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingExtra("--tokenizer", "transformers", "train") from error
        try:
            loaded: Any = AutoTokenizer.from_pretrained(
                tokenizer, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"tokenizer {tokenizer!r}: cannot be loaded; name a folder with tokenizer.json and "
                f"tokenizer_config.json ({type(error).__name__})"
            ) from error
        if not loaded.chat_template:
            raise ConfigError(
                f"tokenizer {tokenizer!r}: has no chat template, so a conversation has no length in its "
                "tokens; name that of an instruction-tuned model, or put a chat_template.jinja beside it"
            )
        self._tokenizer = loaded

    def of(self, row: Row) -> int:
        """Return the tokens of a row: of its prompt with the longest of its answers.

        Raises:
            Refused: the chat template refuses the conversation.
        """
        answers = [
            value
            for name in ("completion", "chosen", "rejected", "reference")
            if (value := getattr(row, name, None)) is not None
        ]
        return max(self._tokens(row.prompt, answer) for answer in answers or [()])

    def _tokens(self, prompt: tuple[Turn, ...], answer: tuple[Turn, ...]) -> int:
        import jinja2

        turns = msgspec.to_builtins((*prompt, *answer))
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=not answer
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise Refused(str(error)) from error
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
