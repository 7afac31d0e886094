"""A judge: the model that rates answers, and how it is asked. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from daekit.recipe.model import Dtype, Quantization
from daekit.recipe.reading import Choice, FilePath, Number, Spec, Text, Whole
from daekit.recipe.validation import Problems, missing


class CallsSpec(Spec):
    """How an OpenAI-compatible endpoint is called."""

    api_key_env: Text | None = Field(
        None,
        description="Environment variable that holds the key, which is never written in a file (default: OPENAI_API_KEY at "
        "OpenAI's own hosts, elsewhere none).",
    )
    concurrency: Whole = Field(8, gt=0, description="Calls under way at a time.")
    max_retries: Whole = Field(
        6, ge=0, description="How often a call that failed (429, 5xx, time-out, broken reply) is sent again."
    )
    timeout: Number = Field(120.0, gt=0, description="Seconds for a whole call, its body included.")


class JudgeSpec(CallsSpec):
    """Who judges: exactly one of ``base_url`` (an OpenAI-compatible endpoint) and ``path`` (a model directory or hub id)."""

    model: Text | None = Field(
        None, description="The name that the endpoint knows it by; with `path` a name for the report (default: its last part)."
    )
    base_url: Text | None = Field(None, description="Such as https://api.openai.com/v1 or http://localhost:8000/v1.")
    path: FilePath | None = Field(None, description="A local judge, run in process with its own chat template.")
    max_tokens: Whole | None = Field(None, gt=0, description="Of a reply; default: the benchmark's (MT-Bench 2048).")
    token_limit: Annotated[Literal["max_tokens", "max_completion_tokens"], Choice] = Field(
        "max_tokens", description="The name under which the endpoint takes max_tokens; reasoning models want the newer one."
    )
    temperature: Number | None = Field(
        None, ge=0, description="Default: the benchmark's (MT-Bench 0; AlpacaEval: the annotator's)."
    )
    seed: Whole | None = Field(None, description="Sent with every call if given.")
    price_prompt: Number | None = Field(None, ge=0, description="Dollars per million tokens of prompts.")
    price_completion: Number | None = Field(None, ge=0, description="Dollars per million tokens of replies.")
    max_calls: Whole | None = Field(None, gt=0, description="Calls that one run may send at most, repeated ones included.")
    max_cost: Number | None = Field(None, gt=0, description="Dollars that one run may spend at most.")
    score_parser: Annotated[Literal["strict", "fastchat"], Choice] = Field(
        "strict",
        description="strict: the last [[rating]] within 1 and 10 (the last verdict of a pairwise game); fastchat: the first "
        "rating whatever its size, as FastChat reads it.",
    )
    batch_size: Whole = Field(8, gt=0, description="Prompts per batch of a local judge.")
    dtype: Annotated[Dtype, Choice] = Field("auto", description="Of a local judge's weights.")
    quantization: Annotated[Quantization | None, Choice] = Field(None, description="Of a local judge: 4bit or 8bit.")

    @property
    def name(self) -> str:
        """What the judge is called in files and reports."""
        return self.model or (self.path or "").rstrip("/").rpartition("/")[2]

    @property
    def endpoint(self) -> str:
        """Where the judge is, without credentials: the URL's scheme, host and path, or the model's path."""
        if self.base_url is None:
            return self.path or ""
        parts = urlsplit(self.base_url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path.rstrip('/')}"

    def problems(self) -> Problems:
        """Everything that contradicts itself."""
        if (self.base_url is None) == (self.path is None):
            yield "base_url", "name exactly one of base_url (https://api.openai.com/v1, say) and path (a model directory)"
        yield from missing("path", self.path, suffixes=())
        if self.base_url is not None:
            yield from (("base_url", sentence) for sentence in url_problems(self.base_url))
            if not self.model:
                yield "model", "is missing: the endpoint must be told which of its models judges"
        for key in self.changed("quantization", "dtype") if self.path is None else ():
            yield key, "belongs to a local judge (path); an endpoint decides it itself"
        if self.path is not None and self.temperature:
            yield "temperature", f"{self.temperature} is not possible with path: a local judge answers greedily; leave it out"
        if self.max_cost is not None and (self.price_prompt is None or self.price_completion is None):
            yield "max_cost", "needs price_prompt and price_completion (dollars per million tokens), or nothing can be counted"


def url_problems(url: str) -> Iterator[str]:
    """What is wrong with the URL of an endpoint. It is not quoted: what is wrong may be a key in it."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an address that is none
        yield "is no URL; it must be such as http://localhost:8000/v1"
        return
    if not sound:
        yield "must begin with http:// or https:// and name a host, such as http://localhost:8000/v1"
    if parts.username or parts.password or parts.query:
        yield "holds credentials or a query; put the key in the environment variable that api_key_env names"
