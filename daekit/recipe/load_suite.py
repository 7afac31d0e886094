"""A suite file -> a typed and checked SuiteSpec, or one error that names everything that is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath

from daekit.errors import UserError
from daekit.recipe.convert import convert_suite
from daekit.recipe.judge import JudgeSpec, judge_problems, url_problems
from daekit.recipe.overrides import apply_overrides
from daekit.recipe.problems import Problems, listed, nearest
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
from daekit.recipe.tree import Node, Path, Place, read_file, read_tree

# a model's name becomes a file and FastChat's model_id; a benchmark's a folder and a domain of the report
_NAME = re.compile(r"^[\w][\w.-]*$")
_NAME_RULE = "may hold letters, digits, `_`, `-` and `.` only"


def load_suite(
    path: str | FilePath, models: Mapping[str, str] | None = None, overrides: Sequence[str] = (), need_models: bool = True
) -> SuiteSpec:
    """Read a suite from a YAML file.

    Args:
        path: the file.
        models: name -> model as ``--model`` names it, added to those of the file before the overrides.
        overrides: ``key.sub=value``, laid over the file in this order.
        need_models: whether a suite without any model is an error.

    Raises:
        UserError: the file cannot be read, or something in it is wrong; the message names every error, with its line.
    """
    return load_suite_text(read_file(path, "suite"), str(path), models, overrides, need_models)


def load_suite_text(
    text: str,
    name: str,
    models: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    need_models: bool = True,
) -> SuiteSpec:
    """Like ``load_suite``, from the text of a suite; ``name`` is what errors call it."""
    root, unread = read_tree(text, name)
    problems = Problems(name, root)
    if root.value is None:
        raise UserError(f"{name}: the suite is empty")
    for wrong in unread:
        problems.add_unread(wrong.path, wrong.message, wrong.place)
    _add_models(root, models or {})
    apply_overrides(root, overrides, problems)
    suite = convert_suite(root, problems)
    if suite is not None:
        _check(suite, problems, need_models)
    problems.raise_if_any()
    assert suite is not None  # whatever keeps it from being read is a problem
    return replace(suite, output_dir=os.path.expanduser(suite.output_dir))


def parse_models(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> model of ``--model`` arguments: ``NAME=MODEL``, or ``MODEL``, whose name is its last part.

    Raises:
        UserError: a name twice, or one that may not be a name.
    """
    models: dict[str, str] = {}
    for argument in arguments:
        name, equals, model = argument.partition("=")
        if not equals or not _NAME.match(name):  # an URL or a path may hold a `=`
            last = re.split(r"[/#+]", argument.rstrip("/"))[-1]
            name, model = re.sub(r"[^\w.-]", "-", last).lstrip(".-"), argument
        if not name or not model:
            raise UserError(f"--model {argument!r} names no model; write --model NAME=PATH_OR_URL")
        if name in models:
            raise UserError(f"--model: two models are named {name!r}; give them names: --model NAME=PATH_OR_URL")
        models[name] = model
    return models


def _add_models(root: Node, models: Mapping[str, str]) -> None:
    if not models or not isinstance(root.value, dict):
        return
    below = root.value.setdefault("models", Node({}, Place()))
    if below.value is None:
        below.value = {}
    if isinstance(below.value, dict):
        below.value |= {name: Node(text, Place(override=f"--model {name}")) for name, text in models.items()}


def _check(suite: SuiteSpec, problems: Problems, need_models: bool) -> None:
    for key in ("name", "output_dir"):
        if not getattr(suite, key):
            problems.add_check((key,), "must not be empty")
    _positive(suite, ("batch_size", "bootstrap"), (), problems)
    if suite.seed < 0:
        problems.add_check(("seed",), f"{suite.seed} must not be negative")
    if not suite.benchmarks:
        problems.add_check(("benchmarks",), "must name at least one benchmark")
    if need_models and not suite.models:
        problems.add_check(("models",), "no model to measure: give --model NAME=PATH_OR_URL, or models in the suite")
    names = [(("models", name), name) for name in suite.models or {}]
    names += [(("benchmarks", name), name) for name in suite.benchmarks or {}]
    for path, name in names:
        if not _NAME.match(name):
            problems.add_check(path, f"the name {name!r} {_NAME_RULE}")
    for name, subject in (suite.models or {}).items():
        if subject is not None:
            _check_subject(name, subject, suite, problems)
    for name, benchmark in (suite.benchmarks or {}).items():
        if benchmark is not None:
            _check_benchmark(benchmark, ("benchmarks", name), problems)
        if isinstance(benchmark, (MTBenchSpec, AlpacaEvalSpec)):
            _check_judge(benchmark.judge, ("benchmarks", name, "judge"), problems)
        if isinstance(benchmark, MTBenchSpec):
            _check_games(benchmark, ("benchmarks", name), suite, problems)
    _check_judge(suite.judge, ("judge",), problems)
    _check_domains(suite, problems)
    if suite.baseline is not None and suite.models and suite.baseline not in suite.models:
        message = (
            f"there is no model {suite.baseline!r} (there are: {listed(suite.models)}){nearest(suite.baseline, suite.models)}"
        )
        problems.add_check(("baseline",), message)


def _check_subject(name: str, subject: SubjectSpec, suite: SuiteSpec, problems: Problems) -> None:
    path: Path = ("models", name)
    if (subject.path is None) == (subject.url is None):
        problems.add_check(path, "a model needs exactly one of path and url")
    for key in ("path", "adapter"):
        _must_exist(getattr(subject, key), path, problems)
    if subject.url is None:
        return
    if wrong := list(url_problems(subject.url)):
        for sentence in wrong:
            problems.add_check(path, f"its url {sentence}")
        return  # what follows quotes it
    if subject.served_model is None:
        problems.add_check(path, f"{subject.url}: say which model of the endpoint: {subject.url}#MODEL-NAME")
    asking = [key for key, each in (suite.benchmarks or {}).items() if isinstance(each, LIKELIHOOD)]
    if asking:
        message = (
            f"an endpoint cannot be asked for the likelihood of given text, which {listed(asking)} need"
            f"{'s' if len(asking) == 1 else ''}; give the model's directory, or a suite without that"
        )
        problems.add_check(path, message)


def _check_benchmark(spec: object, path: Path, problems: Problems) -> None:
    _positive(spec, ("limit", "window", "stride", "block", "max_new_tokens", "max_length"), path, problems)
    if isinstance(spec, (MinimalPairsSpec, MultipleChoiceSpec, MTBenchSpec, AlpacaEvalSpec)):
        _must_exist(spec.path, (*path, "path"), problems, local=True)
    if isinstance(spec, (MTBenchSpec, AlpacaEvalSpec)) and spec.temperature is not None and not spec.temperature >= 0:
        problems.add_check((*path, "temperature"), f"{spec.temperature} must not be negative")
    if isinstance(spec, RowsSpec) and not spec.path.startswith("builtin:"):
        _must_exist(spec.path, (*path, "path"), problems)
    if isinstance(spec, RowsSpec) and spec.reference is not None and spec.reference.path is None:
        problems.add_check((*path, "reference"), "the reference needs the path of a model")
    if isinstance(spec, PerplexitySpec):
        if not spec.texts:
            problems.add_check((*path, "texts"), "must name at least one text")
        for domain, text in spec.texts.items():
            if not _NAME.match(domain):
                problems.add_check((*path, "texts", domain), f"the domain {domain!r} {_NAME_RULE}")
            _must_exist(text, (*path, "texts", domain), problems, local=True)
        if spec.stride >= spec.window:
            message = f"{spec.stride} must be less than window = {spec.window}, or a token would be scored without context"
            problems.add_check((*path, "stride"), message)
    if isinstance(spec, LMEvalSpec):
        if not spec.tasks:
            problems.add_check((*path, "tasks"), "must name at least one task")
        _must_exist(spec.include_path, (*path, "include_path"), problems, local=True)


def _check_judge(judge: JudgeSpec | None, path: Path, problems: Problems) -> None:
    for key, message in [] if judge is None else judge_problems(judge):
        problems.add_check((*path, key), message)


def _check_games(spec: MTBenchSpec, path: Path, suite: SuiteSpec, problems: Problems) -> None:
    """What a pairwise MT-Bench needs."""
    if spec.mode == "pairwise-baseline" and spec.baseline is None:
        problems.add_check((*path, "baseline"), "mode: pairwise-baseline needs the model that the others are compared with")
    if spec.mode != "pairwise-baseline" and spec.baseline is not None:
        problems.add_check((*path, "baseline"), f"mode: {spec.mode} has no baseline; leave it out, or use pairwise-baseline")
    elif spec.baseline is not None and suite.models and spec.baseline not in suite.models:
        problems.add_check((*path, "baseline"), f"there is no model {spec.baseline!r}{nearest(spec.baseline, suite.models)}")
    if spec.mode != "single" and len(suite.models or {}) == 1:
        problems.add_check((*path, "mode"), f"{spec.mode} compares models, and there is only one")


def _check_domains(suite: SuiteSpec, problems: Problems) -> None:
    """A domain of the report belongs to one benchmark, or to several of rows."""
    seen: dict[str, str] = {}
    for name, benchmark in (suite.benchmarks or {}).items():
        domains = benchmark.texts if isinstance(benchmark, PerplexitySpec) else [name]
        if isinstance(benchmark, RowsSpec):
            domains = [benchmark.domain or name]
        for domain in domains:
            before = seen.setdefault(domain, name)
            both_rows = isinstance(benchmark, RowsSpec) and isinstance(suite.benchmarks[before], RowsSpec)
            if before != name and not both_rows:
                message = (
                    f"its domain {domain!r} is also that of {before!r}, and the report could not tell them apart; rename one"
                )
                problems.add_check(("benchmarks", name), message)


def _positive(spec: object, keys: Sequence[str], path: Path, problems: Problems) -> None:
    for key, value in vars(spec).items():
        if key in keys and value is not None and value <= 0:
            problems.add_check((*path, key), f"{value} must be greater than 0")


def _must_exist(value: str | None, path: Path, problems: Problems, local: bool = False) -> None:
    """Unless ``local``, what looks like a hub id may be one."""
    if value is None:
        return
    local = (
        local or value.startswith((".", "/", "~")) or value.count("/") > 1 or value.endswith((".json", ".jsonl", ".parquet"))
    )
    if local and not FilePath(value).expanduser().exists():
        key = ".".join(map(str, path))
        problems.add_check(path, f"{value!r} does not exist; correct it, or set it on the command line: {key}=...")
