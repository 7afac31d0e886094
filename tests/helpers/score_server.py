"""A scripted server on loopback that scores prompts as vLLM's completions API does, by a real model.

``vllm/entrypoints/openai/completion``: ``prompt`` is a list of ids or a text; the first entry of ``prompt_logprobs`` is null,
each further one holds the prompt's own token and the K most likely ones (K or K + 1 entries); K beyond ``max_logprobs`` is
HTTP 400.
``misbehave(call)`` names a fault for the call of that number, counted from 0.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class ScoreServer:
    """``with ScoreServer(model, tokenizer) as server: ... server.url``

    Attributes:
        calls: every request.
        keys: every Authorization header.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    misbehave: Callable[[int], str | None] = lambda number: None
    name: str = "big"
    max_logprobs: int = 20
    max_model_len: int = 256
    says_ids: bool = True  # return_token_ids came in later versions
    calls: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0

    def __enter__(self) -> ScoreServer:
        self._lock, self._now = threading.Lock(), 0
        self.model.eval()
        handler = type("Handler", (_Handler,), {"scores": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def receive(self, body: dict[str, Any], key: str | None) -> int:
        with self._lock:
            self.calls.append(body)
            self.keys.append(key)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return len(self.calls) - 1

    def left(self) -> None:
        with self._lock:
            self._now -= 1

    def answer(self, body: dict[str, Any], fault: str | None) -> tuple[int, dict[str, Any]]:
        """(status, content) of an answer."""
        k = body["prompt_logprobs"]
        if body["model"] != self.name:
            return 404, _error(f"The model `{body['model']}` does not exist.", 404)
        if k > self.max_logprobs and fault != "fewer":
            return 400, _error(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}",
                400,
                "prompt_logprobs",
            )
        prompt = body["prompt"]
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if len(ids) + body["max_tokens"] > self.max_model_len:
            return 400, _error(f"This model's maximum context length is {self.max_model_len} tokens.", 400)
        entries = self._entries(ids, min(k, self.max_logprobs), fault)
        choice = {
            "index": 0,
            "text": "w1",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [4] if self.says_ids else None,
            "prompt_logprobs": entries,
            "prompt_token_ids": ids if self.says_ids else None,
        }
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1, "prompt_tokens_details": None}
        return 200, {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": self.name, "choices": [choice]} | {
            "usage": usage
        }

    def _entries(self, ids: list[int], k: int, fault: str | None) -> list[Any]:
        with self._lock, torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, :, : len(self.tokenizer)].float()
        if fault == "nan":
            logits[-2] = torch.nan
        scores = logits if fault == "raw_logits" else logits.log_softmax(-1)
        entries: list[Any] = [None]
        for position, token in enumerate(ids[1:]):
            best = scores[position].topk(k).indices.tolist() if k else []
            rank = int((scores[position] > scores[position, token]).sum()) + 1
            named = {token: rank} | {each: place for place, each in enumerate(best, 1)}
            entries.append(
                {
                    str(each): {
                        "logprob": None if scores[position, each].isnan() else float(scores[position, each]),
                        "rank": rank,
                        "decoded_token": self.tokenizer.decode([each]),
                    }
                    for each, rank in named.items()
                }
            )
        return [*entries[1:], None] if fault == "shifted" else entries


def _error(message: str, code: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": param, "code": code}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scores: ScoreServer

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = self.scores.receive(body, self.headers.get("Authorization"))
        fault = self.scores.misbehave(number)
        try:
            if self.path != "/v1/completions":
                self._send(404, b'{"detail": "Not Found"}')
            elif fault is not None and fault.isdecimal():
                self._send(int(fault), json.dumps(_error("overloaded", int(fault))).encode())
            elif fault == "hang":
                time.sleep(1.0)
                self.close_connection = True
            else:
                status, content = self.scores.answer(body, fault)
                sent = json.dumps(content).encode()
                if fault == "half of the rows" and status == 200:
                    del content["choices"][0]["prompt_logprobs"][-1]
                    sent = json.dumps(content).encode()
                if fault == "no scores" and status == 200:
                    content["choices"][0]["prompt_logprobs"] = None
                    sent = json.dumps(content).encode()
                self._send(status, sent[: len(sent) // 2] if fault == "half" else sent)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.scores.left()

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
