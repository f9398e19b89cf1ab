"""Explains errors of models: adds advice to a provider's exception, and decides whether a bulk run must stop.

The exception that a client raised is raised on unchanged, so that handlers of its class still catch it. The
advice is a note (PEP 678): Python prints it below the message, and records and the command line show it.
"""

from __future__ import annotations

import re

from cai_graph.errors import ConfigError, LogError, MissingExtra

__all__ = ["annotate", "describe", "forget_task", "is_about_all_rows", "meaning", "message_of", "note_of"]

_PREFIX = "cai_graph: "

_BY_STATUS = {
    401: "the provider refused the API key; check the environment variable that holds it",
    403: "the provider does not let this API key use the model",
    404: "the provider has no such model, or the address is wrong",
    408: "the provider waited too long for the request",
    413: "the provider finds the request too long",
    429: "the provider is busy or the quota is spent; send less at once, or raise the model's max_retries",
    529: "the provider is overloaded; try later, or raise the model's max_retries",
}

_CLIENTS = ("langchain_openai.", "langchain_anthropic.")
"""LangChain's packages that parse providers' replies."""
_FLAGGED = re.compile("moderation|flagged", re.IGNORECASE)
"""Words in a provider's error that rejects one request because of its content."""


def meaning(error: BaseException) -> str | None:
    """Return what an error of a provider's client means and what to do; None for any other error.

    >>> meaning(ValueError("?")) is None
    True
    """
    status = getattr(error, "status_code", None)
    if isinstance(status, int):
        if status == 401 and (server := _asked_without_key(error)) is not None:
            return f"the server wants an API key; set OPENAI_API_KEY to it, and OPENAI_BASE_URL={server}"
        if status == 403 and _FLAGGED.search(str(error)):
            return "the provider's moderation rejected what was sent; its message says why"
        if status in _BY_STATUS:
            return _BY_STATUS[status]
        if status >= 500:
            return f"the provider failed (status {status}); try later, or raise the model's max_retries"
        if status >= 400:
            return f"the provider rejected the request (status {status}); its message says why"
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"APITimeoutError", "TimeoutException"}:
        return "the provider did not answer in time; raise the model's timeout"
    if names & {"APIConnectionError", "TransportError"}:
        return "there is no connection to the provider, or it broke; check the network and the base URL"
    where = _raised_in(error)
    if isinstance(error, IndexError) and where.startswith("langchain_core."):
        return "the provider sent a reply without a choice; try again, or another model"
    if isinstance(error, ValueError | TypeError) and where.startswith(_CLIENTS):
        return (
            "the provider sent a reply that its client cannot read; check the base URL, or try another model"
        )
    return None


def annotate(error: BaseException, who: str) -> None:
    """Add the sentence of `meaning` to an error as a note, once.

    `who` is the part that failed, such as `the critique by openai:gpt-5-mini`.
    """
    said = meaning(error)
    if said is not None and note_of(error) is None:
        error.add_note(f"{_PREFIX}{who} failed: {said}")


def describe(error: BaseException) -> str:
    """Return an exception's class and message, at most 2000 characters, and the note of `annotate` if any."""
    name, message, note = type(error).__name__, message_of(error), note_of(error)
    said = name if message is None else f"{name}: {message}"[:2000]
    return said if note is None else f"{said} ({note})"


def message_of(error: BaseException) -> str | None:
    """Return an exception's message; None where its `str()` raises."""
    try:
        return str(error)
    except Exception:
        return None


def note_of(error: BaseException) -> str | None:
    """Return the sentence that `annotate` added, with `who`; None where it added none."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith(_PREFIX):
            said: str = note.removeprefix(_PREFIX)
            return said
    return None


def forget_task(error: BaseException) -> None:
    """Remove LangGraph's note about the failed task of our own graph, if it is the error's last note.

    It is of no use to the caller, and an error object that is raised repeatedly would collect such notes.
    """
    notes = getattr(error, "__notes__", None)
    if notes and notes[-1].startswith("During task with name "):
        notes.pop()


def is_about_all_rows(error: Exception, *, succeeded: bool | None = None) -> bool:
    """Return whether every further row would fail alike: wrong set-up, rejected key, broken log.

    Args:
        error: the error of one row.
        succeeded: whether another row has succeeded; None: unknown. Denied access (403) is about all rows
            unless one has succeeded, or moderation rejected this row. A model that is not found (404) is
            about all rows only if none is known to have succeeded: it may be missing for a while only.
    """
    status = getattr(error, "status_code", None)
    if status == 403:
        return not succeeded and not _FLAGGED.search(str(error))
    if status == 404:
        return succeeded is False
    return status == 401 or isinstance(error, ConfigError | MissingExtra | LogError)


def _asked_without_key(error: BaseException) -> str | None:
    """Return the address of a server to which `models` sent no key (`Bearer none`), or None."""
    request = getattr(error, "request", None)
    if request is None or request.headers.get("Authorization") != "Bearer none":
        return None
    url = request.url  # its `netloc` contains no password
    address: str = f"{url.scheme}://{url.netloc.decode('ascii')}{url.path}"
    return address.removesuffix("/chat/completions")


def _raised_in(error: BaseException) -> str:
    """Return the name of the module whose code raised an error; "" where it was never raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
