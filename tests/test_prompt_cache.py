"""Prompts are laid out for prefix caches, and what the providers read from theirs is recorded.

Over the real clients of OpenAI and Anthropic; the server keeps prefixes as the providers do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from replies import RULES, principle
from wire import Server, role, serving, under

from cai_graph import constitutional, models
from cai_graph.chain import ConstitutionalChatModel
from cai_graph.constitution import Constitution, load
from cai_graph.trajectory import Call

OTHER = Constitution(
    name="other", principles=(principle("be-brief", "helpful"), principle("be-calm", "honest"))
)


def openai(server: Server) -> BaseChatModel:
    return models.load(server.spec, max_retries=0)


def anthropic(server: Server) -> BaseChatModel:
    return ChatAnthropic(
        model_name="claude-sonnet-5",
        api_key="unused",
        base_url=server.url.removesuffix("/v1"),
        max_retries=0,
    )


Provider = Callable[[Server], BaseChatModel]
PROVIDERS: tuple[Provider, ...] = (openai, anthropic)


def guard(model: BaseChatModel, constitution: Constitution = RULES) -> ConstitutionalChatModel:
    return constitutional(model, constitution=constitution, log=None)


def prompt_bytes(body: Mapping[str, Any]) -> bytes:
    """What a provider's cache sees of a request, in its order: tools or form, system, messages."""
    form = {key: body[key] for key in ("tools", "output_config", "response_format") if key in body}
    return json.dumps([form, body.get("system"), body["messages"]]).encode()


def critiques(server: Server) -> list[bytes]:
    return [prompt_bytes(body) for body in server.requests if role(body) == "critique"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_requests_share_the_same_bytes_up_to_the_conversation(provider: Provider) -> None:
    with serving(under(RULES)) as server:
        guarded = guard(provider(server))
        guarded.invoke("What is a good tea?")
        guarded.invoke("And a good, strong coffee for the morning?")

    one, other = critiques(server)
    static = one.index(b"<conversation>")
    assert one != other
    assert one[:static] == other[:static]
    assert RULES.principles[-1].critique_request.encode() in one[:static]
    assert b"Reply with one JSON object" in one[:static]
    # Then the conversation, and the answer last.
    assert one.index(b"What is a good tea?") < one.index(b"<answer>")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_two_answers_in_one_conversation_share_it_too(provider: Provider) -> None:
    with serving(under(RULES, violates=lambda shown: "<answer>\nanswer to" in shown)) as server:
        guard(provider(server)).invoke("What is a good tea?")

    draft, revision = critiques(server)
    shared = draft.index(b"<answer>")
    assert b"What is a good tea?" in draft[:shared]
    assert draft[:shared] == revision[:shared]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_requests_under_two_constitutions_share_no_prefix_up_to_the_conversation(provider: Provider) -> None:
    def script(body: dict[str, Any]) -> Any:
        return under(OTHER if "be-brief" in json.dumps(body) else RULES)(body)

    with serving(script) as server:
        for constitution in (RULES, OTHER):
            guard(provider(server), constitution).batch(["tea?", "coffee?"])

    found = critiques(server)
    ours = {prompt[: prompt.index(b"<conversation>")] for prompt in found}
    assert len(found) == 4
    assert len(ours) == 2


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_what_was_read_from_the_cache_is_recorded_in_each_call(provider: Provider) -> None:
    balanced = load("balanced")
    with serving(under(balanced)) as server:
        guarded = guard(provider(server), balanced)
        calls: list[dict[str, Call]] = []
        for asked in ("What is a good tea?", "And a strong coffee?"):
            answered = await guarded.answered(asked)
            calls.append({call.role: call for call in answered.trajectory.calls})

    first, second = (made["critique"] for made in calls)
    assert first.cached_input_tokens == 0
    assert second.cached_input_tokens is not None
    assert second.input_tokens is not None
    # All but the exchange: the constitution and the instructions are more than nine tenths of it.
    assert 0.9 * second.input_tokens < second.cached_input_tokens < second.input_tokens


def test_cache_control_stands_on_the_static_part_for_anthropic_alone() -> None:
    with serving(under(RULES, violates=lambda shown: "<answer>\nanswer to" in shown)) as server:
        for provider in PROVIDERS:
            guard(provider(server)).invoke("What is a good tea?")

    marked = [body for body in server.requests if "cache_control" in json.dumps(body)]
    assert [role(body) for body in marked] == ["critique", "critique"]
    for body in marked:
        (part,) = body["system"]
        assert part["cache_control"] == {"type": "ephemeral"}
        assert part["text"].startswith("You are a careful reviewer")
        assert "cache_control" not in json.dumps(body["messages"])
