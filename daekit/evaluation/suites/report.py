"""What a run of a suite has found, its report, and the manifest that makes its scores repeatable."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from daekit.evaluation.evaluate import ModelEvaluation, compare, select_samples
from daekit.evaluation.judging import Judged
from daekit.evaluation.likelihood import Measured, Rows
from daekit.evaluation.suites.prepare import Prepared, Questions
from daekit.generation import Budget
from daekit.generation.local import device
from daekit.recipe.dump import to_yaml
from daekit.report import Report, Row, Sample
from daekit.report.provenance import commit, versions

_SHOWN_QUESTIONS = 8
_PER_TOKEN = ("nll", "perplexity", "token_accuracy")


@dataclass
class Results:
    """Everything that the report is made of.

    Attributes:
        evaluations: model -> its values, row by row.
        measured: (model, benchmark) -> what the benchmark found.
        judged: benchmark -> scores of its judge.
        identities: model -> what its scores depend on.
        budgets: (place, name) of a judge or an endpoint -> what it was sent so far.
    """

    evaluations: dict[str, ModelEvaluation] = field(default_factory=dict)
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    judged: dict[str, Judged] = field(default_factory=dict)
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    budgets: dict[tuple[str, str], list[Budget]] = field(default_factory=dict)


def suite_report(prepared: Prepared, results: Results) -> Report:
    """Everything that was found, for a reader."""
    suite = prepared.suite
    rows = [row for evaluation in results.evaluations.values() for row in evaluation.rows(suite.bootstrap)]
    rows += [Row(model, *row) for (model, _), measured in results.measured.items() for row in measured.rows]
    for name, judged in results.judged.items():  # the judges know their benchmark by its type
        rows += [replace(row, domain="/".join([name, *row.domain.split("/")[1:]])) for row in judged.rows]
    compared, notes = _compared(prepared, results)
    first = next(iter(prepared.models.values()))
    sets = {name: each.rows(first.tokenizer) for name, each in prepared.benchmarks.items() if isinstance(each, Rows)}
    samples = select_samples(list(results.evaluations.values()), sets)
    for questions in prepared.questions.values():
        samples += _answer_samples(prepared, questions, results)
    return Report(
        title=suite.name,
        rows=tuple(rows + compared),
        baseline=suite.baseline,
        samples=tuple(samples),
        notes=tuple(dict.fromkeys([*_notes(prepared, results), *notes])),
        versions=versions(),
        provenance={
            "commit": commit(),
            "seed": str(suite.seed),
            **{f"model {name}": json.dumps(facts, ensure_ascii=False) for name, facts in results.identities.items()},
        },
        recipe=to_yaml(suite),
    )


def manifest(prepared: Prepared, results: Results) -> str:
    """Versions, machine, models, data, settings, seeds and judges, as JSON. No credentials are in it."""
    text = to_yaml(prepared.suite)
    facts = {
        "suite": {"name": prepared.suite.name, "hash": hashlib.sha256(text.encode()).hexdigest()[:16], "yaml": text},
        "options": prepared.options.facts(),
        "versions": versions(),
        "commit": commit(),
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(device()),
            "threads": torch.get_num_threads(),
        },
        "models": results.identities,
        "data": {name: benchmark.data for name, benchmark in prepared.benchmarks.items()}
        | {name: {"questions": questions.data} for name, questions in prepared.questions.items()},
        "answers": {name: questions.how.facts() for name, questions in prepared.questions.items()},
        "judges": {name: judged.manifest for name, judged in results.judged.items()},
        "seeds": {"answers": prepared.suite.seed, "bootstrap": 0},
    }
    return json.dumps(facts, indent=1) + "\n"


def _notes(prepared: Prepared, results: Results) -> list[str]:
    """What a reader must know; a sentence that holds for all models is said once."""
    unjudged = [name for name, each in prepared.questions.items() if each.judge is None]
    notes = [f"{name}: answered, but not judged: the suite names no judge." for name in unjudged]
    for name in prepared.benchmarks:
        said: dict[str, list[str]] = {}
        for (model, benchmark), measured in results.measured.items():
            for note in measured.notes if benchmark == name else []:
                said.setdefault(note, []).append(model)
        everyone = len(results.evaluations)
        notes += [note if len(models) == everyone else f"{', '.join(models)}: {note}" for note, models in said.items()]
    for questions in prepared.questions.values():
        for name, each in prepared.models.items():
            if cut := questions.store(each, write=False).cut():
                turns = sum(len(asked.turns) for asked in questions.conversations)
                notes.append(
                    f"{questions.name}: {cut} of {turns} answers of {name} were cut at max_new_tokens = "
                    f"{questions.how.max_new_tokens}, or where the model's context ends."
                )
    return notes + [note for judged in results.judged.values() for note in judged.notes]


def _compared(prepared: Prepared, results: Results) -> tuple[list[Row], list[str]]:
    """Gain and forgetting; values per token only between models of one tokenizer."""
    suite = prepared.suite
    tokenizers = {name: facts.get("tokenizer") for name, facts in results.identities.items() if facts["kind"] == "model"}
    notes = []
    metrics = {metric for evaluation in results.evaluations.values() for _, _, metric in evaluation.values}
    if len(set(tokenizers.values())) > 1 and metrics.intersection(_PER_TOKEN):
        notes.append(
            "The models do not share a tokenizer (or its chat template): their NLL, perplexity and token accuracy are of other "
            "tokens and cannot be compared; bits per byte can."
        )
    measured = [evaluation for evaluation in results.evaluations.values() if evaluation.values]
    if suite.baseline not in [evaluation.model for evaluation in measured]:
        return [], notes
    rows = compare(measured, suite.baseline, reference_domains=suite.reference_domains, rounds=suite.bootstrap)
    base, per_token = tokenizers[suite.baseline], tuple(f"{metric}_" for metric in _PER_TOKEN)
    return [row for row in rows if tokenizers[row.model] == base or not row.metric.startswith(per_token)], notes


def _answer_samples(prepared: Prepared, questions: Questions, results: Results) -> list[Sample]:
    """The first question of each category, then further ones, up to eight, with what the judge said of each turn."""
    firsts = {each.category: each for each in reversed(questions.conversations)}.values()
    ordered = dict.fromkeys([*sorted(firsts, key=lambda each: each.id), *questions.conversations])
    judged = results.judged.get(questions.name)
    scores: dict[tuple[str, int], list[str]] = {}
    for verdict in judged.verdicts if judged is not None else []:
        if "score" in verdict:
            scores.setdefault((verdict["model"], verdict["question_id"]), []).append(str(verdict["score"]))
    stores = {name: questions.store(model, write=False) for name, model in prepared.models.items()}
    samples = []
    for conversation in list(ordered)[:_SHOWN_QUESTIONS]:
        for name, store in stores.items():
            if (record := store.records.get(conversation.id)) is not None:
                prompt, said = _turns(conversation.turns), _turns(record["choices"][0]["turns"])
                marks = " · ".join(scores.get((name, conversation.id), []))
                samples.append(Sample(name, questions.name, conversation.id, prompt, "", None, said, None, None, marks))
    return samples


def _turns(turns: Sequence[str]) -> str:
    return turns[0] if len(turns) == 1 else "\n\n".join(f"[{at}] {turn}" for at, turn in enumerate(turns, 1))
