"""Runs a prepared suite: every model on every benchmark, then the judge, then the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from daekit.errors import UserError
from daekit.evaluation.answers import answer_all, answer_by_client, endpoint_of
from daekit.evaluation.evaluate import ModelEvaluation
from daekit.evaluation.likelihood import Measured
from daekit.evaluation.models import SuiteModel
from daekit.evaluation.suites.prepare import Options, Prepared, Questions, prepare
from daekit.evaluation.suites.report import Results, manifest, suite_report
from daekit.files import write_whole
from daekit.generation import ChatClient, Estimate
from daekit.generation.caller import require_answering
from daekit.generation.endpoint import Unreached
from daekit.generation.keys import is_loopback
from daekit.progress import Progress, ProgressFunction
from daekit.recipe.dump import to_yaml
from daekit.recipe.judge import JudgeSpec
from daekit.recipe.suite import AlpacaEvalSpec, SuiteSpec
from daekit.report import Report, write_report
from daekit.report.provenance import versions


def run_suite(suite: SuiteSpec, options: Options = Options()) -> Report | None:
    """Measure every model of a suite and write the report into its ``output_dir``; a refused suite writes nothing.

    Returns:
        The report; None for a dry run.

    Raises:
        UserError: see ``prepare`` and ``run_prepared``.
    """
    prepared = prepare(suite, options)
    if options.dry_run:
        _say_what_would_be_done(prepared)
        return None
    return run_prepared(prepared)


def run_prepared(prepared: Prepared) -> Report:
    """Measure every model of a prepared suite. What was measured, answered or judged before is kept; a stopped run goes on.

    Raises:
        UserError: the output directory holds another suite; see ``require_askable``; a score is withheld because judgments are
            missing (everything else is written first).
    """
    _require_own_folder(prepared)
    require_askable(prepared)
    _claim(prepared)
    results = Results()
    for name, model in prepared.models.items():
        results.identities[name] = dict(model.identity)
        results.evaluations[name] = ModelEvaluation(name)
        _measure(prepared, model, results)
        _answer(prepared, model, results)
        if (weights := model.weights_fingerprint()) is not None:
            results.identities[name]["weights"] = weights
        model.free()
    for questions in prepared.questions.values():
        _judge(prepared, questions, results)
    report = suite_report(prepared, results)
    write_report(prepared.folder, report)
    write_whole(prepared.folder / "manifest.json", manifest(prepared, results))
    refusals = [sentence for judged in results.judged.values() for sentence in judged.refusals]
    if refusals:
        raise UserError("\n".join([f"scores are withheld (all else is in {prepared.folder / 'report.html'}):", *refusals]))
    return report


def require_askable(prepared: Prepared, models_to_come: bool = False) -> list[str]:
    """Whether judges and models that are served can be asked: before hours of answers (or of training) each is asked once.

    One whose answers are all kept is not.

    Args:
        models_to_come: whether further models will be measured, whose answers are to be judged. Then a judge on this machine
            need not run yet.

    Returns:
        Notes on such judges.

    Raises:
        UserError: data of a benchmark that a judge cannot be asked about; see ``require_answering``.
    """
    servers: dict[tuple[str, str | None], tuple[str, JudgeSpec]] = {}
    for questions in prepared.questions.values():
        if questions.judge is None:
            continue
        if models_to_come:
            _ = questions.benchmark  # what a judge is asked with, beside answers that are not there yet
        elif not _estimate(prepared, questions, questions.judge).calls:
            continue
        if questions.judge.base_url is not None:
            where = "judge" if questions.spec.judge is None else f"{questions.where}.judge"
            servers.setdefault((questions.judge.endpoint, questions.judge.api_key_env), (where, questions.judge))
    for name, model in prepared.models.items():
        for questions in prepared.questions.values() if model.is_endpoint else ():
            if questions.store(model, write=False).missing(questions.conversations):
                spec = endpoint_of(model, questions.how, None)
                servers.setdefault((spec.endpoint, spec.api_key_env), (f"models.{name}", spec))
    notes = []
    for where, spec in servers.values():
        try:
            require_answering(where, spec, prepared.options.allowed)
        except Unreached as error:
            if not (models_to_come and is_loopback(spec.endpoint)):
                raise
            notes.append(f"{error} It is asked when the training is over.")  # it may be started on the device that trains now
    return notes


def _measure(prepared: Prepared, model: SuiteModel, results: Results) -> None:
    """All likelihood benchmarks of one model."""
    for name in prepared.benchmarks:
        measured = _measured(prepared, model, name, results.identities[model.name])
        results.evaluations[model.name].values.update(measured.values)
        results.evaluations[model.name].generated.update(measured.generated)
        results.measured[model.name, name] = measured


def _measured(prepared: Prepared, model: SuiteModel, name: str, identity: Mapping[str, Any]) -> Measured:
    """One likelihood benchmark of one model."""
    benchmark, batch_size = prepared.benchmarks[name], prepared.suite.batch_size
    key = {
        "benchmark": prepared.suite.benchmarks[name].model_dump(mode="json"),
        "data": benchmark.data,
        "model": identity,
        "batch_size": batch_size,
        "versions": versions(("daekit", "torch", "transformers")),
    }
    path = prepared.folder / name / "results" / f"{model.name}.json"

    def measure(progress: Progress) -> Measured:
        return benchmark.measure(model.model(), model.tokenizer, batch_size, progress)

    return Measured.once(path, key, f"[{model.name}] {name}", measure)


def _answer(prepared: Prepared, model: SuiteModel, results: Results) -> None:
    """All questions, to one model."""
    for questions in prepared.questions.values():
        store, how, where = questions.store(model), questions.how, questions.where
        missing = store.missing(questions.conversations)
        progress = Progress(f"[{model.name}] {questions.name}", "answers")
        if model.is_endpoint and missing:
            spec = endpoint_of(model, how, prepared.options.max_calls)
            folder = questions.folder / "calls" / model.name
            with _client(prepared, results, spec, folder, f"models.{model.name}", progress) as client:
                answer_by_client(client, missing, how, store, where)
        elif missing:
            size = prepared.suite.batch_size
            answer_all(model, questions.conversations, how, store, batch_size=size, where=where, progress=progress)
        progress.close()


def _client(
    prepared: Prepared, results: Results, spec: JudgeSpec, folder: Path, role: str, progress: ProgressFunction | None
) -> ChatClient:
    """A client whose limits hold for all that its endpoint was sent in this run."""
    before = results.budgets.setdefault((spec.endpoint, spec.name), [])
    client = ChatClient(spec, folder, role=role, before=before, allowed=prepared.options.allowed, progress=progress)
    before.append(client.budget)
    return client


def _judge(prepared: Prepared, questions: Questions, results: Results) -> None:
    """The answers of all models to one benchmark's questions."""
    if questions.judge is None:
        return
    answers, folder = _answers(prepared, questions, write=True), questions.judgments
    rounds, missing = prepared.suite.bootstrap, prepared.options.allow_missing
    progress = Progress(f"[judge] {questions.name}", "judgments")
    with _client(prepared, results, questions.judge, folder, "judge", progress) as client:
        judged = questions.benchmark.judge(client, answers, folder, allow_missing=missing, bootstrap=rounds)
    results.judged[questions.name] = judged
    progress.close()


def _answers(prepared: Prepared, questions: Questions, write: bool) -> dict[str, list[dict[str, Any]]]:
    """Model -> its answers as they are judged, in the order of the questions; of models whose answers are all there."""
    found = {}
    for name, model in prepared.models.items():
        store = questions.store(model, write)
        if store.missing(questions.conversations):
            continue
        found[name] = [store.records[each.id] for each in questions.conversations]
        if isinstance(questions.spec, AlpacaEvalSpec):
            asked_and_said = zip(questions.conversations, found[name], strict=True)
            found[name] = [
                {"instruction": each.turns[0], "output": record["choices"][0]["turns"][0]} for each, record in asked_and_said
            ]
    return found


def _estimate(prepared: Prepared, questions: Questions, judge: JudgeSpec) -> Estimate:
    models, there = list(prepared.models), _answers(prepared, questions, write=False)
    answers = there if len(there) == len(models) else None
    return questions.benchmark.estimate(judge, models, questions.judgments, answers)


def _say_what_would_be_done(prepared: Prepared) -> None:
    for name, model in prepared.models.items():
        print(f"{name}: {model.spec.url or model.spec.path}")
        for benchmark in prepared.benchmarks:
            print(f"  {benchmark}: {type(prepared.suite.benchmarks[benchmark]).__name__.removesuffix('Spec')}")
        for questions in prepared.questions.values():
            missing = questions.store(model, write=False).missing(questions.conversations)
            print(f"  {questions.name}: {len(missing)} of {len(questions.conversations)} questions to answer")
    for questions in prepared.questions.values():
        judge = questions.judge
        said = "no judge" if judge is None else f"the judge would get {_estimate(prepared, questions, judge)}"
        print(f"{questions.name}: {said}")


def _require_own_folder(prepared: Prepared) -> None:
    """Raise a UserError if another suite lies in the output directory."""
    path = prepared.folder / "suite.yaml"
    if not path.is_file():
        return
    try:
        theirs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); delete it, or choose another output_dir") from None
    name = theirs.get("name") if isinstance(theirs, dict) else None
    if name != prepared.suite.name:
        raise UserError(
            f"output_dir={prepared.suite.output_dir}: holds the suite {name!r}, not {prepared.suite.name!r}. Choose another, "
            "or delete it."
        )


def _claim(prepared: Prepared) -> None:
    """Write the suite into the output directory."""
    try:
        write_whole(prepared.folder / "suite.yaml", to_yaml(prepared.suite))
    except OSError as error:
        raise UserError(
            f"output_dir={prepared.suite.output_dir}: cannot be written ({error.strerror}); choose another"
        ) from error
