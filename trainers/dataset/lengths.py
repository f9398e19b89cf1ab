"""Counts the tokens of rows with the tokenizer and chat template of the model that will be trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cai_graph.errors import ConfigError, MissingExtra
from trainers.rows import Row, Turn

__all__ = ["Lengths", "Refused"]


class Refused(Exception):  # noqa: N818 - the row is at fault
    """The chat template rejects the conversation, for instance two consecutive user turns, or fails on it."""


class Lengths:
    """Counts tokens with one tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        """Load a tokenizer from a folder; nothing is downloaded, and none of its own code is run.

        Raises:
            ConfigError: the folder contains no tokenizer, or it has no readable chat template.
            MissingExtra: transformers is not installed.
        """
        try:
            import jinja2
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
        try:
            _written(loaded, [{"role": "user", "content": "Hello"}], asks=True)
        except Refused as error:
            # A template may reject this conversation and accept others, but not if it cannot be parsed.
            if isinstance(error.__cause__, (jinja2.TemplateSyntaxError, ValueError)):
                raise ConfigError(
                    f"tokenizer {tokenizer!r}: its chat template cannot be used: {error}"
                ) from error
        self._tokenizer = loaded

    def of(self, row: Row) -> int:
        """Return the number of tokens of a row: of its prompt with its longest answer.

        Raises:
            Refused: the chat template rejects the conversation.
        """
        answers = [
            value
            for name in ("completion", "chosen", "rejected", "reference")
            if (value := getattr(row, name, None)) is not None
        ]
        return max(self._tokens(row.prompt, answer) for answer in answers or [()])

    def _tokens(self, prompt: tuple[Turn, ...], answer: tuple[Turn, ...]) -> int:
        text = _written(self._tokenizer, msgspec.to_builtins((*prompt, *answer)), asks=not answer)
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _written(tokenizer: Any, turns: Sequence[dict[str, Any]], *, asks: bool) -> Any:
    """Return a conversation as rendered by the chat template. Raises Refused if that fails."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # the template is third-party code, which may raise anything
        raise Refused(str(error)) from error
