"""Everything that can be known of a suite before weights are loaded: its inputs are read, its models looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from daekit.errors import UserError
from daekit.evaluation.answers import AnswerStore, HowToAnswer, require_answerable
from daekit.evaluation.judging import AlpacaEval, JudgedBenchmark, MTBench
from daekit.evaluation.likelihood import Benchmark, Rows, likelihood_benchmark
from daekit.evaluation.models import SuiteModel
from daekit.evaluation.questions import Conversation, alpaca_conversations, mt_bench_conversations
from daekit.generation import Permissions
from daekit.generation.keys import endpoint_key
from daekit.generation.local_chat import judge_tokenizer
from daekit.recipe.judge import JudgeSpec
from daekit.recipe.suite import AlpacaEvalSpec, MTBenchSpec, SuiteModelSpec, SuiteSpec


@dataclass(frozen=True)
class Options:
    """How a suite is run, beside what it measures.

    Attributes:
        dry_run: say what would be done and what the judge would cost, and do nothing.
        max_calls: to one judge or endpoint, at most; default: as the suite says.
        max_cost: dollars for one judge, at most; default: as the suite says.
        allow_missing: judgments of a model that may be missing for its score to be given nonetheless.
        score_parser: default: as the suite says.
        allowed: which keys may be sent where, beside what a suite may say.
    """

    dry_run: bool = False
    max_calls: int | None = None
    max_cost: float | None = None
    allow_missing: int = 0
    score_parser: Literal["strict", "fastchat"] | None = None
    allowed: Permissions = Permissions()

    def facts(self) -> dict[str, Any]:
        """For a file."""
        told = {key: value for key, value in vars(self).items() if key != "allowed"}
        return told | {"allow_key_env": sorted(self.allowed.key_variables), "allow_http": self.allowed.http}

    def judge(self, spec: JudgeSpec) -> JudgeSpec:
        """A judge under these options."""
        given = {key: getattr(self, key) for key in ("max_calls", "max_cost", "score_parser")}
        return spec.model_copy(update={key: value for key, value in given.items() if value is not None})


@dataclass(frozen=True)
class Questions:
    """The conversations of a benchmark that is answered and judged.

    Attributes:
        judge: None: the answers are only written.
        data: hash of the file that they come from.
    """

    name: str
    spec: MTBenchSpec | AlpacaEvalSpec
    judge: JudgeSpec | None
    conversations: list[Conversation]
    how: HowToAnswer
    data: str
    folder: Path

    @property
    def where(self) -> str:
        """How error messages begin."""
        return f"benchmarks.{self.name}"

    @property
    def judgments(self) -> Path:
        """Folder of the judge's files."""
        return self.folder / "model_judgment"

    @cached_property
    def benchmark(self) -> JudgedBenchmark:
        """What judges the answers; UserError if something that the judge is asked with is missing or damaged."""
        spec, path = self.spec, Path(self.spec.path).expanduser()
        if isinstance(spec, MTBenchSpec):
            return MTBench(path, spec.mode, spec.baseline, spec.limit)
        return AlpacaEval(path, spec.annotator, spec.limit, f"{self.where}.annotator")

    def store(self, model: SuiteModel, write: bool = True) -> AnswerStore:
        """The answers of a model; without ``write`` no file is made or mended."""
        facts = {"how": self.how.facts(), "questions": self.data, "temperature": self.spec.temperature}
        return AnswerStore(self.folder / "model_answer", model.name, facts | {"model": model.identity}, write)


@dataclass(frozen=True)
class Prepared:
    """A suite whose inputs are read and whose models are known to take them."""

    suite: SuiteSpec
    options: Options
    models: dict[str, SuiteModel]
    benchmarks: dict[str, Benchmark]
    questions: dict[str, Questions]

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.suite.output_dir)

    def with_models(self, specs: Mapping[str, SuiteModelSpec]) -> Prepared:
        """The same inputs for further models, which are looked at, before those that it has; nothing is read again.

        Raises:
            UserError: a model that is not there, or does not fit a benchmark.
        """
        models = {name: SuiteModel(name, spec) for name, spec in specs.items()}
        for model in models.values():
            if model.spec.url is None:
                model.require_there()
            else:
                endpoint_key(f"models.{model.name}", model.spec.url, model.spec.api_key_env, self.options.allowed)
            for benchmark in self.benchmarks.values():
                benchmark.check(model.name, model.tokenizer, model.context_length)
            for each in self.questions.values():
                require_answerable(model, each.conversations, each.how, each.where)
        together = models | self.models
        for name, benchmark in self.benchmarks.items():
            if isinstance(benchmark, Rows) and benchmark.spec.overlong == "drop" and together:
                _require_same_rows(name, benchmark, list(together.values()))
        suite = self.suite.model_copy(update={"models": {name: model.spec for name, model in together.items()}})
        return replace(self, suite=suite, models=together)


def prepare(suite: SuiteSpec, options: Options) -> Prepared:
    """Read the inputs and look at the models.

    Raises:
        UserError: a broken input, a model that is not there, one that does not fit a benchmark.
    """
    benchmarks: dict[str, Benchmark] = {}
    questions: dict[str, Questions] = {}
    for name, spec in suite.benchmarks.items():
        if isinstance(spec, (MTBenchSpec, AlpacaEvalSpec)):
            questions[name] = _questions(name, spec, suite, options)
        else:
            benchmarks[name] = likelihood_benchmark(name, spec)
    prepared = Prepared(suite, options, {}, benchmarks, questions).with_models(suite.models)
    for judge in dict.fromkeys(each.judge for each in questions.values() if each.judge is not None):
        if judge.base_url is not None:
            endpoint_key("judge", judge.base_url, judge.api_key_env, options.allowed)
        else:
            judge_tokenizer(judge)
    return prepared


def _require_same_rows(name: str, benchmark: Rows, models: list[SuiteModel]) -> None:
    """Models are compared row by row, and a row may be overlong for one tokenizer only."""
    first, *others = models
    left_out = benchmark.rows(first.tokenizer).left_out
    for other in others:
        if benchmark.rows(other.tokenizer).left_out != left_out:
            raise UserError(
                f"benchmarks.{name}: max_length = {benchmark.spec.max_length} leaves other rows out for models.{first.name} "
                f"and models.{other.name}, whose tokenizers differ, so that they cannot be compared. Raise max_length, or take "
                "the long rows out of the data."
            )


def _questions(name: str, spec: MTBenchSpec | AlpacaEvalSpec, suite: SuiteSpec, options: Options) -> Questions:
    where, path = f"benchmarks.{name}", Path(spec.path).expanduser()
    if isinstance(spec, MTBenchSpec):
        conversations, data = mt_bench_conversations(path / "question.jsonl", where, spec.limit, spec.temperature)
    else:
        conversations, data = alpaca_conversations(path, where, spec.limit, spec.temperature)
    judge = spec.judge or suite.judge
    how = HowToAnswer(spec.max_new_tokens, spec.system, spec.chat_template_kwargs, suite.seed)
    folder = Path(suite.output_dir) / name
    return Questions(name, spec, judge and options.judge(judge), conversations, how, data, folder)
