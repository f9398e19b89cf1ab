"""Messages of the log's background work, sent to the logger `cai_graph.log`."""

from __future__ import annotations

import contextlib
import logging

__all__ = ["say"]

_logger = logging.getLogger("cai_graph.log")


def say(level: int, message: str, *arguments: object, trace: bool = False) -> None:
    """Log a message; with `trace`, add the traceback of the error being handled. Never raises.

    Otherwise an error in one of the application's logging handlers would end the writer's thread, and every
    append would block.
    """
    with contextlib.suppress(Exception):
        _logger.log(level, message, *arguments, exc_info=trace)
