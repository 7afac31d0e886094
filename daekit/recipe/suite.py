"""The typed form of a suite: what to measure, of which models. Imports neither torch nor transformers.

A suite is one YAML file. Its rules are those of recipes: an unknown key is an error that names the nearest, all errors of a
file are told at once, and ``key.sub=value`` lays a setting over it (``benchmarks.blimp.limit=100``,
``models.mine.dtype=bfloat16``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from daekit.recipe.judge import JudgeSpec
from daekit.recipe.schema import Column, Dtype, ModelSpec, Quantization

# What stands before a text of which every token is scored: a model says nothing about the first token of nothing.
# ``auto``: the tokenizer's BOS, or its EOS if it has none (as lm-eval does); ``none``: the first token is not scored.
Prefix = Literal["auto", "bos", "eos", "none"]


@dataclass(frozen=True)
class SubjectSpec:
    """A model to measure: a directory, a directory + adapter, a hub id, or an OpenAI-compatible endpoint.

    In YAML and for ``--model`` a plain string is short: ``PATH_OR_HUB_ID`` (a directory that holds a LoRA adapter is loaded
    on its base and merged), ``PATH+ADAPTER`` (that adapter on that base), or ``https://host/v1#model-name``.

    Attributes:
        path: hub id or directory.
        adapter: directory of a LoRA adapter to merge into ``path``.
        url: base URL of an endpoint; it can answer, but cannot be asked for the likelihood of a given text.
        served_model: the model's name at the endpoint.
        api_key_env: environment variable that holds the endpoint's key (default: OPENAI_API_KEY at OpenAI, elsewhere none).
    """

    path: str | None = None
    adapter: str | None = None
    url: str | None = None
    served_model: str | None = None
    api_key_env: str | None = None
    revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization | None = None


@dataclass(frozen=True)
class BenchmarkSpec:
    """One thing to measure; ``type`` says which of the classes below. Its key in the suite names it in the report."""


@dataclass(frozen=True)
class MinimalPairsSpec(BenchmarkSpec):
    """Pairs of sentences of which the model should find the good one likelier (BLiMP): the sums of both sentences' token
    log-probabilities are compared; a tie counts as wrong, and ties are reported.

    Metric ``accuracy``: per paradigm, and their macro average.

    Attributes:
        path: a JSONL file, or a directory of them, one per paradigm.
        good: column of the acceptable sentence.
        bad: column of the other one.
        prefix: what stands before each sentence.
        limit: the first so many pairs of each paradigm.
    """

    path: str
    type: Literal["minimal_pairs"] = "minimal_pairs"
    good: str = "sentence_good"
    bad: str = "sentence_bad"
    prefix: Prefix = "auto"
    limit: int | None = None


@dataclass(frozen=True)
class PerplexitySpec(BenchmarkSpec):
    """How well a model predicts running text, by strided windows: every token is scored once, with at least ``window -
    stride`` tokens before it (fewer only at the beginning of a document).

    Metrics ``nll`` and ``perplexity`` per token, which depend on the tokenizer, and ``bits_per_byte`` of the UTF-8 text,
    which does not. The bootstrap resamples blocks of ``block`` characters, the same blocks for every model.

    Attributes:
        texts: domain -> a text file, a directory of ``*.txt`` (one document each), or a JSONL file with one document per row.
        column: of a JSONL file.
        window: tokens that the model sees at a time, the prefix included.
        stride: by how many tokens a window is ahead of the one before.
        block: characters.
        prefix: what stands before each document.
        limit: the first so many documents of each domain.
    """

    texts: dict[str, str]
    type: Literal["perplexity"] = "perplexity"
    column: str = "text"
    window: int = 1024
    stride: int = 512
    block: int = 1000
    prefix: Prefix = "auto"
    limit: int | None = None


@dataclass(frozen=True)
class MultipleChoiceSpec(BenchmarkSpec):
    """Questions answered with the likeliest of their choices.

    Metrics ``accuracy`` (summed log-probability), ``accuracy_per_token`` and ``accuracy_per_byte`` (divided by the choice's
    tokens or bytes; lm-eval's ``acc_bytes``; its ``acc_norm`` is per character). A tie for the first place
    counts as wrong, and ties are reported.

    Attributes:
        path: a JSONL file.
        prompt: what stands before a choice; ``{name}`` is the row's column ``name``.
        choices: column with the list of choices.
        answer: column with the index of the right choice (from 0), its letter, or its text.
        separator: between prompt and choice.
        prefix: what stands before the prompt.
    """

    path: str
    type: Literal["multiple_choice"] = "multiple_choice"
    prompt: str = "{question}\nAnswer:"
    choices: str = "choices"
    answer: str = "answer"
    separator: str = " "
    prefix: Prefix = "auto"
    limit: int | None = None


@dataclass(frozen=True)
class RowsSpec(BenchmarkSpec):
    """Rows of a domain, as a recipe's validation rows: likelihood of the answers, generated answers, distance to a reference
    model.

    Metrics ``nll``, ``perplexity``, ``token_accuracy``; with ``generate`` also ``exact_match``, ``rouge_l`` and, for rows
    with a column ``answer``, ``answer_match``; with ``reference`` also ``kl_to_reference``, KL(reference || model) per token.

    Attributes:
        path: a JSONL or Parquet file, a directory, a hub id, or ``builtin:NAME``, as for a source of a recipe.
        domain: name in the report (default: the benchmark's key).
        split: of a directory, a hub data set or an embedded corpus.
        name: configuration of a hub data set.
        columns: our column name -> its name in the data.
        chat: frame prompt and completion with the tokenizer's chat template.
        reference: the model that KL is measured to, with the tokenizer of the models.
        max_length: longest row in tokens.
        overlong: what becomes of longer rows.
    """

    path: str
    type: Literal["rows"] = "rows"
    domain: str | None = None
    split: str = "validation"
    name: str | None = None
    revision: str | None = None
    columns: dict[Column, str] = field(default_factory=dict)
    chat: bool = False
    limit: int | None = None
    generate: bool = True
    max_new_tokens: int = 64
    reference: ModelSpec | None = None
    max_length: int | None = None
    overlong: Literal["error", "drop"] = "error"


@dataclass(frozen=True)
class LMEvalSpec(BenchmarkSpec):
    """Tasks of EleutherAI's lm-eval, run by lm-eval itself (``pip install lm-eval==0.4.13``).

    Attributes:
        tasks: names of tasks.
        include_path: directory of task files of your own; with ``dataset_path: json`` and local ``data_files`` they run
            offline.
    """

    tasks: tuple[str, ...]
    type: Literal["lm_eval"] = "lm_eval"
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class MTBenchSpec(BenchmarkSpec):
    """MT-Bench: 80 questions of two turns, answered and rated by a judge.

    Attributes:
        path: directory with FastChat's ``question.jsonl``, ``judge_prompts.jsonl`` and ``reference_answer/``.
        judge: who rates the answers (default: the suite's); without any, answers are only written.
        mode: ``single`` (a rating from 1 to 10), ``pairwise-baseline`` (every model against ``baseline``) or ``pairwise-all``.
        baseline: a model of the suite.
        max_new_tokens: of each turn.
        temperature: for all categories; default: FastChat's temperature per category.
        system: a system message; default: whatever the model's chat template does without one.
        chat_template_kwargs: further variables of the chat template (``enable_thinking: false``).
        limit: the first so many questions.
    """

    path: str
    type: Literal["mt_bench"] = "mt_bench"
    judge: JudgeSpec | None = None
    mode: Literal["single", "pairwise-baseline", "pairwise-all"] = "single"
    baseline: str | None = None
    max_new_tokens: int = 1024
    temperature: float | None = None
    system: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None


@dataclass(frozen=True)
class AlpacaEvalSpec(BenchmarkSpec):
    """AlpacaEval: how often an annotator prefers a model's answer to a reference answer.

    Attributes:
        path: the reference outputs, a JSON list of ``{instruction, output, generator}``; they give the instructions too.
        annotator: one of alpaca_eval's evaluator configs, or a directory that holds one.
        judge: as for ``mt_bench``: where the annotator's model is served.
        temperature: 0: greedy answers.
    """

    path: str
    type: Literal["alpaca_eval"] = "alpaca_eval"
    annotator: str = "weighted_alpaca_eval_gpt4_turbo"
    judge: JudgeSpec | None = None
    max_new_tokens: int = 2048
    temperature: float = 0.0
    system: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None


BENCHMARKS: dict[str, type[BenchmarkSpec]] = {
    "minimal_pairs": MinimalPairsSpec,
    "perplexity": PerplexitySpec,
    "multiple_choice": MultipleChoiceSpec,
    "rows": RowsSpec,
    "lm_eval": LMEvalSpec,
    "mt_bench": MTBenchSpec,
    "alpaca_eval": AlpacaEvalSpec,
}
# These ask for the likelihood of given text, which the OpenAI protocol does not offer.
LIKELIHOOD = (MinimalPairsSpec, PerplexitySpec, MultipleChoiceSpec, RowsSpec, LMEvalSpec)


@dataclass(frozen=True)
class SuiteSpec:
    """What to measure of which models.

    Attributes:
        name: becomes the report's title.
        output_dir: everything is written below it.
        benchmarks: name -> benchmark, in the order in which they run.
        models: name -> model; ``--model NAME=...`` adds to them.
        judge: of the benchmarks that name none.
        baseline: the model that gain and forgetting are measured against.
        reference_domains: domains (names of benchmarks, or of their ``texts``) where a change for the worse is forgetting;
            elsewhere a change for the better is gain.
        batch_size: rows per forward pass.
        bootstrap: resamples of the intervals.
        seed: of sampled answers.
    """

    name: str
    output_dir: str
    benchmarks: dict[str, BenchmarkSpec]
    models: dict[str, SubjectSpec] = field(default_factory=dict)
    judge: JudgeSpec | None = None
    baseline: str | None = None
    reference_domains: tuple[str, ...] = ("general",)
    batch_size: int = 32
    bootstrap: int = 1000
    seed: int = 0


def subject_of(text: str) -> SubjectSpec:
    """The model that a plain string means (see ``SubjectSpec``)."""
    if text.startswith(("http://", "https://")):
        url, _, served = text.partition("#")
        return SubjectSpec(url=url.rstrip("/"), served_model=served or None)
    base, plus, adapter = text.rpartition("+")
    if not plus or Path(text).expanduser().exists():  # a directory may have a `+` in its name
        return SubjectSpec(path=text)
    return SubjectSpec(path=base, adapter=adapter)
