"""Model specs and names: every form, every way to get one wrong; servers are real ones on the loopback."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda

from cai_graph import local, models
from cai_graph.errors import CaiError, ConfigError, ModelError


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
            if not self.path.endswith("/v1/models"):
                self.send_error(404)
                return
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


@pytest.mark.parametrize("spec", ["http://", "https:///v1", "http://#qwen", "http://ann:s3cret@:8000/v1"])
def test_address_without_a_host_names_no_server(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"names no server; write http://HOST:PORT/v1") as caught:
        models.load(spec)
    assert "s3cret" not in str(caught.value)


def test_server_that_dribbles_its_reply_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_LISTED_WITHIN_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def dribble() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK":
                    connection.send(bytes([byte]))
                    time.sleep(0.04)

        thread = threading.Thread(target=dribble)
        thread.start()
        with pytest.raises(ModelError, match=r"/v1/models: no whole reply within 0\.1 s; is it running\?"):
            models.load(f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
        thread.join()


def test_errors_of_a_server_do_not_show_its_password(serve: Callable[..., str]) -> None:
    here = serve("a").removeprefix("http://")
    for spec, said in (
        (f"http://ann:s3cret@{here}/none?key=s3cret", rf"http://{here}/none/models: status 404"),
        ("http://ann:s3cret@127.0.0.1:1/v1", r"http://127\.0\.0\.1:1/v1/models: "),
        ("http://ann:s3/cret@host/v1", r"http://host/v1/models: no valid address"),
        ("htp://ann:s3cret@host/v1", r"'htp://ann@host/v1' names no model"),
    ):
        with pytest.raises(CaiError, match=said) as caught:
            models.load(spec)
        assert "s3" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("spec", "name", "model"),
    [
        ("local", "", "qwen2.5-1.5b"),
        ("local:smollm2", "smollm2", "smollm2"),
        ("local:runs/sft", "runs/sft", None),
        ("local:", None, None),
        ("smollm2", None, None),
        ("openai:local", None, None),
    ],
)
def test_a_spec_says_which_local_model_it_names(spec: str, name: str | None, model: str | None) -> None:
    assert local.name_in(spec) == name
    assert local.model_of(spec) is (None if model is None else local.find(model))


def test_a_patient_model_asks_an_api_again_and_gives_a_seed_to_the_embedded_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    api: Any = models.patient("openai:gpt-5-mini", seed=7, max_tokens=None)
    assert (api.max_retries, api.seed, api.max_tokens) == (8, None, None)
    embedded: Any = models.patient("local", seed=7, max_tokens=None)
    assert (embedded.max_retries, embedded.seed, embedded.max_tokens) == (0, 7, 1024)
