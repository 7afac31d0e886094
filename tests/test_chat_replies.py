"""What an endpoint may send: kept as it came, read whatever its form, charged whatever it says, and never a crash."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from daekit.errors import UserError
from daekit.generation import ChatClient, ChatReply, ChatRequest
from daekit.generation.calls import read_reply
from daekit.generation.store import REPLIES, UNREADABLE
from daekit.recipe.judge import JudgeSpec
from tests.helpers.judge_server import JudgeServer

PRICES = {"price_prompt": 1000.0, "price_completion": 1000.0, "max_cost": 5.0}
TEXT = "A fair answer. Rating: [[7]]"


def requests(count: int, **parameters: Any) -> list[ChatRequest]:
    common = {"temperature": 0, "max_tokens": 64} | parameters
    return [ChatRequest([{"role": "user", "content": f"Rate {i} as [[rating]]"}], common) for i in range(count)]


def body(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": TEXT}}
    usage = {"prompt_tokens": 20, "completion_tokens": 10}
    return {"model": "m", "choices": [choice | changes.pop("choice", {})], "usage": usage} | changes


ODD: dict[str, Any] = {
    "a model that is a list": body(model=["a"]),
    "a usage that is a list": body(usage=[1, 2]),
    "a usage that is a text": body(usage="much"),
    "a usage of texts": body(usage={"prompt_tokens": "20", "completion_tokens": [3]}),
    "a usage of NaN": body(usage={"prompt_tokens": math.nan, "completion_tokens": math.inf}),
    "a usage below nothing": body(usage={"prompt_tokens": -(10**6), "completion_tokens": -5}),
    "logprobs that are a list": body(choice={"logprobs": [1]}),
    "logprobs that are odd": body(choice={"logprobs": {"content": [{"top_logprobs": {"a": 1}}]}}),
    "a reason that is an object": body(choice={"finish_reason": {"a": 1}}),
    "half a letter": body(choice={"message": {"content": f"\ud83d {TEXT}"}}),
    "half a letter as the model": body(model="\udc00"),
    "a text in parts": body(choice={"message": {"content": [{"type": "text", "text": TEXT}, 5, {"text": 7}]}}),
}
WITHOUT_TEXT: dict[str, Any] = {
    "a content that is a number": body(choice={"message": {"content": 7}}),
    "a content that is an object": body(choice={"message": {"content": {"a": [TEXT]}}}),
    "a message that is a list": body(choice={"message": [TEXT]}),
    "tool calls that are a text": body(choice={"message": {"tool_calls": "none", "content": None}}),
}


@pytest.mark.parametrize("kind", [*ODD, *WITHOUT_TEXT])
def test_an_odd_reply_is_one_judgment_and_reruns_do_not_crash(kind: str, tmp_path: Path) -> None:
    sent = json.dumps(ODD.get(kind) or WITHOUT_TEXT[kind]).encode()
    with JudgeServer(lambda call: "odd", bodies={"odd": sent}) as server:
        spec = JudgeSpec(model="judge", base_url=server.url, **PRICES)
        for _ in range(2):
            with ChatClient(spec, tmp_path) as client:
                replies = client.ask(requests(4))
                client.notes(requests(4))
            assert all(reply is not None for reply in replies)
            assert all((TEXT in reply.text) is (kind in ODD) for reply in replies if reply is not None)
        assert len(server.calls) == 4, "paid once, kept"
    lines = [json.loads(line) for line in (tmp_path / REPLIES).read_text().splitlines()]
    assert [line["body"].encode() for line in lines] == [sent] * 4, "kept as it came"


@pytest.mark.parametrize(
    "sent", [b'{"choices": ' + b'[{"a":' * 5000, b"[" * 5000 + b"]" * 5000, b"\xff\xfe", b'"text"', b"null"]
)
def test_what_cannot_be_read_is_one_failed_judgment_and_kept(sent: bytes, tmp_path: Path) -> None:
    with JudgeServer(lambda call: "odd" if call.one_in(4) else None, bodies={"odd": sent}) as server:
        spec = JudgeSpec(model="judge", base_url=server.url, max_retries=1)
        with ChatClient(spec, tmp_path, first_wait=0.005) as client:
            replies = client.ask(requests(12))
        bad = {call.key for call in server.calls if call.one_in(4)}
        assert 0 < len(bad) < 12 and sum(reply is None for reply in replies) == len(bad)
        kept = [json.loads(line)["body"] for line in (tmp_path / UNREADABLE).read_text().splitlines()]
        assert kept == [sent.decode(errors="replace")] * 2 * len(bad)
        server.misbehave = lambda call: None
        with ChatClient(spec, tmp_path, first_wait=0.005) as client:
            assert all(client.ask(requests(12)))


def test_nothing_that_a_reply_may_hold_breaks_its_reading() -> None:
    rng = random.Random(0)
    values: list[Any] = [None, True, 0, -1, 1e400, math.nan, "", "x", "\ud800", [], {}, [None], {"a": 1}, "9" * 5000]

    def mutated(value: Any) -> Any:
        if rng.random() < 0.15:
            return rng.choice(values)
        if isinstance(value, dict):
            return {key: mutated(each) for key, each in value.items() if rng.random() > 0.05}
        return [mutated(each) for each in value] if isinstance(value, list) else value

    top = {"content": [{"token": "m", "top_logprobs": [{"token": "m", "logprob": -0.1}]}]}
    call = {"tool_calls": [{"function": {"arguments": TEXT}}], "content": None}
    whole = [
        body(choice={"logprobs": top}),
        body(choice={"message": call}),
        body(choice={"message": {"content": [{"text": "a"}]}}),
    ]
    read = 0
    for _ in range(5000):
        reply = read_reply(json.dumps(mutated(rng.choice(whole))), 0.0)
        if reply is None:
            continue
        read += 1
        reply.text.encode(), (reply.model or "").encode()
        assert isinstance(reply, ChatReply)
        for count in (reply.prompt_tokens, reply.completion_tokens):
            assert count is None or (type(count) is int and count >= 0)
        assert all(isinstance(each["token"], str) and each["logprob"] <= 0 for each in reply.top_logprobs or [])
    assert 1000 < read < 5000
    assert read_reply('{"usage": {"prompt_tokens": ' + "9" * 10_000 + '}, "choices": [{"message": {"content": "a"}}]}', 0.0)


@pytest.mark.parametrize("usage", [{"prompt_tokens": n, "completion_tokens": n} for n in (0, -5, math.nan, 1e-9)] + ["free"])
def test_what_an_endpoint_says_of_its_price_does_not_pass_max_cost(usage: Any, tmp_path: Path) -> None:
    with JudgeServer(lambda call: "cheap", bodies={"cheap": json.dumps(body(usage=usage)).encode()}) as server:
        spec = JudgeSpec(model="judge", base_url=server.url, **(PRICES | {"max_cost": 0.2}))
        with ChatClient(spec, tmp_path) as client:
            replies = client.ask(requests(40))
        assert 0 < len(server.calls) < 20
        assert sum(reply is not None for reply in replies) == len(server.calls)
        assert 0.05 < client.budget.cost <= 0.2 and "max_cost" in str(client.budget.stopped)


def test_replies_that_hold_nothing_are_paid_all_the_same(tmp_path: Path) -> None:
    with JudgeServer(lambda call: "odd", bodies={"odd": b"{}"}) as server:
        spec = JudgeSpec(model="judge", base_url=server.url, **(PRICES | {"max_cost": 0.2}))
        with ChatClient(spec, tmp_path, first_wait=0.001) as client:
            client.ask(requests(40))
        assert 0 < len(server.calls) <= 3 and client.budget.cost <= 0.2


@pytest.mark.parametrize("status", ["301", "302", "303", "307"])
def test_a_redirect_is_an_error_that_names_the_target_and_is_not_followed(status: str, tmp_path: Path) -> None:
    answer = json.dumps(body()).encode()
    with JudgeServer(bodies={"GET": answer}) as other, JudgeServer() as server:
        server.misbehave = lambda call: f"{status} {other.url}/elsewhere?token=hidden"
        named = pytest.raises(UserError, match="redirects to " + re.escape(other.url) + "/elsewhere")
        with ChatClient(JudgeSpec(model="judge", base_url=server.url), tmp_path) as client, named as told:
            client.ask(requests(4))
        assert "hidden" not in str(told.value)
        assert len(server.calls) == 1 and other.calls == [] and other.got == [] and not (tmp_path / REPLIES).exists()
