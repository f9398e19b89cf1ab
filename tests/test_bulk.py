"""Reading rows, and the run of many; the model behind is a real server on the loopback."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from wire import Reply, Server, role, serving, under

from cai_graph import atomic, bulk, constitutional, models, open_log
from cai_graph.bulk import Broken, Failed, Prompt, Rows, Run
from cai_graph.calls import UNATTENDED_SECONDS, Calls
from cai_graph.cli.run import _own_weights
from cai_graph.constitution import Constitution, load
from cai_graph.errors import ConfigError, DataError, LogError
from cai_graph.prompts import Exchange
from cai_graph.trajectory import Critique, Outcome, Trajectory

BALANCED = load("balanced")


def prompts(path: Path, column: str | None = None) -> list[Prompt | Broken]:
    with closing(Rows(str(path))) as rows:
        return list(rows.prompts(column))


def texts(found: list[Prompt | Broken]) -> list[str | None]:
    return [row.messages[-1].text if isinstance(row, Prompt) else None for row in found]


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


# --- reading ------------------------------------------------------------------------------------------


def test_text_is_one_prompt_a_line_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    found = prompts(file(tmp_path, "p.txt", "\ufeffone\r\n\n  \ntwo"))
    assert texts(found) == ["one", "two"]
    assert [(row.index, row.line) for row in found] == [(0, 1), (1, 4)]


def test_csv_keeps_line_ends_inside_quotes_and_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = file(tmp_path, "p.csv", '\ufeffprompt,kind\r\n"one\nline, two",a\r\n"say ""hi""",b\r\n')
    found = prompts(path)
    assert texts(found) == ["one\nline, two", 'say "hi"']
    assert [row.line for row in found] == [2, 4]
    assert isinstance(found[0], Prompt)
    assert found[0].metadata == {"kind": "a"}


def test_csv_with_one_column_needs_no_name_and_with_several_the_error_lists_them(tmp_path: Path) -> None:
    assert texts(prompts(file(tmp_path, "one.csv", "ask\nhello\n"))) == ["hello"]
    path = file(tmp_path, "two.csv", "a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no column 'prompt': the file has the columns 'a', 'b'"):
        prompts(path)
    assert texts(prompts(path, "b")) == ["2"]


def test_csv_rows_that_do_not_fit_are_broken_and_the_others_are_read(tmp_path: Path) -> None:
    content = b"a,prompt\n1,one\n2\n3,\xff\xfe\n4,four,more\n5,five\n6,  \n"
    found = prompts(file(tmp_path, "p.csv", content))
    assert texts(found) == ["one", None, None, None, "five", None]
    whys = [row.why for row in found if isinstance(row, Broken)]
    assert [row.line for row in found if isinstance(row, Broken)] == [3, 4, 5, 7]
    assert whys[0].startswith("1 fields, and the header has 2")
    assert whys[1].startswith("not UTF-8")
    assert whys[3] == "'prompt' is empty"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_rows_behind_a_quote_that_never_closes_are_read(tmp_path: Path, end: str) -> None:
    rows = ["kind,prompt", "a,fine", 'b,"open', "c,and", 'd,"so ""it""" ', 'e,"two', 'lines"', "f,on"]
    found = prompts(file(tmp_path, "p.csv", end.join(rows) + end))
    assert texts(found) == ["fine", None, "and", None, f"two{end}lines", "on"]
    assert [row.line for row in found] == [2, 3, 4, 5, 6, 8]
    whys = [row.why for row in found if isinstance(row, Broken)]
    assert whys[0].startswith("not CSV: ',' expected after '\"', in line 5; is a quote of line 3 not closed?")
    found = prompts(file(tmp_path, "q.csv", f'kind,prompt{end}a,"open{end}b,on'))
    assert texts(found) == [None, "on"]


def test_csv_with_a_column_twice_is_an_error_and_one_without_a_name_is_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the header names the column 'prompt' twice"):
        prompts(file(tmp_path, "p.csv", "prompt,prompt\n1,2\n"))
    with pytest.raises(DataError, match="the header names the column 'kind' twice"):
        prompts(file(tmp_path, "p.csv", "kind,prompt,kind\n1,2,3\n"))
    (row,) = prompts(file(tmp_path, "q.csv", ",prompt,,kind\n0,hello,1,a\n"))
    assert isinstance(row, Prompt)
    assert row.metadata == {"kind": "a"}


def test_csv_of_bare_carriage_returns_is_read(tmp_path: Path) -> None:
    found = prompts(file(tmp_path, "p.csv", 'prompt,kind\rone,a\r"two\rlines",b\r'))
    assert texts(found) == ["one", "two\rlines"]
    assert [row.line for row in found] == [2, 3]


def test_csv_whose_header_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the header in line 1 is not CSV: unexpected end of data"):
        prompts(file(tmp_path, "p.csv", '"prompt\nhello\n'))


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt"])
@pytest.mark.parametrize("mark", ["\ufeff".encode("utf-16-le"), "\ufeff".encode("utf-16-be")])
def test_a_file_that_begins_with_a_mark_of_utf_16_is_refused_once(
    tmp_path: Path, name: str, mark: bytes
) -> None:
    path = file(tmp_path, name, mark + '"prompt"\n"one"\n"two"'.encode("utf-16-le"))
    with closing(Rows(str(path))) as rows:
        for read in (rows.check, lambda: list(rows.prompts())):
            with pytest.raises(DataError, match=r"p\..* is written in UTF-16; save the file as UTF-8"):
                read()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_no_line_of_jsonl_is_guessed_to_be_of_another_encoding(tmp_path: Path, encoding: str) -> None:
    lines = "".join(f'{{"prompt": "{number}"}}\n' for number in range(3))
    found = prompts(file(tmp_path, "p.jsonl", lines.encode(encoding)))
    assert found
    assert all(isinstance(row, Broken) for row in found)


def test_jsonl_rows_are_objects_or_strings_and_what_is_broken_is_said(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "one", "id": 7, "tags": ["x"]}',
        '"two"',
        "{not json",
        "[1]",
        '{"question": "three"}',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "four"}]}',
        '{"messages": []}',
        '{"messages": [{"rolle": "user"}]}',
        "[" * 100_000,
    ]
    found = prompts(file(tmp_path, "p.jsonl", "\n".join(lines)))
    assert texts(found) == ["one", "two", None, None, None, "four", None, None, None]
    assert isinstance(found[0], Prompt)
    assert found[0].metadata == {"id": 7}
    whys = [row.why for row in found if isinstance(row, Broken)]
    assert whys[2] == "no 'prompt' among the keys 'question'; say where the prompt is with --column"


def test_a_key_that_is_null_is_absent(tmp_path: Path) -> None:
    asked = '{"role": "user", "content": "q"}'
    found = prompts(
        file(
            tmp_path,
            "p.jsonl",
            f'{{"prompt": "one", "messages": null}}\n{{"messages": [{asked}], "prompt": null}}',
        )
    )
    assert texts(found) == ["one", "q"]
    lines = [
        f'{{"messages": [{asked}, {{"role": "assistant", "content": "a"}}], "response": null}}',
        '{"prompt": "q", "response": "a", "messages": null, "id": null}',
    ]
    with closing(Rows(str(file(tmp_path, "a.jsonl", "\n".join(lines))))) as rows:
        answers = list(rows.answers())
    assert [row.id for row in answers if isinstance(row, bulk.Answer)] == [0, 1]


def test_messages_that_ask_nothing_are_broken(tmp_path: Path) -> None:
    system, user, empty, image, answer = (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "q"},
        {"role": "user", "content": " "},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "assistant", "content": "a"},
    )
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "t", "args": {}, "id": "1"}]}
    tool = {"role": "tool", "content": "found", "tool_call_id": "1"}
    asked = [[user, answer], [system], [empty], [user, answer, empty]]
    sound = [[system, user], [user, answer, user], [image], [user, called, tool]]
    lines = "\n".join(json.dumps({"messages": messages}) for messages in asked + sound)
    found = prompts(file(tmp_path, "p.jsonl", lines))
    assert [row.why if isinstance(row, Broken) else None for row in found] == [
        "'messages' end in an answer; `cai judge` judges it, or leave it out to have another one written",
        "'messages' hold no message of the role 'user'",
        "the last message of the role 'user' in 'messages' is empty",
        "the last message of the role 'user' in 'messages' is empty",
        *[None] * 4,
    ]


def test_jsonl_with_a_lone_surrogate_is_read_as_it_stands(tmp_path: Path) -> None:
    path = file(tmp_path, "p.jsonl", '{"prompt": "cut \\ud83d"}\n{"prompt": "raw \ud83d"}\n')
    assert texts(prompts(path)) == ["cut \ud83d", "raw \ud83d"]


def test_a_name_that_says_no_format_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the name 'p\.dat' does not say how the rows are written; add --format"
    ):
        Rows(str(file(tmp_path, "p.dat", "hello")))
    with pytest.raises(ConfigError, match="--format"):
        Rows("-")
    with pytest.raises(DataError, match="No such file"):
        Rows(str(tmp_path / "absent.txt"))


def test_a_directory_is_no_file_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^\. is a directory; name a file"):
        Rows(".")


@pytest.mark.parametrize(
    ("content", "column"),
    [('{"a": "b"}\n', "a"), ('"text"\n', "a"), ('{"messages": []}\n{"x": 1}\n', None), ("{broken\n", "a")],
)
def test_one_of_the_first_rows_with_the_key_is_enough(
    tmp_path: Path, content: str, column: str | None
) -> None:
    with closing(Rows(str(file(tmp_path, "p.jsonl", content)))) as rows:
        rows.check(column)


@pytest.mark.parametrize(("name", "content"), [("p.jsonl", " \n"), ("p.csv", ""), ("q.csv", "prompt\n")])
def test_a_file_without_a_row_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    with (
        closing(Rows(str(file(tmp_path, name, content)))) as rows,
        pytest.raises(DataError, match="holds no row"),
    ):
        rows.check()


def test_standard_input_can_be_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    with closing(Rows("-", "text")) as rows:
        assert texts(list(rows.prompts())) == texts(list(rows.prompts())) == ["one", "two"]


def test_answers_come_from_prompt_and_response_or_from_messages(tmp_path: Path) -> None:
    lines = [
        '{"id": "a", "prompt": "p", "response": "r"}',
        '{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}',
        '{"messages": [{"role": "user", "content": "p"}]}',
        '{"prompt": "p"}',
    ]
    with closing(Rows(str(file(tmp_path, "a.jsonl", "\n".join(lines))))) as rows:
        found = list(rows.answers())
    assert [type(row).__name__ for row in found] == ["Answer", "Answer", "Broken", "Broken"]
    for row, id in zip(found, ("a", 1), strict=False):
        assert isinstance(row, bulk.Answer)
        assert (row.id, row.exchange.answer.content) == (id, "r")
        assert [message.content for message in row.exchange.messages] == ["p"]


# --- running ------------------------------------------------------------------------------------------


class Bench:
    """A prompts file, a server and a log."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.server = server

    def run(
        self, path: Path, *, concurrency: int = 4, stopped: Callable[[], bool] = lambda: False, **job: Any
    ) -> tuple[Run, list[Trajectory | Broken | Failed]]:
        settings = {key: job.pop(key) for key in ("seed", "on_log_error") if key in job}
        with open_log(self.folder / "cai.db") as log, closing(Rows(str(path))) as rows:
            model = models.load(self.server.spec, max_retries=8)
            guarded = constitutional(model, log=log, **settings)
            run = Run(guarded, rows, drafting={"model": "m"}, **job)

            async def work() -> list[Trajectory | Broken | Failed]:
                return [result async for result in run.results(concurrency, stopped=stopped)]

            return run, asyncio.run(work())

    def sources(self) -> list[str]:
        with open_log(self.folder / "cai.db", read_only=True) as log:
            return sorted(str(r.source) for r in log.read(kind="trajectory"))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    servers: list[Any] = []

    def make(script: Callable[[dict[str, Any]], str | Reply]) -> Bench:
        context = serving(script)
        servers.append(context)
        return Bench(tmp_path, context.__enter__())

    yield make
    for context in servers:
        context.__exit__(None, None, None)


def test_every_row_ends_in_one_trajectory_even_where_prompts_repeat(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    it = bench(under(BALANCED, violates=lambda shown: "answer to bad" in shown))
    path = file(tmp_path, "p.txt", "good\nbad\ngood\n")
    run, results = it.run(path)
    assert len(results) == 3
    assert run.summary.outcomes == {"KEPT": 2, "REVISED": 1}
    assert run.summary.violated == {BALANCED.principles[0].id: 1}
    assert run.summary.revised_share == pytest.approx(1 / 3)
    assert [source.removeprefix(run.prefix) for source in it.sources()] == ["0", "1", "2"]
    assert run.summary.input_tokens > 0


def test_a_second_run_makes_no_call_and_a_raised_limit_only_the_new_rows(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    it = bench(under(BALANCED))
    path = file(tmp_path, "p.txt", "a\nb\nc\nd\n")
    it.run(path, limit=2)
    calls = len(it.server.requests)
    again, results = it.run(path, limit=2)
    assert (again.done, results, len(it.server.requests)) == (2, [], calls)
    assert again.summary.answered == 2
    more, results = it.run(path)
    assert (more.done, len(results), len(it.sources())) == (2, 2, 4)


def test_what_two_runs_at_once_answered_twice_counts_once(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    it = bench(under(BALANCED))
    path = file(tmp_path, "p.txt", "a\nb\n")
    first, _ = it.run(path)
    with open_log(tmp_path / "cai.db") as log:
        (twice,) = log.read(kind="trajectory", source=f"{first.prefix}0")
        log.append(msgspec.structs.replace(twice, id="again")).result()
    again, _ = it.run(path)
    assert (again.done, again.summary.answered) == (2, 2)


@pytest.mark.parametrize("role", ["model", "critic", "strong", "reviser"])
def test_other_weights_under_the_same_name_are_another_run(tmp_path: Path, role: str) -> None:
    for number in (1, 2):
        folder = tmp_path / str(number) / "sft"
        folder.mkdir(parents=True)
        (folder / "model.gguf").write_bytes(b"GGUF" * number)
    one, two = ({role: f"local:{tmp_path}/{number}/sft"} for number in (1, 2))
    assert _own_weights(**one) == _own_weights(**one) != _own_weights(**two)
    assert [*_own_weights(**one)] == [f"{role}_weights"]
    before = _own_weights(**one)
    (tmp_path / "1" / "sft" / "model.gguf").write_bytes(b"GGUF, trained again")
    assert _own_weights(**one) != before
    assert _own_weights(model="local", critic="local:smollm2", reviser="openai:gpt-5-mini", strong=None) == {}


def test_another_setting_or_another_byte_is_another_run(bench: Callable[..., Bench], tmp_path: Path) -> None:
    it = bench(under(BALANCED))
    path = file(tmp_path, "p.txt", "a\n")
    prefixes = {it.run(path)[0].prefix, it.run(path, seed=1)[0].prefix}
    path.write_text("a \n")
    prefixes.add(it.run(path)[0].prefix)
    assert len(prefixes) == 3
    assert len(it.sources()) == 3


def test_a_row_that_failed_is_tried_again_by_the_next_run(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    broken = True

    def draft(prompt: str) -> str | Reply:
        return Reply("no", status=400) if broken and prompt == "b" else "fine"

    it = bench(under(BALANCED, draft=draft))
    path = file(tmp_path, "p.txt", "a\nb\nc\n")
    run, results = it.run(path)
    assert [type(result).__name__ for result in results].count("Failed") == 1
    assert [row.index for row in run.summary.skipped] == [1]
    assert run.summary.answered == 2
    broken = False
    run, results = it.run(path)
    assert [result.prompt for result in results if isinstance(result, Trajectory)] == ["b"]
    assert (run.summary.answered, run.summary.skipped) == (3, [])
    assert it.run(path)[1] == []


def test_a_busy_server_is_asked_again_after_the_time_it_names(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    refusals = [Reply("slow down", status=429, headers={"Retry-After": "0.01"})] * 6
    it = bench(under(BALANCED, draft=lambda prompt: refusals.pop() if refusals else "at last"))
    run, _ = it.run(file(tmp_path, "p.txt", "a\n"))
    assert (run.summary.outcomes, refusals) == ({"KEPT": 1}, [])


def test_a_refused_key_ends_the_run_at_once(bench: Callable[..., Bench], tmp_path: Path) -> None:
    it = bench(lambda body: Reply("bad key", status=401))
    with pytest.raises(Exception, match="bad key"):
        it.run(file(tmp_path, "p.txt", "a\n" * 100), concurrency=2)
    assert len(it.server.requests) <= 4


@pytest.mark.parametrize("status", [403, 404])
def test_what_is_denied_or_not_found_ends_a_run_in_which_nothing_was_answered(
    bench: Callable[..., Bench], tmp_path: Path, status: int
) -> None:
    it = bench(lambda body: Reply("no such model", status=status))
    with pytest.raises(Exception, match="no such model"):
        it.run(file(tmp_path, "p.txt", "a\n" * 100), concurrency=2)
    assert len(it.server.requests) <= 4


@pytest.mark.parametrize("status", [403, 404])
def test_what_is_denied_or_not_found_after_an_answer_fails_its_row(
    bench: Callable[..., Bench], tmp_path: Path, status: int
) -> None:
    it = bench(under(BALANCED, draft=lambda prompt: Reply("no", status=status) if prompt == "b" else "fine"))
    run, _ = it.run(file(tmp_path, "p.txt", "a\nb\nc\n"), concurrency=1)
    assert ([row.index for row in run.summary.skipped], run.summary.answered) == ([1], 2)


def test_what_moderation_rejects_fails_its_row_even_if_it_is_the_first(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    said = "Your chosen model requires moderation and your input was flagged"
    it = bench(under(BALANCED, draft=lambda prompt: Reply(said, status=403) if prompt == "a" else "fine"))
    run, _ = it.run(file(tmp_path, "p.txt", "a\nb\n"), concurrency=1)
    assert ([row.index for row in run.summary.skipped], run.summary.answered) == ([0], 1)


def test_as_many_rows_as_asked_for_are_under_way_and_no_more(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    three = threading.Barrier(3, timeout=60)
    lock, drafting, most = threading.Lock(), 0, 0

    def draft(prompt: str) -> str:
        nonlocal drafting, most
        with lock:
            drafting += 1
            most = max(most, drafting)
        three.wait()
        with lock:
            drafting -= 1
        return "fine"

    it = bench(under(BALANCED, draft=draft))
    it.run(file(tmp_path, "p.txt", "".join(f"{n}\n" for n in range(12))), concurrency=3)
    assert most == 3
    assert len(it.sources()) == 12


def test_when_asked_to_stop_what_is_under_way_is_finished_and_logged(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    it = bench(under(BALANCED))
    path = file(tmp_path, "p.txt", "".join(f"{n}\n" for n in range(10)))
    seen = 0

    def stopped() -> bool:
        nonlocal seen
        seen += 1
        return seen > 3

    _, results = it.run(path, concurrency=2, stopped=stopped)
    assert len(results) == 3
    with open_log(tmp_path / "cai.db", read_only=True) as log:
        assert log.stats().outcomes == {"KEPT": 3}
    rest, results = it.run(path)
    assert (rest.done, len(results), len(it.sources())) == (3, 7, 10)


def test_the_other_fields_of_a_row_are_the_metadata_of_its_trajectory(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    it = bench(under(BALANCED))
    path = file(tmp_path, "p.jsonl", '{"prompt": "a", "kind": "benign", "user": "u1", "nested": {}}\n')
    _, (trajectory,) = it.run(path)
    assert isinstance(trajectory, Trajectory)
    assert trajectory.metadata == {"kind": "benign", "user": "u1"}


# --- judging ------------------------------------------------------------------------------------------


def test_judgements_come_in_the_order_of_the_rows(bench: Callable[..., Bench], tmp_path: Path) -> None:
    it = bench(under(BALANCED, violates=lambda shown: "awful" in shown))
    lines = [json.dumps({"id": f"r{n}", "prompt": "p", "response": f"text {n}"}) for n in range(12)]
    lines[3] = "{broken"
    lines[5] = json.dumps({"id": "bad", "prompt": "p", "response": "awful"})
    path = file(tmp_path, "a.jsonl", "\n".join(lines))

    async def work() -> list[bulk.Judgement]:
        critic = bulk_critic(it.server)
        with closing(Rows(str(path))) as rows:
            return [judgement async for judgement in bulk.judge(critic, BALANCED, rows, 5)]

    found = asyncio.run(work())
    ids = [judgement.id for judgement in found]
    assert ids == ["r0", "r1", "r2", 3, "r4", "bad", *(f"r{n}" for n in range(6, 12))]
    assert [judgement.violates(BALANCED) for judgement in found].count(True) == 1
    assert set(json.loads(found[3].line())) == {"id", "error"}
    line = json.loads(found[5].line())
    assert set(line) == {"id", "verdicts", "aims"}
    assert line["verdicts"][0]["label"] == "VIOLATES"


async def test_judgements_that_were_made_come_before_the_error_that_ends_them(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    sound = under(BALANCED)
    others = threading.Event()

    def reply(body: dict[str, Any]) -> str | Reply:
        said = json.dumps(body)
        if "text 2" in said:
            others.wait(60)
            return Reply("the key is revoked", status=401)
        if "text 3" in said:
            others.set()
        return sound(body)

    it = bench(reply)
    lines = [json.dumps({"prompt": "p", "response": f"text {n}"}) for n in range(50)]
    found: list[int] = []

    async def work() -> None:
        with closing(Rows(str(file(tmp_path, "a.jsonl", "\n".join(lines))))) as rows:
            async for judgement in bulk.judge(bulk_critic(it.server), BALANCED, rows, 2):
                found.append(judgement.index)

    with pytest.raises(Exception, match="the key is revoked"):
        await work()
    assert found[:3] == [0, 1, 3]
    assert len(found) < 50


class Timed:
    """A critic that tells how long each answer may take."""

    name = "timed"
    candidates = 1
    splits = False

    def __init__(self) -> None:
        self.seconds: list[float | None] = []

    async def critique(
        self, exchange: Exchange, constitution: Constitution, calls: Calls, *, explain: bool
    ) -> Critique:
        self.seconds.append(calls.budget.seconds)
        return Critique(verdicts=())

    async def discuss(self, *args: object) -> Critique:
        raise AssertionError


async def test_a_judgement_may_take_as_long_as_other_work_in_bulk(tmp_path: Path) -> None:
    critic = Timed()
    with closing(Rows(str(file(tmp_path, "a.jsonl", '{"prompt": "q", "response": "a"}\n')))) as rows:
        assert len([judgement async for judgement in bulk.judge(critic, BALANCED, rows, 1)]) == 1
    assert critic.seconds == [UNATTENDED_SECONDS]


def bulk_critic(server: Server) -> Any:
    from cai_graph.critic import critic_for

    return critic_for(models.load(server.spec))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = file(tmp_path, "out.jsonl", "before")

    def write() -> None:
        with atomic.output(str(target)) as out:
            out.write("half")
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        write()
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with atomic.output(str(target)) as out:
        out.write("whole")
    assert target.read_text() == "whole"
    with pytest.raises(DataError, match="not a plain file"), atomic.output("/dev/null"):
        pass


def test_a_log_that_cannot_be_written_ends_the_run(bench: Callable[..., Bench], tmp_path: Path) -> None:
    it = bench(under(BALANCED))
    path = file(tmp_path, "p.txt", "a\nb\n")
    with open_log(tmp_path / "cai.db"):
        pass
    with closing(Rows(str(path))) as rows, open_log(tmp_path / "cai.db", read_only=True) as log:
        model = models.load(it.server.spec)
        run = Run(constitutional(model, log=log, on_log_error="raise"), rows, drafting={})

        async def work() -> None:
            async for _ in run.results(1):
                pass

        with pytest.raises(LogError):
            asyncio.run(work())
    assert role(it.server.requests[0]) == "draft"
    assert Outcome.KEPT not in run.summary.outcomes
