"""Removes passwords and other secrets from the addresses of logs and servers, for messages and records."""

from __future__ import annotations

import re

__all__ = ["without_password"]

_HOST = re.compile(r"(?:[\w-]+(?:\.[\w-]+)+|localhost|\[[\da-fA-F:.]+\])(?::\d+)?")


def without_password(address: str) -> str:
    """Return the URL of a log, or a spec with a server's URL, without its secrets; other text is unchanged.

    A log's URL keeps its user name, for which PGPASSWORD or ~/.pgpass provides the password. A server's URL
    loses what precedes the host, and all that follows the path except the model's name, since either may
    contain a token. So URLs that differ only in their query become equal; but OpenAI's client cannot use a
    base URL with a query anyway.

    >>> without_password("postgresql://ann:word@host/db?sslmode=require")
    'postgresql://ann@host/db?sslmode=require'
    >>> without_password("judge:http://ann:word@host:8000/v1?key=word#org/model")
    'judge:http://host:8000/v1#org/model'
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    if re.search(r"(?:^|\W)https?$", scheme):
        place, mark, model = rest.partition("#")
        host, slash, path = place.partition("/")
        if not _HOST.fullmatch(host.rpartition("@")[2]):  # not a host: perhaps the password contains a slash
            host, slash, path = place.rpartition("@")[2].partition("/")
        left = f"{host.rpartition('@')[2]}{slash}{path}".partition("?")[0]
        return f"{scheme}://{left}{mark}{model}"
    rest = re.sub(r"(?i)([?&])(?:ssl)?password=[^&]*&?", r"\1", rest).rstrip("?&")
    # The last @, since a password may contain any character.
    user, at, place = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{place}"
