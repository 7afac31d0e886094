"""Runs a prepared suite: every model on every benchmark, then the judge, then the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from daekit.errors import UserError
from daekit.evaluation.answers import answer_all, open_conversations
from daekit.evaluation.evaluate import ModelEvaluation
from daekit.evaluation.judging import (
    Budget,
    Engine,
    Estimate,
    Judged,
    estimate_alpaca_eval,
    estimate_mt_bench,
    judge_alpaca_eval,
    judge_mt_bench,
)
from daekit.evaluation.likelihood import Measured
from daekit.evaluation.subjects import Subject
from daekit.evaluation.suites.keep import load_measured, save_measured, write_whole
from daekit.evaluation.suites.prepare import Options, Prepared, Questions, prepare
from daekit.evaluation.suites.report import manifest, suite_report
from daekit.recipe.dump import suite_to_yaml
from daekit.recipe.suite import MTBenchSpec, SuiteSpec
from daekit.report import Report, write_report
from daekit.report.provenance import versions


@dataclass
class Found:
    """What a run has found so far."""

    evaluations: dict[str, ModelEvaluation] = field(default_factory=dict)
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    judged: dict[str, Judged] = field(default_factory=dict)
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    budgets: dict[tuple[str, str], list[Budget]] = field(default_factory=dict)
    """(place, name) of a judge or an endpoint -> what it was sent so far."""


def run_suite(suite: SuiteSpec, options: Options = Options()) -> Report | None:  # noqa: B008 (frozen)
    """Measure every model of a suite and write the report into its ``output_dir``.

    What was measured, answered or judged before is kept; a run that was stopped goes on.

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
    for questions in prepared.questions.values():
        _estimate(prepared, questions)  # a judge that cannot be asked is found out before hours of answers
    _claim(prepared)
    found = Found()
    for subject in prepared.subjects.values():
        found.identities[subject.name] = subject.identity()
        found.evaluations[subject.name] = ModelEvaluation(subject.name)
        _measure(prepared, subject, found)
        _answer(prepared, subject, found)
        if (weights := subject.weights_fingerprint()) is not None:
            found.identities[subject.name]["weights"] = weights
        subject.free()
    for questions in prepared.questions.values():
        _judge(prepared, questions, found)
    report = suite_report(prepared, found)
    write_report(prepared.folder, report)
    write_whole(prepared.folder / "manifest.json", manifest(prepared, found))
    refusals = [sentence for judged in found.judged.values() for sentence in judged.refusals]
    if refusals:
        raise UserError("\n".join([f"scores are withheld (all else is in {prepared.folder / 'report.html'}):", *refusals]))
    return report


def _measure(prepared: Prepared, subject: Subject, found: Found) -> None:
    """All likelihood benchmarks of one model."""
    evaluation = found.evaluations[subject.name]
    for name, benchmark in prepared.benchmarks.items():
        path = prepared.folder / name / "results" / f"{subject.name}.json"
        key = {
            "benchmark": prepared.suite.benchmarks[name].model_dump(mode="json"),
            "data": benchmark.data,
            "model": found.identities[subject.name],
            "batch_size": prepared.suite.batch_size,
            "versions": versions(("daekit", "torch", "transformers")),
        }
        measured = load_measured(path, key)
        if measured is not None:
            print(f"[{subject.name}] {name}: measured before, kept", flush=True)
        else:
            start = time.perf_counter()
            measured = benchmark.measure(subject.model(), subject.tokenizer, prepared.suite.batch_size)
            save_measured(path, key, measured)
            print(f"[{subject.name}] {name}: measured in {time.perf_counter() - start:.1f} s", flush=True)
        evaluation.values.update(measured.values)
        evaluation.generated.update(measured.generated)
        found.measured[subject.name, name] = measured


def _answer(prepared: Prepared, subject: Subject, found: Found) -> None:
    """All questions, to one model."""
    for questions in prepared.questions.values():
        answer_all(
            subject,
            questions.conversations,
            questions.how,
            questions.store(subject),
            batch_size=prepared.suite.batch_size,
            where=questions.where,
            calls=questions.folder / "calls" / subject.name,
            max_calls=prepared.options.max_calls,
            budgets=found.budgets.setdefault((str(subject.spec.url), str(subject.spec.served_model)), []),
        )


def _judge(prepared: Prepared, questions: Questions, found: Found) -> None:
    """The answers of all models to one benchmark's questions."""
    if questions.judge is None:
        found.notes.append(f"{questions.name}: answered, but not judged: the suite names no judge.")
        return
    spec, answers = questions.spec, _answers(prepared, questions)
    common: dict[str, Any] = {
        "allow_missing": prepared.options.allow_missing,
        "limit": spec.limit,
        "bootstrap": prepared.suite.bootstrap,
    }
    path = Path(spec.path).expanduser()
    before = found.budgets.setdefault((questions.judge.endpoint, questions.judge.name), [])
    with Engine(questions.judge, questions.judgments, before=before) as engine:
        before.append(engine.budget)
        if isinstance(spec, MTBenchSpec):
            found.judged[questions.name] = judge_mt_bench(
                engine, path, answers, questions.judgments, mode=spec.mode, baseline=spec.baseline, **common
            )
        else:
            outputs = _outputs(questions, answers)
            found.judged[questions.name] = judge_alpaca_eval(
                engine, spec.annotator, path, outputs, questions.judgments, **common
            )


def _answers(prepared: Prepared, questions: Questions) -> dict[str, list[dict[str, Any]]]:
    """Model -> its records, in the order of the questions; those of models whose answers are all there."""
    found = {}
    for name, subject in prepared.subjects.items():
        store = questions.store(subject)
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
    for name, subject in prepared.subjects.items():
        print(f"{name}: {subject.spec.url or subject.spec.path}")
        for benchmark in prepared.benchmarks:
            print(f"  {benchmark}: {type(prepared.suite.benchmarks[benchmark]).__name__.removesuffix('Spec')}")
        for questions in prepared.questions.values():
            missing = open_conversations(questions.conversations, questions.store(subject))
            print(f"  {questions.name}: {len(missing)} of {len(questions.conversations)} questions to answer")
    for questions in prepared.questions.values():
        estimate = _estimate(prepared, questions)
        print(f"{questions.name}: " + ("no judge" if estimate is None else f"the judge would get {estimate}"))


def _estimate(prepared: Prepared, questions: Questions) -> Estimate | None:
    if questions.judge is None:
        return None
    spec, path, models = questions.spec, Path(questions.spec.path).expanduser(), list(prepared.subjects)
    there = _answers(prepared, questions)
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


def _claim(prepared: Prepared) -> None:
    """Write the suite into the output directory, unless another one lies there."""
    path = prepared.folder / "suite.yaml"
    if path.is_file():
        theirs = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = theirs.get("name") if isinstance(theirs, dict) else None
        if name != prepared.suite.name:
            raise UserError(
                f"output_dir={prepared.suite.output_dir}: holds the suite {name!r}, not {prepared.suite.name!r}. Choose "
                f"another, or delete it."
            )
    try:
        write_whole(path, suite_to_yaml(prepared.suite))
    except OSError as error:
        raise UserError(
            f"output_dir={prepared.suite.output_dir}: cannot be written ({error.strerror}); choose another"
        ) from error
