"""The typed form of a recipe: what a YAML file may say. Imports neither torch nor transformers.

One file is one run of one or more stages. Every mapping of the YAML is one frozen dataclass here; a key that is not a
field is an error. Names are those of TRL, PEFT and transformers wherever the same thing has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from daekit.recipe.student_schema import CalibrationSpec, StudentSearchSpec

StageType = Literal["sft", "kd", "dae"]
Quantization = Literal["4bit", "8bit"]
Overlong = Literal["error", "truncate", "drop"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Column = Literal["messages", "prompt", "completion", "text", "answer"]

# The embedded corpora that ``path: builtin:NAME`` may name.
BUILTIN_CORPORA = ("skills", "chat", "shop")


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from: exactly one of ``path``, ``stage`` and ``config``; or an adapter on the student's base; or, for
    a student, ``init``.

    In YAML a plain string is short for ``{path: ...}``, ``stage:NAME`` for ``{stage: NAME}``, and ``{from: TEACHER, ...}``
    with the keys of ``StudentSpec`` for ``init``.

    One base, several models: a teacher, member of an ensemble or reference that is ``{adapter: A}`` and nothing else is a LoRA
    adapter of the base that the student is trained on (with ``lora`` or ``adapter``); the base is loaded once, in the student's
    dtype and quantisation. A student that is ``{adapter: A}`` goes on training that adapter (without ``lora``: rank and targets
    are its own) on the base that the stage of A had, loaded as it was there; of a directory, on ``path`` or the base it names.

    Attributes:
        path: hub id or directory (a directory that holds a LoRA adapter is loaded on its base and merged).
        stage: the result of an earlier stage of this recipe.
        config: a model made from scratch with random weights: ``model_type`` and the fields of its transformers config;
            ``vocab_size`` and special tokens are taken from the tokenizer unless given.
        dtype: the dtype that the weights are loaded in.
        adapter: ``stage:NAME`` (of an earlier LoRA stage), a directory, or, for a teacher, ``base`` (the base, adapter off).
        quantization: ``4bit`` (nf4, double quantisation) or ``8bit``, by bitsandbytes; experts too.
        device_map: of a teacher: the device that it lies on (``cuda:1``, ``1``, ``cpu``), ``auto``, or a mapping of its
            modules to devices; default: the student's device.
        offload: of a teacher: its layers stay in host memory and are brought to the student's device one by one, the next
            while one runs; the device holds two of them at most.
        init: a student made from its teacher.
    """

    path: str | None = None
    stage: str | None = None
    adapter: str | None = None
    config: dict[str, Any] | None = None
    revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization | None = None
    device_map: str | dict[str, str] | None = None
    offload: bool = False
    init: StudentSpec | None = None


@dataclass(frozen=True)
class StudentSpec:
    """A student made from its teacher, before it is trained: ``student: {from: TEACHER, ...}``.

    One of: a part of the teacher, of a given ``shape`` or found by a ``search``; a Mixtral made ``dense`` (and cut, if a
    shape or a search is given, too), or with fewer experts (``keep_experts``); a Mixtral whose experts are the teacher and
    other dense models (``with``).

    Attributes:
        from_: the teacher; ``from`` in YAML.
        with_: further Mistral models of the same shape; ``with`` in YAML. Attention and embeddings are those of ``from``.
        dense: how the experts of a layer become one MLP (``daekit.students.mixtral_to_dense``).
        keep_experts: how many experts of each layer stay.
        shape: sizes by their names in the config (``hidden_size``...); those that are left out are the teacher's.
        search: finds the shape instead.
        importance: what is kept: what counts most on calibration text (``activations``), the ``first`` or ``random`` parts.
        fit_norms: scale norms over fewer channels to what they gave over all of them, measured on calibration text.
    """

    from_: ModelSpec
    with_: tuple[ModelSpec, ...] = ()
    dense: Literal["best_expert", "average", "routed_average", "top_neurons"] | None = None
    keep_experts: int | None = None
    shape: dict[str, int] = field(default_factory=dict)
    search: StudentSearchSpec | None = None
    importance: Literal["activations", "first", "random"] = "activations"
    fit_norms: bool = False
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)


@dataclass(frozen=True)
class WeightedModelSpec:
    """A member of an ensemble: a model and its weight; the weights of an ensemble sum to 1."""

    model: ModelSpec
    weight: float


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher: a model, or an ensemble of several.

    In YAML whatever is a ModelSpec is a TeacherSpec too; an ensemble is ``{ensemble: [{model: M, weight: W}, ...],
    average: logits}``.
    """

    model: ModelSpec | None = None
    ensemble: tuple[WeightedModelSpec, ...] = ()
    average: Literal["logits", "probabilities"] = "logits"


@dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer trained on the training rows of some sources.

    Attributes:
        vocab_size: its size, special tokens included.
        sources: names of the sources to read (default: all).
        kind: ``bpe`` (byte-level) or ``words`` (one token per word, digit and punctuation mark: for small worlds).
    """

    vocab_size: int
    sources: tuple[str, ...] = ()
    kind: Literal["bpe", "words"] = "bpe"


@dataclass(frozen=True)
class TokenizerSpec:
    """Where the tokenizer comes from: a hub id, a directory or a SentencePiece/tokenizers file, or training on the data.

    In YAML a plain string is short for ``{path: ...}``. Not needed when the first student is loaded from a path.
    """

    path: str | None = None
    train: TokenizerTraining | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SourceSpec:
    """Rows of one domain.

    Attributes:
        domain: the name that decides which teacher speaks for these rows.
        path: a JSONL or Parquet file, a directory of them, a hub id, or ``builtin:NAME`` for the embedded corpora.
        split: split of a hub data set or of a builtin corpus to train on.
        name: configuration name of a hub data set.
        validation: a file, directory or ``builtin:NAME`` with the rows to evaluate on.
        validation_split: split of ``path`` to evaluate on.
        holdout: number of rows taken from the end of the (seeded) shuffled training rows, to evaluate on instead.
        limit: use at most so many training rows (the first ones).
        validation_limit: use at most so many validation rows.
        columns: our column name -> its name in the data.
        chat: make of a prompt and a completion that are strings a user's and an assistant's message, so that the tokenizer's
            chat template frames them; without it TRL joins the two strings as they are.
    """

    domain: str
    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    validation: str | None = None
    validation_split: str | None = None
    holdout: int | None = None
    limit: int | None = None
    validation_limit: int | None = None
    columns: dict[Column, str] = field(default_factory=dict)
    chat: bool = False


@dataclass(frozen=True)
class MixtureSpec:
    """What a stage trains on.

    In YAML a list of source names means all their rows; a mapping ``source: weight`` gives the *share of rows* of each. The
    long form is ``{sources: <list or mapping>, rows: N}``.

    Attributes:
        sources: names of sources.
        weights: share of rows of each source, in the order of ``sources``; empty: all rows of every source, once.
        rows: rows of one epoch of a weighted mixture. Default: the most that repeats no row of any source. A source that
            has fewer rows than its share asks for is repeated: each row is used n or n + 1 times.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...] = ()
    rows: int | None = None


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter for the student (PEFT's names). With ``student.quantization: 4bit`` this is QLoRA.

    Attributes:
        merge: fold the adapter into the (unquantised) base when the stage ends, so that its result is a plain model.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    merge: bool = False


@dataclass(frozen=True)
class LossSpec:
    """The objective of a ``kd`` or ``dae`` stage; weights are per kept token, in nats.

    Attributes:
        divergence: ``forward_kl`` KL(teacher || student), ``reverse_kl``, ``jsd``, ``skew_kl``, ``skew_reverse_kl`` or ``tv``.
        beta: the mixture weight of ``jsd``.
        skew_alpha: of ``skew_kl`` and ``skew_reverse_kl``: how much of the distribution on the left is in the mixture.
        temperature: T; the divergence is multiplied by T^2 (``tv`` is not).
        attention_weight: of KL(teacher's attention || student's), the mean over heads and layers.
        attention_layers: ``uniform`` (all layers of the student, spread over the teacher's), ``last_K`` (the last K of both),
            or pairs ``[student's layer, teacher's layer]``, counted from 0.
        attention_relation_heads: compare in so many relation heads; default: one head to one head.
        hidden_weight: of the distance between hidden states.
        hidden_loss: ``cosine`` (1 - cos) or ``mse``, through a learned projection where the widths differ.
        hidden_layers: as ``attention_layers``.
    """

    ce_weight: float = 0.0
    prediction_weight: float = 1.0
    attention_weight: float = 0.0
    hidden_weight: float = 0.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"] = "forward_kl"
    beta: float = 0.5
    skew_alpha: float = 0.1
    temperature: float = 1.0
    attention_layers: str | tuple[tuple[int, ...], ...] = "uniform"
    attention_relation_heads: int | None = None
    hidden_loss: Literal["cosine", "mse"] = "cosine"
    hidden_layers: str | tuple[tuple[int, ...], ...] = "uniform"


@dataclass(frozen=True)
class StageSpec:
    """One training run.

    Attributes:
        type: ``sft`` (cross-entropy on the data's own tokens), ``kd`` (follow one teacher on all rows) or ``dae`` (follow the
            teacher of each row's domain, and the reference elsewhere).
        student: the model to train; without path, stage and config: the result of the stage before.
        teacher: for ``kd``.
        teachers: for ``dae``: domain -> teacher.
        reference: for ``dae``: the model to follow on ``reference_domains``; default: the student as it stands, frozen.
        reference_domains: for ``dae``: domains that follow the reference.
        data: the rows.
        seed: of this stage alone (two teachers from scratch that shall differ); default: the seed of the recipe.
        overlong: what becomes of rows longer than ``trainer.max_length``: ``error``, ``truncate`` or ``drop``.
        trainer: any field of ``trl.SFTConfig`` (learning_rate, max_steps, per_device_train_batch_size, packing...).
    """

    type: StageType
    data: MixtureSpec
    student: ModelSpec | None = None
    teacher: TeacherSpec | None = None
    teachers: dict[str, TeacherSpec] = field(default_factory=dict)
    reference: TeacherSpec | None = None
    reference_domains: tuple[str, ...] = ("general",)
    lora: LoraSpec | None = None
    loss: LossSpec = field(default_factory=LossSpec)
    seed: int | None = None
    overlong: Overlong = "error"
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSpec:
    """The report that ends a run: every model x every domain with validation rows.

    Attributes:
        models: names of stages (default: every stage, in order).
        baseline: the stage that gain and forgetting are measured against.
        sources: sources whose validation rows are used (default: all that have some).
        limit: at most so many validation rows per source.
        generate: also generate answers greedily, for exact_match and answer_match.
        max_new_tokens: tokens to generate at most.
        batch_size: rows per forward pass.
        bootstrap: resamples of the interval.
        suites: suite files (see ``daekit.recipe.suite``) to measure ``models`` with when the report is written; each writes
            into ``OUTPUT_DIR/suites/NAME``. A suite without baseline takes this one.
    """

    models: tuple[str, ...] = ()
    baseline: str | None = None
    sources: tuple[str, ...] = ()
    limit: int | None = None
    generate: bool = True
    max_new_tokens: int = 64
    batch_size: int = 32
    bootstrap: int = 1000
    suites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Names of sources, stages and domains consist of letters, digits, ``_`` and ``-``: they become keys of overrides
    (``stages.NAME.lora.r=8``), folders and suffixes of metrics.

    Attributes:
        name: becomes part of model cards and reports.
        output_dir: everything the run writes is below it.
        seed: of data order, initial weights and dropout of every stage.
        sources: name -> rows of one domain.
        stages: name -> stage, in the order in which they run.
        evaluation: None: no report.
    """

    name: str
    output_dir: str
    sources: dict[str, SourceSpec]
    stages: dict[str, StageSpec]
    seed: int = 0
    tokenizer: TokenizerSpec | None = None
    evaluation: EvaluationSpec | None = None
