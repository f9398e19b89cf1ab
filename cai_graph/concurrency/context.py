"""The configuration that LangChain and LangGraph carry in the context: set, or set aside.

They merge it into every run below, and find a node's runtime, store and stream writer by it.
"""

from __future__ import annotations

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

__all__ = ["apart", "within"]


class within:  # noqa: N801 - read as a statement: `with within(config):`
    """Puts a configuration where LangChain and LangGraph carry one in the context.

    They merge it into every run below, and find a node's runtime, store and stream writer by it.
    """

    def __init__(self, config: RunnableConfig | None) -> None:
        self._config = config

    def __enter__(self) -> None:
        self._token = var_child_runnable_config.set(self._config)

    def __exit__(self, *raised: object) -> None:
        var_child_runnable_config.reset(self._token)


class apart(within):  # noqa: N801 - read as a statement: `with apart():`
    """Sets that configuration aside, and with it an outer graph's streams and checkpoints."""

    def __init__(self) -> None:
        super().__init__(None)
