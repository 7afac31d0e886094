"""The chat client under a judge that misbehaves: nothing lost, nothing counted twice, nothing invented."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import errno
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daekit.errors import UserError
from daekit.generation import budget
from daekit.generation.caller import each
from daekit.generation.calls import ChatRequest
from daekit.generation.client import ChatClient, identity
from daekit.generation.endpoint import retry_after
from daekit.generation.store import ERRORS, REPLIES, ReplyStore, read_replies
from daekit.recipe.judge import JudgeSpec
from tests.helpers.judge_server import Call, JudgeServer, scripted_rating

COUNT = 20


def requests(count: int = COUNT, **parameters: Any) -> list[ChatRequest]:
    common = {"temperature": 0, "max_tokens": 64} | parameters
    return [
        ChatRequest([{"role": "user", "content": f"Rate {i} as [[rating]]"}], common, label=f"question {i}")
        for i in range(count)
    ]


def spec(server: JudgeServer, **fields: Any) -> JudgeSpec:
    return JudgeSpec(**{"model": "judge", "base_url": server.url, "timeout": 30.0, "concurrency": 8} | fields)


def ask(server: JudgeServer, folder: Path, wanted: list[ChatRequest] | None = None, **fields: Any) -> list[Any]:
    with ChatClient(spec(server, **fields), folder, first_wait=0.005) as client:
        return client.ask(requests() if wanted is None else wanted)


def right(replies: list[Any], server: JudgeServer) -> bool:
    """Every reply is what the judge says to just that prompt."""
    keys = {call.body["messages"][0]["content"]: call.key for call in server.calls}
    wanted = [f"[[{scripted_rating(keys[request.messages[0]['content']])}]]" for request in requests(len(replies))]
    return all(reply is not None and reply.text.endswith(end) for reply, end in zip(replies, wanted, strict=True))


def first_attempts(kind: str, one_in: int = 2, attempts: int = 1) -> Callable[[Call], str | None]:
    return lambda call: kind if call.one_in(one_in) and call.attempt < attempts else None


FAULTS = ["429", "429 0.02", "500", "503", "hang", "trickle", "truncated", "cut", "reset", "error_in_200"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_passes_loses_nothing_and_counts_nothing_twice(kind: str, tmp_path: Path) -> None:
    with JudgeServer(first_attempts(kind), slowness=60.0) as server:
        start = time.monotonic()
        replies = ask(server, tmp_path, timeout=1.5 if kind in ("hang", "trickle") else 30.0)
        assert right(replies, server)
        assert time.monotonic() - start < 40, "a call that hangs, or trickles in for ever, is given up in time"
        faulty = {call.key for call in server.calls if call.one_in(2)}
        assert 0 < len(faulty) < COUNT
        assert len(server.calls) == COUNT + len(faulty)
        assert set(server.answered.values()) == {1} and len(server.answered) == COUNT
        lines = [json.loads(line) for line in (tmp_path / REPLIES).read_text().splitlines()]
        assert len({line["key"] for line in lines}) == len(lines) == COUNT
        assert all(json.loads(line["body"])["model"] == server.model and "usage" in line["body"] for line in lines)
        sent = len(server.calls)
        assert ask(server, tmp_path) == replies  # from the disk
        assert len(server.calls) == sent


@pytest.mark.parametrize("kind", ["500", "truncated", "reset", "400"])
def test_a_fault_that_stays_is_an_error_and_no_reply_and_only_that_is_sent_again(kind: str, tmp_path: Path) -> None:
    broken = True
    with JudgeServer(lambda call: kind if broken and call.one_in(4) else None) as server:
        replies = ask(server, tmp_path, max_retries=1)
        bad = {call.key for call in server.calls if call.one_in(4)}
        assert 0 < len(bad) < COUNT
        assert sum(reply is None for reply in replies) == len(bad)
        attempts = 1 if kind == "400" else 2  # what is refused is not repeated
        assert len(server.calls) == COUNT - len(bad) + attempts * len(bad)
        errors = [json.loads(line) for line in (tmp_path / ERRORS).read_text().splitlines()]
        assert len(errors) == len(bad) and all(e["attempts"] == attempts and e["error"] for e in errors)
        sent, broken = len(server.calls), False
        assert right(ask(server, tmp_path), server)
        assert {call.key for call in server.calls[sent:]} == bad and len(server.calls) == sent + len(bad)


def test_an_answer_without_a_rating_is_kept_and_not_asked_again(tmp_path: Path) -> None:
    with JudgeServer(lambda call: "no_rating" if call.number % 2 else "null") as server:
        texts = {reply.text for reply in ask(server, tmp_path)}
        assert texts == {"I would rather not say.", ""}
        ask(server, tmp_path)
        assert len(server.calls) == COUNT


def test_retry_after_holds_for_every_call(tmp_path: Path) -> None:
    times: list[float] = []

    def once(call: Call) -> str | None:
        times.append(time.monotonic())
        return "429 1" if call.number == 4 else None

    with JudgeServer(once, pause=0.02) as server:
        ask(server, tmp_path, concurrency=2)
    during = [at for at in times if times[4] < at < times[4] + 0.9]
    assert len(during) <= 2, "what was under way comes in, nothing else"
    assert len(times) == COUNT + 1


def test_a_wait_that_is_too_long_is_given_up_not_shortened(tmp_path: Path) -> None:
    with JudgeServer(lambda call: "429 7200" if call.one_in(4) else None) as server:
        start = time.monotonic()
        replies = ask(server, tmp_path)
        assert time.monotonic() - start < 20
        assert sum(reply is None for reply in replies) == len({call.key for call in server.calls if call.one_in(4)})


def test_concurrency_is_bounded_and_used(tmp_path: Path) -> None:
    with JudgeServer(pause=0.2) as server:
        ask(server, tmp_path, requests(9), concurrency=4)
        assert server.most_at_once == 4


def test_an_endpoint_that_never_answers_is_left_after_three_requests(tmp_path: Path) -> None:
    with (
        JudgeServer(lambda call: "500") as server,
        ChatClient(spec(server, max_retries=1), tmp_path, first_wait=0.005) as client,
    ):
        assert client.ask(requests()) == [None] * COUNT
        assert len(server.calls) == 6
        assert "HTTP 500" in str(client.budget.stopped)


def test_an_endpoint_that_goes_down_is_left(tmp_path: Path) -> None:
    with JudgeServer(lambda call: "500" if call.number >= 30 else None) as server:
        with ChatClient(spec(server, max_retries=0, concurrency=2), tmp_path, first_wait=0.005) as client:
            replies = client.ask(requests(100))
        assert sum(reply is not None for reply in replies) == 30
        assert 40 <= len(server.calls) <= 42
        assert "10 requests in a row failed" in str(client.budget.stopped)


def test_requests_that_are_refused_for_good_do_not_keep_the_others_back(tmp_path: Path) -> None:
    with JudgeServer(lambda call: "400" if call.one_in(2) else None) as server:
        ask(server, tmp_path)
        bad = {call.key for call in server.calls if call.one_in(2)}
        assert len(bad) > 3
        more = requests(COUNT + 10)  # a rerun begins with those that are refused again
        replies = ask(server, tmp_path, more)
        assert sum(r is None for r in replies) == len({c.key for c in server.calls if c.one_in(2)}) >= len(bad)


@pytest.mark.parametrize(("kind", "said"), [("401", "JUDGE_TEST_KEY is not set"), ("404", "no such model or URL")])
def test_what_no_call_can_mend_is_said_after_one(kind: str, said: str, tmp_path: Path) -> None:
    with JudgeServer(lambda call: kind) as server:
        with pytest.raises(UserError, match=said):
            ask(server, tmp_path, api_key_env="JUDGE_TEST_KEY")
        assert len(server.calls) == 1


def test_an_endpoint_without_logprobs_is_refused_after_one_call_and_not_remembered(tmp_path: Path) -> None:
    lacking = True
    wanted = requests(logprobs=True, top_logprobs=5)
    with JudgeServer(lambda call: "no_logprobs" if lacking else None) as server:
        with pytest.raises(UserError, match=r"no logprobs.*alpaca_eval_gpt4"):
            ask(server, tmp_path, wanted)
        assert len(server.calls) == 1
        lacking = False
        assert all(ask(server, tmp_path, wanted))
        assert len(server.calls) == 1 + COUNT


def test_the_key_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_TEST_KEY", "sk-very-secret")
    with JudgeServer(lambda call: "400" if call.one_in(2) else None) as server:  # it repeats the key in its errors
        ask(server, tmp_path, api_key_env="JUDGE_TEST_KEY")
        with pytest.raises(UserError) as told:
            server.misbehave = lambda call: "401"
            ask(server, tmp_path, requests(COUNT + 1), api_key_env="JUDGE_TEST_KEY")
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "Bearer ***" in written
    assert "secret" not in written + str(told.value) + "".join(capsys.readouterr())


def test_max_calls_stops_and_a_rerun_goes_on(tmp_path: Path) -> None:
    with JudgeServer(first_attempts("500")) as server:
        done = 0
        for _ in range(20):
            before = len(server.calls)
            replies = ask(server, tmp_path, max_calls=7)
            assert len(server.calls) - before <= 7
            assert sum(reply is not None for reply in replies) >= done
            done = sum(reply is not None for reply in replies)
        assert right(replies, server)
        assert set(server.answered.values()) == {1}


def test_max_cost_is_never_exceeded_and_calls_under_way_do_not_end_a_run(tmp_path: Path) -> None:
    prices = {"price_prompt": 1000.0, "price_completion": 1000.0}  # 10 tokens of a reply: 1 cent
    with JudgeServer(pause=0.01) as server:
        # 64 tokens at most and some of the prompt are set aside per call: only one fits at a time near the end
        with ChatClient(spec(server, max_cost=0.2, **prices), tmp_path) as client:
            replies = client.ask(requests())
        done = sum(reply is not None for reply in replies)
        assert 5 <= done < COUNT
        assert 0.08 < client.budget.cost <= 0.2
        assert "max_cost=0.2 would be exceeded" in str(client.budget.stopped)
        ask(server, tmp_path)
        assert len(server.calls) == COUNT


def test_equal_requests_are_one_call_and_repeats_are_not(tmp_path: Path) -> None:
    twice = requests(3) * 2 + [dataclasses.replace(request, repeat=1) for request in requests(3)]
    with JudgeServer() as server:
        assert all(ask(server, tmp_path, twice))
        assert len(server.calls) == 6


def test_another_judge_or_parameter_is_another_call(tmp_path: Path) -> None:
    with JudgeServer() as server, JudgeServer() as other:
        ask(server, tmp_path, requests(2))
        ask(server, tmp_path, requests(2), model="judge-2")
        ask(server, tmp_path, requests(2, temperature=0.5))
        assert len(server.calls) == 6
        ask(other, tmp_path, requests(2))
        assert len(other.calls) == 2


def test_the_newer_name_of_the_token_limit(tmp_path: Path) -> None:
    with JudgeServer() as server:
        ask(server, tmp_path, requests(1), token_limit="max_completion_tokens")
        body = server.calls[0].body
        assert body["max_completion_tokens"] == 64 and "max_tokens" not in body


def test_an_estimate_says_what_is_still_to_be_sent(tmp_path: Path) -> None:
    with JudgeServer() as server:
        ask(server, tmp_path, requests(10))
        priced = spec(server, price_prompt=1.0, price_completion=2.0)
        estimate = budget.estimate(priced, requests(), read_replies(tmp_path), identity(priced))
        assert (estimate.calls, estimate.cached) == (COUNT - 10, 10)
        assert estimate.completion_tokens == 64 * (COUNT - 10)
        assert estimate.cost == pytest.approx((estimate.prompt_tokens + 2 * estimate.completion_tokens) / 1e6)
        assert len(server.calls) == 10


def test_works_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def notebook(server: JudgeServer) -> list[Any]:
        return ask(server, tmp_path)

    with JudgeServer() as server:
        assert right(asyncio.run(notebook(server)), server)


def _ask_in_child(base_url: str, folder: Path) -> None:
    judge = JudgeSpec(model="judge", base_url=base_url, concurrency=4)
    with ChatClient(judge, folder, first_wait=0.005) as client:
        client.ask(requests(120))


@pytest.mark.parametrize("after", [5, 50])
def test_killed_in_the_middle_it_resumes_with_exactly_the_missing_calls(after: int, tmp_path: Path) -> None:
    with JudgeServer(pause=0.01) as server:
        child = multiprocessing.get_context("fork").Process(target=_ask_in_child, args=(server.url, tmp_path))
        child.start()
        deadline = time.monotonic() + 60
        while len(server.calls) < after and time.monotonic() < deadline:
            time.sleep(0.002)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kept = (tmp_path / REPLIES).read_bytes().count(b"\n")
        assert 0 < kept < 120
        time.sleep(0.1)
        sent = len(server.calls)
        replies = ask(server, tmp_path, requests(120))
        assert right(replies, server)
        assert len(server.calls) - sent == 120 - kept, "exactly the calls whose replies were not kept"
        assert max(server.answered.values()) <= 2 and sum(n - 1 for n in server.answered.values()) <= 4  # under way when killed


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_cut_and_its_call_sent_again(cut: int, tmp_path: Path) -> None:
    with JudgeServer() as server:
        first = ask(server, tmp_path)
        file = tmp_path / REPLIES
        file.write_bytes(file.read_bytes()[:-cut])
        again = ask(server, tmp_path)
        assert [reply.text for reply in again] == [reply.text for reply in first]
        assert len(server.calls) == COUNT + 1
        assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with JudgeServer() as server:
        ask(server, tmp_path)
        lines = (tmp_path / REPLIES).read_text().splitlines(keepends=True)
        (tmp_path / REPLIES).write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:]]))
        with pytest.raises(UserError, match="line 4 is damaged"):
            ask(server, tmp_path)


def test_a_full_disk_ends_the_run_and_a_rerun_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.write, [3000]

    def write(file: int, data: bytes) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: left[0]]
        left[0] -= len(part)
        return real(file, part)

    with JudgeServer() as server:
        monkeypatch.setattr("daekit.files.os.write", write)
        with pytest.raises(OSError, match="No space left"):
            ask(server, tmp_path)
        monkeypatch.undo()
        content = (tmp_path / REPLIES).read_bytes()
        assert 0 < len(content) < 3000 and content.endswith(b"\n"), "the part of a line is taken back"
        kept = {json.loads(line)["label"].replace("question", "Rate") + " as [[rating]]" for line in content.splitlines()}
        assert right(ask(server, tmp_path), server)
        # a call of the first run may still have been on its way when that ended
        asked = Counter(call.body["messages"][0]["content"] for call in server.calls)
        assert len(asked) == COUNT and all(count <= (1 if prompt in kept else 2) for prompt, count in asked.items())


def test_a_prompt_that_is_no_text_is_an_error_of_its_own(tmp_path: Path) -> None:
    broken = ChatRequest([{"role": "user", "content": "half a letter \ud83d"}], {"max_tokens": 5})
    with JudgeServer() as server:
        replies = ask(server, tmp_path, [*requests(3), broken])
        assert [reply is None for reply in replies] == [False, False, False, True]
    assert "no text that can be sent" in (tmp_path / ERRORS).read_text()


@pytest.mark.parametrize(("value", "seconds"), [("3", 3), ("0.5", 0.5), ("", 0), ("soon", 0), ("-4", 0), ("date", 100)])
def test_retry_after_is_a_number_or_a_date(value: str, seconds: float) -> None:
    value = email.utils.formatdate(time.time() + 100) if value == "date" else value
    assert retry_after({"retry-after": value}) == pytest.approx(seconds, abs=1.5)


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path)
    with pytest.raises(UserError, match="another process is sending calls"):
        ReplyStore(tmp_path)
    store.close()
    ReplyStore(tmp_path).close()


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({}, "base_url"),
        ({"base_url": "http://x/v1", "path": "judge", "model": "m"}, "base_url"),
        ({"base_url": "http://x/v1"}, "model"),
        ({"base_url": "x/v1", "model": "m"}, "base_url"),
        ({"base_url": "https://me:secret@x/v1", "model": "m"}, "base_url"),
        ({"base_url": "https://x/v1?api-key=secret", "model": "m"}, "base_url"),
        ({"path": "judge", "max_cost": 1.0}, "max_cost"),
        ({"path": "judge", "temperature": 0.5}, "temperature"),
        ({"base_url": "http://x/v1", "model": "m", "quantization": "4bit"}, "quantization"),
    ],
)
def test_a_spec_that_contradicts_itself(fields: dict[str, Any], key: str, tmp_path: Path) -> None:
    found = list(JudgeSpec(**fields).problems())
    assert [name for name, _ in found] == [key]
    assert "secret" not in found[0][1]
    with pytest.raises(UserError, match=rf"judge\.{key}"):
        ChatClient(JudgeSpec(**fields), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fields", [{"concurrency": 0}, {"max_retries": -1}, {"unknown": 1}])
def test_a_spec_out_of_bounds_is_not_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        JudgeSpec(path="judge", **fields)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("no more")])
def test_what_ends_a_call_ends_all_of_them_as_it_is(error: BaseException) -> None:
    """A signal that comes while a reply is read is no failure of a group: a run ends with its message and status."""
    begun: list[int] = []

    async def ask(item: int) -> None:
        begun.append(item)
        await asyncio.sleep(0)
        if item == 2:
            raise error
        await asyncio.sleep(60)

    with pytest.raises(type(error)) as raised:
        asyncio.run(each(range(5), ask, 3))
    assert raised.value is error and begun == [0, 1, 2]
