"""Whom a student follows: a model, an ensemble, one that is served, or the labels; asked in training, or read from a cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from daekit.errors import listed, nearest
from daekit.recipe.judge import CallsSpec, url_problems
from daekit.recipe.model import ModelSpec
from daekit.recipe.objective import Objective
from daekit.recipe.reading import Choice, FilePath, Flag, Number, Spec, Text, Whole
from daekit.recipe.validation import Problems, bad_directory

Keep = Literal["hidden", "top_k", "sampled"]
KEEPS: tuple[str, ...] = get_args(Keep)
_SUM_TOLERANCE = 1e-6


class CacheSpec(Spec):
    """Keep on disk what a teacher says about the rows: it is asked once, before the training, and not loaded in it.

    A plain text is short for ``{keep: ...}``.
    """

    NOUN: ClassVar = "hidden, top_k or sampled, or a mapping"

    keep: Annotated[Keep, Choice] = Field(
        description="hidden: hidden states and output head, exact for every divergence and temperature (width x bytes of the "
        "dtype per token); top_k: the most likely tokens and the mass of all others (5 k + 4 bytes); sampled: drawn tokens, "
        "unbiased for forward_kl at temperature 1 (about 50 bytes)."
    )
    k: Whole = Field(64, ge=3, description="Of top_k: tokens per position, the label and the end of turn among them.")
    draws: Whole = Field(50, ge=1, le=255, description="Of sampled: tokens drawn per position.")
    path: FilePath | None = Field(None, description="Directory, to share it with other recipes; default: below output_dir.")

    def problems(self) -> Problems:
        """Settings that would do nothing, and a path that is no directory."""
        yield from bad_directory("path", self.path)
        for key, keep in (("k", "top_k"), ("draws", "sampled")):
            if self.changed(key) and self.keep not in (None, keep):
                yield key, f"belongs to keep: {keep}, not to {self.keep}"

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class."""
        return {"keep": value} if isinstance(value, str) else value


class ServerSpec(CallsSpec):
    """A teacher behind a completions API that scores prompts (vLLM's ``prompt_logprobs``), with the student's tokenizer."""

    base_url: Text = Field(description="Such as http://localhost:8000/v1.")
    model: Text = Field(description="The name that the server knows it by; so do caches and resumed runs.")
    k: Whole = Field(
        20,
        ge=2,
        description="Its most likely tokens per position, the label among them; at most the server's --max-logprobs. With a "
        "cache: `cache.k`.",
    )

    def problems(self) -> Problems:
        """An URL that is none."""
        for message in url_problems(self.base_url) if self.base_url is not None else ():
            yield "base_url", message


class WeightedModelSpec(Spec):
    """A member of an ensemble: a model and its weight; the weights of an ensemble sum to 1."""

    model: ModelSpec = Field(description="The model.")
    weight: Number = Field(gt=0, description="Its weight; the weights of an ensemble sum to 1.")


Kind = Literal["model", "ensemble", "server", "labels", "student"]


class TeacherSpec(Spec):
    """One teacher: a model, an ensemble of several, a model that is served elsewhere, or the labels.

    Whatever is a model is a teacher too; an ensemble is ``{ensemble: [{model: M, weight: W}, ...], average: logits}``;
    ``{base_url: URL, model: NAME}`` is a ``ServerSpec``; ``labels`` are the rows' own tokens. With ``cache`` any of them but
    labels is read from disk; ``reference: {cache: ...}`` is the student as the stage finds it.
    """

    NOUN: ClassVar = "a path or a mapping"
    ALSO: ClassVar = ("base_url", *(name for name in ModelSpec.model_fields if name != "init"))

    model: ModelSpec | None = Field(None, description="The model, if it is one.")
    ensemble: tuple[WeightedModelSpec, ...] = Field((), description="The members, if it is several.")
    average: Annotated[Literal["logits", "probabilities"], Choice] = Field(
        "logits", description="What is averaged of its members."
    )
    server: ServerSpec | None = Field(None, description="Where it is served; its keys are written in its place.")
    labels: Flag = Field(False, description="The labels: forward_kl at temperature 1 is then the cross-entropy with them.")
    cache: CacheSpec | None = Field(None, description="Keep what it says on disk, and do not load it in training.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Whatever is a model is a teacher too; ``cache`` is written beside the keys of the model."""
        if value == "labels":
            return {"labels": True}
        if not isinstance(value, dict):
            return {"model": value} if isinstance(value, str | ModelSpec) else value
        kind = "server" if "base_url" in value else "model"
        if kind == "model" and value.keys() & cls.model_fields.keys() - {"cache"}:
            return value
        own = value.keys() if value.keys() & {"base_url", "from"} else ModelSpec.model_fields.keys()
        below = {key: each for key, each in value.items() if key in own and key != "cache"}
        return {key: each for key, each in value.items() if key not in below} | ({kind: below} if below else {})

    @property
    def kind(self) -> Kind:
        """What it is; the student as the stage finds it only a reference with a cache can be.

        Objects of each kind are made in ``runtime/models.py``; a cache tells them apart in ``runtime/caches.py``; all else
        asks the properties below, or looks at ``models``.
        """
        if self.labels:
            return "labels"
        return "server" if self.server else "ensemble" if self.ensemble else "model" if self.model else "student"

    @property
    def has_models(self) -> bool:
        """Whether it has weights here, and with them a distribution over all tokens for any text; cached or not."""
        return self.kind in ("model", "ensemble", "student")

    def cannot(self, loss: Objective, name: str) -> Iterator[tuple[str, str]]:
        """What of an objective it has nothing for, by the keys of ``loss``; ``name`` is its own key."""
        kind, cached = self.kind, self.cache is not None
        what = {"labels": "labels", "server": "a server"}.get(kind, "a cache" if cached else None)
        named, drawn = f"{what} ({name})", self.cache is not None and self.cache.keep == "sampled" and kind != "server"
        if (cached or kind == "labels") and loss.on_policy:
            has = (
                "a cache ({}) has what its teacher said of rows that were there, not" if cached else "labels ({}) cannot score"
            )
            yield "on_policy", f"{has.format(name)} what the student is yet to write; set it to 0, or give the teacher itself"
        if kind == "server" and loss.temperature != 1.0:
            yield "temperature", f"{named} sends log-probabilities at temperature 1, and a tail cannot be tempered; set it to 1"
        if (drawn or kind == "labels") and (loss.divergence != "forward_kl" or loss.temperature != 1.0):
            wrong = "divergence" if loss.divergence != "forward_kl" else "temperature"
            yield wrong, f"{'drawn tokens of ' if drawn else ''}{named} give forward_kl at temperature 1 only; use it"
        for weight in [name for name in ("attention_weight", "hidden_weight") if getattr(loss, name)]:
            if what is not None:
                has = "no layers" if kind == "labels" else "distributions alone, not what layers did"
                yield weight, f"{named} has {has}; set it to 0{', or leave `cache` out' if what == 'a cache' else ''}"
            elif kind == "ensemble":
                has = f"an ensemble ({name}) has no attention or hidden states of its own"
                yield weight, f"{has}; set {weight} to 0, or name one model"

    def problems(self) -> Problems:
        """Neither one model, nor several, nor the labels; weights that are no mean."""
        cache, server = self.cache, self.server
        kinds = sum([self.model is not None, bool(self.ensemble), server is not None, self.labels])
        if kinds > 1 or (kinds == 0 and cache is None):
            yield (), "a teacher is exactly one of a model, an ensemble, a served model and labels"
        elif self.changed("average") and not self.ensemble:
            yield "average", "only an ensemble is averaged"
        path = (self.model and self.model.path) or ""
        if "/" not in path and (meant := nearest(path, ["labels"])) and not os.path.exists(path):
            message = f"{path!r} is no model here{meant} (that word alone; a directory is written ./{path})"
            yield ("model", "path"), message
        if self.labels and cache is not None:
            yield "cache", "labels are in the rows already; remove it"
        if server is not None and cache is not None and cache.keep not in (None, "top_k"):
            only = "a server sends the log-probabilities of its most likely tokens only; use keep: top_k"
            yield ("cache", "keep"), f"{cache.keep}: {only}"
        if server is not None and cache is not None and server.changed("k"):
            yield "k", "with a cache it is `cache.k`; remove it here"
        weights = [member.weight for member in self.ensemble if member is not None and member.weight is not None]
        if weights and abs(sum(weights) - 1) > _SUM_TOLERANCE:
            yield "ensemble", f"the weights {listed(map(str, weights))} sum to {sum(weights):.6g}, must sum to 1"

    def models(self) -> dict[tuple[str | int, ...], ModelSpec]:
        """Key path -> every model that it consists of."""
        models: dict[tuple[str | int, ...], ModelSpec | None] = {(): self.model}
        models |= {("ensemble", at, "model"): member.model for at, member in enumerate(self.ensemble) if member is not None}
        return {path: model for path, model in models.items() if model is not None}

    def compact(self, dumped: dict[str, Any]) -> Any:
        """A model alone is written without its key, labels as that word."""
        kind, kept = self.kind, {"cache": dumped["cache"]} if self.cache else {}
        if kind in ("model", "server"):
            return dumped[kind] | kept
        ensemble = {key: dumped[key] for key in ("ensemble", "average") if kind == "ensemble"}
        return "labels" if kind == "labels" else ensemble | kept
