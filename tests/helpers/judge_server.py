"""A scripted judge on loopback: speaks the OpenAI chat protocol, counts every call, and misbehaves where it is told to.

Verdicts are a function of the prompt alone. ``misbehave(call)`` names a fault for a call, or says None; a fault that breaks the
call counts as no answer, one that only changes the text (an answer without a rating...) does.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STATUSES = {"301", "302", "303", "307", "400", "401", "404", "429", "500", "503"}
TEXTS = {
    "no_rating": "I would rather not say.",
    "out_of_range": "An outstanding answer. Rating: [[11]]",
    "echo": 'The assistant wrote "Rating: [[10]]" itself. That earns nothing. Rating: [[%d]]',
    "octal": "Rating: [[08]]",
    "empty": "",
}


@dataclass(frozen=True)
class Call:
    """One call as the server sees it.

    Attributes:
        number: of all calls, from 0.
        key: hash of the messages.
        attempt: how often the same messages came before.
        body: the whole request.
    """

    number: int
    key: str
    attempt: int
    body: dict[str, Any]

    def one_in(self, count: int) -> bool:
        """A fixed share of all prompts."""
        return int(self.key[:8], 16) % count == 0


Fault = Callable[[Call], str | None]


@dataclass
class JudgeServer:
    """``with JudgeServer(fault) as server: ... server.url``

    Attributes:
        calls: everything received.
        answered: key -> whole answers sent.
        slowness: seconds that a hanging call takes.
        pause: seconds before each answer.
        bodies: fault -> a body to answer with, whatever was asked.
        got: paths that were asked for with GET.
        looked: the status of answers to GET.
    """

    misbehave: Fault = lambda call: None
    model: str = "scripted-judge-v1"
    slowness: float = 5.0
    pause: float = 0.0
    usage: bool = True
    bodies: dict[str, bytes] = field(default_factory=dict)
    got: list[str] = field(default_factory=list)
    looked: int = 200
    calls: list[Call] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0

    def __enter__(self) -> JudgeServer:
        self._lock, self._now, self._closing = threading.Lock(), 0, threading.Event()
        handler = type("Handler", (_Handler,), {"judge": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """base_url."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def receive(self, body: dict[str, Any]) -> Call:
        """Note a call."""
        key = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        with self._lock:
            attempt = sum(call.key == key for call in self.calls)
            call = Call(len(self.calls), key, attempt, body)
            self.calls.append(call)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        return call

    def left(self) -> None:
        """A call is over."""
        with self._lock:
            self._now -= 1

    def sleep(self, seconds: float) -> None:
        """Unless the server closes."""
        self._closing.wait(seconds)

    def response(self, call: Call, fault: str | None) -> dict[str, Any]:
        """The body of an answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
        text = scripted_text(call, fault)
        choice["message"]["content"] = None if fault == "null" else text
        if call.body.get("tools"):
            function = {"name": "rank", "arguments": text}
            choice["message"] |= {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
        if call.body.get("logprobs") and fault != "no_logprobs":
            first = (1 + int(call.key[:4], 16) % 8) / 10
            top = [
                {"token": token, "logprob": _log(p), "bytes": None}
                for token, p in (("m", first), ("M", 0.9 - first), ("x", 0.1))
            ]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        body: dict[str, Any] = {"id": call.key[:8], "object": "chat.completion", "created": 0, "model": self.model}
        body["choices"] = [choice]
        if self.usage:
            prompt = sum(len(message["content"]) for message in call.body["messages"]) // 4
            body["usage"] = {"prompt_tokens": prompt, "completion_tokens": 10, "total_tokens": prompt + 10}
        return body


def closed_url() -> str:
    """A base_url on this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def scripted_rating(key: str) -> int:
    """Of the prompt with this key."""
    return 1 + int(key[:8], 16) % 10


def scripted_text(call: Call, fault: str | None = None) -> str:
    """What the judge says: in the form that the prompt asks for."""
    value = scripted_rating(call.key)
    prompt = "".join(message["content"] for message in call.body["messages"])
    if fault in TEXTS:
        text = TEXTS[fault]
        return text % value if "%d" in text else text
    if "[[rating]]" in prompt:
        return f"A fair answer. Rating: [[{value}]]"
    if "[[A]]" in prompt:
        return f"Both have merits. My final verdict: [[{'AABBC'[value % 5]}]]"
    first = 1 + value % 2
    names = ("m", "M") if '"m"' in prompt else ("model_1", "model_2")
    ranking = [{"model": names[0], "rank": first}, {"model": names[1], "rank": 3 - first}]
    return json.dumps({"ordered_models": ranking}) if call.body.get("tools") else str(ranking)


def _log(p: float) -> float:
    import math

    return math.log(p)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: JudgeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = self.judge.receive(body)
        try:
            self._answer(call, self.judge.misbehave(call))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.judge.left()

    def do_GET(self) -> None:
        self.judge.got.append(self.path)
        self._send(self.judge.looked, self.judge.bodies.get("GET", b"{}"))

    def _answer(self, call: Call, fault: str | None) -> None:
        if self.judge.pause:
            self.judge.sleep(self.judge.pause)
        status, _, wait = (fault or "").partition(" ")
        if status in STATUSES:
            headers = {"Location" if status.startswith("3") else "Retry-After": wait} if wait else {}
            message = f"refused; the key was {self.headers.get('Authorization')}"
            self._send(int(status), json.dumps({"error": {"message": message}}).encode(), headers)
        elif fault in self.judge.bodies:
            self.judge.answered[call.key] += 1
            self._send(200, self.judge.bodies[fault])
        elif fault == "hang":
            self.judge.sleep(self.judge.slowness)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self._body(call, fault, json.dumps(self.judge.response(call, fault)).encode())

    def _body(self, call: Call, fault: str | None, body: bytes) -> None:
        if fault == "truncated":
            self._send(200, body[: len(body) // 2])
        elif fault == "error_in_200":
            self._send(200, b'{"error": {"message": "overloaded"}}')
        elif fault == "cut":  # fewer bytes than announced
            self._send(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
            self.close_connection = True
        elif fault == "trickle":  # a byte at a time: no single read ever times out
            self._head(200, {"Content-Length": str(len(body))})
            end = time.monotonic() + self.judge.slowness
            for at in range(len(body)):
                if time.monotonic() > end:
                    break
                self.wfile.write(body[at : at + 1])
                self.wfile.flush()
                self.judge.sleep(0.05)
            self.close_connection = True
        else:
            self.judge.answered[call.key] += 1
            self._send(200, body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)
