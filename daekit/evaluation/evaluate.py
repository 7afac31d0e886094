"""Models on every evaluation set, row by row: likelihood, generated answers, distance to teachers; and what was gained on the
domains and forgotten elsewhere, measured on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.data.tokenize import TokenizedRow
from daekit.errors import UserError
from daekit.evaluation.intervals import SEED, RowValues, paired_interval
from daekit.evaluation.matching import answer_match, exact_match, rouge_l
from daekit.evaluation.sets import EvaluationSet
from daekit.generation.local import generate
from daekit.models.scoring import RowScores, score_rows
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.models.vocabulary import vocabulary_size
from daekit.progress import ProgressFunction
from daekit.protocol import Teacher
from daekit.recipe.schema import EvaluationSpec
from daekit.report.contents import Row, Sample
from daekit.report.metrics import METRICS

Key = tuple[str, str, str]  # domain, source, metric


@dataclass(frozen=True)
class ModelEvaluation:
    """What was measured of one model, row by row, so that models can be compared on the same rows.

    Attributes:
        values: (domain, source, metric) -> values of the source's rows, in their order.
        generated: source -> the text generated for each row that has a prompt.
    """

    model: str
    values: dict[Key, RowValues] = field(default_factory=dict)
    generated: dict[str, list[str]] = field(default_factory=dict)

    def by_domain(self) -> dict[tuple[str, str, str], RowValues]:
        """(domain, label, metric) -> values. The label is the domain for all its sources together and, if it has
        several, ``domain/source`` for each."""
        sources: dict[str, set[str]] = {}
        parts: dict[tuple[str, str], list[RowValues]] = {}
        for (domain, source, metric), values in self.values.items():
            sources.setdefault(domain, set()).add(source)
            parts.setdefault((domain, metric), []).append(values)
        found = {(domain, domain, metric): RowValues.pooled(each) for (domain, metric), each in parts.items()}
        for (domain, source, metric), values in self.values.items():
            if len(sources[domain]) > 1:
                found[domain, f"{domain}/{source}", metric] = values
        return found

    def rows(self, rounds: int) -> list[Row]:
        """One report row per label and metric, with 95 % intervals from ``rounds`` resamples."""
        rows = []
        for (_, label, metric), values in self.by_domain().items():
            row = values.row(self.model, label, metric, rounds)
            rows.append(row)
            if metric == "nll":  # exp is monotonic: the interval's ends carry over exactly
                value, low, high = map(exponential, (row.value, row.low, row.high))
                rows.append(replace(row, metric="perplexity", value=value, low=low, high=high))
        return rows


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, EvaluationSet],
    *,
    spec: EvaluationSpec,
    teachers: Mapping[str, PreTrainedModel | Teacher] | None = None,
    reference: PreTrainedModel | Teacher | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ModelEvaluation:
    """Measure ``model`` on every set.

    Args:
        name: name of the model in the report.
        model: a causal language model, or a PEFT model around one, on the device that it is to run on.
        sets: source name -> its tokenised validation rows.
        spec: ``generate``, ``max_new_tokens`` and ``batch_size`` are read.
        teachers: domain -> the teacher that KL is measured to; domains without one have no ``kl_to_teacher``.
        reference: what ``kl_to_reference`` is measured to on every domain: how far the model went from there.
        progress: called with what is being measured and (rows done, all of them), now and then.
    """

    def shown(source: str, what: str) -> ProgressFunction | None:
        return progress and partial(progress, f"{source}, {what}")

    evaluation = ModelEvaluation(name)
    for source, evaluation_set in sets.items():
        domain, rows = evaluation_set.domain, evaluation_set.rows
        score = partial(score_rows, model, vocab_size=vocabulary_size(tokenizer), batch_size=spec.batch_size, domain=domain)
        found = _likelihood(score, rows, (teachers or {}).get(domain), reference, partial(shown, source))
        answered = [row for row in rows if row.prompt_ids is not None] if spec.generate else []
        if answered:
            prompts, tell = [row.prompt_ids or [] for row in answered], shown(source, "answers")
            answers = generate(
                model, tokenizer, prompts, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size, progress=tell
            )
            texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
            evaluation.generated[source] = texts
            found |= _matches(answered, texts)
        evaluation.values.update({(domain, source, metric): values for metric, values in found.items()})
    return evaluation


def exponential(value: float) -> float:
    """``exp``, and infinity where it would overflow."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _likelihood(
    score: Callable[..., RowScores],
    rows: Sequence[TokenizedRow],
    teacher: PreTrainedModel | Teacher | None,
    reference: PreTrainedModel | Teacher | None,
    shown: Callable[[str], ProgressFunction | None],
) -> dict[str, RowValues]:
    told = [
        {"input_ids": row.input_ids, "labels": row.labels, TEACHER_PROMPT_IDS: row.teacher_prompt_ids or []} for row in rows
    ]
    # how far the model went from the reference is asked about the same tokens, whatever a teacher is told beside
    untold = [row | {TEACHER_PROMPT_IDS: []} for row in told]
    if teacher is None and reference is not None:  # the model itself runs once
        scores = score(untold, teacher=reference, progress=shown("likelihood"))
        distances = {"kl_to_reference": scores.kl_R}
    else:
        scores = score(told, teacher=teacher, progress=shown("likelihood"))
        distances = {"kl_to_teacher": scores.kl_R}
        if reference is not None:
            same = reference is teacher and told == untold
            again = scores if same else score(untold, teacher=reference, progress=shown("reference"))
            distances["kl_to_reference"] = again.kl_R
    sums = {"nll": scores.nll_R, "token_accuracy": scores.correct_R.astype(np.float64), **distances}
    tokens_R = scores.tokens_R.astype(np.float64)
    return {metric: RowValues(sum_R, tokens_R) for metric, sum_R in sums.items() if sum_R is not None}


def _matches(rows: Sequence[TokenizedRow], texts: Sequence[str]) -> dict[str, RowValues]:
    pairs = list(zip(rows, texts, strict=True))
    values = {
        "exact_match": RowValues.of([exact_match(text, row.reference) for row, text in pairs]),
        "rouge_l": RowValues.of([rouge_l(text, row.reference) for row, text in pairs]),
    }
    found = [answer_match(text, row.answer) for row, text in pairs if row.answer is not None]
    return values | {"answer_match": RowValues.of(found)} if found else values


# ---- several models --------------------------------------------------------------------------------------------------


def compare(
    evaluations: Sequence[ModelEvaluation], baseline: str, *, reference_domains: Sequence[str], rounds: int
) -> list[Row]:
    """``<metric>_gain`` on the domains and ``<metric>_forgetting`` on ``reference_domains``, of every model but the baseline.

    A gain is positive where the model is better than the baseline, forgetting is positive where it is worse. Intervals are
    paired: both models are resampled on the same rows.

    Raises:
        UserError: ``baseline`` is none of the models.
    """
    by_name = {evaluation.model: evaluation for evaluation in evaluations}
    if baseline not in by_name:
        raise UserError(
            f"evaluation.baseline is {baseline!r}, which was not evaluated: name one of {', '.join(by_name)} or leave it out."
        )
    theirs = by_name.pop(baseline).by_domain()
    rows = []
    for name, evaluation in by_name.items():
        for (domain, label, metric), values in evaluation.by_domain().items():
            if metric not in METRICS or not METRICS[metric].compared:
                continue
            base = theirs[domain, label, metric]
            forgetting = domain in reference_domains
            # what counts as more: better for a gain, worse for forgetting
            higher_is_better = METRICS[metric].most is not None
            more, less = (values, base) if higher_is_better != forgetting else (base, values)
            low, high = paired_interval(more, less, rounds, SEED)
            kind = "forgetting" if forgetting else "gain"
            rows.append(Row(name, label, f"{metric}_{kind}", more.mean - less.mean, low, high, len(values.total_R)))
    return rows


def select_samples(
    evaluations: Sequence[ModelEvaluation], sets: Mapping[str, EvaluationSet], *, first: int = 5, mismatches: int = 20
) -> list[Sample]:
    """Answers to show side by side: of each set the ``first`` rows, and rows that some model did not answer with the reference.

    Of the latter at most ``mismatches``, those first on which the models differ. Every model's answer to a chosen row is shown.
    """
    samples = []
    for source, evaluation_set in sets.items():
        texts = {e.model: e.generated[source] for e in evaluations if source in e.generated}
        answered = [(index, row) for index, row in enumerate(evaluation_set.rows) if row.prompt_ids is not None]
        several = sum(other.domain == evaluation_set.domain for other in sets.values()) > 1
        label = f"{evaluation_set.domain}/{source}" if several else evaluation_set.domain
        for at in _chosen([row for _, row in answered], list(texts.values()), first, mismatches):
            index, row = answered[at]
            for model, generated in texts.items():
                text = generated[at]
                found = None if row.answer is None else answer_match(text, row.answer)
                shown = (row.prompt, row.reference, row.answer, text, exact_match(text, row.reference), found)
                samples.append(Sample(model, label, index, *shown))
    return samples


def _chosen(rows: Sequence[TokenizedRow], texts: Sequence[Sequence[str]], first: int, mismatches: int) -> list[int]:
    def hits(at: int) -> int:
        return sum(exact_match(generated[at], rows[at].reference) for generated in texts)

    missed = [at for at in range(first, len(rows)) if hits(at) < len(texts)]
    missed.sort(key=lambda at: hits(at) == 0)  # stable: rows on which the models differ come first
    return [*range(min(first, len(rows))), *sorted(missed[:mismatches])]
