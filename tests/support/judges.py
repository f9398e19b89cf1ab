"""What judges reply: which answer they prefer, or which rating they give, and how surely."""

from __future__ import annotations

import math
from typing import Any

from wire import Reply


def top(**probabilities: float) -> list[dict[str, Any]]:
    """Tokens and their log-probabilities, as providers list them."""
    return [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]


def letter(p_first_shown: float, *before: str) -> Reply:
    """The reply of a model that gives the first label this probability, after some other tokens."""
    shown = top(A=p_first_shown, B=1 - p_first_shown)
    tokens = [{"token": token, "logprob": 0, "bytes": None, "top_logprobs": []} for token in before]
    return Reply("A", logprobs=[*tokens, {"token": "A", "logprob": 0, "bytes": None, "top_logprobs": shown}])


def first_shown(body: dict[str, Any]) -> str:
    """The text of the answer that a request shows first."""
    text = next(str(m["content"]) for m in body["messages"] if m["role"] == "user")
    return text.partition('<answer name="A">\n')[2].partition("\n</answer>")[0]


def prefers_revisions(body: dict[str, Any]) -> Reply:
    return letter(0.8 if first_shown(body).startswith("revised") else 0.2)


def rated(rating: str) -> Reply:
    top = [{"token": rating, "logprob": 0.0}]
    return Reply(rating, logprobs=[{"token": rating, "logprob": 0, "bytes": None, "top_logprobs": top}])
