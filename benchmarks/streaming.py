"""Measures how long a reader of a stream waits for the first and last words, and the model calls it costs.

The model is a local server with OpenAI's wire format, called through the real client. It streams at a fixed
pace: the first token after `FIRST_S`, then `PACE` tokens a second, for app, critic and reviser alike.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from langchain_openai import ChatOpenAI

from cai_graph import constitutional
from cai_graph.constitution import load

ROUNDS = 5
PACE = 200.0
"""Tokens (words) per second: four times a usual model's, to save time; the ratios are the same."""
FIRST_S = 0.1
LENGTHS = (100, 400, 1200)
"""Numbers of words in an answer."""
SENTENCE = 12
"""Number of words in a sentence."""


class Read(NamedTuple):
    """How long a reader waited for the first text and the whole answer, and the number of model calls."""

    first_s: float
    whole_s: float
    calls: int


def answer(words: int, bad: int | None = None) -> str:
    """Return an answer of this many words; the critic flags the word at index `bad`."""
    text = [f"word{index}" for index in range(words)]
    for end in range(SENTENCE - 1, words, SENTENCE):
        text[end] += "."
    if bad is not None:
        text[bad] = "FORBIDDEN"
    return " ".join(text)


# --- the server ----------------------------------------------------------------------------------------


def reply(body: dict[str, Any], draft: str) -> str:
    """Return the model's reply: verdicts to a critic, half the draft's length to a reviser, or the draft."""
    system, last = str(body["messages"][0]["content"]), str(body["messages"][-1]["content"])
    if system.startswith("You are a careful reviewer"):
        bad = "FORBIDDEN" in last
        verdicts = [
            {
                "principle": rule.id,
                "critique": "it says what it must not" if bad and not index else "",
                "verdict": "VIOLATES" if bad and not index else "COMPLIES",
                "severity": 3,
            }
            for index, rule in enumerate(RULES)
        ]
        return json.dumps({"verdicts": verdicts, "evades": False})
    if system.startswith("You improve answers"):
        return answer(len(draft.split()) // 2)
    return draft


class Paced:
    """The server; `draft` is its reply to the app, `calls` counts the requests."""

    def __init__(self) -> None:
        self.draft, self.calls, self.url = "", 0, ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length:")[2].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            self.calls += 1
            words = reply(body, self.draft).split(" ")
            kind = "text/event-stream" if body.get("stream") else "application/json"
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode())
            if body.get("stream"):
                async for event in self._events(words):
                    writer.write(event)
                    await writer.drain()
            else:
                await asyncio.sleep(FIRST_S + len(words) / PACE)
                message = {"role": "assistant", "content": " ".join(words)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                writer.write(json.dumps(_about("chat.completion") | {"choices": [choice]}).encode())
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has disconnected
        finally:
            writer.close()

    async def _events(self, words: list[str]) -> AsyncIterator[bytes]:
        begun = time.perf_counter()
        for index, word in enumerate(words):
            due = begun + FIRST_S + index / PACE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            delta = {"role": "assistant", "content": word if index == 0 else f" {word}"}
            last = "stop" if index == len(words) - 1 else None
            choice = {"index": 0, "delta": delta, "finish_reason": last}
            event = _about("chat.completion.chunk") | {"choices": [choice]}
            yield f"data: {json.dumps(event)}\n\n".encode()
        yield b"data: [DONE]\n\n"


def _about(kind: str) -> dict[str, Any]:
    return {"id": "1", "object": kind, "created": 0, "model": "paced"}


@contextmanager
def serving() -> Iterator[Paced]:
    """Run the server in its own thread while the body of the `with` statement runs."""
    paced, loop = Paced(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started = asyncio.run_coroutine_threadsafe(asyncio.start_server(paced, "127.0.0.1", 0), loop)
    server = started.result()
    paced.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield paced
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


# --- measuring -----------------------------------------------------------------------------------------

RULES = load("balanced")


async def read(app: Any, paced: Paced) -> Read:
    """Read one stream to its end, and return the times and calls."""
    calls, begun, first = paced.calls, time.perf_counter(), 0.0
    async for chunk in app.astream("How are you?"):
        if chunk.text and not first:
            first = time.perf_counter() - begun
    return Read(first, time.perf_counter() - begun, paced.calls - calls)


async def _measured() -> list[str]:
    lines = []
    with serving() as paced:
        model = ChatOpenAI(model="paced", base_url=paced.url, api_key="unused", max_retries=0)  # type: ignore[arg-type]
        apps: dict[str, Any] = {"alone": model}
        apps |= {
            mode: constitutional(model, constitution=RULES, log=None, stream=mode)
            for mode in ("buffer", "blocks", "audit")
        }
        for app in apps.values():  # the first call builds clients and schemas
            paced.draft = answer(SENTENCE)
            await read(app, paced)
        for words in LENGTHS:
            for bad in (None, 2 * words // 3):
                paced.draft = answer(words, bad)
                runs: dict[str, list[Read]] = {name: [] for name in apps}
                for _ in range(ROUNDS):
                    for name, app in apps.items():
                        runs[name].append(await read(app, paced))
                about = "complies" if bad is None else "violates after 2/3"
                lines += [_row(words, about, name, runs) for name in apps]
    return lines


def _row(words: int, about: str, name: str, runs: dict[str, list[Read]]) -> str:
    pairs = list(zip(runs[name], runs["buffer"], strict=True))
    firsts = [own.first_s / other.first_s for own, other in pairs]
    wholes = [own.whole_s / other.whole_s for own, other in pairs]
    calls = statistics.median(own.calls for own in runs[name])
    return (
        f"| {words} | {about} | {name} | {_median(firsts)} | {_median(wholes)} | {calls:.0f} "
        f"| {statistics.median(own.first_s for own in runs[name]):.2f} |"
    )


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def run() -> str:
    """Return the section of RESULTS.md."""
    rows = asyncio.run(_measured())
    head = (
        "| words | the draft | stream | first words / buffer's | whole / buffer's | calls | first, s |\n"
        "|---|---|---|---|---|---|---|"
    )
    about = (
        "A server on the loopback behind the real OpenAI client: "
        f"first token after {FIRST_S} s, then {PACE:.0f} words a second, for app, critic and reviser. "
        f"{len(RULES)} principles, batched, no log. Ratios to `buffer` in the same round: median of {ROUNDS} "
        "interleaved rounds (lowest to highest). `alone` is the model without cai_graph. Where the draft "
        "violates, a reviser writes half its length."
    )
    return "\n\n".join(["## Streaming", about, "\n".join([head, *rows])])
