"""Addresses of logs and of servers, as they may be shown and kept."""

from __future__ import annotations

import re

__all__ = ["without_password"]


def without_password(address: str) -> str:
    """Return a log's URL, or a spec with a server's, without what is secret in it; other text stays as it is.

    Of a log the user stays, for whom PGPASSWORD or ~/.pgpass brings the password. Of a server nothing stays
    before the host and nothing after the path but the model's name: a token may stand in either place.

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
        return f"{scheme}://{place.rpartition('@')[2].partition('?')[0]}{mark}{model}"
    rest = re.sub(r"(?i)([?&])(?:ssl)?password=[^&]*&?", r"\1", rest).rstrip("?&")
    # The last @, since a password may hold one, and whatever else.
    user, at, place = rest.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{place}"
