"""What the types of a suite cannot say: its models, benchmarks and judges checked against each other."""

from __future__ import annotations

from collections.abc import Sequence

from daekit.errors import listed, nearest
from daekit.recipe.judge import JudgeSpec, judge_problems, url_problems
from daekit.recipe.paths import check_exists, check_known, check_name, check_output_dir
from daekit.recipe.suite import (
    LIKELIHOOD,
    AlpacaEvalSpec,
    LMEvalSpec,
    MinimalPairsSpec,
    MTBenchSpec,
    MultipleChoiceSpec,
    PerplexitySpec,
    RowsSpec,
    SubjectSpec,
    SuiteSpec,
)
from daekit.recipe.tree import Path
from daekit.recipe.validation import Errors


def check_suite(
    suite: SuiteSpec, errors: Errors, others: Sequence[str] = (), path: Path = (), inherited: str | None = None
) -> None:
    """Note everything in ``suite`` that contradicts itself, refers to nothing, or cannot be measured.

    Args:
        suite: to check.
        errors: take what is wrong.
        others: models that it measures beside its own: those of the recipe that it is part of.
        path: its place in that recipe.
        inherited: the recipe's baseline, for a suite that has none.
    """
    if suite.name is not None:
        check_name(suite.name, (*path, "name"), errors, dots=True)
    if not path:
        check_output_dir(suite.output_dir or "", ("output_dir",), errors)
    if not suite.benchmarks:
        errors.add_check((*path, "benchmarks"), "must name at least one benchmark")
    for key in ("models", "benchmarks"):
        for name in getattr(suite, key) or {}:
            check_name(name, (*path, key, name), errors, dots=True)
    models = [*others, *(suite.models or {})]
    for name, subject in (suite.models or {}).items():
        if subject is not None:
            _check_subject(subject, suite, (*path, "models", name), errors)
    for name, benchmark in (suite.benchmarks or {}).items():
        where = (*path, "benchmarks", name)
        if benchmark is not None:
            _check_benchmark(benchmark, where, errors)
        if isinstance(benchmark, (MTBenchSpec, AlpacaEvalSpec)):
            _check_judge(benchmark.judge, (*where, "judge"), errors)
        if isinstance(benchmark, MTBenchSpec):
            _check_games(benchmark, models, where, errors)
    _check_judge(suite.judge, (*path, "judge"), errors)
    _check_domains(suite, path, errors)
    baseline = suite.baseline if suite.baseline is not None else inherited
    if baseline is not None and models and not (baseline == inherited and baseline not in models):
        check_known([baseline], models, "model", (*path, "baseline"), errors)


def _check_subject(subject: SubjectSpec, suite: SuiteSpec, path: Path, errors: Errors) -> None:
    if (subject.path is None) == (subject.url is None):
        errors.add_check(path, "a model needs exactly one of path and url")
    for key in ("path", "adapter"):
        check_exists(getattr(subject, key), path, errors)
    if subject.url is None:
        return
    if wrong := list(url_problems(subject.url)):
        for sentence in wrong:
            errors.add_check(path, f"its url {sentence}")
        return  # what follows quotes it
    if subject.served_model is None:
        errors.add_check(path, f"{subject.url}: say which model of the endpoint: {subject.url}#MODEL-NAME")
    asking = [key for key, each in (suite.benchmarks or {}).items() if isinstance(each, LIKELIHOOD)]
    if asking:
        message = (
            f"an endpoint cannot be asked for the likelihood of given text, which {listed(asking)} need"
            f"{'s' if len(asking) == 1 else ''}; give the model's directory, or a suite without that"
        )
        errors.add_check(path, message)


def _check_benchmark(spec: object, path: Path, errors: Errors) -> None:
    if isinstance(spec, (MinimalPairsSpec, MultipleChoiceSpec, MTBenchSpec, AlpacaEvalSpec)):
        check_exists(spec.path, (*path, "path"), errors, local=True)
    if isinstance(spec, RowsSpec):
        if spec.path is not None and not spec.path.startswith("builtin:"):
            check_exists(spec.path, (*path, "path"), errors)
        if spec.domain is not None:
            check_name(spec.domain, (*path, "domain"), errors, "domain", dots=True)
        if spec.reference is not None and spec.reference.path is None:
            errors.add_check((*path, "reference"), "the reference needs the path of a model")
    if isinstance(spec, PerplexitySpec):
        if not spec.texts:
            errors.add_check((*path, "texts"), "must name at least one text")
        for domain, text in (spec.texts or {}).items():
            check_name(domain, (*path, "texts", domain), errors, "domain", dots=True)
            check_exists(text, (*path, "texts", domain), errors, local=True)
        if spec.stride >= spec.window:
            message = f"{spec.stride} must be less than window = {spec.window}, or a token would be scored without context"
            errors.add_check((*path, "stride"), message)
    if isinstance(spec, LMEvalSpec):
        if not spec.tasks:
            errors.add_check((*path, "tasks"), "must name at least one task")
        check_exists(spec.include_path, (*path, "include_path"), errors, local=True)


def _check_judge(judge: JudgeSpec | None, path: Path, errors: Errors) -> None:
    """What contradicts itself, and prices of another judge than the one that an override names."""
    if judge is None:
        return
    for key, message in judge_problems(judge):
        errors.add_check((*path, key), message)
    nodes = {key: errors.root.find((*path, key)) for key in ("model", "base_url", "price_prompt", "price_completion")}
    said = [key for key in ("model", "base_url") if (node := nodes[key]) is not None and node.place.override is not None]
    for key in ("price_prompt", "price_completion") if said else ():
        node = nodes[key]
        if node is not None and node.value is not None and node.place.override is None:
            message = (
                f"{node.show()} is the price of the judge in the file, and {said[0]} names another; give that one's, or "
                "null if it costs nothing"
            )
            errors.add_check((*path, key), message)


def _check_games(spec: MTBenchSpec, models: list[str], path: Path, errors: Errors) -> None:
    """What a pairwise MT-Bench needs."""
    if spec.mode == "pairwise-baseline" and spec.baseline is None:
        errors.add_check((*path, "baseline"), "mode: pairwise-baseline needs the model that the others are compared with")
    if spec.mode != "pairwise-baseline" and spec.baseline is not None:
        errors.add_check((*path, "baseline"), f"mode: {spec.mode} has no baseline; leave it out, or use pairwise-baseline")
    elif spec.baseline is not None and models and spec.baseline not in models:
        errors.add_check((*path, "baseline"), f"there is no model {spec.baseline!r}{nearest(spec.baseline, models)}")
    if spec.mode != "single" and len(models) == 1:
        errors.add_check((*path, "mode"), f"{spec.mode} compares models, and there is only one")


def _check_domains(suite: SuiteSpec, path: Path, errors: Errors) -> None:
    """A domain of the report belongs to one benchmark, or to several of rows."""
    seen: dict[str, str] = {}
    for name, benchmark in (suite.benchmarks or {}).items():
        domains = list(benchmark.texts or {}) if isinstance(benchmark, PerplexitySpec) else [name]
        if isinstance(benchmark, RowsSpec):
            domains = [benchmark.domain or name]
        for domain in domains:
            before = seen.setdefault(domain, name)
            both_rows = isinstance(benchmark, RowsSpec) and isinstance(suite.benchmarks[before], RowsSpec)
            if before != name and not both_rows:
                message = (
                    f"its domain {domain!r} is also that of {before!r}, and the report could not tell them apart; rename one"
                )
                errors.add_check((*path, "benchmarks", name), message)
