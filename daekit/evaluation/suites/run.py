"""Runs a prepared suite: every model on every benchmark, then the judge, then the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from daekit.errors import UserError
from daekit.evaluation.answers import answer_all, answer_by_client, endpoint_of, open_conversations
from daekit.evaluation.evaluate import ModelEvaluation
from daekit.evaluation.evaluated import EvaluatedModel
from daekit.evaluation.judging import (
    estimate_alpaca_eval,
    estimate_mt_bench,
    judge_alpaca_eval,
    judge_mt_bench,
)
from daekit.evaluation.suites.keep import load_measured, save_measured
from daekit.evaluation.suites.prepare import Options, Prepared, Questions, prepare
from daekit.evaluation.suites.report import manifest, suite_report
from daekit.evaluation.suites.results import Results
from daekit.files import write_whole
from daekit.generation import ChatClient, Estimate
from daekit.progress import Progress, ProgressFunction
from daekit.recipe.dump import suite_to_yaml
from daekit.recipe.judge import JudgeSpec
from daekit.recipe.suite import MTBenchSpec, SuiteSpec
from daekit.report import Report, write_report
from daekit.report.provenance import versions


def run_suite(suite: SuiteSpec, options: Options = Options()) -> Report | None:  # noqa: B008 (frozen)
    """Measure every model of a suite and write the report into its ``output_dir``.

    What was measured, answered or judged before is kept; a run that was stopped goes on. A refused suite writes nothing.

    Returns:
        The report; None for a dry run.

    Raises:
        UserError: see ``prepare``; the output directory holds another suite; a score is withheld because judgments are missing
            (everything else is written first).
    """
    prepared = prepare(suite, options)
    if options.dry_run:
        _say_what_would_be_done(prepared)
        return None
    _require_own_folder(prepared)
    for questions in prepared.questions.values():
        _estimate(prepared, questions)  # a judge that cannot be asked is found out before hours of answers
    _claim(prepared)
    results = Results()
    for evaluated in prepared.models.values():
        results.identities[evaluated.name] = evaluated.identity()
        results.evaluations[evaluated.name] = ModelEvaluation(evaluated.name)
        _measure(prepared, evaluated, results)
        _answer(prepared, evaluated, results)
        if (weights := evaluated.weights_fingerprint()) is not None:
            results.identities[evaluated.name]["weights"] = weights
        evaluated.free()
    for questions in prepared.questions.values():
        _judge(prepared, questions, results)
    report = suite_report(prepared, results)
    write_report(prepared.folder, report)
    write_whole(prepared.folder / "manifest.json", manifest(prepared, results))
    refusals = [sentence for judged in results.judged.values() for sentence in judged.refusals]
    if refusals:
        raise UserError("\n".join([f"scores are withheld (all else is in {prepared.folder / 'report.html'}):", *refusals]))
    return report


def _measure(prepared: Prepared, evaluated: EvaluatedModel, results: Results) -> None:
    """All likelihood benchmarks of one model."""
    evaluation = results.evaluations[evaluated.name]
    for name, benchmark in prepared.benchmarks.items():
        path = prepared.folder / name / "results" / f"{evaluated.name}.json"
        key = {
            "benchmark": prepared.suite.benchmarks[name].model_dump(mode="json"),
            "data": benchmark.data,
            "model": results.identities[evaluated.name],
            "batch_size": prepared.suite.batch_size,
            "versions": versions(("daekit", "torch", "transformers")),
        }
        measured = load_measured(path, key)
        if measured is not None:
            print(f"[{evaluated.name}] {name}: measured before, kept", flush=True)
        else:
            start = time.perf_counter()
            progress = Progress(f"[{evaluated.name}] {name}", "rows")
            measured = benchmark.measure(evaluated.model(), evaluated.tokenizer, prepared.suite.batch_size, progress)
            progress.close()
            save_measured(path, key, measured)
            print(f"[{evaluated.name}] {name}: measured in {time.perf_counter() - start:.1f} s", flush=True)
        evaluation.values.update(measured.values)
        evaluation.generated.update(measured.generated)
        results.measured[evaluated.name, name] = measured


def _answer(prepared: Prepared, evaluated: EvaluatedModel, results: Results) -> None:
    """All questions, to one model."""
    for questions in prepared.questions.values():
        store, how = questions.store(evaluated), questions.how
        missing = open_conversations(questions.conversations, store)
        progress = Progress(f"[{evaluated.name}] {questions.name}", "answers")
        if evaluated.is_endpoint and missing:
            spec = endpoint_of(evaluated, how, prepared.options.max_calls)
            folder = questions.folder / "calls" / evaluated.name
            with _client(prepared, results, spec, folder, f"models.{evaluated.name}", progress) as client:
                answer_by_client(client, missing, how, store, questions.where)
        elif missing:
            answer_all(
                evaluated,
                questions.conversations,
                how,
                store,
                batch_size=prepared.suite.batch_size,
                where=questions.where,
                progress=progress,
            )
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
        results.notes.append(f"{questions.name}: answered, but not judged: the suite names no judge.")
        return
    spec, answers = questions.spec, _answers(prepared, questions, write=True)
    common: dict[str, Any] = {
        "allow_missing": prepared.options.allow_missing,
        "limit": spec.limit,
        "bootstrap": prepared.suite.bootstrap,
    }
    path = Path(spec.path).expanduser()
    progress = Progress(f"[judge] {questions.name}", "judgments")
    with _client(prepared, results, questions.judge, questions.judgments, "judge", progress) as client:
        if isinstance(spec, MTBenchSpec):
            results.judged[questions.name] = judge_mt_bench(
                client, path, answers, questions.judgments, mode=spec.mode, baseline=spec.baseline, **common
            )
        else:
            outputs = _outputs(questions, answers)
            results.judged[questions.name] = judge_alpaca_eval(
                client, spec.annotator, path, outputs, questions.judgments, **common
            )
    progress.close()


def _answers(prepared: Prepared, questions: Questions, write: bool) -> dict[str, list[dict[str, Any]]]:
    """Model -> its records, in the order of the questions; those of models whose answers are all there."""
    found = {}
    for name, evaluated in prepared.models.items():
        store = questions.store(evaluated, write)
        if not open_conversations(questions.conversations, store):
            found[name] = [store.records[each.id] for each in questions.conversations]
    return found


def _outputs(questions: Questions, answers: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Model -> what alpaca_eval calls its outputs."""
    turns = {each.id: each.turns[0] for each in questions.conversations}
    return {
        model: [
            {"instruction": turns[record["question_id"]], "output": record["choices"][0]["turns"][0], "generator": model}
            for record in records
        ]
        for model, records in answers.items()
    }


def _say_what_would_be_done(prepared: Prepared) -> None:
    for name, evaluated in prepared.models.items():
        print(f"{name}: {evaluated.spec.url or evaluated.spec.path}")
        for benchmark in prepared.benchmarks:
            print(f"  {benchmark}: {type(prepared.suite.benchmarks[benchmark]).__name__.removesuffix('Spec')}")
        for questions in prepared.questions.values():
            missing = open_conversations(questions.conversations, questions.store(evaluated, write=False))
            print(f"  {questions.name}: {len(missing)} of {len(questions.conversations)} questions to answer")
    for questions in prepared.questions.values():
        estimate = _estimate(prepared, questions)
        print(f"{questions.name}: " + ("no judge" if estimate is None else f"the judge would get {estimate}"))


def _estimate(prepared: Prepared, questions: Questions) -> Estimate | None:
    if questions.judge is None:
        return None
    spec, path, models = questions.spec, Path(questions.spec.path).expanduser(), list(prepared.models)
    there = _answers(prepared, questions, write=False)
    whole = len(there) == len(models)
    if isinstance(spec, MTBenchSpec):
        return estimate_mt_bench(
            questions.judge,
            path,
            models,
            questions.judgments,
            answers=there if whole else None,
            mode=spec.mode,
            baseline=spec.baseline,
            limit=spec.limit,
        )
    outputs = _outputs(questions, there) if whole else None
    return estimate_alpaca_eval(
        questions.judge, spec.annotator, path, models, questions.judgments, outputs=outputs, limit=spec.limit
    )


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
        write_whole(prepared.folder / "suite.yaml", suite_to_yaml(prepared.suite))
    except OSError as error:
        raise UserError(
            f"output_dir={prepared.suite.output_dir}: cannot be written ({error.strerror}); choose another"
        ) from error
