"""The page on streaming: its blocks run as they stand, and its server streams what it says."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.messages import convert_to_messages
from replies import answer_in, role_of, verdicts
from repository import fenced, read_page
from wire import serving

from cai_graph.constitution import load
from cai_graph.log import open_log

PAGE = read_page("streaming.md")
FIRST = "Hold the knife at about twenty degrees to the stone, and keep that angle all the way along the edge."
DRAFT = f"{FIRST} Then test the edge by pulling it over your tongue. It should cut."
MENDED = "Then test the edge on a sheet of paper."


def model(body: dict[str, Any]) -> str:
    messages = convert_to_messages(body["messages"])
    match role_of(messages):
        case "critique":
            rules = [principle.id for principle in load("balanced")]
            return verdicts(*(rules[:1] if "tongue" in answer_in(messages) else ()), ids=rules)
        case "revise":
            return MENDED
        case _:
            return DRAFT


async def test_the_blocks_of_the_page_run_and_show_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = fenced(PAGE, "python")
    with serving(model) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "unused")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for block in blocks:
            await asyncio.to_thread(exec, block, names)
        transport = httpx.ASGITransport(app=names["server"])
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            streamed = (await client.get("/ask", params={"question": "How do I sharpen a knife?"})).text

    answer = f"{FIRST} {MENDED}"
    assert capsys.readouterr().out == 2 * answer
    events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", streamed)
    assert "".join(json.loads(data) for name, data in events if name == "text") == answer
    assert [json.loads(data) for name, data in events if name == "step"][:2] == ["drafting", "critiquing"]
    assert events[-1] == ("end", "null")
    assert "tongue" not in streamed
    with open_log("sqlite:///cai.db") as log:
        released = [record.released.content for record in log.read(kind="trajectory")]  # type: ignore[union-attr]
    assert released == [answer] * 3
