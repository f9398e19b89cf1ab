"""Addresses of logs and of servers, as they may be shown and kept."""

from __future__ import annotations

import re

__all__ = ["without_password"]

_HOST = re.compile(r"(?:[\w-]+(?:\.[\w-]+)+|localhost|\[[\da-fA-F:.]+\])(?::\d+)?")


def without_password(address: str) -> str:
    """Return a log's URL, or a spec with a server's, without what is secret in it; other text stays as it is.

    Of a log the user stays, for whom PGPASSWORD or ~/.pgpass brings the password. Of a server nothing stays
    before the host and nothing after the path but the model's name: a token may stand in either place. So no
    two servers are told apart by a query; with one, OpenAI's client would reach none of them.

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
        if not _HOST.fullmatch(host.rpartition("@")[2]):  # no address: a slash of the password, perhaps
            host, slash, path = place.rpartition("@")[2].partition("/")
        left = f"{host.rpartition('@')[2]}{slash}{path}".partition("?")[0]
        return f"{scheme}://{left}{mark}{model}"
    rest = re.sub(r"(?i)([?&])(?:ssl)?password=[^&]*&?", r"\1", rest).rstrip("?&")
    # The last @, since a password may hold one, and whatever else.
    user, at, place = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{place}"
