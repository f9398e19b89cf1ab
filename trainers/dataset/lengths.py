"""Lengths of rows in tokens of the model that will be trained, as its chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cai_graph.errors import ConfigError, MissingExtra
from trainers.rows import Row, Turn

__all__ = ["Lengths", "Refused"]


class Refused(Exception):  # noqa: N818 - the row is at fault
    """The chat template refuses the conversation, for instance two user turns in a row, or fails on it."""


class Lengths:
    """Counts tokens with one tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        """Load a tokenizer from a folder; nothing is fetched and no code of its own is run.

        Raises:
            ConfigError: there is no tokenizer in the folder, or it has no chat template that can be read.
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
            # This conversation may be refused and others not; but what cannot be read writes none.
            if isinstance(error.__cause__, (jinja2.TemplateSyntaxError, ValueError)):
                raise ConfigError(
                    f"tokenizer {tokenizer!r}: its chat template cannot be used: {error}"
                ) from error
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
        text = _written(self._tokenizer, msgspec.to_builtins((*prompt, *answer)), asks=not answer)
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _written(tokenizer: Any, turns: Sequence[dict[str, Any]], *, asks: bool) -> Any:
    """Return a conversation as the chat template writes it; raise Refused where it does not."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # the template is a program of others
        raise Refused(str(error)) from error
