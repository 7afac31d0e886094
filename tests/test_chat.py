"""Chat: what is streamed is what was written, side by side on a real terminal, and every model has a history of its own."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from daekit.cli import main
from daekit.errors import UserError
from daekit.generation import Permissions
from daekit.generation.endpoint import Endpoint
from daekit.generation.local import Sampling, generate
from daekit.generation.local_chat import encode_chat
from daekit.generation.stream import EndpointSpeaker, LocalSpeaker
from daekit.runtime.chat import Chat, answer_prompts, read_prompts, speakers_of
from daekit.runtime.columns import Columns, Stack, width_of, wrapped
from tests.helpers import tiny
from tests.helpers.judge_server import JudgeServer

HOW = Sampling(30)
LETTERS = "ab cd  efghij klmnopqrstuvwxyz\n é東京 \t"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chat models, one of them the result of a stage."""
    home = tmp_path_factory.mktemp("models")
    for path, seed in ((home / "one", 3), (home / "run" / "stages" / "kd" / "model", 4)):
        tiny.model(seed=seed).save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
    return home


def text_of(rng: random.Random, longest: int = 120) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, longest)))


# ---- on the screen ---------------------------------------------------------------------------------------------------


def screen_of(output: str, height: int) -> list[str]:
    """What a terminal of so many lines shows in the end, with what has scrolled off above."""
    lines, at = [""], 0
    for part in re.findall(r"\x1b\[(\d*)([A-Zm])|(\n)|(\r)|([^\x1b\n\r]+)", output):
        number, command, newline, _, text = part
        if command == "A":
            assert int(number) < height, "what has scrolled off cannot be drawn anew"
            at -= int(number)
        elif command == "J":
            lines[at:] = [""]
        elif newline:
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif text:
            assert not lines[at] or at == 0
            lines[at] += text
    return lines


@pytest.mark.parametrize("seed", range(20))
def test_columns_end_as_if_all_had_been_there_at_once(seed: int) -> None:
    rng = random.Random(seed)
    texts, size = [text_of(rng, 300) for _ in range(rng.randint(2, 3))], (60, rng.randint(6, 12))
    out, whole = io.StringIO(), io.StringIO()
    columns = Columns(out, ["a" * 3] * len(texts), size)
    left = list(texts)
    while any(left):
        column = rng.choice([at for at, text in enumerate(left) if text])
        count = rng.randint(1, 40)
        columns.add(column, left[column][:count])
        left[column] = left[column][count:]
    for column in rng.sample(range(len(texts)), len(texts)):
        columns.end(column)
    at_once = Columns(whole, ["a" * 3] * len(texts), (size[0], 10_000))
    for column, text in enumerate(texts):
        at_once.add(column, text)
    for column in range(len(texts)):
        at_once.end(column)
    assert screen_of(out.getvalue(), size[1]) == screen_of(whole.getvalue(), 10_000)


@pytest.mark.parametrize("seed", range(20))
def test_lines_that_are_printed_for_good_never_change(seed: int) -> None:
    rng = random.Random(seed)
    text, width = text_of(rng, 300), rng.randint(4, 30)
    lines = wrapped(text, width)
    assert all(width_of(line) <= width for line in lines)
    for end in range(len(text)):
        before = wrapped(text[:end], width)
        assert before[:-1] == lines[: len(before) - 1]
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)


def test_one_below_the_other_prints_each_text_in_order() -> None:
    out = io.StringIO()
    stack = Stack(out, ["a", "b"])
    for column, piece in ((1, "se"), (0, "fir"), (1, "cond"), (0, "st\x1b[2J")):
        stack.add(column, piece)
    stack.end(1)
    stack.end(0)
    assert out.getvalue() == "a: first\\x1b[2J\nb: second\n"


# ---- who answers -----------------------------------------------------------------------------------------------------


def speaker(seed: int = 3) -> LocalSpeaker:
    return LocalSpeaker(tiny.model(seed=seed), tiny.tokenizer(), 256)


def test_a_model_says_what_it_writes() -> None:
    local, messages, pieces = speaker(), [{"role": "user", "content": "w5 w6"}], []
    text = local.answer(messages, HOW, pieces.append, threading.Event())
    ids = generate(local.model, local.tokenizer, [encode_chat(local.tokenizer, messages)], max_new_tokens=30)[0]
    assert text == "".join(pieces) == local.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces) > 3
    drawn = [local.answer(messages, Sampling(30, 1.0, (seed,)), pieces.append, threading.Event()) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_model_that_is_stopped_says_no_more() -> None:
    stop, pieces = threading.Event(), []

    def say(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            stop.set()

    text = speaker().answer([{"role": "user", "content": "w5 w6"}], HOW, say, stop)
    assert text == "".join(pieces) and len(text.split()) == 3


def test_a_conversation_longer_than_the_model_reads_is_told() -> None:
    with pytest.raises(UserError, match="the model reads 256"):
        speaker().answer([{"role": "user", "content": "w5 " * 300}], HOW, print, threading.Event())


@pytest.fixture
def streaming() -> Iterator[tuple[str, list[dict[str, Any]], list[str]]]:
    """An endpoint that streams: its URL, what it was sent, the lines that it answers."""
    got: list[dict[str, Any]] = []
    lines: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.end_headers()
            for line in lines:
                self.wfile.write(line.encode() + b"\n")

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", got, lines
    server.shutdown()
    server.server_close()


def chunk(text: str | None) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})


def test_an_endpoint_that_streams_is_read_piece_by_piece(streaming: Any) -> None:
    url, got, lines = streaming
    lines += [": hello", "", chunk("One "), chunk(None), 'data: {"usage": 3}', chunk("two é"), "data: [DONE]", chunk("!")]
    pieces: list[str] = []
    far = EndpointSpeaker("far", url, "m", None, Permissions())
    messages = [{"role": "user", "content": "?"}]
    assert far.answer(messages, Sampling(7, 0.5), pieces.append, threading.Event()) == "One two é!"
    assert pieces == ["One ", "two é", "!"]
    assert got[0]["messages"] == messages and got[0]["stream"] and (got[0]["max_tokens"], got[0]["temperature"]) == (7, 0.5)
    stop = threading.Event()
    stop.set()
    assert far.answer(messages, HOW, pieces.append, stop) == "One "


def test_an_endpoint_that_does_not_stream_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")
    with JudgeServer(lambda call: "401" if call.number else None) as server:
        far = EndpointSpeaker("far", server.url, "m", "SOME_API_KEY", Permissions())
        assert far.answer([{"role": "user", "content": "?"}], HOW, print, threading.Event())
        with pytest.raises(UserError, match="HTTP 401") as caught:
            far.answer([{"role": "user", "content": "?"}], HOW, print, threading.Event())
    assert "sk-very-secret" not in str(caught.value)


# ---- the conversation ------------------------------------------------------------------------------------------------


class Scripted:
    """Says who was asked what."""

    def __init__(self, fails: bool = False) -> None:
        self.asked: list[list[str]] = []
        self.fails = fails

    def answer(self, messages: Sequence[Any], how: Sampling, say: Callable[[str], None], stop: threading.Event) -> str:
        self.asked.append([f"{message['role'][0]}:{message['content']}" for message in messages])
        if self.fails:
            raise UserError("out of luck")
        text = f"{id(self)} {len(self.asked)}"
        say(text)
        return text


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_every_model_sees_its_own_answers_and_one_that_fails_forgets_the_turn() -> None:
    one, other = Scripted(), Scripted(fails=True)
    chat, out = Chat({"one": one, "other": other}, HOW, system="be brief"), io.StringIO()
    answers = chat.ask(turn("a"), out)
    assert answers["other"] == "[no answer: out of luck]" and "out of luck" in out.getvalue()
    other.fails = False
    chat.ask(turn("b"), out)
    assert one.asked[1] == ["s:be brief", "u:a", f"a:{id(one)} 1", "u:b"] and other.asked[1] == ["s:be brief", "u:b"]
    chat.reset()
    chat.ask(turn("c"), None)
    assert one.asked[2] == ["s:be brief", "u:c"]


def test_answers_to_prompts_are_written_as_markdown(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "p.txt").write_text("w5 w6\n\nw7\n")
    rows = [{"prompt": "w5 w6"}, {"messages": [*turn("w7"), {"role": "assistant", "content": "w9"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [*map(list, read_prompts(str(tmp_path / "p.txt")))] == [*read_prompts(str(tmp_path / "p.jsonl"))]
    models = [f"a={folder / 'one'}", f"{folder / 'run'}:kd"]
    command = [
        "chat",
        *models,
        "--prompts",
        str(tmp_path / "p.txt"),
        "--max-new-tokens",
        "9",
        "--output",
        str(tmp_path / "o.md"),
    ]
    assert main(command) == 0
    written = (tmp_path / "o.md").read_text()
    assert written.startswith("# Answers of a and run-kd\n") and written.count("### a") == written.count("### run-kd") == 2
    chat, out = Chat(speakers_of({"a": str(folder / "one")}, Permissions()), Sampling(9)), io.StringIO()
    answer_prompts(chat, [turn("w5 w6")], out)
    assert out.getvalue().split("### a")[1].strip() == written.split("### a")[1].split("###")[0].strip()


def test_a_key_goes_to_the_endpoint_that_it_is_named_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAR_API_KEY", "sk-very-secret")
    (tmp_path / "p.txt").write_text("w5\n")
    keys: list[str | None] = []

    def noting(endpoint: Endpoint, who: str, spec: Any, key: str) -> None:
        keys.append(key)
        made(endpoint, who, spec, key)

    made = Endpoint.__init__
    monkeypatch.setattr(Endpoint, "__init__", noting)
    with JudgeServer() as far, JudgeServer() as other:
        one, two = ["chat", f"far={far.url}#m"], ["chat", f"far={far.url}#m", f"other={other.url}#m"]
        how = ["--prompts", str(tmp_path / "p.txt"), "--key-env"]
        assert main([*one, *how, "FAR_API_KEY"]) == 0 and keys == ["sk-very-secret"]
        assert main([*one, *how, "OPENAI_API_KEY"]) == 2, "which belongs to another host, unless --allow-key-env says otherwise"
        assert main([*one, *how, "UNSET_API_KEY"]) == 2
        assert "UNSET_API_KEY is not set" in capsys.readouterr().err
        keys.clear()
        assert main([*two, *how, "FAR_API_KEY"]) == 2
        assert "a key belongs to one host. Say whose it is: --key-env MODEL=FAR_API_KEY" in capsys.readouterr().err
        assert main([*two, *how, "nobody=FAR_API_KEY"]) == 2
        assert "'nobody' is no endpoint of this chat (there are: far and other)" in capsys.readouterr().err
        assert main([*two, *how, "far=FAR_API_KEY"]) == 0 and sorted(keys) == ["", "sk-very-secret"]
    assert "very" not in "".join(capsys.readouterr())


def test_prompts_that_nobody_answers_are_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("w5\nw6\n")
    with JudgeServer(lambda call: "401") as far, JudgeServer(lambda call: "401" if call.number else None) as other:
        models, how = [f"far={far.url}#m", f"other={other.url}#m"], ["--prompts", str(tmp_path / "p.txt")]
        assert main(["chat", models[0], *how, "--output", str(tmp_path / "o.md")]) == 1
        told = capsys.readouterr().err
        assert "no model answered a prompt: far at http" in told and "it wants a key, and none was sent" in told
        assert "--key-env" in told and "OPENAI" not in told
        assert main(["chat", *models, *how]) == 0, "one answer is there"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["FOLDER/run:base"], "complete stages: kd"),
        (["http://127.0.0.1:9/v1"], "say which model of the endpoint"),
        (["FOLDER/one", "FOLDER/one"], "two models are named"),
        (["FOLDER/one", "--output", "x.md"], "belongs to --prompts"),
        (["FOLDER/one", "--prompts", "FOLDER/none.txt"], "cannot be read"),
        (
            ["FOLDER/none", "--prompts", "p", "--output", "FOLDER/no/x.md"],
            "x.md: FOLDER/no is no directory that may be written to",
        ),
        (["FOLDER/none", "--prompts", "p", "--output", "FOLDER/one"], "one: exists already, and nothing is overwritten"),
        (["FOLDER/silent"], "no chat template"),
        (["FOLDER/nowhere"], "there is no directory FOLDER/nowhere; give a directory, a hub id, RUN:STAGE or https"),
    ],
)
def test_what_cannot_chat_is_told(folder: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not (folder / "silent").exists():
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder / "silent")
        tiny.model().save_pretrained(folder / "silent")
    assert main(["chat", *(text.replace("FOLDER", str(folder)) for text in arguments)]) == 2
    assert reason.replace("FOLDER", str(folder)) in capsys.readouterr().err


class Endless:
    """Says words until it is stopped, or for so long that nobody can have waited."""

    MOST = 200_000

    def answer(self, messages: Sequence[Any], how: Sampling, say: Callable[[str], None], stop: threading.Event) -> str:
        said = 0
        while not stop.is_set() and said < self.MOST:
            say("word ")
            said += 1
            time.sleep(0.001)
        return "word " * said


class Interrupted(io.StringIO):
    """Gets Ctrl-C while something is written to it for the ``at``-th time."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def write(self, text: str) -> int:
        self.at -= 1
        if self.at == 0:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_ctrl_c_stops_the_answers_also_while_one_is_printed(at: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        chat = Chat({"a": Endless(), "b": Endless()}, Sampling(8, 0.0))
        answers = chat.ask(turn("go"), out := Interrupted(at))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert {answers[name].count("word") < Endless.MOST for name in "ab"} == {True}
    assert out.getvalue().count("word") == sum(text.count("word") for text in answers.values())
    assert [chat.said[name][-1]["content"] for name in "ab"] == [answers[name] for name in "ab"]


# ---- a real terminal -------------------------------------------------------------------------------------------------


class Terminal:
    """``daekit chat`` in a process of its own, on a terminal of its own."""

    def __init__(self, arguments: list[str], columns: int) -> None:
        self.child, self.file = pty.fork()
        if self.child == 0:
            try:
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
                os.environ |= {"COLUMNS": str(columns), "LINES": "20", "TERM": "xterm"}
                os._exit(main(arguments))
            finally:
                os._exit(99)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 300) -> str:
        """What comes up to a pattern."""
        end, start = time.monotonic() + seconds, self.seen
        while not (found := re.search(pattern, start, re.DOTALL)):
            ready, _, _ = select.select([self.file], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{pattern!r} did not come: {start[-500:]!r}"
            try:
                start += os.read(self.file, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended before {pattern!r}: {start[-500:]!r}") from None
        self.seen = start[found.end() :]
        return start[: found.end()]

    def send(self, text: str) -> None:
        os.write(self.file, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C until something comes: one between the prompt of ``input`` and its wait for a key is seen with the next."""
        ready = False
        while not ready:
            self.send("\x03")
            ready = bool(select.select([self.file], [], [], 2.0)[0])

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.mark.parametrize("columns", [120, 50])
def test_on_a_terminal(folder: Path, columns: int) -> None:
    terminal = Terminal(["chat", f"a={folder / 'one'}", f"b={folder / 'run'}:kd", "--max-new-tokens", "40"], columns)
    terminal.until(r"a and b\..*\n> ")
    terminal.send("w5 w6\n")
    answer = terminal.until(r"\n> ")
    side_by_side = re.search(r"a +\| b", answer) is not None
    assert side_by_side == (columns == 120) and answer.count("w") > 10
    terminal.send("/reset\n")
    terminal.until(r"A new conversation\.\r\n> ")
    terminal.send("w5 w6\n")
    again = terminal.until(r"\n> ")
    assert screen_of(again.replace("\r\n", "\n"), 20)[1:] == screen_of(answer.replace("\r\n", "\n"), 20)[1:]
    terminal.interrupt()
    terminal.until(r"Ctrl-D ends.*> ")
    terminal.send("/quit\n")
    assert terminal.status() == 0


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daekit.runtime.chat.speakers_of", lambda *_: {"a": Endless()})
    terminal = Terminal(["chat", "a=anything"], 80)
    terminal.until(r"\n> ")
    terminal.send("w5\n")
    terminal.until(r"a:.* word")
    terminal.send("\x03")
    answer = terminal.until(r"\n> ")
    assert answer.count("word") < Endless.MOST / 2
    terminal.send("\x04")
    assert terminal.status() == 0
