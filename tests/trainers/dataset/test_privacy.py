"""Personal data and secrets are known by their form, whatever stands around them."""

from __future__ import annotations

import json

import pytest

from trainers.dataset.privacy import personal


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("write to jo.doe+x@mail.corp.co.uk now", "email address"),
        ("call +49 30 901820 please", "phone number"),
        ("call (415) 555-2671", "phone number"),
        ("call (415)555-2671 9am to 5pm", "phone number"),
        ("call 415-555-2671 24/7", "phone number"),
        ("call 1-800-555-1234.", "phone number"),
        ("1. 415-555-2671", "phone number"),
        ("+1 415 555 2671 415 555 2672", "phone number"),
        ("call 415 555 2671 9am to 5pm, 24/7", "phone number"),
        ("call 415 555 2671 24/7", "phone number"),
        ("call 1 415 555 2671, or 415 555-2672", "phone number"),
        ("4111 1111 1111 1111", "card number"),
        ("my card is 4111 1111 1111 1111 12/25", "card number"),
        ("4111-1111-1111-1111 123", "card number"),
        ("4111111111111111 05/27", "card number"),
        ("3782 822463 10005", "card number"),
        ("6200 0000 0000 0000 000", "card number"),
        ("DE89 3704 0044 0532 0130 00", "bank account"),
        ("AT61 1904 3002 3457 3201 ASAP", "bank account"),
        ("078-05-1120", "social security number"),
        ("SSN 078-05-1120 1980-01-01", "social security number"),
        ("key sk-proj-abcdefghijklmnopqrstuvwx", "secret"),
        ("hf_" + "aB" * 17, "secret"),
        ("github_pat_11ABCDEFG0abcdefghijkl_abcdefghij", "secret"),
        ("sk_live_51Habcdefghijklmnop", "secret"),
        ("ASIAIOSFODNN7EXAMPLE", "secret"),
        ("glpat-abcdefghij0123456789", "secret"),
        *((f"gh{kind}_" + "a1" * 18, "secret") for kind in "pousr"),
        ("rk_live_51Habcdefghijklmnop", "secret"),
        ("xoxb-1234567890-abcdefghij", "secret"),
        ("AIzaSyA-abcdefghijklmnopqrstuvwxyz_0123", "secret"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghijk", "secret"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret"),
        ("jo@example.com or jo@mail.example.org", None),
        ("jo@testfabrik.de", "email address"),  # begins as a reserved name does
        ("jo@example.com.corp.de", "email address"),
        ("between 1914-1918 and 1939-1945", None),
        ("4111 1111 1111 1112", None),
        ("pi is 3.14159265358979, e is 2.718281828", None),
        ("on 2024-11-05 at 12:30:45", None),
        ("ISBN 978-3-16-148410-0", None),
        ("@everyone, see §4", None),
        ("order 12345678-4111111111111111", None),
        ("weights 6.99097932346268003 and 4.111111111111111", None),
        ("version 415.555.2671.3 of 2024.11.05.1200", None),
        ("sizes 100 200 300 4000 and 500", None),
        ("255 255 2550 128", None),
        ("from 20 300 400 5000", None),
        ("price 100 200 3000 USD", None),
        ("from hf_hub import eyJ, sk_live, glpat", None),
    ],
)
def test_personal_data_is_known_by_its_form(text: str, form: str | None) -> None:
    assert personal(text.encode()) == form


@pytest.mark.parametrize("before", ["\n", "\t", "\r\n", '"', "\\", "\x1f"])
@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("jo.doe@corp.co.uk", "email address"),
        ("jo@example.com", None),
        ("555-123-4567", "phone number"),
        ("+49 30 901820", "phone number"),
        ("4111 1111 1111 1111", "card number"),
        ("DE89370400440532013000", "bank account"),
        ("078-05-1120", "social security number"),
        ("sk-abcdefghijklmnopqrstuvwx123", "secret"),
        ("AKIAIOSFODNN7EXAMPLE", "secret"),
        ("ghp_" + "a1" * 18, "secret"),
    ],
)
def test_personal_data_is_known_at_the_start_of_a_line_of_json(
    before: str, text: str, form: str | None
) -> None:
    assert personal(json.dumps({"content": f"mine{before}{text}{before}BERLIN"}).encode()) == form


@pytest.mark.parametrize("part", ["1", "1234 ", "+1 ", "AB12 ", "sk-a.", "(123) ", "1 .", "a."])
def test_a_long_text_is_read_in_time_that_grows_with_its_length(part: str) -> None:
    """Would take hours if each place in it were tried with each length, and pytest's limit ends the test."""
    assert personal((part * (200_000 // len(part)) + "@").encode()) is None
