"""Model specs and names: every form, every way to get one wrong; servers are real ones on the loopback."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda

from cai_graph import local, models
from cai_graph.errors import ConfigError, ModelError


@contextmanager
def _serving(names: list[str], asked: list[tuple[str, str | None]]) -> Iterator[str]:
    """An OpenAI-compatible server with these models; notes path and key of each request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, body: Any) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply({"object": "list", "data": [{"id": name} for name in names]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            message = {"role": "assistant", "content": "hello"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply({"id": "1", "object": "chat.completion", "model": names[0], "choices": [choice]})

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def asked() -> list[tuple[str, str | None]]:
    return []


@pytest.fixture
def serve(asked: list[tuple[str, str | None]]) -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:
        yield lambda *names: stack.enter_context(_serving(list(names), asked))


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("opnai:gpt-5", "'openai:gpt-5'"),
        ("smollm2", "'local:smollm2'"),
        ("locl", "'local'"),
        ("", "The forms are"),
        ("local:", "The forms are"),
        ("openai:", "The forms are"),
        ("gpt-5-mini", "The forms are"),
        ("nonsense:x", "The forms are"),
    ],
)
def test_spec_of_no_form_is_refused_with_the_forms_and_near_names(spec: str, near: str) -> None:
    with pytest.raises(ConfigError, match="names no model") as caught:
        models.load(spec)
    assert near in str(caught.value)
    assert "local:PATH.gguf" in str(caught.value)


def test_local_name_that_is_unknown_lists_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'smollm2'\?"):
        models.load("local:smollm")


@pytest.mark.parametrize(
    ("spec", "variable"),
    [("openai:gpt-5-mini", "OPENAI_API_KEY"), ("anthropic:claude-sonnet-5", "ANTHROPIC_API_KEY")],
)
def test_missing_key_names_the_variable_and_a_given_one_is_enough(
    spec: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=f"{spec}.*set the environment variable {variable}"):
        models.load(spec)
    monkeypatch.setenv(variable, "key")
    assert models.name_of(models.load(spec, temperature=0)) == spec
    monkeypatch.delenv(variable)
    assert models.name_of(models.load(spec, api_key="key")) == spec


def test_provider_that_is_not_installed_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match="pip install langchain-groq"):
        models.load("groq:llama")


def test_server_with_one_model_needs_no_name(serve: Callable[..., str], asked: list[Any]) -> None:
    url = serve("qwen-7b")
    model = models.load(url)
    assert model.invoke("hi").content == "hello"
    assert models.name_of(model) == f"{url}#qwen-7b"
    assert [path for path, _ in asked] == ["/v1/models", "/v1/chat/completions"]


def test_named_model_is_not_asked_for(serve: Callable[..., str], asked: list[Any]) -> None:
    url = serve("a", "b")
    assert models.name_of(models.load(f"{url}/#b")) == f"{url}#b"
    assert asked == []


def test_server_with_several_models_lists_them(serve: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"serves 2 models \(a, b\); choose one: .*#MODEL"):
        models.load(serve("a", "b"))


def test_server_that_is_not_there_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"cannot learn which model http://127.0.0.1:9/v1 serves"):
        models.load("http://127.0.0.1:9/v1")


def test_key_of_openai_goes_to_another_server_only_if_tied_to_it(
    serve: Callable[..., str], asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve("a")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    models.load(url).invoke("hi")
    assert {key for _, key in asked} == {"Bearer none"}
    asked.clear()
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    models.load(url).invoke("hi")
    assert {key for _, key in asked} == {"Bearer sk-secret"}


def test_names_are_stable_and_hide_folders_and_credentials() -> None:
    assert models.name_of(models.load("local")) == "local:qwen2.5-1.5b"
    assert models.name_of(models.load("local:smollm2").bind(stop=["x"]).with_retry()) == "local:smollm2"
    assert models.name_of(models.load("http://user:word@host:1/v1#m")) == "http://host:1/v1#m"


def test_anything_has_a_name() -> None:
    class Broken(FakeListChatModel):
        def _get_ls_params(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError

    assert models.name_of(FakeListChatModel(responses=["a"])) == "FakeListChatModel"
    assert models.name_of(Broken(responses=["a"])) == "Broken"
    assert models.name_of(RunnableLambda(len)) == "RunnableLambda"
    assert models.name_of(None) == "NoneType"


@pytest.mark.parametrize(("name", "found"), [("local", "qwen2.5-1.5b"), ("local:smollm2", "smollm2")])
def test_the_catalogue_is_asked_by_spec_too(name: str, found: str) -> None:
    assert local.find(name) is local.find(found)
