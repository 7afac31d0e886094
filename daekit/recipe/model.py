"""Where the models of recipes and suites come from: paths, earlier stages, configs, adapters, parts of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from daekit.recipe.reading import Choice, Flag, Free, Leaf, Number, Spec, Text, Whole, Written, as_text

Quantization = Literal["4bit", "8bit"]
Keep = Literal["hidden", "top_k", "sampled"]
KEEPS: tuple[str, ...] = get_args(Keep)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
STAGE = "stage:"
_CHECKPOINT = "@checkpoint-"


class CalibrationSpec(Spec):
    """Training rows on which a teacher's parts are ranked and candidates scored; nothing is trained on them here."""

    sources: tuple[Text, ...] = Field(
        (), description="Names of sources, which give equally many tokens each (default: those of the stage's data)."
    )
    tokens: Whole = Field(100_000, ge=1, description="How many tokens together.")
    max_length: Whole = Field(1024, ge=2, description="Longer rows are split into rows of so many tokens.")


class StudentSearchSpec(Spec):
    """The search for the shape of a student, and for what it keeps of its teacher."""

    parameters: tuple[Whole, ...] = Field(
        description="The smallest and the largest number of parameters allowed: [smallest, largest]."
    )
    granularity: Annotated[Literal["coarse", "fine"], Choice] = Field(
        "coarse", description="coarse: sizes only, the most important units; fine: also which layers and which units."
    )
    units: Annotated[Literal["layerwise", "uniform"], Choice] = Field(
        "layerwise",
        description="layerwise: units are ranked (and, if fine, chosen) in each layer by itself; uniform: alike in all layers.",
    )
    blocks: Whole = Field(8, ge=1, description="Hidden size and MLP width are chosen in blocks: the teacher's divided by this.")
    min_ratio: Number = Field(0.25, gt=0, le=1, description="Smallest size, as a ratio of the teacher's.")
    head_dims: tuple[Whole, ...] = Field((), description="Widths of a head to choose from (default: the teacher's).")
    strategy: Annotated[Literal["evolution", "random", "grid"], Choice] = Field(
        "evolution", description="How candidates are found; grid: all of a coarse space."
    )
    objective: Annotated[Literal["perplexity", "kl"], Choice] = Field(
        "perplexity", description="Candidates are compared by their perplexity, or by their KL to the teacher."
    )
    candidates: Whole = Field(200, ge=1, description="Number of candidates to score (a grid: all).")
    tokens: tuple[Whole, ...] = Field(
        (2048, 16384), description="Tokens per candidate, rising from round to round, at most those of the calibration."
    )
    keep: Number = Field(0.25, gt=0, le=1, description="Share of the candidates that reach the next round.")


class ModelSpec(Spec):
    """Where a model comes from: exactly one of path, stage and config; or an adapter; or, for a student, ``from``.

    A plain text is short for ``{path: ...}``, ``stage:NAME`` for ``{stage: NAME}``, ``stage:NAME@checkpoint-40`` for its
    checkpoint after 40 steps, and ``{from: TEACHER, ...}`` with the keys of ``StudentSpec`` makes a student from its teacher.

    One base, several models: a teacher, member of an ensemble or reference that is ``{adapter: A}`` and nothing else is a LoRA
    adapter of the base that the student is trained on (with ``lora`` or ``adapter``); the base is loaded once, in the student's
    dtype and quantisation. A student that is ``{adapter: A}`` goes on training that adapter (without ``lora``: rank and targets
    are its own) on the base that the stage of A had, loaded as it was there; of a directory, on ``path`` or the base it names.
    """

    NOUN: ClassVar = "a path or a mapping"

    path: Text | None = Field(
        None, description="Hub id or directory (a directory that holds a LoRA adapter is loaded on its base and merged)."
    )
    stage: Text | None = Field(None, description="The result of an earlier stage of this recipe.")
    checkpoint: Whole | None = Field(None, ge=1, description="Of `stage`: its checkpoint after so many steps, not its result.")
    adapter: Text | None = Field(
        None,
        description="`stage:NAME` (of an earlier LoRA stage), a directory, or, for a teacher, `base` (the base, adapter off).",
    )
    config: Free | None = Field(
        None,
        description="A model with random weights: `model_type` and the fields of its transformers config; vocab_size and "
        "special tokens are taken from the tokenizer unless given.",
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Annotated[Dtype, Choice] = Field("auto", description="The dtype that the weights are loaded in.")
    attn_implementation: Text | None = Field(
        None, description="sdpa, eager, flash_attention_2...; default: transformers' choice."
    )
    trust_remote_code: Flag = Field(False, description="Run the model's own code from its directory or hub repository.")
    quantization: Annotated[Quantization | None, Choice] = Field(
        None, description="4bit (nf4, double quantisation) or 8bit, by bitsandbytes; experts too."
    )
    device_map: Text | dict[str, Text] | None = Field(
        None,
        description="Of a teacher: the device that it lies on (`cuda:1`, `1`, `cpu`), `auto`, or a mapping of its modules to "
        "devices; default: the student's device.",
    )
    offload: Flag = Field(
        False,
        description="Of a teacher: its layers stay in host memory and are brought to the student's device one by one, the next "
        "while one runs; the device holds two of them at most.",
    )
    init: StudentSpec | None = Field(None, description="A student made from its teacher; written as `from`.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class; the keys beside ``from`` are those of ``StudentSpec``."""
        if isinstance(value, Mapping):
            if "from" not in value or "init" in value:
                return value
            return Written({"init": value}, value.path) if isinstance(value, Written) else {"init": value}
        text = as_text(value)
        if not isinstance(text, str):
            return value
        return placed({"path": text} if not text.startswith(STAGE) else stage_of(text.removeprefix(STAGE)), value)

    def compact(self, dumped: dict[str, Any]) -> dict[str, Any]:
        """A student made from its teacher is written as it is read."""
        return dumped.get("init", dumped)


def stage_of(reference: str) -> dict[str, Any]:
    """``NAME`` or ``NAME@checkpoint-40`` -> the keys of a model that it stands for."""
    name, _, step = reference.strip().partition(_CHECKPOINT)
    if step.isdecimal() and len(step) < 10:
        return {"stage": name, "checkpoint": int(step)}
    return {"stage": reference.strip()}


def placed(values: dict[str, Any], short: Any) -> dict[str, Any]:
    """What a shorthand stands for, where it was written."""
    return Written(values, short.path) if isinstance(short, Leaf) else values


class StudentSpec(Spec):
    """A student made from its teacher, before it is trained: ``student: {from: TEACHER, ...}``.

    One of: a part of the teacher, of a given ``shape`` or found by a ``search``; a Mixtral made ``dense`` (and cut, if a
    shape or a search is given, too), or with fewer experts (``keep_experts``); a Mixtral whose experts are the teacher and
    other dense models (``with``).
    """

    from_: ModelSpec = Field(alias="from", description="The teacher.")
    with_: tuple[ModelSpec, ...] = Field(
        (),
        alias="with",
        description="Further Mistral models of the same shape. Attention and embeddings are those of `from`.",
    )
    dense: Annotated[Literal["best_expert", "average", "routed_average", "top_neurons"] | None, Choice] = Field(
        None, description="How the experts of a layer become one MLP."
    )
    keep_experts: Whole | None = Field(None, ge=1, description="How many experts of each layer stay.")
    shape: dict[str, Whole] = Field(
        {}, description="Sizes by their names in the config (hidden_size...); those that are left out are the teacher's."
    )
    search: StudentSearchSpec | None = Field(None, description="Finds the shape instead.")
    importance: Annotated[Literal["activations", "first", "random"], Choice] = Field(
        "activations",
        description="What is kept: what counts most on calibration text (activations), the first or random parts.",
    )
    fit_norms: Flag = Field(
        False, description="Scale norms over fewer channels to what they gave over all of them, measured on calibration text."
    )
    calibration: CalibrationSpec = Field(CalibrationSpec(), description="The text that parts are ranked on.")


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
    path: Text | None = Field(None, description="Directory, to share it with other recipes; default: below output_dir.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class."""
        text = as_text(value)
        return placed({"keep": value}, value) if isinstance(text, str) else value


class ServerSpec(Spec):
    """A teacher behind a completions API that scores prompts (vLLM's ``prompt_logprobs``), with the student's tokenizer."""

    base_url: Text = Field(description="Such as http://localhost:8000/v1.")
    model: Text = Field(description="The name that the server knows it by; so do caches and resumed runs.")
    k: Whole = Field(
        20,
        ge=2,
        description="Its most likely tokens per position, the label among them; at most the server's --max-logprobs. With a "
        "cache: `cache.k`.",
    )
    api_key_env: Text | None = Field(
        None, description="Environment variable that holds the key (default: OPENAI_API_KEY at OpenAI's own hosts, else none)."
    )
    concurrency: Whole = Field(8, gt=0, description="Calls under way at a time; one call holds one row.")
    max_retries: Whole = Field(6, ge=0, description="How often a call that failed in passing is sent again.")
    timeout: Number = Field(120.0, gt=0, description="Seconds for a whole call, its body included.")


class WeightedModelSpec(Spec):
    """A member of an ensemble: a model and its weight; the weights of an ensemble sum to 1."""

    model: ModelSpec = Field(description="The model.")
    weight: Number = Field(description="Its weight; the weights of an ensemble sum to 1.")


class TeacherSpec(Spec):
    """One teacher: a model, an ensemble of several, a model that is served elsewhere, or the labels.

    Whatever is a model is a teacher too; an ensemble is ``{ensemble: [{model: M, weight: W}, ...], average: logits}``;
    ``{base_url: URL, model: NAME}`` is a ``ServerSpec``; ``labels`` are the rows' own tokens. With ``cache`` any of them but
    labels is read from disk; ``reference: {cache: ...}`` is the student as the stage finds it.
    """

    NOUN: ClassVar = "a path or a mapping"

    model: ModelSpec | None = Field(None, description="The model, if it is one.")
    ensemble: tuple[WeightedModelSpec, ...] = Field((), description="The members, if it is several.")
    average: Annotated[Literal["logits", "probabilities"], Choice] = Field(
        "logits", description="What of an ensemble's members is averaged."
    )
    server: ServerSpec | None = Field(None, description="Where it is served; its keys are written in its place.")
    labels: Flag = Field(False, description="The labels: forward_kl at temperature 1 is then the cross-entropy with them.")
    cache: CacheSpec | None = Field(None, description="Keep what it says on disk, and do not load it in training.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Whatever is a model is a teacher too."""
        if as_text(value) == "labels":
            return placed({"labels": True}, value)
        if not isinstance(value, Mapping):
            return Written({"model": value}, value.path) if isinstance(value, Leaf) else cls._of_model(value)
        kind = "server" if "base_url" in value else "model"
        if kind == "model" and any(key in cls.model_fields for key in value if key != "cache"):
            return value
        below = {key: each for key, each in value.items() if key != "cache"}
        values = {"cache": value["cache"]} if "cache" in value else {}
        if not isinstance(value, Written):
            return values | ({kind: below} if below else {})
        rest = Written(below, value.path, ("ensemble", "average", "cache", "base_url") if kind == "model" else ("cache",))
        return Written(values | ({kind: rest} if below else {}), value.path)

    @classmethod
    def _of_model(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @property
    def is_student(self) -> bool:
        """Whether it is the student as the stage finds it, which only a reference with a cache can be."""
        return self.model is None and self.server is None and not self.ensemble and not self.labels

    def compact(self, dumped: dict[str, Any]) -> Any:
        """A model alone is written without its key, labels as that word."""
        if self.labels:
            return "labels"
        kept = {"cache": dumped["cache"]} if self.cache else {}
        for kind in ("model", "server"):
            if getattr(self, kind):
                return dumped[kind] | kept
        return {key: dumped[key] for key in ("ensemble", "average") if self.ensemble} | kept
