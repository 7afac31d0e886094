"""The typed form of a suite: what to measure, of which models. Imports neither torch nor transformers.

A suite is one YAML file. Its rules are those of recipes: an unknown key is an error that names the nearest, all errors of a
file are told at once, and ``key.sub=value`` lays a setting over it (``benchmarks.blimp.limit=100``,
``models.mine.dtype=bfloat16``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from daekit.errors import listed, nearest
from daekit.recipe.judge import JudgeSpec, url_problems
from daekit.recipe.model import LoadingSpec, ModelSpec
from daekit.recipe.reading import ByType, Choice, FilePath, Flag, Free, Number, Seed, Spec, Text, Whole
from daekit.recipe.validation import Problems, bad_name, missing, missing_rows, unknown

Column = Literal["messages", "prompt", "completion", "text", "answer"]
# What stands before a text of which every token is scored: a model says nothing about the first token of nothing.
# ``auto``: the tokenizer's BOS, or its EOS if it has none (as lm-eval does); ``none``: the first token is not scored.
Prefix = Literal["auto", "bos", "eos", "none"]


class ServedModelSpec(Spec):
    """The keys of a model that is asked over HTTP."""

    url: Text | None = Field(
        None, description="Base URL of an OpenAI-compatible endpoint; it tells no likelihood of given text."
    )
    served_model: Text | None = Field(None, description="The model's name at the endpoint.")
    api_key_env: Text | None = Field(
        None,
        description="Environment variable that holds the endpoint's key (default: OPENAI_API_KEY at OpenAI's own hosts, "
        "elsewhere none).",
    )


class SuiteModelSpec(ServedModelSpec, LoadingSpec):
    """A model to measure: a directory, a directory + adapter, a hub id, or an OpenAI-compatible endpoint.

    In YAML and for ``--model`` a plain text is short: ``PATH_OR_HUB_ID`` (a directory that holds a LoRA adapter is loaded
    on its base and merged), ``PATH+ADAPTER`` (that adapter on that base), or ``https://host/v1#model-name``.
    """

    NOUN: ClassVar = "a path or a mapping"

    path: Text | None = Field(None, description="Hub id or directory.")
    adapter: Text | None = Field(None, description="Directory of a LoRA adapter to merge into `path`.")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """See the class."""
        if not isinstance(value, str):
            return value
        if value.startswith(("http://", "https://")):
            url, _, served = value.partition("#")
            return {"url": url.rstrip("/")} | ({"served_model": served} if served else {})
        base, plus, adapter = value.rpartition("+")
        if not plus or os.path.exists(os.path.expanduser(value)):  # a directory may have a `+` in its name
            return {"path": value}
        return {"path": base, "adapter": adapter}

    def problems(self) -> Problems:
        """Neither a directory nor an endpoint, or one that nobody can reach."""
        if (self.path is None) == (self.url is None):
            yield (), "a model needs exactly one of path and url"
        for path in (self.path, self.adapter):
            yield from missing((), path)
        if self.url is not None and (wrong := list(url_problems(self.url))):
            yield (), f"its url {'; it '.join(wrong)}"
        elif self.url is not None and self.served_model is None:
            yield (), f"{self.url}: say which model of the endpoint: {self.url}#MODEL-NAME"


_PREFIX: Any = Field("auto", description="What stands before each text: BOS, or EOS if there is none (auto), bos, eos, none.")
_LIMIT = Field(None, gt=0, description="The first so many.")
_CHAT = Field(False, description="Frame prompt and completion with the tokenizer's chat template.")
_SYSTEM = Field(None, description="A system message; default: whatever the model's chat template does without one.")
_TEMPLATE: Any = Field({}, description="Further variables of the chat template (`enable_thinking: false`).")
_JUDGE = Field(None, description="Who rates the answers (default: the suite's); without any, answers are only written.")
OptionalLimit: TypeAlias = Whole | None


class BenchmarkSpec(Spec):
    """One thing to measure; ``type`` says which of the classes below. Its key in the suite names it in the report."""

    type: str


class _OfFilesSpec(BenchmarkSpec):
    path: Text

    def problems(self) -> Problems:
        """Files that are not there."""
        yield from missing("path", self.path, local=True)


class MinimalPairsSpec(_OfFilesSpec):
    """Pairs of sentences of which the model should find the good one likelier (BLiMP): the sums of both sentences' token
    log-probabilities are compared; a tie counts as wrong, and ties are reported.

    Metric ``accuracy``: per paradigm, and their macro average.
    """

    type: Annotated[Literal["minimal_pairs"], Choice] = "minimal_pairs"
    path: Text = Field(description="A JSONL file, or a directory of them, one per paradigm.")
    good: Text = Field("sentence_good", description="Column of the acceptable sentence.")
    bad: Text = Field("sentence_bad", description="Column of the other one.")
    prefix: Annotated[Prefix, Choice] = _PREFIX
    limit: OptionalLimit = Field(None, gt=0, description="The first so many pairs of each paradigm.")


class PerplexitySpec(BenchmarkSpec):
    """How well a model predicts running text, by strided windows: every token is scored once, with at least ``window -
    stride`` tokens before it (fewer only at the beginning of a document).

    Metrics ``nll`` and ``perplexity`` per token, which depend on the tokenizer, and ``bits_per_byte`` of the UTF-8 text,
    which does not. The bootstrap resamples blocks of ``block`` characters, the same blocks for every model.
    """

    type: Annotated[Literal["perplexity"], Choice] = "perplexity"
    texts: dict[str, Text] = Field(
        min_length=1,
        description="Domain -> a text file, a directory of *.txt (one document each), or a JSONL file with a document per row.",
    )
    column: Text = Field("text", description="Of a JSONL file.")
    window: Whole = Field(1024, gt=0, description="Tokens that the model sees at a time, the prefix included.")
    stride: Whole = Field(512, gt=0, description="By how many tokens a window is ahead of the one before.")
    block: Whole = Field(1000, gt=0, description="Characters that the bootstrap takes together.")
    prefix: Annotated[Prefix, Choice] = _PREFIX
    limit: OptionalLimit = Field(None, gt=0, description="The first so many documents of each domain.")

    def problems(self) -> Problems:
        """Texts that are not there, and windows that leave tokens without context."""
        for domain, text in (self.texts or {}).items():
            yield from bad_name(("texts", domain), domain, "domain", dots=True)
            yield from missing(("texts", domain), text, local=True)
        if self.stride >= self.window:
            yield "stride", f"{self.stride} must be less than window = {self.window}, or a token would be without context"


class MultipleChoiceSpec(_OfFilesSpec):
    """Questions answered with the likeliest of their choices.

    Metrics ``accuracy`` (summed log-probability), ``accuracy_per_token`` and ``accuracy_per_byte`` (divided by the choice's
    tokens or bytes; lm-eval's ``acc_bytes``; its ``acc_norm`` is per character). A tie for the first place
    counts as wrong, and ties are reported.
    """

    type: Annotated[Literal["multiple_choice"], Choice] = "multiple_choice"
    path: Text = Field(description="A JSONL file.")
    prompt: Text = Field("{question}\nAnswer:", description="What stands before a choice; {name} is the row's column `name`.")
    choices: Text = Field("choices", description="Column with the list of choices.")
    answer: Text = Field("answer", description="Column with the index of the right choice (from 0), its letter, or its text.")
    separator: Text = Field(" ", description="Between prompt and choice.")
    prefix: Annotated[Prefix, Choice] = _PREFIX
    limit: OptionalLimit = _LIMIT


class RowsSpec(BenchmarkSpec):
    """Rows of a domain, as a recipe's validation rows: likelihood of the answers, generated answers, distance to a reference
    model.

    Metrics ``nll``, ``perplexity``, ``token_accuracy``; with ``generate`` also ``exact_match``, ``rouge_l`` and, for rows
    with a column ``answer``, ``answer_match``; with ``reference`` also ``kl_to_reference``, KL(reference || model) per token.
    """

    type: Annotated[Literal["rows"], Choice] = "rows"
    path: Text = Field(description="A JSONL or Parquet file, a directory, a hub id, or builtin:NAME, as in a recipe.")
    domain: Text | None = Field(None, description="Name in the report (default: the benchmark's key).")
    split: Text = Field("validation", description="Split of a directory, a hub data set or an embedded corpus.")
    name: Text | None = Field(None, description="Configuration of a hub data set.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub data set.")
    columns: dict[Annotated[Column, Choice], Text] = Field({}, description="Our column name -> its name in the data.")
    chat: Flag = _CHAT
    limit: OptionalLimit = _LIMIT
    generate: Flag = Field(True, description="Generate answers, too.")
    max_new_tokens: Whole = Field(64, gt=0, description="Tokens to generate at most.")
    reference: ModelSpec | None = Field(None, description="The model that KL is measured to, with the tokenizer of the models.")
    max_length: OptionalLimit = Field(None, gt=0, description="Longest row in tokens.")
    overlong: Annotated[Literal["error", "drop"], Choice] = Field("error", description="What becomes of longer rows.")

    def problems(self) -> Problems:
        """Rows or a reference that are not there."""
        yield from missing_rows("path", self.path)
        yield from bad_name("domain", self.domain, "domain", dots=True)
        if self.reference is not None and self.reference.path is None:
            yield "reference", "the reference needs the path of a model"


class LMEvalSpec(BenchmarkSpec):
    """Tasks of EleutherAI's lm-eval, run by lm-eval itself (``pip install lm-eval==0.4.13``)."""

    type: Annotated[Literal["lm_eval"], Choice] = "lm_eval"
    tasks: tuple[Text, ...] = Field(min_length=1, description="Names of tasks.")
    include_path: Text | None = Field(
        None,
        description="Directory of task files of your own; with `dataset_path: json` and local `data_files` they run offline.",
    )
    num_fewshot: Whole | None = Field(None, ge=0, description="Examples before each question; default: the task's own.")
    limit: OptionalLimit = _LIMIT
    apply_chat_template: Flag = Field(False, description="Ask with the tokenizer's chat template.")

    def problems(self) -> Problems:
        """Files that are not there."""
        yield from missing("include_path", self.include_path, local=True)


class MTBenchSpec(_OfFilesSpec):
    """MT-Bench: 80 questions of two turns, answered and rated by a judge."""

    type: Annotated[Literal["mt_bench"], Choice] = "mt_bench"
    path: Text = Field(description="Directory with FastChat's question.jsonl, judge_prompts.jsonl and reference_answer/.")
    judge: JudgeSpec | None = _JUDGE
    mode: Annotated[Literal["single", "pairwise-baseline", "pairwise-all"], Choice] = Field(
        "single",
        description="single (a rating from 1 to 10), pairwise-baseline (every model against `baseline`) or pairwise-all.",
    )
    baseline: Text | None = Field(None, description="A model of the suite.")
    max_new_tokens: Whole = Field(1024, gt=0, description="Of each turn.")
    temperature: Number | None = Field(None, ge=0, description="For all categories; default: FastChat's per category.")
    system: Text | None = _SYSTEM
    chat_template_kwargs: Free = _TEMPLATE
    limit: OptionalLimit = _LIMIT

    def problems(self) -> Problems:
        """Files that are not there, and a baseline where there is none, or none where there must be one."""
        yield from super().problems()
        if self.mode == "pairwise-baseline" and self.baseline is None:
            yield "baseline", "mode: pairwise-baseline needs the model that the others are compared with"
        if self.mode != "pairwise-baseline" and self.baseline is not None:
            yield "baseline", f"mode: {self.mode} has no baseline; leave it out, or use pairwise-baseline"


class AlpacaEvalSpec(_OfFilesSpec):
    """AlpacaEval: how often an annotator prefers a model's answer to a reference answer."""

    type: Annotated[Literal["alpaca_eval"], Choice] = "alpaca_eval"
    path: Text = Field(description="Reference outputs: a JSON list of {instruction, output, generator}.")
    annotator: Text = Field(
        "weighted_alpaca_eval_gpt4_turbo", description="One of alpaca_eval's configs, or a directory with one."
    )
    judge: JudgeSpec | None = _JUDGE
    max_new_tokens: Whole = Field(2048, gt=0, description="Of each answer.")
    temperature: Number = Field(0.0, ge=0, description="0: greedy answers.")
    system: Text | None = _SYSTEM
    chat_template_kwargs: Free = _TEMPLATE
    limit: OptionalLimit = _LIMIT


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


class SuiteSpec(Spec):
    """What to measure of which models."""

    name: Text = Field(min_length=1, description="Becomes the report's title, and, in a recipe, a folder.")
    output_dir: FilePath = Field(min_length=1, description="Everything is written below it.")
    benchmarks: dict[str, Annotated[BenchmarkSpec, ByType(BENCHMARKS)]] = Field(
        min_length=1, description="Name -> benchmark, in the order in which they run."
    )
    models: dict[str, SuiteModelSpec] = Field({}, description="Name -> model; --model NAME=... adds to them.")
    judge: JudgeSpec | None = Field(None, description="Of the benchmarks that name none.")
    baseline: Text | None = Field(None, description="The model that gain and forgetting are measured against.")
    reference_domains: tuple[Text, ...] = Field(
        ("general",),
        description="Domains (names of benchmarks, or of their `texts`) where a change for the worse is forgetting; elsewhere "
        "a change for the better is gain.",
    )
    batch_size: Whole = Field(32, gt=0, description="Rows per forward pass.")
    bootstrap: Whole = Field(1000, gt=0, description="Resamples of the intervals.")
    seed: Seed = Field(0, description="Of sampled answers.")

    def contradictions(self, others: Sequence[str] = (), inherited: str | None = None) -> Problems:
        """Everything that refers to nothing, or cannot be measured.

        Args:
            others: models that it measures beside its own: those of the recipe that it is part of.
            inherited: the recipe's baseline, for a suite that has none.
        """
        yield from bad_name("name", self.name, dots=True)
        own, benchmarks = self.models or {}, self.benchmarks or {}
        for key in ("models", "benchmarks"):
            for name in getattr(self, key) or {}:
                yield from bad_name((key, name), name, dots=True)
        models = [*others, *own]
        for name in [name for name in own if name in others][:1]:
            yield ("models", name), f"the recipe has a model {name!r}, too; rename one of them"
        asking = [key for key, each in benchmarks.items() if isinstance(each, LIKELIHOOD)]
        for name in [name for name, model in own.items() if model is not None and model.url is not None and asking]:
            need = f"{listed(asking)} need{'s' if len(asking) == 1 else ''}"
            yield ("models", name), f"an endpoint cannot be asked for the likelihood of given text, which {need}"
        for name, each in benchmarks.items():
            path = each.reference and each.reference.path if isinstance(each, RowsSpec) else None
            if path in models:
                yield ("benchmarks", name, "reference"), f"{path!r} is a name of `models`; write the path that it has there"
            if isinstance(each, MTBenchSpec) and each.baseline is not None and models and each.baseline not in models:
                yield ("benchmarks", name, "baseline"), f"there is no model {each.baseline!r}{nearest(each.baseline, models)}"
            if isinstance(each, MTBenchSpec) and each.mode != "single" and len(models) == 1:
                yield ("benchmarks", name, "mode"), f"{each.mode} compares models, and there is only one"
        baseline = self.baseline if self.baseline is not None else inherited
        if baseline is not None and models and not (baseline == inherited and baseline not in models):
            yield from unknown("baseline", [baseline], models, "model")
        seen: dict[str, str] = {}
        for name, each in benchmarks.items():
            own_name = [each.domain or name] if isinstance(each, RowsSpec) else [name]
            for domain in list(each.texts or {}) if isinstance(each, PerplexitySpec) else own_name:
                before = seen.setdefault(domain, name)
                if before != name and not (isinstance(each, RowsSpec) and isinstance(benchmarks[before], RowsSpec)):
                    yield ("benchmarks", name), f"its domain {domain!r} is also that of {before!r}; rename one of them"
        if self.changed("reference_domains"):
            yield from unknown("reference_domains", self.reference_domains, seen, "domain")
