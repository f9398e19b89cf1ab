"""Sets or clears the configuration that LangChain and LangGraph keep in a context variable.

They merge it into every nested run, and use it to find a node's runtime, store and stream writer.
"""

from __future__ import annotations

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

__all__ = ["apart", "within"]


class within:  # noqa: N801 - read as a statement: `with within(config):`
    """Sets the configuration in LangChain's context variable for the body of a `with` statement."""

    def __init__(self, config: RunnableConfig | None) -> None:
        self._config = config

    def __enter__(self) -> None:
        self._token = var_child_runnable_config.set(self._config)

    def __exit__(self, *raised: object) -> None:
        var_child_runnable_config.reset(self._token)


class apart(within):  # noqa: N801 - read as a statement: `with apart():`
    """Clears that configuration for the body, so hiding an outer graph's streams and checkpoints from it."""

    def __init__(self) -> None:
        super().__init__(None)
