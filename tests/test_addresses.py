"""What may be shown and kept of the addresses of logs and servers."""

from __future__ import annotations

import pytest

from cai_graph.addresses import without_password


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://t0ken@host/v1", "https://host/v1"),
        ("http://ann:w@rd/x@host:1/v1?key=word#@cf/model", "http://host:1/v1#@cf/model"),
        ("https://gw.example:8443/account/@cf/v1#m", "https://gw.example:8443/account/@cf/v1#m"),
        ("https://t0ken@gw.example/@cf/v1?key=word", "https://gw.example/@cf/v1"),
        ("--critic=http://ann:word@host/v1#m", "--critic=http://host/v1#m"),
        ("--log=postgresql+psycopg://ann:word@host/db", "--log=postgresql+psycopg://ann@host/db"),
        ("postgres://ann@host/db?sslpassword=word", "postgres://ann@host/db"),
        ("openai:gpt-5-mini", "openai:gpt-5-mini"),
        ("http://host:1/v1#org/model", "http://host:1/v1#org/model"),
        ("How? Ask ann@host.", "How? Ask ann@host."),
    ],
)
def test_nothing_secret_stays_in_an_address(address: str, shown: str) -> None:
    assert without_password(address) == shown
