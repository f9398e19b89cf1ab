"""Which parts of a message's content speak, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from cai_graph.messages import from_langchain
from cai_graph.trajectory import shown_of, text_of


def test_a_message_says_its_text_first_and_then_the_words_of_its_other_parts() -> None:
    message = AIMessage(
        [
            {"type": "executable_code", "executable_code": "1+1", "language": "python"},
            {"type": "text", "text": "Two"},
            {"type": "thinking", "thinking": "I am sure", "signature": "c2ln"},
            "!",
            {"type": "output_audio", "transcript": "Yes, two", "data": "aGVsbG8="},
            {"type": "non_standard", "value": {"type": "invalid_tool_call", "name": "add", "args": "[1"}},
        ]
    )

    assert shown_of(message) == "Two!"
    assert text_of(message) == text_of(from_langchain(message)) == "Two!\n1+1\nYes, two\n[1"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "base64": "aGVs\nbG8=", "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}},
        {"type": "input_audio", "input_audio": {"data": "aGVsbG8=", "format": "wav"}},
        {"type": "file", "file": {"filename": "plan.pdf", "file_data": "aGVsbG8="}},
        {"type": "tool_use", "id": "c1", "name": "look", "input": {"query": "a question"}},
        {"type": "non_standard", "value": {"type": "redacted_thinking", "data": "a b"}},
        {"type": "non_standard", "value": "a string"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "look", "input": "some words"},
        {"type": "server_tool_use", "id": "s1", "name": "web_fetch", "input": {"url": "the page"}},
        {"type": "web_fetch_tool_result", "content": {"source": {"type": "text", "data": "a page"}}},
        {"type": "mcp_tool_result", "content": [{"type": "text", "text": "what it found"}]},
        {"type": "web_search_call", "action": {"type": "search", "query": "what now"}},
        {"type": "file_search_call", "queries": ["what now"], "results": [{"text": "a page"}]},
        {"type": "code_interpreter_call", "code": "print(1, 2)", "outputs": [{"logs": "1 2"}]},
        {"type": "code_execution_result", "code_execution_result": "1 2"},
        {"type": "server_tool_result", "output": "1 2"},
    ],
)
def test_a_part_without_words_says_nothing(part: dict[str, Any]) -> None:
    assert text_of(HumanMessage([{"type": "text", "text": "Look."}, part])) == "Look."
