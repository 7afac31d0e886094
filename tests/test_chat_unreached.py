"""An endpoint at which nobody listens: found soon, said at once, and never counted as an answer."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from daekit.errors import UserError
from daekit.evaluation.answers import AnswerStore, HowToAnswer, answer_by_client
from daekit.evaluation.questions import Conversation
from daekit.generation.calls import ChatRequest
from daekit.generation.client import ChatClient
from daekit.generation.endpoint import Endpoint, PassingFailure
from daekit.generation.keys import Permissions
from daekit.generation.prompt_scores import ScoreClient, ScoreRequest
from daekit.recipe.judge import JudgeSpec
from tests.helpers.judge_server import Call, JudgeServer, closed_url

QUESTIONS = [Conversation(number, "c", (f"w{number}",), 0.0) for number in range(6)]


def requests(count: int = 6) -> list[ChatRequest]:
    return [ChatRequest([{"role": "user", "content": f"Rate {i} as [[rating]]"}], {"max_tokens": 64}) for i in range(count)]


def test_nobody_listens_is_said_at_once_and_final_after_two_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted: list[tuple[int, int]] = []
    spec = JudgeSpec(model="m", base_url=closed_url())
    start = time.monotonic()
    with ChatClient(spec, tmp_path, role="models.far", progress=lambda *done: counted.append(done)) as client:
        with pytest.raises(
            UserError, match=r"did not answer 6 of 6 questions \(why: http.* is not reached: connection refused;"
        ):
            answer_by_client(client, QUESTIONS, HowToAnswer(4), AnswerStore(tmp_path / "a", "far", {}), "benchmarks.mt")
        assert client.budget.calls == 2
    assert time.monotonic() - start < 30
    assert counted == [], "what has failed is no answer"
    printed = capsys.readouterr().out
    assert "[models.far m] not reached (connection refused), trying again in 1 s" in printed
    assert printed.count("trying again") == 1


def test_a_name_that_nobody_knows_is_final_and_words_of_the_resolver_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with ChatClient(JudgeSpec(model="m", base_url="https://no.such.example/v1"), tmp_path, first_wait=0.01) as client:
        assert client.ask(requests()) == [None] * 6
        assert client.budget.calls == 2 and "nobody knows the name of its host" in str(client.budget.stopped)


def test_one_that_answers_late_is_waited_for_and_one_that_has_answered_is_tried_as_often_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    send, sent = Endpoint.send, []

    async def away(self: Endpoint, request: Any) -> str:
        sent.append(request)
        if len(sent) == 1 or 3 <= len(sent) <= 6:
            raise PassingFailure("connection refused", unreachable=True)
        return await send(self, request)

    monkeypatch.setattr(Endpoint, "send", away)
    with JudgeServer() as server:
        spec = JudgeSpec(model="m", base_url=server.url, concurrency=1)
        with ChatClient(spec, tmp_path, first_wait=0.005) as client:
            assert None not in client.ask(requests(3))
    assert len(sent) == 8
    assert capsys.readouterr().out.count("trying again") == 1, "once it has answered, repeated calls are only counted"


@pytest.mark.parametrize("fault", ["500", "400"])
def test_only_answers_are_counted(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(call: Call) -> str | None:
        return fault if call.number else None

    counted: list[tuple[int, int]] = []
    with JudgeServer(broken) as server:
        spec = JudgeSpec(model="m", base_url=server.url, max_retries=0, concurrency=1)
        with ChatClient(spec, tmp_path, first_wait=0.005, progress=lambda *done: counted.append(done)) as client:
            assert client.ask(requests()).count(None) == 5
    assert counted == [(1, 6)]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "1/6" in last and "5 failed" in last and "left" not in last


def test_a_served_teacher_is_given_up_after_two_calls_and_tried_longer_once_it_has_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Any] = []

    async def away(self: Endpoint, request: Any) -> str:
        sent.append(request)
        if answers and len(sent) == 1:
            return '{"choices": [{"prompt_logprobs": [null]}]}'
        raise PassingFailure("connection refused", unreachable=True)

    monkeypatch.setattr(Endpoint, "send", away)
    for answers, calls in ((False, 2), (True, 5)):
        sent.clear()
        client = ScoreClient(JudgeSpec(model="m", base_url=closed_url(), max_retries=3), "teacher m", Permissions(), 0.005)
        if answers:
            client.ask([ScoreRequest((1,), 2)])
        with pytest.raises(UserError, match=r"teacher m at http.*connection refused"):
            client.ask([ScoreRequest((2,), 2)])
        assert len(sent) == calls
    assert capsys.readouterr().out.count("trying again") == 1
