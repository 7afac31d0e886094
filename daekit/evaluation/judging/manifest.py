"""What makes a score repeatable: judge, hashes, versions, seeds; no credentials."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

from daekit.evaluation.evaluate import SEED
from daekit.generation.calls import ChatRequest
from daekit.generation.client import ChatClient

_PACKAGES = ("daekit", "fschat", "alpaca_eval", "transformers", "torch")
# what decides when and whether a call is sent, but not what the judge says
_NOT_IN_MANIFEST = ("base_url", "path", "concurrency", "max_retries", "timeout", "batch_size")


def describe(client: ChatClient, benchmark: str, bootstrap: int, requests: Sequence[ChatRequest]) -> dict[str, Any]:
    """The part of a manifest that both benchmarks share."""
    spec, budget = client.spec, client.budget
    replies = [reply for reply in map(client.reply, requests) if reply is not None]
    judge = {key: value for key, value in spec.model_dump(mode="json").items() if key not in _NOT_IN_MANIFEST}
    return {
        "benchmark": benchmark,
        "judge": {"name": spec.name, **judge, "endpoint": client.identity},
        "judge_models": sorted({reply.model for reply in replies if reply.model}),
        "replies": len(replies),
        "calls": {"sent": budget.calls, "repeated": budget.retries, "failed": budget.failed, "stopped": budget.stopped},
        "tokens": {"prompt": budget.prompt_tokens, "completion": budget.completion_tokens},
        "cost": budget.cost if spec.price_prompt is not None else None,
        "bootstrap": {"rounds": bootstrap, "seed": SEED},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hash_of(value: Any) -> str:
    """Of a plain value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
