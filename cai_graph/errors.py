"""The exceptions that cai_graph raises on purpose, all below CaiError.

    CaiError
    ├── ConstitutionError    a constitution cannot be read, or contradicts itself
    ├── ConfigError          an argument, option or model spec that cannot work
    ├── DataError            a record, row or file whose content cannot be read
    ├── ModelError           a model could not be fetched, started or used
    ├── LogError             the log cannot be opened, read or written
    ├── MissingExtra         an optional part is not installed (also an ImportError)
    └── RunError             a request that ended without an answer
        ├── AwaitsReview     the policy is `human`: there is no answer until a person has decided
        ├── BudgetExceeded   calls, tokens or seconds ran out before an answer was judged
        ├── Refused          the policy is `closed` and a refusal cannot be typed as the answer
        ├── Violation        the policy is `raise` and every answer violates the constitution
        └── Unreadable       the policy is `raise` and a critic's verdict could not be read

The message of each states what was found, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cai_graph import installed

__all__ = [
    "AwaitsReview",
    "BudgetExceeded",
    "CaiError",
    "ConfigError",
    "ConstitutionError",
    "DataError",
    "LogError",
    "MissingExtra",
    "ModelError",
    "Refused",
    "RunError",
    "Unreadable",
    "Violation",
]


class CaiError(Exception):
    """Base of every error that cai_graph raises on purpose."""


class ConstitutionError(CaiError):
    """A constitution cannot be read, or contradicts itself; the message names file, line and field."""


class ConfigError(CaiError):
    """An argument, option or model spec that cannot work."""


class DataError(CaiError):
    """A record, row or file whose content cannot be read; the message names the place."""


class ModelError(CaiError):
    """A model could not be fetched, started or used."""


class LogError(CaiError):
    """The log cannot be opened, read or written."""


class MissingExtra(CaiError, ImportError):  # noqa: N818 - reads as what is missing
    """An optional part is not installed.

    Args:
        needed_by: what the user asked for, such as "`cai ask --model local`".
        package: the distribution that is missing.
        extra: the extra of cai-graph that installs it.
    """

    def __init__(self, needed_by: str, package: str, extra: str) -> None:
        super().__init__(f"{needed_by} needs {package}; {installed.command(extra)}")
        self._given = needed_by, package, extra

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given, vars(self)


class RunError(CaiError):
    """A request that ended without an answer; its Trajectory is logged all the same.

    Attributes:
        trajectory_id: id of the logged Trajectory; None where there is none.
    """

    def __init__(self, message: str, *, trajectory_id: str | None = None) -> None:
        super().__init__(message)
        self.trajectory_id = trajectory_id


class AwaitsReview(RunError):  # noqa: N818
    """The policy is `human`: there is no answer until a person has decided, and nothing is logged before.

    Attributes:
        question: the content to show the person, as JSON.
        thread_id: the thread that waits; resume it with `Command(resume={"decision": …})`.
    """

    def __init__(self, question: Mapping[str, Any]) -> None:
        thread = question["thread_id"]
        super().__init__(
            f"thread {thread!r} waits for a person's decision about trajectory {question['trajectory_id']}: "
            f'{question["reason"]}; resume it with Command(resume={{"decision": …}})'
        )
        self.question = question
        self.thread_id = thread

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.question,), vars(self)


class BudgetExceeded(RunError):  # noqa: N818
    """Calls, tokens or seconds ran out before an answer was judged."""


class Refused(RunError):  # noqa: N818
    """The policy is `closed`, and the answer has a type that the refusal, a text, cannot have."""


class Violation(RunError):  # noqa: N818
    """The policy is `raise` and every answer violates the constitution."""


class Unreadable(RunError):  # noqa: N818
    """The policy is `raise` and a critic's verdict could not be read."""
