"""What a log has to say while nobody calls it, to the logger `cai_graph.log`."""

from __future__ import annotations

import contextlib
import logging

__all__ = ["say"]

_logger = logging.getLogger("cai_graph.log")


def say(level: int, message: str, *arguments: object, trace: bool = False) -> None:
    """Log a message, with the trace of the error that is being handled if `trace`. Never raises.

    A handler of the application's that fails would end the thread that writes, and hold up every append.
    """
    with contextlib.suppress(Exception):
        _logger.log(level, message, *arguments, exc_info=trace)
