"""Where the models of recipes and suites come from: paths, earlier stages, configs, adapters, parts of a teacher."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from daekit.errors import listed
from daekit.recipe.adapter_config import STAGE, same_base
from daekit.recipe.reading import Choice, FilePath, Flag, Free, Number, Spec, Text, Whole
from daekit.recipe.validation import Problems, missing

Quantization = Literal["4bit", "8bit"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_CHECKPOINT = "@checkpoint-"
Size = Literal[
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"
]
Positive = Annotated[Whole, Field(ge=1)]
# What takes a place of `device_map`; torch is not imported here to be asked.
_DEVICE = re.compile(r"(cpu|[0-9]{1,4}|(cuda|xpu|npu|hpu|mps)(:[0-9]{1,4})?)")
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


class CalibrationSpec(Spec):
    """Training rows on which a teacher's parts are ranked and candidates scored; nothing is trained on them here."""

    sources: tuple[Text, ...] = Field((), description="Sources, which give equally many tokens each (default: the stage's).")
    tokens: Whole = Field(100_000, ge=1, description="How many tokens together.")
    max_length: Whole = Field(1024, ge=2, description="Longer rows are split into rows of so many tokens.")


class StudentSearchSpec(Spec):
    """The search for the shape of a student, and for what it keeps of its teacher."""

    parameters: tuple[Positive, ...] = Field(description="Numbers of parameters allowed: [smallest, largest].")
    granularity: Annotated[Literal["coarse", "fine"], Choice] = Field(
        "coarse", description="coarse: sizes only, the most important units; fine: also which layers and which units."
    )
    units: Annotated[Literal["layerwise", "uniform"], Choice] = Field(
        "layerwise",
        description="layerwise: units are ranked (and, if fine, chosen) in each layer by itself; uniform: alike in all layers.",
    )
    blocks: Whole = Field(8, ge=1, description="Hidden size and MLP width are chosen in blocks: the teacher's divided by this.")
    min_ratio: Number = Field(0.25, gt=0, le=1, description="Smallest size, as a ratio of the teacher's.")
    head_dims: tuple[Positive, ...] = Field((), description="Widths of a head to choose from (default: the teacher's).")
    strategy: Annotated[Literal["evolution", "random", "grid"], Choice] = Field(
        "evolution", description="How candidates are found; grid: all of a coarse space."
    )
    objective: Annotated[Literal["perplexity", "kl"], Choice] = Field(
        "perplexity", description="Candidates are compared by their perplexity, or by their KL to the teacher."
    )
    candidates: Whole = Field(200, ge=1, description="Number of candidates to score (a grid: all).")
    tokens: tuple[Positive, ...] = Field(
        (2048, 16384),
        min_length=1,
        description="Tokens per candidate, rising from round to round, at most those of the calibration.",
    )
    keep: Number = Field(0.25, gt=0, le=1, description="Share of the candidates that reach the next round.")

    def problems(self) -> Problems:
        """Ranges that are none, and a search without end."""
        window = self.parameters
        if window is not None and (len(window) != 2 or window[0] > window[1]):
            yield "parameters", f"{listed(map(str, window))}: wants [smallest, largest] number of parameters"
        if any(later <= earlier for earlier, later in pairwise(self.tokens)):
            yield "tokens", "wants numbers that rise from round to round, such as [2048, 16384]"
        if self.strategy == "grid" and self.granularity == "fine":
            yield "strategy", "a grid over a fine space would never end; use granularity: coarse, or evolution"


class LoadingSpec(Spec):
    """How the weights of a hub id or directory are loaded."""

    revision: Text | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Annotated[Dtype, Choice] = Field("auto", description="The dtype that the weights are loaded in.")
    attn_implementation: Text | None = Field(None, description="sdpa, eager, flash_attention_2... (default: transformers').")
    trust_remote_code: Flag = Field(False, description="Run the model's own code from its directory or hub repository.")
    quantization: Annotated[Quantization | None, Choice] = Field(
        None, description="4bit (nf4, double quantisation) or 8bit, by bitsandbytes; experts too."
    )


class ModelSpec(LoadingSpec):
    """Where a model comes from: exactly one of path, stage and config; or an adapter; or, for a student, ``from``.

    A plain text is short for ``{path: ...}``, ``stage:NAME`` for ``{stage: NAME}``, ``stage:NAME@checkpoint-40`` for its
    checkpoint after 40 steps, and ``{from: TEACHER, ...}`` with the keys of ``StudentSpec`` makes a student from its teacher.

    One base, several models: a teacher, member of an ensemble or reference that is ``{adapter: A}`` and nothing else is a LoRA
    adapter of the base that the student is trained on (with ``lora`` or ``adapter``); the base is loaded once, in the student's
    dtype and quantisation. A student that is ``{adapter: A}`` goes on training that adapter (without ``lora``: rank and targets
    are its own) on the base that the stage of A had, loaded as it was there; of a directory, on ``path`` or the base it names.
    """

    NOUN: ClassVar = "a path or a mapping"

    path: FilePath | None = Field(
        None, description="Hub id or directory (a directory that holds a LoRA adapter is loaded on its base and merged)."
    )
    stage: Text | None = Field(None, description="The result of an earlier stage of this recipe.")
    checkpoint: Whole | None = Field(None, ge=1, description="Of `stage`: its checkpoint after so many steps, not its result.")
    adapter: FilePath | None = Field(
        None,
        description="`stage:NAME` (of an earlier LoRA stage), a directory, or, for a teacher, `base` (the base, adapter off).",
    )
    config: Free | None = Field(
        None,
        description="A model with random weights: `model_type` and the fields of its transformers config; vocab_size and "
        "special tokens are taken from the tokenizer unless given.",
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
    whole: Flag = Field(
        False,
        description="Of a teacher under FSDP2 and ZeRO-3: whole on each device, where its layers need not be gathered, instead "
        "of split.",
    )
    init: StudentSpec | None = Field(None, description="A student made from its teacher; written as `from`.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class; the keys beside ``from`` are those of ``StudentSpec``."""
        if isinstance(value, str):
            return stage_of(value.removeprefix(STAGE)) if value.startswith(STAGE) else {"path": value}
        return {"init": value} if isinstance(value, dict) and "from" in value and "init" not in value else value

    def problems(self) -> Problems:
        """Keys that say nothing of this kind of model, and devices that are none."""
        yield from missing((), self.path, suffixes=())
        if self.revision is not None and self.path is None and self.adapter is None:
            yield "revision", "only a model with a `path` has a revision"
        if self.checkpoint is not None and self.stage is None:
            yield "checkpoint", "only a `stage` has checkpoints; a checkpoint elsewhere is a `path`"
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            yield ("config", "model_type"), "a model from a config needs its `model_type` (mistral, mixtral, llama...)"
        if self.config is not None and self.quantization is not None:
            yield "quantization", f"random weights cannot be quantized; remove `quantization: {self.quantization}`"
        if self.offload and self.device_map is not None:
            yield "offload", "excludes device_map: it brings the layers to the student's device"
        if self.offload and self.quantization == "8bit":
            yield "offload", "does not work with quantization: 8bit, whose weights stay out of reach; use 4bit or none"
        if self.whole and (self.offload or self.device_map is not None):
            yield "whole", "excludes offload and device_map, which place the model already"
        if self.device_map is not None and self.config is not None:
            yield "device_map", "a model made from a config is made where the student is; remove it"
        elif self.device_map is not None and not self.device_map:
            yield "device_map", "must not be empty; leave it out for the student's device"
        elif self.device_map is not None and self.device_map not in SPREADS:
            devices = self.device_map.values() if isinstance(self.device_map, dict) else [self.device_map]
            wrong = [device for device in devices if not _DEVICE.fullmatch(device)]
            if "disk" in wrong:
                yield "device_map", "disk is not supported: the loss needs the weights; use `offload: true` or quantization"
            elif wrong:
                yield "device_map", f"{wrong[0]!r} is no device (cpu, cuda:0, 0...), nor, for a whole model, {listed(SPREADS)}"

    def with_base_of(self, origin: ModelSpec) -> ModelSpec:
        """This student, which continues the adapter of a stage; what it does not say of its base is that of the stage's."""
        return origin.model_copy(update={key: getattr(self, key) for key in self.changed(*ModelSpec.model_fields)})

    def may_be(self, other: ModelSpec) -> bool:
        """Whether two bases can be one model; a stage and a path only where the path leads to what it has written."""
        if self.path is not None and other.path is not None:
            return same_base(self.path, other.path) and self.revision == other.revision
        if self.stage is not None and other.stage is not None:
            return (self.stage, self.checkpoint) == (other.stage, other.checkpoint)
        path, stage = self.path or other.path, self.stage or other.stage
        if path is not None and stage is not None:
            return any(f"/stages/{stage}/" in f"/{each}/" for each in (path, os.path.realpath(os.path.expanduser(path))))
        return self.config is None and other.config is None

    def compact(self, dumped: dict[str, Any]) -> dict[str, Any]:
        """A student made from its teacher is written as it is read."""
        return dumped.get("init", dumped)


def stage_of(reference: str) -> dict[str, Any]:
    """``NAME`` or ``NAME@checkpoint-40`` -> the keys of a model that it stands for."""
    name, _, step = reference.strip().partition(_CHECKPOINT)
    if step.isdecimal() and len(step) < 10:
        return {"stage": name, "checkpoint": int(step)}
    return {"stage": reference.strip()}


class StudentSpec(Spec):
    """A student made from its teacher, before it is trained: ``student: {from: TEACHER, ...}``.

    One of: a part of the teacher, of a given ``shape`` or found by a ``search``; a Mixtral made ``dense`` (and cut, if a
    shape or a search is given, too), or with fewer experts (``keep_experts``); a Mixtral whose experts are the teacher and
    other dense models (``with``).
    """

    from_: ModelSpec = Field(alias="from", description="The teacher.")
    with_: tuple[ModelSpec, ...] = Field(
        (), alias="with", description="Further Mistral models of the same shape. Attention and embeddings are those of `from`."
    )
    dense: Annotated[Literal["best_expert", "average", "routed_average", "top_neurons"] | None, Choice] = Field(
        None, description="How the experts of a layer become one MLP."
    )
    keep_experts: Whole | None = Field(None, ge=1, description="How many experts of each layer stay.")
    shape: dict[Annotated[Size, Choice], Positive] = Field(
        {}, description="Sizes by their names in the config (hidden_size...); those that are left out are the teacher's."
    )
    search: StudentSearchSpec | None = Field(None, description="Finds the shape instead.")
    importance: Annotated[Literal["activations", "first", "random"], Choice] = Field(
        "activations",
        description="What is kept: what counts most on calibration text (activations), the first or random parts.",
    )
    fit_norms: Flag = Field(
        False, description="Scale norms over fewer channels to what they gave over all, on calibration text."
    )
    calibration: CalibrationSpec = Field(CalibrationSpec(), description="The text that parts are ranked on.")

    def problems(self) -> Problems:
        """One way of making it, of whole models, and no settings that would do nothing."""
        cuts = self.changed("shape", "search")
        ways = [key.rstrip("_") for key in self.changed("with_", "keep_experts", "dense")]
        if len(cuts) > 1:
            yield "search", "finds the shape: remove `shape`, or `search`"
        if len(ways) > 1 or (cuts and ways and ways != ["dense"]):
            yield (), f"{listed([*ways, *cuts])} exclude each other (only `dense` goes with a shape or a search)"
        if not ways and not cuts:
            yield (), "says not what to make of its teacher: give a `shape`, a `search`, `dense`, `keep_experts` or `with`"
        for key in self.changed("importance", "fit_norms") if not cuts else ():
            yield key, "belongs to a student cut by `shape` or `search`; remove it"
        for path, model in self.models().items():
            if model.quantization is not None:
                yield (*path, "quantization"), "a student cannot be made of quantised weights; load them in 16 bits (remove it)"
            for key in model.changed("device_map", "offload", "whole"):
                yield (*path, key), "a student is cut from a teacher that lies on one device as a whole; remove it"
            if model.adapter is not None:
                merged = "name the merged one (a stage with lora.merge, or `daekit merge`)"
                yield (*path, "adapter"), f"a student is made of whole models; {merged}"
        if self.search is not None and max(self.search.tokens) > self.calibration.tokens:
            more = f"{max(self.search.tokens)} tokens, but calibration.tokens is {self.calibration.tokens}"
            yield ("search", "tokens"), f"the last round wants {more}; raise that, or lower this"

    def models(self) -> dict[tuple[str | int, ...], ModelSpec]:
        """Key path -> the models that it is made from."""
        models: dict[tuple[str | int, ...], ModelSpec] = {("from",): self.from_}
        models |= {("with", index): model for index, model in enumerate(self.with_)}
        return {path: model for path, model in models.items() if model is not None}


ModelSpec.model_rebuild()  # it names StudentSpec, which classes made of it elsewhere do not know
