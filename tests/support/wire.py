"""A server on the loopback that speaks OpenAI's wire format, and Anthropic's, so that tests run real clients.

with serving(lambda body: "hello") as server:
    models.load(server.spec).invoke("hi")
    assert server.requests[0]["messages"][-1]["content"] == "hi"

Both cache the beginnings of prompts as the providers do, and say so in the usage.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import wire_anthropic
from langchain_core.messages import convert_to_messages
from replies import role_of, verdicts

from cai_graph.constitution import Constitution


@dataclass(frozen=True)
class Reply:
    """What the server answers."""

    text: str = ""
    """The assistant's text; of an error, its message."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    """Beside Content-Type and Content-Length, such as Retry-After."""
    finish: str = "stop"
    """The finish reason."""
    logprobs: Any = None
    """The `content` list of the choice's log-probabilities."""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    """What tools are called, each with `name`, `args` and `id`, as LangChain has them."""
    cut: int | None = None
    """After how many chunks the connection breaks, where the reply is streamed."""
    trouble: str | None = None
    """What the provider says instead of breaking the connection there, in an event of its own."""
    reasoning: str = ""
    """What the model thought before; a part of the content in Anthropic's format, a field in OpenAI's."""
    refusal: str | None = None
    """OpenAI's: the model's refusal to fill a schema, in place of text."""
    choices: bool = True
    """OpenAI's: whether there is a choice at all."""


Script = Callable[[dict[str, Any]], "str | Reply"]
"""From a request's body to its reply. Runs in the request's own thread, so it may wait."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the 5 that is usual, calls at once find their connections reset


class Server:
    """A running server."""

    def __init__(self, script: Script, *, keep_alive: bool = False) -> None:
        self.keep_alive = keep_alive
        self.requests: list[dict[str, Any]] = []
        """The bodies received so far."""
        self.script = script
        """What answers from now on."""
        self._cached: set[str] = set()
        self._http = _Listener(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    @property
    def spec(self) -> str:
        return f"{self.url}#model"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _shared(self, body: Mapping[str, Any]) -> int:
        """How many words of a prompt's beginning came in an earlier one, as OpenAI caches by itself."""
        words, most = _words(body), 0
        for earlier in self.requests[:-1]:
            for count, (one, other) in enumerate(zip(words, _words(earlier), strict=False)):
                if one != other:
                    most = max(most, count)
                    break
        return most

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 5

            def do_GET(self) -> None:
                self._send(200, {"object": "list", "data": [{"id": "model", "object": "model"}]}, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                said = server.script(body)
                reply = Reply(said) if isinstance(said, str) else said
                if self.path.endswith("/messages"):
                    self._anthropic(body, reply)
                elif reply.status != 200:
                    self._send(reply.status, {"error": {"message": reply.text}}, reply.headers)
                elif body.get("stream"):
                    lines = [f"data: {json.dumps(chunk)}" for chunk in _chunks(body, reply)]
                    self._stream([*lines, "data: [DONE]"], reply)
                else:
                    answer = _completion(body, reply)
                    answer["usage"]["prompt_tokens_details"] = {"cached_tokens": server._shared(body)}
                    self._send(200, answer, reply.headers)

            def _anthropic(self, body: dict[str, Any], reply: Reply) -> None:
                if reply.status != 200:
                    self._send(reply.status, wire_anthropic.error(reply.status, reply.text), reply.headers)
                elif body.get("stream"):
                    events = wire_anthropic.events(body, reply, server._cached)
                    lines = [f"event: {event['type']}\ndata: {json.dumps(event)}" for event in events]
                    self._stream(lines, reply)
                else:
                    self._send(200, wire_anthropic.message(body, reply, server._cached), reply.headers)

            def _stream(self, lines: Sequence[str], reply: Reply) -> None:
                try:
                    self.send_response(200)
                    for name, value in {"Content-Type": "text/event-stream", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Transfer-Encoding", "chunked")
                    if not server.keep_alive:
                        self.send_header("Connection", "close")
                    self.end_headers()
                    for number, line in enumerate(lines):
                        if number == reply.cut and reply.trouble is not None:
                            error = wire_anthropic.error(529, reply.trouble)
                            named = "event: error\n" if line.startswith("event:") else ""
                            self._write(f"{named}data: {json.dumps(error)}\n\n")
                            break
                        if number == reply.cut:
                            self.close_connection = True  # amid the encoding: the client sees a broken line
                            return
                        self._write(f"{line}\n\n")
                    self.wfile.write(b"0\r\n\r\n")
                except OSError:
                    self.close_connection = True  # the client went away, which some tests do

            def _write(self, text: str) -> None:
                data = text.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

            def _send(self, status: int, content: object, headers: Mapping[str, str]) -> None:
                data = json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    if not server.keep_alive:
                        # The client keeps its pool for ever, and would warn of what outlives its event loop.
                        self.send_header("Connection", "close")
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # the client was killed, which some tests do

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def _words(body: Mapping[str, Any]) -> list[str]:
    return " ".join(str(message.get("content")) for message in body["messages"]).split()


def _completion(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.refusal is not None:
        message |= {"content": None, "refusal": reply.refusal}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [_call(call) for call in reply.tool_calls]
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": _finish(reply),
        "logprobs": None if reply.logprobs is None else {"content": reply.logprobs},
    }
    return {
        **_head(body, "chat.completion"),
        "choices": [choice] if reply.choices else [],
        "usage": _usage(body, reply),
    }


def _chunks(body: Mapping[str, Any], reply: Reply) -> Iterator[dict[str, Any]]:
    """The reply word by word, arguments of tools in halves; the usage last, where it is asked for."""

    def chunk(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return {**_head(body, "chat.completion.chunk"), "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    for word in re.findall(r"\s*\S+|\s+$", reply.text):
        yield chunk({"content": word})
    for index, call in enumerate(map(_call, reply.tool_calls)):
        said = call["function"]["arguments"]
        half = len(said) // 2
        first = {**call["function"], "arguments": said[:half]}
        yield chunk({"tool_calls": [{**call, "index": index, "function": first}]})
        yield chunk({"tool_calls": [{"index": index, "function": {"arguments": said[half:]}}]})
    told = None if reply.logprobs is None else {"content": reply.logprobs}
    yield chunk({}, _finish(reply), told)
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**_head(body, "chat.completion.chunk"), "choices": [], "usage": _usage(body, reply)}


def _head(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "completion", "object": kind, "created": 0, "model": body["model"]}


def _finish(reply: Reply) -> str:
    return "tool_calls" if reply.tool_calls and reply.finish == "stop" else reply.finish


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["args"])}
    return {"id": call["id"], "type": "function", "function": function}


def _usage(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    asked = sum(len(str(message.get("content")).split()) for message in body["messages"])
    written = len(reply.text.split()) + sum(len(str(call["args"]).split()) for call in reply.tool_calls)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


@contextmanager
def serving(script: Script, *, keep_alive: bool = False) -> Iterator[Server]:
    """Run a server for the body's time; `keep_alive`: connections stay open, as a provider's do."""
    server = Server(script, keep_alive=keep_alive)
    try:
        yield server
    finally:
        server.close()


def role(body: Mapping[str, Any]) -> str:
    """Return what a request asks for: draft, critique or revise."""
    return role_of(convert_to_messages(wire_anthropic.conversation(body)))


def under(
    constitution: Constitution,
    *,
    draft: Callable[[str], str | Reply] = lambda prompt: f"answer to {prompt}",
    violates: Callable[[str], bool] = lambda shown: False,
    revise: str = "a better answer",
) -> Script:
    """Return the script of a model that drafts, judges and revises under a constitution.

    `violates` says of what a critic is shown whether it violates the first principle.
    """
    ids = tuple(principle.id for principle in constitution)

    def script(body: dict[str, Any]) -> str | Reply:
        last = str(wire_anthropic.conversation(body)[-1]["content"])
        match role(body):
            case "critique":
                return verdicts(*(ids[:1] if violates(last) else ()), ids=ids)
            case "revise":
                return revise
            case _:
                return draft(last)

    return script
