"""Constitutional AI for any LLM application: draft, critique, revise under a constitution, and log.

from cai_graph import constitutional

guarded = constitutional(app)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cai_graph.calls import Budget as Budget
    from cai_graph.chain import constitutional as constitutional
    from cai_graph.constitution import Constitution as Constitution
    from cai_graph.constitution import Principle as Principle
    from cai_graph.critic.cascades import cascade as cascade
    from cai_graph.errors import CaiError as CaiError
    from cai_graph.faces.chat import ConstitutionalChatModel as ConstitutionalChatModel
    from cai_graph.faces.runnable import Answered as Answered
    from cai_graph.faces.runnable import ConstitutionalRunnable as ConstitutionalRunnable
    from cai_graph.log import open_log as open_log
    from cai_graph.middleware import ConstitutionalMiddleware as ConstitutionalMiddleware
    from cai_graph.request.policy import Settings as Settings
    from cai_graph.testing import ScriptedModel as ScriptedModel
    from cai_graph.trajectory import Trajectory as Trajectory

if not hasattr(os, "register_at_fork"):
    raise ImportError("cai_graph needs a POSIX system: Linux or macOS; on Windows it runs in WSL")

_HOME = {
    "Answered": "faces.runnable",
    "Budget": "calls",
    "CaiError": "errors",
    "Constitution": "constitution",
    "ConstitutionalChatModel": "faces.chat",
    "ConstitutionalMiddleware": "middleware",
    "ConstitutionalRunnable": "faces.runnable",
    "Principle": "constitution",
    "ScriptedModel": "testing",
    "Settings": "request.policy",
    "Trajectory": "trajectory",
    "cascade": "critic.cascades",
    "constitutional": "chain",
    "open_log": "log",
}
"""Public name -> the module that defines it. Each is imported when it is first used."""

__all__ = sorted(
    _HOME.keys() - {"ConstitutionalMiddleware"}
)  # which needs langchain, and `import *` must not


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except AttributeError as error:  # of which `from cai_graph import …` would say nothing
        raise ImportError(f"{name} cannot be imported from {__name__}: {error}") from error


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
